"""The documents do what they say: examples run, commands exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from termwise.algorithms import datatypes, errors
from termwise.flow.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = [
    shlex.split(line, comments=True)
    for document in DOCUMENTS
    for line in document.read_text(encoding="utf-8").splitlines()
    if line.startswith("    termwise ")
]


def test_the_python_example_of_the_readme_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 29
    assert "lm_head" in done.stdout


def test_the_python_examples_of_other_documents_run(tmp_path: Path) -> None:
    found = 0
    for document in DOCUMENTS[1:]:
        for example in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
            subprocess.run([sys.executable, "-c", example], cwd=tmp_path, check=True)
            found += 1
    assert found


@pytest.mark.parametrize("command", COMMANDS, ids=shlex.join)
def test_the_commands_that_are_shown_have_such_options(command: list[str]) -> None:
    """Every command line is parsed as the program parses it; nothing is run."""
    _, name, *arguments = command
    chosen = main.get_command(click.Context(main), name)
    assert chosen is not None
    chosen.make_context(name, arguments)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_states_the_patent_application_and_the_licence() -> None:
    assert "patent application" in README
    assert "Apache-2.0" in README


@pytest.mark.parametrize("module", [datatypes, errors], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_right(module: object) -> None:
    import doctest

    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted > 0
    assert results.failed == 0
