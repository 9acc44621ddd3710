"""The layout of packed weights that ``weight_only.cu`` reads, made once when weights are loaded; and back.

It is a rearrangement of the packed codes, scales and selectors, described at the head of ``weight_only.cu``; nothing is
computed anew, and ``FastLayout.parts`` gives the packed arrays again, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.datatypes import DataType
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format
from termwise.algorithms.grid import WEIGHTS_AT_ONCE
from termwise.algorithms.outlier_victim import pairs_of_types
from termwise.algorithms.packing import pack, unpack
from termwise.algorithms.quantize import QuantizedTensor

ROWS = 16
"""Rows of a tile."""

TILE_INPUTS = 128
LEAST_GROUP = 32
MOST_TYPES = 4
WHOLE_ROW_SHIFT = 30
_TABLE_BYTES = 16
_INTEGER_OFFSET = 32
_TOP_EXPONENT = 15


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Levels of data types as upper bytes of FP16 numbers.

    Attributes:
        values: uint8 [MOST_TYPES, 16], by code.
        exponent: the bytes stand for level · 2^exponent.
    """

    values: NDArray[np.uint8]
    exponent: int


def level_tables(types: tuple[DataType, ...]) -> Tables | None:
    """The tables of ``types``, or None where a level has more than three significant bits or is too small.

    Levels are scaled so that the greatest has FP16's greatest exponent.
    """
    levels = np.zeros((MOST_TYPES, _TABLE_BYTES))
    for index, datatype in enumerate(types):
        for code, numerator in enumerate(datatype.numerators):
            if numerator is not None:
                levels[index, code] = numerator / (1 << datatype.fraction_bits)
    exponent = _TOP_EXPONENT - (int(np.frexp(np.abs(levels).max())[1]) - 1)
    halves = np.ldexp(levels, exponent).astype(np.float16)
    bits = halves.view(np.uint16)
    subnormal = (bits & 0x7C00 == 0) & (bits & 0x7FFF != 0)  # has no counterpart among the BF16 numbers
    if (bits & 0xFF).any() or subnormal.any() or not np.array_equal(halves, np.ldexp(levels, exponent)):
        return None
    return Tables(values=(bits >> 8).astype(np.uint8), exponent=exponent)


def _types(format: Format, matrix_type: int) -> tuple[DataType, ...]:
    """The types that the tables hold: of pairs the normal and the outlier type, else those that a selector names."""
    if format.family == "olive":
        return pairs_of_types(format)[matrix_type]
    if format.type_per_matrix:
        return (format.datatypes[matrix_type],)
    return format.datatypes


def reason_against(format: Format) -> str | None:
    """Why the tensor-core kernels do not take a format, or None where they do."""
    if format.family in ("fp16", "gobo", "int-asym") or format.groups_along_outputs:
        return f"they have no decoder of {format.name}"
    if format.family in ("type", "int") and format.scale_type != "fp16":
        return f"its scales are {format.scale_type}"
    group = format.group_size
    if group is not None and (group < LEAST_GROUP or group & (group - 1)):
        return f"its groups of {group} are no power of two from {LEAST_GROUP} on"
    if format.weight_bits == 6 and [datatype.name for datatype in format.datatypes] == ["int6"]:
        return None
    if format.weight_bits not in (3, 4):
        return f"they decode 3, 4 and integers of 6 bits, not {format.weight_bits}"
    choices = pairs_of_types(format) if format.family == "olive" else [format.datatypes]
    if len(format.datatypes) > (MOST_TYPES if format.family in ("bitmod", "olive") else 2):
        return f"it has {len(format.datatypes)} data types"
    if any(level_tables(types) is None for types in choices):
        return "a level has more than three significant bits"
    return None


