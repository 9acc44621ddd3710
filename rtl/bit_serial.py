"""BitMoD's PE: one term, a signed power of two, of every lane's weight per cycle.

``docs/microarchitecture.md``, section 2.3, says what the three numerics compute. What stands on the borders of an array
(term generators, alignment of activations to a shared exponent) and what follows the PE (dequantizer, chain, column
accumulator) are components of their own.

The authors' published RTL does not align a dot product whose exponent is the smaller one, leaves subnormal activations
open, and keeps 21 of the 23 bits of a dequantized sum. None of it is repeated here, and tests pin each.
"""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError
from termwise.rtl.processing_element import HALF_OPERAND, STAGES_OUTSIDE, TERM_CONTROL, decode_half, delayed
from termwise.rtl.shifting import shift_right

DIGIT = data.StructLayout({"present": 1, "negative": 1, "shift": 3})
"""A digit ± 2^shift of a weight, or none."""

MAXIMUM_SHIFT = 4
BASE_BITS = 3
MAXIMUM_BASE = 6
EXPONENT_BITS = 6
"""Of e and G of numerics ``paper``: an activation's exponent (30), a digit's (4), a base (6), and growth."""

HALF_EXPONENT_BITS = 5
HALF_SIGNIFICAND_BITS = 11
LARGEST_HALF_EXPONENT = 30


def weight_terms(lanes: int) -> data.StructLayout:
    """A term of the weights of one row: a digit for every lane, and the power of two that all of them stand for."""
    return data.StructLayout({"digits": data.ArrayLayout(DIGIT, lanes), "base": BASE_BITS})


def magnitude_bits(spec: BitSerialSpec) -> int:
    """Of what is aligned to an exponent; one bit more where rounding may carry into it."""
    carries = spec.rounding == "nearest_even" and spec.align_bits < HALF_SIGNIFICAND_BITS
    return spec.align_bits + carries


def aligned_layout(spec: BitSerialSpec) -> data.StructLayout:
    """An activation that is aligned to its group's exponent. Its sign meets the digit's in the PE."""
    return data.StructLayout({"sign": 1, "magnitude": magnitude_bits(spec)})


def activation_layout(spec: BitSerialSpec) -> data.ArrayLayout:
    """The activations of a step of one column: FP16 numbers, or aligned ones with numerics ``shared_exponent``."""
    shared = spec.numerics == "shared_exponent"
    return data.ArrayLayout(aligned_layout(spec) if shared else HALF_OPERAND, spec.lanes)


def sum_layout(spec: BitSerialSpec, sum_bits: int) -> data.StructLayout:
    """The sum of a group: ``significand`` · 2^(exponent + constant) of ``paper``, else a whole number."""
    if spec.numerics == "paper":
        return data.StructLayout({"significand": signed(spec.accumulator_bits), "exponent": EXPONENT_BITS})
    return data.StructLayout({"significand": signed(sum_bits), "exponent": 0})


def least_sum_bits(spec: BitSerialSpec, largest_numerator: int, group_inputs: int) -> int:
    """Bits of a signed number that holds every sum of a group of ``group_inputs`` weights of up to this numerator.

    Raises ``InputError`` where ``BitSerialSpec.check_group`` would: more than 64 bits.
    """
    if spec.numerics == "paper":
        return spec.accumulator_bits
    activation = (
        ((1 << HALF_SIGNIFICAND_BITS) - 1) << (LARGEST_HALF_EXPONENT - 1)
        if spec.numerics == "exact"
        else 1 << spec.align_bits
    )
    bits = (activation * largest_numerator * group_inputs).bit_length() + 1
    if bits > 64:
        raise InputError(
            f"a group of {group_inputs} weights of up to {largest_numerator} has sums of {bits} bits with numerics "
            f"{spec.numerics!r}; expected 64 at most"
        )
    return bits


