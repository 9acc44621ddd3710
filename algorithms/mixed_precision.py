"""Mixed precision: a budget of bits per weight in, a format for every linear layer out.

1. Sensitivity of a layer to a format, measured on calibration text (``loss_sensitivities``, ``output_sensitivities``).
2. An integer program (``integer_program``) chooses one format per layer, so that the sum of the sensitivities is least
   within the budget: HAWQ-V3 (arXiv 2011.10680), "Mixed Precision and Integer Linear Programming", with the size of the
   model as the limit.
3. An evolutionary search (``refine``) starts from that choice and compares measured losses, because the errors of
   layers do not add up: EvoPress (arXiv 2410.14649). A mutation switches levels: some layers get the next larger
   format, others the next smaller one, so that the budget holds. Selection takes several steps: few survivors are
   measured on more text.

Differences from the papers. HAWQ-V3 weighs a layer's squared perturbation by the average trace of the loss's Hessian;
see the two sensitivities for what stands here instead. EvoPress begins with random or uniform levels and by default
switches levels between layers of one size; here a layer of any size may pay for another, and a layer that was lowered
without need is raised again. EvoPress draws other text in every step of selection; here the text of each step stays, so
that losses can be kept and the search never ends with a greater loss on the calibration text than it started from.

Costs are counted from packed bytes, with scales and everything else that a format stores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.assignment import Assignment
from termwise.algorithms.errors import InputError, TermwiseError, unknown_name
from termwise.algorithms.formats import Format
from termwise.algorithms.grid import row_blocks
from termwise.algorithms.models import Matrix, Model
from termwise.algorithms.perplexity import Evaluator
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.algorithms.text import Text, text_of

Choice = tuple[int, ...]
"""For every layer the place of its format among the candidates."""

Sensitivity = Literal["loss", "output"]
SENSITIVITIES: tuple[Sensitivity, ...] = ("loss", "output")

Gram = NDArray[np.float32] | NDArray[np.float64]
"""Xᵀ X of a layer's input X [tokens, inputs]: [inputs, inputs]."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""

MEMORY_BYTES = 4 << 30
"""Packed layers that are kept, unless another limit is asked for."""

PIECE_CHARACTERS = 2000
"""Pieces in which long documents are cut to take a share of a text."""


