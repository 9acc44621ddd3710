"""Speed of the cycle-level simulator: array cycles per CPU second, whole models, and a cold start.

    python benchmarks/simulator.py [--repeats 5] [--out FILE]

One process on one core, ``time.process_time``, the median of the repeats after a warm-up; the first call, which
compiles or reads Numba's cache, stands apart. Prints one JSON document; exits with 1 below a rate that is required:

* ``value_driven``: products of a Llama-2-7B prefill whose every step has its own number of cycles (1 or 2, at random),
  with buffers, stalls and DRAM bursts (DDR4-3200 pages, banks, refresh), event by event.
* ``fast_forward``: all of Llama-2-7B, prefill of 256 tokens and a decode step, on one accelerator; Llama-2-70B with
  32,768 tokens as a ratio to it; and the same products stepped from event to event, in the same run.
* ``cold_start``: wall time of ``termwise simulate --json`` in a new process with Numba's cache warm.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

VALUE_DRIVEN_CYCLES_PER_SECOND = 1e7
FAST_FORWARD_SECONDS = 50e-3
LARGE_MODEL_RATIO = 3
COLD_START_SECONDS = 1.5


@click.command()
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON document here.")
def main(repeats: int, out: Path | None) -> None:
    """Measure and print."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["NUMBA_NUM_THREADS"] = "1"

    def median_of(call: Callable[[], Any]) -> tuple[float, float]:
        """CPU seconds of a call, and of the first one."""
        seconds = []
        for _ in range(repeats + 1):
            before = time.process_time()
            call()
            seconds.append(time.process_time() - before)
        return statistics.median(seconds[1:]), seconds[0]

    results = {
        "value_driven": value_driven(median_of),
        "fast_forward": fast_forward(median_of),
        "cold_start": cold_start(repeats),
    }
    missed = [
        name
        for name, met in {
            "value_driven": results["value_driven"]["array_cycles_per_second"] >= VALUE_DRIVEN_CYCLES_PER_SECOND,
            "fast_forward": results["fast_forward"]["seconds"] <= FAST_FORWARD_SECONDS,
            "large_model": results["fast_forward"]["large_model_ratio"] <= LARGE_MODEL_RATIO,
            "cold_start": results["cold_start"]["wall_seconds"] <= COLD_START_SECONDS,
        }.items()
        if not met
    ]
    document = {"load": os.getloadavg()[0], **results, "missed": missed}
    text = json.dumps(document, indent=2)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    sys.exit(bool(missed))


def value_driven(median_of: Callable[[Callable[[], Any]], tuple[float, float]]) -> dict[str, Any]:
    """Distinct products of a prefill with DRAM and random cycles per step."""
    import numpy as np

    from termwise.algorithms.formats import get_format
    from termwise.algorithms.shapes import known_shape
    from termwise.algorithms.workload import workload
    from termwise.sim.accelerators import get_accelerator
    from termwise.sim.cycle import ValueTiming, run_tile_program
    from termwise.sim.dram import get_dram
    from termwise.sim.kernels import steps_of
    from termwise.sim.plan import ceil_divide, plan_product
    from termwise.sim.simulate import product_of

    accelerator, weights = get_accelerator("bitmod-lossy"), get_format("bitmod-w4g128")
    memory = get_dram("ddr4-3200").timing(accelerator.clock_mhz)
    random = np.random.default_rng(0)
    runs = []
    for gemm in workload(known_shape("llama-2-7b"), phase="prefill", context=256, batch=1):
        if gemm.operand != "weight":
            continue
        program = plan_product(product_of(gemm, accelerator, "prefill", weights))._replace(burst_bytes=0)
        tiles = ceil_divide(program.outputs, program.rows)
        values = ValueTiming(
            step_cycles=random.integers(1, 3, (tiles, int(steps_of(program))), np.uint8),
            drain_cycles=np.full(tiles, program.drain_cycles),
        )
        runs.append((program, values))

    def simulate_all() -> tuple[int, int]:
        counts = [run_tile_program(program, memory=memory, values=values) for program, values in runs]
        return sum(count.cycles for count in counts), sum(count.traffic.total_bytes for count in counts)

    cycles, traffic = simulate_all()
    median, first = median_of(simulate_all)
    return {
        "array_cycles": cycles,
        "traffic_bytes": traffic,
        "seconds": median,
        "first_seconds": first,
        "array_cycles_per_second": cycles / median,
    }


def fast_forward(median_of: Callable[[Callable[[], Any]], tuple[float, float]]) -> dict[str, Any]:
    """Whole models by jumps, and by steps."""
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.shapes import known_shape
    from termwise.algorithms.workload import Phase, workload
    from termwise.sim.accelerators import get_accelerator
    from termwise.sim.cycle import run_tile_program
    from termwise.sim.plan import plan_product
    from termwise.sim.simulate import product_of, simulate

    accelerator = get_accelerator("bitmod-lossy")
    shape, large = known_shape("llama-2-7b"), known_shape("llama-2-70b")

    def both_phases() -> None:
        simulate(shape, accelerator, phase="prefill")
        simulate(shape, accelerator, phase="decode")

    def run(phase: Phase, jump: bool) -> list[Any]:
        gemms = workload(shape, phase=phase, context=256, batch=1)
        weights = get_format(accelerator.default_format(phase))
        programs = [plan_product(product_of(gemm, accelerator, phase, weights)) for gemm in gemms]
        return [run_tile_program(program, fast_forward=jump) for program in programs]

    def large_phases() -> None:
        simulate(large, accelerator, phase="prefill", context=32_768)
        simulate(large, accelerator, phase="decode", context=32_768)

    seconds, first = median_of(both_phases)
    large_seconds, _ = median_of(large_phases)
    jumping, _ = median_of(lambda: (run("prefill", True), run("decode", True)))
    stepping, _ = median_of(lambda: (run("prefill", False), run("decode", False)))
    if run("prefill", True) != run("prefill", False):
        raise SystemExit("jumps change the counts")
    return {
        "seconds": seconds,
        "first_seconds": first,
        "large_model_seconds": large_seconds,
        "large_model_ratio": large_seconds / seconds,
        "stepped_over_jumping": stepping / jumping,
    }


def cold_start(repeats: int) -> dict[str, Any]:
    """A new process, as a user starts it."""
    program = "from termwise.flow.cli import main; main()"
    command = [sys.executable, "-c", program, "simulate", "llama-2-7b", "--accelerator", "bitmod-lossy", "--json"]
    seconds = []
    for _ in range(repeats + 1):
        before = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - before)
    return {"wall_seconds": statistics.median(seconds[1:]), "first_seconds": seconds[0]}


if __name__ == "__main__":
    main()
