"""What formats do to a model: the error of every layer, the bits per weight, and the model's score before and after.

Signal to quantization noise (SQNR) of the whole model is that of all its weights together: the sum of the squares of
all weights over the sum of the squares of all errors. Output error is that of a layer's output on a calibration text,
‖(W - Ŵ) X‖² / ‖W X‖². The score of a language model is its perplexity per token, that of an encoder the mean cosine
between the embeddings before and after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from termwise.algorithms.calibration import MAXIMUM_WINDOWS
from termwise.algorithms.datatypes import special_value
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import FREE, Format
from termwise.algorithms.grid import row_blocks
from termwise.algorithms.models import TINY, Matrix, Model
from termwise.algorithms.quantize import INPUT_SCALES, QuantizedTensor, quantization_error, quantize
from termwise.algorithms.shapes import ModelShape
from termwise.algorithms.text import Text, calibration_text

if TYPE_CHECKING:
    from termwise.algorithms.calibrated import CalibrationMethod
    from termwise.algorithms.embeddings import EmbeddingEvaluator
    from termwise.algorithms.packed_model import PackedModelWriter
    from termwise.algorithms.perplexity import Evaluator

    AnyEvaluator = Evaluator | EmbeddingEvaluator

LayerHook = Callable[[str, QuantizedTensor], None]
Wrap = Callable[[Iterator[Any]], Iterable[Any]]

ACTIVATION_TOKENS = 8192
"""Tokens of the calibration text on which static scales of activations are found."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is measured before quantization: on ``text``, and how that is used (``method``; None: only activations).

    The method reads at most ``windows`` windows of the text, spread evenly over it.
    """

    text: Text
    method: CalibrationMethod | None = None
    windows: int = MAXIMUM_WINDOWS


def default_calibration(model: Model) -> Calibration | None:
    """Topics that ``tiny`` was trained on, for ``tiny``; no other model has a text of its own here."""
    return Calibration(text=calibration_text()) if model.name == TINY else None


@dataclass(frozen=True, kw_only=True)
class LayerQuality:
    """One quantized layer.

    Attributes:
        name: path of its module.
        format: name of its format.
        shape: (outputs, inputs).
        sqnr_db: signal to quantization noise; None where nothing was lost.
        mse: mean squared error of a weight.
        output_error: squared error of the output over its square, on the calibration text; None where none was read.
        bits_per_weight: counted from the packed bytes.
        short_group: weights in the short last group of every row; 0 when all groups are full.
        histogram: share of pairs (OliVe), of groups by special value or data type (BitMoD, ANT), of outliers (GOBO).
        note: what a reader should know of this layer; empty if nothing.
    """

    name: str
    format: str
    shape: tuple[int, int]
    sqnr_db: float | None
    mse: float
    output_error: float | None
    bits_per_weight: float
    short_group: int
    histogram: dict[str, float] = field(default_factory=dict)
    note: str


@dataclass(frozen=True, kw_only=True)
class WeightQuality:
    """All quantized layers of a model.

    ``sqnr_db`` (None where nothing was lost), ``mse`` and ``bits_per_weight`` are those of all weights together;
    ``packed_bytes`` is the size of all layers; ``histogram`` the layers' histograms, weighted by their weights.
    """

    layers: tuple[LayerQuality, ...]
    sqnr_db: float | None
    mse: float
    bits_per_weight: float
    weights: int
    packed_bytes: int
    histogram: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, units in the names."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Errors of the weights; the score with them, None where there is none, and then why (None if none was asked)."""

    quality: WeightQuality
    score: float | None
    reason: str | None


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


def histogram_of(weights: Matrix, tensor: QuantizedTensor) -> dict[str, float]:
    """What a format chose in one matrix, as shares that add up to 1 (see ``LayerQuality``); empty for other formats."""
    family = tensor.format.family
    if family == "olive":
        from termwise.algorithms.outlier_victim import pair_statistics

        turned = weights.T if tensor.format.groups_along_outputs else weights
        pairs = pair_statistics(turned, tensor)
        counts = {
            "normal-normal": pairs.normal_normal,
            "outlier-normal": pairs.outlier_normal,
            "outlier-outlier": pairs.outlier_outlier,
        }
        return {name: count / max(pairs.pairs, 1) for name, count in counts.items()}
    if family == "gobo":
        outliers = tensor.parts["outlier_positions"].size / weights.size
        return {"dictionary": 1 - outliers, "outliers": outliers}
    types = tensor.format.datatypes
    if family not in ("bitmod", "ant") or len(types) < 2:
        return {}
    from termwise.algorithms.grid import Grid

    assert isinstance(tensor.coder, Grid)
    counts_of_types = np.bincount(tensor.coder.chosen.ravel(), minlength=len(types))
    values = [special_value(datatype) for datatype in types]
    labels = [datatype.name if value is None else f"{value:+g}" for datatype, value in zip(types, values, strict=True)]
    return {label: float(count / counts_of_types.sum()) for label, count in zip(labels, counts_of_types, strict=True)}


