"""Accuracy tables: what every format, group size and calibration method does to one model's score.

Three questions: formats of the weights; weights with activations; the cache of keys and values. Every measurement is a
record, so that a run that was interrupted goes on and one that is repeated costs nothing. What cannot be measured is
listed with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from termwise.algorithms.calibration import MAXIMUM_WINDOWS
from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.files import write_text
from termwise.algorithms.formats import BLOCK_GROUPS, Format, format_names, get_format
from termwise.algorithms.models import Model
from termwise.algorithms.text import Text
from termwise.algorithms.user_datatypes import definitions_of
from termwise.flow.console import number
from termwise.flow.quality import Calibration, evaluate, score
from termwise.flow.quantization import load_evaluator
from termwise.flow.records import DIGEST_PACKAGES, Record, RecordStore, package_version, source_digest, to_json

if TYPE_CHECKING:
    from termwise.flow.quality import AnyEvaluator

Table = Literal["weights", "activations", "cache"]

GROUPS: Final = (128, 64, 32)
METHODS: Final = ("none", "gptq")
ACTIVATIONS: Final = (
    *("int-w8a8", "int-w4a8g128", "int-w4a4g128", "bitmod-w4a8g128", "bitmod-w3a8g128", "olive-w8a8", "olive-w4a4"),
    *("ant-w8a8", "ant-w4a4", "mxfp8_e4m3-w8a8", "mxfp4-w4a8", "mxfp4-w4a4", "nvfp4-w4a4"),
)
SMOOTHED: Final = ("int-w8a8", "int-w4a4g128", "olive-w4a4")
"""Formats with activations that are measured with SmoothQuant as well."""

CACHES: Final = (
    *(f"kv:int-asym-w{bits}g32" for bits in (8, 4, 3, 2)),
    *(f"kv:keys=int-asym-w{bits}@token,values=int-asym-w{bits}@token" for bits in (8, 4, 3, 2)),
    *("kv:int-w4g32", "kv:bitmod-w4g32", "kv:bitmod-w3g32", "kv:ant-w4g32", "kv:fp6_e2m3-w6g32"),
)

PAPER_COLUMNS: Final = tuple(
    f"{model}, {text}"
    for text in ("Wikitext-2", "C4")
    for model in ("OPT-1.3B", "Phi-2", "Yi-6B", "Llama-2-7B", "Llama-2-13B", "Llama-3-8B")
)
PAPER_PERPLEXITY: Final[Mapping[int, Mapping[str, Sequence[float]]]] = {
    4: {
        "ant": (16.23, 11.23, 6.87, 6.09, 5.31, 7.58, 16.08, 14.31, 10.95, 7.71, 6.91, 11.04),
        "olive": (15.38, 10.49, 6.55, 5.91, 5.13, 6.89, 15.82, 13.51, 9.84, 7.34, 6.74, 9.91),
        "mxfp4": (15.39, 10.72, 6.62, 5.82, 5.11, 7.04, 15.81, 13.72, 10.24, 7.39, 6.71, 10.13),
        "int-asym": (15.41, 10.67, 6.32, 5.77, 5.01, 6.84, 15.74, 13.65, 9.69, 7.31, 6.62, 9.79),
        "bitmod": (14.89, 10.48, 6.23, 5.72, 5.01, 6.73, 15.29, 13.53, 9.58, 7.26, 6.61, 9.66),
    },
    3: {
        "ant": (340.6, 15.57, 9.01, 8.51, 6.40, 15.22, 332.9, 18.35, 14.32, 10.28, 7.98, 17.56),
        "int-asym": (139.4, 13.92, 8.66, 7.08, 5.64, 13.26, 144.9, 16.79, 13.33, 9.29, 7.35, 17.80),
        "bitmod": (22.67, 12.91, 7.66, 6.55, 5.50, 8.96, 20.47, 15.69, 11.98, 8.36, 7.18, 12.82),
    },
}
"""BitMoD Table VI: perplexity at groups of 128 (MX: 32), by bits and type, in the order of ``PAPER_COLUMNS``."""

COMPARED: Final[Mapping[int, Mapping[str, str]]] = {
    4: {
        "ant": "ant-w4g128",
        "olive": "olive-w4g128",
        "mxfp4": "mxfp4",
        "int-asym": "int-asym-w4g128",
        "bitmod": "bitmod-w4g128",
    },
    3: {"ant": "ant-w3g128", "int-asym": "int-asym-w3g128", "bitmod": "bitmod-w3g128"},
}
"""Our format for each type of the table. OliVe has no 3-bit format: its paper defines none."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing to measure: a format of the weights, a calibration method, a format of the cache."""

    table: Table
    format: str
    method: str = "none"
    cache: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a measurement: the score, or why there is none."""

    measurement: Measurement
    score: float | None
    bits: float | None
    sqnr_db: float | None
    output_error: float | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, on what.

    Attributes:
        model: a language model or an encoder of sentences.
        text: what the score is measured on.
        calibration: text for calibrated methods and static scales of activations; None leaves these out.
        calibration_windows: windows of it that are read at most.
        measurements: in the order of the report.
        skipped: measurements that are left out, with the reason.
    """

    model: Model
    text: Text
    calibration: Text | None
    calibration_windows: int
    measurements: tuple[Measurement, ...]
    skipped: tuple[tuple[Measurement, str], ...] = field(default=())

    @property
    def score_name(self) -> str:
        """What the score is, with the direction that is better."""
        return "perplexity per token" if self.model.runnable else "mean cosine of the embeddings"


