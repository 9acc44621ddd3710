"""OliVe: Algorithms 1 and 2 in exact arithmetic, the search against a loop over everything, pairs and activations."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms import outlier_victim
from termwise.algorithms.datatypes import DataType, get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.models import open_model
from termwise.algorithms.outlier_victim import PairCoder, PairStatistics, pair_statistics, pairs_of_types
from termwise.algorithms.quantize import QuantizedTensor, quantize

FORMATS = ["olive-w4", "olive-w4g8", "olive-w8", "olive-w8g8", "olive-w8:outlier=e2m5", "olive-w8g8:outlier=e2m5"]
OUTLIERS = {"abfloat4_e2m1_b2": 1, "abfloat4_e2m1_b3": 1, "abfloat8_e4m3_b4": 3, "abfloat8_e2m5_b2": 5}


def chosen_types(tensor: QuantizedTensor) -> tuple[DataType, DataType]:
    """Normal and outlier type of a tensor."""
    return pairs_of_types(tensor.format)[int(tensor.parts["matrix_type"][0])]


def plain(name: str, count: int = 4000) -> list[int]:
    """Weights without an outlier at 4 or at 8 bits."""
    return [1, -2, 3, -1, 2, 1, -3, 0] * (count // 8)


@pytest.mark.parametrize("name", OUTLIERS)
def test_outlier_codes_follow_algorithm_2(name: str) -> None:
    """At every level, every quarter of the way to the next, and beyond both ends, in fractions.

    The base of m mantissa bits is rounded to nearest even; codes are clamped to those that are levels.
    """
    datatype = get_datatype(name)
    mantissa_bits, bias = OUTLIERS[name], int(name.rpartition("b")[2])
    levels = [level for level in datatype.sorted_numerators if level > 0]
    greatest = datatype.numerators.index(levels[-1])
    quarters = [
        Fraction(4 * low + step * (high - low), 4) for low, high in itertools.pairwise(levels) for step in range(4)
    ]
    coder = PairCoder(
        group_size=2, scales=np.ones((1, 1)), normal=get_datatype(f"int{datatype.bits}"), outlier=datatype
    )
    for magnitude in [
        *quarters,
        Fraction(levels[0]) + Fraction(1, 8),
        *(levels[-1] * Fraction(k, 8) for k in range(8, 40)),
    ]:
        if magnitude <= levels[0]:
            continue
        exponent = math.floor(magnitude).bit_length() - 1 - mantissa_bits
        base = round(magnitude / Fraction(2) ** exponent)
        if base == 2 << mantissa_bits:
            exponent, base = exponent + 1, 1 << mantissa_bits
        code = ((exponent - bias) << mantissa_bits) | (base - (1 << mantissa_bits))
        code = min(max(code, 1), greatest)
        for sign in (1, -1):
            weights = np.array([[sign * magnitude, 1]], dtype=np.float32)
            found = coder.encode(weights)[0]
            assert found[1] == coder.identifier
            assert found[0] == code | (coder.identifier if sign < 0 else 0), f"magnitude {magnitude}"
            assert coder.decode(found[None])[0].tolist() == [sign * datatype.numerators[code], 0]


@pytest.mark.parametrize("name", ["olive-w4", "olive-w8", "olive-w8:outlier=e2m5"])
@pytest.mark.parametrize(
    ("pair", "survivor"),
    [((90, 1), 0), ((1, 90), 1), ((90, 91), 1), ((91, 90), 0), ((90, -90), 1), ((-90, 90), 1)],
)
def test_the_larger_outlier_survives_and_the_right_one_of_equals(
    name: str, pair: tuple[int, int], survivor: int
) -> None:
    decoded = quantize(np.array([[*pair, *plain(name)]], dtype=np.float16), name).dequantize()[0]
    assert decoded[1 - survivor] == 0
    assert np.sign(decoded[survivor]) == np.sign(pair[survivor])
    assert abs(decoded[survivor]) > 30


@pytest.mark.parametrize("name", ["olive-w4", "olive-w8"])
def test_the_last_weight_of_an_odd_row_is_no_outlier(name: str) -> None:
    tensor = quantize(np.array([[*plain(name), 50]], dtype=np.float16), name)
    decoded = tensor.dequantize()[0]
    largest = chosen_types(tensor)[0].maximum
    assert decoded[-1] == np.float32(largest * float(tensor.parts["scales"][0, 0]))
    assert np.abs(decoded[:-1]).max() < 5


def on_a_binary_grid(rows: int, columns: int, seed: int) -> NDArray[np.float16]:
    """Weights with outliers, all multiples of 1/32 below 64.

    Differences from level × FP16 scale (a multiple of 2**-17) then have at most 23 bits, and sums of 32 squares at most
    51: float64 sums are exact, in any order.
    """
    random = np.random.default_rng(seed)
    weights = random.standard_t(4, (rows, columns))
    outliers = random.random(weights.shape) < 0.06
    weights[outliers] *= random.uniform(5, 30, int(outliers.sum()))
    return np.clip(np.round(weights * 32) / 32, -63, 63).astype(np.float16)


def exact_error(weights: list[float], scale: float, normal: DataType, outlier: DataType) -> float:
    """Squared error of one group whose pairs are encoded by Algorithm 1; shares no step with the module."""
    normal_levels = np.array(normal.levels) * scale
    outlier_levels = np.array([level for level in outlier.levels if level > 0]) * scale
    squares = []
    for start in range(0, len(weights), 2):
        pair = weights[start : start + 2]
        larger = max(pair, key=abs)
        if len(pair) == 2 and abs(larger) > outlier_levels.min():
            squares += [np.abs(outlier_levels - abs(larger)).min() ** 2, min(map(abs, pair)) ** 2]
        else:
            squares += [np.abs(normal_levels - weight).min() ** 2 for weight in pair]
    return math.fsum(squares)


def search_everything(weights: NDArray[np.float16], format: Format) -> tuple[int, NDArray[np.float16]]:
    """Index of the normal type and scales [rows, groups] by trying every type and percentage in the paper's order."""
    size = format.group_size or weights.shape[1]
    totals, scales = [], []
    for normal, outlier in pairs_of_types(format):
        errors, best = [], np.empty((weights.shape[0], format.groups(weights.shape[1])), dtype=np.float16)
        for row, group in np.ndindex(*best.shape):
            values = weights[row, group * size : (group + 1) * size].astype(float).tolist()
            mean = sum(values) / len(values)
            reach = abs(mean) + 3 * math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
            candidates = [np.float16(reach * (percent / 100 / normal.maximum)) for percent in range(75, 250, 2)]
            tried = [exact_error(values, float(scale), normal, outlier) for scale in candidates]
            best[row, group] = candidates[tried.index(min(tried))]
            errors.append(min(tried))
        totals.append(math.fsum(errors))
        scales.append(best)
    chosen = totals.index(min(totals))
    return chosen, scales[chosen]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_scales_and_type_are_those_of_a_search_over_everything(name: str, seed: int) -> None:
    weights = on_a_binary_grid(2, 31, seed)
    tensor = quantize(weights, name)
    chosen, scales = search_everything(weights, tensor.format)
    assert int(tensor.parts["matrix_type"][0]) == chosen
    np.testing.assert_array_equal(tensor.parts["scales"], scales)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_decoded_has_the_error_that_was_searched_for(name: str) -> None:
    """Decoded values are float32, within 2**-24 of exact: a squared difference moves by less than 1e-6 of w**2."""
    weights = on_a_binary_grid(3, 32, seed=3)
    tensor = quantize(weights, name)
    size = tensor.format.group_size or 32
    expected = sum(
        exact_error(
            weights[row, group * size : group * size + size].astype(float).tolist(), float(scale), *chosen_types(tensor)
        )
        for (row, group), scale in np.ndenumerate(tensor.parts["scales"])
    )
    difference = weights.astype(np.float64) - tensor.dequantize()
    assert float((difference**2).sum()) == pytest.approx(expected, abs=1e-6 * float((weights.astype(float) ** 2).sum()))


