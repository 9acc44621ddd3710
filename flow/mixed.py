"""A format per layer from a budget of bits per weight: the result as JSON, Markdown and figure.

``mix`` is the body of a command; it prints nothing. The document that it returns has the table ``formats``, so that a
file of it can be read wherever a format per layer is taken (see ``algorithms.assignment``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from termwise.algorithms.assignment import format_names_of, write_assignment
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.mixed_precision import (
    Evolution,
    Gram,
    MixedChoice,
    Outcome,
    Progress,
    Sensitivity,
    choose_formats,
    no_progress,
    share_of,
)
from termwise.algorithms.models import Model
from termwise.algorithms.text import Text
from termwise.flow import figures
from termwise.flow.console import number
from termwise.flow.records import strict, versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_FORMATS: Final = ("bitmod-w3g128", "bitmod-w4g128", "int-w6g128", "int-w8g128")
"""What may be chosen unless other formats are named."""

CALIBRATION_BYTES: Final = 1 << 16
"""Bytes of calibration text that are read, unless another number is asked for."""

_NAMED_LAYERS: Final = 64
"""A figure of more layers than this has their numbers instead of their names."""


def limited(text: Text, size_bytes: int) -> Text:
    """``text``, or a share of it, spread evenly, of about ``size_bytes``. Raises ``InputError`` for less than one."""
    if size_bytes < 1:
        raise InputError(f"a calibration on {size_bytes} bytes of text; expected at least one")
    found = sum(len(document.encode()) for document in text.documents)
    return text if found <= size_bytes else share_of(text, size_bytes / found)


def gram_matrices(model: Model, text: Text) -> Iterator[tuple[str, Gram]]:
    """Xᵀ X of every linear layer's input X [tokens, inputs] on ``text``, block by block: float64 [inputs, inputs].

    Raises ``InputError`` as ``Calibration`` does.
    """
    from termwise.algorithms.calibration import Calibration

    for stage in Calibration(model, text, quantized_inputs=False).stages():
        for shared in stage.statistics():
            for layer in shared.layers:
                yield layer, shared.statistics.gram


def mix(
    model: Model,
    *,
    bits_per_weight: float,
    calibration: Text,
    evaluation: Text,
    formats: Sequence[str] = DEFAULT_FORMATS,
    sensitivity: Sensitivity = "loss",
    evolution: Evolution | None = None,
    calibration_bytes: int = CALIBRATION_BYTES,
    out: Path | None = None,
    figure: Path | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Choose a format for every layer of ``model``; see ``choose_formats`` for the arguments of the same name.

    Args:
        model: one that can be run.
        bits_per_weight: the budget.
        calibration: what the choice is made on; of a longer text about ``calibration_bytes`` are read.
        evaluation: what the result is measured on; it has no document of ``calibration``.
        formats: names of the formats to choose from.
        sensitivity: ``loss`` or ``output``.
        evolution: settings of the search.
        calibration_bytes: see ``calibration``.
        out: file for the formats, ``.toml`` or ``.json``.
        figure: folder for ``mixed.png`` and ``mixed.svg``.
        progress: told of every step.

    Returns: the document of ``to_document``, ready for JSON, with the paths of what was written.
    Raises ``InputError`` as ``choose_formats``, ``get_format`` and ``write_assignment`` do.
    """
    if out is not None and out.suffix not in (".toml", ".json"):  # before hours of work
        raise InputError(f"{out} ends in {out.suffix!r}; expected a file .toml or .json for the formats")
    part = limited(calibration, calibration_bytes)
    choice = choose_formats(
        model,
        [get_format(name) for name in formats],
        bits_per_weight=bits_per_weight,
        calibration=part,
        evaluation=evaluation,
        sensitivity=sensitivity,
        grams=gram_matrices(model, part) if sensitivity == "output" else None,
        evolution=evolution,
        progress=progress,
    )
    document = to_document(choice)
    if out is not None:
        write_assignment(choice.chosen.assignment, out)
        document["out"] = str(out)
    if figure is not None:
        document["figures"] = [str(path) for path in draw(choice, figure)]
    return {"model": model.name, "model_digest": model.digest, **document}


