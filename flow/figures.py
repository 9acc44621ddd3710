"""The Pareto figure of a run as PNG and SVG, and the looks that it shares with the interactive page.

The colour of a point is its format (one hue per family, lighter with fewer bits), its marker is the accelerator. For
equal results the SVG is equal byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from termwise.algorithms.files import written_beside
from termwise.algorithms.formats import Family, get_format
from termwise.flow.results import Point, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from termwise.flow.quality import LayerQuality

INK: Final = "#1d2733"
MUTED: Final = "#5d6b7a"
GRID: Final = "#e4e8ed"

STYLE: Final[Any] = {
    "font.family": ["DejaVu Sans"],
    "svg.hashsalt": "termwise",
    "svg.fonttype": "path",
    "axes.unicode_minus": True,
}
"""Matplotlib's settings for every figure."""

_FAMILY_COLOURS: Final[Mapping[Family, str]] = {
    "fp16": "#2b2f36",
    "int-asym": "#0a7f83",
    "int": "#1e5bb0",
    "bitmod": "#c9381f",
    "olive": "#5c8a1c",
    "ant": "#8a4fc4",
    "gobo": "#c2418c",
    "type": "#b0741a",
}

MARKERS: Final[Sequence[tuple[str, str, str]]] = (
    ("o", "circle", "●"),
    ("s", "square", "■"),
    ("^", "triangle-up", "▲"),
    ("D", "diamond", "◆"),
    ("v", "triangle-down", "▼"),
    ("P", "cross", "✚"),
    ("*", "star", "★"),
    ("X", "x", "✖"),
    ("p", "pentagon", "⬟"),
    ("h", "hexagon", "⬢"),
)
"""Marker of an accelerator: Matplotlib's name, Plotly's name, the character."""

LOG_FROM_RATIO: Final = 6.0
"""An axis is logarithmic when its largest value is at least this many times its least."""


def _lighter(colour: str, share: float) -> str:
    """``colour`` mixed with ``share`` (0 .. 1) of white."""
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * share):02x}" for channel in channels)


def _family_and_bits(name: str) -> tuple[Family, int]:
    """Family of a format and its bits, for the colour; a single data type belongs to the family of all such."""
    format = get_format(name)
    return format.family, format.weight_bits


def format_colours(formats: Sequence[str]) -> dict[str, str]:
    """Colour of every format: a hue per family, the more bits the darker."""
    families: dict[Family, list[str]] = {}
    for name in formats:
        families.setdefault(_family_and_bits(name)[0], []).append(name)
    colours = {}
    for family, members in families.items():
        base = _FAMILY_COLOURS[family]
        ordered = sorted(members, key=lambda name: -_family_and_bits(name)[1])
        for place, name in enumerate(ordered):
            colours[name] = _lighter(base, 0.62 * place / max(len(ordered) - 1, 2))
    return colours


