"""Synthesis, place and route of units: what they take on FPGAs and in gates, and how fast they run.

Counts are those of the bare unit. Its clock is that of the unit between registers: every port gets one, so that a path
from a port counts like any other. For iCE40 and Gowin, whose tools want a pin for every port, the registers are one
long shift register. A figure that a target cannot give is None and has a note; one that is missing where it should be
is an error.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.errors import InputError, TermwiseError, unknown_name
from termwise.algorithms.files import write_text
from termwise.rtl.gates import FLIP_FLOP, GATES, TRANSISTORS, gate_area
from termwise.rtl.toolchain import NEXTPNR_ECP5, NEXTPNR_GOWIN, NEXTPNR_ICE40, YOSYS, ToolKind, find
from termwise.rtl.units import Unit
from termwise.rtl.verilog import verilog

YOSYS_TIMEOUT = 900.0
ROUTE_TIMEOUT = 1200.0
FIRST_PIN = 25
"""Of five pins in a row that are inputs and outputs of the GW1NR-9."""

FLOW_VERSION = 1
"""Raised when figures change their meaning."""


SCOPE = "$scopeinfo"
"""A cell of yosys that keeps the name of a module that was flattened, and is nothing."""


class FigureError(TermwiseError):
    """A tool ended well, and a figure is not where it should be."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """An FPGA family, or gates.

    Attributes:
        name: as commands take it.
        summary: the device that is placed and routed, or why none is.
        synthesize: yosys' command, with ``{top}``.
        flat, split: its options for one netlist, and for one of modules, each of which is then synthesized once.
        luts, flip_flops, dsps, brams, carries: how many of each a cell counts for.
        free: cells that come with those.
        router: nextpnr of the family; None where there is none.
        device: its options.
        sizes: the option of the device, for units and for arrays.
        pins: ports of the design that is routed, where the tool wants to know their places.
    """

    name: str
    summary: str
    synthesize: str
    flat: str
    split: str
    luts: Mapping[str, int]
    flip_flops: tuple[str, ...]
    dsps: tuple[str, ...]
    brams: tuple[str, ...]
    carries: tuple[str, ...]
    free: tuple[str, ...] = ()
    router: ToolKind | None = None
    device: tuple[str, ...] = ()
    sizes: tuple[str, str] = ("", "")
    pins: tuple[str, ...] = ()


_XILINX: dict[str, Any] = {
    # Distributed memories and shift registers take LUTs of a slice.
    "luts": {
        **{f"LUT{inputs}": 1 for inputs in range(1, 7)},
        "INV": 1,
        "SRL16E": 1,
        "SRLC32E": 1,
        "RAM32M": 4,
        "RAM32M16": 8,
        "RAM64M": 4,
        "RAM64M8": 8,
        "RAM32X1D": 2,
        "RAM64X1D": 2,
    },
    "flip_flops": ("FDRE", "FDSE", "FDCE", "FDPE"),
    "dsps": ("DSP48E1", "DSP48E2"),
    "brams": ("RAMB18E1", "RAMB36E1", "RAMB18E2", "RAMB36E2"),
    "carries": ("CARRY4", "CARRY8"),
    "free": ("MUXF7", "MUXF8", "MUXF9"),
}
_NO_XILINX = "no place and route: nextpnr has no device of the family, so there is no clock"

_TIMING_FIRST = ("--placer-heap-timingweight", "30", "--placer-heap-critexp", "4")
"""By its defaults the placer leaves a few paths of an array long: three seeds gave 116, 119 and 130 MHz."""

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="ecp5",
            summary="Lattice ECP5, speed grade 6; LFE5U-25F, arrays LFE5U-85F",
            synthesize="synth_ecp5 -top {top}",
            flat="",
            split=" -noflatten",
            # A carry cell and a distributed memory take the LUTs of the slices that they are in.
            luts={"LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 4},
            flip_flops=("TRELLIS_FF",),
            dsps=("MULT18X18D",),
            brams=("DP16KD", "PDPW16KD"),
            carries=("CCU2C",),
            free=("PFUMX", "L6MUX21"),
            router=NEXTPNR_ECP5,
            device=("--package", "CABGA381", "--speed", "6", "--out-of-context", *_TIMING_FIRST),
            sizes=("--25k", "--85k"),
        ),
        Target(
            name="ice40",
            summary="Lattice iCE40 HX8K",
            synthesize="synth_ice40 -top {top}",
            flat="",
            split=" -noflatten",
            luts={"SB_LUT4": 1},
            flip_flops=tuple(
                f"SB_DFF{kind}" for kind in ("", "E", "SR", "R", "SS", "S", "ESR", "ER", "ESS", "ES", "N", "NE")
            ),
            dsps=("SB_MAC16",),
            brams=("SB_RAM40_4K",),
            carries=("SB_CARRY",),
            router=NEXTPNR_ICE40,
            device=("--package", "ct256"),
            sizes=("--hx8k", "--hx8k"),
        ),
        Target(
            name="xc7",
            summary=f"Xilinx 7 series; {_NO_XILINX}",
            synthesize="synth_xilinx -family xc7 -noiopad -noclkbuf -top {top}",
            flat=" -flatten",
            split="",
            **_XILINX,
        ),
        Target(
            name="xcup",
            summary=f"Xilinx UltraScale+; {_NO_XILINX}",
            synthesize="synth_xilinx -family xcup -noiopad -noclkbuf -top {top}",
            flat=" -flatten",
            split="",
            **_XILINX,
        ),
        Target(
            name="gowin",
            summary="Gowin GW1NR-9",
            synthesize="synth_gowin -noiopads -top {top}",
            flat="",
            split=" -noflatten",
            luts={
                **{f"LUT{inputs}": 1 for inputs in range(1, 5)},
                "INV": 1,
                "ALU": 1,
                "RAM16SDP4": 4,
                "RAM16SDP2": 2,
                "RAM16SDP1": 1,
            },
            flip_flops=tuple(f"DFF{kind}" for kind in ("", "E", "S", "SE", "R", "RE", "P", "PE", "C", "CE")),
            dsps=("MULT9X9", "MULT18X18", "MULT36X36"),
            brams=("SDPB", "SDPX9B", "DPB", "SPB"),
            carries=("ALU",),
            free=("MUX2_LUT5", "MUX2_LUT6", "MUX2_LUT7", "MUX2_LUT8", "GND", "VCC"),
            router=NEXTPNR_GOWIN,
            device=("--device", "GW1NR-LV9QN88PC6/I5", "--vopt", "family=GW1N-9C", "--vopt", "cst=pins.cst"),
            pins=("clk", "rst", "shift_in", "take", "shift_out"),
        ),
        Target(
            name="asic",
            summary="generic gates; areas in two-input NAND gates",
            synthesize="",
            flat="",
            split="",
            luts={},
            flip_flops=(FLIP_FLOP,),
            dsps=(),
            brams=(),
            carries=(),
        ),
    )
}


def get_target(name: str) -> Target:
    """The target of a name. Raises ``InputError`` with the nearest name."""
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]


class Registered(wiring.Component):
    """A unit with a register at every port."""

    def __init__(self, inner: wiring.Component) -> None:
        self.inner = inner
        super().__init__(dict(inner.signature.members.items()))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.inner = self.inner
        for path, member, inside in self.inner.signature.flatten(self.inner):
            outside: Any = self
            for part in path:
                outside = outside[part] if isinstance(part, int) else getattr(outside, part)
            source, sink = (outside, inside) if member.flow is wiring.In else (inside, outside)
            kept = Signal(len(Value.cast(source)), name="kept_" + "__".join(map(str, path)))
            m.d.sync += kept.eq(source)
            m.d.comb += Value.cast(sink).eq(kept)
        return m


class Shifted(wiring.Component):
    """A unit between two shift registers, so that four pins are enough."""

    def __init__(self, inner: wiring.Component) -> None:
        self.inner = inner
        super().__init__({"shift_in": In(1), "take": In(1), "shift_out": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.inner = self.inner
        inputs: list[Value] = []
        outputs: list[Value] = []
        for _, member, port in self.inner.signature.flatten(self.inner):
            (inputs if member.flow is wiring.In else outputs).append(Value.cast(port))
        into = Signal(sum(len(port) for port in inputs))
        out = Signal(sum(len(port) for port in outputs))
        m.d.comb += Cat(*inputs).eq(into)
        m.d.sync += [into.eq(Cat(self.shift_in, into[:-1])), self.shift_out.eq(out[-1])]
        with m.If(self.take):
            m.d.sync += out.eq(Cat(*outputs))
        with m.Else():
            m.d.sync += out.eq(out << 1)
        return m


def fits(unit: Unit, target: Target) -> bool:
    """Whether the target has all that the unit is made of."""
    return not (unit.has_memories and target.name == "asic")


def synthesize(
    unit: Unit,
    target: Target,
    seeds: int,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    conversion: AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Figures of ``unit`` on ``target``: lut, ff, dsp, bram, carry, fmax_mhz, area_nand2, parts, ...

    Args:
        seeds: of place and route; the clock is their median.
        folder: for Verilog, scripts and logs; it is kept.
        progress: is told what is done next.
        conversion: is held while Amaranth converts, which it does for one design at a time.

    Raises ``InputError`` for a unit that the target cannot have, ``MissingToolError``, ``ToolError``, ``FigureError``.
    """
    if not fits(unit, target):
        raise InputError(f"{unit.name} has block memories, which gates are not; expected another target than asic")
    found: dict[str, Any] = dict.fromkeys(
        ("lut", "lut_without_dsp", "ff", "dsp", "bram", "carry", "fmax_mhz", "fmax_mhz_range", "area_nand2", "parts")
    )
    found |= {"unit": unit.name, "target": target.name, "device": target.summary, "seeds": seeds, "notes": []}
    conversion = conversion or nullcontext()
    with conversion:
        text = verilog(unit.build(), unit.name)
    write_text(folder / f"{unit.name}.v", text)
    modules = len(re.findall(r"^module ", text, re.MULTILINE))
    progress(f"{unit.name} on {target.name}: synthesis")
    if target.name == "asic":
        found |= _gates(unit, folder, flat=unit.kind != "array", split=modules > 1)
        found["notes"].append("LUTs, DSPs, block RAMs, carry cells and a clock are not what gates have")
        return found
    # A flat array takes yosys many minutes; its modules, each synthesized once, take one.
    command = target.synthesize + (target.split if unit.kind == "array" else target.flat)
    found |= counted(_cells(unit.name, command.format(top=unit.name), folder, "synthesis"), target)
    if found["dsp"] and unit.kind == "pe" and target.name in ("ecp5", "xc7", "xcup"):
        without = command.format(top=unit.name) + " -nodsp"
        found["lut_without_dsp"] = counted(_cells(unit.name, without, folder, "without_dsp"), target)["lut"]
    if target.router is None:
        found["notes"].append(target.summary.partition("; ")[2])
        return found
    if seeds < 1:
        found["notes"].append("no place and route was asked for")
        return found
    wrapper = Registered if target.name == "ecp5" else Shifted
    with conversion:
        routed = verilog(wrapper(unit.build()), "routed")
    write_text(folder / "routed.v", routed)
    if target.pins:
        places = (f'IO_LOC "{name}" {FIRST_PIN + place};\n' for place, name in enumerate(target.pins))
        write_text(folder / "pins.cst", "".join(places))
    command = command.replace(" -noiopads", "")  # what is placed has pads
    script = f"read_verilog routed.v; {command.format(top='routed')}; flatten; opt_clean; write_json routed.json"
    _yosys(script, folder, "routed")
    clocks = []
    for seed in range(1, seeds + 1):
        progress(f"{unit.name} on {target.name}: place and route, seed {seed} of {seeds}")
        clocks.append(_routed_clock(unit, target, seed, folder))
    found["fmax_mhz"] = round(statistics.median(clocks), 2)
    found["fmax_mhz_range"] = [round(min(clocks), 2), round(max(clocks), 2)]
    return found


