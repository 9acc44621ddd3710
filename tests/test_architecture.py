"""The import rule: data flows one way, and the three readings of a PE never see each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "algorithms": {"algorithms"},
    "sim": {"algorithms", "sim"},
    "rtl": {"algorithms", "rtl"},
    "gpu_ref": {"algorithms", "gpu_ref"},
    "flow": {"algorithms", "sim", "rtl", "gpu_ref", "flow"},
}


def imported_modules(source: str) -> Iterator[str]:
    """Every module that ``source`` imports, at its top or inside a function; relative ones as ``.``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "."
            elif node.module == "termwise":
                yield from (f"termwise.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def violations(folder: str, source: str) -> list[str]:
    """The imports in ``source``, a file of ``folder``, that the rule forbids."""
    bad = []
    for module in imported_modules(source):
        first, _, rest = module.partition(".")
        inner = rest.partition(".")[0] if first == "termwise" else ""
        bare = module == "." or first in MAY_IMPORT
        if bare or (inner in MAY_IMPORT and inner not in MAY_IMPORT[folder]):
            bad.append(module)
    return bad


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_left(folder: str) -> None:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files, f"{folder}/ holds no module"
    found = {str(file.relative_to(REPOSITORY)): violations(folder, file.read_text(encoding="utf-8")) for file in files}
    assert {file: bad for file, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("sim", "from termwise.rtl import x"),
        ("sim", "from termwise import flow"),
        ("algorithms", "import termwise.sim.simulate"),
        ("rtl", "def f():\n    from termwise.sim import x"),
        ("gpu_ref", "from ..sim import x"),
        ("flow", "import sim"),
    ],
)
def test_the_rule_finds_a_planted_violation(folder: str, source: str) -> None:
    assert violations(folder, source)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_installs_under_termwise(folder: str) -> None:
    link = REPOSITORY / "src" / "termwise" / folder
    assert link.is_symlink()
    assert link.resolve() == REPOSITORY / folder
