"""Quantize a weight matrix to a format, and back; and the error that this makes.

``quantize`` holds, beside the matrix and its packed form, one block of widened rows (see ``grid.WEIGHTS_AT_ONCE``).
Every family's arithmetic stands in the module of its processing element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms import bit_serial, dictionary, flint, fp16_mac, integer, outlier_victim
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Family, Format, get_format
from termwise.algorithms.grid import Coder, Weights, row_blocks
from termwise.algorithms.integer import Parts
from termwise.algorithms.packing import pack, unpack

_QUANTIZERS: Mapping[Family, tuple[Callable[[Weights, Format], Parts], Callable[[Parts, Format, int], Coder]]]
_QUANTIZERS = MappingProxyType(
    {
        "type": (integer.fit_symmetric, integer.symmetric_grid),
        "int": (integer.fit_symmetric, integer.symmetric_grid),
        "int-asym": (integer.fit_asymmetric, integer.asymmetric_grid),
        "bitmod": (bit_serial.fit, bit_serial.coder),
        "olive": (outlier_victim.fit, outlier_victim.coder),
        "ant": (flint.fit, flint.coder),
        "gobo": (dictionary.fit, dictionary.coder),
    }
)
"""Of every family: what is stored beside the codes, and how codes are made and read with that."""

INPUT_SCALES = "input_scales"
"""Name of the part that holds the factors of the inputs, FP32, where a calibration scaled them."""


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A packed weight matrix.

    Attributes:
        format: how it is packed.
        shape: (outputs, inputs).
        parts: the packed arrays by name, of the shapes and types of ``format.layout(*shape)``; and ``input_scales``,
            float32 [inputs], where the matrix was multiplied by them before it was quantized.
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
        return self.format.short_group(self._stored_shape[1])

    @property
    def _stored_shape(self) -> tuple[int, int]:
        """Shape of the matrix that is stored: transposed where groups lie along the outputs."""
        return self.shape[::-1] if self.format.groups_along_outputs else self.shape

    @cached_property
    def coder(self) -> Coder:
        """How codes of the stored matrix are made and read."""
        if self.format.family == "fp16":
            raise ValueError("fp16 weights have no codes")
        return _QUANTIZERS[self.format.family][1](self.parts, self.format.along_inputs, self._stored_shape[1])

    @property
    def column_step(self) -> int:
        """Columns of the matrix that ``round_columns`` must be given together: 1, or 2 for pairs."""
        return 1 if self.format.groups_along_outputs else self.coder.column_step

    @property
    def codes(self) -> NDArray[np.uint8]:
        """Code of every weight, uint8 [outputs, inputs]."""
        if self.format.family == "fp16":
            raise ValueError("fp16 weights have no codes")
        stored = self._codes(slice(None))
        return stored.T if self.format.groups_along_outputs else stored

    def _codes(self, rows: slice) -> NDArray[np.uint8]:
        """Codes of rows of the stored matrix."""
        packed = self.parts["codes"][rows].astype(np.uint8, copy=False)
        return unpack(packed, self.format.weight_bits, self._stored_shape[1])

    def dequantize(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """What stands in place of the weights: [outputs, inputs], or the ``rows`` of it, float32.

        Level × scale of every weight, rounded once; divided by the input scales where there are any.
        """
        values = self.dequantize_scaled(rows)
        if INPUT_SCALES in self.parts:
            values /= self.parts[INPUT_SCALES].astype(np.float32, copy=False)
        return values

    def dequantize_scaled(self, rows: slice = slice(None)) -> NDArray[np.float32]:
        """Level × scale of every weight, rounded once to float32: [outputs, inputs], or the ``rows`` of it."""
        if self.format.family == "fp16":
            return self.parts["values"][rows].astype(np.float32)
        if self.format.groups_along_outputs:
            return np.ascontiguousarray(self.coder.decode(self._codes(slice(None))).T[rows])
        return self.coder.decode(self._codes(rows), rows)

    def round_columns(self, start: int, weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Round other ``weights``, float32 [outputs, k], of the columns from ``start`` on, to what this matrix offers.

        Scales and data types stay. ``start`` and k are multiples of ``column_step``, or k reaches the last column.

        Returns: codes, uint8 [outputs, k], and their values without the input scales, float32 [outputs, k].

        Raises ``ValueError`` for columns that are not there, or that part a pair.
        """
        outputs, inputs = self.shape
        part = slice(start, start + weights.shape[1])
        whole = start % self.column_step == 0 and (part.stop % self.column_step == 0 or part.stop == inputs)
        if weights.shape[0] != outputs or not 0 <= start < part.stop <= inputs or not whole:
            raise ValueError(
                f"weights {list(weights.shape)} from column {start} on; expected {outputs} rows, and columns of a "
                f"matrix {list(self.shape)} in steps of {self.column_step}"
            )
        if self.format.groups_along_outputs:
            turned = np.ascontiguousarray(weights.T)
            codes = self.coder.encode(turned, part)
            return codes.T, self.coder.decode(codes, part).T
        codes = self.coder.encode(np.ascontiguousarray(weights), columns=part)
        return codes, self.coder.decode(codes, columns=part)

    def with_codes(self, codes: NDArray[np.uint8]) -> QuantizedTensor:
        """The same scales and data types with other ``codes``, uint8 [outputs, inputs].

        Raises ``ValueError`` for another shape or type, or a code that is wider than the format's.
        """
        if codes.shape != self.shape or codes.dtype != np.uint8 or int(codes.max()) >> self.format.weight_bits:
            raise ValueError(
                f"codes {list(codes.shape)}, {codes.dtype}; expected uint8 {list(self.shape)} of "
                f"{self.format.weight_bits} bits"
            )
        stored = np.ascontiguousarray(codes.T if self.format.groups_along_outputs else codes)
        return replace(self, parts={**self.parts, "codes": pack(stored, self.format.weight_bits)})

    def with_input_scales(self, scales: NDArray[np.float32]) -> QuantizedTensor:
        """The same matrix, which is W · diag(``scales``), with the ``scales`` [inputs] that make W of it again.

        Raises ``InputError`` where one is not a positive number.
        """
        scales = scales.astype(np.float32)
        if scales.shape != (self.shape[1],) or not (np.isfinite(scales).all() and (scales > 0).all()):
            raise InputError(f"input scales {list(scales.shape)}: expected {self.shape[1]} positive numbers")
        return replace(self, parts={**self.parts, INPUT_SCALES: scales.astype(np.float32)})


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """Difference between weights and their quantized values.

    ``mse`` is the mean squared error; ``sqnr_db`` is 10 log10(mean square / mse), infinite when nothing was lost.
    """

    mse: float
    sqnr_db: float


