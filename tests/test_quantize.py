"""Quantizers: exact against integer references, exact inverses, and the errors that others published."""

from __future__ import annotations

import importlib.util
import math
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from termwise.algorithms import grid
from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import FREE, format_names, get_format, packed_row_bytes
from termwise.algorithms.packing import unpack
from termwise.algorithms.quantize import QuantizedTensor, quantization_error, quantize


def _benchmark() -> ModuleType:
    """benchmarks/synthetic_matrix.py, which is no part of a package."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "synthetic_matrix.py"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


synthetic_matrix = _benchmark()
heavy_tailed = synthetic_matrix.heavy_tailed

NAMES = [
    *format_names(),
    "bitmod-w4",
    "bitmod-w3g32",
    "olive-w4g16",
    "olive-w8g64",
    "olive-w8:outlier=e2m5",
    "olive-w4:axis=output",
    "int-w4",
    "int-w4g16:axis=output",
    "int-asym-w3g7",
    "ant-w3g10",
    "ant-w4",
    "ant-w8g32",
    "ant-w4g64:search=mse",
    "ant-w4g32:types=int,flint,pot,float",
]
GRIDS = [
    "int-w4g16",
    "fp6_e3m2-w6g16",
    "flint8-w8g16",
    "int-w8g16",
    "int-w3g16",
    "ant-w4g16",
    "bitmod-w4g16",
    "bitmod-w3g16",
]

WEIGHTS = st.tuples(st.integers(1, 3), st.integers(1, 24)).flatmap(
    lambda shape: arrays.arrays(
        np.float16,
        shape,
        elements=st.floats(-100, 100, width=16) | st.sampled_from([0.0, 1.0, -1.0, 2.0, -7.0, 3.5, 6e-8, -6e-8]),
    )
)


def group_scales(tensor: QuantizedTensor) -> NDArray[np.float64]:
    """Scale of every group, [outputs, groups]."""
    if tensor.format.family == "bitmod":
        channel = tensor.parts["channel_scales"].astype(np.float64)
        return tensor.parts["group_scales"].astype(np.float64) * channel[:, None]
    return tensor.parts["scales"].astype(np.float64)


def chosen_types(tensor: QuantizedTensor) -> NDArray[np.uint8]:
    """Index of every group's data type, [outputs, groups]."""
    groups = tensor.format.groups(tensor.shape[1])
    if "selectors" not in tensor.parts:
        return np.zeros((tensor.shape[0], groups), dtype=np.uint8)
    return unpack(tensor.parts["selectors"].astype(np.uint8), tensor.format.selector_bits, groups)


