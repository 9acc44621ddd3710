"""The FP16 baseline: weights as IEEE binary16, one multiply-accumulate per PE and cycle (BitMoD section V-A)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format
from termwise.algorithms.grid import Weights, row_blocks
from termwise.algorithms.integer import Parts
from termwise.algorithms.processing_element import (
    HALF_PIPELINE,
    Fp16Activations,
    PipelineTiming,
    check_weights_can_be_read,
)


@dataclass(frozen=True, kw_only=True)
class Fp16MacSpec(Fp16Activations):
    """A PE that multiplies one FP16 weight by one FP16 activation per cycle.

    Weights of any other format are decoded to FP16 on their way from DRAM into the weight buffer, where each takes 16
    bits; the decoder keeps pace with DRAM and its energy and area are not counted.
    """

    kind: ClassVar[str] = "fp16_mac"
    lanes: int = 1

    def cycles_per_step(self, weights: Format) -> int:
        """One cycle. Raises ``UnsupportedFormatError`` for GOBO's dictionary and for quantized activations."""
        check_weights_can_be_read(self.kind, weights.along_inputs)
        return 1

    def key_value_cycles_per_step(self, key_value_bits: int) -> int:  # noqa: ARG002
        """One cycle."""
        return 1

    def pipeline(self, weights: Format, inputs: int, rows: int) -> PipelineTiming:  # noqa: ARG002
        """Nothing is scaled: the pipeline alone."""
        return HALF_PIPELINE

    def key_value_pipeline(self, key_value_bits: int) -> PipelineTiming:  # noqa: ARG002
        """The same."""
        return HALF_PIPELINE

    def buffer_bits(self, weights: Format, outputs: int, inputs: int) -> float:  # noqa: ARG002
        """16 bits per weight: they are decoded before they are buffered."""
        return 16.0


def quantize(weights: Weights) -> Parts:
    """``values``: ``weights`` [outputs, inputs] rounded to FP16. Raises ``InputError`` where one is too large."""
    result = np.empty(weights.shape, dtype=np.float16)
    for rows, block in row_blocks(weights):
        with np.errstate(over="ignore"):
            values = block.astype(np.float16)
        if not np.isfinite(values).all():
            raise InputError(
                f"a weight of {np.abs(block).max():.4g} has no FP16 value; expected magnitudes up to 65504"
            )
        result[rows] = values
    return {"values": result}
