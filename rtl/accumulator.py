"""The column accumulator: from the chain of 8 PEs to their outputs (``docs/microarchitecture.md``, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from termwise.algorithms.processing_element import (
    ACCUMULATOR_ROWS,
    ADDITION_CYCLES,
    CHANNEL_SCALE_CYCLES,
    HALF_CYCLES,
    INTEGER_TO_FLOAT_CYCLES,
    SCALING_CYCLES,
)
from termwise.rtl.float32 import ROUNDING_CYCLES, Steps, add, integer_to_float, multiply, to_half
from termwise.rtl.processing_element import delayed

ROW_BITS = (ACCUMULATOR_ROWS - 1).bit_length()
EXPONENT = signed(10)
"""Of an integer sum: it stands for sum · 2^exponent."""

VALUE_CONTROL = data.StructLayout({"valid": 1, "row": ROW_BITS, "first": 1, "last": 1})
"""What accompanies a value: its row, and whether its group is the first or the last one of the tile."""


@dataclass(frozen=True, kw_only=True)
class AccumulatorParts:
    """The parts that a column accumulator has, by what comes from the chain.

    Attributes:
        integer_bits: width of a signed integer sum; 0 where an FP32 number comes.
        scales: whether it multiplies by a scale.
        adds: whether it holds y, which takes an integer or a scale; without, what comes is y already.
        channel_scales: whether finished outputs are multiplied by a channel scale.
        scale_lag: cycles after its value in which a scale comes, up to those in which an integer becomes FP32.
    """

    integer_bits: int = 0
    scales: bool = False
    adds: bool = True
    channel_scales: bool = False
    scale_lag: int = 0

    @property
    def latency(self) -> int:
        """Cycles from a value until its output stands in the output memory."""
        return (
            (INTEGER_TO_FLOAT_CYCLES if self.integer_bits else 0)
            + (SCALING_CYCLES if self.scales else 0)
            + (ADDITION_CYCLES if self.adds else 0)
            + (CHANNEL_SCALE_CYCLES if self.channel_scales else 0)
            + HALF_CYCLES
        )


class ColumnAccumulator(wiring.Component):
    """y ← y + value · scale for 8 rows; the last y of a tile, times its channel scale, becomes an FP16 output.

    Latency ``parts.latency`` cycles from a value to the output memory; a value per cycle, two of the same row at least
    8 cycles apart; no flow control. The output memory has two halves: one is written, the other is read.

    Ports:
        value: the sum, a signed integer or an FP32 number, with ``control``.
        exponent: of an integer.
        scale: FP32, finite, ``scale_lag`` cycles after its value; with ``scales``.
        channel_scale: FP32, finite, of the value's row; with ``channel_scales``.
        exchange: the halves of the output memory change places at the end of this cycle.
        read_row, output: the FP16 output of a row, from the half that is not written, in the same cycle.
    """

    def __init__(self, parts: AccumulatorParts) -> None:
        self.parts = parts
        self.latency = parts.latency
        members = {
            "value": In(signed(parts.integer_bits) if parts.integer_bits else 32),
            "control": In(VALUE_CONTROL),
            "exchange": In(1),
            "read_row": In(ROW_BITS),
            "output": Out(16),
        }
        if parts.integer_bits:
            members["exponent"] = In(EXPONENT)
        if parts.scales:
            members["scale"] = In(32)
        if parts.channel_scales:
            members["channel_scale"] = In(32)
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        parts = self.parts
        value = self.value
        controls = [self.control.as_value()]  # the port's, by cycles behind it
        for cycle in range(parts.latency - 1):
            controls.append(delayed(m, controls[-1], 1, f"control_{cycle + 1}"))
        passed = 0  # cycles behind the ports
        if parts.integer_bits:
            value = integer_to_float(Steps(m, "float", registered=True), self.value, self.exponent)
            passed += INTEGER_TO_FLOAT_CYCLES
        if parts.scales:
            scale = delayed(m, self.scale, passed - parts.scale_lag, "scale")
            value = multiply(Steps(m, "scaled", registered=True), value, scale)
            passed += SCALING_CYCLES
        if parts.adds:
            # y of 8 rows, back after the addition and a cycle for the memory. It is read a cycle ahead.
            assert passed
            m.submodules.sums = sums = Memory(shape=32, depth=ACCUMULATOR_ROWS, init=[])
            before, after = sums.read_port(domain="comb"), sums.write_port()
            total = Signal(32)
            term = data.View(VALUE_CONTROL, controls[passed - 1])
            done = data.View(VALUE_CONTROL, controls[passed + ADDITION_CYCLES])
            m.d.comb += before.addr.eq(term.row)
            newest = Mux(done.valid & (done.row == term.row), total, before.data)
            y = delayed(m, Mux(term.first, 0, newest), 1, "y")
            m.d.comb += total.eq(add(Steps(m, "sum", registered=True), y, value))
            m.d.comb += [after.addr.eq(done.row), after.data.eq(total), after.en.eq(done.valid)]
            value = total
            passed += ADDITION_CYCLES
        if parts.channel_scales:
            scale = delayed(m, self.channel_scale, passed, "channel_scale")
            value = multiply(Steps(m, "channel", registered=True), value, scale)
            passed += CHANNEL_SCALE_CYCLES
        half = to_half(Steps(m, "half", registered=True), value)
        finished = data.View(VALUE_CONTROL, controls[passed + ROUNDING_CYCLES])
        # Output memory.
        m.submodules.outputs = outputs = Memory(shape=16, depth=2 * ACCUMULATOR_ROWS, init=[])
        written, read = outputs.write_port(), outputs.read_port(domain="comb")
        writing = Signal()  # the half that is written
        m.d.sync += writing.eq(writing ^ self.exchange)
        m.d.comb += [
            written.addr.eq(Cat(finished.row, writing)),
            written.data.eq(half),
            written.en.eq(finished.valid & finished.last),
            read.addr.eq(Cat(self.read_row, ~writing)),
            self.output.eq(read.data),
        ]
        return m
