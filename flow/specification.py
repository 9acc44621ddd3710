"""Sweep specifications: which question, models, formats and accelerators a sweep is about, read from TOML.

Everything in a specification is checked before anything is computed or written: the TOML, the keys, the types, and the
names of formats, accelerators and phases. A complaint is one sentence: the file, the key, what was found, and what
would have been accepted. ``docs/sweeps.md`` describes the keys for users.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from termwise.algorithms.errors import InputError, unknown_name

Phase = Literal["prefill", "decode"]
PHASES: Final[tuple[Phase, ...]] = get_args(Phase)
"""The many-token phase and the one-token phase."""

_Name = Annotated[str, StringConstraints(min_length=1, strict=True)]
_Names = Annotated[tuple[_Name, ...], Field(strict=False, min_length=1)]


def _one_or_more(value: object) -> object:
    """A single name stands for a list of one."""
    return [value] if isinstance(value, str) else value


class Specification(BaseModel):
    """A validated sweep: every combination of model, format, accelerator and phase is one point."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: int = Field(ge=1, le=1, description="the number 1")
    question: _Name = Field(description="one sentence of text: what the sweep is to answer")
    models: Annotated[_Names, BeforeValidator(_one_or_more)] = Field(
        alias="model", description="a model (a directory, a Hugging Face id, tiny or a known shape) or a list of models"
    )
    formats: _Names = Field(description="a list of format names with at least one entry")
    accelerators: _Names = Field(
        description="a list of accelerators (names or files of machines) with at least one entry"
    )
    phases: _Names = Field(default=PHASES, description="a list with prefill, decode or both")
    context: int = Field(default=256, ge=1, description="a whole number of tokens, at least 1")
    batch: int = Field(default=1, ge=1, description="a whole number of sequences, at least 1")
    text: _Name | None = Field(default=None, description="the path of a text file")

    def to_dict(self) -> dict[str, Any]:
        """The specification as JSON takes it, by the keys of the TOML file."""
        document: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return document

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that name the content (comments and layout of the file do not count)."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]


_TOML_TYPES: Final[Mapping[type, str]] = {
    bool: "a truth value",
    int: "a whole number",
    float: "a decimal number",
    str: "text",
    list: "a list",
    dict: "a table",
}


def _accepted_keys() -> dict[str, str]:
    """Key in the TOML file -> what its value must be."""
    return {field.alias or name: field.description or "" for name, field in Specification.model_fields.items()}


def _shown(value: object) -> str:
    """A value as the message shows it: short, and with its TOML type."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > 60:
        text = f"{text[:57]}..."
    return f"{text} ({_TOML_TYPES.get(type(value), type(value).__name__)})"


def _complaint(path: Path, error: ValidationError) -> InputError:
    """The first failure as one sentence; an unknown key comes first, since a misspelt key also counts as missing."""
    accepted = _accepted_keys()
    failures = sorted(error.errors(include_url=False), key=lambda failure: failure["type"] != "extra_forbidden")
    failure = failures[0]
    place = [str(part) for part in failure["loc"]]
    key = place[0]
    if failure["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, accepted, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return InputError(f"{path}: unknown key {key!r}: {hint}Accepted: {', '.join(accepted)}")
    if failure["type"] == "missing":
        return InputError(f"{path}: key {key!r} is missing; expected {accepted[key]}")
    entry = "".join(f"[{part}]" for part in place[1:])
    return InputError(f"{path}: key {key + entry!r}: expected {accepted[key]}; found {_shown(failure['input'])}")


def _check_names(path: Path, specification: Specification) -> Specification:
    """Resolve formats, accelerators and phases: canonical names, each once. Raises ``InputError``."""
    from termwise.algorithms.formats import get_format
    from termwise.sim.accelerators import get_accelerator

    machines: dict[str, tuple[str, str]] = {}

    def accelerator(reference: str) -> str:
        """The first reference, a name or a path, to the same machine. Raises where another one has its name."""
        machine = get_accelerator(reference)
        first, digest = machines.setdefault(machine.name, (reference, machine.digest()))
        if digest != machine.digest():
            raise InputError(
                f"{first} and {reference} are two machines called {machine.name!r}; expected a name of its own for each"
            )
        return first

    def resolved(key: str, names: tuple[str, ...], resolve: Any) -> tuple[str, ...]:
        try:
            return tuple(dict.fromkeys(resolve(name) for name in names))
        except InputError as error:
            raise InputError(f"{path}: key {key!r}: {error}") from error

    def phase(name: str) -> str:
        if name not in PHASES:
            raise unknown_name("phase", name, PHASES)
        return name

    return specification.model_copy(
        update={
            "models": tuple(dict.fromkeys(specification.models)),
            "formats": resolved("formats", specification.formats, lambda name: get_format(name).name),
            "accelerators": resolved("accelerators", specification.accelerators, accelerator),
            "phases": resolved("phases", specification.phases, phase),
        }
    )


def read_specification(path: Path) -> Specification:
    """Read and check the sweep specification at ``path``.

    Raises ``InputError`` where the file cannot be read, is not TOML, has an unknown or missing key, a value of a wrong
    type or out of range, or a name that nothing is called.
    """
    try:
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; expected a sweep specification in TOML"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; expected TOML, which is UTF-8 text") from error
    try:
        document = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    try:
        specification = Specification.model_validate(document)
    except ValidationError as error:
        raise _complaint(path, error) from error
    return _check_names(path, specification)
