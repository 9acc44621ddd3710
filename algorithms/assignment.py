"""A format for every linear layer of a model, and its file.

The file is TOML or JSON (by its suffix) with one table ``formats``: name of the layer to name of the format. Other keys
are left to whoever wrote the file, so the JSON result of a search can be read as it is.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from termwise.algorithms.checkpoints import read_json
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.files import write_text
from termwise.algorithms.formats import Format, get_format

Assignment = Mapping[str, Format]
"""Name of a linear layer to its format."""

TABLE = "formats"


def format_names_of(assignment: Assignment) -> dict[str, str]:
    """Layer to name of the format, ready for JSON."""
    return {name: format.name for name, format in assignment.items()}


def write_assignment(assignment: Assignment, path: Path) -> None:
    """Write ``assignment`` to ``path``, ``.toml`` or ``.json``, whole or not at all.

    Raises ``InputError`` for another suffix, or a place that cannot be written.
    """
    names = format_names_of(assignment)
    if _suffix(path) == ".json":
        write_text(path, json.dumps({TABLE: names}, indent=1, ensure_ascii=False) + "\n")
        return
    # A JSON string is a TOML string too.
    lines = [f"{_quoted(layer)} = {_quoted(format)}\n" for layer, format in names.items()]
    write_text(path, f"[{TABLE}]\n" + "".join(lines))


def read_assignment(path: Path, layers: Sequence[str]) -> dict[str, Format]:
    """The format of each of ``layers`` that the file ``path`` names, in the order of ``layers``.

    Raises ``InputError``: no such file, not TOML or JSON, no table ``formats``, a layer that the model does not have,
    one that is missing, or no format of that name.
    """
    document = read_json(path) if _suffix(path) == ".json" else _read_toml(path)
    table = document.get(TABLE)
    if not isinstance(table, dict):
        raise InputError(f"{path} has no table {TABLE!r}; expected one with a format for every linear layer")
    known = set(layers)
    found: dict[str, Format] = {}
    for layer, name in table.items():
        if layer not in known:
            raise InputError(f"{path}: {_unknown_layer(layer, layers)}")
        if not isinstance(name, str):
            raise InputError(f"{path}: {layer} has the format {name!r}; expected the name of a format")
        try:
            found[layer] = get_format(name)
        except InputError as error:
            raise InputError(f"{path}: {layer}: {error}") from None
    missing = [layer for layer in layers if layer not in found]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path} names no format for {missing[0]}{others}; expected one for each linear layer")
    return {layer: found[layer] for layer in layers}


def _suffix(path: Path) -> str:
    if path.suffix not in (".toml", ".json"):
        raise InputError(f"{path} ends in {path.suffix!r}; expected a file .toml or .json with a format per layer")
    return path.suffix


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; expected a TOML file") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are kinds of it
        raise InputError(f"{path} is not TOML: {error}; expected a table {TABLE!r}") from error


def _unknown_layer(layer: str, layers: Sequence[str]) -> str:
    """Names the nearest layers only: a model has hundreds."""
    import difflib

    near = difflib.get_close_matches(layer, layers, n=3, cutoff=0.0)
    return f"{unknown_name('layer', layer, near)} ({len(layers)} layers in all)"
