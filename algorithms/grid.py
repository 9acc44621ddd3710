"""Quantization to a grid: every group of weights takes the levels of one data type times one scale.

INT, INT-asym, BitMoD and ANT are grids that differ in how a group chooses its data type and in how its scale is kept.
The two steps that cost time stand here once, as Numba kernels with a Python reference beside them:

* ``choose``: which data type gives a group the least squared error, when its scale is max |w| / max |level|
  (BitMoD, Algorithm 1). The first of equals wins.
* ``Grid.encode``: the code of the level nearest to each weight, for a scale that is given. A weight midway between two
  levels takes the lower (more negative) one, or what another ``Rounding`` says.

Both are exact. Weights are binary fractions of at most 24 significant bits and levels integers of at most 8, so a
weight is compared with a threshold without rounding. Only the sums of squared errors round: where two candidates come
closer than the bound on that rounding, the group is decided again in integers of any length.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Protocol

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from termwise.algorithms.datatypes import DataType, Rounding
from termwise.algorithms.errors import InputError

Weights = NDArray[np.float16] | NDArray[np.float32]

WEIGHTS_AT_ONCE = 1 << 21
"""Weights that are widened to float32 at a time: what a quantizer holds beside its input and its output (8 MiB)."""

UNDECIDED = np.uint8(255)
"""Mark of a group whose candidates' errors are too close to be told apart in float64."""


class Tables:
    """Decoder tables of several data types, padded to one length: what the kernels read.

    Attributes:
        codes: the code of every level in ascending order, uint8 [types, lengths]; padded with the last.
        thresholds: twice the numerator above which a weight takes the next level, float64 [types, lengths - 1]: the sum
            of two neighbours, unless the rounding is ``floor``; padded with infinity.
        ties_up: whether a weight at the threshold takes the next level too, bool, like ``thresholds``.
        levels: level by code, float64 [types, 2**bits]; NaN where a code is no level.
        units: levels per numerator, 2**fraction_bits, float64 [types].
        divisors: largest magnitude among the numerators, float64 [types].
        shared: True where a type has the same divisor as the one before it, so that work on their common levels is
            shared, bool [types].
        common: magnitudes that stand with both signs in a type and in its neighbours of the same divisor, float64
            [types, width], padded with the first of them.
        own: a type's other numerators, float64 [types, width], padded with its first level.
    """

    def __init__(self, datatypes: Sequence[DataType], rounding: Rounding = "lower") -> None:
        length = 1 << max(len(datatype.sorted_codes) - 1 for datatype in datatypes).bit_length()
        self.codes = np.empty((len(datatypes), length), dtype=np.uint8)
        self.thresholds = np.full((len(datatypes), length - 1), np.inf)
        self.ties_up = np.zeros(self.thresholds.shape, dtype=np.bool_)
        self.levels = np.full((len(datatypes), 1 << max(datatype.bits for datatype in datatypes)), np.nan)
        self.units = np.array([float(1 << datatype.fraction_bits) for datatype in datatypes])
        self.divisors = np.array([float(datatype.max_numerator) for datatype in datatypes])
        self.shared = np.append(False, self.divisors[1:] == self.divisors[:-1])
        for index, datatype in enumerate(datatypes):
            numerators = np.array(datatype.sorted_numerators, dtype=np.float64)
            count = len(numerators)
            self.codes[index, :count] = datatype.sorted_codes
            self.codes[index, count:] = datatype.sorted_codes[-1]
            upper = numerators[1:]
            self.thresholds[index, : count - 1] = upper + numerators[:-1]
            if rounding == "floor":
                self.thresholds[index, : count - 1] = 2 * np.where(upper > 0, upper, numerators[:-1])
            self.ties_up[index, : count - 1] = {
                "lower": False,
                "even": self.codes[index, 1:count] % 2 == 0,
                "nearest": upper > 0,
                "floor": upper > 0,
            }[rounding]
            self.levels[index, list(datatype.sorted_codes)] = datatype.levels
        common: list[list[int]] = []
        own: list[list[int]] = []
        for _, run in itertools.groupby(datatypes, key=lambda datatype: datatype.max_numerator):
            sets = [set(datatype.sorted_numerators) for datatype in run]
            in_all = set.intersection(*sets)
            in_all = {level for level in in_all if -level in in_all}
            common += [[abs(level) for level in in_all if level >= 0]] * len(sets)
            own += [sorted(levels - in_all) for levels in sets]
        self.common = _padded(common)
        self.own = _padded(
            [row or [datatype.sorted_numerators[0]] for row, datatype in zip(own, datatypes, strict=True)]
        )


