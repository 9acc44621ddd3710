"""Models on disk: the linear layers that are quantized and simulated, and what is needed to run them.

A model is one of

* a directory in Hugging Face format: config.json, ``*.safetensors`` (whole or in shards) and a tokenizer;
* a Hugging Face id, ``organisation/name``, fetched by huggingface_hub where there is a network;
* ``tiny``, the small model that ships with the package;
* a llama2.c model file (``.bin``), or a directory that holds one;
* a directory of safetensors files without a config.json: a set of matrices, which has no perplexity.

Linear layers are found by module: the architecture that config.json names is built without memory for its weights, and
every ``torch.nn.Linear`` and every ``Conv1D`` of transformers (GPT-2, which stores [inputs, outputs]) is one. An output
head that shares its tensor with the embedding is a linear layer of its own here, since an accelerator computes it like
the others; the embedding is a table and stays as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms import llama2c
from termwise.algorithms.checkpoints import Checkpoint, SafetensorsCheckpoint, read_json
from termwise.algorithms.config_shapes import shape_from_config
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.shapes import KNOWN_SHAPES, AttentionShape, LinearShape, ModelShape
from termwise.algorithms.tokenization import TOKENIZER_FILES, HuggingFaceTokenizer, Tokenizer, has_tokenizer

Matrix = NDArray[np.float16] | NDArray[np.float32]

TINY = "tiny"
_EMBEDDING = re.compile(r"(^|[._])(wte|wpe|embed\w*|\w*embeddings?)([._]|$)")
_FETCHED = ["*.json", "*.safetensors", *TOKENIZER_FILES]
_NOT_FETCHED = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Where the weights of one linear layer are.

    ``name`` is the path of its module, ``tensor`` the tensor in the checkpoint; ``transposed`` says that the tensor is
    [inputs, outputs].
    """

    name: str
    tensor: str
    transposed: bool
    outputs: int
    inputs: int


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What the architecture says of a checkpoint.

    ``linears`` in the order of execution; ``head`` is the one that makes the logits; ``embedding`` is the tensor of the
    input embedding, which the head may share. ``parameters`` are the tensors that the architecture takes, ``missing``
    those that it needs and the checkpoint lacks. ``causal`` says that the architecture predicts the next token,
    ``encoder`` that it reads a sentence as a whole, with the tokens behind a token as well (BERT).
    """

    linears: tuple[Linear, ...]
    head: str | None
    embedding: str | None
    attention: AttentionShape | None
    parameters: tuple[str, ...]
    missing: tuple[str, ...]
    causal: bool
    encoder: bool
    architecture: str


@dataclass(frozen=True)
class Model:
    """A model on disk. Nothing but headers is read until it is asked for.

    Attributes:
        name: short name: of the directory or file, the Hugging Face id, or ``tiny``.
        location: the directory or file.
        checkpoint: its tensors.
        config: content of config.json; None for a set of matrices.
    """

    name: str
    location: Path
    checkpoint: Checkpoint
    config: dict[str, Any] | None
    sources: tuple[Path, ...] = field(repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of the names and contents of all files: configuration, tokenizer, weights."""
        whole = hashlib.sha256()
        for path in self.sources:
            with path.open("rb") as stream:
                part = hashlib.file_digest(stream, "sha256").hexdigest()
            whole.update(f"{path.name}\0{part}\n".encode())
        return whole.hexdigest()

    @cached_property
    def structure(self) -> Structure:
        """The linear layers and what surrounds them. Raises ``InputError`` where config and checkpoint do not agree."""
        if self.config is None:
            return _set_of_matrices(self.checkpoint, self.location)
        return _architecture(self.checkpoint, self.config, self.location)

    @property
    def matrix_names(self) -> tuple[str, ...]:
        """Names of the linear layers, in the order of ``matrices``."""
        return tuple(linear.name for linear in self.structure.linears)

    @property
    def shape(self) -> ModelShape:
        """Shapes of the linear layers, and the attention where it is known.

        Where config.json alone describes the same linear layers (``termwise.algorithms.config_shapes``), the shape also
        has embeddings, biases, norms, windows and vector operations.
        """
        linears = tuple(
            LinearShape(name=linear.name, outputs=linear.outputs, inputs=linear.inputs)
            for linear in self.structure.linears
        )
        structure = self.structure
        try:
            described = shape_from_config(self.config or {}, name=self.name)
        except InputError:  # a set of matrices, or an architecture that only transformers knows
            described = None
        if described is not None and described.head == structure.head and set(described.linears) == set(linears):
            return replace(described, linears=linears)
        return ModelShape(name=self.name, linears=linears, attention=structure.attention, head=structure.head)

    def matrix(self, name: str) -> Matrix:
        """Weights of one linear layer, float16 or float32 [outputs, inputs]; bfloat16 becomes float32, exactly.

        Raises ``InputError`` for a NaN or infinite weight.
        """
        linear = next(linear for linear in self.structure.linears if linear.name == name)
        return self.checkpoint.read(linear.tensor, transposed=linear.transposed)

    def matrices(self) -> Iterator[tuple[str, Matrix]]:
        """Name and weights of every linear layer, one at a time; see ``matrix``."""
        for name in self.matrix_names:
            yield name, self.matrix(name)

    @property
    def not_runnable_reason(self) -> str | None:
        """Why the model has no perplexity; None if it has one."""
        return self._obstacle(encoder=False)

    @property
    def no_embedding_reason(self) -> str | None:
        """Why the model gives no embeddings of sentences (``termwise.algorithms.embeddings``); None if it does."""
        return self._obstacle(encoder=True)

    def _obstacle(self, *, encoder: bool) -> str | None:
        """Why the model cannot be run as a causal model, or as an encoder; None if it can."""
        if self.config is None:
            return f"{self.name} is a set of matrices without a config.json"
        structure = self.structure
        if structure.missing:
            return _lacking(structure)
        if encoder and not structure.encoder:
            return f"{structure.architecture} is no encoder of sentences"
        if not encoder and not structure.causal:
            return f"{structure.architecture} has no causal language-model head"
        if self._tokenizer_source() is None:
            return f"{self.location} holds no tokenizer"
        return None

    @property
    def runnable(self) -> bool:
        """Whether the model has a perplexity."""
        return self.not_runnable_reason is None

    def _tokenizer_source(self) -> Path | None:
        if isinstance(self.checkpoint, llama2c.Llama2cCheckpoint):
            return llama2c.find_tokenizer(self.checkpoint.files[0], self.checkpoint.config["vocab_size"])
        return self.location if has_tokenizer(self.location) else None

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ``InputError`` where there is none, or it cannot be read."""
        source = self._tokenizer_source()
        if source is None or self.config is None:
            raise InputError(f"{self.location} holds no tokenizer; expected a tokenizer.json beside the weights")
        if isinstance(self.checkpoint, llama2c.Llama2cCheckpoint):
            return llama2c.Llama2cTokenizer.read(source, self.config["vocab_size"])
        return HuggingFaceTokenizer(source, self.config)

    def load(self, *, encoder: bool = False) -> Any:
        """The model as transformers' own module in float32 on the CPU, for evaluation.

        ``encoder``: to embed sentences, rather than to predict tokens. Raises ``InputError`` where it cannot be run.
        """
        obstacle = self._obstacle(encoder=encoder)
        if obstacle is not None:
            raise InputError(f"{self.name} cannot be run: {obstacle}")
        assert self.config is not None
        import torch

        with _quiet_transformers():
            config = _configuration(self.config, self.location)
            # Older checkpoints also hold masks and tables, which the architecture makes itself.
            state = {name: torch.from_numpy(self.checkpoint.read(name)).float() for name in self.structure.parameters}
            module, report = _class_of(config).from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
            )
        if report["missing_keys"]:
            missing = min(report["missing_keys"])
            raise InputError(f"{self.location}: transformers finds no tensor for {missing} in the checkpoint")
        return module.eval()

    def skeleton(self) -> tuple[Any, dict[str, str]]:
        """transformers' own module without memory for its parameters, and the checkpoint's tensor of each of them.

        Parameters are on torch's ``meta`` device and shared ones stay shared; buffers are real. Raises ``InputError``
        where the architecture is unknown, or the checkpoint lacks a tensor that it needs.
        """
        if self.config is None:
            raise InputError(f"{self.name} cannot be run: it is a set of matrices without a config.json")
        if self.structure.missing:
            raise InputError(f"{self.name} cannot be run: {_lacking(self.structure)}")
        module = _build(self.config, self.location, real_buffers=True)
        tensors = {name: tensor for name, tensor in _tensors(module, self.checkpoint).items() if tensor is not None}
        return module.eval(), tensors


def open_model(reference: str | Path) -> Model:
    """The model that ``reference`` names (see the module). Raises ``InputError`` with what was expected."""
    text = str(reference)
    if not text:
        raise InputError("the model has an empty name; expected a directory, a Hugging Face id or 'tiny'")
    path = Path(text).expanduser()
    if text == TINY and not path.is_dir():
        directory = Path(str(files("termwise.algorithms.tiny") / "model"))
        return _open_directory(directory, TINY)
    if path.is_dir():
        return _open_directory(path, path.resolve().name)
    if path.is_file():
        if path.suffix == ".bin" and llama2c.is_model(path):
            return _open_llama2c(path, path.stem)
        raise InputError(f"{path} is a file; expected a directory in Hugging Face format or a llama2.c model (.bin)")
    if text.lower() in KNOWN_SHAPES:
        raise InputError(
            f"{text} is a known shape without weights; expected a directory, a Hugging Face id or 'tiny' "
            "(only 'termwise simulate' takes a shape)"
        )
    if _HUB_ID.fullmatch(text) and not text.startswith("."):
        return _open_directory(_fetch(text), text)
    known = unknown_name("model", text, [TINY, *KNOWN_SHAPES])
    raise InputError(f"{known}; or a directory, or a Hugging Face id (organisation/name)")


def _fetch(name: str) -> Path:
    """The local snapshot of a Hugging Face id, fetched where it is not there yet."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED))
    except Exception as error:  # no network, no such repository, no permission: many kinds of exception
        reason = shorten(str(error), 160, placeholder=" ...")
        raise InputError(
            f"no directory {name!r}, and it could not be fetched as a Hugging Face id: {reason}"
        ) from error


