"""How one product is cut into tiles, passes and chunks, and what stays in the buffers: decided before time starts.

Words (``docs/simulator.md`` has the whole machine):

* A **tile** is ``rows`` outputs × ``columns`` tokens, one per PE. A **panel** is what one tile needs of one operand.
* A **chunk** is the part of a panel that one request loads: at most half a buffer and at most 1024 inputs.
* A **pass** covers a segment of the reduction. With more than one pass, partial sums go to external memory in FP32
  and return in the next pass; long reductions need this, because their panels do not fit in a buffer.
* An **allocation** is what occupies one half of a buffer until its last use. The half is then free for the next but
  one allocation: one half is computed on while the other is loaded.

One operand is **stationary**: the array works through all panels of the other, the **moving** one, while as many
stationary panels as fit stay in half a buffer. Of all pass counts up to 16 and both choices of the stationary operand
the plan takes the one with the least traffic; among equals the one with the fewest passes, then stationary weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from termwise.algorithms.errors import InputError
from termwise.sim.cycle import Traffic
from termwise.sim.kernels import (
    ACTIVATION_BITS,
    CHUNKS,
    OUTPUT_BYTES,
    PANELS,
    PARTIAL_SUM_BYTES,
    RESIDENT,
    TileProgram,
    activation_bytes,
    steps_of,
)

MAXIMUM_CHUNK_INPUTS = 1024
MAXIMUM_PASSES = 16
COUNTER_LIMIT = 1 << 62
PICOSECOND_COUNTER_LIMIT = 9 * 10**12  # cycles, see termwise.sim.kernels.serve_request
# A split reduction reads a partial sum back after at least this many other tiles, so that it has been written by then.
MINIMUM_TILES_OF_SPLIT_REDUCTION = 3


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product on one array, before it is planned.

    Attributes:
        tokens, reduction, outputs: sizes.
        rows, columns, lanes: of the array.
        token_groups: how many times ``columns`` tokens may take turns on the same weights, 1 where outputs stay in
            the PEs (``docs/microarchitecture.md``, section 9).
        cycles_per_step: issue cycles of a dot-product step.
        weight_buffer_bits: bits per weight on chip; they set what fits.
        weight_total_bytes: bytes of the whole matrix off chip.
        group_inputs: inputs that share a scale; 0 for the whole row.
        group_distance_cycles: least distance of the ends of two groups; 0 or 1 where there is none.
        drain_cycles: from a tile's last issue until its outputs may leave.
        weight_buffer_bytes, activation_buffer_bytes: both halves.
        divisible: whether the reduction may be split into passes.
        burst_bytes: bytes that ideal memory moves in a cycle; 0 for a memory with pages.
        activation_bits: bits of an activation, on chip and off.
        elements_per_product: PEs that compute a product together; ``rows`` and ``columns`` count such groups.
    """

    tokens: int
    reduction: int
    outputs: int
    rows: int
    columns: int
    lanes: int
    cycles_per_step: int
    weight_buffer_bits: float
    weight_total_bytes: int
    group_inputs: int
    group_distance_cycles: int
    drain_cycles: int
    weight_buffer_bytes: int
    activation_buffer_bytes: int
    burst_bytes: int
    token_groups: int = 1
    activation_bits: int = ACTIVATION_BITS
    elements_per_product: int = 1
    divisible: bool = True