def accelerator_markers(accelerators: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Marker of every accelerator (they repeat after the tenth)."""
    return {name: MARKERS[place % len(MARKERS)] for place, name in enumerate(accelerators)}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One quantity of a figure.

    Attributes:
        key: attribute of a point.
        title: with the unit.
        front: attribute of a point that marks the front of accuracy against this quantity.
        reversed: whether greater values are better, so that the axis runs downwards.
    """

    key: str
    title: str
    front: str = ""
    reversed: bool = False

    def value(self, point: Point) -> float | None:
        """The point's value of this quantity."""
        value: float | None = getattr(point, self.key)
        return value


LATENCY: Final = Axis(key="latency_ms", title="latency (ms)", front="pareto_latency")
ENERGY: Final = Axis(key="energy_uj", title="energy (µJ)", front="pareto_energy")
PERPLEXITY: Final = Axis(key="perplexity", title="perplexity per token (lower is better)")
WEIGHT_ERROR: Final = Axis(key="sqnr_db", title="weight SQNR (dB, higher is better)", reversed=True)


def accuracy_axis(results: Results, model: str) -> Axis:
    """The vertical axis for a model's points; energy where there is no measure of accuracy at all."""
    measure = results.accuracy_measure(model)
    return {"perplexity": PERPLEXITY, "sqnr_db": WEIGHT_ERROR, None: ENERGY}[measure]


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether the values span so wide a range that a logarithmic axis is needed."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_FROM_RATIO


def with_value(points: Sequence[Point], axis: Axis) -> list[Point]:
    """The points that have a value of this quantity: an energy that is not known is drawn nowhere."""
    return [point for point in points if axis.value(point) is not None]


def drawn_points(results: Results, model: str, phase: str) -> list[Point]:
    """The points of a panel that have a value on its vertical axis."""
    of_panel = [point for point in results.points if (point.model, point.phase) == (model, phase)]
    return with_value(of_panel, accuracy_axis(results, model))


def front_line(points: Sequence[Point], horizontal: Axis, vertical: Axis) -> list[Point]:
    """The points on the front of the two quantities, from left to right."""
    members = [point for point in points if getattr(point, horizontal.front)]
    return sorted(members, key=lambda point: (horizontal.value(point) or 0.0, vertical.value(point) or 0.0))


def _leader_boxes(
    point: Sequence[float], box: tuple[float, float, float, float]
) -> list[tuple[float, float, float, float]]:
    """Small boxes (left, bottom, right, top, in pixels) along the line from a point to its label."""
    x, y = point
    end = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    steps = max(2, int(math.hypot(end[0] - x, end[1] - y) / 6))
    places = [(x + (end[0] - x) * step / steps, y + (end[1] - y) * step / steps) for step in range(steps)]
    return [(left - 1, bottom - 1, left + 1, bottom + 1) for left, bottom in places]


def _overlap(box: tuple[float, float, float, float], others: Sequence[tuple[float, float, float, float]]) -> float:
    """Area that a box shares with others, in square pixels."""
    return sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in others
    )


def _meetings(
    boxes: Sequence[tuple[float, float, float, float]], others: Sequence[tuple[float, float, float, float]]
) -> int:
    """How many pairs of a box and another (left, bottom, right, top) overlap."""
    return sum(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for box in boxes
        for other in others
    )


