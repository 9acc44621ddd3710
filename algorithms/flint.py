"""ANT: weights take the integer, the flint or another grid, whichever has the smallest error (MICRO 2022, section IV).

The kinds of data types that compete are a format's ``datatypes`` (option ``types``); of equal errors the first wins.

* With groups, ``search=absmax`` (as BitMoD evaluates ANT at group granularity): each group is scaled by max |w| / max
  |level| and its type is chosen by squared error at that scale, exactly (``grid.choose``).
* With groups, ``search=mse``: each group takes the type and the scale that together have the least squared error.
* Without groups, as in the paper: one type for the matrix, by the total squared error, and one scale per output
  channel; the best of ``SEARCH_PERCENT`` of max |w| / max |level|, or that itself with ``search=absmax``.

Scales are FP16; with groups the selector of each names its type, without them the part ``matrix_type`` does.

Deviation: the authors' integer grid includes -2**(bits - 1); ours is symmetric, as is OliVe's and BitMoD's integer. On
the synthetic matrix of reports/formats-on-a-synthetic-matrix, with ``search=mse``, theirs would gain 0.1 dB at 3 and 4
bits in groups of 128, and less than 0.04 dB without groups or at 8 bits.

Activations are quantized likewise, with one type and one scale per tensor that are searched on a sample beforehand
(``calibrate``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms import grid
from termwise.algorithms.formats import Format
from termwise.algorithms.integer import Parts, empty_parts, grid_tables, half_scales
from termwise.algorithms.packing import pack, unpack
from termwise.algorithms.processing_element import BitParallelSpec
from termwise.algorithms.scale_search import best_scales, sample_row

SEARCH_PERCENT = tuple(range(75, 151))
"""Scales that ``search=mse`` tries, in percent of max |w| / max |level|. The paper does not state the step: one percent
is that of the authors' script, which however begins at 95 above 6 bits."""


@dataclass(frozen=True, kw_only=True)
class FlintSpec(BitParallelSpec):
    """A bit-parallel PE with ANT's decoder.

    It takes integers and flint; not BitMoD's special values, abfloat, or zero points.
    """

    kind: ClassVar[str] = "flint"
    name: ClassVar[str] = "flint PE (ANT)"
    read_types: ClassVar[str] = "integer and flint"

    def reads(self, format: Format) -> bool:
        """``reads_integers_and_flint``."""
        return reads_integers_and_flint(format)


def reads_integers_and_flint(weights: Format) -> bool:
    """Whether all data types of the format are integers without a zero point, or flint: what ANT's decoder reads."""
    if weights.family not in ("int", "ant", "type"):
        return False
    return all(datatype.integer or datatype.name.startswith("flint") for datatype in weights.datatypes)


def fit(weights: grid.Weights, format: Format) -> Parts:
    """``scales`` of ``weights`` [outputs, inputs], and ``selectors`` or ``matrix_type`` where there is a choice.

    Raises ``InputError`` for a group whose scale is no FP16 number.
    """
    parts = empty_parts(weights, format)
    if format.type_per_matrix:
        _fit_matrix(weights, format, parts)
        return parts
    group_size = format.group_size or weights.shape[1]
    maxima = np.array([datatype.maximum for datatype in format.datatypes])
    for rows, block in grid.row_blocks(weights):
        if format.option("search") == "absmax":
            chosen, largest = grid.choose(block, group_size, format.datatypes, grid_tables(format.datatypes))
            scales = half_scales(largest / maxima[chosen]).astype(np.float64)
        else:
            per_type, errors = _search(block, group_size, format)
            chosen = errors.argmin(axis=0).astype(np.uint8)
            scales = np.take_along_axis(per_type, chosen[None].astype(np.intp), axis=0)[0]
        parts["scales"][rows] = scales
        if "selectors" in parts:
            parts["selectors"][rows] = pack(chosen, format.selector_bits)
    return parts


def _fit_matrix(weights: grid.Weights, format: Format, parts: Parts) -> None:
    """Fill in one ``matrix_type`` and the ``scales`` per row."""
    scales = np.empty((len(format.datatypes), weights.shape[0], 1), dtype=np.float16)
    totals = np.zeros(len(format.datatypes))
    for rows, block in grid.row_blocks(weights):
        scales[:, rows], errors = _search(block, weights.shape[1], format)
        totals += errors.sum(axis=(1, 2))
    best = int(np.argmin(totals))
    parts["matrix_type"][0] = best
    parts["scales"][:] = scales[best]


def _search(
    block: NDArray[np.float32], group_size: int, format: Format
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Best scale and its squared error of every type and group: two float64 [types, rows, groups]."""
    percents = SEARCH_PERCENT if format.option("search") == "mse" else (100,)
    starts = np.arange(0, block.shape[1], group_size)
    largest = np.maximum.reduceat(np.abs(block), starts, axis=1).astype(np.float64)
    found = [best_scales(block, group_size, largest, percents, datatype) for datatype in format.datatypes]
    return np.stack([scales for scales, _ in found]), np.stack([errors for _, errors in found])


def coder(parts: Parts, format: Format, inputs: int) -> grid.Grid:
    """Levels of every group's data type × the stored scales."""
    scales = parts["scales"].astype(np.float64)
    chosen = np.zeros(scales.shape, dtype=np.uint8)
    if format.type_per_matrix:
        chosen[:] = parts["matrix_type"][0]
    elif format.selector_bits:
        chosen = unpack(parts["selectors"].astype(np.uint8, copy=False), format.selector_bits, scales.shape[1])
    return grid.Grid(
        group_size=format.group_size or inputs, scales=scales, chosen=chosen, tables=grid_tables(format.datatypes)
    )


def calibrate(sample: NDArray[np.float32], format: Format) -> tuple[int, float]:
    """Type and scale of a tensor of activations, by the search over a ``sample`` of them.

    Args:
        sample: float32 [any number of values, at least one].
        format: a format of ANT whose ``weight_bits`` are the width of an activation; its groups do not matter.

    Returns:
        Index into ``format.datatypes``, and the scale, an FP16 number.

    Raises:
        InputError: a sample that is empty or not finite, or too large for FP16 scales.
    """
    parts = fit(sample_row(sample), replace(format.along_inputs, group_size=None))
    return int(parts["matrix_type"][0].astype(np.intp)), float(parts["scales"][0, 0].astype(np.float64))


def quantize_with_scale(values: NDArray[np.float32], index: int, scale: float, format: Format) -> NDArray[np.float32]:
    """Encode and decode activations with what ``calibrate`` found.

    Args:
        values: float32 [tokens, channels], finite.
        index: into ``format.datatypes``.
        scale: of all values, positive.
        format: the format that was given to ``calibrate``.

    Returns: what stands in place of the values, float32 [tokens, channels].
    """
    levels = grid.Grid(
        group_size=values.shape[1],
        scales=np.full((values.shape[0], 1), scale),
        chosen=np.full((values.shape[0], 1), index, dtype=np.uint8),
        tables=grid_tables(format.datatypes),
    )
    return levels.decode(levels.encode(np.ascontiguousarray(values)))
