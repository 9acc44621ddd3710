"""The same numbers at speed: CUDA kernels over the packed bytes of ``algorithms``, and their twins on the CPU.

Every kernel is one source. NVIDIA's compiler (nvcc, or NVRTC from a wheel) makes a module for the GPU of it, g++ a
library for the CPU, in which the same text runs thread by thread. The header ``portable.cuh`` says what it may use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from termwise.gpu_ref.quantized_linear import QuantizedLinear, swap_linears

__all__ = ["QuantizedLinear", "swap_linears"]


def __getattr__(name: str) -> Any:
    """torch is imported with the first use of what needs it."""
    if name in __all__:
        from termwise.gpu_ref import quantized_linear

        return getattr(quantized_linear, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
