"""The compiled published model is the readable one: equal cycles and bytes, energies to rounding, on any parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import AttentionShape, LinearShape, ModelShape, known_shape
from termwise.algorithms.workload import PHASES, Phase
from termwise.sim.accelerators import Accelerator, ArrayShape, get_accelerator, published_accelerator_names
from termwise.sim.dram import Dram
from termwise.sim.published import PUBLISHED_MODELS, PUBLISHED_STATES, PublishedState, simulate_published
from termwise.sim.published_figures import PUBLISHED_FIGURES
from termwise.sim.published_sweep import (
    EXACT_LIMIT,
    PublishedConfigurations,
    configurations_of,
    evaluate_published,
    published_configurations,
)

ENERGIES = ("pe_energy_uj", "sram_read_energy_uj", "sram_write_energy_uj", "dram_energy_uj", "energy_uj")
# A sum of at most n products of float64 is off by at most about n roundings of 2^-53; n < 100 here.
ENERGY_TOLERANCE = 100 * 2.0**-53


@st.composite
def accelerators(draw: st.DrawFn) -> Accelerator:
    side = st.builds(ArrayShape, rows=st.integers(1, 150), columns=st.integers(1, 150))
    base = get_accelerator(draw(st.sampled_from(published_accelerator_names())))
    element = base.processing_element
    if isinstance(element, BitSerialSpec):
        element = dataclasses.replace(element, lanes=draw(st.integers(1, 16)))
    return dataclasses.replace(
        base,
        processing_element=element,
        prefill_array=draw(side),
        decode_array=draw(side),
        port_reads_per_step=draw(st.integers(1, 4)),
        weight_buffer_bytes=draw(st.integers(1, 2**21)),
        activation_buffer_bytes=draw(st.integers(1, 2**21)),
        memory=Dram(
            name="ideal",
            ideal_bytes_per_cycle=draw(st.integers(1, 300)),
            energy_pj_per_bit=draw(st.floats(0.01, 40)),
        ),
        pe_energy_pj_per_cycle=draw(st.floats(0.01, 3)),
    )


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    size = st.integers(1, 3000)
    linears = tuple(
        LinearShape(name=f"layers.{index}", outputs=draw(size), inputs=draw(size))
        for index in range(draw(st.integers(1, 4)))
    )
    key_value_heads = draw(st.integers(1, 6))
    attention = AttentionShape(
        layers=draw(st.integers(1, 5)),
        heads=key_value_heads * draw(st.integers(1, 6)),
        key_value_heads=key_value_heads,
        head_size=draw(st.integers(1, 130)),
    )
    return ModelShape(
        name="random",
        linears=linears,
        attention=draw(st.sampled_from([attention, None])),
        head=draw(st.sampled_from([linears[-1].name, None])),
    )


BITS = st.one_of(st.integers(1, 16).map(float), st.floats(1, 16))


@settings(max_examples=200, deadline=None)
@given(
    machine=accelerators(),
    models=st.lists(shapes(), min_size=1, max_size=2),
    phase=st.sampled_from(PHASES),
    state=st.sampled_from(list(PUBLISHED_STATES.values())),
    context=st.integers(1, 700),
    weight_bits=BITS,
    key_value_bits=BITS,
)
def test_the_compiled_model_is_the_readable_one(
    machine: Accelerator,
    models: list[ModelShape],
    phase: Phase,
    state: PublishedState,
    context: int,
    weight_bits: float,
    key_value_bits: float,
) -> None:
    configurations = configurations_of(
        [machine], phase=phase, weight_bits=[weight_bits], key_value_bits=[key_value_bits]
    )
    found = evaluate_published(configurations, models, phase=phase, context=context, state=state)
    for place, model in enumerate(models):
        expected = simulate_published(
            model,
            machine,
            phase=phase,
            context=context,
            state=state,
            weight_bits=weight_bits,
            key_value_bits=key_value_bits,
        )
        assert found.cycles[0, place] == expected.cycles
        assert found.compute_cycles[0, place] == expected.compute_cycles
        assert found.traffic_bytes[0, place] == expected.traffic_bytes
        for name in ENERGIES:
            assert getattr(found, name)[0, place] == pytest.approx(getattr(expected, name), rel=ENERGY_TOLERANCE)


@pytest.mark.parametrize("state", PUBLISHED_STATES.values(), ids=PUBLISHED_STATES)
@pytest.mark.parametrize("phase", PHASES)
def test_golden_cycles_come_out_of_the_compiled_model(state: PublishedState, phase: Phase) -> None:
    machines = [get_accelerator(name) for name in published_accelerator_names()]
    for model in PUBLISHED_MODELS:
        configurations = published_configurations(machines, model, phase=phase, state=state)
        found = evaluate_published(configurations, [known_shape(model)], phase=phase, state=state)
        for index, machine in enumerate(machines):
            figure = PUBLISHED_FIGURES[state.name][machine.name, phase].get(model)
            if figure is not None:
                assert found.cycles[index, 0] == figure.cycles
                assert found.energy_uj[index, 0] == pytest.approx(figure.energy_uj, abs=4)


def usual(**changes: Any) -> PublishedConfigurations:
    one = configurations_of(
        [get_accelerator("bitmod-lossy")] * 2, phase="decode", weight_bits=[3.0, 4.0], key_value_bits=[8.0, 8.0]
    )
    return dataclasses.replace(one, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.array([1.0, 2.0])}, "rows is not an array of int64"),
        ({"weight_bits": [3.0, 4.0]}, "weight_bits is not an array of float64"),
        ({"bit_serial": np.array([1, 0])}, "bit_serial is not an array of bool"),
        ({"columns": np.array([16])}, r"columns has the shape \(1,\)"),
        ({"lanes": np.array([4, 0])}, "lanes holds a value that is not finite or below 1"),
        ({"weight_bits": np.array([3.0, np.nan])}, "weight_bits holds a value that is not finite"),
        ({"dram_pj_per_bit": np.array([1.0, -1.0])}, "dram_pj_per_bit holds a value that is not finite or below 0"),
    ],
)
def test_arrays_that_are_no_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        usual(**changes)


def test_requests_that_make_no_sense_are_refused() -> None:
    shape = known_shape("opt-1.3b")
    with pytest.raises(InputError, match="unknown phase"):
        evaluate_published(usual(), [shape], phase="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="context is 0"):
        evaluate_published(usual(), [shape], phase="prefill", context=0)
    with pytest.raises(InputError, match="no weight precision of ant for 'tiny'"):
        published_configurations([get_accelerator("ant")], "tiny", phase="decode")


def test_results_that_float64_cannot_hold_exactly_are_refused() -> None:
    side = 2**26
    huge = ModelShape(
        name="huge", linears=(LinearShape(name="fc", outputs=side, inputs=side),), attention=None, head=None
    )
    assert side * side > EXACT_LIMIT
    with pytest.raises(InputError, match="so that all are exact"):
        evaluate_published(usual(), [huge], phase="prefill")


def test_no_configurations_and_no_models_give_empty_results() -> None:
    none = configurations_of([], phase="decode", weight_bits=[], key_value_bits=[])
    assert evaluate_published(none, [known_shape("opt-1.3b")], phase="decode").cycles.shape == (0, 1)
    assert evaluate_published(usual(), [], phase="decode").energy_uj.shape == (2, 0)
