"""A sweep: every combination of model, format, accelerator and phase, each computed once and kept as a record.

A combination needs two results. Its quality (error of the weights, perplexity) depends on model, format and text; its
point (that, with cycles and energy) on the quality, the accelerator and the phase. Both are records, named by a digest
of all that they depend on, so a sweep that was killed goes on where it stopped, and one that was finished computes
nothing. What no PE can take is skipped, with the reason; what fails is recorded as failed and the sweep goes on.

All input is checked before anything is written: names, files, every weight of the models that are to be evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.files import make_directory
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.processing_element import UnsupportedFormatError
from termwise.algorithms.shapes import AttentionShape, LinearShape, ModelShape
from termwise.algorithms.text import Text
from termwise.algorithms.user_datatypes import definitions_of
from termwise.algorithms.workload import check_phase
from termwise.flow.folders import check_run_folder
from termwise.flow.quality import check_weights, default_calibration, evaluate, packed_bits_per_weight
from termwise.flow.records import (
    DIGEST_PACKAGES,
    Record,
    RecordStore,
    package_version,
    record_digest,
    source_digest,
)
from termwise.flow.results import PlannedPoint, Results, Run, SweptModel, collect, write_run
from termwise.flow.specification import Specification
from termwise.flow.subject import Subject, open_subjects, open_text
from termwise.sim.accelerators import Accelerator, get_accelerator

if TYPE_CHECKING:
    from termwise.algorithms.perplexity import Evaluator


class SweepInterruptedError(TermwiseError):
    """The user stopped the sweep; the message says what is kept. Exit status 130, as shells have it."""

    exit_status = 130


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One quality that a sweep needs.

    Attributes:
        subject: the model or the known shape.
        format: of its weights.
        inputs: everything that the record depends on.
        digest: names the record.
    """

    subject: Subject
    format: Format
    inputs: Mapping[str, Any]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One point of a sweep; ``skip_reason`` says why the PE cannot take the format, None where it can."""

    planned: PlannedPoint
    quality: Quality
    accelerator: Accelerator
    inputs: Mapping[str, Any]
    skip_reason: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All combinations of a sweep, in the order of the specification: model, phase, format, accelerator."""

    specification: Specification
    subjects: tuple[Subject, ...]
    text: Text | None
    combinations: tuple[Combination, ...]

    @property
    def qualities(self) -> tuple[Quality, ...]:
        """The qualities that at least one combination needs, each once."""
        needed = {entry.quality.digest: entry.quality for entry in self.combinations if entry.skip_reason is None}
        return tuple(needed.values())


@dataclass(kw_only=True)
class Progress:
    """Who is told how a sweep goes on.

    Attributes:
        begin: called with the number of results that are to be computed.
        doing: called with a few words on what is being computed.
        done: called after every result.
    """

    begin: Callable[[int], None] = field(default=lambda _: None)
    doing: Callable[[str], None] = field(default=lambda _: None)
    done: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of a sweep, and how many of its records were computed and how many reused."""

    results: Results
    computed: int
    reused: int


def unsupported_reason(accelerator: Accelerator, weights: Format) -> str | None:
    """Why the accelerator's PE cannot take ``weights``; None where it can."""
    try:
        accelerator.processing_element.cycles_per_step(weights)
    except UnsupportedFormatError as error:
        return str(error)
    return None


def plan_sweep(specification: Specification) -> Plan:
    """Open all models and texts, and name every result. Raises ``InputError``; writes nothing."""
    subjects = open_subjects(specification.models)
    has_weights = any(subject.model is not None for subject in subjects)
    text = open_text(None if specification.text is None else Path(specification.text)) if has_weights else None
    quality_source = source_digest("termwise.algorithms", "termwise.flow.quality")
    point_source = source_digest("termwise.algorithms", "termwise.sim")
    versions = {name: package_version(name) for name in DIGEST_PACKAGES}
    accelerators = [get_accelerator(name) for name in specification.accelerators]
    combinations = []
    for subject in subjects:
        content: Mapping[str, Any] = subject.shape_inputs
        if subject.model is not None and text is not None:
            content = {
                "model": subject.digest,
                "text": text.digest,
                "beginnings_only": text.beginnings_only,
            }
        qualities = []
        for name in specification.formats:
            quality_inputs = {
                **content,
                "format": name,
                "datatypes": definitions_of([get_format(name)]),
                "source": quality_source,
                "versions": versions,
            }
            qualities.append(
                Quality(
                    subject=subject,
                    format=get_format(name),
                    inputs=quality_inputs,
                    digest=record_digest("quality", quality_inputs),
                )
            )
        for phase in specification.phases:
            for quality in qualities:
                for accelerator in accelerators:
                    combinations.append(_combination(specification, quality, accelerator, phase, point_source))
    return Plan(specification=specification, subjects=subjects, text=text, combinations=tuple(combinations))


