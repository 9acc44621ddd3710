"""The shape of a model from the config.json of a Hugging Face directory alone, without weights and without torch.

The keys are those that transformers' configuration classes write. A key that a configuration may leave out takes the
value that transformers takes; a key that decides about sizes is demanded. ``null`` counts as left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from termwise.algorithms.checkpoints import read_json
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.shapes import FAMILIES, Biased, FamilyName, ModelShape, Sizes, shape_of_sizes

MAXIMUM_MLPS = 1 << 18
"""Layers × experts that a configuration may ask for; more is a slip, and would be listed one by one."""


class _Keys:
    """A configuration whose values are checked when they are read; every error names the file and the key."""

    def __init__(self, config: Mapping[str, Any], file: str) -> None:
        self.config = config
        self.file = file

    def has(self, key: str) -> bool:
        return self.config.get(key) is not None

    def error(self, key: str, expected: str) -> InputError:
        return InputError(f"{self.file}: {key!r} is {self.config.get(key)!r}; expected {expected}")

    def count(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1; demanded where there is no default."""
        if not self.has(key):
            if default is None:
                raise InputError(f"{self.file} has no key {key!r}; expected an integer of at least 1")
            return default
        value = self.config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, "an integer of at least 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.config[key] if self.has(key) else default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def fraction(self, key: str, default: float) -> float:
        """A number above 0 and up to 1, at the top or among the ``rope_parameters``, where newer files hold it."""
        rope = self.config.get("rope_parameters")
        keys = self
        if not self.has(key) and isinstance(rope, Mapping):
            keys = _Keys(rope, self.file)
        value = keys.config[key] if keys.has(key) else default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise keys.error(key, "a number above 0 and up to 1")
        return float(value)


def shape_from_config(config: Mapping[str, Any], *, name: str = "model", file: str = "config.json") -> ModelShape:
    """The shape that ``config``, the content of a config.json, describes.

    ``name`` becomes the name of the shape, ``file`` stands in error messages. Raises ``InputError`` for a model type
    outside ``FAMILIES``, a key that is missing, has the wrong type or is zero, and sizes that do not divide.

    >>> config = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
    >>> shape_from_config({**config, "vocab_size": 50257}).parameters
    124439808
    """
    keys = _Keys(config, file)
    if not keys.has("model_type"):
        raise InputError(f"{file} has no key 'model_type'; expected one of {', '.join(FAMILIES)}")
    for family in FAMILIES:
        if config["model_type"] == family:
            return shape_of_sizes(name, _sizes(family, keys))
    raise InputError(f"{file}: {unknown_name('model_type', config['model_type'], FAMILIES)}")


def read_shape(path: Path) -> ModelShape:
    """The shape from a config.json, or from the directory that holds one, and is named after it.

    Raises ``InputError`` as ``shape_from_config`` does, and where the file cannot be read or is not JSON.
    """
    file = path / "config.json" if path.is_dir() else path
    return shape_from_config(read_json(file), name=file.resolve().parent.name, file=str(file))


