"""Weights of one data type: integers, symmetric (``int-w4g128``) or with a zero point (``int-asym-w4g128``), or others.

Symmetric: scale = max |w| / max |level|; of an integer 2**(bits - 1) - 1 (BitMoD section III; the most negative code is
not used). Any other data type with a zero (``fp6_e2m3-w6g128``) is quantized likewise.
Asymmetric: scale = (max - min) / (2**bits - 1) with 0 inside [min, max], zero point = -min / scale rounded to nearest
even; the level of a code is (code - zero point) × scale. Scales are FP16, and weights go to the level nearest for the
FP16 scale that is stored; 24 bits per group for the asymmetric type, as BitMoD section III-C counts them.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms import grid
from termwise.algorithms.datatypes import DataType
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format
from termwise.algorithms.packing import pack, unpack

Parts = dict[str, NDArray[np.generic]]


def half_scales(scales: NDArray[np.float64]) -> NDArray[np.float16]:
    """Scales as they are stored, FP16 [rows, groups]: never zero (1 for an all-zero group), never infinite.

    A scale below the least FP16 number becomes that number. Raises ``InputError`` for one above the greatest.
    """
    largest = scales.max(initial=0.0)
    if largest > np.finfo(np.float16).max:
        raise InputError(f"a group needs the scale {largest:.4g}; expected at most 65504, the largest FP16 number")
    stored = np.maximum(scales, np.finfo(np.float16).smallest_subnormal).astype(np.float16)
    stored[scales == 0] = 1
    return stored


def quantize_symmetric(weights: grid.Weights, format: Format) -> Parts:
    """``codes`` and ``scales`` of ``weights`` [outputs, inputs] on the levels of the format's one data type."""
    parts = empty_parts(weights, format)
    group_size = format.group_size or weights.shape[1]
    tables = grid.Tables(format.datatypes)
    starts = np.arange(0, weights.shape[1], group_size)
    for rows, block in grid.row_blocks(weights):
        largest = np.maximum.reduceat(np.abs(block), starts, axis=1).astype(np.float64)
        scales = half_scales(largest / format.datatypes[0].maximum)
        parts["scales"][rows] = scales
        only = np.zeros(scales.shape, dtype=np.uint8)
        codes = grid.encode(block, group_size, scales.astype(np.float64), only, tables)
        parts["codes"][rows] = pack(codes, format.weight_bits)
    return parts


def dequantize_symmetric(parts: Parts, format: Format, inputs: int) -> NDArray[np.float32]:
    """Exact inverse of the encoding: float32 [outputs, inputs]."""
    codes = unpack(parts["codes"].astype(np.uint8, copy=False), format.weight_bits, inputs)
    only = np.zeros(parts["scales"].shape, dtype=np.uint8)
    scales = parts["scales"].astype(np.float64)
    return grid.decode(codes, format.group_size or inputs, scales, only, grid.Tables(format.datatypes))


@cache
def _offset_tables(bits: int) -> grid.Tables:
    """The levels code - zero point, for every zero point: what an asymmetric integer is once its zero is known."""
    count = 1 << bits
    types = [
        DataType(
            name=f"uint{bits}_minus_{zero}",
            bits=bits,
            numerators=tuple(code - zero for code in range(count)),
            fraction_bits=0,
            source="BitMoD section III-C (INT-asym)",
        )
        for zero in range(count)
    ]
    return grid.Tables(types)


def quantize_asymmetric(weights: grid.Weights, format: Format) -> Parts:
    """``codes``, ``scales`` and ``zero_points`` of ``weights`` [outputs, inputs] on a grid with a zero point."""
    parts = empty_parts(weights, format)
    inputs = weights.shape[1]
    group_size = format.group_size or inputs
    top = (1 << format.weight_bits) - 1
    tables = _offset_tables(format.weight_bits)
    starts = np.arange(0, inputs, group_size)
    for rows, block in grid.row_blocks(weights):
        least = np.minimum(np.minimum.reduceat(block, starts, axis=1), 0).astype(np.float64)
        greatest = np.maximum(np.maximum.reduceat(block, starts, axis=1), 0).astype(np.float64)
        scales = half_scales((greatest - least) / top)
        exact = scales.astype(np.float64)
        zeros = np.clip(np.rint(-least / exact), 0, top).astype(np.uint8)
        parts["scales"][rows] = scales
        parts["zero_points"][rows] = zeros
        parts["codes"][rows] = pack(grid.encode(block, group_size, exact, zeros, tables), format.weight_bits)
    return parts


def dequantize_asymmetric(parts: Parts, format: Format, inputs: int) -> NDArray[np.float32]:
    """Exact inverse of the encoding: float32 [outputs, inputs]."""
    codes = unpack(parts["codes"].astype(np.uint8, copy=False), format.weight_bits, inputs)
    zeros = parts["zero_points"].astype(np.uint8, copy=False)
    scales = parts["scales"].astype(np.float64)
    return grid.decode(codes, format.group_size or inputs, scales, zeros, _offset_tables(format.weight_bits))


def empty_parts(weights: grid.Weights, format: Format) -> Parts:
    """Arrays of the shapes and types that ``format`` stores for ``weights`` [outputs, inputs], to be filled."""
    outputs, inputs = weights.shape
    return {name: np.empty(part.shape, dtype=part.dtype) for name, part in format.layout(outputs, inputs).items()}
