"""What the PEs compute, fast: Numba twins of ``termwise.algorithms.reference``, equal to it bit for bit.

``multiply`` has the signature and the results of the reference. All compiled helpers stand in this file, because
Numba's cache on disk does not notice a change in another one.

A kernel works as the array does: an output at a time, all tokens of the array's columns side by side. Activations lie
[inputs, tokens], so that the loop over tokens is the innermost and becomes vector instructions; everything that belongs
to a weight (its digits, whether a lane is there) is decided outside of it.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec, booth_digits, fixed_point_digits
from termwise.algorithms.dictionary import DictionaryCoder, DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import Format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.operands import HALF_BIAS, WeightOperands, split_half, weight_operands
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import ProcessingElementSpec
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.reference import (
    LARGEST_SUM,
    accumulator_error,
    check_activations,
    check_half_activations,
    half_weights,
    integer_operands,
    term_bases,
)

TOKENS_AT_ONCE = 64
"""Columns of tokens that a kernel takes side by side: its state stays in the first-level cache."""

_ABSENT = np.int32(-64)
"""Exponent of an activation of zero: below that of any lane that is there."""

_EXACT_BITS = 53


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _float32_of(number: int, significand: int, exponent: int) -> np.float32:
    """number · significand · 2^exponent, rounded once; |number| < 2^62, 0 <= significand < 2^11.

    The product is cut to 53 bits with the last one set where anything was lost (round to odd). Such a number is exact
    in float64, and more than two bits longer than FP32's, so that the conversion to FP32 rounds as if it saw it all.
    """
    magnitude = abs(number)
    low = (magnitude & 0xFFFFF) * significand
    high = (magnitude >> 20) * significand + (low >> 20)  # below 2^54
    low &= 0xFFFFF
    if high < 1 << 32:
        kept = high << 20 | low
        places = exponent
    else:
        kept = high << 1 | (low != 0)  # below 2^55
        places = exponent + 19
    while kept >> _EXACT_BITS:
        kept = kept >> 1 | (kept & 1)
        places += 1
    value = math.ldexp(float(kept), places)
    return np.float32(-value if number < 0 else value)


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _shift_right_even(number: int, places: int) -> int:
    """number / 2^places to the nearest whole number, of ties the even one; ``places`` from 0 to 62."""
    if places == 0:
        return number
    quotient = number >> places
    rest = number - (quotient << places)
    half = 1 << (places - 1)
    if rest > half or (rest == half and quotient & 1):
        quotient += 1
    return quotient


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _paper(
    magnitudes: NDArray[np.int32],
    signs: NDArray[np.int32],
    exponents: NDArray[np.int32],
    numerators: NDArray[np.int32],
    group_size: int,
    booth: NDArray[np.bool_],
    tables: NDArray[np.int32],
    bases: NDArray[np.int32],
    terms: NDArray[np.int64],
    scales: NDArray[np.int32],
    scale_exponents: NDArray[np.int32],
    lanes: int,
    distance_added: int,
    accumulator_bits: int,
    excess_steps: int,
    nearest_even: bool,
    results: NDArray[np.float32],
) -> None:
    """Numerics ``paper``; ``results`` float32 [outputs, tokens] receive the sums over the groups.

    Args:
        magnitudes: of activations, shifted left by align_bits - 11 where that is positive, int32 [inputs, tokens].
        signs: 1 or -1, int32 [inputs, tokens].
        exponents: E, ``_ABSENT`` of a zero, int32 [inputs, tokens].
        numerators: int32 [outputs, inputs].
        group_size: inputs of a group.
        booth: which of the two tables a group takes, bool [outputs, groups].
        tables: digits by table, term and numerator + offset, int32 [2, terms, numerators].
        bases: of each table's terms, int32 [2, terms].
        terms: of each table, int64 [2].
        scales, scale_exponents: of groups, without the exponent of an activation, int32 [outputs, groups].
        lanes: of the PE.
        distance_added: 11 - align_bits where that is positive.
        accumulator_bits: of the group accumulator.
        excess_steps: places by which a sum can exceed the accumulator.
        nearest_even: rounding of what is shifted out.
    """
    outputs, inputs = numerators.shape
    tokens = magnitudes.shape[1]
    offset = tables.shape[2] // 2
    limit = np.int32(1 << (accumulator_bits - 1))
    for output in prange(outputs):
        old = np.zeros(tokens, np.int32)
        old_exponent = np.zeros(tokens, np.int32)
        greatest = np.zeros(tokens, np.int32)
        dot = np.zeros(tokens, np.int32)
        total = np.zeros(tokens, np.float32)
        for group in range(scales.shape[1]):
            old[:] = 0
            old_exponent[:] = 0
            table = 1 if booth[output, group] else 0
            begin = group * group_size
            end = min(inputs, begin + group_size)
            for start in range(begin, end, lanes):
                stop = min(start + lanes, end)
                for term in range(terms[table]):
                    present = False
                    for column in range(start, stop):
                        digit = tables[table, term, numerators[output, column] + offset]
                        if digit == 0:
                            continue
                        power = np.int32(0)
                        while abs(digit) >> (power + 1):
                            power += np.int32(1)
                        if not present:
                            for token in range(tokens):
                                greatest[token] = exponents[column, token] + power
                        else:
                            for token in range(tokens):
                                greatest[token] = max(greatest[token], exponents[column, token] + power)
                        present = True
                    if not present:
                        continue
                    dot[:] = 0
                    for column in range(start, stop):
                        digit = tables[table, term, numerators[output, column] + offset]
                        if digit == 0:
                            continue
                        power = np.int32(0)
                        while abs(digit) >> (power + 1):
                            power += np.int32(1)
                        sign = np.int32(1) if digit > 0 else np.int32(-1)
                        added = np.int32(distance_added) - power
                        if nearest_even:
                            for token in range(tokens):
                                distance = min(greatest[token] - exponents[column, token] + added, np.int32(62))
                                aligned = _shift_right_even(np.int64(magnitudes[column, token]), distance)
                                dot[token] += np.int32(aligned) * sign * signs[column, token]
                        else:
                            for token in range(tokens):
                                distance = min(greatest[token] - exponents[column, token] + added, np.int32(31))
                                dot[token] += (magnitudes[column, token] >> distance) * (sign * signs[column, token])
                    base = bases[table, term]
                    if nearest_even:
                        for token in range(tokens):
                            if dot[token] == 0:
                                continue
                            exponent = greatest[token] + base
                            if old[token] != 0:
                                exponent = max(exponent, old_exponent[token])
                            wide = np.int64(0)
                            if old[token] != 0:
                                wide = _shift_right_even(np.int64(old[token]), min(exponent - old_exponent[token], 62))
                            wide += _shift_right_even(np.int64(dot[token]), min(exponent - greatest[token] - base, 62))
                            excess = 0
                            while not -limit <= _shift_right_even(wide, excess) < limit:
                                excess += 1
                            old[token] = _shift_right_even(wide, excess)
                            old_exponent[token] = exponent + excess
                    else:
                        for token in range(tokens):
                            new = dot[token]
                            new_exponent = greatest[token] + base
                            before = old[token]
                            before_exponent = old_exponent[token] if before != 0 else new_exponent
                            exponent = max(before_exponent, new_exponent)
                            wide32 = (before >> min(exponent - before_exponent, np.int32(31))) + (
                                new >> min(exponent - new_exponent, np.int32(31))
                            )
                            for _ in range(excess_steps):
                                over = wide32 >= limit or wide32 < -limit
                                wide32 = wide32 >> np.int32(1) if over else wide32
                                exponent = exponent + np.int32(1) if over else exponent
                            old[token] = wide32 if new != 0 else before
                            old_exponent[token] = exponent if new != 0 else old_exponent[token]
            scale = scales[output, group]
            for token in range(tokens):
                if old[token] != 0:
                    exponent64 = old_exponent[token] + scale_exponents[output, group]
                    total[token] += _float32_of(np.int64(old[token]), scale, exponent64)
        results[output] = total


_FUSED_LANES, _FUSED_EXCESS = 4, 3
_ONE = np.int32(1)
_ALL = np.int32(31)


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _paper_fused(
    magnitudes: NDArray[np.int32],
    signs: NDArray[np.int32],
    exponents: NDArray[np.int32],
    numerators: NDArray[np.int32],
    group_size: int,
    booth: NDArray[np.bool_],
    tables: NDArray[np.int32],
    bases: NDArray[np.int32],
    terms: NDArray[np.int64],
    scales: NDArray[np.int32],
    scale_exponents: NDArray[np.int32],
    lanes: int,
    accumulator_bits: int,
    results: NDArray[np.float32],
) -> None:
    """``_paper`` for four lanes, sums of three bits too many, truncation and 11 align_bits or more: one pass per term.

    A lane that is absent reads the last row of the activations, a zero. The casts keep the arithmetic in 32 bits, where
    a vector instruction holds twice as many tokens as in Numba's 64.
    """
    outputs, inputs = numerators.shape
    tokens = magnitudes.shape[1]
    offset = tables.shape[2] // 2
    limit = np.int32(1 << (accumulator_bits - 1))
    least = np.int32(-limit)
    for output in prange(outputs):
        old = np.zeros(tokens, np.int32)
        old_exponent = np.zeros(tokens, np.int32)
        total = np.zeros(tokens, np.float32)
        row = np.empty(_FUSED_LANES, np.int64)
        power = np.empty(_FUSED_LANES, np.int32)
        sign = np.empty(_FUSED_LANES, np.int32)
        for group in range(scales.shape[1]):
            old[:] = 0
            table = 1 if booth[output, group] else 0
            begin = group * group_size
            end = min(inputs, begin + group_size)
            for start in range(begin, end, lanes):
                for term in range(terms[table]):
                    present = False
                    for lane in range(_FUSED_LANES):
                        column = start + lane
                        digit = np.int32(0)
                        if lane < lanes and column < end:
                            digit = tables[table, term, numerators[output, column] + offset]
                        row[lane] = column if digit != 0 else inputs
                        power[lane] = 0
                        while abs(digit) >> (power[lane] + 1):
                            power[lane] += 1
                        sign[lane] = 1 if digit > 0 else -1
                        present = present or digit != 0
                    if not present:
                        continue
                    power_0, power_1, power_2, power_3 = power[0], power[1], power[2], power[3]
                    sign_0, sign_1, sign_2, sign_3 = sign[0], sign[1], sign[2], sign[3]
                    magnitude_0, magnitude_1 = magnitudes[row[0]], magnitudes[row[1]]
                    magnitude_2, magnitude_3 = magnitudes[row[2]], magnitudes[row[3]]
                    signs_0, signs_1, signs_2, signs_3 = signs[row[0]], signs[row[1]], signs[row[2]], signs[row[3]]
                    exponents_0, exponents_1 = exponents[row[0]], exponents[row[1]]
                    exponents_2, exponents_3 = exponents[row[2]], exponents[row[3]]
                    base = bases[table, term]
                    for token in range(tokens):
                        exponent_0 = np.int32(exponents_0[token] + power_0)
                        exponent_1 = np.int32(exponents_1[token] + power_1)
                        exponent_2 = np.int32(exponents_2[token] + power_2)
                        exponent_3 = np.int32(exponents_3[token] + power_3)
                        greatest = max(max(exponent_0, exponent_1), max(exponent_2, exponent_3))
                        aligned = np.int32(magnitude_0[token] >> min(np.int32(greatest - exponent_0), _ALL))
                        dot = np.int32(aligned * np.int32(signs_0[token] * sign_0))
                        aligned = np.int32(magnitude_1[token] >> min(np.int32(greatest - exponent_1), _ALL))
                        dot = np.int32(dot + np.int32(aligned * np.int32(signs_1[token] * sign_1)))
                        aligned = np.int32(magnitude_2[token] >> min(np.int32(greatest - exponent_2), _ALL))
                        dot = np.int32(dot + np.int32(aligned * np.int32(signs_2[token] * sign_2)))
                        aligned = np.int32(magnitude_3[token] >> min(np.int32(greatest - exponent_3), _ALL))
                        dot = np.int32(dot + np.int32(aligned * np.int32(signs_3[token] * sign_3)))
                        dot_exponent = np.int32(greatest + base)
                        before = old[token]
                        before_exponent = old_exponent[token] if before != 0 else dot_exponent
                        exponent = max(before_exponent, dot_exponent)
                        wide = np.int32(
                            np.int32(before >> min(np.int32(exponent - before_exponent), _ALL))
                            + np.int32(dot >> min(np.int32(exponent - dot_exponent), _ALL))
                        )
                        for _ in range(_FUSED_EXCESS):
                            over = (wide >= limit) | (wide < least)
                            wide = np.int32(wide >> _ONE) if over else wide
                            exponent = np.int32(exponent + _ONE) if over else exponent
                        old[token] = wide if dot != 0 else before
                        old_exponent[token] = exponent if dot != 0 else old_exponent[token]
            for token in range(tokens):
                if old[token] != 0:
                    places = old_exponent[token] + scale_exponents[output, group]
                    total[token] += _float32_of(np.int64(old[token]), scales[output, group], places)
        results[output] = total


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _whole(
    activations: NDArray[np.int64],
    group_exponents: NDArray[np.int32],
    numerators: NDArray[np.int32],
    group_size: int,
    scales: NDArray[np.int32],
    scale_exponents: NDArray[np.int32],
    results: NDArray[np.float32],
) -> None:
    """Numerics ``exact`` and ``shared_exponent``: sums of whole numbers; ``results`` float32 [outputs, tokens].

    ``activations`` are whole numbers, int64 [inputs, tokens], times 2^``group_exponents``, int32 [groups, tokens].
    """
    outputs, inputs = numerators.shape
    tokens = activations.shape[1]
    for output in prange(outputs):
        sums = np.zeros(tokens, np.int64)
        total = np.zeros(tokens, np.float32)
        for group in range(scales.shape[1]):
            sums[:] = 0
            for column in range(group * group_size, min(inputs, (group + 1) * group_size)):
                numerator = np.int64(numerators[output, column])
                if numerator != 0:
                    for token in range(tokens):
                        sums[token] += activations[column, token] * numerator
            for token in range(tokens):
                exponent = group_exponents[group, token] + scale_exponents[output, group]
                total[token] += _float32_of(sums[token], scales[output, group], exponent)
        results[output] = total


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _sequential(
    activations: NDArray[np.float32],
    weights: NDArray[np.float32],
    group_size: int,
    scales: NDArray[np.float32],
    results: NDArray[np.float32],
) -> None:
    """Sums of FP32 products within a group, times its FP32 scale; ``results`` float32 [outputs, tokens].

    ``activations`` [inputs, tokens], ``weights`` [outputs, inputs], ``scales`` [outputs, groups].
    """
    outputs, inputs = weights.shape
    tokens = activations.shape[1]
    for output in prange(outputs):
        sums = np.zeros(tokens, np.float32)
        total = np.zeros(tokens, np.float32)
        for group in range(scales.shape[1]):
            sums[:] = 0
            for column in range(group * group_size, min(inputs, (group + 1) * group_size)):
                weight = weights[output, column]
                for token in range(tokens):
                    sums[token] += activations[column, token] * weight
            scale = scales[output, group]
            for token in range(tokens):
                total[token] += sums[token] * scale
        results[output] = total


@njit(cache=True, parallel=True, nogil=True)  # type: ignore[untyped-decorator]
def _dictionary(
    activations: NDArray[np.float32],
    codes: NDArray[np.uint8],
    centroids: NDArray[np.float32],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    values: NDArray[np.float32],
    results: NDArray[np.float32],
) -> None:
    """GOBO; outliers at ``columns`` with ``values``, those of output r at rows[r] up to rows[r + 1]."""
    outputs, inputs = codes.shape
    tokens = activations.shape[1]
    for output in prange(outputs):
        bins = np.zeros((centroids.size, tokens), np.float32)
        total = np.zeros(tokens, np.float32)
        following = rows[output]
        for column in range(inputs):
            if following < rows[output + 1] and columns[following] == column:
                following += 1
                continue
            code = codes[output, column]
            for token in range(tokens):
                bins[code, token] += activations[column, token]
        for code in range(centroids.size):
            for token in range(tokens):
                total[token] += bins[code, token] * centroids[code]
        for place in range(rows[output], rows[output + 1]):
            for token in range(tokens):
                total[token] += activations[columns[place], token] * values[place]
        results[output] = total


def _digit_tables(
    spec: BitSerialSpec, weights: WeightOperands
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
    """Digits of all numerators that occur, bases and terms: of fixed-point types, and of integers (see ``_paper``)."""
    widest = int(np.abs(weights.numerators).max(initial=1)) + 1
    bases = (term_bases(False, weights.bits), term_bases(True, weights.bits))
    count = max(len(found) for found in bases)
    tables = np.zeros((2, count, 2 * widest + 1), dtype=np.int32)
    base_table = np.zeros((2, count), dtype=np.int32)
    group_of_column = np.arange(weights.numerators.shape[1]) // weights.group_size
    booth = weights.booth[:, group_of_column]
    for index, mine in enumerate((~booth, booth)):
        base_table[index, : len(bases[index])] = bases[index]
        for numerator in np.unique(weights.numerators[mine]).tolist():
            found = (
                booth_digits(numerator, weights.bits) if index else fixed_point_digits(numerator, spec.fixed_point_bits)
            )
            tables[index, : len(found), numerator + widest] = found
    return tables, base_table, np.array([len(found) for found in bases])


def _bit_serial(
    spec: BitSerialSpec, weights: WeightOperands, activations: NDArray[np.float16], results: NDArray[np.float32]
) -> None:
    """``results`` float32 [outputs, tokens] of ``activations`` float16 [tokens, inputs]."""
    significands, exponents = (np.ascontiguousarray(part.T) for part in split_half(activations))
    scale_exponents = (weights.scale_exponents - weights.fraction_bits).astype(np.int32)
    if spec.numerics == "paper":
        up = spec.align_bits - 11
        zero = np.zeros((1, significands.shape[1]), dtype=np.int32)  # the activation of an absent lane
        significands = np.concatenate([significands, zero])
        exponents = np.concatenate([exponents, zero])
        operands = (
            np.abs(significands) << max(up, 0),
            np.where(significands < 0, -1, 1).astype(np.int32),
            np.where(significands == 0, _ABSENT, exponents),
            weights.numerators,
            weights.group_size,
            weights.booth,
            *_digit_tables(spec, weights),
            weights.scale_significands,
            (scale_exponents - HALF_BIAS - up).astype(np.int32),
            spec.lanes,
        )
        # A sum of two numbers of the width of a dot product, less the accumulator's.
        excess = max(0, spec.align_bits + (spec.lanes - 1).bit_length() + 2 - spec.accumulator_bits)
        if spec.rounding == "truncate" and up >= 0 and spec.lanes <= _FUSED_LANES and excess <= _FUSED_EXCESS:
            _paper_fused(*operands, spec.accumulator_bits, results)
        else:
            nearest_even = spec.rounding == "nearest_even"
            _paper(*operands, max(-up, 0), spec.accumulator_bits, excess, nearest_even, results)
        return
    starts = np.arange(0, activations.shape[1], weights.group_size)
    if spec.numerics == "exact":
        whole = significands.astype(np.int64) << (exponents - 1)
        group_exponents = np.full((starts.size, activations.shape[0]), 1 - HALF_BIAS, dtype=np.int32)
    else:
        greatest = np.maximum.reduceat(exponents, starts, axis=0)
        distances = greatest[np.arange(activations.shape[1]) // weights.group_size] - exponents
        whole = _aligned(np.abs(significands), distances, spec) * np.sign(significands)
        group_exponents = (greatest - HALF_BIAS - (spec.align_bits - 11)).astype(np.int32)
    _check_sums(weights, whole)
    _whole(
        whole,
        group_exponents,
        weights.numerators,
        weights.group_size,
        weights.scale_significands,
        scale_exponents,
        results,
    )


def _aligned(magnitudes: NDArray[np.int32], distances: NDArray[np.int32], spec: BitSerialSpec) -> NDArray[np.int64]:
    """Magnitudes shifted into ``align_bits`` bits and right by the distances, int64 of their shape."""
    up = spec.align_bits - 11
    wide = magnitudes.astype(np.int64) << max(up, 0)
    places = np.minimum(distances + max(-up, 0), 40).astype(np.int64)
    quotients = wide >> places
    if spec.rounding == "nearest_even":
        rests, halves = wide - (quotients << places), (np.int64(1) << places) >> 1
        quotients += (rests > halves) | ((rests == halves) & (halves > 0) & (quotients % 2 == 1))
    return quotients


def _check_sums(weights: WeightOperands, whole: NDArray[np.int64]) -> None:
    """Raises ``InputError`` where a group's sum could pass 2^62."""
    most = int(np.abs(whole).max(initial=0)) * int(np.abs(weights.numerators).max(initial=0))
    columns = min(weights.group_size, weights.numerators.shape[1])
    if most * columns >= 1 << 62:
        raise InputError(f"a group of {columns} inputs sums to {most * columns}; expected sums below 2^62")


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

    Returns: float32 [tokens, outputs], every bit that of ``termwise.algorithms.reference.multiply``.

    Raises ``InputError`` as the reference does, and for groups whose exact sums do not fit into 62 bits.
    """
    check_activations(tensor, activations)
    check_half_activations(spec)
    spec.cycles_per_step(tensor.format)
    split_half(activations)
    pass_inputs = pass_inputs or tensor.shape[1]
    results = np.zeros((tensor.shape[0], activations.shape[0]), dtype=np.float32)
    blocks = [
        slice(start, min(start + TOKENS_AT_ONCE, activations.shape[0]))
        for start in range(0, activations.shape[0], TOKENS_AT_ONCE)
    ]
    channel_scales = None
    if isinstance(spec, BitSerialSpec):
        weights = weight_operands(tensor).cut(pass_inputs)
        channel_scales = weights.channel_scales
        for block in blocks:
            part = np.zeros((tensor.shape[0], block.stop - block.start), dtype=np.float32)
            _bit_serial(spec, weights, activations[block], part)
            results[:, block] = part
    else:
        channel_scales = _in_float32(spec, tensor, activations, blocks, results, pass_inputs)
    found = np.ascontiguousarray(results.T)
    return found if channel_scales is None else found * channel_scales


def _in_float32(
    spec: ProcessingElementSpec,
    tensor: QuantizedTensor,
    activations: NDArray[np.float16],
    blocks: list[slice],
    results: NDArray[np.float32],
    pass_inputs: int,
) -> NDArray[np.float32] | None:
    """Products of the PEs that add in FP32, into ``results`` [outputs, tokens]; returns the scales of channels."""
    channel_scales = None
    group_size = tensor.shape[1]
    scales = np.ones((tensor.shape[0], 1), dtype=np.float32)
    if isinstance(spec, DictionarySpec):
        _dictionary_product(tensor, activations, blocks, results)
        return None
    if isinstance(spec, Fp16MacSpec):
        values = half_weights(tensor).astype(np.float32)
    elif isinstance(spec, OutlierVictimSpec | FlintSpec):
        weights = weight_operands(tensor).cut(pass_inputs)
        values, group_size = weights.numerators.astype(np.float32), weights.group_size
        exponents = weights.scale_exponents - weights.fraction_bits
        scales = np.ldexp(weights.scale_significands.astype(np.float64), exponents).astype(np.float32)
        channel_scales = weights.channel_scales
    else:
        raise InputError(f"there is no kernel of a {spec.kind} PE")
    for block in blocks:
        inputs = np.ascontiguousarray(activations[block].T.astype(np.float32))
        part = np.zeros((tensor.shape[0], inputs.shape[1]), dtype=np.float32)
        _sequential(inputs, values, group_size, scales, part)
        results[:, block] = part
    return channel_scales


def _dictionary_product(
    tensor: QuantizedTensor, activations: NDArray[np.float16], blocks: list[slice], results: NDArray[np.float32]
) -> None:
    """Products of GOBO's PE, into ``results`` [outputs, tokens]."""
    coder = tensor.coder
    assert isinstance(coder, DictionaryCoder)
    rows = np.searchsorted(coder.positions, np.arange(tensor.shape[0] + 1) * coder.inputs)
    columns = coder.positions % coder.inputs
    codes = tensor.codes
    for block in blocks:
        inputs = np.ascontiguousarray(activations[block].T.astype(np.float32))
        part = np.zeros((tensor.shape[0], inputs.shape[1]), dtype=np.float32)
        _dictionary(inputs, codes, coder.dictionary, rows, columns, coder.values, part)
        results[:, block] = part


