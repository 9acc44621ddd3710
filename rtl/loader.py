"""The loader: the words of a layer's chunks, from a stream, into the operand memories.

The stream brings the chunks in the order of the program, for each first its weights, then its activations, as far as
they are not there yet. Weights of a chunk: with the first chunk of a row the channel scales (FP32 of each row); before
each group that begins its word (``GROUP_WORD`` of each row); the words of the steps. Activations of a chunk: with the
first chunk of a row the scales of the columns, where activations are codes; the words of the steps. Every word begins
in a beat of its own, its first bit the lowest.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from termwise.rtl.bit_serial import HALF_EXPONENT_BITS
from termwise.rtl.operand_memory import MemoryDesign, Pointers
from termwise.rtl.program import COUNT_BITS, PROGRAM, Allocation, Use, Walker, is_last


class LoadError(enum.IntEnum):
    """Why a load ended."""

    NONE = 0
    MEMORY = 1
    """A word beyond the half of the memory that it belongs to."""
    NOT_FINITE = 2
    """An activation that is infinite or no number."""


Write = Callable[[str, Value], None]


@dataclass(frozen=True, kw_only=True)
class OperandDesign:
    """How an operand is loaded.

    Attributes:
        memory: where it goes.
        steps_per_word: 2 where codes come in pairs.
        halves: FP16 numbers of a step, which are checked; 0 where there are codes.
        columns: of FP16 numbers.
        finds_exponents: the group words are the largest exponents of each group and column, found on the way;
            else they come from the stream.
    """

    memory: MemoryDesign
    steps_per_word: int = 1
    halves: int = 0
    columns: int = 1
    finds_exponents: bool = False


def write_members(design: MemoryDesign) -> dict[str, wiring.Member]:
    """Ports that write into an operand memory."""
    found: dict[str, wiring.Member] = {}
    for kind, (width, depth) in design.kinds.items():
        found |= {f"{kind}_write": Out(1), f"{kind}_write_at": Out(range(depth)), f"{kind}_data": Out(width)}
    return found


class OperandLoader(wiring.Component):
    """The words of one operand's part of a chunk, from beats into its memory.

    Takes a beat per cycle from the cycle after ``begin`` on. ``ready`` does not wait for ``valid``.

    Ports:
        begin: a chunk begins, with ``chunk_first``, ``steps``, ``advances`` and ``half``, which stay until it ends.
        group_steps, resident: of the program.
        stream: beats.
        memory: to the operand memory.
        ends: in the cycle of the last beat.
        error: ``LoadError`` in the cycle of a beat.
    """

    def __init__(self, design: OperandDesign, beat_bits: int) -> None:
        self.design, self.beat_bits = design, beat_bits
        super().__init__(
            {
                "begin": In(1),
                "chunk_first": In(1),
                "steps": In(COUNT_BITS),
                "advances": In(1),
                "half": In(1),
                "group_steps": In(COUNT_BITS),
                "resident": In(1),
                "stream": In(stream.Signature(beat_bits)),
                "memory": Out(wiring.Signature(write_members(design.memory))),
                "ends": Out(1),
                "error": Out(2),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design = self.design
        kinds = design.memory.kinds
        from_stream = [kind for kind in kinds if kind != "group" or not design.finds_exponents]
        beats = {kind: -(-kinds[kind][0] // self.beat_bits) for kind in from_stream}
        # Beats gather in a register, the newest at the top.
        gathered = Signal(max(beats.values()) * self.beat_bits)
        beats_left = Signal(range(max(beats.values()) + 1))
        takes, whole = Signal(), Signal()
        together = Cat(gathered, self.stream.payload)
        m.d.comb += [takes.eq(self.stream.valid & self.stream.ready), whole.eq(takes & (beats_left == 1))]
        with m.If(takes):
            m.d.sync += [gathered.eq(together[self.beat_bits :]), beats_left.eq(beats_left - 1)]

        pointers = Pointers(m, design.memory, "write")
        moves = {kind: Signal(name=f"{kind}_moves") for kind in kinds}
        pointers.move(**moves)
        steps_left, group_left = Signal(COUNT_BITS + 1), Signal(COUNT_BITS + 1)
        group_ends = Signal()
        m.d.comb += group_ends.eq(group_left <= design.steps_per_word)

        def expect(kind: str) -> None:
            m.d.sync += beats_left.eq(beats[kind])
            m.next = kind.upper()

        def expect_after_panel(group_due: Value) -> None:
            """The word of a group that begins, or that of a step."""
            if "group" in from_stream:
                with m.If(group_due):
                    expect("group")
                with m.Else():
                    expect("step")
            else:
                expect("step")

        def write(kind: str, content: Value) -> None:
            """A word goes to the pointer of its kind, if it fits into its half."""
            _, depth = kinds[kind]
            at = pointers.at[kind]
            m.d.comb += [
                getattr(self.memory, f"{kind}_write").eq(1),
                getattr(self.memory, f"{kind}_write_at").eq(at),
                getattr(self.memory, f"{kind}_data").eq(content),
            ]
            in_half = (at >= depth // 2) == self.half
            with m.If((at >= depth) | (~self.resident & ~in_half)):
                m.d.comb += self.error.eq(LoadError.MEMORY)

        def word(kind: str) -> Value:
            """The word whose last beat is at the port."""
            before = (beats[kind] - 1) * self.beat_bits
            return Cat(gathered[len(gathered) - before :], self.stream.payload)[: kinds[kind][0]]

        with m.FSM():
            with m.State("IDLE"), m.If(self.begin):
                pointers.begin_write(self.advances & ~self.resident, self.half)
                m.d.sync += steps_left.eq(self.steps)
                with m.If(self.chunk_first):
                    m.d.sync += group_left.eq(0)
                if "panel" in kinds:
                    with m.If(self.chunk_first):
                        expect("panel")
                    with m.Else():
                        expect_after_panel(group_left == 0)
                else:
                    expect_after_panel(self.chunk_first | (group_left == 0))
            if "panel" in kinds:
                with m.State("PANEL"):
                    m.d.comb += self.stream.ready.eq(1)
                    with m.If(whole):
                        write("panel", word("panel"))
                        m.d.comb += moves["panel"].eq(1)
                        expect_after_panel(Const(1))
            if "group" in from_stream:
                with m.State("GROUP"):
                    m.d.comb += self.stream.ready.eq(1)
                    with m.If(whole):
                        write("group", word("group"))
                        m.d.comb += moves["group"].eq(1)
                        m.d.sync += group_left.eq(self.group_steps)
                        expect("step")
            with m.State("STEP"):
                m.d.comb += self.stream.ready.eq(1)
                with m.If(whole):
                    if design.finds_exponents:
                        self._find_exponents(m, word("step"), group_left, steps_left, write, moves)
                    else:
                        m.d.sync += group_left.eq(Mux(group_ends, 0, group_left - design.steps_per_word))
                    write("step", word("step"))
                    m.d.comb += moves["step"].eq(1)
                    if design.halves:
                        with m.If(self._not_finite(word("step"))):
                            m.d.comb += self.error.eq(LoadError.NOT_FINITE)
                    m.d.sync += steps_left.eq(steps_left - design.steps_per_word)
                    with m.If(steps_left <= design.steps_per_word):
                        m.d.comb += self.ends.eq(1)
                        m.next = "IDLE"
                    with m.Else():
                        expect_after_panel(group_ends)
        return m

    def _halves(self, content: Value) -> list[Value]:
        return [content.word_select(place, 16) for place in range(self.design.halves)]

    def _not_finite(self, content: Value) -> Value:
        return Cat(*(half[10:15].all() for half in self._halves(content))).any()

    def _find_exponents(
        self, m: Module, content: Value, group_left: Signal, steps_left: Value, write: Write, moves: dict[str, Signal]
    ) -> None:
        """The largest exponent of each column, from the first step of a group to its last."""
        design = self.design
        halves = self._halves(content)
        lanes = design.halves // design.columns
        begins = Signal()
        m.d.comb += begins.eq(group_left == 0)
        found = []
        for column in range(design.columns):
            largest: Value = Signal(HALF_EXPONENT_BITS, name=f"largest_{column}")
            running: Value = Mux(begins, 1, largest)
            for lane, half in enumerate(halves[column * lanes : (column + 1) * lanes]):
                greater = Signal(HALF_EXPONENT_BITS, name=f"running_{column}_{lane}")
                m.d.comb += greater.eq(Mux(half[10:15] > running, half[10:15], running))
                running = greater
            m.d.sync += largest.eq(running)
            found.append(running)
        ends = (group_left == 1) | (begins & (self.group_steps == 1))
        m.d.sync += group_left.eq(Mux(begins, self.group_steps - 1, group_left - 1))
        write("group", Cat(*found))
        m.d.comb += moves["group"].eq(ends | (steps_left == 1))


@dataclass(frozen=True, kw_only=True)
class LoaderDesign:
    """A loader of both operands from a stream of ``beat_bits`` bits."""

    weights: OperandDesign
    activations: OperandDesign
    beat_bits: int = 32


class Loader(wiring.Component):
    """Fills halves of the operand memories as they become free, in the order of the program.

    Takes a beat per cycle; two cycles pass between two loads. After an error it takes and drops what comes until it
    is reset, as before every layer.

    Ports:
        program; start: a layer begins.
        stream: beats.
        weights, activations: to the memories.
        weights_arrived, activations_arrived: a load has ended; the next cycle may read it.
        weights_released, activations_released: an allocation has been read for the last time.
        error: ``LoadError``, until the reset.
    """

    def __init__(self, design: LoaderDesign) -> None:
        self.design = design
        self.operands = {"weights": design.weights, "activations": design.activations}
        members: dict[str, wiring.Member] = {
            "program": In(PROGRAM),
            "start": In(1),
            "stream": In(stream.Signature(design.beat_bits)),
            "error": Out(2),
        }
        for operand, own in self.operands.items():
            members |= {
                operand: Out(wiring.Signature(write_members(own.memory))),
                f"{operand}_arrived": Out(1),
                f"{operand}_released": In(1),
            }
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        program = self.program
        m.submodules.walker = walker = Walker()
        chunk = walker.chunk
        m.d.comb += [walker.program.eq(program), walker.start.eq(self.start)]
        failure = Signal(2)
        m.d.comb += self.error.eq(failure)
        loaders, uses, occupied, begins = {}, {}, {}, {}
        for operand, design in self.operands.items():
            allocation = getattr(program, f"{operand[:-1]}_allocation")
            stationary = program.weights_stationary if operand == "weights" else ~program.weights_stationary
            uses[operand] = use = Use(chunk, allocation, stationary)
            m.submodules[operand] = loader = OperandLoader(design, self.design.beat_bits)
            loaders[operand] = loader
            begins[operand] = Signal(name=f"{operand}_begin")
            advances = Signal(name=f"{operand}_advances")
            # The first allocation goes to half 0; the half is that of the load from its beginning on.
            half, moved = Signal(name=f"{operand}_half", init=1), Signal(name=f"{operand}_half_of_load")
            occupied[operand] = Signal(2, name=f"{operand}_occupied")
            resident = allocation == Allocation.RESIDENT
            m.d.comb += [
                loader.begin.eq(begins[operand]),
                loader.chunk_first.eq(chunk.first),
                loader.steps.eq(chunk.steps),
                loader.advances.eq(use.advances),
                loader.group_steps.eq(program.group_steps),
                loader.resident.eq(resident),
                loader.half.eq(moved),
                loader.stream.payload.eq(self.stream.payload),
                advances.eq(begins[operand] & use.advances),
                moved.eq(half ^ (advances & ~resident)),
                getattr(self, f"{operand}_arrived").eq(loader.ends & ~loader.error.any()),
            ]
            m.d.sync += half.eq(moved)
            released = getattr(self, f"{operand}_released")
            m.d.sync += occupied[operand].eq(occupied[operand] + advances - released)
            port = getattr(self, operand)
            for name in port.signature.members:
                m.d.comb += getattr(port, name).eq(getattr(loader.memory, name))
        with m.FSM():
            with m.State("IDLE"), m.If(self.start):
                m.next = "CHECK_WEIGHTS"
            for operand, following in (("weights", "CHECK_ACTIVATIONS"), ("activations", "NEXT")):
                use, loader = uses[operand], loaders[operand]
                with m.State(f"CHECK_{operand.upper()}"):
                    with m.If(~use.new):
                        m.next = following
                    with m.Elif(~use.advances | (occupied[operand] < 2)):
                        m.d.comb += begins[operand].eq(1)
                        m.next = f"LOAD_{operand.upper()}"
                with m.State(f"LOAD_{operand.upper()}"):
                    m.d.comb += [loader.stream.valid.eq(self.stream.valid), self.stream.ready.eq(loader.stream.ready)]
                    with m.If(loader.ends):
                        m.next = following
                    with m.If(loader.error.any()):
                        m.d.sync += failure.eq(loader.error)
                        m.next = "DROP"
            with m.State("NEXT"):
                m.d.comb += walker.next.eq(1)
                with m.If(is_last(chunk)):
                    m.next = "IDLE"
                with m.Else():
                    m.next = "CHECK_WEIGHTS"
            with m.State("DROP"):
                m.d.comb += self.stream.ready.eq(1)
        return m
