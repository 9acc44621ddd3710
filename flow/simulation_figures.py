"""The figures of one simulation: where cycles and energy go by layer kind, and the roofline, as PNG and SVG.

Causes of stalls and parts of the energy are taken as the simulation names them. For equal simulations the SVG is equal
byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from termwise.flow.figures import GRID, INK, MUTED, SHARE_COLOURS, STYLE, place_labels, save
from termwise.flow.layer_kinds import LayerKind, Roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES: Final = {
    "pe": "PEs",
    "sram_read": "buffer reads",
    "sram_write": "buffer writes",
    "leakage": "buffer leakage",
    "dram": "DRAM",
}

LABELS_TOGETHER: Final = 9.0
"""Points of a roofline that are nearer to each other than this (in pixels of 72 per inch) share a label."""


def part_title(name: str) -> str:
    """A cause of cycles, or a part of the energy, in words."""
    return _TITLES.get(name, name.replace("_", " "))


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each cause or part, by its place (they repeat after the eighth)."""
    return {name: SHARE_COLOURS[place % len(SHARE_COLOURS)] for place, name in enumerate(names)}


def present(maps: Iterable[Mapping[str, float | None]]) -> list[str]:
    """The names that have something to show in at least one of the maps, in their order."""
    found: dict[str, None] = {}
    for entry in maps:
        found |= {name: None for name, value in entry.items() if value}
    return list(found)


def energy_parts(kind: LayerKind) -> dict[str, float | None]:
    """The energy of a kind by part, without the total."""
    return {part: uj for part, uj in kind.totals.energy_uj.items() if part != "total"}


def _bars(axes: Axes, kinds: Sequence[LayerKind], maps: Sequence[Mapping[str, float | None]], *, scale: float) -> None:
    """A stacked bar per kind, the first kind on top; ``scale`` makes the unit of the axis from that of the values."""
    from matplotlib.ticker import EngFormatter

    names = present(maps)
    left = [0.0] * len(kinds)
    for name, colour in colours(names).items():
        widths = [scale * (entry.get(name) or 0.0) for entry in maps]
        axes.barh(range(len(kinds)), widths, 0.66, left=left, color=colour, label=part_title(name))
        left = [low + width for low, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(kinds)), [kind.name for kind in kinds])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(EngFormatter(places=None, sep=" "))
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    if names:
        axes.legend(
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            ncols=min(len(names), 7),
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            handlelength=0.9,
            columnspacing=1.0,
            borderaxespad=0.2,
        )


