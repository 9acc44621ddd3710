"""Quantized activations: the arithmetic of weights, token by token or at a scale of the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from termwise.algorithms.activations import (
    InputSample,
    activation_format,
    activation_quantizer,
    needs_calibration,
    sample_inputs,
)
from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.formats import get_format
from termwise.algorithms.loaded_model import ActivationQuantizer
from termwise.algorithms.models import Model, open_model
from termwise.algorithms.perplexity import Evaluator
from termwise.algorithms.quantize import quantize
from termwise.algorithms.text import read_text, text_of

TEXT = text_of("words", ["a short one", "another document, which is longer than the window of sixteen tokens"])
DYNAMIC = ["int-w8a8", "int-asym-w4a8g32", "bitmod-w4a6g32", "fp6_e2m3-w6a4", "mxfp4-w4a8", "mxfp4-w4a6", "mxfp4-w4a4"]
STATIC = ["olive-w4a4", "olive-w8a8", "olive-w4a8", "ant-w4a4", "ant-w4a8g32", "nvfp4-w4a4"]


def activations(tokens: int = 96, channels: int = 64, seed: int = 1) -> Any:
    """Random activations with a few large channels, as real ones have: float32 [tokens, channels]."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((tokens, channels)).astype(np.float32)
    values[:, generator.integers(channels, size=2)] *= 30
    return values


def sample_of(values: Any) -> InputSample:
    """The sample that holds all of ``values``."""
    return InputSample(rows=values, minimum=values.min(axis=0), maximum=values.max(axis=0), tokens=len(values))


def quantizer_of(name: str) -> ActivationQuantizer:
    """The quantizer of a format, calibrated where that must be."""
    quantizer = activation_quantizer(get_format(name), sample_of(activations(seed=2)))
    assert quantizer is not None
    return quantizer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int-w4g128", None),
        ("int-w4a8g128", "int-w8"),
        ("int-asym-w3a8g64", "int-w8"),
        ("bitmod-w4a6g128", "int-w6"),
        ("fp6_e2m3-w6a5g128", "int-w5"),
        ("olive-w4a8", "olive-w8"),
        ("olive-w8a8:outlier=e2m5", "olive-w8:outlier=e2m5"),
        ("olive-w8a4:outlier=e2m5", "olive-w4"),
        ("ant-w4a4g64:types=int,pot", "ant-w4:types=int,pot"),
        ("ant-w4a8:types=int", "ant-w8:types=int"),
        ("ant-w4a8:types=pot,flint", "ant-w8:types=flint"),
        ("mxfp4-w4a4", "mxfp4"),
        ("mxfp4-w4a6", "mxfp6_e2m3"),
        ("mxint8-w8a8", "mxfp8_e4m3"),
        ("nvfp4-w4a4", "nvfp4"),
    ],
)
def test_the_weights_say_what_activations_become(name: str, expected: str | None) -> None:
    found = activation_format(get_format(name))
    assert (None if found is None else found.name) == expected


def test_a_format_none_of_whose_types_has_the_width_of_its_activations_is_refused() -> None:
    with pytest.raises(InputError, match="none of pot has 8-bit activations"):
        activation_format(get_format("ant-w4a8:types=pot"))


def test_activations_that_are_not_finite_are_called_activations() -> None:
    with pytest.raises(InputError, match=r"^activations: 1 NaN or infinite"):
        quantizer_of("int-w4a8g128")(np.array([[1.0, np.nan]], dtype=np.float32))


def test_activations_in_floating_point_are_left_alone() -> None:
    assert activation_quantizer(get_format("int-w4g128")) is None


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_dynamic_scale_is_that_of_weights(name: str) -> None:
    format = get_format(name)
    quantizer = activation_quantizer(format)
    stored = activation_format(format)
    assert quantizer is not None
    assert stored is not None
    assert not needs_calibration(format)
    values = activations()
    assert np.array_equal(quantizer(values), quantize(values, stored).dequantize())


def test_a_token_of_integers_has_one_scale_of_its_own() -> None:
    values = activations(tokens=3)
    quantizer = activation_quantizer(get_format("int-w4a8g32"))
    assert quantizer is not None
    for token, found in zip(values, quantizer(values), strict=True):
        scale = np.float16(np.abs(token).max() / 127)
        # Ties aside, which random numbers do not make, the nearest multiple of the FP16 scale.
        expected = np.clip(np.rint(token.astype(np.float64) / scale), -127, 127) * np.float64(scale)
        assert np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(
    "name", [*DYNAMIC, "olive-w4a4", "olive-w8a8", "olive-w4a8", "nvfp4-w4a4", "ant-w4a4", "ant-w4a8g32"]
)
def test_no_token_changes_another_one(name: str) -> None:
    quantizer = quantizer_of(name)
    values = activations(tokens=5)
    alone = np.concatenate([quantizer(values[index : index + 1]) for index in range(5)])
    together = quantizer(np.concatenate([values, np.full((1, 64), 1e4, dtype=np.float32)]))
    assert np.array_equal(together[:5], alone)


