"""Fit the coefficients of ``termwise.sim.sram`` to the points of ``sram_points.json`` and say how well they fit.

``python -m termwise.sim.sram_fit`` prints the coefficients as they stand in ``termwise.sim.sram``, then the relative
errors: of the fit, with every point left out in turn, with every capacity left out in turn, and against the published
buffers. Least squares of the relative error with non-negative coefficients (scipy), for every overlap from 0 to 3 in
steps of 0.1; the overlap with the smallest sum of squares is kept.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.sim.sram import SramCoefficients, bank_terms

POINTS_FILE = Path(__file__).with_name("sram_points.json")
QUANTITIES = ("read_pj", "write_pj", "area_mm2", "access_ns", "leakage_mw")
OVERLAPS = tuple(step / 10 for step in range(31))
SIGNIFICANT_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class RelativeError:
    """Relative errors of a set of points: model / point − 1."""

    rms: float
    largest: float


def load_points() -> dict[str, Any]:
    """The whole file of points: ``banks``, ``published`` and their sources."""
    document: dict[str, Any] = json.loads(POINTS_FILE.read_text(encoding="utf-8"))
    return document


def bank_points() -> NDArray[np.float64]:
    """The points of the fit: float64 [points, 7], columns bank_bytes, width_bits and ``QUANTITIES``."""
    return np.array(load_points()["banks"], np.float64)


def fit(points: NDArray[np.float64], quantity: str) -> SramCoefficients:
    """The coefficients of ``quantity`` with the smallest squared relative error over ``points`` [points, 7]."""
    from scipy.optimize import nnls

    values = points[:, 2 + QUANTITIES.index(quantity)]
    best: tuple[float, SramCoefficients] | None = None
    for overlap in OVERLAPS:
        terms = np.array([bank_terms(size, width, overlap) for size, width in points[:, :2]]) / values[:, None]
        scale = terms.max(axis=0)  # columns of like size: the solver's tolerance is absolute
        scale[scale == 0] = 1
        scaled, residual = nnls(terms / scale, np.ones(len(values)))
        if best is None or residual < best[0]:
            base, wires, data_tree, word, cells = (float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in scaled / scale)
            best = residual, SramCoefficients(base, wires, data_tree, word, cells, overlap)
    assert best is not None
    return best[1]


def errors(coefficients: SramCoefficients, points: NDArray[np.float64], quantity: str) -> NDArray[np.float64]:
    """Relative error at every point: float64 [points]."""
    values = points[:, 2 + QUANTITIES.index(quantity)]
    return np.array([coefficients.of_bank(size, width) for size, width in points[:, :2]]) / values - 1


def summary(relative: NDArray[np.float64]) -> RelativeError:
    """Root mean square and largest magnitude."""
    return RelativeError(rms=float(np.sqrt(np.mean(relative**2))), largest=float(np.max(np.abs(relative))))


def left_out_errors(points: NDArray[np.float64], quantity: str, groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Relative error at every point of a fit without the points of its group (``groups``: int64 [points])."""
    relative = np.empty(len(points))
    for group in np.unique(groups):
        out = groups == group
        relative[out] = errors(fit(points[~out], quantity), points[out], quantity)
    return relative


def published_errors(coefficients: dict[str, SramCoefficients]) -> dict[str, RelativeError]:
    """Errors of the model against the published buffers, for every quantity that they have."""
    relative: dict[str, list[float]] = {}
    for table in load_points()["published"]:
        for point in table["points"]:
            row = dict(zip(table["columns"], point, strict=True))
            banks = row["banks"]
            for quantity in QUANTITIES:
                if quantity in row:
                    of_bank = coefficients[quantity].of_bank(row["capacity_bytes"] / banks, row["width_bits"] / banks)
                    value = of_bank if quantity == "access_ns" else banks * of_bank
                    relative.setdefault(quantity, []).append(value / row[quantity] - 1)
    return {quantity: summary(np.array(values)) for quantity, values in relative.items()}


def main() -> None:
    """Print the coefficients and their errors."""
    points = bank_points()
    found = {quantity: fit(points, quantity) for quantity in QUANTITIES}
    print("COEFFICIENTS = {")
    for quantity, coefficients in found.items():
        print(f'    "{quantity}": SramCoefficients(')
        for name, value in coefficients._asdict().items():
            print(f"        {name}={value!r},")
        print("    ),")
    print("}\n")
    alone = np.arange(len(points))
    _, capacity = np.unique(points[:, 0], return_inverse=True)
    published = published_errors(found)
    print(f"relative errors over {len(points)} points, rms / largest")
    print("quantity      fit              point left out   capacity left out  published")
    for quantity, coefficients in found.items():
        columns = [
            summary(errors(coefficients, points, quantity)),
            summary(left_out_errors(points, quantity, alone)),
            summary(left_out_errors(points, quantity, capacity)),
        ]
        columns += [published[quantity]] if quantity in published else []
        texts = (f"{100 * error.rms:4.1f} / {100 * error.largest:4.1f} %" for error in columns)
        print(f"{quantity:12}  " + "    ".join(texts))


if __name__ == "__main__":
    main()
