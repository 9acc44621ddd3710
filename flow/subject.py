"""What a command is about: a model with weights, or a known shape without; and the text that it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from termwise.algorithms.errors import InputError
from termwise.algorithms.models import Model, open_model
from termwise.algorithms.shapes import KNOWN_SHAPES, ModelShape, known_shape
from termwise.algorithms.text import Text, held_out_text, read_text

NO_WEIGHTS = "a known shape has no weights"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, or a known shape.

    Attributes:
        reference: as the user named it.
        name: what it is called in results.
        model: None for a known shape.
    """

    reference: str
    name: str
    model: Model | None

    @property
    def digest(self) -> str | None:
        """SHA-256 of the model's files; None for a known shape. Raises ``InputError`` where one cannot be read."""
        if self.model is None:
            return None
        try:
            return self.model.digest
        except OSError as error:
            raise InputError(f"cannot read {error.filename or self.reference}: {error.strerror or error}") from error

    @property
    def shape(self) -> ModelShape:
        """The linear layers and the attention. Raises ``InputError`` where config.json and weights do not agree."""
        return known_shape(self.name) if self.model is None else self.model.shape

    @property
    def not_runnable_reason(self) -> str | None:
        """Why there is no perplexity; None if there is one."""
        return NO_WEIGHTS if self.model is None else self.model.not_runnable_reason


def open_subject(reference: str) -> Subject:
    """The known shape or the model that ``reference`` names; a directory of that name goes first.

    Raises ``InputError`` with what was expected.
    """
    if reference.lower() in KNOWN_SHAPES and not Path(reference).is_dir():
        return Subject(reference=reference, name=reference.lower(), model=None)
    model = open_model(reference)
    return Subject(reference=reference, name=model.name, model=model)


def open_subjects(references: Sequence[str]) -> tuple[Subject, ...]:
    """Every subject of a sweep; two different ones of the same name are called by their references."""
    subjects = [open_subject(reference) for reference in references]
    names = [subject.name for subject in subjects]
    return tuple(
        subject
        if names.count(subject.name) == 1
        else Subject(reference=subject.reference, name=subject.reference, model=subject.model)
        for subject in subjects
    )


def open_text(path: Path | None) -> Text:
    """The text at ``path``, otherwise the one that ships with termwise. Raises ``InputError``."""
    return held_out_text() if path is None else read_text(path)
