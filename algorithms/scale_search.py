"""The scale that gives a group of weights the least squared error, of a list of candidates: OliVe's and ANT's search.

A candidate is a group's reach (what its paper starts from) times a percentage over the largest level, rounded to FP16
as it will be stored. Data types here are symmetric, so that only magnitudes count. With a type for outliers, weights
are encoded in OliVe's pairs (see ``outlier_victim``); without one, every weight takes the nearest level.

A weight has at most 24 significant bits, level × scale at most 29: every comparison is exact in float64, and so is a
weight's distance from its level unless it lies far outside. Only squares and their sums round, the latter in an order
that depends on neither the candidate nor the machine. The
strictly least error wins, of equal ones the first candidate; the order in which candidates are tried, and that the sum
of a worse one is not finished, change nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from termwise.algorithms.datatypes import DataType
from termwise.algorithms.errors import InputError

HALF_MAX = 65504.0
"""Largest FP16 number; the least positive one is 2**-24."""

_BLOCK = 128
"""Weights whose errors are summed before the sum is compared with the best so far."""

_COARSE_STEP = 16
"""One candidate in so many is tried first, so that a good one is known early."""


def runs_of(datatype: DataType) -> NDArray[np.float64]:
    """The non-negative numerators of a symmetric type as runs of equal steps: float64 [runs, 3], (first, step, steps).

    The nearest level is then the nearest one of every run, which is a division and a rounding, and of these the
    nearest. Every neighbouring pair of levels lies in one run; flint4 has 0 to 4 by 1, 4 to 8 by 2, 8 to 16 by 8.
    """
    levels = [level for level in datatype.sorted_numerators if level >= 0]
    runs: list[list[int]] = []
    for low, high in itertools.pairwise(levels):
        if runs and high - low == runs[-1][1]:
            runs[-1][2] += 1
        else:
            runs.append([low, high - low, 1])
    return np.array(runs, dtype=np.float64)


@njit(inline="always")  # type: ignore[untyped-decorator]
def to_half(value: float) -> float:
    """The FP16 number nearest to ``value``, of equals the even one; never below 2**-24, never above 65504."""
    clipped = min(max(value, 2.0**-24), HALF_MAX)
    _, exponent = math.frexp(clipped)
    unit = math.ldexp(1.0, max(exponent - 11, -24))
    return float(np.rint(clipped / unit) * unit)


@njit(inline="always")  # type: ignore[untyped-decorator]
def nearest_rank(value: float, levels: NDArray[np.float64], codes: NDArray[np.uint8]) -> int:
    """Index of the one of ``levels`` (ascending) nearest to ``value``; of equals the one with the even code."""
    low, high = 0, levels.size - 1
    while low < high:
        middle = (low + high) // 2
        threshold = 0.5 * (levels[middle] + levels[middle + 1])
        if value > threshold or (value == threshold and codes[middle + 1] % 2 == 0):
            low = middle + 1
        else:
            high = middle
    return low


@njit(inline="always")  # type: ignore[untyped-decorator]
def _distance(magnitude: float, unit: float, inverse: float, first: float, step: float, steps: float) -> float:
    """Distance of ``magnitude`` from the nearest level of one run, in which levels are multiples of ``unit``.

    ``inverse`` is 1 / (unit × step), rounded; that can only matter midway between two levels, which are equally far.
    """
    rank: float = min(max(np.rint(magnitude * inverse - first / step), 0.0), steps)
    return abs(magnitude - (first + step * rank) * unit)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _squares(
    magnitudes: NDArray[np.float64],
    count: int,
    unit: float,
    runs: NDArray[np.float64],
    total: float,
    best: float,
    nearest: NDArray[np.float64],
) -> float:
    """``total`` plus the squared distances of ``magnitudes`` [count, whole blocks] from their levels.

    Any number above ``best`` once that is exceeded. ``nearest`` is room for one block.
    """
    for start in range(0, count, _BLOCK):
        for run in range(runs.shape[0]):
            first, step, steps = runs[run, 0], runs[run, 1], runs[run, 2]
            inverse = 1.0 / (unit * step)
            if run == 0:
                for index in range(_BLOCK):
                    nearest[index] = _distance(magnitudes[start + index], unit, inverse, first, step, steps)
            else:
                for index in range(_BLOCK):
                    distance = _distance(magnitudes[start + index], unit, inverse, first, step, steps)
                    nearest[index] = min(nearest[index], distance)
        one = two = three = four = 0.0
        for index in range(0, _BLOCK, 4):  # four partial sums, which a processor adds side by side
            one += nearest[index] * nearest[index]
            two += nearest[index + 1] * nearest[index + 1]
            three += nearest[index + 2] * nearest[index + 2]
            four += nearest[index + 3] * nearest[index + 3]
        total += (one + two) + (three + four)
        if total > best:
            return np.inf
    return total


@njit(inline="always")  # type: ignore[untyped-decorator]
def _pair_squares(
    pairs: NDArray[np.float64],
    count: int,
    scale: float,
    unit: float,
    runs: NDArray[np.float64],
    outlier_levels: NDArray[np.float64],
    outlier_codes: NDArray[np.uint8],
) -> float:
    """Squared error of ``pairs`` [count, 2] of magnitudes, the larger first: an outlier and its victim, or neither."""
    total = 0.0
    for pair in range(count):
        larger, smaller = pairs[pair, 0], pairs[pair, 1]
        if larger > outlier_levels[0] * scale:
            difference = larger - outlier_levels[nearest_rank(larger / scale, outlier_levels, outlier_codes)] * scale
            total += difference * difference + smaller * smaller
        else:
            for place in range(2):
                near = np.inf
                for run in range(runs.shape[0]):
                    first, step, steps = runs[run, 0], runs[run, 1], runs[run, 2]
                    near = min(near, _distance(pairs[pair, place], unit, 1.0 / (unit * step), first, step, steps))
                total += near * near
    return total


@njit  # type: ignore[untyped-decorator]
def _search_row(
    weights: NDArray[np.float32],
    group_size: int,
    reach: NDArray[np.float64],
    factors: NDArray[np.float64],
    order: NDArray[np.intp],
    per_unit: float,
    runs: NDArray[np.float64],
    outlier_levels: NDArray[np.float64],
    outlier_codes: NDArray[np.uint8],
    scales: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> None:
    longest = min(group_size, weights.size)
    magnitudes = np.empty(longest + _BLOCK)  # of the weights that are normal at every candidate
    pairs = np.empty((longest // 2, 2))  # those that hold an outlier at the least candidate
    nearest = np.empty(_BLOCK)
    candidates = np.empty(factors.size)
    for group in range(scales.size):
        if reach[group] == 0.0:
            scales[group] = 1.0
            errors[group] = 0.0
            continue
        for index in range(factors.size):
            candidates[index] = to_half(reach[group] * factors[index])
        limit = outlier_levels[0] * candidates[0] if outlier_levels.size else np.inf
        part = weights[group * group_size : (group + 1) * group_size]
        normal = paired = 0
        for index in range(0, part.size, 2):
            left = np.float64(abs(part[index]))
            right = np.float64(abs(part[index + 1])) if index + 1 < part.size else -1.0
            if right >= 0 and max(left, right) > limit:
                pairs[paired, 0] = max(left, right)
                pairs[paired, 1] = min(left, right)
                paired += 1
            else:
                magnitudes[normal] = left
                magnitudes[normal + 1] = max(right, 0.0)
                normal += 2
        filled = -(-normal // _BLOCK) * _BLOCK
        magnitudes[normal:filled] = 0.0  # a zero has no error
        best = np.inf
        chosen = 0
        for index in order:
            unit = candidates[index] / per_unit
            error = _pair_squares(pairs, paired, candidates[index], unit, runs, outlier_levels, outlier_codes)
            error = _squares(magnitudes, filled, unit, runs, error, best, nearest)
            if error < best or (error == best and index < chosen):
                best = error
                chosen = index
        scales[group] = candidates[chosen]
        errors[group] = best


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _search(
    weights: NDArray[np.float32],
    group_size: int,
    reach: NDArray[np.float64],
    factors: NDArray[np.float64],
    order: NDArray[np.intp],
    per_unit: float,
    runs: NDArray[np.float64],
    outlier_levels: NDArray[np.float64],
    outlier_codes: NDArray[np.uint8],
    scales: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> None:
    for row in prange(weights.shape[0]):
        _search_row(
            weights[row],
            group_size,
            reach[row],
            factors,
            order,
            per_unit,
            runs,
            outlier_levels,
            outlier_codes,
            scales[row],
            errors[row],
        )


def positive_levels(datatype: DataType) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """The positive levels of a data type in ascending order, float64, and their codes, uint8."""
    found = [pair for pair in zip(datatype.levels, datatype.sorted_codes, strict=True) if pair[0] > 0]
    return np.array([level for level, _ in found]), np.array([code for _, code in found], dtype=np.uint8)


def candidate_factors(reach: NDArray[np.float64], percents: Sequence[int], datatype: DataType) -> NDArray[np.float64]:
    """What a group's reach is multiplied by to become a candidate: percent / 100 / largest level, float64 [percents].

    Raises ``InputError`` for a group whose least candidate is above 65504.
    """
    factors: NDArray[np.float64] = np.array(percents) / 100 / datatype.maximum
    needed = reach.max() * factors[0]
    if needed > HALF_MAX:
        raise InputError(f"a group needs the scale {needed:.4g}; expected at most 65504, the largest FP16 number")
    return factors


def best_scales(
    weights: NDArray[np.float32],
    group_size: int,
    reach: NDArray[np.float64],
    percents: Sequence[int],
    datatype: DataType,
    outlier: DataType | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and squared error of every group: the candidate reach × percent / 100 / largest level of the least error.

    Args:
        weights: float32 [rows, columns], finite.
        group_size: columns of a group, even where there are outliers; the last group of a row may be shorter.
        reach: what the percentages refer to, float64 [rows, groups]; 0 only of a group of zeros, which has the scale 1.
        percents: the candidates, ascending, in order of preference among equals.
        datatype: the symmetric type of normal weights.
        outlier: the type of outliers; None where there are none.

    Returns:
        The scales, FP16 numbers as float64 [rows, groups], and the squared errors, float64 [rows, groups].

    Raises:
        InputError: a group whose least candidate is above 65504. Greater candidates become 65504.
    """
    factors = candidate_factors(reach, percents, datatype)
    levels, codes = np.empty(0), np.empty(0, dtype=np.uint8)
    if outlier is not None:
        levels, codes = positive_levels(outlier)
    indices = np.arange(factors.size)
    order = indices[np.argsort(indices % _COARSE_STEP != _COARSE_STEP // 2, kind="stable")]
    scales = np.empty(reach.shape)
    errors = np.empty(reach.shape)
    per_unit = float(1 << datatype.fraction_bits)
    _search(weights, group_size, reach, factors, order, per_unit, runs_of(datatype), levels, codes, scales, errors)
    return scales, errors


def sample_row(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """``sample`` of activations, float32 of any shape, as one row [1, values].

    Raises ``InputError`` where it is empty or not finite.
    """
    if sample.size == 0:
        raise InputError("the sample of activations is empty; expected at least one value")
    bad = sample.size - int(np.count_nonzero(np.isfinite(sample)))
    if bad:
        raise InputError(f"the sample of activations holds {bad} NaN or infinite values; expected finite ones")
    return np.ascontiguousarray(sample, dtype=np.float32).reshape(1, -1)