def with_groups(name: str, groups: Sequence[int]) -> list[str]:
    """A format without a group in every group size that it has; its row as one group where that is how it is made."""
    base = name.split("-w")[0]
    if base in BLOCK_GROUPS or base in ("gobo", "fp16"):
        return [name]
    whole = [name] if base in ("olive", "ant") else []
    return [*whole, *(f"{name}g{group}" for group in groups)]


def plan_accuracy(
    model: Model,
    text: Text,
    calibration: Text | None,
    *,
    formats: Sequence[str] = (),
    groups: Sequence[int] = GROUPS,
    methods: Sequence[str] = METHODS,
    calibration_windows: int = MAXIMUM_WINDOWS,
) -> Plan:
    """What to measure of ``model``: by default every format and width in all ``groups``.

    Args:
        model: a language model or an encoder of sentences.
        text: what the score is measured on; of an encoder every document is a sentence.
        calibration: another text.
        formats: names without a group, or with one, in the place of all.
        groups: sizes of groups.
        methods: of calibration, ``none`` among them.
        calibration_windows: windows of the calibration text that are read at most.

    Raises ``InputError`` for a model that cannot be run, and for unknown names.
    """
    from termwise.algorithms.calibrated import get_method

    if not model.runnable and model.no_embedding_reason is not None:
        raise InputError(f"{model.name} cannot be run: {model.not_runnable_reason}")
    for method in methods:
        get_method(method)
    bases = formats or tuple(name.removesuffix("g128") for name in format_names())
    grouped = [[base] if get_format(base).group_size else with_groups(base, groups) for base in bases]
    weights = [get_format(name).name for names in grouped for name in names]
    if calibration is not None and set(text.documents) & set(calibration.documents):
        raise InputError(f"{calibration.name} and {text.name} share a document; expected another calibration text")
    measurements: list[Measurement] = []
    skipped: list[tuple[Measurement, str]] = []
    for method in methods:
        for name in dict.fromkeys(weights):
            entry = Measurement(table="weights", format=name, method=method)
            if method == "none" or calibration is not None:
                measurements.append(entry)
            else:
                skipped.append((entry, "no calibration text"))
    if not formats:
        for name in ACTIVATIONS:
            measurements.append(Measurement(table="activations", format=get_format(name).name))
        if calibration is not None:
            measurements += [Measurement(table="activations", format=name, method="smoothquant") for name in SMOOTHED]
        if model.runnable:
            measurements += [Measurement(table="cache", format="fp16", cache=name) for name in CACHES]
    return Plan(
        model=model,
        text=text,
        calibration=calibration,
        calibration_windows=calibration_windows,
        measurements=tuple(measurements),
        skipped=tuple(skipped),
    )


