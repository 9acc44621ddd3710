"""Everything that needs a GPU, in one command: build, check, golden vectors, benchmarks; one folder to copy back.

    python -m termwise.gpu_ref.run --out gpu-results

It needs this package, torch for CUDA, and nvcc or NVRTC, and takes some minutes. One JSON document goes to standard
output, progress to standard error. Exit status: 0 all checks passed, 1 one failed, 2 bad input, 3 something is missing.
With ``--rehearse`` the same runs on the CPU by the kernels' twins, without benchmarks.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from termwise import __version__
from termwise.algorithms.errors import TermwiseError
from termwise.algorithms.files import directory_written_beside, write_text
from termwise.gpu_ref import benchmark, build, checks
from termwise.gpu_ref.launch import check_device

SANITIZERS = ("memcheck", "racecheck", "initcheck")
_SANITIZER_SECONDS = 60
_QUERIES = (
    ("driver", "driver_version"),
    ("sm_clock", "clocks.sm"),
    ("sm_clock_most", "clocks.max.sm"),
    ("memory_clock", "clocks.mem"),
    ("power", "power.draw"),
    ("power_limit", "power.limit"),
    ("temperature", "temperature.gpu"),
)


def environment(device: torch.device) -> dict[str, str]:
    """Where this runs, as words: device, driver, clocks, versions. What nobody knows is ``unknown``."""
    found = {
        "termwise": __version__,
        "torch": torch.__version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": "the kernels' twins on the CPU",
        "host_compiler": build.host_compiler()[1],
    }
    library = build.nvrtc()
    found["compiler"] = f"NVRTC {library.version()}" if library is not None else f"nvcc {build.nvcc() or 'unknown'}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = str(properties.multi_processor_count)
        found |= _nvidia_smi()
    return found


def _nvidia_smi() -> dict[str, str]:
    """Driver and clocks as the driver's own tool states them."""
    unknown = {name: "unknown" for name, _ in _QUERIES}
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return unknown
    query = ",".join(key for _, key in _QUERIES)
    done = subprocess.run(
        [tool, f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    if done.returncode or len(values) != len(_QUERIES):
        return unknown
    return {name: value for (name, _), value in zip(_QUERIES, values, strict=True)}


def sanitize(tool: str) -> dict[str, str]:
    """What one of compute-sanitizer's tools says of a few small checks: passed, failed or skipped, and why."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"tool": tool, "status": "skipped", "reason": "compute-sanitizer was not found"}
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "termwise.gpu_ref.run", "--few"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SANITIZER_SECONDS, env=os.environ
        )
    except subprocess.TimeoutExpired:
        return {"tool": tool, "status": "skipped", "reason": f"it took more than {_SANITIZER_SECONDS} s"}
    said = (done.stdout + done.stderr).strip().splitlines()[-1:]
    return {"tool": tool, "status": "failed" if done.returncode else "passed", "reason": "".join(said)}


def _checks(device: torch.device, golden: list[checks.Golden], *, few: bool) -> list[checks.Check]:
    outputs, tokens = (8, 2) if few else (256, 8)
    found: list[checks.Check] = []
    for some in (
        checks.exact_checks(device, outputs=outputs, tokens=tokens, keep=golden.append),
        checks.weight_only_checks(device, outputs=24 if few else 1000, inputs=300 if few else 4128),
        checks.quantizer_checks(device, outputs=outputs),
        checks.bit_plane_checks(device),
    ):
        for check in some:
            _say(f"{check.name} {check.format}: {check.wrong} of {check.cases} wrong")
            found.append(check)
    return found


def _say(text: str) -> None:
    print(f"termwise: {text}", file=sys.stderr, flush=True)


def run(folder: Path, device: torch.device) -> dict[str, Any]:
    """Do all of it into ``folder``; the document, which is ``results.json`` there as well."""
    began = time.monotonic()
    where = environment(device)
    _say(f"{where['device']}, {where['compiler']}")
    golden: list[checks.Golden] = []
    rehearsal = device.type == "cpu"
    made = _checks(device, golden, few=rehearsal)
    for entry in golden:
        checks.write_golden(entry, folder / "golden", where)
    document: dict[str, Any] = {
        "environment": where,
        "checks": [asdict(check) for check in made],
        "golden": [f"golden/{entry.name}.safetensors" for entry in golden],
        "sanitizers": [],
        "bandwidth_bytes_per_second": None,
        "timings": [],
        "exact_seconds": None,
        "benchmarks_skipped": "a rehearsal on the CPU measures nothing" if rehearsal else None,
    }
    if not rehearsal:
        document["sanitizers"] = [sanitize(tool) for tool in SANITIZERS]
        bandwidth = benchmark.measured_bandwidth(device)
        document["bandwidth_bytes_per_second"] = bandwidth
        document["timings"] = [timing.to_dict() for timing in benchmark.benchmark(device, bandwidth, _say)]
        document["exact_seconds"] = benchmark.exact_against_twin(device)
        document["environment_after"] = environment(device)
    document["seconds"] = round(time.monotonic() - began, 1)
    write_text(folder / "results.json", json.dumps(document, indent=2) + "\n")
    write_text(folder / "report.md", report(document))
    if document["timings"]:
        draw_roofline(document, folder)
    return document


def report(document: dict[str, Any]) -> str:
    """The document as a page: where it ran, the checks, the times."""
    where = document["environment"]
    wrong = sum(check["wrong"] for check in document["checks"])
    cases = sum(check["cases"] for check in document["checks"])
    lines = ["# Kernels on " + where["device"], "", "Made by `python -m termwise.gpu_ref.run`.", ""]
    lines += [f"* {key}: {value}" for key, value in where.items()]
    lines += ["", "## Checks", "", f"{wrong} of {cases:,} numbers are wrong.", ""]
    lines += ["| kernel | format | numbers | wrong |", "|---|---|---|---|"]
    lines += [
        f"| {check['name']} | {check['format']} | {check['cases']:,} | {check['wrong']} |"
        for check in document["checks"]
    ]
    if document["sanitizers"]:
        lines += ["", "| compute-sanitizer | | |", "|---|---|---|"]
        lines += [f"| {entry['tool']} | {entry['status']} | {entry['reason']} |" for entry in document["sanitizers"]]
    lines += ["", "## Times", ""]
    if document["benchmarks_skipped"]:
        return "\n".join([*lines, f"None: {document['benchmarks_skipped']}.", ""])
    lines += [
        f"A copy moves {document['bandwidth_bytes_per_second'] / 1e12:.2f} TB/s; shares are of that. Weights are read "
        "from memory, not from the cache.",
        "",
        "![roofline](roofline.png)",
        "",
        "| kernel | outputs | inputs | tokens | µs | spread (%) | TB/s | of a copy (%) | against FP16 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for timing in document["timings"]:
        shape = f"| {timing['kernel']} | {timing['outputs']} | {timing['inputs']} | {timing['tokens']} |"
        if timing["error"] is not None:
            lines.append(f"{shape} {timing['error']} | | | | |")
            continue
        against = "–" if timing["against_fp16"] is None else f"{timing['against_fp16']:.2f}"
        lines.append(
            f"{shape} {timing['microseconds']:.1f} | {100 * timing['spread']:.1f} | "
            f"{timing['bytes_per_second'] / 1e12:.2f} | {100 * timing['share_of_peak']:.0f} | {against} |"
        )
    exact = document["exact_seconds"]
    lines += [
        "",
        f"The exact BitMoD kernel is {exact['twin'] / exact['device']:.0f} times as fast as its twin here.",
        "",
    ]
    return "\n".join(lines)


def draw_roofline(document: dict[str, Any], folder: Path) -> None:
    """``roofline.png`` and ``.svg``: operations per second over operations per byte, under the memory's line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    bandwidth = document["bandwidth_bytes_per_second"]
    known = [timing for timing in document["timings"] if timing["error"] is None]
    ends = [0.5, 2 * max(_intensity(timing) for timing in known)]
    axes.plot(ends, [end * bandwidth / 1e12 for end in ends], color="black", label="a copy's bandwidth")
    for kernel in dict.fromkeys(timing["kernel"] for timing in known):
        mine = [timing for timing in known if timing["kernel"] == kernel]
        rates = [2 * _products(timing) / timing["microseconds"] * 1e6 / 1e12 for timing in mine]
        axes.plot([_intensity(timing) for timing in mine], rates, "o", label=kernel)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="10¹² operations per second")
    axes.legend(fontsize="small")
    for kind in ("png", "svg"):
        figure.savefig(folder / f"roofline.{kind}", dpi=150)


def _products(timing: dict[str, Any]) -> int:
    return int(timing["outputs"] * timing["inputs"] * timing["tokens"])


def _intensity(timing: dict[str, Any]) -> float:
    moved = timing["weight_bytes"] + 2 * timing["tokens"] * (timing["inputs"] + timing["outputs"])
    return float(2 * _products(timing) / moved)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="gpu-results", show_default=True, help="New folder.")
@click.option("--rehearse", is_flag=True, help="On the CPU, by the kernels' twins: fewer checks, no benchmarks.")
@click.option("--few", is_flag=True, hidden=True, help="A few small checks on the GPU, without a folder.")
def main(out: Path, rehearse: bool, few: bool) -> None:
    """Build, check and measure the kernels on this machine's GPU; golden vectors and results go to a new folder."""
    device = torch.device("cpu" if rehearse else "cuda")
    try:
        check_device(device)
        if few:
            made = _checks(device, [], few=True)
            sys.exit(int(any(check.wrong for check in made)))
        with directory_written_beside(out.absolute()) as folder:
            document = run(folder, device)
    except TermwiseError as error:
        print(f"termwise: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    print(json.dumps(document, indent=2))
    sys.exit(int(any(check["wrong"] for check in document["checks"])))


if __name__ == "__main__":
    main()
