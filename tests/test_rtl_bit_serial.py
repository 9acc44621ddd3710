from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.operands import split_half
from termwise.algorithms.reference import accumulate, dot_product, shift_right
from termwise.rtl.bit_serial import ActivationAligner, BitSerialPe, least_sum_bits, magnitude_bits
from termwise.rtl.compiled_model import CompiledModel
from termwise.rtl.handover import Dequantizer

TERMS = 3000

DESIGNS = {
    "as published": BitSerialSpec(),
    "rounded to nearest": BitSerialSpec(rounding="nearest_even"),
    "narrow": BitSerialSpec(lanes=3, align_bits=4, accumulator_bits=8),
    "narrow, rounded": BitSerialSpec(lanes=2, align_bits=8, accumulator_bits=12, rounding="nearest_even"),
    "wide": BitSerialSpec(lanes=8, align_bits=24, accumulator_bits=28),
    "one lane": BitSerialSpec(lanes=1, align_bits=11, accumulator_bits=10, rounding="nearest_even"),
    "exact": BitSerialSpec(numerics="exact"),
    "shared exponent": BitSerialSpec(numerics="shared_exponent"),
    "shared exponent, eight lanes": BitSerialSpec(numerics="shared_exponent", lanes=8, align_bits=10),
}


class Stimulus:
    """Random terms of ``count`` cycles, as the borders of an array give them, some of them not valid."""

    def __init__(
        self, spec: BitSerialSpec, seed: int, count: int = TERMS, exponents: tuple[int, int] = (0, 31)
    ) -> None:
        random = np.random.default_rng(seed)
        shape = (count, spec.lanes)
        halves = random.integers(0, 2, shape) << 15 | random.integers(*exponents, shape) << 10
        halves |= random.integers(0, 1024, shape)
        halves[random.random(shape) < 0.05] &= 0x8000
        self.significands, self.exponents = split_half(halves.astype(np.uint16).view(np.float16))
        self.aligned = random.integers(1 - (1 << spec.align_bits), 1 << spec.align_bits, shape)
        self.present = (random.random(shape) < 0.8) & (random.random((count, 1)) > 0.05)
        self.negative, self.shift = random.random(shape) < 0.5, random.integers(0, 5, shape)
        self.base = random.integers(0, 7, count)
        self.valid, self.first = random.random(count) < 0.9, random.random(count) < 0.05
        self.valid[0] = self.first[0] = True
        self.spec = spec

    def ports(self) -> dict[str, list[int]]:
        digits = self.present | self.negative.astype(int) << 1 | self.shift << 2
        weight = [_packed(row, 5) | int(base) << 5 * len(row) for row, base in zip(digits, self.base, strict=True)]
        if self.spec.numerics == "shared_exponent":
            fields = (self.aligned < 0) | np.abs(self.aligned) << 1
            activation = [_packed(row, magnitude_bits(self.spec) + 1) for row in fields]
        else:
            halves = (self.significands < 0) | self.exponents << 1 | np.abs(self.significands) << 6
            activation = [_packed(row, 17) for row in halves]
        control = (self.valid | self.first.astype(int) << 1).tolist()
        return {"weight": weight, "activation": activation, "control": control}

    def sums(self) -> list[tuple[int, int]]:
        """The accumulator after each cycle, by the reference; (sum, 0) but for numerics ``paper``."""
        found = []
        state = (0, 0)
        for cycle in range(len(self.base)):
            if self.valid[cycle]:
                state = self._add((0, 0) if self.first[cycle] else state, cycle)
            found.append(state)
        return found

    def _add(self, state: tuple[int, int], cycle: int) -> tuple[int, int]:
        digits = np.where(self.present[cycle], np.where(self.negative[cycle], -1, 1) << self.shift[cycle], 0).tolist()
        base = int(self.base[cycle])
        activations = list(zip(self.significands[cycle].tolist(), self.exponents[cycle].tolist(), strict=True))
        if self.spec.numerics == "paper":
            return accumulate(self.spec, state, dot_product(self.spec, activations, digits), base)
        if self.spec.numerics == "exact":
            values = [significand << (exponent - 1) for significand, exponent in activations]
        else:
            values = self.aligned[cycle].tolist()
        return state[0] + (sum(value * digit for value, digit in zip(values, digits, strict=True)) << base), 0


def _packed(fields: NDArray[np.integer], bits: int) -> int:
    return sum((int(field) & ((1 << bits) - 1)) << bits * place for place, field in enumerate(fields))


def _signed(bits: int, width: int) -> int:
    return (bits & ((1 << width) - 1)) - ((bits >> (width - 1) & 1) << width)


def _shown(pe: BitSerialPe, sums: NDArray[np.object_]) -> list[tuple[int, int]]:
    width = pe.sum.significand.shape().width
    return [(_signed(int(bits), width), int(bits) >> width) for bits in sums]


def _matches(shown: tuple[int, int], expected: tuple[int, int], width: int) -> bool:
    """An empty sum has no exponent; sums that a reference lets grow without end agree modulo the register."""
    return shown[0] == _signed(expected[0], width) and (expected[0] == 0 or shown[1] == expected[1])


