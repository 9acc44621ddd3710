"""The compiled kernels of the simulator: external memory, and one product cycle by cycle.

They stand in one file, with their constants and the tuples that they take, because Numba's cache on disk does not
notice a change in another file. Nothing is checked here. What they do is defined elsewhere:

* ``serve_request``: the controller of ``termwise.sim.dram``, burst by burst in ``termwise.sim.dram_reference``.
* ``run_product``: the machine of ``docs/microarchitecture.md``, one cycle at a time in
  ``termwise.sim.cycle_reference``. It jumps from event to event, and over panels that repeat.

The machine has two servers. The **channel** to external memory moves one request at a time. The **array** is in one of
five states. A position of the request list is ``3 · step + part`` with part 0 for weights, 1 for activations and 2 for
partial sums; requests are served in this order, so one number says what has arrived.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

PICOSECONDS_PER_MICROSECOND = 1_000_000
NEVER = np.iinfo(np.int64).max // 4  # ps; no refresh is due

READ, WRITE = 0, 1
NO_ROW = -1
NO_DIRECTION = -1

# Fields of the state: what all channels share, ...
LAST_START = 0  # ps; no request starts before the one before it
HITS, MISSES, CONFLICTS = 1, 2, 3  # bursts by what they met: their row open, no row open, another row open
TURNAROUNDS = 4  # changes of a data bus between reading and writing
REFRESHES = 5  # all-bank refreshes, over all channels
READ_BYTES, WRITTEN_BYTES = 6, 7  # whole bursts; for ideal memory the bytes asked for
SHARED_FIELDS = 8
# ... of a channel, ...
BUS_FREE, DIRECTION, NEXT_REFRESH = 0, 1, 2
CHANNEL_FIELDS = 3
# ... and of a bank: COLUMN_READY while a row is open, CLOSE_READY from when it may be precharged, ACTIVATE_READY while
# none is open.
OPEN_ROW, COLUMN_READY, CLOSE_READY, ACTIVATE_READY = 0, 1, 2, 3
BANK_FIELDS = 4


class DramTiming(NamedTuple):
    """Everything that decides the time of a request, in whole numbers; times in picoseconds (a plain tuple for Numba).

    ``ideal_bytes_per_cycle`` above 0 is memory without latency and pages; nothing else but ``clock_mhz`` counts then.
    """

    clock_mhz: int
    ideal_bytes_per_cycle: int
    channels: int
    bank_groups: int
    banks_per_group: int
    burst_bytes: int
    bursts_per_row: int
    burst_ps: int
    row_to_column_ps: int
    precharge_ps: int
    read_latency_ps: int
    write_latency_ps: int
    row_active_ps: int
    read_to_precharge_ps: int
    write_recovery_ps: int
    write_to_read_ps: int
    read_to_write_ps: int
    refresh_ps: int
    refresh_interval_ps: int  # 0 where nothing is refreshed


@njit(cache=True)  # type: ignore[untyped-decorator]
def _refresh(timing: DramTiming, state: NDArray[np.int64], channel: int) -> None:
    """The refresh that is due: all open rows close as soon as they may, and all banks are blocked."""
    banks = timing.bank_groups * timing.banks_per_group
    begin = state[channel + NEXT_REFRESH]
    any_open = False
    for bank in range(banks):
        base = channel + CHANNEL_FIELDS + bank * BANK_FIELDS
        if state[base + OPEN_ROW] != NO_ROW:
            any_open = True
            begin = max(begin, state[base + CLOSE_READY])
    if any_open:
        begin += timing.precharge_ps
    for bank in range(banks):
        base = channel + CHANNEL_FIELDS + bank * BANK_FIELDS
        if state[base + OPEN_ROW] == NO_ROW:
            begin = max(begin, state[base + ACTIVATE_READY])
    for bank in range(banks):
        base = channel + CHANNEL_FIELDS + bank * BANK_FIELDS
        state[base + OPEN_ROW] = NO_ROW
        state[base + ACTIVATE_READY] = begin + timing.refresh_ps
    state[channel + NEXT_REFRESH] += timing.refresh_interval_ps
    state[REFRESHES] += 1


@njit(cache=True)  # type: ignore[untyped-decorator]
def _skip_idle_refreshes(timing: DramTiming, state: NDArray[np.int64], channel: int, start: int) -> None:
    """All refreshes that are due up to ``start``. The first waits for open rows; the others begin when they are due."""
    if state[channel + NEXT_REFRESH] > start:
        return
    _refresh(timing, state, channel)
    due = state[channel + NEXT_REFRESH]
    if due > start:
        return
    refreshes = (start - due) // timing.refresh_interval_ps + 1
    state[REFRESHES] += refreshes
    state[channel + NEXT_REFRESH] = due + refreshes * timing.refresh_interval_ps
    end = due + (refreshes - 1) * timing.refresh_interval_ps + timing.refresh_ps
    for bank in range(timing.bank_groups * timing.banks_per_group):
        state[channel + CHANNEL_FIELDS + bank * BANK_FIELDS + ACTIVATE_READY] = end


@njit(cache=True)  # type: ignore[untyped-decorator]
def _serve_burst(
    timing: DramTiming, state: NDArray[np.int64], channel: int, bank: int, row: int, direction: int, start: int
) -> bool:
    """Serve one burst. Returns whether a refresh went before it, which closes all rows of the channel."""
    base = channel + CHANNEL_FIELDS + bank * BANK_FIELDS
    latency = timing.read_latency_ps if direction == READ else timing.write_latency_ps
    refreshed = False
    while True:
        if state[base + OPEN_ROW] == row:
            activate = NEVER
            column_ready = state[base + COLUMN_READY]
        else:
            if state[base + OPEN_ROW] == NO_ROW:
                activate = max(start, state[base + ACTIVATE_READY])
            else:
                activate = max(start, state[base + CLOSE_READY]) + timing.precharge_ps
            column_ready = activate + timing.row_to_column_ps
        bus_free = state[channel + BUS_FREE]
        column = max(start, column_ready, bus_free - latency)
        if direction == READ and state[channel + DIRECTION] == WRITE:
            column = max(column, bus_free + timing.write_to_read_ps)
        elif direction == WRITE and state[channel + DIRECTION] == READ:
            column = max(column, bus_free + timing.read_to_write_ps - latency)
        if column < state[channel + NEXT_REFRESH]:
            break
        _refresh(timing, state, channel)
        refreshed = True

    data_end = column + latency + timing.burst_ps
    if activate == NEVER:
        state[HITS] += 1
    else:
        if state[base + OPEN_ROW] == NO_ROW:
            state[MISSES] += 1
        else:
            state[CONFLICTS] += 1
        state[base + OPEN_ROW] = row
        state[base + COLUMN_READY] = column_ready
        state[base + CLOSE_READY] = activate + timing.row_active_ps
    close_ready = column + timing.read_to_precharge_ps if direction == READ else data_end + timing.write_recovery_ps
    state[base + CLOSE_READY] = max(state[base + CLOSE_READY], close_ready)
    if state[channel + DIRECTION] == 1 - direction:
        state[TURNAROUNDS] += 1
    state[channel + DIRECTION] = direction
    state[channel + BUS_FREE] = data_end
    return refreshed


@njit(cache=True)  # type: ignore[untyped-decorator]
def _serve_open_stripe(
    timing: DramTiming,
    state: NDArray[np.int64],
    channel: int,
    bank_in_group: int,
    position: int,
    bursts: int,
    direction: int,
) -> int:
    """Serve up to ``bursts`` bursts from ``position`` of a stripe whose rows are all open, back to back.

    Stops before the column command that a refresh goes before, and returns how many bursts were served.
    """
    latency = timing.read_latency_ps if direction == READ else timing.write_latency_ps
    first_column = state[channel + BUS_FREE] - latency
    time_to_refresh = state[channel + NEXT_REFRESH] - first_column
    served = min(bursts, max(0, -(-time_to_refresh // timing.burst_ps)))
    for index in range(max(0, served - timing.bank_groups), served):
        group = (position + index) % timing.bank_groups
        column = first_column + index * timing.burst_ps
        if direction == READ:
            close_ready = column + timing.read_to_precharge_ps
        else:
            close_ready = column + latency + timing.burst_ps + timing.write_recovery_ps
        base = channel + CHANNEL_FIELDS + (group * timing.banks_per_group + bank_in_group) * BANK_FIELDS
        state[base + CLOSE_READY] = max(state[base + CLOSE_READY], close_ready)
    state[HITS] += served
    state[channel + BUS_FREE] += served * timing.burst_ps
    return int(served)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _serve_channel(
    timing: DramTiming, state: NDArray[np.int64], channel: int, first: int, last: int, direction: int, start: int
) -> None:
    """Serve the bursts ``first`` to ``last`` (numbered within the channel) of one request."""
    _skip_idle_refreshes(timing, state, channel, start)
    stripe_bursts = timing.bursts_per_row * timing.bank_groups
    burst = first
    while burst <= last:
        stripe = burst // stripe_bursts
        stripe_end = min(last + 1, (stripe + 1) * stripe_bursts)
        bank_in_group = stripe % timing.banks_per_group
        row = stripe // timing.banks_per_group
        open_groups = 0  # bursts in a row, up to now, that no refresh went between: so many rows are open
        while burst < stripe_end:
            if open_groups < timing.bank_groups:
                bank = (burst % timing.bank_groups) * timing.banks_per_group + bank_in_group
                refreshed = _serve_burst(timing, state, channel, bank, row, direction, start)
                open_groups = 1 if refreshed else open_groups + 1
                burst += 1
            else:
                position = burst % stripe_bursts
                burst += _serve_open_stripe(
                    timing, state, channel, bank_in_group, position, stripe_end - burst, direction
                )
                open_groups = 0


@njit(cache=True)  # type: ignore[untyped-decorator]
def serve_request(
    timing: DramTiming, state: NDArray[np.int64], address: int, size: int, direction: int, start_cycle: int
) -> int:
    """Serve one request and return the cycle of the accelerator at whose beginning its last byte has been moved.

    Args:
        timing: of the memory and the clock, see ``Dram.timing``.
        state: int64, from ``termwise.sim.dram.new_state``; changed in place.
        address: of the first byte, from 0.
        size: bytes. A request of none takes no time and leaves no trace. Whole bursts are moved.
        direction: ``READ`` or ``WRITE``.
        start_cycle: the earliest cycle; a request that names an earlier one than the request before it starts with
            that one. Below 9 · 10¹² cycles, so that times fit 64 bits.

    Nothing is checked here; ``termwise.sim.dram_reference`` serves the same requests one burst at a time.
    """
    if size <= 0:
        return start_cycle
    if timing.ideal_bytes_per_cycle > 0:
        start = max(start_cycle, state[LAST_START], state[SHARED_FIELDS + BUS_FREE])  # cycles here
        end = start + -(-size // timing.ideal_bytes_per_cycle)
        state[LAST_START] = max(start_cycle, state[LAST_START])
        state[SHARED_FIELDS + BUS_FREE] = end
        state[READ_BYTES if direction == READ else WRITTEN_BYTES] += size
        return int(end)

    start = max(-(-start_cycle * PICOSECONDS_PER_MICROSECOND // timing.clock_mhz), state[LAST_START])
    state[LAST_START] = start
    first = address // timing.burst_bytes
    last = (address + size - 1) // timing.burst_bytes
    state[READ_BYTES if direction == READ else WRITTEN_BYTES] += (last - first + 1) * timing.burst_bytes
    channel_fields = CHANNEL_FIELDS + timing.bank_groups * timing.banks_per_group * BANK_FIELDS
    end = 0
    for channel in range(timing.channels):
        first_of_channel = -(-(first - channel) // timing.channels)
        last_of_channel = (last - channel) // timing.channels
        if first_of_channel <= last_of_channel:
            base = SHARED_FIELDS + channel * channel_fields
            _serve_channel(timing, state, base, first_of_channel, last_of_channel, direction, start)
            end = max(end, state[base + BUS_FREE])
    return int(-(-end * timing.clock_mhz // PICOSECONDS_PER_MICROSECOND))


@njit(cache=True)  # type: ignore[untyped-decorator]
def serve_requests(
    timing: DramTiming, state: NDArray[np.int64], requests: NDArray[np.int64], ends: NDArray[np.int64]
) -> None:
    """Serve requests in order: ``requests`` int64 [requests, 4] (address, bytes, direction, earliest start cycle).

    The cycle in which each is done goes to ``ends``, int64 [requests].
    """
    for index in range(requests.shape[0]):
        ends[index] = serve_request(
            timing, state, requests[index, 0], requests[index, 1], requests[index, 2], requests[index, 3]
        )


# The product.

ACTIVATION_BITS = 16  # FP16, where nothing else is said
OUTPUT_BYTES = 2  # FP16
PARTIAL_SUM_BYTES = 4  # FP32

# Matrices begin at multiples of this in external memory: weights, activations, partial sums and outputs, in this order.
REGION_BYTES = 1 << 20

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

# Fields of the issue table: of one chunk of one tile, in cycles from the chunk's first issue. ``ISSUED`` terms and
# ``HELD`` cycles of the sequencer's state SCALE after the first end of a group; ``FIRST_END`` and ``LAST_END`` are the
# cycles up to and with the last issue of the first and of the last group that ends in the chunk, 0 where none does.
ISSUED, HELD, FIRST_END, LAST_END = 0, 1, 2, 3
ISSUE_FIELDS = 4

# Fields of a result.
CYCLES, BUSY, SCALE_STALL, WEIGHT_STALL, ACTIVATION_STALL, DRAIN_STALL, WRITE_BACK_STALL = 0, 1, 2, 3, 4, 5, 6
WEIGHT_BYTES, ACTIVATION_BYTES_MOVED, OUTPUT_BYTES_MOVED, DOT_PRODUCT_STEPS, WEIGHT_READS, DEADLOCK = (
    7,
    8,
    9,
    10,
    11,
    12,
)
RESULT_FIELDS = 13

NO_GROUP_END = -(1 << 60)  # the cycle of a group's end before any was

# Fast-forward over moving panels, and over blocks: so many are remembered, each as the fields of the machine's state
# relative to its beginning.
PANEL, BLOCK_OF_PANELS = 0, 1
SNAPSHOTS = 4
SNAPSHOT_FIELDS = 19


class TileProgram(NamedTuple):
    """Everything that decides the cycles of one product, in whole numbers (a plain tuple, so that Numba takes it).

    A tile is ``rows`` outputs × ``columns · token_groups`` tokens.
    """

    tokens: int
    reduction: int
    outputs: int
    rows: int
    columns: int  # of the array
    token_groups: int  # 1 where outputs stay in the PEs; above where weights do, and a tile's tokens take turns
    lanes: int
    group_inputs: int  # inputs under one scale, 0 for all of them; a step never reaches into the next group
    cycles_per_step: int
    group_distance_cycles: int  # least distance of the ends of two groups
    drain_cycles: int
    weight_total_bytes: int  # the whole weight matrix in external memory, metadata included
    burst_bytes: int  # bytes that ideal memory moves in one cycle; 0 where a memory with pages is given
    segment_steps: int
    chunk_steps: int
    weights_stationary: int  # 1 or 0
    panels_per_block: int  # stationary panels that share an allocation
    weight_allocation: int  # RESIDENT, PANELS or CHUNKS
    activation_allocation: int
    activation_bits: int = ACTIVATION_BITS  # of an activation, packed in rows


@njit(cache=True)  # type: ignore[untyped-decorator]
def steps_of(program: TileProgram) -> int:
    """Dot-product steps of a row."""
    if program.group_inputs == 0:
        return -(-program.reduction // program.lanes)
    whole = program.reduction // program.group_inputs
    rest = program.reduction % program.group_inputs
    return whole * -(-program.group_inputs // program.lanes) + -(-rest // program.lanes)


@njit(cache=True)  # type: ignore[untyped-decorator]
def first_input(program: TileProgram, step: int) -> int:
    """The first input of a step; the reduction after the last step."""
    if program.group_inputs == 0:
        return min(step * program.lanes, program.reduction)
    group_steps = -(-program.group_inputs // program.lanes)
    in_group = min(step % group_steps * program.lanes, program.group_inputs)
    return min(step // group_steps * program.group_inputs + in_group, program.reduction)


@njit(cache=True)  # type: ignore[untyped-decorator]
def activation_bytes(program: TileProgram, inputs: int) -> int:
    """Bytes of the first ``inputs`` activations of a token, whose bits are packed: rounded up."""
    return -(-inputs * program.activation_bits // 8)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _chunks_of_segment(program: TileProgram) -> int:
    """Chunks of a pass that is full."""
    return -(-program.segment_steps // program.chunk_steps)


@njit(cache=True)  # type: ignore[untyped-decorator]
def fill_issue_table(program: TileProgram, step_cycles: NDArray[np.uint8], table: NDArray[np.int64]) -> None:
    """When a chunk's terms are issued, and the groups that end in it.

    Args:
        program: the product.
        step_cycles: uint8 [tables, steps], issue cycles of every step for each tile of rows, or one for all of them;
            [1, 1] where all steps are alike.
        table: int64 [tables, 2, chunks of all passes, ISSUE_FIELDS], filled here; the second axis is 1 for the last
            column of tiles, which may have fewer tokens.
    """
    steps = steps_of(program)
    group_steps = -(-program.group_inputs // program.lanes)
    passes = -(-steps // program.segment_steps)
    chunks = _chunks_of_segment(program)
    distance = program.group_distance_cycles
    tile_columns = program.columns * program.token_groups
    last_tokens = program.tokens - (-(-program.tokens // tile_columns) - 1) * tile_columns
    for index in range(table.shape[0]):
        for last in range(2):
            turns = -(-last_tokens // program.columns) if last == 1 else program.token_groups
            for pass_index in range(passes):
                segment_end = min(steps, (pass_index + 1) * program.segment_steps)
                for chunk in range(chunks):
                    begin = pass_index * program.segment_steps + chunk * program.chunk_steps
                    if begin >= segment_end:
                        break
                    issued = held = first_end = last_end = now = 0
                    for step in range(begin, min(begin + program.chunk_steps, segment_end)):
                        cycles = step_cycles[index, 0] if step_cycles.shape[1] == 1 else step_cycles[index, step]
                        issued += turns * cycles
                        ends = step + 1 == segment_end or (group_steps > 0 and (step + 1) % group_steps == 0)
                        if not ends:
                            now += turns * cycles
                            continue
                        # The tokens of a tile end the group in turns.
                        now += cycles
                        if first_end == 0:
                            first_end = now
                        else:
                            wait = max(0, last_end + distance - now)
                            held += wait
                            now += wait
                        held += (turns - 1) * max(0, distance - cycles)
                        now += (turns - 1) * max(distance, cycles)
                        last_end = now
                    row = table[index, last, pass_index * chunks + chunk]
                    row[ISSUED], row[HELD], row[FIRST_END], row[LAST_END] = issued, held, first_end, last_end


@njit(cache=True)  # type: ignore[untyped-decorator]
def _segment_end(program: TileProgram, steps: int, pass_index: int) -> int:
    """The step after the last one of a pass; ``steps`` are those of a row."""
    return min(steps, (pass_index + 1) * program.segment_steps)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _panel_counts(program: TileProgram) -> tuple[int, int]:
    """Stationary and moving panels."""
    row_tiles = -(-program.outputs // program.rows)
    column_tiles = -(-program.tokens // (program.columns * program.token_groups))
    if program.weights_stationary == 1:
        return row_tiles, column_tiles
    return column_tiles, row_tiles


@njit(cache=True)  # type: ignore[untyped-decorator]
def _is_last_chunk(program: TileProgram, steps: int, cursor: NDArray[np.int64]) -> bool:
    """Whether the cursor stands on the last chunk of its tile."""
    return bool(cursor[CHUNK_BEGIN] + program.chunk_steps >= _segment_end(program, steps, cursor[PASS]))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _advance(program: TileProgram, steps: int, cursor: NDArray[np.int64]) -> None:
    """Move a cursor to the next step: chunks innermost, then the panels of a block, moving panels, blocks, passes.

    Where the next step opens a new allocation of an operand, its first step is noted, and so is that of the one before.
    """
    stationary_panels, moving_panels = _panel_counts(program)
    new_tile = False
    new_moving = False
    new_block = False
    cursor[STEP] += 1
    cursor[CHUNK_BEGIN] += program.chunk_steps
    if cursor[CHUNK_BEGIN] >= _segment_end(program, steps, cursor[PASS]):
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
        if _segment_end(program, steps, cursor[PASS]) <= cursor[CHUNK_BEGIN]:
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
    tile_columns = program.columns * program.token_groups
    first_output = row_tile * program.rows
    first_token = column_tile * tile_columns
    return (
        first_output,
        min(program.rows, program.outputs - first_output),
        first_token,
        min(tile_columns, program.tokens - first_token),
    )


@njit(cache=True)  # type: ignore[untyped-decorator]
def _inputs_of_chunk(program: TileProgram, steps: int, cursor: NDArray[np.int64]) -> tuple[int, int]:
    """First input of the cursor's chunk, and the one after its last."""
    end = min(cursor[CHUNK_BEGIN] + program.chunk_steps, _segment_end(program, steps, cursor[PASS]))
    return first_input(program, cursor[CHUNK_BEGIN]), first_input(program, end)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _weight_bytes(program: TileProgram, steps: int, cursor: NDArray[np.int64]) -> tuple[int, int]:
    """First byte of the chunk's weights in external memory, and the one after its last.

    The bytes of the whole matrix are spread evenly over its weights, in the order of their use, so that the requests
    add up to them.
    """
    first_output, outputs, _, _ = _tile_position(program, cursor)
    begin_input, end_input = _inputs_of_chunk(program, steps, cursor)
    weights = program.outputs * program.reduction
    begin = first_output * program.reduction + outputs * begin_input
    end = first_output * program.reduction + outputs * end_input
    return program.weight_total_bytes * begin // weights, program.weight_total_bytes * end // weights


