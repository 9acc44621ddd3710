"""What a command is about: a model with weights, or only the shape of one; and the text that it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from termwise.algorithms import llama2c
from termwise.algorithms.config_shapes import read_shape
from termwise.algorithms.errors import InputError
from termwise.algorithms.models import Model, open_model
from termwise.algorithms.shapes import KNOWN_SHAPES, ModelShape, known_shape
from termwise.algorithms.text import Text, held_out_text, read_text

NO_WEIGHTS = "a known shape has no weights"
ONLY_CONFIG = "a config.json without safetensors has no weights"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, a known shape, or the shape that a config.json describes.

    Attributes:
        reference: as the user named it.
        name: what it is called in results.
        model: None where there are no weights.
        described: the shape from a config.json without weights; None for a model and a known shape.
    """

    reference: str
    name: str
    model: Model | None
    described: ModelShape | None = None

    @property
    def digest(self) -> str | None:
        """SHA-256 of the model's files; None without weights. Raises ``InputError`` where one cannot be read."""
        if self.model is None:
            return None
        try:
            return self.model.digest
        except OSError as error:
            raise InputError(f"cannot read {error.filename or self.reference}: {error.strerror or error}") from error

    @property
    def shape(self) -> ModelShape:
        """The linear layers and the attention. Raises ``InputError`` where config.json and weights do not agree."""
        if self.model is not None:
            return self.model.shape
        return known_shape(self.name) if self.described is None else self.described

    @property
    def shape_inputs(self) -> dict[str, object]:
        """What a result about a subject without weights depends on: the known name, or all that config.json says."""
        return {"shape": self.name if self.described is None else asdict(self.described)}

    @property
    def no_weights_reason(self) -> str | None:
        """Why there are no weights; None if there are."""
        if self.model is not None:
            return None
        return NO_WEIGHTS if self.described is None else ONLY_CONFIG

    @property
    def not_runnable_reason(self) -> str | None:
        """Why there is no perplexity; None if there is one."""
        return self.no_weights_reason if self.model is None else self.model.not_runnable_reason


def open_subject(reference: str) -> Subject:
    """The known shape or the model that ``reference`` names; a directory of that name goes first.

    A directory with a config.json and no weights that termwise reads, or a file ``*.json``, gives a shape alone.
    Raises ``InputError`` with what was expected.
    """
    path = Path(reference).expanduser()
    if reference.lower() in KNOWN_SHAPES and not path.is_dir():
        return Subject(reference=reference, name=reference.lower(), model=None)
    if _only_config(path):
        shape = read_shape(path)
        return Subject(reference=reference, name=shape.name, model=None, described=shape)
    model = open_model(reference)
    return Subject(reference=reference, name=model.name, model=model)


def _only_config(path: Path) -> bool:
    """Whether ``path`` is a configuration, or a directory with one and neither safetensors nor llama2.c models."""
    if path.is_file():
        return path.suffix == ".json"
    if not (path / "config.json").is_file() or any(path.glob("*.safetensors*")):
        return False
    return not any(file.is_file() and llama2c.is_model(file) for file in path.glob("*.bin"))


def open_subjects(references: Sequence[str]) -> tuple[Subject, ...]:
    """Every subject of a sweep; two different ones of the same name are called by their references."""
    subjects = [open_subject(reference) for reference in references]
    names = [subject.name for subject in subjects]
    return tuple(
        subject if names.count(subject.name) == 1 else replace(subject, name=subject.reference) for subject in subjects
    )


def open_text(path: Path | None) -> Text:
    """The text at ``path``, otherwise the one that ships with termwise. Raises ``InputError``."""
    return held_out_text() if path is None else read_text(path)