def _open_directory(directory: Path, name: str) -> Model:
    """A directory in Hugging Face format, of matrices, or with one llama2.c file."""
    if not any(directory.glob("*.safetensors*")):
        found = [path for path in sorted(directory.glob("*.bin")) if path.is_file() and llama2c.is_model(path)]
        if len(found) == 1:
            return _open_llama2c(found[0], name)
        if found:
            some = ", ".join(path.name for path in found)
            raise InputError(
                f"{directory} holds {len(found)} llama2.c models ({some}); expected the path of one of them"
            )
    config_file = directory / "config.json"
    if not config_file.is_file():
        checkpoint = SafetensorsCheckpoint(directory)
        return Model(name, directory, checkpoint, None, checkpoint.files)
    checkpoint = SafetensorsCheckpoint(directory)
    config = read_json(config_file)
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise InputError(f"{config_file} says that the model is quantized already ({method}); expected plain weights")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{config_file} has no key 'model_type'; expected the configuration of a transformers model")
    sources = [config_file, *(directory / file for file in TOKENIZER_FILES if (directory / file).is_file())]
    return Model(name, directory, checkpoint, config, (*sources, *checkpoint.files))


def _open_llama2c(file: Path, name: str) -> Model:
    checkpoint = llama2c.Llama2cCheckpoint(file)
    tokenizer = llama2c.find_tokenizer(file, checkpoint.config["vocab_size"])
    return Model(name, file, checkpoint, checkpoint.config, (file, *([tokenizer] if tokenizer else [])))


