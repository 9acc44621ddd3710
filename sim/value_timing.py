"""What the values of the weights decide: how long a step is issued, and how long a tile drains.

``docs/microarchitecture.md``, sections 3, 4 and 9. The rows of a tile issue together, and a step of ``lanes`` inputs
takes the terms of the widest data type among the rows' groups there, or, where a bit-serial PE skips zero terms, the
terms that are not zero. At the end of a tile GOBO's PE takes the outliers of the row that has the most.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec, booth_digits, fixed_point_digits
from termwise.algorithms.datatypes import common_unit
from termwise.algorithms.dictionary import DictionaryCoder, DictionarySpec
from termwise.algorithms.grid import Grid
from termwise.algorithms.operands import booth_bits
from termwise.algorithms.processing_element import ProcessingElementSpec
from termwise.algorithms.quantize import QuantizedTensor
from termwise.sim.cycle import ValueTiming

TABLE_BITS = 16
"""Codes of a step are looked up together where they have at most so many bits."""


def term_masks(spec: BitSerialSpec, tensor: QuantizedTensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Which terms of a code are not zero, and how many terms a data type has.

    Returns: uint8 [data types, codes], bit t for term t; uint8 [data types]. A data type is what a group chooses; of
    asymmetric integers it is the zero point. A code without a level has no terms.
    """
    coder, format = tensor.coder, tensor.format
    assert isinstance(coder, Grid)
    asymmetric = format.family == "int-asym"
    bits = booth_bits(format)
    masks = np.zeros((coder.tables.levels.shape[0], 1 << format.weight_bits), dtype=np.uint8)
    terms = np.zeros(masks.shape[0], dtype=np.uint8)
    for index in np.unique(coder.chosen).tolist():
        datatype = None if asymmetric else format.datatypes[index]
        booth = datatype is None or datatype.integer
        common = 1.0 if datatype is None else float(common_unit((datatype,)))
        terms[index] = (bits + 1) // 2 if datatype is None else spec.terms(datatype)
        for code, level in enumerate(coder.tables.levels[index, : masks.shape[1]].tolist()):
            if level == level:  # not NaN
                numerator = round(level * float(coder.tables.units[index]) / common)
                digits = (
                    booth_digits(numerator, bits) if booth else fixed_point_digits(numerator, spec.fixed_point_bits)
                )
                masks[index, code] = sum(1 << term for term, digit in enumerate(digits) if digit)
    return masks, terms


@njit(cache=True)  # type: ignore[untyped-decorator]
def _joined_masks(masks: NDArray[np.uint8], bits: int, lanes: int, joined: NDArray[np.uint8]) -> None:
    """The terms that any lane of a step has, for the codes of all lanes side by side: uint8 [data types, codes]."""
    for index in range(masks.shape[0]):
        for codes in range(joined.shape[1]):
            mask = 0
            for lane in range(lanes):
                mask |= masks[index, (codes >> (lane * bits)) & ((1 << bits) - 1)]
            joined[index, codes] = mask


