from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from amaranth.hdl import Module, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import Out

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.datatypes import DataType, common_unit, get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.outlier_victim import pairs_of_types
from termwise.algorithms.processing_element import UnsupportedFormatError
from termwise.algorithms.reference import shifted_integer
from termwise.rtl.borders import CENTROIDS, DictionaryRowBorder
from termwise.rtl.compiled_model import CompiledModel
from termwise.rtl.decoders import CENTROID_INDEX_BITS, ShiftedIntegerDecoder, abfloat_fields
from termwise.rtl.dictionary import Operation
from termwise.rtl.proof import DisprovedError, prove
from termwise.rtl.term_generator import (
    SPECIAL_VALUE,
    SPECIAL_VALUES,
    TermGenerator,
    WeightType,
    special_value_bits,
    weight_types,
)

SPEC = BitSerialSpec(lanes=1)
NARROW = tuple(map(get_datatype, ("int4", "flint4", "int3", "flint3", "int2")))
WIDE = tuple(map(get_datatype, ("int8", "flint8", "int5", "int6", "int7", "flint5", "flint6", "flint7")))
OUTLIERS = tuple(map(get_datatype, ("abfloat4_e2m1_b2", "abfloat8_e4m3_b4", "abfloat8_e2m5_b2")))


def _expected(datatype: DataType, code: int, bias: int | None = None) -> tuple[int, int] | None:
    """(b, c) of a code by the reference; None where it is no level."""
    if datatype.numerators[code] is None:
        return None
    integer, exponent = shifted_integer(datatype, code)
    return integer, exponent + (0 if bias is None else bias - abfloat_fields(datatype)[1])


