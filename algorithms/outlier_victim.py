"""OliVe: outlier-victim pairs (ISCA 2023, section 3).

Two neighbouring weights of a row form a pair; the last weight of an odd row has no partner and is never an outlier. If
the larger of them is an outlier, it is kept in an outlier type (abfloat) and its neighbour, the victim, becomes zero:
the victim's place holds the identifier 1000, which is no code of a normal type, so the decoder knows which of the two
is the outlier. Of two outliers the larger survives; at equal magnitude the right one (Algorithm 1; the authors' script
keeps the left one and pairs over the flattened tensor).

Normal types int4 (0 .. ±7) with abfloat bias 2 (±12 .. ±96), or flint4 (0 .. ±16) with bias 3 (±24 .. ±192); one
choice per matrix, by total squared error. An outlier's code is Algorithm 2: the exponent from its leading bit, the
base rounded to nearest even, clamped to the least and the greatest code. A weight is an outlier when its magnitude
exceeds the least outlier level (scale × 12 or 24). The paper leaves that threshold open; this one comes within 0.1
dB of the authors' script on the synthetic matrix of reports/formats-on-a-synthetic-matrix, the greatest normal level
would lose 0.2 to 0.4 dB.

Scale search (per output channel, or per group): x_max = max |mean ± 3 standard deviations|, alpha = x_max × i / 100
for i = 75, 77, .., 249, scale = alpha / largest normal level, rounded to FP16 as stored; the strictly least squared
error wins. Sums are float64 in a fixed order, so the choice is the same on every machine. An all-zero group has the
scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from termwise.algorithms import grid
from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.flint import reads_integers_and_flint
from termwise.algorithms.formats import Format
from termwise.algorithms.integer import Parts, empty_parts, grid_tables, half_scales
from termwise.algorithms.processing_element import UnsupportedFormatError, bit_parallel_key_value_cycles

NORMAL_TYPES = (get_datatype("int4"), get_datatype("flint4"))
OUTLIER_TYPES = (get_datatype("abfloat4_e2m1_b2"), get_datatype("abfloat4_e2m1_b3"))
OUTLIER_BIASES = (2, 3)
IDENTIFIER = 0b1000
SEARCH_PERCENT = tuple(range(75, 251, 2))


@dataclass(frozen=True, kw_only=True)
class OutlierVictimSpec:
    """A bit-parallel PE with OliVe's pair decoder, as BitMoD section V-A compares with: one weight per cycle.

    Activations are FP16, weights have up to 8 bits. It takes integers, flint and outlier-victim pairs; not BitMoD's
    special values or zero points.
    """

    kind: ClassVar[str] = "outlier_victim"
    lanes: int = 1

    def cycles_per_step(self, weights: Format) -> int:
        """One cycle. Raises ``UnsupportedFormatError`` for a format that the decoder cannot read."""
        if weights.family != "olive" and not reads_integers_and_flint(weights):
            raise UnsupportedFormatError(
                "the outlier-victim PE (OliVe) decodes integer, flint and outlier-victim weights; "
                f"{weights.name} needs another decoder"
            )
        return 1

    def key_value_cycles_per_step(self, key_value_bits: int) -> int:
        """One cycle for keys and values of up to 8 bits."""
        return bit_parallel_key_value_cycles(self.kind, key_value_bits)

    def buffer_bits(self, weights: Format, outputs: int, inputs: int) -> float:
        """Weights are buffered as they are packed."""
        return weights.bits_per_weight(outputs, inputs)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _outlier_code(magnitude: float, bias: int) -> int:
    """Algorithm 2 for ``magnitude`` in units of the scale: the low three bits of the code, 1 .. 7."""
    exponent = int(np.floor(np.log2(magnitude))) - 1
    base = int(np.rint(magnitude / 2.0**exponent))
    if base == 4:
        exponent += 1
        base = 2
    code = ((exponent - bias) << 1) | (base & 1)
    return min(max(code, 1), 7)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _outlier_level(code: int, bias: int) -> float:
    """Magnitude of an outlier code's level."""
    return float((2 + (code & 1)) << ((code >> 1) + bias))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _group_error(
    weights: NDArray[np.float32],
    scale: float,
    levels: NDArray[np.float64],
    bias: int,
    limit: float,
    errors: NDArray[np.float64],
    best: float,
) -> float:
    """Squared error of one group at ``scale``, or any number above ``best`` once that is exceeded.

    ``levels`` are the non-negative normal levels, a multiple of 4 of them; a weight above ``limit`` × scale is an
    outlier; ``errors`` is room for one number per weight.
    """
    count = weights.size
    inverse = 1.0 / scale
    for index in range(count):
        errors[index] = np.inf
    for step in range(0, levels.size, 4):
        first, second, third, fourth = levels[step], levels[step + 1], levels[step + 2], levels[step + 3]
        for index in range(count):
            value = abs(weights[index]) * inverse
            near = min(min(abs(value - first), abs(value - second)), min(abs(value - third), abs(value - fourth)))
            errors[index] = min(errors[index], near)
    total = 0.0
    best *= inverse * inverse
    for index in range(0, count - 1, 2):
        left = abs(weights[index]) * inverse
        right = abs(weights[index + 1]) * inverse
        if left <= limit and right <= limit:
            total += errors[index] * errors[index] + errors[index + 1] * errors[index + 1]
        else:
            outlier, victim = (left, right) if left > right else (right, left)
            difference = outlier - _outlier_level(_outlier_code(outlier, bias), bias)
            total += difference * difference + victim * victim
        if total > best:
            return np.inf
    if count % 2:
        total += errors[count - 1] * errors[count - 1]
    return total * scale * scale