@njit(cache=True)  # type: ignore[untyped-decorator]
def _code_bits(packed: NDArray[np.uint8], offset: int, mask: int) -> int:
    """Up to 16 bits of a packed row from the bit ``offset``."""
    byte = offset >> 3
    word = int(packed[byte])
    if byte + 1 < packed.size:
        word |= int(packed[byte + 1]) << 8
    if byte + 2 < packed.size:
        word |= int(packed[byte + 2]) << 16
    return (word >> (offset & 7)) & mask


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _skipping_steps(
    packed: NDArray[np.uint8],
    inputs: int,
    bits: int,
    chosen: NDArray[np.uint8],
    group_size: int,
    lanes: int,
    masks: NDArray[np.uint8],
    joined: NDArray[np.uint8],
    ones: NDArray[np.uint8],
    most: int,
    rows: int,
    by_row: bool,
    step_cycles: NDArray[np.uint8],
) -> None:
    """Terms of every step that are not zero, at least one, into ``step_cycles`` (uint8 [tiles of rows, steps], zeros).

    ``packed``: codes of ``bits`` bits, uint8 [outputs, bytes]; ``chosen``: data types, uint8 [outputs, groups];
    ``joined``: of all lanes, or of no size where a step has too many bits; ``ones``: bits set in a mask; ``most``:
    terms that a step can have. By row a step lasts as long as the longest row; else it has as many terms as any row
    has. A step that has reached ``most`` is not looked at again.
    """
    code_mask, step_mask = (1 << bits) - 1, joined.shape[1] - 1
    steps = step_cycles.shape[1]
    first_inputs, end_inputs = np.empty(steps, np.int64), np.empty(steps, np.int64)
    step = 0
    for begin in range(0, inputs, group_size):
        end = min(begin + group_size, inputs)
        for first in range(begin, end, lanes):
            first_inputs[step], end_inputs[step] = first, min(first + lanes, end)
            step += 1
    unfinished = np.empty(steps, np.int64)
    for tile in range(step_cycles.shape[0]):
        cycles = step_cycles[tile]
        count = steps
        for step in range(steps):
            unfinished[step] = step
        for output in range(tile * rows, min((tile + 1) * rows, packed.shape[0])):
            left = 0
            for index in range(count):
                step = unfinished[index]
                first, end = first_inputs[step], end_inputs[step]
                datatype = chosen[output, first // group_size]
                mask = 0
                if step_mask >= 0 and end - first == lanes:
                    mask = int(joined[datatype, _code_bits(packed[output], first * bits, step_mask)])
                else:
                    for column in range(first, end):
                        mask |= masks[datatype, _code_bits(packed[output], column * bits, code_mask)]
                if by_row:
                    cycles[step] = max(cycles[step], ones[mask])
                else:
                    cycles[step] |= mask
                if (cycles[step] if by_row else ones[cycles[step]]) < most:
                    unfinished[left] = step
                    left += 1
            count = left
        for step in range(steps):
            cycles[step] = max(cycles[step] if by_row else ones[cycles[step]], 1)


def _tiles(values: NDArray[np.generic], rows: int) -> list[slice]:
    return [slice(first, first + rows) for first in range(0, values.shape[0], rows)]


def _bit_serial_steps(spec: BitSerialSpec, tensor: QuantizedTensor, rows: int) -> NDArray[np.uint8]:
    coder = tensor.coder
    assert isinstance(coder, Grid)
    outputs, inputs = tensor.shape
    masks, terms = term_masks(spec, tensor)
    sizes = [min(coder.group_size, inputs - first) for first in range(0, inputs, coder.group_size)]
    steps_of_group = [-(-size // spec.lanes) for size in sizes]
    if spec.skip_zero_terms == "none":
        longest = np.stack([terms[coder.chosen[tile]].max(axis=0) for tile in _tiles(coder.chosen, rows)])
        return np.repeat(longest, steps_of_group, axis=1)
    bits = tensor.format.weight_bits
    step_cycles = np.zeros((-(-outputs // rows), sum(steps_of_group)), dtype=np.uint8)
    joined = np.zeros((masks.shape[0], 1 << bits * spec.lanes if bits * spec.lanes <= TABLE_BITS else 0), np.uint8)
    _joined_masks(masks, bits, spec.lanes, joined)
    _skipping_steps(
        tensor.parts["codes"],
        inputs,
        bits,
        coder.chosen,
        coder.group_size,
        spec.lanes,
        masks,
        joined,
        np.array([mask.bit_count() for mask in range(256)], dtype=np.uint8),
        int(terms.max()),
        rows,
        spec.skip_zero_terms == "row",
        step_cycles,
    )
    return step_cycles


def value_timing(spec: ProcessingElementSpec, tensor: QuantizedTensor, rows: int) -> ValueTiming:
    """Timing of ``tensor`` [outputs, inputs] on an array of ``rows`` rows of PEs of ``spec``.

    Raises ``InputError`` for a format that the PE does not take.
    """
    outputs, inputs = tensor.shape
    cycles = spec.cycles_per_step(tensor.format)
    tiles = -(-outputs // rows)
    pipeline = spec.pipeline(tensor.format, inputs, min(rows, outputs))
    drain_cycles = np.full(tiles, pipeline.drain_cycles, dtype=np.int64)
    if isinstance(spec, BitSerialSpec):
        step_cycles = _bit_serial_steps(spec, tensor, rows)
    else:
        group_size = min(tensor.format.group_size or inputs, inputs)
        steps = inputs // group_size * -(-group_size // spec.lanes) + -(-(inputs % group_size) // spec.lanes)
        step_cycles = np.full((tiles, steps), cycles, dtype=np.uint8)
    if isinstance(spec, DictionarySpec):
        coder = tensor.coder
        assert isinstance(coder, DictionaryCoder)
        outliers = np.bincount(coder.positions // coder.inputs, minlength=outputs)
        most = np.array([outliers[tile].max() for tile in _tiles(outliers, rows)], dtype=np.int64)
        of_no_row = replace(pipeline, end_of_row_cycles=0).drain_cycles
        drain_cycles = of_no_row + 1 + spec.centroids(tensor.format) + most
    return ValueTiming(step_cycles=step_cycles, drain_cycles=drain_cycles)
