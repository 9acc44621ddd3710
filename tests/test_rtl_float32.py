from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from termwise.algorithms.operands import split_half
from termwise.algorithms.reference import float32_of
from termwise.rtl.compiled_model import CompiledModel
from termwise.rtl.float32 import Float32Adder, Float32Multiplier, Float32ToHalf, HalfToFloat32, IntegerToFloat32

NUMBERS = 300_000
EDGES = (0, 1, 0x7FFFFF, 0x800000, 0xFFFFFF, 0x33800000, 0x34000000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000)


def patterns(random: np.random.Generator, *, finite: bool = False) -> NDArray[np.uint32]:
    """FP32 bits: any, subnormal, close in magnitude, with few ones, and the edges of the format; of both signs."""
    bits = random.integers(0, 1 << 32, NUMBERS, dtype=np.uint64).astype(np.uint32)
    eighth = NUMBERS // 8
    bits[:eighth] &= 0x807FFFFF
    bits[eighth : 2 * eighth] = bits[eighth : 2 * eighth] & 0x807FFFFF | random.integers(110, 140, eighth) << 23
    signs = random.integers(0, 2, eighth) << 31
    bits[2 * eighth : 3 * eighth] = random.choice(np.array(EDGES, dtype=np.uint32), eighth) | signs
    bits[3 * eighth : 4 * eighth] &= 0xFF800007
    random.shuffle(bits)
    if finite:
        bits[bits >> 23 & 255 == 255] &= 0x80FFFFFF
    return bits


def check(shown: NDArray[Any], expected: NDArray[np.floating], latency: int, *inputs: NDArray[Any]) -> None:
    """Equal bits after ``latency`` cycles; a NaN is the quiet one of the format."""
    kind = np.uint32 if expected.dtype == np.float32 else np.uint16
    wanted = expected.view(kind).astype(np.int64)
    nan = np.isnan(expected)
    if kind is np.uint32:
        wanted[nan] = 0x7FC00000
    else:
        wanted[nan] = wanted[nan] & 0x8000 | 0x7E00
    wrong = np.flatnonzero(shown[latency:] != wanted[: len(wanted) - latency])
    first = wrong[:1]
    assert not wrong.size, ([hex(part[first][0]) for part in inputs], hex(shown[latency:][first][0]))


@pytest.mark.parametrize(
    ("component", "operation"), [(Float32Adder, np.add), (Float32Multiplier, np.multiply)], ids=["sum", "product"]
)
def test_sums_and_products_are_those_of_ieee_754(component: Any, operation: Callable[..., Any]) -> None:
    random = np.random.default_rng(0)
    left, right = patterns(random), patterns(random, finite=component is Float32Multiplier)
    right[: NUMBERS // 4] = left[: NUMBERS // 4] ^ 0x80000000  # cancellation, complete or nearly so
    right[: NUMBERS // 4] += random.integers(0, 3, NUMBERS // 4).astype(np.uint32)
    if component is Float32Multiplier:
        right[right >> 23 & 255 == 255] &= 0x80FFFFFF
    shown = CompiledModel(component()).run({"left": left, "right": right})["result"]
    with np.errstate(all="ignore"):
        expected = operation(left.view(np.float32), right.view(np.float32))
    check(shown, expected, component.latency, left, right)


@pytest.mark.parametrize("bits", [15, 23, 32, 60])
def test_an_integer_becomes_a_float_with_one_rounding(bits: int) -> None:
    random = np.random.default_rng(bits)
    count = 20_000
    numbers = random.integers(-(1 << (bits - 1)), 1 << (bits - 1), count) >> random.integers(0, bits, count)
    numbers[:4] = [0, -1, -(1 << (bits - 1)), (1 << (bits - 1)) - 1]
    exponents = random.integers(-60, 40, count)
    exponents[: count // 3] = random.integers(-149, -100, count // 3)
    exponents[-count // 6 :] = random.integers(60, 131, len(exponents[-count // 6 :]))
    component = IntegerToFloat32(bits)
    shown = CompiledModel(component).run({"number": numbers, "exponent": exponents})["result"]
    expected = [float32_of(int(number), int(exponent)) for number, exponent in zip(numbers, exponents, strict=True)]
    check(shown, np.array(expected, dtype=np.float32), component.latency, numbers, exponents)


def test_a_float_becomes_a_half_with_one_rounding() -> None:
    number = patterns(np.random.default_rng(0))
    number[NUMBERS // 2 :] = number[NUMBERS // 2 :] & 0x807FFFFF | 0x38000000 - (number[NUMBERS // 2 :] >> 8 & 31) << 23
    ties = np.arange(1 << 16, dtype=np.uint32) << 13 | 0x1000
    number[: ties.size] = ties
    shown = CompiledModel(Float32ToHalf()).run({"number": number})["result"]
    with np.errstate(all="ignore"):
        expected = number.view(np.float32).astype(np.float16)
    check(shown, expected, Float32ToHalf.latency, number)


def test_every_finite_half_becomes_the_same_float() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[halves >> 10 & 31 != 31]
    significands, exponents = split_half(halves.view(np.float16))
    operand = halves.astype(int) >> 15 | exponents << 1 | np.abs(significands) << 6
    shown = CompiledModel(HalfToFloat32()).run({"operand": operand})["result"]
    check(shown, halves.view(np.float16).astype(np.float32), 0, halves)