def check_weights(weights: Weights, name: str) -> None:
    """Raises ``InputError`` unless the ``weights`` of that ``name`` are a float16 or float32 matrix with elements."""
    if weights.ndim != 2 or 0 in weights.shape:
        raise InputError(f"{name} has the shape {list(weights.shape)}; expected a matrix [outputs, inputs]")
    if weights.dtype not in (np.float16, np.float32):
        raise InputError(f"{name} is {weights.dtype}; expected float16 or float32 weights")


def quantize(weights: Weights, format: Format | str, *, name: str = "weights") -> QuantizedTensor:
    """Quantize ``weights``, float16 or float32 [outputs, inputs], to ``format`` or to the format of that name.

    Raises ``InputError``, which names the tensor ``name``: not a matrix of one of these types, empty, a NaN or an
    infinity in it, or values beyond what the format's scales can express.
    """
    format = get_format(format) if isinstance(format, str) else format
    check_weights(weights, name)
    stored = weights.T if format.groups_along_outputs else weights
    try:
        parts = _pack(stored, format.along_inputs)
    except InputError as error:
        turned = " (transposed: a row is an input)" if format.groups_along_outputs else ""
        raise InputError(f"{name}{turned}: {error}") from None
    return QuantizedTensor(format=format, shape=(weights.shape[0], weights.shape[1]), parts=parts)


def _pack(weights: Weights, format: Format) -> Parts:
    """All parts of ``weights`` [rows, columns] with groups along the columns."""
    if format.family == "fp16":
        return fp16_mac.quantize(weights)
    fit, make_coder = _QUANTIZERS[format.family]
    parts = fit(weights, format)
    coder = make_coder(parts, format, weights.shape[1])
    layout = format.layout(*weights.shape)["codes"]
    codes = np.empty(layout.shape, dtype=np.uint8)
    for rows, block in row_blocks(weights):
        codes[rows] = pack(coder.encode(block, rows), format.weight_bits)
    return {"codes": codes, **parts}


def quantization_error(weights: Weights, quantized: QuantizedTensor) -> QuantizationError:
    """Error of ``quantized`` against ``weights`` [outputs, inputs], summed in float64 block by block."""
    noise = signal = 0.0
    whole = quantized.dequantize() if quantized.format.groups_along_outputs else None
    for rows, block in row_blocks(weights):
        exact = block.astype(np.float64)
        difference = (exact - (quantized.dequantize(rows) if whole is None else whole[rows])).ravel()
        noise += float(difference @ difference)
        signal += float(exact.ravel() @ exact.ravel())
    ratio = math.inf if noise == 0 else (10 * math.log10(signal / noise) if signal and noise < math.inf else -math.inf)
    return QuantizationError(mse=noise / weights.size, sqnr_db=ratio)
