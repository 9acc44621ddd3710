"""The results of a run: what its records hold, point by point, and which points are on a Pareto front.

``run.json`` in the folder of a run lists the points in order, each with the digest of its record; the numbers are in
the records alone. So a report can be rebuilt from the folder at any time, also after a sweep that was killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from termwise.algorithms.errors import InputError
from termwise.algorithms.files import write_text
from termwise.flow.pareto import pareto_front
from termwise.flow.records import Record, RecordStore, to_json

RUN_VERSION: Final = 1
"""Raised when the content of ``run.json`` changes its meaning."""

ENERGY_PARTS: Final = ("pe_energy_uj", "sram_energy_uj", "dram_energy_uj")
"""The parts that a point's energy is the sum of; leakage of the buffers, where it is known, counts as theirs."""

AccuracyMeasure = Literal["perplexity", "sqnr_db"]


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """One combination of a sweep, and the digest that names its record."""

    model: str
    format: str
    accelerator: str
    phase: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class SweptModel:
    """One model of a sweep.

    Attributes:
        reference: as the user named it.
        name: what the model is called in results.
        digest: of its weights and configuration; None for a shape without weights.
        text: name of the text that the perplexity is about; None for a known shape.
        text_digest: of that text.
    """

    reference: str
    name: str
    digest: str | None
    text: str | None
    text_digest: str | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What ``run.json`` holds: the question, the command, the models and the planned points."""

    run_version: int = RUN_VERSION
    command: str
    specification: Mapping[str, Any]
    specification_digest: str
    models: tuple[SweptModel, ...]
    points: tuple[PlannedPoint, ...]


def write_run(folder: Path, run: Run) -> None:
    """Write ``run.json``. Raises ``InputError`` where the folder cannot be written."""
    write_text(folder / "run.json", to_json(asdict(run)))


def read_run(folder: Path) -> Run:
    """Read ``run.json`` of the run in ``folder``. Raises ``InputError`` where there is none, or not a valid one."""
    path = folder / "run.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; expected the folder of a run of termwise sweep"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; run the sweep again, its records are kept") from error
    try:
        if document["run_version"] != RUN_VERSION:
            raise InputError(
                f"{path} has version {document['run_version']!r}; expected {RUN_VERSION}: run the sweep again"
            )
        return Run(
            **document
            | {
                "models": tuple(SweptModel(**model) for model in document["models"]),
                "points": tuple(PlannedPoint(**point) for point in document["points"]),
            }
        )
    except (TypeError, KeyError) as error:
        raise InputError(
            f"{path} does not describe a run ({error}); run the sweep again, its records are kept"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Point:
    """One computed point.

    Attributes:
        perplexity: per token; None where there is none.
        perplexity_reason: why there is none; None where there is one.
        sqnr_db: signal to quantization noise of all weights; None where the format is exact or there are no weights.
        mean_squared_error: of all weights; None where there are no weights.
        bits_per_weight: counted from the packed bytes of all layers; None where these depend on weights that are not
            there.
        latency_cycles, latency_ms, energy_uj: of the phase, for the whole batch; the energy is None where the energy of
            an event is not known, and a note says of which.
        energy_split_uj: the energy by part, see ``ENERGY_PARTS``.
        traffic_bytes: to and from DRAM.
        notes: what the simulator says of this point in particular.
        digest: names its record.
        pareto: no point of the same model and phase is better in accuracy, latency and energy together.
        pareto_latency: the same for accuracy and latency only.
        pareto_energy: the same for accuracy and energy only.
    """

    model: str
    format: str
    accelerator: str
    phase: str
    perplexity: float | None
    perplexity_reason: str | None
    sqnr_db: float | None
    mean_squared_error: float | None
    bits_per_weight: float | None
    latency_cycles: int
    latency_ms: float
    energy_uj: float | None
    energy_split_uj: Mapping[str, float | None]
    traffic_bytes: int | None
    digest: str
    notes: tuple[str, ...] = ()
    pareto: bool = False
    pareto_latency: bool = False
    pareto_energy: bool = False

    @property
    def noise_to_signal(self) -> float | None:
        """Quantization noise over signal: the accuracy measure where there is no perplexity; 0 for an exact format."""
        if self.sqnr_db is not None:
            return float(10.0 ** (-self.sqnr_db / 10))
        return 0.0 if self.mean_squared_error == 0 else None

    def to_dict(self) -> dict[str, Any]:
        """The point as JSON takes it; the parts of the energy stand beside the total."""
        document = asdict(self) | {"status": "done"} | dict(self.energy_split_uj)
        del document["energy_split_uj"]
        return document


@dataclass(frozen=True, kw_only=True)
class Unavailable:
    """A combination without a result: skipped by design, failed, or not computed yet; ``reason`` says why."""

    model: str
    format: str
    accelerator: str
    phase: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a report shows."""

    run: Run
    points: tuple[Point, ...]
    skipped: tuple[Unavailable, ...]
    failed: tuple[Unavailable, ...]
    missing: tuple[Unavailable, ...]
    versions: Mapping[str, str | None]

    def accuracy_measure(self, model: str) -> AccuracyMeasure | None:
        """What the accuracy of a model's points is: perplexity, else the error of its weights, else nothing."""
        return accuracy_measure([point for point in self.points if point.model == model])

    def panels(self) -> list[tuple[str, str]]:
        """The pairs of model and phase that have points, in the order of the sweep."""
        return list(dict.fromkeys((point.model, point.phase) for point in self.points))