def _inputs(plan: Plan, entry: Measurement) -> dict[str, Any]:
    """Everything that a measurement depends on."""
    calibrated = entry.method != "none" or entry.table == "activations"
    return {
        "study": "accuracy",
        "model": plan.model.digest,
        "text": plan.text.digest,
        "calibration_text": plan.calibration.digest if calibrated and plan.calibration is not None else None,
        "calibration_windows": plan.calibration_windows if calibrated else None,
        "format": entry.format,
        "method": entry.method,
        "cache": entry.cache,
        "datatypes": definitions_of([get_format(entry.format)]),
        "source": source_digest("termwise.algorithms"),
        "versions": {name: package_version(name) for name in DIGEST_PACKAGES},
    }


def measure(
    plan: Plan,
    folder: Path,
    *,
    command: str,
    warn: Callable[[str], None],
    wrap: Callable[[Iterable[Measurement], int], Iterator[Measurement]],
    only_measured: bool = False,
) -> list[Result]:
    """Every result of ``plan``; what is in ``folder`` already is read, the rest is measured and kept there.

    With ``only_measured`` the rest is listed as not run.

    Raises ``InputError`` where the folder cannot be written, or the model or text cannot be read.
    """
    store = RecordStore(folder, warn)
    records: dict[Measurement, Record] = {}
    for entry in plan.measurements:
        wanted = Record(kind="quality", inputs=_inputs(plan, entry), status="done")
        found = store.load("quality", wanted.digest)
        if found is not None and found.status != "failed":
            records[entry] = found
    skipped = list(plan.skipped)
    missing = [entry for entry in plan.measurements if entry not in records]
    if only_measured:
        skipped += [(entry, "not run yet") for entry in missing]
        missing = []
    evaluator = load_evaluator(plan.model, plan.text) if missing else None
    for entry in wrap(missing, len(missing)):
        assert evaluator is not None
        record = _measured(plan, entry, evaluator, command)
        store.save(record)
        records[entry] = record
    results = [_result(entry, records[entry]) for entry in plan.measurements if entry in records]
    return results + [
        Result(measurement=entry, score=None, bits=None, sqnr_db=None, output_error=None, reason=reason)
        for entry, reason in skipped
    ]


def _measured(plan: Plan, entry: Measurement, evaluator: AnyEvaluator, command: str) -> Record:
    """One record; a format that a model or a method does not take is skipped with the reason."""
    fields: dict[str, Any] = {"kind": "quality", "inputs": _inputs(plan, entry), "command": command}
    try:
        return Record(**fields, status="done", outputs=_outputs(plan, entry, evaluator))
    except TermwiseError as error:  # the format, or what the model makes of it
        return Record(**fields, status="skipped", reason=str(error))
    except Exception as error:  # whatever it is, the other measurements do not depend on it
        return Record(**fields, status="failed", error=f"{type(error).__name__}: {error}")


def _outputs(plan: Plan, entry: Measurement, evaluator: AnyEvaluator) -> dict[str, Any]:
    """Score, bits and errors of one measurement."""
    from termwise.algorithms.calibrated import get_method
    from termwise.algorithms.kv_cache import get_cache_format

    if entry.cache is not None:
        from termwise.algorithms.perplexity import Evaluator

        assert isinstance(evaluator, Evaluator)
        cache = get_cache_format(entry.cache)
        try:
            evaluator.quantize_cache(cache)
            value = score(evaluator)
        finally:
            evaluator.restore()
        attention = plan.model.shape.attention
        bits = None if attention is None else cache.bits_per_value(evaluator.window_tokens, attention.head_size)
        finite = math.isfinite(value)
        reason = None if finite else "the perplexity is not a finite number"
        return {
            "score": value if finite else None,
            "score_reason": reason,
            "bits": bits,
            "sqnr_db": None,
            "output_error": None,
        }
    calibration = None
    if plan.calibration is not None:
        method = None if entry.method == "none" else get_method(entry.method)
        calibration = Calibration(text=plan.calibration, method=method, windows=plan.calibration_windows)
    found = evaluate(plan.model, get_format(entry.format), evaluator, calibration=calibration)
    errors = [layer.output_error for layer in found.quality.layers if layer.output_error is not None]
    return {
        "score": found.score,
        "score_reason": found.reason,
        "bits": found.quality.bits_per_weight,
        "sqnr_db": found.quality.sqnr_db,
        "output_error": sum(errors) / len(errors) if errors else None,
    }


