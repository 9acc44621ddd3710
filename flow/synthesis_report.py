"""``reports/synthesis``: what every unit takes and how fast it runs, beside what the papers say.

    python -m termwise.flow.synthesis_report --out reports/synthesis

It can be interrupted: what is recorded is not synthesized again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from termwise.algorithms.errors import TermwiseError
from termwise.algorithms.files import write_text
from termwise.flow import console
from termwise.flow.figures import STYLE, save
from termwise.flow.records import to_json
from termwise.flow.synthesis import Synthesizer, baseline_of, baseline_path, yosys_version
from termwise.rtl.synthesis import TARGETS, Target, fits
from termwise.rtl.units import UNITS, Unit

SEEDS = 3
"""Of place and route; an array takes minutes for each and has one."""

REPORT_TARGETS = ("ecp5", "xc7", "asic")
BITMOD_PE_AREA, FP16_PE_AREA, BITMOD_ENCODER_SHARE = 97090 / 64, 95498 / 48, 2419 / 97090
"""µm² in 28 nm (BitMoD section V-C): PE arrays of 8 × 8 and of 6 × 8 PEs, and a tile's term encoders beside its PEs."""

OLIVE_SHARES = {"pair_decoder": (128, 0.022), "pair_decoder_8bit": (64, 0.015)}
"""Decoders on the borders of 64 × 64 PEs, and their share of the array's area as published (OliVe, 22 nm)."""

OLIVE_ELEMENTS = 4096
GOALS = {"bit_serial": 80, "bit_serial_shared_exponent": 120, "outlier_victim": 120}
"""MHz on ECP5, speed grade 6."""

Figures = Mapping[tuple[str, str], dict[str, Any]]


