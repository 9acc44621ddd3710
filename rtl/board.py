"""The accelerator on a board: ULX3S with an ECP5-85F, behind its USB serial line; and the same design in this process.

Pins are those of the board's constraint file ``ulx3s_v20.lpf`` (github.com/emard/ulx3s). The 25 MHz of its oscillator
are the clock; the line has 1 Mbaud, which its FTDI chip takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import NDArray

from termwise.algorithms.errors import TermwiseError
from termwise.algorithms.files import write_text, written_beside
from termwise.rtl.accelerator import Accelerator, AcceleratorDesign
from termwise.rtl.compiled_model import CompiledModel
from termwise.rtl.registers import WORD_BYTES
from termwise.rtl.serial_link import (
    BEATS_OF_MEMORY,
    BEATS_PER_CREDIT,
    SerialLink,
    UartReceiver,
    UartTransmitter,
)
from termwise.rtl.synthesis import FigureError, cells_of, clock_of, counted, get_target
from termwise.rtl.toolchain import ECPPACK, NEXTPNR_ECP5, YOSYS, find
from termwise.rtl.units import board_design
from termwise.rtl.verilog import verilog

CLOCK_HERTZ = 25_000_000
BAUD = 1_000_000
BLOCK_BEATS = 255
PINS = {
    "clk": "G2",
    "rst": "T1",
    "transmit": "L4",
    "receive": "M1",
    "lights[0]": "B2",
    "lights[1]": "C2",
    "lights[2]": "C1",
    "lights[3]": "D2",
}
"""``rst`` is the button "fire 2". ``transmit`` goes to the FTDI chip."""

DEVICE = ("--85k", "--package", "CABGA381", "--speed", "6")


@dataclass(frozen=True, kw_only=True)
class BoardDesign:
    """An accelerator behind a serial line.

    Attributes:
        accelerator: what it is.
        divisor: clock cycles of a bit on the line.
    """

    accelerator: AcceleratorDesign = field(default_factory=board_design)
    divisor: int = CLOCK_HERTZ // BAUD


class Board(wiring.Component):
    """Accelerator, link and UART.

    Ports: ``receive``, ``transmit``: the line, from and to the host. ``lights``: a layer runs or has run; the
    interrupt; operands and outputs move.
    """

    def __init__(self, design: BoardDesign) -> None:
        self.design = design
        super().__init__({"receive": In(1), "transmit": Out(1), "lights": Out(4)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.receiver = receiver = UartReceiver(self.design.divisor)
        m.submodules.transmitter = transmitter = UartTransmitter(self.design.divisor)
        m.submodules.link = link = SerialLink()
        m.submodules.accelerator = accelerator = Accelerator(self.design.accelerator)
        wiring.connect(m, link.bus, accelerator.bus)
        wiring.connect(m, link.operands, accelerator.operands)
        wiring.connect(m, accelerator.outputs, link.outputs)
        wiring.connect(m, receiver.bytes, link.received)
        wiring.connect(m, link.sent, transmitter.bytes)
        seen = Signal()
        with m.If(accelerator.outputs.valid):
            m.d.sync += seen.eq(1)
        m.d.comb += [
            receiver.line.eq(self.receive),
            self.transmit.eq(transmitter.line),
            self.lights.eq(Cat(seen, accelerator.interrupt, accelerator.operands.valid, accelerator.outputs.valid)),
        ]
        return m


class Port(Protocol):
    """A serial port, as pyserial has it."""

    def write(self, data: bytes, /) -> Any:
        """Send."""

    def read(self, size: int = 1, /) -> bytes:
        """Receive ``size`` bytes; fewer after the time-out."""


class SerialTransport:
    """The driver's ``Transport`` over a serial ``port`` (``serial.Serial("/dev/ttyUSB0", 1_000_000, timeout=5)``).

    Raises ``TermwiseError`` where the other side does not answer as the link does.
    """

    def __init__(self, port: Port) -> None:
        self.port = port

    def _read(self, size: int) -> bytes:
        found = self.port.read(size)
        if len(found) != size:
            raise TermwiseError(f"the board sent {len(found)} of {size} bytes; expected an accelerator on the line")
        return found

    def _answer(self, kind: bytes) -> None:
        found = self._read(1)
        if found != kind:
            raise TermwiseError(f"the board answered {found!r}; expected {kind!r}")
        if self._read(1)[0]:
            raise TermwiseError("the board refused an access to a register; expected one that exists")

    def write(self, offset: int, value: int) -> None:
        """Write a register."""
        self.port.write(bytes([ord("W"), offset // WORD_BYTES]) + value.to_bytes(4, "little"))
        self._answer(b"w")

    def read(self, offset: int) -> int:
        """Read a register."""
        self.port.write(bytes([ord("R"), offset // WORD_BYTES]))
        self._answer(b"r")
        return int.from_bytes(self._read(4), "little")

    def transfer(self, operands: NDArray[np.uint32], outputs: int) -> NDArray[np.uint32]:
        """Send and receive; no more beats are on the way than the link's memory holds."""
        text = operands.astype("<u4").tobytes()
        beats = len(operands)
        sent = credits = 0
        found = bytearray()
        while len(found) < 4 * outputs:
            room = BEATS_OF_MEMORY - (sent - BEATS_PER_CREDIT * credits)
            count = min(beats - sent, room, BLOCK_BEATS)
            if count > 0:
                self.port.write(bytes([ord("S"), count]) + text[4 * sent : 4 * (sent + count)])
                sent += count
                continue
            kind = self.port.read(1)
            if kind == b"c":
                credits += 1
            elif kind == b"o":
                found += self._read(4)
            elif not kind:
                break  # nothing comes any more: the accelerator has stopped
            else:
                raise TermwiseError(f"the board answered {kind!r}; expected outputs")
        return np.frombuffer(bytes(found), "<u4").astype(np.uint32)


