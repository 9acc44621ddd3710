"""Proofs by yosys that a component does what a table says, for every input."""

from __future__ import annotations

import tempfile
from pathlib import Path

from amaranth.back import rtlil
from amaranth.lib import wiring

from termwise.algorithms.errors import TermwiseError
from termwise.rtl.toolchain import YOSYS, ToolError, find

TIMEOUT_SECONDS = 600


class DisprovedError(TermwiseError):
    """A property does not hold; the message has the inputs for which it fails."""


def prove(component: wiring.Component, *, cycles: int = 0) -> None:
    """Proves that the output ``holds`` of ``component`` is 1 for all inputs, by yosys' ``sat``.

    Args:
        component: its only output is ``holds``.
        cycles: after how many cycles it has to be 1, whatever the registers held before; 0 without registers.

    Raises ``DisprovedError`` with a counterexample, ``MissingToolError`` without yosys, ``TermwiseError``
    where it fails.
    """
    tool = find(YOSYS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "design.il").write_text(rtlil.convert(component, name="top", emit_src=False))
        steps = f"-seq {cycles + 1} -prove-skip {cycles} -set rst 0" if cycles else ""
        script = (
            "read_rtlil design.il; hierarchy -top top; proc; flatten; memory_map; opt_clean; async2sync; "
            f"sat -verify -prove holds 1 {steps} -show-inputs"
        )
        failure = ""
        try:
            tool.run(["-q", "-l", "log", "-p", script], folder, "log", timeout=TIMEOUT_SECONDS)
        except ToolError as error:
            failure = str(error)
        log = (folder / "log").read_text() if (folder / "log").exists() else ""
    if "SAT proof finished - no model found: SUCCESS!" in log and not failure:
        return
    if "model found: FAIL!" in log:
        raise DisprovedError(f"{type(component).__name__} is not what its table says: {_counterexample(log)}")
    raise TermwiseError(f"yosys could not prove {type(component).__name__}: {failure or log.strip()[-1000:]}")


def _counterexample(log: str) -> str:
    """The inputs of the model that yosys prints."""
    lines = log[log.rfind("Signal Name") :].splitlines()[2:]
    return ", ".join(f"{words[-4].lstrip(chr(92))} = {words[-3]}" for words in map(str.split, lines) if len(words) >= 4)
