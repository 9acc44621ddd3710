"""The cycle-level simulation of one product, one cycle at a time: the definition that the Numba kernel is held to.

It is written to be read, not to be fast: requests and steps are lists, a buffer half is an object that counts its
remaining uses, the array issues one term after the other, and time advances by one. ``termwise.sim.cycle`` must give
the same counts. ``docs/microarchitecture.md`` (sections 3 to 8) is what it is a reading of; the order within a cycle is
that of section 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from termwise.sim.cycle import CycleCount, StallCycles, Traffic, ValueTiming
from termwise.sim.dram import DramCounts
from termwise.sim.dram_reference import DramReference
from termwise.sim.kernels import (
    OUTPUT_BYTES,
    PANELS,
    PARTIAL_SUM_BYTES,
    PICOSECONDS_PER_MICROSECOND,
    READ,
    REGION_BYTES,
    RESIDENT,
    WRITE,
    DramTiming,
    TileProgram,
)
from termwise.sim.plan import ceil_divide


@dataclass
class _Half:
    """What one half of a buffer holds until its last use. ``before`` is the allocation that used this half last."""

    before: _Half | None
    uses_left: int = 0

    @property
    def may_be_filled(self) -> bool:
        return self.before is None or self.before.uses_left == 0


@dataclass(frozen=True)
class _Piece:
    """Neighbouring bytes in external memory."""

    address: int
    bytes: int


@dataclass
class _Request:
    kind: str
    bytes: int
    half: _Half
    pieces: list[_Piece]
    arrived: bool = False


@dataclass
class _Step:
    """One chunk of one tile: what it waits for and what it does."""

    weights: _Request
    activations: _Request
    dot_product_steps: int
    weight_reads: int
    terms: list[bool]  # one for each term in the order of issue: whether it is the last one of a group
    halves: list[_Half]
    drain_cycles: int = 0
    partial_sums: _Request | None = None
    leaving: list[_Piece] = field(default_factory=list)  # on the last chunk of a tile
    register: _Half | None = None


@dataclass
class _Buffer:
    """The loads of one operand: decides when something must be loaded again, and into which half."""

    allocation: int
    halves: list[_Half] = field(default_factory=list)
    content: Any = None
    loaded: dict[Any, _Request] = field(default_factory=dict)

    def load(self, kind: str, content: Any, part: Any, pieces: list[_Piece]) -> tuple[_Request, bool]:
        """The request that brings ``part`` of the allocation ``content``, and whether it is a new one."""
        if not self.halves or (self.allocation != RESIDENT and content != self.content):
            self.content = content
            self.loaded = {}
            self.halves.append(_Half(before=self.halves[-2] if len(self.halves) >= 2 else None))
        new = part not in self.loaded
        if new:
            size = sum(piece.bytes for piece in pieces)
            self.loaded[part] = _Request(kind=kind, bytes=size, half=self.halves[-1], pieces=pieces)
        return self.loaded[part], new


def _steps(program: TileProgram) -> list[tuple[int, int]]:
    """First input of every step, and the one after its last. A step ends with its group."""
    group_inputs = program.group_inputs or program.reduction
    steps = []
    for group in range(0, program.reduction, group_inputs):
        end = min(group + group_inputs, program.reduction)
        steps += [(begin, min(begin + program.lanes, end)) for begin in range(group, end, program.lanes)]
    return steps


def _tiles(program: TileProgram, steps: int) -> Iterator[tuple[int, int, int, int]]:
    """(pass, block, row tile, column tile) in the order of execution."""
    row_tiles = ceil_divide(program.outputs, program.rows)
    column_tiles = ceil_divide(program.tokens, program.columns * program.token_groups)
    stationary, moving = (row_tiles, column_tiles) if program.weights_stationary else (column_tiles, row_tiles)
    for pass_index in range(ceil_divide(steps, program.segment_steps)):
        for block, first in enumerate(range(0, stationary, program.panels_per_block)):
            for moving_panel in range(moving):
                for stationary_panel in range(first, min(first + program.panels_per_block, stationary)):
                    if program.weights_stationary:
                        yield pass_index, block, stationary_panel, moving_panel
                    else:
                        yield pass_index, block, moving_panel, stationary_panel


def _rows_of(base: int, row_bytes: int, rows: range, begin: int, end: int) -> list[_Piece]:
    """Bytes ``begin`` to ``end`` of rows of a row-major matrix; whole rows touch and are one piece."""
    if end - begin == row_bytes:
        return [_Piece(base + rows.start * row_bytes, len(rows) * row_bytes)]
    return [_Piece(base + row * row_bytes + begin, end - begin) for row in rows]


def _activation_bytes(program: TileProgram, inputs: int) -> int:
    """Bytes of the first ``inputs`` activations of a token."""
    return ceil_divide(inputs * program.activation_bits, 8)


def _terms(
    program: TileProgram, steps: list[tuple[int, int]], begin: int, end: int, cycles: list[int], turns: int
) -> list[bool]:
    """For each term of the steps ``begin`` to ``end``: whether it is the last one of a group (of one of the tokens)."""
    group_inputs = program.group_inputs or program.reduction
    terms: list[bool] = []
    for step in range(begin, end):
        last_of_segment = (step + 1) % program.segment_steps == 0 or step + 1 == len(steps)
        ends_group = steps[step][1] % group_inputs == 0 or last_of_segment
        for _ in range(turns):
            terms += [False] * (cycles[step] - 1) + [ends_group]
    return terms


def _schedule(
    program: TileProgram, values: ValueTiming | None, most_terms: float, most_bytes: float
) -> tuple[list[_Step], list[_Request]]:
    """All chunks, and all requests in the order in which they are issued.

    No further tile once there are more than ``most_terms`` to issue and more than ``most_bytes`` to load.
    """
    all_steps = _steps(program)
    last_pass = ceil_divide(len(all_steps), program.segment_steps) - 1
    tile_columns = program.columns * program.token_groups
    row_bytes = _activation_bytes(program, program.reduction)

    def after(base: int, size: int) -> int:
        return ceil_divide(base + size, REGION_BYTES) * REGION_BYTES

    activation_base = after(0, program.weight_total_bytes)
    partial_sum_base = after(activation_base, program.tokens * row_bytes)
    column_tiles = ceil_divide(program.tokens, tile_columns)
    tile_bytes = program.rows * tile_columns * PARTIAL_SUM_BYTES
    output_base = after(partial_sum_base, ceil_divide(program.outputs, program.rows) * column_tiles * tile_bytes)

    weights = _Buffer(program.weight_allocation)
    activations = _Buffer(program.activation_allocation)
    partial_sums = _Buffer(PANELS)
    steps: list[_Step] = []
    requests: list[_Request] = []
    terms = loaded = 0
    for tile, (pass_index, block, row_tile, column_tile) in enumerate(_tiles(program, len(all_steps))):
        first_output = row_tile * program.rows
        outputs = min(program.rows, program.outputs - first_output)
        tokens = range(column_tile * tile_columns, min((column_tile + 1) * tile_columns, program.tokens))
        turns = ceil_divide(len(tokens), program.columns)
        cycles = [program.cycles_per_step] * len(all_steps)
        if values is not None:
            cycles = [int(number) for number in values.step_cycles[row_tile]]
        segment_end = min((pass_index + 1) * program.segment_steps, len(all_steps))
        first_step, first_request = len(steps), len(requests)
        for begin in range(pass_index * program.segment_steps, segment_end, program.chunk_steps):
            end = min(begin + program.chunk_steps, segment_end)
            inputs = all_steps[begin][0], all_steps[end - 1][1]
            first_byte, end_byte = (
                program.weight_total_bytes
                * (first_output * program.reduction + outputs * position)
                // (program.outputs * program.reduction)
                for position in inputs
            )
            content: dict[bool, Any] = {
                True: (pass_index, block),
                False: (pass_index, block, row_tile if not program.weights_stationary else column_tile),
            }
            now = (pass_index, block, row_tile, column_tile, begin)
            weight_content = content[bool(program.weights_stationary)] if program.weight_allocation == PANELS else now
            activation_content = (
                content[not program.weights_stationary] if program.activation_allocation == PANELS else now
            )
            weight_request, new = weights.load(
                "weights", weight_content, (row_tile, begin), [_Piece(first_byte, end_byte - first_byte)]
            )
            if new:
                requests.append(weight_request)
            activation_request, new = activations.load(
                "activations",
                activation_content,
                (column_tile, begin),
                _rows_of(
                    activation_base, row_bytes, tokens, *(_activation_bytes(program, position) for position in inputs)
                ),
            )
            if new:
                requests.append(activation_request)
            step = _Step(
                weights=weight_request,
                activations=activation_request,
                dot_product_steps=turns * (end - begin),
                weight_reads=end - begin,
                terms=_terms(program, all_steps, begin, end, cycles, turns),
                halves=[weights.halves[-1], activations.halves[-1]],
            )
            for half in step.halves:
                half.uses_left += 1
            steps.append(step)
        partial_sum_address = partial_sum_base + (row_tile * column_tiles + column_tile) * tile_bytes
        partial_pieces = [_Piece(partial_sum_address, outputs * len(tokens) * PARTIAL_SUM_BYTES)]
        steps[-1].leaving = partial_pieces
        if pass_index == last_pass:
            begin, end = first_output * OUTPUT_BYTES, (first_output + outputs) * OUTPUT_BYTES
            steps[-1].leaving = _rows_of(output_base, program.outputs * OUTPUT_BYTES, tokens, begin, end)
        steps[-1].drain_cycles = program.drain_cycles if values is None else int(values.drain_cycles[row_tile])
        # The register that partial sums return to is double-buffered like everything else.
        partial_request, _ = partial_sums.load("outputs", tile, 0, partial_pieces)
        steps[-1].register = partial_request.half
        partial_request.half.uses_left = 1
        if pass_index > 0:
            steps[-1].partial_sums = partial_request
            requests.append(partial_request)
        terms += sum(len(step.terms) for step in steps[first_step:])
        loaded += sum(request.bytes for request in requests[first_request:])
        if terms > most_terms and loaded > most_bytes:
            break
    return steps, [request for request in requests if request.bytes > 0 or _arrives_at_once(request)]


def _arrives_at_once(request: _Request) -> bool:
    """Mark a request of no bytes (a part of a matrix so small that it shares its byte with another) as arrived."""
    request.arrived = True
    return False


def _peak_bytes_per_cycle(program: TileProgram, memory: DramTiming | None) -> float:
    """The most bytes that external memory moves in a cycle."""
    if memory is None:
        return program.burst_bytes
    return memory.channels * memory.burst_bytes * PICOSECONDS_PER_MICROSECOND / memory.burst_ps / memory.clock_mhz


class _Channel:
    """The time that a request takes."""

    def __init__(self, program: TileProgram, memory: DramTiming | None) -> None:
        self._bytes_per_cycle = program.burst_bytes
        self._memory = None if memory is None else DramReference(memory)

    def cycles(self, pieces: list[_Piece], direction: int, now: int) -> int:
        """Cycles of a request that begins in cycle ``now``."""
        if self._memory is None:
            return ceil_divide(sum(piece.bytes for piece in pieces), self._bytes_per_cycle)
        ends = [self._memory.serve(piece.address, piece.bytes, direction, now) for piece in pieces]
        return max(ends) - now

    @property
    def counts(self) -> DramCounts | None:
        """What a memory with pages did."""
        return None if self._memory is None else self._memory.counts()


@dataclass(frozen=True)
class Cycle:
    """What one cycle is.

    Attributes:
        cause: ``busy``, or that of a stall.
        chunk: number of the chunk that the array works on or waits for, in the order of execution.
        tile: number of its tile.
        transfer: what the channel moves: ``weights``, ``activations``, ``outputs`` (partial sums that return),
            ``write_back``, or None.
        request: number of that request, loads and write-backs together, in the order in which they begin.
        bytes: of the request.
    """

    cause: str
    chunk: int
    tile: int
    transfer: str | None
    request: int
    bytes: int


def run_tile_program_by_cycles(
    program: TileProgram,
    *,
    memory: DramTiming | None = None,
    values: ValueTiming | None = None,
    observe: Callable[[Cycle], None] | None = None,
    most_cycles: int | None = None,
) -> CycleCount:
    """As ``termwise.sim.cycle.run_tile_program``, by plain Python and one cycle at a time.

    ``observe`` is called once per cycle. After ``most_cycles`` it stops, and the counts are those up to then.
    """
    most_terms = most_bytes = math.inf
    if most_cycles is not None:
        most_terms, most_bytes = most_cycles, most_cycles * _peak_bytes_per_cycle(program, memory)
    steps, requests = _schedule(program, values, most_terms, most_bytes)
    channel = _Channel(program, memory)
    next_step = 0
    next_term = 0
    next_request = 0
    array = "wait"
    last_group_end: int | None = None  # the cycle in which this tile issued the last term of its last group
    drain_left = 0
    in_transfer: _Request | None = None  # None together with channel_left > 0 is a write-back
    channel_left = 0
    write_back: list[_Piece] = []
    register_free = True
    counts = {"busy": 0, "scale": 0, "weights": 0, "activations": 0, "drain": 0, "write_back": 0}
    moved = {"weights": 0, "activations": 0, "outputs": 0}
    dot_product_steps = weight_reads = 0
    tile = started = transferred = 0
    cycle = 0
    while cycle != most_cycles:
        # 1. What ends here.
        if array == "issue" and next_term == len(steps[next_step].terms):
            step = steps[next_step]
            for half in step.halves:
                half.uses_left -= 1
            if step.leaving:
                array, drain_left = "drain", step.drain_cycles
            else:
                array = "wait"
                next_step += 1
        if array == "drain" and drain_left == 0:
            array = "leave"
        # 2. The array takes up what is next.
        if array == "leave":
            step = steps[next_step]
            arrived = step.partial_sums is None or step.partial_sums.arrived
            if register_free and arrived:
                register_free = False
                write_back = step.leaving
                assert step.register is not None
                step.register.uses_left = 0
                last_group_end = None
                next_step += 1
                tile += 1
                array = "wait" if next_step < len(steps) else "done"
        if array == "wait" and steps[next_step].weights.arrived and steps[next_step].activations.arrived:
            array, next_term = "issue", 0
            dot_product_steps += steps[next_step].dot_product_steps
            weight_reads += steps[next_step].weight_reads
        # 3. The channel.
        if channel_left == 0:
            if write_back:
                channel_left = channel.cycles(write_back, WRITE, cycle)
                transferred = sum(piece.bytes for piece in write_back)
                moved["outputs"] += transferred
                started += 1
                write_back = []
                in_transfer = None
            elif next_request < len(requests) and requests[next_request].half.may_be_filled:
                in_transfer = requests[next_request]
                channel_left = channel.cycles(in_transfer.pieces, READ, cycle)
                transferred = in_transfer.bytes
                moved[in_transfer.kind] += transferred
                next_request += 1
                started += 1
        if array == "done" and channel_left == 0:
            break
        # 4. Whose cycle this is. 5. One cycle of work.
        if array == "issue":
            ends_group = steps[next_step].terms[next_term]
            held = last_group_end is not None and cycle < last_group_end + program.group_distance_cycles
            cause = "scale" if ends_group and held else "busy"
            if cause == "busy":
                next_term += 1
                if ends_group:
                    last_group_end = cycle
        elif array == "wait":
            cause = "activations" if steps[next_step].weights.arrived else "weights"
        elif array == "drain":
            cause = "drain"
            drain_left -= 1
        else:
            cause = "write_back"
        counts[cause] += 1
        if observe is not None:
            kind = None if channel_left == 0 else "write_back" if in_transfer is None else in_transfer.kind
            observe(Cycle(cause, next_step, tile, kind, started, transferred))
        cycle += 1
        if channel_left > 0:
            channel_left -= 1
            if channel_left == 0:
                if in_transfer is None:
                    register_free = True
                else:
                    in_transfer.arrived = True
    busy = counts.pop("busy")
    return CycleCount(
        cycles=cycle,
        busy_cycles=busy,
        stalls=StallCycles(**counts),
        dot_product_steps=dot_product_steps,
        weight_reads=weight_reads,
        traffic=Traffic(
            weight_bytes=moved["weights"], activation_bytes=moved["activations"], output_bytes=moved["outputs"]
        ),
        memory=channel.counts,
    )
