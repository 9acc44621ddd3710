"""Layer kinds of a simulation (queries, keys and values; attention scores; ...; down; head) and the roofline they meet.

Names of linear layers decide their kind: those of the families of ``algorithms.shapes``, and the usual ones of
encoders. A layer of another name is a kind of its own.

**Roofline** (Williams, Waterman and Patterson, CACM 2009). A kind of m multiplications that moves b bytes to and from
external memory has the intensity m / b. It cannot do more multiplications per second than the array has at its peak,
rows × columns × lanes / cycles per step, nor more than its intensity × the bandwidth of external memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from termwise.algorithms.formats import get_format
from termwise.algorithms.shapes import FAMILIES, ModelShape
from termwise.algorithms.workload import PHASES, Phase
from termwise.sim.accelerators import Accelerator
from termwise.sim.totals import Totals, summed, totals_of
from termwise.sim.vector_unit import CAUSE

QUERIES: Final = "queries, keys, values"
SCORES: Final = "attention scores"
ATTENDED: Final = "attention values"
OUTPUT: Final = "attention output"
ROUTER: Final = "router"
UP: Final = "gate and up"
DOWN: Final = "down"
HEAD: Final = "head"
VECTOR: Final = "vector operations"

_OPERAND_KINDS: Final = {"key": SCORES, "value": ATTENDED}


def _kinds_by_suffix() -> dict[str, str]:
    """Kind by the end of a linear layer's name, the longest ends first."""
    found = {
        "attention.self.query": QUERIES,
        "attention.self.key": QUERIES,
        "attention.self.value": QUERIES,
        "attention.output.dense": OUTPUT,
        "intermediate.dense": UP,
        "output.dense": DOWN,
    }
    for family in FAMILIES.values():
        found |= dict.fromkeys(family.query_key_value, QUERIES)
        found |= {family.output: OUTPUT, family.down: DOWN}
        found |= dict.fromkeys(family.up, UP)
        if family.router is not None:
            found[family.router] = ROUTER
    return dict(sorted(found.items(), key=lambda entry: -len(entry[0])))


_SUFFIXES: Final = _kinds_by_suffix()
_ORDER: Final = (QUERIES, SCORES, ATTENDED, OUTPUT, ROUTER, UP, DOWN)


def kind_of(name: str, operand: str, head: str | None) -> str:
    """The kind of the product ``name``, whose ``operand`` is ``weight``, ``key`` or ``value``, of a model's layers."""
    if operand in _OPERAND_KINDS:
        return _OPERAND_KINDS[operand]
    if name == head:
        return HEAD
    return next((kind for end, kind in _SUFFIXES.items() if name == end or name.endswith(f".{end}")), name)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """All products of one kind, or of the whole model."""

    name: str
    multiplications: int
    totals: Totals

    @property
    def multiplications_per_byte(self) -> float | None:
        """Arithmetic intensity: MACs per byte of external traffic; None where nothing is moved."""
        return self.multiplications / self.totals.traffic_bytes if self.totals.traffic_bytes else None

    @property
    def multiplications_per_cycle(self) -> float | None:
        """Achieved MACs per cycle, waiting included; None where there is no cycle."""
        return self.multiplications / self.totals.cycles if self.totals.cycles else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "multiplications": self.multiplications,
            **self.totals.to_dict(),
            "multiplications_per_byte": self.multiplications_per_byte,
            "multiplications_per_cycle": self.multiplications_per_cycle,
            "bound_by": self.totals.bound_by,
        }


def multiplications_of(layer: Mapping[str, Any]) -> int:
    """Scalar multiplications of an entry of ``layers``."""
    if "multiplications" in layer:
        return int(layer["multiplications"])
    return int(layer["tokens"] * layer["reduction"] * layer["outputs"] * layer["repeats"])


