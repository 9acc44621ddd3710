"""Models: linear layers found by module in every architecture, and one sentence for every kind of bad input."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from termwise.algorithms.errors import InputError
from termwise.algorithms.models import open_model
from termwise.algorithms.shapes import AttentionShape

COMMON = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGURATIONS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**COMMON, intermediate_size=64, num_key_value_heads=2),
    "llama_tied": transformers.LlamaConfig(
        **COMMON, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "mistral": transformers.MistralConfig(**COMMON, intermediate_size=64, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**COMMON, intermediate_size=64, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "opt": transformers.OPTConfig(
        **COMMON, ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=32, do_layer_norm_before=True
    ),
    "phi": transformers.PhiConfig(**COMMON, intermediate_size=64, max_position_embeddings=32),
    "bert": transformers.BertConfig(**COMMON, intermediate_size=64, max_position_embeddings=32),
}


def build(name: str) -> Any:
    """A random model of one architecture."""
    torch.manual_seed(1)
    configuration = CONFIGURATIONS[name]
    if name == "bert":
        return transformers.BertModel(configuration)
    return transformers.AutoModelForCausalLM.from_config(configuration)


def expected_linears(module: Any) -> dict[str, Any]:
    """Weights of every linear layer as [outputs, inputs]."""
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return {
        name: layer.weight.detach().T if isinstance(layer, kinds[1]) else layer.weight.detach()
        for name, layer in module.named_modules()
        if isinstance(layer, kinds)
    }


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_linear_layer_is_found_with_its_values(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = build(name).to(dtype)
    module.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    expected = expected_linears(module)
    found = dict(model.matrices())
    assert set(found) == set(expected)
    assert list(found) == list(model.matrix_names)
    for path, weights in found.items():
        assert weights.dtype == (np.float16 if dtype == torch.float16 else np.float32)
        np.testing.assert_array_equal(weights.astype(np.float32), expected[path].float().numpy())
    assert {(linear.name, linear.outputs, linear.inputs) for linear in model.shape.linears} == {
        (path, *weights.shape) for path, weights in found.items()
    }


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_attention_and_head_are_known(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    shape = open_model(tmp_path).shape
    grouped = name in ("llama", "llama_tied", "mistral", "qwen2")
    assert shape.attention == AttentionShape(
        layers=2,
        heads=4,
        key_value_heads=2 if grouped else 4,
        head_size=8,
        window=4096 if name == "mistral" else None,
        windowed_layers=2 if name == "mistral" else 0,
    )
    assert shape.head == (None if name == "bert" else "lm_head")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_a_prefix_more_or_less_does_not_matter(name: str, tmp_path: Path) -> None:
    module = build(name)
    module.save_pretrained(tmp_path)
    prefix = f"{module.base_model_prefix}."
    tensors = load_file(tmp_path / "model.safetensors")
    if name == "bert":
        renamed = {prefix + key: value for key, value in tensors.items()}
    else:
        renamed = {key.removeprefix(prefix): value for key, value in tensors.items()}
    save_torch(renamed, tmp_path / "model.safetensors")
    assert set(open_model(tmp_path).matrix_names) == set(expected_linears(module))
    assert open_model(tmp_path).structure.missing == ()


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    module = build("llama")
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert set(open_model(tmp_path).matrix_names) == set(expected_linears(module))


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    first = open_model(tmp_path).digest
    assert open_model(tmp_path).digest == first
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert open_model(tmp_path).digest != first


def test_a_set_of_matrices_leaves_tables_out(tmp_path: Path) -> None:
    weights = np.ones((4, 6), dtype=np.float16)
    names = ["h.10.a.weight", "h.2.a.weight", "wte.weight", "model.embed_tokens.weight", "word_embeddings.weight"]
    save_file(dict.fromkeys(names, weights) | {"h.2.bias": np.ones(4, np.float32)}, tmp_path / "x.safetensors")
    model = open_model(tmp_path)
    assert model.matrix_names == ("h.2.a", "h.10.a")
    assert not model.runnable
    assert model.shape.attention is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_torch(tensors, tmp_path / "model.safetensors")
    model = open_model(tmp_path)
    assert not model.runnable
    assert "lacks 1 tensors of LlamaForCausalLM: model.embed_tokens.weight" in str(model.not_runnable_reason)
    assert len(model.matrix_names) == 15


def test_a_head_that_is_missing_is_not_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_torch(tensors, tmp_path / "model.safetensors")
    assert open_model(tmp_path).shape.head is None


def test_attention_is_unknown_where_one_shape_does_not_describe_it(tmp_path: Path) -> None:
    configuration = transformers.T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(configuration).save_pretrained(tmp_path)
    assert open_model(tmp_path).shape.attention is None


def test_a_model_can_be_sent_to_another_process(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    model = open_model(tmp_path)
    sent = pickle.loads(pickle.dumps(model))
    assert sent.shape == model.shape
    assert sent.digest == model.digest
    for (name, weights), (name_sent, weights_sent) in zip(model.matrices(), sent.matrices(), strict=True):
        assert name == name_sent
        np.testing.assert_array_equal(weights, weights_sent)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    configuration = transformers.MixtralConfig(
        **COMMON, intermediate_size=64, num_key_value_heads=2, num_local_experts=2
    )
    transformers.MixtralForCausalLM(configuration).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="mixture of experts"):
        open_model(tmp_path).matrix_names  # noqa: B018


def test_an_encoder_is_not_runnable(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    assert open_model(tmp_path).not_runnable_reason == "BertModel has no causal language-model head"


class TestBadInput:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A whole model without a tokenizer."""
        build("llama").save_pretrained(tmp_path)
        return tmp_path

    def refusal(self, reference: str | Path) -> str:
        """The sentence with which opening or reading a model is refused."""
        with pytest.raises(InputError) as caught:
            list(open_model(reference).matrices())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_name_that_is_none(self) -> None:
        assert "did you mean 'tiny'" in self.refusal("tinny")

    def test_a_shape_has_no_weights(self) -> None:
        assert "known shape without weights" in self.refusal("llama-2-7b")

    def test_a_folder_without_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        assert "holds no *.safetensors file" in self.refusal(folder)

    def test_pickles_are_not_opened(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        assert "found only pytorch_model.bin, and pickled weights are never opened" in self.refusal(folder)

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_a_truncated_file(self, folder: Path, keep: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        message = self.refusal(folder)
        assert "model.safetensors is not a whole safetensors file" in message

    def test_a_corrupt_header(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[8:40] = b"x" * 32
        path.write_bytes(data)
        assert "is not a whole safetensors file" in self.refusal(folder)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, folder: Path, bad: float) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4:6] = bad
        save_torch(tensors, folder / "model.safetensors")
        message = self.refusal(folder)
        assert "'model.layers.1.mlp.up_proj.weight' holds 2 NaN or infinite values" in message

    def test_a_config_that_is_no_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        assert "config.json is not JSON" in self.refusal(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": None}, "has no key 'model_type'"),
            ({"model_type": "lama", "architectures": None}, "model_type 'lama' is not one that transformers knows"),
            ({"quantization_config": {"quant_method": "gptq"}}, "quantized already (gptq)"),
            ({"intermediate_size": 48}, "expected [48, 32] from config.json"),
            ({"num_attention_heads": "many"}, "config.json"),
        ],
    )
    def test_a_config_that_does_not_fit(self, folder: Path, change: dict[str, Any], message: str) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        assert message in self.refusal(folder)

    def test_an_index_that_names_a_missing_shard(self, tmp_path: Path) -> None:
        build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
        sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
        assert "names 1 missing shard" in self.refusal(tmp_path)

    def test_a_config_with_fewer_layers_than_the_checkpoint(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] = 1
        (folder / "config.json").write_text(json.dumps(config))
        assert "too few layers for the tensor 'model.layers.1." in self.refusal(folder)

    @pytest.mark.shared
    def test_two_llama2c_models_in_one_folder(self, shared: Path, tmp_path: Path) -> None:
        content = (shared / "models" / "stories260k" / "stories260K.bin").read_bytes()
        for name in ("a.bin", "b.bin"):
            (tmp_path / name).write_bytes(content)
        assert "holds 2 llama2.c models (a.bin, b.bin)" in self.refusal(tmp_path)
        (tmp_path / "b.bin").write_bytes(content[:-4])  # shorter than its header says: no model
        assert open_model(tmp_path).location == tmp_path / "a.bin"

    def test_integer_weights(self, tmp_path: Path) -> None:
        save_file({"a.weight": np.ones((4, 4), np.int8)}, tmp_path / "x.safetensors")
        assert "dtype I8" in self.refusal(tmp_path)

    def test_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "x.bin").write_bytes(struct.pack("<7i", 1, 2, 3, 4, 5, 6, 7))
        assert "expected a directory in Hugging Face format" in self.refusal(tmp_path / "x.bin")


def test_tiny_is_what_its_card_says() -> None:
    model = open_model("tiny")
    assert model.config is not None
    assert model.config["architectures"] == ["LlamaForCausalLM"]
    assert model.shape.attention == AttentionShape(layers=4, heads=4, key_value_heads=2, head_size=64)
    assert len(model.matrix_names) == 4 * 7 + 1
    assert {size % 128 for linear in model.shape.linears for size in (linear.outputs, linear.inputs)} == {0}
    assert {weights.dtype for _, weights in model.matrices()} == {np.dtype(np.float16)}
    assert sum(path.stat().st_size for path in model.location.iterdir()) <= 8_000_000
    assert model.runnable


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "linears", "runnable"),
    [
        ("tinystories-656k", 15, True),
        ("stories260k", 36, True),
        ("minilm-l6-v2", 37, False),
        ("gpt2-124m-attn", 48, False),
        ("tiny-llm-13m-block", 7, False),
    ],
)
def test_real_models_load(shared: Path, name: str, linears: int, runnable: bool) -> None:
    model = open_model(shared / "models" / name)
    assert len(model.matrix_names) == linears
    assert model.runnable is runnable
    for path, weights in model.matrices():
        assert weights.ndim == 2, path
