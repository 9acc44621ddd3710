"""Exports: what another program's own reader makes of them is what ``dequantize`` gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from termwise.algorithms.errors import InputError
from termwise.algorithms.export import export_compressed_tensors, export_gguf
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.models import Model, open_model
from termwise.algorithms.packed_model import PackedModelWriter
from termwise.algorithms.quantize import QuantizedTensor, quantize


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose layers have 64 or 96 inputs, with fewer key than query heads."""
    folder = tmp_path_factory.mktemp("llama") / "small"
    torch.manual_seed(7)
    configuration = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(configuration).to(torch.float16).save_pretrained(folder)
    return folder


def quantized(model: Model, format: Format | Mapping[str, Format]) -> dict[str, QuantizedTensor]:
    formats = format if isinstance(format, Mapping) else dict.fromkeys(model.matrix_names, format)
    return {name: quantize(model.matrix(name), formats[name]) for name in formats}


def decompressed(directory: Path, name: str) -> torch.Tensor:
    """The weights of a layer, as the library's own compressor reads them."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    schemes = [scheme for scheme in parsed.config_groups.values() if isinstance(scheme, QuantizationScheme)]
    scheme = next(scheme for scheme in schemes if scheme.targets == ["Linear"] or name in scheme.targets)
    stored = {key: value for file in directory.glob("*.safetensors") for key, value in load_torch(file).items()}
    state = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
    compressor = BaseCompressor.load_from_registry("pack-quantized")
    weight: torch.Tensor = type(compressor).decompress(state, scheme)["weight"]
    return weight


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("family", ["int", "int-asym"])
@pytest.mark.parametrize("group", ["", "g32"])
def test_pack_quantized_is_read_as_dequantized(tmp_path: Path, llama: Path, family: str, bits: int, group: str) -> None:
    """In FP16 scales the library's product is rounded once to FP16; in FP32 ones it is exact."""
    model = open_model(llama)
    name = "model.layers.1.self_attn.k_proj"
    packed = quantized(model, {name: get_format(f"{family}-w{bits}{group}")})
    expected = packed[name].dequantize()
    export_compressed_tensors(packed, model, tmp_path / "half")
    found = decompressed(tmp_path / "half", name)
    assert found.dtype == torch.float16
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float16))
    export_compressed_tensors(packed, model, tmp_path / "single", scale_dtype="float32")
    found = decompressed(tmp_path / "single", name)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_runs_the_compressed_tensors(tmp_path: Path, llama: Path, tied: bool) -> None:
    """Mixed precision, one layer left as it was, from a packed directory in shards."""
    source = tmp_path / "source"
    plain = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    if tied:
        plain.config.tie_word_embeddings = True
        plain.tie_weights()
    plain.save_pretrained(source)
    model = open_model(source)
    formats = {
        name: get_format("int-w4g32" if "mlp" in name else "int-w8")
        for name in model.matrix_names
        if "o_proj" not in name
    }
    packed = quantized(model, formats)
    with PackedModelWriter(model, formats, tmp_path / "packed") as writer:
        for name, tensor in packed.items():
            writer.add(name, tensor)
        writer.finish()
    export_compressed_tensors(tmp_path / "packed", model, tmp_path / "out", scale_dtype="float32", shard_bytes=20_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in packed.items():
        plain.get_submodule(name).weight = torch.nn.Parameter(torch.from_numpy(tensor.dequantize()))
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=0, atol=0)
    for name in model.matrix_names:  # decompressed by the first use
        np.testing.assert_array_equal(
            loaded.get_submodule(name).weight.detach().numpy(), plain.get_submodule(name).weight.detach().numpy()
        )


