"""Files are written beside their place and moved into it, so that no reader ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from termwise.algorithms.errors import InputError


@contextlib.contextmanager
def input_error_on_failure(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``path`` into one sentence for the user."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; expected a writable place with free space"
        ) from error


def _umask() -> int:
    """The permissions that new files do not get; temporary ones are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def make_directory(path: Path) -> None:
    """Create ``path`` and its parents. Raises ``InputError`` where that is refused."""
    with input_error_on_failure(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary file path beside ``path``; on success it replaces ``path``, on any failure it is removed.

    Raises ``InputError`` when the place cannot be written (read-only, full, not a directory).
    """
    with input_error_on_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all. Raises ``InputError`` as ``written_beside`` does."""
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def directory_written_beside(path: Path) -> Iterator[Path]:
    """As ``written_beside``, for a directory that does not exist yet.

    Raises ``InputError`` when ``path`` exists already and is not an empty directory, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already; expected a new or empty directory")
    with input_error_on_failure(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield temporary
            for entry in temporary.rglob("*"):
                entry.chmod((0o777 if entry.is_dir() else 0o666) & ~_umask())
            temporary.chmod(0o777 & ~_umask())
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
