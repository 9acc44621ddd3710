"""Reports of a run: ``report.md``, ``pareto.png``, ``pareto.svg`` and ``index.html``, from its records alone.

The page is one file: script, figures and data are inside, and it loads nothing from anywhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from termwise.algorithms.files import write_text
from termwise.flow import figures
from termwise.flow.console import number
from termwise.flow.figures import ENERGY, INK, LATENCY, MUTED, Axis
from termwise.flow.records import digest_of, source_digest, strict
from termwise.flow.results import CYCLE_CAUSES, ENERGY_PARTS, Point, Results, Unavailable, collect, read_run

NOT_MODELLED: Final = (
    "Softmax, norms, rotary embedding, activation functions, residual additions, and the unit that computes them.",
    "Leakage, the network on the chip, and the pages, banks and refresh of external memory.",
    "Conflicts between buffer banks, prefetching across products, and a causal mask (masked scores are computed).",
    "The time to quantize keys and values, and their scales.",
    "The accuracy of 8-bit keys and values: perplexities keep keys, values and activations in floating point.",
    "Quantized embeddings, biases and norms: only linear layers are quantized, and bits per weight count only these.",
)
"""What the numbers leave out; ``docs/simulator.md`` has the reasons."""

MEASURES: Final[Mapping[str | None, str]] = {
    "perplexity": "Accuracy is perplexity per token on the text below, after weight-only quantization.",
    "sqnr_db": (
        "No perplexity could be measured, so accuracy is the signal to quantization noise ratio (SQNR) of all "
        "weights; an exact format has none and is not drawn, though it counts as best on the front."
    ),
    None: "There are no weights, so the front weighs latency against energy only.",
}

COLUMNS: Final[Sequence[tuple[str, str, bool]]] = (
    ("model", "model", True),
    ("phase", "phase", True),
    ("format", "format", True),
    ("accelerator", "accelerator", True),
    ("perplexity", "perplexity", False),
    ("sqnr_db", "SQNR (dB)", False),
    ("bits_per_weight", "bits/weight", False),
    ("latency_cycles", "cycles", False),
    ("latency_ms", "latency (ms)", False),
    ("energy_uj", "energy (µJ)", False),
    ("front", "front", True),
)
"""Columns of the table of points: key, heading, whether it holds names."""

_PART_NAMES: Final = {"pe_energy_uj": "PEs", "sram_energy_uj": "buffers", "dram_energy_uj": "external memory"}
_PART_COLOURS: Final = {"pe_energy_uj": "#c9381f", "sram_energy_uj": "#e0a63a", "dram_energy_uj": "#1e5bb0"}
_CAUSE_NAMES: Final = {
    "compute_cycles": "compute",
    "weight_stall_cycles": "waiting for weights",
    "activation_stall_cycles": "waiting for activations",
    "drain_stall_cycles": "fill, drain, write-back",
}
_CAUSE_COLOURS: Final = {
    "compute_cycles": "#2f7d5b",
    "weight_stall_cycles": "#1e5bb0",
    "activation_stall_cycles": "#8a4fc4",
    "drain_stall_cycles": "#9aa5b1",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where the parts of a report are; ``figures`` is empty where no point can be drawn."""

    markdown: Path
    page: Path
    figures: tuple[Path, ...]


def front_marks(point: Point) -> str:
    """On which fronts a point is: all three objectives, accuracy with latency, accuracy with energy."""
    marks = [
        name
        for name, member in (("latency", point.pareto_latency), ("energy", point.pareto_energy))
        if member
    ]
    if marks:
        return " + ".join(marks)
    return "joint" if point.pareto else ""


def row(point: Point) -> list[str]:
    """A point as the cells of ``COLUMNS``."""
    return [
        point.model,
        point.phase,
        point.format,
        point.accelerator,
        number(point.perplexity, 5),
        number(point.sqnr_db),
        number(point.bits_per_weight),
        number(point.latency_cycles),
        number(point.latency_ms),
        number(point.energy_uj),
        front_marks(point),
    ]


