"""The best special values for a model: which numbers to write into the PE's programmable table (BitMoD section IV-A).

BitMoD fixes four special values per width (Table IV); its hardware takes any that its fixed-point multiplier can hold
and its term generator can split. Here every such value is a candidate, every group has a squared error with each of
them, and a table of k values is good when the groups, each with its best value of the table, have a small error.

Error of a model: the squared error of every matrix over its sum of squares, averaged with the numbers of weights. The
scale of a group is the ideal one, max |w| / max |level|, as in Algorithm 1; the 8-bit second level comes after.

Tables of up to four values, the hardware's size, are the best of all, by trying all. A larger one starts from the best
of one value less with the best value added; then single values are exchanged as long as that lowers the error. So none
is worse than a smaller one; a better one that differs in two values or more at once may exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.datatypes import get_datatype, special_value, special_value_type
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.grid import Weights, row_blocks
from termwise.algorithms.processing_element import UnsupportedFormatError

MOST_VALUES = 8
SIZE_OF_THE_HARDWARE = 4
GROUPS_PER_MATRIX = 1 << 14
"""Groups of one matrix that are looked at; of a larger one as many, spread evenly."""


@dataclass(frozen=True, kw_only=True)
class SpecialValueTable:
    """One table of special values.

    Attributes:
        values: the special values, in the order in which a group tries them.
        format: name of the format with this table.
        relative_error: mean over all weights of the squared error over the mean square of their matrix.
        shares: part of the groups that take each value, in the order of ``values``.
        selector_bits: bits of metadata per group that name the value.
    """

    values: tuple[float, ...]
    format: str
    relative_error: float
    shares: tuple[float, ...]
    selector_bits: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "sqnr_db": self.sqnr_db}

    @property
    def sqnr_db(self) -> float | None:
        """The relative error in decibels; None where nothing is lost."""
        return -10 * float(np.log10(self.relative_error)) if self.relative_error > 0 else None


@dataclass(frozen=True, kw_only=True)
class SpecialValueSearch:
    """The best table of every size, the paper's table, and what was looked at."""

    tables: tuple[SpecialValueTable, ...]
    paper: SpecialValueTable
    candidates: tuple[float, ...]
    groups: int
    matrices: int


