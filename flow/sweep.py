"""Sweeps: every combination of model, format, accelerator and phase, each computed once and kept as a record.

The quality of a model in a format is measured once and shared by all accelerators and phases; a point adds the
simulation. Simulations come first, because they tell which combinations a PE cannot take. A record is written as soon
as its result is there, so that a sweep that is stopped in any way goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.formats import get_format
from termwise.algorithms.processing_element import UnsupportedFormatError
from termwise.algorithms.shapes import ModelShape
from termwise.flow.quality import Workbench, outputs_of, outputs_of_shape, shape_without_weights, text_for
from termwise.flow.records import (
    DIGEST_PACKAGES,
    Record,
    RecordStore,
    digest_of,
    package_version,
    record_digest,
    source_digest,
)
from termwise.flow.results import PlannedPoint, Results, Run, SweptModel, collect, write_run
from termwise.flow.specification import Specification
from termwise.sim.accelerators import get_accelerator

if TYPE_CHECKING:
    from termwise.algorithms.models import Model
    from termwise.algorithms.text import Text

ProgressBar = Callable[..., Iterator[Any]]
"""Called as ``progress(items, total=..., label=..., unit=...)``; yields the items (``termwise.flow.console.progress``)."""

KEPT_SIMULATION_OUTPUTS: Final = (
    "latency_cycles",
    "latency_ms",
    "clock_mhz",
    "energy_uj",
    "pe_energy_uj",
    "sram_energy_uj",
    "dram_energy_uj",
    "compute_cycles",
    "weight_stall_cycles",
    "activation_stall_cycles",
    "drain_stall_cycles",
    "traffic_bytes",
    "weight_traffic_bytes",
    "activation_traffic_bytes",
    "output_traffic_bytes",
    "pe_utilization",
    "key_value_bits",
    "notes",
)
"""What a point keeps of a simulation; ``termwise simulate`` gives the layers."""


class SweepInterruptedError(TermwiseError):
    """The user stopped the sweep (Ctrl-C). Exit status 130."""

    exit_status = 130


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of the sweep with its text, or a shape without weights."""

    swept: SweptModel
    text_path: str | None
    model: Model | None
    text: Text | None
    known_shape: ModelShape | None

    def shape(self) -> ModelShape:
        """Shape of the linear layers, and the attention."""
        if self.known_shape is not None:
            return self.known_shape
        assert self.model is not None
        return self.model.shape


@dataclass(frozen=True, kw_only=True)
class Task:
    """One point to compute: what it is, what its records depend on, and their digests."""

    subject: Subject
    format: str
    accelerator: str
    phase: str
    quality_inputs: Mapping[str, Any]
    inputs: Mapping[str, Any]

    @property
    def quality_digest(self) -> str:
        """Name of the record of the quality that the point shares with others."""
        return record_digest("quality", self.quality_inputs)

    @property
    def planned(self) -> PlannedPoint:
        """The point as ``run.json`` lists it."""
        return PlannedPoint(
            model=self.subject.swept.name,
            format=self.format,
            accelerator=self.accelerator,
            phase=self.phase,
            digest=record_digest("point", self.inputs),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a sweep did: the results, and how many records it computed and how many it found."""

    results: Results
    computed: int
    reused: int


def _subject(reference: str, text_path: str | None) -> Subject:
    """Open a model (headers and digest only) or look up a shape. Raises ``InputError``."""
    shape = shape_without_weights(reference)
    if shape is not None:
        swept = SweptModel(reference=reference, name=shape.name, digest=None, text=None, text_digest=None)
        return Subject(swept=swept, text_path=None, model=None, text=None, known_shape=shape)
    from termwise.algorithms.models import open_model

    model, text = open_model(reference), text_for(text_path)
    swept = SweptModel(
        reference=reference, name=model.name, digest=model.digest, text=text.name, text_digest=text.digest
    )
    return Subject(swept=swept, text_path=text_path, model=model, text=text, known_shape=None)


def _tasks(specification: Specification, subject: Subject) -> Iterator[Task]:
    """Every point of one model, in the order of the specification."""
    common = {"versions": {package: package_version(package) for package in DIGEST_PACKAGES}}
    shape = subject.known_shape
    what = {
        "model_digest": subject.swept.digest if shape is None else f"shape {digest_of(asdict(shape))}",
        "text_digest": subject.swept.text_digest,
        "source_digest": source_digest("termwise.algorithms", "termwise.flow.quality"),
    }
    for format in specification.formats:
        quality_inputs = {**common, **what, "format": format}
        for name in specification.accelerators:
            for phase in specification.phases:
                inputs = {
                    "quality_digest": record_digest("quality", quality_inputs),
                    "format": format,
                    "accelerator": name,
                    "accelerator_digest": get_accelerator(name).digest(),
                    "phase": phase,
                    "context": specification.context,
                    "batch": specification.batch,
                    "source_digest": source_digest("termwise.sim", "termwise.flow.sweep"),
                }
                yield Task(
                    subject=subject,
                    format=format,
                    accelerator=name,
                    phase=phase,
                    quality_inputs=quality_inputs,
                    inputs=inputs,
                )


def check_folder(folder: Path) -> None:
    """Raises ``InputError`` unless ``folder`` is the folder of a run, empty, or not there yet."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder for the run (--out)")
    if not folder.is_dir() or (folder / "run.json").is_file():
        return
    others = [entry.name for entry in folder.iterdir() if not entry.name.endswith(".part")]
    if others:
        raise InputError(f"{folder} holds {others[0]} and is no run; expected a new folder or that of a run (--out)")