def _padded(lists: list[list[int]]) -> NDArray[np.float64]:
    """``lists`` as rows of one float64 matrix, filled up with each row's first number."""
    width = max(map(len, lists))
    return np.array([row + row[:1] * (width - len(row)) for row in lists], dtype=np.float64)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _approach(
    values: NDArray[np.float64], count: int, extreme: float, levels: NDArray[np.float64], nearest: NDArray[np.float64]
) -> None:
    """Lower ``nearest`` [count] to the distances of ``values`` [count] from ``extreme`` × the nearest of ``levels``."""
    whole = levels.size - levels.size % 4
    for index in range(0, whole, 4):  # four at a time: a value is read once for four levels
        first = extreme * levels[index]
        second = extreme * levels[index + 1]
        third = extreme * levels[index + 2]
        fourth = extreme * levels[index + 3]
        for column in range(count):
            value = values[column]
            pair = min(abs(value - first), abs(value - second))
            nearest[column] = min(min(nearest[column], pair), min(abs(value - third), abs(value - fourth)))
    for index in range(whole, levels.size):
        level = extreme * levels[index]
        for column in range(count):
            nearest[column] = min(nearest[column], abs(values[column] - level))


@njit(inline="always")  # type: ignore[untyped-decorator]
def _sum_of_squares(values: NDArray[np.float64], count: int) -> float:
    """Sum of squares in four interleaved partial sums, which a processor adds side by side."""
    first = second = third = fourth = 0.0
    whole = count - count % 4
    for index in range(0, whole, 4):
        first += values[index] * values[index]
        second += values[index + 1] * values[index + 1]
        third += values[index + 2] * values[index + 2]
        fourth += values[index + 3] * values[index + 3]
    for index in range(whole, count):
        first += values[index] * values[index]
    return (first + second) + (third + fourth)


@njit  # type: ignore[untyped-decorator]
def _same(first: NDArray[np.float64], second: NDArray[np.float64], count: int) -> bool:
    """Whether the first ``count`` numbers of both are the same ones, in any order: then so is their sum of squares."""
    for index in range(count):
        if first[index] != second[index]:
            here, there = np.sort(first[:count]), np.sort(second[:count])
            return bool(np.all(here == there))
    return True


