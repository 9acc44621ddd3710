"""What the workloads and the simulator leave out, in numbers: the tables of ``docs/assumptions.md``.

Every number comes from shapes, workloads, formats and the constants of an accelerator; nothing is simulated. A test
holds the page to them; ``python -m termwise.sim.assumptions`` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from termwise.algorithms.formats import get_format
from termwise.algorithms.shapes import ModelShape, known_shape
from termwise.algorithms.workload import (
    EXPERTS,
    PHASES,
    PhaseWork,
    cached_numbers,
    generation,
    phase_work,
    table_reads,
    touched_experts,
)
from termwise.sim.accelerators import get_accelerator

MODELS = ("opt-1.3b", "phi-2", "yi-6b", "llama-2-7b", "llama-2-13b", "llama-3-8b", "gemma-2-9b", "mixtral-8x7b")
"""The models of the BitMoD paper, one with windows and four norms a layer, one with experts."""

CONTEXTS = (256, 4096)
WEIGHTS = "bitmod-w4g128"
ACCELERATOR = "bitmod-lossy"
SCALE_BYTES = 2
"""An FP16 scale for each key and each value of a token in a head."""

NORM_AND_BIAS_BYTES = 2
LONG_CONTEXT = 32768
INT64_MAX = (1 << 63) - 1


def _table(header: list[str], rows: Iterable[list[str]], texts: int = 1) -> str:
    """Markdown; the first ``texts`` columns are text, the others numbers."""
    rule = "|" + "---|" * texts + "--:|" * (len(header) - texts)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def _percent(part: float, whole: float) -> str:
    """More digits after the point for a smaller share."""
    share = 100 * part / whole
    digits = 1 if share >= 10 else 2 if share >= 0.01 else 4
    return f"{share:.{digits}f} %"


def packed_weight_bytes(shape: ModelShape) -> int:
    """Bytes of all linear layers in ``WEIGHTS``."""
    format = get_format(WEIGHTS)
    return sum(format.packed_bytes(linear.outputs, linear.inputs) for linear in shape.linears)


def touched_weight_bytes(work: PhaseWork) -> int:
    """Bytes in ``WEIGHTS`` of the linear layers that a phase uses, each read once."""
    format = get_format(WEIGHTS)
    return sum(
        gemm.repeats * format.packed_bytes(gemm.outputs, gemm.reduction)
        for gemm in work.gemms
        if gemm.operand == "weight"
    )


def vector_table() -> str:
    """Elements of vector operations for 1000 multiplications."""

    def row(model: str) -> list[str]:
        works = [
            phase_work(known_shape(model), phase=phase, context=context) for phase in PHASES for context in CONTEXTS
        ]
        cells = [f"{1000 * work.vector_elements / work.multiplications:.2f}" for work in works]
        softmax = [sum(part.total for part in work.vector_operations if part.name == "softmax") for work in works]
        return [model, *cells, _percent(softmax[1], works[1].vector_elements)]

    header = [f"{phase}, {context}" for phase in PHASES for context in CONTEXTS]
    return _table(["model", *header, f"softmax of prefill, {CONTEXTS[1]}"], map(row, MODELS))


def vector_unit_table() -> str:
    """Elements per cycle at which a vector unit takes as long as the array, or as external memory, at its peak.

    Prefill: the array at its peak of multiplications per cycle. Decode: the channel that reads each weight once.
    """
    accelerator = get_accelerator(ACCELERATOR)
    array = accelerator.array("prefill")
    processing_element = accelerator.processing_element
    steps = processing_element.cycles_per_step(get_format(accelerator.default_format("prefill")))
    peak = array.rows * array.columns * processing_element.lanes / steps

    def row(model: str) -> list[str]:
        cells = []
        for context in CONTEXTS:
            prefill = phase_work(known_shape(model), phase="prefill", context=context)
            cells.append(f"{prefill.vector_elements / (prefill.multiplications / peak):.1f}")
        for context in CONTEXTS:
            decode = phase_work(known_shape(model), phase="decode", context=context)
            cycles = touched_weight_bytes(decode) / accelerator.ideal_bytes_per_cycle
            cells.append(f"{decode.vector_elements / cycles:.2f}")
        return [model, *cells]

    return _table(["model", *(f"{phase}, {context}" for phase in PHASES for context in CONTEXTS)], map(row, MODELS))


def byte_table() -> str:
    """What a decode step moves besides the weights, in percent of the weights that it reads."""
    context = CONTEXTS[1]
    cache_bits = get_accelerator(ACCELERATOR).key_value_bits

    def row(model: str) -> list[str]:
        shape = known_shape(model)
        attention = shape.attention
        assert attention is not None
        weights = touched_weight_bytes(phase_work(shape, phase="decode", context=context))
        numbers = cached_numbers(attention, context)
        parts = [
            sum(read.read_bytes() for read in table_reads(shape, phase="decode", context=context, batch=1)),
            (shape.biases + shape.norm_parameters) * NORM_AND_BIAS_BYTES,
            numbers * cache_bits // 8,
            numbers // attention.head_size * SCALE_BYTES,
            cached_numbers(attention, 1) * cache_bits // 8,
        ]
        return [model, *(_percent(part, weights) for part in parts)]

    header = ["embedding rows", "biases and norms", "cache (simulated)", "scales of the cache", "own key and value"]
    return _table(["model", *header], map(row, MODELS))


def embedding_table() -> str:
    """Tables of embeddings in FP16 against the packed linear layers: memory that is held, and mostly not moved."""

    def row(model: str) -> list[str]:
        shape = known_shape(model)
        tables = sum(table.rows * table.features for table in shape.embeddings) * 2
        return [model, f"{shape.parameters:,}", f"{tables / 2**20:,.0f}", _percent(tables, packed_weight_bytes(shape))]

    return _table(["model", "parameters", "tables (MiB)", "of the packed linear layers"], map(row, MODELS))


def mask_table() -> str:
    """Share of a prefill's multiplications whose score a causal mask removes."""

    def removed(model: str, context: int) -> str:
        shape = known_shape(model)
        attention = shape.attention
        assert attention is not None
        work = phase_work(shape, phase="prefill", context=context)
        computed = sum(gemm.multiplications for gemm in work.gemms if gemm.operand != "weight")
        # Query t needs t + 1 keys, at most the window: as many as are cached in the decode step before, and its own.
        needed = sum(cached_numbers(attention, tokens) for tokens in range(1, context + 1))
        needed *= attention.heads // attention.key_value_heads
        return _percent(computed - needed, work.multiplications)

    header = [f"context {context}" for context in CONTEXTS]
    return _table(["model", *header], ([model, *(removed(model, context) for context in CONTEXTS)] for model in MODELS))


