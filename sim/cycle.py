"""The cycle-level simulation of one product, as a Numba kernel that jumps from event to event.

``run_tile_program`` gives exactly the cycles, causes and bytes of ``termwise.sim.cycle_reference``, which advances one
cycle at a time and is the definition. All compiled helpers, their constants and the program that they take stand in
this file, because Numba's cache on disk does not notice a change in another one.

The machine has two servers. The **channel** to external memory moves one request at a time. The **array** is in one of
five states. A position of the request list is ``3 · step + part`` with part 0 for weights, 1 for activations and 2 for
partial sums; requests are served in this order, so one number says what has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from termwise.algorithms.errors import TermwiseError

ACTIVATION_BYTES = 2  # FP16
OUTPUT_BYTES = 2  # FP16
PARTIAL_SUM_BYTES = 4  # FP32

# What an operand's allocation holds: the whole operand, loaded once; whole panels; or one chunk for one use.
RESIDENT, PANELS, CHUNKS = 0, 1, 2

# States of the array.
WAITING_FOR_OPERANDS, COMPUTING, DRAINING, WAITING_TO_LEAVE, FINISHED = 0, 1, 2, 3, 4

# What the channel does.
IDLE, LOADING, WRITING = 0, 1, 2

# Fields of a cursor: where a walk over the program stands.
STEP, PASS, BLOCK, MOVING, STATIONARY, CHUNK_BEGIN, TILE = 0, 1, 2, 3, 4, 5, 6
WEIGHT_ALLOCATION_STEP, ACTIVATION_ALLOCATION_STEP = 7, 8  # first step of the current allocation
WEIGHT_PREVIOUS_STEP, ACTIVATION_PREVIOUS_STEP = 9, 10  # first step of the allocation before it
AT_END = 11
CURSOR_FIELDS = 12

# Fields of a result.
CYCLES, COMPUTE, WEIGHT_STALL, ACTIVATION_STALL, DRAIN_STALL = 0, 1, 2, 3, 4
WEIGHT_BYTES, ACTIVATION_BYTES_MOVED, OUTPUT_BYTES_MOVED, DOT_PRODUCT_STEPS, DEADLOCK = 5, 6, 7, 8, 9
RESULT_FIELDS = 10

# Fast-forward: so many panels are remembered, each as the fields of the machine's state relative to its beginning.
SNAPSHOTS = 4
SNAPSHOT_FIELDS = 18


class TileProgram(NamedTuple):
    """Everything that decides the cycles of one product, in whole numbers (a plain tuple, so that Numba takes it)."""

    tokens: int
    reduction: int
    outputs: int
    rows: int
    columns: int
    lanes: int
    cycles_per_step: int
    group_steps: int  # dot-product steps of a group whose scaling takes longer than its steps; 0 where none does
    group_cycles: int  # cycles of such a group
    fill_drain_cycles: int
    weight_total_bytes: int  # the whole stationary matrix in external memory, metadata included
    burst_bytes: int  # bytes that external memory moves in one cycle
    segment_steps: int
    chunk_steps: int
    weights_stationary: int  # 1 or 0
    panels_per_block: int  # stationary panels that share an allocation
    weight_allocation: int  # RESIDENT, PANELS or CHUNKS
    activation_allocation: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes between the chip and external memory. Partial sums count as outputs, written and read."""

    weight_bytes: int
    activation_bytes: int
    output_bytes: int

    @property
    def total_bytes(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.activation_bytes + self.output_bytes


@dataclass(frozen=True, kw_only=True)
class CycleCount:
    """What one product costs in time. The four causes add up to ``cycles``.

    ``dot_product_steps`` counts the steps of ``lanes`` weights that the array took, each on all of its PEs.
    """

    cycles: int
    compute_cycles: int
    weight_stall_cycles: int
    activation_stall_cycles: int
    drain_stall_cycles: int
    dot_product_steps: int
    traffic: Traffic


@njit(cache=True)  # type: ignore[untyped-decorator]
def _segment_end(program: TileProgram, pass_index: int) -> int:
    """The step after the last one of a pass."""
    steps = -(-program.reduction // program.lanes)
    return min(steps, (pass_index + 1) * program.segment_steps)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _panel_counts(program: TileProgram) -> tuple[int, int]:
    """Stationary and moving panels."""
    row_tiles = -(-program.outputs // program.rows)
    column_tiles = -(-program.tokens // program.columns)
    if program.weights_stationary == 1:
        return row_tiles, column_tiles
    return column_tiles, row_tiles


@njit(cache=True)  # type: ignore[untyped-decorator]
def _is_last_chunk(program: TileProgram, cursor: NDArray[np.int64]) -> bool:
    """Whether the cursor stands on the last chunk of its tile."""
    return bool(cursor[CHUNK_BEGIN] + program.chunk_steps >= _segment_end(program, cursor[PASS]))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _advance(program: TileProgram, cursor: NDArray[np.int64]) -> None:
    """Move a cursor to the next step: chunks innermost, then the panels of a block, moving panels, blocks, passes.

    Where the next step opens a new allocation of an operand, its first step is noted, and so is that of the one before.
    """
    stationary_panels, moving_panels = _panel_counts(program)
    new_tile = False
    new_moving = False
    new_block = False
    cursor[STEP] += 1
    cursor[CHUNK_BEGIN] += program.chunk_steps
    if cursor[CHUNK_BEGIN] >= _segment_end(program, cursor[PASS]):
        new_tile = True
        cursor[TILE] += 1
        cursor[STATIONARY] += 1
        block_begin = cursor[BLOCK] * program.panels_per_block
        if cursor[STATIONARY] >= min(stationary_panels, block_begin + program.panels_per_block):
            new_moving = True
            cursor[STATIONARY] = block_begin
            cursor[MOVING] += 1
            if cursor[MOVING] >= moving_panels:
                new_block = True
                cursor[MOVING] = 0
                cursor[BLOCK] += 1
                cursor[STATIONARY] = cursor[BLOCK] * program.panels_per_block
                if cursor[STATIONARY] >= stationary_panels:
                    cursor[BLOCK] = 0
                    cursor[STATIONARY] = 0
                    cursor[PASS] += 1
        cursor[CHUNK_BEGIN] = cursor[PASS] * program.segment_steps
        if _segment_end(program, cursor[PASS]) <= cursor[CHUNK_BEGIN]:
            cursor[AT_END] = 1
    weights_stationary = program.weights_stationary == 1
    for operand in range(2):
        allocation = program.weight_allocation if operand == 0 else program.activation_allocation
        is_stationary = weights_stationary == (operand == 0)
        if allocation == CHUNKS:
            opens = True
        elif allocation == RESIDENT:
            opens = False
        else:
            opens = new_tile and (new_block if is_stationary else new_moving)
        if opens:
            cursor[WEIGHT_PREVIOUS_STEP + operand] = cursor[WEIGHT_ALLOCATION_STEP + operand]
            cursor[WEIGHT_ALLOCATION_STEP + operand] = cursor[STEP]


@njit(cache=True)  # type: ignore[untyped-decorator]
def _must_load(program: TileProgram, cursor: NDArray[np.int64], is_weight: bool) -> bool:
    """Whether the operand of this step is not in its buffer yet."""
    allocation = program.weight_allocation if is_weight else program.activation_allocation
    if allocation == CHUNKS:
        return True
    if is_weight == (program.weights_stationary == 1):
        return bool(cursor[MOVING] == 0)
    first_in_block = cursor[STATIONARY] == cursor[BLOCK] * program.panels_per_block
    if allocation == RESIDENT:
        return bool(first_in_block and cursor[BLOCK] == 0)
    return bool(first_in_block)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _tile_position(program: TileProgram, cursor: NDArray[np.int64]) -> tuple[int, int, int, int]:
    """First output, number of outputs, first token and number of tokens of the cursor's tile."""
    if program.weights_stationary == 1:
        row_tile, column_tile = cursor[STATIONARY], cursor[MOVING]
    else:
        row_tile, column_tile = cursor[MOVING], cursor[STATIONARY]
    first_output = row_tile * program.rows
    first_token = column_tile * program.columns
    return (
        first_output,
        min(program.rows, program.outputs - first_output),
        first_token,
        min(program.columns, program.tokens - first_token),
    )


@njit(cache=True)  # type: ignore[untyped-decorator]
def _request_bytes(program: TileProgram, cursor: NDArray[np.int64], part: int) -> int:
    """Bytes of part 0 (weights), 1 (activations) or 2 (partial sums) of the cursor's step; 0 where nothing is loaded.

    The bytes of the whole weight matrix are spread evenly over its weights, so that the requests add up to them.
    """
    first_output, outputs, _, tokens = _tile_position(program, cursor)
    if part == 2:
        if cursor[PASS] == 0 or not _is_last_chunk(program, cursor):
            return 0
        return int(outputs * tokens * PARTIAL_SUM_BYTES)
    if not _must_load(program, cursor, part == 0):
        return 0
    chunk_end = min(cursor[CHUNK_BEGIN] + program.chunk_steps, _segment_end(program, cursor[PASS]))
    begin_input = cursor[CHUNK_BEGIN] * program.lanes
    end_input = min(chunk_end * program.lanes, program.reduction)
    if part == 1:
        return int(tokens * (end_input - begin_input) * ACTIVATION_BYTES)
    weights = program.outputs * program.reduction
    begin = first_output * program.reduction + outputs * begin_input
    end = first_output * program.reduction + outputs * end_input
    return int(program.weight_total_bytes * end // weights - program.weight_total_bytes * begin // weights)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _may_start(program: TileProgram, cursor: NDArray[np.int64], part: int, done_steps: int, left_tiles: int) -> bool:
    """Whether the half that a request goes to is free: the allocation before the last one has had its last use."""
    if part == 2:
        return bool(left_tiles >= cursor[TILE] - 1)
    allocation = program.weight_allocation if part == 0 else program.activation_allocation
    if allocation == RESIDENT:
        return True
    return bool(done_steps >= cursor[WEIGHT_PREVIOUS_STEP + part])


@njit(cache=True)  # type: ignore[untyped-decorator]
def _chunk_steps(program: TileProgram, cursor: NDArray[np.int64]) -> int:
    """Dot-product steps of the cursor's chunk."""
    return int(min(program.chunk_steps, _segment_end(program, cursor[PASS]) - cursor[CHUNK_BEGIN]))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _chunk_cycles(program: TileProgram, cursor: NDArray[np.int64]) -> int:
    """Cycles that the array computes on the cursor's chunk; groups that are shorter than their scaling wait for it."""
    steps = _chunk_steps(program, cursor)
    if program.group_steps == 0:
        return int(steps * program.cycles_per_step)
    cycles = steps // program.group_steps * program.group_cycles
    rest = steps % program.group_steps
    if rest > 0:
        cycles += max(rest * program.cycles_per_step, program.group_cycles)
    return int(cycles)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _panels_are_alike(program: TileProgram) -> bool:
    """Whether the requests of one moving panel are those of any other that is full (but the first of a block).

    Activations always are; weights if their rows have a whole number of bytes each, so that no rounding wanders.
    """
    return bool(program.weights_stationary == 1 or program.weight_total_bytes % program.outputs == 0)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _moves_with_panels(program: TileProgram, operand: int) -> bool:
    """Whether an operand's allocations (0 weights, 1 activations) are opened anew in every moving panel."""
    allocation = program.weight_allocation if operand == 0 else program.activation_allocation
    is_stationary = (program.weights_stationary == 1) == (operand == 0)
    return bool(allocation == CHUNKS or (allocation == PANELS and not is_stationary))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _take_snapshot(
    program: TileProgram, load: NDArray[np.int64], work: NDArray[np.int64], rest: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The machine's state at the beginning of a moving panel, relative to the array's place: int64 [SNAPSHOT_FIELDS].

    ``rest``: the state of array and channel, times as cycles that are left, and counts less the array's place.
    """
    snapshot = np.zeros(SNAPSHOT_FIELDS, np.int64)
    snapshot[: rest.size] = rest
    place = rest.size
    for field in (STEP, MOVING, TILE):
        snapshot[place] = load[field] - work[field]
        place += 1
    for field in (STATIONARY, CHUNK_BEGIN):
        snapshot[place] = load[field]
        place += 1
    for operand in range(2):
        if _moves_with_panels(program, operand):
            snapshot[place] = load[WEIGHT_ALLOCATION_STEP + operand] - work[STEP]
            snapshot[place + 1] = load[WEIGHT_PREVIOUS_STEP + operand] - work[STEP]
        place += 2
    return snapshot


@njit(cache=True)  # type: ignore[untyped-decorator]
def _jump(program: TileProgram, cursor: NDArray[np.int64], panels: int, steps: int, tiles: int) -> None:
    """Move a cursor by whole panels with so many steps and tiles."""
    cursor[STEP] += steps
    cursor[MOVING] += panels
    cursor[TILE] += tiles
    for operand in range(2):
        if _moves_with_panels(program, operand):
            cursor[WEIGHT_ALLOCATION_STEP + operand] += steps
            cursor[WEIGHT_PREVIOUS_STEP + operand] += steps


@njit(cache=True)  # type: ignore[untyped-decorator]
def _run(program: TileProgram, result: NDArray[np.int64], fast_forward: bool) -> None:
    """Simulate a whole product into ``result`` (int64 [RESULT_FIELDS], zeros on entry).

    ``fast_forward``: where the state at the beginning of a moving panel is that of an earlier panel, what happens until
    the next full panels have passed is what happened between these two, again and again; it is added at once. Nothing
    else depends on the place: full panels of a block ask for the same bytes, and the array's steps are the same. The
    last panel, which may be smaller, and the first of a block, which loads more, are never jumped over.
    """
    load = np.zeros(CURSOR_FIELDS, np.int64)  # where the requests stand
    work = np.zeros(CURSOR_FIELDS, np.int64)  # where the array stands
    steps_of_tile = -(-program.reduction // program.lanes)
    passes = -(-steps_of_tile // program.segment_steps)
    part = 0  # which request of the load cursor's step comes next
    now = 0
    channel = IDLE
    channel_end = 0
    array = WAITING_FOR_OPERANDS
    array_end = 0
    done_steps = 0
    left_tiles = 0
    staging_free = True
    write_bytes = 0
    moving_panels = _panel_counts(program)[1]
    fast_forward = fast_forward and moving_panels > 4 and _panels_are_alike(program)
    snapshots = np.zeros((SNAPSHOTS, SNAPSHOT_FIELDS), np.int64)
    snapshot_results = np.zeros((SNAPSHOTS, RESULT_FIELDS), np.int64)
    snapshot_places = np.zeros((SNAPSHOTS, 4), np.int64)  # cycle, step, tile and panel
    taken = 0  # snapshots of this block
    seen_step = -1
    block_pass = np.zeros(2, np.int64)

    while True:
        # What ends now.
        if channel != IDLE and channel_end == now:
            if channel == WRITING:
                staging_free = True
            else:
                part += 1
            channel = IDLE
        if array == COMPUTING and array_end == now:
            done_steps += 1
            if not _is_last_chunk(program, work):
                _advance(program, work)
                array = WAITING_FOR_OPERANDS
            elif program.fill_drain_cycles > 0:
                array = DRAINING
                array_end = now + program.fill_drain_cycles
            else:
                array = WAITING_TO_LEAVE
        elif array == DRAINING and array_end == now:
            array = WAITING_TO_LEAVE

        # Parts that need no request are passed over without time.
        request = 0
        if channel != LOADING:
            while load[AT_END] == 0:
                if part == 3:
                    _advance(program, load)
                    part = 0
                    continue
                request = _request_bytes(program, load, part)
                if request > 0:
                    break
                part += 1
        arrived = 3 * load[STEP] + part

        # The array.
        if array == WAITING_TO_LEAVE and staging_free and arrived > 3 * work[STEP] + 2:
            _, outputs, _, tokens = _tile_position(program, work)
            write_bytes = outputs * tokens * (OUTPUT_BYTES if work[PASS] == passes - 1 else PARTIAL_SUM_BYTES)
            staging_free = False
            left_tiles += 1
            _advance(program, work)
            array = FINISHED if work[AT_END] == 1 else WAITING_FOR_OPERANDS
        if array == WAITING_FOR_OPERANDS and arrived > 3 * work[STEP] + 1:
            array = COMPUTING
            array_end = now + _chunk_cycles(program, work)
            result[DOT_PRODUCT_STEPS] += _chunk_steps(program, work)

        # The channel: a write-back first, then the next request once its half is free.
        if channel == IDLE:
            if write_bytes > 0:
                channel = WRITING
                channel_end = now - (-write_bytes // program.burst_bytes)
                result[OUTPUT_BYTES_MOVED] += write_bytes
                write_bytes = 0
            elif load[AT_END] == 0 and _may_start(program, load, part, done_steps, left_tiles):
                channel = LOADING
                channel_end = now - (-request // program.burst_bytes)
                result[WEIGHT_BYTES + part] += request

        array_busy = array in (COMPUTING, DRAINING)
        if fast_forward and work[STEP] != seen_step and array != FINISHED:
            seen_step = work[STEP]
            if work[BLOCK] != block_pass[0] or work[PASS] != block_pass[1]:
                block_pass[0], block_pass[1] = work[BLOCK], work[PASS]
                taken = 0
            at_panel = (
                work[STATIONARY] == work[BLOCK] * program.panels_per_block
                and work[CHUNK_BEGIN] == work[PASS] * program.segment_steps
            )
            alike = load[AT_END] == 0 and load[BLOCK] == work[BLOCK] and load[PASS] == work[PASS]
            if at_panel and alike and load[MOVING] >= 1:
                rest = np.array(
                    [
                        array,
                        array_end - now if array_busy else 0,
                        channel,
                        channel_end - now if channel != IDLE else 0,
                        part,
                        done_steps - work[STEP],
                        left_tiles - work[TILE],
                        1 if staging_free else 0,
                        write_bytes,
                    ]
                )
                snapshot = _take_snapshot(program, load, work, rest)
                for back in range(1, min(taken, SNAPSHOTS) + 1):
                    slot = (taken - back) % SNAPSHOTS
                    if not np.array_equal(snapshots[slot], snapshot):
                        continue
                    panels = work[MOVING] - snapshot_places[slot, 3]
                    times = (moving_panels - 2 - load[MOVING]) // panels
                    if times > 0:
                        steps = times * (work[STEP] - snapshot_places[slot, 1])
                        tiles = times * (work[TILE] - snapshot_places[slot, 2])
                        for field in range(RESULT_FIELDS):
                            result[field] += times * (result[field] - snapshot_results[slot, field])
                        cycles = times * (now - snapshot_places[slot, 0])
                        now += cycles
                        array_end += cycles
                        channel_end += cycles
                        done_steps += steps
                        left_tiles += tiles
                        _jump(program, load, times * panels, steps, tiles)
                        _jump(program, work, times * panels, steps, tiles)
                        arrived = 3 * load[STEP] + part
                        seen_step = work[STEP]
                        taken = 0
                    break
                slot = taken % SNAPSHOTS
                snapshots[slot] = snapshot
                snapshot_results[slot] = result
                snapshot_places[slot, 0], snapshot_places[slot, 1] = now, work[STEP]
                snapshot_places[slot, 2], snapshot_places[slot, 3] = work[TILE], work[MOVING]
                taken += 1

        # The next event, and whose the cycles until then are.
        if channel == IDLE and not array_busy:
            result[CYCLES] = now
            result[DEADLOCK] = 0 if array == FINISHED else 1
            return
        if channel == IDLE:
            event = array_end
        elif not array_busy:
            event = channel_end
        else:
            event = min(array_end, channel_end)
        if array == COMPUTING:
            cause = COMPUTE
        elif array == WAITING_FOR_OPERANDS:
            cause = WEIGHT_STALL if arrived <= 3 * work[STEP] else ACTIVATION_STALL
        else:
            cause = DRAIN_STALL
        result[cause] += event - now
        now = event


def run_tile_program(program: TileProgram, *, fast_forward: bool = True) -> CycleCount:
    """Simulate one product; the result does not depend on ``fast_forward``.

    Raises ``TermwiseError`` if the machine could not finish it (a defect of the plan).
    """
    result = np.zeros(RESULT_FIELDS, np.int64)
    _run(program, result, fast_forward)
    if result[DEADLOCK]:
        raise TermwiseError(f"the simulated machine stopped in cycle {result[CYCLES]} of {program}")
    return CycleCount(
        cycles=int(result[CYCLES]),
        compute_cycles=int(result[COMPUTE]),
        weight_stall_cycles=int(result[WEIGHT_STALL]),
        activation_stall_cycles=int(result[ACTIVATION_STALL]),
        drain_stall_cycles=int(result[DRAIN_STALL]),
        dot_product_steps=int(result[DOT_PRODUCT_STEPS]),
        traffic=Traffic(
            weight_bytes=int(result[WEIGHT_BYTES]),
            activation_bytes=int(result[ACTIVATION_BYTES_MOVED]),
            output_bytes=int(result[OUTPUT_BYTES_MOVED]),
        ),
    )
