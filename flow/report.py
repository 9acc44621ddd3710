"""The report of a run: report.md, pareto.png, pareto.svg, and index.html, one page that needs no network.

All of it is made from the records of the run, so it can be made again at any time. For equal records the files are
equal byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from termwise.algorithms.files import write_text
from termwise.flow import figures
from termwise.flow.console import number
from termwise.flow.records import strict
from termwise.flow.results import ENERGY_PARTS, Point, Results

NOT_MODELLED: Final = (
    "Time and energy of softmax, norms, rotary embedding, activation functions, residual additions and the unit that "
    "computes them; leakage; the network on the chip.",
    "Pages, banks and refresh of external memory; conflicts between the banks of the buffers; prefetching from one "
    "product to the next; a causal mask.",
    "The decoders between external memory and the weight buffer keep pace; the FP16 accelerator takes any format "
    "that way, and its decoder costs neither energy nor area.",
    "Perplexity is measured with quantized weights only, activations and keys and values in float32; accelerators that "
    "hold keys and values as 8-bit integers are therefore not described exactly by it.",
    "The perplexity of a format is the same on every accelerator: rounding inside a PE is not part of it.",
)
"""What a reader must not take these numbers for."""

COLUMNS: Final = (
    "model",
    "phase",
    "format",
    "accelerator",
    "bits per weight",
    "perplexity",
    "SQNR (dB)",
    "latency (ms)",
    "energy (µJ)",
    "Pareto",
)
"""Headings of the table of points."""

MEASURES: Final[Mapping[str | None, str]] = {
    "perplexity": "perplexity per token",
    "sqnr_db": "signal to quantization noise of all weights (there is no perplexity)",
    None: "nothing: there are no weights, so latency and energy alone decide",
}
"""What accuracy means for a model, by ``Results.accuracy_measure``."""

PART_NAMES: Final[Mapping[str, tuple[str, str]]] = {
    "pe_energy_uj": ("PEs", "#1e5bb0"),
    "sram_energy_uj": ("buffers", "#e0a12b"),
    "dram_energy_uj": ("DRAM", "#8795a5"),
}
"""Name and colour of every part of the energy."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a report is; ``figures`` is empty where no point can be drawn."""

    run: Path
    report: Path
    page: Path
    figures: tuple[Path, ...]


def sqnr_text(point: Point) -> str:
    """SQNR for a table: ``exact`` where nothing was lost, a dash where there are no weights."""
    if point.sqnr_db is not None:
        return f"{point.sqnr_db:.2f}"
    return "exact" if point.mean_squared_error == 0 else "–"


def perplexity_text(value: float | None) -> str:
    """Perplexity for a table: four decimals up to 100, then four significant digits."""
    return f"{value:.4f}" if value is not None and value < 100 else number(value)


def front_text(point: Point) -> str:
    """Which fronts a point is on, for a table."""
    marks = [("●", point.pareto), ("L", point.pareto_latency), ("E", point.pareto_energy)]
    return " ".join(mark for mark, member in marks if member)


def cells(point: Point) -> tuple[str, ...]:
    """One row of the table of points (see ``COLUMNS``)."""
    return (
        point.model,
        point.phase,
        point.format,
        point.accelerator,
        "–" if point.bits_per_weight is None else f"{point.bits_per_weight:.3f}",
        perplexity_text(point.perplexity),
        sqnr_text(point),
        number(point.latency_ms),
        number(point.energy_uj),
        front_text(point),
    )


def results_document(results: Results, files: Files) -> dict[str, Any]:
    """The results as one JSON document."""
    run = results.run
    texts = [{"name": model.text, "digest": model.text_digest} for model in run.models if model.text_digest is not None]
    return {
        "question": run.specification["question"],
        "command": run.command,
        "specification": run.specification,
        "specification_digest": run.specification_digest,
        "run": str(files.run),
        "report": str(files.report),
        "page": str(files.page),
        "figures": [str(path) for path in files.figures],
        "text": texts[0] if texts else None,
        "models": [{**asdict(model), "accuracy": results.accuracy_measure(model.name)} for model in run.models],
        "points": [point.to_dict() for point in results.points],
        "skipped": [asdict(entry) for entry in results.skipped],
        "failed": [asdict(entry) for entry in results.failed],
        "missing": [asdict(entry) for entry in results.missing],
        "versions": results.versions,
    }


def write_report(results: Results, folder: Path) -> Files:
    """Write report.md, the figures and index.html to ``folder``. Raises ``InputError`` where it cannot be written."""
    drawn = tuple(figures.draw(results, folder))
    files = Files(run=folder, report=folder / "report.md", page=folder / "index.html", figures=drawn)
    write_text(files.report, report_text(results, has_figure=bool(drawn)))
    write_text(files.page, page_text(results))
    return files


