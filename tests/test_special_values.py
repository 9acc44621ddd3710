"""The search of special values: errors against the quantizer, tables against all others of their size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms.datatypes import special_value_type
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.grid import squared_errors
from termwise.algorithms.special_values import candidate_values, group_errors, search


def heavy_tailed(rows: int, columns: int, seed: int = 1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.02).astype(np.float32)


def test_candidates_are_what_the_pe_can_multiply() -> None:
    assert candidate_values(3)[:6] == (3, -3, 5, -5, 6, -6)
    assert 11 not in candidate_values(3)  # 8 + 2 + 1: three terms
    assert {2.5, 5, 7.5, 8, 15.5} < set(candidate_values(4))
    assert not {2, 4, 6, 6.5, 16} & set(candidate_values(4))


@pytest.mark.parametrize("bits", [3, 4])
def test_errors_are_the_exact_ones(bits: int) -> None:
    weights = heavy_tailed(3, 40)
    values = candidate_values(bits)
    errors = group_errors(weights, bits, 16, values)
    types = [special_value_type(bits, value) for value in values]
    for index, (row, group) in enumerate(itertools.product(range(3), range(3))):
        exact = squared_errors(weights[row, group * 16 : group * 16 + 16].tolist(), types)
        np.testing.assert_allclose(errors[index], [float(error) for error in exact], rtol=1e-12)


@pytest.mark.parametrize("bits", [3, 4])
def test_small_tables_are_the_best_of_all(bits: int) -> None:
    weights = heavy_tailed(16, 128)
    found = search([("a", weights)], bits, 32, largest=4)
    errors = group_errors(weights, bits, 32, found.candidates) / np.square(weights, dtype=np.float64).sum()
    for table in found.tables:
        every = itertools.combinations(range(len(found.candidates)), len(table.values))
        best = min(errors[:, list(some)].min(axis=1).sum() for some in every)
        assert table.relative_error == pytest.approx(best, rel=1e-12)


def test_larger_tables_are_no_worse_and_none_is_worse_than_the_papers() -> None:
    found = search([("a", heavy_tailed(16, 128)), ("b", heavy_tailed(8, 64, 2))], 4, 32)
    errors = [table.relative_error for table in found.tables]
    assert errors == sorted(errors, reverse=True)
    assert found.tables[3].relative_error <= found.paper.relative_error
    assert found.paper.values == (5, -5, 8, -8)
    assert [table.selector_bits for table in found.tables] == [0, 1, 2, 2, 3, 3, 3, 3]
    for table in found.tables:
        assert sum(table.shares) == pytest.approx(1)
        assert set(table.values) == {float(datatype.values[8]) for datatype in get_format(table.format).datatypes}


def test_a_wrong_width_is_told() -> None:
    with pytest.raises(InputError, match="expected 3 or 4 bits, 1 to 8 values"):
        search([("a", heavy_tailed(1, 16))], 5, None)
    with pytest.raises(InputError, match="no matrix"):
        search([], 4, None)
