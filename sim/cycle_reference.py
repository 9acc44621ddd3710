"""The cycle-level simulation of one product, one cycle at a time: the definition that the Numba kernel is held to.

It is written to be read, not to be fast: requests and steps are lists, a buffer half is an object that counts its
remaining uses, and time advances by one. ``termwise.sim.cycle`` must give the same counts.

In every cycle, in this order:

1. The array finishes what ends here: a step releases its buffer halves, a drained tile is ready to leave.
2. A tile leaves when the write-back register is free and its partial sums have arrived. The next step begins when its
   weights and its activations have arrived.
3. The channel, when idle, takes the waiting write-back, or else the next request, if a half of the buffer is free.
4. The cycle is charged to one cause: compute, weights, activations, or drain.
5. Both servers work for one cycle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from termwise.sim.cycle import (
    ACTIVATION_BYTES,
    OUTPUT_BYTES,
    PANELS,
    PARTIAL_SUM_BYTES,
    RESIDENT,
    CycleCount,
    TileProgram,
    Traffic,
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


@dataclass
class _Request:
    kind: str
    bytes: int
    half: _Half
    arrived: bool = False


@dataclass
class _Step:
    """One chunk of one tile: what it waits for and what it does."""

    weights: _Request
    activations: _Request
    dot_product_steps: int
    cycles: int
    halves: list[_Half]
    partial_sums: _Request | None = None
    leaving_bytes: int = 0  # above 0 on the last chunk of a tile
    register: _Half | None = None


@dataclass
class _Buffer:
    """The loads of one operand: decides when something must be loaded again, and into which half."""

    allocation: int
    halves: list[_Half] = field(default_factory=list)
    content: Any = None
    loaded: dict[Any, _Request] = field(default_factory=dict)

    def load(self, kind: str, content: Any, part: Any, size: int) -> tuple[_Request, bool]:
        """The request that brings ``part`` of the allocation ``content``, and whether it is a new one."""
        if not self.halves or (self.allocation != RESIDENT and content != self.content):
            self.content = content
            self.loaded = {}
            self.halves.append(_Half(before=self.halves[-2] if len(self.halves) >= 2 else None))
        new = part not in self.loaded
        if new:
            self.loaded[part] = _Request(kind=kind, bytes=size, half=self.halves[-1])
        return self.loaded[part], new


def _tiles(program: TileProgram) -> Iterator[tuple[int, int, int, int]]:
    """(pass, block, row tile, column tile) in the order of execution."""
    steps = ceil_divide(program.reduction, program.lanes)
    row_tiles = ceil_divide(program.outputs, program.rows)
    column_tiles = ceil_divide(program.tokens, program.columns)
    stationary, moving = (row_tiles, column_tiles) if program.weights_stationary else (column_tiles, row_tiles)
    for pass_index in range(ceil_divide(steps, program.segment_steps)):
        for block, first in enumerate(range(0, stationary, program.panels_per_block)):
            for moving_panel in range(moving):
                for stationary_panel in range(first, min(first + program.panels_per_block, stationary)):
                    if program.weights_stationary:
                        yield pass_index, block, stationary_panel, moving_panel
                    else:
                        yield pass_index, block, moving_panel, stationary_panel


def _chunk_cycles(program: TileProgram, steps: int) -> int:
    if not program.group_steps:
        return steps * program.cycles_per_step
    cycles = 0
    while steps > 0:
        cycles += max(program.group_cycles, min(steps, program.group_steps) * program.cycles_per_step)
        steps -= program.group_steps
    return cycles


def _schedule(program: TileProgram) -> tuple[list[_Step], list[_Request]]:
    """All steps, and all requests in the order in which they are issued."""
    total_steps = ceil_divide(program.reduction, program.lanes)
    last_pass = ceil_divide(total_steps, program.segment_steps) - 1
    weights = _Buffer(program.weight_allocation)
    activations = _Buffer(program.activation_allocation)
    partial_sums = _Buffer(PANELS)
    steps: list[_Step] = []
    requests: list[_Request] = []
    for tile, (pass_index, block, row_tile, column_tile) in enumerate(_tiles(program)):
        first_output = row_tile * program.rows
        outputs = min(program.rows, program.outputs - first_output)
        tokens = min(program.columns, program.tokens - column_tile * program.columns)
        segment_end = min((pass_index + 1) * program.segment_steps, total_steps)
        for begin in range(pass_index * program.segment_steps, segment_end, program.chunk_steps):
            end = min(begin + program.chunk_steps, segment_end)
            first_input, end_input = begin * program.lanes, min(end * program.lanes, program.reduction)
            first_weight = first_output * program.reduction + outputs * first_input
            end_weight = first_output * program.reduction + outputs * end_input
            all_weights = program.outputs * program.reduction
            weight_bytes = program.weight_total_bytes * end_weight // all_weights
            weight_bytes -= program.weight_total_bytes * first_weight // all_weights
            content: dict[bool, Any] = {
                True: (pass_index, block),
                False: (pass_index, block, row_tile if not program.weights_stationary else column_tile),
            }
            now = (pass_index, block, row_tile, column_tile, begin)
            weight_content = content[bool(program.weights_stationary)] if program.weight_allocation == PANELS else now
            activation_content = (
                content[not program.weights_stationary] if program.activation_allocation == PANELS else now
            )
            weight_request, new = weights.load("weights", weight_content, (row_tile, begin), weight_bytes)
            if new:
                requests.append(weight_request)
            activation_request, new = activations.load(
                "activations",
                activation_content,
                (column_tile, begin),
                tokens * (end_input - first_input) * ACTIVATION_BYTES,
            )
            if new:
                requests.append(activation_request)
            step = _Step(
                weights=weight_request,
                activations=activation_request,
                dot_product_steps=end - begin,
                cycles=_chunk_cycles(program, end - begin),
                halves=[weights.halves[-1], activations.halves[-1]],
            )
            for half in step.halves:
                half.uses_left += 1
            steps.append(step)
        values = outputs * tokens
        steps[-1].leaving_bytes = values * (OUTPUT_BYTES if pass_index == last_pass else PARTIAL_SUM_BYTES)
        # The register that partial sums return to is double-buffered like everything else.
        partial_request, _ = partial_sums.load("outputs", tile, 0, values * PARTIAL_SUM_BYTES)
        steps[-1].register = partial_request.half
        partial_request.half.uses_left = 1
        if pass_index > 0:
            steps[-1].partial_sums = partial_request
            requests.append(partial_request)
    return steps, [request for request in requests if request.bytes > 0 or _arrives_at_once(request)]


def _arrives_at_once(request: _Request) -> bool:
    """Mark a request of no bytes (a part of a matrix so small that it shares its byte with another) as arrived."""
    request.arrived = True
    return False


def run_tile_program_by_cycles(program: TileProgram) -> CycleCount:
    """As ``termwise.sim.cycle.run_tile_program``, by plain Python and one cycle at a time."""
    steps, requests = _schedule(program)
    next_step = 0
    next_request = 0
    array = "waiting"
    array_left = 0
    in_transfer: _Request | None = None  # None together with channel_left > 0 is a write-back
    channel_left = 0
    write_back_bytes = 0
    register_free = True
    counts = {"compute": 0, "weights": 0, "activations": 0, "drain": 0}
    moved = {"weights": 0, "activations": 0, "outputs": 0}
    dot_product_steps = 0
    cycle = 0
    while True:
        # 1. What ends here.
        if array == "computing" and array_left == 0:
            step = steps[next_step]
            for half in step.halves:
                half.uses_left -= 1
            if step.leaving_bytes:
                array, array_left = "draining", program.fill_drain_cycles
            else:
                array = "waiting"
                next_step += 1
        # 2. The array takes up what is next.
        if array == "draining" and array_left == 0:
            step = steps[next_step]
            arrived = step.partial_sums is None or step.partial_sums.arrived
            if register_free and arrived:
                register_free = False
                write_back_bytes = step.leaving_bytes
                assert step.register is not None
                step.register.uses_left = 0
                next_step += 1
                array = "waiting" if next_step < len(steps) else "finished"
        if array == "waiting" and steps[next_step].weights.arrived and steps[next_step].activations.arrived:
            array, array_left = "computing", steps[next_step].cycles
            dot_product_steps += steps[next_step].dot_product_steps
        # 3. The channel.
        if channel_left == 0:
            if write_back_bytes:
                channel_left = ceil_divide(write_back_bytes, program.burst_bytes)
                moved["outputs"] += write_back_bytes
                write_back_bytes = 0
                in_transfer = None
            elif next_request < len(requests) and requests[next_request].half.may_be_filled:
                in_transfer = requests[next_request]
                channel_left = ceil_divide(in_transfer.bytes, program.burst_bytes)
                moved[in_transfer.kind] += in_transfer.bytes
                next_request += 1
        if array == "finished" and channel_left == 0:
            break
        # 4. Whose cycle this is.
        if array == "computing":
            counts["compute"] += 1
        elif array == "waiting":
            counts["activations" if steps[next_step].weights.arrived else "weights"] += 1
        else:
            counts["drain"] += 1
        # 5. One cycle of work.
        cycle += 1
        array_left -= array_left > 0
        if channel_left > 0:
            channel_left -= 1
            if channel_left == 0:
                if in_transfer is None:
                    register_free = True
                else:
                    in_transfer.arrived = True
    return CycleCount(
        cycles=cycle,
        compute_cycles=counts["compute"],
        weight_stall_cycles=counts["weights"],
        activation_stall_cycles=counts["activations"],
        drain_stall_cycles=counts["drain"],
        dot_product_steps=dot_product_steps,
        traffic=Traffic(
            weight_bytes=moved["weights"], activation_bytes=moved["activations"], output_bytes=moved["outputs"]
        ),
    )