@pytest.mark.parametrize("name", DESIGNS)
def test_every_term_changes_the_accumulator_as_the_reference_does(name: str) -> None:
    spec = DESIGNS[name]
    pe = BitSerialPe(spec, sum_bits=64)
    model = CompiledModel(pe)
    for seed, exponents in enumerate([(0, 31), (13, 18), (0, 3)]):
        model.reset()
        stimulus = Stimulus(spec, seed, exponents=exponents)
        shown = _shown(pe, model.run(stimulus.ports())["sum"])
        width = pe.sum.significand.shape().width
        expected = stimulus.sums()
        for cycle in range(TERMS - pe.latency):
            assert _matches(shown[cycle + pe.latency], expected[cycle], width), (name, seed, cycle)


def test_latency_is_the_pipeline_without_memory_and_border() -> None:
    for spec in DESIGNS.values():
        pe = BitSerialPe(spec)
        ports = Stimulus(spec, 1, count=20).ports()
        ports["control"] = [3] + [0] * 19
        sums = CompiledModel(pe).run(ports)["sum"]
        assert pe.latency == spec.stages - 2
        changed = [cycle for cycle, (before, after) in enumerate(pairwise(sums)) if before != after]
        assert changed == [pe.latency - 1]


def test_a_dot_product_below_the_accumulator_is_aligned() -> None:
    """The published RTL adds it unaligned."""
    spec = BitSerialSpec()
    pe = BitSerialPe(spec)
    stimulus = Stimulus(spec, 0, count=8)
    stimulus.significands[:], stimulus.exponents[:] = 1024, 20
    stimulus.exponents[1] = 15
    stimulus.present[:], stimulus.negative[:], stimulus.shift[:], stimulus.base[:] = True, False, 0, 0
    stimulus.valid[:], stimulus.first[:] = [True, True, *[False] * 6], [True, *[False] * 7]
    shown = _shown(pe, CompiledModel(pe).run(stimulus.ports())["sum"])[-1]
    # 4 · 2^13 fits 15 bits after two places; 4 · 2^13 / 2^5 is added 2^7 lower.
    assert shown == ((4 << 13 >> 2) + (4 << 13 >> 5 >> 2), 22)


@pytest.mark.parametrize("scale_bits", [1, 8, 11])
def test_the_dequantizer_keeps_every_bit_and_takes_groups_without_a_pause(scale_bits: int) -> None:
    random = np.random.default_rng(0)
    sums = np.concatenate([[-(1 << 14), (1 << 14) - 1], random.integers(-(1 << 14), 1 << 14, 200)])
    scales = np.concatenate([[(1 << scale_bits) - 1] * 2, random.integers(0, 1 << scale_bits, 200)])
    component = Dequantizer(15, scale_bits)
    cycles = scale_bits * (len(sums) + 1)
    start = np.arange(cycles) % scale_bits == 0
    bits = [int(scale) >> place & 1 for scale in scales for place in reversed(range(scale_bits))] + [0] * scale_bits
    held = np.zeros(cycles, dtype=np.int64)
    held[: len(sums) * scale_bits : scale_bits] = sums  # it looks at the sum in the cycle after next_start alone
    ports = {"sum": [0, *held], "next_start": [*start, 0], "next_scale_bit": [*bits, 0]}
    products = CompiledModel(component).run(ports)["product"]
    assert component.latency == scale_bits
    assert products[scale_bits + 1 :: scale_bits].tolist() == (sums * scales).tolist()
    assert component.product.shape().width == 15 + scale_bits  # 23 bits with a scale of 8, where the RTL keeps 21


@pytest.mark.parametrize("name", ["shared exponent", "shared exponent, eight lanes"])
@pytest.mark.parametrize("rounding", ["truncate", "nearest_even"])
def test_activations_are_aligned_to_their_group(name: str, rounding: str) -> None:
    spec = BitSerialSpec(
        numerics="shared_exponent",
        rounding=rounding,
        lanes=1,
        align_bits=DESIGNS[name].align_bits,  # type: ignore[arg-type]
    )
    finite = np.arange(1 << 16, dtype=np.uint16)
    finite = finite[finite >> 10 & 31 != 31]
    significands, exponents = split_half(finite.view(np.float16))
    random = np.random.default_rng(0)
    greatest = np.minimum(exponents + random.integers(0, 30, exponents.size), 30)
    component = ActivationAligner(spec)
    shown = CompiledModel(component).run({"halves": finite, "exponent": greatest})["aligned"][1:]
    assert component.aligned.shape().size == 1 + magnitude_bits(spec)
    for cycle in range(finite.size - 1):
        distance = int(greatest[cycle] - exponents[cycle]) - (spec.align_bits - 11)
        magnitude = shift_right(abs(int(significands[cycle])), distance, spec.rounding)
        negative = int(finite[cycle]) >> 15
        assert int(shown[cycle]) == magnitude << 1 | negative, (hex(finite[cycle]), greatest[cycle])


def test_a_sum_that_no_register_holds_is_refused() -> None:
    assert least_sum_bits(BitSerialSpec(numerics="shared_exponent"), 14, 128) == 14 + 1 + 11
    with pytest.raises(InputError, match="a group of 4194304 weights"):
        least_sum_bits(BitSerialSpec(numerics="exact"), 127, 1 << 22)
