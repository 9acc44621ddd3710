"""The report that puts the cycle-level simulator beside the published model of BitMoD, in both of its states.

    python -m termwise.flow.published_report --out reports/published-vs-cycle

Four layers of numbers: what the authors' simulator printed (``sim.published_figures``), what the closed form of
``sim.published`` gives, what ``sim.simulate`` gives, and the reasons of ``sim.explain`` for the last difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, Final

import click

from termwise.algorithms.errors import InputError
from termwise.algorithms.files import write_text
from termwise.algorithms.formats import get_format
from termwise.algorithms.shapes import known_shape
from termwise.algorithms.workload import PHASES, Phase
from termwise.flow.figures import GRID, INK, MUTED, STYLE, save
from termwise.flow.records import to_json
from termwise.sim.accelerators import get_accelerator, published_accelerator_names
from termwise.sim.explain import REASONS, explain, paged_cycles
from termwise.sim.published import PUBLISHED_MODELS, PUBLISHED_STATES
from termwise.sim.published_figures import (
    HEADLINES,
    MEAN_RATIOS,
    OLIVE_RATIOS,
    PUBLISHED_FIGURES,
    Headline,
    Quantity,
)
from termwise.sim.simulate import simulate

COMMAND: Final = "python -m termwise.flow.published_report --out reports/published-vs-cycle"
DECODED_TOKENS: Final = 20
TOKEN_COUNTS: Final = (0, 20, 64, 256, 1024)
REASON_LABELS: Final = ("logits", "attention", "precision", "metadata", "refetch", "overlap", "fill and drain")
_REASON_COLOURS: Final = ("#7d8894", "#1e5bb0", "#c9381f", "#b0741a", "#5c8a1c", "#8a4fc4", "#0a7f83")
_PHASE_TITLES: Final[Mapping[Phase, str]] = {
    "prefill": "prefill of 256 tokens",
    "decode": "one decoded token after 256",
}

Point = Mapping[str, Any]


def compare() -> list[dict[str, Any]]:
    """One document per state, phase, model and accelerator: the explanation, and the authors' figure (or None)."""
    points = []
    for state, phase, model, accelerator in product(
        PUBLISHED_STATES.values(), PHASES, PUBLISHED_MODELS, published_accelerator_names()
    ):
        explanation = explain(known_shape(model), get_accelerator(accelerator), phase=phase, state=state)
        figure = PUBLISHED_FIGURES[state.name][accelerator, phase].get(model)
        compared = explanation.to_dict()
        del compared["classes"]
        points.append(
            {
                **compared,
                "figure_cycles": None if figure is None else figure.cycles,
                "figure_energy_uj": None if figure is None else figure.energy_uj,
            }
        )
    return points


class Costs:
    """Cycles and energies by state, model, accelerator and phase, and the ratios between them."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = {
            (point["state"], point["model"], point["accelerator"], point["phase"]): point for point in points
        }

    def _cost(self, quantity: Quantity, level: str, key: tuple[str, str, str], decoded_tokens: int) -> float:
        unit = "cycles" if quantity == "speed" else "energy_uj"
        name = f"published_{unit}" if level == "published" else unit
        prefill, decode = (float(self._points[*key, phase][name]) for phase in PHASES)
        return prefill + decoded_tokens * decode

    def ratios(
        self, quantity: Quantity, accelerator: str, other: str, decoded_tokens: int, *, state: str, level: str
    ) -> list[float]:
        """Cost of ``other`` / cost of ``accelerator`` of every model. ``level`` is published or cycle."""
        return [
            self._cost(quantity, level, (state, model, other), decoded_tokens)
            / self._cost(quantity, level, (state, model, accelerator), decoded_tokens)
            for model in PUBLISHED_MODELS
        ]


def mean_ratios(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The mean ratios that the authors' simulator gives, of the published model and of the cycle-level one."""
    costs = Costs(points)
    rows = []
    for state, table in MEAN_RATIOS.items():
        for (quantity, accelerator, other), figure in table.items():
            for tokens, printed in ((0, figure.prefill), (DECODED_TOKENS, figure.with_20_tokens)):
                means = {
                    level: fmean(costs.ratios(quantity, accelerator, other, tokens, state=state, level=level))
                    for level in ("published", "cycle")
                }
                rows.append(
                    {
                        "state": state,
                        "quantity": quantity,
                        "accelerator": accelerator,
                        "other": other,
                        "decoded_tokens": tokens,
                        "figure": printed,
                        **means,
                    }
                )
    return rows