@pytest.mark.parametrize("name", STATIC)
def test_a_static_scale_needs_a_sample(name: str) -> None:
    assert needs_calibration(get_format(name))
    with pytest.raises(InputError, match=r"layer\.3: activations of .* expected a sample"):
        activation_quantizer(get_format(name), name="layer.3")


@pytest.mark.parametrize("name", ["olive-w4a4", "olive-w8a8"])
def test_the_calibration_is_the_search_of_one_row_of_weights(name: str) -> None:
    values = activations()
    quantizer = activation_quantizer(get_format(name), sample_of(values))
    stored = activation_format(get_format(name))
    assert quantizer is not None
    assert stored is not None
    assert np.array_equal(quantizer(values), quantize(values.reshape(1, -1), stored).dequantize().reshape(values.shape))


def test_the_largest_value_read_counts_where_the_sample_lacks_it() -> None:
    values = activations()
    sample = InputSample(
        rows=values, minimum=values.min(axis=0), maximum=np.full(64, 4 * values.max(), dtype=np.float32), tokens=1000
    )
    with_it = activation_quantizer(get_format("nvfp4-w4a4"), sample)
    assert with_it is not None
    largest = np.full((1, 64), sample.largest, dtype=np.float32)
    # 4 x the largest sampled magnitude is the limit: FP4's 6 x a scale whose three roundings (FP32 twice, float32 once)
    # make 3 x 2**-24 at most
    assert with_it(largest) == pytest.approx(largest, rel=2**-22)
    assert np.array_equal(with_it(2 * largest), with_it(largest))


def test_a_pair_of_outliers_ends_with_its_token() -> None:
    """With an odd number of channels the last one has no partner in the next token."""
    values = activations(channels=33)
    values[:, 32] = 500
    values[:, 0] = -400
    quantizer = activation_quantizer(get_format("olive-w4a4"), sample_of(values))
    assert quantizer is not None
    assert (quantizer(values)[:, [0, 32]] != 0).all()