def layer_quality(
    name: str, weights: Matrix, tensor: QuantizedTensor, output_error: float | None = None
) -> LayerQuality:
    """Errors of one layer: ``tensor`` against ``weights`` [outputs, inputs]."""
    error = quantization_error(weights, tensor)
    note = ""
    if tensor.short_group:
        note = f"last group of every row has {tensor.short_group} of {tensor.format.group_size} weights"
    return LayerQuality(
        name=name,
        format=tensor.format.name,
        shape=tensor.shape,
        sqnr_db=error.sqnr_db if math.isfinite(error.sqnr_db) else None,
        mse=error.mse,
        output_error=output_error,
        bits_per_weight=tensor.bits_per_weight,
        short_group=tensor.short_group,
        histogram=histogram_of(weights, tensor),
        note=note,
    )


class _Totals:
    """Sums over the layers of a model."""

    def __init__(self) -> None:
        self.layers: list[LayerQuality] = []
        self.signal = self.noise = 0.0
        self.weights = self.packed_bytes = 0

    def add(self, weights: Matrix, tensor: QuantizedTensor, layer: LayerQuality) -> None:
        self.layers.append(layer)
        self.signal += _square_sum(weights)
        self.noise += layer.mse * weights.size
        self.weights += weights.size
        self.packed_bytes += tensor.nbytes

    def result(self) -> WeightQuality:
        shares: dict[str, float] = {}
        for layer in self.layers:
            for label, share in layer.histogram.items():
                share *= layer.shape[0] * layer.shape[1] / self.weights
                shares[label] = shares.get(label, 0.0) + share
        return WeightQuality(
            layers=tuple(self.layers),
            sqnr_db=_decibels(self.signal, self.noise),
            mse=self.noise / max(self.weights, 1),
            bits_per_weight=8 * self.packed_bytes / max(self.weights, 1),
            weights=self.weights,
            packed_bytes=self.packed_bytes,
            histogram=shares,
        )


def quantize_matrices(matrices: Iterable[tuple[str, Matrix]], format: Format) -> WeightQuality:
    """Quantize every matrix, float16 or float32 [outputs, inputs]. Raises ``InputError`` (see ``quantize``)."""
    totals = _Totals()
    for name, matrix in matrices:
        tensor = quantize(matrix, format, name=name)
        totals.add(matrix, tensor, layer_quality(name, matrix, tensor))
    return totals.result()


def packed_bits_per_weight(shape: ModelShape, format: Format) -> float | None:
    """Bits per weight of all linear layers of ``shape`` in ``format``, counted from the bytes that they would take.

    None where these depend on the weights (GOBO).
    """
    if any(FREE in part.shape for part in format.layout(1, 1).values()):
        return None
    packed_bytes = sum(format.packed_bytes(linear.outputs, linear.inputs) for linear in shape.linears)
    return 8 * packed_bytes / sum(linear.outputs * linear.inputs for linear in shape.linears)


def check_weights(model: Model) -> None:
    """Read every matrix once. Raises ``InputError`` for a truncated file, a NaN or an infinite weight."""
    for name, matrix in model.matrices():
        if not np.isfinite(matrix).all():
            raise InputError(f"{name} of {model.name} holds NaN or infinite weights; expected finite ones")


def _layers(
    model: Model,
    formats: Mapping[str, Format],
    calibration: Calibration | None,
    store: PackedModelWriter | None,
) -> Iterator[tuple[str, QuantizedTensor, float | None]]:
    """Name, quantized tensor and output error of every layer; what ``store`` has is taken, the rest made and kept."""
    done = store.done if store is not None else lambda _: None
    if calibration is None or calibration.method is None:
        for name, format in formats.items():
            tensor = done(name)
            if tensor is None:
                tensor = quantize(model.matrix(name), format, name=name)
                if store is not None:
                    store.add(name, tensor)
            yield name, tensor, None
        return
    from termwise.algorithms.calibrated import LayerOutputError, quantize_calibrated

    errors: dict[str, float | None] = {}

    def told(name: str, tensor: QuantizedTensor, error: LayerOutputError | None) -> None:
        errors[name] = None if error is None else error.relative
        if store is not None:
            store.add(name, tensor, errors[name])

    for name in formats:
        tensor = done(name)
        if tensor is not None:
            yield name, tensor, None if store is None else store.output_error(name)
    calibrated = quantize_calibrated(
        model,
        formats,
        calibration.text,
        calibration.method,
        on_layer=told,
        done=done,
        maximum_windows=calibration.windows,
    )
    for name, tensor in calibrated:
        yield name, tensor, errors[name]


