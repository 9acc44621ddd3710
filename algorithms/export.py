"""Quantized models in layouts that other programs read: compressed-tensors (vLLM, transformers) and GGUF (llama.cpp).

Values stay what they are: an export moves codes and scales and computes nothing anew. What a layout cannot express is
refused, with the layer and the reason.

* ``pack-quantized`` of compressed-tensors: formats ``int`` and ``int-asym``, 2 to 8 bits, in groups that divide the
  inputs or per channel, with FP16 scales.
* GGUF: ``int-w4g32`` as Q4_0 (a code is stored plus 8), ``mxfp4`` as MXFP4. Both are blocks of 32 inputs: the scale
  (FP16, or the exponent in 8 bits), then 16 bytes, of which byte i holds code i low and code i + 16 high.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.checkpoints import FLOATING_TYPES, read_json
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.files import directory_written_beside, written_beside
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.models import Linear, Model
from termwise.algorithms.packed_model import SHARD_BYTES, kept_tensors, open_packed, write_surroundings
from termwise.algorithms.quantize import INPUT_SCALES, QuantizedTensor
from termwise.algorithms.tensor_files import StoredTensor, stored_array, write_shards

Packed = Mapping[str, QuantizedTensor]

_BLOCK = 32


def export_compressed_tensors(
    packed: Packed | Path,
    model: Model,
    directory: Path,
    *,
    scale_dtype: Literal["float16", "float32"] = "float16",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write ``model`` with the layers ``packed`` as compressed-tensors' ``pack-quantized`` to a new ``directory``.

    A reader computes (code - zero point) × scale in the dtype of the scales. In ``float16``, which is how they are
    packed, that product is rounded once: the reader's weights are ``dequantize()`` rounded to FP16. With
    ``scale_dtype="float32"`` a product of 9 bits (a code of 8 minus its zero point) and 11 is exact in 24: the weights
    are ``dequantize()``, bit for bit, and the scales take twice the bytes.

    Where a quantized head shares the table of embeddings, both are written, and ``tie_word_embeddings`` is false.
    transformers 5 reads layers with zero points only with ``CompressedTensorsConfig(dequantize=True)``, and layers of
    different formats only without.

    Args:
        packed: quantized layers by name, or the directory of a packed model.
        model: the model that they belong to; its other tensors are copied bit for bit.
        directory: new or empty.
        scale_dtype: of ``weight_scale``.
        shard_bytes: most bytes of data in one file.

    Raises ``InputError`` for a layer that the layout cannot express, a model without config.json or that is another
    one, or where the directory cannot be written.
    """
    layers = _layers(packed, model)
    if model.config is None:
        raise InputError(f"{model.location} has no config.json; expected a model that transformers can run")
    for layer in layers:
        reason = _not_pack_quantized(layer)
        if reason is not None:
            raise InputError(f"layer {layer.name!r} ({layer.format.name}) has no pack-quantized layout: {reason}")
    tensors = [tensor for layer in layers for tensor in _pack_quantized(layer, scale_dtype)]
    changes: dict[str, Any] = {"quantization_config": _compressed_tensors_config(layers, model)}
    tied = [layer for layer in layers if layer.linear.tensor == model.structure.embedding]
    if tied:
        changes["tie_word_embeddings"] = False
    with directory_written_beside(directory) as temporary:
        kept = kept_tensors(model, {layer.name: None for layer in layers})
        if tied:
            table = _embedding_name(model)
            kept = [
                replace(tensor, name=table) if tensor.name == model.structure.embedding else tensor for tensor in kept
            ]
        write_shards(temporary, [*tensors, *kept], {"format": "pt"}, shard_bytes=shard_bytes)
        write_surroundings(model, temporary, changes)


