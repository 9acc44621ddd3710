"""What the specification of every PE kind offers to its readers: the simulator, the RTL and the reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.formats import Format, activation_format


class UnsupportedFormatError(InputError):
    """The PE has no way to take the weights of this format; the message says why."""


ACCUMULATOR_ROWS = 8
"""Rows that share a column accumulator: their PEs hand their sums over one after the other
(``docs/microarchitecture.md``, section 3, for this and for what follows)."""

INTEGER_TO_FLOAT_CYCLES = 4
SCALING_CYCLES = 8
ADDITION_CYCLES = 7
CHANNEL_SCALE_CYCLES = SCALING_CYCLES
HALF_CYCLES = 3
"""Cycles of the parts of a column accumulator: a sum becomes FP32, is multiplied by the scale, is added to y; y is
multiplied by the channel scale, becomes FP16, and is written into the output memory."""

SYSTOLIC_GROUP_DISTANCE = 2 * ACCUMULATOR_ROWS
"""Least distance of the ends of two groups with systolic movement: rows come to their accumulator two cycles apart."""

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
        stages: of the PE, behind the cycle in which a term is issued (P).
        accumulator_cycles: of the column accumulator, from its chain into the output memory (L).
        dequantizer_cycles: of a PE that multiplies its sum by the scale bit by bit (B).
        end_of_row_cycles: what a PE does between the last term of a row and the end of its sum (X).
        has_groups: whether sums are handed over at the end of every group, not of every row alone.
    """

    stages: int
    accumulator_cycles: int
    dequantizer_cycles: int = 0
    end_of_row_cycles: int = 0
    has_groups: bool = True

    @property
    def group_distance_cycles(self) -> int:
        """Least distance of the last terms of two groups; 0 where nothing waits."""
        return max(self.dequantizer_cycles, ACCUMULATOR_ROWS) if self.has_groups else 0

    @property
    def drain_cycles(self) -> int:
        """From the last issue of a tile until its outputs may leave the array."""
        handed_over = self.stages + self.end_of_row_cycles + self.dequantizer_cycles + ACCUMULATOR_ROWS
        return handed_over + self.accumulator_cycles


HALF_PIPELINE = PipelineTiming(stages=4, accumulator_cycles=HALF_CYCLES, has_groups=False)
"""Of a PE that adds products of FP16 numbers into an FP32 accumulator of its own."""

BIT_PARALLEL_PIPELINE = PipelineTiming(
    stages=4, accumulator_cycles=SCALING_CYCLES + ADDITION_CYCLES + CHANNEL_SCALE_CYCLES + HALF_CYCLES
)
"""Of a PE whose sum of a group is FP32."""

_INTEGER_ACCUMULATOR_CYCLES = INTEGER_TO_FLOAT_CYCLES + SCALING_CYCLES + ADDITION_CYCLES + HALF_CYCLES

INTEGER_PIPELINE = PipelineTiming(stages=5, accumulator_cycles=_INTEGER_ACCUMULATOR_CYCLES)
"""Of a PE whose sum of a group is an integer."""

WIDE_INTEGER_PIPELINE = PipelineTiming(stages=6, accumulator_cycles=_INTEGER_ACCUMULATOR_CYCLES)
"""Of four of them that make one."""


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
        """Sums are FP32 beside FP16 activations, integers beside integers, where four PEs have a stage more."""
        return self._pipeline(self.processing_elements_per_product(weights))

    def key_value_pipeline(self, key_value_bits: int) -> PipelineTiming:
        """The same."""
        return self._pipeline(self.key_value_processing_elements_per_product(key_value_bits))

    def _pipeline(self, elements: int) -> PipelineTiming:
        if self.activations == "fp16":
            return BIT_PARALLEL_PIPELINE
        return INTEGER_PIPELINE if elements == 1 else WIDE_INTEGER_PIPELINE

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
