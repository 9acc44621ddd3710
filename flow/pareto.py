"""Pareto fronts: the designs that no other design beats in every respect."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pareto_front(costs: Sequence[Sequence[float | None]]) -> list[bool]:
    """Which points are non-dominated, for costs that are all to be small.

    A point is dominated when another is no worse in every cost and better in at least one. Points with equal costs do
    not dominate each other: all of a tie stay. A point with a missing cost (None or not a number) is never on the front
    and dominates nothing.

    Args:
        costs: for every point, its costs; each point has the same number of them.
    """
    if not costs:
        return []
    values = np.array(
        [[math.nan if cost is None else float(cost) for cost in point] for point in costs], dtype=np.float64
    )
    complete = np.array([not any(map(math.isnan, point)) for point in values.tolist()], dtype=np.bool_)
    front = np.zeros(len(values), dtype=np.bool_)
    # Points in lexicographic order: no point is dominated by a later one, so the front found so far decides.
    order = np.lexsort(values.T[::-1])
    kept = np.empty((0, values.shape[1]), dtype=np.float64)
    for index in order[complete[order]]:
        point = values[index]
        dominated = ((kept <= point).all(axis=1) & (kept < point).any(axis=1)).any()
        if not dominated:
            front[index] = True
            kept = np.vstack([kept, point])
    return [bool(member) for member in front]
