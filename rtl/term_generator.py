"""The term generator on the border of a row: codes of weights to signed powers of two.

``docs/microarchitecture.md``, section 2.3, defines the digits.

Its tables are made from the ``DataType`` objects of ``termwise.algorithms.datatypes`` and the digits of
``termwise.algorithms.bit_serial``, so that a data type that a user defines needs no line here. Integers need no table:
a radix-4 Booth digit is three bits of the two's complement number.
"""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.bit_serial import BitSerialSpec, booth_digits, fixed_point_digits
from termwise.algorithms.datatypes import DataType, common_unit, datatypes, is_built_in, special_value
from termwise.algorithms.errors import InputError
from termwise.algorithms.processing_element import UnsupportedFormatError
from termwise.rtl.bit_serial import BASE_BITS, DIGIT, weight_terms

SPECIAL_VALUES = 4
"""Entries of the table of special values: 2 bits select one for each group (BitMoD section III-C)."""

SPECIAL_VALUE = data.ArrayLayout(DIGIT, 2)
"""A special value: its digit of term 0 (worth twice as much), then that of term 1."""

DIGIT_BITS = 5
TERM_BITS = 3
MOST_BITS = 8
"""Of the code of a weight."""

NUMBER_BITS = MOST_BITS + 1
"""Of a code less its zero point."""


def digit_constant(digit: int) -> int:
    """The bits of ``DIGIT`` for 0 or ± a power of two of at most 16."""
    magnitude = abs(digit)
    if magnitude & (magnitude - 1) or magnitude > 16:
        raise InputError(f"a digit of {digit}; expected 0 or a signed power of two up to 16")
    return (magnitude != 0) | (digit < 0) << 1 | max(magnitude.bit_length() - 1, 0) << 2


