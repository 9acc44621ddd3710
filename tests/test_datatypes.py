"""Data types: the published tables, other libraries' definitions, and laws that hold for every type."""

from __future__ import annotations

import itertools
import math
import pickle
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms.datatypes import (
    ROUNDINGS,
    DataType,
    datatypes,
    get_datatype,
    signed_digit_weight,
    special_value,
    special_value_type,
)
from termwise.algorithms.errors import InputError

FP4 = {0, 0.5, 1, 1.5, 2, 3, 4, 6}
FP3 = {0, 1, 2, 4}


def both_signs(magnitudes: set[float]) -> set[float]:
    return magnitudes | {-magnitude for magnitude in magnitudes}


@pytest.mark.parametrize(
    ("name", "levels", "maximum"),
    [  # BitMoD Table IV
        ("fp3_e2m0", both_signs(FP3), 4),
        ("bitmod_fp3_er_pos", both_signs(FP3) | {3}, 4),
        ("bitmod_fp3_er_neg", both_signs(FP3) | {-3}, 4),
        ("bitmod_fp3_ea_pos", both_signs(FP3) | {6}, 6),
        ("bitmod_fp3_ea_neg", both_signs(FP3) | {-6}, 6),
        ("fp4_e2m1", both_signs(FP4), 6),
        ("bitmod_fp4_er_pos", both_signs(FP4) | {5}, 6),
        ("bitmod_fp4_er_neg", both_signs(FP4) | {-5}, 6),
        ("bitmod_fp4_ea_pos", both_signs(FP4) | {8}, 8),
        ("bitmod_fp4_ea_neg", both_signs(FP4) | {-8}, 8),
        # ANT, signed 4-bit flint, and its 3-bit sibling
        ("flint4", both_signs({0, 1, 2, 3, 4, 6, 8, 16}), 16),
        ("flint3", both_signs({0, 1, 2, 4}), 4),
        # OliVe section 3.3
        ("abfloat4_e2m1_b2", both_signs({12, 16, 24, 32, 48, 64, 96}), 96),
        ("abfloat4_e2m1_b3", both_signs({24, 32, 48, 64, 96, 128, 192}), 192),
    ],
)
def test_levels_are_the_published_ones(name: str, levels: set[float], maximum: float) -> None:
    assert set(get_datatype(name).levels) == levels
    assert get_datatype(name).maximum == maximum


def test_flint_codes_are_the_published_ones() -> None:
    assert get_datatype("flint4").numerators[:8] == (0, 1, 2, 3, 16, 8, 4, 6)


def test_abfloat_code_0101_is_48() -> None:
    assert get_datatype("abfloat4_e2m1_b2").numerators[0b0101] == 48


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_symmetric_twos_complement(bits: int) -> None:
    numerators = get_datatype(f"int{bits}").numerators
    for code, numerator in enumerate(numerators):
        value = code - (code >> (bits - 1) << bits)
        assert numerator == (None if value == -(1 << (bits - 1)) else value)


LIBRARIES = [
    ("fp4_e2m1", ml_dtypes.float4_e2m1fn, gfloat.formats.format_info_ocp_e2m1),
    ("fp6_e2m3", ml_dtypes.float6_e2m3fn, gfloat.formats.format_info_ocp_e2m3),
    ("fp6_e3m2", ml_dtypes.float6_e3m2fn, gfloat.formats.format_info_ocp_e3m2),
    ("fp8_e4m3", ml_dtypes.float8_e4m3fn, gfloat.formats.format_info_ocp_e4m3),
    ("fp8_e5m2", ml_dtypes.float8_e5m2, gfloat.formats.format_info_ocp_e5m2),
    ("int2", ml_dtypes.int2, None),
    ("int4", ml_dtypes.int4, None),
    ("int8", np.int8, None),
    ("mxint8", None, gfloat.formats.format_info_ocp_int8),
    ("mxfp4", ml_dtypes.float4_e2m1fn, gfloat.formats.format_info_ocp_e2m1),
    ("mxfp8_e4m3", ml_dtypes.float8_e4m3fn, gfloat.formats.format_info_ocp_e4m3),
]


def all_codes(datatype: DataType) -> NDArray[np.uint8]:
    return np.arange(1 << datatype.bits, dtype=np.uint8)


