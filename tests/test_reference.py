"""What the PEs compute: the reference against arithmetic in fractions, and its Numba twin against the reference."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from termwise.algorithms import reference
from termwise.algorithms.bit_serial import BitSerialSpec, booth_digits, fixed_point_digits
from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.dictionary import DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.operands import HALF_BIAS, split_half, weight_operands
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import ProcessingElementSpec, UnsupportedFormatError
from termwise.algorithms.quantize import quantize
from termwise.sim import functional

PAPER, EXACT, SHARED = (BitSerialSpec(numerics=name) for name in ("paper", "exact", "shared_exponent"))  # type: ignore[arg-type]
BIT_SERIAL_FORMATS = [
    "bitmod-w3g16",
    "bitmod-w4g16",
    "bitmod-w4:special=7,-7",
    "int-w8g24",
    "int-w6g16",
    "int-asym-w4g16",
    "ant-w4g16",
    "fp5_e2m2-w5g16",
    "mxfp4",
    "nvfp4",
]
EVERY_PAIR: list[tuple[ProcessingElementSpec, str]] = [
    *itertools.product((PAPER, EXACT, SHARED), BIT_SERIAL_FORMATS),
    *itertools.product((Fp16MacSpec(),), ("fp16", "bitmod-w4g16", "olive-w4", "int-asym-w4g16", "nvfp4")),
    *itertools.product((FlintSpec(),), ("ant-w4g16", "ant-w8", "int-w8g16", "flint5-w5g16")),
    *itertools.product((OutlierVictimSpec(),), ("olive-w4", "olive-w8", "olive-w8:outlier=e2m5", "olive-w4g16")),
    *itertools.product((DictionarySpec(),), ("gobo-w3", "gobo-w4:threshold=-1")),
]
HALVES = st.one_of(
    st.floats(-65504, 65504, width=16),
    st.sampled_from([0.0, -0.0, 65504.0, -65504.0, 2**-14, 2**-24, -(2**-24), 1.0, -1.0, 2047.0]),
)


def weights_of(seed: int, outputs: int = 3, inputs: int = 40) -> NDArray[np.float32]:
    """Heavy-tailed weights."""
    return (np.random.default_rng(seed).standard_t(4, (outputs, inputs)) * 0.05).astype(np.float32)


def activations_of(seed: int, tokens: int = 2, inputs: int = 40) -> NDArray[np.float16]:
    """Activations over many magnitudes, zeros and subnormals among them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((tokens, inputs)) * np.exp2(random.integers(-14, 14, (tokens, inputs)))
    values[random.random(values.shape) < 0.1] = 0
    values[random.random(values.shape) < 0.1] *= 2**-16
    return values.clip(-65504, 65504).astype(np.float16)


def nearest_float32(value: Fraction) -> np.float32:
    """The FP32 number nearest to ``value``, of two the even one, found among the neighbours of a guess."""
    guess = np.float32(float(value))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(candidates, key=lambda near: (abs(Fraction(float(near)) - value), int(near.view(np.uint32)) & 1))


class TestRounding:
    @given(st.integers(-(1 << 70), 1 << 70), st.integers(-160, 40))
    def test_fp32_is_the_nearest_number(self, number: int, exponent: int) -> None:
        value = Fraction(number) * Fraction(2) ** exponent
        if abs(value) < 2**127:
            assert reference.float32_of(number, exponent) == nearest_float32(value)

    def test_ties_go_to_the_even_number_and_beyond_the_range_is_infinite(self) -> None:
        assert reference.float32_of((1 << 25) + 2, 0) == 1 << 25
        assert reference.float32_of((1 << 25) + 6, 0) == (1 << 25) + 8
        assert reference.float32_of((1 << 24) - 1, 104) == np.finfo(np.float32).max
        assert reference.float32_of((1 << 25) - 1, 103) == np.inf
        assert reference.float32_of(-1, 128) == -np.inf
        assert reference.float32_of(3, -150) == np.ldexp(np.float32(1), -148)  # 1.5 units: 2 is the even one

    @given(st.integers(-(1 << 40), 1 << 40), st.integers(0, 45))
    def test_shifts_round_down_or_to_the_nearest(self, number: int, places: int) -> None:
        exact = Fraction(number, 1 << places)
        assert reference.shift_right(number, places, "truncate") == math.floor(exact)
        assert reference.shift_right(number, places, "nearest_even") == round(exact)


