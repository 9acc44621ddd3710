"""What a command is about: folders with nothing but a config.json beside known shapes and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import known_shape
from termwise.flow.cli import main
from termwise.flow.subject import open_subject, open_subjects

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def folder_of(parent: Path, name: str, config: dict[str, Any]) -> Path:
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_and_a_file_without_weights_give_the_shape(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "gpt2", GPT2)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which is never opened")
    for reference in (folder, folder / "config.json"):
        subject = open_subject(str(reference))
        assert subject.shape == known_shape("gpt2")
        assert (subject.model, subject.digest) == (None, None)
        assert subject.not_runnable_reason == "a config.json without safetensors has no weights"


def test_weights_go_before_the_configuration(small_model: Path) -> None:
    assert open_subject(str(small_model)).model is not None


def test_simulate_takes_a_folder_with_only_a_configuration(tmp_path: Path) -> None:
    documents = []
    for reference in (str(folder_of(tmp_path, "gpt2", GPT2)), "gpt2"):
        arguments = ["simulate", reference, "--accelerator", "bitmod-lossy", "--phase", "decode", "--json"]
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        documents.append(json.loads(result.stdout))
    assert documents[0] == documents[1]


def test_a_bad_configuration_is_one_sentence_with_file_and_key(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "broken", {**GPT2, "n_head": 7})
    result = CliRunner().invoke(main, ["simulate", str(folder), "--accelerator", "fp16"])
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert str(folder / "config.json") in line
    assert "'n_embd' is 768; expected a multiple of 'n_head', which is 7" in line


def test_quantize_says_why_there_is_nothing_to_quantize(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "empty", GPT2)
    result = CliRunner().invoke(main, ["quantize", str(folder), "--format", "int-w4g32"])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(folder) in result.stderr


def test_results_without_weights_depend_on_all_that_the_configuration_says(tmp_path: Path) -> None:
    """Two folders of one name: the records of a sweep must not be taken for each other."""
    first = folder_of(tmp_path / "a", "same", GPT2)
    second = folder_of(tmp_path / "b", "same", {**GPT2, "n_layer": 6})
    one, other = open_subjects([str(first), str(second)])
    assert (one.name, other.name) == (str(first), str(second))
    assert one.shape_inputs != other.shape_inputs
    assert open_subject("gpt2").shape_inputs == {"shape": "gpt2"}


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors"):
        open_subject(str(tmp_path))
