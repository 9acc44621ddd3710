"""Speed of value-dependent timing: a decode step of Llama-2-7B from the codes of its weights, on one core.

    python benchmarks/value_timing.py [--repeats 5]

Realistic weights stand for the model's: of every distinct layer shape one matrix (Student's t with 4 degrees of
freedom), quantized before the clock starts and packed as in a file. Then the steps of all linear layers are found from
the packed codes, layer by layer without any memory of the one before, and the products simulated with these steps and
DDR4-3200. One process on one core, ``time.process_time``, the median of the repeats after a warm-up that compiles.
Prints one JSON document; exits with 1 above the time that is required.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import click

REQUIRED_SECONDS = 5.0


@click.command()
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
def main(repeats: int) -> None:
    """Measure and print."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["NUMBA_NUM_THREADS"] = "1"

    import numpy as np

    from termwise.algorithms.bit_serial import BitSerialSpec, Skipping
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.quantize import QuantizedTensor, quantize
    from termwise.algorithms.shapes import known_shape
    from termwise.algorithms.workload import workload
    from termwise.sim.accelerators import get_accelerator
    from termwise.sim.cycle import run_tile_program
    from termwise.sim.dram import get_dram
    from termwise.sim.kernels import TileProgram
    from termwise.sim.plan import plan_product
    from termwise.sim.simulate import product_of
    from termwise.sim.value_timing import value_timing

    random = np.random.default_rng(0)
    accelerator = get_accelerator("bitmod-lossy")
    memory = get_dram("ddr4-3200").timing(accelerator.clock_mhz)
    gemms = [
        gemm
        for gemm in workload(known_shape("llama-2-7b"), phase="decode", context=256, batch=1)
        if gemm.operand == "weight"
    ]
    weights = sum(gemm.outputs * gemm.reduction * gemm.repeats for gemm in gemms)
    results = []
    for name in ("bitmod-w4g128", "bitmod-w3g128"):
        shapes = {(gemm.outputs, gemm.reduction) for gemm in gemms}
        tensors = {
            shape: quantize((random.standard_t(4, shape) * 0.02).astype(np.float32), name) for shape in sorted(shapes)
        }
        programs = [
            plan_product(product_of(gemm, accelerator, "decode", get_format(name)))._replace(burst_bytes=0)
            for gemm in gemms
        ]

        def decode(skip: Skipping, programs: list[TileProgram], tensors: dict[tuple[int, int], QuantizedTensor]) -> int:
            spec = BitSerialSpec(skip_zero_terms=skip)
            cycles = 0
            for gemm, program in zip(gemms, programs, strict=True):
                for _ in range(gemm.repeats):
                    values = value_timing(spec, tensors[gemm.outputs, gemm.reduction], program.rows)
                    cycles += run_tile_program(program, memory=memory, values=values).cycles
            return cycles

        skips: tuple[Skipping, ...] = ("none", "tile", "row")
        for skip in skips:
            cycles = decode(skip, programs, tensors)
            seconds = []
            for _ in range(repeats):
                before = time.process_time()
                decode(skip, programs, tensors)
                seconds.append(time.process_time() - before)
            median = statistics.median(seconds)
            results.append(
                {
                    "format": name,
                    "skip_zero_terms": skip,
                    "cycles": cycles,
                    "seconds": median,
                    "weights_per_second": weights / median,
                }
            )
    slowest = max(result["seconds"] for result in results)
    click.echo(json.dumps({"load": os.getloadavg()[0], "weights": weights, "results": results}, indent=2))
    sys.exit(slowest > REQUIRED_SECONDS)


if __name__ == "__main__":
    main()