def _environment(*, html: bool) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("termwise.flow"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _markdown_cell(text: object) -> str:
    """``text`` for a cell of a Markdown table, or a sentence: nothing in it is read as markup."""
    cleaned = " ".join(str(text).split())
    for character in ("\\", "|", "<", "*", "`", "["):
        cleaned = cleaned.replace(character, f"\\{character}")
    return cleaned


def _skipped_by_reason(results: Results) -> list[dict[str, Any]]:
    """Skipped combinations: those of one model, format and accelerator together, with their phases."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for entry in results.skipped:
        found.setdefault((entry.model, entry.format, entry.accelerator, entry.reason), []).append(entry.phase)
    return [
        {"model": model, "format": format, "accelerator": accelerator, "phases": ", ".join(phases), "reason": reason}
        for (model, format, accelerator, reason), phases in found.items()
    ]


def notes(results: Results) -> list[str]:
    """What the simulator says of points, each sentence once, with the accelerators and phases that it is about."""
    phases_by_note: dict[str, dict[str, dict[str, None]]] = {}
    for point in results.points:
        for note in point.notes:
            phases_by_note.setdefault(note, {}).setdefault(point.accelerator, {})[point.phase] = None
    sentences = []
    for note, phases_by_accelerator in phases_by_note.items():
        together: dict[str, list[str]] = {}
        for accelerator, phases in phases_by_accelerator.items():
            together.setdefault(" and ".join(phases), []).append(accelerator)
        places = "; ".join(f"{', '.join(names)} in {phases}" for phases, names in together.items())
        sentences.append(f"{places}: {note}")
    return sentences


def _common(results: Results) -> dict[str, Any]:
    """What both templates show."""
    no_perplexity = {
        point.model: point.perplexity_reason for point in results.points if point.perplexity_reason is not None
    }
    return {
        "run": results.run,
        "specification": results.run.specification,
        "columns": COLUMNS,
        "results": results,
        "skipped": _skipped_by_reason(results),
        "not_modelled": NOT_MODELLED,
        "notes": notes(results),
        "accuracy": [
            {
                "model": model.name,
                "measure": MEASURES[results.accuracy_measure(model.name)],
                "reason": no_perplexity.get(model.name),
            }
            for model in results.run.models
        ],
    }


def report_text(results: Results, *, has_figure: bool) -> str:
    """The content of report.md; its first line is the command that makes it again."""
    environment = _environment(html=False)
    environment.filters["cell"] = _markdown_cell
    text: str = environment.get_template("report.md").render(
        **_common(results), has_figure=has_figure, rows=[cells(point) for point in results.points]
    )
    return text


def page_text(results: Results) -> str:
    """The content of index.html: styles, data and the drawing library are inside; nothing is loaded."""
    from plotly.offline import get_plotlyjs

    panels = [_panel(results, model, phase) for model, phase in results.panels()]
    text: str = (
        _environment(html=True)
        .get_template("index.html")
        .render(
            **_common(results),
            rows=[_row(point) for point in results.points],
            panels=[{"model": panel["model"], "phase": panel["phase"]} for panel in panels],
            panels_json=_script_json(panels),
            library=get_plotlyjs(),
        )
    )
    return text


def _script_json(document: Any) -> str:
    """``document`` as JSON that may stand inside a script element."""
    text = json.dumps(strict(document), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _row(point: Point) -> dict[str, Any]:
    """A row of the page's table: cells as shown, and the values by which they are sorted."""
    values: tuple[Any, ...] = (
        point.model,
        point.phase,
        point.format,
        point.accelerator,
        point.bits_per_weight,
        point.perplexity,
        point.sqnr_db if point.sqnr_db is not None else (1e9 if point.mean_squared_error == 0 else None),
        point.latency_ms,
        point.energy_uj,
        point.pareto * 4 + point.pareto_latency * 2 + point.pareto_energy,
    )
    shown = zip(cells(point), values, strict=True)
    return {
        "front": point.pareto,
        "cells": [{"text": text, "value": "" if value is None else value} for text, value in shown],
    }


def _hover(point: Point) -> str:
    """What the page says of a point under the pointer."""
    lines = [
        f"<b>{_escape(point.format)} · {_escape(point.accelerator)}</b>",
        f"{_escape(point.model)}, {point.phase}",
        f"perplexity {perplexity_text(point.perplexity)}, SQNR {sqnr_text(point)} dB",
        f"latency {number(point.latency_ms)} ms ({point.latency_cycles:,} cycles)",
        f"energy {number(point.energy_uj)} µJ",
    ]
    if point.bits_per_weight is not None:
        lines.append(f"{point.bits_per_weight:.3f} bits per weight")
    if point.pareto:
        lines.append("not dominated in accuracy, latency and energy")
    return "<br>".join(lines).replace("exact dB", "exact")


def _escape(text: str) -> str:
    """``text`` for Plotly's own small markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _panel(results: Results, model: str, phase: str) -> dict[str, Any]:
    """The three plots of one model and phase, as Plotly takes them."""
    points = figures.drawn_points(results, model, phase)
    vertical = figures.accuracy_axis(results, model)
    colours = figures.format_colours(list(dict.fromkeys(point.format for point in results.points)))
    markers = figures.accelerator_markers(list(dict.fromkeys(point.accelerator for point in results.points)))
    plots = [
        _scatter(figures.with_value(points, axis), axis, vertical, colours, markers)
        for axis in (figures.LATENCY, figures.ENERGY)
    ]
    bars = [point for point in results.points if (point.model, point.phase) == (model, phase)]
    return {"model": model, "phase": phase, "plots": [*plots, _energy_bars(bars)]}


_FONT: Final = {"family": "system-ui, sans-serif", "size": 12, "color": figures.INK}


def _scatter(
    points: list[Point],
    horizontal: figures.Axis,
    vertical: figures.Axis,
    colours: Mapping[str, str],
    markers: Mapping[str, tuple[str, str, str]],
) -> dict[str, Any]:
    """Accuracy against ``horizontal``: one trace per accelerator, and the front as a line of steps."""
    front = figures.front_line(points, horizontal, vertical)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [horizontal.value(point) for point in front],
            "y": [vertical.value(point) for point in front],
            "line": {"color": figures.MUTED, "width": 1.5, "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    for accelerator in dict.fromkeys(point.accelerator for point in points):
        members = [point for point in points if point.accelerator == accelerator]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": accelerator,
                "x": [horizontal.value(point) for point in members],
                "y": [vertical.value(point) for point in members],
                "text": [_hover(point) for point in members],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {
                    "symbol": markers[accelerator][1],
                    "size": [12 if point in front else 10 for point in members],
                    "color": [colours[point.format] for point in members],
                    "line": {
                        "color": [figures.INK if point in front else "#ffffff" for point in members],
                        "width": [1.6 if point in front else 0.8 for point in members],
                    },
                },
            }
        )

    def axis(quantity: figures.Axis) -> dict[str, Any]:
        values = [value for point in points if (value := quantity.value(point)) is not None]
        logarithmic = figures.is_logarithmic(values) and not quantity.reversed
        layout: dict[str, Any] = {
            "title": {"text": quantity.title},
            "type": "log" if logarithmic else "linear",
            "gridcolor": figures.GRID,
            "zeroline": False,
        }
        if logarithmic:
            layout["dtick"] = "D2"
        if values:
            limits = figures.axis_range(values, logarithmic=logarithmic)
            layout["range"] = limits[::-1] if quantity.reversed else limits
        return layout

    return {
        "traces": traces,
        "layout": {
            "xaxis": axis(horizontal),
            "yaxis": axis(vertical),
            "height": 420,
            "margin": {"l": 64, "r": 16, "t": 12, "b": 52},
            "legend": {"orientation": "h", "y": -0.22, "yanchor": "top"},
            "hovermode": "closest",
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "font": _FONT,
        },
    }


def _energy_bars(points: list[Point]) -> dict[str, Any]:
    """Energy by part, the least energy on top; points whose energy is not known have no bar."""
    known = [point for point in points if point.energy_uj is not None]
    ordered = sorted(known, key=lambda point: -(point.energy_uj or 0.0))
    names = [f"{_escape(point.format)} · {_escape(point.accelerator)}" for point in ordered]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": PART_NAMES[part][0],
            "y": names,
            "x": [point.energy_split_uj[part] for point in ordered],
            "text": [f"{number(point.energy_split_uj[part])} of {number(point.energy_uj)} µJ" for point in ordered],
            "textposition": "none",
            "hovertemplate": "%{y}<br>%{fullData.name}: %{text}<extra></extra>",
            "marker": {"color": PART_NAMES[part][1]},
        }
        for part in ENERGY_PARTS
    ]
    return {
        "traces": traces,
        "layout": {
            "barmode": "stack",
            "xaxis": {"title": {"text": "energy (µJ)"}, "gridcolor": figures.GRID},
            "yaxis": {"automargin": True, "ticksuffix": "  "},
            "height": 110 + 22 * len(ordered),
            "margin": {"l": 16, "r": 16, "t": 12, "b": 52},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "font": _FONT,
        },
    }
