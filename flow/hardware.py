"""A quantized layer on the accelerator, or on a model of it, compared with the reference in every bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from termwise.algorithms.errors import InputError, MissingToolError, unknown_name
from termwise.algorithms.formats import get_format
from termwise.algorithms.quantize import quantize
from termwise.flow.subject import open_subject
from termwise.rtl.accelerator import AcceleratorDesign
from termwise.rtl.board import BAUD, BoardDesign, SerialTransport, SimulatedLine
from termwise.rtl.driver import Driver, Transport
from termwise.rtl.serial_link import LEAST_DIVISOR
from termwise.rtl.simulated_board import SimulatedBoard
from termwise.rtl.units import board_design
from termwise.sim.functional import multiply

SEED = 0
"""Of the activations: the layer's weights are real, its input is random."""


def transport_to(design: AcceleratorDesign, port: str | None, line: bool) -> Transport:
    """The board at a serial ``port``, or a model of it, with its serial ``line`` or without.

    Raises ``MissingToolError`` without pyserial.
    """
    if port is not None:
        try:
            import serial
        except ImportError:
            raise MissingToolError("a board needs pyserial: pip install 'termwise[board]'") from None
        try:
            return SerialTransport(serial.Serial(port, BAUD, timeout=5))
        except serial.SerialException as error:
            raise InputError(f"--port {port}: {error}; expected the serial port of a board") from error
    if line:
        return SerialTransport(SimulatedLine(BoardDesign(accelerator=design, divisor=LEAST_DIVISOR)))
    return SimulatedBoard(design)


def run_layer(
    model: str, name: str | None, format_name: str, tokens: int, *, port: str | None = None, line: bool = False
) -> dict[str, Any]:
    """Compute random activations · (a layer's quantized weights)ᵀ; what came out, and whether it is right.

    Raises ``InputError`` for a model without weights, an unknown layer, and what the accelerator does not take.
    """
    subject = open_subject(model)
    if subject.model is None:
        raise InputError(f"{model}: {subject.no_weights_reason}; expected a model with weights")
    names = subject.model.matrix_names
    if name is not None and name not in names:
        raise unknown_name("layer", name, names)
    matrix = subject.model.matrix(name or names[0])
    outputs, inputs = matrix.shape
    tensor = quantize(matrix.astype(np.float32), get_format(format_name))
    activations = np.random.default_rng(SEED).standard_normal((tokens, inputs)).astype(np.float16)
    design = board_design()
    result = Driver(design, transport_to(design, port, line)).run(tensor, activations)
    with np.errstate(over="ignore"):
        expected = multiply(design.array.processing_element, tensor, activations).astype(np.float16)
    return {
        "model": model,
        "layer": name or names[0],
        "format": format_name,
        "outputs": outputs,
        "inputs": inputs,
        "tokens": tokens,
        "cycles": result.cycles,
        "cycles_by_cause": result.cycles_by_cause,
        "operand_beats": result.operand_beats,
        "output_beats": result.output_beats,
        "values": int(expected.size),
        "equal": bool(np.array_equal(result.outputs, expected)),
    }