def counted(cells: Mapping[str, int], target: Target) -> dict[str, Any]:
    """Figures from the cells of a netlist, by type. Raises ``FigureError`` for a cell that the target does not name."""
    known = {*target.luts, *target.flip_flops, *target.dsps, *target.brams, *target.carries, *target.free}
    unknown = sorted(set(cells) - known)
    if unknown or not cells:
        raise FigureError(f"cells {', '.join(unknown) or '(none)'}; expected those of {target.name} that are counted")

    def total(names: tuple[str, ...]) -> int:
        return sum(cells.get(name, 0) for name in names)

    return {
        "lut": sum(count * cells.get(name, 0) for name, count in target.luts.items()),
        "ff": total(target.flip_flops),
        "dsp": total(target.dsps),
        "bram": total(target.brams),
        "carry": total(target.carries),
        "cells": dict(sorted(cells.items())),
    }


def _yosys(script: str, folder: Path, name: str) -> None:
    find(YOSYS).run(["-q", "-l", f"{name}.log", "-p", script], folder, f"{name}.log", timeout=YOSYS_TIMEOUT)


def statistics_of(path: Path) -> dict[str, Any]:
    """What ``stat -json`` has written. Raises ``FigureError`` where that is not there."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not document["modules"] or not document["design"]["num_cells_by_type"]:
            raise KeyError("num_cells_by_type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FigureError(f"{path}: no counts of cells ({error}); expected what yosys' stat -json writes") from error
    return dict(document)


def cells_of(path: Path) -> dict[str, int]:
    """Cells by type from what ``stat -json`` has written, without instances of the netlist's own modules."""
    document = statistics_of(path)
    own = {name.removeprefix("\\") for name in document["modules"]}
    cells = document["design"]["num_cells_by_type"]
    return {name: count for name, count in cells.items() if name not in own and name != SCOPE}


