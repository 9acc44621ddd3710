"""A quantized KV cache: keys and values in a format, read by the model's own attention as decoding reads them.

A name is ``kv:FORMAT`` for keys and values of one format, or ``kv:keys=FORMAT@AXIS,values=FORMAT@AXIS``. The axis says
along what a group lies: ``token``, the channels of one token in one head share a scale, or ``channel``, neighbouring
tokens of one channel do. Without an axis, values are grouped per token, and so are keys of a format without groups;
keys of a format with groups lie per channel, since keys have outlier channels (KIVI, arXiv 2402.02750).

What a query reads. Keys stand in the cache as the model gives them to its attention, after a rotary embedding. The
cache is written before it is read: query t reads what is there when tokens 0 .. t are written. A group per token is
whole at once. Groups per channel begin at token 0; one of g tokens is quantized when its last token is written and
never changes again, so query t reads tokens 0 .. floor((t + 1) / g) × g - 1 quantized, and the rest, KIVI's residual,
in full precision (counted as FP16). Nothing that a query reads depends on later tokens, and a whole window is evaluated
at once with the scores of both. KIVI differs in two points: it quantizes a group after the query that completes it,
and keeps a residual of values, too.

Every group is quantized by ``quantize`` exactly as weights are, scales included. A row of its matrix is one token of
one head, or one group of one channel, and what a format keeps per row (BitMoD: an FP32 scale) is counted for each.
Formats whose rows depend on each other (OliVe: one normal type per matrix; NVFP4: one FP32 scale; GOBO; ANT without
groups) cannot be written token by token and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.quantize import quantize

Axis = Literal["channel", "token"]

_RESIDUAL_BYTES = 2
_SCORES_AT_ONCE = 1 << 23
_NAME = "termwise_quantized_cache"
_PAIR = re.compile(
    r"keys=(?P<keys>.+?)(?:@(?P<keys_axis>\w*))?,values=(?P<values>.+?)(?:@(?P<values_axis>\w*))?", re.ASCII
)


@dataclass(frozen=True, kw_only=True)
class KeyValueCacheFormat:
    """How keys and values are held. Get one by ``get_cache_format(name)``.

    Attributes:
        keys: format of the keys.
        values: format of the values.
        keys_axis: along what a group of keys lies: ``channel`` or ``token``.
        values_axis: along what a group of values lies.

    Raises ``InputError`` for a format that cannot be written token by token.
    """

    keys: Format
    values: Format
    keys_axis: Axis = "channel"
    values_axis: Axis = "token"

    def __post_init__(self) -> None:
        for what, format, axis in (("keys", self.keys, self.keys_axis), ("values", self.values, self.values_axis)):
            if _rows_depend(format):
                raise InputError(
                    f"KV cache: {format.name} keeps something in common for a whole matrix, and {what} are written "
                    "token by token; expected a format all of whose parts belong to a row, such as int-asym-w4g32"
                )
            if format.activation_bits is not None:
                raise InputError(
                    f"KV cache: {format.name} names a width of activations; expected {format.weights_only.name}"
                )
            if axis == "channel" and format.group_size is None:
                raise InputError(
                    f"KV cache: {what} per channel in {format.name} have no group of tokens; "
                    f"expected one, such as {format.name}g32, or the axis token"
                )

    @property
    def name(self) -> str:
        """The canonical name: ``get_cache_format(format.name) == format``."""
        usual = (self.keys_axis, self.values_axis) == (_usual_keys_axis(self.keys), "token")
        if self.keys == self.values and usual:
            return f"kv:{self.keys.name}"
        return f"kv:keys={self.keys.name}@{self.keys_axis},values={self.values.name}@{self.values_axis}"

    def packed_bytes(self, tokens: int, head_size: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens in one head of one layer, scales and residual included."""
        return _packed_bytes(self.keys, self.keys_axis, tokens, head_size) + _packed_bytes(
            self.values, self.values_axis, tokens, head_size
        )

    def bits_per_value(self, tokens: int, head_size: int) -> float:
        """Bits per cached number when ``tokens`` tokens are cached, counted from the bytes."""
        return 8 * self.packed_bytes(tokens, head_size) / (2 * tokens * head_size)


