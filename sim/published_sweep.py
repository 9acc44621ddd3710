"""Many configurations of the published model at once: arrays of parameters in, cycles and energies out.

The same arithmetic as ``termwise.sim.published``, which is the readable definition; the kernel is compiled by Numba.
Cycles, steps and bytes are whole numbers below 2^53 in float64: all sums and products of them are exact, and the
ceiling and the floor of a rounded quotient a / b are those of the exact one, because a / b differs from a whole number
by at least 1 / b, and rounding moves it by at most a / b · 2^-53 < 1 / b. Where a precision has a fraction, both models
do the same float64 operations in the same order. Cycles are therefore equal to those of the readable model; energies
may differ in the last bits, because they are summed in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import ModelShape
from termwise.algorithms.workload import Phase, check_count, check_phase
from termwise.sim.accelerators import Accelerator
from termwise.sim.memory import PORT_WIDTHS_BITS, READ_PJ, WRITE_PJ
from termwise.sim.published import (
    ACTIVATION_BITS,
    PUBLISHED_2024,
    PUBLISHED_CONTEXT,
    WORD_BITS,
    PublishedState,
    published_energies,
    published_gemms,
    published_weight_bits,
)

EXACT_LIMIT = 2**50
"""Cycles and bytes below this are exact, because eight times as many (bits) are below 2^53."""

# Columns of the table of products.
_COUNT, _COPIES, _OUTPUTS, _REDUCTION, _INPUT_FEATURES, _TOKENS, _IS_ATTENTION = range(7)


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedConfigurations:
    """Parameters of many accelerators; every field is an array [configurations], whole numbers are int64.

    Attributes:
        rows, columns: shape of the array.
        lanes: weights of a dot-product step.
        bit_serial: bool; whether a step takes a cycle per two bits of the stationary operand.
        port_reads_per_step: reads of either buffer in one step.
        weight_bits, key_value_bits: float64.
        weight_buffer_bytes, activation_buffer_bytes: as in ``Accelerator``.
        dram_bytes_per_cycle: of ideal memory.
        dram_pj_per_bit: float64.
        pe_pj_per_cycle: float64, of one PE, place and route included.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    lanes: NDArray[np.int64]
    bit_serial: NDArray[np.bool_]
    port_reads_per_step: NDArray[np.int64]
    weight_bits: NDArray[np.float64]
    key_value_bits: NDArray[np.float64]
    weight_buffer_bytes: NDArray[np.int64]
    activation_buffer_bytes: NDArray[np.int64]
    dram_bytes_per_cycle: NDArray[np.int64]
    dram_pj_per_bit: NDArray[np.float64]
    pe_pj_per_cycle: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Raise ``InputError`` for arrays of different lengths or types, and for values that no accelerator has."""
        expected = np.shape(self.rows)
        for entry in fields(self):
            values = getattr(self, entry.name)
            kinds = {"bit_serial": "b"}.get(entry.name, "f" if entry.name in _REAL_FIELDS else "i")
            if not isinstance(values, np.ndarray) or values.dtype.kind != kinds or values.dtype.itemsize not in (1, 8):
                wanted = {"b": "bool", "f": "float64", "i": "int64"}[kinds]
                raise InputError(f"{entry.name} is not an array of {wanted}; expected an array [configurations]")
            if values.ndim != 1 or values.shape != expected:
                raise InputError(
                    f"{entry.name} has the shape {values.shape}; expected [configurations] as rows has, {expected}"
                )
            least = 0 if entry.name in ("dram_pj_per_bit", "pe_pj_per_cycle") else 1
            if kinds != "b" and not bool(np.all(np.isfinite(values) & (values >= least))):
                raise InputError(f"{entry.name} holds a value that is not finite or below {least}")

    def __len__(self) -> int:
        """Number of configurations."""
        return len(self.rows)


_REAL_FIELDS = ("weight_bits", "key_value_bits", "dram_pj_per_bit", "pe_pj_per_cycle")


def configurations_of(
    accelerators: Sequence[Accelerator], *, phase: Phase, weight_bits: Sequence[float], key_value_bits: Sequence[float]
) -> PublishedConfigurations:
    """The parameters of ``accelerators`` in ``phase``, with a weight and a key-value precision for each.

    Raises ``InputError`` for sequences of different lengths, for precisions below 1, for memory that is not ideal and
    for energies that are not known.
    """
    phase = check_phase(phase)

    def column(kind: type[Any], values: Sequence[Any]) -> NDArray[Any]:
        return np.array(values, dtype=kind)

    arrays = [entry.array(phase) for entry in accelerators]
    elements = [entry.processing_element for entry in accelerators]
    energies = [published_energies(entry) for entry in accelerators]
    return PublishedConfigurations(
        rows=column(np.int64, [array.rows for array in arrays]),
        columns=column(np.int64, [array.columns for array in arrays]),
        lanes=column(np.int64, [element.lanes for element in elements]),
        bit_serial=column(np.bool_, [element.kind == "bit_serial" for element in elements]),
        port_reads_per_step=column(np.int64, [entry.port_reads_per_step for entry in accelerators]),
        weight_bits=column(np.float64, weight_bits),
        key_value_bits=column(np.float64, key_value_bits),
        weight_buffer_bytes=column(np.int64, [entry.weight_buffer_bytes for entry in accelerators]),
        activation_buffer_bytes=column(np.int64, [entry.activation_buffer_bytes for entry in accelerators]),
        dram_bytes_per_cycle=column(np.int64, [entry.ideal_bytes_per_cycle for entry in accelerators]),
        dram_pj_per_bit=column(np.float64, [dram for _, dram in energies]),
        pe_pj_per_cycle=column(np.float64, [pe for pe, _ in energies]),
    )


def published_configurations(
    accelerators: Sequence[Accelerator], model: str, *, phase: Phase, state: PublishedState = PUBLISHED_2024
) -> PublishedConfigurations:
    """The parameters of ``accelerators`` with the precisions that ``state`` has for ``model``.

    Raises ``InputError`` as ``published_weight_bits`` does.
    """
    systems = [entry.system for entry in accelerators]
    return configurations_of(
        accelerators,
        phase=phase,
        weight_bits=[published_weight_bits(model, system, phase, state) for system in systems],
        key_value_bits=[state.key_value_bits[system] for system in systems],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedEvaluations:
    """Results, every array [configurations, models]: cycles int64, energies in µJ float64."""

    cycles: NDArray[np.int64]
    compute_cycles: NDArray[np.int64]
    traffic_bytes: NDArray[np.int64]
    pe_energy_uj: NDArray[np.float64]
    sram_read_energy_uj: NDArray[np.float64]
    sram_write_energy_uj: NDArray[np.float64]
    dram_energy_uj: NDArray[np.float64]

    @property
    def energy_uj(self) -> NDArray[np.float64]:
        """PEs, buffers and external memory, [configurations, models]."""
        return self.pe_energy_uj + self.sram_read_energy_uj + self.sram_write_energy_uj + self.dram_energy_uj


def _access_pj(table: Sequence[float], port_bits: NDArray[np.float64]) -> NDArray[np.float64]:
    """``termwise.sim.memory.buffer_access_pj`` of many widths [configurations]."""
    inside = np.interp(port_bits, PORT_WIDTHS_BITS, table)
    return inside * np.maximum(port_bits / PORT_WIDTHS_BITS[-1], 1.0)


def _port_energies(configurations: PublishedConfigurations) -> NDArray[np.float64]:
    """pJ of reading both ports, of writing a weight word and of writing an activation word, [configurations, 3]."""
    lanes = configurations.lanes / configurations.port_reads_per_step
    weight_port_bits = lanes * 4 * np.ceil(configurations.weight_bits / 4) * configurations.rows
    activation_port_bits = lanes * ACTIVATION_BITS * configurations.columns
    read_pj = _access_pj(READ_PJ, weight_port_bits) + _access_pj(READ_PJ, activation_port_bits)
    write_pj = [_access_pj(WRITE_PJ, bits) * WORD_BITS / bits for bits in (weight_port_bits, activation_port_bits)]
    return np.stack([read_pj, *write_pj], axis=1)


def _product_table(
    shapes: Sequence[ModelShape], phase: Phase, context: int, state: PublishedState
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Products of all models, [products, 7 columns], and where each model's begin and end, [models + 1]."""
    rows: list[tuple[float, ...]] = []
    begins = [0]
    for shape in shapes:
        # Precisions do not change the sizes of products; the kernel takes them from the configurations.
        merged: dict[tuple[float, ...], int] = {}
        for gemm, count in published_gemms(shape, phase, context, 8, 8, state).items():
            sizes = (gemm.copies, gemm.outputs, gemm.reduction, gemm.input_features, gemm.tokens)
            key = (*sizes, float(gemm.kind in ("keys", "values")))
            merged[key] = merged.get(key, 0) + count
        rows += [(count, *key) for key, count in merged.items()]
        begins.append(len(rows))
    return np.array(rows, dtype=np.float64).reshape(-1, 7), np.array(begins, dtype=np.int64)


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _evaluate(
    products: NDArray[np.float64],
    begins: NDArray[np.int64],
    per_head: bool,
    round_by_operand: bool,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    lanes: NDArray[np.int64],
    bit_serial: NDArray[np.bool_],
    all_weight_bits: NDArray[np.float64],
    all_key_value_bits: NDArray[np.float64],
    weight_buffer_bytes: NDArray[np.int64],
    activation_buffer_bytes: NDArray[np.int64],
    dram_bytes_per_cycle: NDArray[np.int64],
    dram_pj_per_bit: NDArray[np.float64],
    pe_pj_per_cycle: NDArray[np.float64],
    port_energies: NDArray[np.float64],
    counts: NDArray[np.float64],
    energies: NDArray[np.float64],
) -> None:
    """Fill ``counts`` [configurations, models, 3] (cycles, compute cycles, bytes) and ``energies`` [.., .., 4] in µJ.

    The energies are those of PEs, buffer reads, buffer writes and external memory.
    """
    for index in range(rows.shape[0]):
        array_rows = float(rows[index])
        array_columns = float(columns[index])
        step_lanes = float(lanes[index])
        weight_bits = all_weight_bits[index]
        key_value_bits = all_key_value_bits[index]
        weight_buffer = float(weight_buffer_bytes[index])
        activation_buffer = float(activation_buffer_bytes[index])
        burst_bits = 8.0 * dram_bytes_per_cycle[index]
        weight_step_cycles = np.ceil(np.floor(weight_bits) / 2.0) if bit_serial[index] else 1.0
        key_value_step_cycles = np.ceil(np.floor(key_value_bits) / 2.0) if bit_serial[index] else 1.0
        for model in range(begins.shape[0] - 1):
            cycles = 0.0
            compute_cycles = 0.0
            tile_steps = 0.0
            weight_words = 0.0
            activation_words = 0.0
            traffic_bytes = 0.0
            for product in range(begins[model], begins[model + 1]):
                count = products[product, _COUNT]
                copies = products[product, _COPIES]
                outputs = products[product, _OUTPUTS]
                reduction = products[product, _REDUCTION]
                input_features = products[product, _INPUT_FEATURES]
                tokens = products[product, _TOKENS]
                is_attention = products[product, _IS_ATTENTION] != 0.0
                own_width = is_attention and per_head
                operand_bits = key_value_bits if is_attention else weight_bits
                written_bits = key_value_bits if own_width else weight_bits
                step_cycles = key_value_step_cycles if own_width else weight_step_cycles

                # Compute.
                steps = (
                    copies
                    * np.ceil(reduction / step_lanes)
                    * np.ceil(outputs / array_rows)
                    * np.ceil(tokens / array_columns)
                )
                compute = steps * step_cycles

                # External memory: once, unless both operands exceed their buffers; then one of them again.
                weight_rows = outputs * copies
                input_rows = tokens * copies
                weight_bytes = np.ceil(reduction * operand_bits * 0.125) * weight_rows
                input_bytes = input_features * input_rows * 2.0
                output_bytes = outputs * input_rows * 2.0
                weight_fetches = 1.0
                input_fetches = 1.0
                if weight_bytes > weight_buffer and input_bytes > activation_buffer:
                    weights_again = np.ceil(input_bytes / activation_buffer)
                    inputs_again = np.ceil(weight_bytes / weight_buffer)
                    if weights_again * weight_bytes + input_bytes < inputs_again * input_bytes + weight_bytes:
                        weight_fetches = weights_again
                    else:
                        input_fetches = inputs_again
                traffic = weight_bytes * weight_fetches + input_bytes * input_fetches + output_bytes
                if round_by_operand:
                    dram = (
                        np.floor(weight_rows * reduction * operand_bits * weight_fetches / burst_bits)
                        + np.floor(8.0 * input_bytes * input_fetches / burst_bits)
                        + np.floor(8.0 * output_bytes / burst_bits)
                    )
                else:
                    dram = np.floor(8.0 * traffic / burst_bits)

                cycles += count * max(compute, dram)
                compute_cycles += count * compute
                tile_steps += count * steps
                # A word of the buffers has 64 bits, an activation 16.
                weight_words += count * np.ceil(reduction * written_bits * 0.015625) * weight_rows * weight_fetches
                input_words = np.ceil(input_features * 0.25) * input_rows * input_fetches
                activation_words += count * (input_words + np.ceil(outputs * 0.25) * input_rows)
                traffic_bytes += count * traffic
            counts[index, model, 0] = cycles
            counts[index, model, 1] = compute_cycles
            counts[index, model, 2] = traffic_bytes
            energies[index, model, 0] = pe_pj_per_cycle[index] * array_rows * array_columns * compute_cycles * 1e-6
            energies[index, model, 1] = tile_steps * port_energies[index, 0] * 1e-6
            energies[index, model, 2] = (
                weight_words * port_energies[index, 1] + activation_words * port_energies[index, 2]
            ) * 1e-6
            energies[index, model, 3] = 8.0 * traffic_bytes * dram_pj_per_bit[index] * 1e-6


