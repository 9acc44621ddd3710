"""Layer kinds of a simulation (queries, keys and values; attention scores; ...; down; head) and the roofline they meet.

Names of linear layers decide their kind: those of the families of ``algorithms.shapes``, and the usual ones of
encoders. A layer of another name is a kind of its own.

**Roofline** (Williams, Waterman and Patterson, CACM 2009). A kind of m multiplications that moves b bytes to and from
external memory has the intensity m / b. It cannot do more multiplications per second than the array has at its peak,
rows × columns × lanes / cycles per step, nor more than its intensity × the bandwidth of external memory.

**Bound by.** The channel to external memory works while the array does, so a kind that waits for weights in a third of
its cycles is bound by them if the channel is busy in all of them. A kind is bound by ``compute`` where the array is
busy in at least as many cycles as the channel needs for the traffic at its peak, and as any stall takes; else by the
cause of most stalls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from termwise.algorithms.formats import get_format
from termwise.algorithms.shapes import FAMILIES
from termwise.algorithms.workload import PHASES, Phase, check_phase
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
    """All products of one kind, or of the whole model.

    ``channel_cycles`` are the cycles that external memory takes for the traffic at its peak.
    """

    name: str
    multiplications: int
    totals: Totals
    channel_cycles: float

    @property
    def bound_by(self) -> str:
        """What takes the time (see the module); a dash where there is no cycle."""
        totals = self.totals
        if not totals.cycles:
            return "–"
        cause, most = max(totals.stalls.items(), key=lambda entry: entry[1], default=("compute", 0))
        return "compute" if totals.busy >= max(self.channel_cycles, most) else cause

    @property
    def channel_share(self) -> float:
        """Share of the cycles that external memory needs at its peak; 0 where there is no cycle."""
        return self.channel_cycles / self.totals.cycles if self.totals.cycles else 0.0

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
            "channel_share": self.channel_share,
            "bound_by": self.bound_by,
        }


def multiplications_of(layer: Mapping[str, Any]) -> int:
    """Scalar multiplications of an entry of ``layers``."""
    if "multiplications" in layer:
        return int(layer["multiplications"])
    return int(layer["tokens"] * layer["reduction"] * layer["outputs"] * layer["repeats"])


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


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A simulation by layer kind.

    Attributes:
        document: of ``sim.generation``.
        kinds: in the order of execution. Vector operations, where they are simulated, are a kind of their own.
        phases: of a generation; else empty.
        total: the whole document as one kind.
        roofline: a point for every kind that multiplies and moves something.
    """

    document: Mapping[str, Any]
    kinds: tuple[LayerKind, ...]
    phases: tuple[LayerKind, ...]
    total: LayerKind
    roofline: Roofline

    def to_dict(self) -> dict[str, Any]:
        """The document with ``layer_kinds`` and ``roofline``, JSON-ready."""
        return {
            **self.document,
            "layer_kinds": [kind.to_dict() for kind in self.kinds],
            "roofline": self.roofline.to_dict(),
        }


def analyse(document: Mapping[str, Any], accelerator: Accelerator, head: str | None) -> Analysis:
    """The simulation by layer kind; ``head`` is the name of the layer of the logits, where there is one."""
    bytes_per_cycle = memory_bytes_per_cycle(accelerator)

    def kind(name: str, layers: Iterable[Mapping[str, Any]], totals: Totals) -> LayerKind:
        return LayerKind(
            name=name,
            multiplications=sum(map(multiplications_of, layers)),
            totals=totals,
            channel_cycles=totals.traffic_bytes / bytes_per_cycle,
        )

    members: dict[str, list[Mapping[str, Any]]] = {}
    for layer in document["layers"]:
        members.setdefault(kind_of(layer["name"], layer["operand"], head), []).append(layer)
    others = [name for name in members if name not in _ORDER and name != HEAD]
    kinds = [
        kind(name, members[name], summed(map(totals_of, members[name])))
        for name in (*_ORDER, *others, HEAD)
        if name in members
    ]
    points = tuple(entry for entry in kinds if entry.multiplications and entry.totals.traffic_bytes)
    if "vector_operations" in document:
        cycles = sum(entry["cycles"] for entry in document["vector_operations"])
        kinds.append(kind(VECTOR, (), Totals().stalled(CAUSE, cycles)))
    generation = document["phase"] == "generation"
    return Analysis(
        document=document,
        kinds=tuple(kinds),
        phases=tuple(
            kind(phase, [layer for layer in document["layers"] if layer["phase"] == phase], totals_of(totals))
            for phase, totals in (document["phases"].items() if generation else ())
        ),
        total=kind("total", document["layers"], totals_of(document)),
        roofline=Roofline(
            memory=memory_name(accelerator),
            bytes_per_cycle=bytes_per_cycle,
            clock_mhz=document["clock_mhz"],
            roofs=tuple(_roofs(document, accelerator, PHASES if generation else (check_phase(document["phase"]),))),
            points=points,
        ),
    )


def memory_name(accelerator: Accelerator) -> str:
    """What the machine's external memory is called."""
    memory = accelerator.memory
    ideal = memory.ideal_bytes_per_cycle
    return memory.name if ideal is None else f"{ideal} bytes per cycle"


def memory_bytes_per_cycle(accelerator: Accelerator) -> float:
    """The most bytes that external memory moves in a cycle of the accelerator."""
    return float(accelerator.memory.peak_bytes_per_second(accelerator.clock_mhz) / (accelerator.clock_mhz * 1_000_000))


def _roofs(document: Mapping[str, Any], accelerator: Accelerator, phases: Iterable[Phase]) -> list[Roof]:
    """The peaks of the array, those that are equal as one."""
    element = accelerator.processing_element
    weights, bits = document["format"], accelerator.key_value_bits
    steps: dict[str, int] = {}  # PE-cycles of a step: of all PEs that it takes
    for layer in document["layers"]:
        if layer["operand"] == "weight":
            format = get_format(weights)
            steps[weights] = element.cycles_per_step(format) * element.processing_elements_per_product(format)
        else:
            elements = element.key_value_processing_elements_per_product(bits)
            steps[f"{bits}-bit keys and values"] = element.key_value_cycles_per_step(bits) * elements
    names: dict[float, dict[str, None]] = {}
    for phase in phases:
        lanes = accelerator.array(phase).processing_elements * element.lanes
        for name, cycles in steps.items():
            names.setdefault(lanes / cycles, {})[name] = None
    return [Roof(name=", ".join(known), multiplications_per_cycle=peak) for peak, known in names.items()]
