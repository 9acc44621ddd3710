"""NVIDIA's run-time compiler through its C interface: no header, no driver and no GPU are needed to compile."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

_MOST_LOG_CHARACTERS = 3000


class NvrtcError(Exception):
    """The compiler refused; the message is its log."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The newest library among NVIDIA's wheels, or one that the system knows."""
    names: list[str] = []
    try:
        import nvidia

        for root in nvidia.__path__:
            found = [*Path(root).glob("cu[0-9]*/lib/libnvrtc.so.*"), *Path(root).glob("cuda_nvrtc/lib/libnvrtc.so.*")]
            names += [str(path) for path in sorted(found, reverse=True) if "builtins" not in path.name]
    except ImportError:
        pass
    for name in [*names, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def available() -> bool:
    """Whether the library is installed."""
    return _library() is not None


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


def version() -> str:
    """Major and minor version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _loaded().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile(source: str, name: str, options: Sequence[str], *, ptx: bool) -> bytes:
    """The module of a ``source``: a cubin, or PTX. Raises ``NvrtcError``; a warning is an error."""
    library = _loaded()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), given)
        log = _read(program, "ProgramLog").decode(errors="replace").strip("\0 \n")
        if status or "warning" in log:
            raise NvrtcError(log[-_MOST_LOG_CHARACTERS:] or f"status {status}")
        return _read(program, "PTX" if ptx else "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    """Log or result of a program."""
    library = _loaded()
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        raise NvrtcError(f"status {status}")
