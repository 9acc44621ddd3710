"""A peer to stand beside in benchmarks: 4-bit integers in groups of 128, dequantized and multiplied by Triton.

Imported where Triton is installed, alone. One token; symmetric integers stored + 8; FP16 scales; FP32 sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 128
_ROWS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(activations, codes, scales, results, inputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, COLUMNS // 2)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, inputs, COLUMNS):
        packed = tl.load(codes + rows[:, None] * (inputs // 2) + start // 2 + pairs[None, :])
        low = ((packed & 15).to(tl.int32) - 8).to(tl.float32)
        high = ((packed >> 4).to(tl.int32) - 8).to(tl.float32)
        even = tl.load(activations + start + 2 * pairs).to(tl.float32)
        odd = tl.load(activations + start + 2 * pairs + 1).to(tl.float32)
        part = tl.sum(low * even[None, :] + high * odd[None, :], axis=1)
        total += part * tl.load(scales + rows * (inputs // COLUMNS) + start // COLUMNS).to(tl.float32)
    tl.store(results + rows, total.to(tl.float16))


def multiply(activations: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """activations · weightsᵀ.

    Args:
        activations: FP16 [1, inputs].
        codes: uint8 [outputs, inputs / 2], the lower half of a byte first; outputs a multiple of 16.
        scales: FP16 [outputs, inputs / 128].

    Returns: FP16 [1, outputs].
    """
    outputs, inputs = codes.shape[0], 2 * codes.shape[1]
    results = torch.empty((1, outputs), dtype=torch.float16, device=activations.device)
    _multiply[(outputs // _ROWS,)](activations, codes, scales, results, inputs, ROWS=_ROWS, COLUMNS=GROUP)
    return results
