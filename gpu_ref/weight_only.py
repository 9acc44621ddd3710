"""Linear layers with quantized weights: the kernels of ``weight_only.cu`` as torch operations.

``termwise::weight_only`` takes the layout of ``layout.py`` and multiplies on tensor cores;
``termwise::weight_only_any`` takes packed bytes of any format and shape. Both run on the CPU by their kernels' twins,
under ``torch.compile`` and in CUDA graphs; neither waits for the GPU.

Error: products are exact, sums FP32. With n inputs, |result - exact| is at most (n + 16) 2^-22 Σ|w x|, where Σ|w x| is
the sum of the magnitudes of the products, plus half a unit in the last place of the result's own type. A tensor core
adds 17 numbers at a time and may cut each below 2^-22 of the largest; every other operation rounds once, to 2^-24.
``tests/test_gpu_weight_only.py`` holds the kernels to it. With BF16 activations, products below 2^-37 of a group's
scale may be lost.
"""

from __future__ import annotations

import ctypes

import torch

from termwise.algorithms.errors import InputError
from termwise.gpu_ref.launch import launch
from termwise.gpu_ref.layout import ROWS, TILE_INPUTS
from termwise.gpu_ref.operands import Matrix

ACTIVATION_TYPES = (torch.float16, torch.bfloat16)
_OUTPUT_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_BFLOAT_EXPONENT = 112
_INTEGER_BITS = 6
_THREADS = 256
_SQUARE = 16
_TOKENS = (8, 16, 64)


class FastArguments(ctypes.Structure):
    """As in ``weight_only.cu``."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "scales", "tables", "channel_scales", "activations", "results")
        ),
        ("padded_inputs", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("tokens", "rows", "groups", "group_shift", "type_mask", "output_kind")),
        ("unit", ctypes.c_float),
    ]


class AnyArguments(ctypes.Structure):
    """As in ``weight_only.cu``."""

    _fields_ = [
        ("weights", Matrix),
        *((name, ctypes.c_void_p) for name in ("activations", "results")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("activations_are_bfloat", "output_kind")),
    ]


def check_activations(activations: torch.Tensor, inputs: int, device: torch.device) -> None:
    """Raises ``InputError`` unless ``activations`` are FP16 or BF16 [..., inputs] on ``device``."""
    if activations.dtype not in ACTIVATION_TYPES:
        raise InputError(f"activations of {activations.dtype}; expected torch.float16 or torch.bfloat16")
    if activations.ndim == 0 or activations.shape[-1] != inputs:
        raise InputError(f"activations {list(activations.shape)}; expected [..., {inputs}]")
    if activations.device != device:
        raise InputError(f"activations on {activations.device}, weights on {device}; expected one device")


@torch.library.custom_op("termwise::weight_only", mutates_args=())
def weight_only(
    activations: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    tables: torch.Tensor,
    channel_scales: torch.Tensor,
    kernel: str,
    inputs: int,
    group_shift: int,
    type_mask: int,
    exponent: int,
) -> torch.Tensor:
    """activations · weightsᵀ on tensor cores.

    Args:
        activations: FP16 or BF16 [..., inputs].
        codes: int32 [row tiles, input tiles, words], as ``FastLayout`` has them; so are those that follow.
        scales: int16 [row tiles, groups, 16].
        tables: uint8 [4, 16].
        channel_scales: float32 [outputs].
        kernel: ``FastLayout.kernel``.
        inputs: of the matrix.
        group_shift: log2 of the inputs of a group / 32.
        type_mask: 1 where the last bit of a scale belongs to its type.
        exponent: of the tables.

    Returns: [..., outputs], of the activations' type. Raises ``InputError`` for activations that do not fit.
    """
    device = codes.device
    check_activations(activations, inputs, device)
    outputs, padded = channel_scales.shape[0], codes.shape[1] * TILE_INPUTS
    rows = activations.reshape(-1, inputs)
    results = torch.empty((rows.shape[0], outputs), dtype=activations.dtype, device=device)
    if padded != inputs:
        rows = torch.nn.functional.pad(rows, (0, padded - inputs))
    rows = rows.contiguous()
    if rows.data_ptr() % 16:  # part of another tensor
        rows = rows.clone()
    tokens = rows.shape[0]
    at_once = next((most for most in _TOKENS if tokens <= most), _TOKENS[-1])
    bfloat = activations.dtype == torch.bfloat16
    power = 0 if kernel.endswith(str(_INTEGER_BITS)) else (_BFLOAT_EXPONENT if bfloat else 0) - exponent
    arguments = FastArguments(
        *(held.data_ptr() for held in (codes, scales, tables, channel_scales, rows, results)),
        padded,
        tokens,
        outputs,
        scales.shape[1],
        group_shift,
        type_mask,
        _OUTPUT_KINDS[activations.dtype],
        2.0**power,
    )
    name = f"{kernel}_{'bfloat' if bfloat else 'half'}_{at_once}"
    launch("weight_only", name, arguments, (-(-outputs // ROWS), -(-tokens // at_once)), (_THREADS,), device)
    return results.reshape(*activations.shape[:-1], outputs)


@weight_only.register_fake
def _(
    activations: torch.Tensor,
    codes: torch.Tensor,  # noqa: ARG001
    scales: torch.Tensor,  # noqa: ARG001
    tables: torch.Tensor,  # noqa: ARG001
    channel_scales: torch.Tensor,
    kernel: str,  # noqa: ARG001
    inputs: int,  # noqa: ARG001
    group_shift: int,  # noqa: ARG001
    type_mask: int,  # noqa: ARG001
    exponent: int,  # noqa: ARG001
) -> torch.Tensor:
    return activations.new_empty((*activations.shape[:-1], channel_scales.shape[0]))


@torch.library.custom_op("termwise::weight_only_any", mutates_args=())
def weight_only_any(activations: torch.Tensor, tensors: list[torch.Tensor], numbers: list[int]) -> torch.Tensor:
    """activations · weightsᵀ from packed bytes as they are, for formats and shapes that ``weight_only`` does not take.

    Args:
        activations: FP16 or BF16 [..., inputs].
        tensors: what the pointers of ``Matrix`` point to, in its order; empty where they are null.
        numbers: the other members of ``Matrix``, in its order.

    Returns: [..., outputs], of the activations' type. Raises ``InputError`` for activations that do not fit.
    """
    pointers = [held.data_ptr() if held.numel() else None for held in tensors]
    matrix = Matrix(*pointers, *numbers)
    device = tensors[0].device
    check_activations(activations, matrix.columns, device)
    rows = activations.reshape(-1, matrix.columns).contiguous()
    results = torch.empty((rows.shape[0], matrix.rows), dtype=activations.dtype, device=device)
    arguments = AnyArguments(
        matrix,
        rows.data_ptr(),
        results.data_ptr(),
        rows.shape[0],
        activations.dtype == torch.bfloat16,
        _OUTPUT_KINDS[activations.dtype],
    )
    blocks = (-(-matrix.rows // _SQUARE), -(-rows.shape[0] // _SQUARE))
    launch("weight_only", "weight_only_any", arguments, blocks, (_SQUARE, _SQUARE), device)
    return results.reshape(*activations.shape[:-1], matrix.rows)


@weight_only_any.register_fake
def _(activations: torch.Tensor, tensors: list[torch.Tensor], numbers: list[int]) -> torch.Tensor:  # noqa: ARG001
    return activations.new_empty((*activations.shape[:-1], numbers[2]))
