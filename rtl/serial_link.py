"""A serial line into the accelerator: a UART, and a link that turns bytes into register accesses and stream beats.

From the host: ``W`` word data (4 bytes) writes a register, ``R`` word reads one, ``S`` count (1 to 255) and that many
beats of 4 bytes go into the operand stream; a word is a register's offset / 4; numbers come with their lowest byte
first. To the host: ``w`` response, ``r`` response data (4 bytes), ``o`` beat (4 bytes) of the outputs, ``c`` for each
32 beats that have left the link's memory of 256, ``?`` for a byte that is no command. A response is AXI's: 0, or 2 for
an error.

The host sends no more beats than the memory holds beyond those that ``c`` has told of; so nothing is ever lost, though
the line itself has no flow control.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from termwise.algorithms.errors import InputError
from termwise.rtl.registers import ADDRESS_BITS, AXI_LITE, WORD_BITS

BEATS_OF_MEMORY = 256
BEATS_PER_CREDIT = 32
LEAST_DIVISOR = 4
DATA_BITS = 8


class UartReceiver(wiring.Component):
    """Bytes from a line of 8 bits, no parity, one stop bit.

    Ports: ``line``: idle high, synchronised here. ``bytes``: valid for one cycle; there is no waiting. A frame whose
    stop bit is low is dropped.
    """

    def __init__(self, divisor: int) -> None:
        if divisor < LEAST_DIVISOR:
            raise InputError(f"{divisor} clock cycles per bit; expected {LEAST_DIVISOR} at least")
        self.divisor = divisor
        super().__init__({"line": In(1), "bytes": Out(stream.Signature(DATA_BITS, always_ready=True))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        first, line = Signal(init=1), Signal(init=1)
        m.d.sync += [first.eq(self.line), line.eq(first), self.bytes.valid.eq(0)]
        wait, place = Signal(range(2 * self.divisor)), Signal(range(DATA_BITS + 1))
        held = Signal(DATA_BITS)
        with m.FSM():
            with m.State("IDLE"), m.If(~line):
                # The middle of the first data bit.
                m.d.sync += [wait.eq(self.divisor + self.divisor // 2 - 1), place.eq(0)]
                m.next = "BITS"
            with m.State("BITS"):
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == 0):
                    m.d.sync += [wait.eq(self.divisor - 1), place.eq(place + 1)]
                    with m.If(place == DATA_BITS):
                        m.d.sync += [self.bytes.valid.eq(line), self.bytes.payload.eq(held)]
                        m.next = "END"
                    with m.Else():
                        m.d.sync += held.eq(Cat(held[1:], line))
            with m.State("END"), m.If(line):
                m.next = "IDLE"
        return m


class UartTransmitter(wiring.Component):
    """Bytes to a line of 8 bits, no parity, one stop bit. Ports: ``bytes``; ``line``, idle high."""

    def __init__(self, divisor: int) -> None:
        if divisor < LEAST_DIVISOR:
            raise InputError(f"{divisor} clock cycles per bit; expected {LEAST_DIVISOR} at least")
        self.divisor = divisor
        super().__init__({"bytes": In(stream.Signature(DATA_BITS)), "line": Out(1, init=1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        wait, left = Signal(range(self.divisor)), Signal(range(DATA_BITS + 3))
        frame = Signal(DATA_BITS + 2, init=-1)
        m.d.comb += [self.line.eq(frame[0]), self.bytes.ready.eq(left == 0)]
        with m.If(left == 0), m.If(self.bytes.valid):
            m.d.sync += [
                frame.eq(Cat(Const(0, 1), self.bytes.payload, Const(1, 1))),
                left.eq(DATA_BITS + 2),
                wait.eq(self.divisor - 1),
            ]
        with m.Elif(wait == 0):
            m.d.sync += [frame.eq(Cat(frame[1:], Const(1, 1))), left.eq(left - 1), wait.eq(self.divisor - 1)]
        with m.Else():
            m.d.sync += wait.eq(wait - 1)
        return m


class SerialLink(wiring.Component):
    """Commands from bytes, and answers to bytes, as the head of this module says.

    Ports: ``received``, ``sent``: bytes; ``received`` is always taken. ``bus``: AXI4-Lite. ``operands``, ``outputs``:
    of the accelerator.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "received": In(stream.Signature(DATA_BITS, always_ready=True)),
                "sent": Out(stream.Signature(DATA_BITS)),
                "bus": Out(AXI_LITE),
                "operands": Out(stream.Signature(WORD_BITS)),
                "outputs": In(stream.Signature(data.StructLayout({"data": WORD_BITS, "last": 1}))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self.bus
        byte, comes = self.received.payload, self.received.valid
        m.submodules.memory = memory = SyncFIFOBuffered(width=WORD_BITS, depth=BEATS_OF_MEMORY)
        word, place, beats = Signal(WORD_BITS), Signal(2), Signal(DATA_BITS)
        gathered = Cat(word[DATA_BITS:], byte)
        address = Signal(ADDRESS_BITS)
        unknown = Signal()
        m.d.comb += [
            memory.w_data.eq(gathered),
            self.operands.payload.eq(memory.r_data),
            self.operands.valid.eq(memory.r_rdy),
            memory.r_en.eq(self.operands.ready),
            bus.awaddr.eq(address),
            bus.araddr.eq(address),
            bus.wdata.eq(word),
            bus.wstrb.eq(-1),
        ]
        # Commands.
        with m.FSM():
            with m.State("COMMAND"), m.If(comes):
                m.d.sync += place.eq(0)
                with m.Switch(byte):
                    with m.Case(ord("W")):
                        m.next = "WRITE_ADDRESS"
                    with m.Case(ord("R")):
                        m.next = "READ_ADDRESS"
                    with m.Case(ord("S")):
                        m.next = "COUNT"
                    with m.Default():
                        m.d.sync += unknown.eq(1)
            with m.State("WRITE_ADDRESS"), m.If(comes):
                m.d.sync += address.eq(byte << 2)
                m.next = "WRITE_DATA"
            with m.State("WRITE_DATA"), m.If(comes):
                m.d.sync += [word.eq(gathered), place.eq(place + 1)]
                with m.If(place == 3):
                    m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += [bus.awvalid.eq(1), bus.wvalid.eq(1)]
                with m.If(bus.awready & bus.wready):
                    m.next = "COMMAND"
            with m.State("READ_ADDRESS"), m.If(comes):
                m.d.sync += address.eq(byte << 2)
                m.next = "READ"
            with m.State("READ"):
                m.d.comb += bus.arvalid.eq(1)
                with m.If(bus.arready):
                    m.next = "COMMAND"
            with m.State("COUNT"), m.If(comes):
                m.d.sync += beats.eq(byte)
                m.next = "BEATS"
                with m.If(byte == 0):
                    m.next = "COMMAND"
            with m.State("BEATS"), m.If(comes):
                m.d.sync += [word.eq(gathered), place.eq(place + 1)]
                with m.If(place == 3):
                    m.d.comb += memory.w_en.eq(1)
                    m.d.sync += beats.eq(beats - 1)
                    with m.If(beats == 1):
                        m.next = "COMMAND"
        # Credits.
        left, credits = Signal(range(BEATS_PER_CREDIT)), Signal(range(BEATS_OF_MEMORY // BEATS_PER_CREDIT + 1))
        gives, takes = Signal(), Signal()
        leaves = self.operands.valid & self.operands.ready
        m.d.comb += gives.eq(leaves & (left == BEATS_PER_CREDIT - 1))
        m.d.sync += [left.eq(left + leaves), credits.eq(credits + gives - takes)]
        # Answers, up to 6 bytes, one after the other.
        frame, bytes_left = Signal(6 * DATA_BITS), Signal(range(7))
        m.d.comb += [self.sent.payload.eq(frame[:DATA_BITS]), self.sent.valid.eq(bytes_left != 0)]
        with m.If(bytes_left != 0), m.If(self.sent.ready):
            m.d.sync += [frame.eq(frame >> DATA_BITS), bytes_left.eq(bytes_left - 1)]
        with m.Elif(bus.bvalid):
            m.d.comb += bus.bready.eq(1)
            m.d.sync += [frame.eq(Cat(Const(ord("w"), DATA_BITS), bus.bresp)), bytes_left.eq(2)]
        with m.Elif(bus.rvalid):
            m.d.comb += bus.rready.eq(1)
            response = Cat(bus.rresp, Const(0, DATA_BITS - 2))
            m.d.sync += [frame.eq(Cat(Const(ord("r"), DATA_BITS), response, bus.rdata)), bytes_left.eq(6)]
        with m.Elif(unknown):
            m.d.sync += [frame.eq(ord("?")), bytes_left.eq(1), unknown.eq(0)]
        with m.Elif(credits != 0):
            m.d.comb += takes.eq(1)
            m.d.sync += [frame.eq(ord("c")), bytes_left.eq(1)]
        with m.Elif(self.outputs.valid):
            m.d.comb += self.outputs.ready.eq(1)
            beat = self.outputs.payload.data
            m.d.sync += [frame.eq(Cat(Const(ord("o"), DATA_BITS), beat)), bytes_left.eq(5)]
        return m
