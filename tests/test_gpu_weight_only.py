"""Linear layers with packed weights: within their error bound of the exact product, from any format, shape and type."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError, MissingToolError
from termwise.algorithms.formats import get_format
from termwise.algorithms.models import open_model
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.gpu_ref import QuantizedLinear, exact, quantizers, swap_linears
from termwise.gpu_ref.layout import TILE_INPUTS, fast_layout, level_tables, reason_against
from termwise.gpu_ref.weight_only import weight_only_any
from termwise.sim import functional

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")),
]
FAST = (
    "bitmod-w4g128",
    "bitmod-w4g32",
    "bitmod-w3g128",
    "bitmod-w3",
    "bitmod-w4g64:special=7,-7",
    "bitmod-w6g128",
    "int-w6g64",
    "olive-w4",
    "olive-w4g64",
    "ant-w4g128",
    "ant-w4",
    "ant-w3g64",
    "int-w4g256",
    "fp4_e2m1-w4g128",
)
OTHER = (
    "bitmod-w8g128",
    "bitmod-w4g48",
    "int-asym-w4g128",
    "int-w2",
    "mxfp4",
    "nvfp4",
    "nf4-w4g64",
    "olive-w8",
    "ant-w5g64",
    "bitmod-w4g64:special=5.5,-5.5",
)
TYPES = (torch.float16, torch.bfloat16)
_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def weights_of(seed: int, outputs: int, inputs: int) -> NDArray[np.float32]:
    """Heavy-tailed weights, so that pairs have outliers."""
    return (np.random.default_rng(seed).standard_t(4, (outputs, inputs)) * 0.05).astype(np.float32)


def activations_of(seed: int, tokens: int, inputs: int, type: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((tokens, inputs))).to(type)


def assert_within_bound(found: torch.Tensor, activations: torch.Tensor, tensor: QuantizedTensor) -> None:
    """``found`` against the product in FP64; the bound is derived in ``termwise.gpu_ref.weight_only``."""
    weights = tensor.dequantize().astype(np.float64)
    left = activations.double().cpu().numpy()
    exact, magnitudes = left @ weights.T, np.abs(left) @ np.abs(weights).T
    # dequantize rounds each weight once to FP32. A result below 2^-14 has a unit of 2^-24 in FP16.
    bound = (tensor.shape[1] + 17) * 2.0**-22 * magnitudes
    bound += _ROUNDING[activations.dtype] * (np.abs(exact) + bound) + 2.0**-25
    assert found.dtype == activations.dtype
    error = np.abs(found.double().cpu().numpy() - exact)
    assert (error <= bound).all(), f"{(error / bound).max()} times the bound"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("format", FAST + OTHER)
def test_results_are_within_the_bound(format: str, type: torch.dtype, device: str) -> None:
    tensor = quantize(weights_of(1, 37, 300), format)
    assert (reason_against(tensor.format) is None) == (format in FAST)
    layer = QuantizedLinear(tensor, device=device)
    for tokens in (1, 8, 9, 16, 17, 70):
        activations = activations_of(tokens, tokens, 300, type).to(device)
        assert_within_bound(layer(activations), activations, tensor)


@pytest.mark.parametrize("device", DEVICES)
def test_any_shape_is_taken(device: str) -> None:
    random = np.random.default_rng(2)
    for _ in range(60):
        format = str(random.choice(FAST + OTHER))
        outputs, inputs, tokens = (int(random.integers(1, 301)) for _ in range(3))
        tensor = quantize(weights_of(int(random.integers(1 << 30)), outputs, inputs), format)
        activations = activations_of(int(random.integers(1 << 30)), tokens % 70, inputs, TYPES[random.integers(2)])
        found = QuantizedLinear(tensor, device=device)(activations.to(device))
        assert found.shape == (tokens % 70, outputs)
        assert_within_bound(found, activations, tensor)


@pytest.mark.parametrize("format", FAST)
def test_tables_hold_every_level(format: str) -> None:
    found = get_format(format)
    if found.weight_bits == 6:
        return
    types = found.datatypes[::2] if found.family == "olive" else found.datatypes
    tables = level_tables(types)
    assert tables is not None
    for row, datatype in zip(tables.values, types, strict=False):
        halves = (row.astype(np.uint16) << 8).view(np.float16)
        for code, numerator in enumerate(datatype.numerators):
            level = 0.0 if numerator is None else numerator / (1 << datatype.fraction_bits)
            assert float(halves[code]) == level * 2.0**tables.exponent


@pytest.mark.parametrize("format", FAST)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 128), (33, 515)])
def test_the_layout_gives_the_packed_bytes_again(format: str, outputs: int, inputs: int) -> None:
    tensor = quantize(weights_of(3, outputs, inputs), format)
    layout = fast_layout(tensor)
    assert layout.codes.shape[1] == -(-inputs // TILE_INPUTS)
    found = layout.parts()
    assert found.keys() == tensor.parts.keys()
    for name, part in tensor.parts.items():
        assert found[name].dtype == part.dtype
        assert np.array_equal(found[name], part), name


def test_a_bfloat_far_below_one_is_not_lost() -> None:
    """Tables for BF16 hold levels · 2^-112: products with small activations stay normal FP32 numbers down to 2^-14."""
    tensor = quantize(weights_of(4, 16, 128), "bitmod-w4g128")
    activations = activations_of(5, 3, 128, torch.bfloat16) * 2.0**-12
    found = QuantizedLinear(tensor)(activations).double().numpy()
    exact = activations.double().numpy() @ tensor.dequantize().astype(np.float64).T
    assert np.abs(found - exact).max() <= 2.0**-8 * np.abs(exact).max()


@pytest.mark.parametrize("device", DEVICES)
class TestTheLayer:
    def test_leading_dimensions_bias_and_a_view_that_is_not_contiguous(self, device: str) -> None:
        tensor = quantize(weights_of(6, 24, 64), "bitmod-w4g32")
        layer = QuantizedLinear(tensor, torch.arange(24, dtype=torch.float16), device=device)
        activations = activations_of(7, 12, 64, torch.float16).to(device)
        plain = layer(activations)
        assert torch.equal(layer(activations.reshape(3, 4, 64)), plain.reshape(3, 4, 24))
        assert torch.equal(layer(activations.T.contiguous().T), plain)
        moved = torch.cat([torch.zeros(1, dtype=torch.float16, device=device), activations.ravel()])[1:].reshape(12, 64)
        assert torch.equal(layer(moved), plain)
        assert torch.equal(QuantizedLinear(tensor, device=device)(activations) + layer.bias, plain)
        assert layer(activations[:0]).shape == (0, 24)

    @pytest.mark.parametrize("format", ["bitmod-w4g32", "int-asym-w4g16"])
    def test_the_state_dict_holds_the_packed_arrays(self, format: str, device: str) -> None:
        first = QuantizedLinear(quantize(weights_of(8, 20, 96), format), torch.ones(20), device=device)
        second = QuantizedLinear(quantize(weights_of(9, 20, 96), format), torch.zeros(20), device=device)
        state = first.state_dict()
        assert set(state) == {*first.tensor.parts, "bias"}
        second.load_state_dict(state)
        activations = activations_of(10, 2, 96, torch.float16).to(device)
        assert torch.equal(first(activations), second(activations))
        for name, part in first.tensor.parts.items():
            assert np.array_equal(state[name].numpy(), part)

    def test_a_state_dict_of_another_shape_or_with_codes_missing_is_refused(self, device: str) -> None:
        layer = QuantizedLinear(quantize(weights_of(8, 20, 96), "bitmod-w4g32"), device=device)
        other = QuantizedLinear(quantize(weights_of(8, 20, 128), "bitmod-w4g32"), device=device).state_dict()
        with pytest.raises(RuntimeError, match=r"codes is uint8 \[20, 64\]; expected uint8 \[20, 48\]"):
            layer.load_state_dict(other)
        state = layer.state_dict()
        del state["codes"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"codes"'):
            layer.load_state_dict(state)

    def test_input_scales_divide_the_activations(self, device: str) -> None:
        scales = np.exp2(np.arange(64) % 3).astype(np.float32)
        tensor = quantize(weights_of(11, 8, 64) * scales, "bitmod-w4g32").with_input_scales(scales)
        activations = activations_of(12, 3, 64, torch.float16).to(device)
        layer = QuantizedLinear(tensor, device=device)
        assert_within_bound(layer(activations), activations, tensor)
        assert "input_scales" in layer.state_dict()

    @pytest.mark.parametrize("format", ["bitmod-w4g32", "int-asym-w4g16"])
    def test_torch_compile_takes_it_without_a_break(self, format: str, device: str) -> None:
        layer = QuantizedLinear(quantize(weights_of(13, 8, 64), format), device=device)
        activations = activations_of(14, 3, 64, torch.float16).to(device)

        def twice(given: torch.Tensor) -> torch.Tensor:
            return layer(given) * 2

        compiled: Any = torch.compile(twice, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(activations), twice(activations))

    def test_the_operation_keeps_the_rules_of_custom_operations(self, device: str) -> None:
        layer = QuantizedLinear(quantize(weights_of(13, 8, 64), "int-asym-w4g16"), device=device)
        held: Any = layer._weights
        activations = activations_of(14, 3, 64, torch.float16).to(device)
        torch.library.opcheck(weight_only_any, (activations, list(held.tensors), list(held.numbers)))


class TestRefusals:
    def test_activations_of_another_type_or_shape(self) -> None:
        for format in ("bitmod-w4g32", "int-asym-w4g16"):
            layer = QuantizedLinear(quantize(weights_of(1, 8, 64), format))
            with pytest.raises(InputError, match=r"activations of torch.float32; expected torch.float16 or torch.bf"):
                layer(torch.zeros(2, 64))
            with pytest.raises(InputError, match=r"activations \[2, 63\]; expected \[\.\.\., 64\]"):
                layer(torch.zeros(2, 63, dtype=torch.float16))

    @pytest.mark.parametrize(
        ("format", "reason"),
        [
            ("gobo-w3", "no kernel of a linear layer"),
            ("fp16", "no kernel of a linear layer"),
            ("int-w4a8g32", "expected int-w4g32"),
            ("int-w4g32:axis=output", "lie along the outputs"),
        ],
    )
    def test_formats_without_a_kernel(self, format: str, reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            QuantizedLinear(quantize(weights_of(1, 8, 64), format))

    @pytest.mark.parametrize("format", ["int-w4g32", "int-w4g24"])
    def test_a_code_that_is_no_level(self, format: str) -> None:
        tensor = quantize(weights_of(1, 8, 64), format)
        codes = np.full_like(tensor.parts["codes"], 0x88)
        with pytest.raises(InputError, match="no level"):
            QuantizedLinear(dataclasses.replace(tensor, parts={**tensor.parts, "codes": codes}))

    def test_a_bias_of_another_length(self) -> None:
        with pytest.raises(InputError, match=r"a bias \[7\]; expected \[8\]"):
            QuantizedLinear(quantize(weights_of(1, 8, 64), "int-w4g32"), torch.zeros(7))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self) -> None:
        with pytest.raises(MissingToolError, match="finds no GPU"):
            QuantizedLinear(quantize(weights_of(1, 8, 64), "int-w4g32"), device="cuda")


class TestSwap:
    def _model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(32, 8, bias=False))
        ).half()

    def test_every_chosen_layer_is_replaced(self) -> None:
        model, told = self._model(), []
        kept = model[2][0]
        replaced = swap_linears(model, lambda name, _: "bitmod-w4g32" if name == "0" else None, told.append)
        assert replaced == told == ["0"]
        assert isinstance(model[0], QuantizedLinear)
        assert model[2][0] is kept
        assert "64, 32, bitmod-w4g32, bias=True" in repr(model)
        activations = activations_of(1, 3, 64, torch.float16)
        found = model(activations)
        assert found.shape == (3, 8)
        assert torch.equal(model.half().to("cpu")(activations), found)
        assert model.bfloat16()(activations.bfloat16()).dtype == torch.bfloat16  # the packed weights are what they were

    def test_an_error_names_the_layer(self) -> None:
        with pytest.raises(InputError, match=r"^2\.0: there is no kernel"):
            swap_linears(self._model(), lambda name, _: "gobo-w3" if name == "2.0" else None)
        tensor = quantize(weights_of(1, 8, 64), "int-w4g32")
        with pytest.raises(InputError, match=r"^0: weights \[8, 64\]; expected \[32, 64\]"):
            swap_linears(self._model(), lambda *_: tensor)


@pytest.mark.shared
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gpt2-124m-attn", "minilm-l6-v2", "tiny-llm-13m-block"])
def test_layers_of_real_models(name: str, device: str, shared: Path) -> None:
    """Some rows of every matrix of the first block: linear layers, the exact BitMoD kernel, and the quantizers."""
    model = open_model(shared / "models" / name)
    for index, matrix_name in enumerate(model.matrix_names[:6]):
        weights = np.ascontiguousarray(model.matrix(matrix_name)[:48], dtype=np.float32)
        format = ("bitmod-w4g128", "bitmod-w3g128", "olive-w4")[index % 3]
        tensor = quantizers.quantize(weights, format, device=device)
        for part, expected in quantize(weights, format).parts.items():
            assert np.array_equal(tensor.parts[part], expected), (matrix_name, part)
        activations = activations_of(index, 3, weights.shape[1], torch.float16)
        assert_within_bound(QuantizedLinear(tensor, device=device)(activations.to(device)), activations, tensor)
        spec = OutlierVictimSpec() if format == "olive-w4" else BitSerialSpec()
        found = exact.multiply(spec, tensor, activations.numpy(), device=device)
        wanted = functional.multiply(spec, tensor, activations.numpy())
        assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32)), matrix_name