def _place_labels(
    figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str, str]], obstacles: Any, front: Any
) -> None:
    """Write each label (x, y, text, colour) beside its point, where it covers the least of everything else.

    ``obstacles`` are the points, ``front`` the corners of the front: [points, 2] and [members, 2], in pixels.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # the Agg canvas has one
    frame = axes.get_window_extent(renderer)
    pixels_per_point = figure.dpi / 72
    marker = 5.5 * pixels_per_point
    markers: list[tuple[float, float, float, float]] = [
        (x - marker, y - marker, x + marker, y + marker) for x, y in obstacles
    ]
    lines: list[tuple[float, float, float, float]] = []
    for (x_from, y_from), (x_to, y_to) in pairwise(front):  # the steps of the front: across, then down
        for start, end in (((x_from, y_from), (x_to, y_from)), ((x_to, y_from), (x_to, y_to))):
            lines += _leader_boxes(start, (*end, *end))
    directions = [
        (dx * reach, dy * reach)
        for reach in (1.0, 1.8, 2.8, 4.0, 5.5, 7.5)
        for dx, dy in (
            *((1, 1), (1, 0), (-1, 1), (0, 1.2), (1, -1), (-1, -1), (-1, 0), (0, -1.2)),
            *((1, 1.7), (1, -1.7), (2, 1), (2, -1), (-1, 1.7), (-1, -1.7)),
        )
    ]
    labelled: list[tuple[float, float, float, float]] = []
    for x, y, text, colour in labels:
        best_leader: list[tuple[float, float, float, float]] = []
        best: tuple[float, Any, tuple[float, float, float, float]] | None = None
        for rank, (dx, dy) in enumerate(directions):
            # The leader begins at the corner of the label that is nearest to the point.
            near = ((1 - (dx > 0) + (dx < 0)) / 2, (1 - (dy > 0) + (dy < 0)) / 2)
            note = axes.annotate(
                text,
                (x, y),
                xytext=(7 * dx, 7 * dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                fontsize=7.5,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": near}
                if max(abs(dx), abs(dy)) > 1.5
                else None,
                zorder=5,
                path_effects=[withStroke(linewidth=2.2, foreground="white")],
            )
            box = note.get_window_extent(renderer)
            # The extent of an annotation covers its arrow; the text alone is what must not be covered.
            text_box = Text.get_window_extent(note, renderer) if note.arrow_patch else box
            left, bottom, right, top = text_box.x0 - 2, text_box.y0 - 1, text_box.x1 + 2, text_box.y1 + 1
            covered = 3 * _overlap((left, bottom, right, top), markers)
            covered += 20 * _overlap((left, bottom, right, top), labelled)
            leader = _leader_boxes(axes.transData.transform((x, y)).tolist(), (left, bottom, right, top))
            # A leader must not run through a label, nor a label lie on a leader or on the front.
            covered += 60 * _meetings([(left, bottom, right, top)], lines) + 400 * _meetings(leader[1:], labelled)
            outside = max(0.0, frame.x0 - left) + max(0.0, right - frame.x1)
            outside += max(0.0, frame.y0 - bottom) + max(0.0, top - frame.y1)
            cost = covered + 200 * outside + 6 * rank
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, note, (left, bottom, right, top))
                best_leader = leader
            else:
                note.remove()
            if covered == 0 and outside == 0:
                break
        if best is not None:
            lines += best_leader
            labelled.append(best[2])


def _draw_panel(
    axes: Axes,
    points: Sequence[Point],
    horizontal: Axis,
    vertical: Axis,
    colours: Mapping[str, str],
    markers: Mapping[str, tuple[str, str, str]],
) -> None:
    """Points, front and scales of one panel (labels come last, when the layout is final)."""
    front = front_line(points, horizontal, vertical)
    axes.set_axisbelow(True)
    axes.grid(visible=True, which="major", color=GRID, linewidth=0.8)
    axes.tick_params(colors=MUTED, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    if is_logarithmic([horizontal.value(point) or 0.0 for point in points]):
        axes.set_xscale("log")
    if is_logarithmic([vertical.value(point) or 0.0 for point in points]) and not vertical.reversed:
        axes.set_yscale("log")
    if front:
        axes.step(
            [horizontal.value(point) or 0.0 for point in front],
            [vertical.value(point) or 0.0 for point in front],
            where="post",
            color=INK,
            linewidth=1.1,
            alpha=0.65,
            zorder=2,
        )
    for point in points:
        member = point in front
        axes.plot(
            [horizontal.value(point) or 0.0],
            [vertical.value(point) or 0.0],
            marker=markers[point.accelerator][0],
            markersize=7.5 if member else 6.5,
            markerfacecolor=colours[point.format],
            markeredgecolor=INK if member else "white",
            markeredgewidth=1.1 if member else 0.6,
            alpha=1.0 if member else 0.75,
            linestyle="none",
            zorder=4 if member else 3,
        )
    axes.margins(x=0.12, y=0.2)
    if vertical.reversed:
        axes.invert_yaxis()


def _legend(figure: Figure, colours: Mapping[str, str], markers: Mapping[str, tuple[str, str, str]]) -> None:
    """One legend for all panels, right of them: formats by colour, accelerators by marker, the front."""
    from matplotlib.lines import Line2D

    def heading(text: str) -> Line2D:
        return Line2D([], [], linestyle="none", label=rf"$\bf{{{text}}}$")

    entries = [heading("format")]
    entries += [
        Line2D([], [], linestyle="none", marker="o", markersize=7, color=colour, label=name)
        for name, colour in colours.items()
    ]
    entries += [Line2D([], [], linestyle="none", label=" "), heading("accelerator")]
    entries += [
        Line2D([], [], linestyle="none", marker=marker[0], markersize=7, color=MUTED, label=name)
        for name, marker in markers.items()
    ]
    entries += [
        Line2D([], [], linestyle="none", label=" "),
        Line2D([], [], color=INK, alpha=0.65, linewidth=1.1, label="Pareto front"),
    ]
    figure.legend(
        handles=entries,
        loc="outside right upper",
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.4,
        borderaxespad=0.4,
    )


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Write ``figure`` to ``folder`` as ``stem``.png and ``stem``.svg; equal figures in ``STYLE`` give equal files.

    Raises ``InputError`` where the folder cannot be written.
    """
    written = []
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        content = BytesIO()
        figure.savefig(content, format=suffix, metadata=metadata)
        path = folder / f"{stem}.{suffix}"
        with written_beside(path) as temporary:
            temporary.write_bytes(content.getvalue())
        written.append(path)
    return written


