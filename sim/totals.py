"""Sums of what simulations say: cycles with their causes, traffic and energy of products, phases and generations.

The causes of stalls, the kinds of traffic and the parts of the energy are read from the documents
(``Simulation.to_dict``), so that a new one is summed and shown without a change here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_TRAFFIC = "traffic_bytes"


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Cycles, bytes and energy of work that runs one after the other.

    Attributes:
        cycles, busy: cycles, and those of them in which the array computes.
        stalls: the other cycles by cause.
        traffic: bytes to and from external memory by the key of the documents (``traffic_bytes`` is the whole).
        energy_uj: by part, with ``total``; None where it is not known.
        useful_cycles: ``cycles`` × the share of PE-cycles that computed an output that was asked for.
    """

    cycles: int = 0
    busy: int = 0
    stalls: Mapping[str, int] = field(default_factory=dict)
    traffic: Mapping[str, int] = field(default_factory=dict)
    energy_uj: Mapping[str, float | None] = field(default_factory=dict)
    useful_cycles: float = 0.0

    @property
    def pe_utilization(self) -> float:
        """Share of all PE-cycles that computed an output that was asked for; 0 where there is no cycle."""
        return self.useful_cycles / self.cycles if self.cycles else 0.0

    @property
    def causes(self) -> dict[str, int]:
        """All cycles by cause: ``busy``, then the stalls. They sum to ``cycles``."""
        return {"busy": self.busy, **self.stalls}

    @property
    def traffic_bytes(self) -> int:
        """All bytes to and from external memory."""
        return self.traffic.get(_TRAFFIC, 0)

    def times(self, repeats: int) -> Totals:
        """The same work ``repeats`` times."""
        return Totals(
            cycles=repeats * self.cycles,
            busy=repeats * self.busy,
            stalls={cause: repeats * cycles for cause, cycles in self.stalls.items()},
            traffic={key: repeats * count for key, count in self.traffic.items()},
            energy_uj={part: None if uj is None else repeats * uj for part, uj in self.energy_uj.items()},
            useful_cycles=repeats * self.useful_cycles,
        )

    def plus(self, other: Totals) -> Totals:
        """This work and then the ``other``. An energy that is not known of one is not known of both."""
        energy: dict[str, float | None] = dict(self.energy_uj)
        for part, uj in other.energy_uj.items():
            mine = energy.get(part, 0.0)
            energy[part] = None if mine is None or uj is None else mine + uj
        return Totals(
            cycles=self.cycles + other.cycles,
            busy=self.busy + other.busy,
            stalls=_added(self.stalls, other.stalls),
            traffic=_added(self.traffic, other.traffic),
            energy_uj=energy,
            useful_cycles=self.useful_cycles + other.useful_cycles,
        )

    def stalled(self, cause: str, cycles: int) -> Totals:
        """This work and ``cycles`` more in which the array waits for ``cause``; leakage goes on meanwhile."""
        energy = dict(self.energy_uj)
        leakage, total = energy.get("leakage"), energy.get("total")
        if leakage is not None and self.cycles:
            more = leakage * cycles / self.cycles
            energy["leakage"] = leakage + more
            energy["total"] = None if total is None else total + more
        return Totals(
            cycles=self.cycles + cycles,
            busy=self.busy,
            stalls=_added(self.stalls, {cause: cycles}),
            traffic=self.traffic,
            energy_uj=energy,
            useful_cycles=self.useful_cycles,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys that ``totals_of`` reads."""
        return {
            "cycles": self.cycles,
            "busy": self.busy,
            "stalls": dict(self.stalls),
            **self.traffic,
            "energy_uj": dict(self.energy_uj),
            "pe_utilization": self.pe_utilization,
        }


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Sums by key, in the order of the keys' first appearance."""
    return {key: one.get(key, 0) + other.get(key, 0) for key in (*one, *(key for key in other if key not in one))}


def totals_of(document: Mapping[str, Any]) -> Totals:
    """The totals in the document of a simulation, or in one of its ``layers``."""
    return Totals(
        cycles=document["cycles"],
        busy=document["busy"],
        stalls=document["stalls"],
        traffic={key: value for key, value in document.items() if key.endswith(_TRAFFIC)},
        energy_uj=document["energy_uj"],
        useful_cycles=document["pe_utilization"] * document["cycles"],
    )


def summed(totals: Iterable[Totals]) -> Totals:
    """All of them one after the other."""
    result = Totals()
    for entry in totals:
        result = result.plus(entry)
    return result
