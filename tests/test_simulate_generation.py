"""Simulated generations and vector operations: exactly the sum of their steps, and every cycle with a cause."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.shapes import KNOWN_SHAPES, ModelShape, known_shape
from termwise.algorithms.workload import PHASES, Phase, VectorOperation, generation, vector_operations
from termwise.sim.accelerators import get_accelerator
from termwise.sim.generation import simulate_generation, simulate_phase
from termwise.sim.simulate import simulate
from termwise.sim.totals import Totals, summed, totals_of
from termwise.sim.vector_unit import PASSES, VectorUnit, VectorWork

ACCELERATOR = get_accelerator("bitmod-lossy@16x16")


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    """OPT-125M with grouped queries and half of its layers windowed, so that steps cross the window."""
    whole = known_shape("opt-125m")
    assert whole.attention is not None
    attention = replace(whole.attention, key_value_heads=4, window=20, windowed_layers=6)
    return replace(whole, attention=attention)


def assert_accounted(entry: dict[str, Any]) -> None:
    assert entry["cycles"] == entry["busy"] + sum(entry["stalls"].values())
    parts = [uj for part, uj in entry["energy_uj"].items() if part != "total"]
    assert entry["energy_uj"]["total"] == pytest.approx(sum(parts), rel=1e-12)


@pytest.mark.parametrize("lanes", [None, 8])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_generation_is_the_sum_of_its_phases(shape: ModelShape, batch: int, lanes: int | None) -> None:
    """Cycles and bytes are equal; energies are sums of the same numbers in another order.

    Each of n additions rounds by 2^-53 of a partial sum of positive numbers, so by 2^-53 of the total at most; there
    are less than 1000 of them: 1000 × 2^-53 < 1e-12.
    """
    unit = None if lanes is None else VectorUnit(lanes=lanes)
    context, output_tokens = 16, 10
    document = simulate_generation(
        shape, ACCELERATOR, context=context, output_tokens=output_tokens, batch=batch, vector_unit=unit
    )
    weights = get_format(ACCELERATOR.default_format("decode"))

    def phase_of(phase: Phase, cached: int) -> dict[str, Any]:
        return simulate_phase(
            shape, ACCELERATOR, phase=phase, weights=weights, context=cached, batch=batch, vector_unit=unit
        )

    prefill = phase_of("prefill", context)
    steps = [phase_of("decode", context + step) for step in range(output_tokens - 1)]
    expected = summed(map(totals_of, [prefill, *steps]))
    found = totals_of(document)
    assert dataclasses.replace(found, energy_uj={}, useful_cycles=0) == dataclasses.replace(
        expected, energy_uj={}, useful_cycles=0
    )
    assert found.energy_uj == pytest.approx(expected.energy_uj, rel=1e-12)
    assert found.pe_utilization == pytest.approx(expected.pe_utilization, rel=1e-12)
    assert document["time_to_first_token_ms"] == prefill["latency_ms"] == prefill["time_to_first_token_ms"]
    latencies = [step["latency_ms"] for step in steps]
    per_token = document["time_per_output_token_ms"]
    assert (per_token["first"], per_token["last"]) == (latencies[0], latencies[-1])
    assert per_token["mean"] == pytest.approx(sum(latencies) / len(latencies), rel=1e-12)
    assert document["latency_ms"] == pytest.approx(prefill["latency_ms"] + sum(latencies), rel=1e-12)
    assert document["tokens_per_second"] == pytest.approx(1e3 * batch * output_tokens / document["latency_ms"])
    total = document["energy_uj"]["total"]
    assert document["energy_per_token_uj"] == pytest.approx(total / (batch * output_tokens))
    assert json.loads(json.dumps(document)) == document


def test_the_parts_of_a_generation_add_up(shape: ModelShape) -> None:
    document = simulate_generation(shape, ACCELERATOR, context=16, output_tokens=10, vector_unit=VectorUnit(lanes=8))
    for entry in (document, *document["phases"].values(), *document["layers"]):
        assert_accounted(entry)
    assert document["cycles"] == sum(phase["cycles"] for phase in document["phases"].values())
    vector = sum(entry["cycles"] for entry in document["vector_operations"])
    assert vector == document["stalls"]["vector"] > 0
    assert document["cycles"] == vector + sum(layer["cycles"] for layer in document["layers"])
    work = generation(shape, context=16, steps=9)
    assert sum(layer["multiplications"] for layer in document["layers"]) == work.multiplications
    assert sum(entry["elements"] for entry in document["vector_operations"]) == work.vector_elements


def test_one_output_token_is_a_prefill(shape: ModelShape) -> None:
    document = simulate_generation(shape, ACCELERATOR, context=16, output_tokens=1)
    weights = get_format(ACCELERATOR.default_format("decode"))
    prefill = simulate(shape, ACCELERATOR, phase="prefill", weights=weights, context=16)
    assert document["cycles"] == prefill.cycles
    assert document["latency_ms"] == document["time_to_first_token_ms"]
    assert document["time_per_output_token_ms"] == {"mean": None, "first": None, "last": None}
    assert document["phases"]["decode"]["cycles"] == 0


def test_steps_beyond_the_window_simulate_only_what_grows(shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows in all layers no step beyond the window is simulated again."""
    from termwise.sim import generation as module

    assert shape.attention is not None
    windowed = replace(shape, attention=replace(shape.attention, windowed_layers=12))
    calls = []
    whole = module.simulate
    monkeypatch.setattr(module, "simulate", lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs))
    finished: list[tuple[int, int]] = []
    simulate_generation(
        windowed, ACCELERATOR, context=18, output_tokens=101, progress=lambda *told: finished.append(told)
    )
    assert len(calls) == 1 + 3  # the prefill, and steps with 18, 19 and 20 keys
    assert finished == [(done, 101) for done in range(1, 102)]


