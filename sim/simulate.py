"""Cycle-level simulation of a whole model on an accelerator: cycles and their causes, traffic, energy.

The machine (``docs/simulator.md`` gives the reasons and what is not modelled):

* The array is output-stationary. A tile is ``rows`` outputs × ``columns`` tokens, one per PE, reduced over the inputs
  in dot-product steps of ``lanes`` weights, each of which takes the PE's cycles per step. A tile that is smaller than
  the array leaves PEs idle.
* Two buffers, for weights (or keys, or values) and for activations, are two halves each: one half is loaded while the
  other is computed on. An operand that fits in its buffer whole is loaded once. ``termwise.sim.plan`` says what stays
  in a half, and when a long reduction is split into passes whose partial sums go through external memory.
* One channel to external memory moves one request at a time, in order; a request of n bytes takes
  ceil(n / bytes per cycle) cycles of ideal memory, and what ``termwise.sim.dram`` says of a memory with pages. A
  finished tile waits in a write-back register and goes first.
* A step waits for its weights and activations. A load waits for its half of the buffer. After its last step a tile
  drains for as long as the PE's pipeline is deep; it leaves when the register is free and its partial sums have
  arrived.
* Scaling a group's sum bit-serially takes a cycle per bit of the scale and is hidden behind the next group; where that
  is shorter, its last term waits.
* A product starts when the one before has finished, with empty buffers. Repeated products cost the same each time, so
  one is simulated and multiplied.

Every cycle belongs to exactly one cause: busy, or a stall on scaling, weights, activations, the drain, or the
write-back (a full register, late partial sums, the last write-back). Weights are named first where both miss.

Energy: events × the energies of the accelerator's set (``termwise.sim.energy``). A PE's energy per cycle, place and
route included, × all PEs × compute cycles (PEs without work in a tile that is not full are not gated, as published; in
all other cycles the array's clock is gated). Buffers: one read of both ports per dot-product step, one write per bit
loaded, and one write of every output into the activation buffer; where the set knows it, their leakage × time. External
memory: energy per bit × traffic. An event that the set does not know leaves its part and the total without a number,
and a note names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from termwise.algorithms.dictionary import (
    EXPECTED_DEVIATION,
    DictionarySpec,
    expected_outlier_share,
    expected_packed_bytes,
)
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.processing_element import HALF_BITS
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.shapes import ModelShape
from termwise.algorithms.workload import Gemm, Operand, Phase, check_phase, layers_alike, workload
from termwise.sim.accelerators import Accelerator, ArrayShape, check_group
from termwise.sim.cycle import CycleCount, StallCycles, Traffic, run_tile_program
from termwise.sim.energy import EnergySet, energies_of
from termwise.sim.kernels import TileProgram
from termwise.sim.plan import Product, ceil_divide, plan_product, tile_counts
from termwise.sim.sram import WIDEST_BANK_BITS
from termwise.sim.value_timing import value_timing


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy in µJ. A part is None where an event's energy is not known; so is the total then.

    ``leakage_uj`` is the standing power of the buffers × time; None where the set knows none, as published: it is then
    no part of the total.
    """

    pe_uj: float | None
    sram_read_uj: float | None
    sram_write_uj: float | None
    dram_uj: float | None
    leakage_uj: float | None = None

    @property
    def total_uj(self) -> float | None:
        """PEs, buffers and external memory."""
        return _total((self.pe_uj, self.sram_read_uj, self.sram_write_uj, self.dram_uj, self.leakage_uj or 0.0))

    def times(self, repeats: int) -> Energy:
        """The energy of ``repeats`` equal products."""
        return Energy(**{name: None if part is None else repeats * part for name, part in asdict(self).items()})


