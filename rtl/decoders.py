"""Decoders on the borders of arrays of OliVe's and ANT's PEs (``docs/microarchitecture.md``, sections 2.4 and 2.5).

A code becomes a shifted integer, b · 2^c. Widths, the place of the leading bit, and the biases come from the
``DataType`` objects; ``termwise.algorithms.reference.shifted_integer`` is what the decoders are equal to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.datatypes import DataType
from termwise.algorithms.errors import InputError
from termwise.algorithms.processing_element import UnsupportedFormatError

NARROW_BITS = 4
WIDE_BITS = 8
CENTROID_INDEX_BITS = 4

_ABFLOAT = re.compile(r"abfloat(?P<bits>\d)_e(?P<exponent>\d+)m(?P<significand>\d+)_b(?P<bias>\d+)")


def shifted_integer_layout(bits: int) -> data.StructLayout:
    """b · 2^c of codes of up to ``bits`` bits: b signed, c up to twice the bits below a flint's leading one."""
    return data.StructLayout({"integer": signed(bits), "exponent": (2 * (bits - 2)).bit_length()})


def abfloat_fields(datatype: DataType) -> tuple[int, int]:
    """(bits of the significand, bias) of an abfloat (OliVe section 3). Raises ``InputError`` for another type."""
    found = _ABFLOAT.fullmatch(datatype.name)
    if found is None:
        raise InputError(f"{datatype.name} is no abfloat; expected a name such as abfloat4_e2m1_b2")
    return int(found["significand"]), int(found["bias"])


class ShiftedIntegerDecoder(wiring.Component):
    """A code of an integer, of flint or of an outlier-victim pair as b · 2^c.

    No latency.

    Ports:
        code: in ``bits`` bits; what is above the type's own bits is ignored.
        type: index into ``types``.
        paired: the code is one of an outlier-victim pair: 10…0 marks a victim, its neighbour is an outlier.
        neighbour: the other code of the pair.
        bias: of the outliers' exponents.
        value: ``shifted_integer_layout(bits)``.

    Args:
        types: integers and flint of up to ``bits`` bits.
        outlier: the outlier type, whose bias is the one of the port; None where there are no pairs.
    """

    latency = 0

    def __init__(self, types: Sequence[DataType], outlier: DataType | None) -> None:
        if not types:
            raise InputError("a decoder without data types; expected at least one")
        for datatype in types:
            if not datatype.integer and not datatype.name.startswith("flint"):
                raise UnsupportedFormatError(f"the decoder takes integers and flint; {datatype.name} is neither")
        self.types, self.outlier = tuple(types), outlier
        widest = max(datatype.bits for datatype in (*types, *([] if outlier is None else [outlier])))
        if widest > WIDE_BITS:
            raise InputError(f"a decoder of {widest} bits; expected {WIDE_BITS} at most")
        self.bits = NARROW_BITS if widest <= NARROW_BITS else WIDE_BITS
        self.layout = shifted_integer_layout(self.bits)
        members = {
            "code": In(self.bits),
            "type": In(max((len(self.types) - 1).bit_length(), 1)),
            "value": Out(self.layout),
        }
        if outlier is not None:
            members |= {"paired": In(1), "neighbour": In(self.bits), "bias": In(self.layout["exponent"].width)}
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        normal = Signal(self.layout)
        with m.Switch(self.type):
            for index, datatype in enumerate(self.types):
                decode = _integer if datatype.integer else _flint
                with m.Case(index):
                    m.d.comb += normal.eq(decode(m, self.code, datatype, self.layout))
        if self.outlier is None:
            m.d.comb += self.value.eq(normal)
            return m
        identifier = 1 << (self.outlier.bits - 1)
        victim, outlier = Signal(), Signal()
        m.d.comb += [
            victim.eq(self.paired & (self.code == identifier)),
            outlier.eq(self.paired & (self.neighbour == identifier)),
        ]
        with m.If(victim):
            m.d.comb += self.value.eq(0)
        with m.Elif(outlier):
            m.d.comb += self.value.eq(self._abfloat(m))
        with m.Else():
            m.d.comb += self.value.eq(normal)
        return m

    def _abfloat(self, m: Module) -> data.View:
        """(1.mantissa) · 2^(exponent + bias): the hidden one is always there."""
        assert self.outlier is not None
        significand_bits, _ = abfloat_fields(self.outlier)
        magnitude = self.code[: self.outlier.bits - 1]
        value = Signal(self.layout, name="abfloat")
        one = Cat(magnitude[:significand_bits], Const(1, 2))
        m.d.comb += [
            value.integer.eq(Mux(self.code[self.outlier.bits - 1], -one, one)),
            value.exponent.eq(magnitude[significand_bits:] + self.bias),
        ]
        return value


def _integer(m: Module, code: Value, datatype: DataType, layout: data.StructLayout) -> data.View:
    value = Signal(layout, name=datatype.name)
    m.d.comb += value.integer.eq(code[: datatype.bits].as_signed())
    return value


def _flint(m: Module, code: Value, datatype: DataType, layout: data.StructLayout) -> data.View:
    """Under a leading 0 an integer; under a leading 1 twice the low bits, or 1, by a power of 4."""
    value = Signal(layout, name=datatype.name)
    low_bits = datatype.bits - 2
    low, leading, sign = code[:low_bits], code[low_bits], code[datatype.bits - 1]
    magnitude = Signal(low_bits + 1, name=f"{datatype.name}_magnitude")
    zeros = Signal(range(low_bits + 1), name=f"{datatype.name}_zeros", init=low_bits)
    m.d.comb += zeros.eq(low_bits)
    for place in range(low_bits):  # the highest one counts, so it comes last
        with m.If(low[place]):
            m.d.comb += zeros.eq(low_bits - 1 - place)
    m.d.comb += [
        magnitude.eq(Mux(leading, Mux(low.any(), low << 1, 1), low)),
        value.integer.eq(Mux(sign, -magnitude, magnitude)),
        value.exponent.eq(Mux(leading, zeros << 1, 0)),
    ]
    return value