def _sort_key(point: Point, column: str) -> float | str | None:
    """What the page sorts a cell by."""
    if column == "front":
        return -(4 * point.pareto + 2 * point.pareto_latency + point.pareto_energy)
    value: float | str | None = getattr(point, column)
    return value


def _grouped(entries: Sequence[Unavailable]) -> list[dict[str, str]]:
    """Combinations without a result, those of one reason and pair in one line with their phases."""
    phases: dict[tuple[str, str, str, str], list[str]] = {}
    for entry in entries:
        phases.setdefault((entry.model, entry.format, entry.accelerator, entry.reason), []).append(entry.phase)
    return [
        {"model": model, "format": format, "accelerator": accelerator, "phases": ", ".join(found), "reason": reason}
        for (model, format, accelerator, reason), found in phases.items()
    ]


def _best(results: Results) -> list[str]:
    """The findings in words: for each model and phase, the fastest and the thriftiest point on the joint front."""
    sentences = []
    for model, phase in results.panels():
        members = [
            point for point in results.points if (point.model, point.phase) == (model, phase) and point.pareto
        ]
        if not members:
            continue
        fastest = min(members, key=lambda point: point.latency_ms)
        thriftiest = min(members, key=lambda point: point.energy_uj)
        accuracy = ""
        if fastest.perplexity is not None:
            accuracy = f" at perplexity {number(fastest.perplexity, 5)}"
        sentence = (
            f"{model}, {phase}: {len(members)} designs on the front; fastest {fastest.format} on "
            f"{fastest.accelerator} with {number(fastest.latency_ms)} ms{accuracy}"
        )
        if thriftiest != fastest:
            sentence += (
                f"; least energy {thriftiest.format} on {thriftiest.accelerator} with "
                f"{number(thriftiest.energy_uj)} µJ"
            )
        sentences.append(f"{sentence}.")
    return sentences


def content(results: Results) -> dict[str, Any]:
    """What both report.md and the page say, as the templates take it."""
    measures = dict.fromkeys(results.accuracy_measure(model) for model, _ in results.panels())
    notes: dict[str, list[str]] = {}
    for point in results.points:
        for note in point.notes:
            notes.setdefault(note, []).append(f"{point.accelerator} {point.phase}")
    reasons = {
        f"{point.model}: {point.perplexity_reason}" for point in results.points if point.perplexity_reason is not None
    }
    return {
        "run": results.run,
        "specification": results.run.specification,
        "question": results.run.specification["question"],
        "headings": [heading for _, heading, _ in COLUMNS],
        "left": [left for _, _, left in COLUMNS],
        "rows": [
            {
                "cells": row(point),
                "keys": [_sort_key(point, key) for key, _, _ in COLUMNS],
                "pareto": point.pareto,
            }
            for point in results.points
        ],
        "findings": _best(results),
        "measures": [MEASURES[measure] for measure in measures],
        "no_perplexity": sorted(reasons),
        "skipped": _grouped(results.skipped),
        "failed": _grouped(results.failed),
        "missing": _grouped(results.missing),
        "notes": [(note, ", ".join(dict.fromkeys(where))) for note, where in notes.items()],
        "not_modelled": NOT_MODELLED,
        "versions": results.versions,
        "points": len(results.points),
    }


def _hover(point: Point) -> str:
    """What the page shows of a point under the pointer (Plotly reads a subset of HTML)."""
    lines = [
        f"<b>{html.escape(point.format)}</b> on <b>{html.escape(point.accelerator)}</b>",
        f"perplexity {number(point.perplexity, 5)} · SQNR {number(point.sqnr_db)} dB",
        f"{number(point.bits_per_weight)} bits per weight",
        f"{number(point.latency_cycles)} cycles = {number(point.latency_ms)} ms",
        f"{number(point.energy_uj)} µJ: "
        + ", ".join(f"{_PART_NAMES[part]} {number(point.energy_split_uj[part])}" for part in ENERGY_PARTS),
        f"{number(point.traffic_bytes)} bytes to and from external memory",
    ]
    return "<br>".join(lines)


