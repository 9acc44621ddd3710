"""The closed-form published model against the figures of the BitMoD simulator in both of its states.

The figures stand in ``termwise.sim.published_figures`` with their sources: cycles, total energy and on-chip energy in
µJ for a prefill of 256 tokens and for one decoded token, and arithmetic means of ratios over six models.
"""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from statistics import fmean, geometric_mean, harmonic_mean

import pytest

from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import AttentionShape, LinearShape, ModelShape, known_shape
from termwise.algorithms.workload import PHASES, Phase
from termwise.sim.accelerators import get_accelerator, published_accelerator_names
from termwise.sim.published import (
    PUBLISHED_2025,
    PUBLISHED_MODELS,
    PUBLISHED_STATES,
    PublishedSimulation,
    PublishedState,
    get_published_state,
    published_weight_bits,
    simulate_published,
)
from termwise.sim.published_figures import (
    HEADLINES,
    LLAMA_2_7B_2025_PARTS,
    MEAN_RATIOS,
    PUBLISHED_FIGURES,
    Headline,
    PublishedFigure,
    Quantity,
)

FIGURES = [
    pytest.param(state, accelerator, phase, model, figure, id=f"{state}-{accelerator}-{phase}-{model}")
    for state, table in PUBLISHED_FIGURES.items()
    for (accelerator, phase), row in table.items()
    for model, figure in row.items()
]
RATIOS = [(state, *key) for state, table in MEAN_RATIOS.items() for key in table]
DECODED_TOKENS = 20


def run(model: str, accelerator: str, phase: Phase, state: str = "published") -> PublishedSimulation:
    return simulate_published(
        known_shape(model), get_accelerator(accelerator), phase=phase, state=get_published_state(state)
    )


def ratios(quantity: Quantity, accelerator: str, other: str, decoded_tokens: int, state: str) -> list[float]:
    """Cost of ``other`` / cost of ``accelerator`` on every model."""

    def cost(model: str, name: str) -> float:
        prefill, decode = (run(model, name, phase, state) for phase in PHASES)
        if quantity == "speed":
            return prefill.cycles + decoded_tokens * decode.cycles
        return prefill.energy_uj + decoded_tokens * decode.energy_uj

    return [cost(model, other) / cost(model, accelerator) for model in PUBLISHED_MODELS]


def test_the_figures_are_sixty_and_forty() -> None:
    counts = {state: sum(len(row) for row in table.values()) for state, table in PUBLISHED_FIGURES.items()}
    assert counts == {"published": 60, "published-2025": 40}
    assert {(state, *key) for state in PUBLISHED_STATES for key in product(published_accelerator_names(), PHASES)} == {
        (state, *key) for state, table in PUBLISHED_FIGURES.items() for key in table
    }


@pytest.mark.parametrize(("state", "accelerator", "phase", "model", "figure"), FIGURES)
def test_golden_cycles_and_energies_come_out(
    state: str, accelerator: str, phase: Phase, model: str, figure: PublishedFigure
) -> None:
    result = run(model, accelerator, phase, state)
    assert result.cycles == figure.cycles
    # The golden energies are rounded to 1 µJ and come from CACTI figures with more digits than the table's three.
    assert result.energy_uj == pytest.approx(figure.energy_uj, abs=4)
    assert result.on_chip_energy_uj == pytest.approx(figure.on_chip_energy_uj, abs=4)
    assert result.notes == ()


@pytest.mark.parametrize(("accelerator", "phase"), LLAMA_2_7B_2025_PARTS)
def test_golden_parts_of_the_energy_come_out(accelerator: str, phase: Phase) -> None:
    result = run("llama-2-7b", accelerator, phase, "published-2025")
    parts = (result.pe_energy_uj, result.sram_read_energy_uj, result.sram_write_energy_uj, result.dram_energy_uj)
    assert parts == pytest.approx(LLAMA_2_7B_2025_PARTS[accelerator, phase], abs=4)


@pytest.mark.parametrize(("state", "quantity", "accelerator", "other"), RATIOS)
def test_mean_ratios_over_six_models_come_out(state: str, quantity: Quantity, accelerator: str, other: str) -> None:
    means = [fmean(ratios(quantity, accelerator, other, tokens, state)) for tokens in (0, DECODED_TOKENS)]
    assert tuple(round(mean, 3) for mean in means) == MEAN_RATIOS[state][quantity, accelerator, other]


@pytest.mark.parametrize("headline", [entry for entry in HEADLINES if entry.task != "both"], ids=str)
def test_headline_speeds_of_the_paper_are_means_of_the_state_of_2024(headline: Headline) -> None:
    tokens = 0 if headline.task == "prefill" else DECODED_TOKENS
    values = ratios(headline.quantity, headline.accelerator, headline.other, tokens, "published")
    assert round(fmean(values), 2) == headline.printed


@pytest.mark.parametrize(
    ("other", "comes_out"), [("fp16", 2.31), ("ant", 1.48), ("olive", 1.32)], ids=["fp16", "ant", "olive"]
)
def test_headline_energies_are_geometric_means_over_both_tasks_but_for_the_one_over_olive(
    other: str, comes_out: float
) -> None:
    (headline,) = (entry for entry in HEADLINES if entry.task == "both" and entry.other == other)
    values = [
        value
        for tokens in (0, DECODED_TOKENS)
        for value in ratios("energy", headline.accelerator, other, tokens, "published")
    ]
    assert round(geometric_mean(values), 2) == comes_out
    assert (comes_out == headline.printed) == (other != "olive")