class ActivationAligner(wiring.Component):
    """Aligns the activations of one step and column to the largest exponent of their group (``shared_exponent``).

    q = ± ⌊f · 2^(A - 11) / 2^(E - E_i)⌋ on the magnitude, or the nearest. It stands on the border of an array, once for
    each column.

    Latency 1 cycle, one step per cycle, no flow control.

    Ports: ``halves``: the lanes' FP16 numbers, the first lane lowest. ``exponent``: E, 1 to 30. ``aligned``: q.
    """

    latency = 1

    def __init__(self, spec: BitSerialSpec) -> None:
        self.spec = spec
        super().__init__(
            {
                "halves": In(data.ArrayLayout(16, spec.lanes)),
                "exponent": In(HALF_EXPONENT_BITS),
                "aligned": Out(data.ArrayLayout(aligned_layout(spec), spec.lanes)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for lane in range(self.spec.lanes):
            operand = decode_half(m, self.halves[lane])
            distance = Signal(HALF_EXPONENT_BITS, name=f"distance_{lane}")
            m.d.comb += distance.eq(self.exponent - operand.exponent)
            magnitude = _aligned(m, self.spec, operand.significand, distance, f"lane_{lane}")
            m.d.sync += [self.aligned[lane].magnitude.eq(magnitude), self.aligned[lane].sign.eq(operand.sign)]
        return m


def _aligned(m: Module, spec: BitSerialSpec, significand: Value, distance: Value, name: str) -> Value:
    """A magnitude of 11 bits in ``align_bits`` bits, shifted right by ``distance``."""
    spare = spec.align_bits - HALF_SIGNIFICAND_BITS
    value = Cat(Const(0, spare), significand) if spare > 0 else significand
    quotient, increment = shift_right(m, value, distance + max(-spare, 0), spec.rounding, name)
    return quotient + increment if spec.rounding == "nearest_even" else quotient


class BitSerialPe(wiring.Component):
    """Adds the products of one term of ``lanes`` weights with their activations to the sum of a group.

    Latency: ``latency`` cycles from operands to the sum, one term per cycle, no flow control: what is issued completes.

    Ports:
        weight: ``weight_terms(lanes)``, from the row's term generator.
        activation: ``activation_layout(spec)``, from the border of the column.
        control: valid, first and last term of a group.
        sum: ``sum_layout``: the group accumulator.

    Args:
        spec: lanes, numerics and widths.
        sum_bits: of the accumulator with numerics ``exact`` and ``shared_exponent`` (``least_sum_bits``).
    """

    def __init__(self, spec: BitSerialSpec, sum_bits: int = 0) -> None:
        self.spec = spec
        self.sum_bits = sum_bits or least_sum_bits(spec, 32, 128)
        self.latency = spec.stages - STAGES_OUTSIDE
        super().__init__(
            {
                "weight": In(weight_terms(spec.lanes)),
                "activation": In(activation_layout(spec)),
                "control": In(TERM_CONTROL),
                "sum": Out(sum_layout(spec, self.sum_bits)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        {"paper": self._paper, "exact": self._exact, "shared_exponent": self._shared}[self.spec.numerics](m)
        return m

    # ---- numerics shared_exponent ----

    def _shared(self, m: Module) -> None:
        # Shift and sign: the lane's product with its digit.
        width = magnitude_bits(self.spec) + MAXIMUM_SHIFT
        products, negatives = [], []
        for lane, digit in enumerate(self.weight.digits):
            operand = self.activation[lane]
            product = Signal(signed(width + 1), name=f"product_{lane}")
            shifted = Signal(width, name=f"shifted_{lane}")
            negative = Signal(name=f"negative_{lane}")
            m.d.comb += [
                shifted.eq(Mux(digit.present, _shift_left(operand.magnitude, digit.shift), 0)),
                negative.eq(digit.negative ^ operand.sign),
            ]
            # -x = ~x + 1; the tree adds the ones.
            m.d.sync += product.eq(Cat(shifted, Const(0, 1)) ^ negative.replicate(width + 1))
            products.append(product)
            negatives.append(negative)
        ones = Signal(range(len(negatives) + 1))
        m.d.sync += ones.eq(_tree(negatives))
        self._add_up(m, [*products, ones])

    # ---- numerics exact ----

    def _exact(self, m: Module) -> None:
        products = []
        for lane, digit in enumerate(self.weight.digits):
            operand = self.activation[lane]
            # Shift by the digit, with its sign.
            magnitude = Signal(HALF_SIGNIFICAND_BITS + MAXIMUM_SHIFT, name=f"magnitude_{lane}")
            scaled = Signal(signed(HALF_SIGNIFICAND_BITS + MAXIMUM_SHIFT + 1), name=f"scaled_{lane}")
            places = Signal(HALF_EXPONENT_BITS, name=f"places_{lane}")
            m.d.comb += magnitude.eq(Mux(digit.present, _shift_left(operand.significand, digit.shift), 0))
            m.d.sync += [
                scaled.eq(Mux(digit.negative ^ operand.sign, -magnitude, magnitude)),
                places.eq(operand.exponent - 1),
            ]
            # Shift by the exponent: whole multiples of 2^-24.
            product = Signal(signed(len(scaled) + LARGEST_HALF_EXPONENT - 1), name=f"product_{lane}")
            m.d.sync += product.eq(scaled << places)
            products.append(product)
        self._add_up(m, products)

    def _add_up(self, m: Module, products: list[Signal]) -> None:
        """Tree of ``products``, those of the lanes first, then the accumulator, for sums that lose nothing."""
        before = self.latency - 2
        base = delayed(m, self.weight.base, before, "base")
        control = delayed(m, self.control.as_value(), before, "control")
        # Tree.
        lanes_bits = (self.spec.lanes - 1).bit_length()
        dot_product = Signal(signed(len(products[0]) + lanes_bits))
        m.d.sync += dot_product.eq(_tree(products))
        base, control = delayed(m, base, 1, "base_of_sum"), delayed(m, control, 1, "control_of_sum")
        # Group accumulator.
        term = data.View(TERM_CONTROL, control)
        total = Signal(signed(self.sum_bits))
        addend = Signal(signed(len(dot_product) + MAXIMUM_BASE))
        m.d.comb += [addend.eq(dot_product << base), self.sum.significand.eq(total)]
        with m.If(term.valid):
            m.d.sync += total.eq(Mux(term.first, 0, total) + addend)

    # ---- numerics paper ----

    def _paper(self, m: Module) -> None:
        spec = self.spec
        width = magnitude_bits(spec)
        m.submodules.exponent_match = match = Module()
        m.submodules.multiplier = multiplier = Module()
        m.submodules.group_accumulator = accumulator = Module()
        exponents, significands, negatives = [], [], []
        for lane, digit in enumerate(self.weight.digits):
            # Product: its exponent, 0 where the lane is absent, and its significand.
            operand = self.activation[lane]
            exponent = Signal(EXPONENT_BITS, name=f"exponent_{lane}")
            significand = Signal(HALF_SIGNIFICAND_BITS, name=f"significand_{lane}")
            negative = Signal(name=f"negative_{lane}")
            there = digit.present & operand.significand.any()
            match.d.sync += exponent.eq(Mux(there, operand.exponent + digit.shift, 0))
            multiplier.d.sync += [
                significand.eq(Mux(digit.present, operand.significand, 0)),
                negative.eq(digit.negative ^ operand.sign),
            ]
            exponents.append(exponent)
            significands.append(delayed(multiplier, significand, 1, f"significand_{lane}"))
            negatives.append(delayed(multiplier, negative, 1, f"negative_{lane}"))
        # Exponent match: the largest exponent of the lanes, and each lane's distance to it.
        greatest = Signal(EXPONENT_BITS)
        matched = Signal(EXPONENT_BITS)
        match.d.comb += greatest.eq(_greatest(match, exponents))
        match.d.sync += matched.eq(greatest + delayed(match, self.weight.base, 1, "base"))
        products = []
        for lane, exponent in enumerate(exponents):
            distance = Signal(EXPONENT_BITS, name=f"distance_{lane}")
            match.d.sync += distance.eq(greatest - exponent)
            # Align.
            magnitude = Signal(width, name=f"magnitude_{lane}")
            product = Signal(signed(width + 1), name=f"product_{lane}")
            multiplier.d.comb += magnitude.eq(_aligned(multiplier, spec, significands[lane], distance, f"lane_{lane}"))
            multiplier.d.sync += product.eq(Mux(negatives[lane], -magnitude, magnitude))
            products.append(product)
        # Tree.
        dot_product = Signal(signed(width + 1 + (spec.lanes - 1).bit_length()))
        multiplier.d.sync += dot_product.eq(_tree(products))
        # Group accumulator, which is told before what comes.
        exponent_of_tree = delayed(match, matched, 1, "matched")
        control = data.View(TERM_CONTROL, delayed(accumulator, self.control.as_value(), 3, "control"))
        self._accumulate(accumulator, dot_product, (exponent_of_tree, matched), control)

    def _accumulate(
        self, m: Module, dot_product: Signal, exponents: tuple[Value, Value], next_control: data.View
    ) -> None:
        """(S, G) ← (S, G) + (D, e'), in a loop of one cycle: what does not need S is computed a cycle ahead.

        ``exponents`` are those of the terms that ``dot_product`` will hold in the next cycle and in the one after,
        ``next_control`` is that of the first of them.
        """
        spec = self.spec
        next_exponent = exponents[0]
        significand = Signal(signed(spec.accumulator_bits))
        greatest = Signal(EXPONENT_BITS)  # G
        exponent = Signal(EXPONENT_BITS)  # e'
        control = Signal(TERM_CONTROL)
        zero = Signal(init=1)  # S = 0
        empty = Signal(init=1)  # there is no sum that counts: S = 0, or the term is the first of a group
        meets = data.StructLayout(
            {
                "takes": 1,  # e' becomes G, but for the excess
                "distance": signed(EXPONENT_BITS + 1),  # e' - G
                "old_places": len(significand).bit_length(),  # that S goes to the right
                "new_places": len(dot_product).bit_length(),  # that D goes to the right
            }
        )
        met = Signal(meets, init={"takes": 1})
        step = Signal(signed(EXPONENT_BITS + 1))  # the next e' - this one
        m.d.sync += [exponent.eq(next_exponent), control.eq(next_control), step.eq(exponents[1] - next_exponent)]
        # The smaller exponent's side is shifted right.
        old, old_bit = shift_right(m, significand, met.old_places, spec.rounding, "old")
        new, new_bit = shift_right(m, dot_product, met.new_places, spec.rounding, "new")
        total = Signal(signed(max(spec.accumulator_bits, len(dot_product)) + 1))
        aligned = Mux(empty, 0, old) + new
        m.d.comb += total.eq(aligned if spec.rounding == "truncate" else aligned + (~empty & (old_bit | new_bit)))
        # Where G would be without an excess, and how far the next term is from there.
        meeting = Mux(met.takes, exponent, greatest)
        ahead = Signal(signed(EXPONENT_BITS + 1))
        m.d.comb += ahead.eq(step + Mux(met.takes, 0, met.distance))
        # Back into the width of the accumulator, by as few places as possible.
        changes = Signal()
        is_zero = Signal()
        m.d.comb += [changes.eq(control.valid & (dot_product != 0)), is_zero.eq(zero)]
        with m.If(changes):
            m.d.comb += is_zero.eq(total == 0)
            for places in reversed(range(self._most_excess(total) + 1)):
                name = f"excess_{places}"
                rounded, bit = shift_right(m, total, Const(places, EXPONENT_BITS), spec.rounding, name)
                value = Signal(signed(len(total) + 1), name=f"kept_{places}")
                m.d.comb += value.eq(rounded if spec.rounding == "truncate" else rounded + bit)
                above = value[spec.accumulator_bits - 1 :]  # the sign and copies of it, where the value fits
                with m.If(~(above[1:] ^ above[:-1]).any()):
                    m.d.sync += [
                        significand.eq(value),
                        greatest.eq(meeting + places),
                        met.eq(self._met(m, meets, *_difference(m, ahead, places, name), name)),
                    ]
        with m.Else():
            with m.If(control.valid & control.first):
                m.d.sync += significand.eq(0)
                m.d.comb += is_zero.eq(1)
            m.d.sync += met.eq(self._met(m, meets, *_difference(m, next_exponent, greatest, "kept"), "kept"))
        m.d.sync += [zero.eq(is_zero), empty.eq(is_zero)]
        with m.If(is_zero | (next_control.valid & next_control.first)):
            m.d.sync += [empty.eq(1), met.takes.eq(1), met.new_places.eq(0)]
        m.d.comb += [self.sum.significand.eq(significand), self.sum.exponent.eq(greatest)]

    @staticmethod
    def _met(m: Module, layout: data.StructLayout, distance: Value, opposite: Value, name: str) -> Signal:
        """How a term meets the sum, its exponent ``distance`` above G; the most places of a shifter are all."""
        found = Signal(layout, name=name)
        m.d.comb += [found.distance.eq(distance), found.takes.eq(~distance[-1])]
        for places, wanted in ((found.old_places, distance), (found.new_places, opposite)):
            far = wanted[len(places) : -1].any()
            m.d.comb += places.eq(Mux(wanted[-1], 0, wanted[: len(places)] | far.replicate(len(places))))
        return found

    def _most_excess(self, total: Signal) -> int:
        """Places by which a sum may have to be shifted: one more where rounding up makes it as long as it was."""
        return len(total) - self.spec.accumulator_bits + (self.spec.rounding == "nearest_even")


def _shift_left(value: Value, places: Value) -> Value:
    """``value`` · 2^places, places 0 to 4."""
    return Mux(places[2], value << 4, Mux(places[1], Mux(places[0], value << 3, value << 2), value << places[0]))


def _difference(m: Module, left: Value, right: Value | int, name: str) -> tuple[Signal, Signal]:
    """left - right and right - left, signed."""
    shape = signed(EXPONENT_BITS + 1)
    found = Signal(shape, name=f"{name}_distance"), Signal(shape, name=f"{name}_opposite")
    m.d.comb += [found[0].eq(left - right), found[1].eq(right - left)]
    return found


def _tree(values: Sequence[Value]) -> Value:
    """The sum of ``values`` as a balanced tree."""
    level: list[Value] = list(values)
    while len(level) > 1:
        level = [
            level[place] + level[place + 1] if place + 1 < len(level) else level[place]
            for place in range(0, len(level), 2)
        ]
    return level[0]


def _greatest(m: Module, values: list[Value]) -> Value:
    """The largest of ``values``: each against each, four at a time."""
    while len(values) > 1:
        values = [_greatest_of_few(m, values[place : place + 4]) for place in range(0, len(values), 4)]
    return values[0]


def _greatest_of_few(m: Module, values: list[Value]) -> Value:
    """Comparisons have names: an expression that is used twice would be built twice."""
    wins = {}
    for other in range(len(values)):
        for one in range(other):
            wins[one, other] = Signal(name=f"wins_{one}_{other}")
            m.d.comb += wins[one, other].eq(values[one] >= values[other])
    found: Value = Const(0)
    for one, value in enumerate(values):
        # The first of equals wins: it is not below any later one, and above all before it.
        best = [wins[one, later] for later in range(one + 1, len(values))]
        best += [~wins[before, one] for before in range(one)]
        found = found | Mux(Cat(best).all(), value, 0)
    greatest = Signal.like(values[0], name="greatest_of_few")
    m.d.comb += greatest.eq(found)
    return greatest
