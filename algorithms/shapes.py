"""Shapes of models: what a simulator needs to know of a network, without a weight.

A network is described by its *family*, which says what its layers consist of, and by its *sizes*. Both together give
the shape: linear layers under the names that the tensors of its checkpoint on Hugging Face have, tables of embeddings,
biases, norms, attention, and the vector operations between the matrix products. The table of known models holds the
sizes that their configuration files state; ``termwise.algorithms.config_shapes`` reads such a file.

A table of embeddings is looked up and not multiplied; ``lm_head`` is a linear layer even where its weights are those of
the embedding (and then counts once among the parameters).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from termwise.algorithms.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One linear layer: ``outputs`` × ``inputs`` weights (the layout of ``torch.nn.Linear``).

    In a mixture of experts it is one of ``experts`` layers of the same sizes, of which a token passes
    ``experts_per_token``.
    """

    name: str
    outputs: int
    inputs: int
    experts: int = 1
    experts_per_token: int = 1


@dataclass(frozen=True, kw_only=True)
class EmbeddingShape:
    """A table of ``rows`` vectors of ``features`` numbers, one of which is read for every token."""

    name: str
    rows: int
    features: int


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The attention of every decoder or encoder layer: heads, key-value heads, features per head.

    In ``windowed_layers`` of the layers a token reads the keys of the last ``window`` tokens at most. ``softcap``: the
    scores pass a tanh before the softmax (Gemma 2).
    """

    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    window: int | None = None
    windowed_layers: int = 0
    softcap: bool = False


@dataclass(frozen=True, kw_only=True)
class ElementwiseShape:
    """A vector operation on ``elements`` numbers of a token, at ``repeats`` places of the network.

    ``last_token``: needed for the last token of a sequence only, like the logits.
    """

    name: str
    elements: int
    repeats: int
    last_token: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All linear layers in the order of execution, and what surrounds them.

    Attributes:
        name: of the model.
        linears: every linear layer.
        attention: None where it is not known.
        head: name of the linear layer that produces the logits; None where the model has none.
        embeddings: tables of tokens and of learned positions; empty where only linear layers and attention are known.
        tied_head: the head's weights are those of the first table.
        biases: numbers in the biases of all linear layers.
        norm_parameters: numbers in the gains and offsets of all norms.
        elementwise: vector operations without those on scores, which ``attention`` implies.
    """

    name: str
    linears: tuple[LinearShape, ...]
    attention: AttentionShape | None
    head: str | None
    embeddings: tuple[EmbeddingShape, ...] = ()
    tied_head: bool = False
    biases: int = 0
    norm_parameters: int = 0
    elementwise: tuple[ElementwiseShape, ...] = ()

    @property
    def parameters(self) -> int | None:
        """Numbers that a checkpoint holds, shared ones once; None where only the linear layers are known."""
        if not self.embeddings:
            return None
        linears = sum(
            linear.outputs * linear.inputs
            for linear in self.linears
            if not (self.tied_head and linear.name == self.head)
        )
        embeddings = sum(table.rows * table.features for table in self.embeddings)
        return linears + embeddings + self.biases + self.norm_parameters


FamilyName = Literal["llama", "mistral", "qwen2", "phi", "phi3", "gemma2", "opt", "gpt2", "mixtral"]
"""The families by the ``model_type`` of transformers."""

Biased = Literal["query", "output", "up", "down", "head"]
"""The linear layers that may have a bias: query, key and value; attention output; up and gate; down; the logits."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the layers of a family consist of. Names are below the layer; ``*`` stands for an expert's number.

    Attributes:
        prefix: of the layers.
        query_key_value: three matrices, or one fused one.
        output: of the attention.
        up: gate and up, one fused matrix of both, or the first layer of a plain MLP.
        down: the last layer of the MLP.
        gated: the MLP multiplies two branches.
        router: the layer that chooses experts.
        norms: norms in a layer.
        vectors_per_norm: 1 for RMSNorm (a gain), 2 for LayerNorm (a gain and an offset).
        biased: linear layers with a bias.
        tables: names of the tables of tokens and of learned positions.
        position_rows: rows of the table of positions beyond the stated number (OPT: padding).
        rotary: queries and keys are rotated.
        tied: the head shares the embedding unless the configuration says otherwise.
        softcap: scores and logits pass a tanh.
        scaled_embedding: embeddings are multiplied by a number.
    """

    prefix: str = "model.layers"
    query_key_value: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    gated: bool = True
    router: str | None = None
    norms: int = 2
    vectors_per_norm: int = 1
    biased: frozenset[Biased] = frozenset()
    tables: tuple[str, ...] = ("model.embed_tokens",)
    position_rows: int = 0
    rotary: bool = True
    tied: bool = False
    softcap: bool = False
    scaled_embedding: bool = False