def draw_breakdown(title: str, kinds: Sequence[LayerKind], folder: Path) -> list[Path]:
    """``breakdown.png`` and ``breakdown.svg``: cycles by cause and energy by part, a bar per layer kind.

    Raises ``InputError`` where the folder cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    energies = [energy_parts(kind) for kind in kinds]
    unknown = [part for part in dict.fromkeys(part for entry in energies for part in entry) if _unknown(part, energies)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.4, 1.7 + 0.36 * len(kinds)), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        cycles, energy = figure.subplots(1, 2, sharey=True)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK, fontweight="bold")
        _bars(cycles, kinds, [kind.totals.causes for kind in kinds], scale=1.0)
        cycles.set_xlabel("cycles by cause", fontsize=9, color=INK)
        _bars(energy, kinds, energies, scale=1e-6)
        energy.tick_params(labelleft=False)
        # Both panels share their vertical axis, which each has turned over once.
        cycles.set_ylim(len(kinds) - 0.5, -0.5)
        missing = f" (not known: {', '.join(map(part_title, unknown))})" if unknown else ""
        energy.set_xlabel(f"energy by part (J){missing}", fontsize=9, color=INK)
        return save(figure, folder, "breakdown")


def _unknown(part: str, energies: Sequence[Mapping[str, float | None]]) -> bool:
    return any(part in entry and entry[part] is None for entry in energies)


def roofline_limits(found: Roofline) -> tuple[tuple[float, float], tuple[float, float]]:
    """Range of the intensity (MACs per byte) and of the speed (MACs per second): the points and all ridges, with room.

    There is more of it on the right, where the roofs are named.
    """
    per_second = found.clock_mhz * 1e6
    intensities = [point.multiplications_per_byte or 0.0 for point in found.points]
    intensities += [roof.multiplications_per_cycle / found.bytes_per_cycle for roof in found.roofs]
    speeds = [per_second * (point.multiplications_per_cycle or 0.0) for point in found.points]
    speeds += [per_second * roof.multiplications_per_cycle for roof in found.roofs]
    return (min(intensities) / 3, max(intensities) * 12), (min(speeds) / 3, max(speeds) * 3)


def roof_line(found: Roofline, peak: float, limits: tuple[float, float], points: int = 2) -> list[tuple[float, float]]:
    """The line under which points of ``peak`` MACs per cycle stay: the slope in ``points`` points, then the level.

    Coordinates are MACs per byte and MACs per second, from the lower to the upper limit of the first.
    """
    ridge = peak / found.bytes_per_cycle
    per_second = found.clock_mhz * 1e6
    ratio = max(ridge / limits[0], 1.0)
    slope = [limits[0] * ratio ** (step / (points - 1)) for step in range(points)]
    line = [(intensity, per_second * found.bytes_per_cycle * intensity) for intensity in slope]
    return [*line, (max(limits[1], ridge), per_second * peak)]


def draw_roofline(title: str, found: Roofline, folder: Path) -> list[Path]:
    """``roofline.png`` and ``roofline.svg``; nothing where no product moves anything.

    A point's area grows with its share of the cycles. Raises ``InputError`` where the folder cannot be written.
    """
    if not found.points:
        return []
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogFormatter

    horizontal, vertical = roofline_limits(found)
    per_second = found.clock_mhz * 1e6
    whole = sum(point.totals.cycles for point in found.points)
    colour_of = colours([point.name for point in found.points])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 5.6), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(*horizontal)
        axes.set_ylim(*vertical)
        axes.set_xlabel("arithmetic intensity (MACs per byte of external traffic)", fontsize=9, color=INK)
        axes.set_ylabel("MACs per second", fontsize=9, color=INK)
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=True))
        axes.tick_params(colors=MUTED, labelsize=8)
        axes.grid(visible=True, which="major", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        for roof in found.roofs:
            line = roof_line(found, roof.multiplications_per_cycle, horizontal)
            axes.plot([x for x, _ in line], [y for _, y in line], color=INK, linewidth=1.3, zorder=2)
        places = [
            (point.multiplications_per_byte or 0.0, per_second * (point.multiplications_per_cycle or 0.0))
            for point in found.points
        ]
        largest_first = sorted(zip(found.points, places, strict=True), key=lambda entry: -entry[0].totals.cycles)
        for point, (x, y) in largest_first:
            size = 5.0 + 13.0 * math.sqrt(point.totals.cycles / whole)
            axes.plot(
                [x],
                [y],
                "o",
                color=colour_of[point.name],
                markersize=size,
                markeredgecolor="white",
                alpha=0.85,
                zorder=3,
            )
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        points = axes.transData.transform(places)
        names = [*_name_roofs(axes, found), _name_slope(axes, found, points)]
        corners = [
            corner
            for roof in found.roofs
            for corner in roof_line(found, roof.multiplications_per_cycle, horizontal, points=40)
        ]
        place_labels(
            figure,
            axes,
            _labels(axes, found.points, places, colour_of),
            [*points.tolist(), *(place for name in names for place in name)],
            axes.transData.transform(corners).tolist(),
        )
        return save(figure, folder, "roofline")


Places = list[tuple[float, float]]
"""Points in pixels."""


def _name_roofs(axes: Axes, found: Roofline) -> list[Places]:
    """The name of each roof at its right end, of the highest above it, of the others below; where the names are."""
    right = axes.get_xlim()[1]
    highest = max(roof.multiplications_per_cycle for roof in found.roofs)
    taken = []
    for roof in found.roofs:
        above = roof.multiplications_per_cycle == highest
        note = axes.annotate(
            f"{roof.name}: {roof.multiplications_per_cycle:,.4g} MACs per cycle",
            (right, found.clock_mhz * 1e6 * roof.multiplications_per_cycle),
            xytext=(-2, 10 if above else -10),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            fontsize=8,
            color=INK,
        )
        box = note.get_window_extent()
        taken.append(_along((box.x0, (box.y0 + box.y1) / 2), (box.x1, (box.y0 + box.y1) / 2)))
    return taken


def _along(start: tuple[float, float], end: tuple[float, float], step: float = 8.0) -> Places:
    """Points on the way from ``start`` to ``end``, in pixels."""
    count = max(1, round(math.dist(start, end) / step))
    return [
        (start[0] + (end[0] - start[0]) * place / count, start[1] + (end[1] - start[1]) * place / count)
        for place in range(count + 1)
    ]


def _name_slope(axes: Axes, found: Roofline, points: Any) -> Places:
    """The memory's name along the slope, as far from the ``points`` (in pixels) as can be; where it is."""
    peak = max(roof.multiplications_per_cycle for roof in found.roofs)
    (x_from, y_from), (x_to, y_to) = axes.transData.transform(roof_line(found, peak, axes.get_xlim())[:2]).tolist()
    length = math.dist((x_from, y_from), (x_to, y_to))
    along = ((x_to - x_from) / length, (y_to - y_from) / length)
    speed = found.clock_mhz * 1e6 * found.bytes_per_cycle
    note = axes.annotate(
        f"{found.memory}: {speed / 1e9:,.4g} GB/s", (x_from, y_from), xycoords="figure pixels", fontsize=8, color=INK
    )
    width = note.get_window_extent().width
    above = 4 * axes.figure.dpi / 72

    def places(first: float) -> Places:
        """Where the name is if it begins ``first`` pixels along the slope."""
        corner = (x_from + first * along[0] - above * along[1], y_from + first * along[1] + above * along[0])
        return _along(corner, (corner[0] + width * along[0], corner[1] + width * along[1]))

    def clearance(first: float) -> float:
        return min(math.dist(place, point) for place in places(first) for point in points)

    # The slope may begin below the frame, where the least speed is not that of the least intensity.
    bottom = max(0.0, (axes.get_window_extent().y0 - y_from) / along[1])
    room = max(0.0, length - width - bottom)
    first = max((bottom + room * share / 20 for share in range(1, 20)), key=clearance)
    note.set_visible(False)
    found_places = places(first)
    axes.annotate(
        note.get_text(),
        axes.transData.inverted().transform(found_places[0]).tolist(),
        rotation=math.degrees(math.atan2(along[1], along[0])),
        rotation_mode="anchor",
        fontsize=8,
        color=INK,
    )
    return found_places


