"""What arrays of PEs compute, by the exact kernels: the functions of ``termwise.algorithms.reference``, bit for bit."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionaryCoder, DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.operands import split_half
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import BitParallelSpec, ProcessingElementSpec
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.reference import (
    accumulator_error,
    check_activations,
    check_half_activations,
    check_integer_operands,
    half_weights,
)
from termwise.gpu_ref.launch import check_device, launch
from termwise.gpu_ref.operands import MOST_TERMS, Matrix, digit_tables, on_device, operands

TILE = 16
"""Outputs and tokens of a block, as the kernels have it."""

_NUMERICS = {"paper": 0, "exact": 1, "shared_exponent": 2}
_TwoBases = ctypes.c_int32 * MOST_TERMS * 2


class BitSerialArguments(ctypes.Structure):
    """As in ``bit_serial.cu``."""

    _fields_ = [
        ("weights", Matrix),
        *((name, ctypes.c_void_p) for name in ("activations", "digits", "results")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("sum_size", "numerics", "lanes", "align_bits")),
        *((name, ctypes.c_int32) for name in ("accumulator_bits", "nearest_even")),
        ("terms", ctypes.c_int32 * 2),
        ("bases", _TwoBases),
    ]


class BitParallelArguments(ctypes.Structure):
    """As in ``bit_parallel.cuh``."""

    _fields_ = [
        ("weights", Matrix),
        *((name, ctypes.c_void_p) for name in ("activations", "results")),
        ("tokens", ctypes.c_int64),
        ("sum_size", ctypes.c_int32),
    ]


class IntegerArguments(ctypes.Structure):
    """As in ``bit_parallel.cuh``."""

    _fields_ = [
        *((name, Matrix) for name in ("weights", "activations")),
        *((name, ctypes.c_void_p) for name in ("results", "overflow")),
    ]


class HalfArguments(ctypes.Structure):
    """As in ``fp16_mac.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "activations", "results")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "tokens")),
    ]


