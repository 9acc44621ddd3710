"""The report on the published and the cycle-level model: on disk is what the code computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from termwise.flow import published_report
from termwise.flow.published_report import COMMAND, document_of, main, report_text

FOLDER = Path(__file__).resolve().parent.parent / "reports" / "published-vs-cycle"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return document_of()


def test_the_report_on_disk_is_what_the_code_computes(document: dict[str, Any]) -> None:
    text = (FOLDER / "report.md").read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"`{COMMAND}`"
    assert text == report_text(document), f"reports/published-vs-cycle is out of date: {COMMAND}"
    stored = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert [point["cycles"] for point in stored["points"]] == [point["cycles"] for point in document["points"]]


def test_every_figure_of_the_authors_stands_beside_an_equal_one(document: dict[str, Any]) -> None:
    with_figure = [point for point in document["points"] if point["figure_cycles"] is not None]
    assert len(with_figure) == 100
    assert all(point["figure_cycles"] == point["published_cycles"] for point in with_figure)
    assert all(round(row["published"], 3) == row["figure"] for row in document["mean_ratios"])


def test_reasons_lead_from_one_model_to_the_other(document: dict[str, Any]) -> None:
    for point in document["points"]:
        assert point["published_cycles"] + sum(point["reason_cycles"].values()) == point["cycles"]


def test_the_command_writes_report_results_and_figure(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_report, "document_of", lambda: document)
    done = CliRunner().invoke(main, ["--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {"report.md", "results.json", "differences.png", "differences.svg"}
    assert (tmp_path / "new" / "report.md").read_bytes() == (FOLDER / "report.md").read_bytes()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(main, ["--out", str(tmp_path / "file" / "below")])
    assert done.exit_code == 1
    assert "cannot write" in done.output