class DecoderIsItsTable(wiring.Component):
    """``holds``: for codes that are levels, the decoder's output is that of the reference."""

    def __init__(self, decoder: ShiftedIntegerDecoder, planted_error: bool = False) -> None:
        self.decoder, self.planted_error = decoder, planted_error
        members = {name: member for name, member in decoder.signature.members.items() if name != "value"}
        super().__init__({**members, "holds": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.decoder = decoder = self.decoder
        for name in decoder.signature.members:
            if name != "value":
                m.d.comb += getattr(decoder, name).eq(getattr(self, name))
        expected = Signal(decoder.layout)
        known = Signal()
        plain = Signal(init=1)
        if decoder.outlier is not None:
            identifier = 1 << (decoder.outlier.bits - 1)
            m.d.comb += plain.eq(~self.paired | ((self.code != identifier) & (self.neighbour != identifier)))
            with m.If(self.paired & (self.code == identifier)):
                m.d.comb += known.eq(1)
            with m.Elif(~plain):
                _, own_bias = abfloat_fields(decoder.outlier)
                for code in range(1 << decoder.outlier.bits):
                    pair = _expected(decoder.outlier, code)
                    if pair is not None:
                        with m.If(self.code == code):
                            exponent = pair[1] - own_bias + self.bias
                            m.d.comb += [known.eq(1), expected.integer.eq(pair[0]), expected.exponent.eq(exponent)]
        with m.If(plain), m.Switch(self.type):
            for index, datatype in enumerate(decoder.types):
                with m.Case(index), m.Switch(self.code[: datatype.bits]):
                    for code in range(1 << datatype.bits):
                        pair = _expected(datatype, code)
                        if pair is not None:
                            with m.Case(code):
                                m.d.comb += [
                                    known.eq(1),
                                    expected.integer.eq(pair[0] + self.planted_error * (code == 5)),
                                ]
                                m.d.comb += expected.exponent.eq(pair[1])
        m.d.comb += self.holds.eq(~known | (decoder.value == expected))
        return m


@pytest.mark.parametrize(
    ("types", "outlier"),
    [(NARROW, None), (NARROW, OUTLIERS[0]), (WIDE, OUTLIERS[1]), (WIDE, OUTLIERS[2])],
    ids=["flint", "pairs of 4 bits", "pairs of 8 bits, E4M3", "pairs of 8 bits, E2M5"],
)
def test_decoders_are_proved_equal_to_the_data_types(types: tuple[DataType, ...], outlier: DataType | None) -> None:
    prove(DecoderIsItsTable(ShiftedIntegerDecoder(types, outlier)))


def test_a_planted_error_is_found() -> None:
    with pytest.raises(DisprovedError, match=r"code = "):
        prove(DecoderIsItsTable(ShiftedIntegerDecoder(NARROW, None), planted_error=True))


@pytest.mark.parametrize("name", ["olive-w4", "olive-w8"])
def test_pairs_decode_to_the_levels_of_the_format(name: str) -> None:
    """All codes, beside every neighbour, of every choice of a matrix."""
    choices = pairs_of_types(get_format(name))
    decoder = ShiftedIntegerDecoder([normal for normal, _ in choices], choices[0][1])
    model = CompiledModel(decoder)
    for index, (normal, outlier) in enumerate(choices):
        codes = np.arange(1 << normal.bits)
        code, neighbour = (part.ravel() for part in np.meshgrid(codes, codes))
        identifier = 1 << (normal.bits - 1)
        bias = abfloat_fields(outlier)[1]
        found = model.run({"code": code, "neighbour": neighbour, "paired": 1, "bias": bias, "type": index})["value"]
        sign = 1 << (decoder.bits - 1)
        integers = ((found & ((1 << decoder.bits) - 1)) ^ sign) - sign
        levels = integers << (found >> decoder.bits)
        compared = 0
        for own, other, level in zip(code.tolist(), neighbour.tolist(), levels.tolist(), strict=True):
            datatype = outlier if other == identifier else normal
            numerator = 0 if own == identifier else datatype.numerators[own]
            if numerator is not None:
                compared += 1
                assert level == numerator, (datatype.name, own, other)
        assert compared > len(code) / 2


def test_decoders_refuse_what_they_cannot_decode() -> None:
    with pytest.raises(InputError, match="without data types"):
        ShiftedIntegerDecoder([], None)
    with pytest.raises(UnsupportedFormatError, match="nf4 is neither"):
        ShiftedIntegerDecoder([get_datatype("nf4")], None)
    with pytest.raises(InputError, match="int8 is no abfloat"):
        abfloat_fields(get_datatype("int8"))


class TermsAddUpToNumerators(wiring.Component):
    """``holds``: the digits of all terms, each times its power of two, sum to the numerator of the data type."""

    def __init__(self, types: tuple[WeightType, ...], levels: tuple[tuple[int | None, ...], ...]) -> None:
        self.generators = [TermGenerator(SPEC, types) for _ in range(5)]
        self.types, self.levels = types, levels
        members = {
            name: member
            for name, member in self.generators[0].signature.members.items()
            if name not in ("term", "weight")
        }
        super().__init__({**members, "holds": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        total = Signal(signed(16))
        parts = []
        held = {}
        for term, generator in enumerate(self.generators):
            m.submodules[f"term_{term}"] = generator
            m.d.comb += generator.term.eq(term)
            for name in self.signature.members:
                if name != "holds":
                    m.d.comb += getattr(generator, name).eq(getattr(self, name))
            digit = generator.weight.digits[0]
            magnitude = Signal(12, name=f"magnitude_{term}")
            m.d.comb += magnitude.eq((digit.present << digit.shift) << generator.weight.base)
            signed_part = Signal(signed(13), name=f"part_{term}")
            m.d.comb += signed_part.eq(magnitude)
            with m.If(digit.negative):
                m.d.comb += signed_part.eq(-magnitude)
            parts.append(signed_part)
        m.d.comb += total.eq(sum(parts))
        for name in self.signature.members:
            if name != "holds":
                port = getattr(self, name)
                value = port.as_value() if isinstance(port, data.View) else port
                held[name] = Signal(len(value), name=f"held_{name}")
                m.d.sync += held[name].eq(value)
        special = data.View(
            SPECIAL_VALUE,
            data.View(data.ArrayLayout(SPECIAL_VALUE.size, SPECIAL_VALUES), held["special_values"])[held["selector"]],
        )
        values = []
        for place in range(2):
            value = Signal(signed(12), name=f"special_{place}")
            magnitude = special[place].present << special[place].shift
            m.d.comb += value.eq(magnitude)
            with m.If(special[place].negative):
                m.d.comb += value.eq(-magnitude)
            values.append(value)
        expected, known = Signal(signed(16)), Signal()
        with m.Switch(held["type"]):
            for index, (entry, levels) in enumerate(zip(self.types, self.levels, strict=True)):
                with m.Case(index), m.Switch(held["codes"][: entry.bits]):
                    for code, level in enumerate(levels):
                        if level is None and code != entry.special:
                            continue
                        with m.Case(code):
                            m.d.comb += known.eq(held["zero_point"] < 1 << entry.bits if entry.zero_point else 1)
                            if code == entry.special:
                                m.d.comb += expected.eq(2 * values[0] + values[1])
                            else:
                                m.d.comb += expected.eq(level - (held["zero_point"] if entry.zero_point else 0))
        m.d.comb += self.holds.eq(~known | (total == expected))
        return m


def _levels(entry: WeightType) -> tuple[int | None, ...]:
    """Numerators of every code, straight from the data type."""
    if entry.zero_point:
        return tuple(range(1 << entry.bits))
    names = {"bitmod_fp3": "fp3_e2m0", "bitmod_fp4": "fp4_e2m1"}
    datatype = get_datatype(names.get(entry.name, entry.name))
    unit = common_unit((datatype,))
    return tuple(None if numerator is None else numerator // unit for numerator in datatype.numerators)


def test_every_data_type_of_the_pe_is_proved() -> None:
    types = weight_types(SPEC)
    assert {"bitmod_fp3", "bitmod_fp4", "int8", "flint4", "fp5_e2m2", "integer4_less_zero_point"} <= {
        entry.name for entry in types
    }
    prove(TermsAddUpToNumerators(types, tuple(map(_levels, types))), cycles=1)


def test_a_wrong_level_in_the_table_is_found() -> None:
    types = weight_types(SPEC)
    levels = [list(_levels(entry)) for entry in types]
    place = [entry.name for entry in types].index("bitmod_fp4")
    levels[place][5] = 7
    with pytest.raises(DisprovedError, match="codes = "):
        prove(TermsAddUpToNumerators(types, tuple(map(tuple, levels))), cycles=1)


def test_terms_come_in_the_order_of_the_reference() -> None:
    """Numerics ``paper`` depends on it: every code of every type, term by term."""
    types = weight_types(SPEC)
    generator = TermGenerator(SPEC, types)
    model = CompiledModel(generator)
    stimulus, expected = [], []
    for index, entry in enumerate(types):
        for zero_point in (0, 1, (1 << entry.bits) - 1) if entry.zero_point else (0,):
            for code in range(1 << entry.bits):
                digits = entry.digits(code, zero_point)
                if digits is None:
                    continue
                for term in range(entry.terms):
                    stimulus.append((index, zero_point, code, term))
                    expected.append((digits[term], 2 * term if entry.booth else 1 - term))
    index, zero_point, code, term = np.array(stimulus).T
    ports = {"type": index, "zero_point": zero_point, "codes": code, "term": term}
    weight = model.run({name: np.append(values, 0) for name, values in ports.items()})["weight"][1:]
    present, negative, shift, base = weight & 1, weight >> 1 & 1, weight >> 2 & 7, weight >> 5
    found = present * np.where(negative, -1, 1) << shift
    wanted = np.array(expected)
    wrong = np.flatnonzero((found != wanted[:, 0]) | (base != wanted[:, 1]))
    assert not wrong.size, (types[index[wrong[0]]].name, stimulus[wrong[0]], found[wrong[0]], wanted[wrong[0]])


@pytest.mark.parametrize("name", ["bitmod-w4g128", "bitmod-w3g128"])
def test_special_values_are_those_of_the_format_or_any_other(name: str) -> None:
    types = weight_types(SPEC)
    chosen = get_format(name).datatypes
    index = [entry.name for entry in types].index(chosen[0].name.rsplit("_", 2)[0])
    model = CompiledModel(TermGenerator(SPEC, types))
    table = sum(
        special_value_bits(datatype, SPEC.fixed_point_bits) << SPECIAL_VALUE.size * place
        for place, datatype in enumerate(chosen)
    )
    for selector, datatype in enumerate(chosen):
        ports = {"type": index, "codes": 1 << (datatype.bits - 1), "selector": selector, "special_values": table}
        weight = model.run({**ports, "term": [0, 1, 0]})["weight"][1:]
        values = [int((-1) ** (word >> 1 & 1) * (word & 1) << (word >> 2 & 7) << (word >> 5)) for word in weight]
        assert sum(values) == datatype.numerators[1 << (datatype.bits - 1)], datatype.name


def test_what_a_row_does_with_indices_centroids_and_outliers() -> None:
    """Every code, marked or not; at the end of a row every centroid, then as many outliers as the row has."""
    model = CompiledModel(DictionaryRowBorder())
    codes = np.arange(2 << CENTROID_INDEX_BITS)
    found = model.run({"codes": np.append(codes, 0), "ends": 0})["weight"][1:]
    marked = codes >> CENTROID_INDEX_BITS
    operation, index = found & 7, found >> 3 & 15
    assert (operation == np.where(marked, Operation.CAPTURE, Operation.BIN)).all()
    assert (index == codes % CENTROIDS).all()
    for own, most in ((0, 0), (0, 2), (3, 5), (5, 5)):
        end = [1 | number << 2 for number in range(CENTROIDS)] + [2] * most + [0]
        values = list(range(1000, 1000 + len(end)))
        model.run({"ends": 0}, 1)
        ports = {"ends": 1, "outliers": own | most << 16, "row_end": end, "centroid": values, "outlier": values}
        found = np.append(model.run(ports)["weight"][1:], model.run({"ends": 0}, 1)["weight"])
        wanted = [Operation.CENTROID] * CENTROIDS + [Operation.OUTLIER] * own + [Operation.NOTHING] * (most - own + 1)
        assert (found & 7).tolist() == wanted
        assert (found[:CENTROIDS] >> 3 & 15).tolist() == list(range(CENTROIDS))
        assert (found[: CENTROIDS + own] >> 7).tolist() == values[: CENTROIDS + own]