OUTPUTS_AT_ONCE = 1024
"""Rows of weights that an integer product takes together, in float64."""


def multiply_integers(
    spec: ProcessingElementSpec, weights: QuantizedTensor, activations: QuantizedTensor
) -> NDArray[np.float32]:
    """As ``termwise.algorithms.reference.multiply_integers``, every bit, by matrix products in float64.

    These are exact in any order of summation: no sum of a group's products, nor of some of them, passes 2^31.
    """
    left, right = integer_operands(spec, weights, activations)
    tokens = right.numerators.astype(np.float64)
    token_scales = _scales_in_float64(right)
    results = np.zeros((activations.shape[0], weights.shape[0]), dtype=np.float32)
    for start in range(0, weights.shape[0], OUTPUTS_AT_ONCE):
        rows = slice(start, start + OUTPUTS_AT_ONCE)
        values = left.numerators[rows].astype(np.float64)
        scales = _scales_in_float64(left, rows)
        for group in range(left.groups):
            columns = left.columns(group)
            _check_accumulator(values[:, columns], tokens[:, columns], weights.format)
            sums = (tokens[:, columns] @ values[:, columns].T).astype(np.float32)
            # The product of two FP16 scales has 22 bits: exact in FP32.
            results[:, rows] += sums * (token_scales * scales[:, group]).astype(np.float32)
    return results


def _scales_in_float64(operands: WeightOperands, rows: slice = slice(None)) -> NDArray[np.float64]:
    """Scales of groups over their fractions, float64 [rows, groups]; exact."""
    exponents = operands.scale_exponents[rows] - operands.fraction_bits[rows]
    scales: NDArray[np.float64] = np.ldexp(operands.scale_significands[rows].astype(np.float64), exponents)
    return scales


def _check_accumulator(weights: NDArray[np.float64], activations: NDArray[np.float64], format: Format) -> None:
    """Raises ``InputError`` where magnitudes of products of [outputs, inputs] and [tokens, inputs] sum to too much."""
    magnitudes, others = np.abs(weights), np.abs(activations)
    most = magnitudes.max() * others.max() * weights.shape[1]
    if most > LARGEST_SUM and (others @ magnitudes.T).max() > LARGEST_SUM:
        raise accumulator_error(format)