class TestOperands:
    def test_every_half_is_its_significand_times_its_power(self) -> None:
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        halves = halves[np.isfinite(halves)]
        significands, exponents = split_half(halves)
        np.testing.assert_array_equal(np.ldexp(significands.astype(np.float64), exponents - HALF_BIAS), halves)
        assert set(exponents.tolist()) == set(range(1, 31))
        with pytest.raises(InputError, match="2 NaN or infinite"):
            split_half(np.array([np.nan, 1, np.inf], dtype=np.float16))

    @pytest.mark.parametrize(
        "name",
        [*BIT_SERIAL_FORMATS, "olive-w4", "olive-w8g16", "ant-w6g16:types=int,pot,float", "mxint8", "int-asym-w8"],
    )
    def test_operands_are_the_weights(self, name: str) -> None:
        tensor = quantize(weights_of(1), name)
        weights = weight_operands(tensor)
        group = np.arange(40) // weights.group_size
        scale = np.ldexp(weights.scale_significands.astype(float), weights.scale_exponents - weights.fraction_bits)
        if weights.channel_scales is not None:
            scale *= weights.channel_scales.astype(float)[:, None]
        np.testing.assert_array_equal((weights.numerators * scale[:, group]).astype(np.float32), tensor.dequantize())
        assert weights.scale_significands.max() < 1 << weights.scale_bits

    def test_what_has_no_numerators_is_refused(self) -> None:
        for name in ("fp16", "gobo-w3", "int-w4g16:axis=output"):
            with pytest.raises(InputError, match="expected"):
                weight_operands(quantize(weights_of(1), name))
        scaled = quantize(weights_of(1), "int-w4g16").with_input_scales(np.ones(40, dtype=np.float32))
        with pytest.raises(InputError, match="input scales"):
            weight_operands(scaled)


class TestDigits:
    @pytest.mark.parametrize("bits", range(2, 10))
    def test_booth_digits_sum_to_every_number(self, bits: int) -> None:
        for number in range(-(1 << (bits - 1)), 1 << (bits - 1)):
            digits = booth_digits(number, bits)
            assert sum(digit << 2 * term for term, digit in enumerate(digits)) == number
            assert set(digits) <= {-2, -1, 0, 1, 2}
            assert len(digits) == (bits + 1) // 2

    def test_fixed_point_digits_sum_to_every_number_that_has_them(self) -> None:
        refused = []
        for number in range(-31, 32):
            try:
                first, second = fixed_point_digits(number, 5)
            except UnsupportedFormatError:
                refused.append(number)
                continue
            assert 2 * first + second == number
            assert all(abs(digit) in (0, 1, 2, 4, 8, 16) for digit in (first, second))
        powers = {sign * (1 << place) for sign in (1, -1) for place in range(6)} | {0}
        sums = {one + other for one in powers for other in powers}
        assert refused == [number for number in range(-31, 32) if number not in sums]

    @pytest.mark.parametrize("name", ["bitmod_fp3_ea_pos", "bitmod_fp4_ea_neg", "bitmod_fp4_er_pos", "fp4_e2m1"])
    def test_the_types_of_the_paper_need_exponents_of_two_bits(self, name: str) -> None:
        for numerator in get_datatype(name).sorted_numerators:
            assert all(abs(digit) <= 8 for digit in fixed_point_digits(numerator, 5))


