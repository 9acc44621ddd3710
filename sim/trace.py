"""What happened when, as files that viewers open: a timeline of a product and the signals of one tile.

``timeline.json`` is in the trace event format of Chrome, which https://ui.perfetto.dev opens: a track for the array, in
which each span of cycles has one cause, and one for the channel, with a span for each request. ``tile.vcd`` is a value
change dump, which GTKWave and Surfer open: the sequencer and every PE of one tile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from termwise.algorithms.files import write_text, written_beside
from termwise.sim.cycle import CycleCount, ValueTiming
from termwise.sim.cycle_reference import Cycle, run_tile_program_by_cycles
from termwise.sim.kernels import DramTiming, TileProgram
from termwise.sim.tile_run import Change, TileRun

ARRAY, CHANNEL = "array", "channel"
_THREADS = {ARRAY: 1, CHANNEL: 2}
_PROCESS = 1


@dataclass(frozen=True)
class Interval:
    """Cycles ``begin`` to ``end`` (not included) of a ``unit``, the array or the channel, that are one thing."""

    unit: str
    name: str
    begin: int
    end: int
    arguments: dict[str, int]


@dataclass
class _Recorder:
    """Joins the cycles of a unit that are alike."""

    intervals: list[Interval] = field(default_factory=list)
    _open: dict[str, tuple[Any, str, int, dict[str, int]]] = field(default_factory=dict)
    _cycle: int = 0

    def __call__(self, cycle: Cycle) -> None:
        """Take the next cycle."""
        place = {"tile": cycle.tile, "chunk": cycle.chunk}
        self._take(ARRAY, (cycle.cause, cycle.chunk), cycle.cause, place)
        self._take(CHANNEL, cycle.request if cycle.transfer else None, cycle.transfer, {"bytes": cycle.bytes})
        self._cycle += 1

    def _take(self, unit: str, key: Any, name: str | None, arguments: dict[str, int]) -> None:
        before = self._open.get(unit)
        if before is not None and before[0] == key:
            return
        self._close(unit)
        if name is not None:
            self._open[unit] = (key, name, self._cycle, arguments)

    def _close(self, unit: str) -> None:
        found = self._open.pop(unit, None)
        if found is not None:
            _, name, begin, arguments = found
            self.intervals.append(Interval(unit, name, begin, self._cycle, arguments))

    def finish(self) -> list[Interval]:
        """All intervals, in the order of their ends."""
        for unit in _THREADS:
            self._close(unit)
        return self.intervals


def timeline(
    program: TileProgram,
    *,
    memory: DramTiming | None = None,
    values: ValueTiming | None = None,
    most_cycles: int | None = None,
) -> tuple[list[Interval], CycleCount]:
    """The intervals of a product up to ``most_cycles``, and its counts up to then; one cycle at a time."""
    recorder = _Recorder()
    count = run_tile_program_by_cycles(program, memory=memory, values=values, observe=recorder, most_cycles=most_cycles)
    return recorder.finish(), count


def write_timeline(path: Path, intervals: Iterable[Interval], *, title: str, clock_mhz: int) -> None:
    """Write ``intervals`` in the trace event format; times are µs at ``clock_mhz``. Raises ``InputError``."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": title}},
        *(
            {"ph": "M", "pid": _PROCESS, "tid": thread, "name": "thread_name", "args": {"name": unit}}
            for unit, thread in _THREADS.items()
        ),
        *(
            {
                "ph": "X",
                "pid": _PROCESS,
                "tid": _THREADS[interval.unit],
                "name": interval.name,
                "cat": interval.unit,
                "ts": interval.begin / clock_mhz,
                "dur": (interval.end - interval.begin) / clock_mhz,
                "args": {"begin_cycle": interval.begin, "end_cycle": interval.end, **interval.arguments},
            }
            for interval in intervals
        ),
    ]
    document = {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"clock_mhz": str(clock_mhz)}}
    write_text(path, json.dumps(document) + "\n")


def write_signals(path: Path, run: TileRun, *, comment: str) -> None:
    """Write the signals of a tile as a value change dump with a time step per cycle. Raises ``InputError``.

    Whole numbers are 64-bit two's complement, sums in FP32 are reals, the sequencer's state is a string.
    """
    from vcd import VCDWriter

    changes = sorted(enumerate(run.changes), key=lambda entry: (entry[1].cycle, entry[0]))
    with (
        written_beside(path) as temporary,
        temporary.open("w", encoding="utf-8") as file,
        VCDWriter(file, timescale="1 ns", date="", comment=comment) as writer,
    ):
        variables = {}
        for change in run.changes:
            key = change.scope, change.name
            if key not in variables:
                variables[key] = writer.register_var(change.scope, change.name, **_kind(change))
        for _, change in changes:
            writer.change(variables[change.scope, change.name], change.cycle, change.value)
        writer.flush(run.cycles + 1)


def _kind(change: Change) -> dict[str, Any]:
    if isinstance(change.value, str):
        return {"var_type": "string", "init": ""}
    if isinstance(change.value, float):
        return {"var_type": "real", "init": 0.0}
    return {"var_type": "integer", "size": 64, "init": 0}