def _combination(
    specification: Specification, quality: Quality, accelerator: Accelerator, phase: str, source: str
) -> Combination:
    inputs = {
        "quality": quality.digest,
        "format": quality.format.name,
        "accelerator": accelerator.name,
        "accelerator_digest": accelerator.digest(),
        "phase": phase,
        "context": specification.context,
        "batch": specification.batch,
        "source": source,
    }
    return Combination(
        planned=PlannedPoint(
            model=quality.subject.name,
            format=quality.format.name,
            accelerator=accelerator.name,
            phase=phase,
            digest=record_digest("point", inputs),
        ),
        quality=quality,
        accelerator=accelerator,
        inputs=inputs,
        skip_reason=unsupported_reason(accelerator, quality.format),
    )


def run_sweep(
    plan: Plan,
    folder: Path,
    *,
    command: str,
    warn: Callable[[str], None],
    workers: int = 1,
    progress: Progress | None = None,
) -> Outcome:
    """Compute what is missing in ``folder`` and read all results.

    Args:
        plan: of ``plan_sweep``.
        folder: of the run; made where it does not exist.
        command: that computes this sweep, for records and report.
        warn: receives one sentence for everything that is not as it should be.
        workers: processes that evaluate qualities; 1 evaluates here, with one copy of the model for all formats.
        progress: is told what goes on.

    Raises ``InputError`` for a model, text or folder that cannot be used, before anything is written; for a folder
    that can no longer be written, when that happens; and ``SweepInterruptedError``.
    """
    check_run_folder(folder)
    sweep = _Sweep(plan, folder, command, warn, progress or Progress())
    sweep.look_up()
    sweep.check_models(keep=workers == 1)
    make_directory(folder)
    run = Run(
        command=command,
        specification=plan.specification.to_dict(),
        specification_digest=plan.specification.digest,
        models=tuple(_swept_model(subject, plan.text) for subject in plan.subjects),
        points=tuple(entry.planned for entry in plan.combinations),
    )
    write_run(folder, run)
    try:
        sweep.compute(workers)
    except KeyboardInterrupt:
        raise SweepInterruptedError(
            f"interrupted; the {sweep.computed + sweep.reused} finished records in {folder / 'records'} are kept, and "
            "the same command goes on from there"
        ) from None
    return Outcome(results=collect(folder, run, warn), computed=sweep.computed, reused=sweep.reused)


def _swept_model(subject: Subject, text: Text | None) -> SweptModel:
    measured = text if subject.model is not None else None
    return SweptModel(
        reference=subject.reference,
        name=subject.name,
        digest=subject.digest,
        text=None if measured is None else measured.name,
        text_digest=None if measured is None else measured.digest,
    )