def get_cache_format(name: str) -> KeyValueCacheFormat:
    """The cache format called ``name`` (see the module). Raises ``InputError`` that says which part is wrong."""
    kind, _, rest = name.partition(":")
    if kind != "kv" or not rest:
        raise InputError(
            f"KV cache {name!r}: expected kv:FORMAT, such as kv:int-asym-w4g32, or kv:keys=FORMAT@channel,"
            "values=FORMAT@token"
        )
    if not rest.startswith("keys="):
        both = get_format(rest)
        return KeyValueCacheFormat(keys=both, values=both, keys_axis=_usual_keys_axis(both))
    match = _PAIR.fullmatch(rest)
    if match is None:
        raise InputError(f"KV cache {name!r}: expected kv:keys=FORMAT@AXIS,values=FORMAT@AXIS")
    keys = get_format(match["keys"])
    return KeyValueCacheFormat(
        keys=keys,
        values=get_format(match["values"]),
        keys_axis=_axis(match["keys_axis"], _usual_keys_axis(keys), name),
        values_axis=_axis(match["values_axis"], "token", name),
    )


def _axis(text: str | None, usual: Axis, name: str) -> Axis:
    """The axis that a name says, ``usual`` where it says none."""
    if text is None:
        return usual
    axes: dict[str, Axis] = {"channel": "channel", "token": "token"}
    if text not in axes:
        raise InputError(f"KV cache {name!r}: a group lies along {text!r}; expected channel or token")
    return axes[text]


def _rows_depend(format: Format) -> bool:
    """Whether what a row of a matrix becomes depends on other rows."""
    return (
        format.family == "gobo"
        or format.type_per_matrix
        or (format.family in ("type", "int") and format.scale_type == "e4m3")
        or (format.family != "fp16" and format.groups_along_outputs)
    )


def _usual_keys_axis(format: Format) -> Axis:
    """Where a name does not say it: per channel, if the format has groups."""
    return "token" if format.group_size is None else "channel"


def _complete(tokens: int, format: Format, axis: Axis) -> int:
    """How many of ``tokens`` written tokens are quantized: all, or those of groups that are complete."""
    if axis == "token":
        return tokens
    assert format.group_size is not None
    return tokens // format.group_size * format.group_size


