"""The closed-form published model against the numbers of the BitMoD simulator, state of November 2024.

Source of all golden numbers: the simulator published with BitMoD (HPCA 2025) at its commit 58d7bdb, run with CACTI 7.
They are cycles, total energy and on-chip energy in µJ for a prefill of 256 tokens and for one decoded token, and the
arithmetic means of ratios over six models, of which two (grouped-query attention) appear only in those means.
"""

from __future__ import annotations

import json

import pytest

from termwise.algorithms.errors import InputError
from termwise.algorithms.shapes import LinearShape, ModelShape, known_shape
from termwise.algorithms.workload import PHASES, Phase
from termwise.sim.accelerators import accelerator_names, get_accelerator
from termwise.sim.published import PublishedSimulation, published_weight_bits, simulate_published

TABULATED_MODELS = ("opt-1.3b", "phi-2", "llama-2-7b", "llama-2-13b")
ALL_MODELS = (*TABULATED_MODELS, "yi-6b", "llama-3-8b")

# (accelerator, phase): for each tabulated model (cycles, total energy µJ, on-chip energy µJ).
GOLDEN: dict[tuple[str, Phase], tuple[tuple[int, int, int], ...]] = {
    ("fp16", "prefill"): (
        (669255680, 2549499, 656668),
        (1399816192, 6252350, 1273252),
        (3156574208, 15511221, 2928682),
        (6676111360, 36365139, 5742951),
    ),
    ("ant", "prefill"): (
        (440975360, 1360903, 459880),
        (847773696, 3147508, 888236),
        (1949564928, 7426912, 2035862),
        (4076584960, 16936053, 3981122),
    ),
    ("olive", "prefill"): (
        (403718144, 1308354, 501789),
        (779268096, 2969260, 969019),
        (1768062976, 6898215, 2192068),
        (3648512000, 15557969, 4285634),
    ),
    ("bitmod-lossy", "prefill"): (
        (233070592, 986623, 221382),
        (515194880, 2315439, 428524),
        (1202921472, 5388371, 981870),
        (2601461760, 12460765, 1924566),
    ),
    ("bitmod-lossless", "prefill"): (
        (336236544, 1272043, 317887),
        (693780480, 3020095, 615118),
        (1649680384, 7186699, 1410390),
        (3537397760, 16664646, 2763255),
    ),
    ("fp16", "decode"): (
        (82153718, 419862, 25745),
        (165841248, 847599, 51929),
        (413518608, 2113617, 129318),
        (804330080, 4110960, 251588),
    ),
    ("ant", "decode"): (
        (25779238, 145879, 22139),
        (51998112, 294259, 44668),
        (129497936, 732882, 111292),
        (251907680, 1425302, 216575),
    ),
    ("olive", "decode"): (
        (20018374, 119339, 23250),
        (41655712, 246787, 46840),
        (97236816, 582192, 115455),
        (189155680, 1133377, 225859),
    ),
    ("bitmod-lossy", "decode"): (
        (15857750, 86588, 10470),
        (31959712, 174535, 21129),
        (79493200, 434198, 52631),
        (154552560, 844271, 102418),
    ),
    ("bitmod-lossless", "decode"): (
        (31220054, 165547, 15691),
        (62986912, 334000, 31662),
        (156919888, 832097, 78882),
        (305157360, 1618257, 153502),
    ),
}
GOLDEN_POINTS = [
    (accelerator, phase, model, *numbers)
    for (accelerator, phase), row in GOLDEN.items()
    for model, numbers in zip(TABULATED_MODELS, row, strict=True)
]

# (quantity, accelerator, over): mean ratio in prefill, and in prefill + 20 decoded tokens, as printed.
GOLDEN_RATIOS = {
    ("cycles", "bitmod-lossy", "ant"): (1.723, 1.660),
    ("cycles", "bitmod-lossy", "olive"): (1.560, 1.388),
    ("cycles", "bitmod-lossy", "fp16"): (2.823, 4.176),
    ("cycles", "bitmod-lossless", "fp16"): (1.989, 2.408),
    ("energy", "bitmod-lossy", "ant"): (1.403, 1.572),
    ("energy", "bitmod-lossy", "olive"): (1.303, 1.346),
    ("energy", "bitmod-lossy", "fp16"): (2.985, 4.153),
    ("energy", "bitmod-lossless", "fp16"): (2.200, 2.437),
}


