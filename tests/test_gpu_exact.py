"""The exact kernels equal the reference in every bit: on the CPU as their twins and, where there is one, on a GPU."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from termwise.algorithms import reference
from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionarySpec
from termwise.algorithms.errors import InputError, MissingToolError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import activation_format, get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.models import open_model
from termwise.algorithms.outlier_victim import OutlierVictimSpec, PairCoder
from termwise.algorithms.processing_element import ProcessingElementSpec, UnsupportedFormatError
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.gpu_ref import exact
from termwise.gpu_ref.launch import launch
from termwise.sim import functional

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")),
]
PAPER, EXACT, SHARED = (BitSerialSpec(numerics=name) for name in ("paper", "exact", "shared_exponent"))  # type: ignore[arg-type]
BIT_SERIAL_FORMATS = (
    "bitmod-w3g16",
    "bitmod-w4g16",
    "bitmod-w4:special=7,-7",
    "bitmod-w6g16",
    "int-w8g24",
    "int-w5",
    "int-asym-w4g16",
    "ant-w4g16",
    "fp5_e2m2-w5g16",
    "mxfp4",
    "nvfp4",
)
EVERY_PAIR: list[tuple[ProcessingElementSpec, str]] = [
    *itertools.product((PAPER, EXACT, SHARED), BIT_SERIAL_FORMATS),
    *itertools.product((Fp16MacSpec(),), ("fp16", "bitmod-w4g16", "olive-w4", "int-asym-w4g16", "nvfp4")),
    *itertools.product((FlintSpec(),), ("ant-w4g16", "ant-w8", "int-w8g16", "flint5-w5g16", "ant-w3")),
    *itertools.product((OutlierVictimSpec(),), ("olive-w4", "olive-w8", "olive-w8:outlier=e2m5", "olive-w4g16")),
    *itertools.product((DictionarySpec(),), ("gobo-w3", "gobo-w4:threshold=-1")),
]
EVERY_INTEGER_PAIR: list[tuple[ProcessingElementSpec, str]] = [
    *itertools.product(
        (OutlierVictimSpec(activations="integer"),),
        ("olive-w4a4", "olive-w8a8", "olive-w4a4g16", "olive-w8a8:outlier=e2m5"),
    ),
    *itertools.product((FlintSpec(activations="integer"),), ("ant-w4a4", "ant-w4a4g16", "ant-w8a8", "ant-w4a8g16")),
]


def weights_of(seed: int, outputs: int, inputs: int) -> NDArray[np.float32]:
    """Heavy-tailed weights."""
    return (np.random.default_rng(seed).standard_t(4, (outputs, inputs)) * 0.05).astype(np.float32)


def activations_of(seed: int, tokens: int, inputs: int) -> NDArray[np.float16]:
    """Activations over many magnitudes, zeros and subnormals among them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((tokens, inputs)) * np.exp2(random.integers(-14, 14, (tokens, inputs)))
    values[random.random(values.shape) < 0.1] = 0
    values[random.random(values.shape) < 0.1] *= 2**-16
    return values.clip(-65504, 65504).astype(np.float16)


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    differing = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))
    assert not differing.size, f"{len(differing)} differ, the first at {differing[0]}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("spec", "format"), EVERY_PAIR)
def test_a_product_is_the_references(spec: ProcessingElementSpec, format: str, device: str) -> None:
    tensor = quantize(weights_of(1, 17, 45), format)
    activations = activations_of(2, 2, 45)
    expected = reference.multiply(spec, tensor, activations)
    assert_same_bits(exact.multiply(spec, tensor, activations, device=device), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [
        {"rounding": "nearest_even"},
        {"lanes": 3, "rounding": "nearest_even"},
        {"lanes": 16, "accumulator_bits": 9},
        {"lanes": 1, "align_bits": 5, "accumulator_bits": 28},
        {"align_bits": 24, "accumulator_bits": 8, "rounding": "nearest_even"},
    ],
)
def test_widths_lanes_and_rounding_are_parameters(changes: dict[str, object], device: str) -> None:
    for numerics, format in itertools.product(("paper", "shared_exponent"), ("bitmod-w4g48", "int-w7")):
        spec = BitSerialSpec(numerics=numerics, **changes)  # type: ignore[arg-type]
        tensor = quantize(weights_of(3, 5, 130), format)
        activations = activations_of(4, 2, 130)
        expected = reference.multiply(spec, tensor, activations)
        assert_same_bits(exact.multiply(spec, tensor, activations, device=device), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("spec", "format"), EVERY_INTEGER_PAIR)
