"""Weights of one data type: integers, symmetric (``int-w4g128``) or with a zero point (``int-asym-w4g128``), or others.

Symmetric: scale = max |w| / max |level|; of an integer 2**(bits - 1) - 1 (BitMoD section III; the most negative code is
not used). Any other data type with a zero (``fp6_e2m3-w6g128``) is quantized likewise.
Asymmetric: scale = (max - min) / (2**bits - 1) with 0 inside [min, max], zero point = -min / scale rounded to nearest
even; the level of a code is (code - zero point) × scale. Scales are FP16, and weights go to the level nearest for the
FP16 scale that is stored; 24 bits per group for the asymmetric type, as BitMoD section III-C counts them.

One data type may also have scales that are powers of two (``scale=e8m0``, which makes MX of an element type: OCP
section 6.3) or E4M3 numbers under one FP32 scale of the matrix (``scale=e4m3``, which makes NVFP4 of E2M1).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms import grid
from termwise.algorithms.datatypes import DataType, Rounding, get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format

Parts = dict[str, NDArray[np.generic]]

E8M0_BIAS = 127
"""An E8M0 code is a power of two's exponent plus this (OCP section 5.4.1)."""


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


_E4M3 = get_datatype("fp8_e4m3")


def fit_symmetric(weights: grid.Weights, format: Format) -> Parts:
    """``scales`` of ``weights`` [outputs, inputs], and ``tensor_scale`` under scales in E4M3."""
    parts = empty_parts(weights, format)
    starts = np.arange(0, weights.shape[1], format.group_size or weights.shape[1])
    largest = np.empty(parts["scales"].shape)
    for rows, block in grid.row_blocks(weights):
        largest[rows] = np.maximum.reduceat(np.abs(block), starts, axis=1)
    maximum = format.datatypes[0].maximum
    if format.scale_type == "e8m0":
        parts["scales"][:] = power_of_two_scales(largest, maximum)
    elif format.scale_type == "e4m3":
        parts["scales"][:], parts["tensor_scale"][0] = e4m3_scales(largest / maximum)
        greatest = float(parts["tensor_scale"][0]) * float(_E4M3.maximum) * maximum
        if greatest > float(np.finfo(np.float32).max):
            raise InputError(f"a level of {greatest:.4g}; expected weights whose levels are FP32 numbers")
    else:
        parts["scales"][:] = half_scales(largest / maximum)
    return parts


def power_of_two_scales(largest: NDArray[np.float64], maximum: float) -> NDArray[np.uint8]:
    """E8M0 scales, uint8 (exponent + 127), of groups whose largest magnitudes are ``largest`` (OCP section 6.3).

    The exponent is floor(log2(largest)) - floor(log2(maximum)), the latter of the data type, clamped to -127 .. 127. An
    all-zero group, of which the specification says nothing, has the scale 1.
    """
    exponents = np.frexp(largest)[1] - np.frexp(maximum)[1]
    return np.where(largest == 0, E8M0_BIAS, np.clip(exponents, -E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS).astype(np.uint8)


def e4m3_scales(scales: NDArray[np.float64]) -> tuple[NDArray[np.uint8], np.float32]:
    """E4M3 codes of the scales of groups, and the FP32 scale of the matrix above them (NVFP4).

    The greatest scale becomes 448, the greatest E4M3 number. A scale that would round to zero becomes the least E4M3
    number, so that no weight is lost to it. An all-zero matrix has the scale 1. Raises ``InputError`` when the scale
    of the matrix is outside the normal range of FP32.
    """
    greatest = scales.max()
    matrix = np.float32(greatest / _E4M3.maximum) if greatest else np.float32(1)
    if matrix < np.finfo(np.float32).tiny:
        raise InputError(f"the matrix needs the scale {matrix:.4g}; expected at least 1.2e-38, a normal FP32 number")
    return np.maximum(_E4M3.encode(scales / np.float64(matrix), "even"), 1), matrix


def symmetric_grid(parts: Parts, format: Format, inputs: int) -> grid.Grid:
    """Levels of the one data type × the stored scales."""
    scales = parts["scales"].astype(np.float64)
    if format.scale_type == "e8m0":
        scales = np.ldexp(1.0, parts["scales"].astype(np.int64) - E8M0_BIAS)
    elif format.scale_type == "e4m3":
        scales = _E4M3.decode(parts["scales"].astype(np.uint8)) * parts["tensor_scale"].astype(np.float64)
    return grid.Grid(
        group_size=format.group_size or inputs,
        scales=scales,
        chosen=np.zeros(scales.shape, dtype=np.uint8),
        tables=grid_tables(format.datatypes, format.rounding),
    )


@cache
def grid_tables(datatypes: tuple[DataType, ...], rounding: Rounding = "lower") -> grid.Tables:
    """``grid.Tables`` of the types, made once."""
    return grid.Tables(datatypes, rounding)


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


def fit_asymmetric(weights: grid.Weights, format: Format) -> Parts:
    """``scales`` and ``zero_points`` of ``weights`` [outputs, inputs]."""
    parts = empty_parts(weights, format)
    top = (1 << format.weight_bits) - 1
    starts = np.arange(0, weights.shape[1], format.group_size or weights.shape[1])
    for rows, block in grid.row_blocks(weights):
        least = np.minimum(np.minimum.reduceat(block, starts, axis=1), 0).astype(np.float64)
        greatest = np.maximum(np.maximum.reduceat(block, starts, axis=1), 0).astype(np.float64)
        scales = half_scales((greatest - least) / top)
        parts["scales"][rows] = scales
        parts["zero_points"][rows] = np.clip(np.rint(-least / scales.astype(np.float64)), 0, top)
    return parts


def asymmetric_grid(parts: Parts, format: Format, inputs: int) -> grid.Grid:
    """(code - zero point) × the stored scales."""
    return grid.Grid(
        group_size=format.group_size or inputs,
        scales=parts["scales"].astype(np.float64),
        chosen=parts["zero_points"].astype(np.uint8, copy=False),
        tables=_offset_tables(format.weight_bits),
    )


def empty_parts(weights: grid.Weights, format: Format) -> Parts:
    """Arrays of the shapes and types that ``format`` stores beside the codes of ``weights``, to be filled."""
    outputs, inputs = weights.shape
    layout = format.layout(outputs, inputs)
    return {name: np.empty(part.shape, dtype=part.dtype) for name, part in layout.items() if name != "codes"}