class TestBitSerial:
    """Section 2.3 of the microarchitecture; a published fault has its test."""

    def test_exact_is_the_sum_of_each_group_rounded_once(self) -> None:
        for name in ("int-w8g24", "mxfp4", "ant-w4g16", "int-asym-w4g16"):
            tensor = quantize(weights_of(2), name)
            weights = weight_operands(tensor)
            activations = activations_of(3)
            found = reference.multiply(EXACT, tensor, activations)
            values = tensor.dequantize()  # level × scale is exact in FP32 here
            for token, output in np.ndindex(found.shape):
                total = np.float32(0)
                for group in range(weights.groups):
                    columns = weights.columns(group)
                    pairs = zip(activations[token, columns], values[output, columns], strict=True)
                    total += nearest_float32(
                        sum((Fraction(float(a)) * Fraction(float(w)) for a, w in pairs), Fraction())
                    )
                assert found[token, output] == total

    def test_activations_of_one_exponent_lose_nothing_in_any_numerics(self) -> None:
        # Significands of 11 bits, one exponent, 4 inputs: sums of 13 bits times levels up to 16 halves need
        # 11 + 2 + 5 = 18 bits; with weights of 1 and -1 they fit into the 15 bits of the accumulator.
        activations = (1 + np.random.default_rng(1).integers(0, 1024, (4, 4)) / 1024).astype(np.float16)
        tensor = quantize(np.array([[1, -1, 1, 0]], dtype=np.float32), "int-w2")
        expected = (activations.astype(np.float32) @ np.array([1, -1, 1, 0], np.float32))[:, None]
        for spec in (PAPER, EXACT, SHARED):
            np.testing.assert_array_equal(reference.multiply(spec, tensor, activations), expected)

    def test_a_small_dot_product_is_aligned_to_a_large_accumulator(self) -> None:
        # The published RTL adds it unaligned.
        large = reference.accumulate(PAPER, (0, 0), (8192, 20), 0)
        assert large == (8192, 20)
        assert reference.accumulate(PAPER, large, (8192, 10), 0) == (8192 + 8, 20)
        assert reference.accumulate(PAPER, large, (-1, 10), 0) == (8191, 20)  # towards minus infinity

    def test_a_sum_that_is_too_wide_moves_its_exponent(self) -> None:
        assert reference.accumulate(PAPER, (0, 0), (16383, 5), 0) == (16383, 5)
        assert reference.accumulate(PAPER, (0, 0), (16384, 5), 0) == (8192, 6)
        assert reference.accumulate(PAPER, (0, 0), (-16384, 5), 0) == (-16384, 5)
        assert reference.accumulate(PAPER, (0, 0), (-65532, 5), 1) == (-16383, 8)

    def test_lanes_that_are_absent_do_not_count_and_far_ones_vanish(self) -> None:
        one, zero = (1024, 15), (0, 30)
        assert reference.dot_product(PAPER, [one, zero, (1024, 30), one], [1, 8, 0, 0]) == (8192, 15)
        assert reference.dot_product(PAPER, [one, (1024, 28), (-1024, 29), zero], [1, 0, 1, 1])[1] == 29
        assert reference.dot_product(PAPER, [(1024, 29), (2047, 15)], [1, -1]) == (8192, 29)
        assert reference.dot_product(PAPER, [zero], [4]) == (0, 0)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(HALVES, min_size=8, max_size=8), st.integers(0, 2**32 - 1))
    def test_paper_numerics_stay_within_their_bound(self, values: list[float], seed: int) -> None:
        # In units of 2^(N - 28), N the largest exponent that occurs: a lane loses less than 1 in the alignment, and an
        # addition less than 1 for each operand and 1 for the sum. N is at most E + 3 of a digit + 1 of the base + 3,
        # by which sums of 8 products below 2 · 2^14 outgrow 15 bits.
        activations = np.array([values], dtype=np.float16)
        tensor = quantize(weights_of(seed, outputs=1, inputs=8), "bitmod-w4")
        weights = weight_operands(tensor)
        significands, exponents = (part[0].tolist() for part in split_half(activations))
        pairs, numerators = list(zip(significands, exponents, strict=True)), weights.numerators[0].tolist()
        total, exponent = reference.group_sum(PAPER, numerators, pairs, booth=False, bits=0)
        exact, least = reference.group_sum(EXACT, numerators, pairs, booth=False, bits=0)
        error = abs(Fraction(total) * Fraction(2) ** exponent - Fraction(exact) * Fraction(2) ** least)
        steps, terms, lanes = 2, 2, 4
        unit = Fraction(2) ** (max(exponents) + 3 + 1 + 3 - 28)
        assert error < steps * terms * (lanes + 3) * unit

    def test_wider_alignment_tends_to_the_exact_sum(self) -> None:
        tensor, activations = quantize(weights_of(4), "bitmod-w4g16"), activations_of(5)
        exact = reference.multiply(EXACT, tensor, activations)
        errors = [
            np.abs(
                reference.multiply(BitSerialSpec(align_bits=bits, accumulator_bits=bits + 4), tensor, activations)
                - exact
            )
            for bits in (8, 12, 16, 24)
        ]
        assert all(later.max() < earlier.max() for earlier, later in itertools.pairwise(errors))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"lanes": 0},
            {"align_bits": 3},
            {"align_bits": 25},
            {"accumulator_bits": 7},
            {"numerics": "fast"},
            {"rounding": "up"},
        ],
    )
    def test_a_spec_that_cannot_be_built_is_refused(self, wrong: dict[str, object]) -> None:
        with pytest.raises(InputError, match=next(iter(wrong))):
            BitSerialSpec(**wrong)  # type: ignore[arg-type]