def export_gguf(packed: Packed | Path, model: Model, file: Path) -> tuple[str, ...]:
    """Write ``model`` with the layers ``packed`` as GGUF to ``file``; what the file lacks, one sentence each.

    A Llama gets llama.cpp's names of tensors and hyperparameters, and the rows of its query and key layers in the
    order that llama.cpp's rotary embedding takes (neighbouring features are a pair; in transformers, feature i and
    i + half a head are). Another architecture keeps the names of its checkpoint, and llama.cpp cannot run it. The
    dequantized values are ``dequantize()``, bit for bit. Tensors that are not quantized keep their dtype, vectors are
    FP32. The tokenizer is written where tokenizer.json holds byte-level or byte-fallback BPE.

    Raises ``InputError`` for a layer that GGUF cannot express, for a Llama with scaled rotary embeddings, a model that
    is another one, or where the file cannot be written.
    """
    import gguf

    if file.exists():
        raise InputError(f"{file} exists already; expected a new file")
    layers = _layers(packed, model)
    for layer in layers:
        reason = _not_gguf(layer)
        if reason is not None:
            raise InputError(f"layer {layer.name!r} ({layer.format.name}) has no GGUF layout: {reason}")
    config = model.config or {}
    is_llama = config.get("model_type") in ("llama", "mistral")
    architecture = "llama" if is_llama else str(config.get("model_type", "matrices"))
    notes: list[str] = []
    with written_beside(file) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            writer.add_name(model.name)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            if layers:
                kinds = [layer.format.name for layer in layers]
                only_mx = set(kinds) == {"mxfp4"}
                writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE if only_mx else gguf.LlamaFileType.MOSTLY_Q4_0)
            if is_llama:
                _add_llama_parameters(writer, model)
            else:
                notes.append(f"{architecture} is no architecture that is mapped to llama.cpp's; the names stay")
            notes += _add_tokenizer(writer, model)
            names = _gguf_names(model) if is_llama else lambda name: name
            arrays = list(_gguf_arrays(layers, model, names, is_llama))
            for array in arrays:
                writer.add_tensor_info(array.name, array.shape, np.dtype(array.dtype), array.nbytes, array.kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for array in arrays:
                writer.write_tensor_data(array.values())
        finally:
            writer.close()
    return tuple(notes)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A quantized layer, read from ``packed`` when it is needed, and its place in the model."""

    name: str
    linear: Linear
    format: Format
    parts: tuple[str, ...]
    short_group: int
    tensor: Callable[[], QuantizedTensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.linear.outputs, self.linear.inputs

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return self.format.groups(self.linear.inputs)


def _layers(packed: Packed | Path, model: Model) -> list[_Layer]:
    """The layers of ``packed`` in the order of the model. Raises ``InputError`` where they are not the model's."""
    found = open_packed(packed) if isinstance(packed, Path) else packed
    linears = {linear.name: linear for linear in model.structure.linears}
    layers = []
    for name in found:
        if name not in linears:
            raise unknown_name("layer", name, linears)
    for name, linear in linears.items():
        if name not in found:
            continue
        tensor = found[name]
        if tensor.shape != (linear.outputs, linear.inputs):
            raise InputError(
                f"layer {name!r} is quantized as {list(tensor.shape)}; "
                f"expected {[linear.outputs, linear.inputs]}, as in {model.location}"
            )
        layers.append(
            _Layer(
                name=name,
                linear=linear,
                format=tensor.format,
                parts=tuple(tensor.parts),
                short_group=tensor.short_group,
                tensor=lru_cache(maxsize=1)(lambda name=name: found[name]),
            )
        )
    return layers


def _not_expressible(layer: _Layer) -> str | None:
    """What neither layout has."""
    if layer.format.activation_bits is not None:
        return f"it quantizes activations; expected weights only ({layer.format.weights_only.name})"
    if INPUT_SCALES in layer.parts:
        return "its inputs are scaled, and the layout has no place for the scales; expected none"
    if layer.format.groups_along_outputs:
        return "its groups lie along the outputs; expected groups along the inputs"
    return None


def _not_pack_quantized(layer: _Layer) -> str | None:
    """Why compressed-tensors' pack-quantized cannot hold the layer; None if it can."""
    if layer.format.family not in ("int", "int-asym"):
        return "its codes are no integers; expected int or int-asym"
    if layer.format.family == "int" and layer.format.scale_type != "fp16":
        return f"its scales are {layer.format.scale_type}; expected fp16"
    if layer.short_group:
        return f"groups of {layer.format.group_size} do not divide its {layer.linear.inputs} inputs"
    if layer.linear.transposed:
        return "its module is no torch.nn.Linear"
    return _not_expressible(layer)


def _not_gguf(layer: _Layer) -> str | None:
    """Why neither Q4_0 nor MXFP4 can hold the layer; None if one can."""
    if layer.format.weights_only not in (get_format("int-w4g32"), get_format("mxfp4")):
        return "expected int-w4g32 (Q4_0) or mxfp4 (MXFP4)"
    if layer.short_group:
        return f"blocks of {_BLOCK} do not divide its {layer.linear.inputs} inputs"
    return _not_expressible(layer)


def _embedding_name(model: Model) -> str:
    """The name that the architecture gives to its table of embeddings; a tied checkpoint may use that of the head."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = dict(model.config or {})
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    table = module.get_input_embeddings()
    return next(f"{path}.weight" for path, layer in module.named_modules() if layer is table)


def _pack_quantized(layer: _Layer, scale_dtype: str) -> Iterator[StoredTensor]:
    """``weight_packed``, ``weight_scale``, ``weight_shape`` and, where asymmetric, ``weight_zero_point``."""
    import torch
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    outputs, inputs = layer.shape
    bits, groups = layer.format.weight_bits, layer.groups
    half = 1 << (bits - 1)
    symmetric = layer.format.family == "int"

    def packed_codes() -> NDArray[np.generic]:
        codes = layer.tensor().codes.astype(np.int16)
        # Two's complement, or unsigned below a zero point: both become signed.
        signed = ((codes ^ half) if symmetric else codes) - half
        result: NDArray[np.generic] = pack_to_int32(torch.from_numpy(signed.astype(np.int8)), bits).numpy()
        return result

    def packed_zeros() -> NDArray[np.generic]:
        zeros = layer.tensor().parts["zero_points"].astype(np.int16) - half
        result: NDArray[np.generic] = pack_to_int32(torch.from_numpy(zeros.astype(np.int8)), bits, 0).numpy()
        return result

    name = layer.name
    yield stored_array(f"{name}.weight_packed", "int32", (outputs, math.ceil(inputs * bits / 32)), packed_codes)
    yield stored_array(
        f"{name}.weight_scale",
        scale_dtype,
        (outputs, groups),
        lambda: layer.tensor().parts["scales"].astype(scale_dtype),
    )
    yield stored_array(f"{name}.weight_shape", "int64", (2,), lambda: np.array(layer.shape, dtype=np.int64))
    if not symmetric:
        rows = math.ceil(outputs * bits / 32)
        yield stored_array(f"{name}.weight_zero_point", "int32", (rows, groups), packed_zeros)


def _compressed_tensors_config(layers: Iterable[_Layer], model: Model) -> dict[str, Any]:
    """The ``quantization_config`` in compressed-tensors' schema, made by its own classes."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    by_format: dict[Format, list[str]] = {}
    for layer in layers:
        by_format.setdefault(layer.format, []).append(layer.name)
    quantized = {name for names in by_format.values() for name in names}
    groups = {}
    for number, (format, names) in enumerate(by_format.items()):
        weights = QuantizationArgs(
            num_bits=format.weight_bits,
            type="int",
            symmetric=format.family == "int",
            strategy="channel" if format.group_size is None else "group",
            group_size=format.group_size,
        )
        # One scheme for all linear modules but those to ignore is what other programs expect to see.
        targets = ["Linear"] if len(by_format) == 1 else names
        groups[f"group_{number}"] = QuantizationScheme(targets=targets, weights=weights, format="pack-quantized")
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=[name for name in model.matrix_names if name not in quantized],
    )
    result: dict[str, Any] = config.model_dump(mode="json")
    return result