@dataclass(frozen=True, kw_only=True)
class FastLayout:
    """A matrix in the layout of ``weight_only.cu``.

    Attributes:
        format: that of the packed weights.
        shape: (outputs, inputs).
        codes: uint32 [row tiles, input tiles, words of a warp].
        scales: uint16 [row tiles, groups, ROWS].
        tables: uint8 [MOST_TYPES, 16]; zeros of integers of 6 bits.
        exponent: of the tables.
        channel_scales: float32 [outputs]; ones where the format has none.
        matrix_type: the part of that name, or 0.
    """

    format: Format
    shape: tuple[int, int]
    codes: NDArray[np.uint32]
    scales: NDArray[np.uint16]
    tables: NDArray[np.uint8]
    exponent: int
    channel_scales: NDArray[np.float32]
    matrix_type: int

    @property
    def kernel(self) -> str:
        """Name of the kernels, without activations and tokens."""
        return "weight_only_pairs" if self.format.family == "olive" else f"weight_only_{self.format.weight_bits}"

    @property
    def group_shift(self) -> int:
        """log2 of the inputs of a group / 32."""
        group = self.format.group_size
        return WHOLE_ROW_SHIFT if group is None else (group // LEAST_GROUP).bit_length() - 1

    @property
    def type_mask(self) -> int:
        """1 where the last bit of an FP16 scale is the upper bit of its type: BitMoD's scales leave it free."""
        return int(self.format.family == "bitmod")

    def parts(self) -> dict[str, NDArray[Any]]:
        """The packed arrays: of the shapes and types of ``format.layout``, equal to those that the layout came from."""
        outputs, inputs = self.shape
        groups = self.format.groups(inputs)
        codes = np.concatenate([_gather(tile, self.format.weight_bits) for tile in self.codes], axis=0, dtype=np.uint8)
        found: dict[str, NDArray[Any]] = {
            "codes": pack(np.ascontiguousarray(codes[:outputs, :inputs]), self.format.weight_bits)
        }
        scales = self.scales.transpose(0, 2, 1).reshape(-1, groups)[:outputs]
        halves = (scales & (0x7FFF - self.type_mask)).astype(np.uint16).view(np.float16)
        chosen = (scales >> 15 | (scales & self.type_mask) << 1).astype(np.uint8)
        if self.format.family == "bitmod":
            found["group_scales"] = halves.astype(np.uint8)
            found["channel_scales"] = self.channel_scales
        else:
            found["scales"] = halves
        if self.format.selector_bits:
            found["selectors"] = pack(np.ascontiguousarray(chosen), self.format.selector_bits)
        if self.format.type_per_matrix:
            found["matrix_type"] = np.array([self.matrix_type], dtype=np.uint8)
        return found


def check_codes(tensor: QuantizedTensor) -> None:
    """Raises ``InputError`` where a code of ``tensor`` is no level."""
    step = max(1, WEIGHTS_AT_ONCE // tensor.shape[1])
    for start in range(0, tensor.shape[0], step):
        if np.isnan(tensor.dequantize_scaled(slice(start, start + step))).any():
            raise InputError(f"a code of the {tensor.format.name} tensor is no level; expected codes of a quantizer")


def fast_layout(tensor: QuantizedTensor) -> FastLayout:
    """The layout of a tensor whose format has no ``reason_against`` it.

    Raises ``InputError`` for another format, and for codes that are no levels.
    """
    format = tensor.format
    reason = reason_against(format)
    if reason is not None:
        raise InputError(f"the tensor-core kernels do not take {format.name}: {reason}")
    check_codes(tensor)
    outputs, inputs = tensor.shape
    bits, groups = format.weight_bits, format.groups(inputs)
    row_tiles, input_tiles = -(-outputs // ROWS), -(-inputs // TILE_INPUTS)
    codes = np.empty((row_tiles, input_tiles, 2 * bits * 32), dtype=np.uint32)
    packed = tensor.parts["codes"].astype(np.uint8, copy=False)
    for tile in range(row_tiles):
        padded = np.zeros((ROWS, input_tiles * TILE_INPUTS), dtype=np.uint8)
        rows = packed[tile * ROWS : (tile + 1) * ROWS]
        padded[: len(rows), :inputs] = unpack(rows, bits, inputs)
        codes[tile] = _scatter(padded, bits)
    scales = np.zeros((row_tiles * ROWS, groups), dtype=np.uint16)
    if format.family == "bitmod":
        scales[:outputs] = tensor.parts["group_scales"].astype(np.float16).view(np.uint16)
        channels = tensor.parts["channel_scales"].astype(np.float32, copy=False)
    else:
        scales[:outputs] = tensor.parts["scales"].astype(np.float16, copy=False).view(np.uint16)
        channels = np.ones(outputs, dtype=np.float32)
    if format.selector_bits:
        chosen = unpack(tensor.parts["selectors"].astype(np.uint8, copy=False), format.selector_bits, groups)
        scales[:outputs] |= (chosen & 1).astype(np.uint16) << 15 | chosen >> 1
    matrix_type = int(tensor.parts["matrix_type"][0].astype(int)) if format.type_per_matrix else 0
    tables = Tables(values=np.zeros((MOST_TYPES, _TABLE_BYTES), dtype=np.uint8), exponent=0)
    if bits != 6:
        found = level_tables(_types(format, matrix_type))
        assert found is not None  # there would be a reason
        tables = found
    return FastLayout(
        format=format,
        shape=(outputs, inputs),
        codes=codes,
        scales=np.ascontiguousarray(scales.reshape(row_tiles, ROWS, groups).transpose(0, 2, 1)),
        tables=tables.values,
        exponent=tables.exponent,
        channel_scales=channels,
        matrix_type=matrix_type,
    )


def _scatter(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Codes of a tile of rows, uint8 [ROWS, inputs], to words, uint32 [input tiles, 2 · bits · 32]."""
    tiles = codes.shape[1] // TILE_INPUTS
    # [half, r, tile, w, q, i] -> [tile, half, lane (r, q), w, i]
    lanes = (
        codes.reshape(2, 8, tiles, 4, 4, 8).transpose(2, 0, 1, 4, 3, 5).reshape(tiles, 2, 32, 4, 8).astype(np.uint32)
    )
    places = 4 * np.arange(8, dtype=np.uint32)
    if bits == 4:
        words = (lanes << places).sum(axis=-1, dtype=np.uint32)
    elif bits == 3:
        words = (lanes[..., :3, :] << places).sum(axis=-1, dtype=np.uint32)
        for word in range(3):
            words[..., word] |= ((lanes[..., 3, :] >> word & 1) << (places + 3)).sum(axis=-1, dtype=np.uint32)
    else:
        pairs = (lanes ^ _INTEGER_OFFSET).reshape(tiles, 2, 32, 16, 2)
        pairs = pairs[..., 0] | pairs[..., 1] << np.uint32(16)
        words = pairs[..., :6] | pairs[..., 6:12] << np.uint32(6)
        words[..., :4] |= (pairs[..., 12:] & 0x000F000F) << np.uint32(12)
        above = pairs[..., 12:] >> np.uint32(4) & 0x00030003
        words[..., 4] |= above[..., 0] << np.uint32(12) | above[..., 1] << np.uint32(14)
        words[..., 5] |= above[..., 2] << np.uint32(12) | above[..., 3] << np.uint32(14)
    vector = _vector_words(bits)
    # [tile, half, lane, word] -> [tile, vector, lane, word of the vector]
    whole = words.transpose(0, 2, 1, 3).reshape(tiles, 32, -1, vector).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(whole).reshape(tiles, -1)


def _gather(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Inverse of ``_scatter``."""
    tiles, vector = words.shape[0], _vector_words(bits)
    lanes = words.reshape(tiles, -1, 32, vector).transpose(0, 2, 1, 3).reshape(tiles, 32, 2, bits).transpose(0, 2, 1, 3)
    places = 4 * np.arange(8, dtype=np.uint32)
    codes = np.empty((tiles, 2, 32, 4, 8), dtype=np.uint8)
    if bits == 4:
        codes[:] = lanes[..., None] >> places & 15
    elif bits == 3:
        codes[..., :3, :] = lanes[..., None] >> places & 7
        codes[..., 3, :] = sum((lanes[..., word, None] >> (places + 3) & 1) << word for word in range(3))
    else:
        pairs = np.empty((tiles, 2, 32, 16), dtype=np.uint32)
        pairs[..., :6], pairs[..., 6:12] = lanes & 0x003F003F, lanes >> 6 & 0x003F003F
        above = np.stack([lanes[..., 4] >> 12, lanes[..., 4] >> 14, lanes[..., 5] >> 12, lanes[..., 5] >> 14], axis=-1)
        pairs[..., 12:] = (lanes[..., :4] >> 12 & 0x000F000F) | (above & 0x00030003) << 4
        halves = np.stack([pairs & 63, pairs >> 16 & 63], axis=-1) ^ _INTEGER_OFFSET
        codes[:] = halves.reshape(tiles, 2, 32, 4, 8)
    found = codes.reshape(tiles, 2, 8, 4, 4, 8).transpose(1, 2, 0, 4, 3, 5)
    return np.ascontiguousarray(found).reshape(ROWS, tiles * TILE_INPUTS)


def _vector_words(bits: int) -> int:
    """Words that a lane loads at a time."""
    return 2 if bits == 3 else 4
