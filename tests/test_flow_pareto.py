"""Pareto fronts: the law of dominance, checked against its definition."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from termwise.flow.pareto import pareto_front

COSTS = st.lists(st.lists(st.integers(0, 4) | st.none(), min_size=3, max_size=3), max_size=25)


def dominates(one: list[int | None], other: list[int | None]) -> bool:
    """The definition: no worse in every cost, better in one."""
    if None in one or None in other:
        return False
    pairs = [(a or 0, b or 0) for a, b in zip(one, other, strict=True)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@given(costs=COSTS)
def test_the_front_is_what_nothing_dominates(costs: list[list[int | None]]) -> None:
    expected = [None not in point and not any(dominates(other, point) for other in costs) for point in costs]
    assert pareto_front(costs) == expected


def test_no_point_has_no_front() -> None:
    assert pareto_front([]) == []


def test_ties_stay_together() -> None:
    assert pareto_front([[1, 2], [1, 2], [2, 2]]) == [True, True, False]


def test_a_missing_cost_is_never_on_the_front() -> None:
    assert pareto_front([[None, 0.0], [math.nan, 0.0], [5.0, 5.0]]) == [False, False, True]
