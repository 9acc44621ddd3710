"""GOBO: weights become indices into a small dictionary of their matrix; the few outliers stay as they are (MICRO 2020).

No primary text settles the details below; each is a parameter here or our choice, with the reason:

* Outlier: a weight whose natural logarithm of the probability density, under the Gaussian of the matrix's mean and
  standard deviation, is below ``threshold`` (-4). The density depends on the unit of the weights; at a standard
  deviation of 0.02 the rule keeps 0.018 % of a Gaussian's weights, at 0.05 0.049 %, and the paper's 0.1 % at 0.1
  (``expected_outlier_share``).
* Dictionary: 8 or 16 centroids (3 or 4 bits), which begin as the means of equally populated bins of the weights that
  are no outliers. Each step gives every weight the nearest centroid (of equals the lower) and moves every centroid to
  the mean of its weights; an empty bin keeps its centroid. The steps end as soon as the sum of the absolute errors
  (L1) does not fall; the dictionary with the least one is kept.
* Centroids and outliers are FP32. An outlier is stored as its position in the matrix (row by row, 32 bits) and its
  value; its place among the indices holds 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format
from termwise.algorithms.grid import Weights, row_blocks
from termwise.algorithms.integer import Parts
from termwise.algorithms.processing_element import (
    HALF_PIPELINE,
    Fp16Activations,
    PipelineTiming,
    UnsupportedFormatError,
)

KEY_VALUE_BITS = 16
"""Width of keys and values, which are FP16."""

OUTLIER_BYTES = 8
"""Bytes of a stored outlier: a position of 32 bits and an FP32 value."""

EXPECTED_DEVIATION = 0.1
"""Standard deviation of weights that are not at hand: the one at which a Gaussian has the paper's 0.1 % of outliers."""

MOST_STEPS = 100
"""Steps after which the centroids are taken as they are; the error has stopped falling long before."""


@dataclass(frozen=True, kw_only=True)
class DictionarySpec(Fp16Activations):
    """A PE that adds activations by the index of their weight and multiplies the sums by the centroids (GOBO).

    Activations are FP16, sums FP32; outliers are multiplied one by one (``docs/microarchitecture.md``, section 2.6).
    GOBO quantizes weights alone: keys and values are FP16, and the multiplier of the outliers takes one per cycle.
    """

    kind: ClassVar[str] = "dictionary"
    lanes: int = 1

    def cycles_per_step(self, weights: Format) -> int:
        """One cycle; outliers take their own. Raises ``UnsupportedFormatError`` for any format but GOBO's."""
        if weights.family != "gobo":
            raise UnsupportedFormatError(
                f"the dictionary PE (GOBO) takes indices into a dictionary; {weights.name} weights are none"
            )
        return 1

    def key_value_cycles_per_step(self, key_value_bits: int) -> int:
        """One cycle for FP16. Raises ``InputError`` for any other width."""
        if key_value_bits != KEY_VALUE_BITS:
            raise InputError(f"the dictionary PE (GOBO) takes FP16 keys and values; got {key_value_bits} bits")
        return 1

    def pipeline(self, weights: Format, inputs: int, rows: int) -> PipelineTiming:
        """One centroid a cycle, then the outliers of the row that has the most, as expected, rounded up."""
        outliers = math.ceil(expected_maximum(self.expected_outliers_per_row(weights, inputs), rows))
        return replace(HALF_PIPELINE, end_of_row_cycles=1 + self.centroids(weights) + outliers)

    def key_value_pipeline(self, key_value_bits: int) -> PipelineTiming:  # noqa: ARG002
        """Nothing is scaled: the pipeline alone."""
        return HALF_PIPELINE

    def buffer_bits(self, weights: Format, outputs: int, inputs: int) -> float:  # noqa: ARG002
        """Indices are buffered as they are packed."""
        return float(weights.weight_bits)

    def centroids(self, weights: Format) -> int:
        """Centroids of a matrix: the cycles, at the end of a row, in which sums are multiplied by them.

        Raises ``UnsupportedFormatError`` for any format but GOBO's.
        """
        self.cycles_per_step(weights)
        return 1 << weights.weight_bits

    def expected_outliers_per_row(
        self, weights: Format, inputs: int, *, deviation: float = EXPECTED_DEVIATION
    ) -> float:
        """Outliers that a row of ``inputs`` weights is expected to have where the weights are not at hand.

        They are taken to be Gaussian with the standard ``deviation``; see ``expected_outlier_share``. Raises
        ``UnsupportedFormatError`` for any format but GOBO's.
        """
        self.cycles_per_step(weights)
        return inputs * expected_outlier_share(float(weights.option("threshold")), deviation)