class DictionaryArguments(ctypes.Structure):
    """As in ``dictionary.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "dictionary", "first_outlier", "outlier_columns")),
        *((name, ctypes.c_void_p) for name in ("outlier_values", "activations", "results")),
        *((name, ctypes.c_int64) for name in ("code_row_bytes", "tokens")),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "bits")),
    ]


def multiply(
    spec: ProcessingElementSpec,
    tensor: QuantizedTensor,
    activations: NDArray[np.float16],
    *,
    pass_inputs: int | None = None,
    device: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """activations · weightsᵀ as an array of PEs of ``spec`` computes it, before the result is rounded to FP16.

    Args:
        spec: the PE.
        tensor: the weights [outputs, inputs].
        activations: float16 [tokens, inputs], finite.
        pass_inputs: inputs of a pass where the reduction is split; a pass ends the group that it cuts.
        device: a GPU, or ``cpu`` for the kernel's twin.

    Returns: float32 [tokens, outputs], every bit that of ``termwise.algorithms.reference.multiply``.

    Raises ``InputError`` as the reference does, for sums that 64 bits do not hold, and for a device without kernels;
    ``MissingToolError`` without a compiler or a GPU.
    """
    device = torch.device(device)
    check_device(device)
    check_activations(tensor, activations)
    check_half_activations(spec)
    spec.cycles_per_step(tensor.format)
    split_half(activations)  # refuses what is not finite
    tokens, (outputs, inputs) = activations.shape[0], tensor.shape
    held = on_device(activations.view(np.uint16), device)
    results = torch.empty((tokens, outputs), dtype=torch.float32, device=device)
    blocks = (-(-outputs // TILE), -(-tokens // TILE))
    threads = (TILE, TILE)
    if isinstance(spec, Fp16MacSpec):
        weights = on_device(half_weights(tensor).view(np.uint16), device)
        half = HalfArguments(weights.data_ptr(), held.data_ptr(), results.data_ptr(), outputs, inputs, tokens)
        launch("fp16_mac", "fp16_mac", half, blocks, threads, device)
        return _found(results)
    if isinstance(spec, DictionarySpec):
        return _dictionary(tensor, held, results, blocks, device)
    given = operands(tensor, device)
    group_size = min(given.matrix.group_size, inputs)
    sum_size = min(pass_inputs or inputs, inputs) if given.matrix.groups == 1 else group_size
    common = {"weights": given.matrix, "activations": held.data_ptr(), "results": results.data_ptr()}
    common |= {"tokens": tokens, "sum_size": sum_size}
    if isinstance(spec, BitSerialSpec):
        spec.check_group(tensor.format, sum_size)
        tables, bases = digit_tables(spec, tensor)
        digits = on_device(tables, device)
        arguments = BitSerialArguments(
            **common,
            digits=digits.data_ptr(),
            numerics=_NUMERICS[spec.numerics],
            lanes=spec.lanes,
            align_bits=spec.align_bits,
            accumulator_bits=spec.accumulator_bits,
            nearest_even=spec.rounding == "nearest_even",
            terms=(ctypes.c_int32 * 2)(*map(len, bases)),
            bases=_TwoBases(*((ctypes.c_int32 * MOST_TERMS)(*base) for base in bases)),
        )
        launch("bit_serial", "bit_serial", arguments, blocks, threads, device)
    elif isinstance(spec, OutlierVictimSpec | FlintSpec):
        launch(spec.kind, spec.kind, BitParallelArguments(**common), blocks, threads, device)
    else:
        raise InputError(f"there is no kernel of a {spec.kind} PE")
    given.check(tensor)
    return _found(results)


def _found(results: torch.Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = results.cpu().numpy()
    return found


def _dictionary(
    tensor: QuantizedTensor,
    activations: torch.Tensor,
    results: torch.Tensor,
    blocks: tuple[int, int],
    device: torch.device,
) -> NDArray[np.float32]:
    coder = tensor.coder
    assert isinstance(coder, DictionaryCoder)
    outputs, inputs = tensor.shape
    codes = on_device(tensor.parts["codes"].astype(np.uint8, copy=False), device)
    dictionary = on_device(coder.dictionary, device)
    first = np.searchsorted(coder.positions, np.arange(outputs + 1, dtype=np.int64) * inputs).astype(np.int64)
    firsts = on_device(first, device)
    columns = on_device((coder.positions % inputs).astype(np.uint32), device)
    values = on_device(coder.values, device)
    arguments = DictionaryArguments(
        *(held.data_ptr() for held in (codes, dictionary, firsts, columns, values, activations, results)),
        codes.shape[1],
        activations.shape[0],
        outputs,
        inputs,
        tensor.format.weight_bits,
    )
    launch("dictionary", "dictionary", arguments, blocks, (TILE, TILE), device)
    return _found(results)


def multiply_integers(
    spec: ProcessingElementSpec,
    weights: QuantizedTensor,
    activations: QuantizedTensor,
    *,
    device: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """activations · weightsᵀ of codes on both sides, every bit that of ``reference.multiply_integers``.

    Args:
        spec: an ``outlier_victim`` or ``flint`` PE with integer activations.
        weights: [outputs, inputs], in a format with quantized activations.
        activations: [tokens, inputs], in the ``activation_format`` of the weights'.
        device: a GPU, or ``cpu`` for the kernel's twin.

    Returns: float32 [tokens, outputs]. Raises as the reference and as ``multiply`` do.
    """
    device = torch.device(device)
    check_device(device)
    check_integer_operands(spec, weights, activations)
    assert isinstance(spec, BitParallelSpec)
    left, right = operands(weights, device), operands(activations, device)
    results = torch.empty((activations.shape[0], weights.shape[0]), dtype=torch.float32, device=device)
    overflow = torch.zeros(1, dtype=torch.int32, device=device)
    arguments = IntegerArguments(left.matrix, right.matrix, results.data_ptr(), overflow.data_ptr())
    blocks = (-(-weights.shape[0] // TILE), -(-activations.shape[0] // TILE))
    launch(spec.kind, f"{spec.kind}_integer", arguments, blocks, (TILE, TILE), device)
    left.check(weights)
    right.check(activations)
    if int(overflow.cpu()[0]):
        raise accumulator_error(weights.format)
    return _found(results)