class SimulatedLine:
    """A ``Port`` to a compiled ``Board``: the same bits on the same two pins.

    Args:
        design: of the board.
        patience: bits that pass without an answer until ``read`` gives up.
    """

    def __init__(self, design: BoardDesign, patience: int = 20_000) -> None:
        self.divisor, self.patience = design.divisor, patience
        self.model = CompiledModel(Board(design))
        self._line: list[int] = []
        self._received = bytearray()
        self._run(np.ones(4 * self.divisor, np.int64))

    def _run(self, levels: NDArray[np.int64]) -> None:
        """Drive the line and decode what comes back: frames begin with a 0 and have 10 bits."""
        shown = self.model.run({"receive": levels})["transmit"]
        line = np.concatenate([np.array(self._line, np.int64), shown])
        place, frame = 0, 10 * self.divisor
        while True:
            starts = np.flatnonzero(line[place:] == 0)
            if not len(starts):
                place = len(line)
                break
            place += int(starts[0])
            if place + frame > len(line):
                break
            middle = place + self.divisor // 2 + self.divisor * np.arange(1, 9)
            self._received.append(int((line[middle] << np.arange(8)).sum()))
            place += frame
        self._line = line[place:].tolist()

    def write(self, data: bytes, /) -> int:
        """Send."""
        bits = np.unpackbits(np.frombuffer(data, np.uint8)[:, None], axis=1, bitorder="little")
        frames = np.concatenate([np.zeros((len(data), 1)), bits, np.ones((len(data), 1))], axis=1)
        self._run(np.repeat(frames.astype(np.int64).ravel(), self.divisor))
        return len(data)

    def read(self, size: int = 1, /) -> bytes:
        """Receive."""
        waited = 0
        while len(self._received) < size and waited < self.patience:
            self._run(np.ones(20 * self.divisor, np.int64))
            waited += 20
        found = bytes(self._received[:size])
        del self._received[:size]
        return found


def constraints() -> str:
    """Pins and clock, as nextpnr reads them."""
    lines = []
    for name, site in PINS.items():
        lines += [f'LOCATE COMP "{name}" SITE "{site}";', f'IOBUF PORT "{name}" IO_TYPE=LVCMOS33;']
    lines.append(f'FREQUENCY PORT "clk" {CLOCK_HERTZ / 1e6:g} MHZ;')
    return "\n".join(lines) + "\n"


def build_bitstream(design: BoardDesign, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Write ``board.bit`` and its logs into ``folder``; returns what the design takes and its clock.

    Raises ``MissingToolError``, ``ToolError``, and ``FigureError`` where the clock of the board is not reached.
    """
    work = folder / "work"
    write_text(work / "board.v", verilog(Board(design), "board"))
    write_text(work / "board.lpf", constraints())
    progress("synthesis")
    command = "synth_ecp5 -noflatten -top board; flatten; opt_clean"
    script = f"read_verilog board.v; {command}; tee -q -o cells.json stat -json; write_json board.json"
    find(YOSYS).run(["-q", "-l", "yosys.log", "-p", script], work, "yosys.log")
    cells = cells_of(work / "cells.json")
    progress("place and route")
    options = ["--json", "board.json", "--lpf", "board.lpf", "--textcfg", "board.config", "--report", "report.json"]
    find(NEXTPNR_ECP5).run([*DEVICE, *options, "--seed", "1", "-q"], work, "nextpnr.log", timeout=1800)
    clock = clock_of(work / "report.json")
    if clock * 1e6 < CLOCK_HERTZ:
        raise FigureError(f"the board's clock is {CLOCK_HERTZ / 1e6:g} MHz, and the design reaches {clock:.1f}")
    progress("packing")
    find(ECPPACK).run(["--compress", "board.config", "board.bit"], work, "ecppack.log")
    with written_beside(folder / "board.bit") as temporary:
        temporary.write_bytes((work / "board.bit").read_bytes())
    figures = counted(cells, get_target("ecp5"))
    return {"bitstream": folder / "board.bit", "fmax_mhz": round(clock, 2), "clock_mhz": CLOCK_HERTZ / 1e6, **figures}
