"""One linear layer on an accelerator with its values: what comes out, bit for bit, and when.

The schedule is that of ``termwise.sim.simulate``, with the steps and drains that the weights ask for; the outputs are
those of the PEs (``termwise.sim.functional``), reduced in the passes of the same schedule. They equal
``termwise.algorithms.reference.multiply`` in every bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.workload import Gemm, Phase
from termwise.sim import functional
from termwise.sim.accelerators import Accelerator
from termwise.sim.cycle import CycleCount
from termwise.sim.kernels import TileProgram, first_input
from termwise.sim.simulate import Machine


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """A layer that was computed.

    Attributes:
        outputs: float16 [tokens, outputs], as they leave the array; infinite beyond 65504.
        accumulators: float32 [tokens, outputs], before that rounding.
        count: cycles, their causes, and traffic.
        program: the schedule.
        pass_inputs: inputs of a pass; all of them where there is one.
    """

    outputs: NDArray[np.float16]
    accumulators: NDArray[np.float32]
    count: CycleCount
    program: TileProgram
    pass_inputs: int


def run_layer(
    accelerator: Accelerator,
    tensor: QuantizedTensor,
    activations: NDArray[np.float16],
    *,
    phase: Phase = "prefill",
    stepped: bool = False,
) -> LayerRun:
    """Compute activations · weightsᵀ: float16 [tokens, inputs] by ``tensor`` [outputs, inputs].

    ``phase`` chooses the shape of the array. Raises ``InputError`` as ``simulate`` and ``functional.multiply`` do.
    """
    tokens, inputs = activations.shape
    outputs = tensor.shape[0]
    gemm = Gemm(name="layer", tokens=tokens, reduction=inputs, outputs=outputs, operand="weight", repeats=1)
    run = Machine(accelerator, phase, tensor.format, stepped=stepped).run_values(gemm, tensor)
    pass_inputs = int(first_input(run.program, run.program.segment_steps))
    accumulators = functional.multiply(accelerator.processing_element, tensor, activations, pass_inputs=pass_inputs)
    with np.errstate(over="ignore"):
        rounded = accumulators.astype(np.float16)
    return LayerRun(
        outputs=rounded, accumulators=accumulators, count=run.count, program=run.program, pass_inputs=pass_inputs
    )