def special_value_bits(datatype: DataType, fixed_point_bits: int) -> int:
    """The entry of the table of special values for ``datatype``: the bits of ``SPECIAL_VALUE``.

    Raises ``InputError`` for a type without a special value and ``UnsupportedFormatError`` for one that is no sum of
    two signed powers of two.
    """
    code = special_code(datatype)
    if code is None:
        raise InputError(f"{datatype.name} has no special value; expected one of BitMoD's data types")
    numerator = datatype.numerators[code]
    assert numerator is not None
    first, second = fixed_point_digits(numerator // common_unit((datatype,)), fixed_point_bits)
    return digit_constant(first) | digit_constant(second) << DIGIT_BITS


def special_code(datatype: DataType) -> int | None:
    """The code that stands for the special value: the one of minus zero; None where there is none."""
    return None if special_value(datatype) is None else 1 << (datatype.bits - 1)


class WeightType:
    """What a term generator must know of data types that differ in their special value alone.

    Attributes:
        name: of the type, without its special value.
        bits: of a code.
        booth: whether terms are Booth digits; else ``table`` holds the digits of every code.
        zero_point: whether the number is code - zero point, codes counting from 0.
        special: the code that the table of special values replaces; None where there is none.
        table: (digit of term 0, digit of term 1) of each code; 0 where the code is no level or the special value.
    """

    def __init__(self, spec: BitSerialSpec, datatype: DataType) -> None:
        self.bits = datatype.bits
        self.zero_point = False
        self.booth = datatype.integer
        self.special = special_code(datatype)
        self.name = datatype.name if self.special is None else datatype.name.rsplit("_", 2)[0]
        self.table: tuple[tuple[int, int], ...] = ()
        self.terms = spec.terms(datatype)
        if not self.booth:
            unit = common_unit((datatype,))
            self.table = tuple(
                (0, 0)
                if numerator is None or code == self.special
                else fixed_point_digits(numerator // unit, spec.fixed_point_bits)
                for code, numerator in enumerate(datatype.numerators)
            )

    @classmethod
    def with_zero_point(cls, bits: int) -> WeightType:
        """Integers of ``bits`` bits less a zero point of as many."""
        made = cls.__new__(cls)
        made.name, made.bits, made.booth, made.zero_point = f"integer{bits}_less_zero_point", bits, True, True
        made.special, made.table, made.terms = None, (), (bits + 2) // 2
        return made

    def digits(self, code: int, zero_point: int = 0) -> tuple[int, ...] | None:
        """Digits of every term of ``code``, the first term first; None for the special value. What hardware equals."""
        if code == self.special:
            return None
        if not self.booth:
            return self.table[code]
        if self.zero_point:
            return booth_digits(code - zero_point, self.bits + 1)
        return booth_digits(code - (code >> (self.bits - 1) << self.bits), self.bits)


def weight_types(spec: BitSerialSpec) -> tuple[WeightType, ...]:
    """Every built-in type that a PE of ``spec`` takes, and integers with a zero point.

    Types with equal tables are one type; those that differ in their special value, too.
    """
    found: dict[object, WeightType] = {}
    for name, datatype in datatypes().items():
        if not is_built_in(name):
            continue
        try:
            made = WeightType(spec, datatype)
        except UnsupportedFormatError:
            continue
        key = made.bits if made.booth else (made.bits, made.table)
        if key not in found or made.special is not None:
            found[key] = made
    return (*found.values(), *(WeightType.with_zero_point(bits) for bits in range(2, MOST_BITS)))


class TermGenerator(wiring.Component):
    """The digit of one term of the weights of a row.

    Latency 1 cycle, one term per cycle, no flow control.

    Ports:
        codes: of the lanes, each in ``code_bits`` bits, what is above the type's own bits being ignored.
        type: index into ``types``. A type or term that does not exist gives no digits.
        term: which term, from 0.
        zero_point: of types that have one.
        selector: of the group's special value.
        special_values: the table of them, programmed while nothing runs.
        weight: ``weight_terms(lanes)``.

    Args:
        spec: of the PE.
        types: the types that it takes.
    """

    latency = 1

    def __init__(self, spec: BitSerialSpec, types: Sequence[WeightType]) -> None:
        if not types:
            raise InputError("a term generator without data types; expected at least one")
        self.spec, self.types = spec, tuple(types)
        self.code_bits = max(entry.bits for entry in types)
        super().__init__(
            {
                "codes": In(data.ArrayLayout(self.code_bits, spec.lanes)),
                "type": In(max((len(self.types) - 1).bit_length(), 1)),
                "term": In(TERM_BITS),
                "zero_point": In(MOST_BITS),
                "selector": In((SPECIAL_VALUES - 1).bit_length()),
                "special_values": In(data.ArrayLayout(SPECIAL_VALUE, SPECIAL_VALUES)),
                "weight": Out(weight_terms(spec.lanes)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        booth = Signal()
        special = Signal(SPECIAL_VALUE)
        m.d.comb += special.eq(self.special_values[self.selector])
        with m.Switch(self.type):
            for index, entry in enumerate(self.types):
                with m.Case(index):
                    m.d.comb += booth.eq(entry.booth)
        # Booth digits stand for 2^0, 2^2, 2^4, 2^6; those of the table for 2^1, then 2^0.
        m.d.sync += self.weight.base.eq(Mux(booth, Cat(Const(0, 1), self.term), ~self.term[0])[:BASE_BITS])
        for lane in range(self.spec.lanes):
            digit = self.weight.digits[lane]
            from_booth = self._booth_digit(m, self.codes[lane], lane)
            from_table = self._table_digit(m, self.codes[lane], special, lane)
            m.d.sync += digit.eq(Mux(booth, from_booth, from_table))
        return m

    def _booth_digit(self, m: Module, code: Value, lane: int) -> Value:
        """Of the two's complement number: its bits 2t + 1, 2t and 2t - 1."""
        extended = Signal(NUMBER_BITS, name=f"extended_{lane}")
        number = Signal(NUMBER_BITS, name=f"number_{lane}")
        less = Signal(MOST_BITS, name=f"less_{lane}")
        terms = Signal(TERM_BITS, name=f"terms_{lane}")
        with m.Switch(self.type):
            for index, entry in enumerate(self.types):
                if entry.booth:
                    with m.Case(index):
                        own = code[: entry.bits]
                        m.d.comb += [
                            extended.eq(own if entry.zero_point else own.as_signed()),
                            less.eq(self.zero_point if entry.zero_point else 0),
                            terms.eq(entry.terms),
                        ]
        if any(entry.zero_point for entry in self.types):
            m.d.comb += number.eq(extended - less)
        else:
            m.d.comb += number.eq(extended)
        three = Signal(3, name=f"three_{lane}")
        padded = Cat(Const(0, 1), number, number[-1])
        m.d.comb += three.eq((padded >> Cat(Const(0, 1), self.term))[:3])
        digit = Signal(DIGIT, name=f"booth_digit_{lane}")
        with m.If(self.term < terms):
            m.d.comb += [
                digit.present.eq(~(three.all() | ~three.any())),
                digit.negative.eq(three[2] & ~three.all()),
                digit.shift.eq((three == 0b011) | (three == 0b100)),
            ]
        return digit.as_value()

    def _table_digit(self, m: Module, code: Value, special: data.View, lane: int) -> Value:
        digits = Signal(SPECIAL_VALUE, name=f"digits_{lane}")
        with m.Switch(self.type):
            for index, entry in enumerate(self.types):
                if entry.booth:
                    continue
                with m.Case(index), m.Switch(code[: entry.bits]):
                    for number, (first, second) in enumerate(entry.table):
                        with m.Case(number):
                            if number == entry.special:
                                m.d.comb += digits.eq(special)
                            else:
                                m.d.comb += digits.eq(digit_constant(first) | digit_constant(second) << DIGIT_BITS)
        digit = Signal(DIGIT, name=f"table_digit_{lane}")
        with m.If(self.term == 0):
            m.d.comb += digit.eq(digits[0])
        with m.Elif(self.term == 1):
            m.d.comb += digit.eq(digits[1])
        return digit.as_value()
