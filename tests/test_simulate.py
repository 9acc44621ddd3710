"""The cycle-level simulator: kernel against reference, laws, hand-counted cases, and whole models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from termwise.algorithms.bit_serial import BitSerialSpec, Skipping
from termwise.algorithms.dictionary import expected_packed_bytes
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.processing_element import UnsupportedFormatError
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.algorithms.shapes import AttentionShape, LinearShape, ModelShape, known_shape
from termwise.algorithms.workload import PHASES, Gemm, Phase, workload
from termwise.sim.accelerators import Accelerator, ArrayShape, get_accelerator, published_accelerator_names
from termwise.sim.cycle import CycleCount, StallCycles, ValueTiming, run_tile_program
from termwise.sim.cycle_reference import run_tile_program_by_cycles
from termwise.sim.dram import dram_names, get_dram
from termwise.sim.explain import REASONS, batch_table, explain
from termwise.sim.kernels import TileProgram, steps_of
from termwise.sim.plan import Product, ceil_divide, plan_product, planned_traffic, tile_counts
from termwise.sim.published import PUBLISHED_2025, PUBLISHED_STATES, PublishedState, simulate_published
from termwise.sim.simulate import Simulation, product_of, simulate
from termwise.sim.sram import SramModel
from termwise.sim.value_timing import value_timing

Runner = Callable[[TileProgram], CycleCount]
RUNNERS = pytest.mark.parametrize("run", [run_tile_program, run_tile_program_by_cycles], ids=["kernel", "reference"])


def product(**changes: float) -> Product:
    """A product of one tile of 4 × 4 PEs with large buffers and one byte per cycle, with ``changes``."""
    base = Product(
        tokens=4,
        reduction=8,
        outputs=4,
        rows=4,
        columns=4,
        lanes=1,
        cycles_per_step=1,
        weight_buffer_bits=8,
        weight_total_bytes=32,
        group_inputs=0,
        group_distance_cycles=0,
        drain_cycles=0,
        weight_buffer_bytes=4096,
        activation_buffer_bytes=4096,
        burst_bytes=1,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@st.composite
def products(draw: st.DrawFn) -> Product:
    """Small products, most of them too large for their buffers in one way or another."""
    outputs = draw(st.integers(1, 40))
    reduction = draw(st.integers(1, 60))
    columns = draw(st.integers(1, 8))
    return Product(
        tokens=draw(st.integers(1, 30)),
        reduction=reduction,
        outputs=outputs,
        rows=draw(st.integers(1, 8)),
        columns=columns,
        lanes=draw(st.sampled_from([1, 2, 4])),
        cycles_per_step=draw(st.integers(1, 4)),
        weight_buffer_bits=draw(st.sampled_from([3.1, 4, 8, 16])),
        weight_total_bytes=draw(st.integers(1, 2 * outputs * reduction)),
        group_inputs=draw(st.sampled_from([0, 3, 4, 6, 8, 16, 128])),
        group_distance_cycles=draw(st.sampled_from([0, 1, 8, 11])),
        drain_cycles=draw(st.sampled_from([0, 1, 4, 12])),
        weight_buffer_bytes=draw(st.sampled_from([256, 384, 512, 2048])),
        activation_buffer_bytes=draw(st.sampled_from([256, 384, 512, 2048])),
        burst_bytes=draw(st.sampled_from([1, 2, 5, 8, 32, 1000])),
        token_groups=min(draw(st.sampled_from([1, 1, 2, 3])), 16 // columns),  # a step fits in the smallest half
        activation_bits=draw(st.sampled_from([16, 16, 8, 4, 5, 3])),
    )


@st.composite
def programs(draw: st.DrawFn) -> TileProgram:
    """Programs of such products."""
    return plan_product(draw(products()))


def tile_passes(program: TileProgram) -> int:
    row_tiles, column_tiles, passes = tile_counts(program)
    return row_tiles * column_tiles * passes


def causes(count: CycleCount) -> int:
    return count.busy_cycles + count.stalls.total


# Kernel and reference.


@settings(max_examples=600, deadline=None, derandomize=True)
@given(programs())
def test_kernel_equals_the_reference_that_counts_single_cycles(program: TileProgram) -> None:
    assert run_tile_program(program) == run_tile_program_by_cycles(program)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(programs(), st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 200]))
def test_kernel_equals_the_reference_with_steps_and_drains_that_depend_on_values(
    program: TileProgram, seed: int, most: int
) -> None:
    generator = np.random.default_rng(seed)
    rows = ceil_divide(program.outputs, program.rows)
    values = ValueTiming(
        step_cycles=generator.integers(1, most, (rows, int(steps_of(program))), np.uint8, endpoint=True),
        drain_cycles=generator.integers(0, 30, rows),
    )
    count = run_tile_program(program, values=values)
    assert count == run_tile_program_by_cycles(program, values=values)
    assert count == run_tile_program(program, values=values, fast_forward=False)
    assert causes(count) == count.cycles


@settings(max_examples=200, deadline=None, derandomize=True)
@given(programs(), st.sampled_from([name for name in dram_names() if name != "ideal"]), st.sampled_from([200, 1000]))
def test_kernel_equals_the_reference_with_a_memory_of_pages(program: TileProgram, memory: str, clock: int) -> None:
    timing = get_dram(memory).timing(clock)
    program = program._replace(burst_bytes=0)
    count = run_tile_program(program, memory=timing)
    assert count == run_tile_program_by_cycles(program, memory=timing)
    assert causes(count) == count.cycles
    assert count.memory is not None
    assert count.memory.read_bytes + count.memory.written_bytes >= count.traffic.total_bytes


@settings(max_examples=300, deadline=None, derandomize=True)
@given(products(), st.integers(1, 7), st.booleans())
def test_kernel_equals_the_reference_on_plans_that_are_not_the_best(
    product: Product, passes: int, weights_stationary: bool
) -> None:
    columns = product.columns * product.token_groups
    tiles = ceil_divide(product.outputs, product.rows) * ceil_divide(product.tokens, columns)
    program = plan_product(product, passes=passes if tiles >= 3 else 1, weights_stationary=weights_stationary)
    count = run_tile_program(program)
    assert count == run_tile_program_by_cycles(program)
    assert count.traffic == planned_traffic(program)
    assert causes(count) == count.cycles


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(products(), st.integers(1, 60), st.integers(1, 60), st.booleans(), st.integers(1, 4))
def test_fast_forward_changes_nothing(
    product: Product, row_tiles: int, column_tiles: int, weights_stationary: bool, passes: int
) -> None:
    outputs = product.rows * row_tiles - product.rows // 2
    wide = dataclasses.replace(
        product,
        outputs=outputs,
        tokens=product.columns * column_tiles - product.columns // 2,
        weight_total_bytes=product.weight_total_bytes * outputs,  # whole bytes per row: panels are alike
    )
    program = plan_product(wide, passes=passes, weights_stationary=weights_stationary)
    assert run_tile_program(program) == run_tile_program(program, fast_forward=False)


@pytest.mark.parametrize("weights_stationary", [True, False])
@pytest.mark.parametrize("context", [1000, 4096])
def test_fast_forward_changes_nothing_in_a_large_product(weights_stationary: bool, context: int) -> None:
    large = product(
        tokens=context,
        reduction=4096,
        outputs=11008,
        rows=32,
        columns=32,
        lanes=4,
        cycles_per_step=2,
        group_inputs=128,
        group_distance_cycles=8,
        drain_cycles=12,
        weight_buffer_bits=4.1,
        weight_total_bytes=11008 * 2116,
        weight_buffer_bytes=1 << 19,
        activation_buffer_bytes=1 << 19,
        burst_bytes=32,
    )
    program = plan_product(large, weights_stationary=weights_stationary)
    count = run_tile_program(program)
    assert count == run_tile_program(program, fast_forward=False)
    assert count.traffic == planned_traffic(program)


def test_random_programs_cover_every_kind_of_allocation_and_split() -> None:
    seen: set[tuple[int, int, bool]] = set()

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(programs())
    def collect(program: TileProgram) -> None:
        seen.add((program.weight_allocation, program.activation_allocation, tile_counts(program)[2] > 1))

    collect()
    assert len({(weights, activations) for weights, activations, _ in seen}) >= 6
    assert {split for _, _, split in seen} == {False, True}


# Laws.


@settings(max_examples=300, deadline=None, derandomize=True)
@given(programs())
def test_every_cycle_has_one_cause_and_no_server_is_beaten(program: TileProgram) -> None:
    count = run_tile_program(program)
    assert causes(count) == count.cycles
    assert count.cycles >= count.busy_cycles + tile_passes(program) * program.drain_cycles
    assert count.cycles >= ceil_divide(count.traffic.total_bytes, program.burst_bytes)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(programs())
def test_compute_cycles_are_tiles_times_steps_times_cycles_per_step(program: TileProgram) -> None:
    count = run_tile_program(program)
    row_tiles, column_tiles, _ = tile_counts(program)
    columns = ceil_divide(program.tokens, program.columns)
    assert count.dot_product_steps == row_tiles * columns * int(steps_of(program))
    assert count.weight_reads == row_tiles * column_tiles * int(steps_of(program))
    assert count.busy_cycles == count.dot_product_steps * program.cycles_per_step


@settings(max_examples=300, deadline=None, derandomize=True)
@given(programs())
def test_traffic_is_the_planned_one_and_moves_everything_at_least_once(program: TileProgram) -> None:
    traffic = run_tile_program(program).traffic
    assert traffic == planned_traffic(program)
    assert traffic.weight_bytes % program.weight_total_bytes == 0
    assert traffic.weight_bytes >= program.weight_total_bytes
    assert traffic.activation_bytes >= program.tokens * ceil_divide(program.reduction * program.activation_bits, 8)
    assert traffic.output_bytes >= 2 * program.tokens * program.outputs


@settings(max_examples=200, deadline=None, derandomize=True)
@given(programs())
def test_twice_the_bandwidth_costs_no_cycles(program: TileProgram) -> None:
    cycles = [run_tile_program(program._replace(burst_bytes=2**power)).cycles for power in range(12)]
    assert cycles == sorted(cycles, reverse=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(products())
def test_larger_buffers_move_no_more_bytes(product: Product) -> None:
    larger = dataclasses.replace(
        product,
        weight_buffer_bytes=2 * product.weight_buffer_bytes,
        activation_buffer_bytes=2 * product.activation_buffer_bytes,
    )
    traffic = planned_traffic(plan_product(product)).total_bytes
    assert planned_traffic(plan_product(larger)).total_bytes <= traffic


@RUNNERS
def test_with_a_channel_of_any_width_only_first_loads_and_last_write_back_show(run: Runner) -> None:
    program = plan_product(
        product(outputs=10, tokens=9, reduction=32, weight_total_bytes=320, drain_cycles=5, burst_bytes=1 << 20)
    )
    count = run(program)
    tiles, steps = 3 * 3, 32
    assert count.busy_cycles == tiles * steps
    assert count.stalls == StallCycles(weights=1, activations=1, drain=tiles * 5, write_back=1)
    assert count.cycles == tiles * (steps + 5) + 3


# Cases counted by hand.


@RUNNERS
def test_one_tile_loads_then_computes_then_drains_then_writes(run: Runner) -> None:
    count = run(plan_product(product(drain_cycles=3)))
    # 32 bytes of weights, 4 tokens × 8 inputs × 2 bytes, 8 steps, 3 to drain, 4 × 4 outputs × 2 bytes.
    assert count == CycleCount(
        cycles=32 + 64 + 8 + 3 + 32,
        busy_cycles=8,
        stalls=StallCycles(weights=32, activations=64, drain=3, write_back=32),
        dot_product_steps=8,
        weight_reads=8,
        traffic=planned_traffic(plan_product(product(drain_cycles=3))),
    )


@RUNNERS
def test_second_tile_loads_while_the_first_computes_and_the_write_back_goes_first(run: Runner) -> None:
    # Two tiles of outputs; each takes 32 weight bytes, 8 steps of 5 cycles = 40 cycles, 32 bytes of outputs.
    count = run(plan_product(product(outputs=8, weight_total_bytes=64, cycles_per_step=5)))
    # 32 + 64 cycles until the first tile starts; the second one's weights arrive 32 cycles into its 40.
    # Its write-back hides behind the second tile; the last one shows.
    assert count.cycles == 32 + 64 + 40 + 40 + 32
    assert count.stalls == StallCycles(weights=32, activations=64, write_back=32)


@RUNNERS
def test_full_write_back_register_holds_the_next_tile(run: Runner) -> None:
    # As before with 8 cycles of compute per tile: the second tile is done 16 cycles before the register is free.
    count = run(plan_product(product(outputs=8, weight_total_bytes=64)))
    # 96: first tile starts; 104: it leaves, but the channel loads the second one's weights until 128. The write-back
    # takes 128 .. 160. The second tile computes 128 .. 136, waits until 160 and is written until 192.
    assert count.cycles == 192
    assert count.busy_cycles == 16
    assert count.stalls == StallCycles(weights=32 + 24, activations=64, write_back=24 + 32)


@RUNNERS
def test_groups_shorter_than_their_scaling_take_its_time(run: Runner) -> None:
    # 8 inputs in 2 groups of 4: one step of 2 cycles each with 4 lanes, but scaling takes 8: the last issues of the
    # groups are 8 cycles apart, 2 of them busy.
    short = product(lanes=4, cycles_per_step=2, group_inputs=4, group_distance_cycles=8)
    count = run(plan_product(short))
    assert (count.busy_cycles, count.stalls.scale) == (4, 6)
    # 128 inputs at 2 cycles per step hide it: 32 steps of 2 cycles.
    long = product(
        lanes=4, cycles_per_step=2, group_inputs=128, group_distance_cycles=8, reduction=256, weight_total_bytes=1024
    )
    count = run(plan_product(long))
    assert (count.busy_cycles, count.stalls.scale) == (128, 0)


def test_operands_that_fit_are_loaded_once() -> None:
    program = plan_product(product(outputs=64, tokens=64, weight_total_bytes=512))
    assert planned_traffic(program).weight_bytes == 512
    assert planned_traffic(program).activation_bytes == 64 * 8 * 2


def test_long_reduction_is_split_when_its_panels_do_not_fit() -> None:
    # A panel of 32 tokens × 11008 inputs in FP16 does not fit in half of 512 KiB.
    gemm = next(
        layer
        for layer in simulate(known_shape("llama-2-7b"), get_accelerator("bitmod-lossy"), phase="prefill").layers
        if layer.name.endswith("down_proj")
    )
    assert gemm.passes > 1
    values = gemm.repeats * gemm.tokens * gemm.outputs
    assert gemm.traffic.output_bytes == values * (2 + 8 * (gemm.passes - 1))


def test_products_that_cannot_be_planned_are_refused() -> None:
    with pytest.raises(InputError, match="more than half a buffer"):
        plan_product(product(weight_buffer_bytes=4))
    with pytest.raises(InputError, match="too large to simulate"):
        plan_product(product(outputs=2**31, weight_total_bytes=2**40))
    for tokens in (10**18, 10**23):
        with pytest.raises(InputError, match="more cycles than the simulator counts"):
            plan_product(product(tokens=tokens))
    with pytest.raises(InputError, match=r"counts \(9000000000000\)"):
        plan_product(product(tokens=10**12, burst_bytes=0))


# Whole models.


@pytest.fixture(scope="module")
def small_shape() -> ModelShape:
    """Two layers of 256 features with grouped-query attention."""
    linears = tuple(
        LinearShape(name=f"layers.{layer}.{name}", outputs=outputs, inputs=inputs)
        for layer in range(2)
        for name, outputs, inputs in (("q", 256, 256), ("k", 64, 256), ("up", 640, 256), ("down", 256, 640))
    )
    attention = AttentionShape(layers=2, heads=8, key_value_heads=2, head_size=32)
    head = LinearShape(name="head", outputs=1000, inputs=256)
    return ModelShape(name="small", linears=(*linears, head), attention=attention, head="head")


@pytest.mark.parametrize("accelerator", published_accelerator_names())
@pytest.mark.parametrize("phase", PHASES)
def test_dictionary_is_json_and_its_parts_add_up(small_shape: ModelShape, accelerator: str, phase: Phase) -> None:
    result = simulate(small_shape, get_accelerator(accelerator), phase=phase, context=48, batch=2)
    document = result.to_dict()
    assert json.loads(json.dumps(document)) == document
    traffic = ("weight_traffic_bytes", "activation_traffic_bytes", "output_traffic_bytes")
    for part in (document, *document["layers"]):
        assert part["cycles"] == part["busy"] + sum(part["stalls"].values())
        assert part["traffic_bytes"] == sum(part[name] for name in traffic)
        energies = {name: value for name, value in part["energy_uj"].items() if name != "total"}
        assert set(energies) == {"pe", "sram_read", "sram_write", "dram"}
        assert part["energy_uj"]["total"] == pytest.approx(sum(energies.values()), rel=1e-12)
        assert 0 < part["pe_utilization"] <= 1
    for name in ("cycles", "busy", *traffic):
        assert document[name] == sum(layer[name] for layer in document["layers"])
    for field in ("stalls", "energy_uj"):
        for name, value in document[field].items():
            assert value == pytest.approx(sum(layer[field][name] for layer in document["layers"]), rel=1e-12)
    assert document["energy_uj"]["dram"] == pytest.approx(document["traffic_bytes"] * 8 * 18.75e-6)
    tokens = 2 * 48 if phase == "prefill" else 2
    assert document["tokens_per_second"] == pytest.approx(tokens / (document["latency_ms"] / 1e3))
    assert document["energy_per_token_uj"] == pytest.approx(document["energy_uj"]["total"] / tokens)


def test_both_models_speak_with_the_same_keys(small_shape: ModelShape) -> None:
    accelerator = get_accelerator("bitmod-lossy")
    simulated = simulate(small_shape, accelerator, phase="decode").to_dict()
    published = simulate_published(small_shape, accelerator, phase="decode").to_dict()
    assert simulated["model_of"] == "cycle"
    assert published["model_of"] == "published"
    assert set(published) - set(simulated) == {"weight_bits"}
    assert set(published["energy_uj"]) == {"pe", "sram_read", "sram_write", "dram", "total"}


@pytest.mark.parametrize("accelerator", published_accelerator_names())
def test_weights_that_are_read_once_cost_their_packed_bytes(small_shape: ModelShape, accelerator: str) -> None:
    result = simulate(small_shape, get_accelerator(accelerator), phase="decode", context=1)
    weights = get_format(result.format)
    linear_bytes = sum(layer.traffic.weight_bytes for layer in result.layers if layer.operand == "weight")
    assert linear_bytes == sum(weights.packed_bytes(linear.outputs, linear.inputs) for linear in small_shape.linears)


@pytest.mark.parametrize("accelerator", ["fp16", "bitmod-lossy@8x8"])
@pytest.mark.parametrize("phase", PHASES)
def test_layers_of_a_model_are_the_reference_times_their_repeats(
    small_shape: ModelShape, accelerator: str, phase: Phase
) -> None:
    machine = get_accelerator(accelerator)
    result = simulate(small_shape, machine, phase=phase, context=24, weights=get_format("bitmod-w4g128"))
    for layer, gemm in zip(result.layers, workload(small_shape, phase=phase, context=24, batch=1), strict=True):
        program = plan_product(product_of(gemm, machine, phase, get_format("bitmod-w4g128")))
        count = run_tile_program_by_cycles(program)
        assert layer.cycles == gemm.repeats * count.cycles
        assert layer.traffic.total_bytes == gemm.repeats * count.traffic.total_bytes


def test_cycles_do_not_depend_on_the_energy_constants(small_shape: ModelShape) -> None:
    accelerator = get_accelerator("bitmod-lossy")
    dearer = dataclasses.replace(accelerator, pe_energy_pj_per_cycle=2 * accelerator.pe_energy_pj_per_cycle)
    first, second = (simulate(small_shape, machine, phase="prefill") for machine in (accelerator, dearer))
    assert second.cycles == first.cycles
    assert second.energy.pe_uj == pytest.approx(2 * first.energy.pe_uj)
    assert second.energy.sram_read_uj == first.energy.sram_read_uj


def test_an_event_without_an_energy_leaves_its_part_and_the_total_empty(small_shape: ModelShape) -> None:
    published = get_accelerator("bitmod-lossy")
    silent = dataclasses.replace(published.memory, energy_pj_per_bit=None)
    for changes, missing, event in (
        ({"pe_energy_pj_per_cycle": None}, "pe", "a cycle of the PE of bitmod-lossy"),
        ({"memory": silent}, "dram", "a bit of external memory ideal"),
        ({"weight_buffer_banks": 4, "energy_set": "bitmod-2024"}, "sram_read", "a read of the weight buffer"),
        ({"weight_buffer_banks": 512}, "sram_read", "a read of the weight buffer: buffer: words of"),
    ):
        machine = dataclasses.replace(published, **changes)
        result = simulate(small_shape, machine, phase="decode")
        document = result.to_dict()
        assert document["energy_per_token_uj"] is None
        for part in (document, *document["layers"]):
            assert part["energy_uj"]["total"] is None
            unknown = {name for name, value in part["energy_uj"].items() if value is None}
            assert unknown == {"total", missing, *(["sram_write"] if missing == "sram_read" else [])}
            assert "leakage" not in part["energy_uj"]
        assert any(note.startswith("no energy: ") and event in note for note in result.notes)
        assert result.cycles == simulate(small_shape, published, phase="decode").cycles
        assert json.loads(json.dumps(document)) == document


def test_leakage_of_the_buffers_is_their_power_times_the_time(small_shape: ModelShape) -> None:
    """One MB in one size: the power depends on the ports, which are those of the formats."""
    machine = dataclasses.replace(
        get_accelerator("bitmod-lossy"), weight_buffer_bytes=256 * 1024, activation_buffer_bytes=256 * 1024
    )
    slow = dataclasses.replace(machine, clock_mhz=250)
    result, slower = (simulate(small_shape, entry, phase="prefill") for entry in (machine, slow))
    assert result.to_dict()["energy_set"] == "bitmod-2024-any-buffer"
    leakage = result.energy.leakage_uj
    assert leakage is not None
    assert slower.energy.leakage_uj == pytest.approx(4 * leakage, rel=1e-12)
    keys = next(layer for layer in result.layers if layer.operand == "key")
    array = machine.prefill_array
    power_mw = sum(
        SramModel(capacity_bytes=256 * 1024, word_bits=word_bits, banks=8).leakage_mw
        for word_bits in (array.rows * 4 * 8 // 2, array.columns * 4 * 16 // 2)
    )
    assert keys.energy.leakage_uj == pytest.approx(power_mw * keys.cycles * 1e-6, rel=1e-12)
    parts = result.to_dict()["energy_uj"]
    assert set(parts) == {"pe", "sram_read", "sram_write", "dram", "leakage", "total"}
    assert parts["total"] == pytest.approx(sum(value for name, value in parts.items() if name != "total"), rel=1e-12)


def test_a_sum_that_does_not_fit_the_accumulator_is_refused(small_shape: ModelShape) -> None:
    wide = LinearShape(name="wide", outputs=8, inputs=1 << 17)
    shape = dataclasses.replace(small_shape, linears=(wide,), head=None)
    published = get_accelerator("bitmod-lossy")
    exact = dataclasses.replace(published, processing_element=BitSerialSpec(numerics="exact"))
    simulate(shape, published, phase="decode", weights=get_format("int-w8"))
    simulate(shape, exact, phase="decode", weights=get_format("int-w8g128"))
    with pytest.raises(InputError, match="'exact' adds up groups of at most"):
        simulate(shape, exact, phase="decode", weights=get_format("int-w8"))


def test_outliers_of_a_dictionary_are_expected_and_said(small_shape: ModelShape) -> None:
    result = simulate(small_shape, get_accelerator("gobo"), phase="decode", context=4)
    expected = sum(
        expected_packed_bytes(get_format("gobo-w3"), linear.outputs, linear.inputs) for linear in small_shape.linears
    )
    found = sum(layer.traffic.weight_bytes for layer in result.layers if layer.operand == "weight")
    assert found == expected
    assert any("outliers of gobo-w3 are not counted but expected: 0.1 %" in note for note in result.notes)


def test_fewer_bits_cost_fewer_bytes_and_terms_set_the_compute(small_shape: ModelShape) -> None:
    accelerator = get_accelerator("bitmod-lossy")
    results = {
        name: simulate(small_shape, accelerator, phase="decode", weights=get_format(name))
        for name in ("int-w8g128", "int-w6g128", "bitmod-w4g128", "bitmod-w3g128")
    }
    traffic = [result.traffic.weight_bytes for result in results.values()]
    assert traffic == sorted(traffic, reverse=True)

    def linear_compute(result: Simulation) -> int:
        return sum(layer.busy_cycles for layer in result.layers if layer.operand == "weight")

    compute = [linear_compute(result) for result in results.values()]
    assert compute[0] * 3 == compute[1] * 4
    assert compute[1] * 2 == compute[2] * 3
    assert compute[2] == compute[3]


def test_batch_of_decode_shares_the_weights(small_shape: ModelShape) -> None:
    accelerator = get_accelerator("bitmod-lossy")
    one = simulate(small_shape, accelerator, phase="decode", batch=1)
    many = simulate(small_shape, accelerator, phase="decode", batch=8)
    assert many.cycles < 8 * one.cycles
    for single, batched in zip(one.layers, many.layers, strict=True):
        if single.operand == "weight":
            assert batched.traffic.weight_bytes == single.traffic.weight_bytes
        else:
            assert batched.cycles == 8 * single.cycles


def test_format_that_the_processing_element_cannot_take_is_refused(small_shape: ModelShape) -> None:
    with pytest.raises(UnsupportedFormatError, match="fp16"):
        simulate(small_shape, get_accelerator("bitmod-lossy"), phase="decode", weights=get_format("fp16"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"phase": "x"}, "unknown phase"), ({"context": 0}, "context is 0"), ({"batch": 0}, "batch is 0")],
)
def test_bad_input_is_refused(small_shape: ModelShape, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate(small_shape, get_accelerator("fp16"), **{"phase": "prefill", **arguments})  # type: ignore[arg-type]


def test_notes_say_what_to_know(small_shape: ModelShape) -> None:
    quantized = simulate(small_shape, get_accelerator("bitmod-lossy"), phase="decode")
    assert any("8-bit integers" in note for note in quantized.notes)
    assert any("1 of 16 array columns" in note for note in quantized.notes)
    bare = dataclasses.replace(small_shape, attention=None)
    result = simulate(bare, get_accelerator("fp16"), phase="prefill")
    assert any("not simulated" in note for note in result.notes)
    assert {layer.operand for layer in result.layers} == {"weight"}


def test_short_groups_are_said(small_shape: ModelShape) -> None:
    accelerator = get_accelerator("bitmod-lossy")
    inputs = {linear.inputs for linear in small_shape.linears}
    odd = simulate(small_shape, accelerator, phase="decode", weights=get_format("int-w4g48"))
    assert any(value % 48 for value in inputs)
    assert any("the last group of every row is short in" in note for note in odd.notes)
    even = simulate(small_shape, accelerator, phase="decode", weights=get_format("int-w4"))
    assert not any("short" in note for note in even.notes)


def test_progress_counts_the_distinct_products(small_shape: ModelShape) -> None:
    calls: list[tuple[int, int]] = []
    simulate(
        small_shape, get_accelerator("fp16"), phase="prefill", progress=lambda done, count: calls.append((done, count))
    )
    assert calls == [(index, 7) for index in range(1, 8)]


# Both models side by side.


@pytest.mark.parametrize("accelerator", published_accelerator_names())
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("state", PUBLISHED_STATES.values(), ids=PUBLISHED_STATES)
def test_reasons_add_up_to_the_difference(accelerator: str, phase: Phase, state: PublishedState) -> None:
    shape, machine = known_shape("llama-3-8b"), get_accelerator(accelerator)
    explanation = explain(shape, machine, phase=phase, state=state)
    published = simulate_published(shape, machine, phase=phase, state=state)
    simulated = simulate(shape, machine, phase=phase)
    assert (explanation.published_cycles, explanation.published_energy_uj) == (published.cycles, published.energy_uj)
    assert (explanation.cycles, explanation.energy_uj) == (simulated.cycles, simulated.energy.total_uj)
    assert tuple(explanation.reasons) == REASONS
    assert sum(explanation.reasons.values()) == explanation.cycles - explanation.published_cycles
    assert explanation.reasons["overlap"] > 0
    assert explanation.reasons["weight_metadata"] >= 0
    if phase == "decode":
        assert explanation.reasons["head_tokens"] == 0
    if accelerator == "fp16":
        assert explanation.reasons["weight_precision"] == explanation.reasons["weight_metadata"] == 0
    document = explanation.to_dict()
    assert document["state"] == state.name
    assert json.loads(json.dumps(document)) == document
    for model in ("published", "cycle"):
        total = sum(entry[model]["cycles"] for entry in document["classes"].values())
        assert total == document["published_cycles" if model == "published" else "cycles"]


def test_the_attention_of_2025_has_the_true_shapes() -> None:
    """One key-value head, the same width of keys and values: nothing is left for the reason ``attention_shape``."""
    shape = ModelShape(
        name="one head",
        linears=(LinearShape(name="fc", outputs=64, inputs=64),),
        attention=AttentionShape(layers=2, heads=1, key_value_heads=1, head_size=64),
        head=None,
    )
    for accelerator in ("fp16", "bitmod-lossy"):
        for phase in PHASES:
            machine = get_accelerator(accelerator)
            explanation = explain(shape, machine, phase=phase, state=PUBLISHED_2025)
            assert explanation.reasons["attention_shape"] == 0
            assert explain(shape, machine, phase=phase).reasons["attention_shape"] != 0


def test_the_documented_table_is_what_the_code_computes() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "simulator.md").read_text(encoding="utf-8")
    assert batch_table() in text, "docs/simulator.md is out of date: python -m termwise.sim.explain"


# Values.


def _tensors(shape: ModelShape, name: str) -> Callable[[str], QuantizedTensor]:
    sizes = {linear.name: (linear.outputs, linear.inputs) for linear in shape.linears}
    random = np.random.default_rng(0)
    values = {name: (random.standard_t(3, size) * 0.05).astype(np.float32) for name, size in sizes.items()}
    return lambda layer: quantize(values[layer], name)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("system", published_accelerator_names())
def test_values_change_nothing_where_nothing_depends_on_them(
    small_shape: ModelShape, system: str, phase: Phase
) -> None:
    accelerator = get_accelerator(f"{system}@8x4")
    name = accelerator.default_format(phase)
    expected = simulate(small_shape, accelerator, phase=phase, context=9).to_dict()
    found = simulate(small_shape, accelerator, phase=phase, context=9, tensors=_tensors(small_shape, name)).to_dict()
    notes = set(found.pop("notes")) - set(expected.pop("notes"))
    assert notes == {"steps and drains are those of the values of the weights"}
    for layer in (*expected["layers"], *found["layers"]):
        # Of a layer once times its repeats, and of all layers one after the other: rounded once for each.
        layer["energy_uj"] = {part: pytest.approx(uj, rel=1e-13) for part, uj in layer["energy_uj"].items()}
        layer["pe_utilization"] = pytest.approx(layer["pe_utilization"], rel=1e-13)
    for document in (expected, found):
        for key in ("pe_utilization", "energy_per_token_uj"):
            document[key] = round(document[key], 9)
        document["energy_uj"] = {part: round(uj, 9) for part, uj in document["energy_uj"].items()}
    for key in set(expected) - {"layers"}:
        assert found[key] == expected[key], key
    for mine, other in zip(found["layers"], expected["layers"], strict=True):
        for key in set(mine) - {"energy_uj", "pe_utilization"}:
            assert mine[key] == other[key], key


def test_skipped_terms_save_cycles_and_never_useful_work(small_shape: ModelShape) -> None:
    base = get_accelerator("bitmod-lossy@2x8")
    tensors = _tensors(small_shape, "bitmod-w3g128")
    found = {}
    skips: tuple[Skipping, ...] = ("none", "tile", "row")
    for skip in skips:
        machine = dataclasses.replace(base, processing_element=BitSerialSpec(skip_zero_terms=skip))
        found[skip] = simulate(
            small_shape, machine, phase="prefill", context=16, weights=get_format("bitmod-w3g128"), tensors=tensors
        )
        without = simulate(small_shape, machine, phase="prefill", context=16, weights=get_format("bitmod-w3g128"))
        assert without.busy_cycles == found["none"].busy_cycles
        assert any("no zero terms are skipped" in note for note in without.notes) == (skip != "none")
        assert 0 < found[skip].pe_utilization <= 1
        assert found[skip].stall_cycles.total + found[skip].busy_cycles == found[skip].cycles
    assert found["row"].busy_cycles < found["tile"].busy_cycles < found["none"].busy_cycles
    assert found["row"].cycles < found["none"].cycles


def test_outliers_of_a_dictionary_are_those_of_the_weights(small_shape: ModelShape) -> None:
    machine = get_accelerator("gobo@8x4")
    tensors = _tensors(small_shape, "gobo-w3")
    found = simulate(small_shape, machine, phase="decode", context=4, weights=get_format("gobo-w3"), tensors=tensors)
    expected = 0
    row_bytes = 0
    for linear in small_shape.linears:
        tensor = tensors(linear.name)
        row_bytes += tensor.nbytes
        expected += int(value_timing(machine.processing_element, tensor, 8).drain_cycles.sum())
    linears = [layer for layer in found.layers if layer.operand == "weight"]
    assert sum(layer.stall_cycles.drain for layer in linears) == expected
    assert sum(layer.traffic.weight_bytes for layer in linears) == row_bytes


def test_experts_that_only_some_tokens_pass_have_no_values(small_shape: ModelShape) -> None:
    experts = tuple(
        LinearShape(name=f"layers.0.experts.{index}.up", outputs=64, inputs=64, experts=8, experts_per_token=2)
        for index in range(8)
    )
    shape = dataclasses.replace(small_shape, linears=experts, head=None)
    with pytest.raises(InputError, match="which tokens pass which of 8 layers"):
        simulate(
            shape,
            get_accelerator("bitmod-lossy"),
            phase="decode",
            tensors=_tensors(shape, "bitmod-w4g128"),
            weights=get_format("bitmod-w4g128"),
        )


# Weight stationary.


def _stationary(name: str, turns: int) -> Accelerator:
    base = get_accelerator(name)
    elements = base.decode_array.processing_elements
    return dataclasses.replace(
        base, name="stationary", dataflow="weight_stationary", accumulator_bytes=4 * elements * turns
    )


def test_weights_that_stay_are_read_once_for_all_turns(small_shape: ModelShape) -> None:
    base, machine = get_accelerator("bitmod-lossy@16x16"), _stationary("bitmod-lossy@16x16", 4)
    base = dataclasses.replace(base, energy_set="bitmod-2024-any-buffer")
    for linear in small_shape.linears:
        gemm = Gemm(name="", tokens=64, reduction=linear.inputs, outputs=linear.outputs, operand="weight", repeats=1)
        weights = get_format("bitmod-w4g128")
        programs = [plan_product(product_of(gemm, entry, "prefill", weights)) for entry in (base, machine)]
        mine, other = (run_tile_program(program) for program in programs)
        assert programs[1].token_groups == 4
        assert (mine.busy_cycles, mine.dot_product_steps) == (other.busy_cycles, other.dot_product_steps)
        assert mine.weight_reads == 4 * other.weight_reads
        assert mine.stalls.drain == 4 * other.stalls.drain
        # Each of the 4 tokens' groups ends 2 cycles after the one before, and scaling takes 8: 3 · 6 cycles a group.
        groups = ceil_divide(linear.inputs, 128) * ceil_divide(linear.outputs, 16)
        assert (mine.stalls.scale, other.stalls.scale) == (0, 3 * 6 * groups)
    energies = [simulate(small_shape, entry, phase="prefill", context=64).energy for entry in (base, machine)]
    assert energies[0].pe_uj == energies[1].pe_uj
    assert energies[1].sram_write_uj is None  # 8192 bits in 16 banks of 256 bytes: beyond the model
    larger = _stationary("bitmod-lossy@16x16", 64)
    assert simulate(small_shape, larger, phase="prefill", context=64).energy.total_uj is not None


# Whole machines and models.


@st.composite
def machines_and_shapes(draw: st.DrawFn) -> tuple[Accelerator, ModelShape]:
    """A machine with small buffers, and a model some of whose products repeat for long on it."""
    base = get_accelerator(draw(st.sampled_from(published_accelerator_names())))
    sides = st.builds(ArrayShape, rows=st.integers(1, 12), columns=st.integers(1, 6))
    arrays = draw(sides), draw(sides)
    turns = draw(st.sampled_from([0, 0, 1, 3]))
    elements = max(array.processing_elements for array in arrays)
    machine = dataclasses.replace(
        base,
        name="machine",
        prefill_array=arrays[0],
        decode_array=arrays[1],
        movement=draw(st.sampled_from(["broadcast", "systolic"])),
        dataflow="weight_stationary" if turns else "output_stationary",
        accumulator_bytes=4 * elements * turns,
        weight_buffer_bytes=draw(st.sampled_from([2048, 8192, 65536])),
        activation_buffer_bytes=draw(st.sampled_from([2048, 8192, 65536])),
        memory=get_dram(f"ideal@{draw(st.sampled_from([1, 7, 32, 500]))}"),
    )
    head_size = draw(st.sampled_from([8, 20]))
    heads = draw(st.sampled_from([2, 4]))
    hidden = heads * head_size
    linears = tuple(
        LinearShape(name=f"layers.{layer}.{name}", outputs=outputs, inputs=inputs)
        for layer in range(2)
        for name, outputs, inputs in (
            ("q", hidden, hidden),
            ("up", draw(st.integers(1, 700)), hidden),
            ("down", hidden, draw(st.integers(1, 700))),
        )
    )
    attention = AttentionShape(layers=2, heads=heads, key_value_heads=heads // 2, head_size=head_size)
    return machine, ModelShape(name="random", linears=linears, attention=attention, head=None)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(machines_and_shapes(), st.sampled_from(PHASES), st.integers(1, 300), st.integers(1, 40))
def test_fast_forward_changes_no_number_of_a_model_on_a_machine(
    pair: tuple[Accelerator, ModelShape], phase: Phase, context: int, batch: int
) -> None:
    machine, shape = pair
    batch = 1 if phase == "prefill" else batch
    weights = get_format("fp16") if machine.system == "fp16" else get_format("int-w4g32")
    found, stepped = (
        simulate(shape, machine, phase=phase, context=context, batch=batch, weights=weights, stepped=stepped).to_dict()
        for stepped in (False, True)
    )
    assert found == stepped
    assert found["busy"] + sum(found["stalls"].values()) == found["cycles"]
    parts = [found["energy_uj"][part] for part in found["energy_uj"] if part != "total"]
    assert (None in parts) == (found["energy_uj"]["total"] is None)