def to_document(choice: MixedChoice) -> dict[str, Any]:
    """The result, ready for JSON: losses in nats per token, perplexity per token, None where there is none."""
    candidates = choice.candidates
    document: dict[str, Any] = strict(
        {
            "budget_bits_per_weight": choice.budget,
            "bits_per_weight": choice.chosen.bits_per_weight,
            "formats": format_names_of(choice.chosen.assignment),
            "chosen_by": choice.chosen.label,
            "perplexity": choice.chosen.perplexity,
            "perplexity_gain": choice.gain,
            "original": {"calibration_loss": choice.original_loss, "perplexity": choice.original_perplexity},
            "uniform_within": _outcome(choice.within),
            "uniform_above": _outcome(choice.above),
            "integer_program": {
                **(_outcome(choice.integer) or {}),
                "formats": format_names_of(choice.integer.assignment),
                "sensitivity": choice.program.sensitivity,
                "bound": choice.program.bound,
                "predicted_calibration_loss": choice.predicted_loss,
            },
            "evolution": {"seed": choice.seed, "calibration_loss_by_generation": choice.history},
            "sensitivity": choice.sensitivity,
            "layers": [
                {
                    "name": layer,
                    "weights": weights,
                    "format": choice.chosen.assignment[layer].name,
                    "bits_per_weight": bits,
                    "sensitivity": dict(
                        zip((entry.name for entry in candidates.formats), map(float, row), strict=True)
                    ),
                }
                for layer, weights, bits, row in zip(
                    candidates.layers,
                    candidates.weights,
                    _layer_bits(choice),
                    choice.sensitivities,
                    strict=True,
                )
            ],
            "evaluations": choice.evaluations,
            "calibration": {"name": choice.calibration[0], "digest": choice.calibration[1]},
            "evaluation": {"name": choice.evaluation[0], "digest": choice.evaluation[1]},
            "versions": versions(),
        }
    )
    return document


