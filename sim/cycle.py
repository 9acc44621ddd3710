"""The cycle-level simulation of one product: what ``termwise.sim.kernels.run_product`` counts, with names.

``run_tile_program`` gives exactly the cycles, causes and bytes of ``termwise.sim.cycle_reference``, which advances one
cycle at a time and is the definition in code of ``docs/microarchitecture.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.sim.dram import Dram, DramCounts, counts, new_state
from termwise.sim.kernels import (
    ACTIVATION_BYTES_MOVED,
    ACTIVATION_STALL,
    BUSY,
    CYCLES,
    DEADLOCK,
    DOT_PRODUCT_STEPS,
    DRAIN_STALL,
    ISSUE_FIELDS,
    OUTPUT_BYTES_MOVED,
    RESULT_FIELDS,
    SCALE_STALL,
    WEIGHT_BYTES,
    WEIGHT_READS,
    WEIGHT_STALL,
    WRITE_BACK_STALL,
    DramTiming,
    TileProgram,
    fill_issue_table,
    run_product,
    steps_of,
)


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
class StallCycles:
    """Cycles in which the array issues nothing, by cause (``docs/microarchitecture.md``, section 8)."""

    scale: int = 0
    weights: int = 0
    activations: int = 0
    drain: int = 0
    write_back: int = 0

    @property
    def total(self) -> int:
        """All causes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def plus(self, other: StallCycles, times: int = 1) -> StallCycles:
        """The sum with ``times`` the other ones."""
        return StallCycles(
            **{field.name: getattr(self, field.name) + times * getattr(other, field.name) for field in fields(self)}
        )


@dataclass(frozen=True, kw_only=True)
class CycleCount:
    """What one product costs in time. ``busy_cycles`` and the stalls add up to ``cycles``.

    Attributes:
        cycles: from the first choice of the channel to the last byte of the last write-back.
        busy_cycles: in which the array issues a term.
        stalls: all others.
        dot_product_steps: steps of ``lanes`` weights that the array took, each on all of its PEs.
        weight_reads: of these, steps whose weights were read from their buffer; fewer where weights stay in the PEs.
        traffic: bytes that were asked for.
        memory: what a memory with pages did, in whole bursts; None for ideal memory.
    """

    cycles: int
    busy_cycles: int
    stalls: StallCycles
    dot_product_steps: int
    weight_reads: int
    traffic: Traffic
    memory: DramCounts | None = None

    @property
    def moved_bytes(self) -> int:
        """Bytes that external memory moved: those asked for, or whole bursts."""
        return self.traffic.total_bytes if self.memory is None else self.memory.read_bytes + self.memory.written_bytes


@dataclass(frozen=True, kw_only=True)
class ValueTiming:
    """What depends on the values of the weights.

    Attributes:
        step_cycles: int64 [tiles of rows, steps], cycles in which a tile's step is issued, each at least 1.
        drain_cycles: int64 [tiles of rows], cycles from a tile's last issue until its outputs may leave.
    """

    step_cycles: NDArray[np.int64]
    drain_cycles: NDArray[np.int64]


def issue_table(program: TileProgram, step_cycles: NDArray[np.int64]) -> NDArray[np.int64]:
    """The table of ``termwise.sim.kernels.fill_issue_table``."""
    passes = -(-int(steps_of(program)) // program.segment_steps)
    chunks = passes * -(-program.segment_steps // program.chunk_steps)
    table = np.zeros((step_cycles.shape[0], 2, chunks, ISSUE_FIELDS), np.int64)
    fill_issue_table(program, step_cycles, table)
    return table


def check_values(program: TileProgram, values: ValueTiming) -> None:
    """Raise ``InputError`` where ``values`` are not those of the program's matrix."""
    row_tiles = -(-program.outputs // program.rows)
    expected = (row_tiles, int(steps_of(program)))
    if values.step_cycles.shape != expected or values.drain_cycles.shape != (row_tiles,):
        raise InputError(
            f"the timing of a matrix has steps {list(values.step_cycles.shape)} and drains "
            f"{list(values.drain_cycles.shape)}; expected {list(expected)} and [{row_tiles}]"
        )
    if values.step_cycles.min() < 1 or values.drain_cycles.min() < 0:
        raise InputError("the timing of a matrix has a step of no cycle or a negative drain; expected at least 1 and 0")


def run_tile_program(
    program: TileProgram,
    *,
    memory: DramTiming | None = None,
    values: ValueTiming | None = None,
    fast_forward: bool = True,
) -> CycleCount:
    """Simulate one product; the result does not depend on ``fast_forward``.

    ``memory`` is read where the program's ``burst_bytes`` is 0; ``values`` take the place of the program's constant
    cycles of a step and of the drain.

    Raises ``InputError`` for values of another matrix, ``TermwiseError`` if the machine could not finish the product (a
    defect of the plan).
    """
    if values is None:
        step_cycles = np.full((1, 1), program.cycles_per_step, np.int64)
        drain_cycles = np.full(1, program.drain_cycles, np.int64)
    else:
        check_values(program, values)
        step_cycles, drain_cycles = values.step_cycles.astype(np.int64), values.drain_cycles
    if (memory is None) != (program.burst_bytes > 0):
        raise ValueError("a program has either bytes per cycle or a memory with pages")
    timing = _NO_MEMORY if memory is None else memory
    state = new_state(timing)
    result = np.zeros(RESULT_FIELDS, np.int64)
    run_product(program, issue_table(program, step_cycles), drain_cycles, timing, state, result, fast_forward)
    if result[DEADLOCK]:
        raise TermwiseError(f"the simulated machine stopped in cycle {result[CYCLES]} of {program}")
    return CycleCount(
        cycles=int(result[CYCLES]),
        busy_cycles=int(result[BUSY]),
        stalls=StallCycles(
            scale=int(result[SCALE_STALL]),
            weights=int(result[WEIGHT_STALL]),
            activations=int(result[ACTIVATION_STALL]),
            drain=int(result[DRAIN_STALL]),
            write_back=int(result[WRITE_BACK_STALL]),
        ),
        dot_product_steps=int(result[DOT_PRODUCT_STEPS]),
        weight_reads=int(result[WEIGHT_READS]),
        traffic=Traffic(
            weight_bytes=int(result[WEIGHT_BYTES]),
            activation_bytes=int(result[ACTIVATION_BYTES_MOVED]),
            output_bytes=int(result[OUTPUT_BYTES_MOVED]),
        ),
        memory=None if memory is None else counts(state),
    )


_NO_MEMORY = Dram(name="none", ideal_bytes_per_cycle=1).timing(1)
