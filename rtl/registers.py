"""The registers of the accelerator: one list, from which hardware, driver and documentation are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from termwise.rtl.borders import CENTROIDS, LAYER
from termwise.rtl.program import PROGRAM
from termwise.rtl.sequencer import CAUSES

Access = Literal["read", "write", "pulse"]
WORD_BITS = 32
WORD_BYTES = 4
IDENTITY = 0x7465726D  # "term"

ERRORS = {
    0: "none",
    1: "a load does not fit into its half of an operand memory",
    2: "an activation is infinite or no number",
    3: "a count of the program is 0, or a row is shorter than a group or a chunk",
    4: "the program begins while another runs",
    5: "the data type does not exist",
    6: "codes are packed in a width that the design does not take",
}
"""Codes of the register ``error``."""


@dataclass(frozen=True)
class Register:
    """A word of 32 bits.

    Attributes:
        name: of the register.
        offset: in bytes.
        access: ``read``: hardware writes it; ``write``: it keeps what was written, and reads back; ``pulse``: bits are
            high for a cycle when they are written, and read as 0.
        bits: how many count.
        meaning: for the documentation.
    """

    name: str
    offset: int
    access: Access
    bits: int
    meaning: str


def _registers() -> tuple[Register, ...]:
    found: list[Register] = []

    def add(name: str, access: Access, bits: int, meaning: str) -> None:
        found.append(Register(name, WORD_BYTES * len(found), access, bits, meaning))

    add("identity", "read", WORD_BITS, f"0x{IDENTITY:08x}")
    add("design", "read", WORD_BITS, "the first bits of the digest of the design; the driver refuses another one")
    add("control", "pulse", 2, "bit 0 starts a layer; bit 1 stops everything and clears errors and counters")
    add("status", "read", 3, "bit 0: a layer runs; bit 1: the last one is done; bit 2: there is an error")
    add("error", "read", 3, "; ".join(f"{code}: {text}" for code, text in ERRORS.items()))
    add("interrupt_enable", "write", 2, "bit 0: raise the interrupt when a layer is done; bit 1: at an error")
    add("interrupt", "read", 2, "what raises it, enabled or not; the start of a layer and a stop clear both")
    add("cycles", "read", WORD_BITS, "cycles of the layer, from its start to its last output")
    for cause in CAUSES:
        add(f"{cause}_cycles", "read", WORD_BITS, f"cycles charged to ``{cause}``")
    for name, field in PROGRAM:
        add(name, "write", field.width, "of the program")
    for word in range(-(-LAYER.size // WORD_BITS)):
        bits = min(WORD_BITS, LAYER.size - word * WORD_BITS)
        add(f"layer_{word}", "write", bits, f"bits {word * WORD_BITS} to {word * WORD_BITS + bits - 1} of the layer")
    for number in range(CENTROIDS):
        add(f"centroid_{number}", "write", WORD_BITS, "FP32; beside GOBO's PEs alone, else there is no such register")
    return tuple(found)


REGISTERS = _registers()
OFFSETS = {register.name: register.offset for register in REGISTERS}
ADDRESS_BITS = (WORD_BYTES * len(REGISTERS) - 1).bit_length()


def register_table() -> str:
    """The map as a Markdown table."""
    lines = ["| offset | register | access | bits | meaning |", "|--:|---|---|--:|---|"]
    lines += [
        f"| 0x{register.offset:02x} | `{register.name}` | {register.access} | {register.bits} | {register.meaning} |"
        for register in REGISTERS
    ]
    return "\n".join(lines)


AXI_LITE = wiring.Signature(
    {
        "awvalid": Out(1),
        "awready": In(1),
        "awaddr": Out(ADDRESS_BITS),
        "wvalid": Out(1),
        "wready": In(1),
        "wdata": Out(WORD_BITS),
        "wstrb": Out(WORD_BYTES),
        "bvalid": In(1),
        "bready": Out(1),
        "bresp": In(2),
        "arvalid": Out(1),
        "arready": In(1),
        "araddr": Out(ADDRESS_BITS),
        "rvalid": In(1),
        "rready": Out(1),
        "rdata": In(WORD_BITS),
        "rresp": In(2),
    }
)
SLAVE_ERROR = 2


class RegisterFile(wiring.Component):
    """The registers behind AXI4-Lite.

    A write takes address and data together and answers in the next cycle; a read answers in the next cycle. An address
    without a register, a write to one that is only read, and a write of single bytes are answered with SLVERR and
    change nothing.

    ``centroids``: whether it has those registers.

    Ports: ``bus``: AXI4-Lite, 32 bits. A port for each register: what it shows (``read``), what it holds (``write``),
    or what has been written in the cycle before (``pulse``).
    """

    def __init__(self, *, centroids: bool) -> None:
        self.registers = [register for register in REGISTERS if centroids or not register.name.startswith("centroid_")]
        members: dict[str, wiring.Member] = {"bus": In(AXI_LITE)}
        for register in self.registers:
            members[register.name] = (In if register.access == "read" else Out)(register.bits)
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self.bus
        writes, known = Signal(), Signal()
        m.d.comb += [
            writes.eq(bus.awvalid & bus.wvalid & ~bus.bvalid),
            bus.awready.eq(writes),
            bus.wready.eq(writes),
            bus.arready.eq(~bus.rvalid),
        ]
        for register in self.registers:
            if register.access == "pulse":
                m.d.sync += getattr(self, register.name).eq(0)
        with m.If(bus.bready):
            m.d.sync += bus.bvalid.eq(0)
        with m.If(writes):
            with m.Switch(bus.awaddr[2:]):
                for register in self.registers:
                    if register.access != "read":
                        with m.Case(register.offset // WORD_BYTES):
                            m.d.comb += known.eq(bus.wstrb.all())
                            with m.If(known):
                                m.d.sync += getattr(self, register.name).eq(bus.wdata)
            m.d.sync += [bus.bvalid.eq(1), bus.bresp.eq(~known << 1)]
        with m.If(bus.rready):
            m.d.sync += bus.rvalid.eq(0)
        with m.If(bus.arvalid & ~bus.rvalid):
            m.d.sync += [bus.rvalid.eq(1), bus.rdata.eq(0), bus.rresp.eq(SLAVE_ERROR)]
            with m.Switch(bus.araddr[2:]):
                for register in self.registers:
                    with m.Case(register.offset // WORD_BYTES):
                        shown = 0 if register.access == "pulse" else getattr(self, register.name)
                        m.d.sync += [bus.rdata.eq(shown), bus.rresp.eq(0)]
        return m