@pytest.mark.parametrize("name", ["olive-w4", "olive-w8"])
def test_all_of_half_precision_fits_the_scales(name: str) -> None:
    """The least candidate of alternating ±65504 is 3 × 0.75 × 65504 / 7; those above 65504 are not tried."""
    weights = np.tile(np.array([65504, -65504], dtype=np.float16), (2, 8))
    tensor = quantize(weights, name)
    assert np.isfinite(tensor.parts["scales"]).all()
    assert np.abs(tensor.dequantize() / weights.astype(np.float32) - 1).max() < 0.01


@pytest.mark.parametrize("name", ["olive-w4", "olive-w8", "olive-w8:outlier=e2m5"])
def test_a_huge_outlier_is_kept_and_scales_stay_finite(name: str) -> None:
    weights = np.random.default_rng(3).standard_normal((2, 4096)).astype(np.float32)
    weights[0, 17] = 4e5
    tensor = quantize(weights, name)
    assert np.isfinite(tensor.parts["scales"]).all()
    assert tensor.dequantize()[0, 17] > 1e5


@pytest.mark.parametrize("name", ["olive-w4", "olive-w8"])
def test_weights_beyond_half_precision_scales_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="layer: a group needs the scale"):
        quantize(np.full((1, 4), 1e8, dtype=np.float32), name, name="layer")