@pytest.mark.parametrize("name", ["int-w4g32", "int-asym-w4g32", "int-asym-w8"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_dequantizes_the_compressed_tensors(tmp_path: Path, llama: Path, name: str) -> None:
    model = open_model(llama)
    packed = quantized(model, get_format(name))
    export_compressed_tensors(packed, model, tmp_path / "out")
    how = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=how)
    for layer, tensor in packed.items():
        expected = tensor.dequantize().astype(np.float16)
        np.testing.assert_array_equal(loaded.get_submodule(layer).weight.detach().numpy(), expected)


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("bitmod-w4g32", "its codes are no integers"),
        ("int-w4g48", "groups of 48 do not divide its 64 inputs"),
        ("int-w4g32:scale=e8m0", "its scales are e8m0"),
        ("int-w4g32:axis=output", "its groups lie along the outputs"),
        ("int-w4a8g32", "it quantizes activations"),
    ],
)
def test_pack_quantized_refuses_what_it_cannot_express(tmp_path: Path, llama: Path, format: str, said: str) -> None:
    model = open_model(llama)
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(InputError, match=rf"layer '{name}' \({format}\) .*{said}"):
        export_compressed_tensors(quantized(model, {name: get_format(format)}), model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_layers_must_be_those_of_the_model(tmp_path: Path, llama: Path) -> None:
    model = open_model(llama)
    name = "model.layers.0.self_attn.q_proj"
    tensor = quantize(model.matrix(name), "int-w4g32")
    scaled = tensor.with_input_scales(np.full(64, 2, np.float32))
    with pytest.raises(InputError, match="its inputs are scaled"):
        export_compressed_tensors({name: scaled}, model, tmp_path / "out")
    with pytest.raises(InputError, match="unknown layer 'nobody'"):
        export_gguf({"nobody": tensor}, model, tmp_path / "out.gguf")
    with pytest.raises(InputError, match=r"is quantized as \[64, 64\]; expected \[40, 64\]"):
        export_gguf({"lm_head": tensor}, model, tmp_path / "out.gguf")
    save_file({"a.weight": np.ones((4, 32), np.float16)}, tmp_path / "x.safetensors")
    matrices = open_model(tmp_path)
    with pytest.raises(InputError, match=r"has no config\.json"):
        export_compressed_tensors(quantized(matrices, get_format("int-w4g32")), matrices, tmp_path / "out")
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=8)
    ).save_pretrained(tmp_path / "gpt2")
    gpt2 = open_model(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"its module is no torch\.nn\.Linear"):
        export_compressed_tensors(quantized(gpt2, get_format("int-w4g32")), gpt2, tmp_path / "out")


def gguf_tensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Dequantized tensors of a GGUF file, by name, as the gguf package reads them."""
    reader = gguf.GGUFReader(file)
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def unpermuted(weights: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows as transformers has them, of rows in llama.cpp's order: even features of every head, then odd ones."""
    by_head = weights.reshape(heads, -1, weights.shape[1])
    return np.concatenate([by_head[:, 0::2], by_head[:, 1::2]], axis=1).reshape(weights.shape)


