"""A component as RTLIL, yosys' own language, with one module for all instances that are alike.

Amaranth writes a module for each instance. Here those with the same content become one, named after the first: an array
of 64 PEs has one module of a PE, in Verilog that people read, in models that are compiled, and in reports per unit.
"""

from __future__ import annotations

import re
import warnings

from amaranth._toolchain.yosys import find_yosys
from amaranth.back import rtlil
from amaranth.lib import wiring

_MODULE = re.compile(r"^((?:attribute [^\n]*\n)*)module \\(\S+)\n(.*?)^end\n", re.MULTILINE | re.DOTALL)
_CELL = re.compile(r"^(\s*cell \\)(\S+)( )", re.MULTILINE)
_FIELD = re.compile(r"\\[A-Za-z_][\w$]*(?:\[\d+\]|\.[\w$]+)+")
"""A field of a structure. ``outputs[1]`` would be taken for bit 1 of ``outputs`` by yosys, which then joins the two."""

_YOSYS = (0, 40)


def netlist(component: wiring.Component, name: str) -> str:
    """RTLIL of ``component``, its modules named ``name`` and ``name`` _ path of their first instance."""
    text = rtlil.convert(component, name=name, emit_src=False)
    modules = {module: (attributes, body) for attributes, module, body in _MODULE.findall(text)}
    representative: dict[str, str] = {}
    known: dict[str, str] = {}

    def body_of(module: str) -> str:
        """The content of ``module`` with the representatives of what it contains."""
        return _CELL.sub(lambda cell: f"{cell[1]}{resolve(cell[2])}{cell[3]}", modules[module][1])

    def resolve(module: str) -> str:
        if module not in modules:
            return module  # a cell of yosys'
        if module not in representative:
            body = body_of(module)
            representative[module] = known.setdefault(body, module.replace(".", "_"))
            contents[representative[module]] = (modules[module][0], body)
        return representative[module]

    contents: dict[str, tuple[str, str]] = {}
    resolve(name)
    text = "".join(f"{attributes}module \\{module}\n{body}end\n" for module, (attributes, body) in contents.items())
    return _FIELD.sub(lambda found: re.sub(r"[\[.]", "__", found[0]).replace("]", ""), text)


def run_yosys(text: str, commands: str) -> str:
    """What Amaranth's own yosys prints for ``commands`` on the RTLIL ``text``."""
    yosys = find_yosys(lambda version: version >= _YOSYS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that modules need several passes to settle
        found: str = yosys.run(["-q", "-"], f"read_rtlil <<rtlil\n{text}\nrtlil\n{commands}", src_loc_at=1)
    return found
