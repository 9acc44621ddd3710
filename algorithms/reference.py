"""What the PEs compute, one value at a time, in whole numbers: the definition that every faster form is held to.

It follows ``docs/microarchitecture.md``, section 2, line by line and is written to be read. ``multiply`` computes a
whole product; the functions before it are the units of a PE.

Numbers that are not finished are pairs (whole number, exponent): whole number · 2^exponent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec, PartialSumRounding, booth_digits, fixed_point_digits
from termwise.algorithms.datatypes import DataType
from termwise.algorithms.dictionary import DictionaryCoder, DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import Format, activation_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.operands import HALF_BIAS, WeightOperands, split_half, weight_operands
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import BitParallelSpec, ProcessingElementSpec
from termwise.algorithms.quantize import QuantizedTensor

_FLOAT32_BITS = 24
_FLOAT32_LEAST_EXPONENT = -149
_FLOAT32_MOST = 128


def float32_of(number: int, exponent: int) -> np.float32:
    """number · 2^exponent, rounded once to FP32: to the nearest, of ties to the even one; infinite beyond its range."""
    magnitude = abs(number)
    dropped = max(magnitude.bit_length() - _FLOAT32_BITS, _FLOAT32_LEAST_EXPONENT - exponent, 0)
    kept = shift_right(magnitude, dropped, "nearest_even")
    if kept and kept.bit_length() + dropped + exponent > _FLOAT32_MOST:
        return np.float32(np.copysign(np.inf, number))
    return np.float32(np.copysign(np.ldexp(float(kept), dropped + exponent), number))


def shift_right(number: int, places: int, rounding: PartialSumRounding) -> int:
    """number / 2^places as a whole number: towards minus infinity, or the nearest, of ties the even one."""
    if places <= 0:
        return number << -places
    quotient = number >> places
    if rounding == "nearest_even":
        rest, half = number - (quotient << places), 1 << (places - 1)
        quotient += rest > half or (rest == half and quotient % 2)
    return quotient


# ---- bit_serial (BitMoD) ------------------------------------------------------------------------------------------


def term_bases(booth: bool, bits: int) -> tuple[int, ...]:
    """Power of two that the digits of each term stand for, in the order in which the terms are computed."""
    return tuple(range(0, bits, 2)) if booth else (1, 0)


def digits(spec: BitSerialSpec, numerator: int, booth: bool, bits: int) -> tuple[int, ...]:
    """The digit of every term of a weight: 0 or ± a power of two. Raises ``InputError`` where there is no such form."""
    return booth_digits(numerator, bits) if booth else fixed_point_digits(numerator, spec.fixed_point_bits)


def dot_product(
    spec: BitSerialSpec, activations: Sequence[tuple[int, int]], step_digits: Sequence[int]
) -> tuple[int, int]:
    """Stages 1 and 2 of the PE, numerics ``paper``: (D, e) of one term of one step.

    ``activations`` are (signed significand, exponent) of each lane. Where no lane is there, D and e are 0.
    """
    lanes = [
        (significand * (1 if digit > 0 else -1), exponent + abs(digit).bit_length() - 1)
        for (significand, exponent), digit in zip(activations, step_digits, strict=True)
        if digit and significand
    ]
    if not lanes:
        return 0, 0
    greatest = max(exponent for _, exponent in lanes)
    total = 0
    for significand, exponent in lanes:
        aligned = _aligned(spec, abs(significand), greatest - exponent)
        total += aligned if significand > 0 else -aligned
    return total, greatest


def _aligned(spec: BitSerialSpec, significand: int, distance: int) -> int:
    """A magnitude of 11 bits, shifted into ``align_bits`` bits and then right by ``distance``."""
    return shift_right(significand, distance - (spec.align_bits - 11), spec.rounding)


def accumulate(spec: BitSerialSpec, accumulator: tuple[int, int], dot: tuple[int, int], base: int) -> tuple[int, int]:
    """Stage 3, numerics ``paper``: the accumulator (S, G) after the dot product (D, e) of a term of this ``base``."""
    (old, old_exponent), (new, new_exponent) = accumulator, (dot[0], dot[1] + base)
    if new == 0:
        return accumulator
    exponent = max(old_exponent, new_exponent) if old else new_exponent
    total = shift_right(old, exponent - old_exponent, spec.rounding) if old else 0
    total += shift_right(new, exponent - new_exponent, spec.rounding)
    limit = 1 << (spec.accumulator_bits - 1)
    excess = 0
    while not -limit <= shift_right(total, excess, spec.rounding) < limit:
        excess += 1
    return shift_right(total, excess, spec.rounding), exponent + excess


def group_sum(
    spec: BitSerialSpec,
    numerators: Sequence[int],
    activations: Sequence[tuple[int, int]],
    *,
    booth: bool,
    bits: int,
) -> tuple[int, int]:
    """Sum of activation × numerator over one group, as (whole number, exponent), in the numerics of ``spec``.

    ``activations`` are (signed significand, exponent) as ``split_half`` gives them; ``booth`` numerators are integers
    of ``bits`` bits.
    """
    if spec.numerics == "exact":
        least = -HALF_BIAS + 1
        return sum(
            (significand << (exponent - 1)) * numerator
            for (significand, exponent), numerator in zip(activations, numerators, strict=True)
        ), least
    if spec.numerics == "shared_exponent":
        greatest = max(exponent for _, exponent in activations)
        total = 0
        for (significand, exponent), numerator in zip(activations, numerators, strict=True):
            aligned = _aligned(spec, abs(significand), greatest - exponent)
            total += (aligned if significand > 0 else -aligned) * numerator
        return total, greatest - HALF_BIAS - (spec.align_bits - 11)
    accumulator = (0, 0)
    bases = term_bases(booth, bits)
    for start in range(0, len(numerators), spec.lanes):
        lanes = slice(start, start + spec.lanes)
        step = [digits(spec, numerator, booth, bits) for numerator in numerators[lanes]]
        for term, base in enumerate(bases):
            dot = dot_product(spec, activations[lanes], [lane[term] for lane in step])
            accumulator = accumulate(spec, accumulator, dot, base)
    return accumulator[0], accumulator[1] - HALF_BIAS - (spec.align_bits - 11)


def _bit_serial(spec: BitSerialSpec, weights: WeightOperands, activations: NDArray[np.float16]) -> NDArray[np.float32]:
    significands, exponents = split_half(activations)
    results = np.zeros((activations.shape[0], weights.numerators.shape[0]), dtype=np.float32)
    for token, output in np.ndindex(results.shape):
        for group in range(weights.groups):
            columns = weights.columns(group)
            pairs = list(zip(significands[token, columns].tolist(), exponents[token, columns].tolist(), strict=True))
            total, exponent = group_sum(
                spec,
                weights.numerators[output, columns].tolist(),
                pairs,
                booth=bool(weights.booth[output, group]),
                bits=weights.bits,
            )
            scaled = total * int(weights.scale_significands[output, group])
            exponent += int(weights.scale_exponents[output, group]) - int(weights.fraction_bits[output, group])
            results[token, output] += float32_of(scaled, exponent)
    return results if weights.channel_scales is None else results * weights.channel_scales


# ---- the other kinds ----------------------------------------------------------------------------------------------


def _bit_parallel(weights: WeightOperands, activations: NDArray[np.float16]) -> NDArray[np.float32]:
    """``outlier_victim`` and ``flint`` with FP16 activations (section 2.4)."""
    split_half(activations)  # refuses what is not finite
    results = np.zeros((activations.shape[0], weights.numerators.shape[0]), dtype=np.float32)
    for token, output in np.ndindex(results.shape):
        for group in range(weights.groups):
            total = np.float32(0)
            columns = weights.columns(group)
            for activation, numerator in zip(
                activations[token, columns], weights.numerators[output, columns], strict=True
            ):
                total += np.float32(activation) * np.float32(numerator)
            exponent = int(weights.scale_exponents[output, group]) - int(weights.fraction_bits[output, group])
            scale = float32_of(int(weights.scale_significands[output, group]), exponent)
            results[token, output] += total * scale
    return results if weights.channel_scales is None else results * weights.channel_scales


LARGEST_SUM = (1 << 31) - 1
"""What an int32 accumulator holds."""

_ABFLOAT = re.compile(r"abfloat\d_e\d+m(?P<significand>\d+)_b(?P<bias>\d+)")


def shifted_integer(datatype: DataType, code: int) -> tuple[int, int]:
    """What a decoder makes of a code: (integer, exponent), which stand for integer · 2^exponent (section 2.5).

    An integer is itself. Abfloat: (2^m + mantissa, exponent + bias), OliVe section 3. Flint of n bits and a sign, as
    ANT decodes it: (low bits, 0) under a leading 0; (2 · low bits, 2 · their leading zeros) under a leading 1, or
    (1, 2 (n - 1)) where all of them are 0.

    Raises ``InputError`` for a code that is no level, and for other data types.
    """
    level = datatype.numerators[code]
    if level is None:
        raise InputError(f"code {code} of {datatype.name} is no level; expected a code that a quantizer wrote")
    if datatype.integer:
        return level, 0
    sign = -1 if level < 0 else 1
    magnitude_bits = datatype.bits - 1
    magnitude = code & ((1 << magnitude_bits) - 1)
    abfloat = _ABFLOAT.fullmatch(datatype.name)
    if abfloat is not None:
        one = 1 << int(abfloat["significand"])
        return sign * (one + magnitude % one), magnitude // one + int(abfloat["bias"])
    if not datatype.name.startswith("flint"):
        raise InputError(f"{datatype.name} levels are no shifted integers; expected integers, flint or abfloat")
    low_bits = magnitude_bits - 1
    low = magnitude & ((1 << low_bits) - 1)
    if magnitude >> low_bits == 0:
        return sign * low, 0
    if low == 0:
        return sign, 2 * low_bits
    return sign * (low << 1), 2 * (low_bits - low.bit_length())


def split_integer(integer: int) -> tuple[int, int]:
    """An integer of up to 8 bits as h · 16 + l: (h, l), h from -8 to 7, l from 0 to 15."""
    return integer >> 4, integer & 15


def composed_product(weight: tuple[int, int], activation: tuple[int, int]) -> int:
    """The product of two shifted integers of up to 8 bits, from the four products of 4-bit PEs (section 2.5)."""
    (weight_high, weight_low), (activation_high, activation_low) = map(split_integer, (weight[0], activation[0]))
    partial_products = (
        weight_high * activation_high << 8,
        weight_high * activation_low << 4,
        weight_low * activation_high << 4,
        weight_low * activation_low,
    )
    return sum(partial_products) << (weight[1] + activation[1])


def check_integer_operands(spec: ProcessingElementSpec, weights: QuantizedTensor, activations: QuantizedTensor) -> None:
    """Raises ``InputError`` for what is no product of a PE with integer activations.

    That is another PE, a format that it does not take, or activations that are not in the format that belongs to that
    of the weights, or have another number of inputs.
    """
    if not isinstance(spec, BitParallelSpec) or spec.activations != "integer":
        raise InputError(f"the {spec.kind} PE takes FP16 activations; expected one with integer activations")
    spec.cycles_per_step(weights.format)
    expected = activation_format(weights.format)
    if activations.format != expected or activations.shape[1] != weights.shape[1]:
        wanted = "" if expected is None else expected.name
        raise InputError(
            f"activations {activations.format.name} {list(activations.shape)}; "
            f"expected {wanted} [tokens, {weights.shape[1]}]"
        )


def integer_operands(
    spec: ProcessingElementSpec, weights: QuantizedTensor, activations: QuantizedTensor
) -> tuple[WeightOperands, WeightOperands]:
    """The operands of a PE with integer activations: [outputs, inputs] and [tokens, inputs].

    Raises ``InputError`` as ``check_integer_operands``.
    """
    check_integer_operands(spec, weights, activations)
    return weight_operands(weights), weight_operands(activations)


def accumulator_error(format: Format) -> InputError:
    """For sums that may not fit into the accumulator."""
    return InputError(
        f"a sum of products of {format.name} may pass {LARGEST_SUM}, the largest number of an int32 accumulator; "
        "expected shorter groups or smaller outliers"
    )


def multiply_integers(
    spec: ProcessingElementSpec, weights: QuantizedTensor, activations: QuantizedTensor
) -> NDArray[np.float32]:
    """activations · weightsᵀ of codes on both sides (section 2.5), before the result is rounded to FP16.

    Args:
        spec: an ``outlier_victim`` or ``flint`` PE with integer activations.
        weights: [outputs, inputs], in a format with quantized activations.
        activations: [tokens, inputs], in the ``activation_format`` of the weights' (``StaticQuantizer.quantize``,
            ``DynamicQuantizer.quantize``): a scale per tensor or per token.

    Returns: float32 [tokens, outputs].

    Raises ``InputError`` as ``integer_operands``, and where the magnitudes of a group's products sum to more than an
    int32 accumulator holds, so that some order of the inputs might overflow it.
    """
    left, right = integer_operands(spec, weights, activations)
    results = np.zeros((activations.shape[0], weights.shape[0]), dtype=np.float32)
    for token, output in np.ndindex(results.shape):
        for group in range(left.groups):
            columns = left.columns(group)
            products = [
                weight * activation
                for weight, activation in zip(
                    left.numerators[output, columns].tolist(), right.numerators[token, columns].tolist(), strict=True
                )
            ]
            if sum(map(abs, products)) > LARGEST_SUM:
                raise accumulator_error(weights.format)
            scale = float32_of(
                int(left.scale_significands[output, group]) * int(right.scale_significands[token, 0]),
                int(left.scale_exponents[output, group] - left.fraction_bits[output, group])
                + int(right.scale_exponents[token, 0] - right.fraction_bits[token, 0]),
            )
            results[token, output] += float32_of(sum(products), 0) * scale
    return results


def half_weights(tensor: QuantizedTensor) -> NDArray[np.float16]:
    """Weights decoded to FP16, float16 [outputs, inputs], each rounded once.

    Raises ``InputError`` beyond FP16's range.
    """
    if tensor.format.family == "fp16":
        return tensor.parts["values"].astype(np.float16, copy=False)
    weights = weight_operands(tensor)
    scales = np.ldexp(weights.scale_significands.astype(np.float64), weights.scale_exponents - weights.fraction_bits)
    if weights.channel_scales is not None:
        scales *= weights.channel_scales.astype(np.float64)[:, None]
    group_of_column = np.arange(tensor.shape[1]) // weights.group_size
    with np.errstate(over="ignore"):
        exact = weights.numerators * scales[:, group_of_column]  # 8 + 8 + 24 bits at most: exact in float64
        halves: NDArray[np.float16] = exact.astype(np.float16)
    if not np.isfinite(halves).all():
        raise InputError(f"a weight of {tensor.format.name} has no FP16 value; expected magnitudes up to 65504")
    return halves


def _fp16_mac(weights: NDArray[np.float16], activations: NDArray[np.float16]) -> NDArray[np.float32]:
    split_half(activations)
    results = np.zeros((activations.shape[0], weights.shape[0]), dtype=np.float32)
    for token, output in np.ndindex(results.shape):
        for activation, weight in zip(activations[token], weights[output], strict=True):
            results[token, output] += np.float32(activation) * np.float32(weight)
    return results


def dictionary_product(tensor: QuantizedTensor, activations: NDArray[np.float16]) -> NDArray[np.float32]:
    """GOBO (section 2.6): activations are added by index, then multiplied by the centroids; outliers come last."""
    split_half(activations)
    coder = tensor.coder
    assert isinstance(coder, DictionaryCoder)
    codes = tensor.codes
    results = np.zeros((activations.shape[0], tensor.shape[0]), dtype=np.float32)
    outliers = {
        (int(place) // coder.inputs, int(place) % coder.inputs): value
        for place, value in zip(coder.positions, coder.values, strict=True)
    }
    for token, output in np.ndindex(results.shape):
        bins = np.zeros(coder.dictionary.size, dtype=np.float32)
        for column, code in enumerate(codes[output]):
            if (output, column) not in outliers:
                bins[code] += np.float32(activations[token, column])
        for total, centroid in zip(bins, coder.dictionary, strict=True):
            results[token, output] += total * centroid
        for (row, column), value in outliers.items():
            if row == output:
                results[token, output] += np.float32(activations[token, column]) * value
    return results


def check_activations(tensor: QuantizedTensor, activations: NDArray[np.float16]) -> None:
    """Raises ``InputError`` unless ``activations`` are float16 [tokens, inputs of ``tensor``]."""
    if activations.dtype != np.float16 or activations.ndim != 2 or activations.shape[1] != tensor.shape[1]:
        raise InputError(
            f"activations {activations.dtype} {list(activations.shape)}; expected float16 [tokens, {tensor.shape[1]}]"
        )


def check_half_activations(spec: ProcessingElementSpec) -> None:
    """Raises ``InputError`` for a PE with integer activations, whose product is ``multiply_integers``."""
    if isinstance(spec, BitParallelSpec) and spec.activations == "integer":
        raise InputError(f"the {spec.kind} PE takes integer activations; expected one with FP16 activations")


def multiply(
    spec: ProcessingElementSpec,
    tensor: QuantizedTensor,
    activations: NDArray[np.float16],
    *,
    pass_inputs: int | None = None,
) -> NDArray[np.float32]:
    """activations · weightsᵀ as an array of PEs of ``spec`` computes it, before the result is rounded to FP16.

    Args:
        spec: the PE.
        tensor: the weights [outputs, inputs].
        activations: float16 [tokens, inputs], finite.
        pass_inputs: inputs of a pass where the reduction is split; a pass ends the group that it cuts.

    Returns: float32 [tokens, outputs].

    Raises ``InputError``: activations that do not fit or are not finite; a format that the PE does not take.
    """
    check_activations(tensor, activations)
    check_half_activations(spec)
    spec.cycles_per_step(tensor.format)
    if isinstance(spec, Fp16MacSpec):
        return _fp16_mac(half_weights(tensor), activations)
    if isinstance(spec, DictionarySpec):
        return dictionary_product(tensor, activations)
    weights = weight_operands(tensor).cut(pass_inputs or tensor.shape[1])
    if isinstance(spec, BitSerialSpec):
        return _bit_serial(spec, weights, activations)
    if isinstance(spec, OutlierVictimSpec | FlintSpec):
        return _bit_parallel(weights, activations)
    raise InputError(f"there is no reference of a {spec.kind} PE")
