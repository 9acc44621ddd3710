"""GOBO: outliers bit for bit, the nearest centroid for the rest, and a dictionary no worse than its start."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from termwise.algorithms import dictionary
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.models import open_model
from termwise.algorithms.quantize import QuantizedTensor, quantize

FORMATS = ["gobo-w3", "gobo-w4", "gobo-w3:threshold=-1", "gobo-w3:threshold=-100"]

WEIGHTS = st.tuples(st.integers(1, 4), st.integers(1, 24)).flatmap(
    lambda shape: arrays.arrays(
        np.float32,
        shape,
        elements=st.floats(-2, 2, width=32) | st.sampled_from([0.0, -0.0, 0.5, -1.0, 1e-30, 40.0]),
    )
)
FEW_VALUES = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-2, 2, width=16))


def heavy_tailed(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    """Weights of which some are outliers at the default threshold."""
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.05).astype(np.float32)


def is_outlier(tensor: QuantizedTensor) -> NDArray[np.bool_]:
    """Which weights are stored as they are, [outputs, inputs]."""
    mask = np.zeros(tensor.shape[0] * tensor.shape[1], dtype=np.bool_)
    mask[tensor.parts["outlier_positions"].astype(np.intp)] = True
    return mask.reshape(tensor.shape)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30)
@given(weights=WEIGHTS)
def test_outliers_are_bit_exact_and_the_rest_takes_the_nearest_centroid(
    name: str, weights: NDArray[np.float32]
) -> None:
    """Against a search over the dictionary in fractions; of equally near centroids the lower one.

    Bins may begin at the same number, so that two indices have one centroid.
    """
    tensor = quantize(weights, name)
    decoded, outliers, codes = tensor.dequantize(), is_outlier(tensor), tensor.codes
    np.testing.assert_array_equal(decoded[outliers].view(np.uint32), weights[outliers].view(np.uint32))
    assert not codes[outliers].any()
    centroids = [Fraction(float(centroid)) for centroid in tensor.parts["dictionary"]]
    assert centroids == sorted(centroids)
    for place in zip(*np.nonzero(~outliers), strict=True):
        distances = [abs(Fraction(float(weights[place])) - centroid) for centroid in centroids]
        assert centroids[codes[place]] == centroids[distances.index(min(distances))]
        assert decoded[place] == tensor.parts["dictionary"][codes[place]]


@pytest.mark.parametrize("threshold", [-4.0, -2.0, -6.5, 0.5])
def test_outliers_are_the_weights_of_low_density(threshold: float) -> None:
    """By the logarithm of the Gaussian's density itself; no weight of this matrix is within 1e-9 of the threshold."""
    weights = heavy_tailed(20, 64, seed=1)
    exact = [float(weight) for weight in weights.ravel()]
    mean = math.fsum(exact) / len(exact)
    variance = math.fsum((weight - mean) ** 2 for weight in exact) / len(exact)
    densities = [-((weight - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2 for weight in exact]
    assert min(abs(density - threshold) for density in densities) > 1e-9
    expected = [place for place, density in enumerate(densities) if density < threshold]
    assert quantize(weights, f"gobo-w3:threshold={threshold}").parts["outlier_positions"].tolist() == expected


def test_a_lower_threshold_keeps_fewer_outliers() -> None:
    weights = heavy_tailed(50, 64, seed=2)
    counts = [quantize(weights, f"gobo-w3:threshold={value}").parts["outlier_values"].size for value in (-2, -4, -8)]
    assert counts[0] > counts[1] > counts[2] > 0


def test_a_threshold_above_the_greatest_density_makes_all_weights_outliers() -> None:
    weights = np.array([[1, -1, 0.5], [-0.5, 0, -0.0]], dtype=np.float32)  # the mean is 0
    tensor = quantize(weights, "gobo-w3:threshold=3")
    assert tensor.parts["outlier_positions"].tolist() == [0, 1, 2, 3, 4, 5]
    assert not tensor.parts["dictionary"].any()
    np.testing.assert_array_equal(tensor.dequantize().view(np.uint32), weights.view(np.uint32))


@pytest.mark.parametrize("value", [0.0, 0.1, -3.5, 1e-30, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (30, 70)])
def test_equal_weights_are_one_centroid(value: float, shape: tuple[int, int]) -> None:
    """Also where the mean of many equal numbers rounds to another one."""
    weights = np.full(shape, value, dtype=np.float32)
    tensor = quantize(weights, "gobo-w3")
    assert tensor.parts["outlier_positions"].size == 0
    np.testing.assert_array_equal(tensor.dequantize(), weights)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=8, unique=True), repeats=st.integers(1, 5))
