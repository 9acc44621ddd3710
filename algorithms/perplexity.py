"""Perplexity of a causal language model, with its own weights or with others in their place.

Protocol: every document is read on its own. The token that begins a sequence goes before it, where the tokenizer has
one; the tokens are cut into windows of the model's context, at most 2048 tokens, that do not overlap (of a text with
``beginnings_only`` the first window alone counts). In every window each token but the first is predicted. Perplexity
is exp of the mean negative log likelihood of the predicted tokens; bits per byte divides by the bytes of text that
they stand for. transformers' own model code runs in float32 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.models import Model
from termwise.algorithms.text import Text

MAXIMUM_WINDOW = 2048
PADDING = -1
"""What stands behind a window that is shorter than others of its batch; a causal model does not look there."""

_LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A result, with the sums that it was made of. Negative log likelihood is in nats.

    ``per_token`` is infinite where the exponential leaves the range of a float64.
    """

    per_token: float
    bits_per_byte: float
    predicted_tokens: int
    predicted_bytes: int
    negative_log_likelihood: float
    window_tokens: int


class Evaluator:
    """A model in memory, whose linear layers can be replaced between evaluations on one text.

    Raises ``InputError`` when the model cannot be run or the text has no token to predict.
    """

    def __init__(self, model: Model, text: Text) -> None:
        self._name, self._text_name = model.name, text.name
        self._module: Any = model.load()
        self._transposed = {linear.name: linear.transposed for linear in model.structure.linears}
        self._original: dict[str, Any] = {}
        context = getattr(self._module.config, "max_position_embeddings", None)
        self.window_tokens = min(MAXIMUM_WINDOW, context) if isinstance(context, int) else MAXIMUM_WINDOW
        self._windows, self._bytes = text_windows(model, text, self.window_tokens)
        if not self._windows:
            raise InputError(
                f"the text {text.name} has no token that {model.name} could predict; expected a longer one"
            )
        largest = max(int(window.max()) for window in self._windows)
        rows = int(self._module.get_input_embeddings().num_embeddings)
        if largest >= rows:
            raise InputError(
                f"the tokenizer of {model.name} gives token {largest}, and the model has {rows} embeddings; "
                "expected the tokenizer that belongs to the model"
            )

    def replace(self, name: str, weights: NDArray[np.float32]) -> None:
        """Put ``weights``, float32 [outputs, inputs], in the place of linear layer ``name``.

        A head that shares its tensor with the embedding gets one of its own, so the embedding stays as it is.
        """
        import torch

        layer = self._module.get_submodule(name)
        self._original.setdefault(name, layer.weight)
        values = weights.T if self._transposed[name] else weights
        layer.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)), requires_grad=False)

    def restore(self) -> None:
        """Put the model's own weights back."""
        for name, parameter in self._original.items():
            self._module.get_submodule(name).weight = parameter
        self._original.clear()

    def perplexity(self, progress: Callable[[int, int], None] | None = None) -> Perplexity:
        """Perplexity with the weights that are in place; ``progress`` is told tokens done and tokens in all.

        Raises ``TermwiseError`` when the model's output is NaN, as it is with weights that overflow it.
        """
        import torch

        total = sum(window.size for window in self._windows)
        done = predicted = 0
        likelihood = 0.0
        with torch.inference_mode():
            for batch in _batches(self._windows, self._module.config.vocab_size):
                tokens = torch.from_numpy(batch)
                logits = self._module(input_ids=tokens.clamp(min=0), use_cache=False).logits[:, :-1].float()
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none", ignore_index=PADDING
                )
                likelihood += float(losses.double().sum())
                predicted += int((tokens[:, 1:] != PADDING).sum())
                done += int((tokens != PADDING).sum())
                if progress is not None:
                    progress(done, total)
        if math.isnan(likelihood):
            raise TermwiseError(f"the output of {self._name} on {self._text_name} is NaN with the weights in place")
        try:
            per_token = math.exp(likelihood / predicted)
        except OverflowError:
            per_token = math.inf
        return Perplexity(
            per_token=per_token,
            bits_per_byte=likelihood / math.log(2) / self._bytes,
            predicted_tokens=predicted,
            predicted_bytes=self._bytes,
            negative_log_likelihood=likelihood,
            window_tokens=self.window_tokens,
        )


def perplexity(
    model: Model, text: Text, *, replace: Callable[[str, Any], NDArray[np.float32]] | None = None
) -> Perplexity:
    """Perplexity of ``model`` on ``text``; ``replace`` turns each linear layer's weights into those to evaluate.

    ``replace`` takes a name and a matrix, float16 or float32 [outputs, inputs], and returns float32 [outputs, inputs].
    Raises ``InputError`` as ``Evaluator`` does.
    """
    evaluator = Evaluator(model, text)
    if replace is not None:
        for name, weights in model.matrices():
            evaluator.replace(name, replace(name, weights))
    return evaluator.perplexity()


def text_windows(model: Model, text: Text, length: int) -> tuple[list[NDArray[np.int64]], int]:
    """Windows of at least two tokens, [tokens] each, and the bytes of text that their predicted tokens stand for."""
    tokenizer = model.tokenizer()
    begin = [] if tokenizer.begin_of_sequence is None else [tokenizer.begin_of_sequence]
    windows = []
    predicted_bytes = 0
    for document in text.documents:
        encoding = tokenizer.encode(document)
        tokens = np.concatenate([np.array(begin, dtype=np.int64), encoding.tokens])
        ends = np.concatenate([np.zeros(len(begin), dtype=np.int64), encoding.end_bytes])
        for start in range(0, min(len(tokens), length) if text.beginnings_only else len(tokens), length):
            window = tokens[start : start + length]
            if len(window) > 1:
                windows.append(window)
                predicted_bytes += int(ends[start + len(window) - 1] - ends[start])
    return windows, predicted_bytes


def _batches(windows: list[NDArray[np.int64]], vocabulary: int) -> Iterator[NDArray[np.int64]]:
    """Windows of similar length together, [windows, tokens] padded at the end, as many as keep the logits small."""
    ordered = sorted(windows, key=len, reverse=True)
    while ordered:
        longest = len(ordered[0])
        at_once = max(1, _LOGITS_AT_ONCE // (longest * vocabulary))
        batch = np.full((min(at_once, len(ordered)), longest), PADDING, dtype=np.int64)
        for row, window in zip(batch, ordered, strict=False):
            row[: len(window)] = window
        yield batch
        ordered = ordered[len(batch) :]
