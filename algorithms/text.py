"""Texts that perplexity is measured on: documents, each of which is read on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from termwise.algorithms.errors import InputError
from termwise.algorithms.tiny import corpus

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Documents with a name and a digest (SHA-256 over the documents, hexadecimal).

    ``beginnings_only``: what does not fit into a model's context is left out, rather than read as a further window that
    does not know the document's beginning.
    """

    name: str
    documents: tuple[str, ...]
    digest: str
    beginnings_only: bool = False


def text_of(name: str, documents: Sequence[str], *, beginnings_only: bool = False) -> Text:
    """A text of ``documents``; white space around a document is dropped, and so are empty ones."""
    kept = tuple(stripped for document in documents if (stripped := document.strip()))
    return Text(name=name, documents=kept, digest=corpus.digest(kept), beginnings_only=beginnings_only)


def read_text(path: Path) -> Text:
    """The UTF-8 file ``path``: documents separated by ``<|endoftext|>``, or one document without it.

    Separated documents are taken to be short ones, of which only the beginning counts; one document is read whole.

    Raises ``InputError``: no such file, not UTF-8, or nothing in it.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read the text {path}: {error.strerror or error}; expected a UTF-8 file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the text {path} is not UTF-8 at byte {error.start}; expected a UTF-8 file") from error
    text = text_of(path.name, content.split(SEPARATOR), beginnings_only=SEPARATOR in content)
    if not text.documents:
        raise InputError(f"the text {path} is empty; expected at least one document")
    return text


def held_out_text() -> Text:
    """Python's own documentation, the topics that ``tiny`` was not trained on, from the Python that runs this."""
    documents = tuple(corpus.held_out_documents())
    return Text(name="held-out topics of pydoc", documents=documents, digest=corpus.digest(documents))


def calibration_text() -> Text:
    """Python's own documentation, topics that ``tiny`` was trained on; no long paragraph of it is held out."""
    documents = tuple(corpus.training_topics())
    return Text(name="training topics of pydoc", documents=documents, digest=corpus.digest(documents))