def _set_of_matrices(checkpoint: Checkpoint, location: Path) -> Structure:
    """Every matrix called ``*.weight`` that is no table of embeddings, in the natural order of the names."""
    names = [
        name
        for name, header in checkpoint.headers.items()
        if len(header.shape) == 2 and name.endswith(".weight") and not _EMBEDDING.search(name)
    ]
    if not names:
        raise InputError(f"{location} holds no matrix *.weight that is no embedding; expected linear layers")
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    linears = []
    for name in names:
        outputs, inputs = checkpoint.headers[name].shape
        module = name.removesuffix(".weight")
        linears.append(Linear(name=module, tensor=name, transposed=False, outputs=outputs, inputs=inputs))
    return Structure(
        linears=tuple(linears),
        head=None,
        embedding=None,
        attention=None,
        parameters=(),
        missing=(),
        causal=False,
        encoder=False,
        architecture="a set of matrices",
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers without its messages and progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _configuration(config: Mapping[str, Any], location: Path) -> Any:
    """transformers' configuration object. Raises ``InputError`` for a model type or values that it does not know."""
    from transformers import CONFIG_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise InputError(f"{location}: model_type {model_type!r} is not one that transformers knows")
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(config))
    except Exception as error:  # validation errors of several kinds
        reason = shorten(str(error), 200, placeholder=" ...")
        raise InputError(f"{location}: config.json does not describe a {model_type} model: {reason}") from error


