"""What the arithmetic of every PE kind has in common (``docs/microarchitecture.md``, sections 2 and 3)."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import data

STAGES_OUTSIDE = 2
"""Stages that are not in the PE: the memory's output register, and decoders and operand registers on the borders."""

TERM_CONTROL = data.StructLayout({"valid": 1, "first": 1, "last": 1})
"""What accompanies the operands of a term.

valid: there is a term; without it nothing changes.
first: it is the first of its group: the accumulator starts anew.
last: it is the last of its group: the sum is complete.
"""

HALF_OPERAND = data.StructLayout({"sign": 1, "exponent": 5, "significand": 11})
"""A finite FP16 number (-1)^sign · significand · 2^(exponent - 25), exponent 1 to 30 (section 2.1)."""


def decode_half(module: Module, bits: Value) -> data.View:
    """The ``HALF_OPERAND`` of the 16 ``bits`` of a finite FP16 number, without a register."""
    operand = Signal(HALF_OPERAND)
    normal = bits[10:15].any()
    module.d.comb += [
        operand.sign.eq(bits[15]),
        operand.exponent.eq(bits[10:15] | ~normal),
        operand.significand.eq(Cat(bits[:10], normal)),
    ]
    return operand


def delayed(module: Module, value: Value, cycles: int, name: str) -> Value:
    """``value`` as it was ``cycles`` cycles ago; with 0 itself."""
    for cycle in range(cycles):
        later = Signal.like(value, name=f"{name}_{cycle + 1}")
        module.d.sync += later.eq(value)
        value = later
    return value
