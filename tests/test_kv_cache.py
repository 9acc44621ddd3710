"""A quantized KV cache: names, bytes, and a window that is read as decoding would read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from termwise.algorithms import kv_cache
from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.formats import get_format
from termwise.algorithms.kv_cache import KeyValueCacheFormat, get_cache_format, quantized_cache
from termwise.algorithms.models import open_model
from termwise.algorithms.perplexity import Evaluator
from termwise.algorithms.quantize import quantize
from termwise.algorithms.text import read_text, text_of

TEXT = text_of("words", ["a short one", "another document, which is longer than the window of sixteen tokens"])
NEVER_COMPLETE = "kv:keys=int-w8g4096@channel,values=int-w8g4096@channel"
NAMES = [
    "kv:int-asym-w4g8",
    "kv:bitmod-w4g8",
    "kv:keys=bitmod-w3g4@channel,values=int-asym-w4g4@token",
    "kv:keys=int-w4@token,values=int-w3g8@channel",
    "kv:keys=mxfp4@token,values=ant-w4g8@token",
]


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            *NAMES,
            "kv:fp16",
            "kv:int-w8",
            "kv:keys=bitmod-w4g32:special=5,-5@channel,values=int-w4@token",
            "kv:keys=int-w8g32@token,values=int-w8g32@token",
        ],
    )
    def test_they_parse_back(self, name: str) -> None:
        format = get_cache_format(name)
        assert format.name == name
        assert get_cache_format(format.name) == format

    def test_keys_are_grouped_per_channel_and_values_per_token(self) -> None:
        format = get_format("int-asym-w4g32")
        usual = KeyValueCacheFormat(keys=format, values=format, keys_axis="channel", values_axis="token")
        assert get_cache_format("kv:int-asym-w4g32") == usual
        assert get_cache_format("kv:keys=int-asym-w4g32,values=int-asym-w4g32") == usual
        assert usual.name == "kv:int-asym-w4g32"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("int-w4g32", "expected kv:FORMAT"),
            ("kv:", "expected kv:FORMAT"),
            ("kv:nonsense-w4", "unknown format"),
            ("kv:keys=int-w4g32", "expected kv:keys=FORMAT@AXIS,values=FORMAT@AXIS"),
            ("kv:keys=int-w4g32@row,values=int-w4", "along 'row'; expected channel or token"),
            ("kv:keys=int-w4@channel,values=int-w4", "no group of tokens; expected one, such as int-w4g32"),
            ("kv:olive-w4", "in common for a whole matrix"),
            ("kv:ant-w4", "in common for a whole matrix"),
            ("kv:nvfp4", "in common for a whole matrix"),
            ("kv:gobo-w3", "in common for a whole matrix"),
            ("kv:int-w4g32:axis=output", "in common for a whole matrix"),
            ("kv:int-w4a8g32", "names a width of activations; expected int-w4g32"),
        ],
    )
    def test_bad_ones_are_refused(self, name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            get_cache_format(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 7, 8, 23])
def test_bytes_are_those_of_the_packed_groups_and_the_residual(name: str, tokens: int) -> None:
    format = get_cache_format(name)
    states = np.random.default_rng(1).standard_normal((tokens, 16)).astype(np.float32)
    expected = 0
    for part, axis in ((format.keys, format.keys_axis), (format.values, format.values_axis)):
        if axis == "token":
            expected += sum(quantize(states[index : index + 1], part).nbytes for index in range(tokens))
        else:
            size = part.group_size
            assert size is not None
            for start in range(0, tokens, size):
                group = states[start : start + size].T.copy()
                expected += quantize(group, part).nbytes if group.shape[1] == size else group.size * 2
    assert format.packed_bytes(tokens, 16) == expected
    assert format.bits_per_value(tokens, 16) == 8 * expected / (2 * tokens * 16)


class _GrowingCache(transformers.DynamicCache):  # type: ignore[misc]
    """transformers' cache, filled token by token, from which complete groups are read quantized, each on its own."""

    def __init__(self, format: KeyValueCacheFormat) -> None:
        super().__init__()
        self._format = format
        self._quantized: dict[bytes, Any] = {}

    def update(self, keys: Any, values: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        keys, values = super().update(keys, values, *arguments, **options)
        return (
            self._read(keys, self._format.keys, self._format.keys_axis),
            self._read(values, self._format.values, self._format.values_axis),
        )

    def _read(self, states: Any, format: Any, axis: str) -> Any:
        read = states.clone()
        tokens = states.shape[2]
        for sequence in range(states.shape[0]):
            for head in range(states.shape[1]):
                written = states[sequence, head].float().numpy()
                size = 1 if axis == "token" else format.group_size
                for start in range(0, tokens - size + 1, size):
                    group = written[start : start + size]
                    matrix = group if axis == "token" else np.ascontiguousarray(group.T)
                    entry = format.name.encode() + matrix.tobytes()
                    if entry not in self._quantized:
                        self._quantized[entry] = quantize(matrix, format).dequantize()
                    value = self._quantized[entry]
                    value = value if axis == "token" else value.T
                    read[sequence, head, start : start + size] = torch.from_numpy(value.copy())
        return read


def small_llama(seed: int = 3) -> Any:
    """A random Llama in float64 whose heads of keys and values serve two query heads each."""
    torch.manual_seed(seed)
    configuration = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(configuration).double().eval()


def logits_of(module: Any, format: KeyValueCacheFormat, tokens: Any) -> Any:
    """Logits of whole windows over a quantized cache."""
    with torch.inference_mode(), quantized_cache(module, format, tokens.shape[1]):
        return module(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_window_is_what_decoding_token_by_token_gives(name: str) -> None:
    """The model runs in float64, so that both ways give the quantizer the same float32 values, except where a float64
    sum in another order crosses a rounding boundary of float32; that moves a value by 2**-24 of it (or, one value in
    2**24, a code). The logits are sums of values of order ten, and 1e-5 is a hundred such steps; a group that were
    quantized one token early or late moves them by more than 1e-3, as the last assertion says."""
    module = small_llama()
    format = get_cache_format(name)
    tokens = torch.randint(50, (2, 18), generator=torch.Generator().manual_seed(5))
    found = logits_of(module, format, tokens)
    cache = _GrowingCache(format)
    with torch.inference_mode():
        steps = [
            module(input_ids=tokens[:, time : time + 1], past_key_values=cache, use_cache=True).logits
            for time in range(tokens.shape[1])
        ]
        plain = module(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(found, torch.cat(steps, dim=1), rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_later_tokens_change_no_earlier_logits(name: str) -> None:
    module = small_llama()
    format = get_cache_format(name)
    tokens = torch.randint(50, (1, 21), generator=torch.Generator().manual_seed(6))
    whole = logits_of(module, format, tokens)
    for kept in (1, 7, 8, 13, 20):
        other = tokens.clone()
        other[:, kept:] = (other[:, kept:] + 17) % 50
        changed = logits_of(module, format, other)
        assert torch.equal(changed[:, :kept], whole[:, :kept])
        assert not torch.equal(changed[:, kept:], whole[:, kept:])


def test_the_query_that_completes_a_group_is_the_first_to_read_it_quantized() -> None:
    module = small_llama()
    tokens = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(7))
    quantized = logits_of(module, get_cache_format("kv:keys=int-w2g8@channel,values=int-w2g8@channel"), tokens)
    plain = logits_of(module, get_cache_format(NEVER_COMPLETE), tokens)
    differs = (quantized - plain).abs().amax(dim=-1)[0] > 1e-9
    assert differs.tolist() == [False] * 7 + [True] * 9


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_llama()
    tokens = torch.randint(50, (2, 21), generator=torch.Generator().manual_seed(8))
    format = get_cache_format("kv:keys=int-w4g8@channel,values=int-w4g8@channel")
    whole = logits_of(module, format, tokens)
    monkeypatch.setattr(kv_cache, "_SCORES_AT_ONCE", 4 * 21 * 5)  # five queries at a time
    # float64 sums of a few hundred terms in another order
    assert torch.allclose(logits_of(module, format, tokens), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi", "qwen2", "mistral"])
def test_without_a_complete_group_it_is_the_attention_of_the_family(
    family: str, tmp_path: Path, save_small_llama: Callable[..., Path]
) -> None:
    save_small_llama(tmp_path, context=16)
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    scale = {"init_std" if family == "opt" else "initializer_range": 0.3}
    if family in ("llama", "qwen2", "mistral"):
        sizes["num_key_value_heads"] = 2
    if family == "opt":
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 16}
    configuration = transformers.AutoConfig.for_model(family, **sizes, **special, **scale)
    torch.manual_seed(4)
    transformers.AutoModelForCausalLM.from_config(configuration).save_pretrained(tmp_path)
    evaluator = Evaluator(open_model(tmp_path), TEXT)
    before = evaluator.perplexity()
    evaluator.quantize_cache(NEVER_COMPLETE)
    # Log likelihoods of about 5.5, whose float32 has a spacing of 5e-7; 1e-5 of 5.5 is a hundred of those.
    after = evaluator.perplexity().negative_log_likelihood
    assert after == pytest.approx(before.negative_log_likelihood, rel=1e-5)
    evaluator.quantize_cache("kv:int-w2g4")
    assert evaluator.perplexity().negative_log_likelihood != pytest.approx(before.negative_log_likelihood, rel=1e-4)
    evaluator.restore()
    assert evaluator.perplexity() == before


def test_two_evaluators_do_not_meet(small_model: Path) -> None:
    first, second = (Evaluator(open_model(small_model), TEXT) for _ in range(2))
    before = second.perplexity()
    first.quantize_cache("kv:int-w2g4")
    assert second.perplexity() == before
    second.quantize_cache("kv:int-w4g4")
    alone = Evaluator(open_model(small_model), TEXT)
    alone.quantize_cache("kv:int-w2g4")
    assert first.perplexity() == alone.perplexity()


class TestRefusals:
    @staticmethod
    def evaluator(folder: Path, save_small_llama: Callable[..., Path], configuration: Any) -> Evaluator:
        save_small_llama(folder, context=16)
        torch.manual_seed(4)
        transformers.AutoModelForCausalLM.from_config(configuration).save_pretrained(folder)
        return Evaluator(open_model(folder), TEXT)

    def test_an_attention_of_the_model_s_own(self, tmp_path: Path, save_small_llama: Callable[..., Path]) -> None:
        configuration = transformers.BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0)
        evaluator = self.evaluator(tmp_path, save_small_llama, configuration)
        before = evaluator.perplexity()
        with pytest.raises(InputError, match=r"0 of the 2 layers of .* attend through transformers' attention"):
            evaluator.quantize_cache("kv:int-w4g4")
        assert evaluator.perplexity() == before

    def test_a_sliding_window(self, tmp_path: Path, save_small_llama: Callable[..., Path]) -> None:
        configuration = transformers.MistralConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            sliding_window=8,
            bos_token_id=0,
        )
        evaluator = self.evaluator(tmp_path, save_small_llama, configuration)
        before = evaluator.perplexity()
        with pytest.raises(InputError, match=r"forgets tokens after 8 \(sliding window\), fewer than the 16"):
            evaluator.quantize_cache("kv:int-w4g4")
        assert evaluator.perplexity() == before

    def test_keys_that_overflow(self, small_model: Path) -> None:
        model = open_model(small_model)
        evaluator = Evaluator(model, TEXT)
        evaluator.quantize_cache("kv:int-w4g4")
        for name, weights in model.matrices():
            evaluator.replace(name, weights * np.float32(1e30))
        with pytest.raises(TermwiseError, match="keys or values of LlamaAttention: the cache"):
            evaluator.perplexity()


@pytest.mark.shared
def test_fewer_bits_cost_more_and_eight_cost_nothing(shared: Path) -> None:
    model = open_model(shared / "models" / "tinystories-656k")
    stories = read_text(shared / "text" / "tinystories-text" / "tinystories_eval_clean.txt").documents[:12]
    evaluator = Evaluator(model, text_of("stories", stories, beginnings_only=True))
    found = {0: evaluator.perplexity().per_token}
    for bits in (8, 4, 3, 2):
        evaluator.quantize_cache(f"kv:int-asym-w{bits}g32")
        found[bits] = evaluator.perplexity().per_token
    assert found[8] == pytest.approx(found[0], rel=1e-3)
    assert found[8] < found[4] < found[3] < found[2] < math.inf
