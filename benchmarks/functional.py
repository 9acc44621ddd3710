"""Speed of what the PEs compute: PE-cycles and products per CPU second of the compiled kernels.

    python benchmarks/functional.py [--repeats 5]

One process on one core, ``time.process_time``, the median of the repeats after a warm-up that compiles. A PE-cycle is a
cycle of one PE of a 32 × 32 array: a term of a step on a bit-serial PE, a step on the others; 64 tokens fill the
columns. Prints one JSON document with the products per second beside it, since idle lanes are easy to count; every
result is compared with the reference on one output first.
"""

from __future__ import annotations

import json
import os
import statistics
import time

import click

OUTPUTS, INPUTS, TOKENS = 1024, 2048, 64
REQUIRED = {"bit_serial": 2e8, "outlier_victim": 6e8}


@click.command()
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
def main(repeats: int) -> None:
    """Measure and print."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for library in ("NUMBA", "OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = "1"

    import numpy as np

    from termwise.algorithms import reference
    from termwise.algorithms.activations import InputSample, activation_quantizer
    from termwise.algorithms.bit_serial import BitSerialSpec
    from termwise.algorithms.flint import FlintSpec
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.fp16_mac import Fp16MacSpec
    from termwise.algorithms.outlier_victim import OutlierVictimSpec
    from termwise.algorithms.quantize import quantize
    from termwise.sim import functional

    random = np.random.default_rng(0)
    weights = (random.standard_t(4, (OUTPUTS, INPUTS)) * 0.05).astype(np.float32)
    activations = random.standard_normal((TOKENS, INPUTS)).astype(np.float16)
    whole = activations.astype(np.float32)
    sample = InputSample(rows=whole, minimum=whole.min(axis=0), maximum=whole.max(axis=0), tokens=TOKENS)
    results = []
    for spec, name in (
        (BitSerialSpec(numerics="paper"), "bitmod-w4g128"),
        (BitSerialSpec(numerics="paper"), "int-w8g128"),
        (BitSerialSpec(numerics="exact"), "bitmod-w4g128"),
        (BitSerialSpec(numerics="shared_exponent"), "bitmod-w4g128"),
        (OutlierVictimSpec(), "olive-w4"),
        (OutlierVictimSpec(activations="integer"), "olive-w4a4"),
        (OutlierVictimSpec(activations="integer"), "olive-w8a8"),
        (FlintSpec(), "ant-w4g128"),
        (FlintSpec(activations="integer"), "ant-w4a4g128"),
        (Fp16MacSpec(), "fp16"),
    ):
        tensor = quantize(weights, name)
        few = quantize(weights[:1], name)
        kind = getattr(spec, "activations", "fp16")
        fast, exact, operand = functional.multiply, reference.multiply, activations
        if kind == "integer":
            quantizer = activation_quantizer(get_format(name), sample)
            fast, exact = functional.multiply_integers, reference.multiply_integers
            operand = quantizer.quantize(whole)
            first = quantizer.quantize(whole[:1])
        else:
            first = activations[:1]
        if not np.array_equal(fast(spec, few, first), exact(spec, few, first)):
            raise SystemExit(f"{spec.kind} on {name}: the kernel differs from the reference")
        fast(spec, tensor, operand)
        seconds = []
        for _ in range(repeats):
            begin = time.process_time()
            fast(spec, tensor, operand)
            seconds.append(time.process_time() - begin)
        steps = -(-INPUTS // spec.lanes) * OUTPUTS * TOKENS
        cycles = steps * spec.cycles_per_step(tensor.format)
        rate = cycles / statistics.median(seconds)
        results.append(
            {
                "pe": spec.kind,
                "activations": kind,
                "numerics": getattr(spec, "numerics", None),
                "format": name,
                "pe_cycles_per_second": rate,
                "products_per_second": OUTPUTS * INPUTS * TOKENS / statistics.median(seconds),
                "required_pe_cycles_per_second": REQUIRED.get(spec.kind),
            }
        )
    load = os.getloadavg()[0]
    click.echo(
        json.dumps({"outputs": OUTPUTS, "inputs": INPUTS, "tokens": TOKENS, "load": load, "results": results}, indent=1)
    )


if __name__ == "__main__":
    main()