def _class_of(configuration: Any) -> Any:
    """The transformers class of a configuration: the architecture it names, otherwise the causal or base model."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for name in configuration.architectures or []:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    model_type = configuration.model_type
    masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    name = None if masked else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    name = name or auto.MODEL_MAPPING_NAMES.get(model_type)
    if not isinstance(name, str):
        raise InputError(f"model_type {model_type!r} has no model class in transformers; expected a language model")
    return getattr(transformers, name)


def check_vocabulary(model: Model, module: Any, windows: Iterable[NDArray[np.int64]]) -> None:
    """Raise ``InputError`` if ``windows`` hold a token of which ``module``, the model in memory, has no embedding."""
    largest = max((int(window.max(initial=0)) for window in windows), default=0)
    rows = int(module.get_input_embeddings().num_embeddings)
    if largest >= rows:
        raise InputError(
            f"the tokenizer of {model.name} gives token {largest}, and the model has {rows} embeddings; "
            "expected the tokenizer that belongs to the model"
        )


def _lacking(structure: Structure) -> str:
    """Which tensors the checkpoint lacks, for a message."""
    some = ", ".join(structure.missing[:3]) + (", ..." if len(structure.missing) > 3 else "")
    return f"the checkpoint lacks {len(structure.missing)} tensors of {structure.architecture}: {some}"


def _build(config: Mapping[str, Any], location: Path, *, real_buffers: bool) -> Any:
    """The module that ``config`` names, its parameters on torch's meta device; its buffers as well, or real ones."""
    import torch

    with _quiet_transformers():
        configuration = _configuration(config, location)
        kind = _class_of(configuration)
        try:
            with _parameters_on_meta() if real_buffers else torch.device("meta"):
                module = kind(configuration)
                module.tie_weights()
        except InputError:
            raise
        except Exception as error:  # sizes that do not fit together, missing packages
            reason = shorten(str(error), 200, placeholder=" ...")
            raise InputError(f"{location}: no {kind.__name__} can be built from config.json: {reason}") from error
    return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that a module registers lose their memory at once; a parameter that is shared stays the same."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def without_memory(_module: Any, _name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta:
            return None  # keep it as it is
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_memory)
    try:
        yield
    finally:
        handle.remove()


def _tensors(module: Any, checkpoint: Checkpoint) -> dict[str, str | None]:
    """The tensor of every parameter of ``module``, None where the checkpoint lacks it."""
    aliases: dict[int, list[str]] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    return {
        name: _tensor_of(aliases[id(parameter)], name, module.base_model_prefix, checkpoint)
        for name, parameter in parameters.items()
    }