class TestOtherKinds:
    def test_fp16_weights_are_rounded_once(self) -> None:
        tensor = quantize(weights_of(6), "bitmod-w4g16")
        halves = reference.half_weights(tensor)
        weights = weight_operands(tensor)
        assert weights.channel_scales is not None
        for output, column in np.ndindex(halves.shape):
            group = column // weights.group_size
            exact = Fraction(int(weights.numerators[output, column]) * int(weights.scale_significands[output, group]))
            exact *= Fraction(float(weights.channel_scales[output])) / (1 << int(weights.fraction_bits[output, group]))
            near = [np.nextafter(halves[output, column], np.float16(side)) for side in (-np.inf, np.inf)]
            error = abs(Fraction(float(halves[output, column])) - exact)
            assert all(error <= abs(Fraction(float(other)) - exact) for other in near)

    def test_a_weight_beyond_fp16_is_refused(self) -> None:
        with pytest.raises(InputError, match="has no FP16 value"):
            reference.half_weights(quantize(np.full((1, 16), 1e6, dtype=np.float32), "bitmod-w4g16"))

    def test_sums_are_those_of_fp32_in_the_order_of_the_inputs(self) -> None:
        tensor, activations = quantize(weights_of(7), "fp16"), activations_of(8)
        found = reference.multiply(Fp16MacSpec(), tensor, activations)
        total = np.zeros(found.shape, dtype=np.float32)
        for column in range(40):
            total += activations[:, column, None].astype(np.float32) * tensor.dequantize()[None, :, column]
        np.testing.assert_array_equal(found, total)

    def test_a_victim_adds_nothing(self) -> None:
        tensor = quantize(np.array([[0.1, 6.0, 0.1, 0.1]], dtype=np.float32), "olive-w4")
        assert weight_operands(tensor).numerators[0, 0] == 0
        alone = np.array([[1000.0, 0, 0, 0]], dtype=np.float16)
        assert reference.multiply(OutlierVictimSpec(), tensor, alone) == 0

    def test_a_format_that_the_pe_does_not_take_is_refused(self) -> None:
        activations = activations_of(1)
        for spec, name in ((PAPER, "olive-w4"), (FlintSpec(), "bitmod-w4g16"), (DictionarySpec(), "int-w4g16")):
            for multiply in (reference.multiply, functional.multiply):
                with pytest.raises(UnsupportedFormatError):
                    multiply(spec, quantize(weights_of(1), name), activations)

    @pytest.mark.parametrize("multiply", [reference.multiply, functional.multiply])
    def test_wrong_activations_are_refused(self, multiply: object) -> None:
        tensor = quantize(weights_of(1), "int-w4g16")
        for wrong in (np.zeros((2, 39), np.float16), np.zeros((2, 40), np.float32), np.zeros(40, np.float16)):
            with pytest.raises(InputError, match=r"expected float16 \[tokens, 40\]"):
                multiply(PAPER, tensor, wrong)  # type: ignore[operator]
        with pytest.raises(InputError, match="NaN or infinite activations"):
            multiply(PAPER, tensor, np.full((1, 40), np.inf, np.float16))  # type: ignore[operator]


