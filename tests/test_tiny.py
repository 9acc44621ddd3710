"""The embedded model: its texts do not leak, and its perplexities are the ones of its card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from termwise.algorithms.models import open_model
from termwise.algorithms.perplexity import perplexity
from termwise.algorithms.text import held_out_text
from termwise.algorithms.tiny import corpus


def test_the_name_alone_decides_what_is_held_out() -> None:
    held_out = {name for name in topics if corpus.is_held_out(name)}
    assert {topics[name] for name in held_out} == set(corpus.held_out_documents())
    assert 5 <= len(held_out) <= 20


def test_the_digest_tells_documents_apart() -> None:
    assert len({corpus.digest(documents) for documents in (["ab"], ["a", "b"], ["b", "a"], ["", "ab"], [])}) == 5


def test_no_paragraph_of_the_held_out_text_is_trained_on() -> None:
    """Paragraphs as a reader sees them (blank lines between, white space normalised), not as the module splits them."""
    trained = " ".join(" ".join(corpus.training_documents()).split())
    paragraphs = [
        " ".join(part.split()) for document in corpus.held_out_documents() for part in re.split(r"\n\s*\n", document)
    ]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= corpus.MINIMUM_PARAGRAPH]
    assert len(long) > 200
    assert [paragraph for paragraph in long if paragraph in trained] == []


def test_shared_paragraphs_are_dropped_where_they_stand() -> None:
    shared = "this paragraph is long enough to be recognised anywhere"
    documents = [f"first\n\n# {shared[:14]}\n# {shared[15:]}\n\nlast", shared, "untouched"]
    kept = corpus.drop_shared_paragraphs(documents, [f"title\n\n{shared}\n"])
    assert [" ".join(document.split()) for document in kept] == ["first last", "untouched"]


# Perplexity of the FP16 weights by the digest of the held-out text, which differs between versions of Python.
PINNED = {
    "7cebb980e8ab8e68369dc88993a714fb95f7f514724b4f48765607661cb54e05": 12.08264,  # Python 3.11.7
    "4c8f823a494fb9a4c6097131299ab982b82ace5ddde901dc997b8f0b0e199f53": 12.06200,  # Python 3.12.1
    "53059180dc217807aac9b474b3f386acfb7f594acb3407fb513ed2fa1d6005b0": 12.05101,  # Python 3.13.0
}


def test_the_perplexity_is_the_pinned_one() -> None:
    text = held_out_text()
    if text.digest not in PINNED:
        pytest.skip(f"no figure is pinned for the held-out text {text.digest[:12]} of this version of Python")
    # Sums of float32 products in another order (another BLAS): about 256 × 2**-24 = 1.5e-5 relatively per product; six
    # of them in a row per layer, four layers, and the mean over 20,000 tokens: well within 1e-4.
    assert perplexity(open_model("tiny"), text).per_token == pytest.approx(PINNED[text.digest], rel=1e-4)


def test_the_card_says_what_the_training_record_says() -> None:
    directory = Path(open_model("tiny").location)
    record = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    card = (directory / "README.md").read_text(encoding="utf-8")
    for figure in (f"{record['steps']:,} steps", f"{record['tokens_seen']:,} tokens", f"seed {record['seed']}"):
        assert figure in card
