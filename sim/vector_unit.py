"""A vector unit beside the array: cycles of softmax, norms, rotary embeddings, activation functions and the like.

No paper that is simulated here describes such a unit, so this one is termwise's own and off by default. It has
``lanes`` lanes; in each cycle a lane takes one number and does one comparison, one multiplication with addition, or
one look-up in a table of a function (exponential, reciprocal, SiLU, tanh) with linear interpolation. An operation on a
vector of n numbers makes ``PASSES`` passes over it, each of ceil(n / lanes) cycles. A vector is that of all tokens and
sequences together, as ``algorithms.workload.vector_operations`` lists it; passes follow each other without a gap.

**In turn with the array.** While the unit works the array waits (cause ``vector``). The reason is what the operations
wait for: a softmax needs the whole row of scores, a norm the whole row of features, and the next product needs their
results. Between tokens and heads there is room for overlap, which a scheduler of one's own may use; so the cycles here
are the most that such a unit adds.

**Not modelled**: the unit's pipeline, its energy, and traffic: operands are taken to pass through the activation
buffer, whose reads and writes for them are not counted. Choosing experts and tokens is left out, as in the workload.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from termwise.algorithms.workload import VectorOperation, check_count

CAUSE: Final = "vector"
"""The cause of stalls under which the unit's cycles are counted."""

EXAMPLE_LANES: Final = 64
"""Lanes of the unit by which a note says how much the operations could matter."""

PASSES: Final[dict[str, int]] = {
    "softmax": 3,  # maximum; exponential of the difference, and its sum; times the reciprocal of the sum
    "router_softmax": 3,
    "norm": 2,  # sum and sum of squares; normalization with gain and offset in one multiplication with addition
    "final_norm": 2,
    "rotary": 2,  # each result is a number times the cosine plus its partner times the sine
    "attention_softcap": 2,  # tanh by table; times the cap
    "logit_softcap": 2,
}
"""Passes over the vector; an operation that is not named makes one."""


@dataclass(frozen=True, kw_only=True)
class VectorUnit:
    """A vector unit of ``lanes`` lanes. Raises ``InputError`` for less than one lane."""

    lanes: int

    def __post_init__(self) -> None:
        check_count("the number of vector lanes", self.lanes)

    def elements_per_cycle(self, name: str) -> Fraction:
        """Throughput for the operation ``name``: results per cycle on a long vector."""
        return Fraction(self.lanes, PASSES.get(name, 1))

    def cycles(self, operation: VectorOperation) -> int:
        """Cycles of all repeats: passes × ceil(elements / lanes) each."""
        return operation.repeats * PASSES.get(operation.name, 1) * -(-operation.elements // self.lanes)


class VectorWork:
    """Vector operations by name, with their elements and cycles on a unit; grows as phases are added."""

    def __init__(self, unit: VectorUnit) -> None:
        self.unit = unit
        self._by_name: dict[str, tuple[int, int]] = {}

    def add(self, operations: Iterable[VectorOperation], times: int = 1) -> VectorWork:
        """Add ``operations``, each ``times`` times; returns itself."""
        for operation in operations:
            elements, cycles = self._by_name.get(operation.name, (0, 0))
            self._by_name[operation.name] = (
                elements + times * operation.total,
                cycles + times * self.unit.cycles(operation),
            )
        return self

    @property
    def cycles(self) -> int:
        """Cycles of all operations."""
        return sum(cycles for _, cycles in self._by_name.values())

    def to_list(self) -> list[dict[str, Any]]:
        """JSON-ready: each operation with its elements, cycles and throughput."""
        return [
            {
                "name": name,
                "elements": elements,
                "elements_per_cycle": float(self.unit.elements_per_cycle(name)),
                "cycles": cycles,
            }
            for name, (elements, cycles) in self._by_name.items()
        ]

    def left_out_note(self, cycles: int) -> str:
        """What a simulation of ``cycles`` cycles without the unit says: names, and how much they could matter."""
        return (
            f"vector operations are left out ({self._names()}); a unit of {self.unit.lanes} lanes that works in turn "
            f"with the array would take {self.cycles:,} cycles more ({100 * self.cycles / cycles:.2g} %): "
            f"--vector-lanes {self.unit.lanes}"
        )

    def counted_note(self) -> str:
        """What a simulation with the unit says."""
        return (
            f"vector operations ({self._names()}) take {self.cycles:,} cycles on {self.unit.lanes} lanes in turn with "
            "the array; their energy is not known and no part of the total"
        )

    def _names(self) -> str:
        """The operations by name; those on scores are all that is known of a shape of linear layers and attention."""
        names = ", ".join(name.replace("_", " ") for name in self._by_name)
        only_scores = set(self._by_name) <= {"softmax", "attention_softcap"}
        return f"{names}; others of this model are not known" if only_scores else names

    def __bool__(self) -> bool:
        return bool(self._by_name)