def draw(results: Results, folder: Path) -> list[Path]:
    """Write ``pareto.png`` and ``pareto.svg`` to ``folder``; nothing where no point can be drawn.

    One row of panels per model and phase: accuracy against latency, accuracy against energy.
    Raises ``InputError`` where the folder cannot be written.
    """
    panels = [(model, phase) for model, phase in results.panels() if drawn_points(results, model, phase)]
    if not panels:
        return []
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [point for model, phase in panels for point in drawn_points(results, model, phase)]
    colours = format_colours(list(dict.fromkeys(point.format for point in shown)))
    markers = accelerator_markers(list(dict.fromkeys(point.accelerator for point in shown)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 0.5 + 4.6 * len(panels)), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(panels), 2, squeeze=False)
        for row, (model, phase) in zip(grid, panels, strict=True):
            points = drawn_points(results, model, phase)
            vertical = accuracy_axis(results, model)
            for axes, horizontal in zip(row, (LATENCY, ENERGY), strict=True):
                _draw_panel(axes, with_value(points, horizontal), horizontal, vertical, colours, markers)
                axes.set_title(f"{model} · {phase}", loc="left", fontsize=10, color=INK, fontweight="bold")
                axes.set_xlabel(horizontal.title, fontsize=9, color=INK)
                axes.set_ylabel(vertical.title, fontsize=9, color=INK)
        _legend(figure, colours, markers)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for row, (model, phase) in zip(grid, panels, strict=True):
            points = drawn_points(results, model, phase)
            vertical = accuracy_axis(results, model)
            for axes, horizontal in zip(row, (LATENCY, ENERGY), strict=True):
                places = [
                    (horizontal.value(point) or 0.0, vertical.value(point) or 0.0)
                    for point in with_value(points, horizontal)
                ]
                labels = [
                    (
                        horizontal.value(point) or 0.0,
                        vertical.value(point) or 0.0,
                        f"{point.format} · {point.accelerator}",
                        INK,
                    )
                    for point in front_line(points, horizontal, vertical)
                ]
                corners = [(x, y) for x, y, _, _ in labels]
                _place_labels(
                    figure,
                    axes,
                    labels,
                    axes.transData.transform(places),
                    axes.transData.transform(corners).tolist() if corners else [],
                )
        return save(figure, folder, "pareto")


LAYERS_NAMED: Final = 80
"""A figure of more layers than this numbers them."""

_SHARE_COLOURS: Final = ("#1e5bb0", "#c9381f", "#5c8a1c", "#b0741a", "#8a4fc4", "#0a7f83", "#c2418c", "#7d8894")