def _labels(
    axes: Axes, points: Sequence[LayerKind], places: Sequence[tuple[float, float]], colour_of: Mapping[str, str]
) -> list[tuple[float, float, str, str]]:
    """A label (x, y, text, colour) per point; points that lie on each other share one, line by line."""
    together = LABELS_TOGETHER * axes.figure.dpi / 72
    pixels = axes.transData.transform(list(places))
    groups: list[list[int]] = []
    for place in range(len(points)):
        for group in groups:
            if math.dist(pixels[group[0]], pixels[place]) < together:
                group.append(place)
                break
        else:
            groups.append([place])
    return [
        (
            *places[group[0]],
            "\n".join(points[place].name for place in group),
            colour_of[points[group[0]].name] if len(group) == 1 else INK,
        )
        for group in groups
    ]


def breakdown_plots(kinds: Sequence[LayerKind]) -> list[dict[str, Any]]:
    """The two panels of the breakdown, as Plotly takes them."""
    causes: list[Mapping[str, float | None]] = [kind.totals.causes for kind in kinds]
    energies: list[Mapping[str, float | None]] = [energy_parts(kind) for kind in kinds]
    return [
        _bar_plot(kinds, causes, "cycles by cause", scale=1.0, unit="cycles"),
        _bar_plot(kinds, energies, "energy by part (J)", scale=1e-6, unit="J"),
    ]


