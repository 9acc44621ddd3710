"""Speed of the compiled published model beside the readable one: model × configuration evaluations per CPU second.

    python benchmarks/published_model.py [--configurations 50000] [--repeats 5] [--out FILE]

One process pinned to one core, ``time.process_time``, the median of the repeats after a warm-up; compiling the kernel
(without Numba's cache on disk) is measured apart. The configurations are random in all ten parameters that an
accelerator of the model has; each is evaluated on the six models of the paper, prefill and decode, in both states. The
readable model evaluates a sample of the same configurations in the same run, and its cycles must be equal. Prints one
JSON document; exits with 1 below the rate that is required.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

if TYPE_CHECKING:
    from termwise.sim.accelerators import Accelerator

REQUIRED_PER_SECOND = 1e6
AIM_PER_SECOND = 5e6
SAMPLE = 20


def processor() -> str:
    """Name of the processor, where the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@click.command()
@click.option("--configurations", "number", default=50_000, show_default=True, type=click.IntRange(min=SAMPLE))
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON document here.")
def main(number: int, repeats: int, out: Path | None) -> None:
    """Measure and print."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    os.environ["NUMBA_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as empty_cache:
        os.environ["NUMBA_CACHE_DIR"] = empty_cache
        document = measured(number, repeats)
    text = json.dumps(document, indent=2)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    sys.exit(document["slowest_evaluations_per_second"] < REQUIRED_PER_SECOND)


def measured(number: int, repeats: int) -> dict[str, object]:
    """The document: one result per state and phase."""
    from termwise.algorithms.shapes import known_shape
    from termwise.algorithms.workload import PHASES
    from termwise.sim.accelerators import ArrayShape, get_accelerator
    from termwise.sim.dram import Dram
    from termwise.sim.published import PUBLISHED_MODELS, PUBLISHED_STATES, simulate_published
    from termwise.sim.published_sweep import configurations_of, evaluate_published

    generator = np.random.default_rng(0)
    shapes = [known_shape(name) for name in PUBLISHED_MODELS]
    bases = [get_accelerator(name) for name in ("fp16", "bitmod-lossy")]

    def random_accelerator() -> Accelerator:
        side = ArrayShape(rows=int(generator.integers(4, 129)), columns=int(generator.integers(4, 129)))
        return dataclasses.replace(
            bases[int(generator.integers(2))],
            prefill_array=side,
            decode_array=side,
            port_reads_per_step=int(generator.integers(1, 3)),
            weight_buffer_bytes=1024 * int(generator.integers(64, 2049)),
            activation_buffer_bytes=1024 * int(generator.integers(64, 2049)),
            memory=Dram(
                name="ideal",
                ideal_bytes_per_cycle=int(generator.integers(8, 129)),
                energy_pj_per_bit=float(generator.uniform(4, 25)),
            ),
            pe_energy_pj_per_cycle=float(generator.uniform(0.2, 1)),
        )

    accelerators = [random_accelerator() for _ in range(number)]
    weight_bits = generator.uniform(2, 16, number).tolist()
    key_value_bits = generator.uniform(4, 16, number).tolist()

    results = []
    compile_seconds = None
    for state in PUBLISHED_STATES.values():
        for phase in PHASES:
            configurations = configurations_of(
                accelerators, phase=phase, weight_bits=weight_bits, key_value_bits=key_value_bits
            )
            before = time.process_time()
            compiled = evaluate_published(configurations, shapes, phase=phase, state=state)
            first = time.process_time() - before
            seconds = []
            for _ in range(repeats):
                before = time.process_time()
                evaluate_published(configurations, shapes, phase=phase, state=state)
                seconds.append(time.process_time() - before)
            median = statistics.median(seconds)
            if compile_seconds is None:
                compile_seconds = first - median
            before = time.process_time()
            cycles = [
                [
                    simulate_published(
                        shape,
                        accelerators[index],
                        phase=phase,
                        state=state,
                        weight_bits=weight_bits[index],
                        key_value_bits=key_value_bits[index],
                    ).cycles
                    for shape in shapes
                ]
                for index in range(SAMPLE)
            ]
            readable = time.process_time() - before
            if cycles != compiled.cycles[:SAMPLE].tolist():
                raise SystemExit(
                    f"{state.name}, {phase}: the compiled model's cycles are not those of the readable one"
                )
            evaluations = number * len(shapes)
            results.append(
                {
                    "state": state.name,
                    "phase": phase,
                    "evaluations": evaluations,
                    "median_cpu_seconds": median,
                    "cpu_seconds": seconds,
                    "evaluations_per_second": evaluations / median,
                    "readable_evaluations_per_second": SAMPLE * len(shapes) / readable,
                    "speedup": evaluations / median * readable / (SAMPLE * len(shapes)),
                }
            )
    return {
        "machine": processor(),
        "load_average": os.getloadavg()[0],
        "models": list(PUBLISHED_MODELS),
        "compile_cpu_seconds": compile_seconds,
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "required_per_second": REQUIRED_PER_SECOND,
        "aim_per_second": AIM_PER_SECOND,
        "slowest_evaluations_per_second": min(entry["evaluations_per_second"] for entry in results),
        "results": results,
    }


if __name__ == "__main__":
    main()
