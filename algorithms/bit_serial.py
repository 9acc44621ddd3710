"""BitMoD: each group of weights takes one of four special values, and a PE computes it term by term (HPCA 2025).

Quantizer (section III-B, Algorithm 1; section III-C):

1. Every group takes the data type with the least squared error at the scale max |w| / max |level|, in exact arithmetic.
   Candidates in the order of the paper, extra resolution +, -, extra asymmetry +, -; the first of equals wins.
2. The scales of one output channel are quantized to 8 bits under one FP32 scale, max(scales) / 127 (Equation 1, as in
   VS-Quant; the authors' script uses 255, and the maximum over all candidates).
3. At 3 and 4 bits the 8-bit scale of a group is the better, by squared error, of the two around the ideal one, again
   exactly. The paper rounds to nearest, which loses up to 0.07 % in squared error against unrounded scales; this gains
   1 to 3 % on the matrices of real models. INT6 and INT8 take the nearest, of equals the even one, at least 1.
4. Weights go to the nearest level for the product of both scales.

An all-zero group has the group scale 1, an all-zero channel also the channel scale 1. The authors' script squares
errors in FP16, where small ones vanish and wrong types are chosen; ``compat=authors-fp16`` chooses as it does, and
rounds the scales to nearest.

INT6 and INT8, which the PE takes as Booth digits without loss, have the same two levels of scales. The table of special
values is programmable in the hardware, so a format may name others (``special``).

An extra-asymmetry type scales by its special value's magnitude whichever sign the group's extreme has, as Algorithm 1
says; an extreme of the other sign saturates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms import grid
from termwise.algorithms.datatypes import DataType, common_unit
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.formats import Format
from termwise.algorithms.integer import Parts, empty_parts, grid_tables
from termwise.algorithms.packing import pack, unpack
from termwise.algorithms.processing_element import (
    ADDITION_CYCLES,
    CHANNEL_SCALE_CYCLES,
    HALF_CYCLES,
    HALF_SIGNIFICAND_BITS,
    INTEGER_TO_FLOAT_CYCLES,
    Fp16Activations,
    PipelineTiming,
    UnsupportedFormatError,
    check_weights_can_be_read,
    scale_bits,
)

SPECIAL_WIDTHS = (3, 4)
"""Widths whose data types have a special value; wider weights are integers."""

AUTHORS = "authors-fp16"
"""Value of the option ``compat`` that selects by the authors' arithmetic."""

SCALE_MAX = 127
"""Largest quantized group scale (BitMoD Equation 1: symmetric 8 bits)."""


FIXED_POINT_TERMS = 2
"""Terms of a weight that is no integer."""

SUM_BITS = 63
"""Magnitude bits of the sum of a group that is not rounded: it is a signed 64-bit number."""

LARGEST_ACTIVATION = 2047 << 29
"""The largest FP16 number, 65504, in units of 2^-24."""

Numerics = Literal["paper", "exact", "shared_exponent"]
PartialSumRounding = Literal["truncate", "nearest_even"]
Skipping = Literal["none", "tile", "row"]

_STAGES: dict[Numerics, int] = {"paper": 7, "exact": 6, "shared_exponent": 5}
"""Stages of the PE behind the issue of a term (``docs/microarchitecture.md``, section 3)."""


