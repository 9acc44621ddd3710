"""Mixed precision: the integer program is optimal, the search never loses, files are read back."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms.assignment import read_assignment, write_assignment
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.mixed_precision import (
    Candidates,
    Choice,
    Evolution,
    MixedChoice,
    MixedModel,
    QuantizedLayers,
    choose_formats,
    integer_program,
    loss_sensitivities,
    output_sensitivities,
    refine,
    share_of,
)
from termwise.algorithms.models import Model, open_model
from termwise.algorithms.perplexity import perplexity
from termwise.algorithms.quantize import quantize
from termwise.algorithms.text import Text, read_text, text_of

FORMATS = tuple(map(get_format, ("bitmod-w3g128", "bitmod-w4g128", "int-w8g128")))
OTHER_TEXT = text_of("others", ["what nothing was chosen by", "another sentence that is only read at the end"])


def made_up(generator: np.random.Generator, layers: int, formats: int) -> Candidates:
    """Layers of random sizes; every format has its own random price per weight in each of them."""
    weights = generator.integers(1, 40, layers) * 128
    bits = weights[:, None] * generator.integers(16, 140, (layers, formats)) // 16 * 8
    named = [get_format(f"int-w{2 + place}g128") for place in range(formats)]
    return Candidates(
        layers=tuple(f"layer{index}" for index in range(layers)),
        weights=tuple(int(count) for count in weights),
        formats=tuple(named),
        bits=bits,
    )


def all_choices(candidates: Candidates, budget_bits: int) -> list[Choice]:
    """Every choice within the budget."""
    everything = itertools.product(range(len(candidates.formats)), repeat=len(candidates.layers))
    return [choice for choice in everything if candidates.bits_of(choice) <= budget_bits]


def a_budget(candidates: Candidates, share: float) -> int:
    """A budget between the smallest (0) and the largest (1) choice."""
    least, most = int(candidates.bits.min(axis=1).sum()), int(candidates.bits.max(axis=1).sum())
    return least + round(share * (most - least))


@pytest.fixture(scope="module")
def model(small_model: Path) -> Model:
    return open_model(small_model)


@pytest.fixture(scope="module")
def text(small_text: Path) -> Text:
    return read_text(small_text)


@pytest.fixture(scope="module")
def choice(model: Model, text: Text) -> MixedChoice:
    evolution = Evolution(generations=3, offspring=4, shares=(0.5,), survivors=(2,))
    return choose_formats(
        model, FORMATS, bits_per_weight=6.0, calibration=text, evaluation=OTHER_TEXT, evolution=evolution
    )


class TestIntegerProgram:
    @pytest.mark.parametrize("seed", range(30))
    def test_it_equals_the_best_of_all_choices(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        candidates = made_up(generator, layers=int(generator.integers(1, 7)), formats=int(generator.integers(1, 5)))
        # From 1e-6 to 1e4, and negative ones: the scale of sensitivities must not matter.
        sensitivities = generator.normal(size=candidates.bits.shape) * 10.0 ** generator.integers(-6, 5)
        budget = a_budget(candidates, generator.random())
        found = integer_program(candidates, sensitivities, budget)
        rows = range(len(candidates.layers))

        def total(choice: Choice) -> float:
            return math.fsum(sensitivities[row, place] for row, place in zip(rows, choice, strict=True))

        best = min(map(total, all_choices(candidates, budget)))
        # Both are sums of at most six float64.
        assert total(found.choice) == pytest.approx(best, rel=1e-12, abs=1e-12 * np.abs(sensitivities).max())
        assert candidates.bits_of(found.choice) <= budget
        # The solver's own tolerance: 1e-6 where the greatest cost is 1e4.
        assert found.bound == pytest.approx(found.sensitivity, rel=1e-9, abs=1e-9 * np.ptp(sensitivities) + 1e-300)

    def test_a_budget_to_the_bit_is_used(self) -> None:
        candidates = made_up(np.random.default_rng(1), layers=5, formats=3)
        sensitivities = -candidates.bits.astype(np.float64)  # the larger, the better
        for choice in all_choices(candidates, a_budget(candidates, 1.0))[::17]:
            budget = candidates.bits_of(choice)
            assert candidates.bits_of(integer_program(candidates, sensitivities, budget).choice) == budget

    def test_a_format_that_overflows_is_never_chosen(self) -> None:
        candidates = made_up(np.random.default_rng(2), layers=4, formats=3)
        sensitivities = np.random.default_rng(3).random(candidates.bits.shape)
        sensitivities[2, 0] = sensitivities[0, 2] = math.inf
        choice = integer_program(candidates, sensitivities, a_budget(candidates, 1.0)).choice
        assert choice[2] != 0
        assert choice[0] != 2
        sensitivities[1] = math.inf
        with pytest.raises(InputError, match="no candidate format keeps the loss finite in layer1"):
            integer_program(candidates, sensitivities, a_budget(candidates, 1.0))

    def test_no_choice_within_the_budget_is_refused(self) -> None:
        candidates = made_up(np.random.default_rng(4), layers=3, formats=2)
        with pytest.raises(InputError, match="expected a larger budget"):
            integer_program(candidates, np.ones(candidates.bits.shape), a_budget(candidates, 0.0) - 8)


class TestCandidates:
    def test_costs_are_the_packed_bytes(self, model: Model) -> None:
        formats = (*FORMATS, get_format("gobo-w3"))  # its size depends on the weights
        candidates = QuantizedLayers(model, formats).candidates()
        for row, (name, weights) in enumerate(model.matrices()):
            sizes = [8 * quantize(weights, format).nbytes for format in formats]
            assert candidates.bits[row].tolist() == sizes, name
        assert candidates.bits_of(candidates.uniform(1)) == int(candidates.bits[:, 1].sum())

    @pytest.mark.parametrize("budget", [1.0, 16.0, math.nan, math.inf])
    def test_a_budget_out_of_range_is_refused_with_the_range(self, model: Model, budget: float) -> None:
        candidates = QuantizedLayers(model, FORMATS).candidates()
        with pytest.raises(InputError, match="bits per weight: expected") as caught:
            candidates.budget_bits(budget)
        low, high = str(caught.value).split("expected ")[1].split(",")[0].split(" to ")
        assert candidates.budget_bits(float(low)) >= candidates.bits_of(candidates.uniform(0))
        assert candidates.budget_bits(float(high)) <= candidates.bits_of(candidates.uniform(2))

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ([], "no format to choose from"),
            (["int-w4g128", "int-w8g128", "int-w4g128"], "int-w4g128 is named twice"),
            (["int-w4a8g128"], "quantizes activations; expected formats of weights, such as int-w4g128"),
        ],
    )
    def test_formats_to_choose_from_are_checked(self, model: Model, names: list[str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            QuantizedLayers(model, map(get_format, names))

    def test_layers_that_are_not_kept_are_quantized_again_to_the_same(self, model: Model) -> None:
        kept, read_again = QuantizedLayers(model, FORMATS), QuantizedLayers(model, FORMATS, memory_bytes=0)
        name = model.matrix_names[0]
        first = kept.tensor(name, FORMATS[0])
        assert kept.tensor(name, FORMATS[0]) is first
        assert read_again.tensor(name, FORMATS[0]) is not read_again.tensor(name, FORMATS[0])
        np.testing.assert_array_equal(first.dequantize(), read_again.tensor(name, FORMATS[0]).dequantize())


class TestSensitivities:
    def test_a_loss_is_that_of_the_layers_replaced(self, model: Model, text: Text) -> None:
        mixed = MixedModel(QuantizedLayers(model, FORMATS), [text])
        some = {name: FORMATS[place % 2] for place, name in enumerate(model.matrix_names) if place % 3}
        # In another order of layers in place, so that one assignment leaves nothing behind for the next.
        for assignment in (dict.fromkeys(model.matrix_names, FORMATS[2]), some, {}):
            expected = perplexity(
                model,
                text,
                replace=lambda name, weights, formats=assignment: (
                    quantize(weights, formats[name]).dequantize() if name in formats else weights.astype(np.float32)
                ),
            )
            assert mixed.loss(assignment) == expected.negative_log_likelihood / expected.predicted_tokens
        assert mixed.evaluations == 3

    def test_sensitivity_is_the_increase_by_one_layer(self, model: Model, text: Text) -> None:
        mixed = MixedModel(QuantizedLayers(model, FORMATS), [text])
        candidates = QuantizedLayers(model, FORMATS).candidates()
        told: list[tuple[str, int, int]] = []
        found = loss_sensitivities(mixed, candidates, lambda *event: told.append(event))
        assert found.shape == candidates.bits.shape
        assert found[3, 1] == mixed.loss({model.matrix_names[3]: FORMATS[1]}) - mixed.loss({})
        assert told[-1] == ("sensitivity", found.size, found.size)

    def test_output_sensitivity_is_the_relative_error_of_the_output(self, model: Model) -> None:
        layers = QuantizedLayers(model, FORMATS)
        generator = np.random.default_rng(5)
        inputs = {name: generator.normal(size=(70, weights.shape[1])) for name, weights in model.matrices()}
        found = output_sensitivities(layers, layers.candidates(), ((name, x.T @ x) for name, x in inputs.items()))
        for row, (name, weights) in enumerate(model.matrices()):
            exact = inputs[name] @ weights.astype(np.float64).T
            for column, format in enumerate(FORMATS):
                other = inputs[name] @ quantize(weights, format).dequantize().astype(np.float64).T
                # Sums of thousands of float64 in another order.
                assert found[row, column] == pytest.approx(((exact - other) ** 2).sum() / (exact**2).sum(), rel=1e-9)

    def test_output_sensitivity_is_hawqs_for_uncorrelated_inputs_of_equal_size(self, model: Model) -> None:
        layers = QuantizedLayers(model, FORMATS)
        grams = {name: 3.0 * np.eye(weights.shape[1]) for name, weights in model.matrices()}
        found = output_sensitivities(layers, layers.candidates(), grams.items())
        weights = model.matrix(model.matrix_names[2]).astype(np.float64)
        hessian = grams[model.matrix_names[2]] / (3.0 * (weights**2).sum())
        average_trace = np.trace(hessian) / len(hessian)
        perturbation = (weights - layers.tensor(model.matrix_names[2], FORMATS[0]).dequantize()) ** 2
        assert found[2, 0] == pytest.approx(average_trace * perturbation.sum(), rel=1e-9)

    @pytest.mark.parametrize(
        ("gram", "message"), [(None, "no Gram matrix of"), (np.eye(3), r"shape \[3, 3\]"), (np.zeros((32, 32)), "zero")]
    )
    def test_a_bad_gram_matrix_is_refused_with_the_layer(
        self, model: Model, gram: NDArray[np.float64] | None, message: str
    ) -> None:
        layers = QuantizedLayers(model, FORMATS)
        grams = {name: np.eye(weights.shape[1]) for name, weights in model.matrices()}
        name = model.matrix_names[1]
        del grams[name]
        if gram is not None:
            grams[name] = gram
        with pytest.raises(InputError, match=message) as caught:
            output_sensitivities(layers, layers.candidates(), grams.items())
        assert name in str(caught.value)


class TestEvolution:
    def losses(self, seed: int, candidates: Candidates) -> Callable[[Choice], float]:
        """Layers that interact: the loss is a quadratic form of their errors, not a sum; larger formats err less."""
        generator = np.random.default_rng(seed)
        errors = np.empty(candidates.bits.shape)
        np.put_along_axis(errors, candidates.levels, np.sort(generator.random(errors.shape))[:, ::-1], axis=1)
        interaction = generator.random((len(errors), len(errors)))

        def loss(choice: Choice) -> float:
            error = errors[np.arange(len(errors)), list(choice)]
            return float(error @ interaction @ error)

        return loss

    @pytest.mark.parametrize("seed", range(10))
    def test_it_is_never_worse_than_any_start_and_keeps_the_budget(self, seed: int) -> None:
        candidates = made_up(np.random.default_rng(seed), layers=8, formats=3)
        loss = self.losses(seed, candidates)
        budget = a_budget(candidates, 0.4)
        starts = random.Random(seed).sample(all_choices(candidates, budget), 3)
        asked: list[Choice] = []

        def noisy(choice: Choice) -> float:
            asked.append(choice)
            return -loss(choice)  # a first step that prefers the wrong ones

        settings = Evolution(generations=6, offspring=5, shares=(0.5,), survivors=(2,), seed=seed)
        found = refine(candidates, budget, [noisy, loss], starts, settings)
        assert found.loss == loss(found.choice) <= min(map(loss, starts))
        assert len(found.history) == 7
        assert list(found.history) == sorted(found.history, reverse=True)
        assert all(candidates.bits_of(choice) <= budget for choice in [*asked, found.choice])

    @pytest.mark.parametrize("seed", range(5))
    def test_it_finds_the_best_of_all_choices_of_a_small_space(self, seed: int) -> None:
        candidates = made_up(np.random.default_rng(seed), layers=5, formats=3)
        loss = self.losses(seed, candidates)
        budget = a_budget(candidates, 0.5)
        best = min(map(loss, all_choices(candidates, budget)))
        settings = Evolution(generations=40, offspring=32, shares=(), survivors=(), seed=seed)
        found = refine(candidates, budget, [loss], [tuple(int(level) for level in candidates.levels[:, 0])], settings)
        assert found.loss == best

    def test_a_seed_decides_alone(self) -> None:
        candidates = made_up(np.random.default_rng(0), layers=12, formats=4)
        loss = self.losses(0, candidates)
        start = tuple(int(level) for level in candidates.levels[:, 0])

        def run(seed: int) -> tuple[float, ...]:
            random.seed()  # the state of the library's generator must not matter
            settings = Evolution(generations=4, offspring=6, shares=(), survivors=(), seed=seed)
            return refine(candidates, a_budget(candidates, 0.3), [loss], [start], settings).history

        assert run(7) == run(7)
        assert len({run(seed) for seed in range(5)}) > 1

    def test_where_nothing_can_be_switched_the_start_stays(self) -> None:
        candidates = made_up(np.random.default_rng(1), layers=3, formats=1)
        settings = Evolution(generations=2, offspring=2, shares=(), survivors=())
        found = refine(candidates, a_budget(candidates, 1.0), [lambda _: 1.0], [(0, 0, 0)], settings)
        assert found.choice == (0, 0, 0)

    @pytest.mark.parametrize(
        "change",
        [{"generations": -1}, {"offspring": 3}, {"survivors": (4,)}, {"shares": (0.5, 1.0)}, {"survivors": (2, 4)}],
    )
    def test_settings_that_do_not_belong_together_are_refused(self, change: dict[str, object]) -> None:
        with pytest.raises(InputError, match="expected no less than 0 generations"):
            replace(Evolution(), **change)  # type: ignore[arg-type]


class TestShares:
    def test_a_share_is_spread_over_the_text(self) -> None:
        text = text_of("digits", ["0" * 2000 + "1" * 2000 + "2" * 2000 + "3" * 2000])
        assert [piece[0] for piece in share_of(text, 0.5).documents] == ["1", "3"]
        assert share_of(text, 1.0).documents == ("0" * 2000, "1" * 2000, "2" * 2000, "3" * 2000)
        assert len(share_of(text, 1e-9).documents) == 1

    def test_documents_of_which_the_beginning_counts_stay_whole(self) -> None:
        text = text_of("stories", ["a" * 5000, "b", "c" * 3000, "d"], beginnings_only=True)
        part = share_of(text, 0.5)
        assert part.documents == ("b", "d")
        assert part.beginnings_only


class TestChoice:
    def test_what_is_reported_is_what_the_formats_give(self, model: Model, text: Text, choice: MixedChoice) -> None:
        for outcome in (choice.integer, choice.chosen, choice.within, choice.above):
            assert outcome is not None
            formats = outcome.assignment
            tensors = {name: quantize(weights, formats[name]) for name, weights in model.matrices()}
            weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors.values())
            assert outcome.bits_per_weight == 8 * sum(tensor.nbytes for tensor in tensors.values()) / weights
            for read, measured in ((OTHER_TEXT, outcome.perplexity), (text, math.exp(outcome.calibration_loss))):
                expected = perplexity(model, read, replace=lambda name, _, these=tensors: these[name].dequantize())
                assert measured == pytest.approx(expected.per_token, rel=1e-12)  # exp of the same loss

    def test_no_measured_choice_within_the_budget_is_better(self, choice: MixedChoice) -> None:
        assert choice.within is not None
        assert choice.above is not None
        assert choice.chosen.bits_per_weight <= 6.0 < choice.above.bits_per_weight
        assert choice.chosen.calibration_loss <= min(choice.integer.calibration_loss, choice.within.calibration_loss)
        assert choice.gain == choice.within.perplexity - choice.chosen.perplexity
        assert choice.predicted_loss == choice.original_loss + choice.program.sensitivity

    def test_without_a_search_the_integer_programs_choice_stands(self, model: Model, text: Text) -> None:
        grams = {name: np.eye(weights.shape[1]) for name, weights in model.matrices()}
        found = choose_formats(
            model,
            FORMATS,
            bits_per_weight=6.0,
            calibration=text,
            evaluation=OTHER_TEXT,
            sensitivity="output",
            grams=grams.items(),
            evolution=Evolution(generations=0),
        )
        assert found.chosen == found.integer
        assert found.predicted_loss is None
        assert found.history == ()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sensitivity": "los"}, "did you mean 'loss'"),
            ({"sensitivity": "output"}, "needs the Gram matrix"),
            ({"bits_per_weight": 20.0}, "20 bits per weight: expected"),
            ({"evaluation": text_of("same", ["and a few more of them"])}, "share 1 documents"),
        ],
    )
    def test_bad_input_is_refused(self, model: Model, text: Text, change: dict[str, object], message: str) -> None:
        arguments = {"bits_per_weight": 6.0, "calibration": text, "evaluation": OTHER_TEXT} | change
        with pytest.raises(InputError, match=message):
            choose_formats(model, FORMATS, **arguments)  # type: ignore[arg-type]


class TestFiles:
    LAYERS = ("model.layers.0.q", 'strange "name"\\', "kopf.ö")

    @pytest.mark.parametrize("suffix", [".toml", ".json"])
    def test_what_is_written_is_read_back(self, tmp_path: Path, suffix: str) -> None:
        names = ("bitmod-w4g128:special=5,-5", "mxfp4", "int-w8g128")
        assignment = dict(zip(self.LAYERS, map(get_format, names), strict=True))
        path = tmp_path / f"formats{suffix}"
        write_assignment(assignment, path)
        assert read_assignment(path, self.LAYERS) == assignment
        assert list(read_assignment(path, self.LAYERS[::-1])) == list(self.LAYERS[::-1])

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"a.b": "int-w4g128"}, "names no format for a.c; expected one"),
            ({}, "names no format for a.b and 1 more; expected one"),
            ({"a.b": "int-w4", "a.c": "int-w4", "a.d": "int-w4"}, "unknown layer 'a.d': did you mean 'a."),
            ({"a.b": "int-w4", "a.c": "int-w9"}, "a.c: format 'int-w9': int has no 9-bit weights"),
            ({"a.b": "int-w4", "a.c": 4}, "a.c has the format 4; expected the name"),
            (None, "has no table 'formats'"),
        ],
    )
    def test_a_bad_table_is_refused_with_the_layer(self, tmp_path: Path, table: object, message: str) -> None:
        path = tmp_path / "formats.json"
        path.write_text(json.dumps({} if table is None else {"formats": table}), encoding="utf-8")
        with pytest.raises(InputError, match=message) as caught:
            read_assignment(path, ("a.b", "a.c"))
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("formats.toml", b"[formats", "is not TOML"),
            ("formats.toml", b"\xff", "is not TOML"),
            ("formats.json", b"[1", "is not JSON"),
            ("formats.yaml", b"", "expected a file .toml or .json"),
            ("formats.toml", None, "cannot read"),
        ],
    )
    def test_a_bad_file_is_refused(self, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_assignment(tmp_path / name, ("a",))
