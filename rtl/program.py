"""What a layer asks of the machine: loops over tiles and chunks, and what stays in the operand memories.

The words are those of ``docs/simulator.md``. Loader and sequencer each walk the same loops by a ``Walker`` of their
own; one fills the memories, the other reads them.
"""

from __future__ import annotations

import enum

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

COUNT_BITS = 16
"""Of every count of a program."""

PACKED_BITS = 8
PACKED = ("code_bits", "word_bits", "group_bits", "row_bits")
"""How an operand is packed: bits of a code, of a word's codes, and of the last word of a group and of a row."""


class Allocation(enum.IntEnum):
    """What occupies a half of an operand memory until its last use."""

    RESIDENT = 0
    """The operand, which fits in both halves and is loaded once."""
    PANELS = 1
    """The panels of a block of the stationary operand, or one panel of the moving one."""
    CHUNKS = 2
    """One chunk, which is loaded for every tile."""


PROGRAM = data.StructLayout(
    {
        "row_tiles": COUNT_BITS,
        "column_tiles": COUNT_BITS,
        "row_steps": COUNT_BITS,
        "group_steps": COUNT_BITS,
        "chunk_steps": COUNT_BITS,
        "panels_per_block": COUNT_BITS,
        "last_rows": COUNT_BITS,
        "last_columns": COUNT_BITS,
        "terms": 4,
        "weights_stationary": 1,
        "weight_allocation": 2,
        "activation_allocation": 2,
        **{f"{operand}_{bits}": PACKED_BITS for operand in ("weight", "activation") for bits in PACKED},
    }
)
"""A layer as loops.

row_tiles, column_tiles: tiles along the outputs and the tokens.
row_steps, group_steps, chunk_steps: of a row, a group and a chunk; the last ones may be shorter.
panels_per_block: panels of the stationary operand that stay together.
last_rows, last_columns: outputs and tokens of the last tiles.
terms: of a step.
weights_stationary: which operand stays.
weight_allocation, activation_allocation: ``Allocation``.
weight_code_bits …: ``PACKED``.
"""

CHUNK = data.StructLayout(
    {
        "steps": COUNT_BITS,
        "row_tile": COUNT_BITS,
        "column_tile": COUNT_BITS,
        "first": 1,
        "last": 1,
        "first_stationary": 1,
        "last_stationary": 1,
        "first_moving": 1,
        "last_moving": 1,
        "first_block": 1,
        "last_block": 1,
    }
)
"""A chunk: its steps, its tile, and whether it is the first or last one of each loop around it."""


class Walker(wiring.Component):
    """The loops of a layer: blocks, moving panels, stationary panels of the block, chunks.

    A chunk stays until ``next``; the following one shows in the cycle after. No flow control beside.

    Ports: ``program``; ``start``: the first chunk shows in the next cycle; ``next``; ``chunk``.
    """

    def __init__(self) -> None:
        super().__init__({"program": In(PROGRAM), "start": In(1), "next": In(1), "chunk": Out(CHUNK)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        program, chunk = self.program, self.chunk
        block, moving, stationary, step = (
            Signal(COUNT_BITS, name=name) for name in ("block", "moving", "stationary", "step")
        )
        stationary_panels, moving_panels = Signal(COUNT_BITS), Signal(COUNT_BITS)
        left, panels = Signal(COUNT_BITS), Signal(COUNT_BITS)
        m.d.comb += [
            stationary_panels.eq(Mux(program.weights_stationary, program.row_tiles, program.column_tiles)),
            moving_panels.eq(Mux(program.weights_stationary, program.column_tiles, program.row_tiles)),
            left.eq(program.row_steps - step),
            chunk.last.eq(left <= program.chunk_steps),
            chunk.steps.eq(Mux(chunk.last, left, program.chunk_steps)),
            chunk.first.eq(step == 0),
            panels.eq(stationary_panels - block),  # from this block on
            chunk.first_stationary.eq(stationary == 0),
            chunk.last_stationary.eq((stationary + 1 == program.panels_per_block) | (stationary + 1 == panels)),
            chunk.first_moving.eq(moving == 0),
            chunk.last_moving.eq(moving + 1 == moving_panels),
            chunk.first_block.eq(block == 0),
            chunk.last_block.eq(panels <= program.panels_per_block),
            chunk.row_tile.eq(Mux(program.weights_stationary, block + stationary, moving)),
            chunk.column_tile.eq(Mux(program.weights_stationary, moving, block + stationary)),
        ]
        with m.If(self.start):
            m.d.sync += [block.eq(0), moving.eq(0), stationary.eq(0), step.eq(0)]
        with m.Elif(self.next):
            m.d.sync += step.eq(step + program.chunk_steps)
            with m.If(chunk.last):
                m.d.sync += [step.eq(0), stationary.eq(stationary + 1)]
                with m.If(chunk.last_stationary):
                    m.d.sync += [stationary.eq(0), moving.eq(moving + 1)]
                    with m.If(chunk.last_moving):
                        m.d.sync += [moving.eq(0), block.eq(block + program.panels_per_block)]
        return m


def is_last(chunk: data.View) -> Value:
    """The last chunk of all."""
    return chunk.last & chunk.last_stationary & chunk.last_moving & chunk.last_block


class Use:
    """What a chunk means for one operand: is it loaded, does it begin or end an allocation.

    Attributes:
        new: the chunk is loaded; else it is still there.
        advances: it begins an allocation, in the other half.
        releases: its last step is the last one that reads the allocation.
    """

    def __init__(self, chunk: data.View, allocation: Value, stationary: Value) -> None:
        self.allocation, self.stationary, self.chunk = allocation, stationary, chunk
        self.by_chunks = allocation == Allocation.CHUNKS
        self.by_panels = allocation == Allocation.PANELS
        resident = allocation == Allocation.RESIDENT
        begins = Mux(stationary, chunk.first_moving & chunk.first_stationary, chunk.first_stationary) & chunk.first
        ends = Mux(stationary, chunk.last_moving & chunk.last_stationary, chunk.last_stationary) & chunk.last
        whole = chunk.first_block & chunk.first_moving & chunk.first_stationary & chunk.first
        seen = Mux(stationary, chunk.first_moving, chunk.first_stationary & (~resident | chunk.first_block))
        self.new = self.by_chunks | seen
        self.advances = self.by_chunks | (self.by_panels & begins) | (resident & whole)
        self.releases = self.by_chunks | (self.by_panels & ends) | (resident & is_last(chunk))
        # Panels are read in the order in which they were loaded; a set of them is gone back to.
        self.set_begins = chunk.first & (chunk.first_stationary | ~stationary)
        self.set_is_new = Mux(stationary, chunk.first_moving, chunk.first_stationary)
        self.first_set = resident & ~stationary & chunk.first_moving
