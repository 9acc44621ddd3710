"""The command line: ``termwise COMMAND``.

Results go to standard output, with ``--json`` one JSON document and nothing else; messages and progress bars go to
standard error. Exit status: 0 done, 1 something was computed and is wrong, 2 bad input (nothing was written), 3 a tool
is missing, 130 interrupted, 141 the reader of a pipe went away. Every error is one sentence on standard error.

Modules that a command needs are imported inside it, so that no command pays for another's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from termwise import __version__
from termwise.algorithms.errors import InputError, MissingToolError, TermwiseError, unknown_name
from termwise.flow import console

if TYPE_CHECKING:
    from termwise.algorithms.formats import Format
    from termwise.algorithms.models import Model
    from termwise.algorithms.quantize import QuantizedTensor
    from termwise.flow.layer_kinds import Analysis
    from termwise.flow.quality import Calibration
    from termwise.flow.subject import Subject
    from termwise.flow.sweep import Progress
    from termwise.sim.accelerators import Accelerator

INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141
TRACEBACK_VARIABLE: Final = "TERMWISE_TRACEBACK"


def _sentence(text: str) -> str:
    """``text`` on one line."""
    return " ".join(text.split())


def _fail(text: str, status: int) -> NoReturn:
    """One sentence on standard error, then exit with ``status``."""
    console.say(_sentence(text))
    sys.exit(status)


def _close_pipe_quietly() -> NoReturn:
    """The reader of standard output is gone: say nothing, also not when the interpreter flushes at its end."""
    with contextlib.suppress(OSError, ValueError):  # standard output is no file, as in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(PIPE_CLOSED)


class _Commands(click.Group):
    """The group of commands, with the exit statuses and the one-sentence errors of termwise."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As ``click.Group.main``; errors end the process with their exit status and a sentence."""
        if not standalone_mode or os.environ.get(TRACEBACK_VARIABLE):
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        try:
            status = super().main(args, prog_name, complete_var, False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "termwise"
            hint = f" (see {where} --help)" if isinstance(error, click.UsageError) else ""
            _fail(f"error: {error.format_message().rstrip('.')}{hint}", error.exit_code)
        except TermwiseError as error:
            _fail(str(error) if error.exit_status == INTERRUPTED else f"error: {error}", error.exit_status)
        except click.Abort:
            _fail("interrupted; no file is left half written", INTERRUPTED)
        except MemoryError:
            _fail("error: not enough memory; no file is left half written", 1)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            _fail(f"error: {place}{error.strerror or error}; expected a readable file or a writable place", 2)
        except Exception as error:
            _fail(
                f"error: {type(error).__name__}: {error}; this is a defect of termwise, "
                f"{TRACEBACK_VARIABLE}=1 shows where",
                1,
            )
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """As ``click.Group.invoke``; a pipe that is closed early ends the command without a word."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:
                _close_pipe_quietly()
            raise


_json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
_text_option = click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path),
    help="UTF-8 text for the perplexity.  [default: held-out documentation of Python]",
)


_windows_option = click.option(
    "--calibration-windows",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Windows of the calibration text that are read at most, spread evenly over it.",
)


@click.group(cls=_Commands, name="termwise", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="termwise", message="termwise %(version)s")
@click.option(
    "--datatypes",
    "datatypes_file",
    type=click.Path(path_type=Path),
    help="TOML file of data types of your own, used by name everywhere.",
)
def main(datatypes_file: Path | None) -> None:
    """Co-design number formats of language models and the accelerators that compute with them.

    MODEL is a directory in Hugging Face format, a Hugging Face id, or tiny, the model that ships with termwise; for
    simulate and sweep also a known shape such as llama-2-7b.
    """
    if datatypes_file is not None:
        from termwise.algorithms.user_datatypes import ENVIRONMENT_VARIABLE, read_datatypes

        read_datatypes(datatypes_file)  # says what is wrong before anything else does
        os.environ[ENVIRONMENT_VARIABLE] = str(datatypes_file.resolve())


@main.command()
@_json_option
def formats(*, as_json: bool) -> None:
    """List every data type and every format."""
    from termwise.algorithms.datatypes import datatypes
    from termwise.algorithms.formats import format_names, get_format

    side = 4096
    named = [(name, get_format(name)) for name in format_names()]
    if as_json:
        console.print_json(
            {
                "datatypes": [
                    {
                        "name": entry.name,
                        "bits": entry.bits,
                        "levels": list(entry.levels),
                        "terms": entry.terms,
                        "special": {str(code): meaning for code, meaning in entry.special.items()},
                        "source": entry.source,
                    }
                    for entry in datatypes().values()
                ],
                "formats": [
                    {
                        "name": name,
                        "family": entry.family,
                        "weight_bits": entry.weight_bits,
                        "group_size": entry.group_size,
                        "bits_per_weight": _bits_per_weight(entry, side),
                        "datatypes": [datatype.name for datatype in entry.datatypes],
                        "source": entry.source,
                    }
                    for name, entry in named
                ],
                "bits_per_weight_of": [side, side],
            }
        )
        return
    console.print_table(
        "Data types",
        ("name", "bits", "levels", "terms", "source"),
        [
            (entry.name, str(entry.bits), _levels(entry.levels), str(entry.terms), entry.source)
            for entry in datatypes().values()
        ],
        left=(0, 2, 4),
    )
    console.print_table(
        f"Formats (other group sizes likewise, for example bitmod-w4g64); bits per weight of {side} × {side} weights",
        ("name", "code bits", "group", "bits per weight", "data types of a group", "source"),
        [
            (
                name,
                str(entry.weight_bits),
                "row" if entry.group_size is None else str(entry.group_size),
                console.number(_bits_per_weight(entry, side), 5),
                ", ".join(datatype.name for datatype in entry.datatypes) or "–",
                entry.source,
            )
            for name, entry in named
        ],
        left=(0, 4, 5),
    )


@main.command()
@click.option("--show", "shown", metavar="ACCELERATOR", help="The TOML file of one, a start for a machine of your own.")
@_json_option
def accelerators(*, shown: str | None, as_json: bool) -> None:
    """List every accelerator that comes with termwise: arrays, PEs, buffers, memory, sources."""
    from termwise.sim.accelerators import accelerator_names, get_accelerator
    from termwise.sim.machine_file import to_toml

    machines = [get_accelerator(name) for name in (accelerator_names() if shown is None else (shown,))]
    if as_json:
        console.print_json({"accelerators": [_machine_document(machine) for machine in machines]})
        return
    if shown is not None:
        click.echo(to_toml(machines[0]), nl=False)
        return
    console.print_table(
        "Accelerators (each also with another array: NAME@ROWSxCOLUMNS, NAME@iso-pe, NAME@iso-area)",
        (
            "name",
            "PE",
            "lanes",
            "prefill array",
            "decode array",
            "PEs",
            "PE area (µm²)",
            "PEs (mm²)",
            "buffers (KiB)",
            "memory",
            "MHz",
            "KV bits",
            "formats",
        ),
        [_machine_cells(machine) for machine in machines],
        left=(0, 1, 9, 12),
    )
    by_sources: dict[tuple[str, ...], list[str]] = {}
    for machine in machines:
        by_sources.setdefault(machine.sources, []).append(machine.name)
    for sources, names in by_sources.items():
        console.print_text(f"sources of {', '.join(names)}:")
        for source in sources:
            console.print_text(f"  {source}")


def _machine_document(machine: Accelerator) -> dict[str, Any]:
    """All fields of a machine, and what follows from them."""
    from termwise.algorithms.workload import PHASES
    from termwise.sim.energy import energies_of

    areas = {phase: machine.array_area_um2(phase) for phase in PHASES}
    return {
        **machine.to_dict(),
        "energy_set": energies_of(machine).name,
        "processing_elements": {phase: machine.array(phase).processing_elements for phase in PHASES},
        "array_area_mm2": {phase: None if area is None else area / 1e6 for phase, area in areas.items()},
        "digest": machine.digest(),
    }


def _machine_cells(machine: Accelerator) -> tuple[str, ...]:
    """One row of the table of accelerators; the area is that of the prefill array."""
    from termwise.algorithms.workload import PHASES

    area = machine.array_area_um2("prefill")
    memory = machine.memory
    wide = "" if memory.ideal_bytes_per_cycle is None else f" ({memory.ideal_bytes_per_cycle} bytes a cycle)"
    arrays = [machine.array(phase) for phase in PHASES]
    return (
        machine.name,
        machine.processing_element.kind,
        str(machine.processing_element.lanes),
        *(f"{array.rows} × {array.columns}" for array in arrays),
        " / ".join(dict.fromkeys(str(array.processing_elements) for array in arrays)),
        console.number(machine.pe_area_um2, 5),
        console.number(None if area is None else area / 1e6),
        f"{machine.weight_buffer_bytes / 1024:g} + {machine.activation_buffer_bytes / 1024:g}",
        f"{memory.name}{wide}",
        str(machine.clock_mhz),
        str(machine.key_value_bits),
        ", ".join(dict.fromkeys((machine.prefill_format, machine.decode_format))),
    )


def _bits_per_weight(format: Format, side: int) -> float | None:
    """Bits per weight of a square matrix; None where they depend on the weights."""
    from termwise.algorithms.formats import FREE

    free = any(FREE in part.shape for part in format.layout(side, side).values())
    return None if free else format.bits_per_weight(side, side)


def _levels(levels: Sequence[float]) -> str:
    """Levels for a table: all of a small type, the ends of a large one."""
    shown = [f"{level:g}" for level in levels]
    if len(shown) > 16:
        shown = [*shown[:2], "…", *shown[-2:]]
    return " ".join(shown)


@main.command()
@click.argument("model")
@click.option("--format", "format_name", metavar="FORMAT", help="Of all layers, as termwise formats lists them.")
@click.option(
    "--formats",
    "assignment",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A format per layer, as termwise mix writes it (.toml or .json).",
)
@click.option("--calibrate", "method_name", metavar="METHOD", help="awq, smoothquant, gptq, adadim, awq+gptq, ...")
@click.option(
    "--calibration-text",
    "calibration_file",
    type=click.Path(path_type=Path),
    help="UTF-8 text on which output errors are measured, and calibrated.  [default for tiny: its training topics]",
)
@_windows_option
@click.option("--kv-cache", "cache_name", metavar="CACHE", help="Format of keys and values: int-asym-w4g32, ...")
@click.option("--compat", metavar="authors-fp16", help="BitMoD's selection in the arithmetic of its authors' script.")
@click.option("--no-score", is_flag=True, help="Neither perplexity nor cosine: the model is not run.")
@click.option("--swap", is_flag=True, help="Then generate with the packed layers: on a GPU, or the kernels' CPU twins.")
@click.option("--out", type=click.Path(path_type=Path), help="New directory for the packed model and its report.")
@click.option("--report", type=click.Path(path_type=Path), help="Folder for the report alone.")
@_text_option
@_json_option
def quantize(
    *,
    model: str,
    format_name: str | None,
    assignment: Path | None,
    method_name: str | None,
    calibration_file: Path | None,
    calibration_windows: int,
    cache_name: str | None,
    compat: str | None,
    no_score: bool,
    swap: bool,
    out: Path | None,
    report: Path | None,
    text_file: Path | None,
    as_json: bool,
) -> None:
    """Quantize MODEL: error of every layer, bits per weight, perplexity before and after.

    An encoder has the cosine of its embeddings in the place of a perplexity. With --out, the same command goes on where
    it was stopped.
    """
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.kv_cache import get_cache_format
    from termwise.flow.folders import check_new_folder, check_place
    from termwise.flow.quantization import (
        Request,
        layer_columns,
        memory_reason,
        quantize_model,
        score_sentence,
        summary_sentence,
        swap_sentence,
    )
    from termwise.flow.subject import open_text

    if (format_name is None) == (assignment is None):
        raise InputError("quantize takes one of --format FORMAT and --formats FILE")
    cache = None
    if cache_name is not None:
        cache = get_cache_format(cache_name if cache_name.startswith("kv:") else f"kv:{cache_name}")
    formats: Any = None
    if format_name is not None:
        formats = get_format(format_name if compat is None else f"{format_name}:compat={compat}")
    elif compat is not None:
        raise InputError("--compat goes with --format; in a file of formats it is written behind their names")
    if method_name is not None:
        from termwise.algorithms.calibrated import get_method

        get_method(method_name)  # what needs no model is refused before one is opened
    if report is not None:
        check_place(report)
    if out is not None:
        check_new_folder(out)
    opened = _model_with_weights(model)
    if assignment is not None:
        from termwise.algorithms.assignment import read_assignment

        formats = read_assignment(assignment, opened.matrix_names)
    reason = opened.not_runnable_reason
    if reason is not None and opened.no_embedding_reason is None:
        reason = "the cache of keys and values belongs to language models" if cache is not None else None
    if reason is None:
        reason = "--no-score" if no_score else memory_reason(opened)
    if cache is not None and reason is not None:
        raise InputError(f"--kv-cache {cache.name}: it is measured by the perplexity, and there is none: {reason}")
    text = open_text(text_file) if reason is None or text_file is not None else None
    if swap:
        from termwise.gpu_ref.quantized_linear import check_format

        if reason is not None or not opened.runnable:
            raise InputError(f"--swap generates with {opened.name}: {reason or 'it predicts no tokens'}")
        for format in [formats] if format_name is not None else formats.values():
            check_format(format)
    request = Request(
        model=opened,
        formats=formats,
        text=text if reason is None else None,
        no_score_reason=reason,
        calibration=_calibration(opened, method_name, calibration_file, calibration_windows),
        cache=cache,
        out=out,
        report=report,
        swap=swap,
    )
    total = len(opened.matrix_names) if format_name is not None else len(formats)

    def wrap(layers: Iterator[Any]) -> Iterator[Any]:
        return console.progress(layers, total=total, label=request.format_name, unit="layer")

    document, quality = quantize_model(request, wrap=wrap, say=console.say)
    if as_json:
        console.print_json(document)
        return
    titles, rows = layer_columns(quality)
    console.print_table(f"{opened.name} in {request.format_name}", titles, rows, left=(0, len(titles)))
    console.print_text(summary_sentence(quality))
    console.print_text(score_sentence(document))
    if document["swap"] is not None:
        console.print_text(swap_sentence(document))
    for key, name in (("out", "packed model"), ("report", "report")):
        if document[key] is not None:
            console.print_text(f"{name}: {document[key]}")


@main.command()
@click.argument("model")
@click.option(
    "--bits", "budget", required=True, type=float, help="Bits per weight of all layers together, scales included."
)
@click.option("--format", "names", multiple=True, metavar="FORMAT", help="To choose from; once per format.")
@click.option("--sensitivity", default="loss", show_default=True, help="loss or output: what a layer's format costs.")
@click.option(
    "--generations", default=20, show_default=True, type=click.IntRange(min=0), help="Of the evolution; 0: none."
)
@click.option("--seed", default=0, show_default=True, help="Of the evolution.")
@click.option(
    "--calibration-text", "calibration_file", type=click.Path(path_type=Path), help="UTF-8 text to choose on."
)
@click.option("--out", type=click.Path(path_type=Path), help="File for the formats (.toml or .json).")
@click.option("--report", type=click.Path(path_type=Path), help="Folder for the report and its figure.")
@_text_option
@_json_option
def mix(
    *,
    model: str,
    budget: float,
    names: tuple[str, ...],
    sensitivity: str,
    generations: int,
    seed: int,
    calibration_file: Path | None,
    out: Path | None,
    report: Path | None,
    text_file: Path | None,
    as_json: bool,
) -> None:
    """Choose a format for every layer of MODEL within a budget of bits per weight.

    An integer program over measured sensitivities, then an evolutionary search on the loss itself; both on the
    calibration text. The perplexity of the result, and of the best uniform format, is measured on the other text.
    """
    from termwise.algorithms.files import write_text
    from termwise.algorithms.mixed_precision import Evolution
    from termwise.flow.folders import check_file, check_place
    from termwise.flow.mixed import DEFAULT_FORMATS, markdown
    from termwise.flow.mixed import mix as choose
    from termwise.flow.subject import open_text

    if out is not None:
        check_file(out)  # before hours of work
    if report is not None:
        check_place(report)
    opened = _model_with_weights(model)
    calibration = _calibration(opened, None, calibration_file)
    if calibration is None:
        raise InputError("mix chooses on a text of its own; expected --calibration-text FILE")
    with _steps() as progress:
        document = choose(
            opened,
            bits_per_weight=budget,
            calibration=calibration.text,
            evaluation=open_text(text_file),
            formats=names or DEFAULT_FORMATS,
            sensitivity=sensitivity,  # type: ignore[arg-type]  # checked where it is used
            evolution=Evolution(generations=generations, seed=seed),
            out=out,
            figure=report,
            progress=progress,
        )
    text = markdown(document)
    if report is not None:
        write_text(report / "report.md", text)
    if as_json:
        console.print_json(document)
    else:
        console.print_text(text)


@main.command("special-values")
@click.argument("model")
@click.option("--bits", required=True, type=int, help="3 or 4.")
@click.option("--group", "group_size", type=click.IntRange(min=1), help="Weights of a group.  [default: a row]")
@click.option("--largest", default=8, show_default=True, help="Values of the largest table.")
@_json_option
def special_values(*, model: str, bits: int, group_size: int | None, largest: int, as_json: bool) -> None:
    """Find the best special values of BitMoD for MODEL: tables of one value, two, and so on, beside the paper's."""
    from termwise.algorithms.special_values import search

    opened = _model_with_weights(model)
    total = len(opened.matrix_names)
    matrices = console.progress(opened.matrices(), total=total, label=opened.name, unit="layer")
    found = search(matrices, bits, group_size, largest=largest)
    document = {
        "model": opened.name,
        "model_digest": opened.digest,
        "bits": bits,
        "group_size": group_size,
        "groups": found.groups,
        "candidates": list(found.candidates),
        "paper": found.paper.to_dict(),
        "tables": [table.to_dict() for table in found.tables],
    }
    if as_json:
        console.print_json(document)
        return
    group = "rows" if group_size is None else f"groups of {group_size}"
    console.print_table(
        f"Best special values of {opened.name}, {bits} bits, {group}, before the 8-bit scales",
        ("values", "selector bits", "SQNR (dB)", "over the paper's (dB)", "share of each (%)", "format"),
        [
            (
                ", ".join(f"{value:+g}" for value in table.values),
                str(table.selector_bits),
                console.number(table.sqnr_db, 5),
                "–" if None in (table.sqnr_db, found.paper.sqnr_db) else _gain(table.sqnr_db, found.paper.sqnr_db),
                ", ".join(f"{100 * share:.1f}" for share in table.shares),
                "the paper's: " + table.format if table is found.paper else table.format,
            )
            for table in (*found.tables, found.paper)
        ],
        left=(0, 4, 5),
    )
    console.print_text(f"{found.groups:,} groups of {found.matrices} matrices, {len(found.candidates)} candidates")


def _gain(decibels: float | None, base: float | None) -> str:
    """Difference of two figures in decibels, with its sign."""
    return f"{(decibels or 0.0) - (base or 0.0):+.3f}"


@main.command()
@click.argument("packed", type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="MODEL", help="What was quantized.")
@click.option("--to", "layout", required=True, metavar="LAYOUT", help="compressed-tensors or gguf.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New directory, or the GGUF file.")
@click.option("--exact-scales", is_flag=True, help="compressed-tensors: FP32 scales, so that nothing is rounded.")
@_json_option
def export(*, packed: Path, model: str, layout: str, out: Path, exact_scales: bool, as_json: bool) -> None:
    """Write the packed model PACKED, from quantize --out, in a layout that other software reads."""
    from termwise.algorithms.export import export_compressed_tensors, export_gguf

    if layout not in ("compressed-tensors", "gguf"):
        raise unknown_name("layout", layout, ("compressed-tensors", "gguf"))
    if exact_scales and layout == "gguf":
        raise InputError("--exact-scales goes with --to compressed-tensors; blocks of GGUF have FP16 scales")
    opened = _model_with_weights(model)
    notes: tuple[str, ...] = ()
    if layout == "gguf":
        notes = export_gguf(packed, opened, out)
    else:
        export_compressed_tensors(packed, opened, out, scale_dtype="float32" if exact_scales else "float16")
    if as_json:
        console.print_json({"model": opened.name, "layout": layout, "out": str(out), "notes": list(notes)})
        return
    console.print_text(f"{layout}: {out}")
    for note in notes:
        console.print_text(f"note: {note}")


@main.command()
@click.argument("model")
@click.option(
    "--format", "formats", multiple=True, metavar="FORMAT", help="In the place of all; without a group, in all."
)
@click.option("--groups", default="128,64,32", show_default=True, help="Sizes of groups.")
@click.option("--methods", default="none,gptq", show_default=True, help="Methods of calibration.")
@click.option(
    "--calibration-text", "calibration_file", type=click.Path(path_type=Path), help="Text for the calibration."
)
@_windows_option
@click.option(
    "--paragraphs", type=click.IntRange(min=1), help="Read so many paragraphs of 200 characters of each text."
)
@click.option("--only-measured", is_flag=True, help="Write the report of what is measured already.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.  [default: reports/accuracy/MODEL]")
@_text_option
@_json_option
def accuracy(
    *,
    model: str,
    formats: tuple[str, ...],
    groups: str,
    methods: str,
    calibration_file: Path | None,
    calibration_windows: int,
    paragraphs: int | None,
    only_measured: bool,
    out: Path | None,
    text_file: Path | None,
    as_json: bool,
) -> None:
    """Measure what every format, group size and calibration method does to MODEL: tables and a figure.

    What is finished is kept under runs/accuracy: the same command goes on where it was stopped.
    """
    from termwise.algorithms import embeddings
    from termwise.algorithms.calibration import MAXIMUM_WINDOWS
    from termwise.flow.accuracy import document_of, measure, plan_accuracy, report_text, write_accuracy
    from termwise.flow.quantization import load_evaluator
    from termwise.flow.subject import open_text

    opened = _model_with_weights(model)
    text = open_text(text_file)
    calibration = _calibration(opened, None, calibration_file)
    calibration_text = None if calibration is None else calibration.text
    if paragraphs is not None:
        text = embeddings.paragraphs(text, characters=200, count=paragraphs)
        if calibration_text is not None:
            calibration_text = embeddings.paragraphs(calibration_text, characters=200, count=paragraphs)
    plan = plan_accuracy(
        opened,
        text,
        calibration_text,
        formats=formats,
        groups=_numbers(groups, "--groups"),
        methods=methods.split(","),
        calibration_windows=calibration_windows,
    )
    out = out or Path("reports/accuracy") / opened.name.replace("/", "-")
    command = ["termwise", "accuracy", model]
    command += [part for name in formats for part in ("--format", name)]
    for option, value, usual in (
        ("--groups", groups, "128,64,32"),
        ("--methods", methods, "none,gptq"),
        ("--calibration-text", calibration_file, None),
        ("--calibration-windows", calibration_windows, MAXIMUM_WINDOWS),
        ("--paragraphs", paragraphs, None),
        ("--text", text_file, None),
    ):
        command += [option, str(value)] if value != usual else []
    command += ["--out", str(out)]

    def wrap(entries: Iterable[Any], total: int) -> Iterator[Any]:
        return console.progress(entries, total=total, label=opened.name, unit="measurement")

    told = shlex.join(command)
    results = measure(
        plan, Path("runs/accuracy") / out.name, command=told, warn=console.warn, wrap=wrap, only_measured=only_measured
    )
    document = document_of(plan, results, load_evaluator(opened, text), told)
    write_accuracy(document, out)
    if as_json:
        console.print_json(document)
    else:
        console.print_text(report_text(document))


def _numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers separated by commas. Raises ``InputError``, which names the ``option``."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise InputError(f"{option} {text}: expected positive whole numbers, separated by commas")
    return [int(part) for part in parts]


def _model_with_weights(reference: str) -> Model:
    """The model that ``reference`` names. Raises ``InputError`` where there is only a shape."""
    from termwise.flow.subject import open_subject

    subject = open_subject(reference)
    if subject.model is None:
        raise InputError(f"{reference}: {subject.no_weights_reason}; expected a directory, a Hugging Face id or tiny")
    return subject.model


@contextlib.contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error (a terminal only) for work of several steps: which one, done, in all."""
    from tqdm import tqdm

    with tqdm(total=0, file=sys.stderr, disable=None, leave=False) as bar:

        def told(what: str, done: int, total: int) -> None:
            bar.set_description(what, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        yield told


def _calibration(
    model: Model, method_name: str | None, file: Path | None, windows: int | None = None
) -> Calibration | None:
    """What is measured before a quantization: with a text of the user's at least the errors of the layers' outputs.

    Raises ``InputError`` for a method without a text.
    """
    from termwise.algorithms.calibrated import RoundToNearest
    from termwise.algorithms.calibration import MAXIMUM_WINDOWS
    from termwise.algorithms.text import read_text
    from termwise.flow.quality import Calibration, default_calibration

    windows = MAXIMUM_WINDOWS if windows is None else windows
    method = None
    if method_name is not None:
        from termwise.algorithms.calibrated import get_method

        method = get_method(method_name)
    usual = default_calibration(model)
    if file is not None:
        return Calibration(text=read_text(file), method=method or RoundToNearest(), windows=windows)
    if usual is not None:
        return Calibration(text=usual.text, method=method, windows=windows)
    if method is not None:
        raise InputError(f"--calibrate {method.name} reads a text; expected --calibration-text FILE")
    return None


@main.command()
@click.argument("model")
@click.option(
    "--accelerator",
    "accelerator_name",
    required=True,
    metavar="ACCELERATOR",
    help="As termwise accelerators lists them, for example bitmod-lossy or olive@32x32, or a TOML file of your own.",
)
@click.option("--format", "format_name", metavar="FORMAT", help="Of the weights.  [default: the accelerator's own]")
@click.option("--phase", default="prefill", show_default=True, metavar="PHASE", help="prefill, decode or generation.")
@click.option(
    "--context",
    default=256,
    show_default=True,
    help="Tokens of a prefill or a prompt, or tokens cached in a decode step.",
)
@click.option("--output-tokens", type=int, help="New tokens of a generation.  [default: 256]")
@click.option(
    "--memory",
    "memory_name",
    metavar="MEMORY",
    help="ideal, ddr4-3200, lpddr5x-8533, hbm2e or hbm3, also with channels, as in hbm3@8.  [default: the "
    "accelerator's own]",
)
@click.option(
    "--energy-set",
    "energy_set",
    metavar="NAME",
    help="Energies per event: bitmod-2024 or bitmod-2024-any-buffer.  [default: the accelerator's own]",
)
@click.option("--batch", default=1, show_default=True, help="Sequences at once.")
@click.option(
    "--vector-lanes",
    type=int,
    metavar="N",
    help="Softmax, norms and the like on a vector unit of N lanes.  [default: left out]",
)
@click.option(
    "--values", is_flag=True, help="Quantize the model's weights and simulate what depends on their values from them."
)
@click.option(
    "--trace",
    "trace_folder",
    type=click.Path(path_type=Path),
    help="New folder for a timeline (Perfetto) of one layer and the signals (VCD) of one tile.",
)
@click.option("--layer", metavar="NAME", help="The layer that --trace follows.  [default: the first]")
@click.option("--stepped", is_flag=True, help="Simulate every event; by default what repeats is counted once, exactly.")
@click.option(
    "--model-of",
    default="cycle",
    show_default=True,
    metavar="MODEL_OF",
    help="cycle: the cycle-level simulator; published, published-2025: the closed form of the BitMoD paper, and its "
    "later state.",
)
@click.option("--out", type=click.Path(path_type=Path), help="New folder for a report, figures, a page and the JSON.")
@_json_option
def simulate(
    *,
    model: str,
    accelerator_name: str,
    format_name: str | None,
    phase: str,
    context: int,
    output_tokens: int | None,
    memory_name: str | None,
    energy_set: str | None,
    batch: int,
    vector_lanes: int | None,
    values: bool,
    trace_folder: Path | None,
    layer: str | None,
    stepped: bool,
    model_of: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Simulate MODEL on an accelerator: cycles and their causes, traffic, energy, by kind of layer.

    MODEL is a known shape such as llama-2-7b, a directory in Hugging Face format, or a config.json.

    \b
    Examples:
      termwise simulate llama-2-7b --accelerator bitmod-lossy --phase decode
      termwise simulate llama-2-7b --accelerator olive --context 2048 --out runs/olive
      termwise simulate opt-1.3b --accelerator fp16 --phase generation --output-tokens 128
      termwise simulate opt-1.3b --accelerator bitmod-lossy --memory hbm2e
      termwise simulate opt-1.3b --accelerator bitmod-lossy --vector-lanes 64 --json
      termwise simulate tiny --accelerator machine.toml --values
    """
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.workload import PHASES, check_phase
    from termwise.flow.folders import check_new_folder
    from termwise.flow.subject import open_subject
    from termwise.sim.accelerators import get_accelerator
    from termwise.sim.dram import get_dram
    from termwise.sim.energy import get_energy_set
    from termwise.sim.published import PUBLISHED_STATES, simulate_published

    accelerator = get_accelerator(accelerator_name)
    if memory_name is not None:
        accelerator = dataclasses.replace(accelerator, memory=get_dram(memory_name))
    if energy_set is not None:
        accelerator = dataclasses.replace(accelerator, energy_set=get_energy_set(energy_set).name)
    if phase not in (*PHASES, "generation"):
        raise unknown_name("phase", phase, (*PHASES, "generation"))
    if output_tokens is not None and phase != "generation":
        raise InputError(f"--output-tokens {output_tokens}: a {phase} has none; expected --phase generation")
    format = None if format_name is None else get_format(format_name)
    state = PUBLISHED_STATES.get(model_of)
    if state is None and model_of != "cycle":
        raise unknown_name("model of the hardware", model_of, ("cycle", *PUBLISHED_STATES))
    if state is not None:
        _check_published(
            model_of,
            {
                "--format": format_name,
                "--memory": memory_name,
                "--energy-set": energy_set,
                "--vector-lanes": vector_lanes,
                "--values": values or None,
                "--stepped": stepped or None,
                "--trace": trace_folder,
                "--out": out,
            },
            phase,
        )
    if trace_folder is not None and phase == "generation":
        raise InputError("--trace: a generation has many phases; expected --phase prefill or decode")
    if layer is not None and trace_folder is None:
        raise InputError(f"--layer {layer}: only a trace follows one layer; expected --trace FOLDER with it")
    for folder in (out, trace_folder):
        if folder is not None:
            check_new_folder(folder)
    subject = open_subject(model)
    shape = subject.shape
    if state is not None:
        document = simulate_published(
            shape, accelerator, phase=check_phase(phase), context=context, batch=batch, state=state
        ).to_dict()
        if as_json:
            console.print_json(document)
        else:
            _print_published(document)
        return

    from termwise.flow.layer_kinds import analyse
    from termwise.flow.simulation_report import write_simulation
    from termwise.sim.generation import simulate_generation, simulate_phase
    from termwise.sim.vector_unit import VectorUnit

    unit = None if vector_lanes is None else VectorUnit(lanes=vector_lanes)
    tensors = None
    if values:
        stored = format or get_format(accelerator.default_format("prefill" if phase == "prefill" else "decode"))
        tensors = _quantized(subject, stored)
    with _bar(f"{shape.name} on {accelerator.name}", "step" if phase == "generation" else "product") as (
        begin,
        advance,
    ):

        def told(_: int, total: int) -> None:
            begin(total)
            advance()

        if phase == "generation":
            document = simulate_generation(
                shape,
                accelerator,
                weights=format,
                context=context,
                output_tokens=256 if output_tokens is None else output_tokens,
                batch=batch,
                vector_unit=unit,
                tensors=tensors,
                stepped=stepped,
                progress=told,
            )
        else:
            document = simulate_phase(
                shape,
                accelerator,
                phase=check_phase(phase),
                weights=format,
                context=context,
                batch=batch,
                vector_unit=unit,
                tensors=tensors,
                stepped=stepped,
                progress=told,
            )
    traced = None
    if trace_folder is not None:
        from termwise.flow.tracing import write_trace

        phase_of_trace = check_phase(phase)
        traced = write_trace(
            trace_folder,
            shape,
            accelerator,
            phase=phase_of_trace,
            weights=format or get_format(accelerator.default_format(phase_of_trace)),
            context=context,
            batch=batch,
            layer=layer,
        )
    analysis = analyse(document, accelerator, shape.head)
    if out is not None:
        write_simulation(analysis, out, command=_command_line())
    if as_json:
        console.print_json(analysis.to_dict())
        return
    _print_simulation(analysis)
    if out is not None:
        console.print_text(f"report: {out / 'report.md'}")
        console.print_text(f"page: {out / 'index.html'}")
    if traced is not None:
        for note in traced.notes:
            console.print_text(note)
        for file in traced.files:
            console.print_text(f"trace: {file}")


def _check_published(model_of: str, options: dict[str, object], phase: str) -> None:
    """Raise ``InputError`` where the published model is asked for what it has not."""
    if phase == "generation":
        raise InputError(
            "--phase generation: the published model has single phases; expected prefill or decode with "
            f"--model-of {model_of}"
        )
    for option, value in options.items():
        if value is not None:
            given = option if value is True else f"{option} {value}"
            raise InputError(
                f"{given}: the published model has precisions, memory and energies of its own, and neither a "
                f"vector unit nor layers to draw; expected no {option} with --model-of {model_of}"
            )


def _command_line() -> str:
    """The command that runs, with the arguments and options that were given, for the first line of a report."""
    context = click.get_current_context()
    words = ["termwise", context.command.name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name != "as_json":
            words += [
                *([] if isinstance(parameter, click.Argument) else [parameter.opts[0]]),
                str(context.params[name]),
            ]
    return shlex.join(words)


@contextlib.contextmanager
def _bar(label: str, unit: str) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """A progress bar on standard error (a terminal only): set its total, advance it by one."""
    from tqdm import tqdm

    with tqdm(total=0, desc=label, unit=unit, file=sys.stderr, disable=None, leave=False) as bar:

        def begin(total: int) -> None:
            bar.total = total
            bar.refresh()

        yield begin, lambda: (bar.update(1), None)[1]


def _quantized(subject: Subject, format: Format) -> Callable[[str], QuantizedTensor]:
    """The weights of a layer by its name, quantized when they are asked for."""
    from termwise.algorithms.quantize import quantize

    model = subject.model
    if model is None:
        raise InputError(f"--values: {subject.name} has no weights ({subject.no_weights_reason}); expected some")
    return lambda name: quantize(model.matrix(name), format, name=name)


def _print_simulation(analysis: Analysis) -> None:
    from termwise.flow.simulation_report import kind_tables, memory_text, summary_lines, title_of

    console.print_text(f"{title_of(analysis.document)}\n")
    for table in kind_tables(analysis):
        console.print_table(table.title, table.columns, table.rows)
    for line in summary_lines(analysis.document, memory_text(analysis.roofline)):
        console.print_text(line)
    for note in analysis.document["notes"]:
        console.print_text(f"note: {note}")


def _print_published(document: dict[str, Any]) -> None:
    from termwise.flow.simulation_report import summary_lines, title_of

    console.print_text(f"{title_of(document)}: the closed form {document['model_of']}")
    for line in summary_lines(document):
        console.print_text(line)
    for note in document["notes"]:
        console.print_text(f"note: {note}")


@main.command()
@click.argument("specification", metavar="[SPEC.toml]", required=False, type=click.Path(path_type=Path))
@click.option("--model", "models", multiple=True, metavar="MODEL", help="In place of the models of the specification.")
@_text_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<name of SPEC>]")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=1), help="Processes that evaluate.")
@_json_option
def sweep(
    *,
    specification: Path | None,
    models: tuple[str, ...],
    text_file: Path | None,
    out: Path | None,
    workers: int,
    as_json: bool,
) -> None:
    """Compute every combination that SPEC.toml names, and compare them: table, figures, one HTML page.

    Without SPEC.toml it is the quickstart that ships with termwise: eleven formats on four accelerators.

    What is finished is kept: the same command goes on where it was stopped, and computes nothing twice.
    """
    from termwise.flow.report import results_document, write_report
    from termwise.flow.specification import read_specification
    from termwise.flow.sweep import plan_sweep, run_sweep

    named = [] if specification is None else [str(specification)]
    if specification is None:
        specification = Path(str(files("termwise.flow") / "quickstart.toml"))
    wanted = read_specification(specification)
    changes: dict[str, Any] = {}
    if models:
        changes["models"] = tuple(dict.fromkeys(models))
    if text_file is not None:
        changes["text"] = str(text_file)
    wanted = wanted.model_copy(update=changes)
    try:
        plan = plan_sweep(wanted)
    except InputError as error:
        raise error if changes else InputError(f"{specification}: {error}") from error
    if out is None:
        suffix = "".join(f"-{subject.name.replace('/', '-')}" for subject in plan.subjects) if models else ""
        out = Path("runs") / f"{specification.stem}{suffix}"
    command = ["termwise", "sweep", *named]
    command += [part for model in models for part in ("--model", model)]
    command += ["--text", str(text_file)] if text_file is not None else []
    command += ["--out", str(out)]
    with _bar(specification.stem, "result") as (begin, advance):
        outcome = run_sweep(
            plan,
            out,
            command=shlex.join(command),
            warn=console.warn,
            workers=workers,
            progress=_progress(begin, advance),
        )
    written = write_report(outcome.results, out)
    counts = f"{outcome.computed} results computed, {outcome.reused} reused"
    console.say(counts)
    for failed in outcome.results.failed:
        console.say(
            _sentence(f"failed: {failed.model}, {failed.format}, {failed.accelerator}, {failed.phase}: {failed.reason}")
        )
    if as_json:
        document = results_document(outcome.results, written)
        console.print_json({**document, "computed": outcome.computed, "reused": outcome.reused})
    else:
        _print_results(outcome.results, written.page, written.report)
    if outcome.results.failed:
        sys.exit(1)


def _progress(begin: Callable[[int], None], advance: Callable[[], None]) -> Progress:
    from termwise.flow.sweep import Progress

    return Progress(begin=begin, done=advance)


def _print_results(results: Any, page: Path, report: Path) -> None:
    from termwise.flow.report import COLUMNS, cells, notes

    console.print_table(
        results.run.specification["question"],
        COLUMNS,
        [cells(point) for point in results.points],
        left=(0, 1, 2, 3, 9),
    )
    if results.skipped:
        console.print_text(f"{len(results.skipped)} combinations skipped, because the PE cannot take the format")
    for note in notes(results):
        console.print_text(f"note: {note}")
    if results.failed:
        console.print_text(f"{len(results.failed)} combinations failed")
    if results.missing:
        console.print_text(f"{len(results.missing)} combinations not computed yet: {results.run.command}")
    console.print_text(f"report: {report}")
    console.print_text(f"page: {page}")


@main.command()
@click.argument("name", metavar="[UNIT]", required=False)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files.  [default: ./UNIT]")
@_json_option
def rtl(*, name: str | None, out: Path | None, as_json: bool) -> None:
    """Write a unit of the hardware as Verilog, with its ports and how to instantiate it; without UNIT, list them."""
    from termwise.flow.folders import check_place

    units = _hardware_units()
    if name is None:
        if as_json:
            console.print_json(
                {"units": [{"name": unit.name, "kind": unit.kind, "summary": unit.summary} for unit in units.values()]}
            )
            return
        rows = [(unit.name, unit.kind, unit.summary) for unit in units.values()]
        console.print_table("Units of the hardware", ("unit", "kind", "what it is"), rows, left=3)
        return
    from termwise.rtl.units import get_unit
    from termwise.rtl.verilog import write_unit

    unit = get_unit(name)
    folder = out or Path(unit.name)
    check_place(folder)
    written = write_unit(unit, folder)
    if as_json:
        console.print_json({"unit": unit.name, "files": written})
        return
    for path in written:
        console.print_text(str(path))


@main.command()
@click.argument("names", metavar="UNIT...", nargs=-1, required=True)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="TARGET",
    help="ecp5, ice40, xc7, xcup, gowin or asic.  [default: ecp5]",
)
@click.option(
    "--seeds", default=1, show_default=True, type=click.IntRange(min=0), help="Of place and route; 0: none is done."
)
@click.option(
    "--runs",
    default="runs/synthesis",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of records and logs; what is recorded there is not synthesized again.",
)
@click.option("--baseline", is_flag=True, help="Compare with the committed figures; status 1 where one is worse.")
@click.option(
    "--baselines",
    default="reports/synthesis",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of the committed figures.",
)
@_json_option
def synth(
    *,
    names: tuple[str, ...],
    targets: tuple[str, ...],
    seeds: int,
    runs: Path,
    baseline: bool,
    baselines: Path,
    as_json: bool,
) -> None:
    """Synthesize units of the hardware, or ``all``: LUTs, flip-flops, DSPs, block RAMs and clock, or area in gates."""
    _hardware_units()
    from termwise.flow.folders import check_place
    from termwise.flow.synthesis import SHOWN, Synthesizer, compare
    from termwise.rtl.synthesis import fits, get_target
    from termwise.rtl.units import UNITS, get_unit

    units = list(UNITS.values()) if names == ("all",) else [get_unit(name) for name in names]
    chosen = [(unit, get_target(target)) for unit in units for target in targets or ("ecp5",)]
    if names == ("all",):
        chosen = [item for item in chosen if fits(*item)]
    check_place(runs)
    synthesizer = Synthesizer(runs, seeds, console.warn)
    results = [
        synthesizer.figures(unit, target)
        for unit, target in console.progress(chosen, total=len(chosen), label="synthesis", unit="unit")
    ]
    compared = compare(results, baselines) if baseline else []
    if as_json:
        document = results[0] if len(results) == 1 else {"results": results}
        console.print_json({**document, "baseline": compared} if baseline else document)
    else:
        rows = [(entry["unit"], entry["target"], *(console.number(entry[name]) for name in SHOWN)) for entry in results]
        headings = ("LUT", "without DSPs", "FF", "DSP", "BRAM", "carry", "MHz", "NAND2")
        console.print_table("Synthesis", ("unit", "target", *headings), rows, left=2)
        for entry in results:
            for note in entry["notes"]:
                console.say(f"{entry['unit']} on {entry['target']}: {note}")
        if baseline:
            cells = [
                (
                    row["unit"],
                    row["target"],
                    row["figure"],
                    console.number(row["baseline"]),
                    console.number(row["found"]),
                    "worse" if row["worse"] else "",
                )
                for row in compared
            ]
            console.print_table(
                "Baseline", ("unit", "target", "figure", "baseline", "found", ""), cells, left=(0, 1, 2, 5)
            )
    if any(row["worse"] for row in compared):
        sys.exit(1)


