"""Verilog for people who go on with other tools: modules by name, a table of ports, and how to instantiate it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from pathlib import Path
from typing import Any

from amaranth.hdl import Shape
from amaranth.lib import data, wiring

from termwise.algorithms.files import make_directory, write_text
from termwise.rtl.netlist import netlist, run_yosys
from termwise.rtl.units import Unit


def verilog(component: wiring.Component, name: str) -> str:
    """Verilog of ``component`` as the module ``name``, with one module for all instances that are alike."""
    text = run_yosys(netlist(component, name), "proc; opt_expr; opt_clean; write_verilog -noattr")
    return re.sub(r"\A(/\*.*?\*/\n)", "", text, flags=re.DOTALL).lstrip()


def port_table(component: wiring.Component) -> list[dict[str, Any]]:
    """Name, direction, width and fields of every port, ``clk`` and ``rst`` first."""
    rows: list[dict[str, Any]] = [
        {"name": name, "direction": "input", "bits": 1, "signed": False, "fields": ""} for name in ("clk", "rst")
    ]
    for path, member, _ in component.signature.flatten(component):
        shape = Shape.cast(member.shape)
        if shape.width == 0:
            continue
        rows.append(
            {
                "name": "__".join(map(str, path)),
                "direction": "input" if member.flow is wiring.In else "output",
                "bits": shape.width,
                "signed": shape.signed,
                "fields": _fields(member.shape),
            }
        )
    return rows


def _fields(shape: Any) -> str:
    """Fields of a structure with their bits, the lowest first."""
    if isinstance(shape, data.StructLayout):
        parts = []
        for name, field in shape:
            inner = _fields(field.shape)
            if field.width:
                parts.append(
                    f"{name} [{field.offset + field.width - 1}:{field.offset}]" + (f" ({inner})" if inner else "")
                )
        return ", ".join(parts)
    if isinstance(shape, data.ArrayLayout):
        each = Shape.cast(shape.elem_shape).width
        inner = _fields(shape.elem_shape)
        return f"{shape.length} × {each} bits, the first lowest" + (f", each {inner}" if inner else "")
    return ""


def _declared(port: dict[str, Any]) -> str:
    return f"[{port['bits'] - 1}:0] " if port["bits"] > 1 else ""


def instance(name: str, ports: list[dict[str, Any]]) -> str:
    """A template of an instance: wires, then the instance."""
    wires = "".join(f"wire {_declared(port)}{port['name']};\n" for port in ports)
    connections = ",\n".join(f"    .{port['name']}({port['name']})" for port in ports)
    return f"{wires}\n{name} {name}_instance (\n{connections}\n);\n"


def document(unit: Unit, component: Any, ports: list[dict[str, Any]]) -> str:
    """The unit in words: what it is, how long it takes, its ports."""
    latency = getattr(component, "latency", None)
    lines = [f"# {unit.name}", "", f"{unit.summary}.", ""]
    text = (type(component).__doc__ or "").strip().split("\n\n")
    lines += [re.sub(r"``", "`", " ".join(text[0].split())), ""]
    if latency is not None:
        lines += [f"* latency: {latency} cycles", "* throughput: one operand per cycle"]
    if unit.products_per_cycle is not None:
        lines.append(f"* products per cycle: {unit.products_per_cycle}")
    lines += ["* one clock, `clk`; `rst` is synchronous and active high", ""]
    lines += ["| port | direction | bits | signed | fields |", "|---|---|--:|---|---|"]
    for port in ports:
        cells = (
            f"`{port['name']}`",
            port["direction"],
            str(port["bits"]),
            "yes" if port["signed"] else "",
            port["fields"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_unit(unit: Unit, folder: Path) -> list[Path]:
    """Write ``<name>.v``, ``<name>_instance.v`` and ``<name>.md`` into ``folder``; equal units give equal bytes.

    Raises ``InputError`` where the folder cannot be written.
    """
    component = unit.build()
    text = verilog(component, unit.name)
    used = [
        port for port in port_table(component) if re.search(rf"^\s*(in|out)put .*\b{port['name']};", text, re.MULTILINE)
    ]
    digest = hashlib.sha256(text.encode()).hexdigest()
    header = (
        f"// {unit.name}: {unit.summary}\n"
        f"// termwise {importlib.metadata.version('termwise')}, Amaranth {importlib.metadata.version('amaranth')}\n"
        f"// SHA-256 of what follows: {digest}\n"
    )
    make_directory(folder)
    files = {
        folder / f"{unit.name}.v": header + text,
        folder / f"{unit.name}_instance.v": instance(unit.name, used),
        folder / f"{unit.name}.md": document(unit, component, used),
    }
    for path, content in files.items():
        write_text(path, content)
    return list(files)