@pytest.mark.parametrize("name", NAMES)
class TestEveryFormat:
    @settings(max_examples=10)
    @given(weights=WEIGHTS)
    def test_bytes_are_those_of_the_layout(self, name: str, weights: NDArray[np.float16]) -> None:
        tensor = quantize(weights, get_format(name))
        layouts = get_format(name).layout(*weights.shape)
        assert set(tensor.parts) == set(layouts)
        for part, layout in layouts.items():
            assert tensor.parts[part].dtype == layout.dtype
            if FREE not in layout.shape:
                assert tensor.parts[part].shape == layout.shape
        if tensor.format.family == "gobo":
            outliers = tensor.parts["outlier_positions"].size
            assert tensor.parts["outlier_values"].shape == (outliers,)
            codes = weights.shape[0] * packed_row_bytes(weights.shape[1], tensor.format.weight_bits)
            assert tensor.nbytes == codes + 4 * (1 << tensor.format.weight_bits) + 8 * outliers
        else:
            assert tensor.nbytes == get_format(name).packed_bytes(*weights.shape)
            assert tensor.bits_per_weight == get_format(name).bits_per_weight(*weights.shape)

    @settings(max_examples=10)
    @given(weights=WEIGHTS)
    def test_rows_are_quantized_alone(self, name: str, weights: NDArray[np.float16]) -> None:
        format = get_format(name)
        if format.type_per_matrix or format.groups_along_outputs or format.family == "gobo" or name == "nvfp4":
            weights = weights[:1]  # a type, a group, a dictionary or a scale is shared by rows
        whole = quantize(weights, get_format(name)).dequantize()
        alone = [quantize(weights[row : row + 1], get_format(name)).dequantize() for row in range(weights.shape[0])]
        np.testing.assert_array_equal(whole, np.concatenate(alone))

    @settings(max_examples=10)
    @given(weights=WEIGHTS)
    def test_decoding_a_slice_is_slicing_what_is_decoded(self, name: str, weights: NDArray[np.float16]) -> None:
        tensor = quantize(weights, get_format(name))
        np.testing.assert_array_equal(tensor.dequantize(slice(1, 3)), tensor.dequantize()[1:3])

    def test_zeros_stay_zeros(self, name: str) -> None:
        weights = np.zeros((3, 300), dtype=np.float16)
        weights[2, 200:] = 1
        tensor = quantize(weights, get_format(name))
        assert not tensor.dequantize()[:2].any()
        assert np.isfinite(tensor.dequantize()).all()

    def test_float32_and_float16_give_the_same(self, name: str) -> None:
        weights = heavy_tailed(4, 300, seed=3)
        one, other = (quantize(weights.astype(dtype), get_format(name)) for dtype in (np.float16, np.float32))
        for part in one.parts:
            np.testing.assert_array_equal(one.parts[part], other.parts[part])

    def test_a_view_that_is_not_contiguous_is_read_right(self, name: str) -> None:
        weights = heavy_tailed(6, 200, seed=4)
        np.testing.assert_array_equal(
            quantize(weights.T, get_format(name)).dequantize(),
            quantize(np.ascontiguousarray(weights.T), get_format(name)).dequantize(),
        )

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_weight_that_is_not_finite_is_refused(self, name: str, bad: float) -> None:
        weights = np.ones((100, 100), dtype=np.float16)
        weights[70, 3] = bad
        with pytest.raises(InputError, match=r"layer\.7.*: 1 NaN or infinite weights in rows 0 to 99"):
            quantize(weights, get_format(name), name="layer.7")


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=25)
@given(weights=WEIGHTS)
def test_codes_are_the_nearest_levels_and_ties_go_down(name: str, weights: NDArray[np.float16]) -> None:
    """Every code against a search over all levels in fractions."""
    tensor = quantize(weights, get_format(name))
    codes = unpack(tensor.parts["codes"].astype(np.uint8), tensor.format.weight_bits, weights.shape[1])
    scales, chosen = group_scales(tensor), chosen_types(tensor)
    for (row, column), weight in np.ndenumerate(weights):
        datatype = tensor.format.datatypes[chosen[row, column // 16]]
        scale = Fraction(float(scales[row, column // 16])) / (1 << datatype.fraction_bits)
        distances = {level: abs(Fraction(float(weight)) - level * scale) for level in datatype.sorted_numerators}
        expected = min(distances, key=lambda level: (distances[level], level))
        assert datatype.numerators[codes[row, column]] == expected, f"weight {weight} scale {float(scale)}"


@pytest.mark.parametrize("name", GRIDS)
def test_dequantized_weights_are_level_times_scale(name: str) -> None:
    weights = heavy_tailed(3, 50, seed=5)
    tensor = quantize(weights, get_format(name))
    codes = unpack(tensor.parts["codes"].astype(np.uint8), tensor.format.weight_bits, weights.shape[1])
    scales, chosen = group_scales(tensor), chosen_types(tensor)
    for (row, column), value in np.ndenumerate(tensor.dequantize()):
        datatype = tensor.format.datatypes[chosen[row, column // 16]]
        numerator = datatype.numerators[codes[row, column]]
        assert numerator is not None
        exact = Fraction(numerator, 1 << datatype.fraction_bits) * Fraction(float(scales[row, column // 16]))
        assert value == np.float32(float(exact))


def exact_error(weights: list[float], name: str) -> Fraction:
    """Squared error of one group by a search over all levels: shares no step with the module under test."""
    datatype = get_datatype(name)
    largest = max(abs(Fraction(weight)) for weight in weights)
    levels = [Fraction(level) * largest / Fraction(datatype.maximum) for level in datatype.levels]
    return sum((min((Fraction(weight) - level) ** 2 for level in levels) for weight in weights), Fraction(0))


@pytest.mark.parametrize("name", ["bitmod-w4g16", "bitmod-w3g16", "ant-w4g16"])
@settings(max_examples=25)
@given(weights=WEIGHTS)
def test_the_chosen_type_has_the_least_error_and_comes_first(name: str, weights: NDArray[np.float16]) -> None:
    tensor = quantize(weights, get_format(name))
    names = [datatype.name for datatype in tensor.format.datatypes]
    for (row, group), chosen in np.ndenumerate(chosen_types(tensor)):
        values = weights[row, group * 16 : group * 16 + 16].astype(float).tolist()
        errors = [exact_error(values, candidate) for candidate in names]
        assert chosen == errors.index(min(errors)), f"{values}: {[float(error) for error in errors]}"


def test_close_errors_are_decided_exactly() -> None:
    """Groups of few distinct values, where candidates tie or nearly tie, and float64 alone could not tell."""
    datatypes = get_format("bitmod-w4").datatypes
    tables = grid.Tables(datatypes)
    random = np.random.default_rng(11)
    values = np.array([1.0, -1.0, 0.8333, -0.8333, 0.75, 0.3337, -0.0421, 1e-3], dtype=np.float16).astype(np.float32)
    weights = random.choice(values, (400, 16))
    chosen, _ = grid.choose(weights, 16, datatypes, tables)
    expected = [[grid.choose_exactly(row.tolist(), datatypes)] for row in weights]
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("name", ["bitmod-w4", "bitmod-w3", "ant-w4"])
@pytest.mark.parametrize("spread", ["none", "between rows", "within a row", "few values"])
def test_float32_weights_of_any_size_are_decided_exactly(name: str, spread: str) -> None:
    random = np.random.default_rng(5)
    weights = random.standard_normal((100, 16)).astype(np.float32)
    if spread == "between rows":
        weights *= np.exp2(random.integers(-120, 60, (100, 1))).astype(np.float32)
    elif spread == "within a row":
        weights *= np.exp2(random.integers(-30, 0, (100, 16))).astype(np.float32)
    elif spread == "few values":
        weights = np.round(weights * 4) / 4 * np.float32(1e-30)
    datatypes = get_format(name).datatypes
    chosen, _ = grid.choose(weights, 16, datatypes, grid.Tables(datatypes))
    assert chosen[:, 0].tolist() == [grid.choose_exactly(row.tolist(), datatypes) for row in weights]


def test_an_exact_tie_of_special_values_takes_the_first() -> None:
    """+5 and -5 gain the same here, so extra resolution + is chosen over extra resolution -."""
    weights = np.array([[6, 5, -5, 4, -4, 3, -3, 2, -2, 1.5, -1.5, 0.5]], dtype=np.float16)
    tensor = quantize(weights, get_format("bitmod-w4"))
    assert chosen_types(tensor)[0, 0] == 0


@settings(max_examples=40)
@given(weights=WEIGHTS, name=st.sampled_from(["bitmod-w4g8", "bitmod-w3g8", "bitmod-w3g8:special=7"]))
def test_bitmod_scales_are_the_better_of_the_two_around_the_ideal(weights: NDArray[np.float16], name: str) -> None:
    tensor = quantize(weights, get_format(name))
    chosen = chosen_types(tensor)
    for (row, group), multiple in np.ndenumerate(tensor.parts["group_scales"]):
        values = weights[row, group * 8 : group * 8 + 8].astype(float).tolist()
        datatype = tensor.format.datatypes[chosen[row, group]]
        unit = Fraction(float(tensor.parts["channel_scales"][row])) / (1 << datatype.fraction_bits)
        ideal = Fraction(max(map(abs, values))) / datatype.max_numerator / unit
        errors = {}
        for candidate in sorted({min(max(math.floor(ideal) + step, 1), 127) for step in (0, 1)}):
            levels = [unit * candidate * numerator for numerator in datatype.sorted_numerators]
            errors[candidate] = sum(min((Fraction(value) - level) ** 2 for level in levels) for value in values)
        assert errors[int(multiple)] == min(errors.values())


def test_bitmod_scales_that_are_nearly_equal_in_error_are_decided_exactly() -> None:
    random = np.random.default_rng(3)
    datatypes = get_format("bitmod-w4").datatypes
    values = np.array([1.0, -1.0, 0.8333, 0.75, 0.3337, 1e-3], dtype=np.float16).astype(np.float32)
    weights = random.choice(values, (400, 16))
    chosen, largest = grid.choose(weights, 16, datatypes, grid.Tables(datatypes))
    units = (largest[:, 0] / np.float32(1200)).astype(np.float64)
    multiples = grid.settle(weights, 16, largest, chosen, units, 127, datatypes, grid.Tables(datatypes))
    for row in range(400):
        expected = grid.settle_exactly(weights[row].tolist(), Fraction(units[row]), 127, datatypes[chosen[row, 0]])
        assert multiples[row, 0] == expected


def test_bitmod_group_scales_use_the_full_8_bits() -> None:
    tensor = quantize(heavy_tailed(8, 1024, seed=6), get_format("bitmod-w4g128"))
    assert (tensor.parts["group_scales"].astype(int).max(axis=1) >= 126).all()
    lossless = quantize(heavy_tailed(8, 1024, seed=6), get_format("bitmod-w6g128"))
    assert (lossless.parts["group_scales"].astype(int).max(axis=1) == 127).all()


@pytest.mark.parametrize(("deviation", "share"), [(0.029, 0.008), (0.0073, 0.12), (0.0029, 0.46)])
def test_the_authors_arithmetic_chooses_wrongly_as_often_as_was_measured(deviation: float, share: float) -> None:
    """The share of 4-bit groups that was measured with the script, of weights whose distribution was not told."""
    weights = (np.random.default_rng(0).standard_normal((512, 1024)) * deviation).astype(np.float16)
    exact, script = (quantize(weights, name) for name in ("bitmod-w4g128", "bitmod-w4g128:compat=authors-fp16"))
    differing = np.mean(chosen_types(exact) != chosen_types(script))
    assert differing == pytest.approx(share, rel=0.3)


def test_groups_that_the_authors_script_would_make_zero_are_refused() -> None:
    with pytest.raises(InputError, match="finds no data type for 1 groups, and would make them zero"):
        quantize(np.array([[6e4, 5.2e4, -4.7e4]], dtype=np.float16), "bitmod-w3:compat=authors-fp16")


@pytest.mark.parametrize("name", ["bitmod-w6g16", "bitmod-w8g16"])
def test_bitmod_integers_have_two_levels_of_scales_and_no_selector(name: str) -> None:
    tensor = quantize(heavy_tailed(4, 64, seed=2), name)
    assert set(tensor.parts) == {"codes", "group_scales", "channel_scales"}
    plain = quantize(heavy_tailed(4, 64, seed=2), f"int-w{tensor.format.weight_bits}g16")
    lost = quantization_error(heavy_tailed(4, 64, seed=2), plain).sqnr_db
    assert quantization_error(heavy_tailed(4, 64, seed=2), tensor).sqnr_db == pytest.approx(lost, abs=0.5)
    assert tensor.nbytes == 4 * (tensor.format.weight_bits * 8 + 4 + 4)


def test_asymmetric_codes_are_nearest_for_the_stored_scale() -> None:
    weights = heavy_tailed(4, 64, seed=8)
    tensor = quantize(weights, get_format("int-asym-w3g16"))
    codes = unpack(tensor.parts["codes"].astype(np.uint8), 3, 64)
    for (row, column), weight in np.ndenumerate(weights):
        scale = Fraction(float(tensor.parts["scales"][row, column // 16]))
        zero = int(tensor.parts["zero_points"][row, column // 16])
        distances = [abs(Fraction(float(weight)) - (code - zero) * scale) for code in range(8)]
        assert codes[row, column] == distances.index(min(distances))


@pytest.mark.parametrize("name", synthetic_matrix.PUBLISHED_DB)
def test_errors_are_those_of_the_published_quantizers(name: str) -> None:
    """Within 0.1 dB. Over seeds 0 to 9 a figure has a standard deviation of 0.008 to 0.028 dB at this size."""
    weights = heavy_tailed(1024, 4096, seed=0)
    tensor = quantize(weights, get_format(name))
    assert quantization_error(weights, tensor).sqnr_db == pytest.approx(synthetic_matrix.PUBLISHED_DB[name], abs=0.1)


def test_all_half_precision_numbers_are_widened_exactly() -> None:
    """All 65,536 of them against numpy's conversion; 2 × 1024 are infinite or NaN."""
    every = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    wide = np.empty(every.shape, dtype=np.float32)
    assert grid._widen(every, wide.view(np.uint32), wide) == 2048
    expected = every.view(np.float16).astype(np.float32)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(wide[finite].view(np.uint32), expected[finite].view(np.uint32))


def test_a_format_may_be_given_by_its_name() -> None:
    weights = heavy_tailed(4, 64, seed=1)
    assert quantize(weights, "bitmod-w4g32").format == get_format("bitmod-w4g32")


def test_nothing_lost_is_an_infinite_ratio() -> None:
    weights = heavy_tailed(4, 64, seed=1)
    assert quantization_error(weights, quantize(weights, get_format("fp16"))).sqnr_db == np.inf


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros(3, dtype=np.float16), r"expected a matrix \[outputs, inputs\]"),
        (np.zeros((0, 3), dtype=np.float16), "expected a matrix"),
        (np.zeros((2, 3)), "float64; expected float16 or float32"),
    ],
)
def test_what_is_no_weight_matrix_is_refused(weights: NDArray[np.float16], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(weights, get_format("int-w4g128"), name="layer")


def test_a_scale_beyond_fp16_is_refused() -> None:
    with pytest.raises(InputError, match="layer: a group needs the scale"):
        quantize(np.full((1, 2), 1e6, dtype=np.float32), get_format("int-w4"), name="layer")
    with pytest.raises(InputError, match="has no FP16 value"):
        quantize(np.full((1, 2), 1e6, dtype=np.float32), get_format("fp16"), name="layer")


@pytest.mark.parametrize("name", ["int-w4", "int-asym-w4", "bitmod-w4", "olive-w4", "ant-w4", "mxfp4-w4"])
def test_a_group_far_longer_than_the_row_is_the_row(name: str) -> None:
    weights = heavy_tailed(2, 64, seed=1)
    long = quantize(weights, f"{name}g999999998").dequantize()
    np.testing.assert_array_equal(long, quantize(weights, f"{name}g64").dequantize())


@pytest.mark.parametrize("name", ["int-w" + "1" * 5000, "int-w4g" + "9" * 5000, "int-w4a" + "1" * 5000])
def test_a_name_of_thousands_of_digits_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown format"):
        get_format(name)


@pytest.mark.parametrize("name", ["bitmod-w3", "fp8_e4m3-w8:scale=e4m3"])
def test_levels_beyond_float32_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected weights whose levels are FP32 numbers"):
        quantize(np.array([[np.finfo(np.float32).max]], dtype=np.float32), name)


def test_a_row_too_small_for_a_scale_is_refused_and_not_made_zero() -> None:
    for tiny in (1e-40, 1e-45):
        with pytest.raises(InputError, match="a normal FP32 number"):
            quantize(np.full((1, 8), tiny, dtype=np.float32), "bitmod-w4")


class TestReplacedCodes:
    """What calibration writes in the place of the codes is checked."""

    weights = heavy_tailed(4, 32, seed=1)

    def test_floating_point_has_no_codes(self) -> None:
        with pytest.raises(ValueError, match="fp16 weights have no codes"):
            _ = quantize(self.weights, "fp16").codes

    @pytest.mark.parametrize(("start", "columns"), [(1, 2), (0, 3), (-2, 2), (31, 2), (0, 0)])
    def test_columns_that_part_a_pair_or_are_not_there_are_refused(self, start: int, columns: int) -> None:
        with pytest.raises(ValueError, match="in steps of 2"):
            quantize(self.weights, "olive-w4").round_columns(start, np.zeros((4, columns), dtype=np.float32))

    @pytest.mark.parametrize(
        "codes",
        [np.zeros((4, 31), np.uint8), np.zeros((4, 32), np.int64), np.full((4, 32), 16, np.uint8)],
    )
    def test_codes_of_another_shape_type_or_width_are_refused(self, codes: NDArray[np.uint8]) -> None:
        with pytest.raises(ValueError, match=r"expected uint8 \[4, 32\] of 4 bits"):
            quantize(self.weights, "int-w4g32").with_codes(codes)


def test_a_transposed_matrix_is_named_as_such() -> None:
    weights = np.ones((3, 64), dtype=np.float16)
    weights[1, 5] = np.nan
    with pytest.raises(InputError, match=r"layer \(transposed: a row is an input\): 1 NaN"):
        quantize(weights, "int-w4g16:axis=output", name="layer")