@main.group()
def board() -> None:
    """The accelerator on a ULX3S (ECP5-85F): its bitstream, and layers on it or on a model of it."""


@board.command("build")
@click.option(
    "--out", default="board", show_default=True, type=click.Path(path_type=Path), help="Folder for the files."
)
@_json_option
def board_build(*, out: Path, as_json: bool) -> None:
    """Build the bitstream ``board.bit``, with Verilog and logs beside it."""
    _hardware_units()
    from termwise.flow.folders import check_place
    from termwise.rtl.board import BoardDesign, build_bitstream

    check_place(out)
    found = build_bitstream(BoardDesign(), out, console.say)
    if as_json:
        console.print_json(found)
        return
    console.print_text(str(found["bitstream"]))
    console.print_text(
        f"{found['lut']:,} LUTs, {found['ff']:,} flip-flops, {found['bram']} block RAMs, {found['dsp']} DSPs; "
        f"{found['fmax_mhz']} MHz, of which {found['clock_mhz']:g} are used"
    )


@board.command("run")
@click.argument("model")
@click.option("--layer", "name", metavar="NAME", help="A linear layer.  [default: the first]")
@click.option("--format", "format_name", default="bitmod-w4g128", show_default=True, metavar="FORMAT", help="Of it.")
@click.option("--tokens", default=4, show_default=True, type=click.IntRange(min=1), help="Rows of activations.")
@click.option("--port", metavar="DEVICE", help="Serial port of the board.  [default: a model of the hardware]")
@click.option("--line", is_flag=True, help="Simulate the serial line, too.")
@_json_option
def board_run(
    *, model: str, name: str | None, format_name: str, tokens: int, port: str | None, line: bool, as_json: bool
) -> None:
    """Compute a quantized layer of MODEL on the accelerator and compare every bit with the reference."""
    _hardware_units()
    from termwise.flow.hardware import run_layer

    found = run_layer(model, name, format_name, tokens, port=port, line=line)
    if as_json:
        console.print_json(found)
    else:
        rows = [(cause, console.number(count)) for cause, count in found["cycles_by_cause"].items()]
        console.print_table(
            f"{found['layer']}, {found['outputs']} × {found['inputs']}, {found['tokens']} tokens, {found['format']}",
            ("cycles", ""),
            [*rows, ("all", console.number(found["cycles"]))],
        )
        same = "equal to the reference in every bit" if found["equal"] else "NOT equal to the reference"
        console.print_text(f"{found['values']:,} outputs are {same}")
    if not found["equal"]:
        sys.exit(1)