def _total(parts: Iterable[float | None]) -> float | None:
    """The sum; None where one part is."""
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def _summed(energies: Sequence[Energy]) -> Energy:
    """Energy of products one after the other, part by part."""
    return Energy(**{field.name: _total(getattr(entry, field.name) for entry in energies) for field in fields(Energy)})


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
    energy_set: str
    memory: str
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

        ``time_to_first_token_ms`` is there for a prefill, which yields the first token, and is its latency.
        ``busy`` and the map ``stalls`` are cycles and sum to ``cycles``; so do the parts of the map ``energy_uj`` to
        its ``total``, which is None where a part is. ``leakage`` is there where the energy set knows it.
        """
        return {
            "model_of": "cycle",
            "model": self.model,
            "accelerator": self.accelerator,
            "energy_set": self.energy_set,
            "memory": self.memory,
            "format": self.format,
            "phase": self.phase,
            "context": self.context,
            "batch": self.batch,
            "clock_mhz": self.clock_mhz,
            "key_value_bits": self.key_value_bits,
            "cycles": self.cycles,
            "latency_ms": self.latency_ms,
            **({"time_to_first_token_ms": self.latency_ms} if self.phase == "prefill" else {}),
            "tokens_per_second": self.tokens_per_second,
            "energy_per_token_uj": None if self.energy.total_uj is None else self.energy.total_uj / self.tokens,
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


def _energy_to_dict(energy: Energy) -> dict[str, float | None]:
    return {
        "pe": energy.pe_uj,
        "sram_read": energy.sram_read_uj,
        "sram_write": energy.sram_write_uj,
        "dram": energy.dram_uj,
        **({} if energy.leakage_uj is None else {"leakage": energy.leakage_uj}),
        "total": energy.total_uj,
    }


def product_of(gemm: Gemm, accelerator: Accelerator, phase: Phase, weights: Format) -> Product:
    """One product on the accelerator's array.

    Raises ``UnsupportedFormatError`` where the PE takes no ``weights``, and ``InputError`` where the sum of a group
    does not fit its accumulator, or the array cannot be divided into the groups of PEs that the weights need.
    """
    element = accelerator.processing_element
    if gemm.operand == "weight":
        cycles_per_step = element.cycles_per_step(weights)
        elements = element.processing_elements_per_product(weights)
        array = accelerator.array_of_products(phase, elements)
        buffer_bits = element.buffer_bits(weights, gemm.outputs, gemm.reduction)
        total_bytes = _packed_bytes(weights, gemm.outputs, gemm.reduction)
        pipeline = element.pipeline(weights, gemm.reduction, min(array.rows, gemm.outputs))
        group_inputs = weights.group_size or 0
        check_group(accelerator, weights, min(group_inputs or gemm.reduction, gemm.reduction))
        activation_bits = element.activation_bits(weights)
    else:
        cycles_per_step = element.key_value_cycles_per_step(accelerator.key_value_bits)
        buffer_bits = float(accelerator.key_value_bits)
        total_bytes = ceil_divide(gemm.outputs * gemm.reduction * accelerator.key_value_bits, 8)
        pipeline = element.key_value_pipeline(accelerator.key_value_bits)
        group_inputs = 0
        elements = element.key_value_processing_elements_per_product(accelerator.key_value_bits)
        array = accelerator.array_of_products(phase, elements)
        activation_bits = element.key_value_activation_bits(accelerator.key_value_bits)
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
        group_distance_cycles=accelerator.group_distance_cycles(pipeline),
        drain_cycles=pipeline.drain_cycles + accelerator.movement_cycles(phase),
        weight_buffer_bytes=accelerator.weight_buffer_bytes,
        activation_buffer_bytes=accelerator.activation_buffer_bytes,
        burst_bytes=accelerator.memory.ideal_bytes_per_cycle or 0,
        activation_bits=activation_bits,
        elements_per_product=elements,
        token_groups=_token_groups(accelerator, array, element.lanes * activation_bits),
        divisible=not isinstance(element, DictionarySpec),  # whose sums of a row are one per centroid
    )


def _token_groups(accelerator: Accelerator, array: ArrayShape, input_bits: int) -> int:
    """Turns of a tile: as many as its accumulators and half of the activation buffer have room for."""
    fitting = 4 * accelerator.activation_buffer_bytes // (array.columns * input_bits)
    return max(1, min(accelerator.token_groups(array), fitting))


def _packed_bytes(weights: Format, outputs: int, inputs: int) -> int:
    """Bytes of a matrix in external memory; those that depend on the weights (GOBO's outliers) as expected."""
    if weights.family == "gobo":
        return expected_packed_bytes(weights, outputs, inputs)
    return weights.packed_bytes(outputs, inputs)


class _Charges:
    """Energies of the events of one machine, by its set; collects the events that the set does not know."""

    def __init__(self, accelerator: Accelerator, energies: EnergySet) -> None:
        self.accelerator, self.energies = accelerator, energies
        self.unknown: dict[str, str] = {}

    def known(self, event: str, energy: Callable[[], float | None]) -> float | None:
        """``energy`` of one ``event``; None, and a reason, where the set does not know it."""
        reason = ""
        try:
            value = energy()
        except InputError as error:  # the model of the buffers has no points there
            value, reason = None, f": {error}"
        if value is None:
            self.unknown.setdefault(event, reason)
        return value

    def buffer(self, operand: str, port_bits: float) -> tuple[float | None, float | None, float | None]:
        """pJ of a read, pJ of a written bit, and mW of leakage of the buffer of ``operand``, a word of its fields."""
        size: dict[str, Any] = {
            "capacity_bytes": getattr(self.accelerator, f"{operand}_buffer_bytes"),
            "banks": getattr(self.accelerator, f"{operand}_buffer_banks"),
            "word_bits": port_bits,
        }
        read_pj = self.known(f"a read of the {operand} buffer", lambda: self.energies.sram_access_pj("read", **size))
        write_pj = self.known(f"a write into the {operand} buffer", lambda: self.energies.sram_write_pj_per_bit(**size))
        return read_pj, write_pj, None if read_pj is None else self.energies.sram_leakage_mw(**size)

    def accumulators(self, word_bits: int) -> tuple[float | None, float | None, float | None]:
        """pJ of a read and of a write of a word of the accumulator memory, and its leakage in mW.

        It has a bank for every 512 bits of the word, the widest that the model of the buffers knows.
        """
        size = {
            "capacity_bytes": self.accelerator.accumulator_bytes,
            "banks": ceil_divide(word_bits, WIDEST_BANK_BITS),
            "word_bits": word_bits,
        }
        event = "of the accumulator memory"
        read_pj = self.known(f"a read {event}", lambda: self.energies.sram_access_pj("read", **size))
        write_pj = self.known(f"a write {event}", lambda: self.energies.sram_access_pj("write", **size))
        return read_pj, write_pj, None if read_pj is None else self.energies.sram_leakage_mw(**size)

    def notes(self) -> tuple[str, ...]:
        """A sentence for every event without an energy."""
        return tuple(
            f"no energy: the set {self.energies.name} does not know that of {event}{reason}"
            for event, reason in self.unknown.items()
        )


def _of_events(events: float, energy_pj: float | None) -> float | None:
    """pJ of ``events``; None where the energy of one is not known."""
    return None if energy_pj is None else events * energy_pj


def _microjoules(*parts_pj: float | None) -> float | None:
    """µJ of all parts; None where one is not known."""
    total_pj = _total(parts_pj)
    return None if total_pj is None else total_pj / 1e6


def _energy(product: Product, count: CycleCount, charges: _Charges) -> Energy:
    """Energy of one product (see the module's last paragraph)."""
    accelerator, energies = charges.accelerator, charges.energies
    reads = accelerator.port_reads_per_step
    weight_read_pj, weight_bit_pj, weight_leakage_mw = charges.buffer(
        "weight", product.lanes * product.weight_buffer_bits * product.rows / reads
    )
    activation_read_pj, activation_bit_pj, activation_leakage_mw = charges.buffer(
        "activation", product.lanes * product.activation_bits * product.columns / reads
    )
    # Weights may take more bits in the buffer than in external memory, where a decoder stands between the two.
    buffered_weight_bits = (
        count.traffic.weight_bytes
        / product.weight_total_bytes
        * product.outputs
        * product.reduction
        * product.weight_buffer_bits
    )
    buffered_activation_bits = 8 * (count.traffic.activation_bytes + count.traffic.output_bytes)
    pe_pj = charges.known(
        f"a cycle of the PE of {accelerator.name}", lambda: energies.processing_element_pj(accelerator.system)
    )
    dram_pj = charges.known(f"a bit of external memory {accelerator.memory.name}", lambda: energies.dram_pj_per_bit)
    leakage_mw = _total((weight_leakage_mw, activation_leakage_mw))
    sums_read_pj: float | None = 0.0
    sums_write_pj: float | None = 0.0
    if accelerator.dataflow == "weight_stationary":
        sums_read_pj, sums_write_pj, sums_leakage_mw = charges.accumulators(32 * product.rows * product.columns)
        leakage_mw = _total((leakage_mw, sums_leakage_mw))
    elements = product.rows * product.columns * product.elements_per_product
    return Energy(
        pe_uj=_microjoules(_of_events(count.busy_cycles, _of_events(elements, pe_pj))),
        sram_read_uj=_microjoules(
            _of_events(count.weight_reads * reads, weight_read_pj),
            _of_events(count.dot_product_steps * reads, activation_read_pj),
            _of_events(count.dot_product_steps, sums_read_pj),
        ),
        sram_write_uj=_microjoules(
            _of_events(buffered_weight_bits, weight_bit_pj),
            _of_events(buffered_activation_bits, activation_bit_pj),
            _of_events(count.dot_product_steps, sums_write_pj),
        ),
        dram_uj=_microjoules(_of_events(8 * count.moved_bytes, dram_pj)),
        leakage_uj=None if leakage_mw is None else leakage_mw * count.cycles / accelerator.clock_mhz / 1e3,
    )


def _useful_pe_cycles(product: Product) -> int:
    """PE-cycles that compute the outputs of one product if no PE ever idles."""
    steps = ceil_divide(product.reduction, product.lanes)
    return product.outputs * product.tokens * steps * product.cycles_per_step


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One product as it was simulated, ``repeats`` times; ``useful_pe_cycles`` as ``_useful_pe_cycles`` of each."""

    product: Product
    program: TileProgram
    count: CycleCount
    useful_pe_cycles: int
    repeats: int


def _layer(gemm: Gemm, runs: Sequence[_Run], charges: _Charges) -> LayerSimulation:
    def total(amount: Callable[[CycleCount], int]) -> int:
        return sum(run.repeats * amount(run.count) for run in runs)

    stalls = StallCycles()
    for run in runs:
        stalls = stalls.plus(run.count.stalls, run.repeats)
    cycles = total(lambda count: count.cycles)
    product = runs[0].product
    useful = sum(run.repeats * run.useful_pe_cycles for run in runs)
    return LayerSimulation(
        name=gemm.name,
        operand=gemm.operand,
        tokens=gemm.tokens,
        reduction=gemm.reduction,
        outputs=gemm.outputs,
        repeats=gemm.repeats,
        passes=tile_counts(runs[0].program)[2],
        cycles=cycles,
        busy_cycles=total(lambda count: count.busy_cycles),
        stall_cycles=stalls,
        traffic=Traffic(
            weight_bytes=total(lambda count: count.traffic.weight_bytes),
            activation_bytes=total(lambda count: count.traffic.activation_bytes),
            output_bytes=total(lambda count: count.traffic.output_bytes),
        ),
        energy=_summed([_energy(run.product, run.count, charges).times(run.repeats) for run in runs]),
        pe_utilization=useful / (product.rows * product.columns * cycles),
    )


class Machine:
    """The accelerator in one phase, with the products that it has computed."""

    def __init__(self, accelerator: Accelerator, phase: Phase, weights: Format, *, stepped: bool) -> None:
        self.accelerator, self.phase, self.weights, self.stepped = accelerator, phase, weights, stepped
        ideal = accelerator.memory.ideal_bytes_per_cycle is not None
        self._memory = None if ideal else accelerator.memory.timing(accelerator.clock_mhz)
        self._counts: dict[TileProgram, CycleCount] = {}

    def run(self, gemm: Gemm) -> _Run:
        """All repeats of a product, whose values are not known."""
        product = product_of(gemm, self.accelerator, self.phase, self.weights)
        program = plan_product(product)
        if program not in self._counts:
            self._counts[program] = run_tile_program(program, memory=self._memory, fast_forward=not self.stepped)
        return _Run(
            product=product,
            program=program,
            count=self._counts[program],
            useful_pe_cycles=_useful_pe_cycles(product),
            repeats=gemm.repeats,
        )

    def run_values(self, gemm: Gemm, tensor: QuantizedTensor) -> _Run:
        """One of the repeats of a product with weights, those of ``tensor``."""
        product = product_of(gemm, self.accelerator, self.phase, self.weights)
        product = replace(product, weight_total_bytes=tensor.nbytes)
        program = plan_product(product)
        timing = value_timing(self.accelerator.processing_element, tensor, product.rows)
        movement = self.accelerator.movement_cycles(self.phase)
        values = replace(timing, drain_cycles=timing.drain_cycles + movement)
        count = run_tile_program(program, memory=self._memory, values=values, fast_forward=not self.stepped)
        rows = np.full(len(timing.step_cycles), product.rows)
        rows[-1] = product.outputs - product.rows * (len(rows) - 1)
        useful = product.tokens * int(rows @ timing.step_cycles.sum(axis=1, dtype=np.int64))
        return _Run(product=product, program=program, count=count, useful_pe_cycles=useful, repeats=1)


def simulate(
    shape: ModelShape,
    accelerator: Accelerator,
    *,
    phase: Phase,
    weights: Format | None = None,
    context: int = 256,
    batch: int = 1,
    tensors: Callable[[str], QuantizedTensor] | None = None,
    stepped: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Simulate one prefill of ``context`` tokens, or one decode step over ``context`` cached tokens.

    ``weights`` is the format of all linear layers, the accelerator's own for the phase where it is None. ``tensors``
    gives the weights of a linear layer by its name, in that format: then what depends on the values is simulated from
    them, layer by layer (``termwise.sim.value_timing``). ``stepped`` simulates every event, where else what repeats is
    counted once; the results are the same. ``progress`` is called with the products finished and their number.

    Raises ``InputError`` for an unknown phase, a context or batch below 1 or an array that does not fit the buffers,
    and ``UnsupportedFormatError`` (an ``InputError``) where the PE has no way to take ``weights``.
    """
    phase = check_phase(phase)
    if weights is None:
        weights = get_format(accelerator.default_format(phase))
    energies = energies_of(accelerator)
    charges = _Charges(accelerator, energies)
    machine = Machine(accelerator, phase, weights, stepped=stepped)
    gemms = workload(shape, phase=phase, context=context, batch=batch)
    alike = {} if tensors is None else layers_alike(shape)
    runs = sum(len(alike.get((gemm.name, gemm.outputs, gemm.reduction), (gemm.name,))) for gemm in gemms)
    done = 0
    layers: list[LayerSimulation] = []
    for gemm in gemms:
        found = []
        names = alike.get((gemm.name, gemm.outputs, gemm.reduction), ()) if gemm.operand == "weight" else ()
        if names and len(names) != gemm.repeats:
            raise InputError(
                f"{gemm.name}: which tokens pass which of {len(names)} layers is not known; "
                "expected a model without experts where values are simulated"
            )
        for name in names or (None,):
            found.append(
                machine.run(gemm) if name is None or tensors is None else machine.run_values(gemm, tensors(name))
            )
            done += 1
            if progress is not None:
                progress(done, runs)
        layers.append(_layer(gemm, found, charges))
    elements = accelerator.processing_element.processing_elements_per_product(weights)
    array = accelerator.array_of_products(phase, elements)
    cycles = sum(layer.cycles for layer in layers)
    useful = sum(layer.pe_utilization * layer.cycles for layer in layers)
    return Simulation(
        model=shape.name,
        accelerator=accelerator.name,
        energy_set=energies.name,
        memory=accelerator.memory.name,
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
        energy=_summed([layer.energy for layer in layers]),
        pe_utilization=useful / cycles if cycles else 0.0,
        layers=tuple(layers),
        notes=(
            *charges.notes(),
            *(_without_values(accelerator, weights) if tensors is None else (VALUES_NOTE,)),
            *_short_groups(shape, weights),
            *_notes(shape, accelerator, array.columns, layers),
        ),
    )


VALUES_NOTE = "steps and drains are those of the values of the weights"


def _without_values(accelerator: Accelerator, weights: Format) -> tuple[str, ...]:
    """What depends on the values of weights that are not at hand."""
    if getattr(accelerator.processing_element, "skip_zero_terms", "none") != "none":
        return ("no zero terms are skipped here, because they depend on the values of the weights",)
    if weights.family != "gobo":
        return ()
    share = expected_outlier_share(float(weights.option("threshold")), EXPECTED_DEVIATION)
    return (
        f"the outliers of {weights.name} are not counted but expected: {100 * share:.2g} % of Gaussian weights with a "
        f"standard deviation of {EXPECTED_DEVIATION:g}",
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
