"""How fast the kernels are on a GPU, beside what else multiplies there, and beside the memory's own speed.

Every time is the median of replays of a CUDA graph, so that Python is not measured, divided by the calls in it. Calls
go round over as many copies of the weights as pass the second-level cache four times.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import TermwiseError
from termwise.algorithms.quantize import quantize
from termwise.gpu_ref import exact, quantizers
from termwise.gpu_ref.layout import ROWS, fast_layout
from termwise.gpu_ref.weight_only import weight_only

SHAPES = ((8192, 28672), (4096, 4096))
"""Outputs and inputs: beyond any second-level cache, and a layer for which starting a kernel takes as long as it."""

FORMATS = ("bitmod-w4g128", "bitmod-w3g128", "bitmod-w6g128", "olive-w4", "ant-w4g128")
TOKENS = (1, 16, 64)
BASELINE = "cuBLAS FP16"
TRITON = "Triton int4"
_QUANTIZED_ROWS = 256
_CALLS = 20
_REPLAYS = 30


@dataclass(frozen=True)
class Timing:
    """One kernel on one shape.

    Attributes:
        kernel: format, or the name of a peer.
        outputs, inputs, tokens: of the product.
        microseconds: median of a call.
        spread: (largest - least) / median of the replays.
        weight_bytes: that a call must read, scales included.
        bytes_per_second: all bytes that a call must move, over its time.
        share_of_peak: of the measured bandwidth of a copy.
        against_fp16: time of cuBLAS in FP16 on the same shape over this one.
        error: why there is no time; None where there is.
    """

    kernel: str
    outputs: int
    inputs: int
    tokens: int
    microseconds: float | None = None
    spread: float | None = None
    weight_bytes: int | None = None
    bytes_per_second: float | None = None
    share_of_peak: float | None = None
    against_fp16: float | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    microseconds, _ = _time([lambda: target.copy_(source)])
    return 2 * source.numel() / microseconds * 1e6


def _time(calls: list[Callable[[], Any]]) -> tuple[float, float]:
    """Median microseconds of one of ``calls``, which are replayed in turn, and the spread of the replays."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # modules are loaded, memory is allocated
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(_CALLS):
            calls[index % len(calls)]()
    times = []
    graph.replay()
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / _CALLS)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def _rotated(weight_bytes: int, device: torch.device) -> int:
    """Copies of the weights, so that none is in the cache when its turn comes again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_CALLS, -(-4 * cache // weight_bytes)))


Calls = list[Callable[[torch.Tensor], torch.Tensor]]
"""Products with copies of one matrix, of FP16 activations [tokens, inputs]."""


def _fast_calls(format: str, outputs: int, inputs: int, device: torch.device) -> tuple[Calls, int]:
    """Calls of the kernel of ``format``, and the bytes of weights of each: some quantized rows, again and again."""
    random = np.random.default_rng(0)
    some = (random.standard_t(4, (_QUANTIZED_ROWS, inputs)) * 0.02).astype(np.float32)
    on_gpu = format.startswith(quantizers.FAMILIES)
    layout = fast_layout(quantizers.quantize(some, format, device=device) if on_gpu else quantize(some, format))
    times = outputs // _QUANTIZED_ROWS
    assert outputs % _QUANTIZED_ROWS == 0
    assert _QUANTIZED_ROWS % ROWS == 0
    parts = [
        torch.from_numpy(layout.codes.view(np.int32)).repeat(times, 1, 1).to(device),
        torch.from_numpy(layout.scales.view(np.int16)).repeat(times, 1, 1).to(device),
        torch.from_numpy(layout.tables).to(device),
        torch.from_numpy(layout.channel_scales).repeat(times).to(device),
    ]
    weight_bytes = sum(part.numel() * part.element_size() for part in parts)
    settings = (layout.kernel, inputs, layout.group_shift, layout.type_mask, layout.exponent)
    copies = [parts, *([part.clone() for part in parts] for _ in range(_rotated(weight_bytes, device) - 1))]
    return [functools.partial(_fast, held, settings) for held in copies], weight_bytes


def _fast(held: list[torch.Tensor], settings: tuple[Any, ...], activations: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = weight_only(activations, *held, *settings)
    return found


def _half_calls(outputs: int, inputs: int, device: torch.device) -> tuple[Calls, int]:
    """cuBLAS in FP16."""
    weight_bytes = 2 * outputs * inputs
    copies = [
        torch.empty((outputs, inputs), dtype=torch.float16, device=device).normal_()
        for _ in range(_rotated(weight_bytes, device))
    ]
    return [functools.partial(torch.nn.functional.linear, weight=held) for held in copies], weight_bytes


def _torch_int4_calls(outputs: int, inputs: int, device: torch.device) -> tuple[Calls, int]:
    """torch's own kernel of 4-bit integers in groups of 128, with BF16 activations."""
    group, inner = 128, 8
    weight_bytes = outputs * inputs // 2 + 4 * outputs * inputs // group
    calls: Calls = []
    for _ in range(_rotated(weight_bytes, device)):
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, inner)
        scales = torch.rand((inputs // group, outputs, 2), dtype=torch.bfloat16, device=device)
        calls.append(functools.partial(_torch_int4, packed, scales, group))
    return calls, weight_bytes


def _torch_int4(packed: torch.Tensor, scales: torch.Tensor, group: int, activations: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.aten._weight_int4pack_mm(activations.view(torch.bfloat16), packed, group, scales)
    return found


def _triton_calls(outputs: int, inputs: int, device: torch.device) -> tuple[Calls, int]:
    """4-bit integers in groups of 128, dequantized by Triton, one token."""
    from termwise.gpu_ref import triton_peer

    weight_bytes = outputs * inputs // 2 + 2 * outputs * inputs // triton_peer.GROUP
    calls: Calls = []
    for _ in range(_rotated(weight_bytes, device)):
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
        scales = torch.rand((outputs, inputs // triton_peer.GROUP), device=device).half()
        calls.append(functools.partial(triton_peer.multiply, codes=codes, scales=scales))
    return calls, weight_bytes


def benchmark(device: torch.device, bandwidth: float, progress: Callable[[str], None]) -> list[Timing]:
    """Times of the fast kernels and their peers.

    A kernel that fails has an error in the place of a time; the others are measured all the same.
    """
    makers: dict[str, Callable[[int, int, torch.device], tuple[Calls, int]]] = {
        BASELINE: _half_calls,
        "torch int4": _torch_int4_calls,
    }
    if importlib.util.find_spec("triton"):
        makers[TRITON] = _triton_calls
    makers |= {format: functools.partial(_fast_calls, format) for format in FORMATS}
    found: list[Timing] = []
    for (outputs, inputs), (kernel, make) in itertools.product(SHAPES, makers.items()):
        progress(f"{kernel}, {outputs} × {inputs}")
        calls: Calls = []
        weight_bytes = 0
        error: Exception | None = None
        try:
            calls, weight_bytes = make(outputs, inputs, device)
        except (RuntimeError, AttributeError, TermwiseError) as refusal:
            error = refusal
        for tokens in TOKENS if kernel != TRITON else (1,):
            timing = Timing(kernel, outputs, inputs, tokens)
            activations = torch.empty((tokens, inputs), dtype=torch.float16, device=device).normal_()
            try:
                if error is not None:
                    raise error
                microseconds, spread = _time([functools.partial(call, activations) for call in calls])
            except (RuntimeError, AttributeError, TermwiseError) as refusal:
                found.append(replace(timing, error=str(refusal).partition("\n")[0]))
                continue
            rate = (weight_bytes + 2 * tokens * (inputs + outputs)) / microseconds * 1e6
            found.append(
                replace(
                    timing,
                    microseconds=microseconds,
                    spread=spread,
                    weight_bytes=weight_bytes,
                    bytes_per_second=rate,
                    share_of_peak=rate / bandwidth,
                )
            )
        calls.clear()
        torch.cuda.empty_cache()
    return against_baseline(found)


def against_baseline(timings: list[Timing]) -> list[Timing]:
    """The timings with their ratio to cuBLAS on the same shape, where both have a time."""
    known = {(entry.outputs, entry.inputs, entry.tokens): entry for entry in timings if entry.kernel == BASELINE}
    found = []
    for entry in timings:
        baseline = known.get((entry.outputs, entry.inputs, entry.tokens))
        ratio = None
        if baseline is not None and baseline.microseconds is not None and entry.microseconds is not None:
            ratio = baseline.microseconds / entry.microseconds
        found.append(replace(entry, against_fp16=ratio))
    return found


def exact_against_twin(device: torch.device) -> dict[str, float]:
    """Seconds of the exact BitMoD kernel for 512 × 2048 weights and 32 tokens: on ``device``, and its twin."""
    random = np.random.default_rng(0)
    tensor = quantize((random.standard_t(4, (512, 2048)) * 0.02).astype(np.float32), "bitmod-w4g128")
    activations = random.standard_normal((32, 2048)).astype(np.float16)
    seconds = {}
    for name, where in (("device", device), ("twin", torch.device("cpu"))):
        exact.multiply(BitSerialSpec(), tensor, activations, device=where)
        begin = time.perf_counter()
        exact.multiply(BitSerialSpec(), tensor, activations, device=where)
        seconds[name] = time.perf_counter() - begin
    return seconds