def _result(entry: Measurement, record: Record) -> Result:
    outputs = record.outputs
    return Result(
        measurement=entry,
        score=outputs.get("score"),
        bits=outputs.get("bits"),
        sqnr_db=outputs.get("sqnr_db"),
        output_error=outputs.get("output_error"),
        reason=record.reason or record.error or outputs.get("score_reason"),
    )


def order_agreement(ours: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[float, list[str]]:
    """Kendall's tau between two rankings of the same names, lower first, and the pairs that they rank differently.

    A pair that is equal in one of them counts for neither.
    """
    total, disagreeing = 0, []
    pairs = list(combinations(sorted(set(ours) & set(theirs)), 2))
    for one, other in pairs:
        here, there = ours[one] - ours[other], theirs[one] - theirs[other]
        agrees = (here > 0) == (there > 0) if here and there else None
        total += 0 if agrees is None else 1 if agrees else -1
        if agrees is False:
            better, worse = (one, other) if here < 0 else (other, one)
            disagreeing.append(f"{better} before {worse} here, behind it there")
    return total / len(pairs) if pairs else math.nan, disagreeing


def document_of(plan: Plan, results: Sequence[Result], evaluator: AnyEvaluator, command: str) -> dict[str, Any]:
    """All results, ready for JSON, with the score of the model's own weights, which ``evaluator`` has in place."""
    return {
        "command": command,
        "model": plan.model.name,
        "model_digest": plan.model.digest,
        "score": plan.score_name,
        "original_score": score(evaluator),
        "text": {"name": plan.text.name, "digest": plan.text.digest, **_read(evaluator)},
        "calibration_text": None
        if plan.calibration is None
        else {
            "name": plan.calibration.name,
            "digest": plan.calibration.digest,
            "maximum_windows": plan.calibration_windows,
        },
        "results": [
            {
                "table": result.measurement.table,
                "format": result.measurement.format,
                "method": result.measurement.method,
                "cache": result.measurement.cache,
                "score": result.score,
                "bits": result.bits,
                "sqnr_db": result.sqnr_db,
                "output_error": result.output_error,
                "reason": result.reason,
            }
            for result in results
        ],
    }


def _read(evaluator: AnyEvaluator) -> dict[str, int]:
    """How much of the text the score is over."""
    sequences = evaluator.sequences()
    tokens = sum(len(sequence) for sequence in sequences)
    return {"sequences": len(sequences), "tokens": tokens, "window_tokens": evaluator.window_tokens}


def write_accuracy(document: Mapping[str, Any], folder: Path) -> None:
    """``report.md``, ``results.json``, ``accuracy.png`` and ``accuracy.svg`` in ``folder``."""
    from termwise.flow.figures import draw_accuracy

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; expected a writable place") from error
    draw_accuracy(document, folder)
    write_text(folder / "results.json", to_json(document))
    write_text(folder / "report.md", report_text(document))


def report_text(document: Mapping[str, Any]) -> str:
    """The report as Markdown; line 1 is the command that makes it again."""
    results = document["results"]
    lines = [f"`{document['command']}`", "", f"# Accuracy of {document['model']}", ""]
    kind = document["score"]
    encoder = "cosine" in kind
    if encoder:
        lines += [f"{document['model']} is an encoder of sentences: it predicts no tokens and has no perplexity.", ""]
    better = "higher is better, 1 is no loss" if encoder else "lower is better"
    lines += [
        f"Score: {kind} on {document['text']['name']} ({better}). With the model's own weights: "
        f"**{number(document['original_score'], 5)}**, over {document['text']['tokens']:,} tokens in "
        f"{document['text']['sequences']:,} sequences of at most {document['text']['window_tokens']:,}. "
        "Every linear layer is quantized, the head among them. Bits are "
        "per weight (of a cache per value), counted from the packed bytes with scales and selectors. A group larger "
        "than a row is the row; the last group of a row may be short.",
        "",
    ]
    if document["calibration_text"] is not None:
        lines += [
            f"Calibration text: {document['calibration_text']['name']}, which shares no document with it; at most "
            f"{document['calibration_text']['maximum_windows']} windows, spread evenly over it.",
            "",
        ]
    lines += ["![score against bits per weight](accuracy.png)", ""]
    lines += _weights_section(results)
    lines += _comparison_section(document)
    for table, title, column in (
        ("activations", "Weights and activations", "format"),
        ("cache", "Cache of keys and values, weights in floating point", "cache"),
    ):
        rows = [entry for entry in results if entry["table"] == table]
        if rows:
            lines += [f"## {title}", "", f"| {column} | method | bits | score |", "|---|---|---|---|"]
            lines += [
                f"| {entry[column]} | {entry['method']} | {number(entry['bits'])} | {_cell(entry)} |" for entry in rows
            ]
            lines.append("")
    lines += _not_measured_section(results)
    return "\n".join(lines).rstrip() + "\n"


def _not_measured_section(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every reason with the formats, without their groups, and the methods that it holds for."""
    methods: dict[tuple[str, str], dict[str, None]] = {}
    for entry in results:
        if entry["score"] is None:
            name = entry["cache"] or _without_group(get_format(entry["format"]))[0]
            methods.setdefault((entry["reason"] or "no finite score", name), {})[entry["method"]] = None
    names: dict[tuple[str, str], list[str]] = {}
    for (reason, name), used in methods.items():
        names.setdefault((reason, ", ".join(used)), []).append(name)
    lines = [f"* {reason} ({used}): {', '.join(found)}" for (reason, used), found in names.items()]
    return ["## Not measured", "", *lines, ""] if lines else []


def _cell(entry: Mapping[str, Any]) -> str:
    return "–" if entry["score"] is None else number(entry["score"], 5)


def _weights_section(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table per calibration method: a row per format without its group, a column per group."""
    lines: list[str] = []
    for method in dict.fromkeys(entry["method"] for entry in results if entry["table"] == "weights"):
        entries = [entry for entry in results if entry["table"] == "weights" and entry["method"] == method]
        measured = [entry for entry in entries if entry["score"] is not None]
        if not measured:
            continue
        rows: dict[str, dict[str, Mapping[str, Any]]] = {}
        columns: dict[str, None] = {}
        for entry in measured:
            format = get_format(entry["format"])
            base, group = _without_group(format)
            rows.setdefault(base, {})[group] = entry
            columns[group] = None
        ordered = sorted(
            columns, key=lambda group: -int(group) if group.isdigit() else -(10**6) if group == "row" else 1
        )
        lines += [f"## Formats of the weights, {'round to nearest' if method == 'none' else method}", ""]
        lines += ["Score, and bits per weight beside it.", ""]
        titles = {"row": "row or matrix", "own": "its own"}
        lines.append(f"| format | {' | '.join(titles.get(group, f'group {group}') for group in ordered)} |")
        lines.append("|---|" + "---|" * len(ordered))
        for base, found in rows.items():
            cells = []
            for group in ordered:
                shown = found.get(group)
                cells.append("" if shown is None else f"{_cell(shown)} ({number(shown['bits'])})")
            lines.append(f"| {base} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _without_group(format: Format) -> tuple[str, str]:
    """Name without the group, and the group as a column: a number, ``row``, or ``own`` for block formats and GOBO."""
    if format.type_name in BLOCK_GROUPS or format.family in ("gobo", "fp16"):
        return format.name, "own"
    if format.group_size is None:
        return format.name, "row"
    return format.name.replace(f"g{format.group_size}", "", 1), str(format.group_size)


def compared_scores(document: Mapping[str, Any], bits: int) -> dict[str, float]:
    """Score of every type of ``COMPARED`` in its largest group, less is better (a cosine is negated)."""
    sign = -1 if "cosine" in document["score"] else 1
    plain = {
        entry["format"]: entry["score"]
        for entry in document["results"]
        if (entry["table"], entry["method"]) == ("weights", "none") and entry["score"] is not None
    }
    found = {}
    for name, format in COMPARED[bits].items():
        for group in GROUPS:
            named = format.replace("g128", f"g{group}")
            if named in plain:
                found[name] = sign * plain[named]
                break
    return found


def index_text(documents: Sequence[Mapping[str, Any]], command: str) -> str:
    """The page above the reports of several models: their commands, and their orders beside the paper's."""
    lines = [f"`{command}`", "", "# Accuracy of the formats", ""]
    lines += ["| model | score | own weights | report | made by |", "|---|---|---|---|---|"]
    for document in documents:
        folder = document["model"].replace("/", "-")
        lines.append(
            f"| {document['model']} | {document['score']} | {number(document['original_score'], 5)} | "
            f"[report]({folder}/report.md) | `{document['command']}` |"
        )
    lines += ["", "Of the encoder the score is a cosine: it predicts no tokens.", ""]
    for bits, formats in COMPARED.items():
        lines += [f"## {bits} bits: the order of BitMoD's Table VI", ""]
        lines += [
            f"Formats: {', '.join(formats.values())}; or the largest group measured; round to nearest.",
            "",
        ]
        lines += [
            "| model | best first | mean tau over the paper's columns | pairs that no column of the paper orders so |"
        ]
        lines += ["|---|---|---|---|"]
        for document in documents:
            ours = compared_scores(document, bits)
            order = sorted(ours, key=lambda name: ours[name])
            columns = [
                {name: scores[place] for name, scores in PAPER_PERPLEXITY[bits].items()}
                for place in range(len(PAPER_COLUMNS))
            ]
            found = [order_agreement(ours, theirs) for theirs in columns]
            never = set.intersection(*(set(disagreeing) for _, disagreeing in found))
            mean = sum(tau for tau, _ in found) / len(found)
            told = "; ".join(sorted(pair.partition(" here")[0] for pair in never)) or "none"
            lines.append(f"| {document['model']} | {', '.join(order)} | {mean:+.2f} | {told} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _comparison_section(document: Mapping[str, Any]) -> list[str]:
    """Our order of the types of BitMoD's Table VI beside the paper's."""
    lines: list[str] = []
    for bits in COMPARED:
        ours = compared_scores(document, bits)
        if len(ours) < 2:
            continue
        if not lines:
            lines += [
                "## Order of the types, beside BitMoD's Table VI",
                "",
                "Groups of 128 or the largest measured (MX: 32), round to nearest. Kendall's tau is 1 for the same "
                "order, -1 for the reverse; a pair that is equal in the paper counts for neither. "
                "The paper's MX-FP4 is not OCP's: its authors' script puts the largest level of a group at twice its "
                "power of two, whatever the type, so that its grid is another one; ours follows OCP v1.0. The paper's "
                "3-bit OliVe is not compared: OliVe's paper defines no 3-bit pair.",
                "",
            ]
        order = sorted(ours, key=lambda name: ours[name])
        shown = ", ".join(f"{name} {number(abs(ours[name]), 5)}" for name in order)
        lines += [f"{bits} bits, best first: {shown}.", ""]
        for place, model in enumerate(PAPER_COLUMNS):
            theirs = {name: columns[place] for name, columns in PAPER_PERPLEXITY[bits].items()}
            tau, disagreeing = order_agreement(ours, theirs)
            told = "; ".join(disagreeing) or "no pair the other way round"
            lines.append(f"* {model}: tau {tau:+.2f}; {told}")
        lines.append("")
    return lines