def _cells(name: str, command: str, folder: Path, step: str) -> dict[str, int]:
    script = f"read_verilog {name}.v; {command}; tee -q -o {step}.json stat -json"
    _yosys(script, folder, step)
    return cells_of(folder / f"{step}.json")


def clock_of(path: Path) -> float:
    """MHz from nextpnr's report. Raises ``FigureError`` where there is none."""
    try:
        clocks = json.loads(path.read_text(encoding="utf-8"))["fmax"]
        return min(float(clock["achieved"]) for clock in clocks.values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FigureError(f"{path}: no clock ({error}); expected what nextpnr's --report writes") from error


def _routed_clock(unit: Unit, target: Target, seed: int, folder: Path) -> float:
    assert target.router is not None
    report = f"report_{seed}.json"
    options = ["--json", "routed.json", "--freq", str(unit.megahertz), "--timing-allow-fail"]
    options += ["--seed", str(seed), "--report", report, "-q"]
    size = target.sizes[unit.kind == "array"]
    device = [size, *target.device] if size else list(target.device)
    find(target.router).run([*device, *options], folder, f"route_{seed}.log", timeout=ROUTE_TIMEOUT)
    return clock_of(folder / report)


def gate_script(top: str, *, flat: bool) -> str:
    """Yosys' commands from Verilog that is read to gates."""
    registers = f"setattr -unset init w:*; dfflegalize -cell {FLIP_FLOP} x"  # they have a reset, no initial value
    synthesis = f"synth {'-flatten ' if flat else ''}-noabc -top {top}"
    return f"{synthesis}; memory_map; opt -full; techmap; {registers}; abc -g {GATES}; opt_clean"


def _gates(unit: Unit, folder: Path, *, flat: bool, split: bool) -> dict[str, Any]:
    """Area in NAND2 gates, and the shares of the modules inside."""
    found: dict[str, Any] = {}
    if flat:
        script = f"read_verilog {unit.name}.v; {gate_script(unit.name, flat=True)}"
        _yosys(f"{script}; tee -q -o gates.json stat -json", folder, "gates")
        found = areas(statistics_of(folder / "gates.json"), unit.name) | {"parts": None}
    if split or not flat:
        script = f"read_verilog {unit.name}.v; {gate_script(unit.name, flat=False)}"
        _yosys(f"{script}; tee -q -o parts.json stat -json", folder, "parts")
        whole = areas(statistics_of(folder / "parts.json"), unit.name)
        found = whole | found | {"parts": whole["parts"]}
    return found


def areas(document: Mapping[str, Any], top: str) -> dict[str, Any]:
    """Area in NAND2 gates, flip-flops, and the share of each module, the top's own logic as ``other``.

    Raises ``FigureError`` for cells that are no gates.
    """
    modules = {name.lstrip("\\"): module for name, module in document["modules"].items()}
    cells = {
        name: {cell.lstrip("\\"): int(count) for cell, count in module["num_cells_by_type"].items() if cell != SCOPE}
        for name, module in modules.items()
    }
    instances: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        instances[name] = instances.get(name, 0) + times
        for cell, count in cells[name].items():
            if cell in modules:
                visit(cell, times * count)

    visit(top, 1)
    own = {}
    for name, times in instances.items():
        gates = {cell: count for cell, count in cells[name].items() if cell not in modules}
        unknown = sorted(set(gates) - set(TRANSISTORS))
        if unknown:
            raise FigureError(f"{name} has cells {', '.join(unknown)}; expected gates")
        own[name] = times * sum(gate_area(gate, count) for gate, count in gates.items())
    total = sum(own.values())
    if not total:
        raise FigureError(f"{top} has no gates")
    parts: dict[str, float] = {}
    for name, area in own.items():
        part = "other" if name == top else re.sub(r"_\d+", "", name.removeprefix(f"{top}_"))
        parts[part] = parts.get(part, 0) + area / total
    parts = {part: round(share, 4) for part, share in sorted(parts.items(), key=lambda item: -item[1]) if share}
    flip_flops = sum(times * cells[name].get(FLIP_FLOP, 0) for name, times in instances.items())
    return {"area_nand2": round(total, 2), "ff": flip_flops, "parts": parts}
