"""Perplexity: the printed figures of real models, and equality with transformers' own loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.models import Model, open_model
from termwise.algorithms.perplexity import Evaluator, perplexity
from termwise.algorithms.text import held_out_text, read_text, text_of


@pytest.fixture
def small(tmp_path: Path, save_small_llama: Callable[..., Path]) -> Callable[[bool], Model]:
    """``small(tied)``: a random model with a context of 16 in ``tmp_path``, whose head is tied or not."""
    return lambda tied: open_model(save_small_llama(tmp_path, context=16, tied=tied))


TEXT = text_of("words", ["a short one", "x", "another document, which is longer than the window of sixteen tokens"])


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_loss_of_transformers_window_by_window(
    small: Callable[[bool], Model], tmp_path: Path, tied: bool
) -> None:
    model = small(tied)
    found = perplexity(model, TEXT)
    module = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    total, count = 0.0, 0
    for document in TEXT.documents:
        tokens = [0, *tokenizer.encode(document).ids]
        for start in range(0, len(tokens), 16):
            window = torch.tensor([tokens[start : start + 16]])
            if window.shape[1] > 1:
                with torch.inference_mode():
                    loss = module(input_ids=window, labels=window).loss
                total += float(loss) * (window.shape[1] - 1)
                count += window.shape[1] - 1
    assert found.predicted_tokens == count
    # float32 sums of a few hundred terms in another order: 300 × 2**-24 < 2e-5 relatively
    assert found.per_token == pytest.approx(math.exp(total / count), rel=2e-5)


def test_bytes_are_those_that_are_predicted(small: Callable[[bool], Model]) -> None:
    found = perplexity(small(False), TEXT)
    windows = [-(-(len(document) + 1) // 16) for document in TEXT.documents]
    assert found.predicted_bytes == sum(map(len, TEXT.documents)) - sum(count - 1 for count in windows)
    assert found.predicted_bytes == found.predicted_tokens  # one byte is one token here


def test_beginnings_only_drops_what_does_not_fit(small: Callable[[bool], Model]) -> None:
    text = text_of("words", TEXT.documents, beginnings_only=True)
    found = perplexity(small(False), text)
    assert found.predicted_tokens == sum(min(15, len(document)) for document in TEXT.documents)


@pytest.mark.parametrize("tied", [False, True])
def test_replacing_by_the_same_changes_nothing_and_restoring_undoes(small: Callable[[bool], Model], tied: bool) -> None:
    model = small(tied)
    evaluator = Evaluator(model, TEXT)
    before = evaluator.perplexity()
    for name, weights in model.matrices():
        evaluator.replace(name, weights.astype(np.float32))
    assert evaluator.perplexity() == before
    for name, weights in model.matrices():
        evaluator.replace(name, np.zeros(weights.shape, np.float32))
    # all logits are zero: every token of the vocabulary is equally likely
    assert evaluator.perplexity().per_token == pytest.approx(257, rel=1e-5)
    evaluator.restore()
    assert evaluator.perplexity() == before


def test_a_tied_head_is_replaced_alone(small: Callable[[bool], Model]) -> None:
    evaluator = Evaluator(small(True), TEXT)
    embedding = evaluator._module.get_input_embeddings().weight.clone()
    evaluator.replace("lm_head", np.zeros((257, 32), np.float32))
    assert torch.equal(evaluator._module.get_input_embeddings().weight, embedding)


def test_a_model_that_cannot_be_run_is_refused(small: Callable[[bool], Model], tmp_path: Path) -> None:
    model = small(False)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        perplexity(model, TEXT)


def test_a_text_without_a_token_to_predict_is_refused(small: Callable[[bool], Model]) -> None:
    model = small(False)
    with pytest.raises(InputError, match="no token that"):
        perplexity(model, text_of("nothing", []))


def test_masks_in_an_older_checkpoint_are_not_read(small: Callable[[bool], Model], tmp_path: Path) -> None:
    model = small(False)
    expected = perplexity(model, TEXT)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e9)
    tensors["model.layers.1.self_attn.masked_bias"] = torch.tensor([-math.inf], dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert perplexity(open_model(tmp_path), TEXT) == expected


def test_weights_that_destroy_the_model_give_infinity_or_an_error_and_no_number(small: Callable[[bool], Model]) -> None:
    model = small(False)
    assert perplexity(model, TEXT, replace=lambda name, weights: weights * np.float32(1e5)).per_token == math.inf
    with pytest.raises(TermwiseError, match="is NaN"):
        perplexity(model, TEXT, replace=lambda name, weights: weights * np.float32(1e30))


def test_the_tokenizer_of_another_model_is_refused(small: Callable[[bool], Model], tmp_path: Path) -> None:
    model = small(False)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="gives token 300, and the model has 257 embeddings"):
        perplexity(model, TEXT)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "bloom"])
def test_filling_up_short_windows_changes_no_family(
    small: Callable[[bool], Model], family: str, tmp_path: Path
) -> None:
    """A batch of windows of several lengths gives the sum that the windows give one at a time."""
    small(False)
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    # Large random weights: with small ones every prediction is about uniform, whatever the model sees.
    scale = {"init_std" if family == "opt" else "initializer_range": 0.3}
    if family == "opt":
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    if family != "bloom":
        sizes["max_position_embeddings"] = 64
    configuration = transformers.AutoConfig.for_model(family, **sizes, **special, **scale)
    torch.manual_seed(4)
    transformers.AutoModelForCausalLM.from_config(configuration).save_pretrained(tmp_path)
    model = open_model(tmp_path)
    parts = [part for part in TEXT.documents if len(part) > 1] + ["xyz"]
    together = perplexity(model, text_of("all", parts)).negative_log_likelihood
    alone = sum(perplexity(model, text_of("one", [part])).negative_log_likelihood for part in parts)
    # Every log likelihood is about ln 257 = 5.5, whose float32 has a spacing of 5e-7; the order of the sums inside the
    # model differs between batches by a few of those, and 1e-5 of 5.5 is a hundred.
    assert together == pytest.approx(alone, rel=1e-5)


class TestTexts:
    def test_separators_make_documents(self, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text(" one\n<|endoftext|>\n\n<|endoftext|>two", encoding="utf-8")
        text = read_text(tmp_path / "t.txt")
        assert text.documents == ("one", "two")
        assert text.beginnings_only

    def test_without_separators_it_is_one_document(self, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text("one\n\ntwo", encoding="utf-8")
        assert read_text(tmp_path / "t.txt").documents == ("one\n\ntwo",)
        assert not read_text(tmp_path / "t.txt").beginnings_only

    @pytest.mark.parametrize(
        ("content", "message"), [(b"", "is empty"), (b" \n<|endoftext|> ", "is empty"), (b"a\xff", "UTF-8 at byte 1")]
    )
    def test_bad_files_are_refused(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_text(tmp_path / "t.txt")

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="No such file"):
            read_text(tmp_path / "t.txt")

    def test_the_held_out_text_is_of_the_size_that_was_meant(self) -> None:
        assert 30_000 < sum(map(len, held_out_text().documents)) < 120_000


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "text", "perplexity_printed", "digits", "tokens"),
    [
        ("tinystories-656k", "tinystories_eval_clean", 24.136, 3, 31_974),
        ("stories260k", "tinystories_eval_clean", 4.404, 3, 62_335),
        ("stories260k", "tinystories_v2_sample", 3.55, 2, None),
    ],
)
def test_printed_perplexities_come_out(
    shared: Path, name: str, text: str, perplexity_printed: float, digits: int, tokens: int | None
) -> None:
    """The figures of the models' PROVENANCE.txt, to every printed digit."""
    found = perplexity(
        open_model(shared / "models" / name), read_text(shared / "text" / "tinystories-text" / f"{text}.txt")
    )
    assert round(found.per_token, digits) == perplexity_printed
    assert tokens is None or found.predicted_tokens == tokens


