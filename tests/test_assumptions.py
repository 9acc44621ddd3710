"""The numbers of docs/assumptions.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from termwise.algorithms.shapes import known_shape
from termwise.algorithms.workload import phase_work
from termwise.sim.assumptions import LONG_CONTEXT, documented_tables, first_above, touched_weight_bytes
from termwise.sim.assumptions import packed_weight_bytes as packed

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "assumptions.md").read_text(encoding="utf-8")


def test_documented_numbers_are_what_the_code_computes() -> None:
    tables = documented_tables()
    for name, table in tables.items():
        assert table in PAGE, f"the table {name!r} is out of date: python -m termwise.sim.assumptions"
    assert f"after {LONG_CONTEXT:,} tokens" in PAGE
    assert sum(line.startswith("|") for line in PAGE.splitlines()) == sum(
        len(table.splitlines()) for table in tables.values()
    )


def test_first_above_is_the_first() -> None:
    for limit in range(1, 200):
        assert first_above(limit, lambda number: number * number) ** 2 > limit
        assert (first_above(limit, lambda number: number * number) - 1) ** 2 <= limit
    assert first_above(0, lambda number: number) == 1


@pytest.mark.parametrize("name", ["llama-3-8b", "gpt2", "phi-3-mini"])
def test_a_dense_model_touches_all_of_its_weights(name: str) -> None:
    shape = known_shape(name)
    assert touched_weight_bytes(phase_work(shape, phase="decode", context=3)) == packed(shape)
