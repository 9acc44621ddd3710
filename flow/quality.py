"""What a format does to a model: the error of every layer, the bits per weight, and the perplexity before and after.

Signal to quantization noise (SQNR) of the whole model is that of all its weights together: the sum of the squares of
all weights over the sum of the squares of all errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from termwise.algorithms.assignment import Assignment
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format
from termwise.algorithms.grid import row_blocks
from termwise.algorithms.models import Matrix, Model
from termwise.algorithms.quantize import QuantizedTensor, quantization_error, quantize
from termwise.algorithms.shapes import ModelShape

if TYPE_CHECKING:
    from termwise.algorithms.perplexity import Evaluator

LayerHook = Callable[[str, QuantizedTensor], None]


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """One quantized layer.

    Attributes:
        name: path of its module.
        shape: (outputs, inputs).
        format: name of its format.
        sqnr_db: signal to quantization noise; None where nothing was lost.
        mse: mean squared error of a weight.
        bits_per_weight: counted from the packed bytes.
        short_group: weights in the short last group of every row; 0 when all groups are full.
        note: what a reader should know of this layer; empty if nothing.
    """

    name: str
    shape: tuple[int, int]
    format: str
    sqnr_db: float | None
    mse: float
    bits_per_weight: float
    short_group: int
    note: str


@dataclass(frozen=True, kw_only=True)
class WeightQuality:
    """All quantized layers of a model.

    ``sqnr_db`` (None where nothing was lost), ``mse`` and ``bits_per_weight`` are those of all weights together;
    ``packed_bytes`` is the size of all layers.
    """

    layers: tuple[LayerQuality, ...]
    sqnr_db: float | None
    mse: float
    bits_per_weight: float
    weights: int
    packed_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, units in the names."""
        return asdict(self)


def _decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None where it is infinite."""
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None


def _square_sum(weights: Matrix) -> float:
    """Sum of the squares of all weights [outputs, inputs], in float64."""
    total = 0.0
    for _, block in row_blocks(weights):
        exact = block.astype(np.float64).ravel()
        total += float(exact @ exact)
    return total


def quantize_matrices(
    matrices: Iterable[tuple[str, Matrix]], format: Format | Assignment, *, on_layer: LayerHook | None = None
) -> WeightQuality:
    """Quantize every matrix, float16 or float32 [outputs, inputs]; ``on_layer`` receives each result once.

    ``format`` is that of all matrices, or says which one each of them has.

    Raises ``InputError`` (see ``quantize``), or where there is no matrix at all.
    """
    layers = []
    signal = noise = 0.0
    weights = packed_bytes = 0
    for name, matrix in matrices:
        tensor = quantize(matrix, format if isinstance(format, Format) else format[name], name=name)
        error = quantization_error(matrix, tensor)
        note = ""
        if tensor.short_group:
            note = f"last group of every row has {tensor.short_group} of {tensor.format.group_size} weights"
        layers.append(
            LayerQuality(
                name=name,
                shape=tensor.shape,
                format=tensor.format.name,
                sqnr_db=error.sqnr_db if math.isfinite(error.sqnr_db) else None,
                mse=error.mse,
                bits_per_weight=tensor.bits_per_weight,
                short_group=tensor.short_group,
                note=note,
            )
        )
        signal += _square_sum(matrix)
        noise += error.mse * matrix.size
        weights += matrix.size
        packed_bytes += tensor.nbytes
        if on_layer is not None:
            on_layer(name, tensor)
    return WeightQuality(
        layers=tuple(layers),
        sqnr_db=_decibels(signal, noise),
        mse=noise / max(weights, 1),
        bits_per_weight=8 * packed_bytes / max(weights, 1),
        weights=weights,
        packed_bytes=packed_bytes,
    )


def packed_bits_per_weight(shape: ModelShape, format: Format) -> float:
    """Bits per weight of all linear layers of ``shape`` in ``format``, counted from the bytes that they would take."""
    packed_bytes = sum(format.packed_bytes(linear.outputs, linear.inputs) for linear in shape.linears)
    return 8 * packed_bytes / sum(linear.outputs * linear.inputs for linear in shape.linears)


def check_weights(model: Model) -> None:
    """Read every matrix once. Raises ``InputError`` for a truncated file, a NaN or an infinite weight."""
    for name, matrix in model.matrices():
        if not np.isfinite(matrix).all():
            raise InputError(f"{name} of {model.name} holds NaN or infinite weights; expected finite ones")


def evaluate_format(
    model: Model,
    format: Format | Assignment,
    evaluator: Evaluator | None,
    *,
    wrap: Callable[[Iterator[tuple[str, Matrix]]], Iterable[tuple[str, Matrix]]] | None = None,
    keep: LayerHook | None = None,
) -> tuple[WeightQuality, float | None, str | None]:
    """Quantize ``model`` and measure its perplexity, where there is an ``evaluator``, with the quantized weights.

    The evaluator has the model's own weights again when this returns or raises. ``wrap`` may show progress over the
    matrices; ``keep`` receives every quantized tensor.

    Returns: the error of the weights, the perplexity per token (None without an evaluator, or where it is not a finite
    number), and why there is none (None where there is one, or without an evaluator).
    """

    def on_layer(name: str, tensor: QuantizedTensor) -> None:
        if keep is not None:
            keep(name, tensor)
        if evaluator is not None:
            evaluator.replace(name, tensor.dequantize())

    matrices = model.matrices()
    try:
        quality = quantize_matrices(matrices if wrap is None else wrap(matrices), format, on_layer=on_layer)
        if evaluator is None:
            return quality, None, None
        try:
            value = evaluator.perplexity().per_token
        except OverflowError:
            value = math.inf
    finally:
        if evaluator is not None:
            evaluator.restore()
    if not math.isfinite(value):
        return quality, None, "the perplexity is not a finite number"
    return quality, value, None
