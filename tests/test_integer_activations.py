"""PEs with integer activations: what they take, their product to the bit, and the array that they make."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms import reference
from termwise.algorithms.activations import DynamicQuantizer, InputSample, StaticQuantizer, activation_quantizer
from termwise.algorithms.datatypes import DataType, get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import ProcessingElementSpec, UnsupportedFormatError
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.algorithms.shapes import AttentionShape, LinearShape, ModelShape
from termwise.algorithms.workload import workload
from termwise.sim import functional
from termwise.sim.accelerators import ArrayShape, MachineError, check_machine, get_accelerator
from termwise.sim.cycle import run_tile_program
from termwise.sim.plan import plan_product, planned_traffic
from termwise.sim.simulate import product_of, simulate

OLIVE = OutlierVictimSpec(activations="integer")
ANT = FlintSpec(activations="integer")
Product = Callable[[ProcessingElementSpec, QuantizedTensor, QuantizedTensor], NDArray[np.float32]]
PRODUCTS = pytest.mark.parametrize(
    "multiply", [reference.multiply_integers, functional.multiply_integers], ids=["reference", "twin"]
)
BOTH = (
    "int-w8a8",
    "int-w4a4g16",
    "int-w6a5g24",
    "int-w4a8g16",
    "int-w2a4",
    "ant-w4a4",
    "ant-w4a8g16",
    "ant-w6a6",
    "ant-w8a4:types=flint",
    "flint5-w5a4g16",
)
OLIVE_ONLY = ("olive-w4a4", "olive-w4a4g16", "olive-w8a8", "olive-w8a8:outlier=e2m5", "olive-w4a8", "olive-w8a4")
EVERY_PAIR = [*itertools.product((OLIVE, ANT), BOTH), *itertools.product((OLIVE,), OLIVE_ONLY)]


def weights_of(seed: int, outputs: int = 5, inputs: int = 41) -> NDArray[np.float32]:
    """Heavy-tailed weights, an odd number in a row."""
    return (np.random.default_rng(seed).standard_t(4, (outputs, inputs)) * 0.05).astype(np.float32)


def activations_of(seed: int, tokens: int = 3, inputs: int = 41) -> NDArray[np.float32]:
    """Activations with a few large channels."""
    random = np.random.default_rng(seed)
    return (random.standard_normal((tokens, inputs)) * np.exp(random.standard_normal(inputs))).astype(np.float32)


def quantizer_of(name: str, values: NDArray[np.float32]) -> StaticQuantizer | DynamicQuantizer:
    sample = InputSample(rows=values, minimum=values.min(axis=0), maximum=values.max(axis=0), tokens=len(values))
    quantizer = activation_quantizer(get_format(name), sample)
    assert isinstance(quantizer, StaticQuantizer | DynamicQuantizer)
    return quantizer


def operands_of(name: str, seed: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    values = activations_of(seed + 100)
    return quantize(weights_of(seed), name), quantizer_of(name, values).quantize(values)


def outlier_tensor(codes: list[int], name: str) -> QuantizedTensor:
    """One row of pairs (victim, outlier with this code of the 8-bit abfloat) at the scale 1."""
    tensor = quantize(np.ones((1, 2 * len(codes)), dtype=np.float32), name)
    parts = {**tensor.parts, "scales": np.ones((1, 1), dtype=np.float16)}
    return dataclasses.replace(tensor, parts=parts).with_codes(
        np.array([list(itertools.chain.from_iterable((0x80, code) for code in codes))], dtype=np.uint8)
    )


class TestCodes:
    @pytest.mark.parametrize(
        "name",
        [
            *(f"int{bits}" for bits in range(2, 9)),
            *(f"flint{bits}" for bits in range(3, 9)),
            *("abfloat4_e2m1_b2", "abfloat4_e2m1_b3", "abfloat8_e4m3_b4", "abfloat8_e2m5_b2"),
        ],
    )
    def test_every_level_is_an_integer_of_the_width_of_its_pe_and_a_shift(self, name: str) -> None:
        datatype = get_datatype(name)
        limit = 8 if datatype.bits <= 4 else 128
        for code, level in enumerate(datatype.numerators):
            if level is None:
                with pytest.raises(InputError, match=f"code {code} of {name} is no level"):
                    reference.shifted_integer(datatype, code)
            else:
                integer, exponent = reference.shifted_integer(datatype, code)
                assert integer << exponent == level
                assert -limit <= integer < limit

    def test_codes_decode_as_published(self) -> None:
        # OliVe section 3: abfloat 0101 with bias 2 is 3 << 4 = 48. ANT: signed flint 0 1 2 3 16 8 4 6.
        assert reference.shifted_integer(get_datatype("abfloat4_e2m1_b2"), 0b0101) == (3, 4)
        flint = [reference.shifted_integer(get_datatype("flint4"), code) for code in range(8)]
        assert flint == [(0, 0), (1, 0), (2, 0), (3, 0), (1, 4), (2, 2), (4, 0), (6, 0)]

    def test_other_types_are_refused(self) -> None:
        with pytest.raises(InputError, match="fp4_e2m1 levels are no shifted integers"):
            reference.shifted_integer(get_datatype("fp4_e2m1"), 1)

    @pytest.mark.parametrize(
        ("weights", "activations"),
        [
            ("int8", "int8"),
            ("int8", "abfloat8_e4m3_b4"),
            ("abfloat8_e4m3_b4", "abfloat8_e4m3_b4"),
            ("abfloat8_e2m5_b2", "abfloat8_e2m5_b2"),
            ("flint8", "flint8"),
            ("int4", "int8"),
            ("abfloat4_e2m1_b2", "abfloat8_e4m3_b4"),
        ],
    )
    def test_four_partial_products_make_every_product(self, weights: str, activations: str) -> None:
        def decoded(datatype: DataType) -> list[tuple[int, tuple[int, int]]]:
            return [
                (level or 0, (0, 0) if level is None else reference.shifted_integer(datatype, code))
                for code, level in enumerate(datatype.numerators)  # a code that is no level stands for a victim
            ]

        for (left, weight), (right, activation) in itertools.product(
            decoded(get_datatype(weights)), decoded(get_datatype(activations))
        ):
            assert reference.composed_product(weight, activation) == left * right, (weight, activation)

    def test_halves_fit_into_four_bits(self) -> None:
        for integer in range(-128, 128):
            high, low = reference.split_integer(integer)
            assert -8 <= high < 8
            assert 0 <= low < 16
            assert 16 * high + low == integer


class TestQuantizedActivations:
    @pytest.mark.parametrize("name", [*BOTH, *OLIVE_ONLY])
    def test_codes_stand_for_what_takes_the_place_of_the_values(self, name: str) -> None:
        values = activations_of(1)
        quantizer = quantizer_of(name, values)
        other = activations_of(2, tokens=7)
        tensor = quantizer.quantize(other)
        assert tensor.shape == (7, 41)
        np.testing.assert_array_equal(tensor.dequantize(), quantizer(other))

    def test_a_static_scale_is_that_of_every_token(self) -> None:
        values = activations_of(1)
        tensor = quantizer_of("olive-w4a4", values).quantize(100 * activations_of(2, tokens=7))
        assert np.unique(tensor.parts["scales"]).size == 1
        np.testing.assert_array_equal(
            tensor.parts["scales"],
            quantizer_of("olive-w4a4", values).quantize(activations_of(3, tokens=7)).parts["scales"],
        )


class TestProduct:
    @PRODUCTS
    @pytest.mark.parametrize("name", [name for name in (*BOTH, *OLIVE_ONLY) if get_format(name).group_size is None])
    def test_it_is_the_sum_of_levels_times_the_scales_each_rounded_once(self, multiply: Product, name: str) -> None:
        weights, activations = operands_of(name, 3)

        def levels(tensor: QuantizedTensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            scales = tensor.parts["scales"].astype(np.float64)
            return tensor.dequantize().astype(np.float64) / scales, scales

        (left, left_scales), (right, right_scales) = levels(weights), levels(activations)
        sums = right @ left.T  # whole numbers below 2^53
        np.testing.assert_array_equal(sums, np.rint(sums))
        expected = sums.astype(np.float32) * (right_scales @ left_scales.T).astype(np.float32)
        np.testing.assert_array_equal(multiply(OLIVE, weights, activations), expected)

    @PRODUCTS
    def test_groups_add_up_in_fp32_in_their_order(self, multiply: Product) -> None:
        weights, activations = operands_of("int-w4a8g16", 4)
        whole = weights.dequantize().astype(np.float64)
        expected = np.zeros((3, 5), dtype=np.float32)
        token_scales = activations.parts["scales"].astype(np.float64)
        tokens = np.rint(activations.dequantize() / token_scales)
        for group, start in enumerate(range(0, 41, 16)):
            scales = weights.parts["scales"][:, group].astype(np.float64)
            sums = tokens[:, start : start + 16] @ np.rint(whole[:, start : start + 16] / scales[:, None]).T
            expected += sums.astype(np.float32) * (token_scales * scales).astype(np.float32)
        np.testing.assert_array_equal(multiply(ANT, weights, activations), expected)

    @PRODUCTS
    def test_a_victim_adds_nothing(self, multiply: Product) -> None:
        weights = outlier_tensor([9], "olive-w8a8")
        activations = quantizer_of("olive-w8a8", np.array([[1.0, 0.0]], dtype=np.float32)).quantize(
            np.array([[1.0, 0.0]], dtype=np.float32)
        )
        assert activations.dequantize()[0, 0] > 0
        np.testing.assert_array_equal(multiply(OLIVE, weights, activations), [[0]])

    @pytest.mark.parametrize(("spec", "name"), EVERY_PAIR, ids=[f"{spec.kind}-{name}" for spec, name in EVERY_PAIR])
    def test_every_bit_of_the_twin_is_that_of_the_reference(
        self, spec: ProcessingElementSpec, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(functional, "OUTPUTS_AT_ONCE", 2)
        for seed in range(3):
            weights, activations = operands_of(name, seed)
            np.testing.assert_array_equal(
                functional.multiply_integers(spec, weights, activations).view(np.uint32),
                reference.multiply_integers(spec, weights, activations).view(np.uint32),
            )

    @PRODUCTS
    def test_a_sum_that_may_pass_the_accumulator_is_refused(self, multiply: Product) -> None:
        most = max((code for code, level in enumerate(get_datatype("abfloat8_e4m3_b4").numerators) if level == 1 << 15))
        minus = most | 0x80
        one, two = outlier_tensor([most], "olive-w8a8"), outlier_tensor([most, most], "olive-w8a8")
        tokens = outlier_tensor([minus], "olive-w8"), outlier_tensor([most, minus], "olive-w8")
        np.testing.assert_array_equal(multiply(OLIVE, one, tokens[0]), [[-(2.0**30)]])
        with pytest.raises(InputError, match="may pass 2147483647"):  # 2^30 - 2^30 in this order, but 2^31 in another
            multiply(OLIVE, two, tokens[1])
        below = outlier_tensor([most, most - 1], "olive-w8a8")
        assert multiply(OLIVE, below, tokens[1]) > 0

    @PRODUCTS
    def test_the_longest_row_of_8_bit_integers_is_that_of_the_page(self, multiply: Product) -> None:
        for inputs in (133144, 133145):
            ones = np.ones((1, inputs), dtype=np.float32)
            weights, activations = (
                quantize(ones, "int-w8a8"),
                DynamicQuantizer(format=get_format("int-w8")).quantize(ones),
            )
            if inputs == 133144:
                scale = np.float32(weights.parts["scales"][0, 0]) * np.float32(activations.parts["scales"][0, 0])
                np.testing.assert_array_equal(multiply(ANT, weights, activations), np.float32(127**2 * inputs) * scale)
            else:
                with pytest.raises(InputError, match="expected shorter groups or smaller outliers"):
                    multiply(ANT, weights, activations)

    @PRODUCTS
    def test_operands_that_do_not_belong_together_are_refused(self, multiply: Product) -> None:
        weights, activations = operands_of("int-w8a8", 1)
        with pytest.raises(InputError, match=re.escape("activations int-w8 [3, 41]; expected int-w4 [tokens, 41]")):
            multiply(ANT, quantize(weights_of(1), "int-w4a4"), activations)
        with pytest.raises(InputError, match=re.escape("expected int-w8 [tokens, 40]")):
            multiply(ANT, quantize(weights_of(1, inputs=40), "int-w8a8"), activations)
        for spec in (FlintSpec(), Fp16MacSpec()):
            with pytest.raises(InputError, match="takes FP16 activations"):
                multiply(spec, weights, activations)
        with pytest.raises(UnsupportedFormatError):
            multiply(ANT, quantize(weights_of(1), "olive-w4a4"), activations)

    @pytest.mark.parametrize("multiply", [reference.multiply, functional.multiply])
    def test_fp16_activations_are_refused_by_a_pe_with_integer_ones(self, multiply: Product) -> None:
        halves = np.ones((1, 41), dtype=np.float16)
        with pytest.raises(InputError, match="takes integer activations"):
            multiply(OLIVE, quantize(weights_of(1), "olive-w4"), halves)  # type: ignore[arg-type]


class TestSpecification:
    @pytest.mark.parametrize(("spec", "name"), EVERY_PAIR, ids=[f"{spec.kind}-{name}" for spec, name in EVERY_PAIR])
    def test_what_the_decoder_reads_on_both_sides_takes_a_cycle(self, spec: ProcessingElementSpec, name: str) -> None:
        assert spec.cycles_per_step(get_format(name)) == 1

    @pytest.mark.parametrize(
        ("spec", "name", "reason"),
        [
            (ANT, "olive-w4a4", "olive-w4a4 needs another decoder"),
            (ANT, "ant-w4", "its activations are FP16, and the PE takes integers"),
            (OLIVE, "olive-w4", "its activations are FP16, and the PE takes integers"),
            (OLIVE, "fp16", "its activations are FP16"),
            (OLIVE, "int-asym-w4a8g128", "int-asym-w4a8g128 needs another decoder"),
            (OLIVE, "bitmod-w4a8g128", "bitmod-w4a8g128 needs another decoder"),
            (OLIVE, "int-w4a8g32:scale=e8m0", "those of int-w4a8g32:scale=e8m0 are mxfp8_e4m3"),
            (ANT, "int-w4a4g16:scale=e4m3", "those of int-w4a4g16:scale=e4m3 are nvfp4"),
            (ANT, "ant-w4a4:types=int,pot", "needs another decoder"),
            (OLIVE, "int-w4a8:axis=output", "its groups lie along the outputs"),
            (OLIVE, "gobo-w3", "needs GOBO's own datapath"),
            (OutlierVictimSpec(), "olive-w4a4", "its activations have 4 bits, and the PE takes FP16"),
        ],
    )
    def test_what_it_cannot_read_is_refused_with_the_reason(
        self, spec: ProcessingElementSpec, name: str, reason: str
    ) -> None:
        with pytest.raises(UnsupportedFormatError, match=reason):
            spec.cycles_per_step(get_format(name))

    def test_other_activations_are_refused(self) -> None:
        with pytest.raises(InputError, match="activations of the flint PE"):
            FlintSpec(activations="int8")  # type: ignore[arg-type]

    def test_four_pes_make_a_product_of_more_than_four_bits(self) -> None:
        elements = {name: OLIVE.processing_elements_per_product(get_format(name)) for name in (*BOTH, *OLIVE_ONLY)}
        assert {name for name, count in elements.items() if count == 1} == {
            "int-w4a4g16",
            "int-w2a4",
            "ant-w4a4",
            "olive-w4a4",
            "olive-w4a4g16",
        }
        assert set(elements.values()) == {1, 4}
        assert [OLIVE.key_value_processing_elements_per_product(bits) for bits in (4, 8)] == [1, 4]
        assert OutlierVictimSpec().processing_elements_per_product(get_format("int-w8g128")) == 1
        assert OutlierVictimSpec().key_value_processing_elements_per_product(8) == 1

    def test_activations_are_as_wide_as_the_format_says(self) -> None:
        assert OLIVE.activation_bits(get_format("olive-w4a8")) == 8
        assert ANT.key_value_activation_bits(4) == 4
        assert Fp16MacSpec().activation_bits(get_format("fp16")) == FlintSpec().key_value_activation_bits(8) == 16


SHAPE = ModelShape(
    name="small",
    head=None,
    linears=(LinearShape(name="linear", outputs=96, inputs=65),),
    attention=AttentionShape(layers=1, heads=2, key_value_heads=2, head_size=16),
)


class TestSimulation:
    def test_an_8_bit_product_has_a_quarter_of_the_array(self) -> None:
        machine = dataclasses.replace(
            get_accelerator("olive-int@32x16"), pe_energy_pj_per_cycle=1.0, place_and_route_factor=1.0
        )
        narrow, wide = (
            simulate(SHAPE, machine, phase="prefill", weights=get_format(name), context=16)
            for name in ("olive-w4a4", "olive-w8a8")
        )
        assert narrow.layers[0].busy_cycles == 3 * 1 * 65  # tiles of 32 outputs, one of 16 tokens, steps
        assert wide.layers[0].busy_cycles == 6 * 2 * 65
        assert narrow.layers[1:] == wide.layers[1:]  # keys and values have 8 bits in both
        for layer in (*narrow.layers, *wide.layers):  # 1 pJ for each of the 512 PEs in each busy cycle
            assert layer.energy.pe_uj == pytest.approx(layer.busy_cycles * 512e-6, rel=1e-12)
        assert wide.layers[0].pe_utilization == pytest.approx(
            96 * 16 * 65 / (16 * 8 * wide.layers[0].cycles), rel=1e-12
        )
        assert any("queries" in note for note in wide.notes)

    def test_activations_move_in_packed_rows(self) -> None:
        machine = get_accelerator("olive-int")
        loads = {
            name: simulate(SHAPE, machine, phase="prefill", weights=get_format(name), context=16)
            .layers[0]
            .traffic.activation_bytes
            for name in ("olive-w4a4", "olive-w4a8", "int-w4a5")
        }
        assert loads == {"olive-w4a4": 16 * 33, "olive-w4a8": 16 * 65, "int-w4a5": 16 * 41}

    def test_chunks_of_a_row_add_up_to_its_bytes(self) -> None:
        machine = get_accelerator("olive-int@8x8")
        (gemm, *_) = workload(SHAPE, phase="prefill", context=7, batch=1)
        whole = product_of(gemm, machine, "prefill", get_format("olive-w4a4"))
        for bits in range(1, 17):
            small = dataclasses.replace(whole, activation_bits=bits, activation_buffer_bytes=256)
            program = plan_product(small, passes=1, weights_stationary=False)
            assert program.chunk_steps < 65 or bits < 3
            row_bytes = -(-65 * bits // 8)
            count = run_tile_program(program)
            assert count.traffic == planned_traffic(program)
            assert count.traffic.activation_bytes % (7 * row_bytes) == 0
            assert count.traffic.activation_bytes > 0

    @pytest.mark.parametrize("array", ["63x64", "64x63"])
    def test_an_array_with_an_odd_side_is_refused_where_a_product_takes_four(self, array: str) -> None:
        with pytest.raises(MachineError, match=f"'{array}'; expected sides that are multiples of 2"):
            get_accelerator(f"olive-int@{array}")
        machine = dataclasses.replace(get_accelerator("olive-int"), decode_array=ArrayShape(rows=3, columns=2))
        with pytest.raises(MachineError, match="decode_array is '3x2'"):
            check_machine(machine)
        with pytest.raises(MachineError, match="decode_array is '3x2'"):
            simulate(SHAPE, machine, phase="decode", weights=get_format("int-w8a8"))
        assert get_accelerator(f"olive@{array}").prefill_array.processing_elements == 63 * 64

    @pytest.mark.parametrize(("name", "kind"), [("olive-int", "outlier_victim"), ("ant-int", "flint")])
    def test_presets_take_their_formats_and_say_what_is_not_known(self, name: str, kind: str) -> None:
        machine = get_accelerator(name)
        assert machine.processing_element.kind == kind
        assert machine.prefill_array.processing_elements == 4096
        assert machine.pe_energy_pj_per_cycle is machine.pe_area_um2 is None
        assert any("not known" in source for source in machine.sources)
        found = simulate(SHAPE, machine, phase="decode", context=8)
        assert found.cycles > 0
        assert found.energy.total_uj is None