def _hardware_units() -> Any:
    """The units. Raises ``MissingToolError`` where the packages of the hardware are not installed."""
    try:
        import amaranth  # noqa: F401
    except ImportError:
        raise MissingToolError("the hardware needs Amaranth: pip install 'termwise[fpga]'") from None
    from termwise.rtl.units import UNITS

    return UNITS


@main.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@_json_option
def report(*, run: Path, as_json: bool) -> None:
    """Write tables, figures and the HTML page of a run again, from its records."""
    from termwise.flow.report import results_document, write_report
    from termwise.flow.results import collect, read_run

    results = collect(run, read_run(run), console.warn)
    written = write_report(results, run)
    if as_json:
        console.print_json(results_document(results, written))
    else:
        _print_results(results, written.page, written.report)
    if results.failed:
        sys.exit(1)


@main.command()
@_json_option
def doctor(*, as_json: bool) -> None:
    """Say what is installed, what is missing, and how to get it."""
    from termwise.flow.doctor import examine, to_document

    findings = examine()
    document = to_document(findings)
    if as_json:
        console.print_json(document)
    else:
        console.print_table(
            f"termwise {__version__} on Python {document['python']}, {document['platform']}",
            ("name", "kind", "state", "version", "for", "how to get it"),
            [
                (
                    finding.name,
                    finding.kind,
                    "here" if finding.present else "MISSING" if finding.required else "not here",
                    finding.version or "–",
                    finding.purpose,
                    "" if finding.present else finding.get,
                )
                for finding in findings
            ],
            left=6,
        )
    if not document["complete"]:
        missing = ", ".join(finding.name for finding in findings if finding.required and not finding.present)
        _fail(f"error: packages are missing: {missing}", 3)


if __name__ == "__main__":
    main()
