"""BitMoD's and OliVe's quantizers by the kernels of ``quantizers.cu``: packed bytes equal to those of ``quantize``.

What takes time runs on the device; what a matrix has few of (scales of channels, the choice of OliVe's normal type,
BitMoD's groups that are too close to be told apart in FP64) is computed on the CPU, by the functions of ``algorithms``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from termwise.algorithms import bit_serial, outlier_victim
from termwise.algorithms.datatypes import DataType
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format, get_format, packed_row_bytes
from termwise.algorithms.grid import (
    UNDECIDED,
    Grid,
    Tables,
    Weights,
    choose,
    row_blocks,
    settle_exactly,
)
from termwise.algorithms.integer import grid_tables
from termwise.algorithms.outlier_victim import PairCoder
from termwise.algorithms.quantize import QuantizedTensor, check_weights
from termwise.algorithms.scale_search import candidate_factors, positive_levels, runs_of
from termwise.gpu_ref.launch import check_device, launch
from termwise.gpu_ref.operands import on_device

FAMILIES = ("bitmod", "olive")
_WARPS = 4
_LANES = 32
_THREADS = 128
_MOST_CANDIDATES = 128
_DOUBLE = ctypes.c_double


class GroupArguments(ctypes.Structure):
    """As in ``quantizers.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "levels", "divisors", "chosen", "largest", "units")),
        ("multiples", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("columns", "group_size", "groups", "types", "level_count", "most")),
    ]


class EncodeArguments(ctypes.Structure):
    """As in ``quantizers.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "scales", "chosen", "thresholds", "ties_up")),
        *((name, ctypes.c_void_p) for name in ("code_of_rank", "outlier_levels", "outlier_codes", "packed")),
        *((name, ctypes.c_int64) for name in ("rows", "row_bytes")),
        *((name, ctypes.c_int32) for name in ("columns", "group_size", "groups", "ranks", "bits", "outlier_count")),
        ("units", _DOUBLE),
    ]


class SearchArguments(ctypes.Structure):
    """As in ``quantizers.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "factors", "runs", "outlier_levels", "outlier_codes")),
        *((name, ctypes.c_void_p) for name in ("reach", "scales", "errors")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("columns", "group_size", "groups", "candidates", "run_count")),
        ("outlier_count", ctypes.c_int32),
        ("per_unit", _DOUBLE),
    ]


def quantize(
    weights: Weights, format: Format | str, *, name: str = "weights", device: str | torch.device = "cpu"
) -> QuantizedTensor:
    """As ``termwise.algorithms.quantize.quantize``, byte for byte, on ``device``: a GPU, or the CPU by the twins.

    Args:
        weights: float16 or float32 [outputs, inputs].
        format: of BitMoD or OliVe, with groups along the inputs.
        name: of the tensor, for messages.
        device: a GPU, or ``cpu``.

    Raises ``InputError`` as ``quantize`` does, and for other formats and devices; ``MissingToolError``.
    """
    format = get_format(format) if isinstance(format, str) else format
    device = torch.device(device)
    check_device(device)
    authors = format.family == "bitmod" and format.option("compat") == bit_serial.AUTHORS
    if format.family not in FAMILIES or format.groups_along_outputs or authors:
        raise InputError(
            f"there is no kernel that quantizes to {format.name}; expected BitMoD's own selection or OliVe, "
            "groups along the inputs"
        )
    check_weights(weights, name)
    try:
        return _quantize(weights, format, _Kernels(device))
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _quantize(weights: Weights, format: Format, kernels: _Kernels) -> QuantizedTensor:
    outputs, inputs = weights.shape
    coder: Grid | PairCoder
    if format.family == "bitmod":
        parts = bit_serial.fit(weights, format, kernels.choose, kernels.settle)
        coder = bit_serial.coder(parts, format, inputs)
    else:
        parts = outlier_victim.fit(weights, format, kernels.reach, kernels.search)
        coder = outlier_victim.coder(parts, format, inputs)
    codes = np.empty((outputs, packed_row_bytes(inputs, format.weight_bits)), dtype=np.uint8)
    for rows, block in row_blocks(weights):
        codes[rows] = kernels.encode(coder, block, rows, format.weight_bits)
    return QuantizedTensor(format=format, shape=(outputs, inputs), parts={"codes": codes, **parts})


