"""Formats: names that parse back, and bytes that are counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import (
    BLOCK_GROUPS,
    WEIGHT_BITS,
    Format,
    format_names,
    get_format,
    packed_row_bytes,
    single_types,
)

FORMATS = st.sampled_from(sorted(WEIGHT_BITS)).flatmap(
    lambda family: st.builds(
        Format,
        family=st.just(family),
        weight_bits=st.sampled_from(WEIGHT_BITS[family]),
        group_size=st.none() if family in ("fp16", "gobo") else st.none() | st.integers(1, 300).map(lambda n: 2 * n),
    )
)


@given(FORMATS)
def test_name_parses_back(format: Format) -> None:
    assert get_format(format.name) == format


@pytest.mark.parametrize(
    ("name", "bits"),
    [  # BitMoD section III-C: 8 + 2 bits per group of 128; 24 bits for INT-asym. FP32 channel scales: 32 / 4096 more.
        ("bitmod-w4g128", 4 + 10 / 128 + 32 / 4096),
        ("bitmod-w3g128", 3 + 10 / 128 + 32 / 4096),
        ("int-asym-w4g128", 4 + 24 / 128),
        ("int-w6g128", 6 + 16 / 128),
        ("ant-w4g128", 4 + 17 / 128),
        ("olive-w4", 4 + 16 / 4096 + 8 / 4096**2),
        ("fp6_e2m3-w6g128", 6 + 16 / 128),
        ("fp16", 16),
    ],
)
def test_bits_per_weight_follow_from_the_metadata(name: str, bits: float) -> None:
    assert get_format(name).bits_per_weight(4096, 4096) == bits


def test_a_short_last_group_counts_as_a_group() -> None:
    assert get_format("int-w4g128").groups(172) == 2
    assert get_format("int-w4g128").short_group(172) == 44
    assert get_format("int-w4g128").short_group(256) == 0
    assert get_format("olive-w4").short_group(172) == 0


@pytest.mark.parametrize(("values", "bits", "expected"), [(8, 3, 3), (9, 3, 4), (1, 1, 1), (128, 3, 48)])
def test_rows_are_padded_to_bytes(values: int, bits: int, expected: int) -> None:
    assert packed_row_bytes(values, bits) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bitmod-w4g12b", "did you mean 'bitmod-w4g128'"),
        ("bitmodw4g128", "did you mean 'bitmod-w4g128'"),
        ("BITMOD-W4", "unknown format"),
        ("bitmod-w5g128", "bitmod has no 5-bit weights; expected one of 3, 4, 6, 8"),
        ("int-w9g128", "int has no 9-bit weights"),
        ("int-w4g0", "unknown format"),
        ("fp6_e2m3-w5g128", "fp6_e2m3 has 6 bits; got 5"),
        ("int4-w4g128", "did you mean 'int-w4g128'"),
        ("fp16-w16", "unknown format"),
        ("olive-w4g127", "must be even"),
        ("", "unknown format"),
        ("gobo-w3g128", "expected no group"),
        ("int-w4a3g128", "3-bit activations; expected one of 4, 5, 6, 7, 8"),
        ("nvfp4-w4a8", "8-bit activations; expected one of 4"),
        ("gobo-w3a8", "8-bit activations; expected none"),
        ("int-w4:axis=sideways", "axis=sideways: expected one of input, output"),
        ("int-w4:colour=red", "option 'colour=red'; expected each of axis, rounding, scale at most once"),
        ("int-w4:axis", "option 'axis'"),
        ("fp16:axis=input", "expected none"),
        ("bitmod-w4:special=4", "special value 4: it is a level of FP4 already"),
        ("bitmod-w4:special=5.25", "expected a multiple of 0.5 below 16"),
        ("bitmod-w3:special=5,5", "one to eight different numbers"),
        ("bitmod-w6:special=5", "expected each of axis at most once"),
        ("bitmod-w4:compat=authors-fp16:special=5", "expected one option"),
        ("ant-w8:types=pot", "expected some of int,flint,float"),
        ("gobo-w3:threshold=low", "expected a number"),
    ],
)
def test_a_wrong_name_is_told_in_one_sentence(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_format(name)


@pytest.mark.parametrize("name", single_types())
@pytest.mark.parametrize("group", ["", "g128", "g7"])
def test_every_data_type_with_a_zero_is_a_format(name: str, group: str) -> None:
    format = get_format(f"{name}-w{get_datatype(name).bits}{group}")
    if name in BLOCK_GROUPS:
        assert get_format(format.name) == format
        assert format.group_size == (BLOCK_GROUPS[name] if group == "" else int(group[1:]))
    else:
        assert format.name == f"{name}-w{get_datatype(name).bits}{group}"
    assert [datatype.name for datatype in format.datatypes] == [name]


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("mxfp4-w4g32", "mxfp4"),
        ("mxfp4-w4g64", "mxfp4-w4g64"),
        ("mxfp4-w4a8", "mxfp4-w4a8"),
        ("nvfp4:rounding=even", "nvfp4"),
        ("mxfp4:rounding=floor", "mxfp4:rounding=floor"),
        ("int-w4a8g128:scale=fp16:axis=output", "int-w4a8g128:axis=output"),
        ("int-w4g32:scale=e8m0:rounding=even", "int-w4g32:scale=e8m0"),
        ("bitmod-w4g128:special=5,-5,8,-8", "bitmod-w4g128"),
        ("bitmod-w4g128:special=5.0,-7", "bitmod-w4g128:special=5,-7"),
        ("ant-w4:types=flint,int", "ant-w4"),
        ("ant-w4:search=mse", "ant-w4"),
        ("ant-w4g128:search=absmax", "ant-w4g128"),
        ("olive-w8:outlier=e2m5", "olive-w8:outlier=e2m5"),
        ("gobo-w3:threshold=-4.0", "gobo-w3"),
    ],
)
def test_a_name_has_one_canonical_form(name: str, canonical: str) -> None:
    assert get_format(name).name == canonical
    assert get_format(canonical) == get_format(name)


def test_every_example_is_a_format() -> None:
    assert [get_format(name).name for name in format_names()] == list(format_names())
