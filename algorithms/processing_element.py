"""What the specification of every PE kind offers to its readers: the simulator, the RTL and the reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.formats import Format, activation_format


class UnsupportedFormatError(InputError):
    """The PE has no way to take the weights of this format; the message says why."""


PIPELINE_STAGES = 3
"""Stages of every PE behind the cycle in which a term is issued (``docs/microarchitecture.md``, section 3)."""

HALF_SIGNIFICAND_BITS = 11
HALF_BITS = 16

ActivationKind = Literal["fp16", "integer"]
"""What a PE takes as activations: FP16 numbers, or codes of the weights' kind (section 2.5)."""

INTEGER_BITS = 4
"""Width of both operands of a PE with integer activations."""

WIDE_INTEGER_BITS = 8
WIDE_ELEMENTS = 4
"""So many of these PEs, two of an array's rows × two of its columns, make a PE for operands of up to 8 bits."""


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


def check_weights_can_be_read(kind: str, weights: Format, activations: ActivationKind = "fp16") -> None:
    """Raises ``UnsupportedFormatError`` for what no PE that takes such ``activations`` reads, whatever its decoder."""
    reason = ""
    if weights.family == "gobo":
        reason = "a dictionary with an outlier list needs GOBO's own datapath"
    elif weights.groups_along_outputs:
        reason = "its groups lie along the outputs, and the PE adds up along the inputs under one scale"
    elif activations == "integer" and weights.activation_bits is None:
        reason = "its activations are FP16, and the PE takes integers"
    elif activations == "fp16" and weights.activation_bits is not None:
        reason = f"its activations have {weights.activation_bits} bits, and the PE takes FP16"
    if reason:
        raise UnsupportedFormatError(f"the {kind} PE does not take {weights.name}: {reason}")


class Fp16Activations:
    """What a PE with FP16 activations says of them."""

    def processing_elements_per_product(self, weights: Format) -> int:  # noqa: ARG002
        """One."""
        return 1

    def key_value_processing_elements_per_product(self, key_value_bits: int) -> int:  # noqa: ARG002
        """One."""
        return 1

    def activation_bits(self, weights: Format) -> int:  # noqa: ARG002
        """16."""
        return HALF_BITS

    def key_value_activation_bits(self, key_value_bits: int) -> int:  # noqa: ARG002
        """16."""
        return HALF_BITS


@dataclass(frozen=True, kw_only=True)
class BitParallelSpec:
    """What the PEs of OliVe and ANT have in common: a decoder, and one product per cycle.

    With FP16 activations (BitMoD section V-A, ``docs/microarchitecture.md``, section 2.4) a weight has up to 8 bits.
    With integer activations (section 2.5) both operands are codes of up to 4 bits, and four PEs make one for 8 bits.

    Attributes:
        lanes: weights of a step.
        activations: ``fp16`` or ``integer``.

    Raises ``InputError`` for other activations.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    """As messages call the PE."""
    read_types: ClassVar[str]
    """The weights that the decoder reads, in words."""
    lanes: int = 1
    activations: ActivationKind = "fp16"

    def __post_init__(self) -> None:
        if self.activations not in get_args(ActivationKind):
            raise unknown_name(f"activations of the {self.name}", self.activations, get_args(ActivationKind))

    def reads(self, format: Format) -> bool:
        """Whether the decoder reads all data types of ``format``."""
        raise NotImplementedError

    def cycles_per_step(self, weights: Format) -> int:
        """One cycle.

        Raises ``UnsupportedFormatError`` for weights that the decoder cannot read, and for activations that are not
        what this PE takes: FP16 numbers, or codes that the decoder reads, under one scale per token or tensor.
        """
        check_weights_can_be_read(self.kind, weights, self.activations)
        if not self.reads(weights):
            raise UnsupportedFormatError(
                f"the {self.name} decodes {self.read_types} weights; {weights.name} needs another decoder"
            )
        stored = activation_format(weights)
        if stored is not None and not self.reads(stored):
            raise UnsupportedFormatError(
                f"the {self.name} decodes {self.read_types} activations; those of {weights.name} are {stored.name}"
            )
        return 1

    def processing_elements_per_product(self, weights: Format) -> int:
        """1; 4 with integer activations where weights or activations have more than 4 bits."""
        return self._elements(max(weights.weight_bits, self.activation_bits(weights)))

    def key_value_processing_elements_per_product(self, key_value_bits: int) -> int:
        """The same of keys and values, whose partners have as many bits."""
        return self._elements(key_value_bits)

    def _elements(self, widest_bits: int) -> int:
        return WIDE_ELEMENTS if self.activations == "integer" and widest_bits > INTEGER_BITS else 1

    def activation_bits(self, weights: Format) -> int:
        """Those of the format, or 16."""
        return weights.activation_bits or HALF_BITS

    def key_value_activation_bits(self, key_value_bits: int) -> int:
        """As many as keys and values have, or 16."""
        return key_value_bits if self.activations == "integer" else HALF_BITS

    def key_value_cycles_per_step(self, key_value_bits: int) -> int:
        """One cycle for keys and values of up to 8 bits, integers here; ``InputError`` above that."""
        if key_value_bits > WIDE_INTEGER_BITS:
            raise InputError(f"the {self.kind} PE takes keys and values of up to 8 bits; got {key_value_bits}")
        return 1

    def pipeline(self, weights: Format, inputs: int, rows: int) -> PipelineTiming:  # noqa: ARG002
        """A group's sum is scaled in one cycle and added in the next."""
        return BIT_PARALLEL_PIPELINE

    def key_value_pipeline(self, key_value_bits: int) -> PipelineTiming:  # noqa: ARG002
        """The same."""
        return BIT_PARALLEL_PIPELINE

    def buffer_bits(self, weights: Format, outputs: int, inputs: int) -> float:
        """Weights are buffered as they are packed."""
        return weights.bits_per_weight(outputs, inputs)


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

    def processing_elements_per_product(self, weights: Format) -> int:
        """PEs that compute one product of a weight and an activation together, each cycle."""

    def key_value_processing_elements_per_product(self, key_value_bits: int) -> int:
        """The same for keys and values."""

    def activation_bits(self, weights: Format) -> int:
        """Bits of an activation beside such weights, in the buffer and in external memory."""

    def key_value_activation_bits(self, key_value_bits: int) -> int:
        """The same of queries and attention probabilities, beside keys and values."""