@pytest.mark.parametrize(("name", "theirs", "info"), LIBRARIES)
def test_every_code_has_the_value_of_other_libraries(name: str, theirs: type | None, info: Any) -> None:
    """Minus zero, infinities and NaN among them."""
    ours = get_datatype(name)
    values = ours.decode(all_codes(ours))
    others = []
    if theirs is not None:
        others.append(all_codes(ours).view(theirs).astype(np.float64))
    if info is not None:
        others.append(np.array([gfloat.decode_float(info, int(code)).fval for code in all_codes(ours)]))
    for other in others:
        np.testing.assert_array_equal(values, other)
        zeros = values == 0
        np.testing.assert_array_equal(np.signbit(values[zeros]), np.signbit(other[zeros]))


@pytest.mark.parametrize(("name", "theirs"), [(name, theirs) for name, theirs, info in LIBRARIES if theirs and info])
def test_rounding_to_even_is_that_of_ml_dtypes_for_every_fp16_number(name: str, theirs: type) -> None:
    """Within the range; beyond it ours saturates, as a quantizer must."""
    ours = get_datatype(name)
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = values[np.abs(values) <= ours.maximum]
    np.testing.assert_array_equal(ours.encode(values, "even"), values.astype(theirs).view(np.uint8))


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp6_e3m2", "mxint8", "int4", "fp8_e4m3"])
def test_rounding_modes_are_what_they_say(name: str) -> None:
    """Against fractions: every level, every midpoint, and a value on either side of both."""
    datatype = get_datatype(name)
    levels = [Fraction(level) for level in datatype.levels]
    points = levels + [(low + high) / 2 for low, high in itertools.pairwise(levels)]
    points += [point + sign * Fraction(1, 1 << 20) for point in points for sign in (1, -1)]
    points += [2 * levels[0], 2 * levels[-1]]
    for rounding in ROUNDINGS:
        codes = datatype.encode(np.array([float(point) for point in points]), rounding)
        for point, code in zip(points, codes, strict=True):
            value = Fraction(float(datatype.values[code]))
            below = max((level for level in levels if level <= point), default=levels[0])
            above = min((level for level in levels if level >= point), default=levels[-1])
            if rounding == "floor":
                assert value == (below if point > 0 else above)
            elif point - below != above - point:
                assert value == min(below, above, key=lambda level: abs(level - point))
            elif below != above:
                expected = {"lower": below, "nearest": max(below, above, key=abs)}
                assert (code % 2 == 0) if rounding == "even" else (value == expected[rounding])


def test_nf4_is_the_quantile_table_of_its_paper() -> None:
    """QLoRA equation 4 and section 3: 8 quantiles below zero and 9 above, from the offset 0.9677083, over the largest.

    The published table is in FP32, and its quantiles were computed in single precision: half a unit in the sixth place.
    """
    offset = 0.9677083
    normal = NormalDist()
    positive = [normal.inv_cdf(offset + (0.5 - offset) * index / 8) for index in range(8)]
    negative = [-normal.inv_cdf(offset + (0.5 - offset) * index / 7) for index in range(7)]
    expected = np.array(sorted([*positive, 0.0, *negative])) / max(positive)
    np.testing.assert_allclose(get_datatype("nf4").values, expected, atol=5e-7)
    assert all(np.float32(level) == level for level in get_datatype("nf4").levels)


@pytest.mark.parametrize(
    ("name", "least", "count", "greatest"),
    [("abfloat8_e4m3_b4", 144, 64, 32768), ("abfloat8_e2m5_b2", 132, 127, 2016)],
)
def test_8_bit_outliers_begin_beyond_int8(name: str, least: int, count: int, greatest: int) -> None:
    positive = [level for level in get_datatype(name).levels if level > 0]
    assert (positive[0], len(positive), positive[-1]) == (least, count, greatest)


@pytest.mark.parametrize(("name", "magnitudes"), [("pot3", {0, 1, 2, 4}), ("pot4", {0, 1, 2, 4, 8, 16, 32, 64})])
def test_powers_of_two(name: str, magnitudes: set[float]) -> None:
    assert set(get_datatype(name).levels) == both_signs(magnitudes)


@pytest.mark.parametrize(
    ("name", "special"),
    [("bitmod_fp3_sv_pos_7", 7), ("bitmod_fp4_sv_neg_2.5", -2.5), ("bitmod_fp4_sv_pos_15.5", 15.5)],
)
def test_a_special_value_of_ones_own_is_a_type(name: str, special: float) -> None:
    datatype = get_datatype(name)
    assert datatype.name == name
    assert datatype.values[1 << (datatype.bits - 1)] == special_value(datatype) == special
    plain = get_datatype(f"fp{datatype.bits}_e2m{datatype.bits - 3}")
    assert set(datatype.levels) == set(plain.levels) | {special}


