"""Packing: exact inverses, and the bit order that the documentation promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from termwise.algorithms.packing import pack, unpack


@given(st.data(), st.integers(1, 8))
def test_unpack_inverts_pack(data: st.DataObject, bits: int) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 70)))
    codes = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, (1 << bits) - 1)))
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, shape[1]), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_first_code_is_in_the_lowest_bits(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (1, 40), dtype=np.uint8)
    number = sum(int(code) << (bits * index) for index, code in enumerate(codes[0]))
    assert int.from_bytes(pack(codes, bits)[0].tobytes(), "little") == number
