"""Workloads beyond dense products: windows, experts, vector operations, look-ups, prefill with decode steps."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product

import pytest

from termwise.algorithms.config_shapes import shape_from_config
from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import KNOWN_SHAPES, AttentionShape, ModelShape, known_shape
from termwise.algorithms.workload import (
    EXPERTS,
    PHASES,
    Experts,
    Phase,
    cached_numbers,
    generation,
    phase_work,
    table_reads,
    touched_experts,
    vector_operations,
    workload,
)
from termwise.sim.accelerators import get_accelerator
from termwise.sim.published import simulate_published
from termwise.sim.simulate import simulate

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 101}
WINDOWED = shape_from_config(
    {
        "model_type": "gemma2",
        **SIZES,
        "intermediate_size": 80,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "sliding_window": 7,
    }
)
ROUTED = shape_from_config(
    {
        "model_type": "mixtral",
        **SIZES,
        "intermediate_size": 80,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
    }
)


def attention_of(shape: ModelShape) -> AttentionShape:
    assert shape.attention is not None
    return shape.attention


@pytest.mark.parametrize("context", [1, 6, 7, 8, 14, 15, 40])
@pytest.mark.parametrize("phase", PHASES)
def test_a_query_meets_as_many_keys_as_its_window_lets_it(phase: Phase, context: int) -> None:
    attention = attention_of(WINDOWED)
    gemms = workload(WINDOWED, phase=phase, context=context, batch=3)
    queries = context if phase == "prefill" else 1
    met = (attention.layers - attention.windowed_layers) * context + attention.windowed_layers * min(context, 7)
    expected = 3 * queries * met * attention.heads * attention.head_size
    for operand in ("key", "value"):
        assert sum(gemm.multiplications for gemm in gemms if gemm.operand == operand) == expected
    softmax = vector_operations(WINDOWED, phase=phase, context=context, batch=3)
    assert sum(part.total for part in softmax if part.name == "softmax") == 3 * queries * met * attention.heads


def test_a_context_inside_the_window_is_one_product_for_all_layers() -> None:
    unlimited = replace(WINDOWED, attention=replace(attention_of(WINDOWED), window=None, windowed_layers=0))
    for phase in PHASES:
        inside = workload(WINDOWED, phase=phase, context=7, batch=2)
        assert inside == workload(unlimited, phase=phase, context=7, batch=2)
        assert inside != workload(WINDOWED, phase=phase, context=8, batch=2)


@pytest.mark.parametrize("context", [1, 7, 8, 30])
def test_a_decode_step_reads_what_the_cache_holds(context: int) -> None:
    for shape in (WINDOWED, ROUTED):
        gemms = workload(shape, phase="decode", context=context, batch=1)
        read = sum(gemm.outputs * gemm.reduction * gemm.repeats for gemm in gemms if gemm.operand != "weight")
        assert read == cached_numbers(attention_of(shape), context)


@pytest.mark.parametrize("experts", range(1, 6))
def test_expected_experts_are_the_mean_over_all_choices(experts: int) -> None:
    """Every choice of k experts by each of T tokens, enumerated."""
    for per_token in range(1, experts + 1):
        choices = list(combinations(range(experts), per_token))
        for tokens in range(1, 4):
            counts = [len(set().union(*drawn)) for drawn in product(choices, repeat=tokens)]
            mean = Fraction(sum(counts), len(counts))
            found = touched_experts(experts, per_token, tokens, "expected")
            assert found == int(mean + Fraction(1, 2))
            assert touched_experts(experts, per_token, tokens, "worst") == max(counts)


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 16])
def test_expected_experts_follow_the_formula_where_it_is_cut_short(experts: int) -> None:
    for per_token in range(1, experts + 1):
        edge = experts * experts // per_token
        for tokens in range(max(1, edge - 2), edge + 3):
            mean = experts * (1 - (1 - Fraction(per_token, experts)) ** tokens)
            assert touched_experts(experts, per_token, tokens, "expected") == int(mean + Fraction(1, 2))


@pytest.mark.parametrize("rule", EXPERTS)
def test_tokens_touch_no_fewer_experts_than_one_and_no_more_than_all(rule: Experts) -> None:
    counts = [touched_experts(64, 6, tokens, rule) for tokens in range(1, 1000)]
    assert counts[0] == 6
    assert counts == sorted(counts)
    assert counts[-1] == 64
    expected = [touched_experts(64, 6, tokens, "expected") for tokens in range(1, 1000)]
    assert all(few <= many for few, many in zip(expected, counts, strict=True)) or rule == "expected"


@pytest.mark.parametrize("rule", EXPERTS)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 100])
def test_every_token_passes_its_experts_exactly_once(rule: Experts, batch: int) -> None:
    for phase, context in (("decode", 9), ("prefill", 3)):
        tokens = batch * (context if phase == "prefill" else 1)
        gemms = workload(
            ROUTED, phase="decode" if phase == "decode" else "prefill", context=context, batch=batch, experts=rule
        )
        routed = [gemm for gemm in gemms if gemm.name.endswith(".w1")]
        assert sum(gemm.tokens * gemm.repeats for gemm in routed) == 3 * 2 * tokens
        assert sum(gemm.repeats for gemm in routed) == 3 * touched_experts(5, 2, tokens, rule)
        rows = [gemm.tokens for gemm in routed]
        assert max(rows) - min(rows) <= 1
        assert max(rows) <= tokens
        (router,) = [gemm for gemm in gemms if gemm.name.endswith("gate")]
        assert (router.tokens, router.outputs, router.repeats) == (tokens, 5, 3)


def test_vector_operations_of_a_decoded_token_are_those_of_the_layers() -> None:
    found = {
        part.name: part.total
        for part in vector_operations(known_shape("llama-3-8b"), phase="decode", context=100, batch=2)
    }
    assert found == {
        "norm": 2 * 32 * 2 * 4096,
        "rotary": 2 * 32 * (32 + 8) * 128,
        "activation": 2 * 32 * 14336,
        "gate_product": 2 * 32 * 14336,
        "residual": 2 * 32 * 2 * 4096,
        "final_norm": 2 * 4096,
        "softmax": 2 * 32 * 32 * 100,
    }


def test_vector_operations_follow_the_family() -> None:
    def names(shape: ModelShape) -> set[str]:
        return {part.name for part in vector_operations(shape, phase="prefill", context=9, batch=1)}

    common = {"norm", "activation", "residual", "final_norm", "softmax"}
    gated = common | {"rotary", "gate_product"}
    assert names(known_shape("llama-2-7b")) == gated
    assert names(known_shape("qwen2.5-7b")) == gated | {"bias"}
    assert names(known_shape("phi-2")) == common | {"rotary", "bias", "head_bias"}
    assert names(known_shape("gpt2")) == names(known_shape("opt-1.3b")) == common | {"bias", "position_addition"}
    assert names(known_shape("mixtral-8x7b")) == gated | {"router_softmax", "expert_sum"}
    softcaps = {"embedding_scale", "attention_softcap", "logit_softcap"}
    assert names(known_shape("gemma-2-9b")) == gated | softcaps


def test_biases_are_added_as_often_as_there_are_any() -> None:
    for name in KNOWN_SHAPES:
        shape = known_shape(name)
        added = vector_operations(shape, phase="decode", context=1, batch=1)
        assert sum(part.total for part in added if part.name in ("bias", "head_bias")) == shape.biases


def test_logits_cost_one_token_of_each_sequence() -> None:
    prefill = vector_operations(WINDOWED, phase="prefill", context=9, batch=3)
    totals = {part.name: part.total for part in prefill}
    assert totals["logit_softcap"] == 3 * 101
    assert totals["final_norm"] == 3 * 48
    assert totals["norm"] == 3 * 9 * 48 * 4 * 3


def test_a_shape_of_linear_layers_and_attention_has_the_operations_on_scores_alone() -> None:
    bare = replace(known_shape("llama-2-7b"), elementwise=(), embeddings=())
    operations = vector_operations(bare, phase="decode", context=10, batch=1)
    assert [(part.name, part.total) for part in operations] == [("softmax", 32 * 32 * 10)]
    assert vector_operations(replace(bare, attention=None), phase="decode", context=10, batch=1) == ()
    assert table_reads(bare, phase="decode", context=10, batch=1) == ()


def test_a_token_reads_one_row_of_every_table() -> None:
    reads = table_reads(known_shape("gpt2"), phase="prefill", context=10, batch=3)
    assert [(read.name, read.rows, read.features) for read in reads] == [
        ("transformer.wte", 30, 768),
        ("transformer.wpe", 30, 768),
    ]
    assert reads[0].read_bytes() == 30 * 768 * 2
    assert reads[0].read_bytes(element_bits=5) == 30 * 480
    assert [read.rows for read in table_reads(known_shape("gpt2"), phase="decode", context=10, batch=3)] == [3, 3]


@pytest.mark.parametrize("shape", [WINDOWED, ROUTED, known_shape("gpt2")], ids=lambda shape: str(shape.name))
@pytest.mark.parametrize("context", [1, 5, 6, 7, 8, 20])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("batch", [1, 3])
def test_totals_of_a_generation_are_the_sums_over_its_phases(
    shape: ModelShape, context: int, steps: int, batch: int
) -> None:
    whole = generation(shape, context=context, steps=steps, batch=batch)
    phases = list(whole.phases())
    assert [(work.phase, work.context) for work in phases] == [
        ("prefill", context),
        *(("decode", context + step) for step in range(steps)),
    ]
    assert phases[-1] == phase_work(shape, phase="decode", context=context + steps - 1, batch=batch)
    assert whole.multiplications == sum(work.multiplications for work in phases)
    assert whole.vector_elements == sum(work.vector_elements for work in phases)
    assert whole.table_rows == sum(work.table_rows for work in phases)
    assert whole.table_rows == len(shape.embeddings) * batch * (context + steps)


def test_counts_beyond_int64_are_exact() -> None:
    shape, context = known_shape("llama-2-7b"), 2**40
    work = phase_work(shape, phase="prefill", context=context, batch=3)
    weights = sum(linear.outputs * linear.inputs for linear in shape.linears if linear.name != shape.head)
    head = 3 * 32000 * 4096
    assert work.multiplications == 3 * context * weights + head + 2 * 3 * 32 * 4096 * context**2
    assert work.multiplications > 2**63
    steps = 2**35
    decode = generation(shape, context=1, steps=steps).multiplications
    decode -= phase_work(shape, phase="prefill", context=1).multiplications
    cached = steps * (steps + 1) // 2
    assert decode == steps * (weights + head // 3) + 2 * 32 * 4096 * cached


@pytest.mark.parametrize("shape", [WINDOWED, ROUTED], ids=["windowed", "routed"])
@pytest.mark.parametrize("phase", PHASES)
def test_the_simulator_computes_windows_and_experts(shape: ModelShape, phase: Phase) -> None:
    result = simulate(shape, get_accelerator("bitmod-lossy"), phase=phase, context=30, batch=2)
    gemms = workload(shape, phase=phase, context=30, batch=2)
    assert [(layer.name, layer.tokens, layer.repeats) for layer in result.layers] == [
        (gemm.name, gemm.tokens, gemm.repeats) for gemm in gemms
    ]


def test_the_published_model_refuses_experts() -> None:
    with pytest.raises(InputError, match="mixtral-8x7b is a mixture of experts"):
        simulate_published(known_shape("mixtral-8x7b"), get_accelerator("fp16"), phase="decode")


def test_bad_input_is_refused() -> None:
    shape = known_shape("gpt2")
    with pytest.raises(InputError, match="steps is 0"):
        generation(shape, context=1, steps=0)
    with pytest.raises(InputError, match="context is 0"):
        generation(shape, context=0, steps=1)
    with pytest.raises(InputError, match="unknown rule for experts 'worse': did you mean 'worst'"):
        generation(shape, context=1, steps=1, experts="worse")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown rule for experts"):
        workload(ROUTED, phase="decode", context=1, batch=1, experts="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="3 experts per token of 2"):
        touched_experts(2, 3, 1, "worst")
    with pytest.raises(InputError, match="the number of tokens is 0"):
        touched_experts(2, 1, 0, "worst")
    with pytest.raises(InputError, match="unknown phase"):
        vector_operations(shape, phase="train", context=1, batch=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="context is 0"):
        table_reads(shape, phase="decode", context=0, batch=1)
    incomplete = replace(ROUTED, linears=ROUTED.linears[:-2])
    with pytest.raises(InputError, match="expected whole sets of experts"):
        workload(incomplete, phase="decode", context=1, batch=1)