def test_the_papers_special_values_have_their_own_names() -> None:
    assert special_value_type(4, -5).name == "bitmod_fp4_er_neg"
    assert get_datatype("bitmod_fp3_sv_pos_6").name == "bitmod_fp3_ea_pos"
    assert special_value(get_datatype("int4")) is None


def test_nan_without_a_code_is_refused() -> None:
    with pytest.raises(InputError, match="fp4_e2m1 has no code for NaN"):
        get_datatype("fp4_e2m1").encode(np.array([math.nan]))
    assert (
        get_datatype("fp8_e5m2").decode(get_datatype("fp8_e5m2").encode(np.array([math.nan, -math.inf])))[1]
        == -math.inf
    )


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [  # exponent bias 1 and 3, as in FP6; no library has these two
        ("fp5_e2m2", {0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7}),
        ("fp5_e3m1", {0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24}),
        ("flint5", {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64}),
    ],
)
def test_levels_without_a_library_are_written_out(name: str, magnitudes: set[float]) -> None:
    assert set(get_datatype(name).levels) == both_signs(magnitudes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_agree_with_ml_dtypes(bits: int) -> None:
    theirs = getattr(ml_dtypes, f"int{bits}", np.int8)
    for code, numerator in enumerate(get_datatype(f"int{bits}").numerators):
        if numerator is not None:
            assert int(np.array(numerator).astype(theirs).view(np.uint8)) & ((1 << bits) - 1) == code


@pytest.mark.parametrize("datatype", datatypes().values(), ids=lambda datatype: datatype.name)
class TestEveryType:
    def test_name_parses_back(self, datatype: DataType) -> None:
        assert get_datatype(datatype.name) is datatype

    def test_codes_and_levels_are_one_to_one(self, datatype: DataType) -> None:
        decoded = [datatype.numerators[code] for code in datatype.sorted_codes]
        assert decoded == list(datatype.sorted_numerators)
        assert len(set(datatype.sorted_codes)) == len(datatype.sorted_codes)

    def test_encoding_what_is_decoded_gives_the_code(self, datatype: DataType) -> None:
        """Every code: also minus zero, infinities, NaN, and codes that mean nothing."""
        for rounding in ROUNDINGS:
            np.testing.assert_array_equal(
                datatype.encode(datatype.decode(all_codes(datatype)), rounding), all_codes(datatype)
            )

    def test_values_are_those_of_the_levels(self, datatype: DataType) -> None:
        numbers = [datatype.values[code] for code in datatype.sorted_codes]
        assert numbers == list(datatype.levels)

    def test_levels_ascend(self, datatype: DataType) -> None:
        assert list(datatype.levels) == sorted(set(datatype.levels))

    def test_terms_suffice_for_every_level(self, datatype: DataType) -> None:
        least = max(signed_digit_weight(numerator) for numerator in datatype.sorted_numerators)
        assert datatype.terms >= least

    def test_a_copy_from_another_process_is_equal(self, datatype: DataType) -> None:
        assert pickle.loads(pickle.dumps(datatype)) == datatype

    def test_a_source_is_named(self, datatype: DataType) -> None:
        assert datatype.source


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("int8", 4),
        ("int6", 3),
        ("int5", 3),
        ("bitmod_fp4_ea_pos", 2),
        ("bitmod_fp4_er_neg", 2),
        ("bitmod_fp3_ea_neg", 2),
    ],
)
def test_terms_are_the_cycles_of_bitmod(name: str, terms: int) -> None:
    assert get_datatype(name).terms == terms


@pytest.mark.parametrize("value", range(-70, 71))
def test_signed_digit_weight_is_the_least(value: int) -> None:
    """Against a search over all sums of at most three signed powers of two."""
    powers = [sign << exponent for exponent in range(9) for sign in (1,)]
    powers += [-power for power in powers]
    sums = {0: 0}
    for count in (1, 2, 3, 4):
        for known in list(sums):
            for power in powers:
                sums.setdefault(known + power, count)
    assert signed_digit_weight(value) == sums[value]


def test_an_unknown_type_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'fp4_e2m1'"):
        get_datatype("fp4_e2m1x")


def test_two_codes_for_one_level_are_refused() -> None:
    with pytest.raises(ValueError, match="two codes"):
        DataType(name="x", bits=1, numerators=(0, 0), fraction_bits=0, source="test")