class TestTwin:
    @pytest.mark.parametrize(("spec", "name"), EVERY_PAIR, ids=[f"{spec}-{name}" for spec, name in EVERY_PAIR])
    def test_every_bit_is_that_of_the_reference(self, spec: ProcessingElementSpec, name: str) -> None:
        for seed in range(3):
            tensor, activations = quantize(weights_of(seed), name), activations_of(seed + 100)
            np.testing.assert_array_equal(
                functional.multiply(spec, tensor, activations).view(np.uint32),
                reference.multiply(spec, tensor, activations).view(np.uint32),
            )

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(["paper", "exact", "shared_exponent"]),
        st.sampled_from(["truncate", "nearest_even"]),
        st.integers(4, 24),
        st.integers(8, 28),
        st.integers(1, 6),
        st.sampled_from(BIT_SERIAL_FORMATS),
        st.lists(HALVES, min_size=20, max_size=20),
        st.integers(0, 2**32 - 1),
    )
    def test_any_width_rounding_and_number_of_lanes(
        self,
        numerics: str,
        rounding: str,
        align_bits: int,
        accumulator_bits: int,
        lanes: int,
        name: str,
        values: list[float],
        seed: int,
    ) -> None:
        spec = BitSerialSpec(
            numerics=numerics,  # type: ignore[arg-type]
            rounding=rounding,  # type: ignore[arg-type]
            align_bits=align_bits,
            accumulator_bits=accumulator_bits,
            lanes=lanes,
        )
        tensor = quantize(weights_of(seed, outputs=2, inputs=20), get_format(name))
        activations = np.array([values, values[::-1]], dtype=np.float16)
        np.testing.assert_array_equal(
            functional.multiply(spec, tensor, activations).view(np.uint32),
            reference.multiply(spec, tensor, activations).view(np.uint32),
        )

    def test_blocks_of_tokens_do_not_matter(self) -> None:
        tensor = quantize(weights_of(1, outputs=4), "bitmod-w4g16")
        activations = activations_of(1, tokens=functional.TOKENS_AT_ONCE + 3)
        whole = functional.multiply(PAPER, tensor, activations)
        for token in (0, functional.TOKENS_AT_ONCE - 1, functional.TOKENS_AT_ONCE, functional.TOKENS_AT_ONCE + 2):
            alone = functional.multiply(PAPER, tensor, activations[token : token + 1])
            np.testing.assert_array_equal(whole[token], alone[0])

    def test_a_group_whose_exact_sum_is_too_wide_is_refused(self) -> None:
        tensor = quantize(np.ones((1, 1 << 16), dtype=np.float32), "int-w8")
        with pytest.raises(InputError, match="expected sums below 2"):
            functional.multiply(EXACT, tensor, np.full((1, 1 << 16), 65504, dtype=np.float16))
