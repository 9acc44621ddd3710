"""OliVe: outlier-victim pairs (ISCA 2023, section 3), at 4 and at 8 bits.

Two neighbouring weights of a row form a pair; the last weight of an odd row has no partner and is never an outlier. If
the larger of them is an outlier, it is kept in an outlier type (abfloat) and its neighbour, the victim, becomes zero:
the victim's place holds the identifier 1000 (10000000 at 8 bits), which is no code of a normal type, so the decoder
knows which of the two is the outlier. Of two outliers the larger survives; at equal magnitude the right one (Algorithm
1; the authors' script keeps the left one and pairs over the flattened tensor).

Normal types at 4 bits: int4 (0 .. ±7) with abfloat bias 2 (±12 .. ±96), or flint4 (0 .. ±16) with bias 3 (±24 ..
±192); one choice per matrix, by total squared error, int4 among equals. At 8 bits: int8 (0 .. ±127), with abfloat E4M3
(±144 .. ±2^15, the paper's) or E2M5 (±132 .. ±2016, of the authors' code). A format's ``datatypes`` name the normal
types and then, in the same order, the outlier type of each.

An outlier's code is Algorithm 2: the exponent from its leading bit, the base rounded to nearest even, clamped to the
least and the greatest code that is a level. That is the level nearest to it, of two equally near the one with the even
code, since codes ascend with the levels and a base's last bit is its code's: it is found so in the table of levels.

A weight is an outlier when its magnitude exceeds the least outlier level (scale × 12, 24, 144 or 132). The paper leaves
that threshold open; this one comes within 0.1 dB of the authors' script on the synthetic matrix of
reports/formats-on-a-synthetic-matrix, the greatest normal level would lose 0.2 to 0.4 dB.

Scale search (per output channel, or per group): x_max = max |mean ± 3 standard deviations|, alpha = x_max × i / 100
for i = 75, 77, .., 249, scale = alpha / largest normal level, rounded to FP16 as stored; the strictly least squared
error wins (``scale_search``). Mean and deviation are float64 sums from left to right, so the choice is the same on
every machine. An all-zero group has the scale 1; a candidate above 65504 becomes 65504. An outlier beyond the greatest
outlier level takes that level.

Activations are encoded likewise, in pairs of neighbouring channels, with one scale per tensor that is searched on a
sample beforehand (``calibrate``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from termwise.algorithms import grid
from termwise.algorithms.datatypes import DataType
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import reads_integers_and_flint
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.integer import Parts, empty_parts, grid_tables
from termwise.algorithms.processing_element import BitParallelSpec
from termwise.algorithms.scale_search import best_scales, nearest_rank, positive_levels, sample_row

if TYPE_CHECKING:
    from termwise.algorithms.quantize import QuantizedTensor

SEARCH_PERCENT = tuple(range(75, 251, 2))


@dataclass(frozen=True, kw_only=True)
class OutlierVictimSpec(BitParallelSpec):
    """A bit-parallel PE with OliVe's pair decoder.

    It takes integers, flint and outlier-victim pairs; not BitMoD's special values or zero points.
    """

    kind: ClassVar[str] = "outlier_victim"
    name: ClassVar[str] = "outlier-victim PE (OliVe)"
    read_types: ClassVar[str] = "integer, flint and outlier-victim"

    def reads(self, format: Format) -> bool:
        """Pairs, and what ANT's decoder reads."""
        return format.family == "olive" or reads_integers_and_flint(format)


