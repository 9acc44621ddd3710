"""Whole generations: a prefill of the prompt, then decode steps whose cache grows by a token each.

The first token comes out of the prefill, so M output tokens are a prefill and M - 1 decode steps; step i (from 0) reads
the ``context + i`` tokens that are cached (``algorithms.workload.Generation``). The result is exactly the sum of the
simulations of all steps. It costs little more than two of them, because only attention depends on the cache: the linear
layers of a step are simulated once, the attention once per distinct size.

The weights are in one format for both phases, since a model is held once: that of the decode phase where none is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.shapes import ModelShape
from termwise.algorithms.workload import Gemm, Phase, check_count, vector_operations, workload
from termwise.sim.accelerators import Accelerator
from termwise.sim.simulate import simulate
from termwise.sim.totals import Totals, summed, totals_of
from termwise.sim.vector_unit import CAUSE, EXAMPLE_LANES, VectorUnit, VectorWork

Progress = Callable[[int, int], None]
"""Is called with the parts that are finished and their number."""

Tensors = Callable[[str], QuantizedTensor]
"""The weights of a linear layer by its name; see ``simulate``."""


def simulate_phase(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    phase: Phase,
    weights: Format | None = None,
    context: int = 256,
    batch: int = 1,
    vector_unit: VectorUnit | None = None,
    tensors: Tensors | None = None,
    stepped: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """``simulate(...).to_dict()`` with the vector operations on ``vector_unit``, or a note that they are left out.

    With a unit, ``vector_operations`` lists them, ``stalls`` has the cause ``vector``, and cycles, latency and all that
    follows from it include them. Raises ``InputError`` as ``simulate`` does.
    """
    document = simulate(
        shape,
        accelerator,
        phase=phase,
        weights=weights,
        context=context,
        batch=batch,
        tensors=tensors,
        stepped=stepped,
        progress=progress,
    ).to_dict()
    work = VectorWork(vector_unit or VectorUnit(lanes=EXAMPLE_LANES))
    work.add(vector_operations(shape, phase=phase, context=context, batch=batch))
    return _with_vector_operations(document, work, counted=vector_unit is not None)


def _with_vector_operations(document: dict[str, Any], work: VectorWork, *, counted: bool) -> dict[str, Any]:
    """The document of a phase with the operations counted, or noted as left out."""
    if not counted:
        notes = [work.left_out_note(document["cycles"])] if work else []
        return {**document, "notes": [*document["notes"], *notes]}
    totals = totals_of(document).stalled(CAUSE, work.cycles)
    latency_ms = totals.cycles / (document["clock_mhz"] * 1e3)
    tokens = document["batch"] * (document["context"] if document["phase"] == "prefill" else 1)
    energy = totals.energy_uj["total"]
    changed: dict[str, Any] = {
        **document,
        "latency_ms": latency_ms,
        "tokens_per_second": tokens * 1e3 / latency_ms,
        "energy_per_token_uj": None if energy is None else energy / tokens,
        **totals.to_dict(),
        "vector_operations": work.to_list(),
        "notes": [*document["notes"], work.counted_note()],
    }
    if "time_to_first_token_ms" in document:
        changed["time_to_first_token_ms"] = latency_ms
    return changed


def simulate_generation(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    weights: Format | None = None,
    context: int = 256,
    output_tokens: int = 256,
    batch: int = 1,
    vector_unit: VectorUnit | None = None,
    tensors: Tensors | None = None,
    stepped: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Simulate a prompt of ``context`` tokens and ``output_tokens`` new ones for ``batch`` sequences.

    ``progress`` is called with the phases finished (the prefill, then each step) and their number.

    Returns a JSON-ready document with the keys of ``Simulation.to_dict`` where both have them, of the whole generation:
    ``tokens_per_second`` and ``energy_per_token_uj`` are about the new tokens. Beside them: ``output_tokens``,
    ``time_to_first_token_ms`` (the prefill), ``time_per_output_token_ms`` (``mean``, ``first`` and ``last`` of the
    steps, None where there is no step) and ``phases`` with the totals of ``prefill`` and ``decode``. An entry of
    ``layers`` is a product in one ``phase``, all steps together, with its ``multiplications`` in place of its sizes.

    Raises ``InputError`` as ``simulate`` does, and for less than one output token.
    """
    check_count("the number of output tokens", output_tokens)
    steps = output_tokens - 1
    weights = get_format(accelerator.default_format("decode")) if weights is None else weights
    work = VectorWork(vector_unit or VectorUnit(lanes=EXAMPLE_LANES))

    def document_of(phase: Phase, shape: ModelShape = shape, cached: int = context) -> dict[str, Any]:
        return simulate(
            shape,
            accelerator,
            phase=phase,
            weights=weights,
            context=cached,
            batch=batch,
            tensors=tensors,
            stepped=stepped,
        ).to_dict()

    def vector_cycles(phase: Phase, cached: int) -> int:
        """Cycles of the vector operations of one phase that count, and adds them to ``work``."""
        before = work.cycles
        work.add(vector_operations(shape, phase=phase, context=cached, batch=batch))
        return work.cycles - before if vector_unit is not None else 0

    def told(done: int) -> None:
        if progress is not None:
            progress(done, steps + 1)

    prefill = document_of("prefill")
    layers = _Layers()
    layers.add("prefill", prefill["layers"])
    prefill_totals = _stalled(totals_of(prefill), vector_cycles("prefill", context), vector_unit)
    told(1)

    step_cycles: list[int] = []
    decode_vector_cycles = 0
    notes = {"prefill": prefill["notes"]}
    if steps:
        decode = document_of("decode")
        notes["decode"] = decode["notes"]
        linear = [layer for layer in decode["layers"] if layer["operand"] == "weight"]
        layers.add("decode", linear, times=steps)
        linear_cycles = sum(layer["cycles"] for layer in linear)
        attention_shape = replace(shape, linears=(), elementwise=())
        attention: dict[tuple[Gemm, ...], tuple[list[dict[str, Any]], int]] = {
            workload(attention_shape, phase="decode", context=context, batch=batch): (
                [layer for layer in decode["layers"] if layer["operand"] != "weight"],
                0,
            )
        }
        for step in range(steps):
            cached = context + step
            sizes = workload(attention_shape, phase="decode", context=cached, batch=batch)
            if sizes not in attention:
                attention[sizes] = document_of("decode", attention_shape, cached)["layers"], 0
            found, times = attention[sizes]
            attention[sizes] = found, times + 1
            vector = vector_cycles("decode", cached)
            decode_vector_cycles += vector
            step_cycles.append(linear_cycles + sum(layer["cycles"] for layer in found) + vector)
            told(step + 2)
        for found, times in attention.values():
            layers.add("decode", found, times=times)
    decode_totals = _stalled(layers.totals("decode"), decode_vector_cycles, vector_unit)
    totals = prefill_totals.plus(decode_totals)

    per_ms = accelerator.clock_mhz * 1e3  # cycles
    tokens = batch * output_tokens
    energy = totals.energy_uj["total"]
    vector_notes = [] if not work else [work.counted_note() if vector_unit else work.left_out_note(totals.cycles)]
    return {
        **{key: prefill[key] for key in _COMMON if key in prefill},
        "phase": "generation",
        "output_tokens": output_tokens,
        "latency_ms": totals.cycles / per_ms,
        "time_to_first_token_ms": prefill_totals.cycles / per_ms,
        "time_per_output_token_ms": {
            "mean": sum(step_cycles) / steps / per_ms if steps else None,
            "first": step_cycles[0] / per_ms if steps else None,
            "last": step_cycles[-1] / per_ms if steps else None,
        },
        "tokens_per_second": tokens * 1e3 * per_ms / totals.cycles,
        "energy_per_token_uj": None if energy is None else energy / tokens,
        **totals.to_dict(),
        "phases": {"prefill": prefill_totals.to_dict(), "decode": decode_totals.to_dict()},
        "layers": layers.to_list(),
        **({"vector_operations": work.to_list()} if vector_unit is not None else {}),
        "notes": [*_joined(notes), *vector_notes],
    }


