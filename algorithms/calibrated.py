"""Quantization that looks at the inputs of a layer: AWQ, SmoothQuant, GPTQ, AdaDim, for every format.

What all methods lower, or at least measure, is the output error of a layer, ‖(W - Ŵ) Xᵀ‖² = tr((W - Ŵ) H (W - Ŵ)ᵀ)
with the weights W [outputs, inputs], the effective weights Ŵ, the layer's inputs X [tokens, inputs] on a calibration
text and H = Xᵀ X. Two ideas are combined here:

* an input scale s > 0 per channel: W · diag(s) is quantized, and what precedes the layer is divided by s. Layers that
  share an input share the scales. ``Awq`` and ``SmoothQuant`` choose them, from the activations' magnitudes.
* other codes than the nearest ones: ``Gptq`` rounds a column and lets the columns that are still to come make up for
  the error. A format's scales and data types are those that ``quantize`` finds for the weights, before any rounding.

``AdaDim`` chooses for each layer whether groups lie along its inputs or its outputs.

The activations of a format (``int-w4a8g128``) stay in floating point here: the error of their rounding is not measured,
and later layers do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.calibration import MAXIMUM_WINDOWS, Calibration, InputStatistics, SharedInput
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.grid import Weights
from termwise.algorithms.models import Model
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.algorithms.text import Text

Float64 = NDArray[np.float64]

_LEAST_AWQ_SCALE = 1e-4
_LEAST_SMOOTHING = 1e-5
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class LayerOutputError:
    """Output error of a layer on the calibration text, and what it is relative to.

    ``noise`` is ‖(W - Ŵ) Xᵀ‖², ``signal`` is ‖W Xᵀ‖², both summed over all tokens and outputs.
    """

    noise: float
    signal: float

    @property
    def relative(self) -> float:
        """``noise`` / ``signal``: 0 where nothing is lost, infinite where there was no signal to lose."""
        if self.noise == 0:
            return 0.0
        return self.noise / self.signal if self.signal else math.inf


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer that is to be quantized: ``weights``, float16 or float32 [outputs, inputs], to ``format``."""

    name: str
    weights: Weights
    format: Format


class CalibrationMethod(Protocol):
    """How the layers that share an input are quantized."""

    @property
    def name(self) -> str:
        """Name of the method, as ``get_method`` takes it where its parameters are the default ones."""

    def quantize(self, layers: Sequence[Layer], statistics: InputStatistics) -> list[QuantizedTensor]:
        """Each of ``layers``, quantized; ``statistics`` are those of the input that all of them read."""


def squared_output(weights: NDArray[np.floating], gram: Float64) -> float:
    """tr(W H Wᵀ) of ``weights`` [outputs, inputs] and ``gram`` H [inputs, inputs]: ‖W Xᵀ‖² over all tokens.

    In float64 throughout, because the good codes are those whose errors cancel each other in this sum.
    """
    total = 0.0
    for start in range(0, len(weights), _ROWS_AT_ONCE):
        part = weights[start : start + _ROWS_AT_ONCE].astype(np.float64)
        total += float(np.vdot(part @ gram, part))
    return max(total, 0.0)


def output_error(weights: Weights, quantized: QuantizedTensor, gram: Float64) -> LayerOutputError:
    """Output error of ``quantized`` against ``weights`` [outputs, inputs] on inputs with ``gram`` [inputs, inputs]."""
    return LayerOutputError(noise=_noise(weights, quantized, gram), signal=squared_output(weights, gram))


def _noise(weights: Weights, quantized: QuantizedTensor, gram: Float64) -> float:
    return squared_output(weights.astype(np.float64) - quantized.dequantize(), gram)


class Rounder(Protocol):
    """How weights are rounded once their input scales are known."""

    @property
    def name(self) -> str:
        """Name of the rounding, as part of a method's name."""

    def prepare(self, gram: Float64) -> Callable[[Layer], QuantizedTensor]:
        """What quantizes layers whose common input has the ``gram`` [inputs, inputs]."""


@dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """Every weight by itself: what ``quantize`` does. As a method, its output error is measured like the others'."""

    @property
    def name(self) -> str:
        """``none``."""
        return "none"

    def prepare(self, gram: Float64) -> Callable[[Layer], QuantizedTensor]:  # noqa: ARG002  # as others need it
        """``quantize``, whatever the inputs are."""
        return _nearest

    def quantize(self, layers: Sequence[Layer], statistics: InputStatistics) -> list[QuantizedTensor]:
        """Every layer rounded to nearest."""
        return [self.prepare(statistics.gram)(layer) for layer in layers]


def _combined(name: str, rounding: Rounder) -> str:
    """Name of a method with its rounding."""
    return name if isinstance(rounding, RoundToNearest) else f"{name}+{rounding.name}"


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ (arXiv 2210.17323, Algorithm 1).

    Scales and data types are those that ``quantize`` gives the weights, and stay; so groups are static ones. Columns
    are rounded one after the other (pairs for OliVe), each to the nearest codes, and what the rounding of column i
    costs is taken from the columns behind it: w_j -= (w_i - ŵ_i) U_ij / U_ii with the upper triangular U of
    H⁻¹ = Uᵀ U. ``damping`` × the mean of H's diagonal is added to it. Columns further behind learn of ``block_columns``
    columns at once, which changes nothing but the time. ``act_order`` takes columns with large inputs first.

    An input that is always zero says nothing: its weights are set to zero before they are rounded, as the authors' code
    does; on the diagonal stands the mean of the others' (there: 1, which depends on the unit of the activations).
    Where the inputs are uncorrelated (H is diagonal) the codes are the nearest ones; in general the output error is not
    guaranteed to be below that of rounding to nearest, though it nearly always is. Formats without codes (``fp16``) are
    rounded to nearest.
    """

    damping: float = 0.01
    block_columns: int = 128
    act_order: bool = False

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"GPTQ with damping {self.damping}; expected a positive fraction of the mean diagonal")
        if self.block_columns < 1:
            raise InputError(f"GPTQ with blocks of {self.block_columns} columns; expected at least one")

    @property
    def name(self) -> str:
        """``gptq``."""
        return "gptq"

    def prepare(self, gram: Float64) -> Callable[[Layer], QuantizedTensor]:
        """What rounds with the error feedback of ``gram`` [inputs, inputs]; its factors are computed once."""
        return _Feedback(gram, self)

    def quantize(self, layers: Sequence[Layer], statistics: InputStatistics) -> list[QuantizedTensor]:
        """Every layer rounded with error feedback."""
        rounded = self.prepare(statistics.gram)
        return [rounded(layer) for layer in layers]


@dataclass(frozen=True, kw_only=True)
class Awq:
    """AWQ (arXiv 2306.00978, section 3.2): input scales from the mean magnitudes of the activations.

    s = mean|X|^alpha, normalised so that its greatest times its least is 1 (and at least 1e-4 before that, as in the
    authors' code). Of alpha = i / ``grid_points`` for i = 0, 1, .. the one with the least output error of all layers
    that share the input is taken, the first of equals; the error is that of rounding to nearest. alpha = 0 scales
    nothing, so the sum of the layers' errors is never above that of ``none``. The best scale by that error is rounded
    by ``rounding``. The paper's search for a clipping range is not made.
    """

    grid_points: int = 20
    rounding: Rounder = field(default_factory=RoundToNearest)

    def __post_init__(self) -> None:
        if self.grid_points < 1:
            raise InputError(f"AWQ with {self.grid_points} grid points; expected at least one")

    @property
    def name(self) -> str:
        """``awq``, with the rounding where it is another one than to nearest."""
        return _combined("awq", self.rounding)

    def scales(self, index: int, statistics: InputStatistics) -> NDArray[np.float32]:
        """Input scales, float32 [inputs], of the grid point ``index``."""
        scales = np.maximum(statistics.mean_magnitude ** (index / self.grid_points), _LEAST_AWQ_SCALE)
        normalised: Float64 = scales / math.sqrt(scales.max() * scales.min())
        return normalised.astype(np.float32)

    def quantize(self, layers: Sequence[Layer], statistics: InputStatistics) -> list[QuantizedTensor]:
        """Every layer with the best of the scales."""
        scaled = [layer for layer in layers if layer.format.family != "fp16"]
        best, least = self.scales(0, statistics), math.inf
        for index in range(self.grid_points if scaled else 0):
            scales = self.scales(index, statistics)
            tensors = _quantize_scaled(scaled, scales, statistics.gram, RoundToNearest())
            noise = sum(
                _noise(layer.weights, tensor, statistics.gram) for layer, tensor in zip(scaled, tensors, strict=True)
            )
            if noise < least:
                best, least = scales, noise
        return _quantize_scaled(layers, best, statistics.gram, self.rounding)


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """SmoothQuant (arXiv 2211.10438, Eq. 4): input scales that move the activations' outliers into the weights.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), where W_j are the weights of channel j in all layers that share the
    input; both factors at least 1e-5, as the authors' code has it for the weights and for s. What is quantized easier
    are the activations X / s, so it pays for formats that quantize them too; weights alone get harder.
    """

    alpha: float = 0.5
    rounding: Rounder = field(default_factory=RoundToNearest)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"SmoothQuant with alpha {self.alpha}; expected a number from 0 to 1")

    @property
    def name(self) -> str:
        """``smoothquant``, with the rounding where it is another one than to nearest."""
        return _combined("smoothquant", self.rounding)

    def scales(self, layers: Sequence[Layer], statistics: InputStatistics) -> NDArray[np.float32]:
        """Input scales, float32 [inputs]."""
        largest = np.max([np.abs(layer.weights).max(axis=0) for layer in layers], axis=0).astype(np.float64)
        activations = np.maximum(statistics.max_magnitude.astype(np.float64), _LEAST_SMOOTHING)
        scales: Float64 = activations**self.alpha / np.maximum(largest, _LEAST_SMOOTHING) ** (1 - self.alpha)
        return scales.astype(np.float32)

    def quantize(self, layers: Sequence[Layer], statistics: InputStatistics) -> list[QuantizedTensor]:
        """Every layer with the scales of all."""
        scaled = [layer for layer in layers if layer.format.family != "fp16"] or layers
        return _quantize_scaled(layers, self.scales(scaled, statistics), statistics.gram, self.rounding)


@dataclass(frozen=True, kw_only=True)
class AdaDim:
    """AdaDim (arXiv 2309.15531, section 4): groups along the inputs or along the outputs, whichever has less error.

    Outliers of the activations make some input channels sensitive; with groups along the outputs they share their
    scales with nothing else. The choice is each layer's own, by its output error after ``rounding``; at equal errors,
    and for formats that know one direction only, the format stays as it is.
    """

    rounding: Rounder = field(default_factory=RoundToNearest)

    @property
    def name(self) -> str:
        """``adadim``, with the rounding where it is another one than to nearest."""
        return _combined("adadim", self.rounding)

    def quantize(self, layers: Sequence[Layer], statistics: InputStatistics) -> list[QuantizedTensor]:
        """Every layer in the better of its two formats."""
        rounded = self.rounding.prepare(statistics.gram)
        chosen = []
        for layer in layers:
            tensors = [
                rounded(Layer(name=layer.name, weights=layer.weights, format=format))
                for format in both_directions(layer.format)
            ]
            chosen.append(min(tensors, key=lambda tensor: _noise(layer.weights, tensor, statistics.gram)))
        return chosen


METHODS: Mapping[str, CalibrationMethod] = MappingProxyType(
    {
        method.name: method
        for method in (
            RoundToNearest(),
            Awq(),
            SmoothQuant(),
            Gptq(),
            AdaDim(),
            Awq(rounding=Gptq()),
            SmoothQuant(rounding=Gptq()),
            AdaDim(rounding=Gptq()),
        )
    }
)
"""Every method by its name, with the parameters of its paper."""


def get_method(name: str) -> CalibrationMethod:
    """The method called ``name``, with the parameters of its paper. Raises ``InputError`` for an unknown one."""
    if name not in METHODS:
        raise unknown_name("calibration method", name, METHODS)
    return METHODS[name]


def both_directions(format: Format) -> tuple[Format, ...]:
    """``format`` and its twin with groups in the other direction; ``format`` alone where there is none."""
    if format.groups_along_outputs:
        return format, format.along_inputs
    try:
        return format, get_format(f"{format.name}:axis=output")
    except InputError:
        return (format,)


def quantize_calibrated(
    model: Model,
    format_of: Format | Mapping[str, Format],
    text: Text,
    method: CalibrationMethod,
    *,
    on_layer: Callable[[str, QuantizedTensor, LayerOutputError | None], None] | None = None,
    done: Callable[[str], QuantizedTensor | None] | None = None,
    maximum_windows: int = MAXIMUM_WINDOWS,
    quantized_inputs: bool = True,
) -> Iterator[tuple[str, QuantizedTensor]]:
    """Quantize the linear layers of ``model`` by ``method`` on ``text``, block by block: name and tensor of each.

    ``format_of`` is one format for all layers, or the format of each layer that is to be quantized, by name. A stage's
    inputs are measured once, with its own weights; ``quantized_inputs`` says whether the stages before it have their
    quantized ones by then. ``on_layer`` is told each layer's output error, None for a layer that never runs (it is
    rounded to nearest).

    ``done`` gives the layers that an earlier run with the same arguments has finished, None for others: these are put
    in place and not yielded again. Layers that share an input are computed again unless all of them are finished, so
    that a run that was broken off yields what it would have yielded.

    Raises ``InputError`` as ``Calibration`` and ``quantize`` do, for a name in ``format_of`` that is no linear layer,
    and for a finished layer of another shape; ``TermwiseError`` where activations are not finite.
    """
    formats = dict.fromkeys(model.matrix_names, format_of) if isinstance(format_of, Format) else dict(format_of)
    for name in formats:
        if name not in model.matrix_names:
            raise unknown_name("linear layer", name, model.matrix_names)
    calibration = Calibration(model, text, maximum_windows=maximum_windows, quantized_inputs=quantized_inputs)
    for stage in calibration.stages():
        wanted = [name for name in stage.layers if name in formats]
        finished = _finished(model, wanted, done)
        shared = stage.statistics() if len(finished) < len(wanted) else ()
        for name, tensor, error in _quantize_stage(model, formats, wanted, finished, shared, method):
            if name not in finished:
                if on_layer is not None:
                    on_layer(name, tensor, error)
                yield name, tensor
            stage.replace(name, tensor.dequantize())


def _finished(
    model: Model, names: Sequence[str], done: Callable[[str], QuantizedTensor | None] | None
) -> dict[str, QuantizedTensor]:
    """Those of the layers ``names`` that an earlier run has finished. Raises ``InputError`` for another shape."""
    finished = {}
    for name in names:
        tensor = None if done is None else done(name)
        if tensor is not None:
            linear = next(linear for linear in model.structure.linears if linear.name == name)
            if tensor.shape != (linear.outputs, linear.inputs):
                raise InputError(
                    f"the finished layer {name} has the shape {list(tensor.shape)}; "
                    f"expected {[linear.outputs, linear.inputs]} of {model.name}"
                )
            finished[name] = tensor
    return finished


def _quantize_stage(
    model: Model,
    formats: Mapping[str, Format],
    wanted: Sequence[str],
    finished: Mapping[str, QuantizedTensor],
    shared: Sequence[SharedInput],
    method: CalibrationMethod,
) -> Iterator[tuple[str, QuantizedTensor, LayerOutputError | None]]:
    """The layers ``wanted`` of one stage, input by input; those that never run come last."""
    rest = list(wanted)
    for entry in shared:
        names = [name for name in entry.layers if name in rest]
        rest = [name for name in rest if name not in names]
        if all(name in finished for name in names):
            yield from ((name, finished[name], None) for name in names)
            continue
        layers = [Layer(name=name, weights=model.matrix(name), format=formats[name]) for name in names]
        tensors = method.quantize(layers, entry.statistics)
        for layer, tensor in zip(layers, tensors, strict=True):
            yield layer.name, tensor, output_error(layer.weights, tensor, entry.statistics.gram)
    for name in rest:
        tensor = finished.get(name) or quantize(model.matrix(name), formats[name], name=name)
        yield name, tensor, None


def _nearest(layer: Layer) -> QuantizedTensor:
    return quantize(layer.weights, layer.format, name=layer.name)


def _quantize_scaled(
    layers: Sequence[Layer], scales: NDArray[np.float32], gram: Float64, rounding: Rounder
) -> list[QuantizedTensor]:
    """``layers`` with their inputs divided by ``scales`` [inputs]; plain where these are 1, and those of ``fp16``."""
    if (scales == 1).all():
        rounded = rounding.prepare(gram)
        return [rounded(layer) for layer in layers]
    if isinstance(rounding, RoundToNearest):
        rounded = _nearest
    else:
        inverse = 1 / scales.astype(np.float64)
        rounded = rounding.prepare(gram * inverse * inverse[:, None])
    tensors = []
    for layer in layers:
        if layer.format.family == "fp16":
            tensors.append(_nearest(layer))
            continue
        weights = layer.weights.astype(np.float32) * scales
        tensor = rounded(Layer(name=layer.name, weights=weights, format=layer.format))
        tensors.append(tensor.with_input_scales(scales))
    return tensors


class _Feedback:
    """GPTQ by ``method`` for the layers of one input with the ``gram`` [inputs, inputs]."""

    def __init__(self, gram: Float64, method: Gptq) -> None:
        self._gram, self._method = gram, method
        self._dead = np.asarray(np.diagonal(gram) == 0)
        self._factors: dict[int, tuple[NDArray[np.intp], Float64]] = {}

    def __call__(self, layer: Layer) -> QuantizedTensor:
        """``layer``, rounded with error feedback."""
        nearest = _nearest(layer)
        if layer.format.family == "fp16":
            return nearest
        step = nearest.column_step
        order, factor = self._factor(step)
        codes = np.empty(layer.weights.shape, dtype=np.uint8)
        remaining = layer.weights.T.astype(np.float64)  # [inputs, outputs]: a column of the weights is a row here
        remaining[self._dead] = 0
        remaining = remaining[order]
        block = -(-self._method.block_columns // step) * step
        with _one_thread():
            for start in range(0, len(order), block):
                stop = min(start + block, len(order))
                errors = np.empty((stop - start, remaining.shape[1]))
                for first in range(start, stop, step):
                    last = min(first + step, stop)
                    column = int(order[first])
                    now = np.ascontiguousarray(remaining[first:last].T, dtype=np.float32)
                    codes[:, column : column + last - first], values = nearest.round_columns(column, now)
                    for index in range(first, last):
                        error = (remaining[index] - values[:, index - first]) / factor[index, index]
                        remaining[index + 1 : stop] -= np.multiply.outer(factor[index, index + 1 : stop], error)
                        errors[index - start] = error
                remaining[stop:] -= factor[start:stop, stop:].T @ errors
        return nearest.with_codes(codes)

    def _factor(self, step: int) -> tuple[NDArray[np.intp], Float64]:
        """The order in which columns are rounded, ``step`` at a time, [inputs], and U in that order [inputs, inputs].

        H = M Mᵀ with an upper triangular M gives H⁻¹ = Uᵀ U with U = M⁻¹. M is a Cholesky factor from the last column
        to the first.
        """
        if step not in self._factors:
            from scipy.linalg.lapack import dtrtri

            diagonal = np.diagonal(self._gram)
            living = diagonal[~self._dead]
            mean = float(living.mean()) if living.size else 1.0
            order = _order(diagonal, step) if self._method.act_order else np.arange(len(diagonal))
            damped = self._gram[np.ix_(order, order)]
            filled = np.where(self._dead, mean, diagonal)[order] + self._method.damping * mean
            np.fill_diagonal(damped, filled)
            triangle = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
            inverse, _ = dtrtri(triangle, lower=0)
            self._factors[step] = order, inverse
        return self._factors[step]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Numba's kernels on one thread: waking others up for one column takes longer than the column."""
    import numba

    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(threads)


def _order(diagonal: Float64, step: int) -> NDArray[np.intp]:
    """Columns with large ``diagonal`` [inputs] first, ``step`` of them together; a rest of fewer comes last."""
    whole = len(diagonal) // step * step
    together = diagonal[:whole].reshape(-1, step).sum(axis=1)
    first = np.argsort(-together, kind="stable") * step
    columns = (first[:, None] + np.arange(step)).ravel()
    return np.concatenate([columns, np.arange(whole, len(diagonal))])