def run(model: str, accelerator: str, phase: Phase) -> PublishedSimulation:
    return simulate_published(known_shape(model), get_accelerator(accelerator), phase=phase)


@pytest.mark.parametrize(("accelerator", "phase", "model", "cycles", "energy_uj", "on_chip_uj"), GOLDEN_POINTS)
def test_golden_cycles_and_energies_come_out(
    accelerator: str, phase: Phase, model: str, cycles: int, energy_uj: int, on_chip_uj: int
) -> None:
    result = run(model, accelerator, phase)
    assert result.cycles == cycles
    # The golden energies are rounded to 1 µJ and come from CACTI figures with more digits than the table's three.
    assert result.energy_uj == pytest.approx(energy_uj, abs=3.5)
    assert result.on_chip_energy_uj == pytest.approx(on_chip_uj, abs=3.5)
    assert result.notes == ()


@pytest.mark.parametrize(("quantity", "accelerator", "over"), GOLDEN_RATIOS)
@pytest.mark.parametrize("decoded_tokens", [0, 20])
def test_mean_ratios_over_six_models_come_out(quantity: str, accelerator: str, over: str, decoded_tokens: int) -> None:
    def cost(model: str, name: str) -> float:
        prefill, decode = (run(model, name, phase) for phase in PHASES)
        if quantity == "cycles":
            return prefill.cycles + decoded_tokens * decode.cycles
        return prefill.energy_uj + decoded_tokens * decode.energy_uj

    mean = sum(cost(model, over) / cost(model, accelerator) for model in ALL_MODELS) / len(ALL_MODELS)
    golden = GOLDEN_RATIOS[quantity, accelerator, over][0 if decoded_tokens == 0 else 1]
    assert round(mean, 3) == golden


@pytest.mark.parametrize("accelerator", accelerator_names())
@pytest.mark.parametrize("phase", PHASES)
def test_dictionary_is_json_and_its_parts_add_up(accelerator: str, phase: Phase) -> None:
    document = run("llama-2-7b", accelerator, phase).to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["model_of"] == "published"
    assert document["cycles"] == document["latency_cycles"] == round(document["latency_ms"] * 1e6)
    parts = ("pe_energy_uj", "sram_read_energy_uj", "sram_write_energy_uj", "dram_energy_uj")
    assert document["energy_uj"] == pytest.approx(sum(document[part] for part in parts), rel=1e-12)
    traffic = ("weight_traffic_bytes", "activation_traffic_bytes", "output_traffic_bytes")
    assert document["traffic_bytes"] == sum(document[part] for part in traffic)
    assert document["dram_energy_uj"] == pytest.approx(document["traffic_bytes"] * 8 * 18.75e-6, rel=1e-12)


def test_models_without_published_precision_take_the_mean_and_say_so() -> None:
    bits, notes = published_weight_bits("mistral-7b", "ant", "decode")
    assert bits == pytest.approx((5 + 5 + 5.25 + 5 + 5 + 4.5) / 6)
    assert "mistral-7b" in notes[0]
    assert notes[0] in run("mistral-7b", "ant", "decode").notes
    assert run("mistral-7b", "bitmod-lossy", "decode").notes == ()


def test_what_was_not_published_is_noted_or_refused() -> None:
    shape, accelerator = known_shape("opt-1.3b"), get_accelerator("bitmod-lossy")
    with pytest.raises(InputError, match="knows only a batch of 1"):
        simulate_published(shape, accelerator, phase="prefill", batch=2)
    with pytest.raises(InputError, match="context is 0"):
        simulate_published(shape, accelerator, phase="prefill", context=0)
    with pytest.raises(InputError, match="unknown phase"):
        simulate_published(shape, accelerator, phase="both")  # type: ignore[arg-type]
    assert "context of 256" in simulate_published(shape, accelerator, phase="decode", context=512).notes[0]
    other = simulate_published(shape, get_accelerator("bitmod-lossy@16x16"), phase="decode")
    assert "16 × 16" in other.notes[0]
    bare = ModelShape(name="bare", linears=(LinearShape(name="fc", outputs=64, inputs=64),), attention=None, head=None)
    assert "not counted" in simulate_published(bare, accelerator, phase="prefill").notes[0]