@dataclass(frozen=True, kw_only=True)
class BitSerialSpec(Fp16Activations):
    """A PE of 4 lanes that takes one term, a signed power of two, of 4 weights per cycle (BitMoD section IV).

    Activations are FP16. Integers of up to 8 bits arrive as radix-4 Booth digits; other types as two signed powers of
    two of a fixed-point number of ``fixed_point_bits`` magnitude bits (I3 I2 I1 I0 . F0). A zero point is part of the
    integer: code - zero point has one bit more. ``docs/microarchitecture.md``, section 2.3, defines every bit.

    Attributes:
        lanes: weights of a step.
        fixed_point_bits: magnitude bits of a weight that is no integer.
        numerics: ``paper`` aligns and truncates as published, ``exact`` loses nothing within a group,
            ``shared_exponent`` aligns a group's activations once to one exponent.
        align_bits: magnitude bits of an aligned activation, 4 to 24.
        accumulator_bits: bits of the signed group accumulator of ``paper``, 8 to 28.
        rounding: of everything that is shifted out: ``truncate`` (magnitudes towards zero, sums towards minus
            infinity) or ``nearest_even``.
        skip_zero_terms: a design option of our own: ``none``; ``tile``: a term that is zero in all lanes of all rows
            is not issued; ``row``: every row counts its own terms, and a step lasts as long as the longest row. At
            least one term of a step is issued. The cycles then depend on the values of the weights.

    Raises ``InputError`` for widths that cannot be built.
    """

    kind: ClassVar[str] = "bit_serial"
    lanes: int = 4
    fixed_point_bits: int = 5
    numerics: Numerics = "paper"
    align_bits: int = 14
    accumulator_bits: int = 15
    rounding: PartialSumRounding = "truncate"
    skip_zero_terms: Skipping = "none"

    def __post_init__(self) -> None:
        for field, least, most in (
            ("lanes", 1, 16),
            ("fixed_point_bits", 3, 8),
            ("align_bits", 4, 24),
            ("accumulator_bits", 8, 28),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or not least <= value <= most:
                raise InputError(f"the bit-serial PE has {field} = {value!r}; expected {least} to {most}")
        for field, accepted in (
            ("numerics", get_args(Numerics)),
            ("rounding", get_args(PartialSumRounding)),
            ("skip_zero_terms", get_args(Skipping)),
        ):
            if getattr(self, field) not in accepted:
                raise unknown_name(f"{field} of the bit-serial PE", getattr(self, field), accepted)

    def cycles_per_step(self, weights: Format) -> int:
        """Terms of the widest data type of the format: 4 for INT8, 3 for INT6 and INT5, 2 for BitMoD's types.

        Raises ``UnsupportedFormatError`` for values that have no such terms.
        """
        check_weights_can_be_read(self.kind, weights)
        if weights.family in ("fp16", "olive"):
            raise UnsupportedFormatError(
                f"the bit-serial PE (BitMoD) takes fixed-point weights of {self.fixed_point_bits} magnitude bits and "
                f"integers of up to 8 bits; {weights.name} weights of one group span more"
            )
        if weights.family == "int-asym":
            if weights.weight_bits > 7:
                raise UnsupportedFormatError(
                    "the bit-serial PE (BitMoD) takes integers of up to 8 bits; "
                    f"{weights.name} minus its zero point has 9"
                )
            return (weights.weight_bits + 2) // 2
        return max(self.terms(datatype) for datatype in weights.datatypes)

    def terms(self, datatype: DataType) -> int:
        """Terms, hence cycles, of a dot-product step of ``datatype``. Raises ``UnsupportedFormatError``."""
        if datatype.integer and datatype.bits <= 8:
            return datatype.terms
        unit = common_unit((datatype,))
        try:
            for numerator in datatype.sorted_numerators:
                fixed_point_digits(numerator // unit, self.fixed_point_bits)
        except UnsupportedFormatError as error:
            raise UnsupportedFormatError(f"the bit-serial PE (BitMoD) does not take {datatype.name}: {error}") from None
        return FIXED_POINT_TERMS

    def key_value_cycles_per_step(self, key_value_bits: int) -> int:
        """Booth digits of a key or value. Raises ``InputError`` above 8 bits."""
        if key_value_bits > 8:
            raise InputError(f"the bit-serial PE (BitMoD) takes keys and values of up to 8 bits; got {key_value_bits}")
        return (key_value_bits + 1) // 2

    def pipeline(self, weights: Format, inputs: int, rows: int) -> PipelineTiming:  # noqa: ARG002
        """The dequantizer takes one bit of a group's scale a cycle; then the group's value is added."""
        return self._pipeline(scale_bits(weights))

    def key_value_pipeline(self, key_value_bits: int) -> PipelineTiming:  # noqa: ARG002
        """The same with FP16 scales."""
        return self._pipeline(HALF_SIGNIFICAND_BITS)

    @property
    def stages(self) -> int:
        """Stages of the pipeline behind the issue of a term."""
        return _STAGES[self.numerics]

    def _pipeline(self, bits: int) -> PipelineTiming:
        return PipelineTiming(
            stages=self.stages,
            dequantizer_cycles=bits,
            accumulator_cycles=INTEGER_TO_FLOAT_CYCLES + ADDITION_CYCLES + CHANNEL_SCALE_CYCLES + HALF_CYCLES,
        )

    def buffer_bits(self, weights: Format, outputs: int, inputs: int) -> float:
        """Weights are buffered as they are packed."""
        return weights.bits_per_weight(outputs, inputs)

    def check_group(self, weights: Format, inputs: int) -> None:
        """Raises ``InputError`` where the sum of a group of ``inputs`` weights may not fit the 64 bits of a sum.

        Numerics ``exact`` and ``shared_exponent`` keep every bit of a group's sum; ``paper`` rounds it to
        ``accumulator_bits`` and takes groups of any length.
        """
        if self.numerics == "paper":
            return
        if weights.family == "int-asym":  # code - zero point
            numerator = (1 << weights.weight_bits) - 1
        else:
            numerator = max(entry.max_numerator // common_unit((entry,)) for entry in weights.datatypes)
        activation = LARGEST_ACTIVATION if self.numerics == "exact" else 1 << self.align_bits
        longest = ((1 << SUM_BITS) - 1) // (activation * numerator)
        if inputs > longest:
            raise InputError(
                f"the bit-serial PE with numerics {self.numerics!r} adds up groups of at most {longest} weights of "
                f"{weights.name}, whose sums fit {SUM_BITS} bits; got {inputs}"
            )


def booth_digits(number: int, bits: int) -> tuple[int, ...]:
    """Radix-4 Booth digits of a two's complement ``number`` of ``bits`` bits, the least significant first.

    >>> booth_digits(-5, 6)  # -1 - 4
    (-1, -1, 0)
    """
    found = []
    for place in range(0, bits, 2):
        below = number >> (place - 1) & 1 if place else 0
        found.append(below + (number >> place & 1) - 2 * (number >> (place + 1) & 1))
    return tuple(found)


@functools.cache
def fixed_point_digits(number: int, magnitude_bits: int) -> tuple[int, int]:
    """Two digits, of places 1 and 0, each 0 or ± a power of two: number = 2 · first + second.

    Raises ``UnsupportedFormatError`` for a number that has no such form.

    >>> fixed_point_digits(3, 5), fixed_point_digits(14, 5), fixed_point_digits(-1, 5)
    ((1, 1), (8, -2), (0, -1))
    """
    sign, magnitude = (-1 if number < 0 else 1), abs(number)
    ones = [place for place in range(magnitude.bit_length()) if magnitude >> place & 1]
    powers = [1 << place for place in reversed(ones)]
    if len(powers) > 2:  # non-adjacent form: a run of ones is the next power less the lowest of the run
        run = 1 << (ones[-1] + 1)
        powers = [run, magnitude - run]
    if len(powers) == 1:
        powers = [powers[0], 0] if powers[0] > 1 else [0, powers[0]]
    first, second = powers or (0, 0)
    if magnitude >> magnitude_bits or abs(second) & (abs(second) - 1):
        raise UnsupportedFormatError(f"{number} is no sum of two signed powers of two within {magnitude_bits} bits")
    return sign * first // 2, sign * second


def quantize_scales(scales: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Second-level scales: 8-bit group scales [outputs, groups] under one FP32 scale per output channel [outputs].

    Raises ``InputError`` when a channel scale is outside the normal range of FP32.
    """
    channel = (scales.max(axis=1) / SCALE_MAX).astype(np.float32)
    channel[scales.max(axis=1) == 0] = 1
    if channel.min() < np.finfo(np.float32).tiny:
        raise InputError(
            f"a channel needs the scale {channel.min():.4g}; expected at least 1.2e-38, a normal FP32 number"
        )
    return np.clip(np.rint(scales / channel[:, None]), 1, SCALE_MAX).astype(np.uint8), channel


def fit(
    weights: grid.Weights,
    format: Format,
    choose_types: Callable[..., tuple[NDArray[np.uint8], NDArray[np.float32]]] = grid.choose,
    settle: Callable[..., NDArray[np.uint8]] = grid.settle,
) -> Parts:
    """``selectors`` (where there is a choice), ``group_scales`` and ``channel_scales`` of [outputs, inputs].

    ``choose_types`` and ``settle`` are functions of ``grid``, or others that return the same.
    """
    parts = empty_parts(weights, format)
    group_size = format.group_size or weights.shape[1]
    maxima = np.array([datatype.maximum for datatype in format.datatypes])
    tables = grid_tables(format.datatypes)
    for rows, block in grid.row_blocks(weights):
        chosen, largest = choose(block, group_size, format, choose_types)
        group_scales, channel_scales = quantize_scales(largest.astype(np.float64) / maxima[chosen])
        if format.weight_bits in SPECIAL_WIDTHS and format.option("compat") != AUTHORS:
            units = channel_scales.astype(np.float64) / tables.units[0]
            group_scales = settle(block, group_size, largest, chosen, units, SCALE_MAX, format.datatypes, tables)
        greatest = group_scales.astype(np.float64) * channel_scales.astype(np.float64)[:, None] * maxima[chosen]
        if greatest.max() > np.finfo(np.float32).max:
            raise InputError(f"a level of {greatest.max():.4g}; expected weights whose levels are FP32 numbers")
        parts["group_scales"][rows], parts["channel_scales"][rows] = group_scales, channel_scales
        if format.selector_bits:
            parts["selectors"][rows] = pack(chosen, format.selector_bits)
    return parts


def choose(
    weights: NDArray[np.float32],
    group_size: int,
    format: Format,
    choose_types: Callable[..., tuple[NDArray[np.uint8], NDArray[np.float32]]],
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Index of every group's data type, uint8 [rows, groups], and its largest magnitude, float32 [rows, groups]."""
    if len(format.datatypes) == 1:
        starts = np.arange(0, weights.shape[1], group_size)
        largest = np.maximum.reduceat(np.abs(weights), starts, axis=1)
        return np.zeros(largest.shape, dtype=np.uint8), largest
    chosen, largest = choose_types(weights, group_size, format.datatypes, grid_tables(format.datatypes))
    if format.option("compat") == AUTHORS:
        chosen = authors_choice(weights, group_size, format.datatypes)
    return chosen, largest


def authors_choice(weights: NDArray[np.float32], group_size: int, datatypes: Sequence[DataType]) -> NDArray[np.uint8]:
    """The data type that the authors' script chooses for every group of ``weights``: uint8 [rows, groups].

    It holds weights, scales, values, errors and their squares in FP16, so that squares underflow, and takes the mean
    over a group of errors as the script does (a wider sum, rounded once to FP16). Scales are clamped to 1e-5 .. 1e4; a
    candidate must have an error below 1000. Raises ``InputError`` where none has one: the script makes such a group
    zero without saying so.
    """
    rows, inputs = weights.shape
    group_size = min(group_size, inputs)
    groups = -(-inputs // group_size)
    padded = np.zeros((rows, groups * group_size), dtype=np.float16)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        padded[:, :inputs] = weights.astype(np.float16)
        halves = padded.reshape(rows, groups, group_size)
        counts = np.full(groups, group_size)
        counts[-1] = inputs - (groups - 1) * group_size
        largest = np.abs(halves).max(axis=2, keepdims=True)
        best = np.full((rows, groups), 1000, dtype=np.float16)
        chosen = np.full((rows, groups), len(datatypes), dtype=np.uint8)
        for index, datatype in enumerate(datatypes):
            levels = np.array(datatype.sorted_numerators, dtype=np.float16)
            scales = np.clip(largest / np.float16(datatype.max_numerator), np.float16(1e-5), np.float16(1e4))
            middles = (levels[1:].astype(np.float64) + levels[:-1]) / 2
            values = levels[np.searchsorted(middles, halves / scales)] * scales
            squares = (values - halves) ** np.float16(2)
            error = (squares.sum(axis=2, dtype=np.float64) / counts).astype(np.float16)
            better = error < best
            best[better] = error[better]
            chosen[better] = index
    lost = int(np.count_nonzero(chosen == len(datatypes)))
    if lost:
        raise InputError(
            f"the authors' FP16 arithmetic finds no data type for {lost} groups, and would make them zero; expected "
            "weights whose mean squared error is a number below 1000"
        )
    return chosen


def coder(parts: Parts, format: Format, inputs: int) -> grid.Grid:
    """Levels of every group's data type × the product of both scales."""
    scales = _products(parts["group_scales"], parts["channel_scales"])
    chosen = np.zeros(scales.shape, dtype=np.uint8)
    if format.selector_bits:
        chosen = unpack(parts["selectors"].astype(np.uint8, copy=False), format.selector_bits, scales.shape[1])
    return grid.Grid(
        group_size=format.group_size or inputs, scales=scales, chosen=chosen, tables=grid_tables(format.datatypes)
    )


def _products(group_scales: NDArray[np.generic], channel_scales: NDArray[np.generic]) -> NDArray[np.float64]:
    """Scale of every group, exact in float64 (8 bits × 24 bits), [outputs, groups]."""
    product: NDArray[np.float64] = group_scales.astype(np.float64) * channel_scales.astype(np.float64)[:, None]
    return product
