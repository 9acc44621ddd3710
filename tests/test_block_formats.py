"""MX (OCP v1.0) and NVFP4: scales and elements against torchao's conversions and against the specification."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.quantize import quantize

MX = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"]


def heavy_tailed(rows: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(3, (rows, columns)) * 0.02).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


@pytest.mark.parametrize("name", MX)
def test_mx_equals_torchao(name: str) -> None:
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    elements = {
        "mxfp4": torch.float4_e2m1fn_x2,
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
    }
    weights = heavy_tailed(16, 256)
    scale, data = to_mx(torch.from_numpy(weights), elements[name], 32)
    theirs = to_dtype(data, scale, elements[name], 32, torch.float32)
    ours = quantize(weights, name)
    np.testing.assert_array_equal(ours.parts["scales"], scale.view(torch.uint8).numpy().reshape(16, 8))
    np.testing.assert_array_equal(ours.dequantize(), theirs.numpy().reshape(16, 256))


def test_nvfp4_equals_torchao() -> None:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    weights = heavy_tailed(16, 256)
    matrix = per_tensor_amax_to_scale(torch.tensor(np.abs(weights).max()))
    scales, packed = nvfp4_quantize(torch.from_numpy(weights), per_tensor_scale=matrix)
    ours = quantize(weights, "nvfp4")
    np.testing.assert_array_equal(ours.parts["scales"], scales.view(torch.uint8).numpy().reshape(16, 16))
    assert ours.parts["tensor_scale"][0] == matrix.item()
    theirs = packed.numpy()
    np.testing.assert_array_equal(ours.codes[:, 0::2] & 7, theirs & 7)  # theirs keeps the sign of a zero
    np.testing.assert_array_equal(ours.codes[:, 1::2] & 7, theirs >> 4 & 7)


@pytest.mark.parametrize("name", [*MX, "mxint8"])
@pytest.mark.parametrize("rounding", ["nearest", "floor", "even"])
def test_mx_follows_the_specification_in_every_rounding_mode(name: str, rounding: str) -> None:
    """OCP section 6.3: X = 2^(floor(log2 max |V|) - emax); elements V / X, rounded as microxcaling's mode says."""
    weights = heavy_tailed(4, 64)
    weights[0, :8] = [2.0**-20, 1.5, -1.5, 1.75, 1.25, -1.25, 0.625, 6.0]
    datatype = get_datatype(name)
    tensor = quantize(weights, f"{name}:rounding={rounding}")
    for row in range(4):
        for group in range(2):
            part = weights[row, 32 * group : 32 * group + 32].astype(np.float64)
            exponent = np.floor(np.log2(np.abs(part).max())) - np.floor(np.log2(datatype.maximum))
            assert tensor.parts["scales"][row, group] == exponent + 127
            codes = datatype.encode(part / 2.0**exponent, rounding)  # type: ignore[arg-type]
            expected = datatype.decode(codes) * 2.0**exponent
            np.testing.assert_array_equal(tensor.dequantize()[row, 32 * group : 32 * group + 32], expected)


def test_a_scale_stays_within_e8m0() -> None:
    tiny = np.full((1, 32), 2.0**-140, dtype=np.float32)
    assert quantize(tiny, "mxfp8_e5m2").parts["scales"][0, 0] == 0
    huge = np.full((1, 32), 3e38, dtype=np.float32)
    assert np.isfinite(quantize(huge, "mxfp4").dequantize()).all()
    assert quantize(np.zeros((1, 32), dtype=np.float32), "mxfp4").parts["scales"][0, 0] == 127


def test_nvfp4_keeps_groups_far_below_the_largest() -> None:
    """A group whose scale would round to zero takes the least E4M3 scale."""
    weights = np.full((1, 32), 1.0, dtype=np.float32)
    weights[0, 16:] = 1e-6
    tensor = quantize(weights, "nvfp4")
    assert tensor.parts["scales"][0, 1] == 1
    with pytest.raises(InputError, match="a normal FP32 number"):
        quantize(np.full((1, 16), 1e-36, dtype=np.float32), "nvfp4")


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4 + 8 / 32), ("mxint8", 8 + 8 / 32), ("mxfp6_e2m3", 6 + 8 / 32)])
def test_bits_per_weight(name: str, bits: float) -> None:
    assert get_format(name).bits_per_weight(4096, 4096) == bits
    assert get_format("nvfp4").bits_per_weight(4096, 4096) == 4 + 8 / 16 + 32 / 4096**2


def test_any_type_takes_any_scale() -> None:
    weights = heavy_tailed(4, 64)
    same = quantize(weights, "fp4_e2m1-w4g32:scale=e8m0"), quantize(weights, "mxfp4")
    np.testing.assert_array_equal(same[0].dequantize(), same[1].dequantize())
    assert np.isfinite(quantize(weights, "int-w3g16:scale=e4m3").dequantize()).all()