def test_a_product_of_codes_on_both_sides_is_the_references(
    spec: ProcessingElementSpec, format: str, device: str
) -> None:
    weights = quantize(weights_of(5, 18, 79), format)
    stored = activation_format(get_format(format))
    assert stored is not None
    tokens = quantize(activations_of(6, 3, 79).clip(-100, 100), stored)
    expected = reference.multiply_integers(spec, weights, tokens)
    assert_same_bits(exact.multiply_integers(spec, weights, tokens, device=device), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spec", "format"), [(PAPER, "int-w8"), (SHARED, "bitmod-w4"), (OutlierVictimSpec(), "olive-w4")]
)
def test_a_pass_ends_the_group_that_it_cuts(spec: ProcessingElementSpec, format: str, device: str) -> None:
    tensor, activations = quantize(weights_of(7, 4, 200), format), activations_of(8, 2, 200)
    for pass_inputs in (64, 96, 200, 1000):
        expected = reference.multiply(spec, tensor, activations, pass_inputs=pass_inputs)
        found = exact.multiply(spec, tensor, activations, pass_inputs=pass_inputs, device=device)
        assert_same_bits(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_random_shapes_and_formats_agree_with_the_simulators_kernels(device: str) -> None:
    random = np.random.default_rng(9)
    for _ in range(40):
        spec, format = EVERY_PAIR[random.integers(len(EVERY_PAIR))]
        outputs, inputs, tokens = (int(random.integers(1, 301)) for _ in range(3))
        tokens = min(tokens, 40)
        tensor = quantize(weights_of(int(random.integers(1 << 30)), outputs, inputs), format)
        activations = activations_of(int(random.integers(1 << 30)), tokens, inputs)
        try:
            expected = functional.multiply(spec, tensor, activations)
        except UnsupportedFormatError:
            continue
        found = exact.multiply(spec, tensor, activations, device=device)
        differing = np.count_nonzero(found.view(np.uint32) != expected.view(np.uint32))
        assert not differing, (spec, format, outputs, inputs, tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spec", "format"),
    [
        (PAPER, "bitmod-w4g128"),
        (EXACT, "bitmod-w3g64"),
        (SHARED, "int-w6"),
        (OutlierVictimSpec(), "olive-w4"),
        (FlintSpec(), "ant-w4g128"),
        (DictionarySpec(), "gobo-w3"),
        (Fp16MacSpec(), "fp16"),
    ],
)
def test_a_real_layer_agrees_with_the_simulators_kernels(spec: ProcessingElementSpec, format: str, device: str) -> None:
    model = open_model("tiny")
    name = next(name for name in model.matrix_names if name.endswith("down_proj"))
    weights = model.matrix(name)[:64]
    tensor = quantize(weights, format)
    activations = activations_of(10, 5, weights.shape[1])
    expected = functional.multiply(spec, tensor, activations)
    assert_same_bits(exact.multiply(spec, tensor, activations, device=device), expected)


class TestRefusals:
    def test_a_code_that_is_no_level(self) -> None:
        tensor = quantize(weights_of(1, 2, 16), "int-w4")
        codes = np.full(tensor.parts["codes"].shape, 0x88, dtype=np.uint8)
        broken = dataclasses.replace(tensor, parts={**tensor.parts, "codes": codes})
        with pytest.raises(InputError, match="no level"):
            exact.multiply(PAPER, broken, activations_of(1, 1, 16))

    def test_activations_of_another_shape_or_type(self) -> None:
        tensor = quantize(weights_of(1, 2, 16), "int-w4")
        for wrong in (activations_of(1, 1, 15), activations_of(1, 1, 16).astype(np.float32)):
            with pytest.raises(InputError, match=r"expected float16 \[tokens, 16\]"):
                exact.multiply(PAPER, tensor, wrong)  # type: ignore[arg-type]

    def test_activations_that_are_not_finite(self) -> None:
        activations = activations_of(1, 1, 16)
        activations[0, 3] = np.nan
        with pytest.raises(InputError, match="NaN or infinite"):
            exact.multiply(PAPER, quantize(weights_of(1, 2, 16), "int-w4"), activations)

    def test_a_format_that_the_element_does_not_take(self) -> None:
        with pytest.raises(UnsupportedFormatError):
            exact.multiply(PAPER, quantize(weights_of(1, 2, 16), "olive-w4"), activations_of(1, 1, 16))

    def test_groups_whose_sums_64_bits_do_not_hold(self) -> None:
        tensor = quantize(np.ones((1, 1 << 17), dtype=np.float32), "int-w8")
        with pytest.raises(InputError, match="63 bits"):
            exact.multiply(EXACT, tensor, np.ones((1, 1 << 17), dtype=np.float16))

    def test_sums_that_an_accumulator_does_not_hold(self) -> None:
        spec = OutlierVictimSpec(activations="integer")
        weights = np.zeros((1, 64), dtype=np.float32)
        weights[:, ::2] = 1e4
        weights[:, 1::2] = 1e-3
        codes = quantize(weights, "olive-w8a8")
        largest = _all_outliers(codes)
        tokens = _all_outliers(quantize(weights, "olive-w8"))
        with pytest.raises(InputError, match="int32 accumulator"):
            exact.multiply_integers(spec, largest, tokens)

    def test_a_gpu_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old one")
        with pytest.raises(InputError, match=r"an old one has compute capability 7.5; expected 8.0 or more"):
            exact.multiply(PAPER, quantize(weights_of(1, 2, 16), "int-w4"), activations_of(1, 1, 16), device="cuda")

    def test_more_blocks_than_a_grid_has(self) -> None:
        with pytest.raises(InputError, match="expected at most"):
            launch("fp16_mac", "fp16_mac", exact.HalfArguments(), (1, 65536), (16, 16), torch.device("cpu"))

    def test_devices_without_kernels(self) -> None:
        tensor, activations = quantize(weights_of(1, 2, 16), "int-w4"), activations_of(1, 1, 16)
        with pytest.raises(InputError, match="expected cpu, or cuda"):
            exact.multiply(PAPER, tensor, activations, device="meta")
        if not torch.cuda.is_available():
            with pytest.raises(MissingToolError, match="finds no GPU"):
                exact.multiply(PAPER, tensor, activations, device="cuda")


def _all_outliers(tensor: QuantizedTensor) -> QuantizedTensor:
    """Every pair the greatest outlier and a victim."""
    coder = tensor.coder
    assert isinstance(coder, PairCoder)
    codes = tensor.codes.copy()
    codes[:, ::2], codes[:, 1::2] = coder.outlier.sorted_codes[-1], coder.identifier
    return tensor.with_codes(codes)


def test_nothing_is_computed_of_no_tokens() -> None:
    tensor = quantize(weights_of(1, 2, 16), "bitmod-w4g16")
    assert exact.multiply(PAPER, tensor, np.zeros((0, 16), dtype=np.float16)).shape == (0, 2)