def pairs_of_types(format: Format) -> tuple[tuple[DataType, DataType], ...]:
    """(normal type, outlier type) of every choice that a matrix of an OliVe format has."""
    half = len(format.datatypes) // 2
    return tuple(zip(format.datatypes[:half], format.datatypes[half:], strict=True))


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _reach(weights: NDArray[np.float32], group_size: int, reach: NDArray[np.float64]) -> None:
    """max |mean ± 3 standard deviations| of every group into ``reach`` [rows, groups]."""
    for row in prange(weights.shape[0]):
        for group in range(reach.shape[1]):
            part = weights[row, group * group_size : (group + 1) * group_size]
            total = 0.0
            for weight in part:
                total += np.float64(weight)
            mean = total / part.size
            total = 0.0
            for weight in part:
                total += (np.float64(weight) - mean) ** 2
            reach[row, group] = abs(mean) + 3.0 * np.sqrt(total / part.size)


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _replace_outliers(
    weights: NDArray[np.float32],
    group_size: int,
    scales: NDArray[np.float64],
    levels: NDArray[np.float64],
    code_of_rank: NDArray[np.uint8],
    identifier: int,
    codes: NDArray[np.uint8],
) -> None:
    """Overwrite the ``codes`` [rows, columns] of the pairs that hold an outlier (Algorithm 1).

    ``levels`` are the outlier type's positive ones in ascending order, ``code_of_rank`` their codes. A quotient of
    weight and scale is rounded, but stays on its side of every level and midpoint: those differ from it by more.
    """
    for row in prange(weights.shape[0]):
        for index in range(0, weights.shape[1] - 1, 2):
            scale = scales[row, index // group_size]
            left = abs(np.float64(weights[row, index])) / scale
            right = abs(np.float64(weights[row, index + 1])) / scale
            if max(left, right) > levels[0]:
                outlier = index if left > right else index + 1
                sign = identifier if weights[row, outlier] < 0 else 0
                codes[row, outlier] = code_of_rank[nearest_rank(max(left, right), levels, code_of_rank)] | sign
                codes[row, outlier ^ 1] = identifier


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _decode(
    codes: NDArray[np.uint8],
    group_size: int,
    scales: NDArray[np.float64],
    normal: NDArray[np.float64],
    outlier: NDArray[np.float64],
    identifier: int,
    decoded: NDArray[np.float32],
) -> None:
    """``codes`` to ``decoded``, both [rows, columns]; a code beside an identifier is an outlier."""
    for row in prange(decoded.shape[0]):
        for column in range(decoded.shape[1]):
            code = codes[row, column]
            other = column ^ 1
            level = 0.0
            if code != identifier:
                is_outlier = other < codes.shape[1] and codes[row, other] == identifier
                level = outlier[code] if is_outlier else normal[code]
            decoded[row, column] = np.float32(level * scales[row, column // group_size])


def group_reach(block: NDArray[np.float32], group_size: int, groups: int) -> NDArray[np.float64]:
    """max |mean ± 3 standard deviations| of every group of ``block`` [rows, columns]: float64 [rows, groups]."""
    reach = np.empty((block.shape[0], groups))
    _reach(block, group_size, reach)
    return reach


def fit(
    weights: grid.Weights,
    format: Format,
    reach_of: Callable[..., NDArray[np.float64]] = group_reach,
    search: Callable[..., tuple[NDArray[np.float64], NDArray[np.float64]]] = best_scales,
) -> Parts:
    """``scales`` and ``matrix_type`` of ``weights`` [outputs, inputs].

    ``matrix_type`` is an index into ``pairs_of_types``: 0 at 8 bits, where there is one choice. ``reach_of`` and
    ``search`` are ``group_reach`` and ``best_scales``, or others that return the same.

    Raises ``InputError`` for a group whose least candidate is no FP16 number.
    """
    parts = empty_parts(weights, format)
    outputs, inputs = weights.shape
    group_size = format.group_size or inputs
    choices = pairs_of_types(format)
    scales = np.empty((len(choices), outputs, format.groups(inputs)), dtype=np.float16)
    totals = np.zeros(len(choices))
    for rows, block in grid.row_blocks(weights):
        reach = reach_of(block, group_size, scales.shape[2])
        for index, (normal, outlier) in enumerate(choices):
            found, errors = search(block, group_size, reach, SEARCH_PERCENT, normal, outlier)
            scales[index, rows] = found
            totals[index] += errors.sum()
    best = int(np.argmin(totals))
    parts["matrix_type"][0] = best
    parts["scales"][:] = scales[best]
    return parts


@dataclass(frozen=True, kw_only=True)
class PairCoder:
    """Outlier-victim pairs of a matrix whose scales and types are settled.

    Attributes:
        group_size: columns of a group, even.
        scales: positive scale per group, float64 [rows, groups].
        normal: the type of a pair without an outlier.
        outlier: the type of an outlier.
    """

    group_size: int
    scales: NDArray[np.float64]
    normal: DataType
    outlier: DataType
    column_step: ClassVar[int] = 2

    @property
    def identifier(self) -> int:
        """Code in a victim's place: a one and zeros, which is no level of a normal type."""
        return 1 << (self.normal.bits - 1)

    @property
    def outlier_threshold(self) -> float:
        """The least outlier level: a weight whose magnitude exceeds it × scale is an outlier."""
        return min(level for level in self.outlier.levels if level > 0)

    def _part(self, rows: slice, columns: slice) -> tuple[int, NDArray[np.float64]]:
        if columns == slice(None):
            return self.group_size, self.scales[rows]
        return 2, self.scales[rows][:, np.arange(columns.start, columns.stop, 2) // self.group_size]

    def encode(
        self, weights: NDArray[np.float32], rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.uint8]:
        """Codes of ``weights``, float32 [rows, columns], which begin with a whole pair: uint8 [rows, columns]."""
        group_size, scales = self._part(rows, columns)
        only = np.zeros(scales.shape, dtype=np.uint8)
        tables = grid_tables((self.normal,))
        codes = grid.Grid(group_size=group_size, scales=scales, chosen=only, tables=tables).encode(weights)
        levels, code_of_rank = positive_levels(self.outlier)
        _replace_outliers(weights, group_size, scales, levels, code_of_rank, self.identifier, codes)
        return codes

    def decode(
        self, codes: NDArray[np.uint8], rows: slice = slice(None), columns: slice = slice(None)
    ) -> NDArray[np.float32]:
        """Values of ``codes``, uint8 [rows, columns], which begin with a whole pair: float32 [rows, columns]."""
        group_size, scales = self._part(rows, columns)
        normal, outlier = (grid_tables((datatype,)).levels[0] for datatype in (self.normal, self.outlier))
        decoded = np.empty(codes.shape, dtype=np.float32)
        _decode(codes, group_size, scales, normal, outlier, self.identifier, decoded)
        return decoded


def coder(parts: Parts, format: Format, inputs: int) -> PairCoder:
    """Pairs at the stored scales and types."""
    normal, outlier = pairs_of_types(format)[int(parts["matrix_type"][0].astype(np.intp))]
    return PairCoder(
        group_size=format.group_size or inputs + inputs % 2,
        scales=parts["scales"].astype(np.float64),
        normal=normal,
        outlier=outlier,
    )


@dataclass(frozen=True, kw_only=True)
class PairStatistics:
    """Pairs of a matrix by the outliers among their two weights (OliVe Table 2).

    Of two outliers in a pair the smaller is lost. The last weight of an odd row is in no pair.
    """

    normal_normal: int
    outlier_normal: int
    outlier_outlier: int

    @property
    def pairs(self) -> int:
        """All pairs."""
        return self.normal_normal + self.outlier_normal + self.outlier_outlier


def pair_statistics(weights: grid.Weights, tensor: QuantizedTensor) -> PairStatistics:
    """Count the pairs of ``weights`` [outputs, inputs] by the outliers in them, at the scales of ``tensor``.

    ``weights`` are what was quantized to ``tensor``, since codes alone do not tell a lost outlier from another victim.
    Raises ``InputError`` where the tensor is not in a format of OliVe, or of another shape.
    """
    if tensor.format.family != "olive":
        raise InputError(f"pair statistics of a tensor in {tensor.format.name}; expected a format of OliVe")
    if weights.shape != tensor.shape:
        raise InputError(f"weights {list(weights.shape)} beside a tensor {list(tensor.shape)}; expected one shape")
    pairs = tensor.coder
    assert isinstance(pairs, PairCoder)
    counts = np.zeros(3, dtype=np.int64)
    for rows, block in grid.row_blocks(weights.T if tensor.format.groups_along_outputs else weights):
        even = block.shape[1] - block.shape[1] % 2
        limits = pairs.scales[rows][:, np.arange(0, even, 2) // pairs.group_size] * pairs.outlier_threshold
        outliers = (np.abs(block[:, 0:even:2]) > limits).astype(np.intp) + (np.abs(block[:, 1:even:2]) > limits)
        counts += np.bincount(outliers.ravel(), minlength=3)
    return PairStatistics(normal_normal=int(counts[0]), outlier_normal=int(counts[1]), outlier_outlier=int(counts[2]))


def _format_of_width(bits: int, outlier: str) -> Format:
    """OliVe's format of that width, without groups. Raises ``InputError``."""
    return get_format(f"olive-w{bits}:outlier={outlier}" if bits == 8 else f"olive-w{bits}")


def calibrate(sample: NDArray[np.float32], bits: int, outlier: str = "e4m3") -> tuple[int, float]:
    """Normal type and scale of a tensor of activations, by the search over a ``sample`` of them as one group.

    Args:
        sample: float32 [any number of values, at least one], in pairs as they stand.
        bits: width of an activation, 4 or 8.
        outlier: outlier type of 8 bits, ``e4m3`` or ``e2m5``; of no meaning at 4 bits.

    Returns:
        Index of the normal type (0 int4 or int8, 1 flint4), and the scale, an FP16 number.

    Raises:
        InputError: another width or outlier type; a sample that is empty or not finite, or too large for FP16 scales.
    """
    parts = fit(sample_row(sample), _format_of_width(bits, outlier))
    return int(parts["matrix_type"][0].astype(np.intp)), float(parts["scales"][0, 0].astype(np.float64))


def quantize_with_scale(
    values: NDArray[np.float32], index: int, scale: float, bits: int, outlier: str = "e4m3"
) -> NDArray[np.float32]:
    """Encode and decode activations with what ``calibrate`` found.

    Args:
        values: float32 [tokens, channels], finite; neighbouring channels form the pairs.
        index: the normal type.
        scale: of all values, positive.
        bits: width of an activation, 4 or 8.
        outlier: outlier type of 8 bits.

    Returns: what stands in place of the values, float32 [tokens, channels].
    """
    normal, outlier_type = pairs_of_types(_format_of_width(bits, outlier))[index]
    pairs = PairCoder(
        group_size=values.shape[1] + values.shape[1] % 2,
        scales=np.full((values.shape[0], 1), scale),
        normal=normal,
        outlier=outlier_type,
    )
    return pairs.decode(pairs.encode(np.ascontiguousarray(values)))
