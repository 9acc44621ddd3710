"""Formats: names that parse back, and bytes that are counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import WEIGHT_BITS, Format, format_names, get_format, packed_row_bytes, single_types

FORMATS = st.sampled_from(sorted(WEIGHT_BITS)).flatmap(
    lambda family: st.builds(
        Format,
        family=st.just(family),
        weight_bits=st.sampled_from(WEIGHT_BITS[family]),
        group_size=st.none() if family == "fp16" else st.none() | st.integers(1, 300).map(lambda half: 2 * half),
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
        ("bitmod-w5g128", "bitmod has no 5-bit weights; expected one of 3, 4"),
        ("int-w9g128", "int has no 9-bit weights"),
        ("int-w4g0", "unknown format"),
        ("fp6_e2m3-w5g128", "fp6_e2m3 has 6 bits; got 5"),
        ("int4-w4g128", "did you mean 'int-w4g128'"),
        ("fp16-w16", "unknown format"),
        ("olive-w4g127", "must be even"),
        ("", "unknown format"),
    ],
)
def test_a_wrong_name_is_told_in_one_sentence(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_format(name)


@pytest.mark.parametrize("name", single_types())
@pytest.mark.parametrize("group", ["", "g128", "g7"])
def test_every_data_type_with_a_zero_is_a_format(name: str, group: str) -> None:
    format = get_format(f"{name}-w{get_datatype(name).bits}{group}")
    assert format.name == f"{name}-w{get_datatype(name).bits}{group}"
    assert [datatype.name for datatype in format.datatypes] == [name]


def test_every_example_is_a_format() -> None:
    assert [get_format(name).name for name in format_names()] == list(format_names())
