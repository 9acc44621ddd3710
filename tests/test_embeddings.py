"""Embeddings of sentences: equality with transformers, one sentence at a time, and the figures of a real encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from termwise.algorithms.activations import activation_quantizer, sample_inputs
from termwise.algorithms.embeddings import EmbeddingEvaluator, paragraphs
from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.formats import get_format
from termwise.algorithms.models import open_model
from termwise.algorithms.quantize import quantize
from termwise.algorithms.text import read_text, text_of

TEXT = text_of("sentences", ["a short one", "x", "another document, which is longer than the others are", "four"])


@pytest.fixture
def save_encoder(tmp_path: Path, save_small_llama: Callable[..., Path]) -> Callable[..., Path]:
    """``save_encoder(family, positions)`` writes a random encoder of bytes to ``tmp_path``; 0 and 1 are special."""

    def save(family: str = "bert", positions: int = 64) -> Path:
        save_small_llama(tmp_path, context=16)
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tokenizer.post_processor = tokenizers.processors.BertProcessing(("</s>", 1), ("<s>", 0))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        torch.manual_seed(5)
        configuration = transformers.AutoConfig.for_model(
            family,
            vocab_size=257,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=positions,
            pad_token_id=0,
            initializer_range=0.3,
        )
        transformers.AutoModel.from_config(configuration).save_pretrained(tmp_path)
        return tmp_path

    return save


def one_at_a_time(folder: Path, pool: Callable[[Any], Any]) -> Any:
    """Embeddings by transformers' own classes, without a batch."""
    module = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for document in TEXT.documents:
        tokens = torch.tensor([tokenizer.encode(document).ids])
        with torch.inference_mode():
            pooled = pool(module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0])
        found.append((pooled / pooled.norm()).numpy())
    return np.stack(found)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_an_embedding_is_the_mean_of_the_states(save_encoder: Callable[..., Path], family: str) -> None:
    folder = save_encoder(family)
    found = EmbeddingEvaluator(open_model(folder), TEXT).embeddings()
    # float32 sums of a few hundred terms in another order: 300 x 2**-24 < 2e-5 of numbers below 1
    assert found == pytest.approx(one_at_a_time(folder, lambda states: states.mean(dim=0)), abs=2e-5)
    assert found.shape == (4, 32)


def test_the_folder_may_ask_for_the_first_token(save_encoder: Callable[..., Path]) -> None:
    folder = save_encoder()
    (folder / "1_Pooling").mkdir()
    settings = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    found = EmbeddingEvaluator(open_model(folder), TEXT).embeddings()
    assert found == pytest.approx(one_at_a_time(folder, lambda states: states[0]), abs=2e-5)


def test_another_pooling_is_refused(save_encoder: Callable[..., Path]) -> None:
    folder = save_encoder()
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InputError, match="asks for pooling_mode_max_tokens; expected the mean"):
        EmbeddingEvaluator(open_model(folder), TEXT)


@pytest.mark.parametrize(("family", "expected"), [("bert", 20), ("roberta", 19)])
def test_long_documents_are_cut_to_the_positions_there_are(
    save_encoder: Callable[..., Path], family: str, expected: int
) -> None:
    evaluator = EmbeddingEvaluator(open_model(save_encoder(family, positions=20)), TEXT)
    assert evaluator.window_tokens == expected
    longest = max(evaluator._documents, key=len)
    assert len(longest) == expected
    assert longest[-1] == 1  # the special token at the end is kept


def test_the_tokenizer_s_file_may_cut_further(save_encoder: Callable[..., Path]) -> None:
    folder = save_encoder()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(12)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert EmbeddingEvaluator(open_model(folder), TEXT).window_tokens == 12


