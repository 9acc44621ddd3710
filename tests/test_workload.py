"""Shapes of known models and the matrix products of a phase."""

from __future__ import annotations

from fractions import Fraction

import pytest

from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import KNOWN_SHAPES, AttentionShape, LinearShape, ModelShape, known_shape
from termwise.algorithms.workload import Gemm, workload

# Parameters that the model cards state, and how many of them are no linear layer: embeddings that are not tied to
# lm_head, norms (hidden size × (2 per layer + 1)) and the biases of query, key and value.
STATED_PARAMETERS = {
    "yi-6b": (6_061_035_520, 64000 * 4096 + 65 * 4096),
    "llama-2-7b": (6_738_415_616, 32000 * 4096 + 65 * 4096),
    "llama-2-13b": (13_015_864_320, 32000 * 5120 + 81 * 5120),
    "llama-2-70b": (68_976_648_192, 32000 * 8192 + 161 * 8192),
    "llama-3-8b": (8_030_261_248, 128256 * 4096 + 65 * 4096),
    "llama-3-70b": (70_553_706_496, 128256 * 8192 + 161 * 8192),
    "llama-3.2-1b": (1_235_814_400, 33 * 2048),
    "llama-3.2-3b": (3_212_749_824, 57 * 3072),
    "mistral-7b": (7_241_732_096, 32000 * 4096 + 65 * 4096),
    "qwen2-0.5b": (494_032_768, 49 * 896 + 24 * (896 + 2 * 128)),
    "qwen2-1.5b": (1_543_714_304, 57 * 1536 + 28 * (1536 + 2 * 256)),
    "qwen2-7b": (7_615_616_512, 152064 * 3584 + 57 * 3584 + 28 * (3584 + 2 * 512)),
    "tinyllama-1.1b": (1_100_048_384, 32000 * 2048 + 45 * 2048),
}


def weights_of(shape: ModelShape) -> int:
    return sum(linear.outputs * linear.inputs for linear in shape.linears)


@pytest.mark.parametrize("name", STATED_PARAMETERS)
def test_linear_layers_hold_the_stated_parameters(name: str) -> None:
    total, elsewhere = STATED_PARAMETERS[name]
    assert weights_of(known_shape(name)) == total - elsewhere


@pytest.mark.parametrize(
    ("name", "linears"),
    [("opt-1.3b", 145), ("phi-2", 193), ("yi-6b", 225), ("llama-2-7b", 225), ("llama-2-13b", 281), ("llama-3-8b", 225)],
)
def test_models_of_the_paper_have_the_published_number_of_linear_layers(name: str, linears: int) -> None:
    assert len(known_shape(name).linears) == linears


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_known_shape_is_consistent(name: str) -> None:
    shape = known_shape(name)
    assert shape.name == name
    names = [linear.name for linear in shape.linears]
    assert len(set(names)) == len(names)
    assert shape.head == names[-1] == "lm_head"
    attention = shape.attention
    assert attention is not None
    assert attention.heads % attention.key_value_heads == 0
    queries, keys = (count * attention.head_size for count in (attention.heads, attention.key_value_heads))
    fused = [linear for linear in shape.linears if linear.name.endswith(("qkv_proj", "c_attn"))]
    if fused:
        assert fused[0].outputs == queries + 2 * keys
    else:
        query = next(linear for linear in shape.linears if linear.name.endswith("q_proj"))
        key = next(linear for linear in shape.linears if linear.name.endswith("k_proj"))
        assert (query.outputs, key.outputs) == (queries, keys)
    assert shape == known_shape(name.upper())


def test_names_are_those_of_hugging_face() -> None:
    assert known_shape("opt-125m").linears[3].name == "model.decoder.layers.0.self_attn.out_proj"
    assert known_shape("phi-2").linears[5].name == "model.layers.0.mlp.fc2"
    assert known_shape("mistral-7b").linears[-2].name == "model.layers.31.mlp.down_proj"


def test_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="unknown model 'llama-2-7c': did you mean 'llama-2-7b'"):
        known_shape("llama-2-7c")


def by_name(gemms: tuple[Gemm, ...]) -> dict[str, Gemm]:
    return {gemm.name: gemm for gemm in gemms}


def test_prefill_runs_all_tokens_and_the_head_only_the_last_of_each_sequence() -> None:
    gemms = by_name(workload(known_shape("llama-3-8b"), phase="prefill", context=100, batch=3))
    assert gemms["model.layers.*.mlp.down_proj"] == Gemm(
        name="model.layers.*.mlp.down_proj", tokens=300, reduction=14336, outputs=4096, operand="weight", repeats=32
    )
    assert gemms["lm_head"].tokens == 3
    assert gemms["attention.keys"] == Gemm(
        name="attention.keys", tokens=400, reduction=128, outputs=100, operand="key", repeats=32 * 8 * 3
    )
    assert gemms["attention.values"] == Gemm(
        name="attention.values", tokens=400, reduction=100, outputs=128, operand="value", repeats=32 * 8 * 3
    )


def test_decode_runs_one_token_of_each_sequence_over_the_cached_ones() -> None:
    gemms = by_name(workload(known_shape("llama-3-8b"), phase="decode", context=100, batch=3))
    assert {gemm.tokens for gemm in gemms.values() if gemm.operand == "weight"} == {3}
    assert (gemms["attention.keys"].tokens, gemms["attention.keys"].outputs) == (4, 100)
    assert (gemms["attention.values"].tokens, gemms["attention.values"].reduction) == (4, 100)


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_merged_layers_multiply_as_often_as_the_separate_ones(name: str) -> None:
    shape = known_shape(name)
    gemms = workload(shape, phase="decode", context=7, batch=1)
    linears = sum(gemm.multiplications for gemm in gemms if gemm.operand == "weight")
    passed = sum(
        Fraction(linear.outputs * linear.inputs * linear.experts_per_token, linear.experts) for linear in shape.linears
    )
    assert linears == passed  # of the experts, those that one token passes
    attention = shape.attention
    assert attention is not None
    keys = sum(gemm.multiplications for gemm in gemms if gemm.operand == "key")
    assert keys == attention.layers * attention.heads * attention.head_size * 7


def test_layers_of_one_name_and_two_sizes_stay_apart() -> None:
    linears = (
        LinearShape(name="layers.0.fc", outputs=4, inputs=8),
        LinearShape(name="layers.1.fc", outputs=4, inputs=8),
        LinearShape(name="layers.2.fc", outputs=6, inputs=8),
    )
    shape = ModelShape(name="uneven", linears=linears, attention=None, head=None)
    gemms = workload(shape, phase="prefill", context=5, batch=1)
    assert [(gemm.name, gemm.outputs, gemm.repeats) for gemm in gemms] == [("layers.*.fc", 4, 2), ("layers.*.fc", 6, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phase": "train"}, "unknown phase 'train'"),
        ({"context": 0}, "context is 0; expected an integer of at least 1"),
        ({"batch": -1}, "batch is -1; expected an integer of at least 1"),
        ({"batch": True}, "batch is True"),
        ({"context": 2.5}, "context is 2.5"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        workload(known_shape("opt-125m"), **{"phase": "prefill", "context": 8, "batch": 1, **arguments})  # type: ignore[arg-type]


def test_uneven_heads_are_refused() -> None:
    attention = AttentionShape(layers=1, heads=5, key_value_heads=2, head_size=8)
    shape = ModelShape(name="odd", linears=(), attention=attention, head=None)
    with pytest.raises(InputError, match="5 heads and 2 key-value heads"):
        workload(shape, phase="prefill", context=8, batch=1)