def _packed_bytes(format: Format, axis: Axis, tokens: int, head_size: int) -> int:
    """Bytes of the keys, or the values, of one head."""
    if axis == "token":
        return format.packed_bytes(tokens, head_size)
    assert format.group_size is not None
    complete = _complete(tokens, format, axis)
    quantized = format.packed_bytes(complete // format.group_size * head_size, format.group_size)
    return quantized + (tokens - complete) * head_size * _RESIDUAL_BYTES


def quantize_states(states: Any, format: Format, axis: Axis) -> Any:
    """Keys or values as they are read once their group is complete; those of an incomplete group as they are.

    ``states`` and the result: torch tensor [sequences, heads, tokens, channels] of one floating-point type, which
    the quantizer reads as float32. Raises ``InputError`` for a NaN or an infinity.
    """
    import torch

    complete = _complete(states.shape[2], format, axis)
    if complete == 0:
        return states
    written = states[:, :, :complete]
    if axis == "channel":
        written = written.unflatten(2, (-1, format.group_size)).transpose(-1, -2)
    rows = written.reshape(-1, written.shape[-1]).float().numpy()
    read = torch.from_numpy(quantize(rows, format, name="the cache").dequantize()).to(states.dtype)
    read = read.view(written.shape)
    if axis == "channel":
        read = read.transpose(-1, -2).flatten(2, 3)
    return torch.cat([read, states[:, :, complete:]], dim=2)


class _Attention:
    """Attention over a quantized cache, and which layers have used it."""

    def __init__(self, format: KeyValueCacheFormat, layers: int, window_tokens: int) -> None:
        self._format, self._layers, self._window_tokens = format, layers, window_tokens
        self._seen: set[int] = set()

    def check_layers(self, name: str) -> None:
        """Raise ``InputError`` unless every layer of the model ``name`` has used this attention."""
        if len(self._seen) != self._layers:
            raise InputError(
                f"KV cache: {len(self._seen)} of the {self._layers} layers of {name} attend through transformers' "
                "attention interface; expected a model all of whose layers do"
            )

    def __call__(
        self,
        module: Any,
        queries: Any,
        keys: Any,
        values: Any,
        mask: Any,
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        """What a layer's attention gives for a window that is read from its first token.

        ``queries`` [sequences, query heads, tokens, channels]; ``keys`` and ``values`` [sequences, heads, tokens,
        channels], where a head serves several query heads; ``mask`` is added to the scores and forbids later tokens.
        Returns [sequences, tokens, query heads, channels].
        """
        import torch

        self._check(module, keys, mask, options)
        self._seen.add(id(module))
        try:
            read_keys = quantize_states(keys, self._format.keys, self._format.keys_axis)
            read_values = quantize_states(values, self._format.values, self._format.values_axis)
        except InputError as error:
            raise TermwiseError(f"keys or values of {type(module).__name__}: {error}") from None
        sequences, query_heads, tokens, channels = queries.shape
        heads = keys.shape[1]
        scaling = channels**-0.5 if scaling is None else scaling
        mask = mask.expand(sequences, query_heads, tokens, tokens).unflatten(1, (heads, -1))
        queries = queries.unflatten(1, (heads, -1))
        output = torch.empty((sequences, tokens, query_heads, values.shape[-1]), dtype=queries.dtype)
        at_once = max(1, _SCORES_AT_ONCE // (query_heads * tokens))
        for sequence in range(sequences):
            for start in range(0, tokens, at_once):
                block = slice(start, min(start + at_once, tokens))
                times = torch.arange(block.start, block.stop)
                key, value = keys[sequence, :, None], values[sequence, :, None]
                query = queries[sequence, :, :, block]
                scores = query @ read_keys[sequence, :, None].transpose(-1, -2)
                if self._format.keys_axis == "channel":
                    complete = _read_quantized(times, tokens, self._format.keys)
                    scores = torch.where(complete, scores, query @ key.transpose(-1, -2))
                probabilities = torch.softmax(scores * scaling + mask[sequence, :, :, block], dim=-1)
                result = probabilities @ read_values[sequence, :, None]
                if self._format.values_axis == "channel":
                    complete = _read_quantized(times, tokens, self._format.values)
                    result = (probabilities * complete) @ read_values[sequence, :, None]
                    result = result + (probabilities * ~complete) @ value
                output[sequence, block] = result.flatten(0, 1).transpose(0, 1)
        return output, None

    def _check(self, module: Any, keys: Any, mask: Any, options: dict[str, Any]) -> None:
        """Raise ``InputError`` for an attention that is more than a softmax over all earlier tokens."""
        kind = type(module).__name__
        window = options.get("sliding_window")
        if window is not None and window < self._window_tokens:
            raise InputError(
                f"KV cache: {kind} forgets tokens after {window} (sliding window), fewer than the "
                f"{self._window_tokens} of an evaluation; expected attention to all earlier tokens"
            )
        for option in ("softcap", "s_aux", "position_bias"):
            if options.get(option) is not None:
                raise InputError(f"KV cache: {kind} uses {option}, which is not implemented; expected plain softmax")
        if mask is None or not mask.is_floating_point() or mask.shape[-2:] != (keys.shape[2], keys.shape[2]):
            raise InputError(f"KV cache: {kind} has no mask of one window; expected causal attention within it")


def _read_quantized(times: Any, tokens: int, format: Format) -> Any:
    """Whether the query at each of ``times`` [queries] reads a token of a group per channel quantized: bool
    [queries, tokens]."""
    import torch

    assert format.group_size is not None
    complete = (times + 1) // format.group_size * format.group_size
    return torch.arange(tokens)[None] < complete[:, None]


_running: ContextVar[_Attention] = ContextVar(_NAME)


def _attend(*arguments: Any, **options: Any) -> Any:
    """What transformers calls: the attention of the model that runs."""
    return _running.get()(*arguments, **options)


@contextmanager
def quantized_cache(module: Any, format: KeyValueCacheFormat, window_tokens: int) -> Iterator[_Attention]:
    """While it is open, every layer of the transformers model ``module`` attends over a cache in ``format``.

    Each call of the model reads windows of at most ``window_tokens`` tokens from their beginning, without a cache of
    its own. Raises ``InputError``, from within the call, for attention that this cannot stand for; the attention that
    it gives says by ``check_layers`` whether all layers used it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    attention = _Attention(format, int(module.config.num_hidden_layers), window_tokens)
    before = module.config._attn_implementation
    token = _running.set(attention)
    module.config._attn_implementation = _NAME
    try:
        yield attention
    finally:
        module.config._attn_implementation = before
        _running.reset(token)
