"""One quantization of one model: layers, score before and after, packed model, report with a figure.

With ``out`` every finished layer is on the disk before the next one begins, so the same command goes on where an
earlier one was stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from termwise.algorithms.errors import InputError
from termwise.algorithms.files import write_text
from termwise.algorithms.formats import Format
from termwise.algorithms.kv_cache import KeyValueCacheFormat
from termwise.algorithms.models import Model
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.text import Text
from termwise.flow.console import number
from termwise.flow.quality import Calibration, WeightQuality, Wrap, check_calibration, evaluate, score

if TYPE_CHECKING:
    from termwise.flow.quality import AnyEvaluator

REPORT_FOLDER = "quantization-report"
_MEMORY_PER_WEIGHT = 9
"""Bytes of memory per weight while a score is measured: two float32 models, and room for the activations."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to do.

    Attributes:
        model: the model.
        formats: of all linear layers, or by name of those that are quantized.
        text: what the score is measured on; None for no score.
        no_score_reason: why ``text`` is None.
        calibration: what is measured before the quantization.
        cache: format of the keys and values; None leaves them in floating point.
        out: new directory for the packed model.
        report: folder for the report; None for none but in ``out``.
        swap: whether the model then generates with layers that stay packed, in the place of its own.
    """

    model: Model
    formats: Format | Mapping[str, Format]
    text: Text | None
    no_score_reason: str | None = None
    calibration: Calibration | None = None
    cache: KeyValueCacheFormat | None = None
    out: Path | None = None
    report: Path | None = None
    swap: bool = False

    @property
    def format_name(self) -> str:
        """Name of the format, or ``mixed``."""
        return self.formats.name if isinstance(self.formats, Format) else "mixed"

    @property
    def method(self) -> str | None:
        """Name of the calibration method; ``none`` where only output errors are measured, None where nothing is."""
        return None if self.calibration is None or self.calibration.method is None else self.calibration.method.name


def memory_reason(model: Model) -> str | None:
    """Why the score of ``model`` cannot be measured in the memory that is free; None if it can, or nobody knows."""
    weights = sum(linear.outputs * linear.inputs for linear in model.structure.linears)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    needed = weights * _MEMORY_PER_WEIGHT
    if needed <= free:
        return None
    return f"it takes about {needed / 2**30:.0f} GiB of memory to run {model.name}, and {free / 2**30:.0f} GiB are free"


def load_evaluator(model: Model, text: Text) -> AnyEvaluator:
    """The model in memory with the text: perplexity of a language model, embeddings of an encoder."""
    from termwise.algorithms.embeddings import EmbeddingEvaluator
    from termwise.algorithms.perplexity import Evaluator

    return Evaluator(model, text) if model.runnable else EmbeddingEvaluator(model, text)


def quantize_model(
    request: Request, *, wrap: Wrap | None = None, say: Callable[[str], None]
) -> tuple[dict[str, Any], WeightQuality]:
    """Do what ``request`` says; the document of the result, ready for JSON, and the quality of the layers.

    Raises ``InputError`` as ``evaluate``, ``PackedModelWriter`` and the evaluators do.
    """
    model, text = request.model, request.text
    if text is not None:
        check_calibration(request.formats, request.calibration)
    encoder = not model.runnable and model.no_embedding_reason is None
    measure = "cosine" if encoder else "perplexity"
    evaluator: AnyEvaluator | None = None
    before: float | None = None
    packed: dict[str, QuantizedTensor] = {}
    with ExitStack() as stack:
        writer = None
        if request.out is not None:
            from termwise.algorithms.packed_model import PackedModelWriter

            settings = {"calibration_method": request.method or "none"}
            if request.method is not None and request.calibration is not None:
                settings["calibration_text"] = request.calibration.text.digest
                settings["calibration_windows"] = str(request.calibration.windows)
            writer = stack.enter_context(PackedModelWriter(model, request.formats, request.out, settings))
        if text is not None:
            say(f"{measure} of {model.name} on {text.name}")
            evaluator = load_evaluator(model, text)
            before = score(evaluator)
            if request.cache is not None:
                evaluator.quantize_cache(request.cache)  # type: ignore[union-attr]  # checked by the command
        evaluation = evaluate(
            model,
            request.formats,
            evaluator,
            calibration=request.calibration,
            store=writer,
            wrap=wrap,
            told=packed.__setitem__ if request.swap else lambda _, __: None,
        )
        if writer is not None:
            writer.finish()
    reason = request.no_score_reason if evaluator is None else evaluation.reason
    document: dict[str, Any] = {
        "model": model.name,
        "model_digest": model.digest,
        "format": request.format_name,
        "calibration": request.method,
        "calibration_text": None if request.calibration is None else _text(request.calibration.text),
        "kv_cache": None if request.cache is None else request.cache.name,
        **evaluation.quality.to_dict(),
        "perplexity": None,
        "cosine": None,
        "perplexity_reason": f"{model.name} is an encoder" if encoder else reason,
        "text": None if text is None else _text(text),
        "out": None if request.out is None else str(request.out),
    }
    if evaluator is not None and reason is None:
        document[measure] = {"before": before, "after": evaluation.score}
    document["score_reason"] = reason
    document["swap"] = None
    if request.swap:
        from termwise.flow.swapped import generate

        assert text is not None
        say(f"{model.name} with packed layers")
        document["swap"] = generate(model, packed, text)
    folder = request.report or (None if request.out is None else request.out / REPORT_FOLDER)
    document["report"] = None if folder is None else str(folder)
    if folder is not None:
        write_report(document, evaluation.quality, folder)
    return document, evaluation.quality


def _text(text: Text) -> dict[str, str]:
    return {"name": text.name, "digest": text.digest}


def score_sentence(document: Mapping[str, Any]) -> str:
    """The score before and after, or why there is none."""
    for key, name in (("perplexity", "perplexity per token"), ("cosine", "mean cosine of the embeddings")):
        found = document[key]
        if found is not None:
            before, after = number(found["before"]), number(found["after"])
            return f"{name} on {document['text']['name']}: {before} before, {after} after"
    return f"no perplexity: {document['score_reason']}"


def swap_sentence(document: Mapping[str, Any]) -> str:
    """What the model said with packed layers, and how far that is from the same model with dequantized weights."""
    found = document["swap"]
    prompt, text = (" ".join(found[key].split()) for key in ("prompt", "text"))
    same = (
        "the same" if found["same_tokens"] == found["tokens"] else f"{found['same_tokens']} of {found['tokens']} tokens"
    )
    difference = f"logits differ by {found['logit_difference']:.2g} of {found['logit_range']:.3g} at most"
    return (
        f"{found['layers']} packed layers on {found['device']} go on from “{prompt}” with “{text}”: {same} as with "
        f"dequantized weights, {difference}"
    )


def layer_columns(quality: WeightQuality) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of layers."""
    mixed = len({layer.format for layer in quality.layers}) > 1
    measured = any(layer.output_error is not None for layer in quality.layers)
    labels = list(quality.histogram)
    noted = any(layer.note for layer in quality.layers)
    titles = ["layer", *(["format"] if mixed else []), "outputs", "inputs", "bits per weight", "SQNR (dB)"]
    titles += ["mean squared error", *(["output error"] if measured else [])]
    titles += [*(f"{label} (%)" for label in labels), *(["note"] if noted else [])]
    rows = []
    for layer in quality.layers:
        row = [layer.name, *([layer.format] if mixed else []), f"{layer.shape[0]:,}", f"{layer.shape[1]:,}"]
        row += [f"{layer.bits_per_weight:.4f}", "exact" if layer.sqnr_db is None else f"{layer.sqnr_db:.2f}"]
        row += [f"{layer.mse:.3e}"]
        if measured:
            row.append("–" if layer.output_error is None else f"{layer.output_error:.3e}")
        row += [f"{100 * layer.histogram[label]:.2f}" if label in layer.histogram else "–" for label in labels]
        rows.append([*row, *([layer.note] if noted else [])])
    return titles, rows


