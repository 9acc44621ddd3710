"""MX (OCP v1.0) and NVFP4: scales and elements against gfloat, ml_dtypes and the specification."""

from __future__ import annotations

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.quantize import quantize

MX = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"]


def heavy_tailed(rows: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(3, (rows, columns)) * 0.02).astype(np.float32)


@pytest.mark.parametrize("name", [*MX, "mxint8"])
def test_mx_equals_gfloat(name: str) -> None:
    """Its scale rule and its block quantization, element by element."""
    info = getattr(gfloat.formats, f"format_info_{'mxfp4_e2m1' if name == 'mxfp4' else name}")
    weights = heavy_tailed(16, 256)
    ours = quantize(weights, name).dequantize()
    for row in range(16):
        for start in range(0, 256, 32):
            block = weights[row, start : start + 32].astype(np.float64)
            theirs = gfloat.quantize_block(info, block, gfloat.compute_scale_amax)
            np.testing.assert_array_equal(ours[row, start : start + 32], theirs)


def test_nvfp4_equals_its_definition_in_ml_dtypes() -> None:
    weights = heavy_tailed(16, 256)
    tensor = quantize(weights, "nvfp4")
    matrix = np.float32(np.abs(weights).max().astype(np.float64) / 6 / 448)
    assert tensor.parts["tensor_scale"][0] == matrix
    groups = weights.reshape(16, 16, 16).astype(np.float64)
    scales = (np.abs(groups).max(axis=2) / 6 / np.float64(matrix)).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(tensor.parts["scales"], scales.view(np.uint8))
    total = scales.astype(np.float64)[:, :, None] * np.float64(matrix)
    elements = np.clip(groups / total, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal(tensor.dequantize(), (elements * total).astype(np.float32).reshape(16, 256))


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