@njit  # type: ignore[untyped-decorator]
def _choose_row(
    weights: NDArray[np.float32],
    group_size: int,
    divisors: NDArray[np.float64],
    shared: NDArray[np.bool_],
    common: NDArray[np.float64],
    own: NDArray[np.float64],
    chosen: NDArray[np.uint8],
    largest: NDArray[np.float32],
) -> None:
    values = np.empty(min(group_size, weights.size))  # the group's weights × divisor
    magnitudes = np.empty(min(group_size, weights.size))
    to_common = np.empty(min(group_size, weights.size))  # their distance from the nearest common level, × divisor
    nearest = np.empty(min(group_size, weights.size))  # the same from any level of the candidate
    nearest_of_best = np.empty(min(group_size, weights.size))
    for group in range(chosen.size):
        start = group * group_size
        count = min(group_size, weights.size - start)
        extreme = np.float32(0)
        for column in range(start, start + count):
            extreme = max(extreme, abs(weights[column]))
        largest[group] = extreme
        bound = (count + 8) * 2.0**-52
        best = 0
        best_error = 0.0
        undecided = False
        for candidate in range(divisors.size):
            divisor = divisors[candidate]
            if not shared[candidate]:
                for column in range(count):
                    values[column] = np.float64(weights[start + column]) * divisor
                    magnitudes[column] = abs(values[column])
                    to_common[column] = np.inf
                _approach(magnitudes, count, np.float64(extreme), common[candidate], to_common)
            for column in range(count):
                nearest[column] = to_common[column]
            _approach(values, count, np.float64(extreme), own[candidate], nearest)
            error = _sum_of_squares(nearest, count) / (divisor * divisor)
            if candidate == 0 or error < best_error * (1.0 - bound):
                best = candidate
                best_error = error
                undecided = False
                for column in range(count):
                    nearest_of_best[column] = nearest[column]
            elif error <= best_error * (1.0 + bound) and error > 0.0:
                undecided = undecided or divisors[best] != divisor or not _same(nearest, nearest_of_best, count)
        chosen[group] = UNDECIDED if undecided else best


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _choose(
    weights: NDArray[np.float32],
    group_size: int,
    divisors: NDArray[np.float64],
    shared: NDArray[np.bool_],
    common: NDArray[np.float64],
    own: NDArray[np.float64],
    chosen: NDArray[np.uint8],
    largest: NDArray[np.float32],
) -> None:
    for row in prange(weights.shape[0]):
        _choose_row(weights[row], group_size, divisors, shared, common, own, chosen[row], largest[row])


@njit  # type: ignore[untyped-decorator]
def _settle_row(
    weights: NDArray[np.float32],
    group_size: int,
    unit: float,
    most: int,
    largest: NDArray[np.float32],
    chosen: NDArray[np.uint8],
    divisors: NDArray[np.float64],
    common: NDArray[np.float64],
    own: NDArray[np.float64],
    multiples: NDArray[np.uint8],
) -> None:
    values = np.empty(min(group_size, weights.size))
    magnitudes = np.empty(min(group_size, weights.size))
    nearest = np.empty(
        (2, min(group_size, weights.size))
    )  # distance from the nearest level, at the lower and the upper multiple
    for group in range(chosen.size):
        start = group * group_size
        count = min(group_size, weights.size - start)
        for column in range(count):
            values[column] = np.float64(weights[start + column])
            magnitudes[column] = abs(values[column])
            nearest[0, column] = np.inf
            nearest[1, column] = np.inf
        candidate = chosen[group]
        lower = int(np.floor(np.float64(largest[group]) / divisors[candidate] / unit))
        lower = min(max(lower, 1), most)
        upper = min(lower + 1, most)
        for side in range(2):
            scale = unit * (upper if side else lower)
            _approach(magnitudes, count, scale, common[candidate], nearest[side])
            _approach(values, count, scale, own[candidate], nearest[side])
        down, up = _sum_of_squares(nearest[0], count), _sum_of_squares(nearest[1], count)
        multiples[group] = upper if up < down else lower
        if up != down and abs(up - down) <= (count + 8) * 2.0**-52 * down:
            multiples[group] = 0  # too close to be told apart in float64


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _settle(
    weights: NDArray[np.float32],
    group_size: int,
    units: NDArray[np.float64],
    most: int,
    largest: NDArray[np.float32],
    chosen: NDArray[np.uint8],
    divisors: NDArray[np.float64],
    common: NDArray[np.float64],
    own: NDArray[np.float64],
    multiples: NDArray[np.uint8],
) -> None:
    for row in prange(weights.shape[0]):
        unit = units[row]
        _settle_row(
            weights[row], group_size, unit, most, largest[row], chosen[row], divisors, common, own, multiples[row]
        )


@njit(inline="always")  # type: ignore[untyped-decorator]
def _below(value: float) -> np.float32:
    """Greatest float32 that is not above ``value``: a float32 exceeds ``value`` exactly when it exceeds this."""
    rounded = np.float32(value)
    return np.nextafter(rounded, np.float32(-np.inf)) if rounded > value else rounded


