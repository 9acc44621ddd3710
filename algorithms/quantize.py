"""Quantize a weight matrix to a format, and back; and the error that this makes.

``quantize`` holds, beside the matrix and its packed form, one block of widened rows (see ``grid.WEIGHTS_AT_ONCE``).
Every family's arithmetic stands in the module of its processing element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms import bit_serial, flint, fp16_mac, integer, outlier_victim
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Family, Format, get_format
from termwise.algorithms.grid import Weights, row_blocks
from termwise.algorithms.integer import Parts

_QUANTIZERS: Mapping[
    Family, tuple[Callable[[Weights, Format], Parts], Callable[[Parts, Format, int], NDArray[np.float32]]]
]
_QUANTIZERS = MappingProxyType(
    {
        "fp16": (fp16_mac.quantize, fp16_mac.dequantize),
        "type": (integer.quantize_symmetric, integer.dequantize_symmetric),
        "int": (integer.quantize_symmetric, integer.dequantize_symmetric),
        "int-asym": (integer.quantize_asymmetric, integer.dequantize_asymmetric),
        "bitmod": (bit_serial.quantize, bit_serial.dequantize),
        "olive": (outlier_victim.quantize, outlier_victim.dequantize),
        "ant": (flint.quantize, flint.dequantize),
    }
)


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A packed weight matrix.

    Attributes:
        format: how it is packed.
        shape: (outputs, inputs).
        parts: the packed arrays by name, of the shapes and types of ``format.layout(*shape)``.
    """

    format: Format
    shape: tuple[int, int]
    parts: Parts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, counted from the bytes."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def short_group(self) -> int:
        """Weights in each row's short last group; 0 when the group size divides the inputs."""
        return self.format.short_group(self.shape[1])

    def dequantize(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Level × scale of every weight, rounded once to float32: [outputs, inputs], or the ``rows`` of it."""
        per_matrix = ("normal_type",)
        chosen = {name: part if name in per_matrix else part[rows] for name, part in self.parts.items()}
        return _QUANTIZERS[self.format.family][1](chosen, self.format, self.shape[1])


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """Difference between weights and their quantized values.

    ``mse`` is the mean squared error; ``sqnr_db`` is 10 log10(mean square / mse), infinite when nothing was lost.
    """

    mse: float
    sqnr_db: float


def quantize(weights: Weights, format: Format | str, *, name: str = "weights") -> QuantizedTensor:
    """Quantize ``weights``, float16 or float32 [outputs, inputs], to ``format`` or to the format of that name.

    Raises ``InputError``, which names the tensor ``name``: not a matrix of one of these types, empty, a NaN or an
    infinity in it, or values beyond what the format's scales can express.
    """
    format = get_format(format) if isinstance(format, str) else format
    if weights.ndim != 2 or 0 in weights.shape:
        raise InputError(f"{name} has the shape {list(weights.shape)}; expected a matrix [outputs, inputs]")
    if weights.dtype not in (np.float16, np.float32):
        raise InputError(f"{name} is {weights.dtype}; expected float16 or float32 weights")
    try:
        parts = _QUANTIZERS[format.family][0](weights, format)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return QuantizedTensor(format=format, shape=(weights.shape[0], weights.shape[1]), parts=parts)


def quantization_error(weights: Weights, quantized: QuantizedTensor) -> QuantizationError:
    """Error of ``quantized`` against ``weights`` [outputs, inputs], summed in float64 block by block."""
    noise = signal = 0.0
    for rows, block in row_blocks(weights):
        exact = block.astype(np.float64)
        difference = (exact - quantized.dequantize(rows)).ravel()
        noise += float(difference @ difference)
        signal += float(exact.ravel() @ exact.ravel())
    ratio = math.inf if noise == 0 else (10 * math.log10(signal / noise) if signal else -math.inf)
    return QuantizationError(mse=noise / weights.size, sqnr_db=ratio)
