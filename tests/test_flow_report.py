"""Reports: everything that was computed is in them, nothing is loaded from outside, and they can be made again."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from termwise.algorithms.formats import format_names
from termwise.flow.cli import main
from termwise.flow.figures import format_colours
from termwise.flow.report import NOT_MODELLED, results_document, write_report
from termwise.flow.results import PlannedPoint, Point, Results, Run, SweptModel, Unavailable, with_fronts

QUESTION = 'Is <b>4</b> bits | enough & "good"?</script>'


def made_up_results(*, perplexity: bool = True, models: tuple[str, ...] = ("first", "se<cond")) -> Results:
    """Two models, two phases, three formats, two accelerators, with numbers that follow from their places."""
    formats = ("fp16", "int-w4g128", "bitmod-w3g128")
    points, planned = [], []
    for m, model in enumerate(models):
        for p, phase in enumerate(("prefill", "decode")):
            for f, format in enumerate(formats):
                for a, accelerator in enumerate(("fp16", "bitmod-lossy")):
                    entry = PlannedPoint(
                        model=model, format=format, accelerator=accelerator, phase=phase, digest=f"{len(planned):032x}"
                    )
                    planned.append(entry)
                    cycles = (4 - f) * (3 - a) * (1 + 9 * p) * 1000
                    split = {"pe_energy_uj": 1.0 * cycles, "sram_energy_uj": 2.0, "dram_energy_uj": 3.0 + a}
                    points.append(
                        Point(
                            model=model,
                            format=format,
                            accelerator=accelerator,
                            phase=phase,
                            perplexity=10.0 + f + m if perplexity else None,
                            perplexity_reason=None if perplexity else "there is no <tokenizer>",
                            sqnr_db=None if f == 0 else 40.0 - 10 * f,
                            mean_squared_error=0.0 if f == 0 else 0.1 * f,
                            bits_per_weight=16 / (1 + f),
                            latency_cycles=cycles,
                            latency_ms=cycles / 1e6,
                            energy_uj=sum(split.values()),
                            energy_split_uj=split,
                            traffic_bytes=10 * cycles,
                            digest=entry.digest,
                            notes=("a note | of the simulator",) if a else (),
                        )
                    )
    run = Run(
        command="termwise sweep 'a file.toml' --out run",
        specification={"question": QUESTION, "context": 256, "batch": 1, "formats": list(formats)},
        specification_digest="ab" * 16,
        models=tuple(
            SweptModel(reference=model, name=model, digest="cd" * 32, text="words", text_digest="ef" * 32)
            for model in models
        ),
        points=tuple(planned),
    )
    skipped = Unavailable(
        model=models[0], format="olive-w4", accelerator="fp16", phase="decode", reason="too <wide> | really"
    )
    return Results(
        run=run,
        points=with_fronts(points),
        skipped=(skipped,),
        failed=(),
        missing=(),
        versions={"python": "3.11", "numpy": "2.0"},
    )


class Page(HTMLParser):
    """What a page would load, and the text that it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.shown: list[str] = []
        self.rows = 0
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside.append(tag)
        self.rows += tag == "tr"
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset", "poster")]

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] not in ("script", "style"):
            self.shown.append(data)


def test_the_page_loads_nothing_and_shows_every_point(tmp_path: Path) -> None:
    results = made_up_results()
    files = write_report(results, tmp_path)
    text = files.page.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.loaded == []
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]
    shown = " ".join(page.shown)
    assert QUESTION in shown
    assert "too <wide> | really" in shown
    assert all(sentence in shown for sentence in NOT_MODELLED)
    assert page.rows == 1 + len(results.points) + 2


def test_the_panels_hold_every_point_with_hover_and_energy_split(tmp_path: Path) -> None:
    results = made_up_results()
    text = write_report(results, tmp_path).page.read_text(encoding="utf-8")
    match = re.search(r"^const panels = (.*);$", text, re.MULTILINE)
    assert match is not None
    assert "<" not in match[1]
    panels = json.loads(match[1])
    assert [(panel["model"], panel["phase"]) for panel in panels] == results.panels()
    for panel in panels:
        members = [point for point in results.points if (point.model, point.phase) == (panel["model"], panel["phase"])]
        for plot, key in zip(panel["plots"], ("latency_ms", "energy_uj"), strict=False):
            drawn = [value for trace in plot["traces"] if trace["mode"] == "markers" for value in trace["x"]]
            assert sorted(drawn) == sorted(getattr(point, key) for point in members)
            hover = [entry for trace in plot["traces"] if trace["mode"] == "markers" for entry in trace["text"]]
            assert len(hover) == len(members)
        bars = panel["plots"][2]["traces"]
        totals = [sum(parts) for parts in zip(*(trace["x"] for trace in bars), strict=True)]
        assert sorted(totals) == pytest.approx(sorted(point.energy_uj for point in members))


