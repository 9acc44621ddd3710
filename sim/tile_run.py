"""One tile with its values, cycle by cycle: what the sequencer does, and what every PE's registers show.

A reading of ``docs/microarchitecture.md``, sections 2 to 4, of its own: the order of issue is walked term by term, and
each value appears in the cycle that section 3 names. All operands are there from the first cycle. The arithmetic is
that of ``termwise.algorithms.reference``, whose outputs the tile's equal in every bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionaryCoder, DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.operands import HALF_BIAS, WeightOperands, split_half, weight_operands
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import (
    ACCUMULATOR_ROWS,
    ADDITION_CYCLES,
    INTEGER_TO_FLOAT_CYCLES,
    SCALING_CYCLES,
    PipelineTiming,
    ProcessingElementSpec,
)
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.reference import (
    accumulate,
    check_activations,
    check_half_activations,
    digits,
    dot_product,
    float32_of,
    half_weights,
    shift_right,
    term_bases,
)

MOST_VALUES = 1 << 16
"""Products of a tile that are walked through; it is plain Python."""

Value = int | float | str


@dataclass(frozen=True)
class Change:
    """A register that shows ``value`` from ``cycle`` on."""

    cycle: int
    scope: str
    name: str
    value: Value


@dataclass
class TileRun:
    """A tile that was computed.

    Attributes:
        outputs: float32 [tokens, outputs], as they leave.
        busy_cycles, scale_cycles, drain_cycles: of the sequencer's states; they sum to ``cycles``.
        changes: what changes when; the stages of section 3 are in the cycles.
    """

    outputs: NDArray[np.float32]
    busy_cycles: int = 0
    scale_cycles: int = 0
    drain_cycles: int = 0
    changes: list[Change] = field(default_factory=list)

    @property
    def cycles(self) -> int:
        """From the first issue until the outputs may leave."""
        return self.busy_cycles + self.scale_cycles + self.drain_cycles

    def show(self, cycle: int, scope: str, **values: Value) -> None:
        """Registers of a scope that change in ``cycle``."""
        self.changes += [Change(cycle, scope, name, value) for name, value in values.items()]


@dataclass(frozen=True)
class _Issue:
    """One cycle of the state ISSUE: the term that each row works on (None: it idles) and where it stands."""

    cycle: int
    group: int
    step: int
    columns: range
    terms: tuple[int | None, ...]
    ends_group: bool


def run_tile(spec: ProcessingElementSpec, tensor: QuantizedTensor, activations: NDArray[np.float16]) -> TileRun:
    """Compute activations · weightsᵀ in one tile: float16 [tokens, inputs] by ``tensor`` [outputs, inputs].

    Raises ``InputError`` as ``reference.multiply`` does, and for more than 65,536 products.
    """
    check_activations(tensor, activations)
    check_half_activations(spec)
    spec.cycles_per_step(tensor.format)
    products = tensor.shape[0] * activations.size
    if products > MOST_VALUES:
        raise InputError(f"a tile of {products} products; expected {MOST_VALUES} at most, cycle by cycle")
    run = TileRun(outputs=np.zeros((activations.shape[0], tensor.shape[0]), dtype=np.float32))
    pipeline = spec.pipeline(tensor.format, tensor.shape[1], tensor.shape[0])
    if isinstance(spec, BitSerialSpec):
        _bit_serial(run, spec, weight_operands(tensor), activations, pipeline)
    elif isinstance(spec, OutlierVictimSpec | FlintSpec):
        _bit_parallel(run, weight_operands(tensor), activations, pipeline)
    elif isinstance(spec, Fp16MacSpec):
        _fp16_mac(run, half_weights(tensor), activations, pipeline)
    elif isinstance(spec, DictionarySpec):
        _dictionary(run, tensor, activations, pipeline)
    else:
        raise InputError(f"there is no tile of a {spec.kind} PE")
    run.show(run.cycles, "sequencer", state="LEAVE")
    for token, output in np.ndindex(run.outputs.shape):
        run.show(run.cycles, _scope(output, token), output=float(run.outputs[token, output]))
    return run


def _scope(output: int, token: int) -> str:
    return f"pe_{output}_{token}"


def _walk(
    run: TileRun,
    groups: Sequence[range],
    lanes: int,
    terms_of: Any,
    distance: int,
) -> Iterator[_Issue]:
    """Every issue in order, with the sequencer's registers shown; holds the ends of groups ``distance`` cycles apart.

    ``terms_of(group, columns)`` gives, for each row, the terms of a step in the order in which it takes them.
    """
    cycle = step = 0
    last_end: int | None = None
    for group, columns in enumerate(groups):
        for begin in range(columns.start, columns.stop, lanes):
            inputs = range(begin, min(begin + lanes, columns.stop))
            rows = terms_of(group, inputs)
            length = max(1, *(len(terms) for terms in rows))
            for place in range(length):
                ends_group = inputs.stop == columns.stop and place == length - 1
                while ends_group and last_end is not None and cycle < last_end + distance:
                    run.show(cycle, "sequencer", state="SCALE")
                    run.scale_cycles += 1
                    cycle += 1
                issued = tuple(terms[place] if place < len(terms) else None for terms in rows)
                run.show(cycle, "sequencer", state="ISSUE", group=group, step=step, term=place)
                run.busy_cycles += 1
                yield _Issue(cycle, group, step, inputs, issued, ends_group)
                if ends_group:
                    last_end = cycle
                cycle += 1
            step += 1


def _drain(run: TileRun, cycles: int) -> None:
    run.show(run.busy_cycles + run.scale_cycles, "sequencer", state="DRAIN")
    run.drain_cycles = cycles


def _bit_serial(
    run: TileRun,
    spec: BitSerialSpec,
    weights: WeightOperands,
    activations: NDArray[np.float16],
    pipeline: PipelineTiming,
) -> None:
    significands, exponents = (part.tolist() for part in split_half(activations))
    outputs, inputs = weights.numerators.shape
    groups = [range(inputs)[weights.columns(group)] for group in range(weights.groups)]
    of_weight = {
        (booth, numerator): digits(spec, numerator, booth, weights.bits)
        for group, columns in enumerate(groups)
        for output in range(outputs)
        for booth in [bool(weights.booth[output, group])]
        for numerator in weights.numerators[output, columns.start : columns.stop].tolist()
    }

    def digits_of(output: int, group: int, column: int) -> tuple[int, ...]:
        return of_weight[bool(weights.booth[output, group]), int(weights.numerators[output, column])]

    def terms_of(group: int, columns: range) -> list[list[int]]:
        every = []
        nonzero: list[list[int]] = []
        for output in range(outputs):
            lanes = [digits_of(output, group, column) for column in columns]
            every.append(list(range(len(lanes[0]))))
            nonzero.append([term for term in every[-1] if any(lane[term] for lane in lanes)])
        if spec.skip_zero_terms == "row":
            return nonzero
        if spec.skip_zero_terms == "tile":
            union = sorted(set().union(*nonzero))
            return [[term for term in union if term in own] for own in every]
        return every

    state: dict[tuple[int, int], Any] = {}
    shift = spec.align_bits - 11
    for issue in _walk(run, groups, spec.lanes, terms_of, pipeline.group_distance_cycles):
        for token, output in np.ndindex(run.outputs.shape):
            term = issue.terms[output]
            start = (0, 0) if spec.numerics == "paper" else 0
            value = state.get((token, output), start)
            booth = bool(weights.booth[output, issue.group])
            if term is not None:
                lane_digits = [digits_of(output, issue.group, column)[term] for column in issue.columns]
                base = term_bases(booth, weights.bits)[term]
                pairs = [(significands[token][column], exponents[token][column]) for column in issue.columns]
                if spec.numerics == "paper":
                    value = accumulate(spec, value, dot_product(spec, pairs, lane_digits), base)
                elif spec.numerics == "exact":
                    value += sum(
                        ((f << (e - 1)) * digit) << base for (f, e), digit in zip(pairs, lane_digits, strict=True)
                    )
                else:
                    columns = groups[issue.group]
                    greatest = max(exponents[token][columns.start : columns.stop])
                    for (f, e), digit in zip(pairs, lane_digits, strict=True):
                        aligned = shift_right(abs(f), greatest - e - shift, spec.rounding)
                        value += (aligned if f > 0 else -aligned) * digit << base
            shown = issue.cycle + pipeline.stages + 1
            registers = {"sum": value[0], "exponent": value[1]} if spec.numerics == "paper" else {"sum": value}
            run.show(shown, _scope(output, token), **registers)
            state[token, output] = value
            if not issue.ends_group:
                continue
            state[token, output] = start
            total, exponent = value if spec.numerics == "paper" else (value, 0)
            if spec.numerics == "paper":
                exponent -= HALF_BIAS + shift
            elif spec.numerics == "exact":
                exponent = 1 - HALF_BIAS
            else:
                columns = groups[issue.group]
                exponent = max(exponents[token][columns.start : columns.stop]) - HALF_BIAS - shift
            scaled = total * int(weights.scale_significands[output, issue.group])
            exponent += int(weights.scale_exponents[output, issue.group])
            exponent -= int(weights.fraction_bits[output, issue.group])
            run.outputs[token, output] += float32_of(scaled, exponent)
            run.show(shown, _scope(output, token), dequantizing=1)
            run.show(shown + pipeline.dequantizer_cycles, _scope(output, token), dequantizing=0)
            y = float(run.outputs[token, output])
            accumulated = _at_accumulator(shown, output, pipeline) + INTEGER_TO_FLOAT_CYCLES + ADDITION_CYCLES
            run.show(accumulated, _scope(output, token), y=y)
    _drain(run, pipeline.drain_cycles)
    if weights.channel_scales is not None:
        run.outputs *= weights.channel_scales


def _at_accumulator(shown: int, output: int, pipeline: PipelineTiming) -> int:
    """The cycle in which a sum that is complete in cycle ``shown`` has come to the column accumulator of its row."""
    return shown + pipeline.dequantizer_cycles + 1 + output % ACCUMULATOR_ROWS


def _one_term(outputs: int) -> Any:
    return lambda _group, _columns: [[0]] * outputs


def _bit_parallel(
    run: TileRun, weights: WeightOperands, activations: NDArray[np.float16], pipeline: PipelineTiming
) -> None:
    split_half(activations)  # refuses what is not finite
    outputs, inputs = weights.numerators.shape
    groups = [range(inputs)[weights.columns(group)] for group in range(weights.groups)]
    sums = np.zeros_like(run.outputs)
    for issue in _walk(run, groups, 1, _one_term(outputs), pipeline.group_distance_cycles):
        shown = issue.cycle + pipeline.stages + 1
        for token, output in np.ndindex(run.outputs.shape):
            column = issue.columns.start
            sums[token, output] += np.float32(activations[token, column]) * np.float32(
                weights.numerators[output, column]
            )
            run.show(shown, _scope(output, token), sum=float(sums[token, output]))
            if issue.ends_group:
                exponent = int(weights.scale_exponents[output, issue.group])
                exponent -= int(weights.fraction_bits[output, issue.group])
                scale = float32_of(int(weights.scale_significands[output, issue.group]), exponent)
                run.outputs[token, output] += sums[token, output] * scale
                sums[token, output] = 0
                accumulated = _at_accumulator(shown, output, pipeline) + SCALING_CYCLES + ADDITION_CYCLES
                run.show(accumulated, _scope(output, token), y=float(run.outputs[token, output]))
    _drain(run, pipeline.drain_cycles)
    if weights.channel_scales is not None:
        run.outputs *= weights.channel_scales


def _fp16_mac(
    run: TileRun, weights: NDArray[np.float16], activations: NDArray[np.float16], pipeline: PipelineTiming
) -> None:
    split_half(activations)
    for issue in _walk(run, [range(weights.shape[1])], 1, _one_term(weights.shape[0]), 0):
        column = issue.columns.start
        products = np.outer(activations[:, column].astype(np.float32), weights[:, column].astype(np.float32))
        run.outputs += products
        for token, output in np.ndindex(run.outputs.shape):
            y = float(run.outputs[token, output])
            run.show(issue.cycle + pipeline.stages + 1, _scope(output, token), y=y)
    _drain(run, pipeline.drain_cycles)


def _dictionary(
    run: TileRun, tensor: QuantizedTensor, activations: NDArray[np.float16], pipeline: PipelineTiming
) -> None:
    split_half(activations)
    coder = tensor.coder
    assert isinstance(coder, DictionaryCoder)
    codes, centroids = tensor.codes, coder.dictionary
    outputs, inputs = tensor.shape
    outliers: list[list[tuple[int, np.float32]]] = [[] for _ in range(outputs)]
    for position, value in zip(coder.positions.tolist(), coder.values, strict=True):
        outliers[position // inputs].append((position % inputs, value))
    positions = [{column for column, _ in row} for row in outliers]
    bins = np.zeros((*run.outputs.shape, centroids.size), dtype=np.float32)
    for issue in _walk(run, [range(inputs)], 1, _one_term(outputs), 0):
        column = issue.columns.start
        for token, output in np.ndindex(run.outputs.shape):
            if column in positions[output]:
                continue
            code = int(codes[output, column])
            bins[token, output, code] += np.float32(activations[token, column])
            shown = issue.cycle + pipeline.stages + 1
            run.show(shown, _scope(output, token), bin=code, sum=float(bins[token, output, code]))
    begin = run.busy_cycles + pipeline.stages + 1  # one cycle after the last bin is complete: the first product
    for token, output in np.ndindex(run.outputs.shape):
        y = np.float32(0)
        terms = [(bins[token, output, code], centroids[code]) for code in range(centroids.size)]
        terms += [(np.float32(activations[token, column]), value) for column, value in outliers[output]]
        for place, (left, right) in enumerate(terms):
            y += left * right
            run.show(begin + 1 + place, _scope(output, token), y=float(y))
        run.outputs[token, output] = y
    last_row = replace(pipeline, end_of_row_cycles=1 + centroids.size + max(len(row) for row in outliers))
    _drain(run, last_row.drain_cycles)