@pytest.mark.shared
def test_the_printed_perplexity_of_the_second_model_is_of_ascii_text(shared: Path) -> None:
    """The printed 18.46 comes out without the text's curly quotes; with them it is 20.41."""
    text = read_text(shared / "text" / "tinystories-text" / "tinystories_v2_sample.txt")
    ascii_text = text_of("ascii", [part.encode("ascii", "ignore").decode() for part in text.documents])
    assert round(perplexity(open_model(shared / "models" / "tinystories-656k"), ascii_text).per_token, 2) == 18.46


@pytest.mark.shared
@pytest.mark.parametrize(("name", "printed"), [("tinystories-656k", 1.136), ("stories260k", 1.070)])
def test_bits_per_byte_of_the_real_models(shared: Path, name: str, printed: float) -> None:
    """The first is printed in the model's PROVENANCE.txt.

    The second is printed there as 1.044, whose divisor is 127,707 bytes: each of the 589 line ends counted as the six
    characters of its token's name, ``<0x0A>``, and each document's leading space counted, too (177). It is
    127,707 - 5 * 589 - 177 = 124,585 bytes of text.
    """
    found = perplexity(
        open_model(shared / "models" / name),
        read_text(shared / "text" / "tinystories-text" / "tinystories_eval_clean.txt"),
    )
    assert round(found.bits_per_byte, 3) == printed
    if name == "stories260k":
        assert found.predicted_bytes == 127_707 - 5 * 589 - 177


def test_threads_that_other_code_sets_do_not_change_the_sum(small_model: Path, small_text: Path) -> None:
    evaluator = Evaluator(open_model(small_model), read_text(small_text))
    expected, threads = evaluator.perplexity(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert evaluator.perplexity() == expected
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