class _Sweep:
    """The state of one sweep: the records that are there, and the models that are open."""

    def __init__(self, plan: Plan, folder: Path, command: str, warn: Callable[[str], None], progress: Progress) -> None:
        self.plan = plan
        self.store = RecordStore(folder, warn)
        self.command = command
        self.progress = progress
        self.computed = 0
        self.reused = 0
        self.qualities: dict[str, Record] = {}
        self.points: dict[str, Record] = {}
        self.evaluators: dict[str, Evaluator] = {}

    def look_up(self) -> None:
        """Read the finished records."""
        for entry in self.plan.combinations:
            record = self.store.load("point", entry.planned.digest)
            if record is not None and record.status != "failed":
                self.points[entry.planned.digest] = record
        unfinished = {entry.quality.digest for entry in self._open_points() if entry.skip_reason is None}
        for quality in self.plan.qualities:
            if quality.digest in unfinished:
                record = self.store.load("quality", quality.digest)
                if record is not None and record.status == "done":
                    self.qualities[quality.digest] = record
        self.reused = len(self.points) + len(self.qualities)

    def _open_points(self) -> list[Combination]:
        return [entry for entry in self.plan.combinations if entry.planned.digest not in self.points]

    def _open_qualities(self) -> list[Quality]:
        needed = {entry.quality.digest for entry in self._open_points() if entry.skip_reason is None}
        return [entry for entry in self.plan.qualities if entry.digest in needed - self.qualities.keys()]

    def check_models(self, *, keep: bool) -> None:
        """Read the weights of every model that is to be evaluated, and load those that can be run.

        A single model stays loaded, if ``keep``. Raises ``InputError``.
        """
        subjects = list({entry.subject.name: entry.subject for entry in self._open_qualities()}.values())
        for subject in subjects:
            if subject.model is None or self.plan.text is None:
                continue
            self.progress.doing(f"reading {subject.name}")
            check_weights(subject.model)
            if subject.model.not_runnable_reason is None:
                evaluator = _evaluator(subject, self.plan.text)
                if keep and len(subjects) == 1:
                    self.evaluators[subject.name] = evaluator

    def compute(self, workers: int) -> None:
        """Compute every result that is missing; each is written as soon as it is there."""
        open_qualities = self._open_qualities()
        self.progress.begin(len(open_qualities) + len(self._open_points()))
        for entry in self._open_points():
            if entry.skip_reason is not None:
                self._save_point(entry, Record(**self._fields(entry), status="skipped", reason=entry.skip_reason))
        ready = {entry.quality.digest: entry.quality for entry in self._open_points()}
        for digest in ready:
            if digest in self.qualities:
                self._compute_points(digest)
        results = self._in_processes(open_qualities, workers) if workers > 1 else self._here(open_qualities)
        for quality, outputs, error in results:
            record = Record(
                kind="quality",
                inputs=quality.inputs,
                status="done" if error is None else "failed",
                outputs=outputs,
                error=error,
                specification_digest=self.plan.specification.digest,
                command=self.command,
            )
            self.store.save(record)
            self.qualities[quality.digest] = record
            self.computed += 1
            self.progress.done()
            self._compute_points(quality.digest)

    def _here(self, qualities: Sequence[Quality]) -> Iterator[tuple[Quality, dict[str, Any], str | None]]:
        """Evaluate one after the other in this process."""
        for quality in qualities:
            subject = quality.subject
            self.progress.doing(f"{subject.name} · {quality.format.name}")
            evaluator = self.evaluators.get(subject.name)
            try:
                if evaluator is None and subject.not_runnable_reason is None and self.plan.text is not None:
                    self.evaluators.clear()  # one model in memory at a time
                    evaluator = self.evaluators[subject.name] = _evaluator(subject, self.plan.text)
                yield quality, quality_outputs(subject, quality.format, evaluator, self._wrap(quality)), None
            except Exception as error:  # whatever it is, the other results do not depend on it
                yield quality, {}, describe(error)

    def _wrap(self, quality: Quality) -> Callable[[Iterable[Any]], Iterator[Any]]:
        """Progress over the layers of one quality."""
        title = f"{quality.subject.name} · {quality.format.name}"

        def told(layers: Iterable[Any]) -> Iterator[Any]:
            for layer in layers:
                self.progress.doing(f"{title} · {layer[0]}")
                yield layer
            self.progress.doing(f"{title} · perplexity")

        return told

    def _in_processes(
        self, qualities: Sequence[Quality], workers: int
    ) -> Iterator[tuple[Quality, dict[str, Any], str | None]]:
        """Evaluate in processes, each with its own copy of the model; results come as they are finished."""
        if not qualities:
            return
        from joblib import Parallel, delayed

        path = self.plan.specification.text
        self.progress.doing(f"{workers} processes")
        tasks = (
            delayed(_evaluate_in_process)(place, entry.subject.reference, path, entry.format.name)
            for place, entry in enumerate(qualities)
        )
        parallel = Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
        for place, outputs, error in parallel(tasks):
            yield qualities[place], outputs, error

    def _fields(self, entry: Combination) -> dict[str, Any]:
        return {
            "kind": "point",
            "inputs": entry.inputs,
            "specification_digest": self.plan.specification.digest,
            "command": self.command,
        }

    def _save_point(self, entry: Combination, record: Record) -> None:
        self.store.save(record)
        self.points[entry.planned.digest] = record
        self.computed += 1
        self.progress.done()

    def _compute_points(self, quality_digest: str) -> None:
        """Simulate every open combination that has this quality."""
        quality = self.qualities[quality_digest]
        for entry in self._open_points():
            if entry.quality.digest != quality_digest:
                continue
            planned = entry.planned
            self.progress.doing(f"{planned.model} · {planned.format} · {planned.accelerator} · {planned.phase}")
            self._save_point(entry, self._point_record(entry, quality))

    def _point_record(self, entry: Combination, quality: Record) -> Record:
        fields = self._fields(entry)
        if quality.status != "done":
            return Record(**fields, status="failed", error=quality.error)
        try:
            outputs = point_outputs(entry, quality.outputs, self.plan.specification)
        except UnsupportedFormatError as error:
            return Record(**fields, status="skipped", reason=str(error))
        except Exception as error:  # whatever it is, the other points do not depend on it
            return Record(**fields, status="failed", error=describe(error))
        return Record(**fields, status="done", outputs=outputs)


