"""PEs that take one product per cycle: FP16, OliVe's and ANT's (``docs/microarchitecture.md``, 2.2, 2.4 and 2.5).

``HalfMac`` has an FP16 activation and an FP32 accumulator, beside a weight that is FP16 or a shifted integer.
``IntegerMac`` has codes on both sides and an int32 accumulator; at 8 bits it is four multipliers of 4 bits.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.errors import InputError
from termwise.algorithms.processing_element import BIT_PARALLEL_PIPELINE, INTEGER_PIPELINE, WIDE_INTEGER_PIPELINE
from termwise.rtl.decoders import NARROW_BITS, WIDE_BITS, shifted_integer_layout
from termwise.rtl.float32 import BIAS, Steps, add, leading_zeros
from termwise.rtl.processing_element import STAGES_OUTSIDE, TERM_CONTROL, delayed

HALF_SIGNIFICAND_BITS = 11
HALF_UNIT = 25
"""A finite FP16 number is significand · 2^(exponent - 25)."""

INTEGER_SIGNIFICAND_BITS = 8
ACCUMULATOR_BITS = 32


def normal_layout(significand_bits: int) -> data.StructLayout:
    """± significand · 2^exponent, the significand's top bit set; the significand of zero is 0.

    An FP16 number's exponent is 25 more than that, so that six bits hold either.
    """
    return data.StructLayout({"negative": 1, "exponent": signed(6), "significand": significand_bits})


HALF_NORMAL = normal_layout(HALF_SIGNIFICAND_BITS)
INTEGER_NORMAL = normal_layout(INTEGER_SIGNIFICAND_BITS)


def _normalised(m: Module, layout: data.StructLayout, negative: Value, magnitude: Value, exponent: Value) -> data.View:
    steps = Steps(m, "normal", registered=False)
    bits = len(magnitude)
    zeros = leading_zeros(steps, magnitude, "magnitude")[: (bits - 1).bit_length()]
    operand = Signal(layout)
    m.d.comb += [
        operand.negative.eq(negative),
        operand.exponent.eq(exponent - zeros),
        operand.significand.eq((magnitude << zeros)[:bits]),
    ]
    return operand


def normal_half(m: Module, operand: data.View) -> data.View:
    """``HALF_NORMAL`` of a ``HALF_OPERAND``, without a register."""
    return _normalised(m, HALF_NORMAL, operand.sign, operand.significand, operand.exponent)


def normal_integer(m: Module, value: data.View) -> data.View:
    """``INTEGER_NORMAL`` of a ``shifted_integer_layout``, without a register."""
    integer = value.integer
    magnitude = Signal(INTEGER_SIGNIFICAND_BITS, name="integer_magnitude")
    m.d.comb += magnitude.eq(Mux(integer[-1], -integer, integer))
    return _normalised(m, INTEGER_NORMAL, integer[-1], magnitude, value.exponent)


class HalfMac(wiring.Component):
    """s ← fl32(s + activation · weight); the product is exact.

    Latency 2 cycles from operands to the sum, a product per cycle, no flow control. The sum is added and rounded in one
    cycle, because the next product needs it; it sets the clock.

    Ports:
        weight: ``HALF_NORMAL``, or ``INTEGER_NORMAL`` of a shifted integer of up to 8 bits.
        activation: ``HALF_NORMAL``.
        control: ``TERM_CONTROL``: valid, first and last product of a group (``fp16_mac``: of a row).
        sum: FP32.

    Args:
        weights: ``half`` or ``integer``.
    """

    latency = BIT_PARALLEL_PIPELINE.stages - STAGES_OUTSIDE

    def __init__(self, weights: str = "half") -> None:
        if weights not in ("half", "integer"):
            raise InputError(f"weights {weights!r} of a multiply-accumulate unit; expected 'half' or 'integer'")
        self.layout = HALF_NORMAL if weights == "half" else INTEGER_NORMAL
        self.unit = HALF_UNIT + (HALF_UNIT if weights == "half" else 0)
        super().__init__(
            {
                "weight": In(self.layout),
                "activation": In(HALF_NORMAL),
                "control": In(TERM_CONTROL),
                "sum": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        weight, activation = self.weight, self.activation
        # Product, of two numbers from 1 to 2: below 4.
        bits = HALF_SIGNIFICAND_BITS + len(weight.significand)
        product = Signal(bits)
        exponent = Signal(8)  # as FP32 has it; neither too small nor too large
        negative = Signal()
        m.d.sync += [
            product.eq(weight.significand * activation.significand),
            exponent.eq(weight.exponent + activation.exponent + (BIAS - self.unit + bits - 2)),
            negative.eq(weight.negative ^ activation.negative),
        ]
        control = data.View(TERM_CONTROL, delayed(m, self.control.as_value(), 1, "control"))
        above = product[-1]
        fraction = Signal(23)
        number = Signal(32)
        m.d.comb += [
            fraction.eq(Cat(Const(0, 24 - bits), Mux(above, product[:-1], Cat(Const(0, 1), product[:-2])))),
            number.eq(Mux(product.any(), Cat(fraction, (exponent + above)[:8], negative), 0)),
        ]
        # Addition and rounding.
        total = Signal(32)
        result = add(Steps(m, "sum", registered=False), Mux(control.first, 0, total), number)
        with m.If(control.valid):
            m.d.sync += total.eq(result)
        m.d.comb += self.sum.eq(total)
        return m


class IntegerMac(wiring.Component):
    """s ← s + (b · d) << (c + e) of two shifted integers; with 8 bits from four products of 4 bits (OliVe section 4).

    Latency 3 cycles from operands to the sum, 4 with 8 bits; a product per cycle, no flow control. Sums that do not fit
    into 32 bits are refused before (section 2.5), here they wrap.

    Ports: ``weight``, ``activation``: ``shifted_integer_layout(bits)``. ``control``: valid, first and last product of a
    group. ``sum``: int32.
    """

    def __init__(self, bits: int) -> None:
        if bits not in (NARROW_BITS, WIDE_BITS):
            raise InputError(f"an integer PE of {bits} bits; expected {NARROW_BITS} or {WIDE_BITS}")
        self.bits = bits
        self.latency = (INTEGER_PIPELINE if bits == NARROW_BITS else WIDE_INTEGER_PIPELINE).stages - STAGES_OUTSIDE
        layout = shifted_integer_layout(bits)
        super().__init__(
            {
                "weight": In(layout),
                "activation": In(layout),
                "control": In(TERM_CONTROL),
                "sum": Out(signed(ACCUMULATOR_BITS)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        weight, activation = self.weight.integer, self.activation.integer
        product = Signal(signed(2 * self.bits))
        exponent = delayed(m, self.weight.exponent + self.activation.exponent, 2, "exponent")
        control = data.View(TERM_CONTROL, delayed(m, self.control.as_value(), self.latency - 1, "control"))
        shifted = Signal(signed(ACCUMULATOR_BITS))
        if self.bits == NARROW_BITS:
            # Operands, which may come a long way; product; shift and accumulator in one.
            weight, activation = delayed(m, weight, 1, "weight"), delayed(m, activation, 1, "activation")
            m.d.sync += product.eq(_product(weight, activation))
            m.d.comb += shifted.eq(product << exponent)
        else:
            # Four products of halves h · 16 + l; their sum; shift; accumulator.
            halves = [((operand[4:].as_signed(), 4), (operand[:4], 0)) for operand in (weight, activation)]
            partial = []
            for left, left_place in halves[0]:
                for right, right_place in halves[1]:
                    part = Signal(signed(10), name=f"product_{left_place}_{right_place}")
                    m.d.sync += part.eq(_product(left, right))
                    partial.append(part << (left_place + right_place))
            m.d.sync += product.eq((partial[0] + partial[1]) + (partial[2] + partial[3]))
            m.d.sync += shifted.eq(product << exponent)
        total = Signal(signed(ACCUMULATOR_BITS))
        with m.If(control.valid):
            m.d.sync += total.eq(Mux(control.first, 0, total) + shifted)
        m.d.comb += self.sum.eq(total)
        return m


def _product(left: Value, right: Value) -> Value:
    """left · right of 4 bits, either signed or not, as rows: synthesis would take a DSP, which is far and slow."""
    rows: list[Value] = [Mux(bit, left, 0) << place for place, bit in enumerate(right)]
    if right.shape().signed:
        rows[3] = -rows[3]
    return (rows[0] + rows[1]) + (rows[2] + rows[3])
