"""A layer as an array takes it: the words of its operand memories, in order, and what stays the same for a layer.

The words are made from the codes, scales and choices of a ``QuantizedTensor``; nothing is computed here that hardware
decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.grid import Grid
from termwise.algorithms.operands import HALF_BIAS, weight_operands
from termwise.algorithms.outlier_victim import pairs_of_types
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.reference import half_weights
from termwise.rtl.array import ArrayDesign
from termwise.rtl.borders import LAYER, BitParallelDatapath, BitSerialDatapath
from termwise.rtl.decoders import abfloat_fields
from termwise.rtl.term_generator import SPECIAL_VALUE, WeightType, special_code, special_value_bits

Bits = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class LayerImage:
    """A layer cut into the tiles of an array.

    Attributes:
        outputs, tokens, inputs: of the product.
        row_steps: steps of a row. group_steps: of a group; the last one of a row may be shorter.
        terms: of a step.
        weights: bits [row tiles, words of a row, rows · bits], 0 or 1.
        groups: uint32 [row tiles, groups, rows]: ``GROUP_WORD``.
        channel_scales: FP32 [row tiles, rows].
        activations: bits [column tiles, words of a row, columns · bits].
        column_scales: FP16 [column tiles, columns]; 1 where there are none.
        layer: the bits of ``LAYER``.
    """

    outputs: int
    tokens: int
    inputs: int
    row_steps: int
    group_steps: int
    terms: int
    weights: Bits
    groups: NDArray[np.uint32]
    channel_scales: NDArray[np.float32]
    activations: Bits
    column_scales: NDArray[np.float16]
    layer: int

    @property
    def row_tiles(self) -> int:
        """Tiles along the outputs."""
        return int(self.weights.shape[0])

    @property
    def column_tiles(self) -> int:
        """Tiles along the tokens."""
        return int(self.activations.shape[0])


def layer_image(
    design: ArrayDesign, tensor: QuantizedTensor, activations: NDArray[np.float16] | QuantizedTensor
) -> LayerImage:
    """The image of activations · weightsᵀ: [tokens, inputs] by ``tensor`` [outputs, inputs].

    Raises ``InputError`` (``UnsupportedFormatError``) for what the PE does not take and the array was not built for.
    """
    path = design.datapath
    spec = design.processing_element
    terms = spec.cycles_per_step(tensor.format)
    outputs, inputs = tensor.shape
    tokens = activations.shape[0]
    if activations.shape[1] != inputs:
        raise InputError(f"activations of {activations.shape[1]} inputs; expected {inputs}")
    lanes = path.lanes
    if isinstance(path, BitSerialDatapath):
        assert isinstance(spec, BitSerialSpec)
        layer, groups, channel, group_inputs = _bit_serial(design, path, tensor)
        codes, bits = tensor.codes, path.generator_bits
    elif isinstance(spec, Fp16MacSpec):
        layer, group_inputs = {}, inputs
        groups, channel = np.zeros((outputs, 1), np.uint32), np.ones(outputs, np.float32)
        codes, bits = half_weights(tensor).view(np.uint16), 16
    else:
        assert isinstance(path, BitParallelDatapath)
        layer, groups, channel, group_inputs = _bit_parallel(path, tensor)
        codes, bits = tensor.codes, path.bits
    if isinstance(activations, QuantizedTensor) != path.column_scales:
        raise InputError(f"an array of {spec.kind} PEs takes {'codes' if path.column_scales else 'FP16 numbers'}")
    column_scales = np.ones(tokens, np.float16)
    if isinstance(activations, QuantizedTensor):
        assert isinstance(path, BitParallelDatapath)
        chosen, words, _, _ = _bit_parallel(path, activations)
        column_scales = (words[:, 0] & 0xFFFF).astype(np.uint16).view(np.float16)
        types = np.unique(words >> 16)
        if len(types) > 1:
            raise InputError(f"{activations.format.name} activations of {len(types)} data types; expected one")
        if chosen.pop("typed_groups", 0):
            chosen["type"] = int(types[0])
        layer |= {f"activation_{name}": value for name, value in chosen.items() if name in ("type", "paired", "bias")}
        values, value_bits = activations.codes, path.bits
    else:
        if not np.isfinite(activations).all():
            raise InputError("NaN or infinite activations; expected finite ones")
        values, value_bits = activations.view(np.uint16), 16
    # A group ends with a step of its own.
    group_steps, row_steps = -(-group_inputs // lanes), 0
    columns: list[int] = []
    for first in range(0, inputs, group_inputs):
        own = list(range(first, min(first + group_inputs, inputs)))
        columns += own + [-1] * (-len(own) % lanes)
    row_steps = len(columns) // lanes
    weight_values = path.weight_bits // bits
    activation_values = path.activation_bits // value_bits
    return LayerImage(
        outputs=outputs,
        tokens=tokens,
        inputs=inputs,
        row_steps=row_steps,
        group_steps=min(group_steps, row_steps),
        terms=terms,
        weights=_words(codes, columns, weight_values, bits, design.rows),
        groups=_tiles(groups, design.rows).transpose(0, 2, 1),
        channel_scales=_tiles(channel[:, None], design.rows, fill=1)[:, :, 0],
        activations=_words(values, columns, activation_values, value_bits, design.columns),
        column_scales=_tiles(column_scales[:, None], design.columns, fill=1)[:, :, 0],
        layer=int(LAYER.const(layer).as_bits()),
    )


def _tiles(values: NDArray[Any], size: int, fill: int = 0) -> NDArray[Any]:
    """[rows, …] cut into [tiles, size, …], the last one filled up."""
    missing = -len(values) % size
    padded = np.concatenate([values, np.full((missing, *values.shape[1:]), fill, values.dtype)])
    return padded.reshape(-1, size, *values.shape[1:])


def _words(codes: NDArray[np.unsignedinteger], columns: list[int], each: int, bits: int, size: int) -> Bits:
    """Bits [tiles, words, size · each · bits] of ``codes`` [rows, inputs]; -1 in ``columns`` is a zero."""
    extended = np.concatenate([codes, np.zeros((len(codes), 1), codes.dtype)], axis=1)
    order = np.array(columns + [-1] * (-len(columns) % each))
    tiles = _tiles(extended[:, order], size)
    words = tiles.reshape(len(tiles), size, -1, each).transpose(0, 2, 1, 3)
    places = np.arange(bits, dtype=np.uint32)
    found = (words[..., None].astype(np.uint32) >> places & 1).astype(np.uint8)
    return found.reshape(len(tiles), words.shape[1], -1)


def _bit_serial(
    design: ArrayDesign, path: BitSerialDatapath, tensor: QuantizedTensor
) -> tuple[dict[str, object], NDArray[np.uint32], NDArray[np.float32], int]:
    """Layer, group words [outputs, groups], channel scales and inputs of a group."""
    spec, format = path.spec, tensor.format
    operands = weight_operands(tensor)
    group_inputs = min(operands.group_size, tensor.shape[1])
    if group_inputs > design.group_inputs and spec.numerics != "paper":
        raise InputError(f"groups of {group_inputs} weights; the array was built for {design.group_inputs}")
    if operands.scale_bits > path.scale_bits or (path.scale == "integer") != (format.family == "bitmod"):
        wanted = "8-bit scales (BitMoD)" if path.scale == "integer" else "FP16 scales"
        raise InputError(f"{format.name} weights; the array was built for {wanted}")
    fractions = np.unique(operands.fraction_bits)
    if len(fractions) > 1:
        raise InputError(f"the data types of {format.name} have different fractions; expected one")
    chosen = _choices(tensor)
    layer: dict[str, object] = {"typed_groups": 0}
    if format.family == "int-asym":
        index = _type_index(path, WeightType.with_zero_point(format.weight_bits), format.name)
        selectors = chosen.astype(np.uint32)
    else:
        indices = [_type_index(path, WeightType(spec, datatype), format.name) for datatype in format.datatypes]
        index, selectors = indices[0], np.zeros(chosen.shape, np.uint32)
        special = [special_code(datatype) is not None for datatype in format.datatypes]
        if all(special):
            layer["special_values"] = [
                data_bits(special_value_bits(datatype, spec.fixed_point_bits)) for datatype in format.datatypes
            ] + [data_bits(0)] * (4 - len(special))
            selectors = chosen.astype(np.uint32)
        elif len(indices) > 1:
            layer["typed_groups"] = 1
            selectors = np.array(indices, np.uint32)[chosen]
    unit = {"paper": HALF_BIAS + spec.align_bits - 11, "exact": HALF_BIAS - 1}
    offset = -int(fractions[0]) - unit.get(spec.numerics, HALF_BIAS + spec.align_bits - 11)
    if path.scale == "integer":
        scales = operands.scale_significands.astype(np.uint32)
    else:
        scales = tensor.parts["scales"].astype(np.float16).view(np.uint16).astype(np.uint32)
        offset -= HALF_BIAS
    channel = np.ones(len(scales), np.float32) if operands.channel_scales is None else operands.channel_scales
    layer |= {"type": index, "exponent_offset": offset}
    return layer, (scales | selectors << 16).astype(np.uint32), channel.astype(np.float32), group_inputs


def _choices(tensor: QuantizedTensor) -> NDArray[np.uint8]:
    """Index of every group's data type, or its zero point."""
    coder = tensor.coder
    assert isinstance(coder, Grid)
    return coder.chosen