def window_table() -> str:
    """Bytes of the cache that a decode step reads with the window and would read without it."""
    cache_bits = get_accelerator(ACCELERATOR).key_value_bits

    def row(model: str) -> list[str]:
        attention = known_shape(model).attention
        assert attention is not None
        read = cached_numbers(attention, LONG_CONTEXT)
        whole = cached_numbers(attention, 1) * LONG_CONTEXT
        layers = f"{attention.windowed_layers} of {attention.layers}"
        mebibytes = [f"{numbers * cache_bits / 8 / 2**20:,.0f}" for numbers in (whole, read)]
        return [model, f"{attention.window:,}", layers, *mebibytes, _percent(read, whole)]

    models = ("mistral-7b", "phi-3-mini", "gemma-2-9b")
    return _table(["model", "window", "layers", "whole (MiB)", "windowed (MiB)", "share"], map(row, models))


def expert_table() -> str:
    """Experts of Mixtral that a phase of so many tokens touches under both rules, and the weights that it reads."""
    shape = known_shape("mixtral-8x7b")
    routed = next(linear for linear in shape.linears if linear.experts > 1)
    whole = packed_weight_bytes(shape)

    def row(tokens: int) -> list[str]:
        cells = []
        for rule in EXPERTS:
            touched = touched_experts(routed.experts, routed.experts_per_token, tokens, rule)
            work = phase_work(shape, phase="decode", context=1, batch=tokens, experts=rule)
            cells += [f"{touched} of {routed.experts}", _percent(touched_weight_bytes(work), whole)]
        return [str(tokens), *cells]

    header = ["tokens", "expected", "weights read", "worst", "weights read"]
    return _table(header, map(row, (1, 2, 3, 4, 8, 16)), texts=0)


def first_above(limit: int, count: Callable[[int], int]) -> int:
    """The smallest number from 1 on for which the growing ``count`` is above ``limit``."""
    high = 1
    while count(high) <= limit:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= limit else (low, middle)
    return high


def int64_table() -> str:
    """Contexts and numbers of decode steps at which a sum of multiplications no longer fits int64."""

    def row(model: str) -> list[str]:
        shape = known_shape(model)
        prefill = first_above(
            INT64_MAX, lambda context: phase_work(shape, phase="prefill", context=context).multiplications
        )
        steps = first_above(INT64_MAX, lambda count: generation(shape, context=1, steps=count).multiplications)
        return [model, f"{prefill:,}", f"{steps:,}"]

    return _table(["model", "prefill of so many tokens", "decode steps after one token"], map(row, MODELS))


def documented_tables() -> dict[str, str]:
    """The tables of ``docs/assumptions.md`` by name."""
    return {
        "vector operations": vector_table(),
        "vector unit": vector_unit_table(),
        "bytes": byte_table(),
        "embeddings": embedding_table(),
        "mask": mask_table(),
        "windows": window_table(),
        "experts": expert_table(),
        "int64": int64_table(),
    }


if __name__ == "__main__":
    for name, table in documented_tables().items():
        print(f"{name}\n\n{table}\n")
