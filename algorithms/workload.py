"""What a model asks of an accelerator in one phase: matrix products, vector operations, look-ups.

A product (GEMM) takes ``tokens`` × ``reduction`` activations and an operand of ``outputs`` × ``reduction`` numbers that
the array treats as weights: the weights of a linear layer, or the keys or the values of one key-value head.

* Prefill: every linear layer sees ``context`` × ``batch`` tokens, except the one that produces the logits: an
  inference engine needs those only after the last token of each sequence, so it sees ``batch`` tokens. (The published
  BitMoD model, ``termwise.sim.published``, runs it on all tokens.)
* Decode: one new token for each sequence of the batch; the attention reads ``context`` cached tokens. The new token's
  own key and value are not counted.
* Attention: one product per layer, key-value head and sequence. The query heads that share a key-value head are rows
  of the same product, so keys and values are read once for all of them. The scores that a causal mask removes are
  computed all the same.
* Sliding window of W tokens, where the context is longer: in a decode step the attention reads W cached tokens. A
  prefill runs in blocks of W query tokens (the last one may be shorter), each of which multiplies W keys: a query meets
  W of them, whichever they are, and no more keys and values are read than a context of whole blocks has.
* Mixture of experts: see ``touched_experts``. The pairs of a token and an expert spread over the touched experts as
  evenly as whole numbers allow, so an expert that is not touched costs nothing, and the multiplications are exact.
* Vector operations and look-ups in tables of embeddings are lists of their own (``vector_operations``,
  ``table_reads``), which a simulator without the units for them leaves out.

All counts are Python integers and cannot overflow. int64 begins in the compiled kernels of ``termwise.sim``, which take
the sizes of one product and count its cycles and bytes; repeats and sums over products are Python integers again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.shapes import AttentionShape, LinearShape, ModelShape

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Operand = Literal["weight", "key", "value"]
Experts = Literal["expected", "worst"]
EXPERTS: tuple[Experts, ...] = ("expected", "worst")


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """``repeats`` independent products [tokens, reduction] × [outputs, reduction]ᵀ -> [tokens, outputs].

    ``operand`` says what stands in the place of the weights. Layers that differ only in their number share one entry,
    with ``*`` in the place of the number.
    """

    name: str
    tokens: int
    reduction: int
    outputs: int
    operand: Operand
    repeats: int

    @property
    def multiplications(self) -> int:
        """Scalar multiplications of all repeats."""
        return self.tokens * self.reduction * self.outputs * self.repeats


def check_phase(phase: str) -> Phase:
    """``phase`` itself. Raises ``InputError`` where it is neither ``prefill`` nor ``decode``."""
    for accepted in PHASES:
        if phase == accepted:
            return accepted
    raise unknown_name("phase", phase, PHASES)


def check_count(what: str, value: object) -> int:
    """``value`` itself. Raises ``InputError`` where it is not an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{what} is {value!r}; expected an integer of at least 1")
    return value


@dataclass(frozen=True, kw_only=True)
class VectorOperation:
    """``repeats`` times an operation on a vector of ``elements`` numbers, for all tokens and sequences together.

    An element is one number that the operation yields (``expert_sum``: that it takes). How many passes over the vector
    an operation needs, two for a norm for example, is a property of the unit that computes it.
    """

    name: str
    elements: int
    repeats: int

    @property
    def total(self) -> int:
        """Elements of all repeats."""
        return self.elements * self.repeats


