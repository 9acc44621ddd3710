"""What several test files share: the folder of real models and texts, and where the repository is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# Examples are the same in every run; the first one of a kernel includes its compilation, so no example has a deadline.
hypothesis.settings.register_profile("termwise", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("termwise")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TERMWISE_SHARED", REPOSITORY.parent / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need real models where these are absent, and say so."""
    if (SHARED / "models").is_dir():
        return
    reason = f"no real models in {SHARED} (set TERMWISE_SHARED to a folder with models/ and text/)"
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def shared() -> Path:
    """The folder with real models (``models/``) and texts (``text/``); use it with the mark ``shared``."""
    return SHARED


def _save_small_llama(folder: Path, *, context: int, tied: bool = False) -> Path:
    """Write a random Llama of 2 layers and a tokenizer of bytes to ``folder``; token 0 begins a sequence."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(3)
    configuration = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=0,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(configuration).save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def save_small_llama() -> Callable[..., Path]:
    """``save_small_llama(folder, context=16, tied=False)`` writes a small random model that can be run."""
    return _save_small_llama


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small random model with a context of 64 tokens and a head of its own."""
    return _save_small_llama(tmp_path_factory.mktemp("models") / "small", context=64)


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of two short documents."""
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text("a few words to predict<|endoftext|>and a few more of them", encoding="utf-8")
    return path
