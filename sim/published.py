"""The closed-form model that the BitMoD paper's performance figures come from, rebuilt from its description.

It follows the simulator that the authors published with "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration"
(HPCA 2025) in two states: of November 2024, which gave the paper's figures (``published``), and of July 2025, with
another attention (``published-2025``). A ``PublishedState`` holds all that they do not share. Per product:

* compute cycles = ceil(reduction / lanes) · ceil(outputs / rows) · ceil(tokens / columns) · cycles per step, where a
  step of a bit-serial PE takes ceil(floor(bits of the stationary operand) / 2) cycles and any other takes one;
* DRAM cycles = weights, inputs and outputs in whole transfers of 256 bits, rounded down;
* cycles = the larger of the two. Where weights and inputs both exceed their buffers, the cheaper of two refetches.

What it leaves out or does oddly is kept, because this module exists to give the published numbers: the logits are
computed for every prefill token; nothing waits for a first load, a pipeline or a write-back; the type bits of a group
are not counted; and the attention of 2024 multiplies over the hidden size for every head, all heads at once, with
16-bit operands but the cycles per step of the weights. ``termwise.sim.simulate`` is the model without these;
``termwise.sim.explain`` says what each difference costs. ``termwise.sim.published_sweep`` evaluates many
configurations of this model at once.

The weight precisions of ANT and OliVe are averages that the authors measured for six models; another model has none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.shapes import ModelShape
from termwise.algorithms.workload import Phase, check_count, check_phase
from termwise.sim.accelerators import Accelerator, get_accelerator
from termwise.sim.memory import buffer_access_pj

PUBLISHED_CONTEXT = 256
PUBLISHED_MODELS = ("opt-1.3b", "phi-2", "yi-6b", "llama-2-7b", "llama-2-13b", "llama-3-8b")
"""The models of the BitMoD paper."""

ACTIVATION_BITS = 16
WORD_BITS = 64
"""The published model writes its buffers in words of this width."""

AttentionRule = Literal["whole_hidden_size", "per_head"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedState:
    """What one state of the published simulator does not share with another.

    Attributes:
        name: as ``get_published_state`` takes it.
        date: month of the state.
        attention: ``whole_hidden_size``: every head multiplies over the hidden size, in steps as long as those of the
            weights and written to the buffer at the weights' width. ``per_head``: each key-value head by itself with
            its true sizes and the width of keys and values.
        dram_rounding: whether DRAM cycles are rounded down ``by_operand``, without rounding a row of weights up to
            whole bytes, or once for the ``product``, with rows of whole bytes.
        weight_bits: bits per weight of (system, phase); a mapping holds one value per model.
        key_value_bits: width of keys and values of a system.
    """

    name: str
    date: str
    attention: AttentionRule
    dram_rounding: Literal["by_operand", "product"]
    weight_bits: Mapping[tuple[str, Phase], float | Mapping[str, float]]
    key_value_bits: Mapping[str, float]


def _by_model(*bits: float) -> dict[str, float]:
    return dict(zip(PUBLISHED_MODELS, bits, strict=True))


_SHARED_WEIGHT_BITS: dict[tuple[str, Phase], float | Mapping[str, float]] = {
    ("fp16", "prefill"): 16,
    ("fp16", "decode"): 16,
    ("bitmod-lossless", "prefill"): 6.0625,
    ("bitmod-lossless", "decode"): 6.0625,
    ("bitmod-lossy", "prefill"): 4.0625,
    ("bitmod-lossy", "decode"): 3.0625,
}
_ANT_2025 = _by_model(5, 5, 5.25, 5, 4, 5)
_OLIVE_2025 = _by_model(4, 4, 4, 4, 4, 4.5)

PUBLISHED_2024 = PublishedState(
    name="published",
    date="November 2024",
    attention="whole_hidden_size",
    dram_rounding="by_operand",
    weight_bits={
        **_SHARED_WEIGHT_BITS,
        ("ant", "prefill"): 5.5,
        ("ant", "decode"): _by_model(5, 5, 5.25, 5, 5, 4.5),
        ("olive", "prefill"): 4.5,
        ("olive", "decode"): _by_model(3.875, 4, 4.25, 3.75, 3.75, 3.5),
    },
    key_value_bits={"fp16": 16, "ant": 16, "olive": 16, "bitmod-lossless": 16, "bitmod-lossy": 16},
)
PUBLISHED_2025 = PublishedState(
    name="published-2025",
    date="July 2025",
    attention="per_head",
    dram_rounding="product",
    weight_bits={
        **_SHARED_WEIGHT_BITS,
        ("ant", "prefill"): _ANT_2025,
        ("ant", "decode"): _ANT_2025,
        ("olive", "prefill"): _OLIVE_2025,
        ("olive", "decode"): _OLIVE_2025,
    },
    key_value_bits={"fp16": 16, "ant": 16, "olive": 16, "bitmod-lossless": 8, "bitmod-lossy": 8},
)
PUBLISHED_STATES: Mapping[str, PublishedState] = {state.name: state for state in (PUBLISHED_2024, PUBLISHED_2025)}


def get_published_state(name: str) -> PublishedState:
    """The state called ``name``. Raises ``InputError`` for an unknown one."""
    state = PUBLISHED_STATES.get(name)
    if state is None:
        raise unknown_name("state of the published model", name, tuple(PUBLISHED_STATES))
    return state


@dataclass(frozen=True, kw_only=True)
class PublishedGemm:
    """One product as the published model sees it, or ``copies`` equal ones that it computes and fetches together.

    [outputs, reduction] stays, [tokens, input_features] moves. In the attention of 2024 the model multiplies over
    ``reduction`` but fetches only ``input_features`` per token. The bits are those of one stationary number: in
    external memory (``operand_bits``), for the cycles of a step (``step_bits``), in the buffer (``written_bits``).
    """

    kind: str
    copies: int
    outputs: int
    reduction: int
    input_features: int
    tokens: int
    operand_bits: float
    step_bits: float
    written_bits: float


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

    state: str
    model: str
    accelerator: str
    weight_bits: float
    key_value_bits: float
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
        """JSON-ready, with the keys of ``termwise.sim.simulate.Simulation.to_dict`` where both have them.

        Its only stall is external memory: what a layer takes beyond its compute cycles.
        """
        return {
            "model_of": self.state,
            "model": self.model,
            "accelerator": self.accelerator,
            "weight_bits": self.weight_bits,
            "key_value_bits": self.key_value_bits,
            "phase": self.phase,
            "context": self.context,
            "batch": 1,
            "clock_mhz": self.clock_mhz,
            "cycles": self.cycles,
            "latency_ms": self.latency_ms,
            "busy": self.compute_cycles,
            "stalls": {"dram": self.cycles - self.compute_cycles},
            "traffic_bytes": self.traffic_bytes,
            "weight_traffic_bytes": self.weight_traffic_bytes,
            "activation_traffic_bytes": self.activation_traffic_bytes,
            "output_traffic_bytes": self.output_traffic_bytes,
            "energy_uj": {
                "pe": self.pe_energy_uj,
                "sram_read": self.sram_read_energy_uj,
                "sram_write": self.sram_write_energy_uj,
                "dram": self.dram_energy_uj,
                "total": self.energy_uj,
            },
            "notes": list(self.notes),
        }


def _published_system(system: str, state: PublishedState) -> str:
    """``system`` itself. Raises ``InputError`` for one that was not published."""
    if system not in state.key_value_bits:
        systems = ", ".join(state.key_value_bits)
        raise InputError(f"the published model has no accelerator {system!r}; it has {systems}")
    return system


def published_weight_bits(model: str, system: str, phase: Phase, state: PublishedState = PUBLISHED_2024) -> float:
    """Bits per weight in the published model.

    Raises ``InputError`` for a system that was not published, and where the precision was published for each model
    and this model is not among them.
    """
    bits = state.weight_bits[_published_system(system, state), phase]
    if not isinstance(bits, Mapping):
        return bits
    if model not in bits:
        raise InputError(
            f"the published model has no weight precision of {system} for {model!r} in {phase}; expected "
            f"{', '.join(bits)}"
        )
    return bits[model]


def _ceil_divide(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _round_up(bits: float) -> int:
    return -int(-bits // 1)


def published_cycles_per_step(accelerator: Accelerator, bits: float) -> int:
    """Cycles of a dot-product step: two bits a cycle on a bit-serial PE, one cycle on any other."""
    if accelerator.processing_element.kind != "bit_serial":
        return 1
    return _ceil_divide(int(bits), 2)


def published_gemms(
    shape: ModelShape,
    phase: Phase,
    context: int,
    weight_bits: float,
    key_value_bits: float,
    state: PublishedState = PUBLISHED_2024,
) -> Counter[PublishedGemm]:
    """The products of one prefill or one decode step of one sequence, each with how often it occurs.

    Raises ``InputError`` where the key-value heads of the model do not share its heads evenly.
    """
    tokens = context if phase == "prefill" else 1
    gemms: Counter[PublishedGemm] = Counter()
    for linear in shape.linears:
        gemm = PublishedGemm(
            kind="head" if linear.name == shape.head else "linear",
            copies=1,
            outputs=linear.outputs,
            reduction=linear.inputs,
            input_features=linear.inputs,
            tokens=tokens,
            operand_bits=weight_bits,
            step_bits=weight_bits,
            written_bits=weight_bits,
        )
        gemms[gemm] += 1
    attention = shape.attention
    if attention is None:
        return gemms
    heads, key_value_heads, head_size = attention.heads, attention.key_value_heads, attention.head_size
    if heads % key_value_heads:
        raise InputError(
            f"{shape.name} has {heads} heads and {key_value_heads} key-value heads; "
            "expected a whole number of heads for each key-value head"
        )
    # kind, copies, outputs, reduction, features that are fetched per token, tokens
    operands: list[tuple[str, int, int, int, int, int]]
    if state.attention == "per_head":
        rows = heads // key_value_heads * tokens
        operands = [
            ("keys", key_value_heads, context, head_size, head_size, rows),
            ("values", key_value_heads, head_size, context, context, rows),
        ]
        own_bits = key_value_bits
    else:
        hidden, fetched = heads * head_size, key_value_heads * head_size
        # A decode step of 2024 multiplies with one key, and fetches the features of one token.
        operands = [
            ("keys", 1, tokens, hidden, fetched, heads * tokens),
            ("values", 1, heads * tokens, context, fetched, tokens),
        ]
        own_bits = weight_bits
    for kind, copies, outputs, reduction, input_features, attention_tokens in operands:
        gemm = PublishedGemm(
            kind=kind,
            copies=copies,
            outputs=outputs,
            reduction=reduction,
            input_features=input_features,
            tokens=attention_tokens,
            operand_bits=key_value_bits,
            step_bits=own_bits,
            written_bits=own_bits,
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


def published_cost(
    gemm: PublishedGemm,
    accelerator: Accelerator,
    phase: Phase,
    weight_bits: float,
    state: PublishedState = PUBLISHED_2024,
) -> PublishedCost:
    """Cost of one product. ``weight_bits`` are those of the linear layers: they set the width of the weight port."""
    array = accelerator.array(phase)
    lanes = accelerator.processing_element.lanes
    pe_pj_per_cycle, dram_pj_per_bit = published_energies(accelerator)
    burst_bits = 8 * accelerator.ideal_bytes_per_cycle
    tile_steps = (
        gemm.copies
        * _ceil_divide(gemm.reduction, lanes)
        * _ceil_divide(gemm.outputs, array.rows)
        * _ceil_divide(gemm.tokens, array.columns)
    )
    compute_cycles = tile_steps * published_cycles_per_step(accelerator, gemm.step_bits)

    weight_rows = gemm.outputs * gemm.copies
    input_rows = gemm.tokens * gemm.copies
    weight_bytes = _round_up(gemm.reduction * gemm.operand_bits / 8) * weight_rows
    input_bytes = gemm.input_features * input_rows * ACTIVATION_BITS // 8
    output_bytes = gemm.outputs * input_rows * ACTIVATION_BITS // 8
    weight_fetches, input_fetches = published_fetches(weight_bytes, input_bytes, accelerator)
    traffic_bytes = weight_bytes * weight_fetches + input_bytes * input_fetches + output_bytes
    if state.dram_rounding == "product":
        dram_cycles = 8 * traffic_bytes // burst_bits
    else:
        dram_cycles = (
            int(weight_rows * gemm.reduction * gemm.operand_bits * weight_fetches / burst_bits)
            + 8 * input_bytes * input_fetches // burst_bits
            + 8 * output_bytes // burst_bits
        )

    weight_port_bits, input_port_bits = published_port_bits(accelerator, phase, weight_bits)
    read_pj = buffer_access_pj("read", weight_port_bits) + buffer_access_pj("read", input_port_bits)
    weight_words = _round_up(gemm.reduction * gemm.written_bits / WORD_BITS) * weight_rows * weight_fetches
    input_words = _ceil_divide(gemm.input_features * ACTIVATION_BITS, WORD_BITS) * input_rows * input_fetches
    output_words = _ceil_divide(gemm.outputs * ACTIVATION_BITS, WORD_BITS) * input_rows
    return PublishedCost(
        compute_cycles=compute_cycles,
        dram_cycles=dram_cycles,
        weight_bytes=weight_bytes * weight_fetches,
        activation_bytes=input_bytes * input_fetches,
        output_bytes=output_bytes,
        pe_energy_pj=pe_pj_per_cycle * array.processing_elements * compute_cycles,
        sram_read_energy_pj=tile_steps * read_pj,
        sram_write_energy_pj=weight_words * buffer_access_pj("write", weight_port_bits) * WORD_BITS / weight_port_bits
        + (input_words + output_words) * buffer_access_pj("write", input_port_bits) * WORD_BITS / input_port_bits,
        dram_energy_pj=8 * traffic_bytes * dram_pj_per_bit,
    )


def published_energies(accelerator: Accelerator) -> tuple[float, float]:
    """pJ of a cycle of one PE, place and route included, and of a bit of external memory.

    Raises ``InputError`` where the accelerator or its memory has none.
    """
    pe, dram = accelerator.placed_pe_pj_per_cycle, accelerator.memory.energy_pj_per_bit
    if pe is None or dram is None:
        missing = "of its PE" if pe is None else f"of its memory {accelerator.memory.name!r}"
        raise InputError(f"accelerator {accelerator.name!r}: the energy {missing} is not known; expected a number")
    return pe, dram


def published_port_bits(accelerator: Accelerator, phase: Phase, weight_bits: float) -> tuple[float, float]:
    """Width in bits of the port of the weight buffer and of that of the activation buffer.

    A weight port is as wide as the row of weights that a step takes, in whole multiples of four bits each.
    """
    array, lanes, reads = (
        accelerator.array(phase),
        accelerator.processing_element.lanes,
        accelerator.port_reads_per_step,
    )
    return (
        lanes * 4 * _round_up(weight_bits / 4) * array.rows / reads,
        lanes * ACTIVATION_BITS * array.columns / reads,
    )


def _check_bits(what: str, bits: float) -> float:
    """``bits`` itself. Raises ``InputError`` unless they are finite and at least 1."""
    if not (math.isfinite(bits) and bits >= 1):
        raise InputError(f"{what} is {bits!r}; expected a finite number of bits of at least 1")
    return bits


def simulate_published(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    phase: Phase,
    context: int = PUBLISHED_CONTEXT,
    batch: int = 1,
    state: PublishedState = PUBLISHED_2024,
    weight_bits: float | None = None,
    key_value_bits: float | None = None,
) -> PublishedSimulation:
    """The published model's cycles and energies for one prefill of ``context`` tokens, or one decoded token.

    ``weight_bits`` and ``key_value_bits`` take the place of the published precisions.

    Raises ``InputError`` for a batch other than 1 or a mixture of experts (the published figures have neither), an
    unknown phase, a context or precision below 1, an accelerator that was not published, or a model for which the
    accelerator has no published precision while ``weight_bits`` is None.
    """
    phase = check_phase(phase)
    check_count("context", context)
    if batch != 1:
        raise InputError(f"batch is {batch!r}; the published model knows only a batch of 1")
    if any(linear.experts > 1 for linear in shape.linears):
        raise InputError(f"{shape.name} is a mixture of experts; the published model knows only dense models")
    system = _published_system(accelerator.system, state)
    notes: tuple[str, ...] = ()
    if weight_bits is not None or key_value_bits is not None:
        notes += ("the precision is not the published one",)
    if weight_bits is None:
        weight_bits = published_weight_bits(shape.name, system, phase, state)
    if key_value_bits is None:
        key_value_bits = state.key_value_bits[system]
    _check_bits("weight_bits", weight_bits)
    _check_bits("key_value_bits", key_value_bits)
    if shape.attention is None:
        notes += (f"the attention of {shape.name} is not known and not counted",)
    elif context != PUBLISHED_CONTEXT:
        notes += (f"the published results are for a context of {PUBLISHED_CONTEXT}",)
    array = accelerator.array(phase)
    if array != get_accelerator(system).array(phase):
        notes += (f"the array of {array.rows} × {array.columns} PEs is not the published one",)
    elif "@" not in accelerator.name and accelerator.name != accelerator.system:
        notes += (f"{accelerator.name} is not the published {accelerator.system}",)
    costs = [
        (published_cost(gemm, accelerator, phase, weight_bits, state), count)
        for gemm, count in published_gemms(shape, phase, context, weight_bits, key_value_bits, state).items()
    ]
    return PublishedSimulation(
        state=state.name,
        model=shape.name,
        accelerator=accelerator.name,
        weight_bits=weight_bits,
        key_value_bits=key_value_bits,
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