def evaluate(
    model: Model,
    formats: Format | Mapping[str, Format],
    evaluator: AnyEvaluator | None,
    *,
    calibration: Calibration | None = None,
    store: PackedModelWriter | None = None,
    wrap: Wrap | None = None,
    told: Callable[[str, QuantizedTensor], None] = lambda _, __: None,
) -> Evaluation:
    """Quantize ``model`` and measure its score, where there is an ``evaluator``, with what was quantized.

    The evaluator has the model's own weights and activations again when this returns or raises.

    Args:
        model: the model.
        formats: of all linear layers, or of each that is to be quantized, by name.
        evaluator: the model in memory, with the text that it is measured on.
        calibration: what is measured before; needed by calibrated methods and by static scales of activations.
        store: gives the layers that an earlier run has finished, and receives every layer that is quantized now.
        wrap: may show progress over the layers.
        told: is given every layer's name and what was quantized.

    Raises ``InputError`` as ``quantize`` does, and for a format whose activations need a calibration there is not.
    """
    if isinstance(formats, Format):
        formats = dict.fromkeys(model.matrix_names, formats)
    totals = _Totals()
    try:
        put = _installer(model, formats, evaluator, calibration)
        layers = _layers(model, formats, calibration, store)
        for name, tensor, output_error in layers if wrap is None else wrap(layers):
            matrix = model.matrix(name)
            totals.add(matrix, tensor, layer_quality(name, matrix, tensor, output_error))
            put(name, tensor)
            told(name, tensor)
        quality = totals.result()
        if evaluator is None:
            return Evaluation(quality=quality, score=None, reason=None)
        value = score(evaluator)
    finally:
        if evaluator is not None:
            evaluator.restore()
    if not math.isfinite(value):
        return Evaluation(quality=quality, score=None, reason="the perplexity is not a finite number")
    return Evaluation(quality=quality, score=value, reason=None)


def score(evaluator: AnyEvaluator) -> float:
    """Perplexity per token of a language model, mean cosine of the embeddings of an encoder."""
    from termwise.algorithms.perplexity import Evaluator

    return evaluator.perplexity().per_token if isinstance(evaluator, Evaluator) else evaluator.cosine()


def check_calibration(formats: Format | Mapping[str, Format], calibration: Calibration | None) -> bool:
    """Whether one of ``formats`` has static scales of activations. Raises ``InputError`` if so without a text."""
    from termwise.algorithms.activations import needs_calibration

    every = [formats] if isinstance(formats, Format) else list(formats.values())
    static = [format for format in every if format.activation_bits is not None and needs_calibration(format)]
    if static and calibration is None:
        raise InputError(
            f"{static[0].name} quantizes activations with scales that are found before; expected a calibration text"
        )
    return bool(static)


def _installer(
    model: Model, formats: Mapping[str, Format], evaluator: AnyEvaluator | None, calibration: Calibration | None
) -> LayerHook:
    """What puts a quantized layer into the evaluator, with its activations."""
    if evaluator is None:
        return lambda _name, _tensor: None
    from termwise.algorithms.activations import activation_quantizer, sample_inputs

    samples = {}
    if check_calibration(formats, calibration) and calibration is not None:
        samples = sample_inputs(type(evaluator)(model, calibration.text), tokens=ACTIVATION_TOKENS)

    def put(name: str, tensor: QuantizedTensor) -> None:
        if tensor.format.activation_bits is None:
            evaluator.replace(name, tensor.dequantize())
            return
        scales = tensor.parts.get(INPUT_SCALES)
        sample = samples.get(name)
        if scales is not None and sample is not None:
            sample = sample.divided_by(scales.astype(np.float32))
        evaluator.replace(
            name,
            tensor.dequantize_scaled(),
            activation=activation_quantizer(tensor.format, sample, name=name),
            input_scales=None if scales is None else scales.astype(np.float32),
        )

    return put