@njit(cache=True)  # type: ignore[untyped-decorator]
def _search_row(
    weights: NDArray[np.float32],
    group_size: int,
    candidates: NDArray[np.float64],
    levels: NDArray[np.float64],
    bias: int,
    limit: float,
    scales: NDArray[np.float64],
) -> float:
    """Best of ``candidates`` [groups, percents] for every group into ``scales`` [groups]; returns the squared error."""
    errors = np.empty(group_size)
    total = 0.0
    for group in range(scales.size):
        part = weights[group * group_size : (group + 1) * group_size]
        best = np.inf
        for percent in range(candidates.shape[1]):
            error = _group_error(part, candidates[group, percent], levels, bias, limit, errors, best)
            if error < best:
                best = error
                scales[group] = candidates[group, percent]
        total += best
    return total


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _search(
    weights: NDArray[np.float32],
    group_size: int,
    candidates: NDArray[np.float64],
    levels: NDArray[np.float64],
    bias: int,
    limit: float,
    scales: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> None:
    for row in prange(weights.shape[0]):
        errors[row] = _search_row(weights[row], group_size, candidates[row], levels, bias, limit, scales[row])


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _replace_outliers(
    weights: NDArray[np.float32],
    group_size: int,
    scales: NDArray[np.float64],
    limit: float,
    bias: int,
    codes: NDArray[np.uint8],
) -> None:
    """Overwrite the ``codes`` [rows, columns] of the pairs that hold a weight above ``limit`` × scale."""
    for row in prange(weights.shape[0]):
        for index in range(0, weights.shape[1] - 1, 2):
            scale = scales[row, index // group_size]
            left = np.float64(weights[row, index]) / scale
            right = np.float64(weights[row, index + 1]) / scale
            if abs(left) > limit and abs(left) > abs(right):
                codes[row, index] = _outlier_code(abs(left), bias) | (IDENTIFIER if left < 0 else 0)
                codes[row, index + 1] = IDENTIFIER
            elif abs(right) > limit:
                codes[row, index] = IDENTIFIER
                codes[row, index + 1] = _outlier_code(abs(right), bias) | (IDENTIFIER if right < 0 else 0)


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _decode(
    codes: NDArray[np.uint8],
    group_size: int,
    scales: NDArray[np.float64],
    normal: NDArray[np.float64],
    outlier: NDArray[np.float64],
    decoded: NDArray[np.float32],
) -> None:
    """``codes`` to ``decoded``, both [rows, columns]; a code beside an identifier is an outlier."""
    for row in prange(decoded.shape[0]):
        for column in range(decoded.shape[1]):
            code = codes[row, column]
            other = column ^ 1
            level = 0.0
            if code != IDENTIFIER:
                is_outlier = other < codes.shape[1] and codes[row, other] == IDENTIFIER
                level = outlier[code] if is_outlier else normal[code]
            decoded[row, column] = np.float32(level * scales[row, column // group_size])


def _candidate_scales(block: NDArray[np.float32], group_size: int, largest_level: float) -> NDArray[np.float64]:
    """Scales to try, as stored in FP16: float64 [rows, groups, percents]."""
    inputs = block.shape[1]
    starts = np.arange(0, inputs, group_size)
    counts = np.diff(np.append(starts, inputs))
    exact = block.astype(np.float64)
    mean = np.add.reduceat(exact, starts, axis=1) / counts
    square = np.add.reduceat((exact - np.repeat(mean, counts, axis=1)) ** 2, starts, axis=1) / counts
    reach = np.abs(mean) + 3 * np.sqrt(square)
    scales = reach[:, :, None] * (np.array(SEARCH_PERCENT) / 100 / largest_level)
    return half_scales(scales).astype(np.float64)


def _normal_levels(index: int) -> NDArray[np.float64]:
    """Non-negative levels of a normal type in ascending order, float64."""
    return np.array([level for level in NORMAL_TYPES[index].levels if level >= 0])


def _least_outlier(index: int) -> float:
    """The least outlier level beside a normal type: what a weight must exceed to be an outlier."""
    return min(level for level in OUTLIER_TYPES[index].levels if level > 0)


def fit(weights: grid.Weights, format: Format) -> Parts:
    """``scales`` and ``matrix_type`` of ``weights`` [outputs, inputs]."""
    parts = empty_parts(weights, format)
    outputs, inputs = weights.shape
    group_size = format.group_size or inputs
    scales = np.empty((len(NORMAL_TYPES), outputs, format.groups(inputs)))
    totals = np.zeros(len(NORMAL_TYPES))
    for rows, block in grid.row_blocks(weights):
        for index, bias in enumerate(OUTLIER_BIASES):
            levels = _normal_levels(index)
            candidates = _candidate_scales(block, group_size, levels[-1])
            errors = np.empty(block.shape[0])
            _search(block, group_size, candidates, levels, bias, _least_outlier(index), scales[index, rows], errors)
            totals[index] += errors.sum()
    best = int(np.argmin(totals))
    parts["matrix_type"][0] = best
    parts["scales"][:] = scales[best]
    return parts


@dataclass(frozen=True, kw_only=True)
class PairCoder:
    """Outlier-victim pairs of a matrix whose scales and normal type are settled.

    ``scales`` float64 [rows, groups]; ``index`` of the normal type.
    """

    group_size: int
    scales: NDArray[np.float64]
    index: int
    column_step: ClassVar[int] = 2

    def _part(self, rows: slice, columns: slice) -> tuple[int, NDArray[np.float64]]:
        if columns == slice(None):
            return self.group_size, self.scales[rows]
        return 2, self.scales[rows][:, np.arange(columns.start, columns.stop, 2) // self.group_size]

    def encode(
        self, weights: NDArray[np.float32], rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.uint8]:
        """Codes of ``weights``, float32 [rows, columns], which begin with a whole pair: uint8 [rows, columns]."""
        group_size, scales = self._part(rows, columns)
        normal = grid_tables(NORMAL_TYPES[self.index : self.index + 1])
        only = np.zeros(scales.shape, dtype=np.uint8)
        codes = grid.Grid(group_size=group_size, scales=scales, chosen=only, tables=normal).encode(weights)
        _replace_outliers(weights, group_size, scales, _least_outlier(self.index), OUTLIER_BIASES[self.index], codes)
        return codes

    def decode(
        self, codes: NDArray[np.uint8], rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.float32]:
        """Values of ``codes``, uint8 [rows, columns], which begin with a whole pair: float32 [rows, columns]."""
        group_size, scales = self._part(rows, columns)
        normal = grid_tables(NORMAL_TYPES[self.index : self.index + 1]).levels[0]
        outlier = grid_tables(OUTLIER_TYPES[self.index : self.index + 1]).levels[0]
        decoded = np.empty(codes.shape, dtype=np.float32)
        _decode(codes, group_size, scales, normal, outlier, decoded)
        return decoded


def coder(parts: Parts, format: Format, inputs: int) -> PairCoder:
    """Pairs at the stored scales and normal type."""
    return PairCoder(
        group_size=format.group_size or inputs + inputs % 2,
        scales=parts["scales"].astype(np.float64),
        index=int(parts["matrix_type"][0].astype(np.intp)),
    )