def _axis(axis: Axis, points: Sequence[Point], **more: Any) -> dict[str, Any]:
    """A Plotly axis for a quantity."""
    values = [value for point in points if (value := axis.value(point)) is not None]
    logarithmic = figures.is_logarithmic(values) and not axis.reversed
    limits = figures.axis_range(values, logarithmic=logarithmic)
    return {
        "title": {"text": axis.title, "font": {"size": 13}},
        "type": "log" if logarithmic else "linear",
        "range": limits[::-1] if axis.reversed else limits,
        "gridcolor": figures.GRID,
        "zeroline": False,
        "linecolor": MUTED,
        "dtick": None,
        "minexponent": 6,
        **more,
    }


_LAYOUT: Final[Mapping[str, Any]] = {
    "font": {"family": "system-ui, 'Segoe UI', 'Helvetica Neue', sans-serif", "size": 12, "color": INK},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "hoverlabel": {"align": "left", "bgcolor": "white", "bordercolor": MUTED, "font": {"color": INK}},
}


def _front_figure(results: Results, model: str, phase: str) -> dict[str, Any]:
    """The interactive panels of one model and phase: accuracy against latency, and against energy."""
    points = figures.drawn_points(results, model, phase)
    every = [point for pair in results.panels() for point in figures.drawn_points(results, *pair)]
    colours = figures.format_colours(list(dict.fromkeys(point.format for point in every)))
    markers = figures.accelerator_markers(list(dict.fromkeys(point.accelerator for point in every)))
    vertical = figures.accuracy_axis(results, model)
    traces: list[dict[str, Any]] = []
    for suffix, horizontal in (("", LATENCY), ("2", ENERGY)):
        place = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        front = figures.front_line(points, horizontal, vertical)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [horizontal.value(point) for point in front],
                "y": [vertical.value(point) for point in front],
                "line": {"shape": "hv", "color": INK, "width": 1.3},
                "opacity": 0.6,
                "name": "Pareto front",
                "legendgroup": "front",
                "showlegend": not suffix,
                "hoverinfo": "skip",
                **place,
            }
        )
        for format in dict.fromkeys(point.format for point in points):
            members = [point for point in points if point.format == format]
            on_front = [bool(getattr(point, horizontal.front)) for point in members]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [horizontal.value(point) for point in members],
                    "y": [vertical.value(point) for point in members],
                    "marker": {
                        "color": colours[format],
                        "symbol": [markers[point.accelerator][1] for point in members],
                        "size": [12 if member else 10 for member in on_front],
                        "line": {
                            "color": [INK if member else "white" for member in on_front],
                            "width": [1.6 if member else 0.8 for member in on_front],
                        },
                    },
                    "text": [_hover(point) for point in members],
                    "hovertemplate": "%{text}<extra></extra>",
                    "name": html.escape(format),
                    "legendgroup": format,
                    "showlegend": not suffix,
                    **place,
                }
            )
    for accelerator in dict.fromkeys(point.accelerator for point in points):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [None],
                "y": [None],
                "marker": {"color": MUTED, "symbol": markers[accelerator][1], "size": 10},
                "name": html.escape(accelerator),
                "legend": "legend2",
                "hoverinfo": "skip",
            }
        )
    layout = {
        **_LAYOUT,
        "xaxis": _axis(LATENCY, points, domain=[0, 0.46]),
        "xaxis2": _axis(ENERGY, points, domain=[0.54, 1], anchor="y2"),
        "yaxis": _axis(vertical, points),
        "yaxis2": _axis(vertical, points, anchor="x2", matches="y", title={"text": ""}),
        "legend": {"title": {"text": "format"}, "orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"},
        "legend2": {
            "title": {"text": "accelerator (marker)"},
            "x": 1.02,
            "y": 0,
            "yanchor": "bottom",
            "itemclick": False,
            "itemdoubleclick": False,
        },
        "margin": {"l": 64, "r": 16, "t": 12, "b": 52},
        "height": 470,
    }
    return {"data": traces, "layout": layout}


