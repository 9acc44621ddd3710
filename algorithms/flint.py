"""ANT: a group takes the integer or the flint grid, whichever has the smaller error (MICRO 2022, section IV).

As BitMoD evaluates ANT at group granularity, each group is scaled by max |w| / max |level| and the type is chosen by
squared error at that scale, the integer first among equals. Scales are FP16; one bit per group names the type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from termwise.algorithms import grid
from termwise.algorithms.formats import Format
from termwise.algorithms.integer import Parts, empty_parts, grid_tables, half_scales
from termwise.algorithms.packing import pack, unpack
from termwise.algorithms.processing_element import UnsupportedFormatError, bit_parallel_key_value_cycles


@dataclass(frozen=True, kw_only=True)
class FlintSpec:
    """A bit-parallel PE with ANT's decoder, as BitMoD section V-A compares with: one weight of up to 8 bits a cycle.

    Activations are FP16. It takes integers and flint; not BitMoD's special values, abfloat, or zero points.
    """

    kind: ClassVar[str] = "flint"
    lanes: int = 1

    def cycles_per_step(self, weights: Format) -> int:
        """One cycle. Raises ``UnsupportedFormatError`` for a format that the decoder cannot read."""
        if not reads_integers_and_flint(weights):
            raise UnsupportedFormatError(
                f"the flint PE (ANT) decodes integer and flint weights; {weights.name} needs another decoder"
            )
        return 1

    def key_value_cycles_per_step(self, key_value_bits: int) -> int:
        """One cycle for keys and values of up to 8 bits."""
        return bit_parallel_key_value_cycles(self.kind, key_value_bits)

    def buffer_bits(self, weights: Format, outputs: int, inputs: int) -> float:
        """Weights are buffered as they are packed."""
        return weights.bits_per_weight(outputs, inputs)


def reads_integers_and_flint(weights: Format) -> bool:
    """Whether all data types of the format are integers without a zero point, or flint: what ANT's decoder reads."""
    if weights.family not in ("int", "ant", "type"):
        return False
    return all(datatype.integer or datatype.name.startswith("flint") for datatype in weights.datatypes)


def fit(weights: grid.Weights, format: Format) -> Parts:
    """``scales`` and ``selectors`` of ``weights`` [outputs, inputs]."""
    parts = empty_parts(weights, format)
    group_size = format.group_size or weights.shape[1]
    maxima = np.array([datatype.maximum for datatype in format.datatypes])
    for rows, block in grid.row_blocks(weights):
        chosen, largest = grid.choose(block, group_size, format.datatypes, grid_tables(format.datatypes))
        parts["scales"][rows] = half_scales(largest / maxima[chosen])
        parts["selectors"][rows] = pack(chosen, format.selector_bits)
    return parts


def coder(parts: Parts, format: Format, inputs: int) -> grid.Grid:
    """Levels of every group's data type × the stored scales."""
    groups = format.groups(inputs)
    return grid.Grid(
        group_size=format.group_size or inputs,
        scales=parts["scales"].astype(np.float64),
        chosen=unpack(parts["selectors"].astype(np.uint8, copy=False), format.selector_bits, groups),
        tables=grid_tables(format.datatypes),
    )
