"""The sequencer: issues every term of a layer in its cycle, and counts what each cycle is charged to.

``docs/microarchitecture.md``, sections 4 and 8.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from termwise.rtl.array import ARRAY_CONTROL
from termwise.rtl.borders import CENTROIDS, ROW_END
from termwise.rtl.operand_memory import MemoryDesign, Pointers
from termwise.rtl.processing_element import delayed
from termwise.rtl.program import COUNT_BITS, PROGRAM, Allocation, Use, Walker, is_last
from termwise.rtl.term_generator import TERM_BITS

CAUSES = ("busy", "scale", "weights", "activations", "drain", "write_back")
"""What a cycle is charged to, in the order of the counters."""

COUNTER_BITS = 32
ENTRY_CYCLES = 2
"""From the issue of a term until its operands enter the array: the memory and its output register."""


def read_members(design: MemoryDesign) -> dict[str, wiring.Member]:
    """Ports that read from an operand memory."""
    found: dict[str, wiring.Member] = {}
    for kind, (_, depth) in design.memories.items():
        found |= {f"{kind}_read": Out(1), f"{kind}_read_at": Out(range(depth))}
    return found


class Sequencer(wiring.Component):
    """Issues a term per cycle as soon as its chunk is there; between tiles the array drains.

    Ports:
        program; start: a layer begins.
        weights, activations: reads of the operand memories, for the term that is issued.
        control: ``ARRAY_CONTROL`` of the term whose operands the memories show.
        weights_arrived, activations_arrived: from the loader. weights_released, activations_released: to it.
        exchange: outputs of a tile move to the write-back register; ``rows`` × ``columns`` of them count.
        write_back_busy: it still holds outputs.
        running: there is a layer. ends: in its last cycle.
        cause: which of ``CAUSES`` the cycle is charged to, one bit each.
        ends_row, row_end: beside GOBO's PEs: ``ROW_END`` of a term that follows a row, with ``control``.
        most_outliers: likewise, of a row of the tile.
    """

    def __init__(
        self,
        weights: MemoryDesign,
        activations: MemoryDesign,
        *,
        weight_steps: int,
        activation_steps: int,
        group_distance: int,
        drain_cycles: int,
        rows: int,
        columns: int,
    ) -> None:
        self.designs = {"weights": weights, "activations": activations}
        self.steps_per_word = {"weights": weight_steps, "activations": activation_steps}
        self.group_distance, self.drain_cycles = group_distance, drain_cycles
        self.full_rows, self.full_columns = rows, columns
        members: dict[str, wiring.Member] = {
            "program": In(PROGRAM),
            "start": In(1),
            "control": Out(ARRAY_CONTROL),
            "exchange": Out(1),
            "rows": Out(COUNT_BITS),
            "columns": Out(COUNT_BITS),
            "write_back_busy": In(1),
            "running": Out(1),
            "ends": Out(1),
            "cause": Out(len(CAUSES)),
        }
        if weights.outliers:
            members |= {"ends_row": Out(1), "row_end": Out(ROW_END), "most_outliers": In(16)}
        for operand, design in self.designs.items():
            members |= {
                operand: Out(wiring.Signature(read_members(design))),
                f"{operand}_arrived": In(1),
                f"{operand}_released": Out(1),
            }
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        program = self.program
        m.submodules.walker = walker = Walker()
        chunk = walker.chunk
        m.d.comb += [walker.program.eq(program), walker.start.eq(self.start)]
        # Places within the chunk, the row and the group.
        chunk_begins = Signal(init=1)
        step, term, group_step = Signal(COUNT_BITS), Signal(TERM_BITS), Signal(COUNT_BITS)
        row_step = Signal(COUNT_BITS)
        first_group = Signal()
        row_begins = Signal()
        at_step, at_group = Signal(COUNT_BITS), Signal(COUNT_BITS)
        m.d.comb += [
            row_begins.eq(chunk_begins & chunk.first),
            at_step.eq(Mux(chunk_begins, 0, step)),
            at_group.eq(Mux(row_begins, 0, group_step)),
        ]
        last_term, last_of_group, last_of_chunk, last_of_row = Signal(), Signal(), Signal(), Signal()
        ends_group, in_first_group, odd = Signal(), Signal(), Signal()
        m.d.comb += [
            last_term.eq(term + 1 == program.terms),
            last_of_chunk.eq(at_step + 1 == chunk.steps),
            last_of_row.eq(last_of_chunk & chunk.last),
            last_of_group.eq((at_group + 1 == program.group_steps) | last_of_row),
            ends_group.eq(last_term & last_of_group),
            in_first_group.eq(row_begins | first_group),
            odd.eq(Mux(row_begins, 0, row_step[0])),
        ]

        # Terms that follow a row: centroids, outliers, and one more until the last sum is there.
        has_row_ends = self.designs["weights"].outliers > 0
        row_end, ends_row, row_end_is_last, release_waits = Signal(ROW_END), Signal(), Signal(), Signal()

        # What has arrived; what is released.
        issues = Signal()
        ready = {}
        for operand, design in self.designs.items():
            stationary = program.weights_stationary if operand == "weights" else ~program.weights_stationary
            allocation = getattr(program, f"{operand[:-1]}_allocation")
            use = Use(chunk, allocation, stationary)
            there = Signal(8, name=f"{operand}_there")
            ready[operand] = Signal(name=f"{operand}_ready")
            enters = Signal(name=f"{operand}_enters")
            half, moved = Signal(name=f"{operand}_half", init=1), Signal(name=f"{operand}_half_of_chunk")
            advances = Signal(name=f"{operand}_advances")
            m.d.comb += [
                ready[operand].eq(~chunk_begins | ~use.new | there.any()),
                enters.eq(issues & chunk_begins & (term == 0)),
                advances.eq(enters & use.advances & (allocation != Allocation.RESIDENT)),
                moved.eq(half ^ advances),
            ]
            releases = issues & last_term & last_of_chunk & use.releases
            if design.outliers:  # they are read after the row
                with m.If(issues & last_term & last_of_row):
                    m.d.sync += release_waits.eq(use.releases)
                releases = (releases & ~last_of_row) | (row_end_is_last & release_waits)
            m.d.comb += getattr(self, f"{operand}_released").eq(releases)
            m.d.sync += [
                there.eq(there + getattr(self, f"{operand}_arrived") - (enters & use.new)),
                half.eq(moved),
            ]
            # Addresses.
            pointers = Pointers(m, design, f"{operand}_read")
            with m.If(enters):
                pointers.begin_read(use, moved)
            each = self.steps_per_word[operand]
            word_ends = issues & last_term & (odd | last_of_row if each == 2 else Const(1))
            # A group's word is read with its first step, a panel's with the first of its row.
            row_starts = issues & (term == 0) & row_begins
            group_starts = issues & (term == 0) & (at_group == 0)
            moves = {"step": word_ends, "group": group_starts, "panel": row_starts}
            pointers.move(**{kind: moves[kind] for kind in design.kinds})
            port = getattr(self, operand)
            if design.outliers:
                panel_read_at = pointers.at["panel"]
            reads = {"step": issues & (term == 0), "group": group_starts, "panel": row_starts}
            for kind in design.kinds:
                m.d.comb += [
                    getattr(port, f"{kind}_read").eq(reads[kind]),
                    getattr(port, f"{kind}_read_at").eq(pointers.at[kind]),
                ]

        row_end_place, outliers_done = Signal(COUNT_BITS), Signal(COUNT_BITS)
        if has_row_ends:
            design = self.designs["weights"]
            by_chunks = program.weight_allocation == Allocation.CHUNKS
            turn, panel = Signal(), Signal(range(design.panels))
            with m.If(issues & (term == 0) & row_begins):
                m.d.sync += [turn.eq(~turn), panel.eq(panel_read_at)]
            centroids = Signal(range(2 * CENTROIDS))
            m.d.comb += [
                centroids.eq(1 << program.weight_code_bits[:3]),
                row_end.number.eq(row_end_place),
                row_end.centroid.eq(row_end_place < centroids),
                outliers_done.eq(row_end_place - centroids),
                row_end.outlier.eq(~row_end.centroid & (outliers_done < self.most_outliers)),
                row_end_is_last.eq(ends_row & ~row_end.centroid & (outliers_done >= self.most_outliers)),
                self.weights.outlier_read.eq(ends_row & row_end.outlier),
                self.weights.outlier_read_at.eq(Mux(by_chunks, turn, panel) * design.outliers + outliers_done),
                self.ends_row.eq(delayed(m, ends_row, ENTRY_CYCLES, "ends_row")),
                self.row_end.eq(delayed(m, row_end.as_value(), ENTRY_CYCLES, "row_end")),
            ]

        # The ends of two groups are kept apart.
        since = Signal(range(self.group_distance + 2), init=self.group_distance)
        holds = Signal()
        m.d.comb += holds.eq(ends_group & (since < self.group_distance) if self.group_distance else 0)
        with m.If(issues & ends_group):
            m.d.sync += since.eq(1)
        with m.Elif(since < self.group_distance):
            m.d.sync += since.eq(since + 1)

        # Issue.
        with m.If(issues):
            m.d.sync += [chunk_begins.eq(0), first_group.eq(in_first_group), term.eq(term + 1)]
            m.d.sync += [step.eq(at_step), group_step.eq(at_group)]
            with m.If(row_begins):
                m.d.sync += row_step.eq(0)
            with m.If(last_term):
                m.d.sync += [
                    term.eq(0),
                    step.eq(at_step + 1),
                    row_step.eq(Mux(row_begins, 1, row_step + 1)),
                    group_step.eq(Mux(last_of_group, 0, at_group + 1)),
                    first_group.eq(in_first_group & ~last_of_group),
                    chunk_begins.eq(last_of_chunk),
                ]
        # Whether the group is the last one of its row: its first step is at most a group away from the end.
        steps_to_go = Signal(COUNT_BITS)  # of the row, from the group's beginning on
        m.d.comb += steps_to_go.eq(program.row_steps - Mux(row_begins, 0, row_step) + at_group)
        control = Signal(ARRAY_CONTROL)
        m.d.comb += [
            control.term.valid.eq(issues | ends_row),
            control.term.first.eq(issues & (term == 0) & (at_group == 0)),
            control.term.last.eq(row_end_is_last if has_row_ends else ends_group),
            control.first_group.eq(in_first_group | ends_row),
            control.last_group.eq((steps_to_go <= program.group_steps) | ends_row),
            control.number.eq(term),
            control.odd.eq(odd),
            self.control.eq(delayed(m, control.as_value(), ENTRY_CYCLES, "control")),
        ]

        # States. A tile that is done moves to the write-back register in no time, if that is free.
        finished, leaving, left = Signal(), Signal(), Signal(range(self.drain_cycles + 1))
        charged = {cause: Signal(name=f"cause_{cause}") for cause in CAUSES}
        m.d.comb += self.cause.eq(Cat(*charged.values()))
        last_rows, last_columns = Signal(COUNT_BITS), Signal(COUNT_BITS)
        ends_rows = chunk.row_tile + 1 == program.row_tiles
        ends_columns = chunk.column_tile + 1 == program.column_tiles
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.running.eq(self.start)
                with m.If(self.start):
                    m.next = "ISSUE"
            with m.State("ISSUE"):
                m.d.comb += self.running.eq(1)
                with m.If(leaving & self.write_back_busy):
                    m.d.comb += charged["write_back"].eq(1)
                with m.Else():
                    m.d.comb += self.exchange.eq(leaving)
                    m.d.sync += leaving.eq(0)
                    with m.If(finished):
                        m.d.comb += charged["write_back"].eq(1)
                        m.next = "DONE"
                    with m.Elif(~ready["weights"]):
                        m.d.comb += charged["weights"].eq(1)
                    with m.Elif(~ready["activations"]):
                        m.d.comb += charged["activations"].eq(1)
                    with m.Elif(holds):
                        m.d.comb += charged["scale"].eq(1)
                    with m.Else():
                        m.d.comb += [issues.eq(1), charged["busy"].eq(1)]
                        with m.If(last_term & last_of_chunk):
                            m.d.comb += walker.next.eq(1)
                            m.d.sync += finished.eq(is_last(chunk))
                        with m.If(last_term & last_of_row):
                            m.d.sync += [
                                left.eq(self.drain_cycles),
                                last_rows.eq(Mux(ends_rows, program.last_rows, self.full_rows)),
                                last_columns.eq(Mux(ends_columns, program.last_columns, self.full_columns)),
                            ]
                            m.next = "ROW_END" if has_row_ends else "DRAIN"
            if has_row_ends:
                with m.State("ROW_END"):
                    m.d.comb += [self.running.eq(1), charged["drain"].eq(1), ends_row.eq(1)]
                    m.d.sync += row_end_place.eq(row_end_place + 1)
                    with m.If(row_end_is_last):
                        m.d.sync += row_end_place.eq(0)
                        m.next = "DRAIN"
            with m.State("DRAIN"):
                m.d.comb += [self.running.eq(1), charged["drain"].eq(1)]
                m.d.sync += left.eq(left - 1)
                with m.If(left == 1):
                    m.d.sync += leaving.eq(1)
                    m.next = "ISSUE"
            with m.State("DONE"):
                m.d.comb += [self.running.eq(1), self.ends.eq(~self.write_back_busy)]
                m.d.comb += charged["write_back"].eq(self.write_back_busy)
                with m.If(~self.write_back_busy):
                    m.next = "IDLE"
        m.d.comb += [self.rows.eq(last_rows), self.columns.eq(last_columns)]
        return m
