"""ANT: types and scales against a search over everything, selectors only where there is a choice, activations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms import flint
from termwise.algorithms.datatypes import DataType
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.packing import unpack
from termwise.algorithms.quantize import QuantizedTensor, quantize

GROUPED = [
    "ant-w4g8:search=mse",
    "ant-w3g8:search=mse",
    "ant-w8g8:search=mse",
    "ant-w4g8:types=pot,float:search=mse",
    "ant-w4g8:types=int,flint,pot,float:search=mse",
    "ant-w4g8:types=int:search=mse",
]
PER_MATRIX = [
    "ant-w4",
    "ant-w3",
    "ant-w8",
    "ant-w4:search=absmax",
    "ant-w4:types=int,flint,pot,float",
    "ant-w5:types=float,pot",
    "ant-w4:types=flint",
]


def on_a_binary_grid(rows: int, columns: int, seed: int, shape: str = "normal") -> NDArray[np.float16]:
    """Multiples of 1/32 below 64. Differences from level × FP16 scale (a multiple of 2**-17) have at most 23 bits, sums
    of 32 squares at most 51: float64 sums are exact, in any order.
    """
    random = np.random.default_rng(seed)
    weights = {"normal": random.standard_normal, "uniform": lambda size: random.uniform(-1, 1, size)}[shape](
        (rows, columns)
    )
    weights[:, ::7] *= random.uniform(1, 6, (rows, 1))
    return np.clip(np.round(weights * 32 * 4) / 32, -63, 63).astype(np.float16)


def search_group(values: list[float], format: Format, datatype: DataType) -> tuple[float, np.float16]:
    """Least squared error of one group on a type, and its scale: the first of all percentages that has it."""
    percents = range(75, 151) if format.option("search") == "mse" else (100,)
    largest = max(map(abs, values))
    scales = [np.float16(largest * (percent / 100 / datatype.maximum)) for percent in percents]
    levels = np.array(datatype.levels)
    errors = [math.fsum(np.abs(levels * float(scale) - value).min() ** 2 for value in values) for scale in scales]
    return min(errors), scales[errors.index(min(errors))]


def chosen_types(tensor: QuantizedTensor) -> NDArray[np.uint8]:
    """Index of every group's type, [rows, groups]."""
    groups = tensor.format.groups(tensor.shape[1])
    return unpack(tensor.parts["selectors"].astype(np.uint8), tensor.format.selector_bits, groups)


@pytest.mark.parametrize("shape", ["normal", "uniform"])
@pytest.mark.parametrize("name", GROUPED)
def test_a_group_takes_the_type_and_scale_of_least_error(name: str, shape: str) -> None:
    weights = on_a_binary_grid(4, 30, seed=1, shape=shape)
    tensor = quantize(weights, name)
    for (row, group), scale in np.ndenumerate(tensor.parts["scales"]):
        values = weights[row, group * 8 : group * 8 + 8].astype(float).tolist()
        found = [search_group(values, tensor.format, datatype) for datatype in tensor.format.datatypes]
        errors = [error for error, _ in found]
        best = errors.index(min(errors))
        assert scale == found[best][1]
        if len(errors) > 1:
            assert chosen_types(tensor)[row, group] == best


@pytest.mark.parametrize("shape", ["normal", "uniform"])
@pytest.mark.parametrize("name", PER_MATRIX)
def test_a_matrix_takes_the_type_of_least_total_error_and_a_row_its_best_scale(name: str, shape: str) -> None:
    weights = on_a_binary_grid(4, 30, seed=2, shape=shape)
    tensor = quantize(weights, name)
    rows = [row.astype(float).tolist() for row in weights]
    found = [[search_group(row, tensor.format, datatype) for row in rows] for datatype in tensor.format.datatypes]
    totals = [math.fsum(error for error, _ in of_type) for of_type in found]
    best = totals.index(min(totals))
    assert int(tensor.parts["matrix_type"][0]) == best
    assert tensor.parts["scales"][:, 0].tolist() == [scale for _, scale in found[best]]


@pytest.mark.parametrize("name", GROUPED + PER_MATRIX)
def test_what_is_decoded_has_the_error_that_was_searched_for(name: str) -> None:
    """Decoded values are float32, within 2**-24 of exact: a squared difference moves by less than 1e-6 of w**2."""
    weights = on_a_binary_grid(3, 30, seed=3)
    tensor = quantize(weights, name)
    size = tensor.format.group_size or 30
    expected = 0.0
    totals = np.zeros(len(tensor.format.datatypes))
    for row in range(3):
        for start in range(0, 30, size):
            values = weights[row, start : start + size].astype(float).tolist()
            errors = [search_group(values, tensor.format, datatype)[0] for datatype in tensor.format.datatypes]
            expected += min(errors)
            totals += errors
    if tensor.format.type_per_matrix:
        expected = totals.min()
    difference = weights.astype(np.float64) - tensor.dequantize()
    assert float((difference**2).sum()) == pytest.approx(expected, abs=1e-6 * float((weights.astype(float) ** 2).sum()))


