"""Processor time and peak memory of calibrated quantization of the model ``tiny``, for every method.

    python benchmarks/calibration.py [FORMAT]

Each method runs in a process of its own, on one thread, after a calibration on one window that loads what is loaded
once. Memory is what the peak of the resident memory rises by. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def peak_bytes() -> int:
    """Peak resident memory of this process (Linux)."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(format: str, method: str) -> None:
    from termwise.algorithms.calibrated import get_method, quantize_calibrated
    from termwise.algorithms.calibration import Calibration
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.models import open_model
    from termwise.algorithms.text import calibration_text

    model, text = open_model("tiny"), calibration_text()
    arguments = (model, get_format(format), text, get_method(method))
    list(quantize_calibrated(*arguments, maximum_windows=1))
    before, start = peak_bytes(), time.process_time()
    list(quantize_calibrated(*arguments))
    result = {
        "method": method,
        "tokens": Calibration(model, text).tokens,
        "processor_seconds": time.process_time() - start,
        "peak_memory_rise_bytes": peak_bytes() - before,
        "peak_memory_bytes": peak_bytes(),
    }
    print(json.dumps(result))


def main() -> None:
    from termwise.algorithms.calibrated import METHODS

    format = sys.argv[1] if len(sys.argv) > 1 else "int-w3g128"
    results = []
    for method in METHODS:
        command = [sys.executable, __file__, format, method]
        done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout))
    print(json.dumps({"format": format, "methods": results}, indent=2))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[1], sys.argv[2])
    else:
        main()
