"""Folders that a command is to write: refused before anything is computed, where they cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

from termwise.algorithms.errors import InputError


def check_place(folder: Path) -> None:
    """Raise ``InputError`` unless the nearest existing parent of ``folder``, or itself, is a writable directory."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, StopIteration) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such place"
        raise InputError(f"cannot write {folder}: {reason}; expected a writable place") from error
    if not nearest.is_dir():
        raise InputError(f"cannot write {folder}: {nearest} is a file; expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {folder}: {nearest} is read-only; expected a writable place")


def check_file(path: Path) -> None:
    """Raise ``InputError`` unless the file ``path`` can be written, or replaced. Writes nothing."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory; expected a file")
    try:
        check_place(path.parent)
    except InputError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def check_new_folder(folder: Path) -> None:
    """Raise ``InputError`` unless ``folder`` can be made, or is empty. Writes nothing."""
    check_place(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} exists already; expected a new or empty directory")


def check_run_folder(folder: Path) -> None:
    """Raise ``InputError`` unless ``folder`` can be made, or is the folder of a run. Writes nothing."""
    check_place(folder)
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    strangers = sorted(name for name in names if name != "records" and not name.endswith(".part"))
    if strangers and "run.json" not in names:
        raise InputError(
            f"{folder} holds {strangers[0]} and is not the folder of a run; expected a new folder, or one of an "
            "earlier sweep"
        )