def _architecture(checkpoint: Checkpoint, config: Mapping[str, Any], location: Path) -> Structure:
    """The structure of the architecture that ``config`` names, mapped to the tensors of ``checkpoint``."""
    import torch
    from transformers.models.auto import modeling_auto as auto
    from transformers.pytorch_utils import Conv1D

    module = _build(config, location, real_buffers=False)
    configuration, kind = module.config, type(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    experts = next((name for name, parameter in parameters.items() if parameter.ndim == 3 and "expert" in name), None)
    if experts is not None:
        raise InputError(
            f"{location}: {experts} of {kind.__name__} holds several matrices in one parameter (a mixture of experts); "
            "expected linear layers of their own"
        )
    tensors: dict[str, str] = {}
    missing = []
    for name, found in _tensors(module, checkpoint).items():
        if found is None:
            missing.append(name)
            continue
        tensors[name] = found
        stored, expected = checkpoint.headers[found].shape, tuple(parameters[name].shape)
        if stored != expected:
            raise InputError(
                f"{checkpoint.headers[found].file}: tensor {found!r} has the shape {list(stored)}; "
                f"expected {list(expected)} from config.json"
            )
    linears = []
    for name, layer in module.named_modules():
        if not isinstance(layer, (torch.nn.Linear, Conv1D)) or f"{name}.weight" not in tensors:
            continue
        transposed = isinstance(layer, Conv1D)
        sizes = tuple(layer.weight.shape)
        outputs, inputs = sizes[::-1] if transposed else sizes
        linears.append(
            Linear(
                name=name,
                tensor=tensors[f"{name}.weight"],
                transposed=transposed,
                outputs=outputs,
                inputs=inputs,
            )
        )
    if not linears:  # the names are not those of the architecture
        matrices = _set_of_matrices(checkpoint, location)
        return replace(matrices, missing=tuple(missing), architecture=kind.__name__)
    _check_layers(checkpoint, set(tensors.values()), location)
    paths = {id(layer): name for name, layer in module.named_modules()}
    embedding = paths.get(id(module.get_input_embeddings()))
    head = paths.get(id(module.get_output_embeddings()))
    return Structure(
        linears=tuple(linears),
        head=head if any(linear.name == head for linear in linears) else None,
        embedding=tensors.get(f"{embedding}.weight"),
        attention=_attention(configuration),
        parameters=tuple(dict.fromkeys(tensors.values())),
        missing=tuple(missing),
        causal=kind.__name__ in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        and configuration.model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        encoder=configuration.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(configuration, "is_encoder_decoder", False),
        architecture=kind.__name__,
    )


def _tensor_of(aliases: list[str], name: str, prefix: str, checkpoint: Checkpoint) -> str | None:
    """The tensor of parameter ``name``: itself or one that it shares its values with, with or without the prefix."""
    for alias in (name, *aliases):
        for candidate in (alias, alias.removeprefix(f"{prefix}."), f"{prefix}.{alias}"):
            if candidate in checkpoint.headers:
                return candidate
    return None


def _check_layers(checkpoint: Checkpoint, used: set[str], location: Path) -> None:
    """Raise ``InputError`` if the checkpoint has a further layer of a kind that the architecture has fewer of."""
    kinds = {re.sub(r"\d+", "#", name) for name in used}
    for name, header in checkpoint.headers.items():
        kind = re.sub(r"\d+", "#", name)
        if name not in used and kind in kinds and len(header.shape) == 2:
            raise InputError(f"{location}: config.json has too few layers for the tensor {name!r} of the checkpoint")


def _attention(configuration: Any) -> AttentionShape | None:
    """The attention that a configuration describes, None where it has no heads, or more than one kind of attention.

    Decoders that attend to an encoder, latent attention, and heads shared by another rule than ``num_key_value_heads``
    are of such kinds.
    """
    if getattr(configuration, "is_encoder_decoder", False):
        return None
    if any(hasattr(configuration, key) for key in ("kv_lora_rank", "multi_query")):
        return None
    heads = getattr(configuration, "num_attention_heads", None)
    layers = getattr(configuration, "num_hidden_layers", None)
    hidden = getattr(configuration, "hidden_size", None)
    if not (isinstance(heads, int) and isinstance(layers, int) and isinstance(hidden, int)):
        return None
    return AttentionShape(
        layers=layers,
        heads=heads,
        key_value_heads=getattr(configuration, "num_key_value_heads", None) or heads,
        head_size=getattr(configuration, "head_dim", None) or hidden // heads,
    )