def _sizes(family: FamilyName, keys: _Keys) -> Sizes:
    names = {
        "opt": ("num_hidden_layers", "hidden_size", "num_attention_heads", "ffn_dim"),
        "gpt2": ("n_layer", "n_embd", "n_head", "n_inner"),
    }.get(family, ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"))
    layers, hidden, heads = (keys.count(key) for key in names[:3])
    experts = keys.count("num_local_experts", 8) if family == "mixtral" else 1
    if layers > MAXIMUM_MLPS:
        raise keys.error(names[0], f"at most {MAXIMUM_MLPS}")
    if layers * experts > MAXIMUM_MLPS:
        raise keys.error("num_local_experts", f"at most {MAXIMUM_MLPS // layers} in each of {layers} layers")
    feed_forward = keys.count(names[3], 4 * hidden if family == "gpt2" else None)
    # Where transformers takes another number than that of the heads, the file must state it.
    stated = family in ("mistral", "qwen2", "gemma2", "mixtral")
    key_value_heads = heads
    if family not in ("opt", "gpt2"):
        key_value_heads = keys.count("num_key_value_heads", None if stated else heads)
    if heads % key_value_heads:
        raise keys.error("num_key_value_heads", f"a divisor of {names[2]!r}, which is {heads}")
    head_size = None
    if family == "gemma2" or (family in ("llama", "mistral", "mixtral", "qwen2", "phi") and keys.has("head_dim")):
        head_size = keys.count("head_dim")
    elif hidden % heads:
        raise keys.error(names[1], f"a multiple of {names[2]!r}, which is {heads}")
    window, windowed_layers = _window(family, keys, layers)
    return Sizes(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=key_value_heads,
        feed_forward=feed_forward,
        vocabulary=keys.count("vocab_size"),
        head_size=head_size,
        positions=_positions(family, keys),
        tied=keys.flag("tie_word_embeddings", FAMILIES[family].tied),
        window=window,
        windowed_layers=windowed_layers,
        biased=_biased(family, keys),
        **_specialties(family, keys, head_size or hidden // heads, hidden),
    )


def _positions(family: FamilyName, keys: _Keys) -> int:
    """Rows of a table of learned positions."""
    if family == "opt":
        return keys.count("max_position_embeddings")
    if family == "gpt2":
        return keys.count("n_positions")
    return 0


def _window(family: FamilyName, keys: _Keys, layers: int) -> tuple[int | None, int]:
    """The sliding window and the number of layers that have it."""
    if family not in ("mistral", "mixtral", "phi3", "gemma2", "qwen2"):
        return None, 0
    if family == "qwen2" and not keys.flag("use_sliding_window", False):
        return None, 0
    absent = "sliding_window" not in keys.config and family in ("mistral", "gemma2")
    if not keys.has("sliding_window") and not absent:
        return None, 0
    window = keys.count("sliding_window", 4096)  # of Mistral and Gemma 2, where the file says nothing
    if keys.has("layer_types"):
        kinds = keys.config["layer_types"]
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise keys.error("layer_types", f"a list of {layers} kinds of attention")
        windowed = kinds.count("sliding_attention")
    elif family == "gemma2":
        windowed = (layers + 1) // 2  # every other layer, the first included
    elif family == "qwen2":
        windowed = max(0, layers - keys.count("max_window_layers", 28))
    else:
        windowed = layers
    return (window, windowed) if windowed else (None, 0)


def _biased(family: FamilyName, keys: _Keys) -> frozenset[Biased]:
    """The linear layers with a bias."""
    if family == "opt" and not keys.flag("enable_bias", True):
        return frozenset()
    biased = set(FAMILIES[family].biased)
    if family == "llama":
        if keys.flag("attention_bias", False):
            biased |= {"query", "output"}
        if keys.flag("mlp_bias", False):
            biased |= {"up", "down"}
    return frozenset(biased)


def _specialties(family: FamilyName, keys: _Keys, head_size: int, hidden: int) -> dict[str, Any]:
    """The sizes that only one family has."""
    if family == "mixtral":
        experts = keys.count("num_local_experts", 8)
        per_token = keys.count("num_experts_per_tok", 2)
        if per_token > experts:
            raise keys.error("num_experts_per_tok", f"at most 'num_local_experts', which is {experts}")
        return {"experts": experts, "experts_per_token": per_token}
    if family == "phi":
        if keys.flag("qk_layernorm", False):
            raise keys.error("qk_layernorm", "false; norms of queries and keys are not described")
        return {"rotary_size": int(head_size * keys.fraction("partial_rotary_factor", 0.5))}
    if family == "phi3":
        return {"rotary_size": int(head_size * keys.fraction("partial_rotary_factor", 1.0))}
    if family == "opt":
        removed = keys.flag("_remove_final_layer_norm", False)
        return {
            "embedding": keys.count("word_embed_proj_dim", hidden),
            "final_norm": keys.flag("do_layer_norm_before", True) and not removed,
            "norm_gains": keys.flag("layer_norm_elementwise_affine", True),
        }
    if family == "gemma2":
        return {"softcap": keys.has("attn_logit_softcapping") or "attn_logit_softcapping" not in keys.config}
    return {}
