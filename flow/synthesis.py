"""Synthesis as records: each unit on each target once, whoever asks; compared with a baseline per version of yosys."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from termwise.algorithms.errors import InputError, MissingToolError, TermwiseError
from termwise.flow.records import Record, RecordStore, record_digest, to_json
from termwise.rtl.synthesis import FLOW_VERSION, Target, synthesize
from termwise.rtl.toolchain import YOSYS, find
from termwise.rtl.units import Unit
from termwise.rtl.verilog import verilog

SHOWN = ("lut", "lut_without_dsp", "ff", "dsp", "bram", "carry", "fmax_mhz", "area_nand2")
"""Figures of a table."""

_CONVERSION = threading.Lock()
"""Amaranth converts one design at a time."""

TOLERANCES: Mapping[str, float] = {
    "lut": 0.03,
    "lut_without_dsp": 0.03,
    "ff": 0.0,
    "dsp": 0.0,
    "bram": 0.0,
    "carry": 0.03,
    "area_nand2": 0.03,
    "fmax_mhz": 0.10,
}
"""By how much a figure may be worse than its baseline. A clock depends on the seeds, by about a tenth."""


def tool_versions(target: Target) -> dict[str, str]:
    """What synthesizes for a target. Raises ``MissingToolError``."""
    kinds = [YOSYS, *([target.router] if target.router else [])]
    return {kind.native: find(kind).version for kind in kinds}


@dataclass(frozen=True)
class Synthesizer:
    """Figures from the records below ``folder``, or from the tools.

    Attributes:
        folder: of records, Verilog and logs.
        seeds: of place and route.
        warn: is told of records that cannot be trusted.
        progress: is told what is done next.
    """

    folder: Path
    seeds: int
    warn: Callable[[str], None]
    progress: Callable[[str], None] = lambda _: None

    def figures(self, unit: Unit, target: Target) -> dict[str, Any]:
        """Figures of a unit on a target; the record is written as soon as they are there.

        Raises ``MissingToolError``, and ``TermwiseError`` where a tool fails; the record then has the error.
        """
        with _CONVERSION:
            text = verilog(unit.build(), unit.name)
        inputs = {
            "flow": FLOW_VERSION,
            "unit": unit.name,
            "verilog": hashlib.sha256(text.encode()).hexdigest(),
            "megahertz": unit.megahertz,
            "target": target.name,
            "device": (*target.sizes, *target.device),
            "seeds": self.seeds if target.router else 0,
            "tools": tool_versions(target),
        }
        store = RecordStore(self.folder, self.warn)
        digest = record_digest("synthesis", inputs)
        known = store.load("synthesis", digest)
        if known is not None and known.status == "done":
            return dict(known.outputs)
        place = self.folder / "work" / f"{unit.name}-{target.name}-{digest[:8]}"
        begin = time.monotonic()
        try:
            found = synthesize(unit, target, self.seeds, place, self.progress, _CONVERSION)
        except (InputError, MissingToolError):  # nothing was tried
            raise
        except TermwiseError as error:
            store.save(Record(kind="synthesis", inputs=inputs, status="failed", error=str(error)))
            raise
        found |= {"tools": inputs["tools"], "seconds": round(time.monotonic() - begin, 1), "digest": digest}
        store.save(Record(kind="synthesis", inputs=inputs, status="done", outputs=found))
        return found


def yosys_version(text: str) -> str:
    """``0.66`` of what yosys says. Raises ``TermwiseError`` where there is no version."""
    found = re.search(r"\d+\.\d+", text)
    if found is None:
        raise TermwiseError(f"yosys says {text!r}; expected a version")
    return found[0]


def baseline_path(folder: Path, version: str) -> Path:
    """Where the baseline of a version of yosys is kept."""
    return folder / f"baseline-yosys-{version}.json"


def baseline_of(results: Iterable[Mapping[str, Any]]) -> str:
    """The JSON text of a baseline."""
    return to_json({f"{entry['unit']} {entry['target']}": {name: entry[name] for name in SHOWN} for entry in results})


def compare(results: Iterable[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Every figure beside its baseline: ``{unit, target, figure, baseline, found, worse}``.

    Raises ``InputError`` where there is no baseline of the version or of a unit.
    """
    rows = []
    for entry in results:
        path = baseline_path(folder, yosys_version(entry["tools"]["yosys"]))
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"no baseline {path}; expected one for this version of yosys") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}); expected a baseline") from error
        key = f"{entry['unit']} {entry['target']}"
        if key not in known:
            raise InputError(f"{path} has no figures of {key}; expected a baseline with them")
        for name, tolerance in TOLERANCES.items():
            before, now = known[key].get(name), entry[name]
            if before is None or now is None:
                continue
            worse = now < before * (1 - tolerance) if name == "fmax_mhz" else now > before * (1 + tolerance)
            rows.append(
                {
                    "unit": entry["unit"],
                    "target": entry["target"],
                    "figure": name,
                    "baseline": before,
                    "found": now,
                    "worse": bool(worse),
                }
            )
    return rows
