"""Shapes of models: what a simulator needs to know of a network, without a weight.

The table of known models holds the sizes that their configuration files on Hugging Face state; the lists of linear
layers are derived from it, with the names that the Hugging Face implementations give to their ``torch.nn.Linear``
modules. Embeddings are table look-ups and absent; ``lm_head`` is a linear layer even where its weights are tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from termwise.algorithms.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One linear layer: ``outputs`` × ``inputs`` weights (the layout of ``torch.nn.Linear``)."""

    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The attention of every decoder or encoder layer: heads, key-value heads, features per head."""

    layers: int
    heads: int
    key_value_heads: int
    head_size: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All linear layers in the order of execution, and the attention (None where it is not known).

    ``head`` names the linear layer that produces the logits (None where the model has none).
    """

    name: str
    linears: tuple[LinearShape, ...]
    attention: AttentionShape | None
    head: str | None


_Family = Literal["llama", "opt", "phi"]


@dataclass(frozen=True)
class _Sizes:
    """One row of the table: sizes in features, counts in layers and heads, the vocabulary in rows of ``lm_head``."""

    family: _Family
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


# family, layers, hidden, heads, key-value heads, feed-forward, vocabulary
_TABLE: dict[str, _Sizes] = {
    "opt-125m": _Sizes("opt", 12, 768, 12, 12, 3072, 50272),
    "opt-1.3b": _Sizes("opt", 24, 2048, 32, 32, 8192, 50272),
    "opt-2.7b": _Sizes("opt", 32, 2560, 32, 32, 10240, 50272),
    "opt-6.7b": _Sizes("opt", 32, 4096, 32, 32, 16384, 50272),
    "opt-13b": _Sizes("opt", 40, 5120, 40, 40, 20480, 50272),
    "opt-30b": _Sizes("opt", 48, 7168, 56, 56, 28672, 50272),
    "opt-66b": _Sizes("opt", 64, 9216, 72, 72, 36864, 50272),
    "phi-2": _Sizes("phi", 32, 2560, 32, 32, 10240, 51200),
    "yi-6b": _Sizes("llama", 32, 4096, 32, 4, 11008, 64000),
    "llama-2-7b": _Sizes("llama", 32, 4096, 32, 32, 11008, 32000),
    "llama-2-13b": _Sizes("llama", 40, 5120, 40, 40, 13824, 32000),
    "llama-2-70b": _Sizes("llama", 80, 8192, 64, 8, 28672, 32000),
    "llama-3-8b": _Sizes("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-3-70b": _Sizes("llama", 80, 8192, 64, 8, 28672, 128256),
    "llama-3.2-1b": _Sizes("llama", 16, 2048, 32, 8, 8192, 128256),
    "llama-3.2-3b": _Sizes("llama", 28, 3072, 24, 8, 8192, 128256),
    "mistral-7b": _Sizes("llama", 32, 4096, 32, 8, 14336, 32000),
    "qwen2-0.5b": _Sizes("llama", 24, 896, 14, 2, 4864, 151936),
    "qwen2-1.5b": _Sizes("llama", 28, 1536, 12, 2, 8960, 151936),
    "qwen2-7b": _Sizes("llama", 28, 3584, 28, 4, 18944, 152064),
    "tinyllama-1.1b": _Sizes("llama", 22, 2048, 32, 4, 5632, 32000),
}

KNOWN_SHAPES: tuple[str, ...] = tuple(_TABLE)
"""The names that ``known_shape`` accepts."""


def _layer_linears(sizes: _Sizes) -> list[tuple[str, int, int]]:
    """The linear layers of one decoder layer as (name below the layer, outputs, inputs), in the order of execution."""
    hidden, feed_forward = sizes.hidden, sizes.feed_forward
    key_value = sizes.key_value_heads * sizes.head_size
    output_name = {"llama": "o_proj", "opt": "out_proj", "phi": "dense"}[sizes.family]
    attention = [
        ("self_attn.q_proj", hidden, hidden),
        ("self_attn.k_proj", key_value, hidden),
        ("self_attn.v_proj", key_value, hidden),
        (f"self_attn.{output_name}", hidden, hidden),
    ]
    if sizes.family == "llama":
        return [
            *attention,
            ("mlp.gate_proj", feed_forward, hidden),
            ("mlp.up_proj", feed_forward, hidden),
            ("mlp.down_proj", hidden, feed_forward),
        ]
    block = "mlp." if sizes.family == "phi" else ""
    return [*attention, (f"{block}fc1", feed_forward, hidden), (f"{block}fc2", hidden, feed_forward)]


def known_shape(name: str) -> ModelShape:
    """The shape of a well-known model by its name (case does not matter), one of ``KNOWN_SHAPES``.

    Raises ``InputError`` for any other name.

    >>> shape = known_shape("llama-2-7b")
    >>> len(shape.linears), shape.linears[6]
    (225, LinearShape(name='model.layers.0.mlp.down_proj', outputs=4096, inputs=11008))
    """
    sizes = _TABLE.get(name.lower())
    if sizes is None:
        raise unknown_name("model", name, KNOWN_SHAPES)
    prefix = "model.decoder.layers" if sizes.family == "opt" else "model.layers"
    linears = [
        LinearShape(name=f"{prefix}.{layer}.{suffix}", outputs=outputs, inputs=inputs)
        for layer in range(sizes.layers)
        for suffix, outputs, inputs in _layer_linears(sizes)
    ]
    linears.append(LinearShape(name="lm_head", outputs=sizes.vocabulary, inputs=sizes.hidden))
    attention = AttentionShape(
        layers=sizes.layers,
        heads=sizes.heads,
        key_value_heads=sizes.key_value_heads,
        head_size=sizes.head_size,
    )
    return ModelShape(name=name.lower(), linears=tuple(linears), attention=attention, head="lm_head")
