"""The buffer model: its points are the published ones, its coefficients are those of the fit, and it is monotone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from termwise.algorithms.errors import InputError
from termwise.sim.sram import COEFFICIENTS, SramModel
from termwise.sim.sram_fit import (
    QUANTITIES,
    bank_points,
    errors,
    fit,
    left_out_errors,
    load_points,
    published_errors,
    summary,
)

BANK_BYTES = [1 << exponent for exponent in range(10, 23)]


@pytest.mark.parametrize("table", load_points()["published"], ids=lambda table: table["source"][:20])
def test_points_are_the_published_buffers_to_every_printed_digit(table: dict[str, Any]) -> None:
    """A published buffer is as many banks as it has, all accessed together; the table prints rounded figures."""
    banks = {(row[0], row[1]): row for row in load_points()["banks"]}
    for point in table["points"]:
        published = dict(zip(table["columns"], point, strict=True))
        count = published["banks"]
        row = banks[published["capacity_bytes"] // count, published["width_bits"] // count]
        bank = dict(zip(load_points()["columns"], row, strict=True))
        for quantity, digits in (("read_pj", 3), ("write_pj", 3), ("area_mm2", 4), ("access_ns", 3)):
            if quantity in published:
                factor = 1 if quantity == "access_ns" else count
                printed = 2 if len(table["columns"]) == 5 else digits
                # half a unit of the last printed digit, and half a unit of CACTI's sixth digit for every bank
                tolerance = 0.5 * 10**-printed + factor * bank[quantity] * 0.5e-5
                assert abs(factor * bank[quantity] - published[quantity]) <= tolerance, (quantity, published)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_coefficients_are_those_that_the_fit_finds(quantity: str) -> None:
    """The fit rounds to four digits; another version of the solver may differ by one unit of the fourth."""
    assert fit(bank_points(), quantity) == pytest.approx(COEFFICIENTS[quantity], rel=1.1e-3)


STATED = {  # rms and largest relative error in per cent: of the fit, with a point left out, with a capacity left out
    "read_pj": ((10.5, 35.1), (11.7, 39.7), (12.4, 44.8)),
    "write_pj": ((7.4, 19.5), (7.9, 20.6), (8.1, 20.6)),
    "area_mm2": ((6.5, 17.6), (6.9, 19.8), (7.1, 19.8)),
    "access_ns": ((6.1, 15.3), (6.5, 16.0), (6.9, 15.9)),
    "leakage_mw": ((4.3, 16.4), (4.8, 19.1), (6.5, 30.0)),
}
STATED_PUBLISHED = {  # the same against the published buffers
    "read_pj": (9.1, 16.1),
    "write_pj": (4.5, 10.3),
    "area_mm2": (4.3, 6.7),
    "access_ns": (6.5, 8.7),
}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_errors_are_those_stated(quantity: str) -> None:
    points = bank_points()
    _, capacity = np.unique(points[:, 0], return_inverse=True)
    found = (
        summary(errors(COEFFICIENTS[quantity], points, quantity)),
        summary(left_out_errors(points, quantity, np.arange(len(points)))),
        summary(left_out_errors(points, quantity, capacity)),
    )
    for stated, error in zip(STATED[quantity], found, strict=True):
        assert (100 * error.rms, 100 * error.largest) == pytest.approx(stated, abs=0.051)  # stated to one decimal


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_nothing_shrinks_with_capacity(quantity: str) -> None:
    for word_bits, banks in itertools.product((128, 256, 512), (1, 4, 8)):
        values = [
            getattr(SramModel(capacity_bytes=size, word_bits=word_bits, banks=banks), quantity)
            for size in BANK_BYTES
            if size >= max(4096, 1024 * banks) and word_bits >= 16 * banks
        ]
        assert values == sorted(values)


def test_all_coefficients_are_physical() -> None:
    for coefficients in COEFFICIENTS.values():
        assert min(coefficients) >= 0


def test_banks_add_up() -> None:
    """Eight banks of 64 KiB with 32 bits each are eight times one such bank; the time is that of one."""
    eight = SramModel(capacity_bytes=512 * 1024, word_bits=256, banks=8)
    one = SramModel(capacity_bytes=64 * 1024, word_bits=32, banks=1)
    for quantity in QUANTITIES:
        factor = 1 if quantity == "access_ns" else 8
        assert getattr(eight, quantity) == pytest.approx(factor * getattr(one, quantity), rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity_bytes": 2048}, "capacity_bytes"),
        ({"capacity_bytes": 8 << 20}, "capacity_bytes"),
        ({"capacity_bytes": 4096, "banks": 8, "word_bits": 128}, "a bank"),
        ({"word_bits": 8}, "bits of a word"),
        ({"word_bits": 1024, "banks": 1}, "bits of a word"),
        ({"capacity_bytes": 4096, "banks": 4, "word_bits": 2048}, "32 words"),
        ({"word_bits": 0}, "word_bits"),
        ({"banks": True}, "banks"),
        ({"capacity_bytes": 65536.0}, "capacity_bytes"),
    ],
)
def test_what_has_no_points_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SramModel(**({"capacity_bytes": 65536, "word_bits": 64, "banks": 1} | fields))


def test_published_buffers_are_met_as_stated() -> None:
    found = published_errors(COEFFICIENTS)
    assert set(found) == set(STATED_PUBLISHED)
    for quantity, stated in STATED_PUBLISHED.items():
        error = (100 * found[quantity].rms, 100 * found[quantity].largest)
        assert error == pytest.approx(stated, abs=0.051)