def layer_kinds(document: Mapping[str, Any], head: str | None, *, phase: str | None = None) -> list[LayerKind]:
    """The kinds of a simulation in the order of execution; of a generation those of one ``phase``, where it is given.

    ``head`` is the name of the layer of the logits. Vector operations, where they are simulated, are a kind of their
    own (of a whole document only), whose cycles all have the cause ``vector``.
    """
    found: dict[str, tuple[int, Totals]] = {}
    for layer in document["layers"]:
        if phase is None or layer["phase"] == phase:
            kind = kind_of(layer["name"], layer["operand"], head)
            multiplications, totals = found.get(kind, (0, Totals()))
            found[kind] = multiplications + multiplications_of(layer), totals.plus(totals_of(layer))
    others = [kind for kind in found if kind not in _ORDER and kind != HEAD]
    kinds = [
        LayerKind(name=kind, multiplications=found[kind][0], totals=found[kind][1])
        for kind in (*_ORDER, *others, HEAD)
        if kind in found
    ]
    if phase is None and "vector_operations" in document:
        cycles = sum(entry["cycles"] for entry in document["vector_operations"])
        kinds.append(LayerKind(name=VECTOR, multiplications=0, totals=Totals().stalled(CAUSE, cycles)))
    return kinds


def whole(document: Mapping[str, Any]) -> LayerKind:
    """The whole document as one kind, called ``total``."""
    multiplications = sum(map(multiplications_of, document["layers"]))
    return LayerKind(name="total", multiplications=multiplications, totals=totals_of(document))


def phase_totals(document: Mapping[str, Any]) -> list[LayerKind]:
    """The phases of a generation."""
    return [
        LayerKind(
            name=phase,
            multiplications=sum(multiplications_of(layer) for layer in document["layers"] if layer["phase"] == phase),
            totals=totals_of(totals),
        )
        for phase, totals in document["phases"].items()
    ]


@dataclass(frozen=True, kw_only=True)
class Roof:
    """The peak of the array for one operand in one phase, or several with the same peak."""

    name: str
    multiplications_per_cycle: float


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Roofs and points. MACs per cycle; times ``clock_mhz`` they are millions per second."""

    memory: str
    bytes_per_cycle: float
    clock_mhz: int
    roofs: tuple[Roof, ...]
    points: tuple[LayerKind, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the points, which are in ``layer_kinds``."""
        return {
            "memory": self.memory,
            "bytes_per_cycle": self.bytes_per_cycle,
            "roofs": [
                {"name": roof.name, "multiplications_per_cycle": roof.multiplications_per_cycle} for roof in self.roofs
            ],
        }


def roofline(document: Mapping[str, Any], accelerator: Accelerator, head: str | None) -> Roofline:
    """The roofline of a simulation: a point for every kind that multiplies and moves something."""
    phases = PHASES if document["phase"] == "generation" else [p for p in PHASES if p == document["phase"]]
    operands = {layer["operand"] for layer in document["layers"]}
    points = [kind for kind in layer_kinds(document, head) if kind.multiplications and kind.totals.traffic_bytes]
    return Roofline(
        memory=memory_name(accelerator),
        bytes_per_cycle=memory_bytes_per_cycle(accelerator),
        clock_mhz=document["clock_mhz"],
        roofs=tuple(_roofs(document["format"], accelerator, phases, attention=bool(operands - {"weight"}))),
        points=tuple(points),
    )


def memory_name(accelerator: Accelerator) -> str:
    """What the machine's external memory is called."""
    return f"{accelerator.dram_bytes_per_cycle} bytes per cycle"


def memory_bytes_per_cycle(accelerator: Accelerator) -> float:
    """The most bytes that external memory moves in a cycle of the accelerator."""
    return accelerator.dram_bytes_per_cycle


def _roofs(weights: str, accelerator: Accelerator, phases: Iterable[Phase], *, attention: bool) -> list[Roof]:
    """The peaks of the array, those that are equal as one."""
    element = accelerator.processing_element
    names: dict[float, list[str]] = {}
    for phase in phases:
        lanes = accelerator.array(phase).processing_elements * element.lanes
        steps = {weights: element.cycles_per_step(get_format(weights))}
        if attention:
            bits = accelerator.key_value_bits
            steps[f"{bits}-bit keys and values"] = element.key_value_cycles_per_step(bits)
        for name, cycles in steps.items():
            known = names.setdefault(lanes / cycles, [])
            if name not in known:
                known.append(name)
    return [Roof(name=", ".join(known), multiplications_per_cycle=peak) for peak, known in names.items()]
