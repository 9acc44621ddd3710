"""Quantized weights as a PE takes them: whole numbers, and scales taken apart into whole numbers and powers of two.

A weight is numerator · 2^-fraction_bits · scale; the scale of a group is significand · 2^exponent; a channel scale,
where a format has one, multiplies the finished sum (``docs/microarchitecture.md``, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.datatypes import common_unit
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format
from termwise.algorithms.grid import Grid
from termwise.algorithms.integer import E8M0_BIAS
from termwise.algorithms.outlier_victim import PairCoder
from termwise.algorithms.processing_element import scale_bits
from termwise.algorithms.quantize import INPUT_SCALES, QuantizedTensor

HALF_BIAS = 25
"""An FP16 number is its whole significand × 2^(exponent field - 25), where a field of 0 counts as 1."""


@dataclass(frozen=True, kw_only=True)
class WeightOperands:
    """The weights of one matrix [outputs, inputs].

    Attributes:
        numerators: int32 [outputs, inputs], without the power of two that all of a data type's have in common.
        fraction_bits: of each group, int32 [outputs, groups].
        group_size: inputs of a group; the last group of a row may be shorter.
        booth: whether a group's numerators are integers, whose terms are Booth digits, bool [outputs, groups].
        bits: width of such an integer (of code - zero point: one more than the code's); 0 where no type is one.
        scale_significands: whole numbers, int32 [outputs, groups].
        scale_bits: width of a scale's significand.
        scale_exponents: powers of two of the scales, int32 [outputs, groups].
        channel_scales: float32 [outputs], or None.
    """

    numerators: NDArray[np.int32]
    fraction_bits: NDArray[np.int32]
    group_size: int
    booth: NDArray[np.bool_]
    bits: int
    scale_significands: NDArray[np.int32]
    scale_bits: int
    scale_exponents: NDArray[np.int32]
    channel_scales: NDArray[np.float32] | None

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return int(self.scale_significands.shape[1])

    def cut(self, inputs: int) -> WeightOperands:
        """The same weights with an end of a group after every ``inputs`` inputs, where a row is one group.

        So a reduction in passes ends it (``docs/microarchitecture.md``, section 4). Rows of several groups stay as they
        are: a pass has whole groups.
        """
        if self.groups > 1 or inputs >= self.numerators.shape[1]:
            return self
        pieces = -(-self.numerators.shape[1] // inputs)
        parts = ("fraction_bits", "booth", "scale_significands", "scale_exponents")
        changed: dict[str, Any] = {name: np.repeat(getattr(self, name), pieces, axis=1) for name in parts}
        return replace(self, group_size=inputs, **changed)

    def columns(self, group: int) -> slice:
        """The inputs of a group."""
        return slice(group * self.group_size, min((group + 1) * self.group_size, self.numerators.shape[1]))


def split_half(values: NDArray[np.float16]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Signed significand f and exponent E, 1 to 30, of FP16 ``values``: int32 of their shape, value = f · 2^(E - 25).

    Raises ``InputError`` for an infinity or a NaN.
    """
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise InputError(f"{bad} NaN or infinite activations; expected finite ones")
    bits = values.view(np.uint16).astype(np.int32)
    field = bits >> 10 & 0x1F
    significand = (bits & 0x3FF) | np.where(field > 0, 0x400, 0).astype(np.int32)
    return np.where(bits >> 15, -significand, significand).astype(np.int32), np.maximum(field, 1).astype(np.int32)


def weight_operands(tensor: QuantizedTensor) -> WeightOperands:
    """The operands of ``tensor``.

    Raises ``InputError`` for what is not computed as groups of numerators: FP16 weights, GOBO's dictionary, groups
    along the outputs, and input scales, which belong to the activations.
    """
    format = tensor.format
    if format.family in ("fp16", "gobo"):
        raise InputError(f"{format.name} weights have no numerators under a scale; expected another format")
    if format.groups_along_outputs:
        raise InputError(f"the groups of {format.name} lie along the outputs; expected groups along the inputs")
    if INPUT_SCALES in tensor.parts:
        raise InputError("the tensor has input scales; expected them to be multiplied into the activations first")
    coder = tensor.coder
    if isinstance(coder, PairCoder):
        numerators = _pair_numerators(coder, tensor.codes)
        fraction_bits = np.zeros(coder.scales.shape, dtype=np.int32)
        booth = np.zeros(coder.scales.shape, dtype=np.bool_)
    else:
        assert isinstance(coder, Grid)
        group_of_column = np.arange(tensor.shape[1]) // coder.group_size
        common, booth_types = _types(format)
        chosen = coder.chosen[:, group_of_column]
        units = coder.tables.units[chosen] / common[chosen]
        levels = coder.tables.levels[chosen, tensor.codes]
        if np.isnan(levels).any():
            raise InputError(f"a code of the {format.name} tensor is no level; expected codes that a quantizer wrote")
        numerators = (levels * units).astype(np.int32)
        fraction_bits = np.log2(coder.tables.units[coder.chosen] / common[coder.chosen]).astype(np.int32)
        booth = booth_types[coder.chosen]
    significands, exponents, channel = _scales(tensor)
    return WeightOperands(
        numerators=numerators,
        fraction_bits=fraction_bits,
        group_size=coder.group_size,
        booth=booth,
        bits=booth_bits(format),
        scale_significands=significands,
        scale_bits=scale_bits(format),
        scale_exponents=exponents,
        channel_scales=channel,
    )


def _types(format: Format) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Of every data type that a group may choose: its common power of two, and whether its terms are Booth digits."""
    if format.family == "int-asym":  # the choice is the zero point
        return np.ones(1 << format.weight_bits), np.ones(1 << format.weight_bits, dtype=np.bool_)
    units = [float(common_unit((datatype,))) for datatype in format.datatypes]
    return np.array(units), np.array([datatype.integer for datatype in format.datatypes])


def booth_bits(format: Format) -> int:
    """Width of the widest integer among the format's data types; 0 where there is none."""
    if format.family == "int-asym":
        return format.weight_bits + 1
    return max((datatype.bits for datatype in format.datatypes if datatype.integer), default=0)


def _pair_numerators(coder: PairCoder, codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Numerators of outlier-victim pairs, whose fraction has no bits: the values at the scale 1."""
    unscaled = PairCoder(
        group_size=coder.group_size, scales=np.ones_like(coder.scales), normal=coder.normal, outlier=coder.outlier
    )
    return unscaled.decode(codes).astype(np.int32)


def _scales(
    tensor: QuantizedTensor,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32] | None]:
    """Significands and exponents of the scales of groups, and the scales of channels."""
    parts, format = tensor.parts, tensor.format
    if format.family == "bitmod":
        significands = parts["group_scales"].astype(np.int32)
        return significands, np.zeros_like(significands), parts["channel_scales"].astype(np.float32)
    if format.family in ("type", "int") and format.scale_type == "e8m0":
        exponents = parts["scales"].astype(np.int32) - E8M0_BIAS
        return np.ones_like(exponents), exponents, None
    if format.family in ("type", "int") and format.scale_type == "e4m3":
        codes = parts["scales"].astype(np.int32)
        field = codes >> 3 & 0xF
        significands = (codes & 7) | np.where(field > 0, 8, 0).astype(np.int32)
        channel = np.full(tensor.shape[0], parts["tensor_scale"][0], dtype=np.float32)
        return significands, (np.maximum(field, 1) - 10).astype(np.int32), channel
    significands, exponents = split_half(parts["scales"].astype(np.float16))
    return significands, (exponents - HALF_BIAS).astype(np.int32), None
