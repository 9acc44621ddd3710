"""Quantized activations: what the input of a linear layer passes through in a format such as ``int-w4a8g128``.

Activations go through ``quantize`` as weights do, tokens in the place of outputs: the same scales (FP16, or those of
the block formats), the same ties, the same codes. How a scale is found depends on the family that the weights are of:

| family                                 | activations                              | scale                            |
|----------------------------------------|------------------------------------------|----------------------------------|
| int, int-asym, bitmod, one data type   | symmetric integers                       | one per token, dynamic:          |
|                                        |                                          | largest / (2**(bits - 1) - 1)    |
| int, one data type; scales in E8M0: MX | 4: mxfp4, 6: mxfp6_e2m3, 8: mxfp8_e4m3   | one per 32 channels, dynamic     |
| the same; scales in E4M3: NVFP4        | nvfp4                                    | one per 16 channels, dynamic,    |
|                                        |                                          | under a static one of the tensor |
| olive                                  | outlier-victim pairs along the channels  | one per tensor, static           |
| ant                                    | the type of option ``types`` that fits,  | one per tensor, static           |
|                                        | of those that have the width             |                                  |

Dynamic: from the token itself, as it comes. Static: from a text for calibration, read once by the model as it is, and
fixed from then on (as OliVe section 3 and ANT section IV have it). A bounded random sample of the tokens at each
layer's input is quantized as one row of weights; the search of the weights then finds the tensor's scale and its data
type. For ANT, whose search begins at the largest magnitude, that of all tokens read stands beside the sample; NVFP4's
static scale is made from it too, and larger values saturate.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format, activation_format
from termwise.algorithms.loaded_model import ActivationQuantizer, Float32, LoadedModel
from termwise.algorithms.quantize import QuantizedTensor, quantize

SAMPLE_VALUES = 1 << 17
"""Values of a layer's sample: 512 KiB in float32."""


@dataclass(frozen=True, kw_only=True)
class InputSample:
    """What a linear layer's input was like on a text.

    Attributes:
        rows: the inputs of tokens drawn at random without replacement, float32 [sampled tokens, channels].
        minimum: least value of each channel over all tokens, float32 [channels].
        maximum: greatest value of each channel over all tokens, float32 [channels].
        tokens: how many tokens were read.
    """

    rows: Float32
    minimum: Float32
    maximum: Float32
    tokens: int

    @property
    def largest(self) -> float:
        """The largest magnitude of all values read."""
        return float(max(-self.minimum.min(), self.maximum.max()))

    def divided_by(self, scales: Float32) -> InputSample:
        """The sample of the inputs divided by positive ``scales``, float32 [channels]."""
        return replace(self, rows=self.rows / scales, minimum=self.minimum / scales, maximum=self.maximum / scales)


