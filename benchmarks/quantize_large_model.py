"""Quantize a model of Llama-2-7B's shape, layer by layer, killed half-way and resumed: memory, rate and disk use.

    python benchmarks/quantize_large_model.py [--layers 32] [--format bitmod-w4g128] [--folder DIR]

Writes a checkpoint of random FP16 weights in shards (12.6 GB with all 32 layers) to a temporary folder, quantizes it
in a process that is killed (SIGKILL) after half of its matrices, and resumes in a second one, which finishes. Each
reports the peak of its anonymous memory (sampled every 10 ms) and the peak of its resident memory, which also counts
the code of all libraries and the pages of the tensor that is mapped from the checkpoint. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from termwise.algorithms.formats import Format
    from termwise.algorithms.models import Model

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
MATRICES_PER_LAYER = 7
BLOCK_ROWS = 64


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs (Linux)."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class PeakMemory:
    """``with PeakMemory() as peak: ...``: the greatest ``anonymous_bytes`` meanwhile, sampled every 10 ms."""

    def __enter__(self) -> PeakMemory:
        self.anonymous_bytes = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def quantize_model(model: Model, format: Format, directory: Path, kill_after: int | None = None) -> dict[str, int]:
    """Quantize what is not done yet; numbers of ``resumed`` and ``quantized`` layers and of quantized ``weights``.

    ``kill_after`` so many layers, the process kills itself.
    """
    from termwise.algorithms.packed_model import PackedModelWriter
    from termwise.algorithms.quantize import quantize

    counts = {"resumed": 0, "quantized": 0, "weights": 0}
    with PackedModelWriter(model, format, directory) as writer:
        for name in model.matrix_names:
            if writer.done(name) is not None:
                counts["resumed"] += 1
                continue
            matrix = model.matrix(name)
            writer.add(name, quantize(matrix, format, name=name))
            counts["quantized"] += 1
            counts["weights"] += matrix.size
            if counts["quantized"] == kill_after:
                print(json.dumps(counts | memory()), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        writer.finish()
    return counts


PEAK = PeakMemory()


def memory() -> dict[str, int]:
    """Peaks of this process so far."""
    return {
        "peak_anonymous_bytes": PEAK.anonymous_bytes,
        "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def run_here(directory: Path, out: Path, format: str, kill_after: int | None) -> None:
    """One process of the benchmark: quantize, and print counts, peaks and seconds as JSON."""
    from termwise.algorithms.formats import get_format
    from termwise.algorithms.models import open_model

    with PEAK:
        model = open_model(directory)
        start = time.perf_counter()
        counts = quantize_model(model, get_format(format), out, kill_after)
        seconds = time.perf_counter() - start
    print(json.dumps(counts | memory() | {"seconds": seconds}))


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, layer by layer."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        for kind in ("q", "k", "v", "o"):
            yield f"model.layers.{layer}.self_attn.{kind}_proj.weight", (HIDDEN, HIDDEN)
        for kind, shape in (
            ("gate", (INTERMEDIATE, HIDDEN)),
            ("up", (INTERMEDIATE, HIDDEN)),
            ("down", (HIDDEN, INTERMEDIATE)),
        ):
            yield f"model.layers.{layer}.mlp.{kind}_proj.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make_model(directory: Path, layers: int) -> int:
    """Write the model to ``directory``; its number of bytes. One block of random rows serves for all, scaled anew."""
    from termwise.algorithms.tensor_files import StoredTensor, write_shards

    random = np.random.default_rng(0)
    block = random.standard_t(5, BLOCK_ROWS * INTERMEDIATE).astype(np.float32) * 0.02

    def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
        size = 2 * int(np.prod(shape))

        def chunks() -> Iterator[bytes]:
            for start in range(0, size // 2, block.size):
                count = min(block.size, size // 2 - start)
                yield (block[:count] * np.float32(random.uniform(0.5, 2))).astype(np.float16).tobytes()

        return StoredTensor(name=name, dtype="F16", shape=shape, nbytes=size, chunks=chunks)

    all_tensors = [stored(name, shape) for name, shape in tensors(layers)]
    write_shards(directory, all_tensors, {}, shard_bytes=5_000_000_000)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(tensor.nbytes for tensor in all_tensors)


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def child(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Return status and last line of a process of the benchmark."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if not lines:
        raise SystemExit(f"the process ended with status {done.returncode} and printed nothing")
    return done.returncode, json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--format", default="bitmod-w4g128")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--run", nargs=3, metavar=("MODEL", "OUT", "KILL_AFTER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        kill_after = int(arguments.run[2]) or None
        run_here(Path(arguments.run[0]), Path(arguments.run[1]), arguments.format, kill_after)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model, out = Path(folder) / "model", Path(folder) / "packed"
        model.mkdir()
        needed = 2 * 2 * sum(int(np.prod(shape)) for _, shape in tensors(arguments.layers))
        if shutil.disk_usage(folder).free < needed:
            parser.error(f"{folder} has less than {needed:,} bytes free; expected fewer --layers or another --folder")
        start = time.perf_counter()
        model_bytes = make_model(model, arguments.layers)
        made_seconds = time.perf_counter() - start
        half = (arguments.layers * MATRICES_PER_LAYER + 1) // 2
        status, first = child("--format", arguments.format, "--run", str(model), str(out), str(half))
        assert status == -signal.SIGKILL, f"expected a killed process, got status {status}"
        assert not out.exists()
        partial_bytes = bytes_in(Path(f"{out}.partial"))
        status, second = child("--format", arguments.format, "--run", str(model), str(out), "0")
        assert status == 0
        assert second["resumed"] == first["quantized"] == half
        result = {
            "layers": arguments.layers,
            "format": arguments.format,
            "model_bytes": model_bytes,
            "making_it_seconds": made_seconds,
            "killed_run": first,
            "resumed_run": second,
            "weights_per_second": second["weights"] / second["seconds"],
            "partial_bytes": partial_bytes,
            "packed_bytes": bytes_in(out),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
