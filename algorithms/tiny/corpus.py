"""Text that every CPython installation has: language topics, docstrings and source of the standard library.

The held-out text is a fixed set of language topics (``pydoc_data.topics``, the text of ``help('while')``), chosen by a
hash of the topic's name, so that the choice does not depend on the version of Python. Topics overlap and are quoted in
docstrings, so every paragraph of a held-out topic is dropped from the training text wherever it occurs.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_FRACTION = 0.13
"""Fraction of topic names that is held out: about 60 KB of text in Python 3.11."""

MINIMUM_PARAGRAPH = 40
"""Characters (whitespace normalised) from which on a paragraph shared with the held-out text is dropped."""

MINIMUM_DOCSTRING = 16
"""Characters from which on a docstring is taken into the training text."""

# Tests, third-party packages, the topics themselves, and what differs between builds of the same version.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "lib-dynload"}
)
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
# Tables of characters: large, and without a word of documentation.
_TABLES = frozenset({"encodings"})

_PARAGRAPH_BREAK = re.compile(r"(\n(?:[ \t]*(?:#[ \t]*)?\n)+)")
_COMMENT_MARK = re.compile(r"(?m)^[ \t]*#+[ \t]?")


def is_held_out(name: str) -> bool:
    """Whether the topic of this name belongs to the held-out text: a hash of the name alone decides."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return number < HELD_OUT_FRACTION * 2.0**64


def held_out_documents() -> list[str]:
    """The held-out topics in the order of their names; needs no scan of the standard library."""
    return [text for name, text in sorted(topics.items()) if is_held_out(name)]


def training_topics() -> list[str]:
    """The training documents among the topics; needs no scan of the standard library."""
    documents = [text for name, text in sorted(topics.items()) if not is_held_out(name)]
    return drop_shared_paragraphs(documents, held_out_documents())


def training_groups() -> dict[str, list[str]]:
    """The training documents by origin: ``topics``, ``docstrings`` (one per module) and ``source`` (one per module).

    No paragraph of at least ``MINIMUM_PARAGRAPH`` characters is shared with the held-out topics.
    """
    docstrings: list[str] = []
    source: list[str] = []
    for path, name in _modules():
        try:
            with tokenize.open(path) as file:
                text = file.read()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        document = "\n\n".join(_docstrings(tree, name))
        if document:
            docstrings.append(document + "\n")
        if text.strip() and not _TABLES.intersection(path.parts):
            source.append(text)
    held_out = held_out_documents()
    return {
        "topics": training_topics(),
        "docstrings": drop_shared_paragraphs(docstrings, held_out),
        "source": drop_shared_paragraphs(source, held_out),
    }


def training_documents() -> list[str]:
    """All training documents: topics, then docstrings, then source, each in the order of their names."""
    return [document for documents in training_groups().values() for document in documents]


def digest(documents: Sequence[str]) -> str:
    """SHA-256 (hexadecimal) over the UTF-8 of the documents, each preceded by its length as eight bytes."""
    state = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()


def drop_shared_paragraphs(documents: Iterable[str], reserved: Sequence[str]) -> list[str]:
    """The documents without the paragraphs that they share with the ``reserved`` ones; empty documents are left out.

    A paragraph is dropped if it contains a reserved paragraph or lies within one, after comment marks and runs of
    white space are normalised, where the shorter of the two has at least ``MINIMUM_PARAGRAPH`` characters.
    """
    paragraphs = sorted(
        {
            normalised
            for document in reserved
            for part in _PARAGRAPH_BREAK.split(document)
            if len(normalised := _normalise(part)) >= MINIMUM_PARAGRAPH
        }
    )
    everything = "\n".join(paragraphs)
    kept = []
    for document in documents:
        whole = _normalise(document)
        contained = [paragraph for paragraph in paragraphs if paragraph in whole]
        parts = _PARAGRAPH_BREAK.split(document)
        # Text at even places, the breaks that follow it at odd ones.
        for place in range(0, len(parts), 2):
            normalised = _normalise(parts[place])
            if len(normalised) < MINIMUM_PARAGRAPH:
                continue
            if normalised in everything or any(paragraph in normalised for paragraph in contained):
                parts[place : place + 2] = [""] * len(parts[place : place + 2])
        text = "".join(parts)
        if text.strip():
            kept.append(text)
    return kept


def _normalise(text: str) -> str:
    return " ".join(_COMMENT_MARK.sub("", text).split())


def _modules() -> Iterator[tuple[Path, str]]:
    """Path (relative names sorted) and dotted name of every module of the standard library that is read."""
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in relative:
        parts = name.split("/")
        if _EXCLUDED_FOLDERS.intersection(parts) or any(part.startswith(_EXCLUDED_PREFIXES) for part in parts):
            continue
        yield root / name, name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """The docstrings within ``node`` in the order of the source, each headed by a qualified name as ``pydoc`` does."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text is not None and len(text.strip()) >= MINIMUM_DOCSTRING:
            heading = name
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                heading += f"({ast.unparse(node.args)})"
            yield f"{heading}\n\n{inspect.cleandoc(text)}"
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{name}.{child.name}"
        yield from _docstrings(child, inner)