def expected_outlier_share(threshold: float, deviation: float) -> float:
    """Share of Gaussian weights of a standard ``deviation`` that are outliers: 0 to 1.

    >>> round(1e5 * expected_outlier_share(-4, 0.05))
    49
    """
    square = -2 * (threshold + math.log(deviation * math.sqrt(2 * math.pi)))
    return 1.0 if square < 0 else math.erfc(math.sqrt(square / 2))


def expected_maximum(mean: float, rows: int) -> float:
    """Expected largest of ``rows`` independent Poisson numbers of ``mean``: the sum over n of P(some row has above n).

    >>> round(expected_maximum(4, 1), 6), round(expected_maximum(4, 32), 2)
    (4.0, 8.65)
    """
    if mean == 0:
        return 0.0
    total = cumulative = 0.0
    for count in range(math.ceil(mean + 12 * math.sqrt(mean)) + 40):  # beyond, not even 2^64 rows reach
        cumulative += math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
        total += 1 - min(cumulative, 1.0) ** rows
    return total


def expected_packed_bytes(format: Format, outputs: int, inputs: int, *, deviation: float = EXPECTED_DEVIATION) -> int:
    """Bytes of a packed ``outputs`` × ``inputs`` matrix of Gaussian weights, with its expected outliers, rounded up."""
    outliers = math.ceil(outputs * inputs * expected_outlier_share(float(format.option("threshold")), deviation))
    parts = format.layout(outputs, inputs)
    fixed = sum(part.bytes for name, part in parts.items() if not name.startswith("outlier"))
    return fixed + OUTLIER_BYTES * outliers


def gaussian_limits(weights: Weights, threshold: float) -> tuple[float, float]:
    """Mean, and the distance from it beyond which a weight is an outlier, of ``weights`` [outputs, inputs].

    ln N(w; mean, deviation) < threshold where (w - mean)**2 > -2 deviation**2 (threshold + ln(deviation √(2 π))). All
    weights are outliers (distance -1) where the right side is negative, none (infinity) where all weights are equal.
    """
    total = square = 0.0
    least, greatest = np.inf, -np.inf
    for _, block in row_blocks(weights):
        total += float(block.sum(dtype=np.float64))
        least, greatest = min(least, float(block.min())), max(greatest, float(block.max()))
    mean = total / weights.size
    if least == greatest:
        return mean, np.inf
    for _, block in row_blocks(weights):
        square += float(np.square(block.astype(np.float64) - mean).sum())
    deviation = float(np.sqrt(square / weights.size))
    reach = -2 * (threshold + np.log(deviation * np.sqrt(2 * np.pi)))
    return mean, -1.0 if reach < 0 else deviation * float(np.sqrt(reach))