def accuracy_measure(points: Sequence[Point]) -> AccuracyMeasure | None:
    """Perplexity where any point has one, else the error of the weights where any point has one, else None."""
    if any(point.perplexity is not None for point in points):
        return "perplexity"
    return "sqnr_db" if any(point.noise_to_signal is not None for point in points) else None


def with_fronts(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points with their three Pareto marks set, each within its model and phase.

    Without any measure of accuracy, latency and energy alone decide.
    """
    marked = list(points)
    for model, phase in dict.fromkeys((point.model, point.phase) for point in points):
        places = [place for place, point in enumerate(points) if (point.model, point.phase) == (model, phase)]
        measure = accuracy_measure([point for point in points if point.model == model])

        def costs(
            place: int, *performance: float | None, measure: AccuracyMeasure | None = measure
        ) -> list[float | None]:
            if measure is None:
                return [*performance]
            point = points[place]
            return [point.perplexity if measure == "perplexity" else point.noise_to_signal, *performance]

        both = pareto_front([costs(place, points[place].latency_ms, points[place].energy_uj) for place in places])
        latency = pareto_front([costs(place, points[place].latency_ms) for place in places])
        energy = pareto_front([costs(place, points[place].energy_uj) for place in places])
        for place, in_both, in_latency, in_energy in zip(places, both, latency, energy, strict=True):
            marked[place] = replace(points[place], pareto=in_both, pareto_latency=in_latency, pareto_energy=in_energy)
    return tuple(marked)


def _point(planned: PlannedPoint, outputs: Mapping[str, Any]) -> Point:
    """The computed point of a finished record."""
    energy = outputs["energy_uj"]
    buffers = [energy["sram_read"], energy["sram_write"], energy.get("leakage", 0.0)]
    split = {
        "pe_energy_uj": energy["pe"],
        "sram_energy_uj": None if None in buffers else sum(buffers),
        "dram_energy_uj": energy["dram"],
    }
    return Point(
        model=planned.model,
        format=planned.format,
        accelerator=planned.accelerator,
        phase=planned.phase,
        perplexity=outputs["perplexity"],
        perplexity_reason=outputs["perplexity_reason"],
        sqnr_db=outputs["sqnr_db"],
        mean_squared_error=outputs["mse"],
        bits_per_weight=outputs["bits_per_weight"],
        latency_cycles=outputs["cycles"],
        latency_ms=outputs["latency_ms"],
        energy_uj=energy["total"],
        energy_split_uj=split,
        traffic_bytes=outputs.get("traffic_bytes"),
        digest=planned.digest,
        notes=tuple(outputs.get("notes", ())),
    )


def collect(folder: Path, run: Run, warn: Callable[[str], None]) -> Results:
    """Read the record of every planned point. Records that cannot be trusted count as missing."""
    store = RecordStore(folder, warn)
    points: list[Point] = []
    unavailable: dict[str, list[Unavailable]] = {"skipped": [], "failed": [], "missing": []}
    versions: dict[str, set[str]] = {}
    for planned in run.points:
        record: Record | None = store.load("point", planned.digest)
        if record is not None:
            for package, version in record.versions.items():
                versions.setdefault(package, set()).add(version or "missing")
        if record is not None and record.status == "done":
            points.append(_point(planned, record.outputs))
            continue
        status = "missing" if record is None else record.status
        reason = "not computed yet" if record is None else record.reason or record.error or "no reason given"
        combination = {key: value for key, value in asdict(planned).items() if key != "digest"}
        unavailable[status].append(Unavailable(**combination, reason=reason))
    return Results(
        run=run,
        points=with_fronts(points),
        skipped=tuple(unavailable["skipped"]),
        failed=tuple(unavailable["failed"]),
        missing=tuple(unavailable["missing"]),
        versions={package: ", ".join(sorted(found)) for package, found in versions.items()},
    )