@dataclass(frozen=True, kw_only=True)
class _Array:
    """A tensor of a GGUF file: ``shape`` and ``dtype`` of the numpy array that ``values`` makes, and its GGML type."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Any
    values: Callable[[], NDArray[np.generic]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _gguf_arrays(
    layers: Iterable[_Layer], model: Model, names: Callable[[str], str], is_llama: bool
) -> Iterator[_Array]:
    """All tensors: the quantized layers, and what the architecture takes beside them."""
    import gguf

    layers = list(layers)
    for layer in layers:
        kind = gguf.GGMLQuantizationType.MXFP4 if layer.format.family == "type" else gguf.GGMLQuantizationType.Q4_0
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        order = _row_order(model, layer.name, layer.linear.outputs) if is_llama else None
        yield _Array(
            name=names(f"{layer.name}.weight"),
            shape=(layer.linear.outputs, layer.groups * block_bytes),
            dtype="uint8",
            kind=kind,
            values=_blocks_of(layer, order),
        )
    quantized = {layer.name: None for layer in layers}
    kept = {tensor.name for tensor in kept_tensors(model, quantized)}
    of_linear = {linear.tensor: linear for linear in model.structure.linears}
    for name in model.structure.parameters or sorted(kept):
        header = model.checkpoint.headers[name]
        if name not in kept or header.dtype not in FLOATING_TYPES:
            continue
        linear = of_linear.get(name)
        transposed = linear is not None and linear.transposed
        module = linear.name if linear is not None else name.removesuffix(".weight")
        order = _row_order(model, module, header.shape[0]) if is_llama else None
        dtype = {"F16": "float16", "BF16": "uint8"}.get(header.dtype, "float32") if len(header.shape) > 1 else "float32"
        shape = header.shape[::-1] if transposed else header.shape
        is_table = is_llama and name == model.structure.embedding
        yield _Array(
            name=names("model.embed_tokens.weight" if is_table else name),
            shape=(*shape[:-1], 2 * shape[-1]) if dtype == "uint8" else shape,
            dtype=dtype,
            kind=gguf.GGMLQuantizationType.BF16 if dtype == "uint8" else None,
            values=_kept_of(model, name, transposed, order, dtype),
        )


def _row_order(model: Model, module: str, rows: int) -> NDArray[np.intp] | None:
    """The order in which llama.cpp takes the rows of a query or key layer (weights and bias); None for others."""
    assert model.structure.attention is not None
    heads = {
        "q_proj": model.structure.attention.heads,
        "k_proj": model.structure.attention.key_value_heads,
    }.get(module.removesuffix(".bias").rpartition(".")[2])
    if heads is None:
        return None
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _blocks_of(layer: _Layer, order: NDArray[np.intp] | None) -> Callable[[], NDArray[np.generic]]:
    def values() -> NDArray[np.generic]:
        tensor = layer.tensor()
        codes = tensor.codes
        if layer.format.family == "int":
            codes = codes ^ np.uint8(8)  # two's complement of 4 bits, plus 8
        scales = np.ascontiguousarray(tensor.parts["scales"])
        scale_bytes = scales.view(np.uint8).reshape(*scales.shape, scales.itemsize)
        pairs = codes.reshape(*scales.shape, 2, _BLOCK // 2)
        nibbles = pairs[..., 0, :] | (pairs[..., 1, :] << np.uint8(4))
        blocks = np.concatenate([scale_bytes, nibbles], axis=-1).reshape(scales.shape[0], -1)
        return blocks if order is None else blocks[order]

    return values


def _kept_of(
    model: Model, name: str, transposed: bool, order: NDArray[np.intp] | None, dtype: str
) -> Callable[[], NDArray[np.generic]]:
    def values() -> NDArray[np.generic]:
        weights: NDArray[Any] = model.checkpoint.read(name, transposed=transposed)
        weights = weights if order is None else weights[order]
        if dtype != "uint8":
            return np.ascontiguousarray(weights.astype(dtype, copy=False))
        upper = np.ascontiguousarray(weights.view(np.uint32) >> 16, dtype=np.uint16)  # bfloat16 that was widened
        return upper.view(np.uint8)

    return values


def _gguf_names(model: Model) -> Callable[[str], str]:
    """llama.cpp's name of a tensor of a Llama."""
    import gguf

    assert model.structure.attention is not None
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.structure.attention.layers)

    def name_of(name: str) -> str:
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        found = found or known.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{model.location}: tensor {name!r} has no name in llama.cpp; expected those of a Llama")
        return str(found)

    return name_of


