"""The closed-form model that the BitMoD paper's performance figures come from, rebuilt from its description.

It follows the simulator that the authors published with "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration"
(HPCA 2025), in its state of November 2024, which gave the paper's figures. Per layer:

* compute cycles = ceil(reduction / lanes) · ceil(outputs / rows) · ceil(tokens / columns) · cycles per step, where a
  step of a bit-serial PE takes ceil(floor(weight bits) / 2) cycles and any other takes one;
* DRAM cycles = weights, inputs and outputs, each in whole transfers of 256 bits, rounded down;
* cycles = the larger of the two. Where weights and inputs both exceed their buffers, the cheaper of two refetches.

What it leaves out or does oddly is kept, because this module exists to give the published numbers: attention multiplies
over the hidden size for every head, all heads at once, with 16-bit operands but the cycles per step of the weights; the
logits are computed for every prefill token; nothing waits for a first load, a pipeline or a write-back; the type bits
of a group are not counted. ``termwise.sim.simulate`` is the model without these; ``termwise.sim.explain`` says what
each difference costs.

The weight precisions of ANT and OliVe are averages that the authors measured for six models. For another model the mean
of the six is taken, and ``notes`` says so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import ModelShape
from termwise.algorithms.workload import Phase, check_count, check_phase
from termwise.sim.accelerators import Accelerator
from termwise.sim.memory import buffer_access_pj

PUBLISHED_CONTEXT = 256
ACTIVATION_BITS = 16
ATTENTION_BITS = 16
_WORD_BITS = 64  # the published model writes its buffers in words of this width

_DECODE_BITS: dict[str, dict[str, float]] = {
    "ant": {
        "opt-1.3b": 5,
        "phi-2": 5,
        "yi-6b": 5.25,
        "llama-2-7b": 5,
        "llama-2-13b": 5,
        "llama-3-8b": 4.5,
    },
    "olive": {
        "opt-1.3b": 3.875,
        "phi-2": 4,
        "yi-6b": 4.25,
        "llama-2-7b": 3.75,
        "llama-2-13b": 3.75,
        "llama-3-8b": 3.5,
    },
}
_FIXED_BITS: dict[tuple[str, Phase], float] = {
    ("fp16", "prefill"): 16,
    ("fp16", "decode"): 16,
    ("ant", "prefill"): 5.5,
    ("olive", "prefill"): 4.5,
    ("bitmod-lossless", "prefill"): 6.0625,
    ("bitmod-lossless", "decode"): 6.0625,
    ("bitmod-lossy", "prefill"): 4.0625,
    ("bitmod-lossy", "decode"): 3.0625,
}


@dataclass(frozen=True, kw_only=True)
class PublishedGemm:
    """One product as the published model sees it: [outputs, reduction] stationary, [tokens, input_features] moving.

    In attention the published model multiplies over ``reduction`` but fetches only ``input_features`` per token.
    """

    kind: str
    outputs: int
    reduction: int
    input_features: int
    tokens: int
    operand_bits: float


@dataclass(frozen=True, kw_only=True)
class PublishedCost:
    """Cost of one product: compute and DRAM cycles, traffic in bytes and energies in pJ."""

    compute_cycles: int
    dram_cycles: int
    weight_bytes: int
    activation_bytes: int
    output_bytes: int
    pe_energy_pj: float
    sram_read_energy_pj: float
    sram_write_energy_pj: float
    dram_energy_pj: float

    @property
    def cycles(self) -> int:
        """The larger of compute and DRAM cycles: perfect overlap."""
        return max(self.compute_cycles, self.dram_cycles)


@dataclass(frozen=True, kw_only=True)
class PublishedSimulation:
    """Result of the published model: cycles, and energies in µJ, for one prefill or one decoded token."""

    model: str
    accelerator: str
    weight_bits: float
    phase: Phase
    context: int
    clock_mhz: int
    cycles: int
    compute_cycles: int
    weight_traffic_bytes: int
    activation_traffic_bytes: int
    output_traffic_bytes: int
    pe_energy_uj: float
    sram_read_energy_uj: float
    sram_write_energy_uj: float
    dram_energy_uj: float
    notes: tuple[str, ...]

    @property
    def sram_energy_uj(self) -> float:
        """Reads and writes of both buffers."""
        return self.sram_read_energy_uj + self.sram_write_energy_uj

    @property
    def on_chip_energy_uj(self) -> float:
        """PEs and buffers."""
        return self.pe_energy_uj + self.sram_energy_uj

    @property
    def energy_uj(self) -> float:
        """PEs, buffers and external memory."""
        return self.on_chip_energy_uj + self.dram_energy_uj

    @property
    def latency_ms(self) -> float:
        """``cycles`` at the accelerator's clock."""
        return self.cycles / (self.clock_mhz * 1e3)

    @property
    def traffic_bytes(self) -> int:
        """Bytes to and from external memory."""
        return self.weight_traffic_bytes + self.activation_traffic_bytes + self.output_traffic_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys of ``termwise.sim.simulate.Simulation.to_dict`` where both have them."""
        return {
            "model_of": "published",
            "model": self.model,
            "accelerator": self.accelerator,
            "weight_bits": self.weight_bits,
            "phase": self.phase,
            "context": self.context,
            "batch": 1,
            "clock_mhz": self.clock_mhz,
            "cycles": self.cycles,
            "latency_cycles": self.cycles,
            "latency_ms": self.latency_ms,
            "compute_cycles": self.compute_cycles,
            "traffic_bytes": self.traffic_bytes,
            "weight_traffic_bytes": self.weight_traffic_bytes,
            "activation_traffic_bytes": self.activation_traffic_bytes,
            "output_traffic_bytes": self.output_traffic_bytes,
            "energy_uj": self.energy_uj,
            "on_chip_energy_uj": self.on_chip_energy_uj,
            "pe_energy_uj": self.pe_energy_uj,
            "sram_energy_uj": self.sram_energy_uj,
            "sram_read_energy_uj": self.sram_read_energy_uj,
            "sram_write_energy_uj": self.sram_write_energy_uj,
            "dram_energy_uj": self.dram_energy_uj,
            "notes": list(self.notes),
        }


def published_weight_bits(model: str, system: str, phase: Phase) -> tuple[float, tuple[str, ...]]:
    """Bits per weight in the published model, and notes where they are not published for this model.

    Raises ``InputError`` for a system that was not published.
    """
    fixed = _FIXED_BITS.get((system, phase))
    if fixed is not None:
        return fixed, ()
    by_model = _DECODE_BITS.get(system)
    if by_model is None:
        systems = ", ".join(dict.fromkeys(name for name, _ in _FIXED_BITS))
        raise InputError(f"the published model has no accelerator {system!r}; it has {systems}")
    known = by_model.get(model)
    if known is not None:
        return known, ()
    mean = sum(by_model.values()) / len(by_model)
    return mean, (
        f"{system} has no published weight precision for {model} in {phase}: "
        f"the mean of the six published models, {mean:.4g} bits, is used",
    )


def _ceil_divide(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _round_up(bits: float) -> int:
    return -int(-bits // 1)


def published_cycles_per_step(accelerator: Accelerator, weight_bits: float) -> int:
    """Cycles of a dot-product step: two bits a cycle on a bit-serial PE, one cycle on any other."""
    if accelerator.processing_element.kind != "bit_serial":
        return 1
    return _ceil_divide(int(weight_bits), 2)


def published_gemms(shape: ModelShape, phase: Phase, context: int, weight_bits: float) -> Counter[PublishedGemm]:
    """The products of one prefill or one decode step of one sequence, each with how often it occurs."""
    tokens = context if phase == "prefill" else 1
    gemms: Counter[PublishedGemm] = Counter()
    for linear in shape.linears:
        kind = "head" if linear.name == shape.head else "linear"
        gemm = PublishedGemm(
            kind=kind,
            outputs=linear.outputs,
            reduction=linear.inputs,
            input_features=linear.inputs,
            tokens=tokens,
            operand_bits=weight_bits,
        )
        gemms[gemm] += 1
    attention = shape.attention
    if attention is None:
        return gemms
    heads = attention.heads
    hidden = heads * attention.head_size
    key_value_features = attention.key_value_heads * attention.head_size
    if phase == "prefill":
        operands = [
            ("keys", context, hidden, heads * context),
            ("values", heads * context, context, context),
        ]
    else:
        operands = [("keys", 1, hidden, heads), ("values", heads, context, 1)]
    for kind, outputs, reduction, attention_tokens in operands:
        gemm = PublishedGemm(
            kind=kind,
            outputs=outputs,
            reduction=reduction,
            input_features=key_value_features,
            tokens=attention_tokens,
            operand_bits=ATTENTION_BITS,
        )
        gemms[gemm] += attention.layers
    return gemms


def published_fetches(weight_bytes: int, input_bytes: int, accelerator: Accelerator) -> tuple[int, int]:
    """How often weights and inputs are fetched: once, unless both exceed their buffers; then one of them again."""
    if weight_bytes <= accelerator.weight_buffer_bytes or input_bytes <= accelerator.activation_buffer_bytes:
        return 1, 1
    weight_fetches = _ceil_divide(input_bytes, accelerator.activation_buffer_bytes)
    input_fetches = _ceil_divide(weight_bytes, accelerator.weight_buffer_bytes)
    if weight_fetches * weight_bytes + input_bytes < input_fetches * input_bytes + weight_bytes:
        return weight_fetches, 1
    return 1, input_fetches


def published_cost(gemm: PublishedGemm, accelerator: Accelerator, phase: Phase, weight_bits: float) -> PublishedCost:
    """Cost of one product. ``weight_bits`` are those of the linear layers: they set the cycles of a step everywhere."""
    array = accelerator.array(phase)
    lanes = accelerator.processing_element.lanes
    burst_bits = 8 * accelerator.dram_bytes_per_cycle
    tile_steps = (
        _ceil_divide(gemm.reduction, lanes)
        * _ceil_divide(gemm.outputs, array.rows)
        * _ceil_divide(gemm.tokens, array.columns)
    )
    compute_cycles = tile_steps * published_cycles_per_step(accelerator, weight_bits)

    weight_bytes = _round_up(gemm.reduction * gemm.operand_bits / 8) * gemm.outputs
    input_bytes = gemm.input_features * gemm.tokens * ACTIVATION_BITS // 8
    output_bytes = gemm.outputs * gemm.tokens * ACTIVATION_BITS // 8
    weight_fetches, input_fetches = published_fetches(weight_bytes, input_bytes, accelerator)
    dram_cycles = (
        int(gemm.outputs * gemm.reduction * gemm.operand_bits * weight_fetches / burst_bits)
        + 8 * input_bytes * input_fetches // burst_bits
        + 8 * output_bytes // burst_bits
    )

    # A weight port is as wide as the row of weights that a step takes, in whole multiples of four bits each.
    weight_port_bits = lanes * 4 * _round_up(weight_bits / 4) * array.rows / accelerator.port_reads_per_step
    input_port_bits = lanes * ACTIVATION_BITS * array.columns / accelerator.port_reads_per_step
    read_pj = buffer_access_pj("read", weight_port_bits) + buffer_access_pj("read", input_port_bits)
    weight_words = _round_up(gemm.reduction * weight_bits / _WORD_BITS) * gemm.outputs * weight_fetches
    input_words = _ceil_divide(gemm.input_features * ACTIVATION_BITS, _WORD_BITS) * gemm.tokens * input_fetches
    output_words = _ceil_divide(gemm.outputs * ACTIVATION_BITS, _WORD_BITS) * gemm.tokens
    traffic_bytes = weight_bytes * weight_fetches + input_bytes * input_fetches + output_bytes
    return PublishedCost(
        compute_cycles=compute_cycles,
        dram_cycles=dram_cycles,
        weight_bytes=weight_bytes * weight_fetches,
        activation_bytes=input_bytes * input_fetches,
        output_bytes=output_bytes,
        pe_energy_pj=accelerator.pe_energy_pj_per_cycle
        * accelerator.place_and_route_factor
        * array.processing_elements
        * compute_cycles,
        sram_read_energy_pj=tile_steps * read_pj,
        sram_write_energy_pj=weight_words * buffer_access_pj("write", weight_port_bits) * _WORD_BITS / weight_port_bits
        + (input_words + output_words) * buffer_access_pj("write", input_port_bits) * _WORD_BITS / input_port_bits,
        dram_energy_pj=8 * traffic_bytes * accelerator.dram_pj_per_bit,
    )


def simulate_published(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    phase: Phase,
    context: int = PUBLISHED_CONTEXT,
    batch: int = 1,
) -> PublishedSimulation:
    """The published model's cycles and energies for one prefill of ``context`` tokens, or one decoded token.

    Raises ``InputError`` for a batch other than 1 or a mixture of experts (the published model has neither), an unknown
    phase, a context below 1, or an accelerator that was not published.
    """
    phase = check_phase(phase)
    check_count("context", context)
    if batch != 1:
        raise InputError(f"batch is {batch!r}; the published model knows only a batch of 1")
    if any(linear.experts > 1 for linear in shape.linears):
        raise InputError(f"{shape.name} is a mixture of experts; the published model knows only dense models")
    weight_bits, notes = published_weight_bits(shape.name, accelerator.system, phase)
    if shape.attention is None:
        notes += (f"the attention of {shape.name} is not known and not counted",)
    elif context != PUBLISHED_CONTEXT:
        notes += (f"the published results are for a context of {PUBLISHED_CONTEXT}",)
    array = accelerator.array(phase)
    if accelerator.name != accelerator.system:
        notes += (f"the array of {array.rows} × {array.columns} PEs is not the published one",)
    costs = [
        (published_cost(gemm, accelerator, phase, weight_bits), count)
        for gemm, count in published_gemms(shape, phase, context, weight_bits).items()
    ]
    return PublishedSimulation(
        model=shape.name,
        accelerator=accelerator.name,
        weight_bits=weight_bits,
        phase=phase,
        context=context,
        clock_mhz=accelerator.clock_mhz,
        cycles=sum(count * cost.cycles for cost, count in costs),
        compute_cycles=sum(count * cost.compute_cycles for cost, count in costs),
        weight_traffic_bytes=sum(count * cost.weight_bytes for cost, count in costs),
        activation_traffic_bytes=sum(count * cost.activation_bytes for cost, count in costs),
        output_traffic_bytes=sum(count * cost.output_bytes for cost, count in costs),
        pe_energy_uj=sum(count * cost.pe_energy_pj for cost, count in costs) / 1e6,
        sram_read_energy_uj=sum(count * cost.sram_read_energy_pj for cost, count in costs) / 1e6,
        sram_write_energy_uj=sum(count * cost.sram_write_energy_pj for cost, count in costs) / 1e6,
        dram_energy_uj=sum(count * cost.dram_energy_pj for cost, count in costs) / 1e6,
        notes=notes,
    )