def test_no_usual_mean_gives_all_three_headline_energies() -> None:
    """Ratios of 2024 or 2025, total or on-chip energy, 16 to 256 tokens, three means over models and over tasks."""
    energies = ("energy_uj", "on_chip_energy_uj")
    headlines = [entry for entry in HEADLINES if entry.task == "both"]
    results = {
        key: run(*key) for key in product(PUBLISHED_MODELS, published_accelerator_names(), PHASES, PUBLISHED_STATES)
    }
    for state, energy, tokens in product(PUBLISHED_STATES, energies, (16, 20, 32, 64, 128, 256)):

        def values(headline: Headline, decoded: int, state: str = state, energy: str = energy) -> list[float]:
            def cost(model: str, name: str) -> float:
                prefill, decode = (getattr(results[model, name, phase, state], energy) for phase in PHASES)
                return float(prefill + decoded * decode)

            return [cost(model, headline.other) / cost(model, headline.accelerator) for model in PUBLISHED_MODELS]

        for over_models, over_tasks in product((fmean, geometric_mean, harmonic_mean), repeat=2):
            found = [
                over_tasks([over_models(values(entry, 0)), over_models(values(entry, tokens))]) for entry in headlines
            ]
            assert [round(value, 2) for value in found] != [entry.printed for entry in headlines]


@pytest.mark.parametrize("state", PUBLISHED_STATES)
@pytest.mark.parametrize("accelerator", published_accelerator_names())
@pytest.mark.parametrize("phase", PHASES)
def test_dictionary_is_json_and_its_parts_add_up(accelerator: str, phase: Phase, state: str) -> None:
    document = run("llama-2-7b", accelerator, phase, state).to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["model_of"] == state
    assert document["cycles"] == document["busy"] + document["stalls"]["dram"] == round(document["latency_ms"] * 1e6)
    energy = document["energy_uj"]
    assert list(energy) == ["pe", "sram_read", "sram_write", "dram", "total"]
    assert energy["total"] == pytest.approx(sum(list(energy.values())[:-1]), rel=1e-12)
    traffic = ("weight_traffic_bytes", "activation_traffic_bytes", "output_traffic_bytes")
    assert document["traffic_bytes"] == sum(document[part] for part in traffic)
    assert energy["dram"] == pytest.approx(document["traffic_bytes"] * 8 * 18.75e-6, rel=1e-12)


@pytest.mark.parametrize("state", PUBLISHED_STATES.values(), ids=PUBLISHED_STATES)
def test_models_without_published_precision_are_refused_unless_one_is_given(state: PublishedState) -> None:
    shape, accelerator = known_shape("mistral-7b"), get_accelerator("ant")
    with pytest.raises(InputError, match=r"no weight precision of ant for 'mistral-7b' in decode; expected opt-1\.3b"):
        simulate_published(shape, accelerator, phase="decode", state=state)
    given = simulate_published(shape, accelerator, phase="decode", state=state, weight_bits=4.5)
    assert given.weight_bits == 4.5
    assert given.notes == ("the precision is not the published one",)
    assert run("mistral-7b", "bitmod-lossy", "decode", state.name).notes == ()


def test_states_and_systems_are_looked_up_by_name() -> None:
    assert get_published_state("published-2025") is PUBLISHED_2025
    with pytest.raises(InputError, match="published-2024"):
        get_published_state("published-2024")
    with pytest.raises(InputError, match="no accelerator 'gobo'; it has fp16"):
        published_weight_bits("opt-1.3b", "gobo", "decode")


def test_a_precision_that_was_published_and_is_given_changes_nothing_but_the_note() -> None:
    for state in PUBLISHED_STATES.values():
        shape, accelerator = known_shape("phi-2"), get_accelerator("bitmod-lossy")
        usual = simulate_published(shape, accelerator, phase="decode", state=state)
        given = simulate_published(
            shape, accelerator, phase="decode", state=state, weight_bits=3.0625, key_value_bits=usual.key_value_bits
        )
        assert dataclasses.replace(given, notes=()) == usual


def test_what_was_not_published_is_noted_or_refused() -> None:
    shape, accelerator = known_shape("opt-1.3b"), get_accelerator("bitmod-lossy")
    with pytest.raises(InputError, match="knows only a batch of 1"):
        simulate_published(shape, accelerator, phase="prefill", batch=2)
    with pytest.raises(InputError, match="context is 0"):
        simulate_published(shape, accelerator, phase="prefill", context=0)
    with pytest.raises(InputError, match="unknown phase"):
        simulate_published(shape, accelerator, phase="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"weight_bits is 0\.5"):
        simulate_published(shape, accelerator, phase="prefill", weight_bits=0.5)
    with pytest.raises(InputError, match="key_value_bits is nan"):
        simulate_published(shape, accelerator, phase="prefill", key_value_bits=float("nan"))
    assert "context of 256" in simulate_published(shape, accelerator, phase="decode", context=512).notes[0]
    other = simulate_published(shape, get_accelerator("bitmod-lossy@16x16"), phase="decode")
    assert "16 × 16" in other.notes[0]
    linear = LinearShape(name="fc", outputs=64, inputs=64)
    bare = ModelShape(name="bare", linears=(linear,), attention=None, head=None)
    assert "not counted" in simulate_published(bare, accelerator, phase="prefill").notes[0]
    uneven = AttentionShape(layers=1, heads=3, key_value_heads=2, head_size=8)
    with pytest.raises(InputError, match="3 heads and 2 key-value heads"):
        simulate_published(
            ModelShape(name="uneven", linears=(linear,), attention=uneven, head=None),
            accelerator,
            phase="prefill",
            state=PUBLISHED_2025,
        )
