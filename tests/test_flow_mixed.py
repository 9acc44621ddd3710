"""The result of a mixed-precision choice as document, section and figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from termwise.algorithms.assignment import format_names_of, read_assignment
from termwise.algorithms.errors import InputError
from termwise.algorithms.mixed_precision import Evolution
from termwise.algorithms.models import Model, open_model
from termwise.algorithms.perplexity import Evaluator
from termwise.algorithms.text import read_text, text_of
from termwise.flow.mixed import gram_matrices, limited, markdown, mix
from termwise.flow.records import to_json

EVOLUTION = Evolution(generations=1, offspring=2, shares=(), survivors=())
FORMATS = ("bitmod-w3g128", "bitmod-w4g128", "int-w8g128")


@pytest.fixture(scope="module")
def model(small_model: Path) -> Model:
    return open_model(small_model)


@pytest.fixture(scope="module")
def arguments(small_text: Path) -> dict[str, Any]:
    evaluation = text_of("others", ["what nothing was chosen by"])
    calibration = read_text(small_text)
    return {"bits_per_weight": 6.0, "calibration": calibration, "evaluation": evaluation, "formats": FORMATS}


@pytest.fixture(scope="module")
def written(
    model: Model, arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """A result, and the folder with ``formats.toml`` and the figures."""
    folder = tmp_path_factory.mktemp("mixed")
    return mix(model, **arguments, evolution=EVOLUTION, out=folder / "formats.toml", figure=folder), folder


def test_the_document_is_strict_json_and_a_file_of_formats(
    model: Model, written: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    document, folder = written
    path = tmp_path / "result.json"
    path.write_text(to_json(document), encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == document
    from_result = read_assignment(path, model.matrix_names)
    assert from_result == read_assignment(folder / "formats.toml", model.matrix_names)
    assert format_names_of(from_result) == document["formats"]


def test_output_errors_are_those_of_the_inputs_on_the_text(model: Model, arguments: dict[str, Any]) -> None:
    text = text_of("words", ["a sentence that fills a window of sixty-four tokens, since one byte is one token"])
    read: dict[str, Any] = {}

    def observe(name: str, inputs: Any) -> None:
        exact = inputs.astype(np.float64)
        read[name] = read.get(name, 0) + exact.T @ exact

    Evaluator(model, text).observe_inputs(observe)
    grams = dict(gram_matrices(model, text))
    assert grams.keys() == read.keys()
    for name, gram in grams.items():
        # Products of at most 128 tokens are summed in float32; the greatest sum of magnitudes is on the diagonal.
        np.testing.assert_allclose(gram, read[name], rtol=0, atol=128 * 2.0**-24 * read[name].max())
    document = mix(model, **{**arguments, "calibration": text}, sensitivity="output", evolution=EVOLUTION)
    assert document["sensitivity"] == "output"
    assert document["integer_program"]["predicted_calibration_loss"] is None


def test_layers_add_up_to_the_whole(written: tuple[dict[str, Any], Path]) -> None:
    document = written[0]
    layers = document["layers"]
    bits = sum(layer["bits_per_weight"] * layer["weights"] for layer in layers)
    # Sizes are whole bits below 2^53; the quotients of each layer are rounded once.
    assert bits / sum(layer["weights"] for layer in layers) == pytest.approx(document["bits_per_weight"], rel=1e-12)
    assert all(set(layer["sensitivity"]) == set(FORMATS) for layer in layers)
    assert {layer["name"]: layer["format"] for layer in layers} == document["formats"]


def test_the_same_call_gives_the_same_files(
    model: Model, arguments: dict[str, Any], written: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    document, folder = written
    again = mix(model, **arguments, evolution=EVOLUTION, out=tmp_path / "formats.toml", figure=tmp_path)
    paths = {"out", "figures"}
    assert {key: value for key, value in again.items() if key not in paths} == {
        key: value for key, value in document.items() if key not in paths
    }
    for name in ("formats.toml", "mixed.png", "mixed.svg"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_section_states_whether_anything_was_gained(written: tuple[dict[str, Any], Path]) -> None:
    document = written[0]
    for gain, said in ((0.5, "The choice lowers"), (0.0, "does not lower"), (-0.5, "does not lower")):
        assert said in markdown({**document, "perplexity_gain": gain})
    for history, said_nothing_better in (([2.0, 1.5], False), ([2.0, 2.0], True), ([], False)):
        text = markdown({**document, "evolution": {"seed": 0, "calibration_loss_by_generation": history}})
        assert ("found nothing better" in text) == said_nothing_better
    text = markdown({**document, "perplexity_gain": None, "uniform_within": None, "uniform_above": None})
    assert "the best uniform format" not in text
    assert "| integer program |" in text


def test_a_long_calibration_is_cut_to_about_the_size_asked_for() -> None:
    text = text_of("long", ["x" * 20000, "y" * 20000])
    assert limited(text, 40000) is text
    assert sum(map(len, limited(text, 10000).documents)) == 10000
    with pytest.raises(InputError, match="expected at least one"):
        limited(text, 0)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(model: Model, arguments: dict[str, Any]) -> None:
    def no_step(what: str, done: int, total: int) -> None:
        raise AssertionError("nothing is to be measured")

    with pytest.raises(InputError, match=r"expected a file \.toml or \.json"):
        mix(model, **arguments, out=Path("formats.yaml"), progress=no_step)