def test_no_more_values_than_centroids_lose_nothing_where_bins_begin_apart(values: list[int], repeats: int) -> None:
    """Eight equally frequent values fill eight bins; fewer of them fill some."""
    if len(values) not in (1, 2, 4, 8):
        return  # bins of equal population would be split between two values
    weights = np.repeat(np.array(values, dtype=np.float32), 8 * repeats)[None] / 4
    np.testing.assert_array_equal(quantize(weights, "gobo-w3:threshold=-100").dequantize(), weights)


def absolute_error(values: NDArray[np.float32], centroids: list[float]) -> float:
    """Sum of the distances of values from their nearest centroids."""
    return math.fsum(min(abs(float(value) - centroid) for centroid in centroids) for value in values)


def equal_population(values: NDArray[np.float32], count: int) -> list[float]:
    """Means of bins with the same number of the sorted values; of an empty bin the middle value."""
    edges = [round(Fraction(index * len(values), count)) for index in range(count + 1)]
    bins = [values[low:high] for low, high in itertools.pairwise(edges)]
    return [
        float(np.float32(math.fsum(part) / len(part))) if len(part) else float(values[len(values) // 2])
        for part in bins
    ]


@pytest.mark.parametrize("count", [8, 16])
@given(values=FEW_VALUES)
def test_the_dictionary_is_never_worse_than_bins_of_equal_population(count: int, values: NDArray[np.float32]) -> None:
    """Errors are differences of running sums below 40 × 2, so they are known to 1e-12; means to 2**-24 of 2."""
    ordered = np.sort(values)
    start = absolute_error(ordered, equal_population(ordered, count))
    found = absolute_error(ordered, dictionary.centroids(ordered, count).astype(float).tolist())
    assert found <= start + 1e-12 + ordered.size * 2.0**-23


def test_a_dictionary_of_many_weights_is_better_than_its_start() -> None:
    values = np.sort(heavy_tailed(1, 5000, seed=3)[0])
    found = absolute_error(values, dictionary.centroids(values, 8).astype(float).tolist())
    assert found < absolute_error(values, equal_population(values, 8))


@given(values=FEW_VALUES)
def test_centroids_ascend(values: NDArray[np.float32]) -> None:
    found = dictionary.centroids(np.sort(values), 8)
    assert (np.diff(found) >= 0).all()
    assert found.dtype == np.float32


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_the_matrix_are_coded_as_the_whole(name: str) -> None:
    weights = heavy_tailed(12, 37, seed=4)
    tensor = quantize(weights, name)
    codes, decoded = tensor.codes, tensor.dequantize()
    for rows, columns in ((slice(0, 12), slice(0, 1)), (slice(3, 7), slice(5, 37)), (slice(11, 12), slice(30, 31))):
        part = tensor.coder.encode(weights[rows, columns], rows, columns)
        np.testing.assert_array_equal(part, codes[rows, columns])
        np.testing.assert_array_equal(tensor.coder.decode(part, rows, columns), decoded[rows, columns])
    for start, stop in ((0, 3), (20, 37)):
        part, values = tensor.round_columns(start, weights[:, start:stop])
        np.testing.assert_array_equal(part, codes[:, start:stop])
        np.testing.assert_array_equal(values, decoded[:, start:stop])
    np.testing.assert_array_equal(tensor.dequantize(slice(5, None)), decoded[5:])


@pytest.mark.parametrize("rows", [slice(-2, None), slice(0, 6, 2)])
def test_rows_that_are_no_neighbours_from_the_start_are_refused(rows: slice) -> None:
    tensor = quantize(heavy_tailed(6, 8, seed=5), "gobo-w3")
    with pytest.raises(ValueError, match="expected neighbours, counted from the start"):
        tensor.dequantize(rows)


@pytest.mark.shared
def test_outliers_of_real_attention_are_few(shared: Path) -> None:
    """The paper keeps about 0.1 %; these layers' deviations, 0.06 to 0.24, make the rule keep 0.2 to 2.1 % of each."""
    for _, weights in open_model(shared / "models" / "gpt2-124m-attn").matrices():
        _, reach = dictionary.gaussian_limits(weights, -4)
        outliers = np.count_nonzero(np.abs(weights.astype(np.float64) - weights.mean(dtype=np.float64)) > reach)
        assert 0 < outliers < 0.03 * weights.size


def test_small_centroids_lie_among_their_weights_beside_huge_ones() -> None:
    small = np.linspace(1e-6, 2e-6, 64, dtype=np.float32)
    weights = np.concatenate([small, np.full(64, -3e30, np.float32), np.full(64, 3e30, np.float32)]).reshape(1, -1)
    values = quantize(weights, "gobo-w3:threshold=-1e9").dequantize()[0, :64]
    assert (values >= small[0]).all()
    assert (values <= small[-1]).all()


@pytest.mark.parametrize(("name", "deviation"), [("gobo-w3", 0.1), ("gobo-w4:threshold=-2", 0.3), ("gobo-w3", 1.0)])
def test_the_expected_outliers_are_those_of_gaussian_weights(name: str, deviation: float) -> None:
    """The count is binomial around the expected one: 6 standard deviations leave 2e-9, and the seed is fixed."""
    rows, inputs = 256, 2048
    weights = np.random.default_rng(7).normal(scale=deviation, size=(rows, inputs)).astype(np.float32)
    tensor = quantize(weights, name)
    expected = rows * dictionary.DictionarySpec().expected_outliers_per_row(
        tensor.format, inputs, deviation=float(weights.std(dtype=np.float64))
    )
    found = tensor.parts["outlier_positions"].size
    assert abs(found - expected) <= 6 * math.sqrt(expected)
    packed = dictionary.expected_packed_bytes(tensor.format, rows, inputs, deviation=deviation)
    codes = sum(part.nbytes for part in (tensor.parts["dictionary"], tensor.parts["codes"]))
    share = dictionary.expected_outlier_share(float(tensor.format.option("threshold")), deviation)
    assert packed == codes + 8 * math.ceil(rows * inputs * share)


def test_expected_outliers_go_from_few_to_all() -> None:
    shares = [dictionary.expected_outlier_share(-4, deviation) for deviation in (0.01, 0.1, 1, 10, 100)]
    assert shares == sorted(shares)
    assert shares[1] == pytest.approx(1e-3, rel=0.05)  # the paper's 0.1 %
    assert shares[-1] == 1


def test_the_pe_tells_its_centroids_and_takes_fp16_keys() -> None:
    spec = dictionary.DictionarySpec()
    assert [spec.centroids(get_format(name)) for name in ("gobo-w3", "gobo-w4")] == [8, 16]
    assert spec.cycles_per_step(get_format("gobo-w4")) == spec.key_value_cycles_per_step(16) == 1
    with pytest.raises(InputError, match="FP16 keys and values; got 8 bits"):
        spec.key_value_cycles_per_step(8)
    for ask in (spec.centroids, lambda weights: spec.expected_outliers_per_row(weights, 8)):
        with pytest.raises(InputError, match="int-w4g128 weights are none"):
            ask(get_format("int-w4g128"))