def test_a_model_without_attention_or_operations_generates(shape: ModelShape) -> None:
    bare = replace(shape, attention=None, elementwise=())
    document = simulate_generation(bare, ACCELERATOR, context=8, output_tokens=3, vector_unit=VectorUnit(lanes=8))
    step = simulate(bare, ACCELERATOR, phase="decode", context=8).cycles
    assert document["phases"]["decode"]["cycles"] == 2 * step
    assert document["stalls"]["vector"] == 0


def test_output_tokens_are_refused_by_name(shape: ModelShape) -> None:
    with pytest.raises(InputError, match="number of output tokens is 0"):
        simulate_generation(shape, ACCELERATOR, output_tokens=0)


@pytest.mark.parametrize("phase", PHASES)
def test_without_a_unit_a_phase_is_the_simulation_with_a_note(shape: ModelShape, phase: Phase) -> None:
    document = simulate_phase(shape, ACCELERATOR, phase=phase, context=16)
    expected = simulate(shape, ACCELERATOR, phase=phase, context=16).to_dict()
    (note,) = document["notes"][len(expected["notes"]) :]
    assert {**document, "notes": expected["notes"]} == expected
    operations = vector_operations(shape, phase=phase, context=16, batch=1)
    assert all(operation.name.replace("_", " ") in note for operation in operations)
    counted = simulate_phase(shape, ACCELERATOR, phase=phase, context=16, vector_unit=VectorUnit(lanes=64))
    assert f"{counted['stalls']['vector']:,} cycles" in note
    assert ("time_to_first_token_ms" in document) == (phase == "prefill")


@pytest.mark.parametrize("phase", PHASES)
def test_vector_cycles_have_their_own_cause(shape: ModelShape, phase: Phase) -> None:
    unit = VectorUnit(lanes=8)
    plain = simulate(shape, ACCELERATOR, phase=phase, context=16, batch=2).to_dict()
    document = simulate_phase(shape, ACCELERATOR, phase=phase, context=16, batch=2, vector_unit=unit)
    assert_accounted(document)
    vector = document["stalls"]["vector"]
    assert vector == sum(map(unit.cycles, vector_operations(shape, phase=phase, context=16, batch=2)))
    assert document["cycles"] == plain["cycles"] + vector
    assert {cause: document["stalls"][cause] for cause in plain["stalls"]} == plain["stalls"]
    assert document["latency_ms"] == document["cycles"] / (ACCELERATOR.clock_mhz * 1e3)
    assert document["tokens_per_second"] < plain["tokens_per_second"]
    assert document["energy_uj"] == plain["energy_uj"]
    assert any("energy is not known" in note for note in document["notes"])


def test_a_lane_makes_a_pass_over_a_number_in_a_cycle() -> None:
    unit = VectorUnit(lanes=4)
    assert unit.cycles(VectorOperation(name="residual", elements=9, repeats=5)) == 5 * 3
    assert unit.cycles(VectorOperation(name="norm", elements=9, repeats=5)) == 5 * 2 * 3
    assert unit.cycles(VectorOperation(name="softmax", elements=8, repeats=1)) == 3 * 2
    assert unit.elements_per_cycle("softmax") == Fraction(4, 3)
    with pytest.raises(InputError, match="number of vector lanes is 0"):
        VectorUnit(lanes=0)


def test_passes_name_operations_of_the_workload() -> None:
    names = {
        operation.name
        for name in KNOWN_SHAPES
        for operation in vector_operations(known_shape(name), phase="decode", context=4, batch=1)
    }
    assert set(PASSES) <= names


def test_vector_work_adds_up_times() -> None:
    operations = [
        VectorOperation(name="norm", elements=10, repeats=2),
        VectorOperation(name="norm", elements=3, repeats=1),
    ]
    once, thrice = (VectorWork(VectorUnit(lanes=4)).add(operations, times=times) for times in (1, 3))
    assert thrice.cycles == 3 * once.cycles == 3 * (2 * 2 * 3 + 2)
    assert thrice.to_list() == [{"name": "norm", "elements": 69, "elements_per_cycle": 2.0, "cycles": 42}]
    assert not VectorWork(VectorUnit(lanes=4))


def test_totals_keep_causes_parts_and_what_is_not_known() -> None:
    """A cause or a part that only one side has counts as 0 on the other; an unknown energy stays unknown."""
    one = Totals(cycles=5, busy=3, stalls={"weights": 2}, energy_uj={"pe": 1.0, "leakage": 0.5, "total": 1.5})
    other = Totals(cycles=4, busy=3, stalls={"scale": 1}, energy_uj={"pe": None, "total": None})
    both = one.plus(other)
    assert both.stalls == {"weights": 2, "scale": 1}
    assert both.energy_uj == {"pe": None, "leakage": 0.5, "total": None}
    assert both.causes == {"busy": 6, "weights": 2, "scale": 1}
    assert one.times(3) == one.plus(one).plus(one)
    # The buffers leak on while the array waits: half of 0.5 µJ more in half as many cycles more.
    waiting = Totals(cycles=4, busy=4, energy_uj={"pe": 1.0, "leakage": 0.5, "total": 1.5}).stalled("vector", 2)
    assert waiting.energy_uj == {"pe": 1.0, "leakage": 0.75, "total": 1.75}
    assert Totals().pe_utilization == 0
