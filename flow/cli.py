"""The command line: ``termwise COMMAND``.

Results go to standard output, with ``--json`` one JSON document and nothing else; messages and progress bars go to
standard error. Exit status: 0 done, 1 something was computed and is wrong, 2 bad input (nothing was written), 3 a tool
is missing, 130 interrupted, 141 the reader of a pipe went away. Every error is one sentence on standard error.

Modules that a command needs are imported inside it, so that no command pays for another's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from termwise import __version__
from termwise.algorithms.errors import InputError, TermwiseError, unknown_name
from termwise.flow import console

if TYPE_CHECKING:
    from termwise.algorithms.quantize import QuantizedTensor
    from termwise.algorithms.text import Text
    from termwise.flow.quality import WeightQuality
    from termwise.flow.subject import Subject
    from termwise.flow.sweep import Progress

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


@click.group(cls=_Commands, name="termwise", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="termwise", message="termwise %(version)s")
def main() -> None:
    """Co-design number formats of language models and the accelerators that compute with them.

    MODEL is a directory in Hugging Face format, a Hugging Face id, or tiny, the model that ships with termwise; for
    simulate and sweep also a known shape such as llama-2-7b.
    """


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
                        "bits_per_weight": entry.bits_per_weight(side, side),
                        "datatypes": [datatype.name for datatype in entry.datatypes],
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
        ("name", "code bits", "group", "bits per weight", "data types of a group"),
        [
            (
                name,
                str(entry.weight_bits),
                "row" if entry.group_size is None else str(entry.group_size),
                f"{entry.bits_per_weight(side, side):.4f}",
                ", ".join(datatype.name for datatype in entry.datatypes) or "–",
            )
            for name, entry in named
        ],
        left=(0, 4),
    )


def _levels(levels: Sequence[float]) -> str:
    """Levels for a table: all of a small type, the ends of a large one."""
    shown = [f"{level:g}" for level in levels]
    if len(shown) > 16:
        shown = [*shown[:2], "…", *shown[-2:]]
    return " ".join(shown)


@main.command()
@click.argument("model")
@click.option("--format", "format_name", required=True, metavar="FORMAT", help="As termwise formats lists them.")
@click.option("--out", type=click.Path(path_type=Path), help="New directory for the packed model.")
@_text_option
@_json_option
def quantize(*, model: str, format_name: str, out: Path | None, text_file: Path | None, as_json: bool) -> None:
    """Quantize MODEL: error of every layer, bits per weight, perplexity before and after."""
    from termwise.algorithms.formats import get_format
    from termwise.flow.folders import check_new_folder
    from termwise.flow.quality import evaluate_format
    from termwise.flow.subject import NO_WEIGHTS, open_subject, open_text

    format = get_format(format_name)
    subject = open_subject(model)
    if subject.model is None:
        raise InputError(f"{model}: {NO_WEIGHTS}; expected a directory, a Hugging Face id or tiny")
    if out is not None:
        check_new_folder(out)
    reason = subject.not_runnable_reason
    text = open_text(text_file) if reason is None or text_file is not None else None
    evaluator = None
    before = None
    if reason is None and text is not None:
        from termwise.algorithms.perplexity import Evaluator

        console.say(f"perplexity of {subject.name} on {text.name}")
        evaluator = Evaluator(subject.model, text)
        before = evaluator.perplexity().per_token
    kept: dict[str, QuantizedTensor] = {}
    total = len(subject.model.matrix_names)
    quality, after, failure = evaluate_format(
        subject.model,
        format,
        evaluator,
        wrap=lambda matrices: console.progress(matrices, total=total, label=format.name, unit="layer"),
        keep=kept.__setitem__ if out is not None else None,
    )
    if out is not None:
        from termwise.algorithms.packed_model import PackedModelWriter

        with PackedModelWriter(subject.model, format, out) as writer:
            for name, tensor in kept.items():
                writer.add(name, tensor)
            writer.finish()
    reason = reason or failure
    if as_json:
        console.print_json(
            {
                "model": subject.name,
                "model_digest": subject.digest,
                "format": format.name,
                **quality.to_dict(),
                "perplexity": {"before": before, "after": after} if reason is None else None,
                "perplexity_reason": reason,
                "text": _text_document(text if evaluator is not None else None),
                "out": None if out is None else str(out),
            }
        )
        return
    _print_quantization(subject, format.name, quality)
    if reason is None and text is not None:
        console.print_text(
            f"perplexity per token on {text.name}: {console.number(before)} before, {console.number(after)} after"
        )
    else:
        console.print_text(f"no perplexity: {reason}")
    if out is not None:
        console.print_text(f"packed model: {out}")


def _text_document(text: Text | None) -> dict[str, str] | None:
    return None if text is None else {"name": text.name, "digest": text.digest}


def _print_quantization(subject: Subject, format: str, quality: WeightQuality) -> None:
    notes = any(layer.note for layer in quality.layers)
    columns = ["layer", "outputs", "inputs", "bits per weight", "SQNR (dB)", "mean squared error"]
    console.print_table(
        f"{subject.name} in {format}",
        [*columns, *(["note"] if notes else [])],
        [
            (
                layer.name,
                f"{layer.shape[0]:,}",
                f"{layer.shape[1]:,}",
                f"{layer.bits_per_weight:.4f}",
                "exact" if layer.sqnr_db is None else f"{layer.sqnr_db:.2f}",
                f"{layer.mse:.3e}",
                *([layer.note] if notes else []),
            )
            for layer in quality.layers
        ],
        left=(0, len(columns)),
    )
    lost = "exact" if quality.sqnr_db is None else f"SQNR {quality.sqnr_db:.2f} dB"
    console.print_text(
        f"all {quality.weights:,} weights of {len(quality.layers)} layers: {quality.bits_per_weight:.4f} bits per "
        f"weight, {quality.packed_bytes:,} bytes, {lost}"
    )


@main.command()
@click.argument("model")
@click.option(
    "--accelerator",
    "accelerator_name",
    required=True,
    metavar="ACCELERATOR",
    help="For example bitmod-lossy or olive@32x32.",
)
@click.option("--format", "format_name", metavar="FORMAT", help="Of the weights.  [default: the accelerator's own]")
@click.option("--phase", default="prefill", show_default=True, metavar="PHASE", help="prefill or decode.")
@click.option(
    "--context", default=256, show_default=True, help="Tokens of a prefill, or tokens cached in a decode step."
)
@click.option("--batch", default=1, show_default=True, help="Sequences at once.")
@click.option(
    "--model-of",
    default="cycle",
    show_default=True,
    metavar="MODEL_OF",
    help="cycle: the cycle-level simulator; published: the closed form of the BitMoD paper.",
)
@_json_option
def simulate(
    *,
    model: str,
    accelerator_name: str,
    format_name: str | None,
    phase: str,
    context: int,
    batch: int,
    model_of: str,
    as_json: bool,
) -> None:
    """Simulate MODEL on an accelerator: cycles and their causes, traffic, energy."""
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.workload import check_phase
    from termwise.flow.subject import open_subject
    from termwise.sim.accelerators import get_accelerator

    accelerator = get_accelerator(accelerator_name)
    checked = check_phase(phase)
    format = None if format_name is None else get_format(format_name)
    if model_of not in ("cycle", "published"):
        raise unknown_name("model of the hardware", model_of, ("cycle", "published"))
    if model_of == "published" and format is not None:
        raise InputError(
            f"--format {format.name}: the published model has its own weight precisions; expected no --format with "
            "--model-of published"
        )
    shape = open_subject(model).shape
    if model_of == "published":
        from termwise.sim.published import simulate_published

        document = simulate_published(shape, accelerator, phase=checked, context=context, batch=batch).to_dict()
    else:
        from termwise.sim.simulate import simulate as simulate_cycles

        with _bar(f"{shape.name} on {accelerator.name}", "product") as (begin, advance):

            def told(_: int, total: int) -> None:
                begin(total)
                advance()

            document = simulate_cycles(
                shape,
                accelerator,
                phase=checked,
                weights=format,
                context=context,
                batch=batch,
                progress=told,
            ).to_dict()
    if as_json:
        console.print_json(document)
    else:
        _print_simulation(document)


@contextlib.contextmanager
def _bar(label: str, unit: str) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """A progress bar on standard error (a terminal only): set its total, advance it by one."""
    from tqdm import tqdm

    with tqdm(total=0, desc=label, unit=unit, file=sys.stderr, disable=None, leave=False) as bar:

        def begin(total: int) -> None:
            bar.total = total
            bar.refresh()

        yield begin, lambda: (bar.update(1), None)[1]


def _print_simulation(document: dict[str, Any]) -> None:
    published = document["model_of"] == "published"
    stored = f"{document['weight_bits']:.4g} bits per weight" if published else document["format"]
    title = (
        f"{document['model']} on {document['accelerator']}, {stored}, {document['phase']}, context "
        f"{document['context']}, batch {document['batch']}"
    )
    if not published:
        console.print_table(
            title,
            (
                "product",
                "operand",
                "tokens",
                "reduction",
                "outputs",
                "times",
                "cycles",
                "PE use",
                "DRAM bytes",
                "energy (µJ)",
            ),
            [
                (
                    layer["name"],
                    layer["operand"],
                    *(f"{layer[key]:,}" for key in ("tokens", "reduction", "outputs", "repeats", "cycles")),
                    f"{100 * layer['pe_utilization']:.1f} %",
                    f"{layer['traffic_bytes']:,}",
                    console.number(layer["energy_uj"]),
                )
                for layer in document["layers"]
            ],
            left=2,
        )
    else:
        console.print_text(f"{title}: the published closed form")
    cycles = document["cycles"]
    console.print_text(
        f"latency: {cycles:,} cycles, {console.number(document['latency_ms'])} ms at {document['clock_mhz']:,} MHz"
    )
    causes = [("compute", "compute_cycles")]
    if not published:
        causes += [
            ("waiting for weights", "weight_stall_cycles"),
            ("waiting for activations", "activation_stall_cycles"),
            ("fill and drain", "drain_stall_cycles"),
        ]
    shares = ", ".join(
        f"{name} {document[key]:,} ({100 * document[key] / max(cycles, 1):.1f} %)" for name, key in causes
    )
    console.print_text(f"cycles by cause: {shares}")
    energy = document["energy_uj"]
    parts = [("PEs", "pe_energy_uj"), ("buffers", "sram_energy_uj"), ("DRAM", "dram_energy_uj")]
    split = ", ".join(f"{name} {100 * document[key] / energy:.1f} %" for name, key in parts) if energy else "–"
    console.print_text(f"energy: {console.number(energy)} µJ: {split}")
    console.print_text(f"DRAM traffic: {document['traffic_bytes']:,} bytes")
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
