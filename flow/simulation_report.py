"""What ``termwise simulate`` says: tables per layer kind on the terminal, and a folder with a report and figures.

Everything is made from the document of the simulation. The names of the causes, of the traffic and of the parts of the
energy are read from it; a cause without a single cycle has no column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from termwise.algorithms.files import directory_written_beside, write_text
from termwise.flow.console import number
from termwise.flow.layer_kinds import Analysis, LayerKind, Roofline, multiplications_of
from termwise.flow.records import to_json
from termwise.flow.report import markdown_cell, script_json, template_environment
from termwise.flow.simulation_figures import (
    breakdown_plots,
    draw_breakdown,
    draw_roofline,
    part_title,
    present,
    roofline_plot,
)
from termwise.sim.totals import totals_of

NOT_KNOWN: Final = "not known"

BREAKDOWN_MEANING: Final = (
    "Cycles by what the array does: it computes, or it waits for one cause. Energy by part. Both are over all products "
    "of a kind."
)
ROOFLINE_MEANING: Final = (
    "A point is a layer kind at the MACs per second that it achieves, waiting included; its area grows with its share "
    "of the cycles. The slope is what external memory allows at its peak bandwidth, a level what the array computes at "
    "its peak. A point on the slope cannot be faster without more bandwidth or fewer bytes, a point on its level not "
    "without a larger array; a point below both loses time to what the table says."
)


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table of text; the first ``left`` columns are words, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def title_of(document: Mapping[str, Any]) -> str:
    """Which simulation this is."""
    stored = f"{document['weight_bits']:.4g} bits per weight" if "weight_bits" in document else document["format"]
    made = f", {document['output_tokens']} output tokens" if "output_tokens" in document else ""
    return (
        f"{document['model']} on {document['accelerator']}, {stored}, {document['phase']}, context "
        f"{document['context']}{made}, batch {document['batch']}"
    )


def energy_text(microjoules: float | None) -> str:
    """Energy with its unit, or that it is not known."""
    return NOT_KNOWN if microjoules is None else f"{number(microjoules)} µJ"


def _share(part: float, all_of: float) -> str:
    return f"{100 * part / all_of:.1f} %" if all_of else "–"


def _time_table(kinds: Sequence[LayerKind], total: LayerKind, first: str, title: str) -> TextTable:
    """Where the cycles go: a row for each kind and one for the total."""
    rows = [*kinds, total]
    causes = [cause for cause in present(row.totals.causes for row in rows) if cause != "busy"]
    return TextTable(
        title=title,
        columns=(first, "cycles", "share", "busy", *map(part_title, causes), "bound by"),
        rows=tuple(
            (
                row.name,
                f"{row.totals.cycles:,}",
                _share(row.totals.cycles, total.totals.cycles),
                _share(row.totals.busy, row.totals.cycles),
                *(_share(row.totals.causes.get(cause, 0), row.totals.cycles) for cause in causes),
                part_title(row.bound_by),
            )
            for row in rows
        ),
    )


def _cost_table(kinds: Sequence[LayerKind], total: LayerKind, first: str, title: str) -> TextTable:
    """What is moved, spent and used: a row for each kind and one for the total."""
    return TextTable(
        title=title,
        columns=(first, "DRAM (MB)", "DRAM use", "energy (µJ)", "PE use", "MACs per byte"),
        rows=tuple(
            (
                row.name,
                number(row.totals.traffic_bytes / 1e6),
                f"{100 * row.channel_share:.1f} %",
                _energy_cell(row.totals.energy_uj.get("total")),
                f"{100 * row.totals.pe_utilization:.1f} %",
                number(row.multiplications_per_byte),
            )
            for row in (*kinds, total)
        ),
    )


def _energy_cell(microjoules: float | None) -> str:
    return NOT_KNOWN if microjoules is None else number(microjoules)


def kind_tables(analysis: Analysis) -> list[TextTable]:
    """Time and cost of the layer kinds; of a generation those of its phases before them."""
    tables = [
        _time_table(analysis.kinds, analysis.total, "layers", "Time by layer kind"),
        _cost_table(analysis.kinds, analysis.total, "layers", "Traffic, energy and use by layer kind"),
    ]
    if analysis.phases:
        tables.insert(0, _time_table(analysis.phases, analysis.total, "phase", "Time by phase"))
        tables.insert(1, _cost_table(analysis.phases, analysis.total, "phase", "Traffic, energy and use by phase"))
    return tables


def product_table(document: Mapping[str, Any]) -> TextTable:
    """Every product of the document by name, with its sizes where they do not change from step to step."""
    sizes = [key for key in ("tokens", "reduction", "outputs") if all(key in layer for layer in document["layers"])]
    rows = []
    for layer in document["layers"]:
        totals = totals_of(layer)
        rows.append(
            (
                f"{layer['phase']}: {layer['name']}" if "phase" in layer else layer["name"],
                layer["operand"],
                *(f"{layer[key]:,}" for key in sizes),
                f"{layer['repeats']:,}",
                f"{multiplications_of(layer):,}",
                f"{totals.cycles:,}",
                f"{100 * totals.pe_utilization:.1f} %",
                f"{totals.traffic_bytes:,}",
                _energy_cell(layer["energy_uj"]["total"]),
            )
        )
    columns = ("product", "operand", *sizes, "times", "MACs", "cycles", "PE use")
    return TextTable(title="Products", columns=(*columns, "DRAM bytes", "energy (µJ)"), rows=tuple(rows), left=2)


def vector_table(document: Mapping[str, Any]) -> TextTable:
    """The vector operations of a simulation that has them."""
    return TextTable(
        title="Vector operations",
        columns=("operation", "elements", "elements per cycle", "cycles"),
        rows=tuple(
            (
                part_title(entry["name"]),
                f"{entry['elements']:,}",
                number(entry["elements_per_cycle"]),
                f"{entry['cycles']:,}",
            )
            for entry in document["vector_operations"]
        ),
    )


def summary_lines(document: Mapping[str, Any], memory: str = "") -> list[str]:
    """Latency, speed, energy and traffic of the whole, a sentence each; also of the published model's documents.

    ``memory`` is what is said of external memory beside its traffic.
    """
    cycles, phase = document["cycles"], document["phase"]
    lines = [f"latency: {cycles:,} cycles, {number(document['latency_ms'])} ms at {document['clock_mhz']:,} MHz"]
    if "time_to_first_token_ms" in document:
        lines.append(f"time to first token: {number(document['time_to_first_token_ms'])} ms")
    per_token = document.get("time_per_output_token_ms")
    if per_token is not None and per_token["mean"] is not None:
        lines.append(
            f"time per output token: {number(per_token['mean'])} ms on average, {number(per_token['first'])} ms for "
            f"the first step, {number(per_token['last'])} ms for the last"
        )
    if "tokens_per_second" in document:
        tokens = {"prefill": "tokens read", "generation": "output tokens"}.get(phase, "tokens")
        lines.append(
            f"{number(document['tokens_per_second'])} {tokens} per second, "
            f"{energy_text(document['energy_per_token_uj'])} per token"
        )
    causes = {"busy": document["busy"], **document["stalls"]}
    shares = ", ".join(f"{part_title(name)} {count:,} ({_share(count, cycles)})" for name, count in causes.items())
    lines.append(f"cycles by cause: {shares}")
    energy = document["energy_uj"]["total"]
    parts = ", ".join(
        f"{part_title(part)} {NOT_KNOWN if uj is None else _share(uj, energy) if energy else energy_text(uj)}"
        for part, uj in document["energy_uj"].items()
        if part != "total"
    )
    lines.append(f"energy: {energy_text(energy)}: {parts}")
    lines.append(f"DRAM traffic: {document['traffic_bytes']:,} bytes{memory and f' ({memory})'}")
    return lines


def memory_text(found: Roofline) -> str:
    """External memory and its peak bandwidth."""
    return f"{found.memory}, {found.clock_mhz * found.bytes_per_cycle / 1e3:,.4g} GB/s at its peak"


def write_simulation(analysis: Analysis, folder: Path, *, command: str) -> None:
    """Write simulation.json, report.md, index.html and the figures to the new ``folder``, all of them or none.

    Raises ``InputError`` where the folder cannot be written, or is neither new nor empty.
    """
    from plotly.offline import get_plotlyjs

    document, found = analysis.document, analysis.roofline
    title = title_of(document)
    tables = [*kind_tables(analysis), product_table(document)]
    if "vector_operations" in document:
        tables.append(vector_table(document))
    shown = {
        "title": title,
        "command": command,
        "lines": summary_lines(document, memory_text(found)),
        "tables": tables,
        "notes": document["notes"],
        "has_roofline": bool(found.points),
        "breakdown_meaning": BREAKDOWN_MEANING,
        "roofline_meaning": ROOFLINE_MEANING,
    }
    plots = [*breakdown_plots(analysis.kinds), *([roofline_plot(found)] if found.points else [])]
    markdown = template_environment(html=False)
    markdown.filters["cell"] = markdown_cell
    page = template_environment(html=True).get_template("simulation.html")
    with directory_written_beside(folder) as temporary:
        write_text(temporary / "simulation.json", to_json({"command": command, **analysis.to_dict()}))
        draw_breakdown(title, analysis.kinds, temporary)
        draw_roofline(title, found, temporary)
        write_text(temporary / "report.md", markdown.get_template("simulation.md").render(**shown))
        text = page.render(**shown, plots_json=script_json(plots), library=get_plotlyjs())
        write_text(temporary / "index.html", text)
