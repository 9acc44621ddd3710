"""A layer as an accelerator takes it: packed rows as a ``QuantizedTensor`` holds them, words of groups, constants.

Nothing is computed here that hardware decodes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionarySpec
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

Packed = NDArray[np.uint8]
RowOutliers = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Places among the inputs of a row, ascending, and values."""


@dataclass(frozen=True, kw_only=True)
class LayerImage:
    """A layer for the tiles of an array.

    Attributes:
        rows, columns, lanes: of the array.
        outputs, tokens, inputs: of the product.
        group_inputs: of a group.
        terms: of a step.
        weights: uint8 [outputs, bytes of a row], packed.
        weight_code_bits: of a packed code.
        groups: uint32 [outputs, groups]: ``GROUP_WORD``.
        channel_scales: FP32 [outputs].
        activations: uint8 [tokens, bytes of a row], packed.
        activation_code_bits: of a packed code; 16 of FP16 numbers.
        column_scales: FP16 [tokens]; 1 where there are none.
        layer: the bits of ``LAYER``.
        centroids: FP32 [centroids], of a dictionary.
        outliers: of each row, of a dictionary.
    """

    rows: int
    columns: int
    lanes: int
    outputs: int
    tokens: int
    inputs: int
    group_inputs: int
    terms: int
    weights: Packed
    weight_code_bits: int
    groups: NDArray[np.uint32]
    channel_scales: NDArray[np.float32]
    activations: Packed
    activation_code_bits: int
    column_scales: NDArray[np.float16]
    layer: int
    centroids: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    outliers: tuple[RowOutliers, ...] = ()

    @property
    def row_tiles(self) -> int:
        """Tiles along the outputs."""
        return -(-self.outputs // self.rows)

    @property
    def column_tiles(self) -> int:
        """Tiles along the tokens."""
        return -(-self.tokens // self.columns)

    @property
    def group_steps(self) -> int:
        """Steps of a group, which ends with a step of its own; the last one of a row may be shorter."""
        return -(-self.group_inputs // self.lanes)

    @property
    def row_steps(self) -> int:
        """Steps of a row."""
        whole, rest = divmod(self.inputs, self.group_inputs)
        return whole * self.group_steps + -(-rest // self.lanes)

    def codes_before(self, step: int) -> int:
        """Codes of a row before a step."""
        group, inside = divmod(step, self.group_steps)
        return min(group * self.group_inputs + inside * self.lanes, self.inputs)


def layer_image(
    design: ArrayDesign, tensor: QuantizedTensor, activations: NDArray[np.float16] | QuantizedTensor
) -> LayerImage:
    """The image of activations · weightsᵀ: [tokens, inputs] by ``tensor`` [outputs, inputs].

    Raises ``InputError`` (``UnsupportedFormatError``) for what the PE does not take and the array was not built for.
    """
    path = design.datapath
    spec = design.processing_element
    terms = spec.cycles_per_step(tensor.format)
    centroids: NDArray[np.float32] = np.zeros(0, np.float32)
    outliers: tuple[RowOutliers, ...] = ()
    outputs, inputs = tensor.shape
    tokens = activations.shape[0]
    if activations.shape[1] != inputs:
        raise InputError(f"activations of {activations.shape[1]} inputs; expected {inputs}")
    if isinstance(path, BitSerialDatapath):
        assert isinstance(spec, BitSerialSpec)
        layer, groups, channel, group_inputs = _bit_serial(design, path, tensor)
        weights, bits = tensor.parts["codes"], tensor.format.weight_bits
    elif isinstance(spec, Fp16MacSpec):
        layer, group_inputs = {}, inputs
        groups, channel = np.zeros((outputs, 1), np.uint32), np.ones(outputs, np.float32)
        weights, bits = half_weights(tensor).view(np.uint8), 16
    elif isinstance(spec, DictionarySpec):
        layer, group_inputs = {}, inputs
        groups, channel = np.zeros((outputs, 0), np.uint32), np.ones(outputs, np.float32)
        weights, bits = tensor.parts["codes"], tensor.format.weight_bits
        centroids = tensor.parts["dictionary"].astype(np.float32)
        outliers = _outliers(tensor, path.outliers)
    else:
        assert isinstance(path, BitParallelDatapath)
        layer, groups, channel, group_inputs = _bit_parallel(path, tensor)
        weights, bits = tensor.parts["codes"], tensor.format.weight_bits
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
        values, value_bits = activations.parts["codes"], activations.format.weight_bits
    else:
        if not np.isfinite(activations).all():
            raise InputError("NaN or infinite activations; expected finite ones")
        values, value_bits = np.ascontiguousarray(activations).view(np.uint8), 16
    return LayerImage(
        rows=design.rows,
        columns=design.columns,
        lanes=path.lanes,
        outputs=outputs,
        tokens=tokens,
        inputs=inputs,
        group_inputs=group_inputs,
        terms=terms,
        weights=weights.astype(np.uint8, copy=False),
        weight_code_bits=bits,
        groups=groups,
        channel_scales=channel,
        activations=values.astype(np.uint8, copy=False),
        activation_code_bits=value_bits,
        column_scales=column_scales,
        layer=int(LAYER.const(layer).as_bits()),
        centroids=centroids,
        outliers=outliers,
    )


def _outliers(tensor: QuantizedTensor, room: int) -> tuple[RowOutliers, ...]:
    """Places and values of the outliers of every row of GOBO's weights."""
    outputs, inputs = tensor.shape
    positions = tensor.parts["outlier_positions"].astype(np.int64)
    values = tensor.parts["outlier_values"].astype(np.float32)
    ends = np.searchsorted(positions, inputs * np.arange(outputs + 1))
    most = int(np.diff(ends).argmax())
    if ends[most + 1] - ends[most] > room:
        raise InputError(f"row {most} has {ends[most + 1] - ends[most]} outliers; the array was built for {room}")
    return tuple(
        (positions[first:last] - row * inputs, values[first:last])
        for row, (first, last) in enumerate(itertools.pairwise(ends.tolist()))
    )


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
