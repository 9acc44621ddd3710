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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.kv_cache import KeyValueCacheFormat, get_cache_format, quantized_cache
from termwise.algorithms.loaded_model import LoadedModel
from termwise.algorithms.models import Model, check_vocabulary
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


class Evaluator(LoadedModel):
    """A model in memory, whose linear layers can be replaced between evaluations on one text.

    ``replace`` puts weights in place, and what a layer's input passes through; ``quantize_cache`` does so for keys and
    values; ``restore`` undoes both.

    Raises ``InputError`` when the model cannot be run or the text has no token to predict.
    """

    def __init__(self, model: Model, text: Text) -> None:
        super().__init__(model)
        self._text_name = text.name
        self._cache_format: KeyValueCacheFormat | None = None
        context = getattr(self._module.config, "max_position_embeddings", None)
        self.window_tokens = min(MAXIMUM_WINDOW, context) if isinstance(context, int) else MAXIMUM_WINDOW
        self._windows, self._bytes = text_windows(model, text, self.window_tokens)
        if not self._windows:
            raise InputError(
                f"the text {text.name} has no token that {model.name} could predict; expected a longer one"
            )
        check_vocabulary(model, self._module, self._windows)

    def quantize_cache(self, format: KeyValueCacheFormat | str) -> None:
        """Hold keys and values in ``format``, or in the format of that name, from now on; see ``kv_cache``.

        Raises ``InputError`` for an unknown name, or a model whose attention cannot be told so.
        """
        import torch

        format = get_cache_format(format) if isinstance(format, str) else format
        with torch.inference_mode(), quantized_cache(self._module, format, self.window_tokens) as attention:
            self._forward(torch.zeros((1, 2), dtype=torch.int64))
        attention.check_layers(self._name)
        self._cache_format = format

    def restore(self) -> None:
        """Put the model's own weights back; inputs, keys and values are untouched again."""
        super().restore()
        self._cache_format = None

    def sequences(self) -> list[NDArray[np.int64]]:
        """The text as the model reads it: int64 [tokens] each."""
        return self._windows

    def _output(self, tokens: Any) -> Any:
        return self._module(input_ids=tokens, use_cache=False)

    def perplexity(self, progress: Callable[[int, int], None] | None = None) -> Perplexity:
        """Perplexity with the weights that are in place; ``progress`` is told tokens done and tokens in all.

        Raises ``TermwiseError`` when the model's output is NaN, as it is with weights that overflow it, or when an
        input that is to be quantized never came.
        """
        import torch

        total = sum(window.size for window in self._windows)
        done = predicted = 0
        likelihood = 0.0
        with torch.inference_mode(), self._cache():
            for batch in _batches(self._windows, self._module.config.vocab_size):
                tokens = torch.from_numpy(batch)
                logits = self._forward(tokens.clamp(min=0)).logits[:, :-1].float()
                losses = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none", ignore_index=PADDING
                )
                likelihood += float(losses.double().sum())
                predicted += int((tokens[:, 1:] != PADDING).sum())
                done += int((tokens != PADDING).sum())
                if progress is not None:
                    progress(done, total)
        self._check_inputs()
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

    def _cache(self) -> AbstractContextManager[Any]:
        """Within it, the model's attention reads the cache that ``quantize_cache`` asked for."""
        if self._cache_format is None:
            return nullcontext()
        return quantized_cache(self._module, self._cache_format, self.window_tokens)


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