@njit(inline="always")  # type: ignore[untyped-decorator]
def _strictly_below(value: float) -> np.float32:
    """Greatest float32 below ``value``: a float32 is at least ``value`` exactly when it exceeds this."""
    rounded = np.float32(value)
    return np.nextafter(rounded, np.float32(-np.inf)) if rounded >= value else rounded


@njit  # type: ignore[untyped-decorator]
def _encode_row(
    weights: NDArray[np.float32],
    group_size: int,
    scales: NDArray[np.float64],
    chosen: NDArray[np.uint8],
    thresholds: NDArray[np.float64],
    ties_up: NDArray[np.bool_],
    code_of_rank: NDArray[np.uint8],
    codes: NDArray[np.uint8],
) -> None:
    ranks_in_all = code_of_rank.shape[1]
    limits = np.full(max(ranks_in_all, 4), np.float32(np.inf), dtype=np.float32)
    ranks = np.empty(min(group_size, weights.size), dtype=np.int32)
    for group in range(chosen.size):
        candidate = chosen[group]
        start = group * group_size
        count = min(group_size, weights.size - start)
        part = weights[start : start + count]
        for rank in range(ranks_in_all - 1):
            threshold = 0.5 * scales[group] * thresholds[candidate, rank]
            limits[rank] = _strictly_below(threshold) if ties_up[candidate, rank] else _below(threshold)
        if ranks_in_all <= 16:  # count the limits below each weight, many weights at once
            for column in range(count):
                ranks[column] = 0
            for rank in range(0, ranks_in_all, 4):
                first, second, third, fourth = limits[rank], limits[rank + 1], limits[rank + 2], limits[rank + 3]
                for column in range(count):
                    value = part[column]
                    below = np.int32(value > first) + np.int32(value > second)
                    ranks[column] += below + np.int32(value > third) + np.int32(value > fourth)
        else:  # find the place among the limits by halving
            for column in range(count):
                value = part[column]
                place = 0
                step = ranks_in_all // 2
                while step > 0:
                    if value > limits[place + step - 1]:
                        place += step
                    step >>= 1
                ranks[column] = place
        for column in range(count):
            codes[start + column] = code_of_rank[candidate, ranks[column]]


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _encode(
    weights: NDArray[np.float32],
    group_size: int,
    scales: NDArray[np.float64],
    chosen: NDArray[np.uint8],
    thresholds: NDArray[np.float64],
    ties_up: NDArray[np.bool_],
    code_of_rank: NDArray[np.uint8],
    codes: NDArray[np.uint8],
) -> None:
    for row in prange(weights.shape[0]):
        _encode_row(weights[row], group_size, scales[row], chosen[row], thresholds, ties_up, code_of_rank, codes[row])


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _decode(
    codes: NDArray[np.uint8],
    group_size: int,
    scales: NDArray[np.float64],
    chosen: NDArray[np.uint8],
    levels: NDArray[np.float64],
    decoded: NDArray[np.float32],
) -> None:
    for row in prange(codes.shape[0]):
        for group in range(chosen.shape[1]):
            candidate = chosen[row, group]
            scale = scales[row, group]
            for column in range(group * group_size, min((group + 1) * group_size, codes.shape[1])):
                decoded[row, column] = np.float32(levels[candidate, codes[row, column]] * scale)


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _widen(halves: NDArray[np.uint16], bits: NDArray[np.uint32], values: NDArray[np.float32]) -> int:
    """Widen FP16 numbers, given as their bits [rows, columns], to float32; returns how many are NaN or infinite.

    ``bits`` is a view of ``values``. Exponent and significand move to their places in a float32, whose exponent is
    biased by 112 more: a multiplication by 2**112 makes up for that, exactly, for subnormal numbers as well.
    """
    bad = 0
    for row in prange(halves.shape[0]):
        for column in range(halves.shape[1]):
            half = np.uint32(halves[row, column])
            bad += (half & np.uint32(0x7C00)) == np.uint32(0x7C00)
            bits[row, column] = (half & np.uint32(0x8000)) << np.uint32(16) | (half & np.uint32(0x7FFF)) << np.uint32(
                13
            )
        for column in range(halves.shape[1]):
            values[row, column] *= np.float32(2.0**112)
    return bad


