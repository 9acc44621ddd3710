"""Exact products of integers of 1 to 8 bits by either side, from bit planes on the tensor cores (arXiv 2409.17870).

A number of n bits u is, by its encoding, u (``unsigned``), u as two's complement (``signed``), or the sum of ±2^i over
its bits (``bipolar``), which is 2 u - (2^n - 1): symmetric, odd, and ±1 for one bit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from termwise.algorithms.errors import InputError, unknown_name
from termwise.gpu_ref.launch import check_device, launch

Encoding = Literal["unsigned", "signed", "bipolar"]
MOST_BITS = 8
_WORD_BITS = 32
_PADDED_INPUTS = 256
_WARPS = 4
_Factors = ctypes.c_int32 * MOST_BITS
_LARGEST = (1 << 31) - 1


class BitPlaneArguments(ctypes.Structure):
    """As in ``bit_planes.cu``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "activations", "results")),
        *((name, ctypes.c_int64) for name in ("outputs", "tokens")),
        *((name, ctypes.c_int32) for name in ("words", "weight_bits", "activation_bits")),
        ("weight_factors", _Factors),
        ("activation_factors", _Factors),
    ]


@dataclass(frozen=True)
class BitPlanes:
    """A matrix of integers by the bits of its codes.

    Attributes:
        planes: int32 [bits, rows, words]; bit k % 32 of word k // 32 is that of input k, zeros behind the inputs.
        sums: of the unsigned codes of a row, int64 [rows].
        inputs: numbers in a row.
        encoding: what the bits stand for.
    """

    planes: torch.Tensor
    sums: torch.Tensor
    inputs: int
    encoding: Encoding

    @property
    def bits(self) -> int:
        """Width of a number."""
        return int(self.planes.shape[0])

    @property
    def factors(self) -> list[int]:
        """What a one at each place adds; of bipolar numbers that of their unsigned codes."""
        found = [1 << place for place in range(self.bits)]
        if self.encoding == "signed":
            found[-1] = -found[-1]
        return found

    @property
    def largest(self) -> int:
        """The largest magnitude of a sum of factors."""
        return max(sum(factor for factor in self.factors if factor > 0), -min(self.factors))


def bit_planes(codes: torch.Tensor, bits: int, encoding: Encoding) -> BitPlanes:
    """The planes of ``codes``, uint8 [rows, inputs], each below 2^``bits``, on their device.

    Raises ``InputError`` for other tensors, widths and encodings, and for a code that is wider.
    """
    check_device(codes.device)
    if encoding not in get_args(Encoding):
        raise unknown_name("encoding", encoding, get_args(Encoding))
    if not 1 <= bits <= MOST_BITS:
        raise InputError(f"integers of {bits} bits; expected 1 to {MOST_BITS}")
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise InputError(f"codes {codes.dtype} {list(codes.shape)}; expected torch.uint8 [rows, inputs]")
    if codes.numel() and int(codes.max()) >> bits:
        raise InputError(f"a code of {int(codes.max())}; expected codes of {bits} bits")
    rows, inputs = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -inputs % _PADDED_INPUTS))
    padded = padded.reshape(rows, padded.shape[1] // _WORD_BITS, _WORD_BITS)
    places = torch.arange(_WORD_BITS, device=codes.device, dtype=torch.int64)
    planes = [((padded >> bit & 1).to(torch.int64) << places).sum(dim=-1) for bit in range(bits)]
    words = torch.stack(planes)
    words = torch.where(words > _LARGEST, words - (1 << 32), words).to(torch.int32).contiguous()
    return BitPlanes(words, codes.sum(dim=1, dtype=torch.int64), inputs, encoding)


def multiply(weights: BitPlanes, activations: BitPlanes) -> torch.Tensor:
    """activations · weightsᵀ, exact: int64 [tokens, outputs] of [outputs, inputs] and [tokens, inputs].

    Raises ``InputError`` for other inputs or devices, for two encodings that do not go together (``bipolar`` with
    another), and for rows whose sums 31 bits do not hold.
    """
    device = weights.planes.device
    if activations.planes.device != device or activations.inputs != weights.inputs:
        raise InputError(
            f"activations of {activations.inputs} inputs on {activations.planes.device}; expected {weights.inputs} "
            f"on {device}"
        )
    if (weights.encoding == "bipolar") != (activations.encoding == "bipolar"):
        raise InputError(f"{weights.encoding} weights beside {activations.encoding} activations; expected both bipolar")
    most = weights.largest * activations.largest * weights.inputs
    if most > _LARGEST:
        raise InputError(f"{weights.inputs} inputs, whose products sum to {most}; expected at most {_LARGEST}")
    outputs, tokens = weights.sums.shape[0], activations.sums.shape[0]
    results = torch.empty((tokens, outputs), dtype=torch.int32, device=device)
    pad = [0] * MOST_BITS
    arguments = BitPlaneArguments(
        weights.planes.data_ptr(),
        activations.planes.data_ptr(),
        results.data_ptr(),
        outputs,
        tokens,
        weights.planes.shape[2],
        weights.bits,
        activations.bits,
        _Factors(*(weights.factors + pad)[:MOST_BITS]),
        _Factors(*(activations.factors + pad)[:MOST_BITS]),
    )
    blocks = (-(-outputs // (16 * _WARPS)), -(-tokens // 8))
    launch("bit_planes", "multiply_bit_planes", arguments, blocks, (_WARPS * 32,), device)
    found = results.to(torch.int64)
    if weights.encoding == "bipolar":  # (2 u - U) (2 v - V), summed
        weight_most, activation_most = (1 << weights.bits) - 1, (1 << activations.bits) - 1
        found = 4 * found - 2 * activation_most * weights.sums - 2 * weight_most * activations.sums[:, None]
        found += weights.inputs * weight_most * activation_most
    return found