_FONT: Final = {"family": "system-ui, sans-serif", "size": 12, "color": INK}


def _bar_plot(
    kinds: Sequence[LayerKind], maps: Sequence[Mapping[str, float | None]], title: str, *, scale: float, unit: str
) -> dict[str, Any]:
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part_title(name),
            "y": [kind.name for kind in kinds],
            "x": [None if entry.get(name) is None else scale * (entry[name] or 0.0) for entry in maps],
            "hovertemplate": f"%{{y}}<br>%{{fullData.name}}: %{{x:.4s}} {unit}<extra></extra>",
            "marker": {"color": colour},
        }
        for name, colour in colours(present(maps)).items()
    ]
    return {
        "traces": traces,
        "layout": {
            "barmode": "stack",
            "xaxis": {"title": {"text": title}, "gridcolor": GRID, "exponentformat": "SI"},
            "yaxis": {"automargin": True, "ticksuffix": "  ", "autorange": "reversed"},
            "height": 130 + 28 * len(kinds),
            "margin": {"l": 16, "r": 16, "t": 12, "b": 52},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "font": _FONT,
        },
    }


def roofline_plot(found: Roofline) -> dict[str, Any]:
    """The roofline, as Plotly takes it."""
    horizontal, vertical = roofline_limits(found)
    per_second = found.clock_mhz * 1e6
    whole = sum(point.totals.cycles for point in found.points)
    colour_of = colours([point.name for point in found.points])
    traces: list[dict[str, Any]] = []
    for roof in found.roofs:
        line = roof_line(found, roof.multiplications_per_cycle, horizontal)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{roof.name}: {roof.multiplications_per_cycle:,.4g} MACs per cycle",
                "x": [x for x, _ in line],
                "y": [y for _, y in line],
                "line": {"color": INK, "width": 1.5},
                "hoverinfo": "skip",
            }
        )
    for point in found.points:
        share = point.totals.cycles / whole
        speed = per_second * (point.multiplications_per_cycle or 0.0)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": point.name,
                "x": [point.multiplications_per_byte],
                "y": [speed],
                "text": [
                    f"<b>{point.name}</b><br>{100 * share:.1f} % of the cycles<br>bound by {part_title(point.bound_by)}"
                ],
                "hovertemplate": "%{text}<br>%{x:.4g} MACs per byte<br>%{y:.4s} MACs per second<extra></extra>",
                "marker": {
                    "size": 8 + 20 * math.sqrt(share),
                    "color": colour_of[point.name],
                    "line": {"color": "#ffffff", "width": 1},
                },
            }
        )

    def axis(title: str, limits: tuple[float, float]) -> dict[str, Any]:
        return {
            "title": {"text": title},
            "type": "log",
            "range": [math.log10(limit) for limit in limits],
            "gridcolor": GRID,
            "exponentformat": "SI",
            "dtick": 1,
        }

    return {
        "traces": traces,
        "layout": {
            "xaxis": axis("MACs per byte of external traffic", horizontal),
            "yaxis": axis("MACs per second", vertical),
            "height": 520,
            "margin": {"l": 64, "r": 16, "t": 12, "b": 52},
            "legend": {"orientation": "h", "y": -0.14, "yanchor": "top"},
            "hovermode": "closest",
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "font": _FONT,
        },
    }
