"""Diagrams of the hardware for ``docs/rtl.md``: blocks, and timing as a model of the hardware shows it.

python -m termwise.flow.hardware_figures --out docs/rtl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from termwise.algorithms.files import make_directory
from termwise.algorithms.formats import get_format
from termwise.algorithms.quantize import quantize
from termwise.flow.figures import STYLE, save
from termwise.rtl.accelerator import Accelerator, AcceleratorDesign
from termwise.rtl.array import ArrayDesign
from termwise.rtl.compiled_model import CompiledModel
from termwise.rtl.driver import operand_beats, plan, program_fields
from termwise.rtl.layer_image import layer_image
from termwise.rtl.registers import OFFSETS

Box = tuple[str, float, float, float, float]
Arrow = tuple[tuple[float, float], tuple[float, float], str]

ACCELERATOR_BOXES: Sequence[Box] = (
    ("registers\n(AXI4-Lite)", 0.2, 3.4, 1.7, 0.8),
    ("loader", 0.2, 1.6, 1.7, 0.8),
    ("weight memory\n(two halves)", 2.7, 2.4, 1.9, 0.8),
    ("activation memory\n(two halves)", 2.7, 0.8, 1.9, 0.8),
    ("sequencer", 2.7, 3.8, 1.9, 0.6),
    ("array", 5.4, 1.2, 1.7, 2.0),
    ("column accumulators\nand output memory", 7.6, 1.2, 1.9, 2.0),
    ("writer", 7.6, 3.6, 1.9, 0.6),
)
ACCELERATOR_ARROWS: Sequence[Arrow] = (
    ((-0.5, 3.8), (0.2, 3.8), "bus"),
    ((-0.5, 2.0), (0.2, 2.0), "operands"),
    ((1.9, 3.9), (2.7, 3.9), "program"),
    ((1.05, 3.4), (1.05, 2.4), "program"),
    ((1.9, 2.2), (2.7, 2.8), ""),
    ((1.9, 1.8), (2.7, 1.2), ""),
    ((3.65, 3.8), (3.65, 3.2), "reads"),
    ((4.6, 4.1), (6.2, 3.2), "terms"),
    ((4.6, 2.8), (5.4, 2.6), ""),
    ((4.6, 1.2), (5.4, 1.7), ""),
    ((7.1, 2.2), (7.6, 2.2), ""),
    ((8.55, 3.2), (8.55, 3.6), ""),
    ((9.5, 3.9), (10.2, 3.9), "outputs"),
)
ARRAY_BOXES: Sequence[Box] = (
    ("row border\nterm generator", 0.2, 2.6, 1.6, 0.8),
    ("row border\nterm generator", 0.2, 1.2, 1.6, 0.8),
    ("column border\nsplit or align", 2.5, 3.9, 1.6, 0.7),
    ("column border\nsplit or align", 5.0, 3.9, 1.6, 0.7),
    ("PE, dequantizer,\nchain link", 2.5, 2.6, 1.6, 0.8),
    ("PE, dequantizer,\nchain link", 5.0, 2.6, 1.6, 0.8),
    ("PE, dequantizer,\nchain link", 2.5, 1.2, 1.6, 0.8),
    ("PE, dequantizer,\nchain link", 5.0, 1.2, 1.6, 0.8),
    ("column accumulator\n(8 rows)", 2.5, 0.0, 1.6, 0.7),
    ("column accumulator\n(8 rows)", 5.0, 0.0, 1.6, 0.7),
)
ARRAY_ARROWS: Sequence[Arrow] = (
    ((1.8, 3.0), (2.5, 3.0), ""),
    ((4.1, 3.0), (5.0, 3.0), ""),
    ((1.8, 1.6), (2.5, 1.6), ""),
    ((4.1, 1.6), (5.0, 1.6), ""),
    ((3.0, 3.9), (3.0, 3.4), ""),
    ((5.5, 3.9), (5.5, 3.4), ""),
    ((3.0, 2.6), (3.0, 2.0), ""),
    ((5.5, 2.6), (5.5, 2.0), ""),
    ((3.8, 2.6), (3.8, 2.0), "chain"),
    ((6.3, 2.6), (6.3, 2.0), "chain"),
    ((3.8, 1.2), (3.8, 0.7), ""),
    ((6.3, 1.2), (6.3, 0.7), ""),
)


def draw_blocks(
    boxes: Sequence[Box], arrows: Sequence[Arrow], size: tuple[float, float], folder: Path, name: str
) -> None:
    """Boxes and arrows."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for text, left, low, width, height in boxes:
            patch = FancyBboxPatch((left, low), width, height, boxstyle="round,pad=0.03", fc="#eef3fa", ec="#4477aa")
            axes.add_patch(patch)
            axes.text(left + width / 2, low + height / 2, text, ha="center", va="center", fontsize=7)
        for begin, end, text in arrows:
            axes.annotate("", xy=end, xytext=begin, arrowprops={"arrowstyle": "-|>", "color": "#444444", "lw": 1})
            if text:
                middle = ((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2 + 0.1)
                axes.text(*middle, text, ha="center", va="bottom", fontsize=6, color="#444444")
        ends = [point for begin, end, _ in arrows for point in (begin, end)]
        ends += [(left + width, low + height) for _, left, low, width, height in boxes]
        ends += [(left, low) for _, left, low, *_ in boxes]
        (left, low), (right, high) = np.min(ends, axis=0), np.max(ends, axis=0)
        axes.set(xlim=(left - 0.2, right + 0.2), ylim=(low - 0.2, high + 0.2), aspect="equal")
        axes.set_axis_off()
        save(figure, folder, name)


def draw_timing(waves: Mapping[str, Any], folder: Path, name: str) -> None:
    """Waves of one clock: bits as lines, numbers as text where they change; ``None`` where they mean nothing."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cycles = max(len(values) for values in waves.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(min(1.6 + 0.42 * cycles, 9.5), 0.3 + 0.3 * len(waves)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for row, (signal, values) in enumerate(waves.items()):
            base = -row
            if any(value is not None and value > 1 for value in values):
                for cycle, value in enumerate(values):
                    if value is None:
                        axes.plot([cycle, cycle + 1], [base + 0.3, base + 0.3], color="#bbbbbb", lw=1)
                        continue
                    axes.fill_between([cycle, cycle + 1], base, base + 0.6, fc="#eef3fa", ec="#4477aa", lw=0.8)
                    axes.text(cycle + 0.5, base + 0.3, f"{value:x}", ha="center", va="center", fontsize=5)
            else:
                levels = np.repeat([base + 0.6 * (value or 0) for value in values], 2)
                axes.plot(np.repeat(np.arange(len(values) + 1), 2)[1:-1], levels, color="#4477aa", lw=1.2)
            axes.text(-0.2, base + 0.3, signal, ha="right", va="center", fontsize=6.5, family="monospace")
        for cycle in range(cycles + 1):
            axes.axvline(cycle, color="#dddddd", lw=0.5, zorder=0)
        axes.set_xlim(0, cycles)
        axes.set_axis_off()
        save(figure, folder, name)


def _shown(valid: Iterable[int], values: Iterable[int]) -> list[Any]:
    return [int(value) if there else None for there, value in zip(valid, values, strict=True)]


def draw_all(folder: Path) -> None:
    """Every diagram."""
    make_directory(folder)
    draw_blocks(ACCELERATOR_BOXES, ACCELERATOR_ARROWS, (8.2, 3.9), folder, "accelerator")
    draw_blocks(ARRAY_BOXES, ARRAY_ARROWS, (6.4, 4.4), folder, "array")
    design = AcceleratorDesign(array=ArrayDesign(rows=2, columns=2, types=("bitmod_fp4",)))
    model = CompiledModel(Accelerator(design), streams=("operands", "outputs", "interrupt"))
    # Registers: a write, then a read of the same one.
    offset, cycles = OFFSETS["chunk_steps"], 8
    write, read = [1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]
    ports: dict[str, Any] = {
        "bus__awvalid": write,
        "bus__wvalid": write,
        "bus__awaddr": offset,
        "bus__wdata": 0x20,
        "bus__wstrb": 15,
        "bus__bready": [0, 1, 1, 0, 0, 0, 0, 0],
        "bus__arvalid": read,
        "bus__araddr": offset,
        "bus__rready": [0, 0, 0, 0, 0, 0, 1, 0],
    }
    found = model.run(ports, cycles)
    waves: dict[str, Any] = {
        "awvalid, wvalid": write,
        "awready, wready": found["bus__awready"],
        "awaddr": _shown(write, [offset] * cycles),
        "wdata": _shown(write, [0x20] * cycles),
        "bvalid": found["bus__bvalid"],
        "bready": ports["bus__bready"],
        "arvalid": read,
        "arready": found["bus__arready"],
        "araddr": _shown(read, [offset] * cycles),
        "rvalid": found["bus__rvalid"],
        "rready": ports["bus__rready"],
        "rdata": _shown(found["bus__rvalid"], found["bus__rdata"]),
    }
    draw_timing(waves, folder, "timing-registers")
    # A layer of one tile: operands with a gap, outputs with a wait.
    random = np.random.default_rng(0)
    tensor = quantize(random.standard_normal((2, 8)).astype(np.float32), get_format("bitmod-w4g8"))
    image = layer_image(design.array, tensor, random.standard_normal((2, 8)).astype(np.float16))
    schedule = plan(design, image)
    registers = program_fields(design, image, schedule)
    for name, value in registers.items():
        _write(model, OFFSETS[name], value)
    for place in range(len([name for name in OFFSETS if name.startswith("layer_")])):
        _write(model, OFFSETS[f"layer_{place}"], image.layer >> 32 * place & 0xFFFFFFFF)
    _write(model, OFFSETS["control"], 1)
    beats = [int(beat) for beat in np.concatenate(operand_beats(design, image, schedule))]
    sent: list[tuple[int, int, int]] = []
    place = 0
    for cycle in range(24):
        valid = int(place < len(beats) and cycle not in (6, 7))
        beat = beats[place] if valid else 0
        ready = int(model.run({"operands__valid": valid, "operands__payload": beat}, 1)["operands__ready"][0])
        sent.append((valid, ready, beat & 0xFFFF))
        place += valid & ready
    valids, readies, values = zip(*sent, strict=True)
    waves = {
        "operands.valid": valids,
        "operands.ready": readies,
        "payload[15:0]": _shown(valids, values),
    }
    draw_timing(waves, folder, "timing-operands")
    # The memory of outputs is read once the tile is done; the taker waits for two cycles.
    for _ in range(400):
        if model.run({}, 1)["outputs__valid"][0]:
            break
    takes = [0, 0, 1, 1, 1, 1, 1, 1]
    found = model.run({"outputs__ready": takes}, len(takes))
    payload = [int(value) for value in found["outputs__payload"]]
    waves = {
        "outputs.valid": found["outputs__valid"],
        "outputs.ready": takes,
        "data[15:0]": _shown(found["outputs__valid"], [value & 0xFFFF for value in payload]),
        "last": [
            value >> 32 & 1 if valid else 0 for value, valid in zip(payload, found["outputs__valid"], strict=True)
        ],
    }
    draw_timing(waves, folder, "timing-outputs")


def _write(model: CompiledModel, offset: int, value: int) -> None:
    ports = {
        "bus__awaddr": offset,
        "bus__wdata": value,
        "bus__wstrb": 15,
        "bus__awvalid": 1,
        "bus__wvalid": 1,
    }
    model.run(ports, 1)
    model.run({"bus__bready": 1}, 1)


def main(arguments: Sequence[str]) -> int:
    """Draw into the folder of ``--out``."""
    parser = argparse.ArgumentParser(description="Draw the diagrams of docs/rtl.md.")
    parser.add_argument("--out", type=Path, default=Path("docs/rtl"))
    draw_all(parser.parse_args(arguments).out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
