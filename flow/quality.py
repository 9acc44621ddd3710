"""How good a model is in a format: the error of every layer, bits per weight, and perplexity.

One pass over the layers quantizes each, measures it and puts the dequantized weights into the model in memory; then the
perplexity is measured. Activations, embeddings, norms, keys and values stay in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format
from termwise.algorithms.shapes import KNOWN_SHAPES, ModelShape, known_shape

if TYPE_CHECKING:
    from termwise.algorithms.models import Matrix, Model
    from termwise.algorithms.perplexity import Evaluator
    from termwise.algorithms.quantize import QuantizedTensor
    from termwise.algorithms.text import Text

LayerProgress = Callable[[int, int], None]
"""Is told layers done and layers in all."""


def shape_without_weights(reference: str) -> ModelShape | None:
    """The known shape that ``reference`` names, None where it names something else (a directory has precedence)."""
    if reference.lower() in KNOWN_SHAPES and not Path(reference).exists():
        return known_shape(reference)
    return None


def text_for(path: str | None) -> Text:
    """The text at ``path``; without one, the held-out topics of Python's documentation. Raises ``InputError``."""
    from termwise.algorithms.text import held_out_text, read_text

    return held_out_text() if path is None else read_text(Path(path))


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """One quantized layer of ``outputs`` × ``inputs`` weights.

    ``sqnr_db`` is None where nothing was lost; ``note`` is what is special about the layer, None for nothing.
    """

    name: str
    outputs: int
    inputs: int
    mse: float
    sqnr_db: float | None
    bits_per_weight: float
    packed_bytes: int
    note: str | None


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A model in a format: its layers, and sums over all their weights.

    ``perplexity`` (per token) and ``bits_per_byte`` are None with a ``perplexity_reason`` where the model has none.
    """

    layers: tuple[LayerQuality, ...]
    mse: float
    sqnr_db: float | None
    bits_per_weight: float
    packed_bytes: int
    weights: int
    perplexity: float | None
    bits_per_byte: float | None
    predicted_tokens: int | None
    perplexity_reason: str | None


@dataclass
class Workbench:
    """A model with a text, kept in memory between formats.

    Attributes:
        model: whose linear layers are quantized.
        text: that perplexity is measured on.
    """

    model: Model
    text: Text
    _evaluator: Evaluator | None = field(default=None, init=False, repr=False)

    @property
    def perplexity_reason(self) -> str | None:
        """Why the model has no perplexity; None if it has one."""
        return self.model.not_runnable_reason

    def evaluator(self) -> Evaluator | None:
        """The model in memory, loaded once; None where it cannot be run."""
        if self._evaluator is None and self.perplexity_reason is None:
            from termwise.algorithms.perplexity import Evaluator

            self._evaluator = Evaluator(self.model, self.text)
        return self._evaluator

    def check_weights(self, progress: LayerProgress | None = None) -> None:
        """Read every layer once. Raises ``InputError`` for weights that are damaged, NaN or infinite."""
        total = len(self.model.matrix_names)
        for place, _ in enumerate(self.model.matrices(), start=1):
            if progress is not None:
                progress(place, total)

    def perplexity_before(self) -> float | None:
        """Perplexity per token with the model's own weights; None where it cannot be run."""
        evaluator = self.evaluator()
        if evaluator is None:
            return None
        evaluator.restore()
        return evaluator.perplexity().per_token

    def measure(
        self,
        format: Format,
        *,
        progress: LayerProgress | None = None,
        keep: Callable[[str, QuantizedTensor], None] | None = None,
    ) -> Quality:
        """Quantize every layer to ``format`` and measure what that does.

        ``keep`` receives every quantized layer, for example to save it. Raises ``InputError`` for weights that cannot
        be quantized.
        """
        from termwise.algorithms.quantize import quantization_error, quantize

        evaluator = self.evaluator()
        if evaluator is not None:
            evaluator.restore()
        layers: list[LayerQuality] = []
        noise = signal = 0.0
        total = len(self.model.matrix_names)
        for place, (name, weights) in enumerate(self.model.matrices(), start=1):
            quantized = quantize(weights, format, name=name)
            error = quantization_error(weights, quantized)
            if keep is not None:
                keep(name, quantized)
            if evaluator is not None:
                evaluator.replace(name, quantized.dequantize())
            noise += error.mse * weights.size
            signal += _sum_of_squares(weights)
            layers.append(
                LayerQuality(
                    name=name,
                    outputs=weights.shape[0],
                    inputs=weights.shape[1],
                    mse=error.mse,
                    sqnr_db=error.sqnr_db if math.isfinite(error.sqnr_db) else None,
                    bits_per_weight=quantized.bits_per_weight,
                    packed_bytes=quantized.nbytes,
                    note=_note(format, quantized),
                )
            )
            if progress is not None:
                progress(place, total)
        count = sum(layer.outputs * layer.inputs for layer in layers)
        packed_bytes = sum(layer.packed_bytes for layer in layers)
        after = None if evaluator is None else evaluator.perplexity()
        return Quality(
            layers=tuple(layers),
            mse=noise / count,
            sqnr_db=10 * math.log10(signal / noise) if noise and signal else None,
            bits_per_weight=8 * packed_bytes / count,
            packed_bytes=packed_bytes,
            weights=count,
            perplexity=None if after is None else after.per_token,
            bits_per_byte=None if after is None else after.bits_per_byte,
            predicted_tokens=None if after is None else after.predicted_tokens,
            perplexity_reason=self.perplexity_reason,
        )