@lru_cache(maxsize=1)
def _workbench(reference: str, text_path: str | None, model_digest: str, text_digest: str) -> Workbench:
    """The model in memory, kept for its next format. The digests make a changed file another model."""
    from termwise.algorithms.models import open_model

    model, text = open_model(reference), text_for(text_path)
    if (model.digest, text.digest) != (model_digest, text_digest):
        raise InputError(f"{reference} or its text changed during the sweep; expected files that stay as they are")
    return Workbench(model, text)


def describe(error: Exception) -> str:
    """An exception as a record keeps it: a sentence of ours as it is, any other with its type."""
    if isinstance(error, TermwiseError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@dataclass(frozen=True, kw_only=True)
class _Measurement:
    """One quality to measure, small enough to send to another process; ``shape`` in place of a model's weights."""

    digest: str
    format: str
    reference: str
    text_path: str | None
    model_digest: str | None
    text_digest: str | None
    shape: ModelShape | None

    @classmethod
    def of(cls, task: Task) -> _Measurement:
        """The measurement that a task needs."""
        swept = task.subject.swept
        return cls(
            digest=task.quality_digest,
            format=task.format,
            reference=swept.reference,
            text_path=task.subject.text_path,
            model_digest=swept.digest,
            text_digest=swept.text_digest,
            shape=task.subject.known_shape,
        )

    def workbench(self) -> Workbench:
        """The model and its text, in memory."""
        assert self.model_digest is not None
        assert self.text_digest is not None
        return _workbench(self.reference, self.text_path, self.model_digest, self.text_digest)


_Measured = tuple[str, dict[str, Any] | None, str | None]
"""Digest of a quality, its outputs, and what failed where there are none."""


def _measure(measurement: _Measurement) -> _Measured:
    """Measure one quality, in whatever process."""
    try:
        format = get_format(measurement.format)
        if measurement.shape is not None:
            return measurement.digest, outputs_of_shape(measurement.shape, format), None
        return measurement.digest, outputs_of(measurement.workbench().measure(format)), None
    except Exception as error:  # recorded as failed; the sweep goes on
        return measurement.digest, None, describe(error)


def _measured(measurements: Sequence[_Measurement], workers: int) -> Iterator[_Measured]:
    """The qualities, in the order in which they are ready."""
    if workers == 1 or len(measurements) <= 1:
        yield from map(_measure, measurements)
        return
    from joblib import Parallel, delayed

    missing = {measurement.digest for measurement in measurements}
    try:
        parallel = Parallel(n_jobs=min(workers, len(measurements)), return_as="generator_unordered")
        for result in parallel(delayed(_measure)(measurement) for measurement in measurements):
            missing.discard(result[0])
            yield result
    except (OSError, RuntimeError) as error:  # a process was killed, for example for want of memory
        for digest in missing:
            yield digest, None, describe(error)


def _simulate(task: Task, specification: Specification) -> dict[str, Any]:
    """Simulate a task: the outputs that its record keeps. Raises ``UnsupportedFormatError`` and others."""
    from termwise.algorithms.workload import check_phase
    from termwise.sim.simulate import simulate

    simulation = simulate(
        task.subject.shape(),
        get_accelerator(task.accelerator),
        phase=check_phase(task.phase),
        weights=get_format(task.format),
        context=specification.context,
        batch=specification.batch,
    ).to_dict()
    return {key: simulation[key] for key in KEPT_SIMULATION_OUTPUTS}


@dataclass(frozen=True, kw_only=True)
class _Recorder:
    """Writes records of one sweep, and counts them."""

    store: RecordStore
    command: str
    specification_digest: str

    def point(self, task: Task, **result: Any) -> None:
        """Write the record of a point."""
        self._save(Record(kind="point", inputs=task.inputs, **self._origin(), **result))

    def quality(self, task: Task, **result: Any) -> None:
        """Write the record of a quality."""
        self._save(Record(kind="quality", inputs=task.quality_inputs, **self._origin(), **result))

    def _origin(self) -> dict[str, Any]:
        return {"command": self.command, "specification_digest": self.specification_digest}

    def _save(self, record: Record) -> None:
        self.store.save(record)


def _check_models(pending: Iterable[Task], qualities: Mapping[str, Record]) -> None:
    """Read the weights and texts that will be needed, so that bad ones end the sweep before it writes anything."""
    needed = {
        task.subject.swept.reference: task
        for task in pending
        if task.subject.model is not None and task.quality_digest not in qualities
    }
    for task in needed.values():
        workbench = _Measurement.of(task).workbench()
        workbench.check_weights()
        workbench.evaluator()


def run_sweep(
    specification: Specification,
    folder: Path,
    *,
    command: str,
    warn: Callable[[str], None],
    progress: ProgressBar,
    workers: int = 1,
) -> Outcome:
    """Compute what the records in ``folder`` do not hold yet, and collect the results.

    Args:
        specification: what to compute.
        folder: of the run; made where it is not there.
        command: that remakes the results; it is written into records and reports.
        warn: receives a sentence for every record that cannot be trusted.
        progress: draws a bar while items are taken.
        workers: processes that measure qualities; each holds a model of its own.

    Raises ``InputError`` (nothing written, or the disk refused), and ``SweepInterruptedError`` on Ctrl-C. A point that
    fails is recorded as failed, and the sweep goes on.
    """
    check_folder(folder)
    subjects = [_subject(reference, specification.text) for reference in specification.models]
    names = [subject.swept.name for subject in subjects]
    if len(set(names)) != len(names):
        raise InputError(f"two models have one name ({', '.join(names)}); expected models that can be told apart")
    tasks = [task for subject in subjects for task in _tasks(specification, subject)]
    store = RecordStore(folder, warn)
    pending: list[Task] = []
    for task in tasks:
        record = store.load("point", task.planned.digest)
        if record is None or record.status == "failed":
            pending.append(task)
    qualities: dict[str, Record] = {}
    for digest in dict.fromkeys(task.quality_digest for task in pending):
        known = store.load("quality", digest)
        if known is not None and known.status == "done":
            qualities[digest] = known
    run = Run(
        command=command,
        specification=specification.to_dict(),
        specification_digest=specification.digest,
        models=tuple(subject.swept for subject in subjects),
        points=tuple(task.planned for task in tasks),
    )
    recorder = _Recorder(store=store, command=command, specification_digest=specification.digest)
    try:
        _check_models(pending, qualities)
        if workers > 1:
            _workbench.cache_clear()  # the workers hold models of their own
        write_run(folder, run)
        _compute(pending, qualities, specification, recorder, progress, workers)
    except KeyboardInterrupt as error:
        kept = sum(store.path("point", task.planned.digest).exists() for task in tasks)
        raise SweepInterruptedError(
            f"interrupted; {kept} of {len(tasks)} points are finished and kept in {folder}, "
            "and the same command goes on from there"
        ) from error
    finally:
        _workbench.cache_clear()
    return Outcome(
        results=collect(folder, run, warn), computed=len(pending), reused=len(tasks) - len(pending)
    )


def _compute(
    pending: Sequence[Task],
    qualities: dict[str, Record],
    specification: Specification,
    recorder: _Recorder,
    progress: ProgressBar,
    workers: int,
) -> None:
    """Simulate the pending points, measure the qualities that they need, and write their records."""
    waiting: dict[str, list[tuple[Task, dict[str, Any]]]] = {}
    for task in progress(pending, total=len(pending), label="simulating", unit="point"):
        try:
            simulated = _simulate(task, specification)
        except UnsupportedFormatError as error:
            recorder.point(task, status="skipped", reason=str(error))
        except Exception as error:  # recorded as failed; the sweep goes on
            recorder.point(task, status="failed", error=describe(error))
        else:
            waiting.setdefault(task.quality_digest, []).append((task, simulated))
    for digest, record in qualities.items():
        for task, simulated in waiting.pop(digest, []):
            recorder.point(task, status="done", outputs={**record.outputs, **simulated})
    needed = [_Measurement.of(points[0][0]) for points in waiting.values()]
    measured = _measured(needed, workers)
    for digest, outputs, error in progress(measured, total=len(needed), label="measuring quality", unit="format"):
        points = waiting[digest]
        if outputs is None:
            recorder.quality(points[0][0], status="failed", error=error)
        else:
            recorder.quality(points[0][0], status="done", outputs=outputs)
        for task, simulated in points:
            if outputs is None:
                recorder.point(task, status="failed", error=error)
            else:
                recorder.point(task, status="done", outputs={**outputs, **simulated})