@dataclass(frozen=True, kw_only=True)
class TableRead:
    """``rows`` look-ups in a table of embeddings, each of ``features`` numbers; equal tokens are read again."""

    name: str
    rows: int
    features: int

    def read_bytes(self, element_bits: int = 16) -> int:
        """Bytes that all rows take, each row in whole bytes."""
        return self.rows * -(-self.features * element_bits // 8)


def touched_experts(experts: int, experts_per_token: int, tokens: int, rule: Experts) -> int:
    """How many of ``experts`` experts at least one of ``tokens`` tokens passes.

    ``expected``: E × (1 - (1 - k / E)^T) rounded to the nearest integer (a half up), for T tokens that each draw k
    of E experts evenly and independently of each other. ``worst``: min(E, k × T), no expert shared while one is free.
    One token touches k experts under both rules. Raises ``InputError`` for another rule, or k above E.
    """
    check_count("the number of experts", experts)
    check_count("the number of experts per token", experts_per_token)
    check_count("the number of tokens", tokens)
    if experts_per_token > experts:
        raise InputError(f"{experts_per_token} experts per token of {experts}; expected at most all of them")
    if rule not in EXPERTS:
        raise unknown_name("rule for experts", rule, EXPERTS)
    pairs = experts_per_token * tokens
    # From E² pairs on, E × (1 - k / E)^T <= E × exp(-E) < 1 / 2, which rounds to no expert left.
    if rule == "worst" or pairs >= experts * experts:
        return min(experts, pairs)
    untouched = experts * (1 - Fraction(experts_per_token, experts)) ** tokens
    return int(experts - untouched + Fraction(1, 2))


def workload(
    shape: ModelShape, *, phase: Phase, context: int, batch: int, experts: Experts = "expected"
) -> tuple[Gemm, ...]:
    """The products of one prefill of ``context`` tokens, or of one decode step, for ``batch`` sequences.

    Linear layers come first, in the order of execution, then keys and values. A shape without attention sizes gives
    no attention products. ``experts`` is the rule of ``touched_experts``. Raises ``InputError`` for an unknown phase or
    rule, a context or batch below 1, or heads or experts that do not divide.
    """
    phase = check_phase(phase)
    check_count("context", context)
    check_count("batch", batch)
    query_tokens = context if phase == "prefill" else 1
    gemms: list[Gemm] = []
    for (name, linear, is_head), count in _alike(shape).items():
        tokens = batch if is_head else query_tokens * batch
        for rows, repeats in _routed(linear, tokens, count, experts):
            gemms.append(
                Gemm(
                    name=name,
                    tokens=rows,
                    reduction=check_count(f"the number of inputs of {name}", linear.inputs),
                    outputs=check_count(f"the number of outputs of {name}", linear.outputs),
                    operand="weight",
                    repeats=repeats,
                )
            )
    attention = shape.attention
    if attention is not None:
        if attention.heads % attention.key_value_heads:
            raise InputError(
                f"{shape.name} has {attention.heads} heads and {attention.key_value_heads} key-value heads; "
                "expected a whole number of heads for each key-value head"
            )
        for operand in ("key", "value"):
            for queries, keys, repeats in _attention_blocks(attention, phase, context):
                gemms.append(_attention_gemm(attention, operand, queries, keys, repeats * batch))
    return tuple(gemms)


def _alike(shape: ModelShape) -> dict[tuple[str, LinearShape, bool], int]:
    """How many linear layers differ only in the numbers in their names; names with ``*`` in the place of numbers."""
    alike: dict[tuple[str, int, int, int, int, bool], list[LinearShape]] = {}
    for linear in shape.linears:
        sizes = linear.outputs, linear.inputs, linear.experts, linear.experts_per_token
        alike.setdefault((_pattern(linear.name), *sizes, linear.name == shape.head), []).append(linear)
    return {
        (name, replace(layers[0], name=name), is_head): len(layers) for (name, *_, is_head), layers in alike.items()
    }


def layers_alike(shape: ModelShape) -> dict[tuple[str, int, int], tuple[str, ...]]:
    """Names of the linear layers behind the products of ``workload``, by the product's name, outputs and reduction."""
    names: dict[tuple[str, int, int], list[str]] = {}
    for linear in shape.linears:
        names.setdefault((_pattern(linear.name), linear.outputs, linear.inputs), []).append(linear.name)
    return {key: tuple(found) for key, found in names.items()}


@functools.lru_cache(maxsize=1 << 16)
def _pattern(name: str) -> str:
    """A layer's name with ``*`` in the place of numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _routed(linear: LinearShape, tokens: int, count: int, rule: Experts) -> list[tuple[int, int]]:
    """Tokens and repeats of the products of ``count`` layers alike, ``tokens`` of which reach each set of experts."""
    if linear.experts == 1:
        return [(tokens, count)]
    if count % linear.experts:
        raise InputError(
            f"{count} layers {linear.name} are experts of sets of {linear.experts}; expected whole sets of experts"
        )
    touched = touched_experts(linear.experts, linear.experts_per_token, tokens, rule)
    rows, longer = divmod(tokens * linear.experts_per_token, touched)
    sets = count // linear.experts
    parts = [(rows + 1, longer * sets), (rows, (touched - longer) * sets)]
    return [(rows, repeats) for rows, repeats in parts if rows and repeats]


def _attention_blocks(attention: AttentionShape, phase: Phase, context: int) -> Iterator[tuple[int, int, int]]:
    """Query tokens, keys and repeats (in all layers, for one sequence and one key-value head) of the attention."""
    window, windowed = attention.window, attention.windowed_layers
    if window is None or window >= context:
        window, windowed = context, 0
    whole = attention.layers - windowed
    if phase == "decode":
        blocks = [(1, context, whole), (1, window, windowed)]
    else:
        last = context % window
        blocks = [(context, context, whole), (window, window, windowed * (context // window)), (last, window, windowed)]
    for queries, keys, repeats in blocks:
        if queries and repeats:
            yield queries, keys, repeats


def _attention_gemm(
    attention: AttentionShape, operand: Literal["key", "value"], queries: int, keys: int, repeats: int
) -> Gemm:
    sizes = (attention.head_size, keys) if operand == "key" else (keys, attention.head_size)
    return Gemm(
        name=f"attention.{operand}s",
        tokens=attention.heads // attention.key_value_heads * queries,
        reduction=sizes[0],
        outputs=sizes[1],
        operand=operand,
        repeats=repeats * attention.key_value_heads,
    )


def vector_operations(shape: ModelShape, *, phase: Phase, context: int, batch: int) -> tuple[VectorOperation, ...]:
    """The vector operations of one prefill, or one decode step, of ``batch`` sequences; leave some out by name.

    Names: ``embedding_scale``, ``position_addition``, ``norm``, ``bias``, ``rotary``, ``router_softmax``,
    ``activation``, ``gate_product``, ``expert_sum``, ``residual``, ``final_norm``, ``head_bias`` and ``logit_softcap``
    as the family has them (the last three for the last token of each sequence), and on the scores of the attention
    ``attention_softcap`` and ``softmax``. Scores are counted where ``workload`` computes them; scaling them belongs to
    the softmax. A shape of which only linear layers and attention are known has those on the scores alone. Choosing
    experts and the next token is left out. Raises ``InputError`` for an unknown phase, or a context or batch below 1.
    """
    phase = check_phase(phase)
    check_count("context", context)
    check_count("batch", batch)
    tokens = (context if phase == "prefill" else 1) * batch
    found = [
        VectorOperation(
            name=operation.name,
            elements=operation.elements * (batch if operation.last_token else tokens),
            repeats=operation.repeats,
        )
        for operation in shape.elementwise
    ]
    attention = shape.attention
    if attention is not None:
        names = ("attention_softcap", "softmax") if attention.softcap else ("softmax",)
        found += [
            VectorOperation(name=name, elements=attention.heads * queries * keys * batch, repeats=repeats)
            for name in names
            for queries, keys, repeats in _attention_blocks(attention, phase, context)
        ]
    return tuple(found)


def table_reads(shape: ModelShape, *, phase: Phase, context: int, batch: int) -> tuple[TableRead, ...]:
    """The look-ups in tables of embeddings: one row per token of each table.

    Raises ``InputError`` for an unknown phase, or a context or batch below 1.
    """
    phase = check_phase(phase)
    check_count("context", context)
    check_count("batch", batch)
    rows = (context if phase == "prefill" else 1) * batch
    return tuple(TableRead(name=table.name, rows=rows, features=table.features) for table in shape.embeddings)


def cached_numbers(attention: AttentionShape, context: int) -> int:
    """Numbers in the keys and values of ``context`` tokens of one sequence, those that a window has passed left out."""
    check_count("context", context)
    windowed = 0 if attention.window is None else attention.windowed_layers
    tokens = (attention.layers - windowed) * context + windowed * min(context, attention.window or context)
    return 2 * attention.key_value_heads * attention.head_size * tokens


@dataclass(frozen=True, kw_only=True)
class PhaseWork:
    """The work of one prefill, or of one decode step that reads ``context`` cached tokens."""

    phase: Phase
    context: int
    gemms: tuple[Gemm, ...]
    vector_operations: tuple[VectorOperation, ...]
    table_reads: tuple[TableRead, ...]

    @property
    def multiplications(self) -> int:
        """Scalar multiplications of all products."""
        return sum(gemm.multiplications for gemm in self.gemms)

    @property
    def vector_elements(self) -> int:
        """Elements of all vector operations."""
        return sum(operation.total for operation in self.vector_operations)

    @property
    def table_rows(self) -> int:
        """Rows that are read from all tables."""
        return sum(read.rows for read in self.table_reads)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A prefill of ``context`` tokens, then ``steps`` decode steps, each for ``batch`` sequences.

    Step i (from 0) reads ``context + i`` cached tokens and writes one more: the first token comes out of the prefill,
    so ``steps`` + 1 tokens are produced. Totals are exact and take no longer for more steps.
    """

    shape: ModelShape
    context: int
    steps: int
    batch: int
    experts: Experts

    def phases(self) -> Iterator[PhaseWork]:
        """The prefill and each decode step, in order; every step has a context of its own."""
        yield self._work("prefill", self.context)
        for step in range(self.steps):
            yield self._work("decode", self.context + step)

    @property
    def multiplications(self) -> int:
        """Scalar multiplications of all phases."""
        return sum(times * work.multiplications for work, times in self._doubled()) // 2

    @property
    def vector_elements(self) -> int:
        """Elements of the vector operations of all phases."""
        return sum(times * work.vector_elements for work, times in self._doubled()) // 2

    @property
    def table_rows(self) -> int:
        """Rows read from the tables of embeddings in all phases."""
        return sum(times * work.table_rows for work, times in self._doubled()) // 2

    def _doubled(self) -> list[tuple[PhaseWork, int]]:
        """Phases whose work, each times its number, is twice that of all phases.

        The work of a step is affine in its context up to the window and again beyond it, so the steps on one side are
        as much work as their number times the mean of the first and the last.
        """
        found = [(self._work("prefill", self.context), 2)]
        end = self.context + self.steps
        window = self.shape.attention.window if self.shape.attention is not None else None
        turn = end if window is None else min(max(window, self.context), end)
        for first, beyond in ((self.context, turn), (turn, end)):
            if first < beyond:
                found += [(self._work("decode", step), beyond - first) for step in (first, beyond - 1)]
        return found

    def _work(self, phase: Phase, context: int) -> PhaseWork:
        return phase_work(self.shape, phase=phase, context=context, batch=self.batch, experts=self.experts)


def phase_work(
    shape: ModelShape, *, phase: Phase, context: int, batch: int = 1, experts: Experts = "expected"
) -> PhaseWork:
    """Products, vector operations and look-ups of one phase; see ``workload``, which also says what it raises."""
    return PhaseWork(
        phase=phase,
        context=context,
        gemms=workload(shape, phase=phase, context=context, batch=batch, experts=experts),
        vector_operations=vector_operations(shape, phase=phase, context=context, batch=batch),
        table_reads=table_reads(shape, phase=phase, context=context, batch=batch),
    )


def generation(
    shape: ModelShape, *, context: int, steps: int, batch: int = 1, experts: Experts = "expected"
) -> Generation:
    """A prefill of ``context`` tokens and ``steps`` decode steps with a growing cache, for ``batch`` sequences.

    Raises ``InputError`` for a context, batch or number of steps below 1, or an unknown rule for experts.
    """
    check_count("context", context)
    check_count("steps", steps)
    check_count("batch", batch)
    if experts not in EXPERTS:
        raise unknown_name("rule for experts", experts, EXPERTS)
    return Generation(shape=shape, context=context, steps=steps, batch=batch, experts=experts)