def evaluate_published(
    configurations: PublishedConfigurations,
    shapes: Sequence[ModelShape],
    *,
    phase: Phase,
    context: int = PUBLISHED_CONTEXT,
    state: PublishedState = PUBLISHED_2024,
) -> PublishedEvaluations:
    """Every configuration on every model, for one prefill of ``context`` tokens or one decoded token of one sequence.

    Cycles are equal to those of ``termwise.sim.published.simulate_published``; energies to about 1e-14 of them.

    Raises ``InputError`` for an unknown phase, a context below 1, heads that key-value heads do not share evenly, and
    results that are too large to be exact (``EXACT_LIMIT``).
    """
    phase = check_phase(phase)
    check_count("context", context)
    products, begins = _product_table(shapes, phase, context, state)
    counts = np.empty((len(configurations), len(shapes), 3))
    energies = np.empty((len(configurations), len(shapes), 4))
    _evaluate(
        products,
        begins,
        state.attention == "per_head",
        state.dram_rounding == "by_operand",
        configurations.rows,
        configurations.columns,
        configurations.lanes,
        configurations.bit_serial,
        configurations.weight_bits,
        configurations.key_value_bits,
        configurations.weight_buffer_bytes,
        configurations.activation_buffer_bytes,
        configurations.dram_bytes_per_cycle,
        configurations.dram_pj_per_bit,
        configurations.pe_pj_per_cycle,
        _port_energies(configurations),
        counts,
        energies,
    )
    if counts.size and counts.max() >= EXACT_LIMIT:
        raise InputError(
            f"a configuration takes {counts.max():.3g} cycles or bytes; expected fewer than 2^50, so that all are exact"
        )
    whole = counts.astype(np.int64)
    return PublishedEvaluations(
        cycles=whole[..., 0],
        compute_cycles=whole[..., 1],
        traffic_bytes=whole[..., 2],
        pe_energy_uj=energies[..., 0],
        sram_read_energy_uj=energies[..., 1],
        sram_write_energy_uj=energies[..., 2],
        dram_energy_uj=energies[..., 3],
    )
