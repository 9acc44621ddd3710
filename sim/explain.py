"""Why the cycle-level simulation and the published model differ, as numbers that add up.

The published model (``termwise.sim.published``, either state) is changed into the cycle-level one
(``termwise.sim.simulate``) in seven steps, each of which computes all products again; a step's reason is the change of
the total in cycles. The reasons add up to the difference exactly. Their sizes depend on the order of the steps:

1. ``head_tokens``: the logits only after the last token of a sequence, not after all of them (prefill).
2. ``attention_shape``: each key-value head by itself with its true sizes, and keys and values at their own width.
3. ``weight_precision``: the bits of the format's codes and the PE's cycles for this format, in place of the published
   bits per weight.
4. ``weight_metadata``: the bytes of the packed format beyond its codes: scales and selectors.
5. ``refetch``: the traffic of the plan, which keeps operands in halves of buffers and splits long reductions, in
   place of the published rule.
6. ``overlap``: first loads, write-backs, and all else that two servers with finite buffers cannot do at the same time.
7. ``fill_and_drain``: the pipeline of the array, and the scaling of groups that nothing hides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.shapes import ModelShape, known_shape
from termwise.algorithms.workload import Gemm, Phase, check_count, check_phase, workload
from termwise.sim.accelerators import Accelerator, get_accelerator
from termwise.sim.cycle import run_tile_program
from termwise.sim.dram import Dram, get_dram
from termwise.sim.kernels import OUTPUT_BYTES
from termwise.sim.plan import Product, ceil_divide, plan_product, planned_traffic
from termwise.sim.published import (
    PUBLISHED_2024,
    PublishedState,
    published_cost,
    published_fetches,
    published_gemms,
    published_weight_bits,
    simulate_published,
)
from termwise.sim.simulate import Simulation, product_of, simulate

REASONS = (
    "head_tokens",
    "attention_shape",
    "weight_precision",
    "weight_metadata",
    "refetch",
    "overlap",
    "fill_and_drain",
)
"""The reasons, in the order in which the published model is changed."""

CLASSES = ("linear", "head", "keys", "values")
"""Classes of products: linear layers without the one of the logits, that one, and the two products of attention."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cycles of a class of products. ``cycles`` is below the sum of the others as far as they overlap."""

    compute_cycles: int = 0
    dram_cycles: int = 0
    cycles: int = 0

    def plus(self, other: Cost) -> Cost:
        """Field by field."""
        return Cost(
            compute_cycles=self.compute_cycles + other.compute_cycles,
            dram_cycles=self.dram_cycles + other.dram_cycles,
            cycles=self.cycles + other.cycles,
        )

    def to_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return {"compute_cycles": self.compute_cycles, "dram_cycles": self.dram_cycles, "cycles": self.cycles}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Both models side by side. ``reasons`` (cycles by name) add up to ``cycles`` − ``published_cycles``."""

    state: str
    model: str
    accelerator: str
    format: str
    phase: Phase
    context: int
    published_cycles: int
    cycles: int
    published_energy_uj: float
    energy_uj: float | None
    reasons: dict[str, int]
    published_classes: dict[str, Cost]
    cycle_classes: dict[str, Cost]

    @property
    def ratio(self) -> float:
        """Cycle-level cycles divided by published cycles."""
        return self.cycles / self.published_cycles

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, units in the names."""
        return {
            "state": self.state,
            "model": self.model,
            "accelerator": self.accelerator,
            "format": self.format,
            "phase": self.phase,
            "context": self.context,
            "published_cycles": self.published_cycles,
            "cycles": self.cycles,
            "ratio": self.ratio,
            "published_energy_uj": self.published_energy_uj,
            "energy_uj": self.energy_uj,
            "reason_cycles": dict(self.reasons),
            "classes": {
                name: {"published": self.published_classes[name].to_dict(), "cycle": self.cycle_classes[name].to_dict()}
                for name in CLASSES
            },
        }


