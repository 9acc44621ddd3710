"""Parameters of known models, and shapes from configurations."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from termwise.algorithms import config_shapes, shapes
from termwise.algorithms.config_shapes import read_shape, shape_from_config
from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import FAMILIES, KNOWN_SHAPES, AttentionShape, ModelShape, known_shape

# The number of parameters that Hugging Face states for the safetensors of each repository, https://huggingface.co/ID
# (OPT: the numbers in the tensors of its checkpoint).
STATED: dict[str, tuple[str, int]] = {
    "opt-125m": ("facebook/opt-125m", 125_239_296),
    "opt-350m": ("facebook/opt-350m", 331_196_416),
    "opt-1.3b": ("facebook/opt-1.3b", 1_315_758_080),
    "phi-2": ("microsoft/phi-2", 2_779_683_840),
    "yi-6b": ("01-ai/Yi-6B", 6_061_035_520),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", 8_030_261_248),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", 70_553_706_496),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", 1_235_814_400),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", 3_212_749_824),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
    "mixtral-8x7b": ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    "qwen2-0.5b": ("Qwen/Qwen2-0.5B", 494_032_768),
    "qwen2-1.5b": ("Qwen/Qwen2-1.5B", 1_543_714_304),
    "qwen2-7b": ("Qwen/Qwen2-7B", 7_615_616_512),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", 494_032_768),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", 3_085_938_688),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", 7_615_616_512),
    "qwen2.5-14b": ("Qwen/Qwen2.5-14B", 14_770_033_664),
    "qwen2.5-32b": ("Qwen/Qwen2.5-32B", 32_763_876_352),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B", 72_706_203_648),
    "phi-3-mini": ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
    "gemma-2-2b": ("google/gemma-2-2b", 2_614_341_888),
    "gemma-2-9b": ("google/gemma-2-9b", 9_241_705_984),
    "gemma-2-27b": ("google/gemma-2-27b", 27_227_128_320),
    "gpt2": ("openai-community/gpt2", 124_439_808),
    "gpt2-medium": ("openai-community/gpt2-medium", 354_823_168),
    "gpt2-large": ("openai-community/gpt2-large", 774_030_080),
    "gpt2-xl": ("openai-community/gpt2-xl", 1_557_611_200),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", 1_100_048_384),
}

# Checkpoints without safetensors: the sizes in billions that their names state, to the digits stated.
# (OPT-66B holds 65.7 billion, OPT-6.7B 6.66.)
NAMED_IN_BILLIONS = {"opt-2.7b": 2.7, "opt-6.7b": 6.7, "opt-13b": 13, "opt-30b": 30, "opt-66b": 66}


@pytest.mark.parametrize("name", STATED)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    assert known_shape(name).parameters == STATED[name][1]


def test_parameters_of_every_known_shape_are_checked() -> None:
    assert STATED.keys() | NAMED_IN_BILLIONS.keys() == set(KNOWN_SHAPES)


@pytest.mark.parametrize("name", NAMED_IN_BILLIONS)
def test_parameters_round_to_the_name(name: str) -> None:
    stated = NAMED_IN_BILLIONS[name]
    parameters = known_shape(name).parameters
    assert parameters is not None
    assert round(parameters / 1e9, 1 if isinstance(stated, float) else 0) == stated


COMMON = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 101}
GROUPED = {**COMMON, "intermediate_size": 80, "num_key_value_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GROUPED},
    "llama_biased": {
        "model_type": "llama",
        **GROUPED,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", **GROUPED},
    "qwen2": {"model_type": "qwen2", **GROUPED},
    "qwen2_windowed": {
        "model_type": "qwen2",
        **GROUPED,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "phi": {"model_type": "phi", **COMMON, "intermediate_size": 80},
    "phi3": {"model_type": "phi3", **GROUPED, "pad_token_id": 0, "sliding_window": 9},
    "gemma2": {"model_type": "gemma2", **GROUPED, "head_dim": 20, "attn_logit_softcapping": 50.0},
    "opt": {"model_type": "opt", **COMMON, "ffn_dim": 80, "max_position_embeddings": 33},
    "opt_projected": {
        "model_type": "opt",
        **COMMON,
        "ffn_dim": 80,
        "max_position_embeddings": 33,
        "word_embed_proj_dim": 24,
        "do_layer_norm_before": False,
        "enable_bias": False,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 101, "n_positions": 33},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def test_every_family_is_compared_with_transformers() -> None:
    assert {config["model_type"] for config in SMALL.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", SMALL)
def test_linear_layers_and_parameters_are_those_of_transformers(name: str) -> None:
    shape = shape_from_config(SMALL[name])
    configuration = AutoConfig.for_model(**SMALL[name])
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(configuration)
        module.tie_weights()
    assert shape.parameters == sum(parameter.numel() for parameter in module.parameters())
    expected = set()
    for path, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Linear, Conv1D)):
            outputs, inputs = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
            expected.add((path, outputs, inputs))
    found = {(linear.name, linear.outputs, linear.inputs) for linear in shape.linears}
    if name == "mixtral":  # transformers holds all experts, and the router, in parameters of their own
        found = {entry for entry in found if "block_sparse_moe" not in entry[0]}
        expected = {entry for entry in expected if ".mlp." not in entry[0]}
    assert found == expected


@pytest.mark.parametrize("name", SMALL)
def test_keys_left_out_mean_what_transformers_takes(name: str) -> None:
    """The file that transformers writes, with all of its keys, describes the same shape."""
    whole = AutoConfig.for_model(**SMALL[name]).to_dict()
    assert len(whole) > len(SMALL[name])
    assert shape_from_config(whole) == shape_from_config(SMALL[name])


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_window_layers": 24,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "phi-2": {
        "model_type": "phi",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "vocab_size": 51200,
    },
    "phi-3-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "sliding_window": 2047,
        "vocab_size": 32064,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "head_dim": 256,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "opt-350m": {
        "model_type": "opt",
        "do_layer_norm_before": False,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "max_position_embeddings": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    },
    "gpt2-xl": {
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 1600,
        "n_head": 25,
        "n_layer": 48,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_gives_the_shape_of_the_table(name: str) -> None:
    assert shape_from_config(PUBLISHED[name], name=name) == known_shape(name)


def test_a_directory_with_only_a_configuration_gives_its_shape(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2-xl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED["gpt2-xl"]))
    assert read_shape(folder) == read_shape(folder / "config.json") == known_shape("gpt2-xl")


def test_windows_of_gemma_lie_in_every_other_layer() -> None:
    attention = shape_from_config({**SMALL["gemma2"], "sliding_window": 7}).attention
    assert attention == AttentionShape(
        layers=3, heads=6, key_value_heads=2, head_size=20, window=7, windowed_layers=2, softcap=True
    )


def test_a_shape_of_linear_layers_alone_has_no_number_of_parameters() -> None:
    bare = ModelShape(name="bare", linears=known_shape("gpt2").linears, attention=None, head="lm_head")
    assert bare.parameters is None
    whole = known_shape("gpt2")
    untied = replace(whole, tied_head=False)
    assert whole.parameters is not None
    assert untied.parameters == whole.parameters + 50257 * 768


def without(name: str, key: str) -> dict[str, Any]:
    return {other: value for other, value in SMALL[name].items() if other != key}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.json has no key 'model_type'; expected one of llama"),
        ({"model_type": "lama"}, "config.json: unknown model_type 'lama': did you mean 'llama'"),
        ({"model_type": ["llama"]}, "config.json: unknown model_type"),
        (without("llama", "hidden_size"), "config.json has no key 'hidden_size'; expected an integer of at least 1"),
        (without("mistral", "num_key_value_heads"), "config.json has no key 'num_key_value_heads'"),
        (without("gemma2", "head_dim"), "config.json has no key 'head_dim'"),
        (without("gpt2", "n_positions"), "config.json has no key 'n_positions'"),
        ({**SMALL["llama"], "vocab_size": None}, "config.json has no key 'vocab_size'"),
        ({**SMALL["llama"], "vocab_size": 0}, "'vocab_size' is 0; expected an integer of at least 1"),
        ({**SMALL["llama"], "num_hidden_layers": -2}, "'num_hidden_layers' is -2"),
        ({**SMALL["llama"], "num_hidden_layers": 10**12}, "'num_hidden_layers' is 1000000000000; expected at most"),
        ({**SMALL["mixtral"], "num_local_experts": 10**9}, "'num_local_experts' is 1000000000; expected at most"),
        ({**SMALL["llama"], "intermediate_size": "80"}, "'intermediate_size' is '80'"),
        ({**SMALL["llama"], "intermediate_size": 80.0}, "'intermediate_size' is 80.0"),
        ({**SMALL["llama"], "num_attention_heads": True}, "'num_attention_heads' is True"),
        ({**SMALL["llama"], "attention_bias": 1}, "'attention_bias' is 1; expected true or false"),
        ({**SMALL["llama"], "hidden_size": 50}, "'hidden_size' is 50; expected a multiple of 'num_attention_heads'"),
        ({**SMALL["gpt2"], "n_embd": 50}, "'n_embd' is 50; expected a multiple of 'n_head', which is 6"),
        ({**SMALL["llama"], "num_key_value_heads": 4}, "'num_key_value_heads' is 4; expected a divisor"),
        ({**SMALL["gemma2"], "layer_types": ["full_attention"]}, "'layer_types' is .* a list of 3 kinds"),
        ({**SMALL["mixtral"], "num_experts_per_tok": 5}, "'num_experts_per_tok' is 5; expected at most"),
        ({**SMALL["phi"], "partial_rotary_factor": 1.5}, "'partial_rotary_factor' is 1.5; expected a number above 0"),
        ({**SMALL["phi"], "qk_layernorm": True}, "'qk_layernorm' is True; expected false"),
        ({**SMALL["mistral"], "sliding_window": 0}, "'sliding_window' is 0"),
    ],
)
def test_a_bad_configuration_is_refused_by_file_and_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        shape_from_config(config)
    assert str(refusal.value).startswith("config.json")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("module", [shapes, config_shapes], ids=lambda module: str(module.__name__))
def test_examples_in_docstrings_are_right(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_a_bad_file_is_named_with_its_path(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(InputError, match=f"cannot read {file}"):
        read_shape(file)
    file.write_text("[]")
    with pytest.raises(InputError, match=f"{file} holds a JSON list"):
        read_shape(tmp_path)
    file.write_text("{}")
    with pytest.raises(InputError, match=f"{file} has no key 'model_type'"):
        read_shape(tmp_path)