def data_bits(bits: int) -> list[dict[str, int]]:
    """An entry of the table of special values from its bits."""
    return [
        {"present": digit & 1, "negative": digit >> 1 & 1, "shift": digit >> 2}
        for digit in (bits & 31, bits >> SPECIAL_VALUE.size // 2)
    ]


def _type_index(path: BitSerialDatapath, wanted: WeightType, name: str) -> int:
    for index, entry in enumerate(path.types):
        same = (entry.booth, entry.zero_point, entry.bits, entry.table) == (
            (wanted.booth, wanted.zero_point, wanted.bits, wanted.table)
        )
        if same and (wanted.special is None or wanted.special == entry.special):
            return index
    raise InputError(f"{name} weights; the array was built for {', '.join(entry.name for entry in path.types)}")


def _bit_parallel(
    path: BitParallelDatapath, tensor: QuantizedTensor
) -> tuple[dict[str, object], NDArray[np.uint32], NDArray[np.float32], int]:
    """The same for OliVe's and ANT's PEs."""
    format = tensor.format
    names = [datatype.name for datatype in path.types]

    def index_of(name: str) -> int:
        if name not in names:
            raise InputError(f"{format.name} weights; the array was built for codes of {path.bits} bits")
        return names.index(name)

    operands = weight_operands(tensor)
    scales = tensor.parts["scales"].astype(np.float16).view(np.uint16).astype(np.uint32)
    scales = np.broadcast_to(scales.reshape(scales.shape[0], -1), operands.scale_significands.shape)
    layer: dict[str, object] = {"exponent_offset": 0}
    selectors: NDArray[np.uint32] = np.zeros(scales.shape, np.uint32)
    if format.family == "olive":
        normal, outlier = pairs_of_types(format)[int(tensor.parts["matrix_type"].ravel()[0])]
        layer |= {"type": index_of(normal.name), "paired": 1, "bias": abfloat_fields(outlier)[1]}
    else:
        indices = np.array([index_of(datatype.name) for datatype in format.datatypes], np.uint32)
        selectors = indices[_choices(tensor)]
        layer |= {"typed_groups": 1, "type": int(indices[0])}
    group_inputs = min(operands.group_size, tensor.shape[1])
    return layer, (scales | selectors << 16).astype(np.uint32), np.ones(len(scales), np.float32), group_inputs