def centroids(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Dictionary of ``count`` centroids of ``values`` [at least one, sorted], ascending, float32 [count].

    Where there are fewer values than centroids, bins without one begin at the median.
    """
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    edges = np.linspace(0, values.size, count + 1).round().astype(np.intp)
    best = current = np.sort(_means(values, sums, edges, np.full(count, values[values.size // 2])))
    least = np.inf
    for _ in range(MOST_STEPS):
        edges = np.concatenate([[0], np.searchsorted(values, _last_below(current), side="right"), [values.size]])
        error = _absolute_error(values, sums, edges, current)
        if error >= least:
            break
        least, best = error, current
        current = _means(values, sums, edges, current)
    return best


def _last_below(current: NDArray[np.float32]) -> NDArray[np.float32]:
    """The greatest float32 that goes to the lower of every two neighbouring centroids: at most midway."""
    exact = current.astype(np.float64)
    middles = (exact[1:] + exact[:-1]) / 2
    rounded = middles.astype(np.float32)
    return np.where(rounded > middles, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _means(
    values: NDArray[np.float32], sums: NDArray[np.float64], edges: NDArray[np.intp], empty: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Mean of every bin of the sorted ``values`` between ``edges``, from their running ``sums``.

    Of an empty bin it is what ``empty`` says. A mean lies within its bin, also where small values are lost in the sums.
    """
    counts = np.diff(edges)
    first = values[np.minimum(edges[:-1], values.size - 1)]
    last = values[np.maximum(edges[1:] - 1, 0)]
    means = np.diff(sums[edges]) / np.maximum(counts, 1)
    return np.where(counts > 0, np.minimum(np.maximum(means, first), last), empty).astype(np.float32)


def _absolute_error(
    values: NDArray[np.float32], sums: NDArray[np.float64], edges: NDArray[np.intp], current: NDArray[np.float32]
) -> float:
    """Sum of |value - centroid| over all bins, from the running ``sums`` of the sorted ``values``."""
    exact = current.astype(np.float64)
    middle = np.clip(np.searchsorted(values, current), edges[:-1], edges[1:])
    above = sums[edges[1:]] - sums[middle] - (edges[1:] - middle) * exact
    below = (middle - edges[:-1]) * exact - (sums[middle] - sums[edges[:-1]])
    return float((above + below).sum())


def fit(weights: Weights, format: Format) -> Parts:
    """``dictionary``, ``outlier_positions`` and ``outlier_values`` of ``weights`` [outputs, inputs].

    Holds a sorted copy of the weights. Raises ``InputError`` for a matrix of 2**32 weights or more.
    """
    if weights.size >= 1 << 32:
        raise InputError(f"{weights.size} weights; expected fewer than 2^32, since a position has 32 bits")
    mean, reach = gaussian_limits(weights, float(format.option("threshold")))
    positions, outliers, others = [], [], []
    for rows, block in row_blocks(weights):
        far = np.abs(block.astype(np.float64) - mean) > reach
        positions.append((np.flatnonzero(far) + rows.start * weights.shape[1]).astype(np.uint32))
        outliers.append(block[far])
        others.append(block[~far])
    normal = np.concatenate(others)
    normal.sort()
    count = 1 << format.weight_bits
    return {
        "dictionary": centroids(normal, count) if normal.size else np.zeros(count, dtype=np.float32),
        "outlier_positions": np.concatenate(positions),
        "outlier_values": np.concatenate(outliers).astype(np.float32),
    }


@dataclass(frozen=True, kw_only=True)
class DictionaryCoder:
    """Indices into the ``dictionary``, float32 [count], of a matrix of ``inputs`` columns whose outliers are known.

    ``positions`` (ascending) and ``values`` of the outliers, [outliers].
    """

    dictionary: NDArray[np.float32]
    positions: NDArray[np.int64]
    values: NDArray[np.float32]
    inputs: int
    column_step: ClassVar[int] = 1

    def _outliers(
        self, shape: tuple[int, ...], rows: slice, columns: slice
    ) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]:
        """(row, column) of every outlier in a part of the matrix of that ``shape``, and their values."""
        if {rows.step, columns.step} - {None, 1} or min(rows.start or 0, columns.start or 0) < 0:
            raise ValueError(f"rows {rows}, columns {columns}: expected neighbours, counted from the start")
        first_row, first_column = rows.start or 0, columns.start or 0
        found = slice(*np.searchsorted(self.positions, [first_row * self.inputs, (first_row + shape[0]) * self.inputs]))
        row, column = np.divmod(self.positions[found], self.inputs)
        here = (column >= first_column) & (column < first_column + shape[1])
        return (row[here] - first_row, column[here] - first_column), self.values[found][here]

    def encode(
        self, weights: NDArray[np.float32], rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.uint8]:
        """Index of the centroid nearest to each weight, of equals the lower; 0 for an outlier."""
        codes = np.searchsorted(_last_below(self.dictionary), weights).astype(np.uint8)
        codes[self._outliers(weights.shape, rows, columns)[0]] = 0
        return codes

    def decode(
        self, codes: NDArray[np.uint8], rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.float32]:
        """The centroid of every index, and the outliers."""
        decoded = self.dictionary[codes]
        places, values = self._outliers(codes.shape, rows, columns)
        decoded[places] = values
        return decoded


def coder(parts: Parts, format: Format, inputs: int) -> DictionaryCoder:  # noqa: ARG001
    """Indices into the stored dictionary."""
    return DictionaryCoder(
        dictionary=parts["dictionary"].astype(np.float32, copy=False),
        positions=parts["outlier_positions"].astype(np.int64),
        values=parts["outlier_values"].astype(np.float32, copy=False),
        inputs=inputs,
    )