def collect(folder: Path, workers: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures of every unit on every target, from records below ``folder`` or from the tools."""
    synthesizers = {
        kind: Synthesizer(folder, 1 if kind == "array" else SEEDS, console.warn) for kind in ("pe", "block", "array")
    }
    wanted = [(unit, TARGETS[target]) for unit in UNITS.values() for target in REPORT_TARGETS]
    wanted = [item for item in wanted if fits(*item)]

    def place(item: tuple[Unit, Target]) -> tuple[bool, bool, bool]:
        unit, target = item
        array = unit.kind == "array"
        return array, array and target.name == "ecp5", not unit.has_memories

    # Short ones first: an interrupted run has lost little. The longest, the accelerator, before the other long ones.
    wanted.sort(key=place)
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda item: synthesizers[item[0].kind].figures(*item), wanted)
        results = list(console.progress(found, total=len(wanted), label="synthesis", unit="unit"))
    return {(unit.name, target.name): figures for (unit, target), figures in zip(wanted, results, strict=True)}


def _clock(entry: Mapping[str, Any]) -> str:
    low, high = entry["fmax_mhz_range"]
    return f"{entry['fmax_mhz']:.0f} ({low:.0f}–{high:.0f})"


def _dash(value: Any) -> str:
    return console.number(value)


def unit_table(found: Figures, units: Sequence[Unit]) -> list[str]:
    """A Markdown table of units."""
    lines = [
        "| unit | LUT | without DSPs | FF | DSP | BRAM | MHz | xc7 LUT | xc7 FF | xc7 DSP | NAND2 | what it is |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for unit in units:
        lattice, xilinx = found[unit.name, "ecp5"], found[unit.name, "xc7"]
        gates = found.get((unit.name, "asic"))
        cells = [
            unit.name,
            *(_dash(lattice[name]) for name in ("lut", "lut_without_dsp", "ff", "dsp", "bram")),
            _clock(lattice),
            *(_dash(xilinx[name]) for name in ("lut", "ff", "dsp")),
            "–" if gates is None else console.number(round(gates["area_nand2"])),
            unit.summary,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def per_product(found: Figures, name: str, target: str, figure: str) -> float:
    """A figure per product and cycle; LUTs those without DSPs."""
    entry = found[name, target]
    value = entry["lut_without_dsp"] if figure == "lut" and entry["lut_without_dsp"] else entry[figure]
    products = UNITS[name].products_per_cycle
    assert products is not None
    return float(value / products)


def findings(found: Figures) -> list[str]:
    """What the figures say, one line each."""
    lines = []
    for target in ("ecp5", "xc7"):
        with_dsp = found["fp16_mac", target]["lut"]
        ratio = found["bit_serial_shared_exponent", target]["lut"] / 2 / with_dsp
        without = per_product(found, "bit_serial_shared_exponent", target, "lut") / per_product(
            found, "fp16_mac", target, "lut"
        )
        lines.append(
            f"* LUTs per product and cycle on {target}, `bit_serial_shared_exponent` over `fp16_mac`: "
            f"**{without:.2f}** where neither has DSPs, {ratio:.2f} where `fp16_mac` has "
            f"{found['fp16_mac', target]['dsp']}."
        )
    for name in ("bit_serial", "bit_serial_shared_exponent", "bit_serial_exact"):
        used = {target: found[name, target]["dsp"] for target in ("ecp5", "xc7")}
        lines.append(f"* DSPs of `{name}`: {used['ecp5']} on ecp5, {used['xc7']} on xc7.")
    for name, goal in GOALS.items():
        entry = found[name, "ecp5"]
        verdict = "reached" if entry["fmax_mhz_range"][0] >= goal else "missed by some seed"
        lines.append(f"* Clock of `{name}` on ECP5: {_clock(entry)} MHz; goal {goal}: {verdict}.")
    for name in ("bit_serial", "bit_serial_shared_exponent", "outlier_victim", "fp16_mac"):
        array, alone = found[f"{name}_array_4x4", "ecp5"]["fmax_mhz"], found[name, "ecp5"]["fmax_mhz"]
        lines.append(f"* 4 × 4 array of `{name}`: {array:.0f} MHz, {array / alone:.0%} of its PE's clock.")
    gates = {name: figures["area_nand2"] for (name, target), figures in found.items() if target == "asic"}
    ours = (gates["bit_serial"] + gates["dequantizer"]) / gates["fp16_mac"]
    lines.append(
        f"* Area of BitMoD's PE with its dequantizer over that of `fp16_mac`: {ours:.2f}; published "
        f"{BITMOD_PE_AREA / FP16_PE_AREA:.2f} (28 nm)."
    )
    share = 8 * gates["term_generator"] / (64 * (gates["bit_serial"] + gates["dequantizer"]))
    lines.append(
        f"* 8 term generators beside 8 × 8 PEs: {share:.1%} of the PEs' area; published {BITMOD_ENCODER_SHARE:.1%}."
    )
    for name, (count, printed) in OLIVE_SHARES.items():
        decoders = count * gates[name]
        ours = decoders / (decoders + OLIVE_ELEMENTS * gates["outlier_victim"])
        lines.append(
            f"* {count} of `{name}` beside 64 × 64 PEs of 4 bits: {ours:.1%} of both; published {printed:.1%}."
        )
    return lines


def parts_of_pe(found: Figures) -> dict[str, float]:
    """Shares of BitMoD's PE with its dequantizer: area in gates."""
    pe, dequantizer = found["bit_serial", "asic"], found["dequantizer", "asic"]
    inside = {name: share * pe["area_nand2"] for name, share in pe["parts"].items()}
    inside["dequantizer"] = dequantizer["area_nand2"]
    total = sum(inside.values())
    return {name: area / total for name, area in inside.items()}


def draw(found: Figures, folder: Path) -> None:
    """LUTs and clocks of the PEs; the parts of BitMoD's PE and of the arrays."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    elements = [unit for unit in UNITS.values() if unit.kind == "pe"]
    names = [unit.name for unit in elements]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(names, [per_product(found, name, "ecp5", "lut") for name in names], color="#4477aa")
        left.set_xlabel("ECP5 LUTs per product and cycle,\nwithout DSPs")
        left.invert_yaxis()
        clocks = [found[name, "ecp5"] for name in names]
        right.barh(names, [entry["fmax_mhz"] for entry in clocks], color="#66ccee")
        for place, entry in enumerate(clocks):
            right.plot(entry["fmax_mhz_range"], [place, place], color="black", linewidth=1.5)
        right.set_xlabel(f"ECP5 clock (MHz),\nmedian and range of {SEEDS} seeds")
        save(figure, folder, "processing-elements")

        figure = Figure(figsize=(8.2, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        bars = {"bit_serial PE with dequantizer": parts_of_pe(found)}
        bars |= {
            f"{unit.name}": found[unit.name, "asic"]["parts"] for unit in UNITS.values() if unit.name.endswith("_4x4")
        }
        palette = (
            *("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#222255", "#999933"),
            *("#bbbbbb", "#e69f00", "#8a4fc4", "#0a7f83", "#7f3b08", "#c7e9c0"),
        )
        colour: dict[str, str] = {}
        for row, parts in enumerate(bars.values()):
            begin = 0.0
            for name, share in sorted(parts.items(), key=lambda item: -item[1]):
                known = name if share >= 0.02 or name in colour else "what is below 2 %"
                colour.setdefault(known, palette[len(colour)])
                axes.barh(row, share, left=begin, color=colour[known], edgecolor="white", linewidth=0.4)
                begin += share
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.set_xlabel("share of the area in gates")
        handles = [mpl.patches.Patch(color=value, label=name.replace("_", " ")) for name, value in colour.items()]
        figure.legend(handles=handles, loc="outside right upper", fontsize=6)
        save(figure, folder, "parts")


def report_text(found: Figures, command: str) -> str:
    """The report."""
    tools = next(iter(found.values()))["tools"] | found["bit_serial", "ecp5"]["tools"]
    lines = [f"`{command}`", "", "# Synthesis", ""]
    lines += [f"* {name}: {version.strip(chr(34))}" for name, version in tools.items()]
    lines += [
        f"* ecp5: {TARGETS['ecp5'].summary}; clocks are the median and range of {SEEDS} seeds of place and route, "
        "those of arrays of one",
        "* xc7: Xilinx 7 series; nextpnr has no device of the family, so there are counts and no clock",
        "* NAND2: generic gates, area in two-input NAND gates",
        "",
        "LUTs of ECP5 are those that logic, carry chains and distributed memories take. Clocks are those of a unit",
        "with a register at every port; counts are those of the unit alone. Arrays are synthesized module by module.",
        "",
        "## What it says",
        "",
        *findings(found),
        "",
        "## Processing elements",
        "",
        *unit_table(found, [unit for unit in UNITS.values() if unit.kind == "pe"]),
        "",
        "A `bit_serial` PE does 2 products per cycle (4 lanes, 2 terms for BitMoD's data types), the others 1.",
        "`fp16_mac`, `fp16_mac_int8` and `dictionary` add to an FP32 accumulator in one cycle, which sets their clock.",
        "",
        "![LUTs per product, and clocks, of the processing elements](processing-elements.png)",
        "",
        "## Parts of BitMoD's PE",
        "",
        "The papers print the areas of whole PEs and of decoders alone (above), not those of the parts of a PE.",
        "",
        "| part | share of the area |",
        "|---|--:|",
        *(f"| {name.replace('_', ' ')} | {share:.1%} |" for name, share in parts_of_pe(found).items()),
        "",
        "![Parts of BitMoD's PE and of the arrays](parts.png)",
        "",
        "## Arrays",
        "",
        *unit_table(found, [unit for unit in UNITS.values() if unit.kind == "array"]),
        "",
        "An array of 4 rows has a column accumulator for each column, which would serve 8 rows; in larger arrays its",
        "share is half of the one here.",
        "",
        "| array | part | share of the area |",
        "|---|---|--:|",
    ]
    for unit in UNITS.values():
        if (unit.name, "asic") in found and unit.kind == "array":
            for name, share in found[unit.name, "asic"]["parts"].items():
                if share >= 0.005:
                    lines.append(f"| {unit.name} | {name.replace('_', ' ')} | {share:.1%} |")
    lines += [
        "",
        "## Blocks",
        "",
        *unit_table(found, [unit for unit in UNITS.values() if unit.kind == "block"]),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the report; 0, or 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(description="Synthesize every unit and write reports/synthesis.")
    parser.add_argument("--out", type=Path, default=Path("reports/synthesis"))
    parser.add_argument("--runs", type=Path, default=Path("runs/synthesis"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        found = collect(options.runs, options.workers)
        command = f"python -m termwise.flow.synthesis_report --out {options.out}"
        results = list(found.values())
        write_text(options.out / "report.md", report_text(found, command))
        write_text(options.out / "results.json", to_json({"command": command, "results": results}))
        version = yosys_version(results[0]["tools"]["yosys"])
        write_text(baseline_path(options.out, version), baseline_of(results))
        draw(found, options.out)
    except TermwiseError as error:
        console.say(f"error: {error}")
        return 1
    console.print_text(str(options.out / "report.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