def _sum_of_squares(weights: Matrix) -> float:
    """Sum of the squares of ``weights`` in float64, a few rows at a time."""
    rows_at_once = max(1, (1 << 20) // weights.shape[1])
    total = 0.0
    for start in range(0, weights.shape[0], rows_at_once):
        values = weights[start : start + rows_at_once].astype(np.float64).ravel()
        total += float(values @ values)
    return total


def _note(format: Format, quantized: QuantizedTensor) -> str | None:
    """What is special about a layer: a group size that does not divide its inputs."""
    inputs = quantized.shape[1]
    if not quantized.short_group:
        return None
    if quantized.short_group == inputs:
        return f"one group of {inputs} per row: the layer has fewer inputs than a group of {format.group_size}"
    return f"the last group of each row has {quantized.short_group} weights instead of {format.group_size}"


def outputs_of(quality: Quality) -> dict[str, Any]:
    """What a record keeps of a quality: everything but the layers."""
    return {
        "perplexity": quality.perplexity,
        "bits_per_byte": quality.bits_per_byte,
        "predicted_tokens": quality.predicted_tokens,
        "perplexity_reason": quality.perplexity_reason,
        "sqnr_db": quality.sqnr_db,
        "mse": quality.mse,
        "bits_per_weight": quality.bits_per_weight,
        "packed_bytes": quality.packed_bytes,
        "weights": quality.weights,
        "layers_with_a_short_group": sum(layer.note is not None for layer in quality.layers),
    }


def outputs_of_shape(shape: ModelShape, format: Format) -> dict[str, Any]:
    """The same for a shape: bytes are known without weights, accuracy is not."""
    packed_bytes = sum(format.packed_bytes(linear.outputs, linear.inputs) for linear in shape.linears)
    weights = sum(linear.outputs * linear.inputs for linear in shape.linears)
    return {
        "perplexity": None,
        "bits_per_byte": None,
        "predicted_tokens": None,
        "perplexity_reason": f"{shape.name} is a shape without weights",
        "sqnr_db": None,
        "mse": None,
        "bits_per_weight": 8 * packed_bytes / weights,
        "packed_bytes": packed_bytes,
        "weights": weights,
        "layers_with_a_short_group": sum(format.short_group(linear.inputs) > 0 for linear in shape.linears),
    }