def headline_value(costs: Costs, headline: Headline, level: str) -> float:
    """A headline ratio in the state of November 2024.

    The arithmetic mean over the models in one task; in both tasks the geometric mean over models and tasks.
    """

    def values(tokens: int) -> list[float]:
        return costs.ratios(
            headline.quantity, headline.accelerator, headline.other, tokens, state="published", level=level
        )

    if headline.task == "both":
        return geometric_mean([*values(0), *values(DECODED_TOKENS)])
    return fmean(values(0 if headline.task == "prefill" else DECODED_TOKENS))


def headline_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The ratios that the paper prints, and what both models give by the same rule."""
    costs = Costs(points)
    return [
        {**headline._asdict(), **{level: headline_value(costs, headline, level) for level in ("published", "cycle")}}
        for headline in HEADLINES
    ]


def token_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Mean speed ratios with a growing number of generated tokens, in both states and in the cycle-level model."""
    costs = Costs(points)
    rows = []
    for accelerator, other in dict.fromkeys((headline.accelerator, headline.other) for headline in HEADLINES):
        for name, state, level in (
            *((state, state, "published") for state in PUBLISHED_STATES),
            ("cycle", next(iter(PUBLISHED_STATES)), "cycle"),
        ):
            means = {
                str(tokens): fmean(costs.ratios("speed", accelerator, other, tokens, state=state, level=level))
                for tokens in TOKEN_COUNTS
            }
            rows.append({"accelerator": accelerator, "other": other, "model_of": name, "speed_by_tokens": means})
    return rows


def olive_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Ratios of OliVe's own evaluation; beside the one over ANT on an array, what the models here give."""
    costs = Costs(points)
    rows = []
    for ratio in OLIVE_RATIOS:
        ours: dict[str, float | None] = dict.fromkeys((*PUBLISHED_STATES, "cycle"))
        if ratio.other == "ANT" and ratio.platform == "systolic array":
            for state in PUBLISHED_STATES:
                ours[state] = fmean(costs.ratios("speed", "olive", "ant", 0, state=state, level="published"))
            ours["cycle"] = fmean(costs.ratios("speed", "olive", "ant", 0, state="published", level="cycle"))
        rows.append({**ratio._asdict(), "prefill": ours})
    return rows


def integer_rows() -> list[dict[str, Any]]:
    """Prefill cycles of the arrays of 4-bit PEs, OliVe at 4 bits beside ANT at 4 and at 8 bits, by model."""

    def cycles(accelerator: str, model: str, format: str) -> int:
        shape, weights = known_shape(model), get_format(format)
        return simulate(shape, get_accelerator(accelerator), phase="prefill", weights=weights).cycles

    return [
        {
            "model": model,
            "olive_cycles": cycles("olive-int", model, "olive-w4a4"),
            "ant_cycles": {f"{bits} bits": cycles("ant-int", model, f"ant-w{bits}a{bits}") for bits in (4, 8)},
        }
        for model in PUBLISHED_MODELS
    ]


def memory_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """What a memory with pages adds to the cycle-level figure, by phase, model and accelerator."""
    first = next(iter(PUBLISHED_STATES))
    return [
        {
            **{key: point[key] for key in ("phase", "model", "accelerator", "cycles")},
            "paged_cycles": paged_cycles(
                known_shape(point["model"]), get_accelerator(point["accelerator"]), phase=point["phase"]
            ),
        }
        for point in points
        if point["state"] == first
    ]