class _Kernels:
    """The functions of ``grid``, ``outlier_victim`` and ``scale_search`` that a quantizer spends its time in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block: NDArray[np.float32] | None = None
        self._held: torch.Tensor | None = None

    def _weights(self, block: NDArray[np.float32]) -> torch.Tensor:
        """The block on the device; of one that is used again, the same tensor."""
        if self._block is not block or self._held is None:
            self._block, self._held = block, on_device(block, self._device)
        return self._held

    def _to(self, values: NDArray[Any]) -> torch.Tensor:
        return on_device(values, self._device)

    def _groups(
        self, block: NDArray[np.float32], group_size: int, datatypes: Sequence[DataType], **tensors: torch.Tensor
    ) -> tuple[GroupArguments, list[torch.Tensor]]:
        """Arguments of the kernels of a group, and what must live until they have run."""
        levels, divisors = _level_tables(tuple(datatypes))
        held = [self._weights(block), self._to(levels), self._to(divisors)]
        arguments = GroupArguments(
            *(tensor.data_ptr() for tensor in held),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            rows=block.shape[0],
            columns=block.shape[1],
            group_size=group_size,
            groups=-(-block.shape[1] // group_size),
            types=levels.shape[0],
            level_count=levels.shape[1],
        )
        return arguments, held

    def _start(self, kernel: str, arguments: GroupArguments) -> None:
        blocks = -(-arguments.rows * arguments.groups // _WARPS)
        launch("quantizers", kernel, arguments, (blocks,), (_WARPS * _LANES,), self._device)

    def choose(
        self,
        block: NDArray[np.float32],
        group_size: int,
        datatypes: Sequence[DataType],
        tables: Tables,
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """As ``grid.choose``, which decides what the kernel leaves open."""
        shape = (block.shape[0], -(-block.shape[1] // group_size))
        chosen = torch.empty(shape, dtype=torch.uint8, device=self._device)
        largest = torch.empty(shape, dtype=torch.float32, device=self._device)
        arguments, held = self._groups(block, group_size, datatypes, chosen=chosen, largest=largest)
        self._start("choose_types", arguments)
        found = chosen.cpu().numpy()
        del held
        rows, groups = np.nonzero(found == UNDECIDED)
        whole = (groups + 1) * group_size <= block.shape[1]
        for some in (np.flatnonzero(whole), np.flatnonzero(~whole)):  # of one length each
            if some.size:
                start = groups[some, None] * group_size
                columns = start + np.arange(min(group_size, block.shape[1] - int(start.max())))
                parts = np.ascontiguousarray(block[rows[some, None], columns])
                decided, _ = choose(parts, parts.shape[1], datatypes, tables)
                found[rows[some], groups[some]] = decided[:, 0]
        return found, largest.cpu().numpy()

    def settle(
        self,
        block: NDArray[np.float32],
        group_size: int,
        largest: NDArray[np.float32],
        chosen: NDArray[np.uint8],
        units: NDArray[np.float64],
        most: int,
        datatypes: Sequence[DataType],
        tables: Tables,  # noqa: ARG002
    ) -> NDArray[np.uint8]:
        """As ``grid.settle``."""
        multiples = torch.empty(largest.shape, dtype=torch.uint8, device=self._device)
        given = {"chosen": self._to(chosen), "largest": self._to(largest), "units": self._to(units)}
        arguments, held = self._groups(block, group_size, datatypes, multiples=multiples, **given)
        arguments.most = most
        self._start("settle_scales", arguments)
        found: NDArray[np.uint8] = multiples.cpu().numpy()
        del held
        for row, group in np.argwhere(found == 0):
            part = block[row, group * group_size : (group + 1) * group_size].tolist()
            datatype = datatypes[chosen[row, group]]
            found[row, group] = settle_exactly(part, Fraction(float(units[row])), most, datatype)
        return found

    def _search_arguments(
        self, block: NDArray[np.float32], group_size: int, groups: int, **tensors: torch.Tensor
    ) -> SearchArguments:
        return SearchArguments(
            weights=self._weights(block).data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
            rows=block.shape[0],
            columns=block.shape[1],
            group_size=group_size,
            groups=groups,
        )

    def reach(self, block: NDArray[np.float32], group_size: int, groups: int) -> NDArray[np.float64]:
        """As ``outlier_victim.group_reach``."""
        found = torch.empty((block.shape[0], groups), dtype=torch.float64, device=self._device)
        arguments = self._search_arguments(block, group_size, groups, reach=found)
        blocks = -(-found.numel() // _THREADS)
        launch("quantizers", "find_reach", arguments, (blocks,), (_THREADS,), self._device)
        return found.cpu().numpy()

    def search(
        self,
        block: NDArray[np.float32],
        group_size: int,
        reach: NDArray[np.float64],
        percents: Sequence[int],
        datatype: DataType,
        outlier: DataType | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As ``scale_search.best_scales``, of at most 128 candidates."""
        factors = candidate_factors(reach, percents, datatype)
        assert factors.size <= _MOST_CANDIDATES
        assert outlier is not None
        levels, codes = positive_levels(outlier)
        runs = runs_of(datatype)
        scales, errors = (torch.empty(reach.shape, dtype=torch.float64, device=self._device) for _ in range(2))
        given = {"factors": self._to(factors), "runs": self._to(runs), "reach": self._to(reach)}
        given |= {"outlier_levels": self._to(levels), "outlier_codes": self._to(codes)}
        arguments = self._search_arguments(block, group_size, reach.shape[1], **given, scales=scales, errors=errors)
        arguments.candidates, arguments.run_count, arguments.outlier_count = factors.size, runs.shape[0], levels.size
        arguments.per_unit = 1 << datatype.fraction_bits
        launch("quantizers", "search_scales", arguments, (reach.size,), (_MOST_CANDIDATES,), self._device)
        return scales.cpu().numpy(), errors.cpu().numpy()

    def encode(self, coder: Grid | PairCoder, block: NDArray[np.float32], rows: slice, bits: int) -> NDArray[np.uint8]:
        """Packed codes of the ``rows`` of the coder's matrix, uint8 [rows, packed_row_bytes]."""
        scales = coder.scales[rows]
        given: dict[str, NDArray[Any]] = {}
        units = 1.0
        if isinstance(coder, PairCoder):
            tables = grid_tables((coder.normal,))
            given["outlier_levels"], given["outlier_codes"] = positive_levels(coder.outlier)
            units = float(tables.units[0])
        else:
            tables = coder.tables
            given["chosen"] = coder.chosen[rows]
            scales = scales / tables.units[given["chosen"]]
        given |= {"scales": scales, "thresholds": tables.thresholds, "code_of_rank": tables.codes}
        given["ties_up"] = tables.ties_up.astype(np.uint8)
        held = {name: self._to(values) for name, values in given.items()}
        row_bytes = packed_row_bytes(block.shape[1], bits)
        packed = torch.empty((block.shape[0], row_bytes), dtype=torch.uint8, device=self._device)
        arguments = EncodeArguments(
            weights=self._weights(block).data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in held.items()},
            packed=packed.data_ptr(),
            rows=block.shape[0],
            row_bytes=row_bytes,
            columns=block.shape[1],
            group_size=coder.group_size,
            groups=scales.shape[1],
            ranks=tables.codes.shape[1],
            bits=bits,
            outlier_count=len(given.get("outlier_codes", ())),
            units=units,
        )
        blocks = -(-block.shape[0] * -(-block.shape[1] // 8) // _THREADS)
        launch("quantizers", "encode_weights", arguments, (blocks,), (_THREADS,), self._device)
        found: NDArray[np.uint8] = packed.cpu().numpy()
        return found


@functools.cache
def _level_tables(datatypes: tuple[DataType, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Numerators, float64 [types, levels], padded with each type's first, and their largest magnitudes [types]."""
    width = max(len(datatype.sorted_numerators) for datatype in datatypes)
    levels = np.array(
        [
            [*datatype.sorted_numerators, *[datatype.sorted_numerators[0]] * (width - len(datatype.sorted_numerators))]
            for datatype in datatypes
        ],
        dtype=np.float64,
    )
    return levels, np.array([float(datatype.max_numerator) for datatype in datatypes])