@pytest.mark.parametrize("name", ["ant-w4g8", "ant-w4g8:types=int,flint,pot,float", "ant-w3g8:types=flint,float"])
def test_searching_scales_never_has_a_greater_error(name: str) -> None:
    """100 percent is among the candidates.

    At ``absmax`` types are compared before scales are rounded to FP16, which may choose another one, but no better one.
    """
    weights = on_a_binary_grid(6, 64, seed=4)
    errors = [
        ((weights.astype(np.float64) - quantize(weights, searched).dequantize()) ** 2).reshape(6, 8, 8).sum(axis=2)
        for searched in (f"{name}:search=mse", name)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["ant-w4g8:types=int", "ant-w4g8:types=flint:search=mse"])
def test_one_type_needs_no_selectors(name: str) -> None:
    tensor = quantize(on_a_binary_grid(2, 20, seed=5), name)
    assert set(tensor.parts) == {"codes", "scales"}


@pytest.mark.parametrize("kind", ["int", "flint", "pot", "float"])
def test_a_single_kind_at_absmax_is_the_format_of_that_type(kind: str) -> None:
    weights = on_a_binary_grid(3, 40, seed=6)
    format = get_format(f"ant-w4g8:types={kind}")
    other = "int-w4g8" if kind == "int" else f"{format.datatypes[0].name}-w4g8"
    np.testing.assert_array_equal(quantize(weights, format).dequantize(), quantize(weights, other).dequantize())


def test_equal_totals_take_the_first_type() -> None:
    """At ``absmax``, zeros and the largest magnitude are levels of every type, here with scales that are exact."""
    weights = np.array([[12, 0, 0, -12]], dtype=np.float16)
    tensor = quantize(weights, "ant-w3:search=absmax")
    assert int(tensor.parts["matrix_type"][0]) == 0
    np.testing.assert_array_equal(tensor.dequantize(), weights)


@pytest.mark.parametrize("name", ["ant-w4", "ant-w4g8:search=mse", "ant-w4g8:types=int"])
def test_columns_are_rounded_as_the_whole_matrix_is(name: str) -> None:
    weights = on_a_binary_grid(4, 37, seed=7)
    tensor = quantize(weights, name)
    for start, stop in ((0, 1), (3, 12), (30, 37)):
        codes, values = tensor.round_columns(start, weights[:, start:stop].astype(np.float32))
        np.testing.assert_array_equal(codes, tensor.codes[:, start:stop])
        np.testing.assert_array_equal(values, tensor.dequantize()[:, start:stop])


class TestActivations:
    @pytest.mark.parametrize("name", ["ant-w4", "ant-w4g8", "ant-w8:axis=output", "ant-w4:types=int,flint,pot,float"])
    def test_a_sample_of_one_row_is_quantized_as_weights_without_groups_are(self, name: str) -> None:
        format = get_format(name)
        options = "".join(f":{key}={value}" for key, value in format.options if key == "types")
        row = on_a_binary_grid(1, 65, seed=8).astype(np.float32)
        index, scale = flint.calibrate(row, format)
        tensor = quantize(row, f"ant-w{format.weight_bits}{options}")
        assert (index, scale) == (int(tensor.parts["matrix_type"][0]), float(tensor.parts["scales"][0, 0]))
        np.testing.assert_array_equal(flint.quantize_with_scale(row, index, scale, format), tensor.dequantize())

    def test_every_value_takes_the_nearest_level(self) -> None:
        format = get_format("ant-w4")
        values = on_a_binary_grid(3, 20, seed=9).astype(np.float32)
        for index, datatype in enumerate(format.datatypes):
            found = flint.quantize_with_scale(values, index, 0.5, format)
            levels = np.array(datatype.levels) * 0.5
            np.testing.assert_array_equal(
                np.abs(values - found), np.abs(values[..., None] - levels).min(axis=-1).astype(np.float32)
            )

    def test_what_was_quantized_stays_as_it_is(self) -> None:
        format = get_format("ant-w4")
        values = on_a_binary_grid(3, 20, seed=10).astype(np.float32)
        index, scale = flint.calibrate(values, format)
        once = flint.quantize_with_scale(values, index, scale, format)
        np.testing.assert_array_equal(flint.quantize_with_scale(once, index, scale, format), once)

    def test_a_sample_that_is_empty_or_not_finite_is_refused(self) -> None:
        with pytest.raises(InputError, match="the sample of activations is empty"):
            flint.calibrate(np.empty((0, 3), dtype=np.float32), get_format("ant-w4"))
        with pytest.raises(InputError, match="holds 2 NaN or infinite values"):
            flint.calibrate(np.array([np.inf, np.nan], dtype=np.float32), get_format("ant-w4"))
