"""Cycle-level simulation of a whole model on an accelerator: cycles and their causes, traffic, energy.

The machine (``docs/simulator.md`` gives the reasons and what is not modelled):

* The array is output-stationary. A tile is ``rows`` outputs × ``columns`` tokens, one per PE, reduced over the inputs
  in dot-product steps of ``lanes`` weights, each of which takes the PE's cycles per step. A tile that is smaller than
  the array leaves PEs idle.
* Two buffers, for weights (or keys, or values) and for activations, are two halves each: one half is loaded while the
  other is computed on. An operand that fits in its buffer whole is loaded once. ``termwise.sim.plan`` says what stays
  in a half, and when a long reduction is split into passes whose partial sums go through external memory.
* One channel to external memory moves one request at a time, in order; a request of n bytes takes
  ceil(n / ``dram_bytes_per_cycle``) cycles. A finished tile waits in a write-back register and goes first.
* A step waits for its weights and activations. A load waits for its half of the buffer. After its last step a tile
  drains for as long as the PE's pipeline is deep; it leaves when the register is free and its partial sums have
  arrived.
* Scaling a group's sum bit-serially takes a cycle per bit of the scale and is hidden behind the next group; where that
  is shorter, its last term waits.
* A product starts when the one before has finished, with empty buffers. Repeated products cost the same each time, so
  one is simulated and multiplied.

Every cycle belongs to exactly one cause: busy, or a stall on scaling, weights, activations, the drain, or the
write-back (a full register, late partial sums, the last write-back). Weights are named first where both miss.

Energy: a PE's energy per cycle × place-and-route factor × all PEs × compute cycles (PEs without work in a tile that is
not full are not gated, as published; in all other cycles the array's clock is gated). Buffers: one read of both ports
per dot-product step, one write per bit loaded, and one write of every output into the activation buffer. External
memory: energy per bit × traffic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.processing_element import HALF_BITS
from termwise.algorithms.shapes import ModelShape
from termwise.algorithms.workload import Gemm, Operand, Phase, check_phase, workload
from termwise.sim.accelerators import Accelerator, ArrayShape
from termwise.sim.cycle import CycleCount, StallCycles, Traffic, run_tile_program
from termwise.sim.kernels import TileProgram
from termwise.sim.memory import buffer_access_pj, buffer_write_pj_per_bit
from termwise.sim.plan import Product, ceil_divide, plan_product, tile_counts


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy in µJ."""

    pe_uj: float
    sram_read_uj: float
    sram_write_uj: float
    dram_uj: float

    @property
    def total_uj(self) -> float:
        """PEs, buffers and external memory."""
        return self.pe_uj + self.sram_read_uj + self.sram_write_uj + self.dram_uj


@dataclass(frozen=True, kw_only=True)
class LayerSimulation:
    """One distinct product; all sums are over its ``repeats``."""

    name: str
    operand: Operand
    tokens: int
    reduction: int
    outputs: int
    repeats: int
    passes: int
    cycles: int
    busy_cycles: int
    stall_cycles: StallCycles
    traffic: Traffic
    energy: Energy
    pe_utilization: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, units in the names."""
        return {
            "name": self.name,
            "operand": self.operand,
            "tokens": self.tokens,
            "reduction": self.reduction,
            "outputs": self.outputs,
            "repeats": self.repeats,
            "passes": self.passes,
            "cycles": self.cycles,
            "busy": self.busy_cycles,
            "stalls": asdict(self.stall_cycles),
            **_traffic_to_dict(self.traffic),
            "energy_uj": _energy_to_dict(self.energy),
            "pe_utilization": self.pe_utilization,
        }


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Result of a simulation of one prefill, or of one decode step, of ``batch`` sequences.

    ``pe_utilization`` is the share of all PE-cycles that computed an output that was asked for.
    """

    model: str
    accelerator: str
    format: str
    phase: Phase
    context: int
    batch: int
    clock_mhz: int
    key_value_bits: int
    cycles: int
    busy_cycles: int
    stall_cycles: StallCycles
    traffic: Traffic
    energy: Energy
    pe_utilization: float
    layers: tuple[LayerSimulation, ...]
    notes: tuple[str, ...]

    @property
    def latency_ms(self) -> float:
        """``cycles`` at the accelerator's clock."""
        return self.cycles / (self.clock_mhz * 1e3)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences that were read (prefill) or made (decode)."""
        return self.batch * (self.context if self.phase == "prefill" else 1)

    @property
    def tokens_per_second(self) -> float:
        """``tokens`` over the latency."""
        return self.tokens * 1e3 / self.latency_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, units in the names.

        ``busy`` and the map ``stalls`` are cycles and sum to ``cycles``; so do the parts of the map ``energy_uj`` to
        its ``total``.
        """
        return {
            "model_of": "cycle",
            "model": self.model,
            "accelerator": self.accelerator,
            "format": self.format,
            "phase": self.phase,
            "context": self.context,
            "batch": self.batch,
            "clock_mhz": self.clock_mhz,
            "key_value_bits": self.key_value_bits,
            "cycles": self.cycles,
            "latency_ms": self.latency_ms,
            "tokens_per_second": self.tokens_per_second,
            "energy_per_token_uj": self.energy.total_uj / self.tokens,
            "busy": self.busy_cycles,
            "stalls": asdict(self.stall_cycles),
            **_traffic_to_dict(self.traffic),
            "energy_uj": _energy_to_dict(self.energy),
            "pe_utilization": self.pe_utilization,
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
        }