def candidate_values(bits: int, spec: BitSerialSpec | None = None) -> tuple[float, ...]:
    """Every special value that the PE can multiply beside the levels of FP3 or FP4, by magnitude, + before -."""
    spec = BitSerialSpec() if spec is None else spec
    unit = 1 << (bits - 3)
    found = []
    for numerator in range(1, 1 << spec.fixed_point_bits):
        for value in (numerator / unit, -numerator / unit):
            try:
                spec.terms(special_value_type(bits, value))
            except (InputError, UnsupportedFormatError):
                continue
            found.append(value)
    return tuple(found)


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _errors(
    groups: NDArray[np.float32],
    magnitudes: NDArray[np.float64],
    specials: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> None:
    """Squared error of every group [groups, weights] with every special value, into ``errors`` [groups, values].

    ``magnitudes`` are the non-negative levels without a special value, ascending.
    """
    size = groups.shape[1]
    top = magnitudes[-1]
    for group in prange(groups.shape[0]):
        extreme = 0.0
        for index in range(size):
            extreme = max(extreme, abs(np.float64(groups[group, index])))
        plain = np.empty(size)  # distance from the nearest level at the scale of ``divisor``
        divisor = 0.0
        for candidate in range(specials.size):
            special = specials[candidate]
            needed = max(top, abs(special))
            if needed != divisor:
                divisor = needed
                for index in range(size):
                    value = abs(np.float64(groups[group, index])) * divisor
                    nearest = np.inf
                    for level in magnitudes:
                        nearest = min(nearest, abs(value - extreme * level))
                    plain[index] = nearest
            total = 0.0
            for index in range(size):
                value = np.float64(groups[group, index]) * divisor
                distance = min(plain[index], abs(value - extreme * special))
                total += distance * distance
            errors[group, candidate] = total / (divisor * divisor)


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _best_tables(errors: NDArray[np.float64], size: int, least: NDArray[np.float64], best: NDArray[np.intp]) -> None:
    """Of every first value the best table of ``size`` 1 .. 4, its sum of errors and its values [values, 4].

    ``errors`` [values, groups]. A table is ascending; -1 fills up what is shorter.
    """
    count, groups = errors.shape
    for first in prange(count):
        least[first] = np.inf
        pair = np.empty(groups)
        triple = np.empty(groups)
        for second in range(first + 1 if size > 1 else count - 1, count):
            for group in range(groups):
                pair[group] = min(errors[first, group], errors[second, group]) if size > 1 else errors[first, group]
            for third in range(second + 1 if size > 2 else count - 1, count):
                for group in range(groups):
                    triple[group] = min(pair[group], errors[third, group]) if size > 2 else pair[group]
                for fourth in range(third + 1 if size > 3 else count - 1, count):
                    total = 0.0
                    for group in range(groups):
                        total += min(triple[group], errors[fourth, group]) if size > 3 else triple[group]
                    if total < least[first]:
                        least[first] = total
                        best[first, 0] = first
                        best[first, 1] = second if size > 1 else -1
                        best[first, 2] = third if size > 2 else -1
                        best[first, 3] = fourth if size > 3 else -1


def _best_of_all(errors: NDArray[np.float64], size: int) -> list[int]:
    """The best columns of ``errors`` [groups, values], 1 to 4 of them."""
    least = np.empty(errors.shape[1])
    best = np.empty((errors.shape[1], 4), dtype=np.intp)
    _best_tables(np.ascontiguousarray(errors.T), size, least, best)
    return [int(index) for index in best[least.argmin()] if index >= 0]


def group_errors(weights: Weights, bits: int, group_size: int | None, values: tuple[float, ...]) -> NDArray[np.float64]:
    """Squared errors of groups of ``weights`` [outputs, inputs] with each of ``values``: float64 [groups, values].

    Every group, or ``GROUPS_PER_MATRIX`` spread evenly. A short last group is filled up with zeros, which cost nothing.
    """
    size = min(group_size or weights.shape[1], weights.shape[1])
    magnitudes = np.array([level for level in get_datatype(f"fp{bits}_e2m{bits - 3}").levels if level >= 0])
    in_row = -(-weights.shape[1] // size)
    chosen = np.unique(np.linspace(0, weights.shape[0] * in_row - 1, GROUPS_PER_MATRIX).astype(np.intp))
    found = []
    for rows, block in row_blocks(weights):
        padded = np.pad(block, ((0, 0), (0, in_row * size - weights.shape[1]))).reshape(-1, size)
        here = chosen[(chosen >= rows.start * in_row) & (chosen < rows.stop * in_row)] - rows.start * in_row
        errors = np.empty((here.size, len(values)))
        _errors(np.ascontiguousarray(padded[here]), magnitudes, np.array(values), errors)
        found.append(errors)
    return np.concatenate(found)


def search(
    matrices: Iterable[tuple[str, Weights]],
    bits: int,
    group_size: int | None,
    *,
    largest: int = MOST_VALUES,
    progress: Callable[[str], None] | None = None,
) -> SpecialValueSearch:
    """The best tables of 1 .. ``largest`` special values for ``matrices`` (name, [outputs, inputs]).

    ``progress`` is told the name of every matrix that was read. Raises ``InputError`` without a matrix, at a NaN, or
    for a width or size that BitMoD has not.
    """
    if bits not in (3, 4) or not 1 <= largest <= MOST_VALUES:
        raise InputError(
            f"{bits} bits, tables of up to {largest} values; expected 3 or 4 bits, 1 to {MOST_VALUES} values"
        )
    values = candidate_values(bits)
    parts, weight_counts = [], []
    for name, weights in matrices:
        square = sum(float(np.square(block, dtype=np.float64).sum()) for _, block in row_blocks(weights))
        errors = group_errors(weights, bits, group_size, values)
        seen = errors.shape[0] / (weights.shape[0] * -(-weights.shape[1] // (group_size or weights.shape[1])))
        parts.append(errors * (weights.size / square / seen) if square else errors)
        weight_counts.append(weights.size)
        if progress is not None:
            progress(name)
    if not parts:
        raise InputError("no matrix to search special values for; expected a model with linear layers")
    errors = np.concatenate(parts) / sum(weight_counts)
    suffix = "" if group_size is None else f"g{group_size}"
    base = f"bitmod-w{bits}{suffix}"

    def table(chosen: list[int], format: Format | None = None) -> SpecialValueTable:
        ordered = chosen if format else sorted(chosen)
        own = errors[:, ordered]
        best = own.argmin(axis=1)
        named = tuple(values[index] for index in ordered)
        format = format or get_format(f"{base}:special={','.join(f'{value:g}' for value in named)}")
        return SpecialValueTable(
            values=named,
            format=format.name,
            relative_error=float(own.min(axis=1).sum()),
            shares=tuple(float(share) for share in np.bincount(best, minlength=len(ordered)) / best.size),
            selector_bits=format.selector_bits,
        )

    paper_format = get_format(base)
    paper = [values.index(special_value(datatype) or 0.0) for datatype in paper_format.datatypes]
    tables: list[SpecialValueTable] = []
    chosen: list[int] = []
    for size in range(1, largest + 1):
        if size <= SIZE_OF_THE_HARDWARE:
            chosen = _best_of_all(errors, size)
        else:
            chosen = _exchange(errors, _with_best_added(errors, chosen))
        tables.append(table(chosen))
    return SpecialValueSearch(
        tables=tuple(tables),
        paper=table(paper, paper_format),
        candidates=values,
        groups=errors.shape[0],
        matrices=len(parts),
    )


def _with_best_added(errors: NDArray[np.float64], chosen: list[int]) -> list[int]:
    """``chosen`` columns of ``errors`` [groups, values] and the one more that lowers the error most."""
    covered = errors[:, chosen].min(axis=1)
    sums = np.minimum(covered[:, None], errors).sum(axis=0)
    sums[chosen] = np.inf
    return [*chosen, int(sums.argmin())]


def _exchange(errors: NDArray[np.float64], chosen: list[int]) -> list[int]:
    """``chosen`` after single exchanges, as long as one lowers the error."""
    least = errors[:, chosen].min(axis=1).sum()
    improved = True
    while improved:
        improved = False
        for place in range(len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            tried = _with_best_added(errors, others)
            error = errors[:, tried].min(axis=1).sum()
            if error < least:
                least, chosen, improved = error, tried, True
                break
    return chosen
