"""Time and peak memory of quantizing a 4096 × 11008 FP16 matrix to bitmod-w4g128, against a plain search in torch.

    python benchmarks/quantize_bitmod.py

Both run in this one process on the same number of threads. The search in torch tries the four data types one after the
other on the whole matrix in float32: divide by the scale, find the nearest level among the midpoints, square, average,
keep the better. It makes no second-level scales and packs nothing; ours does both. Prints one JSON document.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

OUTPUTS, INPUTS, GROUP = 4096, 11008, 128
REPEATS = 5


def matrix() -> NDArray[np.float16]:
    """Student-t weights with 5 degrees of freedom, FP16, made in blocks so that making them costs no memory."""
    random = np.random.default_rng(0)
    weights = np.empty((OUTPUTS, INPUTS), dtype=np.float16)
    for row in range(0, OUTPUTS, 64):
        weights[row : row + 64] = random.standard_t(5, (64, INPUTS)) * 0.02
    return weights


def ours_seconds(weights: NDArray[np.float16]) -> float:
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.quantize import quantize

    format = get_format(f"bitmod-w4g{GROUP}")
    quantize(weights[:2], format)
    return min(timed(lambda: quantize(weights, format)) for _ in range(REPEATS))


def torch_seconds(weights: NDArray[np.float16], threads: int) -> float:
    import torch

    from termwise.algorithms.formats import get_format

    torch.set_num_threads(threads)
    groups = torch.from_numpy(weights).to(torch.float32).view(-1, GROUP)
    datatypes = [torch.tensor(datatype.levels) for datatype in get_format("bitmod-w4").datatypes]

    def search() -> None:
        largest = groups.abs().amax(dim=1, keepdim=True)
        best_error = torch.full((groups.shape[0], 1), torch.inf)
        best = torch.zeros_like(groups)
        for levels in datatypes:
            scale = largest / levels.abs().max()
            nearest = torch.bucketize(groups / scale, (levels[1:] + levels[:-1]) / 2)
            quantized = levels[nearest] * scale
            error = (quantized - groups).square().mean(dim=1, keepdim=True)
            better = error < best_error
            best = torch.where(better, quantized, best)
            best_error = torch.where(better, error, best_error)

    return min(timed(search) for _ in range(2))


def timed(call: object) -> float:
    assert callable(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def status_bytes(key: str) -> int:
    """A line of this process's status file (Linux), in bytes: VmRSS is present, VmHWM peak resident memory."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def peak_memory_ratio() -> float:
    """Peak memory of quantizing, the matrix itself included, in matrices; in a process of its own."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "import quantize_bitmod as benchmark\n"
        "from termwise.algorithms.formats import get_format\n"
        "from termwise.algorithms.quantize import quantize\n"
        "import numpy as np\n"
        "quantize(np.ones((2, 256), dtype=np.float16), get_format('bitmod-w4g128'))\n"
        "weights = benchmark.matrix()\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # restart the peak at the present use
        "before = benchmark.status_bytes('VmRSS') - weights.nbytes\n"
        "packed = quantize(weights, get_format('bitmod-w4g128'))\n"
        "print((benchmark.status_bytes('VmHWM') - before) / weights.nbytes)\n"
    )
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    import numba

    weights = matrix()
    ours = ours_seconds(weights)
    theirs = torch_seconds(weights, numba.get_num_threads())
    result = {
        "matrix": [OUTPUTS, INPUTS],
        "threads": numba.get_num_threads(),
        "ours_seconds": ours,
        "torch_seconds": theirs,
        "speedup": theirs / ours,
        "peak_memory_over_matrix": peak_memory_ratio(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
