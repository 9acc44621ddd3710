"""Shifts to the right with what falls off: towards minus infinity, or to the nearest, of ties the even one."""

from __future__ import annotations

from amaranth.hdl import Const, Module, Mux, Signal, Value, signed, unsigned

from termwise.algorithms.bit_serial import PartialSumRounding


def shift_right(
    module: Module, value: Value, places: Value, rounding: PartialSumRounding, name: str
) -> tuple[Value, Value]:
    """⌊value / 2^places⌋ of the shape of ``value``, and a bit to add to it (0 with ``truncate``).

    ``places`` may be any number: from the width of ``value`` on, what is left is 0 or the sign, and the bit to add is
    that of the exact quotient. The logic is combinational. It is the function of the same name of
    ``termwise.algorithms.reference``.
    """
    shape = value.shape()
    width = shape.width
    stages = width.bit_length()  # of the shifter, which so takes every number up to the width
    near = places[:stages]
    far = Signal(name=f"{name}_far")  # a larger number
    module.d.comb += far.eq(places[stages:].any())
    sign = value[-1] if shape.signed else Const(0)
    quotient = Signal(shape, name=f"{name}_quotient")
    if rounding == "truncate":
        module.d.comb += quotient.eq(Mux(far, _filled(sign, shape), value >> near))
        return quotient, Const(0)
    # Kept with as many places below the point as may fall off: the first is the half, the others are less.
    wide = Signal(signed(2 * width + 1) if shape.signed else unsigned(2 * width + 1), name=f"{name}_wide")
    module.d.comb += wide.eq((value << (width + 1)) >> near)
    half, rest = wide[width], wide[:width].any()
    increment = Signal(name=f"{name}_increment")
    module.d.comb += [
        quotient.eq(Mux(far, _filled(sign, shape), wide >> (width + 1))),
        increment.eq(Mux(far, sign, half & (rest | wide[width + 1]))),
    ]
    return quotient, increment


def _filled(sign: Value, shape: object) -> Value:
    """All bits equal to ``sign``."""
    return Mux(sign, Const(-1, shape), Const(0, shape)) if getattr(shape, "signed", False) else Const(0, shape)
