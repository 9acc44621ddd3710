"""Generic gates, for areas that do not depend on a process: in two-input NAND gates.

The area of a gate is its number of transistors in static CMOS over the 4 of a NAND gate: each input of a complementary
gate takes a pair; AND and OR have an inverter behind; XOR, multiplexer and flip-flop are the usual circuits with
transmission gates.
"""

from __future__ import annotations

NAND_TRANSISTORS = 4

TRANSISTORS = {
    "$_NOT_": 2,
    "$_BUF_": 4,
    "$_NAND_": 4,
    "$_NOR_": 4,
    "$_AND_": 6,
    "$_OR_": 6,
    "$_AOI3_": 6,
    "$_OAI3_": 6,
    "$_XOR_": 10,
    "$_XNOR_": 10,
    "$_MUX_": 12,
    "$_DFF_P_": 24,
}
"""By yosys' names of gates."""

FLIP_FLOP = "$_DFF_P_"
GATES = "AND,NAND,OR,NOR,XOR,XNOR,MUX,AOI3,OAI3"
"""What ABC may use beside inverters."""


def gate_area(gate: str, count: int) -> float:
    """Area of ``count`` gates in NAND gates. Raises ``KeyError`` for another gate."""
    return count * TRANSISTORS[gate] / NAND_TRANSISTORS