def _bar_figure(
    points: Sequence[Point],
    names: Mapping[str, str],
    colours: Mapping[str, str],
    values: Callable[[Point], Mapping[str, float]],
    title: str,
) -> dict[str, Any]:
    """Stacked bars, one per point, the least total on top."""
    ordered = sorted(points, key=lambda point: -sum(values(point).values()))
    labels = [f"{html.escape(point.format)} · {html.escape(point.accelerator)}" for point in ordered]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "y": labels,
            "x": [values(point)[key] for point in ordered],
            "name": name,
            "marker": {"color": colours[key]},
            "hovertemplate": f"{name}: %{{x:,.4~r}}<extra>%{{y}}</extra>",
        }
        for key, name in names.items()
    ]
    layout = {
        **_LAYOUT,
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": {"title": {"text": title, "font": {"size": 13}}, "gridcolor": figures.GRID, "zeroline": False},
        "yaxis": {"automargin": True, "ticks": "", "type": "category"},
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "traceorder": "normal"},
        "margin": {"l": 16, "r": 16, "t": 34, "b": 48},
        "height": 110 + 24 * len(ordered),
    }
    return {"data": traces, "layout": layout}


def _page_figures(results: Results) -> list[dict[str, Any]]:
    """All interactive figures of the page, by model and phase."""
    entries = []
    for place, (model, phase) in enumerate(results.panels()):
        points = [point for point in results.points if (point.model, point.phase) == (model, phase)]
        drawn = figures.drawn_points(results, model, phase)
        entries.append(
            {
                "title": f"{model} · {phase}",
                "front_id": f"front-{place}",
                "front": _front_figure(results, model, phase) if drawn else None,
                "energy_id": f"energy-{place}",
                "energy": _bar_figure(
                    points, _PART_NAMES, _PART_COLOURS, lambda point: point.energy_split_uj, "energy (µJ)"
                ),
                "cycles_id": f"cycles-{place}",
                "cycles": _bar_figure(
                    points, _CAUSE_NAMES, _CAUSE_COLOURS, lambda point: point.cycles_by_cause, "cycles"
                ),
            }
        )
    return strict(entries)  # type: ignore[no-any-return]


def _results_digest(results: Results) -> str:
    """Names what a report shows, and the code that draws it."""
    return digest_of({"results": asdict(results), "source": source_digest("termwise.flow"), "templates": _templates()})


def _templates() -> dict[str, str]:
    """The content of the templates."""
    folder = Path(__file__).parent / "templates"
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()) if path.is_file()}


def _existing(folder: Path, digest: str) -> Report | None:
    """The report in ``folder`` if it is complete and shows exactly these results."""
    page, markdown = folder / "index.html", folder / "report.md"
    try:
        with page.open(encoding="utf-8") as stream:
            beginning = stream.read(2000)
    except OSError:
        return None
    found = re.search(r'<meta name="termwise-digest" content="(\w+)">', beginning)
    drawn = tuple(folder / name for name in ("pareto.png", "pareto.svg"))
    if found is None or found[1] != digest or not all(path.is_file() for path in (markdown, *drawn)):
        return None
    return Report(markdown=markdown, page=page, figures=drawn)


def write_report(results: Results, folder: Path) -> Report:
    """Write the whole report to ``folder``; one that shows exactly these results already is left as it is.

    Raises ``InputError`` where the folder cannot be written.
    """
    digest = _results_digest(results)
    existing = _existing(folder, digest)
    if existing is not None:
        return existing
    import jinja2
    from plotly.offline import get_plotlyjs

    drawn = tuple(figures.draw(results, folder))
    if not drawn:
        for name in ("pareto.png", "pareto.svg"):
            (folder / name).unlink(missing_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(_templates()),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    said = content(results)
    write_text(folder / "report.md", environment.get_template("report.md").render(**said, drawn=bool(drawn)))
    page = environment.get_template("index.html").render(
        **said, digest=digest, figures=_page_figures(results), plotly=get_plotlyjs(), causes=CYCLE_CAUSES
    )
    write_text(folder / "index.html", page)
    return Report(markdown=folder / "report.md", page=folder / "index.html", figures=drawn)


def rebuild(folder: Path, warn: Callable[[str], None]) -> tuple[Results, Report]:
    """Collect the results of the run in ``folder`` again and write its report.

    Raises ``InputError`` where ``folder`` is no run, or cannot be written.
    """
    results = collect(folder, read_run(folder), warn)
    return results, write_report(results, folder)