def no_progress(what: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The formats that every layer may take, and what they cost.

    Attributes:
        layers: names of the linear layers.
        weights: number of weights of each layer.
        formats: the formats.
        bits: size of every layer in every format, int64 [layers, formats], in bits.
    """

    layers: tuple[str, ...]
    weights: tuple[int, ...]
    formats: tuple[Format, ...]
    bits: NDArray[np.int64]

    @cached_property
    def levels(self) -> NDArray[np.intp]:
        """Places of the formats of every layer from the smallest to the largest, [layers, formats]."""
        return np.argsort(self.bits, axis=1, kind="stable")

    def bits_of(self, choice: Choice) -> int:
        """Size of all layers in bits."""
        return int(self.bits[np.arange(len(self.layers)), list(choice)].sum())

    def bits_per_weight(self, choice: Choice) -> float:
        """Size of all layers over the number of their weights."""
        return self.bits_of(choice) / sum(self.weights)

    def assignment(self, choice: Choice) -> dict[str, Format]:
        """The format of every layer by its name."""
        return {layer: self.formats[place] for layer, place in zip(self.layers, choice, strict=True)}

    def uniform(self, place: int) -> Choice:
        """One format for all layers."""
        return (place,) * len(self.layers)

    def budget_bits(self, bits_per_weight: float) -> int:
        """The largest size in bits that the budget allows.

        Raises ``InputError`` where it is less than the smallest choice or more than the largest one.
        """
        weights = sum(self.weights)
        least, most = int(self.bits.min(axis=1).sum()), int(self.bits.max(axis=1).sum())
        budget = Fraction(bits_per_weight) * weights if math.isfinite(bits_per_weight) else Fraction(-1)
        if not least <= budget <= most:
            # Rounded inwards, so that both ends are accepted as they are printed.
            low, high = math.ceil(least / weights * 1e4) / 1e4, math.floor(most / weights * 1e4) / 1e4
            raise InputError(
                f"a budget of {bits_per_weight:g} bits per weight: "
                f"expected {low:.4f} to {high:.4f}, the range of {', '.join(format.name for format in self.formats)}"
            )
        return math.floor(budget)


class QuantizedLayers:
    """The linear layers of a model in any of several formats.

    Packed layers are kept as long as all of them together stay within ``memory_bytes``; the others are read and
    quantized again whenever they are needed. One matrix of float32 is in memory beside them.

    Raises ``InputError`` where a format is named twice, or quantizes activations, which no layer's weights hold.
    """

    def __init__(self, model: Model, formats: Iterable[Format], *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.model, self.formats = model, tuple(formats)
        self._room = memory_bytes
        self._kept: dict[tuple[str, Format], QuantizedTensor] = {}
        if not self.formats:
            raise InputError("no format to choose from; expected at least one")
        for place, format in enumerate(self.formats):
            if format in self.formats[:place]:
                raise InputError(f"the format {format.name} is named twice; expected different ones to choose from")
            if format.activation_bits is not None:
                raise InputError(
                    f"{format.name} quantizes activations; expected formats of weights, such as "
                    f"{format.weights_only.name}, to choose from"
                )

    def tensor(self, name: str, format: Format, weights: Matrix | None = None) -> QuantizedTensor:
        """Layer ``name`` in ``format``; ``weights``, its matrix, where it is at hand."""
        found = self._kept.get((name, format))
        if found is None:
            found = quantize(self.model.matrix(name) if weights is None else weights, format, name=name)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[name, format] = found
        return found

    def candidates(self, progress: Progress = no_progress) -> Candidates:
        """What every layer costs in every format. Layers are quantized only where the weights decide the size."""
        linears = self.model.structure.linears
        bits = np.empty((len(linears), len(self.formats)), dtype=np.int64)
        for row, linear in enumerate(linears):
            for column, format in enumerate(self.formats):
                try:
                    size = format.packed_bytes(linear.outputs, linear.inputs)
                except InputError:
                    size = self.tensor(linear.name, format).nbytes
                bits[row, column] = 8 * size
            progress("sizes", row + 1, len(linears))
        return Candidates(
            layers=tuple(linear.name for linear in linears),
            weights=tuple(linear.outputs * linear.inputs for linear in linears),
            formats=self.formats,
            bits=bits,
        )


class _LoadedOnce(Model):
    """A model that is loaded once: evaluators on several texts share its module, and the weights in place."""

    @classmethod
    def of(cls, model: Model) -> _LoadedOnce:
        """``model`` itself, to be loaded once."""
        return cls(**{entry.name: getattr(model, entry.name) for entry in fields(Model)})

    @cached_property
    def _module(self) -> Any:
        return super().load()

    def load(self, **_: Any) -> Any:
        """The one module."""
        return self._module


class MixedModel:
    """A model in memory whose layers take any of several formats, and its losses on one or more texts.

    In memory are the model's weights and those in place (float32 both), and what ``layers`` keeps. Losses are kept by
    text and assignment. Raises ``InputError`` where the model cannot be run, or a text is too short.
    """

    def __init__(self, layers: QuantizedLayers, texts: Sequence[Text]) -> None:
        model = _LoadedOnce.of(layers.model)
        self._layers = layers
        self._evaluators = [Evaluator(model, text) for text in texts]
        self._in_place: dict[str, Format] = {}
        self._known: dict[tuple[int, frozenset[tuple[str, Format]]], float] = {}

    def loss(self, assignment: Assignment, *, text: int = -1) -> float:
        """Negative log likelihood per token, in nats, on the text of that place, by default the last one.

        Layers that ``assignment`` does not name have the model's own weights. Infinite where the weights overflow the
        model.
        """
        text %= len(self._evaluators)
        key = (text, frozenset(assignment.items()))
        if key not in self._known:
            self._put_in_place(assignment)
            try:
                result = self._evaluators[text].perplexity()
                self._known[key] = result.negative_log_likelihood / result.predicted_tokens
            except TermwiseError:
                self._known[key] = math.inf
        return self._known[key]

    @property
    def evaluations(self) -> int:
        """How often a loss was measured."""
        return len(self._known)

    def _put_in_place(self, assignment: Assignment) -> None:
        evaluator = self._evaluators[0]
        if not self._in_place.keys() <= assignment.keys():
            evaluator.restore()
            self._in_place.clear()
        for name, format in assignment.items():
            if self._in_place.get(name) != format:
                evaluator.replace(name, self._layers.tensor(name, format).dequantize())
                self._in_place[name] = format


def loss_sensitivities(
    mixed: MixedModel, candidates: Candidates, progress: Progress = no_progress
) -> NDArray[np.float64]:
    """Sensitivity ``loss``: what a layer's format alone adds to the loss on the last text of ``mixed``.

    Nats per token, float64 [layers, formats]; one evaluation each. It is the perturbation of the loss itself that
    HAWQ-V3's Hessian estimates to second order. Negative where the format happens to help, infinite where it overflows.
    """
    base = mixed.loss({})
    result = np.empty((len(candidates.layers), len(candidates.formats)))
    for row, layer in enumerate(candidates.layers):
        for column, format in enumerate(candidates.formats):
            result[row, column] = mixed.loss({layer: format}) - base
            progress("sensitivity", row * result.shape[1] + column + 1, result.size)
    return result


def output_sensitivities(
    layers: QuantizedLayers,
    candidates: Candidates,
    grams: Iterable[tuple[str, Gram]],
    progress: Progress = no_progress,
) -> NDArray[np.float64]:
    """Sensitivity ``output``: relative squared error of a layer's output, ‖X (W - Ŵ)ᵀ‖² / ‖X Wᵀ‖².

    Args:
        layers: the layers in all formats.
        candidates: what may be chosen.
        grams: name of every layer, in any order, and Xᵀ X of its input X [tokens, inputs] on calibration text:
            [inputs, inputs]. One is in memory at a time if they are made one at a time.
        progress: told of every layer.

    HAWQ-V3 minimises the sum over layers of a second-order perturbation: average trace of the Hessian × ‖W - Ŵ‖². Here
    the Hessian of a row of weights is Xᵀ X / ‖X Wᵀ‖², and the quadratic form is taken as it is, not by the average of
    its trace; the two are equal where inputs are uncorrelated and of equal size. So every layer's output counts alike,
    whatever the loss makes of it: the loss's own curvature would take gradients.

    Returns: float64 [layers, formats], without a unit.
    Raises ``InputError`` where the Gram matrix of a layer is missing, has another shape, or gives no output at all.
    """
    found: dict[str, list[float]] = {}
    for layer, gram in grams:
        weights = layers.model.matrix(layer)
        if list(gram.shape) != [weights.shape[1]] * 2:
            raise InputError(
                f"the Gram matrix of {layer} has the shape {list(gram.shape)}; "
                f"expected [{weights.shape[1]}, {weights.shape[1]}]"
            )
        exact = gram.astype(np.float64, copy=False)
        signal = sum(_energy(block.astype(np.float64), exact) for _, block in row_blocks(weights))
        if not signal > 0:
            raise InputError(f"the output of {layer} is zero on the calibration text; expected inputs and weights")
        found[layer] = []
        for format in candidates.formats:
            whole = layers.tensor(layer, format, weights).dequantize()
            noise = sum(_energy(block.astype(np.float64) - whole[rows], exact) for rows, block in row_blocks(weights))
            found[layer].append(noise / signal)
        progress("sensitivity", len(found), len(candidates.layers))
    missing = [layer for layer in candidates.layers if layer not in found]
    if missing:
        raise InputError(
            f"no Gram matrix of {missing[0]}: the calibration never reached that layer; expected one of every layer"
        )
    return np.array([found[layer] for layer in candidates.layers])


def _energy(weights: NDArray[np.float64], gram: NDArray[np.float64]) -> float:
    """‖X weightsᵀ‖² of ``weights`` [outputs, inputs], for ``gram`` = Xᵀ X."""
    return float(((weights @ gram) * weights).sum())


@dataclass(frozen=True, kw_only=True)
class Program:
    """The answer of the integer program.

    Attributes:
        choice: the format of every layer.
        sensitivity: sum of the sensitivities.
        bound: no choice within the budget has a lesser sum, as the solver proved, up to its arithmetic.
    """

    choice: Choice
    sensitivity: float
    bound: float


def integer_program(candidates: Candidates, sensitivities: NDArray[np.float64], budget_bits: int) -> Program:
    """The choice of least total sensitivity, float64 [layers, formats], within ``budget_bits``, proved by HiGHS.

    HAWQ-V3: minimise the sum of the sensitivities, where the sizes of the layers sum to the limit or less,
    with a variable of 0 or 1 per layer and format, of which each layer has one. A sensitivity that is not finite
    forbids the format.

    Raises ``InputError`` where no choice fits, ``TermwiseError`` where the solver proves none.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_array

    layers, formats = sensitivities.shape
    allowed = np.isfinite(sensitivities)
    if not allowed.any(axis=1).all():
        layer = candidates.layers[int(np.argmin(allowed.any(axis=1)))]
        raise InputError(f"no candidate format keeps the loss finite in {layer}; expected one that does")
    # The solver's tolerances are absolute, so costs and sizes are brought to a common magnitude. Each layer's least
    # cost is set to zero; what is taken off is the same for every choice.
    least = np.where(allowed, sensitivities, np.inf).min(axis=1, keepdims=True)
    costs = np.where(allowed, sensitivities - least, 0.0)
    scale = 1e4 / float(costs.max()) if costs.max() > 0 else 1.0
    unit = int(np.gcd.reduce(candidates.bits, axis=None))
    one_each = block_diag([np.ones((1, formats))] * layers, format="csr")
    sizes = csr_array((candidates.bits // unit).reshape(1, -1).astype(np.float64))
    found = milp(
        (costs * scale).ravel(),
        integrality=1,
        bounds=Bounds(0, allowed.ravel().astype(np.float64)),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, -np.inf, budget_bits // unit)],
        options={"mip_rel_gap": 0.0},
    )
    if found.status == 2:
        raise InputError(
            f"no choice of {', '.join(format.name for format in candidates.formats)} fits into {budget_bits} bits "
            "with a finite loss; expected a larger budget"
        )
    if found.status != 0:
        raise TermwiseError(f"the integer program was not solved to optimality: {found.message}")
    choice = tuple(int(place) for place in found.x.reshape(layers, formats).argmax(axis=1))
    # The solver's tolerances let more in, never less: a choice that fits exactly is the best one.
    if candidates.bits_of(choice) > budget_bits:
        raise TermwiseError("the integer program's choice exceeds the budget by the solver's tolerance")
    total = float(sensitivities[np.arange(layers), list(choice)].sum())
    return Program(choice=choice, sensitivity=total, bound=float(found.mip_dual_bound / scale + least.sum()))


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """Settings of the evolutionary search.

    Attributes:
        generations: how many; 0 leaves the search out.
        offspring: choices that each generation tries.
        shares: fractions of the calibration text in the steps of selection before the last, which takes all of it.
        survivors: choices that are left after each of these steps.
        seed: of the mutations.

    Raises ``InputError`` where these do not belong together.
    """

    generations: int = 20
    offspring: int = 16
    shares: tuple[float, ...] = (1 / 16, 1 / 4)
    survivors: tuple[int, ...] = (4, 2)
    seed: int = 0

    def __post_init__(self) -> None:
        steps = (self.offspring, *self.survivors)
        if (
            self.generations < 0
            or len(self.shares) != len(self.survivors)
            or not all(0 < share < 1 for share in self.shares)
            or min(steps) < 1
            or list(steps) != sorted(steps, reverse=True)
        ):
            raise InputError(
                f"{self.generations} generations of {self.offspring} offspring, survivors {list(self.survivors)} after "
                f"shares {list(self.shares)}: expected no less than 0 generations, at least one offspring, as many "
                "shares between 0 and 1 as survivors, and no step with more survivors than the one before"
            )


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What the evolutionary search found.

    Attributes:
        choice: the format of every layer.
        loss: its loss by the last measure.
        history: loss of the best choice after every generation, the first one before any: [generations + 1].
    """

    choice: Choice
    loss: float
    history: tuple[float, ...]


def refine(
    candidates: Candidates,
    budget_bits: int,
    losses: Sequence[Callable[[Choice], float]],
    starts: Sequence[Choice],
    settings: Evolution,
    progress: Progress = no_progress,
) -> Refinement:
    """Search for a choice of less loss within ``budget_bits``, by DEAP's (1 + offspring) evolution.

    Args:
        candidates: what may be chosen.
        budget_bits: size that no choice exceeds.
        losses: measures of one choice, one for each of ``settings.shares``, then the one that counts. Each is asked for
            the same choice more than once; it is expected to remember.
        starts: choices within the budget; the search begins with the best one of them.
        settings: see there. The same settings give the same result.
        progress: told of every generation.

    The loss that counts is never greater than that of any start: the parent competes in the last step, and stays unless
    an offspring is better.
    """
    from deap import algorithms, base

    *first, last = losses
    if len(first) != len(settings.shares):
        raise ValueError("expected one measure per share of the text, and one of all of it")
    order = candidates.levels
    rank = np.argsort(order, axis=1)
    generator = random.Random(settings.seed)
    fitness = type("Fitness", (base.Fitness,), {"weights": (-1.0,)})
    individual = type("Individual", (list,), {})

    def choice_of(levels: Sequence[int]) -> Choice:
        return tuple(int(order[layer, level]) for layer, level in enumerate(levels))

    def by(measure: Callable[[Choice], float]) -> Callable[[Any], float]:
        return lambda levels: measure(choice_of(levels))

    def new(levels: Iterable[int]) -> Any:
        made = individual(levels)
        made.fitness = fitness()
        return made

    def mutate(parent: Any) -> tuple[Any]:
        for _ in range(100):
            levels = _switch_levels(parent, candidates, budget_bits, generator)
            if levels is not None and levels != list(parent):
                return (new(levels),)
        return (parent,)  # nothing can be switched

    def evaluate(levels: Any) -> tuple[float]:
        return ((first or losses)[0](choice_of(levels)),)

    history: list[float] = []

    def select(population: Sequence[Any], _: int) -> list[Any]:
        parent = population[0]
        remaining = list({tuple(entry): entry for entry in population[1:]}.values())
        for measure, survivors in zip(first, settings.survivors, strict=True):
            remaining = sorted(remaining, key=by(measure))[:survivors]
        best = min([parent, *remaining], key=by(last))
        history.append(last(choice_of(best)))
        progress("evolution", len(history) - 1, settings.generations)
        return [best]

    toolbox = base.Toolbox()
    toolbox.register("clone", lambda levels: new(levels))
    toolbox.register("mutate", mutate)
    toolbox.register("evaluate", evaluate)
    toolbox.register("select", select)
    start = min(starts, key=last)
    history.append(last(start))
    population = [new(int(rank[layer, place]) for layer, place in enumerate(start))]
    if settings.generations:
        algorithms.eaMuPlusLambda(
            population,
            toolbox,
            mu=1,
            lambda_=settings.offspring,
            cxpb=0.0,
            mutpb=1.0,
            ngen=settings.generations,
            verbose=False,
        )
    choice = choice_of(population[0])
    return Refinement(choice=choice, loss=last(choice), history=tuple(history))


def _switch_levels(
    parent: Sequence[int], candidates: Candidates, budget_bits: int, generator: random.Random
) -> list[int] | None:
    """EvoPress's mutation: one to three rises by a level (rather fewer), then other layers fall until the budget holds.

    Returns: the levels, or None where the layers that may fall do not make enough room.
    """
    sizes = np.take_along_axis(candidates.bits, candidates.levels, axis=1)
    top = sizes.shape[1] - 1
    levels = list(parent)
    spare = budget_bits - sum(int(sizes[layer, level]) for layer, level in enumerate(levels))

    def move(layer: int, step: int) -> int:
        """What room a step of a layer leaves."""
        before = int(sizes[layer, levels[layer]])
        levels[layer] += step
        return spare + before - int(sizes[layer, levels[layer]])

    raised: list[int] = []
    for _ in range(min(generator.randint(1, 3), generator.randint(1, 3))):
        may_rise = [layer for layer, level in enumerate(levels) if level < top]
        if may_rise:
            raised.append(generator.choice(may_rise))
            spare = move(raised[-1], 1)
    lowered: list[int] = []
    while spare < 0:
        may_fall = [layer for layer, level in enumerate(levels) if level > 0 and layer not in raised]
        if not may_fall:
            return None
        lowered.append(generator.choice(may_fall))
        spare = move(lowered[-1], -1)
    for layer in lowered:
        if spare + int(sizes[layer, levels[layer]]) - int(sizes[layer, levels[layer] + 1]) >= 0:
            spare = move(layer, 1)
    return levels


def share_of(text: Text, share: float) -> Text:
    """About ``share`` (0 .. 1) of ``text``, spread evenly over it.

    Documents of more than 2000 characters are cut in pieces, each of which is read on its own; documents of which only
    the beginning counts are not.
    """
    pieces = list(text.documents)
    if not text.beginnings_only:
        pieces = [
            document[start : start + PIECE_CHARACTERS]
            for document in text.documents
            for start in range(0, len(document), PIECE_CHARACTERS)
        ]
    if not pieces:
        return text
    count = max(1, round(share * len(pieces)))
    chosen = ((np.arange(count) + 0.5) * len(pieces) / count).astype(int)
    name = f"{count} of {len(pieces)} pieces of {text.name}"
    return text_of(name, [pieces[place] for place in chosen], beginnings_only=text.beginnings_only)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A choice, and what was measured of it.

    Attributes:
        label: where it comes from: ``integer program``, ``evolution``, or the name of the one format.
        assignment: the format of every layer.
        bits_per_weight: of all layers, scales and everything else included.
        calibration_loss: negative log likelihood per token of the calibration text, in nats.
        perplexity: per token of the evaluation text.
    """

    label: str
    assignment: Assignment
    bits_per_weight: float
    calibration_loss: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class MixedChoice:
    """A format for every layer, and what it gains.

    Attributes:
        budget: bits per weight that were allowed.
        candidates: what could be chosen.
        sensitivity: how sensitivities were measured.
        sensitivities: float64 [layers, formats]; see ``loss_sensitivities`` and ``output_sensitivities``.
        program: the integer program's answer.
        predicted_loss: loss on the calibration text if the errors of layers added up, in nats per token; None where
            sensitivities are no losses.
        original_loss: loss of the model's own weights on the calibration text, in nats per token.
        original_perplexity: of the model's own weights on the evaluation text.
        integer: the integer program's choice, measured.
        chosen: the choice that the search ended with; that of the integer program without a search.
        within: the uniform format within the budget of the least loss on the calibration text; None where none fits.
        above: the smallest uniform format beyond the budget; None where there is none.
        history: loss of the best choice after every generation, see ``Refinement``; empty without a search.
        evaluations: how often a loss was measured.
        seed: of the search.
        calibration, evaluation: name and digest of the texts.
    """

    budget: float
    candidates: Candidates
    sensitivity: Sensitivity
    sensitivities: NDArray[np.float64] = field(repr=False)
    program: Program
    predicted_loss: float | None
    original_loss: float
    original_perplexity: float
    integer: Outcome
    chosen: Outcome
    within: Outcome | None
    above: Outcome | None
    history: tuple[float, ...]
    evaluations: int
    seed: int
    calibration: tuple[str, str]
    evaluation: tuple[str, str]

    @property
    def gain(self) -> float | None:
        """Perplexity on the evaluation text that the choice saves against ``within``; negative where it loses."""
        return None if self.within is None else self.within.perplexity - self.chosen.perplexity


def choose_formats(
    model: Model,
    formats: Sequence[Format],
    *,
    bits_per_weight: float,
    calibration: Text,
    evaluation: Text,
    sensitivity: Sensitivity = "loss",
    grams: Iterable[tuple[str, Gram]] | None = None,
    evolution: Evolution | None = None,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress = no_progress,
) -> MixedChoice:
    """A format of ``formats`` for every linear layer of ``model``, within ``bits_per_weight``.

    ``calibration`` is what all decisions are measured on, ``evaluation`` is only reported. ``grams`` are needed for the
    sensitivity ``output`` (see ``output_sensitivities``). For memory see ``MixedModel`` and ``QuantizedLayers``.

    Raises ``InputError``: a budget outside of what the formats reach, texts that share a document, a model that cannot
    be run, an unknown sensitivity, or no Gram matrices for it.
    """
    evolution = Evolution() if evolution is None else evolution
    if sensitivity not in SENSITIVITIES:
        raise unknown_name("sensitivity", sensitivity, SENSITIVITIES)
    if sensitivity == "output" and grams is None:
        raise InputError("the sensitivity 'output' needs the Gram matrix of every layer's input; got none")
    shared = set(calibration.documents) & set(evaluation.documents)
    if shared:
        raise InputError(
            f"{calibration.name} and {evaluation.name} share {len(shared)} documents; expected an evaluation on text "
            "that nothing was chosen by"
        )
    layers = QuantizedLayers(model, formats, memory_bytes=memory_bytes)
    candidates = layers.candidates(progress)
    budget_bits = candidates.budget_bits(bits_per_weight)
    parts = [share_of(calibration, share) for share in evolution.shares]
    mixed = MixedModel(layers, [evaluation, *parts, calibration])

    if sensitivity == "loss":
        sensitivities = loss_sensitivities(mixed, candidates, progress)
    else:
        assert grams is not None
        sensitivities = output_sensitivities(layers, candidates, grams, progress)
    program = integer_program(candidates, sensitivities, budget_bits)

    def measure(text: int) -> Callable[[Choice], float]:
        return lambda choice: mixed.loss(candidates.assignment(choice), text=text)

    losses = [measure(text) for text in range(1, len(parts) + 2)]

    def outcome(label: str, choice: Choice) -> Outcome:
        return Outcome(
            label=label,
            assignment=candidates.assignment(choice),
            bits_per_weight=candidates.bits_per_weight(choice),
            calibration_loss=losses[-1](choice),
            perplexity=_exponential(measure(0)(choice)),
        )

    uniform = [candidates.uniform(place) for place in range(len(formats))]
    within = [choice for choice in uniform if candidates.bits_of(choice) <= budget_bits]
    above = [choice for choice in uniform if candidates.bits_of(choice) > budget_bits]
    best_within = min(within, key=losses[-1], default=None)
    next_above = min(above, key=candidates.bits_of, default=None)
    starts = [program.choice, *([] if best_within is None else [best_within])]
    refined = refine(candidates, budget_bits, losses, starts, evolution, progress) if evolution.generations else None
    original = mixed.loss({})
    return MixedChoice(
        budget=bits_per_weight,
        candidates=candidates,
        sensitivity=sensitivity,
        sensitivities=sensitivities,
        program=program,
        predicted_loss=original + program.sensitivity if sensitivity == "loss" else None,
        original_loss=original,
        original_perplexity=_exponential(mixed.loss({}, text=0)),
        integer=outcome("integer program", program.choice),
        chosen=outcome("evolution", refined.choice) if refined else outcome("integer program", program.choice),
        within=None if best_within is None else outcome(formats[best_within[0]].name, best_within),
        above=None if next_above is None else outcome(formats[next_above[0]].name, next_above),
        history=refined.history if refined else (),
        evaluations=mixed.evaluations,
        seed=evolution.seed,
        calibration=(calibration.name, calibration.digest),
        evaluation=(evaluation.name, evaluation.digest),
    )


def _exponential(loss: float) -> float:
    """exp of a loss; infinite where it leaves the range of a float64."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