@pytest.mark.parametrize("name", [*FORMATS, "olive-w4:axis=output"])
def test_columns_are_rounded_as_the_whole_matrix_is(name: str) -> None:
    weights = on_a_binary_grid(4, 37, seed=5)
    tensor = quantize(weights, name)
    for start, stop in ((0, 2), (2, 12), (30, 37), (36, 37)):
        codes, values = tensor.round_columns(start, weights[:, start:stop].astype(np.float32))
        np.testing.assert_array_equal(codes, tensor.codes[:, start:stop])
        np.testing.assert_array_equal(values, tensor.dequantize()[:, start:stop])


class TestPairStatistics:
    @pytest.mark.parametrize("name", ["olive-w4", "olive-w8", "olive-w4g8", "olive-w4:axis=output"])
    def test_counts_are_those_of_a_loop(self, name: str) -> None:
        weights = on_a_binary_grid(6, 37, seed=7)
        tensor = quantize(weights, name)
        turned = weights.T if tensor.format.groups_along_outputs else weights
        threshold = min(level for level in chosen_types(tensor)[1].levels if level > 0)
        size = tensor.format.group_size or turned.shape[1]
        counts = [0, 0, 0]
        for row, column in itertools.product(range(turned.shape[0]), range(0, turned.shape[1] - 1, 2)):
            limit = threshold * float(tensor.parts["scales"][row, column // size])
            counts[sum(abs(float(weight)) > limit for weight in turned[row, column : column + 2])] += 1
        found = pair_statistics(weights, tensor)
        assert [found.normal_normal, found.outlier_normal, found.outlier_outlier] == counts
        assert found.pairs == turned.shape[0] * (turned.shape[1] // 2)

    def test_pairs_with_an_outlier_are_those_with_a_victim(self) -> None:
        weights = on_a_binary_grid(8, 64, seed=8)
        tensor = quantize(weights, "olive-w4")
        found = pair_statistics(weights, tensor)
        victims = int((tensor.codes == 0b1000).sum())
        assert victims > 0
        assert found.outlier_normal + found.outlier_outlier == victims

    def test_a_row_of_one_weight_has_no_pair(self) -> None:
        weights = np.ones((3, 1), dtype=np.float16)
        assert pair_statistics(weights, quantize(weights, "olive-w4")) == PairStatistics(
            normal_normal=0, outlier_normal=0, outlier_outlier=0
        )

    def test_another_format_or_shape_is_refused(self) -> None:
        weights = np.ones((3, 4), dtype=np.float16)
        with pytest.raises(InputError, match="int-w4g128; expected a format of OliVe"):
            pair_statistics(weights, quantize(weights, "int-w4g128"))
        with pytest.raises(InputError, match=r"weights \[2, 4\] beside a tensor \[3, 4\]"):
            pair_statistics(weights[:2], quantize(weights, "olive-w4"))

    @pytest.mark.shared
    def test_outliers_of_real_attention_are_rare_and_hardly_ever_meet(self, shared: Path) -> None:
        """OliVe Table 2: fewer than 2 % of pairs hold an outlier, fewer than 0.1 % two."""
        _, weights = next(open_model(shared / "models" / "gpt2-124m-attn").matrices())
        found = pair_statistics(weights, quantize(weights, "olive-w4"))
        assert found.pairs == weights.size // 2
        assert 0 < found.outlier_normal < 0.02 * found.pairs
        assert found.outlier_outlier < 0.001 * found.pairs


class TestActivations:
    @pytest.mark.parametrize(("name", "bits", "outlier"), [("olive-w4", 4, "e4m3"), ("olive-w8", 8, "e4m3")])
    def test_a_sample_of_one_row_is_quantized_as_weights_are(self, name: str, bits: int, outlier: str) -> None:
        row = on_a_binary_grid(1, 65, seed=9).astype(np.float32)
        index, scale = outlier_victim.calibrate(row, bits, outlier)
        tensor = quantize(row, name)
        assert (index, scale) == (int(tensor.parts["matrix_type"][0]), float(tensor.parts["scales"][0, 0]))
        np.testing.assert_array_equal(
            outlier_victim.quantize_with_scale(row, index, scale, bits, outlier), tensor.dequantize()
        )

    def test_every_token_is_quantized_alone_in_pairs_of_channels(self) -> None:
        values = on_a_binary_grid(5, 33, seed=10).astype(np.float32)
        index, scale = outlier_victim.calibrate(values, 8, "e2m5")
        together = outlier_victim.quantize_with_scale(values, index, scale, 8, "e2m5")
        alone = [outlier_victim.quantize_with_scale(token[None], index, scale, 8, "e2m5")[0] for token in values]
        np.testing.assert_array_equal(together, alone)

    def test_what_was_quantized_stays_as_it_is(self) -> None:
        """Of values on levels each pair is encoded as itself, a victim being zero."""
        values = on_a_binary_grid(5, 32, seed=11).astype(np.float32)
        index, scale = outlier_victim.calibrate(values, 4)
        once = outlier_victim.quantize_with_scale(values, index, scale, 4)
        least = min(level for level in get_format("olive-w4").datatypes[2 + index].levels if level > 0) * scale
        on_levels = np.abs(once) != np.float32(least)  # the least outlier level is no outlier: it must exceed that
        twice = outlier_victim.quantize_with_scale(once, index, scale, 4)
        np.testing.assert_array_equal(twice[on_levels], once[on_levels])

    def test_a_sample_that_is_empty_or_not_finite_is_refused(self) -> None:
        with pytest.raises(InputError, match="the sample of activations is empty"):
            outlier_victim.calibrate(np.empty(0, dtype=np.float32), 4)
        with pytest.raises(InputError, match="holds 1 NaN or infinite values"):
            outlier_victim.calibrate(np.array([1, np.nan], dtype=np.float32), 4)

    def test_other_widths_and_outlier_types_are_refused(self) -> None:
        sample = np.ones(4, dtype=np.float32)
        with pytest.raises(InputError, match="olive has no 6-bit weights"):
            outlier_victim.calibrate(sample, 6)
        with pytest.raises(InputError, match="option outlier=e5m2: expected one of e4m3, e2m5"):
            outlier_victim.calibrate(sample, 8, "e5m2")