@pytest.mark.parametrize(("name", "kind"), [("int-w4g32", "Q4_0"), ("mxfp4", "MXFP4")])
def test_gguf_is_read_as_dequantized(tmp_path: Path, llama: Path, name: str, kind: str) -> None:
    model = open_model(llama)
    formats = {layer: get_format(name) for layer in model.matrix_names if layer != "lm_head"}
    packed = quantized(model, formats)
    notes = export_gguf(packed, model, tmp_path / "x.gguf")
    assert notes == ("no tokenizer: the model has no tokenizer.json",)
    found = gguf_tensors(tmp_path / "x.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    places = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    places |= {f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"} | {"self_attn.o_proj": "attn_output"}
    for layer, tensor in packed.items():
        _, _, number, place = layer.split(".", 3)
        key = f"blk.{number}.{places[place]}.weight"
        assert kinds[key] == kind
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(place)
        values = found.pop(key)
        np.testing.assert_array_equal(values if heads is None else unpermuted(values, heads), tensor.dequantize())
    assert kinds["output.weight"] == kinds["token_embd.weight"] == "F16"
    original = load_file(llama / "model.safetensors")
    others = {"output": "lm_head", "token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for number in range(2):
        others[f"blk.{number}.attn_norm"] = f"model.layers.{number}.input_layernorm"
        others[f"blk.{number}.ffn_norm"] = f"model.layers.{number}.post_attention_layernorm"
    assert found.keys() == {f"{name}.weight" for name in others}
    for ours, theirs in others.items():
        np.testing.assert_array_equal(found[f"{ours}.weight"], original[f"{theirs}.weight"])


@pytest.mark.parametrize("name", ["int-w4g32", "mxfp4"])
def test_transformers_reads_the_gguf_as_the_quantized_model(tmp_path: Path, llama: Path, name: str) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate")
    model = open_model(llama)
    packed = quantized(model, get_format(name))
    export_gguf(packed, model, tmp_path / "x.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    modules = dict(loaded.named_modules())
    for layer, tensor in packed.items():
        np.testing.assert_array_equal(modules[layer].weight.detach().numpy(), tensor.dequantize())
    expected = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for layer, tensor in packed.items():
        expected.get_submodule(layer).weight.data = torch.from_numpy(tensor.dequantize())
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits, rtol=0, atol=0)


def test_gguf_keeps_bfloat16_and_has_the_tokenizer(tmp_path: Path, small_model: Path) -> None:
    """A tokenizer of bytes; token 0 begins a sequence."""
    whole = transformers.LlamaForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_bytes((small_model / "tokenizer.json").read_bytes())
    model = open_model(tmp_path / "m")
    packed = quantized(model, {"model.layers.0.self_attn.q_proj": get_format("mxfp4")})
    assert export_gguf(packed, model, tmp_path / "x.gguf") == ()
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert embedding.tensor_type.name == "BF16"
    with safe_open(tmp_path / "m" / "model.safetensors", framework="np") as stored:
        original = stored.get_tensor("model.embed_tokens.weight")
    assert original.dtype == ml_dtypes.bfloat16
    assert embedding.data.tobytes() == original.tobytes()
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    vocabulary = json.loads((small_model / "tokenizer.json").read_text())["model"]["vocab"]
    assert tokens == sorted(vocabulary, key=vocabulary.__getitem__)
    assert reader.fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert reader.fields["tokenizer.ggml.bos_token_id"].contents() == 0


def test_gguf_has_the_biases_in_the_order_of_the_rows(tmp_path: Path) -> None:
    configuration = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
    )
    module = transformers.LlamaForCausalLM(configuration)
    biases = torch.arange(32, dtype=torch.float32)
    module.model.layers[0].self_attn.q_proj.bias.data = biases
    module.save_pretrained(tmp_path / "m")
    export_gguf({}, open_model(tmp_path / "m"), tmp_path / "x.gguf")
    found = gguf_tensors(tmp_path / "x.gguf")["blk.0.attn_q.bias"]
    np.testing.assert_array_equal(found[:4], [0, 8, 1, 9])
    np.testing.assert_array_equal(unpermuted(found[:, None], 2)[:, 0], biases)


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("bitmod-w4g32", r"expected int-w4g32 \(Q4_0\) or mxfp4"),
        ("int-w4g64", r"expected int-w4g32 \(Q4_0\) or mxfp4"),
    ],
)
def test_gguf_refuses_what_it_cannot_express(tmp_path: Path, llama: Path, format: str, said: str) -> None:
    model = open_model(llama)
    with pytest.raises(InputError, match=rf"layer 'lm_head' \({format}\) has no GGUF layout: {said}"):
        export_gguf(quantized(model, {"lm_head": get_format(format)}), model, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_gguf_replaces_no_file(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "mine").write_text("notes")
    with pytest.raises(InputError, match="mine exists already"):
        export_gguf({}, open_model(llama), tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "notes"


def test_gguf_refuses_rows_that_blocks_do_not_fill_and_scaled_rotary_embeddings(tmp_path: Path, llama: Path) -> None:
    save_file({"a.weight": np.ones((4, 40), np.float16)}, tmp_path / "x.safetensors")
    matrices = open_model(tmp_path)
    with pytest.raises(InputError, match="blocks of 32 do not divide its 40 inputs"):
        export_gguf(quantized(matrices, get_format("mxfp4")), matrices, tmp_path / "x.gguf")
    (tmp_path / "m").mkdir()
    for path in llama.iterdir():
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="rotary embeddings of type 'linear'"):
        export_gguf({}, open_model(tmp_path / "m"), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_gguf_of_another_architecture_keeps_its_names(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    weights = random.standard_normal((4, 64)).astype(np.float16)
    save_file({"a.weight": weights, "a.bias": np.ones(4, np.float16)}, tmp_path / "x.safetensors")
    model = open_model(tmp_path)
    packed = quantized(model, get_format("int-w4g32"))
    assert "the names stay" in export_gguf(packed, model, tmp_path / "x.gguf")[0]
    found = gguf_tensors(tmp_path / "x.gguf")
    np.testing.assert_array_equal(found["a.weight"], packed["a"].dequantize())
    np.testing.assert_array_equal(found["a.bias"], np.ones(4))


def test_a_table_of_embeddings_that_is_stored_as_the_head_is_exported_as_both(tmp_path: Path, llama: Path) -> None:
    """A tied checkpoint may hold the shared tensor under the name of the head alone."""
    (tmp_path / "m").mkdir()
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = open_model(tmp_path / "m")
    packed = quantized(model, get_format("int-w4g32"))
    export_gguf(packed, model, tmp_path / "x.gguf")
    found = gguf_tensors(tmp_path / "x.gguf")
    np.testing.assert_array_equal(found["token_embd.weight"], tensors["lm_head.weight"])
    np.testing.assert_array_equal(found["output.weight"], packed["lm_head"].dequantize())
    export_compressed_tensors(packed, model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], tensors["lm_head.weight"])
    assert "lm_head.weight" not in stored
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.shared
def test_a_real_tokenizer_with_byte_fallback_is_exported(tmp_path: Path, shared: Path) -> None:
    model = open_model(shared / "models" / "tinystories-656k")
    assert export_gguf(quantized(model, get_format("mxfp4")), model, tmp_path / "x.gguf") == ()
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(shared / "models" / "tinystories-656k")
    text = "Once upon a time, there was a little girl named Lily."
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
