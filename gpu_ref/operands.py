"""Packed tensors as the exact kernels take them: the structure ``Matrix`` of ``operands.cuh``, member by member.

What a kernel reads of a data type (numerators, digits) are tables made from the ``DataType``, so that a new one needs
no change in a kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec, booth_digits, fixed_point_digits
from termwise.algorithms.datatypes import DataType, common_unit
from termwise.algorithms.errors import InputError
from termwise.algorithms.operands import booth_bits
from termwise.algorithms.outlier_victim import PairCoder
from termwise.algorithms.quantize import INPUT_SCALES, QuantizedTensor
from termwise.algorithms.reference import term_bases

CODES = 256
NO_LEVEL = -(1 << 31)
NUMERATORS = 512
MOST_TERMS = 4
_SCALE_KINDS = {"bitmod": 0, "fp16": 1, "e8m0": 2, "e4m3": 3}


class Matrix(ctypes.Structure):
    """Packed weights or activations; see ``operands.cuh``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "selectors", "zero_points", "scales", "numerators")),
        *((name, ctypes.c_void_p) for name in ("fraction_bits", "booth", "channel_scales", "faults")),
        *((name, ctypes.c_int64) for name in ("code_row_bytes", "selector_row_bytes")),
        *((name, ctypes.c_int32) for name in ("rows", "columns", "group_size", "groups", "bits", "selector_bits")),
        *((name, ctypes.c_int32) for name in ("matrix_type", "scale_kind", "identifier", "channel_step")),
    ]


@dataclass(kw_only=True)
class Operands:
    """A ``matrix`` whose pointers are into ``tensors`` on one device."""

    matrix: Matrix
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def check(self, tensor: QuantizedTensor) -> None:
        """Raises ``InputError`` where a kernel met a code that is no level; waits for the kernel."""
        if int(self.tensors["faults"].cpu()[0]):
            raise InputError(f"a code of the {tensor.format.name} tensor is no level; expected codes of a quantizer")


def on_device(values: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array as a tensor of ``device``; its memory is that of the array on the CPU."""
    values = np.ascontiguousarray(values)
    if values.dtype in (np.uint16, np.uint32):  # torch has few operations on these; the bits are what counts
        values = values.view(values.dtype.name.removeprefix("u"))
    if not values.flags.writeable:
        values = values.copy()
    return torch.from_numpy(values).to(device)


def operands(tensor: QuantizedTensor, device: torch.device) -> Operands:
    """The operands of ``tensor`` on ``device``.

    Raises ``InputError`` for what is not computed as groups of numerators: FP16 weights, GOBO's dictionary, groups
    along the outputs, and input scales.
    """
    format, parts = tensor.format, tensor.parts
    if format.family in ("fp16", "gobo"):
        raise InputError(f"{format.name} weights have no numerators under a scale; expected another format")
    if format.groups_along_outputs:
        raise InputError(f"the groups of {format.name} lie along the outputs; expected groups along the inputs")
    if INPUT_SCALES in parts:
        raise InputError("the tensor has input scales; expected them to be multiplied into the activations first")
    rows, columns = tensor.shape
    types: Sequence[DataType] = format.datatypes
    identifier = -1
    if format.family == "olive":
        coder = tensor.coder
        assert isinstance(coder, PairCoder)
        types, identifier = (coder.normal, coder.outlier), coder.identifier
    asymmetric = format.family == "int-asym"
    if asymmetric:
        types = ()  # code - zero point
    scales = "fp16"
    if format.family == "bitmod":
        scales = "bitmod"
    elif format.family in ("type", "int"):
        scales = format.scale_type
    numerators, fractions = _tables(types, pairs=format.family == "olive")
    arrays: dict[str, NDArray[Any]] = {
        "codes": parts["codes"].astype(np.uint8, copy=False),
        "scales": parts["group_scales" if scales == "bitmod" else "scales"],
        "numerators": numerators,
        "fraction_bits": fractions,
        "booth": np.array([datatype.integer for datatype in types] or [True], dtype=np.int32),
        "faults": np.zeros(1, dtype=np.int32),
    }
    for name in ("selectors", "zero_points"):
        if name in parts:
            arrays[name] = parts[name].astype(np.uint8, copy=False)
    if scales == "bitmod":
        arrays["channel_scales"] = parts["channel_scales"].astype(np.float32, copy=False)
    elif scales == "e4m3":
        arrays["channel_scales"] = parts["tensor_scale"].astype(np.float32, copy=False)
    arrays["scales"] = arrays["scales"].view(np.uint16) if scales == "fp16" else arrays["scales"].astype(np.uint8)
    tensors = {name: on_device(values, device) for name, values in arrays.items()}
    group_size = format.group_size or columns + (columns % 2 if identifier >= 0 else 0)
    matrix = Matrix(
        **{name: held.data_ptr() for name, held in tensors.items()},
        code_row_bytes=arrays["codes"].shape[1],
        selector_row_bytes=arrays["selectors"].shape[1] if "selectors" in arrays else 0,
        rows=rows,
        columns=columns,
        group_size=group_size,
        groups=format.groups(columns),
        bits=format.weight_bits,
        selector_bits=format.selector_bits,
        matrix_type=0 if identifier >= 0 or "matrix_type" not in parts else int(parts["matrix_type"][0].astype(int)),
        scale_kind=_SCALE_KINDS[scales],
        identifier=identifier,
        channel_step=int(scales == "bitmod"),
    )
    return Operands(matrix=matrix, tensors=tensors)


def _tables(types: Sequence[DataType], *, pairs: bool) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Numerators by type and code, int32 [types, CODES], and fraction bits, int32 [types], without what is common.

    The numerators of pairs, whose fraction has no bits, are the values themselves.
    """
    numerators = np.full((max(len(types), 1), CODES), NO_LEVEL, dtype=np.int32)
    fractions = np.zeros(max(len(types), 1), dtype=np.int32)
    for index, datatype in enumerate(types):
        unit = 1 << datatype.fraction_bits if pairs else common_unit((datatype,))
        fractions[index] = 0 if pairs else datatype.fraction_bits - (unit.bit_length() - 1)
        for code, numerator in enumerate(datatype.numerators):
            if numerator is not None:
                numerators[index, code] = numerator // unit
    return numerators, fractions


def digit_tables(spec: BitSerialSpec, tensor: QuantizedTensor) -> tuple[NDArray[np.int8], list[tuple[int, ...]]]:
    """Digits of every numerator of the tensor's types, int8 [2, NUMERATORS, MOST_TERMS], and the bases of both tables.

    A digit is 0 or ± (1 + its power of two); table 1 is that of integers, whose digits are Booth's.
    """
    format = tensor.format
    bits = booth_bits(format)
    tables = np.zeros((2, NUMERATORS, MOST_TERMS), dtype=np.int8)
    entries: list[tuple[int, int]] = []  # table, numerator
    if format.family == "int-asym":
        entries = [(1, number) for number in range(1 - (1 << format.weight_bits), 1 << format.weight_bits)]
    else:
        for datatype in format.datatypes:
            unit = common_unit((datatype,))
            entries += [(int(datatype.integer), number // unit) for number in datatype.sorted_numerators]
    for table, number in entries:
        found = booth_digits(number, bits) if table else fixed_point_digits(number, spec.fixed_point_bits)
        for term, digit in enumerate(found):
            if digit:
                tables[table, number + NUMERATORS // 2, term] = abs(digit).bit_length() * (1 if digit > 0 else -1)
    return tables, [term_bases(False, 0), term_bases(True, bits)]