def summary_sentence(quality: WeightQuality) -> str:
    """All weights in one sentence."""
    lost = "exact" if quality.sqnr_db is None else f"SQNR {quality.sqnr_db:.2f} dB"
    return (
        f"all {quality.weights:,} weights of {len(quality.layers)} layers: {quality.bits_per_weight:.4f} bits per "
        f"weight, {quality.packed_bytes:,} bytes, {lost}"
    )


def write_report(document: Mapping[str, Any], quality: WeightQuality, folder: Path) -> None:
    """``report.md``, ``quantization.json`` and ``layers.png`` and ``.svg`` in ``folder``."""
    import json

    from termwise.flow.figures import draw_layers

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; expected a writable place") from error
    title = f"{document['model']} in {document['format']}"
    titles, rows = layer_columns(quality)
    lines = [f"# {title}", "", summary_sentence(quality) + ".", "", score_sentence(document) + ".", ""]
    if document["calibration_text"] is not None:
        method = {None: "scales of activations", "none": "output errors"}
        used = method.get(document["calibration"], document["calibration"])
        lines += [f"Calibration: {used} on {document['calibration_text']['name']}.", ""]
    if document["kv_cache"] is not None:
        lines += [f"Keys and values: {document['kv_cache']}.", ""]
    lines += ["![layers](layers.png)", "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    draw_layers(title, quality.layers, folder)
    write_text(folder / "quantization.json", json.dumps(document, indent=2) + "\n")
    write_text(folder / "report.md", "\n".join(lines) + "\n")