def test_no_two_formats_have_the_same_colour() -> None:
    colours = format_colours(format_names())
    assert len(set(colours.values())) == len(format_names())


def test_the_first_line_is_the_command_and_every_point_has_a_row(tmp_path: Path) -> None:
    results = made_up_results()
    text = write_report(results, tmp_path).report.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == f"`{results.run.command}`"
    assert sum(line.startswith(("| first |", "| se\\<cond |")) for line in lines) == len(results.points) + 1
    assert "too \\<wide> \\| really" in text
    assert all(sentence in text for sentence in NOT_MODELLED)
    assert "bitmod-lossy in prefill and decode: a note \\| of the simulator" in text
    assert "ab" * 16 in text
    assert "numpy 2.0" in text
    # Every table has the same number of cells in all its rows.
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(made_up_results(), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "report.md",
        "pareto.png",
        "pareto.svg",
        "index.html",
    }


def test_without_perplexity_the_weights_decide_and_the_reason_is_said(tmp_path: Path) -> None:
    results = made_up_results(perplexity=False)
    files = write_report(results, tmp_path)
    text = files.report.read_text(encoding="utf-8")
    assert "signal to quantization noise" in text
    assert "there is no \\<tokenizer>" in text
    document = results_document(results, files)
    assert {model["accuracy"] for model in document["models"]} == {"sqnr_db"}
    exact = [point for point in document["points"] if point["format"] == "fp16"]
    assert any(point["pareto"] for point in exact)


def test_a_run_without_a_point_still_has_a_report(tmp_path: Path) -> None:
    results = made_up_results()
    empty = Results(
        run=results.run, points=(), skipped=results.skipped, failed=results.skipped, missing=(), versions={}
    )
    files = write_report(empty, tmp_path)
    assert files.figures == ()
    assert "pareto.png" not in files.report.read_text(encoding="utf-8")
    assert "Failed" in files.page.read_text(encoding="utf-8")


def test_every_format_has_its_own_colour() -> None:
    names = ["fp16", "int-w8g128", "int-w6g128", "int-w4g128", "int-asym-w4g128", "bitmod-w4g128", "bitmod-w3g128"]
    assert len(set(format_colours(names).values())) == len(names)


@pytest.mark.parametrize("damage", ["no file", "not json", "not a run", "another version"])
def test_a_folder_that_is_no_run_is_bad_input(tmp_path: Path, damage: str) -> None:
    content: dict[str, Any] = {"run_version": 1}
    if damage == "not json":
        (tmp_path / "run.json").write_text("{")
    elif damage != "no file":
        (tmp_path / "run.json").write_text(json.dumps({**content, "run_version": 99 if "v" in damage else 1}))
    result = CliRunner().invoke(main, ["report", str(tmp_path), "--json"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert str(tmp_path) in result.stderr
    assert not (tmp_path / "report.md").exists()


def test_the_report_is_made_again_from_the_records(tmp_path: Path) -> None:
    specification = tmp_path / "shape.toml"
    specification.write_text(
        'version = 1\nquestion = "?"\nmodel = "opt-125m"\nformats = ["int-w4g128"]\n'
        'accelerators = ["ant", "bitmod-lossy"]\nphases = ["decode"]\ncontext = 8\n'
    )
    run = tmp_path / "run"
    first = CliRunner().invoke(main, ["sweep", str(specification), "--out", str(run), "--json"])
    assert first.exit_code == 0, first.stderr
    content = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for name in ("report.md", "index.html", "pareto.png", "pareto.svg"):
        (run / name).unlink()
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    again = CliRunner().invoke(main, ["report", str(moved), "--json"])
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["points"] == json.loads(first.stdout)["points"]
    assert {path.name: path.read_bytes() for path in moved.iterdir() if path.is_file()} == content