def ceil_divide(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def tile_counts(program: TileProgram) -> tuple[int, int, int]:
    """Row tiles, column tiles and passes of a program."""
    return (
        ceil_divide(program.outputs, program.rows),
        ceil_divide(program.tokens, program.columns * program.token_groups),
        ceil_divide(int(steps_of(program)), program.segment_steps),
    )


def planned_traffic(program: TileProgram) -> Traffic:
    """Traffic of a program in closed form; the simulated traffic equals it."""
    row_tiles, column_tiles, passes = tile_counts(program)
    if program.weights_stationary:
        stationary_panels, moving_panels = row_tiles, column_tiles
        stationary_kind, moving_kind = program.weight_allocation, program.activation_allocation
    else:
        stationary_panels, moving_panels = column_tiles, row_tiles
        stationary_kind, moving_kind = program.activation_allocation, program.weight_allocation
    stationary_fetches = moving_panels if stationary_kind == CHUNKS else 1
    blocks = ceil_divide(stationary_panels, program.panels_per_block)
    moving_fetches = {RESIDENT: 1, PANELS: blocks, CHUNKS: stationary_panels}[moving_kind]
    weight_fetches, activation_fetches = (
        (stationary_fetches, moving_fetches) if program.weights_stationary else (moving_fetches, stationary_fetches)
    )
    values = program.tokens * program.outputs
    return Traffic(
        weight_bytes=program.weight_total_bytes * weight_fetches,
        activation_bytes=program.tokens * int(activation_bytes(program, program.reduction)) * activation_fetches,
        output_bytes=values * (OUTPUT_BYTES + 2 * (passes - 1) * PARTIAL_SUM_BYTES),
    )


def _allocation(panels: int, panel_bits: float, operand_bits: float, buffer_bytes: int) -> tuple[int, int]:
    """What an allocation of an operand holds, and how many panels fit in one."""
    if operand_bits <= 8 * buffer_bytes:
        return RESIDENT, panels
    fitting = int(4 * buffer_bytes // panel_bits)
    return (PANELS, min(fitting, panels)) if fitting else (CHUNKS, 1)


def _whole(product: Product) -> TileProgram:
    """The program of one pass without its allocations. Raises ``InputError`` where a step fits in no half buffer."""
    token_groups = min(product.token_groups, ceil_divide(product.tokens, product.columns))
    columns = product.columns * token_groups
    fitting_inputs = min(
        4 * product.weight_buffer_bytes // (min(product.rows, product.outputs) * product.weight_buffer_bits),
        4 * product.activation_buffer_bytes // (min(columns, product.tokens) * product.activation_bits),
    )
    chunk_steps = min(int(fitting_inputs), MAXIMUM_CHUNK_INPUTS) // product.lanes
    if chunk_steps < 1:
        raise InputError(
            f"an array of {product.rows} × {columns} PEs needs more than half a buffer "
            f"({product.weight_buffer_bytes // 2} bytes for weights, {product.activation_buffer_bytes // 2} for "
            "activations) for one dot-product step; expected a smaller array or larger buffers"
        )
    program = TileProgram(
        tokens=product.tokens,
        reduction=product.reduction,
        outputs=product.outputs,
        rows=product.rows,
        columns=product.columns,
        token_groups=token_groups,
        lanes=product.lanes,
        group_inputs=product.group_inputs,
        cycles_per_step=product.cycles_per_step,
        group_distance_cycles=product.group_distance_cycles,
        drain_cycles=product.drain_cycles,
        weight_total_bytes=product.weight_total_bytes,
        burst_bytes=product.burst_bytes,
        segment_steps=1,
        chunk_steps=1,
        weights_stationary=1,
        panels_per_block=1,
        weight_allocation=CHUNKS,
        activation_allocation=CHUNKS,
        activation_bits=product.activation_bits,
    )
    steps = int(steps_of(program))
    return program._replace(segment_steps=steps, chunk_steps=min(chunk_steps, steps))


def _candidate(product: Product, whole: TileProgram, passes: int, weights_stationary: bool) -> TileProgram:
    steps = whole.segment_steps
    segment_steps = ceil_divide(steps, passes)
    if product.group_inputs:
        group_steps = ceil_divide(product.group_inputs, product.lanes)
        segment_steps = min(ceil_divide(segment_steps, group_steps) * group_steps, steps)
    segment_inputs = min(segment_steps * product.lanes, product.reduction)
    columns = whole.columns * whole.token_groups
    weight_kind, weight_panels = _allocation(
        ceil_divide(product.outputs, product.rows),
        min(product.rows, product.outputs) * product.weight_buffer_bits * segment_inputs,
        product.outputs * product.reduction * product.weight_buffer_bits,
        product.weight_buffer_bytes,
    )
    activation_kind, activation_panels = _allocation(
        ceil_divide(product.tokens, columns),
        min(columns, product.tokens) * product.activation_bits * segment_inputs,
        product.tokens * product.reduction * product.activation_bits,
        product.activation_buffer_bytes,
    )
    return whole._replace(
        segment_steps=segment_steps,
        chunk_steps=min(whole.chunk_steps, segment_steps),
        weights_stationary=int(weights_stationary),
        panels_per_block=max(1, weight_panels if weights_stationary else activation_panels),
        weight_allocation=weight_kind,
        activation_allocation=activation_kind,
    )


def check_count_range(program: TileProgram) -> None:
    """Raise ``InputError`` where bytes, steps or cycles might not fit the kernel's 64-bit counters.

    Bounds from above: every byte of the traffic alone on a channel that moves one in a cycle, after everything else. A
    memory with pages counts picoseconds.
    """
    row_tiles, column_tiles, passes = tile_counts(program)
    tiles = row_tiles * column_tiles
    steps = ceil_divide(program.reduction, program.lanes) + program.reduction
    issue = tiles * steps * program.token_groups * (program.cycles_per_step + program.group_distance_cycles)
    traffic = planned_traffic(program).total_bytes
    cycles = issue + tiles * passes * program.drain_cycles + traffic
    limit = COUNTER_LIMIT if program.burst_bytes else PICOSECOND_COUNTER_LIMIT
    if max(cycles, 3 * steps * tiles) >= limit:
        raise _too_many_cycles(program.tokens, program.reduction, program.outputs, limit)


def _too_many_cycles(tokens: int, reduction: int, outputs: int, limit: int) -> InputError:
    return InputError(
        f"a product of {tokens} × {reduction} by {reduction} × {outputs} numbers may take more cycles than the "
        f"simulator counts ({limit}); expected fewer tokens or a smaller matrix"
    )


def plan_product(product: Product, *, passes: int | None = None, weights_stationary: bool | None = None) -> TileProgram:
    """The program of least traffic for ``product``, with ``passes`` and the stationary operand fixed where given.

    Raises ``InputError`` where a single dot-product step does not fit in half a buffer, or the product is too large
    for 64-bit byte positions and counts.
    """
    if product.outputs * product.reduction * max(product.weight_total_bytes, 1) >= 1 << 63:
        raise InputError(
            f"a matrix of {product.outputs} × {product.reduction} numbers in {product.weight_total_bytes} bytes is "
            "too large to simulate; expected numbers × bytes below 2^63"
        )
    if PARTIAL_SUM_BYTES * product.tokens * max(product.reduction, product.outputs) >= COUNTER_LIMIT:
        raise _too_many_cycles(product.tokens, product.reduction, product.outputs, COUNTER_LIMIT)
    whole = _whole(product)
    row_tiles, column_tiles, _ = tile_counts(whole)
    most_passes = (
        MAXIMUM_PASSES if product.divisible and row_tiles * column_tiles >= MINIMUM_TILES_OF_SPLIT_REDUCTION else 1
    )
    values = product.tokens * (int(activation_bytes(whole, product.reduction)) + product.outputs * OUTPUT_BYTES)
    least_bytes = product.weight_total_bytes + values
    best, best_bytes = whole, math.inf
    for pass_count in range(1, most_passes + 1) if passes is None else (passes,):
        for stationary in (True, False) if weights_stationary is None else (weights_stationary,):
            if best_bytes > least_bytes:  # of equals the first stays: the fewest passes, then stationary weights
                program = _candidate(product, whole, pass_count, stationary)
                program_bytes = planned_traffic(program).total_bytes
                if program_bytes < best_bytes:
                    best, best_bytes = program, program_bytes
    check_count_range(best)
    return best
