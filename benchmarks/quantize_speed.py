"""CPU time of quantizing a 4096 × 4096 FP16 matrix, beside plain round-to-nearest in the same run.

    python benchmarks/quantize_speed.py [--repeats 3]

One thread (in a process of its own with NUMBA_NUM_THREADS=1), ``time.process_time``, the best of the repeats; kernels
are compiled before. Round-to-nearest is int-w4g128: one scale per group, codes, packing. The searches of OliVe and ANT
without groups try 88 and 76 scales per type. Then the wall time of bitmod-w4g128 on one and on two threads, which means
something only where two cores are free. The matrix is the heavy-tailed one of synthetic_matrix.py. Prints one JSON
document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import click
from synthetic_matrix import heavy_tailed

ROWS = COLUMNS = 4096
REFERENCE = "int-w4g128"
NAMES = (
    REFERENCE,
    "bitmod-w4g128",
    "bitmod-w3g128",
    "olive-w4",
    "olive-w8",
    "ant-w4g128",
    "ant-w4",
    "gobo-w3",
    "mxfp4",
)
LIMITS = {"bitmod-w4g128": 0.6, "olive-w4": 30.0}
"""Most CPU seconds that a format may take."""
LIMIT_OF_RATIO = {"bitmod-w4g128": 8.0}
"""Most times the CPU seconds of round-to-nearest."""
THREADED = "bitmod-w4g128"


def seconds(names: tuple[str, ...], repeats: int) -> dict[str, dict[str, float]]:
    """CPU and wall seconds of quantizing to every format, the best of ``repeats`` rounds over all of them."""
    from termwise.algorithms.quantize import quantize

    weights = heavy_tailed(ROWS, COLUMNS, seed=0)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        quantize(weights[:2], name)
    for _ in range(repeats):
        for name in names:
            cpu, wall = time.process_time(), time.perf_counter()
            quantize(weights, name)
            now = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            before = found.get(name, now)
            found[name] = {clock: min(now[clock], before[clock]) for clock in now}
    return found


def in_a_process(names: tuple[str, ...], repeats: int, threads: int) -> dict[str, dict[str, float]]:
    """``seconds`` in a fresh process on that many threads."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--repeats", str(repeats), "--measure", ",".join(names)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, dict[str, float]] = json.loads(done.stdout)
    return result


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--measure", hidden=True, help="Formats to measure in this process, separated by commas.")
def main(repeats: int, measure: str | None) -> None:
    """Measure and print; exit with 1 where a format takes longer than it may."""
    if measure is not None:
        click.echo(json.dumps(seconds(tuple(measure.split(",")), repeats)))
        return
    found = in_a_process(NAMES, repeats, threads=1)
    reference = found[REFERENCE]["cpu"]
    rows = {name: {"cpu_seconds": found[name]["cpu"], "over_rtn": found[name]["cpu"] / reference} for name in NAMES}
    one, two = (in_a_process((THREADED,), repeats, threads)[THREADED] for threads in (1, 2))
    slow = [name for name, limit in LIMITS.items() if rows[name]["cpu_seconds"] > limit]
    slow += [name for name, limit in LIMIT_OF_RATIO.items() if rows[name]["over_rtn"] > limit]
    result = {
        "matrix": [ROWS, COLUMNS],
        "formats": rows,
        "two_threads": {
            "format": THREADED,
            "wall_seconds": [one["wall"], two["wall"]],
            "cpu_seconds": [one["cpu"], two["cpu"]],
            "speedup": one["wall"] / two["wall"],
        },
        "slower_than_allowed": slow,
    }
    click.echo(json.dumps(result, indent=2))
    sys.exit(1 if slow else 0)


if __name__ == "__main__":
    main()
