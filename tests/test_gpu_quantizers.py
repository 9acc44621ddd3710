"""The quantizers' kernels: packed bytes equal to those of the CPU's quantizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from termwise.algorithms import quantize as cpu
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.models import open_model
from termwise.gpu_ref import quantizers

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")),
]
FORMATS = (
    "bitmod-w4g128",
    "bitmod-w3g64",
    "bitmod-w3g16",
    "bitmod-w4:special=7,-7",
    "bitmod-w6g128",
    "bitmod-w8",
    "olive-w4",
    "olive-w4g64",
    "olive-w8",
    "olive-w8:outlier=e2m5",
)


def heavy_tailed(shape: tuple[int, int]) -> NDArray[np.float32]:
    return (np.random.default_rng(shape[1]).standard_t(4, shape) * 0.05).astype(np.float32)


def with_ties(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Weights on a coarse grid: midway between levels, and equal errors of several types."""
    return np.round(heavy_tailed(shape) * 20) / 20


def zeros_in_part(shape: tuple[int, int]) -> NDArray[np.float32]:
    weights = heavy_tailed(shape)
    weights[: shape[0] // 2] = 0
    return weights


def of_every_magnitude(shape: tuple[int, int]) -> NDArray[np.float32]:
    return heavy_tailed(shape) * np.exp2(np.arange(shape[0]) % 12)[:, None].astype(np.float32)


def assert_same_bytes(weights: NDArray[np.float32], format: str, device: str) -> None:
    expected, found = cpu.quantize(weights, format), quantizers.quantize(weights, format, device=device)
    assert found.format == expected.format
    assert found.shape == expected.shape
    assert found.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert found.parts[name].dtype == part.dtype
        assert np.array_equal(found.parts[name], part), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [heavy_tailed, with_ties, zeros_in_part, of_every_magnitude])
@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_are_the_cpus(format: str, make: type, device: str) -> None:
    for shape in ((24, 300), (3, 17), (1, 1)):
        assert_same_bytes(make(shape), format, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["bitmod-w4g128", "bitmod-w3g128", "olive-w4"])
def test_real_weights(format: str, device: str) -> None:
    model = open_model("tiny")
    for name in model.matrix_names[:4]:
        assert_same_bytes(np.ascontiguousarray(model.matrix(name)[:48]), format, device)


@pytest.mark.parametrize("device", DEVICES)
def test_random_shapes(device: str) -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        outputs, inputs = (int(random.integers(1, 200)) for _ in range(2))
        assert_same_bytes(heavy_tailed((outputs, inputs)), str(random.choice(FORMATS)), device)


def test_half_weights_and_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("termwise.algorithms.grid.WEIGHTS_AT_ONCE", 700)
    for format in ("bitmod-w4g32", "olive-w4"):
        assert_same_bytes(heavy_tailed((30, 96)).astype(np.float16), format, "cpu")


@pytest.mark.parametrize("format", ["int-w4", "bitmod-w4g32:axis=output", "bitmod-w4g32:compat=authors-fp16"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(InputError, match="no kernel that quantizes to"):
        quantizers.quantize(heavy_tailed((2, 32)), get_format(format))


def test_bad_weights_are_refused_with_the_tensors_name() -> None:
    weights = heavy_tailed((2, 32))
    weights[1, 3] = np.nan
    with pytest.raises(InputError, match="layer 3: 1 NaN or infinite weights"):
        quantizers.quantize(weights, "bitmod-w4g32", name="layer 3")
    with pytest.raises(InputError, match=r"layer 3 has the shape \[32\]"):
        quantizers.quantize(weights[0], "bitmod-w4g32", name="layer 3")
    with pytest.raises(InputError, match="needs the scale"):
        quantizers.quantize(heavy_tailed((2, 32)) * np.float32(1e9), "olive-w4")
