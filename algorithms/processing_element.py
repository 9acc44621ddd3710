"""What the specification of every PE kind offers to its readers: the simulator, the RTL and the reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format


class UnsupportedFormatError(InputError):
    """The PE has no way to take the weights of this format; the message says why."""


PIPELINE_STAGES = 3
"""Stages of every PE behind the cycle in which a term is issued (``docs/microarchitecture.md``, section 3)."""

HALF_SIGNIFICAND_BITS = 11


@dataclass(frozen=True, kw_only=True)
class PipelineTiming:
    """What a PE's pipeline costs beside the issue of terms (``docs/microarchitecture.md``, section 3), in cycles.

    Attributes:
        dequantization_cycles: least distance of the last terms of two groups; 0 or 1 where nothing waits.
        drain_cycles: from the last issue of a tile until its outputs may leave the array.
    """

    dequantization_cycles: int
    drain_cycles: int


BIT_PARALLEL_PIPELINE = PipelineTiming(dequantization_cycles=1, drain_cycles=PIPELINE_STAGES + 2)
"""Of the PEs that scale a group's sum and add it, in a cycle each."""


def scale_bits(format: Format) -> int:
    """Width of the significand of a group's scale, which a bit-serial dequantizer takes bit by bit."""
    if format.family == "bitmod":
        return 8
    types = {"e8m0": 1, "e4m3": 4}
    return (
        types.get(format.scale_type, HALF_SIGNIFICAND_BITS)
        if format.family in ("type", "int")
        else HALF_SIGNIFICAND_BITS
    )


def check_weights_can_be_read(kind: str, weights: Format) -> None:
    """Raises ``UnsupportedFormatError`` for what none of the modelled PEs reads, whatever its decoder."""
    reason = ""
    if weights.family == "gobo":
        reason = "a dictionary with an outlier list needs GOBO's own datapath"
    elif weights.groups_along_outputs:
        reason = "its groups lie along the outputs, and the PE adds up along the inputs under one scale"
    elif weights.activation_bits is not None:
        reason = f"its activations have {weights.activation_bits} bits, and the PE takes FP16"
    if reason:
        raise UnsupportedFormatError(f"the {kind} PE does not take {weights.name}: {reason}")


def bit_parallel_key_value_cycles(kind: str, key_value_bits: int) -> int:
    """One cycle for keys and values of up to 8 bits, integers to a bit-parallel PE; ``InputError`` above that."""
    if key_value_bits > 8:
        raise InputError(f"the {kind} PE takes keys and values of up to 8 bits; got {key_value_bits}")
    return 1


class ProcessingElementSpec(Protocol):
    """A frozen specification of one PE.

    ``kind`` is the stem of the PE (``fp16_mac``, ``bit_serial``, ``outlier_victim``, ``flint``), ``lanes`` the number
    of weights that it multiplies in one dot-product step.
    """

    kind: ClassVar[str]

    @property
    def lanes(self) -> int:
        """Weights per dot-product step."""

    def cycles_per_step(self, weights: Format) -> int:
        """Cycles of one dot-product step of ``lanes`` weights. Raises ``UnsupportedFormatError``."""

    def key_value_cycles_per_step(self, key_value_bits: int) -> int:
        """The same for keys and values, held as ``key_value_bits``-bit integers (8) or FP16 (16)."""

    def pipeline(self, weights: Format, inputs: int, rows: int) -> PipelineTiming:
        """Pipeline for ``rows`` rows of ``inputs`` weights, which work together, in a format that it takes.

        What depends on the weights is what is expected of them.
        """

    def key_value_pipeline(self, key_value_bits: int) -> PipelineTiming:
        """The same for keys and values, which have an FP16 scale each where they are integers."""

    def buffer_bits(self, weights: Format, outputs: int, inputs: int) -> float:
        """Bits per weight of an ``outputs`` × ``inputs`` layer in the weight buffer (metadata included)."""