def _traffic_to_dict(traffic: Traffic) -> dict[str, int]:
    return {
        "traffic_bytes": traffic.total_bytes,
        "weight_traffic_bytes": traffic.weight_bytes,
        "activation_traffic_bytes": traffic.activation_bytes,
        "output_traffic_bytes": traffic.output_bytes,
    }


def _energy_to_dict(energy: Energy) -> dict[str, float]:
    return {
        "pe": energy.pe_uj,
        "sram_read": energy.sram_read_uj,
        "sram_write": energy.sram_write_uj,
        "dram": energy.dram_uj,
        "total": energy.total_uj,
    }


def divided_array(array: ArrayShape, elements: int, name: str) -> ArrayShape:
    """``array`` of PEs as one of square groups of ``elements`` PEs, each of which computes one product.

    Raises ``InputError``, which names the accelerator ``name``, where a side is no multiple of that of a group.
    """
    side = math.isqrt(elements)
    if array.rows % side or array.columns % side:
        raise InputError(
            f"accelerator {name!r}: an array of {array.rows} × {array.columns} PEs cannot be divided into groups of "
            f"{side} × {side} for 8-bit products; expected sides that are multiples of {side}"
        )
    return ArrayShape(rows=array.rows // side, columns=array.columns // side)


def product_of(gemm: Gemm, accelerator: Accelerator, phase: Phase, weights: Format) -> Product:
    """One product on the accelerator's array.

    Raises ``UnsupportedFormatError`` where the PE takes no ``weights``, and ``InputError`` for an array that cannot be
    divided into the groups of PEs that they need.
    """
    element = accelerator.processing_element
    if gemm.operand == "weight":
        cycles_per_step = element.cycles_per_step(weights)
        buffer_bits = element.buffer_bits(weights, gemm.outputs, gemm.reduction)
        total_bytes = weights.packed_bytes(gemm.outputs, gemm.reduction)
        pipeline = element.pipeline(weights, gemm.reduction)
        group_inputs = weights.group_size or 0
        elements = element.processing_elements_per_product(weights)
        activation_bits = element.activation_bits(weights)
    else:
        cycles_per_step = element.key_value_cycles_per_step(accelerator.key_value_bits)
        buffer_bits = float(accelerator.key_value_bits)
        total_bytes = ceil_divide(gemm.outputs * gemm.reduction * accelerator.key_value_bits, 8)
        pipeline = element.key_value_pipeline(accelerator.key_value_bits)
        group_inputs = 0
        elements = element.key_value_processing_elements_per_product(accelerator.key_value_bits)
        activation_bits = element.key_value_activation_bits(accelerator.key_value_bits)
    array = divided_array(accelerator.array(phase), elements, accelerator.name)
    return Product(
        tokens=gemm.tokens,
        reduction=gemm.reduction,
        outputs=gemm.outputs,
        rows=array.rows,
        columns=array.columns,
        lanes=element.lanes,
        cycles_per_step=cycles_per_step,
        weight_buffer_bits=buffer_bits,
        weight_total_bytes=total_bytes,
        group_inputs=group_inputs if group_inputs < gemm.reduction else 0,
        dequantization_cycles=pipeline.dequantization_cycles,
        drain_cycles=pipeline.drain_cycles,
        weight_buffer_bytes=accelerator.weight_buffer_bytes,
        activation_buffer_bytes=accelerator.activation_buffer_bytes,
        burst_bytes=accelerator.dram_bytes_per_cycle,
        activation_bits=activation_bits,
        elements_per_product=elements,
    )


def _energy(product: Product, count: CycleCount, accelerator: Accelerator) -> Energy:
    """Energy of one product (see the module's last paragraph)."""
    reads = accelerator.port_reads_per_step
    weight_port_bits = product.lanes * product.weight_buffer_bits * product.rows / reads
    activation_port_bits = product.lanes * product.activation_bits * product.columns / reads
    read_pj = count.weight_reads * buffer_access_pj("read", weight_port_bits)
    read_pj += count.dot_product_steps * buffer_access_pj("read", activation_port_bits)
    # Weights may take more bits in the buffer than in external memory, where a decoder stands between the two.
    buffered_weight_bits = (
        count.traffic.weight_bytes
        / product.weight_total_bytes
        * product.outputs
        * product.reduction
        * product.weight_buffer_bits
    )
    written_pj = buffered_weight_bits * buffer_write_pj_per_bit(weight_port_bits)
    written_pj += (
        8
        * (count.traffic.activation_bytes + count.traffic.output_bytes)
        * buffer_write_pj_per_bit(activation_port_bits)
    )
    pe_pj_per_cycle = accelerator.pe_energy_pj_per_cycle * accelerator.place_and_route_factor
    rows = product.rows * product.elements_per_product
    return Energy(
        pe_uj=pe_pj_per_cycle * rows * product.columns * count.busy_cycles / 1e6,
        sram_read_uj=reads * read_pj / 1e6,
        sram_write_uj=written_pj / 1e6,
        dram_uj=8 * count.traffic.total_bytes * accelerator.dram_pj_per_bit / 1e6,
    )


def _useful_pe_cycles(product: Product) -> int:
    """PE-cycles that compute the outputs of one product if no PE ever idles."""
    steps = ceil_divide(product.reduction, product.lanes)
    return product.outputs * product.tokens * steps * product.cycles_per_step


def _times(repeats: int, count: CycleCount) -> tuple[StallCycles, Traffic]:
    stalls = StallCycles().plus(count.stalls, repeats)
    traffic = Traffic(
        weight_bytes=repeats * count.traffic.weight_bytes,
        activation_bytes=repeats * count.traffic.activation_bytes,
        output_bytes=repeats * count.traffic.output_bytes,
    )
    return stalls, traffic


def _layer(
    gemm: Gemm, product: Product, program: TileProgram, count: CycleCount, accelerator: Accelerator
) -> LayerSimulation:
    stalls, traffic = _times(gemm.repeats, count)
    energy = _energy(product, count, accelerator)
    return LayerSimulation(
        name=gemm.name,
        operand=gemm.operand,
        tokens=gemm.tokens,
        reduction=gemm.reduction,
        outputs=gemm.outputs,
        repeats=gemm.repeats,
        passes=tile_counts(program)[2],
        cycles=gemm.repeats * count.cycles,
        busy_cycles=gemm.repeats * count.busy_cycles,
        stall_cycles=stalls,
        traffic=traffic,
        energy=Energy(
            pe_uj=gemm.repeats * energy.pe_uj,
            sram_read_uj=gemm.repeats * energy.sram_read_uj,
            sram_write_uj=gemm.repeats * energy.sram_write_uj,
            dram_uj=gemm.repeats * energy.dram_uj,
        ),
        pe_utilization=_useful_pe_cycles(product) / (product.rows * product.columns * count.cycles),
    )


def simulate(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    phase: Phase,
    weights: Format | None = None,
    context: int = 256,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Simulate one prefill of ``context`` tokens, or one decode step over ``context`` cached tokens.

    ``weights`` is the format of all linear layers, the accelerator's own for the phase where it is None. ``progress``
    is called with the distinct products finished and their number.

    Raises ``InputError`` for an unknown phase, a context or batch below 1 or an array that does not fit the buffers,
    and ``UnsupportedFormatError`` (an ``InputError``) where the PE has no way to take ``weights``.
    """
    phase = check_phase(phase)
    if weights is None:
        weights = get_format(accelerator.default_format(phase))
    gemms = workload(shape, phase=phase, context=context, batch=batch)
    counts: dict[TileProgram, CycleCount] = {}
    layers: list[LayerSimulation] = []
    for index, gemm in enumerate(gemms):
        product = product_of(gemm, accelerator, phase, weights)
        program = plan_product(product)
        if program not in counts:
            counts[program] = run_tile_program(program)
        layers.append(_layer(gemm, product, program, counts[program], accelerator))
        if progress is not None:
            progress(index + 1, len(gemms))
    elements = accelerator.processing_element.processing_elements_per_product(weights)
    array = divided_array(accelerator.array(phase), elements, accelerator.name)
    cycles = sum(layer.cycles for layer in layers)
    useful = sum(layer.pe_utilization * layer.cycles for layer in layers)
    return Simulation(
        model=shape.name,
        accelerator=accelerator.name,
        format=weights.name,
        phase=phase,
        context=context,
        batch=batch,
        clock_mhz=accelerator.clock_mhz,
        key_value_bits=accelerator.key_value_bits,
        cycles=cycles,
        busy_cycles=sum(layer.busy_cycles for layer in layers),
        stall_cycles=functools.reduce(StallCycles.plus, (layer.stall_cycles for layer in layers), StallCycles()),
        traffic=Traffic(
            weight_bytes=sum(layer.traffic.weight_bytes for layer in layers),
            activation_bytes=sum(layer.traffic.activation_bytes for layer in layers),
            output_bytes=sum(layer.traffic.output_bytes for layer in layers),
        ),
        energy=Energy(
            pe_uj=sum(layer.energy.pe_uj for layer in layers),
            sram_read_uj=sum(layer.energy.sram_read_uj for layer in layers),
            sram_write_uj=sum(layer.energy.sram_write_uj for layer in layers),
            dram_uj=sum(layer.energy.dram_uj for layer in layers),
        ),
        pe_utilization=useful / cycles if cycles else 0.0,
        layers=tuple(layers),
        notes=(*_short_groups(shape, weights), *_notes(shape, accelerator, array.columns, layers)),
    )


def _short_groups(shape: ModelShape, weights: Format) -> tuple[str, ...]:
    """That some rows end in a short group, if they do."""
    short = [linear for linear in shape.linears if weights.short_group(linear.inputs)]
    if not short:
        return ()
    example = f"{weights.short_group(short[0].inputs)} of {weights.group_size} weights in {short[0].name}"
    return (f"the last group of every row is short in {len(short)} of {len(shape.linears)} linear layers ({example})",)


def _notes(shape: ModelShape, accelerator: Accelerator, columns: int, layers: list[LayerSimulation]) -> tuple[str, ...]:
    """What a reader of the numbers should know of this simulation in particular."""
    notes: list[str] = []
    if shape.attention is None:
        notes.append(f"the attention of {shape.name} is not known and not simulated")
    elif accelerator.key_value_bits < 16:
        bits = accelerator.key_value_bits
        partners = accelerator.processing_element.key_value_activation_bits(bits)
        which = "keys and values" if partners == HALF_BITS else "keys, values, queries and attention probabilities"
        notes.append(f"{which} are {bits}-bit integers here; the perplexities of termwise keep them in floating point")
    tokens = max((layer.tokens for layer in layers if layer.operand == "weight"), default=columns)
    if tokens < columns:
        notes.append(f"{tokens} of {columns} array columns have a token to work on in the linear layers")
    split = [layer.name for layer in layers if layer.passes > 1]
    if split:
        notes.append(
            "partial sums go through external memory, because long reductions do not fit in the buffers: "
            + ", ".join(split)
        )
    return tuple(notes)
