"""Data types: the published tables, other libraries' definitions, and laws that hold for every type."""

from __future__ import annotations

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest

from termwise.algorithms.datatypes import DataType, datatypes, get_datatype, signed_digit_weight
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


def test_fp4_is_the_fp4_of_ml_dtypes_and_gfloat() -> None:
    ours = get_datatype("fp4_e2m1")
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    for code in range(16):
        level = 0.0 if ours.numerators[code] is None else ours.numerators[code] / 2**ours.fraction_bits
        assert level == theirs[code]
        assert level == gfloat.decode_float(gfloat.formats.format_info_ocp_e2m1, code).fval


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("fp4_e2m1", ml_dtypes.float4_e2m1fn),
        ("fp6_e2m3", ml_dtypes.float6_e2m3fn),
        ("fp6_e3m2", ml_dtypes.float6_e3m2fn),
    ],
)
def test_floats_are_those_of_ml_dtypes_on_all_codes(name: str, theirs: type) -> None:
    ours = get_datatype(name)
    levels = np.arange(1 << ours.bits, dtype=np.uint8).view(theirs).astype(np.float64)
    for code, numerator in enumerate(ours.numerators):
        assert (0.0 if numerator is None else numerator / 2**ours.fraction_bits) == levels[code]


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

    def test_levels_ascend(self, datatype: DataType) -> None:
        assert list(datatype.levels) == sorted(set(datatype.levels))

    def test_terms_suffice_for_every_level(self, datatype: DataType) -> None:
        least = max(signed_digit_weight(numerator) for numerator in datatype.sorted_numerators)
        assert datatype.terms >= least

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
