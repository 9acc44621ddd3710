"""FP32 arithmetic as IEEE 754 has it: to the nearest, of ties to the even one, with subnormals and infinities.

Each operation is a sequence of steps (section 3 of ``docs/microarchitecture.md`` counts them). The same steps make a
pipeline, with a register behind each, and logic without a register, for the accumulators of one cycle.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.processing_element import (
    ADDITION_CYCLES,
    HALF_CYCLES,
    INTEGER_TO_FLOAT_CYCLES,
    SCALING_CYCLES,
)
from termwise.rtl.processing_element import HALF_OPERAND

FLOAT32 = data.StructLayout({"fraction": 23, "exponent": 8, "negative": 1})

SIGNIFICAND_BITS = 24
EXTRA_BITS = 3
"""Below a significand while it is rounded: half, quarter, and whether anything is left (sticky)."""

INFINITE_EXPONENT = 255
BIAS = 127
ROUNDING_CYCLES = HALF_CYCLES - 1
"""Steps from FP32 to FP16; the output memory takes the last of ``HALF_CYCLES``."""

LEAST_EXPONENT = -149
"""Of a whole number that becomes FP32: the unit of subnormal numbers."""

WIDE_EXPONENT = signed(12)
"""An exponent on its way to the eight bits of the result."""


class Steps:
    """Logic cut into steps; ``keep`` ends one for a value: by a register, or by nothing."""

    def __init__(self, module: Module, name: str, *, registered: bool) -> None:
        self.module, self.name, self.registered = module, name, registered
        self.count = 0

    def signal(self, value: Value, name: str) -> Signal:
        """``value`` under a name, within a step."""
        signal = Signal(value.shape(), name=f"{self.name}_{name}")
        self.module.d.comb += signal.eq(value)
        return signal

    def end(self, **values: Value) -> list[Signal]:
        """The values as the next step sees them."""
        self.count += 1
        kept = []
        for name, value in values.items():
            signal = Signal(value.shape(), name=f"{self.name}_{name}_{self.count}", reset_less=True)
            self.module.d["sync" if self.registered else "comb"] += signal.eq(value)
            kept.append(signal)
        return kept


def leading_zeros(steps: Steps, value: Value, name: str) -> Value:
    """Zeros above the highest one of ``value``; at least its width where there is none."""
    width = 1 << (len(value) - 1).bit_length()
    # Of every piece the count, whose top bit says that the piece is empty; two by two the upper one decides.
    # Each level has names: an expression that is used twice would be built twice.
    padded = steps.signal(Cat(Const(0, width - len(value)), value), f"{name}_zeros_0")
    counts: list[Value] = [~padded[place] for place in range(width)]
    level = 0
    while len(counts) > 1:
        level += 1
        merged: list[Value] = []
        for place in range(0, len(counts), 2):
            low, high = counts[place], counts[place + 1]
            below = Mux(high[-1], low[:-1], high[:-1]) if len(high) > 1 else Const(0, 0)
            count = Cat(below, high[-1] & ~low[-1], high[-1] & low[-1])
            merged.append(steps.signal(count, f"{name}_zeros_{level}_{place // 2}"))
        counts = merged
    return counts[0]


def shift_right_sticky(steps: Steps, value: Value, places: Value, name: str) -> Value:
    """``value`` >> ``places``, the lowest bit set where a one fell off. ``places`` may exceed the width."""
    stages = len(value).bit_length()
    near = places[:stages]
    # What falls off is found beside the shifter, not along it.
    kept_places = (Const(-1, len(value)) << near)[: len(value)]
    fallen = steps.signal((value & ~kept_places).any(), f"{name}_fallen")
    shifted = steps.signal(value >> near, name)
    kept = Cat(shifted[0] | fallen, shifted[1:])
    if len(places) <= stages:
        return kept
    return Mux(places[stages:].any(), value.any(), kept)


def unpack(bits: Value) -> tuple[Value, Value, Value]:
    """(negative, biased exponent from 1, significand of 24 bits) of a finite FP32 number."""
    number = data.View(FLOAT32, bits)
    normal = number.exponent.any()
    return number.negative, Cat(number.exponent[0] | ~normal, number.exponent[1:]), Cat(number.fraction, normal)


def rounded(steps: Steps, negative: Value, exponent: Value, significand: Value) -> Value:
    """FP32 of a ``significand`` of 24 + 3 bits and its biased ``exponent``, 0 where it is subnormal.

    Rounding carries into the exponent, and from the largest number into infinity.
    """
    half, rest = significand[EXTRA_BITS - 1], significand[: EXTRA_BITS - 1].any()
    up = half & (rest | significand[EXTRA_BITS])
    over = exponent >= INFINITE_EXPONENT
    fraction = significand[EXTRA_BITS : EXTRA_BITS + 23]
    sum_ = steps.signal(Cat(fraction, exponent[:8])[:31] + up, "rounded")
    return Cat(Mux(over, Const(INFINITE_EXPONENT << 23, 31), sum_[:31]), negative)


def add(steps: Steps, left: Value, right: Value) -> Value:
    """left + right in ``ADDITION_CYCLES`` steps. A NaN is 0x7fc00000."""
    a, b = data.View(FLOAT32, left), data.View(FLOAT32, right)
    # 1: which magnitude is larger; the distances either way; what is not finite. Nothing behind the comparison but its
    # register: 64 multiplexers would hang on it.
    infinite = [number.exponent.all() for number in (a, b)]
    nan = [one & number.fraction.any() for one, number in zip(infinite, (a, b), strict=True)]
    subtract = a.negative ^ b.negative
    (_, exponent_left, _), (_, exponent_right, _) = unpack(left), unpack(right)
    swap, left, right, far_left, far_right, subtract, special, is_nan = steps.end(
        swap=right[:31] > left[:31],
        left=left,
        right=right,
        far_left=(exponent_left - exponent_right)[:8],
        far_right=(exponent_right - exponent_left)[:8],
        subtract=subtract,
        special=infinite[0] | infinite[1],
        nan=nan[0] | nan[1] | (infinite[0] & infinite[1] & subtract),
    )
    # 2: the larger magnitude first; from a distance of 32 on nothing but a sticky bit is left.
    negative, exponent, significand = unpack(steps.signal(Mux(swap, right, left), "large"))
    _, _, significand_small = unpack(steps.signal(Mux(swap, left, right), "small"))
    far = steps.signal(Mux(swap, far_right, far_left), "far")
    distance, negative, exponent, significand, significand_small, subtract, special, is_nan = steps.end(
        distance=Cat(far[:5], far[5:].any()),
        negative=negative,
        exponent=exponent,
        significand=significand,
        small=significand_small,
        subtract=subtract,
        special=special,
        nan=is_nan,
    )
    # 3: alignment.
    aligned, limit, negative, exponent, significand, subtract, special, is_nan = steps.end(
        aligned=shift_right_sticky(steps, Cat(Const(0, EXTRA_BITS), significand_small), distance, "aligned"),
        limit=Const(1 << 27, 28) >> exponent,
        negative=negative,
        exponent=exponent,
        significand=significand,
        subtract=subtract,
        special=special,
        nan=is_nan,
    )
    # 4: sum or difference, of 28 bits; never negative.
    large_significand = Cat(Const(0, EXTRA_BITS), significand)
    total = (large_significand + Mux(subtract, ~aligned, aligned) + subtract)[: SIGNIFICAND_BITS + EXTRA_BITS + 1]
    total = steps.signal(Cat(total[:-1], total[-1] & ~subtract), "sum")
    # The exponent allows so many places to the left; a one is put where that ends.
    total, marked, negative, exponent, subtract, special, is_nan = steps.end(
        total=total,
        marked=total | limit,
        negative=negative,
        exponent=exponent,
        subtract=subtract,
        special=special,
        nan=is_nan,
    )
    # 5: places to the left that the first one has to go, as far as the exponent allows. The bit above the significand
    # is one place too many: it is counted from there, and the exponent is one more.
    places = leading_zeros(steps, marked, "total")[:5]
    total, places, negative, exponent, special, is_nan = steps.end(
        total=total,
        places=places,
        negative=negative & ~(subtract & ~total.any()),  # what cancels is +0
        exponent=exponent,
        special=special,
        nan=is_nan,
    )
    # 6: normalisation. The significand is the upper 24 of 28 bits now, and 4 bits are below it.
    wide = steps.signal((total << places)[:28], "wide")
    # Where the exponent limits the shift, the number is subnormal: its exponent field is 0.
    subnormal = ~wide[27]
    biased = Mux(subnormal, 0, exponent - places + 1)
    kept = Cat(wide[0] | wide[1], wide[2:])
    kept, biased, negative, special, is_nan = steps.end(
        kept=kept, biased=biased[:9], negative=negative, special=special, nan=is_nan
    )
    # 7: rounding.
    result = rounded(steps, negative, biased, kept)
    infinity = Cat(Const(INFINITE_EXPONENT << 23, 31), negative)
    (result,) = steps.end(result=Mux(is_nan, Const(0x7FC00000, 32), Mux(special, infinity, result)))
    return result


def _zeros_of_subnormal(steps: Steps, bits: Value, name: str) -> Value:
    """Leading zeros of the significand of an FP32 number, which a normal one has not."""
    number = data.View(FLOAT32, bits)
    zeros = leading_zeros(steps, Cat(number.fraction, Const(0, 1)), name)[:5]
    return Mux(number.exponent.any(), 0, zeros)


def multiply(steps: Steps, left: Value, right: Value) -> Value:
    """left · right in ``SCALING_CYCLES`` steps; ``right`` is finite. Infinity · 0 is a NaN, 0x7fc00000."""
    a = data.View(FLOAT32, left)
    negative_left, exponent_left, significand_left = unpack(left)
    negative_right, exponent_right, significand_right = unpack(right)
    special = a.exponent.all()
    # 1: leading zeros, of subnormal numbers.
    significand_left, significand_right, zeros_left, zeros_right, exponent, negative, special, is_nan = steps.end(
        left=significand_left,
        right=significand_right,
        zeros_left=_zeros_of_subnormal(steps, left, "left"),
        zeros_right=_zeros_of_subnormal(steps, right, "right"),
        exponent=_wide(exponent_left + exponent_right - BIAS),
        negative=negative_left ^ negative_right,
        special=special,
        nan=special & (a.fraction.any() | ~right[:31].any()),
    )
    # 2: products of halves, each as wide as the multiplier of any FPGA.
    low, middle_left, middle_right, high, zeros, exponent, negative, special, is_nan = steps.end(
        low=significand_left[:12] * significand_right[:12],
        middle_left=significand_left[12:] * significand_right[:12],
        middle_right=significand_left[:12] * significand_right[12:],
        high=significand_left[12:] * significand_right[12:],
        zeros=zeros_left + zeros_right,
        exponent=exponent,
        negative=negative,
        special=special,
        nan=is_nan,
    )
    # 3: the registers behind the multipliers, which are far from the rest.
    low, middle_left, middle_right, high, zeros, exponent, negative, special, is_nan = steps.end(
        low=low,
        middle_left=middle_left,
        middle_right=middle_right,
        high=high,
        zeros=zeros,
        exponent=exponent,
        negative=negative,
        special=special,
        nan=is_nan,
    )
    # 4: the product of 48 bits; its top bit stands for twice 2^(exponent - BIAS).
    product, zeros, exponent, negative, special, is_nan = steps.end(
        product=(Cat(low, high) + ((middle_left + middle_right) << 12))[:48],
        zeros=zeros,
        exponent=_wide(exponent - zeros),
        negative=negative,
        special=special,
        nan=is_nan,
    )
    # 5: normalisation: the first one comes to the top or to the bit below.
    product, exponent, negative, special, is_nan = steps.end(
        product=(product << zeros)[:48], exponent=exponent, negative=negative, special=special, nan=is_nan
    )
    # 6: the first one at the top. What is below 24 + 3 bits is kept as one bit.
    top = product[-1]
    wide = steps.signal(Mux(top, product, product << 1)[:48], "wide")
    biased = exponent + top
    # Where it is less than 1, the number is subnormal and goes 1 - biased places to the right: ~exponent + (1 or 2).
    below = steps.signal((~exponent + Cat(top, ~top))[:11], "below")
    least = steps.signal(exponent[-1] | (~top & ~exponent.any()), "least")
    kept, biased, below, negative, special, is_nan = steps.end(
        kept=Cat(wide[:22].any(), wide[22:]),
        biased=Mux(least, 0, biased)[:11],
        below=Mux(least, Cat(below[:5], below[5:].any()), 0),
        negative=negative,
        special=special,
        nan=is_nan,
    )
    # 7: subnormal numbers.
    kept, exponent, negative, special, is_nan = steps.end(
        kept=shift_right_sticky(steps, kept, below, "subnormal"),
        exponent=Mux(kept[-1], biased, 0),
        negative=negative,
        special=special,
        nan=is_nan,
    )
    # 8: rounding.
    result = rounded(steps, negative, exponent, kept)
    infinity = Cat(Const(INFINITE_EXPONENT << 23, 31), negative)
    (result,) = steps.end(result=Mux(is_nan, Const(0x7FC00000, 32), Mux(special, infinity, result)))
    return result


def _wide(value: Value) -> Value:
    """``value`` as a wide exponent."""
    return value.as_signed() if value.shape() == WIDE_EXPONENT else (value + Const(0, WIDE_EXPONENT))[:12].as_signed()


def integer_to_float(steps: Steps, number: Value, exponent: Value) -> Value:
    """number · 2^exponent, rounded once, in ``INTEGER_TO_FLOAT_CYCLES`` steps.

    ``number`` is signed, ``exponent`` signed and not below ``LEAST_EXPONENT``.
    """
    width = max(len(number), SIGNIFICAND_BITS)
    # 1: the magnitude. The most negative number has the magnitude 2^(width - 1), which fits. Normalisation ends where
    # the number is subnormal: ``limit`` is a one there, at the bit that goes to the top with the least exponent.
    top = LEAST_EXPONENT + SIGNIFICAND_BITS - 1
    magnitude, limit, exponent, negative = steps.end(
        magnitude=(Mux(number[-1], -number, number) + Const(0, width))[:width],
        limit=Cat(exponent == top - place for place in range(SIGNIFICAND_BITS)),
        exponent=_wide(exponent),
        negative=number[-1],
    )
    # 2: how far the first one is from the top.
    magnitude, places, exponent, negative = steps.end(
        magnitude=magnitude,
        places=leading_zeros(steps, magnitude | limit, "magnitude"),
        exponent=exponent,
        negative=negative,
    )
    # 3: normalisation to 24 + 3 bits and what is below.
    wide = steps.signal((magnitude << places)[:width], "wide")
    bits = SIGNIFICAND_BITS + EXTRA_BITS
    kept = (
        Cat(Const(0, bits - width), wide)
        if width <= bits
        else Cat(wide[: width - bits + 1].any(), wide[width - bits + 1 :])
    )
    biased = steps.signal(_wide(exponent - places + (BIAS + width - 1)), "biased")
    kept, biased, negative = steps.end(kept=kept, biased=Mux(wide[-1], biased, 0)[:11], negative=negative)
    # 4: rounding.
    (result,) = steps.end(result=rounded(steps, negative, biased, kept))
    return result


def to_half(steps: Steps, number: Value) -> Value:
    """FP16 of an FP32 ``number``, rounded once, in ``ROUNDING_CYCLES`` steps."""
    value = data.View(FLOAT32, number)
    # 1: 11 + 3 bits; shifted further where the result is subnormal, by up to 15 places: what is below is less than a
    # quarter of the least FP16 number, which a sticky bit tells as well.
    normal = BIAS - 15 + 1  # the exponent of the least normal FP16 number
    exponent = value.exponent
    significand = steps.signal(Cat(value.fraction[:11].any(), value.fraction[11:], exponent.any()), "significand")
    shifted = shift_right_sticky(steps, significand, (normal - exponent[:4])[:4], "subnormal")
    far = steps.signal(exponent < normal - 15, "far")
    least = steps.signal(exponent < normal, "least")
    special = exponent.all()
    kept, biased, negative, infinite, is_nan = steps.end(
        kept=Mux(far, significand.any(), Mux(least, shifted, significand)),
        biased=Mux(least, 0, exponent - (normal - 1))[:5],
        negative=value.negative,
        infinite=exponent >= normal + 30,
        nan=special & value.fraction.any(),
    )
    # 2: rounding.
    up = kept[2] & (kept[:2].any() | kept[3])
    magnitude = (Cat(kept[3:13], biased) + up)[:15]
    magnitude = Mux(is_nan, Const(0x7E00, 15), Mux(infinite, Const(0x7C00, 15), magnitude))
    (result,) = steps.end(result=Cat(magnitude, negative))
    return result


def half_to_float(steps: Steps, operand: data.View) -> Value:
    """FP32 of a ``HALF_OPERAND``, exactly, without a step: zeros before the significand make the exponent less."""
    zeros = leading_zeros(steps, operand.significand, "significand")[:4]
    exponent = operand.exponent + (BIAS - 15) - zeros
    fraction = (operand.significand << zeros)[:10]
    nonzero = operand.significand.any()
    return Cat(Const(0, 13), Mux(nonzero, fraction, 0), Mux(nonzero, exponent[:8], 0), operand.sign)


class Float32Adder(wiring.Component):
    """left + right. Latency 7 cycles, a sum per cycle, no flow control. Ports: FP32 numbers."""

    latency = ADDITION_CYCLES

    def __init__(self) -> None:
        super().__init__({"left": In(32), "right": In(32), "result": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        steps = Steps(m, "sum", registered=True)
        m.d.comb += self.result.eq(add(steps, self.left, self.right))
        assert steps.count == self.latency
        return m


class Float32Multiplier(wiring.Component):
    """left · right. Latency 7 cycles, a product per cycle, no flow control. Ports: FP32 numbers, ``right`` finite."""

    latency = SCALING_CYCLES

    def __init__(self) -> None:
        super().__init__({"left": In(32), "right": In(32), "result": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        steps = Steps(m, "product", registered=True)
        m.d.comb += self.result.eq(multiply(steps, self.left, self.right))
        assert steps.count == self.latency
        return m


class IntegerToFloat32(wiring.Component):
    """number · 2^exponent as FP32, rounded once. Latency 4 cycles, a number per cycle, no flow control.

    Ports: ``number``, signed, ``bits`` wide; ``exponent``, signed, at least -149; ``result``, FP32.
    """

    latency = INTEGER_TO_FLOAT_CYCLES

    def __init__(self, bits: int) -> None:
        super().__init__({"number": In(signed(bits)), "exponent": In(signed(10)), "result": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        steps = Steps(m, "float", registered=True)
        m.d.comb += self.result.eq(integer_to_float(steps, self.number, self.exponent))
        assert steps.count == self.latency
        return m


class Float32ToHalf(wiring.Component):
    """FP16 of an FP32 number, rounded once. Latency 2 cycles, a number per cycle, no flow control."""

    latency = ROUNDING_CYCLES

    def __init__(self) -> None:
        super().__init__({"number": In(32), "result": Out(16)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        steps = Steps(m, "half", registered=True)
        m.d.comb += self.result.eq(to_half(steps, self.number))
        assert steps.count == self.latency
        return m


class HalfToFloat32(wiring.Component):
    """FP32 of a finite FP16 number. No latency. Ports: ``operand``: ``HALF_OPERAND``; ``result``: FP32."""

    latency = 0

    def __init__(self) -> None:
        super().__init__({"operand": In(HALF_OPERAND), "result": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.result.eq(half_to_float(Steps(m, "half", registered=False), self.operand))
        return m
