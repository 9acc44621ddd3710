"""A user's own data types: read, refused with one sentence, used by name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from termwise.algorithms.datatypes import add_datatype, datatypes, get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import WEIGHT_BITS, format_names, get_format
from termwise.algorithms.quantize import quantize
from termwise.algorithms.user_datatypes import (
    ENVIRONMENT_VARIABLE,
    RESERVED_NAMES,
    datatype_from,
    definition_of,
    read_datatypes,
)

FP3_MINE = """
[datatype.fp3_mine]
bits = 3
levels = [0, 1, 2, 5, "minus zero", -1, -2, -5]
source = "a test"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "types.toml"
    path.write_text(FP3_MINE)
    return path


def test_a_type_of_the_users_is_used_everywhere_by_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(file))
    assert get_datatype("fp3_mine").levels == (-5, -2, -1, 0, 1, 2, 5)
    assert "fp3_mine" in datatypes()
    assert "fp3_mine-w3g128" in format_names()
    weights = np.array([[5, 2, 1, 0, -1, -2, -5, 3.4]], dtype=np.float16)
    np.testing.assert_array_equal(quantize(weights, "fp3_mine-w3").dequantize()[0], [5, 2, 1, 0, -1, -2, -5, 2])
    quantize(weights, "fp3_mine-w3g4:scale=e8m0")
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    with pytest.raises(InputError, match="unknown format"):
        get_format("fp3_mine-w3")


def test_codes_that_are_no_levels_keep_their_meaning(tmp_path: Path) -> None:
    path = tmp_path / "types.toml"
    path.write_text('[datatype.odd]\nbits = 3\nlevels = [0, "inf", 0.75, "nan", "-inf", "unused", -3]\n')
    (datatype,) = read_datatypes(path)
    np.testing.assert_array_equal(datatype.values, [0, math.inf, 0.75, math.nan, -math.inf, math.nan, -3, math.nan])
    codes = np.arange(8, dtype=np.uint8)
    np.testing.assert_array_equal(datatype.encode(datatype.decode(codes)), codes)


@pytest.mark.parametrize("name", datatypes())
def test_a_definition_reads_back(name: str) -> None:
    """Of every type of termwise, under another name."""
    ours = get_datatype(name)
    if ours.fraction_bits + ours.max_numerator.bit_length() > 40 or name.startswith(("int", "mxint", "abfloat")):
        return  # too wide for a user's type, or a code that no user's type has, or no zero
    read = datatype_from("mine", definition_of(ours), "test")
    assert read.levels == ours.levels
    np.testing.assert_array_equal(read.values, ours.values)
    assert definition_of(read) == definition_of(ours)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected tables \[datatype.NAME\]"),
        ("bits = 3", r"expected tables \[datatype.NAME\]"),
        ("[datatype.x]\nbits = 2\nlevels = [0, 1, 1]", "'x': the level 1 stands twice"),
        ("[datatype.x]\nbits = 2\nlevels = [0, 1, 1.0]", "the level 1 stands twice"),
        ("[datatype.x]\nbits = 2\nlevels = [0, 1, 2, 3, 4]", "5 levels; expected at most 4, the codes of 2 bits"),
        ("[datatype.x]\nbits = 2\nlevels = [1, 2]", "no level is 0"),
        ("[datatype.x]\nbits = 2\nlevels = [0]", "no level but 0"),
        ("[datatype.x]\nbits = 3\nlevels = [0, 1, 'inf', 'inf']", "'inf' stands twice"),
        ("[datatype.x]\nbits = 3\nlevels = [0, 1, 1" + "0" * 400 + "]", "a level of 1329 bits; expected at most 40"),
        ("[datatype.x]\nbits = 9\nlevels = [0, 1]", "bits: input should be less than or equal to 8; got 9"),
        ("[datatype.x]\nlevels = [0, 1]", "bits: field required"),
        ("[datatype.x]\nbits = 2\nlevels = [0, true]", r"levels\.1"),
        (
            "[datatype.x]\nbits = 2\nlevels = [0, 'what']",
            r"levels\.1: expected a number or one of 'unused', .*; got 'what'",
        ),
        ("[datatype.x]\nbits = 2\nlevels = [0, nan]", "level nan; expected a finite number"),
        ("[datatype.x]\nbits = 2\nlevels = [0, 0.1]", r"the level 0\.1 takes more than 40 bits"),
        ("[datatype.x]\nbits = 2\nlevels = [0, 1e300]", r"the level 1e\+300 takes more than 40 bits"),
        ("[datatype.x]\nbits = 2\nlevels = [0, 1, 1e-300]", r"the level 1e-300 takes more than 40 bits"),
        ("[datatype.x]\nbits = 2\nlevels = [0, 1]\ncolour = 1", "colour: extra inputs are not permitted"),
        ("[datatype.X]\nbits = 2\nlevels = [0, 1]", "expected a name of lower-case letters"),
        ("[datatype.int4]\nbits = 4\nlevels = [0, 1]", "'int4' comes with termwise"),
        ("[datatype.flint_x]\nbits = 4\nlevels = [0, 1]", "names that begin with flint or bitmod_"),
        ("[datatype.olive]\nbits = 4\nlevels = [0, 1]", "'olive' comes with termwise"),
        ("[datatype", "is no TOML"),
        ("datatype = 3", r"expected tables \[datatype.NAME\]"),
        ("[datatype]\nx = 3", "'x': the table: input should be"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "types.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_datatypes(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.toml: No such file"):
        read_datatypes(tmp_path / "none.toml")


def test_no_type_may_have_the_name_of_a_family() -> None:
    assert {family.replace("-", "_") for family in WEIGHT_BITS} <= RESERVED_NAMES


def test_one_name_has_one_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("termwise.algorithms.datatypes._added", {})
    one = datatype_from("meaning", {"bits": 2, "levels": [0, 1, -1]}, "one")
    other = datatype_from("meaning", {"bits": 2, "levels": [0, 1, -2]}, "other")
    add_datatype(one)
    add_datatype(one)
    with pytest.raises(InputError, match="the data type meaning is defined already"):
        add_datatype(other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
LEVEL = st.integers(-9, 9) | st.floats() | st.sampled_from(["unused", "nan", "inf", "minus zero"]) | JSON


@given(
    name=st.sampled_from(["mine", "int4", "A"]) | st.text(max_size=6),
    table=JSON
    | st.fixed_dictionaries(
        {}, optional={"bits": st.integers(0, 10) | JSON, "levels": st.lists(LEVEL, max_size=20) | JSON, "source": JSON}
    ),
)
def test_any_table_gives_a_type_or_one_sentence(name: str, table: object) -> None:
    message = ""
    try:
        datatype = datatype_from(name, table, "file")
    except InputError as error:
        message = str(error)
    else:
        codes = np.arange(1 << datatype.bits, dtype=np.uint8)
        np.testing.assert_array_equal(datatype.encode(datatype.decode(codes)), codes)
    assert "\n" not in message
