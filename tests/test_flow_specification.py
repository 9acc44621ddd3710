"""Sweep specifications: what is accepted, and one sentence with file, key and remedy for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from termwise.algorithms.errors import InputError
from termwise.flow.specification import read_specification

REPOSITORY = Path(__file__).resolve().parent.parent
GOOD = """
version = 1
question = "Which?"
model = "tiny"
formats = ["fp16", "int-w4g128"]
accelerators = ["fp16", "bitmod-lossy@16x16"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "spec.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_both_phases_256_tokens_one_sequence(tmp_path: Path) -> None:
    found = read_specification(write(tmp_path, GOOD))
    assert (found.models, found.phases) == (("tiny",), ("prefill", "decode"))
    assert (found.context, found.batch, found.text) == (256, 1, None)


def test_a_list_of_models_and_repeated_names_are_taken_once(tmp_path: Path) -> None:
    text = GOOD.replace('"tiny"', '["tiny", "opt-1.3b", "tiny"]').replace('"fp16", "int', '"fp16", "fp16", "int')
    found = read_specification(write(tmp_path, text))
    assert found.models == ("tiny", "opt-1.3b")
    assert found.formats == ("fp16", "int-w4g128")


def test_layout_and_comments_do_not_change_the_digest(tmp_path: Path) -> None:
    first = read_specification(write(tmp_path, GOOD)).digest
    assert read_specification(write(tmp_path, f"# a comment\n{GOOD}\ncontext = 256\n")).digest == first
    assert read_specification(write(tmp_path, f"{GOOD}\ncontext = 257\n")).digest != first


@pytest.mark.parametrize("path", sorted((REPOSITORY / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_the_specifications_that_ship_are_valid_and_ask_a_question(path: Path) -> None:
    assert read_specification(path).question.endswith("?")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("formats =", "format ="), ["unknown key 'format'", "did you mean 'formats'"]),
        (("int-w4g128", "int-w4g12x"), ["key 'formats'", "unknown format 'int-w4g12x'", "did you mean"]),
        (("int-w4g128", "int-w9g128"), ["key 'formats'", "no 9-bit weights"]),
        (("bitmod-lossy@16x16", "bitmod-losy"), ["key 'accelerators'", "did you mean 'bitmod-lossy'"]),
        (("bitmod-lossy@16x16", "olive@0x3"), ["key 'accelerators'", "ROWSxCOLUMNS"]),
        (("version = 1", "version = 2"), ["'version'", "the number 1", "found 2 (a whole number)"]),
        (("version = 1", 'version = "1"'), ["'version'", 'found "1" (text)']),
        (("version = 1", ""), ["'version' is missing"]),
        (('["fp16", "int-w4g128"]', '"fp16"'), ["'formats'", "a list", 'found "fp16" (text)']),
        (('["fp16", "int-w4g128"]', "[]"), ["'formats'", "at least one"]),
        (('["fp16", "int-w4g128"]', "[4]"), ["'formats[0]'", "found 4 (a whole number)"]),
        (('"tiny"', "3"), ["'model'", "found 3"]),
        (("version = 1", "version = 1\ncontext = 0"), ["'context'", "at least 1", "found 0"]),
        (("version = 1", "version = 1\ncontext = 2.5"), ["'context'", "found 2.5 (a decimal number)"]),
        (("version = 1", "version = 1\nbatch = true"), ["'batch'", "found true (a truth value)"]),
        (("version = 1", 'version = 1\nphases = ["decod"]'), ["'phases'", "did you mean 'decode'"]),
        (("version = 1", "version = = 1"), ["not valid TOML", "line 2"]),
        (("version = 1", "version = 1\nversion = 1"), ["not valid TOML", "line 3"]),
    ],
)
def test_a_mistake_is_named_with_file_and_key(tmp_path: Path, change: tuple[str, str], said: list[str]) -> None:
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(InputError) as caught:
        read_specification(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in [str(path), *said]), message


def test_no_file_a_directory_and_no_text_are_bad_input(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            read_specification(path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_specification(binary)