def test_the_same_weights_give_the_same_embeddings_and_restoring_undoes(save_encoder: Callable[..., Path]) -> None:
    model = open_model(save_encoder())
    evaluator = EmbeddingEvaluator(model, TEXT)
    before = evaluator.embeddings()
    for name, weights in model.matrices():
        evaluator.replace(name, weights.astype(np.float32))
    assert np.array_equal(evaluator.embeddings(), before)
    # lengths are 1 within the rounding of 32 float32 numbers
    assert evaluator.cosine() == pytest.approx(1, abs=2**-22)
    for name, weights in model.matrices():
        evaluator.replace(name, quantize(weights, "int-w3").dequantize())
    assert 0 < evaluator.cosine() < 0.999
    evaluator.restore()
    assert np.array_equal(evaluator.embeddings(), before)


@pytest.mark.parametrize("name", ["int-w8a8", "olive-w4a4"])
def test_activations_are_quantized_too(save_encoder: Callable[..., Path], name: str) -> None:
    model = open_model(save_encoder())
    evaluator = EmbeddingEvaluator(model, TEXT)
    samples = sample_inputs(evaluator)
    format = get_format(name)
    for layer, weights in model.matrices():
        quantizer = activation_quantizer(format, samples[layer])
        evaluator.replace(layer, weights.astype(np.float32), activation=quantizer)
    assert evaluator.cosine() < 1 - 1e-6


def test_weights_that_destroy_the_model_are_an_error(save_encoder: Callable[..., Path]) -> None:
    model = open_model(save_encoder())
    evaluator = EmbeddingEvaluator(model, TEXT)
    for name, weights in model.matrices():
        evaluator.replace(name, weights * np.float32(1e38))
    with pytest.raises(TermwiseError, match="is NaN, infinite or zero"):
        evaluator.cosine()


def test_a_causal_model_is_refused(small_model: Path) -> None:
    assert open_model(small_model).no_embedding_reason == "LlamaForCausalLM is no encoder of sentences"
    with pytest.raises(InputError, match="cannot be run: LlamaForCausalLM is no encoder"):
        EmbeddingEvaluator(open_model(small_model), TEXT)


def test_an_encoder_has_no_reason_against_it(save_encoder: Callable[..., Path]) -> None:
    assert open_model(save_encoder()).no_embedding_reason is None


def test_a_text_without_documents_is_refused(save_encoder: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="expected a document"):
        EmbeddingEvaluator(open_model(save_encoder()), text_of("nothing", []))


class TestParagraphs:
    TEXT = text_of("wiki", ["= Title =\n\n one \nthe second\n", "third one"])

    def test_they_are_the_lines_that_are_no_headings(self) -> None:
        assert paragraphs(self.TEXT).documents == ("one", "the second", "third one")

    def test_short_ones_and_those_behind_the_count_are_left_out(self) -> None:
        assert paragraphs(self.TEXT, characters=4).documents == ("the second", "third one")
        assert paragraphs(self.TEXT, count=1).documents == ("one",)

    def test_none_is_refused(self) -> None:
        with pytest.raises(InputError, match="no paragraph of 99 characters"):
            paragraphs(self.TEXT, characters=99)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "printed"), [("int-asym-w4g128", 0.949), ("int-asym-w4g64", 0.962), ("int-asym-w3g128", 0.800)]
)
def test_the_printed_cosines_of_the_real_encoder_come_out(shared: Path, name: str, printed: float) -> None:
    """The figures of the model's PROVENANCE.txt, on 200 paragraphs of WikiText-2: those of asymmetric integers.

    Which paragraphs is not said there: with the first 200 lines of 200 characters or more, all printed figures of 3
    and 4 bits come out within 0.001.
    """
    model = open_model(shared / "models" / "minilm-l6-v2")
    text = paragraphs(read_text(shared / "text" / "wikitext-2" / "test.txt"), characters=200, count=200)
    evaluator = EmbeddingEvaluator(model, text)
    for layer, weights in model.matrices():
        evaluator.replace(layer, quantize(weights, name).dequantize())
    assert evaluator.cosine() == pytest.approx(printed, abs=0.001)
