"""Products from bit planes: every pair of widths and every encoding against plain integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError
from termwise.gpu_ref.bit_planes import Encoding, bit_planes, multiply

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")),
]


def values_of(codes: NDArray[np.uint8], bits: int, encoding: Encoding) -> NDArray[np.int64]:
    """The numbers, by the definition of the encoding: a sum over bits."""
    ones = codes[..., None].astype(np.int64) >> np.arange(bits) & 1
    factors = 1 << np.arange(bits)
    if encoding == "signed":
        factors[-1] *= -1
    return ((2 * ones - 1 if encoding == "bipolar" else ones) * factors).sum(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("encoding", ["unsigned", "signed", "bipolar"])
def test_every_pair_of_widths(encoding: Encoding, device: str) -> None:
    random = np.random.default_rng(0)
    for weight_bits in range(1, 9):
        for activation_bits in range(1, 9):
            outputs, inputs, tokens = (int(random.integers(1, limit)) for limit in (40, 300, 20))
            weights = random.integers(0, 1 << weight_bits, (outputs, inputs)).astype(np.uint8)
            activations = random.integers(0, 1 << activation_bits, (tokens, inputs)).astype(np.uint8)
            left = bit_planes(torch.from_numpy(weights).to(device), weight_bits, encoding)
            right = bit_planes(torch.from_numpy(activations).to(device), activation_bits, encoding)
            expected = values_of(activations, activation_bits, encoding) @ values_of(weights, weight_bits, encoding).T
            found = multiply(left, right).cpu().numpy()
            assert np.array_equal(found, expected), (weight_bits, activation_bits, outputs, inputs, tokens)


def test_signed_weights_beside_unsigned_activations_and_nothing() -> None:
    codes = np.random.default_rng(1).integers(0, 16, (5, 70)).astype(np.uint8)
    signed = bit_planes(torch.from_numpy(codes), 4, "signed")
    unsigned = bit_planes(torch.from_numpy(codes), 4, "unsigned")
    expected = values_of(codes, 4, "unsigned") @ values_of(codes, 4, "signed").T
    assert np.array_equal(multiply(signed, unsigned).numpy(), expected)
    nothing = bit_planes(torch.empty((0, 70), dtype=torch.uint8), 4, "unsigned")
    assert multiply(signed, nothing).shape == (0, 5)


def test_bad_input_is_refused() -> None:
    codes = torch.zeros((2, 8), dtype=torch.uint8)
    for bits in (0, 9):
        with pytest.raises(InputError, match="expected 1 to 8"):
            bit_planes(codes, bits, "signed")
    with pytest.raises(InputError, match="encoding"):
        bit_planes(codes, 4, "ternary")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"expected torch.uint8 \[rows, inputs\]"):
        bit_planes(codes.int(), 4, "signed")
    with pytest.raises(InputError, match="a code of 9; expected codes of 3 bits"):
        bit_planes(codes + 9, 3, "signed")
    four = bit_planes(codes, 4, "signed")
    with pytest.raises(InputError, match="activations of 7 inputs"):
        multiply(four, bit_planes(codes[:, :7], 4, "signed"))
    with pytest.raises(InputError, match="expected both bipolar"):
        multiply(four, bit_planes(codes, 4, "bipolar"))
    wide = bit_planes(torch.zeros((1, 1 << 16), dtype=torch.uint8), 8, "unsigned")
    with pytest.raises(InputError, match="expected at most 2147483647"):
        multiply(wide, wide)
