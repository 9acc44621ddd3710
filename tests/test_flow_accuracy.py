"""Accuracy tables: what is planned, measured once, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from termwise.algorithms.errors import InputError
from termwise.algorithms.models import open_model
from termwise.algorithms.perplexity import perplexity
from termwise.algorithms.quantize import quantize
from termwise.algorithms.text import read_text, text_of
from termwise.flow import accuracy
from termwise.flow.accuracy import order_agreement, plan_accuracy, with_groups
from termwise.flow.cli import main


def run(*arguments: Path | str) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture
def other_text(tmp_path: Path, small_text: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(" ".join(small_text.read_text().split()[::-1]) * 40)
    return path


@pytest.fixture
def command(tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path | str]:
    monkeypatch.chdir(tmp_path)
    formats = ["--format", "int-w4", "--format", "olive-w4", "--groups", "16"]
    return ["accuracy", small_model, "--text", small_text, *formats]


def test_results_are_those_of_quantizer_and_evaluator(command: list[Any], small_model: Path, small_text: Path) -> None:
    document = json.loads(run(*command, "--methods", "none", "--json").stdout)
    measured = {entry["format"]: entry for entry in document["results"]}
    assert list(measured) == ["int-w4g16", "olive-w4", "olive-w4g16"]
    model, text = open_model(small_model), read_text(small_text)
    assert document["original_score"] == pytest.approx(perplexity(model, text).per_token, rel=1e-5)
    for name, entry in measured.items():
        expected = perplexity(model, text, replace=lambda _, weights, name=name: quantize(weights, name).dequantize())
        assert entry["score"] == pytest.approx(expected.per_token, rel=1e-5)
    report = Path("reports/accuracy/small/report.md").read_text()
    assert report.splitlines()[0].startswith("`termwise accuracy ")
    assert f"{measured['int-w4g16']['score']:,.5g}"[:5] in report
    assert {path.name for path in Path("reports/accuracy/small").iterdir()} == {
        "report.md",
        "results.json",
        "accuracy.png",
        "accuracy.svg",
    }


def test_what_was_measured_is_not_measured_again(
    command: list[Any], other_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    whole = accuracy.evaluate

    def counted(model: Any, formats: Any, *given: Any, **named: Any) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        method = named["calibration"].method
        made.append(f"{formats.name} {None if method is None else method.name}")
        return whole(model, formats, *given, **named)

    monkeypatch.setattr(accuracy, "evaluate", counted)
    command = [*command, "--methods", "none,gptq", "--calibration-text", other_text]
    assert run(*command).exit_code == 130
    assert made == ["int-w4g16 None", "olive-w4 None", "olive-w4g16 None", "int-w4g16 gptq"]

    def told(model: Any, formats: Any, *given: Any, **named: Any) -> Any:
        made.append(formats.name)
        return whole(model, formats, *given, **named)

    monkeypatch.setattr(accuracy, "evaluate", told)
    first = json.loads(run(*command, "--json").stdout)
    assert made[4:] == ["olive-w4", "olive-w4g16"]
    monkeypatch.setattr(accuracy, "evaluate", None)
    assert json.loads(run(*command, "--json").stdout)["results"] == first["results"]
    assert all(entry["score"] is not None for entry in first["results"])
    partly = json.loads(run(*command, "--format", "int-w3", "--only-measured", "--json").stdout)["results"]
    assert [entry for entry in partly if entry["score"] is not None] == first["results"]
    assert {entry["reason"] for entry in partly if entry["score"] is None} == {"not run yet"}


def test_by_default_every_format_is_measured_in_every_group_with_and_without_calibration(small_model: Path) -> None:
    plan = plan_accuracy(open_model(small_model), text_of("a", ["one"]), text_of("b", ["two"]))
    names = {entry.format for entry in plan.measurements}
    assert {"fp16", "int-w4g128", "int-w4g64", "int-w4g32", "olive-w8", "gobo-w3", "mxfp4", "bitmod-w3g32"} <= names
    assert plan.skipped == ()
    assert len(set(plan.measurements)) == len(plan.measurements)
    weights = {method: set() for method in ("none", "gptq")}
    for entry in plan.measurements:
        if entry.table == "weights":
            weights[entry.method].add(entry.format)
    assert weights["none"] == weights["gptq"]
    assert {entry.method for entry in plan.measurements} == {"none", "gptq", "smoothquant"}
    assert {entry.table for entry in plan.measurements} == {"weights", "activations", "cache"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int-w4", ["int-w4g64", "int-w4g32"]),
        ("olive-w4", ["olive-w4", "olive-w4g64", "olive-w4g32"]),
        ("mxfp4", ["mxfp4"]),
        ("gobo-w3", ["gobo-w3"]),
        ("fp16", ["fp16"]),
    ],
)
def test_groups_are_those_that_a_format_has(name: str, expected: list[str]) -> None:
    assert with_groups(name, (64, 32)) == expected


def test_orders_are_compared_pair_by_pair() -> None:
    ours = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert order_agreement(ours, {"a": 5, "b": 6, "c": 7}) == (1.0, [])
    assert order_agreement(ours, {"a": 7, "b": 6, "c": 5})[0] == -1.0
    tau, told = order_agreement(ours, {"a": 6, "b": 5, "c": 7, "d": 1})
    assert tau == pytest.approx(1 / 3)
    assert told == ["a before b here, behind it there"]
    assert order_agreement(ours, {"a": 5, "b": 5, "c": 7}) == (2 / 3, [])


def test_a_text_is_not_calibrated_on(small_model: Path) -> None:
    with pytest.raises(InputError, match="b and a share a document"):
        plan_accuracy(open_model(small_model), text_of("a", ["one"]), text_of("b", ["two", "one"]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "int-w9"], "int has no 9-bit weights"),
        (["--methods", "none,gptx"], "did you mean 'gptq'"),
        (["--groups", "64,x"], "--groups 64,x: expected positive whole numbers"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_runs(command: list[Any], arguments: list[str], said: str) -> None:
    result = run(*command[:4], *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not Path("runs").exists()


def test_the_index_names_commands_and_orders() -> None:
    scores = {"bitmod-w4g128": 3.0, "int-asym-w4g128": 4.0, "ant-w4g128": 2.0}
    document = {
        "model": "m",
        "score": "perplexity per token",
        "original_score": 1.5,
        "command": "termwise accuracy m",
        "results": [
            {"table": "weights", "method": "none", "format": name, "score": score} for name, score in scores.items()
        ],
    }
    text = accuracy.index_text([document], "the command")
    assert text.splitlines()[0] == "`the command`"
    assert "`termwise accuracy m`" in text
    assert "ant, bitmod, int-asym" in text
    assert "ant before bitmod" in text  # in no column of the paper
    assert "bitmod before int-asym" not in text