_COMMON = (
    *("model_of", "model", "accelerator", "energy_set", "memory", "format"),
    *("context", "batch", "clock_mhz", "key_value_bits"),
)
"""What a generation has in common with its prefill, where the document of the prefill has it."""


def _stalled(totals: Totals, cycles: int, unit: VectorUnit | None) -> Totals:
    return totals if unit is None else totals.stalled(CAUSE, cycles)


class _Layers:
    """Products by phase and name, summed over all steps and sizes."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], tuple[int, int, Totals]] = {}

    def add(self, phase: Phase, layers: Sequence[Mapping[str, Any]], times: int = 1) -> None:
        for layer in layers:
            key = (phase, layer["name"], layer["operand"])
            repeats, multiplications, totals = self._found.get(key, (0, 0, Totals()))
            more = times * layer["repeats"]
            self._found[key] = (
                repeats + more,
                multiplications + more * layer["tokens"] * layer["reduction"] * layer["outputs"],
                totals.plus(totals_of(layer).times(times)),
            )

    def totals(self, phase: Phase) -> Totals:
        """The totals of a phase."""
        return summed(totals for key, (_, _, totals) in self._found.items() if key[0] == phase)

    def to_list(self) -> list[dict[str, Any]]:
        """JSON-ready."""
        return [
            {
                "phase": phase,
                "name": name,
                "operand": operand,
                "repeats": repeats,
                "multiplications": multiplications,
                **totals.to_dict(),
            }
            for (phase, name, operand), (repeats, multiplications, totals) in self._found.items()
        ]


def _joined(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Each note once; those of one phase alone with its name."""
    found: dict[str, list[str]] = {}
    for phase, sentences in notes.items():
        for sentence in sentences:
            found.setdefault(sentence, []).append(phase)
    return [sentence if len(phases) == len(notes) else f"{phases[0]}: {sentence}" for sentence, phases in found.items()]