def _outcome(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    return {
        "label": outcome.label,
        "bits_per_weight": outcome.bits_per_weight,
        "calibration_loss": outcome.calibration_loss,
        "perplexity": outcome.perplexity,
    }


def _layer_bits(choice: MixedChoice) -> list[float]:
    """Bits per weight of every layer in the format chosen for it."""
    candidates = choice.candidates
    places = [candidates.formats.index(choice.chosen.assignment[layer]) for layer in candidates.layers]
    return [
        int(candidates.bits[row, place]) / weights
        for row, (place, weights) in enumerate(zip(places, candidates.weights, strict=True))
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """A section on a result, from the document of ``mix`` or ``to_document``."""
    program, within = document["integer_program"], document["uniform_within"]
    rows = [("the model's own weights", None, document["original"])]
    rows += [(f"`{entry['label']}`", entry["bits_per_weight"], entry) for entry in (within,) if entry]
    rows.append(("integer program", program["bits_per_weight"], program))
    history = document["evolution"]["calibration_loss_by_generation"]
    if history:
        chosen = {"calibration_loss": history[-1], "perplexity": document["perplexity"]}
        rows.append(("integer program, then evolution", document["bits_per_weight"], chosen))
    above = document["uniform_above"]
    rows += [(f"`{entry['label']}`", entry["bits_per_weight"], entry) for entry in (above,) if entry]
    lines = [
        f"At most {document['budget_bits_per_weight']:g} bits per weight, chosen on {document['calibration']['name']}, "
        f"perplexity on {document['evaluation']['name']}.",
        "",
        "| weights | bits per weight | calibration loss (nats per token) | perplexity |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {label} | {number(bits)} | {number(entry['calibration_loss'], 5)} | {number(entry['perplexity'], 5)} |"
        for label, bits, entry in rows
    ]
    gain = document["perplexity_gain"]
    if gain is not None and within is not None:
        verb = "lowers" if gain > 0 else "does not lower"
        lines += [
            "",
            f"The choice {verb} the perplexity of `{within['label']}`, the best uniform format within the budget "
            f"({number(within['perplexity'], 5)} to {number(document['perplexity'], 5)}).",
        ]
    if history and history[-1] == history[0]:
        lines += ["", "The evolution found nothing better on the calibration text than it started from."]
    taken: dict[str, int] = {}
    for name in document["formats"].values():
        taken[name] = taken.get(name, 0) + 1
    lines += ["", "Layers: " + ", ".join(f"{count} in `{name}`" for name, count in sorted(taken.items())) + "."]
    return "\n".join(lines) + "\n"


def draw(choice: MixedChoice, folder: Path) -> list[Path]:
    """Write ``mixed.png`` and ``mixed.svg`` to ``folder``: bits and sensitivity of every layer, coloured by format.

    Raises ``InputError`` where the folder cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    candidates = choice.candidates
    colours = figures.format_colours([format.name for format in candidates.formats])
    with matplotlib.rc_context(figures.STYLE):
        width = min(24.0, 4.0 + 0.28 * len(candidates.layers))
        figure = Figure(figsize=(width, 6.4), dpi=150, layout="constrained", facecolor="white")
        upper, lower = figure.subplots(2, 1, sharex=True)
        _draw_bits(upper, choice, colours)
        _draw_sensitivities(lower, choice, colours)
        named = len(candidates.layers) <= _NAMED_LAYERS
        if named:
            lower.set_xticks(range(len(candidates.layers)), candidates.layers, rotation=90, fontsize=6.5)
        else:
            lower.set_xlabel("linear layer, in the order of execution", fontsize=9, color=figures.INK)
        figure.legend(
            handles=[Patch(facecolor=colour, label=name) for name, colour in colours.items()],
            loc="outside right upper",
            frameon=False,
            fontsize=8.5,
            labelcolor=figures.INK,
        )
        return figures.save(figure, folder, "mixed")


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", color=figures.GRID, linewidth=0.8)
    axes.tick_params(colors=figures.MUTED, labelsize=8)
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(figures.MUTED)


def _draw_bits(axes: Axes, choice: MixedChoice, colours: Mapping[str, str]) -> None:
    """A bar per layer: bits per weight, and the budget as a line."""
    _plain(axes)
    layers = choice.candidates.layers
    chosen: list[Format] = [choice.chosen.assignment[layer] for layer in layers]
    axes.bar(range(len(layers)), _layer_bits(choice), color=[colours[format.name] for format in chosen], width=0.8)
    axes.axhline(choice.budget, color=figures.INK, linewidth=1.0, linestyle="--")
    axes.annotate(
        f"budget {choice.budget:g}, used {choice.chosen.bits_per_weight:.4f}",
        (1.0, choice.budget),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=figures.INK,
    )
    axes.set_ylabel("bits per weight", fontsize=9, color=figures.INK)


def _draw_sensitivities(axes: Axes, choice: MixedChoice, colours: Mapping[str, str]) -> None:
    """A point per layer and format, the chosen one with a dark edge; linear around zero, else logarithmic."""
    _plain(axes)
    candidates = choice.candidates
    values = np.where(np.isfinite(choice.sensitivities), choice.sensitivities, np.nan)
    for column, format in enumerate(candidates.formats):
        taken = np.array([choice.chosen.assignment[layer] == format for layer in candidates.layers])
        for which, edge, size in ((~taken, "none", 14), (taken, figures.INK, 34)):
            axes.scatter(
                np.flatnonzero(which),
                values[which, column],
                s=size,
                color=colours[format.name],
                edgecolors=edge,
                linewidths=0.9,
                zorder=3 if edge == "none" else 4,
            )
    greatest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    if greatest > 0:  # sensitivities may be negative or zero
        axes.set_yscale("symlog", linthresh=10.0 ** math.ceil(math.log10(greatest / 1000)))
    units = {"loss": "loss (nats per token)", "output": "relative squared error of the output"}
    axes.set_ylabel(f"sensitivity: {units[choice.sensitivity]}", fontsize=9, color=figures.INK)