def squared_errors(weights: Sequence[float], datatypes: Sequence[DataType]) -> list[Fraction]:
    """Exact squared error of one group of weights on each data type, scaled to the group's largest magnitude.

    This is the reference of ``choose``: integers and fractions only, every weight on the nearest of all levels.
    """
    ratios = [float(weight).as_integer_ratio() for weight in weights]
    unit = max(denominator for _, denominator in ratios)
    exact = [numerator * (unit // denominator) for numerator, denominator in ratios]
    largest = max(map(abs, exact))
    errors = []
    for datatype in datatypes:
        divisor = datatype.max_numerator
        levels = [largest * numerator for numerator in datatype.sorted_numerators]
        midpoints = [low + high for low, high in itertools.pairwise(levels)]
        error = sum(
            (value * divisor - levels[bisect.bisect_left(midpoints, 2 * value * divisor)]) ** 2 for value in exact
        )
        errors.append(Fraction(error, (unit * divisor) ** 2))
    return errors


def choose_exactly(weights: Sequence[float], datatypes: Sequence[DataType]) -> int:
    """Index of the data type with the least squared error over one group, the first of equals, in exact arithmetic."""
    errors = squared_errors(weights, datatypes)
    return errors.index(min(errors))


def choose(
    weights: NDArray[np.float32], group_size: int, datatypes: Sequence[DataType], tables: Tables
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Choose the data type of every group.

    Args:
        weights: float32 [rows, columns], finite.
        group_size: columns of a group; the last group of a row may be shorter.
        datatypes: the candidates, in order of preference among equals (at most 255).
        tables: ``Tables(datatypes)``.

    Returns:
        Index of the data type, uint8 [rows, groups], and the largest magnitude, float32 [rows, groups].
    """
    groups = -(-weights.shape[1] // group_size)
    chosen = np.empty((weights.shape[0], groups), dtype=np.uint8)
    largest = np.empty((weights.shape[0], groups), dtype=np.float32)
    _choose(weights, group_size, tables.divisors, tables.shared, tables.common, tables.own, chosen, largest)
    for row, group in np.argwhere(chosen == UNDECIDED):
        start = group * group_size
        chosen[row, group] = choose_exactly(weights[row, start : start + group_size].tolist(), datatypes)
    return chosen, largest


def settle_exactly(weights: Sequence[float], unit: Fraction, most: int, datatype: DataType) -> int:
    """Multiple of ``unit`` that scales one group, in exact arithmetic: the reference of ``settle``."""
    exact = [Fraction(float(weight)) for weight in weights]
    lower = math.floor(float(max(map(abs, exact))) / datatype.max_numerator / float(unit))
    lower = min(max(lower, 1), most)
    errors = []
    for multiple in (lower, min(lower + 1, most)):
        levels = [unit * multiple * numerator for numerator in datatype.sorted_numerators]
        middles = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
        errors.append(sum((value - levels[bisect.bisect_left(middles, value)]) ** 2 for value in exact))
    return min(lower + 1, most) if errors[1] < errors[0] else lower


def settle(
    weights: NDArray[np.float32],
    group_size: int,
    largest: NDArray[np.float32],
    chosen: NDArray[np.uint8],
    units: NDArray[np.float64],
    most: int,
    datatypes: Sequence[DataType],
    tables: Tables,
) -> NDArray[np.uint8]:
    """Scale of every group as a multiple of one number per row: the better of the two around max |w| / max |level|.

    The least squared error wins, of equals the smaller multiple.

    Args:
        weights: float32 [rows, columns], finite.
        group_size: columns of a group; the last group of a row may be shorter.
        largest: largest magnitude of every group, float32 [rows, groups].
        chosen: index of each group's data type, uint8 [rows, groups].
        units: a multiple of 1, as the scale of a numerator, float64 [rows], of at most 24 significant bits.
        most: the greatest multiple, at most 255; the least is 1.
        datatypes: the data types.
        tables: ``Tables(datatypes)``.

    Returns:
        The multiples, uint8 [rows, groups].
    """
    multiples = np.empty(largest.shape, dtype=np.uint8)
    _settle(weights, group_size, units, most, largest, chosen, tables.divisors, tables.common, tables.own, multiples)
    for row, group in np.argwhere(multiples == 0):
        part = weights[row, group * group_size : (group + 1) * group_size].tolist()
        datatype = datatypes[chosen[row, group]]
        multiples[row, group] = settle_exactly(part, Fraction(float(units[row])), most, datatype)
    return multiples


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that the weights of a matrix may take: of every group the levels of one data type times a scale.

    Attributes:
        group_size: columns of a group; the last group of a row may be shorter.
        scales: positive scale per group, float64 [rows, groups], of at most 32 significant bits.
        chosen: index of each group's data type, uint8 [rows, groups].
        tables: the data types, and how a weight is rounded to a level.
    """

    group_size: int
    scales: NDArray[np.float64]
    chosen: NDArray[np.uint8]
    tables: Tables
    column_step: ClassVar[int] = 1

    def _part(self, rows: slice, columns: slice) -> tuple[int, NDArray[np.float64], NDArray[np.uint8]]:
        """Group size, scales and data types of a part of the matrix."""
        if columns == slice(None):
            return self.group_size, self.scales[rows], self.chosen[rows]
        groups = np.arange(columns.start, columns.stop) // self.group_size
        return 1, self.scales[rows][:, groups], self.chosen[rows][:, groups]

    def encode(
        self, weights: NDArray[np.float32], rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.uint8]:
        """Codes of the levels nearest to ``weights``, float32 [rows, columns], finite: uint8 of the same shape."""
        group_size, scales, chosen = self._part(rows, columns)
        codes = np.empty(weights.shape, dtype=np.uint8)
        units = scales / self.tables.units[chosen]
        tables = self.tables
        _encode(weights, group_size, units, chosen, tables.thresholds, tables.ties_up, tables.codes, codes)
        return codes

    def decode(
        self, codes: NDArray[np.uint8], rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.float32]:
        """Level × scale of every code, uint8 [rows, columns], rounded once to float32."""
        group_size, scales, chosen = self._part(rows, columns)
        decoded = np.empty(codes.shape, dtype=np.float32)
        _decode(codes, group_size, scales, chosen, self.tables.levels, decoded)
        return decoded


class Coder(Protocol):
    """The codes of a matrix whose scales are settled: what ``Grid`` is, and what other families have in its place.

    ``column_step``: columns that must be encoded together, 1 or a pair.
    """

    column_step: ClassVar[int]

    def encode(self, weights: NDArray[np.float32], rows: slice = ..., columns: slice = ...) -> NDArray[np.uint8]:
        """Codes of the part ``weights`` of the matrix."""

    def decode(self, codes: NDArray[np.uint8], rows: slice = ..., columns: slice = ...) -> NDArray[np.float32]:
        """Values of the part ``codes`` of the matrix, float32."""


def row_blocks(weights: Weights) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Blocks of rows as (slice, float32 copy): a quantizer never holds more than one block of widened weights.

    Raises ``InputError`` at a block that holds a NaN or an infinity.
    """
    at_once = max(1, WEIGHTS_AT_ONCE // weights.shape[1])
    for start in range(0, weights.shape[0], at_once):
        rows = slice(start, min(start + at_once, weights.shape[0]))
        if weights.dtype == np.float16:
            block = np.empty(weights[rows].shape, dtype=np.float32)
            bad = int(_widen(weights[rows].view(np.uint16), block.view(np.uint32), block))
        else:
            block = np.ascontiguousarray(weights[rows], dtype=np.float32)
            bad = block.size - int(np.count_nonzero(np.isfinite(block)))
        if bad:
            raise InputError(
                f"{bad} NaN or infinite weights in rows {rows.start} to {rows.stop - 1}; expected finite ones"
            )
        yield rows, block