def describe(error: Exception) -> str:
    """An error as a record states it: one line; the kind too, unless the message was written for the user."""
    text = " ".join(str(error).split())
    return text if isinstance(error, TermwiseError) else f"{type(error).__name__}: {text}"


def _evaluator(subject: Subject, text: Text) -> Evaluator:
    from termwise.algorithms.perplexity import Evaluator

    if subject.model is None:
        raise InputError(f"{subject.name} has no perplexity: {subject.no_weights_reason}")
    return Evaluator(subject.model, text)


def quality_outputs(
    subject: Subject,
    format: Format,
    evaluator: Evaluator | None,
    wrap: Callable[[Iterable[Any]], Iterator[Any]] | None = None,
) -> dict[str, Any]:
    """Outputs of a quality record: the errors of the weights, the perplexity, and the shape, which points need."""
    shape = asdict(subject.shape)
    if subject.model is None:
        return {
            "perplexity": None,
            "perplexity_reason": subject.no_weights_reason,
            "sqnr_db": None,
            "mse": None,
            "bits_per_weight": packed_bits_per_weight(subject.shape, format),
            "layers": [],
            "shape": shape,
        }
    calibration = default_calibration(subject.model)
    evaluation = evaluate(subject.model, format, evaluator, calibration=calibration, wrap=wrap)
    reason = subject.not_runnable_reason if evaluator is None else evaluation.reason
    quality = evaluation.quality.to_dict()
    return {"perplexity": evaluation.score, "perplexity_reason": reason, **quality, "shape": shape}


@lru_cache(maxsize=1)
def _opened_in_process(reference: str, text_path: str | None) -> tuple[Subject, Evaluator | None]:
    """The model of a worker process, loaded once for all its formats."""
    from termwise.flow.subject import open_subject

    subject = open_subject(reference)
    if subject.not_runnable_reason is not None:
        return subject, None
    return subject, _evaluator(subject, open_text(None if text_path is None else Path(text_path)))


def _evaluate_in_process(
    place: int, reference: str, text_path: str | None, format: str
) -> tuple[int, dict[str, Any], str | None]:
    """What a worker process does for one quality: its place, its outputs, its error."""
    try:
        subject, evaluator = _opened_in_process(reference, text_path)
        return place, quality_outputs(subject, get_format(format), evaluator), None
    except Exception as error:
        return place, {}, describe(error)


def shape_of(document: Mapping[str, Any]) -> ModelShape:
    """The shape that a quality record holds."""
    attention = document["attention"]
    return ModelShape(
        name=document["name"],
        linears=tuple(LinearShape(**linear) for linear in document["linears"]),
        attention=None if attention is None else AttentionShape(**attention),
        head=document["head"],
    )


def point_outputs(entry: Combination, quality: Mapping[str, Any], specification: Specification) -> dict[str, Any]:
    """Outputs of a point record: the totals of its simulation beside the quality of its format."""
    from termwise.sim.simulate import simulate

    simulation = simulate(
        shape_of(quality["shape"]),
        entry.accelerator,
        phase=check_phase(entry.planned.phase),
        weights=entry.quality.format,
        context=specification.context,
        batch=specification.batch,
    ).to_dict()
    del simulation["layers"]
    kept = ("perplexity", "perplexity_reason", "sqnr_db", "mse", "bits_per_weight")
    return {**{key: quality[key] for key in kept}, **simulation}
