"""An operand memory of two halves: words of steps, of groups and of panels, written in order and read in order.

``docs/microarchitecture.md``, section 5. A read takes the issue cycle; the word then passes the output register.
"""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from termwise.algorithms.errors import InputError
from termwise.rtl.processing_element import delayed
from termwise.rtl.program import Use


@dataclass(frozen=True, kw_only=True)
class MemoryDesign:
    """Widths and depths of an operand memory; a width of 0 leaves a kind of words out.

    Attributes:
        rows: of the array, or its columns; each has a bank.
        step_bits, group_bits, panel_bits: of a word of a row.
        steps, groups, panels: words of both halves, powers of two.
        outliers: words of 32 bits beside each panel word, a power of two, or none.

    Raises ``InputError`` for other depths.
    """

    rows: int
    step_bits: int
    group_bits: int
    panel_bits: int
    steps: int = 1024
    groups: int = 128
    panels: int = 8
    outliers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "groups", "panels"):
            depth = getattr(self, name)
            if not isinstance(depth, int) or depth < 2 or depth & (depth - 1):
                raise InputError(f"an operand memory with {name} = {depth!r}; expected a power of two")

    @property
    def memories(self) -> dict[str, tuple[int, int]]:
        """(width, depth) of each memory: of each kind of words, and of the outliers."""
        return self.kinds | ({"outlier": (32, self.panels * self.outliers)} if self.outliers else {})

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """(width, depth) of each kind of words that are written and read one after the other."""
        every = {
            "step": (self.step_bits, self.steps),
            "group": (self.group_bits, self.groups),
            "panel": (self.panel_bits, self.panels),
        }
        return {name: shape for name, shape in every.items() if shape[0]}


class Pointers:
    """Addresses of the next word of each kind, and where a set of panels began."""

    def __init__(self, m: Module, design: MemoryDesign, name: str) -> None:
        self.m, self.design = m, design
        depths = {kind: depth for kind, (_, depth) in design.kinds.items()}
        self.next = {kind: Signal(range(2 * depth), name=f"{name}_{kind}") for kind, depth in depths.items()}
        self.base = {kind: Signal(range(2 * depth), name=f"{name}_{kind}_base") for kind, depth in depths.items()}
        self.at = {kind: Signal(range(2 * depth), name=f"{name}_{kind}_at") for kind, depth in depths.items()}
        for kind in depths:
            m.d.comb += self.at[kind].eq(self.next[kind])

    def half_base(self, kind: str, half: Value) -> Value:
        """Where a half begins."""
        _, depth = self.design.kinds[kind]
        return Mux(half, depth // 2, 0)

    def begin_write(self, advances: Value, half: Value) -> None:
        """Where a chunk is written: behind the one before, or at the beginning of another half."""
        for kind, at in self.at.items():
            with self.m.If(advances):
                self.m.d.comb += at.eq(self.half_base(kind, half))

    def begin_read(self, use: Use, half: Value) -> None:
        """Where a chunk is read: behind the one before, or where its set of panels began."""
        m = self.m
        for kind, at in self.at.items():
            with m.If(use.by_chunks):
                m.d.comb += at.eq(self.half_base(kind, half))
            with m.Elif(use.set_begins):
                with m.If(use.set_is_new):
                    with m.If(use.by_panels):
                        m.d.comb += at.eq(self.half_base(kind, half))
                    with m.Elif(use.first_set):
                        m.d.comb += at.eq(0)
                    m.d.sync += self.base[kind].eq(at)
                with m.Else():
                    m.d.comb += at.eq(self.base[kind])

    def move(self, **steps: Value) -> None:
        """Each kind's address moves on by one where it is told so; it is kept where it is else."""
        for kind, step in steps.items():
            if kind in self.next:
                self.m.d.sync += self.next[kind].eq(self.at[kind] + step)


class OperandMemory(wiring.Component):
    """Memories of the kinds of words, a bank for each row: a write is one row's, a read is all rows'.

    Latency 2 cycles from ``read`` to the word, which stays until the next one; a write is seen by reads from the next
    cycle on.

    Ports: ``row`` of a write; for each kind of words: ``<kind>_write``, ``<kind>_write_at``, ``<kind>_data``;
    ``<kind>_read``, ``<kind>_read_at``, ``<kind>``, a row's word after the other.
    """

    latency = 2

    def __init__(self, design: MemoryDesign) -> None:
        self.design = design
        members: dict[str, wiring.Member] = {"row": In(range(design.rows))}
        for kind, (width, depth) in design.memories.items():
            members |= {
                f"{kind}_write": In(1),
                f"{kind}_write_at": In(range(depth)),
                f"{kind}_data": In(width),
                f"{kind}_read": In(1),
                f"{kind}_read_at": In(range(depth)),
                kind: Out(width * design.rows),
            }
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for kind, (width, depth) in self.design.memories.items():
            arrives = delayed(m, getattr(self, f"{kind}_read"), 1, f"{kind}_arrives")
            words = []
            for row in range(self.design.rows):
                m.submodules[f"{kind}s_{row}"] = memory = Memory(shape=width, depth=depth, init=[])
                write, read = memory.write_port(), memory.read_port()
                m.d.comb += [
                    write.addr.eq(getattr(self, f"{kind}_write_at")),
                    write.data.eq(getattr(self, f"{kind}_data")),
                    write.en.eq(getattr(self, f"{kind}_write") & (self.row == row)),
                    read.addr.eq(getattr(self, f"{kind}_read_at")),
                    read.en.eq(getattr(self, f"{kind}_read")),
                ]
                words.append(read.data)
            with m.If(arrives):
                m.d.sync += getattr(self, kind).eq(Cat(*words))
        return m