@njit(cache=True)  # type: ignore[untyped-decorator]
def _request_bytes(program: TileProgram, steps: int, cursor: NDArray[np.int64], part: int) -> int:
    """Bytes of part 0 (weights), 1 (activations) or 2 (partial sums) of the cursor's step; 0 where none is loaded."""
    _, outputs, _, tokens = _tile_position(program, cursor)
    if part == 2:
        if cursor[PASS] == 0 or not _is_last_chunk(program, steps, cursor):
            return 0
        return int(outputs * tokens * PARTIAL_SUM_BYTES)
    if not _must_load(program, cursor, part == 0):
        return 0
    if part == 1:
        begin_input, end_input = _inputs_of_chunk(program, steps, cursor)
        return int(tokens * (activation_bytes(program, end_input) - activation_bytes(program, begin_input)))
    begin, end = _weight_bytes(program, steps, cursor)
    return int(end - begin)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _region(size: int) -> int:
    """Bytes that a matrix of ``size`` bytes occupies in external memory."""
    return -(-size // REGION_BYTES) * REGION_BYTES


@njit(cache=True)  # type: ignore[untyped-decorator]
def _serve_pieces(
    memory: DramTiming,
    state: NDArray[np.int64],
    base: int,
    row_bytes: int,
    first_row: int,
    rows: int,
    begin: int,
    size: int,
    direction: int,
    now: int,
) -> int:
    """Serve bytes ``begin`` to ``begin + size`` of rows of a row-major matrix, one piece where they touch."""
    if size == row_bytes:
        return int(serve_request(memory, state, base + first_row * row_bytes, rows * size, direction, now))
    end = now
    for row in range(first_row, first_row + rows):
        end = max(end, serve_request(memory, state, base + row * row_bytes + begin, size, direction, now))
    return int(end)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _partial_sum_place(program: TileProgram, first_output: int, first_token: int) -> int:
    """Where the partial sums of a tile begin: one full tile after the other, those of the same outputs together."""
    tile_columns = program.columns * program.token_groups
    column_tiles = -(-program.tokens // tile_columns)
    tile = first_output // program.rows * column_tiles + first_token // tile_columns
    return int(tile * program.rows * tile_columns * PARTIAL_SUM_BYTES)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _serve_load(
    program: TileProgram,
    steps: int,
    memory: DramTiming,
    state: NDArray[np.int64],
    cursor: NDArray[np.int64],
    part: int,
    now: int,
) -> int:
    """The cycle at whose beginning a load of the cursor's step has arrived from a memory with pages."""
    if part == 0:
        begin, end = _weight_bytes(program, steps, cursor)
        return int(serve_request(memory, state, begin, end - begin, READ, now))
    base = _region(program.weight_total_bytes)
    first_output, outputs, first_token, tokens = _tile_position(program, cursor)
    row_bytes = activation_bytes(program, program.reduction)
    if part == 1:
        begin_input, end_input = _inputs_of_chunk(program, steps, cursor)
        begin = activation_bytes(program, begin_input)
        size = activation_bytes(program, end_input) - begin
        return int(_serve_pieces(memory, state, base, row_bytes, first_token, tokens, begin, size, READ, now))
    base += _region(program.tokens * row_bytes)
    address = base + _partial_sum_place(program, first_output, first_token)
    return int(serve_request(memory, state, address, outputs * tokens * PARTIAL_SUM_BYTES, READ, now))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _serve_write_back(
    program: TileProgram,
    memory: DramTiming,
    state: NDArray[np.int64],
    tile: tuple[int, int, int, int],
    value_bytes: int,
    now: int,
) -> int:
    """The cycle at whose beginning a tile has been written to a memory with pages: partial sums or outputs."""
    first_output, outputs, first_token, tokens = tile
    base = _region(program.weight_total_bytes) + _region(program.tokens * activation_bytes(program, program.reduction))
    if value_bytes == PARTIAL_SUM_BYTES:
        address = base + _partial_sum_place(program, first_output, first_token)
        return int(serve_request(memory, state, address, outputs * tokens * PARTIAL_SUM_BYTES, WRITE, now))
    base += _region(_partial_sum_place(program, program.outputs + program.rows - 1, 0))
    row_bytes = program.outputs * OUTPUT_BYTES
    begin, size = first_output * OUTPUT_BYTES, outputs * OUTPUT_BYTES
    return int(_serve_pieces(memory, state, base, row_bytes, first_token, tokens, begin, size, WRITE, now))


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
def _are_alike(program: TileProgram, tables: int, level: int) -> bool:
    """Whether one moving panel (level 0) or block (level 1) asks for and issues the same as any other that is full.

    Those along the tokens always do; those along the outputs if all tiles of rows issue alike, and if their rows have
    a whole number of bytes each, so that no rounding wanders.
    """
    along_tokens = (program.weights_stationary == 1) == (level == PANEL)
    return bool(along_tokens or (tables == 1 and program.weight_total_bytes % program.outputs == 0))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _moves_with(program: TileProgram, operand: int, level: int) -> bool:
    """Whether an operand's allocations (0 weights, 1 activations) are opened anew in every moving panel, or block."""
    allocation = program.weight_allocation if operand == 0 else program.activation_allocation
    if level == BLOCK_OF_PANELS or allocation == CHUNKS:
        return bool(allocation != RESIDENT)
    is_stationary = (program.weights_stationary == 1) == (operand == 0)
    return bool(allocation == PANELS and not is_stationary)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _is_at_beginning(program: TileProgram, load: NDArray[np.int64], work: NDArray[np.int64], level: int) -> bool:
    """Whether the array begins a panel or block that may repeat, with all requests under way in the same run of them.

    Not in the first panel of a block, nor in the first block, which load more.
    """
    if load[AT_END] == 1 or load[PASS] != work[PASS] or work[CHUNK_BEGIN] != work[PASS] * program.segment_steps:
        return False
    if work[STATIONARY] != work[BLOCK] * program.panels_per_block:
        return False
    if level == PANEL:
        return bool(load[BLOCK] == work[BLOCK] and load[MOVING] >= 1)
    return bool(work[MOVING] == 0 and work[BLOCK] >= 1)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _fill_snapshot(
    program: TileProgram,
    load: NDArray[np.int64],
    work: NDArray[np.int64],
    rest: NDArray[np.int64],
    level: int,
    snapshot: NDArray[np.int64],
) -> None:
    """The machine's state at the beginning of a panel or block, relative to the array's place: [SNAPSHOT_FIELDS].

    ``rest``: the state of array and channel, times as cycles that are left, and counts less the array's place. The end
    of the last group is not part of it: no group of an earlier tile holds one of the next.
    """
    snapshot[:] = 0
    snapshot[: rest.size] = rest
    place = rest.size
    snapshot[place] = load[STEP] - work[STEP]
    snapshot[place + 1] = load[TILE] - work[TILE]
    snapshot[place + 2] = load[CHUNK_BEGIN]
    snapshot[place + 3] = load[BLOCK] - work[BLOCK]
    snapshot[place + 4] = load[MOVING] - work[MOVING]
    snapshot[place + 5] = load[STATIONARY] - work[STATIONARY]
    place += 6
    for operand in range(2):
        if _moves_with(program, operand, level):
            snapshot[place] = load[WEIGHT_ALLOCATION_STEP + operand] - work[STEP]
            snapshot[place + 1] = load[WEIGHT_PREVIOUS_STEP + operand] - work[STEP]
        place += 2


@njit(cache=True)  # type: ignore[untyped-decorator]
def _jump(program: TileProgram, cursor: NDArray[np.int64], count: int, steps: int, tiles: int, level: int) -> None:
    """Move a cursor by ``count`` whole panels or blocks with so many steps and tiles."""
    cursor[STEP] += steps
    cursor[TILE] += tiles
    if level == PANEL:
        cursor[MOVING] += count
    else:
        cursor[BLOCK] += count
        cursor[STATIONARY] += count * program.panels_per_block
    for operand in range(2):
        if _moves_with(program, operand, level):
            cursor[WEIGHT_ALLOCATION_STEP + operand] += steps
            cursor[WEIGHT_PREVIOUS_STEP + operand] += steps


@njit(cache=True)  # type: ignore[untyped-decorator]
def run_product(
    program: TileProgram,
    issue_table: NDArray[np.int64],
    drain_cycles: NDArray[np.int64],
    memory: DramTiming,
    memory_state: NDArray[np.int64],
    result: NDArray[np.int64],
    fast_forward: bool,
) -> None:
    """Simulate a whole product into ``result`` (int64 [RESULT_FIELDS], zeros on entry).

    Args:
        program: the product.
        issue_table: from ``fill_issue_table``.
        drain_cycles: int64 [tiles of rows], or [1] where all are alike.
        memory: external memory; read where ``program.burst_bytes`` is 0.
        memory_state: its state, from ``termwise.sim.dram.new_state``; changed in place.
        result: see the constants.
        fast_forward: where the state at the beginning of a moving panel is that of an earlier panel of the block, what
            happens until the next full panels have passed is what happened between these two, again and again; it is
            added at once. Nothing else depends on the place: full panels ask for the same bytes, and the array's steps
            are the same. The last panel, which may be smaller, and the first of a block, which loads more, are never
            jumped over. The same holds for the blocks of a pass. Nothing is jumped over with a memory whose time
            depends on addresses.
    """
    load = np.zeros(CURSOR_FIELDS, np.int64)  # where the requests stand
    work = np.zeros(CURSOR_FIELDS, np.int64)  # where the array stands
    steps = steps_of(program)
    passes = -(-steps // program.segment_steps)
    chunks = _chunks_of_segment(program)
    tile_columns = program.columns * program.token_groups
    last_column_tile = -(-program.tokens // tile_columns) - 1
    part = 0  # which request of the load cursor's step comes next
    now = 0
    channel = IDLE
    channel_end = 0
    array = WAITING_FOR_OPERANDS
    array_end = 0
    group_end = NO_GROUP_END  # cycle of the last issue of the last group that ended in this tile
    done_steps = 0
    left_tiles = 0
    staging_free = True
    write_bytes = 0
    write_tile = (0, 0, 0, 0)
    write_value_bytes = OUTPUT_BYTES
    stationary_panels, moving_panels = _panel_counts(program)
    counts = (moving_panels, -(-stationary_panels // program.panels_per_block))  # by level
    tables = max(issue_table.shape[0], drain_cycles.shape[0])
    jumps = np.zeros(2, np.bool_)
    for level in range(2):
        repeats = counts[level] > 4 and _are_alike(program, tables, level)
        jumps[level] = fast_forward and program.burst_bytes > 0 and repeats
    any_jumps = jumps[PANEL] or jumps[BLOCK_OF_PANELS]
    snapshots = np.zeros((2, SNAPSHOTS, SNAPSHOT_FIELDS), np.int64)
    snapshot_results = np.zeros((2, SNAPSHOTS, RESULT_FIELDS), np.int64)
    snapshot_places = np.zeros((2, SNAPSHOTS, 4), np.int64)  # cycle, step, tile, and panel or block
    taken = np.zeros(2, np.int64)  # snapshots of this block, and of this pass
    snapshot = np.zeros(SNAPSHOT_FIELDS, np.int64)
    rest = np.zeros(9, np.int64)
    seen_step = -1
    seen_block = np.zeros(2, np.int64)

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
            if not _is_last_chunk(program, steps, work):
                _advance(program, steps, work)
                array = WAITING_FOR_OPERANDS
            else:
                row_tile = work[STATIONARY] if program.weights_stationary == 1 else work[MOVING]
                drain = drain_cycles[row_tile] if drain_cycles.shape[0] > 1 else drain_cycles[0]
                array = DRAINING if drain > 0 else WAITING_TO_LEAVE
                array_end = now + drain
        elif array == DRAINING and array_end == now:
            array = WAITING_TO_LEAVE

        # Parts that need no request are passed over without time.
        request = 0
        if channel != LOADING:
            while load[AT_END] == 0:
                if part == 3:
                    _advance(program, steps, load)
                    part = 0
                    continue
                request = _request_bytes(program, steps, load, part)
                if request > 0:
                    break
                part += 1
        arrived = 3 * load[STEP] + part

        # The array.
        if array == WAITING_TO_LEAVE and staging_free and arrived > 3 * work[STEP] + 2:
            write_tile = _tile_position(program, work)
            write_value_bytes = OUTPUT_BYTES if work[PASS] == passes - 1 else PARTIAL_SUM_BYTES
            write_bytes = write_tile[1] * write_tile[3] * write_value_bytes
            staging_free = False
            left_tiles += 1
            _advance(program, steps, work)
            group_end = NO_GROUP_END
            array = FINISHED if work[AT_END] == 1 else WAITING_FOR_OPERANDS
        if array == WAITING_FOR_OPERANDS and arrived > 3 * work[STEP] + 1:
            row_tile, column_tile = work[MOVING], work[STATIONARY]
            if program.weights_stationary == 1:
                row_tile, column_tile = work[STATIONARY], work[MOVING]
            chunk = (
                work[PASS] * chunks + (work[CHUNK_BEGIN] - work[PASS] * program.segment_steps) // program.chunk_steps
            )
            is_last_column = 1 if column_tile == last_column_tile else 0
            issue = issue_table[row_tile if issue_table.shape[0] > 1 else 0, is_last_column, chunk]
            held = issue[HELD]
            if issue[FIRST_END] > 0:
                wait = max(0, group_end + program.group_distance_cycles - (now + issue[FIRST_END] - 1))
                held += wait
                group_end = now + issue[LAST_END] - 1 + wait
            array = COMPUTING
            array_end = now + issue[ISSUED] + held
            result[BUSY] += issue[ISSUED]
            result[SCALE_STALL] += held
            chunk_steps = min(program.chunk_steps, _segment_end(program, steps, work[PASS]) - work[CHUNK_BEGIN])
            tokens = min(tile_columns, program.tokens - column_tile * tile_columns)
            result[WEIGHT_READS] += chunk_steps
            result[DOT_PRODUCT_STEPS] += chunk_steps * -(-tokens // program.columns)

        # The channel: a write-back first, then the next request once its half is free.
        if channel == IDLE:
            if write_bytes > 0:
                channel = WRITING
                if program.burst_bytes > 0:
                    channel_end = now - (-write_bytes // program.burst_bytes)
                else:
                    channel_end = _serve_write_back(program, memory, memory_state, write_tile, write_value_bytes, now)
                result[OUTPUT_BYTES_MOVED] += write_bytes
                write_bytes = 0
            elif load[AT_END] == 0 and _may_start(program, load, part, done_steps, left_tiles):
                channel = LOADING
                if program.burst_bytes > 0:
                    channel_end = now - (-request // program.burst_bytes)
                else:
                    channel_end = _serve_load(program, steps, memory, memory_state, load, part, now)
                result[WEIGHT_BYTES + part] += request

        array_busy = array in (COMPUTING, DRAINING)
        if any_jumps and work[STEP] != seen_step and array != FINISHED:
            seen_step = work[STEP]
            if work[PASS] != seen_block[1]:
                taken[:] = 0
            elif work[BLOCK] != seen_block[0]:
                taken[PANEL] = 0
            seen_block[0], seen_block[1] = work[BLOCK], work[PASS]
            for level in range(2):
                if not jumps[level] or not _is_at_beginning(program, load, work, level):
                    continue
                place = work[MOVING] if level == PANEL else work[BLOCK]
                last = load[MOVING] if level == PANEL else load[BLOCK]
                rest[0] = array
                rest[1] = array_end - now if array_busy else 0
                rest[2] = channel
                rest[3] = channel_end - now if channel != IDLE else 0
                rest[4] = part
                rest[5] = done_steps - work[STEP]
                rest[6] = left_tiles - work[TILE]
                rest[7] = 1 if staging_free else 0
                rest[8] = write_bytes
                _fill_snapshot(program, load, work, rest, level, snapshot)
                times = 0
                for back in range(1, min(taken[level], SNAPSHOTS) + 1):
                    slot = (taken[level] - back) % SNAPSHOTS
                    if not np.array_equal(snapshots[level, slot], snapshot):
                        continue
                    before = snapshot_places[level, slot]
                    count = place - before[3]
                    times = max(0, (counts[level] - 2 - last) // count)
                    steps_jumped = times * (work[STEP] - before[1])
                    tiles = times * (work[TILE] - before[2])
                    cycles = times * (now - before[0])
                    for field in range(RESULT_FIELDS):
                        result[field] += times * (result[field] - snapshot_results[level, slot, field])
                    now += cycles
                    array_end += cycles
                    channel_end += cycles
                    group_end += cycles
                    done_steps += steps_jumped
                    left_tiles += tiles
                    _jump(program, load, times * count, steps_jumped, tiles, level)
                    _jump(program, work, times * count, steps_jumped, tiles, level)
                    arrived = 3 * load[STEP] + part
                    break
                if times > 0:
                    seen_step = work[STEP]
                    seen_block[0] = work[BLOCK]
                    taken[: level + 1] = 0
                    break
                slot = taken[level] % SNAPSHOTS
                snapshots[level, slot] = snapshot
                snapshot_results[level, slot] = result
                before = snapshot_places[level, slot]
                before[0], before[1], before[2], before[3] = now, work[STEP], work[TILE], place
                taken[level] += 1

        # The next event, and whose the cycles until then are; those of a chunk were charged when it began.
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
        if array == WAITING_FOR_OPERANDS:
            result[WEIGHT_STALL if arrived <= 3 * work[STEP] else ACTIVATION_STALL] += event - now
        elif array == DRAINING:
            result[DRAIN_STALL] += event - now
        elif array != COMPUTING:
            result[WRITE_BACK_STALL] += event - now
        now = event