def _closed_form(product: Product, accelerator: Accelerator) -> Cost:
    """Published overlap and refetch rules on a product with its true sizes, bytes and cycles per step."""
    input_bytes = product.tokens * ceil_divide(product.reduction * product.activation_bits, 8)
    weight_fetches, input_fetches = published_fetches(product.weight_total_bytes, input_bytes, accelerator)
    traffic = product.weight_total_bytes * weight_fetches + input_bytes * input_fetches
    traffic += product.tokens * product.outputs * OUTPUT_BYTES
    return _perfect_overlap(product, traffic)


def _codes_alone(
    format: Format, rule: Callable[[Product, Accelerator], Cost]
) -> Callable[[Product, Accelerator], Cost]:
    """``rule`` on a product of weights that take the bits of their codes and nothing else."""

    def cost(product: Product, accelerator: Accelerator) -> Cost:
        code_bytes = ceil_divide(product.outputs * product.reduction * format.weight_bits, 8)
        return rule(replace(product, weight_total_bytes=code_bytes), accelerator)

    return cost


def _planned(product: Product, _: Accelerator) -> Cost:
    """Published overlap, planned traffic."""
    return _perfect_overlap(product, planned_traffic(plan_product(product)).total_bytes)


def _perfect_overlap(product: Product, traffic_bytes: int) -> Cost:
    compute = (
        ceil_divide(product.reduction, product.lanes)
        * ceil_divide(product.outputs, product.rows)
        * ceil_divide(product.tokens, product.columns)
        * product.cycles_per_step
    )
    dram = ceil_divide(traffic_bytes, product.burst_bytes)
    return Cost(compute_cycles=compute, dram_cycles=dram, cycles=max(compute, dram))


def _class_of(gemm: Gemm, head: str | None) -> str:
    if gemm.operand == "key":
        return "keys"
    if gemm.operand == "value":
        return "values"
    return "head" if gemm.name == head else "linear"


@lru_cache(maxsize=256)
def _simulation(shape: ModelShape, accelerator: Accelerator, phase: Phase, weights: Format, context: int) -> Simulation:
    """The cycle-level simulation, which does not depend on the state of the published model."""
    return simulate(shape, accelerator, phase=phase, weights=weights, context=context)


def explain(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    phase: Phase,
    weights: Format | None = None,
    context: int = 256,
    state: PublishedState = PUBLISHED_2024,
) -> Explanation:
    """Split the difference between both models of one prefill, or of one decoded token, into named reasons.

    ``state`` is that of the published model.

    Raises ``InputError`` as ``termwise.sim.simulate.simulate`` and ``termwise.sim.published.simulate_published`` do.
    """
    phase = check_phase(phase)
    check_count("context", context)
    if weights is None:
        weights = get_format(accelerator.default_format(phase))
    weight_bits = published_weight_bits(shape.name, accelerator.system, phase, state)
    key_value_bits = state.key_value_bits[accelerator.system]
    gemms = workload(shape, phase=phase, context=context, batch=1)
    products = [(gemm, product_of(gemm, accelerator, phase, weights)) for gemm in gemms]

    def published_total(logits_of_last_token: bool) -> dict[str, Cost]:
        classes = {name: Cost() for name in CLASSES}
        for gemm, count in published_gemms(shape, phase, context, weight_bits, key_value_bits, state).items():
            if gemm.kind == "head" and logits_of_last_token:
                gemm = replace(gemm, tokens=1)
            cost = published_cost(gemm, accelerator, phase, weight_bits, state)
            classes[gemm.kind] = classes[gemm.kind].plus(
                Cost(
                    compute_cycles=count * cost.compute_cycles,
                    dram_cycles=count * cost.dram_cycles,
                    cycles=count * cost.cycles,
                )
            )
        return classes

    def product_total(names: tuple[str, ...], rule: Callable[[Product, Accelerator], Cost]) -> dict[str, Cost]:
        classes = {name: Cost() for name in names}
        for gemm, product in products:
            name = _class_of(gemm, shape.head)
            if name in names:
                cost = rule(product, accelerator)
                classes[name] = classes[name].plus(
                    Cost(
                        compute_cycles=gemm.repeats * cost.compute_cycles,
                        dram_cycles=gemm.repeats * cost.dram_cycles,
                        cycles=gemm.repeats * cost.cycles,
                    )
                )
        return classes

    published = published_total(logits_of_last_token=False)
    with_head = published_total(logits_of_last_token=True)
    with_attention = {**with_head, **product_total(("keys", "values"), _closed_form)}
    weight_classes = ("linear", "head")
    with_precision = {**with_attention, **product_total(weight_classes, _codes_alone(weights, _closed_form))}
    with_metadata = product_total(CLASSES, _closed_form)
    with_refetch = product_total(CLASSES, _planned)

    def simulated(product: Product, _: Accelerator) -> Cost:
        count = run_tile_program(plan_product(product))
        dram_cycles = ceil_divide(count.traffic.total_bytes, product.burst_bytes)
        return Cost(compute_cycles=count.busy_cycles, dram_cycles=dram_cycles, cycles=count.cycles)

    def without_pipeline(product: Product, accelerator: Accelerator) -> Cost:
        return simulated(replace(product, drain_cycles=0, group_distance_cycles=0), accelerator)

    with_pipeline = product_total(CLASSES, simulated)
    stages = [
        published,
        with_head,
        with_attention,
        with_precision,
        with_metadata,
        with_refetch,
        product_total(CLASSES, without_pipeline),
        with_pipeline,
    ]
    totals = [sum(cost.cycles for cost in stage.values()) for stage in stages]
    return Explanation(
        state=state.name,
        model=shape.name,
        accelerator=accelerator.name,
        format=weights.name,
        phase=phase,
        context=context,
        published_cycles=totals[0],
        cycles=totals[-1],
        published_energy_uj=simulate_published(shape, accelerator, phase=phase, context=context, state=state).energy_uj,
        energy_uj=_simulation(shape, accelerator, phase, weights, context).energy.total_uj,
        reasons={name: totals[index + 1] - totals[index] for index, name in enumerate(REASONS)},
        published_classes=published,
        cycle_classes=with_pipeline,
    )