def _add_llama_parameters(writer: Any, model: Model) -> None:
    """What llama.cpp needs to know of a Llama. Raises ``InputError`` where the rotary embedding is scaled."""
    from transformers import CONFIG_MAPPING

    config = dict(model.config or {})
    configuration = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    rotary = configuration.rope_parameters or {}
    if rotary.get("rope_type", "default") != "default":
        raise InputError(
            f"{model.location}: rotary embeddings of type {rotary['rope_type']!r} are not exported; expected 'default'"
        )
    head = configuration.head_dim or configuration.hidden_size // configuration.num_attention_heads
    writer.add_context_length(configuration.max_position_embeddings)
    writer.add_embedding_length(configuration.hidden_size)
    writer.add_block_count(configuration.num_hidden_layers)
    writer.add_feed_forward_length(configuration.intermediate_size)
    writer.add_head_count(configuration.num_attention_heads)
    writer.add_head_count_kv(configuration.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(configuration.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rotary.get("rope_theta", 10000.0)))
    writer.add_vocab_size(configuration.vocab_size)


def _add_tokenizer(writer: Any, model: Model) -> list[str]:
    """Vocabulary, merges and special tokens from tokenizer.json; or a sentence that says why there are none."""
    import gguf

    path = model.location / "tokenizer.json"
    if not path.is_file():
        return ["no tokenizer: the model has no tokenizer.json"]
    tokenizer = read_json(path)
    description = tokenizer.get("model") or {}
    byte_level = '"ByteLevel"' in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    byte_fallback = bool(description.get("byte_fallback"))
    if description.get("type") != "BPE" or not (byte_level or byte_fallback):
        return [f"no tokenizer: tokenizer.json holds {description.get('type')}, not byte-level or byte-fallback BPE"]
    special = gguf.SpecialVocab(model.location, load_merges=byte_level)
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    pieces = {number: text for text, number in description["vocab"].items()}
    pieces |= {number: entry["content"] for number, entry in added.items()}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(description.get("merges", [])):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    tokens, types, scores = [], [], []
    for number in range(max(int((model.config or {}).get("vocab_size", 0)), max(pieces) + 1)):
        text = pieces.get(number)
        kind = gguf.TokenType.NORMAL
        if text is None:
            kind = gguf.TokenType.UNUSED
        elif text == description.get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
        elif byte_fallback and len(text) == 6 and text.startswith("<0x"):
            kind = gguf.TokenType.BYTE
        tokens.append(f"[PAD{number}]" if text is None else text)
        types.append(kind)
        scores.append(-float(ranks.get(tokens[-1], 0)))  # the earlier merge has the greater score
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not byte_level:
        writer.add_token_scores(scores)
    special.add_to_gguf(writer, quiet=True)
    return []