def document_of() -> dict[str, Any]:
    """All results, JSON-ready."""
    points = compare()
    return {
        "command": COMMAND,
        "decoded_tokens": DECODED_TOKENS,
        "points": points,
        "mean_ratios": mean_ratios(points),
        "headlines": headline_rows(points),
        "tokens": token_rows(points),
        "olive": olive_rows(points),
        "olive_integer": integer_rows(),
        "memory": memory_rows(points),
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table whose first ``left`` columns are text."""
    rule = ["---" if place < left else "--:" for place in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def _cycle_table(points: Sequence[Point]) -> list[str]:
    def cells(point: Point) -> list[str]:
        figure, published = point["figure_cycles"], point["published_cycles"]
        shares = [f"{100 * point['reason_cycles'][name] / published:+.1f} %" for name in REASONS]
        return [
            point["model"],
            point["accelerator"],
            "–" if figure is None else f"{figure:,}",
            f"{published:,}",
            f"{point['cycles']:,}",
            f"{point['ratio']:.3f}",
            *shares,
        ]

    header = ("model", "accelerator", "authors' figure", "published model", "cycle-level", "ratio", *REASON_LABELS)
    return _table(header, [cells(point) for point in points], 2)


def _energy_table(points: Sequence[Point]) -> list[str]:
    def cells(point: Point) -> list[str]:
        figure, published = point["figure_energy_uj"], point["published_energy_uj"]
        return [
            point["model"],
            point["accelerator"],
            "–" if figure is None else f"{figure:,}",
            f"{published:,.0f}",
            "–" if figure is None else f"{published - figure:+.1f}",
            f"{point['energy_uj']:,.0f}",
            f"{point['energy_uj'] / published:.3f}",
        ]

    header = ("model", "accelerator", "authors' figure", "published model", "difference", "cycle-level", "ratio")
    return _table(header, [cells(point) for point in points], 2)


def _task(tokens: int) -> str:
    return "prefill" if tokens == 0 else f"prefill + {tokens} tokens"


def _span(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Least and largest value as text."""
    return f"{write(min(values))} to {write(max(values))}"


def _percent(value: float) -> str:
    return f"{100 * value:+.0f} %"


def _summary(points: Sequence[Point]) -> list[str]:
    """What the tables say, with the numbers from them."""
    with_figure = [point for point in points if point["figure_cycles"] is not None]
    exact = sum(point["figure_cycles"] == point["published_cycles"] for point in with_figure)
    off = max(abs(point["figure_energy_uj"] - point["published_energy_uj"]) for point in with_figure)
    lines = [
        f"* The published model gives {exact} of the {len(with_figure)} cycle counts of the authors' simulator exactly "
        f"and every energy within {math.ceil(off)} µJ (the table of CACTI figures has three decimals).",
    ]
    for state, phase in product(PUBLISHED_STATES.values(), PHASES):
        chosen = [point for point in points if (point["state"], point["phase"]) == (state.name, phase)]
        ratios = [point["ratio"] - 1 for point in chosen]
        parts = []
        for name, label in zip(REASONS, REASON_LABELS, strict=True):
            shares = [point["reason_cycles"][name] / point["published_cycles"] for point in chosen]
            if max(abs(share) for share in shares) >= 0.005:
                parts.append(f"{label} {_span(shares, _percent)}")
        lines.append(
            f"* {state.name} ({state.date}), {_PHASE_TITLES[phase]}: the cycle-level count differs by "
            f"{_span(ratios, _percent)}: {'; '.join(parts)}."
        )
    return lines


_REASONS_TEXT: Final = """\
The difference between both models is charged to seven causes, one after the other, each in percent of the published
cycles; they add up (`termwise.sim.explain` defines them):

* **logits**: the published model computes them for all tokens of a prefill, the cycle-level one for the last.
* **attention**: the state of 2024 multiplies every head over the whole hidden size, all heads at once. That of 2025 has
  the true shapes; what is left are keys and values of ANT and OliVe, 16 bits there and 8 bits here, and the refetch
  rule, which looks at all heads together there.
* **precision**: bits of the codes. The published ones of ANT and OliVe are averages that mix widths to reach some
  accuracy; the formats here are plain 4-bit ones. BitMoD's 4.0625 and 3.0625 bits become 4 and 3.
* **metadata**: scales and selectors in the packed bytes, in place of the published 0.0625 bit per weight.
* **refetch**: the cycle-level plan splits long reductions and fetches less, though only half a buffer holds the
  stationary operand.
* **overlap**: first loads, write-backs, finite buffers. The published model overlaps all of it perfectly.
* **fill and drain**: the pipeline, and the bit-serial scaling of the last group of a tile."""

_HEADLINE_TEXT: Final = """\
All come from the state of November 2024. The speed ratios are arithmetic means over the six models. Which mean the
energy ratios are is not said; the geometric mean over the six models and both tasks gives the first two to the printed
digits. None of the means that were tried (arithmetic, geometric, harmonic; of ratios or of energies normalized to FP16;
per task and over both; on-chip or total; 16 to 256 generated tokens) gives all three."""

_TOKENS_TEXT: Final = f"""\
The paper's generative task is a prefill of 256 and {DECODED_TOKENS} generated tokens. Decode at batch 1 is bound by the
reading of weights, prefill by computing, so the choice moves every ratio: more tokens favour the format with the fewest
bits over FP16, and take the advantage of the PE away where the other's weights are as narrow."""

_OLIVE_TEXT: Final = """\
OliVe (ISCA 2023) evaluates itself on two other models of the hardware. What of their parameters is known:

* Known: the PEs and decoders of the array (4096 4-bit PEs of 50.01 µm² in 22 nm), its output-stationary dataflow, the
  number formats. ANT's public simulator, which has AdaFloat and OLAccel but no OliVe, states 500 MHz, 1024 bits of DRAM
  per cycle, buffers of 128, 256 and 128 KiB, and arrays of 32 × 32 (ANT), 32 × 28 (AdaFloat) and 16 × 18 (OLAccel) PEs.
* Not known here: OliVe's array, buffers and bandwidth in its comparison; the width that every layer of every design is
  granted; and all of the GPU model that the ratio over GOBO comes from. OliVe's public repository holds its accuracy
  experiments, not its performance model.
* So none of these ratios is reproduced. AdaFloat, OLAccel and GPUs have no accelerator in termwise, and OliVe compares
  with GOBO on a GPU.

The one comparison that both have, OliVe over ANT on an array, stands beside the printed value, for prefill. In BitMoD's
evaluation both multiply FP16 activations with weights of about the same width, so the advantage that remains is the
larger array (36 × 32 PEs in place of 32 × 32)."""

_INTEGER_TEXT: Final = """\
OliVe's own arrays multiply integers on both sides: `olive-int` and `ant-int`, each 4096 PEs of 4 bits, four of which
make a product of 8 bits. OliVe runs at 4 bits throughout. How many layers ANT must run at 8 bits to keep its accuracy
is not published, so both ends stand here: ANT at 4 bits everywhere, and at 8 bits everywhere, in the cycle-level
simulator, for a prefill of 256 tokens of the models of BitMoD's paper (OliVe's own are others). The printed ratio is
the one that a machine gives whose layers are nearly all at 8 bits."""

_MEMORY_TEXT: Final = """\
Both models take external memory that moves 32 bytes in every cycle. A real one opens and closes rows, turns its bus
around and refreshes. With the times of a DDR4-3200 device (in nanoseconds) on a channel of the same 32 bytes per cycle,
the cycle-level simulator counts, in percent more cycles for a prefill of 256 tokens and for one decoded token:"""


def report_text(document: Mapping[str, Any]) -> str:
    """The report as Markdown; line 1 is the command that makes it again."""
    points: Sequence[Point] = document["points"]
    lines = [
        f"`{document['command']}`",
        "",
        "# The published model and the cycle-level simulator",
        "",
        "BitMoD's figures come from a closed form. Its two states (November 2024, which gave the paper's figures, and "
        "July 2025) are rebuilt here as `published` and `published-2025`, beside the cycle-level simulator of the same "
        "accelerators ([what it models](../../docs/simulator.md)).",
        "",
        "![difference of the cycle-level cycles by cause](differences.png)",
        "",
        *_summary(points),
        "",
        "## Causes",
        "",
        _REASONS_TEXT,
        "",
    ]
    for state in PUBLISHED_STATES.values():
        lines += [f"## Cycles: {state.name}, {state.date}", ""]
        missing = sorted(
            {point["model"] for point in points if point["state"] == state.name}
            - {
                point["model"]
                for point in points
                if point["state"] == state.name and point["figure_cycles"] is not None
            }
        )
        if missing:
            lines += [f"No figure of the authors' simulator is at hand for {' and '.join(missing)}.", ""]
        for phase in PHASES:
            chosen = [point for point in points if (point["state"], point["phase"]) == (state.name, phase)]
            lines += [f"{_PHASE_TITLES[phase].capitalize()}:", "", *_cycle_table(chosen), ""]
    for state in PUBLISHED_STATES.values():
        lines += [f"## Energy in µJ: {state.name}, {state.date}", ""]
        for phase in PHASES:
            chosen = [point for point in points if (point["state"], point["phase"]) == (state.name, phase)]
            lines += [f"{_PHASE_TITLES[phase].capitalize()}:", "", *_energy_table(chosen), ""]
    lines += ["## Mean ratios over the six models", ""]
    lines += _table(
        ("state", "quantity", "comparison", "task", "authors' figure", "published model", "cycle-level"),
        [
            [
                row["state"],
                row["quantity"],
                f"{row['accelerator']} over {row['other']}",
                _task(row["decoded_tokens"]),
                *(f"{row[key]:.3f}" for key in ("figure", "published", "cycle")),
            ]
            for row in document["mean_ratios"]
        ],
        4,
    )
    lines += ["", "## The headline ratios of the paper", "", _HEADLINE_TEXT, ""]
    tasks = {
        "prefill": _task(0),
        "with_20_tokens": _task(DECODED_TOKENS),
        "both": "both, geometric mean",
    }
    lines += _table(
        ("quantity", "comparison", "task", "printed", "published model", "comes out", "cycle-level"),
        [
            [
                row["quantity"],
                f"{row['accelerator']} over {row['other']}",
                tasks[row["task"]],
                f"{row['printed']:.2f}",
                f"{row['published']:.3f}",
                "yes" if round(row["published"], 2) == row["printed"] else "no",
                f"{row['cycle']:.3f}",
            ]
            for row in document["headlines"]
        ],
        3,
    )
    lines += ["", f"## The choice of {DECODED_TOKENS} generated tokens", "", _TOKENS_TEXT, ""]
    lines += _table(
        ("comparison (speed)", "model", *(f"{tokens} tokens" for tokens in TOKEN_COUNTS)),
        [
            [
                f"{row['accelerator']} over {row['other']}",
                row["model_of"],
                *(f"{value:.2f}" for value in row["speed_by_tokens"].values()),
            ]
            for row in document["tokens"]
        ],
        2,
    )
    lines += ["", "## OliVe's own comparison", "", _OLIVE_TEXT, ""]
    lines += _table(
        ("OliVe over", "platform", "printed", *PUBLISHED_STATES, "cycle-level"),
        [
            [
                row["other"],
                row["platform"],
                f"{row['printed']:.1f}",
                *("–" if value is None else f"{value:.2f}" for value in row["prefill"].values()),
            ]
            for row in document["olive"]
        ],
        2,
    )
    lines += ["", _INTEGER_TEXT, ""]
    widths = list(document["olive_integer"][0]["ant_cycles"])
    ratios = [[row["ant_cycles"][width] / row["olive_cycles"] for width in widths] for row in document["olive_integer"]]
    lines += _table(
        ("OliVe at 4 bits over ANT", *(f"ANT at {width}" for width in widths)),
        [
            *(
                [row["model"], *(f"{ratio:.2f}" for ratio in found)]
                for row, found in zip(document["olive_integer"], ratios, strict=True)
            ),
            ["mean", *(f"{fmean(column):.2f}" for column in zip(*ratios, strict=True))],
        ],
        1,
    )
    lines += ["", "## DRAM timing", "", _MEMORY_TEXT, ""]
    added = {
        (row["model"], row["phase"], row["accelerator"]): 100 * (row["paged_cycles"] / row["cycles"] - 1)
        for row in document["memory"]
    }
    accelerators = published_accelerator_names()
    lines += _table(
        ("model", "phase", *accelerators),
        [
            [model, phase, *(f"{added[model, phase, accelerator]:+.1f} %" for accelerator in accelerators)]
            for phase in PHASES
            for model in PUBLISHED_MODELS
        ],
        2,
    )
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], folder: Path) -> list[Path]:
    """Write ``differences.png`` and ``differences.svg``: causes by state, phase and accelerator, means over the models.

    Raises ``InputError`` where the folder cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = published_accelerator_names()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 6.4), dpi=150, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(PUBLISHED_STATES), len(PHASES), squeeze=False, sharey=True, sharex=True)
        for row, state in zip(grid, PUBLISHED_STATES.values(), strict=True):
            for axes, phase in zip(row, PHASES, strict=True):
                for height, name in enumerate(names):
                    chosen = [
                        point
                        for point in points
                        if (point["state"], point["phase"], point["accelerator"]) == (state.name, phase, name)
                    ]
                    ends = {False: 0.0, True: 0.0}
                    for reason, colour in zip(REASONS, _REASON_COLOURS, strict=True):
                        share = fmean(
                            100 * point["reason_cycles"][reason] / point["published_cycles"] for point in chosen
                        )
                        axes.barh(height, share, left=ends[share > 0], height=0.62, color=colour, linewidth=0)
                        ends[share > 0] += share
                    axes.plot(sum(ends.values()), height, "D", color=INK, markersize=4.5, markeredgecolor="white")
                axes.axvline(0, color=MUTED, linewidth=0.8)
                axes.set_yticks(range(len(names)), names)
                axes.set_title(f"{state.name} · {phase}", loc="left", fontsize=10, color=INK, fontweight="bold")
                axes.grid(axis="x", color=GRID, linewidth=0.8)
                axes.set_axisbelow(True)
                axes.spines[["top", "right", "left"]].set_visible(False)
                axes.tick_params(labelsize=8, left=False)
        grid[0][0].invert_yaxis()
        for axes in grid[-1]:
            axes.set_xlabel("cycle-level − published, % of the published cycles", fontsize=9, color=INK)
        for label, colour in zip(REASON_LABELS, _REASON_COLOURS, strict=True):
            grid[0][-1].barh([0], [0], color=colour, label=label)
        grid[0][-1].plot([], [], "D", color=INK, markersize=4.5, label="sum")
        grid[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
        return save(figure, folder, "differences")


def write_report(folder: Path) -> dict[str, Any]:
    """``report.md``, ``results.json``, ``differences.png`` and ``differences.svg`` in ``folder``; returns the results.

    Raises ``InputError`` where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; expected a writable place") from error
    document = document_of()
    draw(document["points"], folder)
    write_text(folder / "results.json", to_json(document))
    write_text(folder / "report.md", report_text(document))
    return document


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the report.")
def main(out: Path) -> None:
    """Write the report."""
    try:
        write_report(out)
    except InputError as error:
        raise click.ClickException(str(error)) from error
    click.echo(out / "report.md")


if __name__ == "__main__":
    main()
