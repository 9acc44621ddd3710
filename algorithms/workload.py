"""The matrix products of a model in one phase: what an accelerator is asked to compute.

A product (GEMM) takes ``tokens`` × ``reduction`` activations and an operand of ``outputs`` × ``reduction`` numbers that
the array treats as weights: the weights of a linear layer, or the keys or the values of one key-value head.

* Prefill: every linear layer sees ``context`` × ``batch`` tokens, except the one that produces the logits: an
  inference engine needs those only after the last token of each sequence, so it sees ``batch`` tokens. (The published
  BitMoD model, ``termwise.sim.published``, runs it on all tokens.)
* Decode: one new token for each sequence of the batch; the attention reads ``context`` cached tokens.
* Attention: one product per layer, key-value head and sequence. The query heads that share a key-value head are rows
  of the same product, so keys and values are read once for all of them. The scores that a causal mask removes are
  computed all the same.

Left out, because no multiplication array computes it: embeddings, norms, softmax, rotary embedding, activation
functions, residual additions and biases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.shapes import ModelShape

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Operand = Literal["weight", "key", "value"]


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


def workload(shape: ModelShape, *, phase: Phase, context: int, batch: int) -> tuple[Gemm, ...]:
    """The products of one prefill of ``context`` tokens, or of one decode step, for ``batch`` sequences.

    Linear layers come first, in the order of execution, then keys and values. A shape without attention sizes gives
    no attention products. Raises ``InputError`` for an unknown phase, or a context or batch below 1.
    """
    phase = check_phase(phase)
    check_count("context", context)
    check_count("batch", batch)
    query_tokens = context if phase == "prefill" else 1
    merged: dict[tuple[str, int, int, int], Gemm] = {}
    for linear in shape.linears:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", linear.name)
        tokens = batch if linear.name == shape.head else query_tokens * batch
        key = (name, tokens, linear.inputs, linear.outputs)
        found = merged.get(key)
        if found is None:
            merged[key] = Gemm(
                name=name,
                tokens=tokens,
                reduction=check_count(f"the number of inputs of {linear.name}", linear.inputs),
                outputs=check_count(f"the number of outputs of {linear.name}", linear.outputs),
                operand="weight",
                repeats=1,
            )
        else:
            merged[key] = replace(found, repeats=found.repeats + 1)
    gemms = list(merged.values())
    attention = shape.attention
    if attention is not None:
        if attention.heads % attention.key_value_heads:
            raise InputError(
                f"{shape.name} has {attention.heads} heads and {attention.key_value_heads} key-value heads; "
                "expected a whole number of heads for each key-value head"
            )
        rows = attention.heads // attention.key_value_heads * query_tokens
        repeats = attention.layers * attention.key_value_heads * batch
        gemms += [
            Gemm(
                name="attention.keys",
                tokens=rows,
                reduction=attention.head_size,
                outputs=context,
                operand="key",
                repeats=repeats,
            ),
            Gemm(
                name="attention.values",
                tokens=rows,
                reduction=context,
                outputs=attention.head_size,
                operand="value",
                repeats=repeats,
            ),
        ]
    return tuple(gemms)
