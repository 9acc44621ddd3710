"""The search over scales: its parts against plain definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from termwise.algorithms.datatypes import datatypes, get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.scale_search import best_scales, nearest_rank, positive_levels, runs_of, to_half

SYMMETRIC = [
    name
    for name, datatype in datatypes().items()
    if 0 in datatype.sorted_numerators
    and datatype.sorted_numerators == tuple(-numerator for numerator in reversed(datatype.sorted_numerators))
]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_runs_are_the_levels_and_every_two_neighbours_share_one(name: str) -> None:
    datatype = get_datatype(name)
    runs = [[int(first + step * rank) for rank in range(int(steps) + 1)] for first, step, steps in runs_of(datatype)]
    assert sorted(set().union(*runs)) == [level for level in datatype.sorted_numerators if level >= 0]
    assert all(after[0] == before[-1] for before, after in itertools.pairwise(runs))


def test_half_precision_is_rounded_as_numpy_does() -> None:
    """At every positive FP16 number, midway to the next one, and beside that."""
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (halves[1:] + halves[:-1]) / 2
    values = np.concatenate([halves, middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf)])
    found = [to_half(value) for value in values]
    np.testing.assert_array_equal(found, values.astype(np.float16).astype(np.float64))


@pytest.mark.parametrize(("value", "expected"), [(1e-12, 2.0**-24), (65519.0, 65504.0), (1e9, 65504.0)])
def test_half_precision_is_never_zero_and_never_infinite(value: float, expected: float) -> None:
    assert to_half(value) == expected


@pytest.mark.parametrize("name", ["abfloat4_e2m1_b2", "abfloat4_e2m1_b3", "abfloat8_e4m3_b4", "abfloat8_e2m5_b2"])
def test_the_nearest_level_of_a_tie_has_the_even_code(name: str) -> None:
    levels, codes = positive_levels(get_datatype(name))
    for low, (left, right) in enumerate(itertools.pairwise(levels)):
        middle = (left + right) / 2
        assert nearest_rank(math.nextafter(middle, 0), levels, codes) == low
        assert codes[nearest_rank(middle, levels, codes)] % 2 == 0
        assert nearest_rank(math.nextafter(middle, math.inf), levels, codes) == low + 1
    assert nearest_rank(0.0, levels, codes) == 0
    assert nearest_rank(1e9, levels, codes) == levels.size - 1


def test_equal_errors_take_the_first_candidate() -> None:
    """0 and 4 are levels of the scales 1, 2 and 4: at 175, 350 and 700 percent, of which 350 is tried first."""
    weights = np.array([[0, 4, 0, -4]], dtype=np.float32)
    percents = (175, 180, 190, 200, 210, 220, 230, 240, 350, 700)
    scales, errors = best_scales(weights, 4, np.array([[4.0]]), percents, get_datatype("int4"))
    assert (scales[0, 0], errors[0, 0]) == (1.0, 0.0)
    scales, errors = best_scales(weights, 4, np.array([[4.0]]), percents[1:], get_datatype("int4"))
    assert (scales[0, 0], errors[0, 0]) == (2.0, 0.0)


def test_groups_of_zeros_have_the_scale_one() -> None:
    weights = np.array([[0, 0, 3, 1]], dtype=np.float32)
    scales, errors = best_scales(weights, 2, np.array([[0.0, 3.0]]), (100,), get_datatype("flint4"))
    assert scales[0, 0] == 1.0
    assert errors[0, 0] == 0.0


def test_candidates_above_half_precision_become_the_greatest_number() -> None:
    weights = np.array([[400_000.0, 1.0]], dtype=np.float32)
    scales, _ = best_scales(weights, 2, np.array([[400_000.0]]), (75, 100, 150), get_datatype("int4"))
    assert scales[0, 0] == float(np.float16(400_000 / 7))
    scales, _ = best_scales(weights * 1.4, 2, np.array([[560_000.0]]), (75, 100, 150), get_datatype("int4"))
    assert scales[0, 0] == 65504
    with pytest.raises(InputError, match=r"a group needs the scale 6\.696e\+04"):
        best_scales(weights * 2, 2, np.array([[625_000.0]]), (75, 100), get_datatype("int4"))