FAMILIES: dict[FamilyName, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(biased=frozenset({"query"})),
    "phi": Family(
        output="self_attn.dense",
        up=("mlp.fc1",),
        down="mlp.fc2",
        gated=False,
        norms=1,
        vectors_per_norm=2,
        biased=frozenset({"query", "output", "up", "down", "head"}),
    ),
    "phi3": Family(query_key_value=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    "gemma2": Family(norms=4, tied=True, softcap=True, scaled_embedding=True),
    "opt": Family(
        prefix="model.decoder.layers",
        output="self_attn.out_proj",
        up=("fc1",),
        down="fc2",
        gated=False,
        vectors_per_norm=2,
        biased=frozenset({"query", "output", "up", "down"}),
        tables=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        position_rows=2,
        rotary=False,
        tied=True,
    ),
    "gpt2": Family(
        prefix="transformer.h",
        query_key_value=("attn.c_attn",),
        output="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        gated=False,
        vectors_per_norm=2,
        biased=frozenset({"query", "output", "up", "down"}),
        tables=("transformer.wte", "transformer.wpe"),
        rotary=False,
        tied=True,
    ),
    "mixtral": Family(
        up=("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
        down="block_sparse_moe.experts.*.w2",
        router="block_sparse_moe.gate",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one model of a family: features, numbers of layers and heads, rows of tables.

    None takes what the family has: ``head_size`` hidden / heads, ``rotary_size`` (features of a head that are rotated)
    all of them, ``tied`` and ``biased`` the family's. ``embedding`` is the number of features of the token table where
    that is not ``hidden``, and projections lie between (OPT-350m). ``final_norm`` and ``norm_gains`` are absent in
    unusual members of the OPT family only.
    """

    family: FamilyName
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int
    head_size: int | None = None
    positions: int = 0
    tied: bool | None = None
    window: int | None = None
    windowed_layers: int = 0
    experts: int = 1
    experts_per_token: int = 1
    rotary_size: int | None = None
    biased: frozenset[Biased] | None = None
    embedding: int | None = None
    final_norm: bool = True
    norm_gains: bool = True
    softcap: bool | None = None


def shape_of_sizes(name: str, sizes: Sizes) -> ModelShape:
    """The shape of a model of these sizes. Sizes must be valid: heads divide hidden where no ``head_size`` is given."""
    family = FAMILIES[sizes.family]
    biased = family.biased if sizes.biased is None else sizes.biased
    tied = family.tied if sizes.tied is None else sizes.tied
    softcap = family.softcap if sizes.softcap is None else sizes.softcap
    head_size = sizes.head_size or sizes.hidden // sizes.heads
    embedding = sizes.embedding or sizes.hidden
    in_layer = _layer_linears(family, sizes, head_size)
    linears = [
        LinearShape(
            name=f"{family.prefix}.{layer}.{linear.name}",
            outputs=linear.outputs,
            inputs=linear.inputs,
            experts=linear.experts,
            experts_per_token=linear.experts_per_token,
        )
        for layer in range(sizes.layers)
        for linear, _ in in_layer
    ]
    if embedding != sizes.hidden:
        around = family.prefix.removesuffix("layers")
        linears.insert(0, LinearShape(name=f"{around}project_in", outputs=sizes.hidden, inputs=embedding))
        linears.append(LinearShape(name=f"{around}project_out", outputs=embedding, inputs=sizes.hidden))
    linears.append(LinearShape(name="lm_head", outputs=sizes.vocabulary, inputs=embedding))
    layer_biases = sum(linear.outputs for linear, role in in_layer if role in biased)
    head_biases = sizes.vocabulary if "head" in biased else 0
    norms = family.norms * sizes.layers + sizes.final_norm
    rows = (sizes.vocabulary, sizes.positions + family.position_rows)
    widths = (embedding, sizes.hidden)
    return ModelShape(
        name=name,
        linears=tuple(linears),
        attention=AttentionShape(
            layers=sizes.layers,
            heads=sizes.heads,
            key_value_heads=sizes.key_value_heads,
            head_size=head_size,
            window=sizes.window,
            windowed_layers=sizes.windowed_layers,
            softcap=softcap,
        ),
        head="lm_head",
        embeddings=tuple(
            EmbeddingShape(name=table, rows=count, features=width)
            for table, count, width in zip(family.tables, rows, widths, strict=False)
        ),
        tied_head=tied,
        biases=layer_biases * sizes.layers + head_biases,
        norm_parameters=norms * family.vectors_per_norm * sizes.hidden if sizes.norm_gains else 0,
        elementwise=_elementwise(family, sizes, head_size, layer_biases, head_biases, softcap),
    )


def _layer_linears(family: Family, sizes: Sizes, head_size: int) -> list[tuple[LinearShape, Biased | None]]:
    """The linear layers of one layer under their names below it, and their roles, in the order of execution."""
    hidden, feed_forward = sizes.hidden, sizes.feed_forward
    query, key_value = sizes.heads * head_size, sizes.key_value_heads * head_size
    parts = [query, key_value, key_value]
    if len(family.query_key_value) == 1:
        parts = [sum(parts)]
    found: list[tuple[LinearShape, Biased | None]] = [
        (LinearShape(name=name, outputs=outputs, inputs=hidden), "query")
        for name, outputs in zip(family.query_key_value, parts, strict=True)
    ]
    found.append((LinearShape(name=family.output, outputs=hidden, inputs=query), "output"))
    if family.router is not None:
        found.append((LinearShape(name=family.router, outputs=sizes.experts, inputs=hidden), None))
    branches = 2 if family.gated else 1
    up = branches * feed_forward // len(family.up)
    roles: list[tuple[str, int, int, Biased]] = [(name, up, hidden, "up") for name in family.up]
    roles.append((family.down, hidden, feed_forward, "down"))
    for expert in range(sizes.experts):
        for name, outputs, inputs, role in roles:
            linear = LinearShape(
                name=name.replace("*", str(expert)),
                outputs=outputs,
                inputs=inputs,
                experts=sizes.experts,
                experts_per_token=sizes.experts_per_token,
            )
            found.append((linear, role))
    return found


def _elementwise(
    family: Family, sizes: Sizes, head_size: int, layer_biases: int, head_biases: int, softcap: bool
) -> tuple[ElementwiseShape, ...]:
    """The vector operations of a model, without those on the scores of the attention."""
    layers, hidden = sizes.layers, sizes.hidden
    passed = sizes.feed_forward * sizes.experts_per_token
    rotary_size = head_size if sizes.rotary_size is None else sizes.rotary_size
    rotated = (sizes.heads + sizes.key_value_heads) * rotary_size if family.rotary else 0
    routed = family.router is not None
    operations = [
        ("embedding_scale", hidden if family.scaled_embedding else 0, 1, False),
        ("position_addition", hidden if len(family.tables) > 1 else 0, 1, False),
        ("norm", hidden, family.norms * layers, False),
        ("bias", layer_biases, layers, False),
        ("rotary", rotated, layers, False),
        ("router_softmax", sizes.experts if routed else 0, layers, False),
        ("activation", passed, layers, False),
        ("gate_product", passed if family.gated else 0, layers, False),
        ("expert_sum", hidden * sizes.experts_per_token if routed else 0, layers, False),
        ("residual", hidden, 2 * layers, False),
        ("final_norm", hidden if sizes.final_norm else 0, 1, True),
        ("head_bias", head_biases, 1, True),
        ("logit_softcap", sizes.vocabulary if softcap else 0, 1, True),
    ]
    return tuple(
        ElementwiseShape(name=name, elements=elements, repeats=repeats, last_token=last_token)
        for name, elements, repeats, last_token in operations
        if elements
    )


def _row(
    family: FamilyName,
    layers: int,
    hidden: int,
    heads: int,
    key_value_heads: int,
    feed_forward: int,
    vocabulary: int,
    *,
    head_size: int | None = None,
    positions: int = 0,
    tied: bool | None = None,
    window: int | None = None,
    windowed_layers: int | None = None,
    experts: tuple[int, int] = (1, 1),
    rotary_size: int | None = None,
    embedding: int | None = None,
    final_norm: bool = True,
) -> Sizes:
    """One row of the table: a window is that of all layers unless the row tells; ``experts``: all, per token."""
    if windowed_layers is None:
        windowed_layers = 0 if window is None else layers
    return Sizes(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=key_value_heads,
        feed_forward=feed_forward,
        vocabulary=vocabulary,
        head_size=head_size,
        positions=positions,
        tied=tied,
        window=window,
        windowed_layers=windowed_layers,
        experts=experts[0],
        experts_per_token=experts[1],
        rotary_size=rotary_size,
        embedding=embedding,
        final_norm=final_norm,
    )


# family, layers, hidden, heads, key-value heads, feed-forward, vocabulary; Mistral is v0.1, Phi-3 mini the 4k variant.
_TABLE: dict[str, Sizes] = {
    "opt-125m": _row("opt", 12, 768, 12, 12, 3072, 50272, positions=2048),
    "opt-350m": _row("opt", 24, 1024, 16, 16, 4096, 50272, positions=2048, embedding=512, final_norm=False),
    "opt-1.3b": _row("opt", 24, 2048, 32, 32, 8192, 50272, positions=2048),
    "opt-2.7b": _row("opt", 32, 2560, 32, 32, 10240, 50272, positions=2048),
    "opt-6.7b": _row("opt", 32, 4096, 32, 32, 16384, 50272, positions=2048),
    "opt-13b": _row("opt", 40, 5120, 40, 40, 20480, 50272, positions=2048),
    "opt-30b": _row("opt", 48, 7168, 56, 56, 28672, 50272, positions=2048),
    "opt-66b": _row("opt", 64, 9216, 72, 72, 36864, 50272, positions=2048),
    "phi-2": _row("phi", 32, 2560, 32, 32, 10240, 51200, rotary_size=32),
    "yi-6b": _row("llama", 32, 4096, 32, 4, 11008, 64000),
    "llama-2-7b": _row("llama", 32, 4096, 32, 32, 11008, 32000),
    "llama-2-13b": _row("llama", 40, 5120, 40, 40, 13824, 32000),
    "llama-2-70b": _row("llama", 80, 8192, 64, 8, 28672, 32000),
    "llama-3-8b": _row("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-3-70b": _row("llama", 80, 8192, 64, 8, 28672, 128256),
    "llama-3.1-8b": _row("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-3.1-70b": _row("llama", 80, 8192, 64, 8, 28672, 128256),
    "llama-3.2-1b": _row("llama", 16, 2048, 32, 8, 8192, 128256, tied=True),
    "llama-3.2-3b": _row("llama", 28, 3072, 24, 8, 8192, 128256, tied=True),
    "mistral-7b": _row("mistral", 32, 4096, 32, 8, 14336, 32000, window=4096),
    "mixtral-8x7b": _row("mixtral", 32, 4096, 32, 8, 14336, 32000, experts=(8, 2)),
    "qwen2-0.5b": _row("qwen2", 24, 896, 14, 2, 4864, 151936, tied=True),
    "qwen2-1.5b": _row("qwen2", 28, 1536, 12, 2, 8960, 151936, tied=True),
    "qwen2-7b": _row("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "qwen2.5-0.5b": _row("qwen2", 24, 896, 14, 2, 4864, 151936, tied=True),
    "qwen2.5-1.5b": _row("qwen2", 28, 1536, 12, 2, 8960, 151936, tied=True),
    "qwen2.5-3b": _row("qwen2", 36, 2048, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-7b": _row("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "qwen2.5-14b": _row("qwen2", 48, 5120, 40, 8, 13824, 152064),
    "qwen2.5-32b": _row("qwen2", 64, 5120, 40, 8, 27648, 152064),
    "qwen2.5-72b": _row("qwen2", 80, 8192, 64, 8, 29568, 152064),
    "phi-3-mini": _row("phi3", 32, 3072, 32, 32, 8192, 32064, window=2047),
    "gemma-2-2b": _row("gemma2", 26, 2304, 8, 4, 9216, 256000, head_size=256, window=4096, windowed_layers=13),
    "gemma-2-9b": _row("gemma2", 42, 3584, 16, 8, 14336, 256000, head_size=256, window=4096, windowed_layers=21),
    "gemma-2-27b": _row("gemma2", 46, 4608, 32, 16, 36864, 256000, head_size=128, window=4096, windowed_layers=23),
    "gpt2": _row("gpt2", 12, 768, 12, 12, 3072, 50257, positions=1024),
    "gpt2-medium": _row("gpt2", 24, 1024, 16, 16, 4096, 50257, positions=1024),
    "gpt2-large": _row("gpt2", 36, 1280, 20, 20, 5120, 50257, positions=1024),
    "gpt2-xl": _row("gpt2", 48, 1600, 25, 25, 6400, 50257, positions=1024),
    "tinyllama-1.1b": _row("llama", 22, 2048, 32, 4, 5632, 32000),
}

KNOWN_SHAPES: tuple[str, ...] = tuple(_TABLE)
"""The names that ``known_shape`` accepts."""


def known_shape(name: str) -> ModelShape:
    """The shape of a well-known model by its name (case does not matter), one of ``KNOWN_SHAPES``.

    Raises ``InputError`` for any other name.

    >>> shape = known_shape("llama-2-7b")
    >>> len(shape.linears), shape.linears[6].name, shape.linears[6].outputs, shape.linears[6].inputs
    (225, 'model.layers.0.mlp.down_proj', 4096, 11008)
    >>> shape.parameters
    6738415616
    """
    sizes = _TABLE.get(name.lower())
    if sizes is None:
        raise unknown_name("model", name, KNOWN_SHAPES)
    return shape_of_sizes(name.lower(), sizes)