def paged_memory(accelerator: Accelerator) -> Dram:
    """DDR4 with the times of a DDR4-3200 device in nanoseconds, and the peak bandwidth of the accelerator's channel.

    So that nothing but rows, banks, turnarounds and refresh is different from ideal memory. 32 bytes in a cycle of 1 ns
    are 4000 million transfers of 8 bytes.
    """
    device = get_dram("ddr4-3200")
    megatransfers = accelerator.ideal_bytes_per_cycle * accelerator.clock_mhz // device.bytes_per_transfer
    return replace(device, name="ddr4-3200 timings at the peak of the channel", megatransfers_per_second=megatransfers)


def paged_cycles(
    shape: ModelShape, accelerator: Accelerator, *, phase: Phase, weights: Format | None = None, context: int = 256
) -> int:
    """Cycles of a prefill or of one decoded token with ``paged_memory`` in the place of ideal memory.

    Raises ``InputError`` as ``termwise.sim.simulate.simulate`` does.
    """
    if weights is None:
        weights = get_format(accelerator.default_format(phase))
    memory = paged_memory(accelerator).timing(accelerator.clock_mhz)
    total = 0
    for gemm in workload(shape, phase=phase, context=context, batch=1):
        program = plan_product(product_of(gemm, accelerator, phase, weights))
        total += gemm.repeats * run_tile_program(program._replace(burst_bytes=0), memory=memory).cycles
    return total


def batch_table() -> str:
    """Decode of Llama-2-7B with a growing batch: where the limit moves from external memory to the array."""
    lines = [
        "| accelerator | batch | cycles per token | busy | stall on weights | stall on activations | drain "
        "| write-back | PE utilization |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in ("fp16", "bitmod-lossy"):
        for batch in (1, 4, 16, 64):
            result = simulate(known_shape("llama-2-7b"), get_accelerator(name), phase="decode", batch=batch)
            stalls = result.stall_cycles
            shares = " | ".join(
                f"{100 * part / result.cycles:.1f} %"
                for part in (result.busy_cycles, stalls.weights, stalls.activations, stalls.drain, stalls.write_back)
            )
            lines.append(
                f"| {name} | {batch} | {round(result.cycles / batch):,} | {shares} "
                f"| {100 * result.pe_utilization:.1f} % |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(batch_table())