class _Reservoir:
    """Tokens drawn at random from those that pass, and the extremes of all.

    Every token gets a random number; those with the least numbers stay. So each set of tokens is equally likely, and
    the draw depends on the seed and on the order of the tokens alone, not on how they come in batches.
    """

    def __init__(self, seed: int, name: str, values: int) -> None:
        self._random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        self._values = values
        self._numbers = np.empty(0)
        self._rows: Float32 | None = None
        self._minimum = self._maximum = np.empty(0, dtype=np.float32)
        self._tokens = 0

    def add(self, inputs: Float32) -> None:
        """Let ``inputs``, float32 [tokens, channels], pass."""
        if self._rows is None:
            self._rows = inputs[:0]
            self._minimum = np.full(inputs.shape[1], np.inf, dtype=np.float32)
            self._maximum = np.full(inputs.shape[1], -np.inf, dtype=np.float32)
        self._minimum = np.minimum(self._minimum, inputs.min(axis=0))
        self._maximum = np.maximum(self._maximum, inputs.max(axis=0))
        self._tokens += len(inputs)
        numbers = np.concatenate([self._numbers, self._random.random(len(inputs))])
        kept = np.sort(np.argsort(numbers, kind="stable")[: max(1, self._values // inputs.shape[1])])
        self._numbers = numbers[kept]
        self._rows = np.concatenate([self._rows, inputs])[kept]

    def sample(self) -> InputSample | None:
        """What is kept; None if nothing came."""
        if self._rows is None:
            return None
        return InputSample(rows=self._rows, minimum=self._minimum, maximum=self._maximum, tokens=self._tokens)


def sample_inputs(
    loaded: LoadedModel, *, tokens: int | None = None, values: int = SAMPLE_VALUES, seed: int = 0
) -> dict[str, InputSample]:
    """A random sample of each linear layer's input, by the layer's name, on the text that ``loaded`` reads.

    At most ``values`` values of a layer (one token at least), of about ``tokens`` tokens that are read (None: all).
    The same seed draws the same sample. The layers run with the weights that are in place: sample before ``replace``.
    """
    reservoirs: dict[str, _Reservoir] = {}

    def observe(name: str, inputs: Float32) -> None:
        if name not in reservoirs:
            reservoirs[name] = _Reservoir(seed, name, values)
        reservoirs[name].add(inputs)

    loaded.observe_inputs(observe, tokens=tokens)
    found = {name: reservoir.sample() for name, reservoir in reservoirs.items()}
    return {name: sample for name, sample in found.items() if sample is not None}


def needs_calibration(format: Format) -> bool:
    """Whether activations beside weights in ``format`` have a static scale, for which a sample must be there."""
    return format.activation_bits is not None and (
        format.family in ("olive", "ant") or (format.family in ("int", "type") and format.scale_type == "e4m3")
    )


def activation_quantizer(
    format: Format, sample: InputSample | None = None, *, name: str = "activations"
) -> ActivationQuantizer | None:
    """What the input of a linear layer passes through when its weights are in ``format``; None if it stays as it is.

    ``sample`` is that of the layer's input (divided by the input scales, if there are any), which only the formats of
    ``needs_calibration`` read. Raises ``InputError`` that names the layer ``name``: no sample for such a format, or
    values that the scales cannot express.
    """
    activations = activation_format(format)
    if activations is None:
        return None
    if not needs_calibration(format):
        return DynamicQuantizer(format=activations)
    if sample is None:
        raise InputError(
            f"{name}: activations of {format.name} have a static scale; expected a sample of a text for calibration"
        )
    if activations.family == "type":
        return LimitedQuantizer(format=activations, limit=sample.largest)
    row = sample.rows
    if activations.family == "olive":
        row = np.pad(row, ((0, 0), (0, row.shape[1] % 2)))  # a pair does not reach into the next token
    row = row.reshape(1, -1)
    if activations.family == "ant":
        row = np.append(row, np.float32(sample.largest)).reshape(1, -1)
    return StaticQuantizer(calibrated=quantize(row, activations, name=f"the sample of {name}"))


@dataclass(frozen=True, kw_only=True)
class DynamicQuantizer:
    """Every scale comes from the values of one token: float32 [tokens, channels] to the same."""

    format: Format

    def __call__(self, activations: Float32) -> Float32:
        """Nearest values; see ``ActivationQuantizer``. Raises ``InputError`` as ``quantize`` does."""
        return self.quantize(activations).dequantize()

    def quantize(self, activations: Float32) -> QuantizedTensor:
        """The codes and scales behind these values, [tokens, channels]. Raises ``InputError`` as ``quantize`` does."""
        return quantize(activations, self.format, name="activations")


@dataclass(frozen=True, kw_only=True)
class LimitedQuantizer:
    """Scales of groups come from a token; the one of the tensor above them is that of ``limit``, the largest magnitude.

    Larger values saturate.
    """

    format: Format
    limit: float

    def __call__(self, activations: Float32) -> Float32:
        """Nearest values; see ``ActivationQuantizer``. Raises ``InputError`` as ``quantize`` does."""
        limit = np.float32(self.limit)
        limited = np.clip(activations, -limit, limit)
        # A row that holds the limit makes it the largest magnitude of the matrix, whatever the tokens are.
        with_limit = np.concatenate([limited, np.full((1, limited.shape[1]), limit, dtype=np.float32)])
        return quantize(with_limit, self.format, name="activations").dequantize(slice(0, len(limited)))


@dataclass(frozen=True, kw_only=True)
class StaticQuantizer:
    """One scale and one data type for all values, those of ``calibrated``, a tensor of one row and one group."""

    calibrated: QuantizedTensor

    def __call__(self, activations: Float32) -> Float32:
        """Nearest values; see ``ActivationQuantizer``. Raises ``InputError`` for what is not finite."""
        coder = self._of_tokens(activations).coder
        return coder.decode(coder.encode(np.ascontiguousarray(activations)))

    def quantize(self, activations: Float32) -> QuantizedTensor:
        """The codes behind these values, [tokens, channels]; every token has the same scale and data type.

        Raises ``InputError`` for what is not finite.
        """
        fixed = self._of_tokens(activations)
        return fixed.with_codes(fixed.coder.encode(np.ascontiguousarray(activations)))

    def _of_tokens(self, activations: Float32) -> QuantizedTensor:
        """The scale and the data type for every token of ``activations``, with codes that are not theirs."""
        bad = activations.size - int(np.count_nonzero(np.isfinite(activations)))
        if bad:
            raise InputError(f"{bad} NaN or infinite activations; expected finite ones")
        tokens, channels = activations.shape
        scales = np.repeat(self.calibrated.parts["scales"], tokens, axis=0)
        return replace(self.calibrated, shape=(tokens, channels), parts={**self.calibrated.parts, "scales": scales})