def draw_layers(title: str, layers: Sequence[LayerQuality], folder: Path) -> list[Path]:
    """``layers.png`` and ``layers.svg`` in ``folder``: error of every layer, and what the format chose in it.

    The first panel has the signal to quantization noise of the weights and, where it was measured, of the output, in
    decibels; the second, where there is something to show, the shares of ``LayerQuality.histogram``.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(label for layer in layers for label in layer.histogram))
    panels = 2 if labels else 1
    places = range(len(layers))
    named = len(layers) <= LAYERS_NAMED
    with matplotlib.rc_context({**STYLE, "font.size": 8}):
        size = (2.2 + min(0.17 * len(layers), 14.0), 3.0 * panels + (1.6 if named else 0.4))
        figure = Figure(figsize=(max(size[0], 6.0), size[1]), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0]
        errors = grid[0]
        weights = [math.nan if layer.sqnr_db is None else layer.sqnr_db for layer in layers]
        errors.plot(places, weights, "o", markersize=4, color=_SHARE_COLOURS[0], label="weights")
        if any(layer.output_error for layer in layers):
            outputs = [-10 * math.log10(layer.output_error) if layer.output_error else math.nan for layer in layers]
            errors.plot(places, outputs, "D", markersize=3.5, color=_SHARE_COLOURS[1], label="output")
        errors.set_ylabel("signal to quantization noise (dB)", color=INK)
        errors.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        errors.legend(frameon=False, loc="best")
        if labels:
            bottom = [0.0] * len(layers)
            for place, label in enumerate(labels):
                shares = [100 * layer.histogram.get(label, 0.0) for layer in layers]
                colour = _SHARE_COLOURS[place % len(_SHARE_COLOURS)]
                grid[1].bar(places, shares, 0.8, bottom=bottom, color=colour, label=label)
                bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
            grid[1].set_ylabel("share (%)", color=INK)
            grid[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        for axes in grid:
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        if named:
            grid[-1].set_xticks(places, [layer.name for layer in layers], rotation=90, fontsize=6)
        else:
            grid[-1].set_xlabel("layer, in the order of execution", color=INK)
        return save(figure, folder, "layers")


SHOWN_RATIO: Final = 2.0
"""A perplexity above so many times the original one is drawn at the edge."""


def draw_accuracy(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """``accuracy.png`` and ``accuracy.svg`` in ``folder``: score against bits per weight, a panel per method.

    ``document`` is that of ``accuracy.document_of``. The colour is the family of the format, the marker the method.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = [entry for entry in document["results"] if entry["table"] == "weights" and entry["score"] is not None]
    methods = list(dict.fromkeys(entry["method"] for entry in entries)) or ["none"]
    original = document["original_score"]
    cosine = "cosine" in document["score"]
    worst = 0.6 * original if cosine else SHOWN_RATIO * original
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(methods) + 1.6, 4.4), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, len(methods), squeeze=False, sharex=True, sharey=True)[0]
        families: dict[Family, None] = {}
        for axes, method in zip(grid, methods, strict=True):
            for entry in entries:
                if entry["method"] == method and entry["format"] != "fp16":
                    family = get_format(entry["format"]).family
                    families[family] = None
                    beyond = entry["score"] < worst if cosine else entry["score"] > worst
                    marker, height = (("v" if cosine else "^"), worst) if beyond else ("o", entry["score"])
                    colour = _FAMILY_COLOURS[family]
                    axes.plot(entry["bits"], height, marker, markersize=4, alpha=0.8, color=colour, clip_on=False)
            axes.axhline(original, color=MUTED, linewidth=0.8, linestyle="--")
            title = "round to nearest" if method == "none" else method
            axes.set_title(f"{document['model']} · {title}", loc="left", fontsize=10, color=INK, fontweight="bold")
            axes.set_xlabel("bits per weight", fontsize=9, color=INK)
            axes.grid(color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim((worst, 1.0) if cosine else (0.97 * original, worst))
        grid[0].set_ylabel(f"{document['score']} (triangles: beyond)", fontsize=9, color=INK)
        for family in families:
            grid[-1].plot(
                [], [], "o", color=_FAMILY_COLOURS[family], label="single type" if family == "type" else family
            )
        grid[-1].plot([], [], "--", color=MUTED, linewidth=0.8, label="original weights")
        grid[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        return save(figure, folder, "accuracy")


def axis_range(values: Sequence[float], *, logarithmic: bool) -> list[float]:
    """Range of an axis with room at both ends (as Plotly takes it: exponents of ten on a logarithmic axis)."""
    scaled = [math.log10(value) for value in values] if logarithmic else list(values)
    low, high = min(scaled), max(scaled)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - room, high + room]