class TestSample:
    def test_it_holds_tokens_that_came_and_the_extremes_of_all(self, small_model: Path) -> None:
        evaluator = Evaluator(open_model(small_model), TEXT)
        seen: dict[str, list[Any]] = {}
        evaluator.observe_inputs(lambda name, inputs: seen.setdefault(name, []).append(inputs.copy()))
        samples = sample_inputs(evaluator, values=320)
        assert set(samples) == set(open_model(small_model).matrix_names)
        tokens = sum(1 + len(document) for document in TEXT.documents)  # one byte is one token, after the first
        for name, sample in samples.items():
            inputs = np.concatenate(seen[name])
            assert len(inputs) == sample.tokens == tokens
            assert sample.rows.shape == (320 // inputs.shape[1], inputs.shape[1])
            assert {row.tobytes() for row in sample.rows} <= {row.tobytes() for row in inputs}
            assert np.array_equal(sample.minimum, inputs.min(axis=0))
            assert np.array_equal(sample.maximum, inputs.max(axis=0))
            assert sample.largest == np.abs(inputs).max()

    def test_the_seed_decides_alone(self, small_model: Path) -> None:
        evaluator = Evaluator(open_model(small_model), TEXT)
        first, again, other = (sample_inputs(evaluator, values=640, seed=seed) for seed in (1, 1, 2))
        assert all(np.array_equal(first[name].rows, again[name].rows) for name in first)
        assert any(not np.array_equal(first[name].rows, other[name].rows) for name in first)

    def test_reading_stops_after_the_tokens_asked_for(self, small_model: Path) -> None:
        samples = sample_inputs(Evaluator(open_model(small_model), TEXT), tokens=1)
        assert {sample.tokens for sample in samples.values()} == {1 + len(TEXT.documents[0])}

    def test_scales_divide_everything(self) -> None:
        sample = sample_of(activations())
        divided = sample.divided_by(np.full(64, 2, dtype=np.float32))
        assert np.array_equal(divided.rows, sample.rows / 2)
        assert divided.largest == sample.largest / 2


def save_gpt2(folder: Path, save_small_llama: Callable[..., Path]) -> Model:
    """A random GPT-2, whose layers are ``Conv1D``, with the tokenizer of the small Llama."""
    save_small_llama(folder, context=16)
    torch.manual_seed(4)
    configuration = transformers.GPT2Config(
        vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(configuration).save_pretrained(folder)
    return open_model(folder)


class TestReplacedLayers:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_layer_multiplies_quantized_inputs(
        self, family: str, tmp_path: Path, save_small_llama: Callable[..., Path]
    ) -> None:
        """Its output is that of torch's own product of the quantized input and the weights that were put in place."""
        name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[family]
        if family == "gpt2":
            model = save_gpt2(tmp_path, save_small_llama)
        else:
            model = open_model(save_small_llama(tmp_path, context=16))
        evaluator = Evaluator(model, TEXT)
        quantizer = activation_quantizer(get_format("int-w4a4g32"))
        assert quantizer is not None
        weights = model.matrix(name).astype(np.float32)
        scales = np.exp(np.random.default_rng(1).standard_normal(weights.shape[1])).astype(np.float32)
        evaluator.replace(name, weights * scales, activation=quantizer, input_scales=scales)
        inputs: list[Any] = []
        evaluator.observe_inputs(lambda layer, values: inputs.append(values.copy()) if layer == name else None)
        outputs: list[Any] = []
        layer = evaluator._module.get_submodule(name)
        handle = layer.register_forward_hook(lambda module, arguments, output: outputs.append(output.clone()))
        evaluator.observe_inputs(lambda layer, values: None)
        handle.remove()
        assert len(inputs) == len(outputs) == len(evaluator._windows)
        for given, found in zip(inputs, outputs, strict=True):
            quantized = quantizer(given / scales)
            expected = quantized.astype(np.float64) @ (weights * scales).astype(np.float64).T
            bias = 0 if layer.bias is None else layer.bias.detach().numpy()
            # a float32 sum of n products errs by at most (n + 1) x 2**-24 x the sum of their magnitudes
            bound = (weights.shape[1] + 2) * 2**-24 * (np.abs(quantized) @ np.abs(weights * scales).T + np.abs(bias))
            assert (np.abs(found[0].numpy() - (expected + bias)) <= bound).all()

    def test_scales_that_are_powers_of_two_change_nothing_and_restoring_undoes(self, small_model: Path) -> None:
        model = open_model(small_model)
        evaluator = Evaluator(model, TEXT)
        before = evaluator.perplexity()
        for name, weights in model.matrices():
            scales = np.exp2(np.arange(weights.shape[1]) % 5 - 2).astype(np.float32)
            evaluator.replace(name, weights.astype(np.float32) * scales, input_scales=scales)
        assert evaluator.perplexity() == before
        for name, weights in model.matrices():
            evaluator.replace(name, weights.astype(np.float32), activation=quantizer_of("int-w4a4g32"))
        assert evaluator.perplexity() != before
        evaluator.restore()
        assert evaluator.perplexity() == before

    def test_replacing_again_forgets_what_the_input_went_through(self, small_model: Path) -> None:
        model = open_model(small_model)
        evaluator = Evaluator(model, TEXT)
        before = evaluator.perplexity()
        for name, weights in model.matrices():
            evaluator.replace(name, weights.astype(np.float32), activation=quantizer_of("int-w4a4g32"))
            evaluator.replace(name, weights.astype(np.float32))
        assert evaluator.perplexity() == before

    @pytest.mark.parametrize(("scales", "message"), [(np.ones(3), r"expected \[32\]"), (np.zeros(32), "positive")])
    def test_bad_input_scales_are_refused(self, small_model: Path, scales: Any, message: str) -> None:
        evaluator = Evaluator(open_model(small_model), TEXT)
        with pytest.raises(InputError, match=message):
            evaluator.replace("lm_head", np.ones((257, 32), np.float32), input_scales=scales.astype(np.float32))

    def test_an_input_that_overflows_is_an_error_that_names_the_layer(self, small_model: Path) -> None:
        model = open_model(small_model)
        evaluator = Evaluator(model, TEXT)
        for name, weights in model.matrices():
            activation = quantizer_of("int-w8a8") if name == "lm_head" else None
            evaluator.replace(name, weights * np.float32(1e30), activation=activation)
        with pytest.raises(TermwiseError, match="the input of lm_head is NaN or infinite"):
            evaluator.perplexity()

    def test_a_layer_that_is_never_called_is_an_error(self, small_model: Path) -> None:
        model = open_model(small_model)
        evaluator = Evaluator(model, TEXT)
        weights = model.matrix("lm_head").astype(np.float32)
        evaluator.replace("lm_head", weights, activation=quantizer_of("int-w8a8"))
        evaluator._inputs["lm_head"].remove()
        with pytest.raises(TermwiseError, match="weights of lm_head without calling that layer"):
            evaluator.perplexity()


@pytest.mark.shared
def test_eight_bit_activations_cost_little_and_four_bits_much(shared: Path) -> None:
    """Of perplexity 24.132 with 8-bit weights: less than 1 % with 8-bit tokens, more than a tenth with 4-bit ones."""
    model = open_model(shared / "models" / "tinystories-656k")
    evaluator = Evaluator(model, read_text(shared / "text" / "tinystories-text" / "tinystories_eval_clean.txt"))
    found = {}
    for name in ("int-w8", "int-w8a8", "int-w8a4"):
        format = get_format(name)
        for layer, weights in model.matrices():
            evaluator.replace(
                layer, quantize(weights, format.weights_only).dequantize(), activation=activation_quantizer(format)
            )
        found[name] = evaluator.perplexity().per_token
        evaluator.restore()
    assert found["int-w8a8"] == pytest.approx(found["int-w8"], rel=0.01)
    assert found["int-w8a4"] > 1.1 * found["int-w8"]
