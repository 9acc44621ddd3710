"""A quantized model on disk: safetensors beside a config.json with a ``quantization_config``.

``model.safetensors``, or shards and their index, hold for every quantized layer the packed arrays of its format as
``<module>.weight.<part>`` (see ``Format.layout``; and ``input_scales`` where a calibration scaled the inputs), and
every other tensor of the checkpoint bit for bit as it was. ``quantization_config`` has the keys

* ``quant_method``: ``termwise``; ``version``: 2;
* ``layers``: per quantized layer its ``format`` and its ``shape`` [outputs, inputs]; formats may differ;
* ``datatypes``: definitions of data types that do not ship with termwise, by name (see ``user_datatypes``);
* ``settings``: how the layers were quantized, text by name.

The metadata of every safetensors file repeats it, so that a set of matrices needs no config.json. Tokenizer files are
copied.

``PackedModelWriter`` writes one layer at a time and goes on where an earlier run was interrupted, also by ``kill -9``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise import __version__
from termwise.algorithms.checkpoints import (
    SafetensorsCheckpoint,
    TensorHeader,
    open_safetensors,
    read_headers,
    read_json,
)
from termwise.algorithms.datatypes import add_datatype
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.files import input_error_on_failure, write_text, written_beside
from termwise.algorithms.formats import FREE, Format, get_format
from termwise.algorithms.models import Model
from termwise.algorithms.packing import unpack
from termwise.algorithms.quantize import INPUT_SCALES, QuantizedTensor
from termwise.algorithms.tensor_files import DTYPE_NAMES, StoredTensor, stored_array, stored_tensors, write_shards
from termwise.algorithms.tokenization import TOKENIZER_FILES
from termwise.algorithms.user_datatypes import datatype_from, definitions_of

METHOD = "termwise"
VERSION = 2
SHARD_BYTES = 4_000_000_000
"""Data in one file of a finished model: below the limit of 4 GiB that some file systems have."""

_CONFIG_KEY = "quantization_config"
_WRITTEN_BY = "the output of 'termwise quantize --out'"
_MANIFEST = "manifest.json"
_OUTPUT_ERROR = "output_error"
_SAMPLES, _SAMPLE_BYTES = 1024, 64 << 10
_LARGEST_E4M3 = 0x7E


class PackedModelWriter:
    """Writes a quantized model layer by layer to a new directory, which appears whole or not at all.

        with PackedModelWriter(model, format, directory) as writer:
            for name in model.matrix_names:
                if writer.done(name) is None:
                    writer.add(name, quantize(model.matrix(name), format))
            writer.finish()

    One layer is in memory at a time. Until ``finish``, finished layers lie in ``<directory>.partial``, one file each,
    with a manifest. A run that is interrupted, however, loses the layer it was at; the next run with the same model,
    formats, data types and settings finds the others (``done``). It takes the disk space of the packed layers twice
    while ``finish`` puts them together.

    The model counts as the same when names, sizes and times of the last change of its files are the same, and the
    SHA-256 of a sample: 1024 pieces of 64 KiB evenly spaced over each file, all of it up to 64 MiB. To hash all bytes
    would take as long as reading the whole model; whoever writes other weights changes the time, and training changes
    every piece. The version of termwise must be the same too, since a quantizer may change with it.

    Args:
        model: where the layers, and all that is kept, come from.
        formats: of every linear layer, or by name of layer; layers without one are copied as they are.
        directory: new or empty.
        settings: what else the packed layers depend on (method, calibration text, seed, ...), as text by name.
        datatypes: definitions of further data types of the user, by name; those that the formats name are always kept.
        restart: drop what an earlier run left, whatever its settings.
        shard_bytes: most bytes of data in one file.

    Raises ``InputError`` when ``directory`` holds something, the partial directory holds work with other settings (it
    says which), another process is at it, or a name in ``formats`` is no layer.
    """

    def __init__(
        self,
        model: Model,
        formats: Mapping[str, Format] | Format,
        directory: Path,
        settings: Mapping[str, str] | None = None,
        datatypes: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        restart: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        names = model.matrix_names
        if isinstance(formats, Format):
            formats = dict.fromkeys(names, formats)
        for name in formats:
            if name not in names:
                raise unknown_name("layer", name, names)
        self._model = model
        self._directory = directory
        self._partial = directory.with_name(f"{directory.name}.partial")
        self._shard_bytes = shard_bytes
        self._shapes = {
            linear.name: (linear.outputs, linear.inputs) for linear in model.structure.linears if linear.name in formats
        }
        self._formats = {name: formats[name] for name in self._shapes}
        self._description = describe(self._formats, self._shapes, settings or {}, datatypes or {})
        self._kept = kept_tensors(model, self._formats)
        self._lock: Any = None
        self._begun_here = self._writing = False
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory} exists already; expected a new or empty directory")
        self._open_partial(restart)

    def _open_partial(self, restart: bool) -> None:
        """Lock the partial directory and see that what it holds belongs to this run."""
        with input_error_on_failure(self._partial):
            self._partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self._partial / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise InputError(f"another process is writing {self._partial}; expected one at a time") from None
        try:
            identity = {"termwise": __version__, "model": _model_identity(self._model), **self._description}
            manifest = self._partial / _MANIFEST
            if restart:
                self._drop_layers()
                manifest.unlink(missing_ok=True)
            if manifest.is_file():
                difference = _difference(read_json(manifest), json.loads(json.dumps(identity)))
                if difference is not None:
                    raise InputError(
                        f"{self._partial} holds unfinished work of another kind: {difference}; "
                        "expected the same settings, or that you remove it to start over"
                    )
            else:
                self._drop_layers()  # whatever is there has no manifest, so nobody knows what it is
                self._begun_here = True
                write_text(manifest, json.dumps(identity, indent=2) + "\n")
        except BaseException:
            self._lock.close()
            raise

    def _drop_layers(self) -> None:
        for file in self._partial.glob("layer-*.safetensors"):
            file.unlink()

    def __enter__(self) -> PackedModelWriter:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Let the partial directory go; remove it where it holds no layer, or none that could be used again.

        The latter are those of a run that bad input ended: no run goes on with a model that has to be changed first.
        They stay where an earlier run left them, or where they could not be written (a full disk).
        """
        self._lock.close()
        useless = isinstance(error, InputError) and self._begun_here and not self._writing
        if self._partial.is_dir() and (useless or not any(self._partial.glob("layer-*.safetensors"))):
            shutil.rmtree(self._partial, ignore_errors=True)

    def _layer_file(self, name: str) -> Path:
        """Where a finished layer lies; its name need not be fit for a file."""
        if name not in self._formats:
            raise unknown_name("layer", name, self._formats)
        return self._partial / f"layer-{list(self._formats).index(name):05d}.safetensors"

    def done(self, name: str) -> QuantizedTensor | None:
        """The layer ``name`` where it is finished, of this run or of an earlier one; otherwise None.

        Raises ``InputError`` where its file is damaged.
        """
        file = self._layer_file(name)
        if not file.is_file():
            return None
        headers = {header.name: header for header in read_headers(file, open_safetensors(file))}
        format, shape = self._stored_format(name), self._shapes[name]
        _check_parts(name, format, shape, headers, file)
        return _read_layer(name, format, shape, headers)

    def _stored_format(self, name: str) -> Format:
        """The format that a finished layer has: the one that was asked for, or its twin in the other direction."""
        return get_format(self._metadata(name).get("format", self._formats[name].name))

    def output_error(self, name: str) -> float | None:
        """The output error that the finished layer ``name`` was added with. Raises ``InputError`` as ``done``."""
        error = self._metadata(name).get(_OUTPUT_ERROR)
        return None if error is None else float.fromhex(error)

    def _metadata(self, name: str) -> dict[str, str]:
        return open_safetensors(self._layer_file(name)).metadata() or {}

    def add(self, name: str, tensor: QuantizedTensor, output_error: float | None = None) -> None:
        """Keep the finished layer ``name``: it is on the disk when this returns.

        Its groups may lie in the other direction than its format says, as AdaDim chooses. ``output_error``, where it
        was measured, is kept until the model is finished: whoever goes on cannot measure it again.

        Raises ``InputError`` when ``tensor`` has another format or shape than the layer, or cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        file = self._layer_file(name)
        format, shape = self._formats[name], self._shapes[name]
        if (tensor.format.along_inputs, tensor.shape) != (format.along_inputs, shape):
            raise InputError(
                f"layer {name!r}: got {tensor.format.name} {list(tensor.shape)}; expected {format.name} {list(shape)}"
            )
        arrays = {f"{name}.weight.{part}": np.ascontiguousarray(values) for part, values in tensor.parts.items()}
        headers = {
            key: TensorHeader(name=key, file=file, shape=values.shape, dtype=DTYPE_NAMES[values.dtype.name])
            for key, values in arrays.items()
        }
        _check_parts(name, tensor.format, shape, headers, file)
        metadata = {"format": tensor.format.name}
        if output_error is not None:
            metadata[_OUTPUT_ERROR] = float(output_error).hex()
        self._writing = True
        with written_beside(file) as temporary:
            try:
                save_file(arrays, temporary, metadata=metadata)
            except SafetensorError as error:  # the library's own kind, also for a full disk
                raise InputError(f"cannot write {file}: {error}; expected a writable place with free space") from error
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        self._writing = False

    def finish(self) -> None:
        """Put the layers, the kept tensors, config.json and the tokenizer together in the directory.

        Raises ``InputError`` when that cannot be written (the layers stay), ``ValueError`` while a layer is missing.
        """
        self._writing = True
        layers: list[StoredTensor] = []
        for name in self._formats:
            file = self._layer_file(name)
            if not file.is_file():
                raise ValueError(f"layer {name!r} has not been added")
            layers += stored_tensors(file).values()
        finished = self._partial / "finished"
        with input_error_on_failure(self._directory):
            shutil.rmtree(finished, ignore_errors=True)
            finished.mkdir()
            description = json.loads(json.dumps(self._description))
            for name, layer in description["layers"].items():
                layer["format"] = self._stored_format(name).name
            metadata = {_CONFIG_KEY: json.dumps(description)}
            write_shards(finished, [*layers, *self._kept], metadata, shard_bytes=self._shard_bytes)
            write_surroundings(self._model, finished, {_CONFIG_KEY: description})
            finished.replace(self._directory)
            shutil.rmtree(self._partial)
        self._writing = False


def describe(
    formats: Mapping[str, Format],
    shapes: Mapping[str, tuple[int, int]],
    settings: Mapping[str, str],
    datatypes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The ``quantization_config`` of layers with these formats and shapes (see the module)."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "layers": {name: {"format": formats[name].name, "shape": list(shapes[name])} for name in formats},
        "datatypes": {
            **{name: dict(definition) for name, definition in datatypes.items()},
            **definitions_of(formats.values()),
        },
        "settings": dict(settings),
    }


def kept_tensors(model: Model, quantized: Mapping[str, object]) -> list[StoredTensor]:
    """The tensors of the checkpoint that are not the weights of a layer in ``quantized``, bit for bit as they are.

    The table of embeddings is kept, also where a quantized head shares it. Tensors of a llama2.c file are FP32.
    Raises ``InputError`` for a tensor whose name is taken by a part of a quantized layer.
    """
    linears = model.structure.linears
    replaced = {linear.tensor for linear in linears if linear.name in quantized}
    replaced -= {linear.tensor for linear in linears if linear.name not in quantized}
    replaced.discard(model.structure.embedding or "")
    kept: list[StoredTensor] = []
    if isinstance(model.checkpoint, SafetensorsCheckpoint):
        for file in model.checkpoint.files:
            kept += (tensor for name, tensor in stored_tensors(file).items() if name not in replaced)
    else:
        for name, header in model.checkpoint.headers.items():
            if name not in replaced:
                kept.append(stored_array(name, "float32", header.shape, _reader(model, name)))
    for tensor in kept:
        module, weight, part = tensor.name.rpartition(".weight.")
        if weight and part and module in quantized:
            raise InputError(f"{model.location}: tensor {tensor.name!r} has the name of a part of layer {module!r}")
    return kept


def _reader(model: Model, name: str) -> Any:
    return lambda: model.checkpoint.read(name)


def write_surroundings(model: Model, directory: Path, changes: Mapping[str, Any]) -> None:
    """Write the model's config.json with ``changes`` (where it has one) and its tokenizer to ``directory``."""
    if model.config is not None:
        text = json.dumps({**model.config, **changes}, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if model.location.is_dir() and (model.location / name).is_file():
            shutil.copyfile(model.location / name, directory / name)


def _model_identity(model: Model) -> dict[str, Any]:
    """What tells the model from another one; see ``PackedModelWriter``."""
    identity = {}
    for path in model.sources:
        status = path.stat()
        with path.open("rb") as stream:
            identity[path.name] = {
                "bytes": status.st_size,
                "changed_ns": status.st_mtime_ns,
                "sample_sha256": _sample_digest(stream, status.st_size),
            }
    return identity


def _sample_digest(stream: Any, size: int) -> str:
    """SHA-256 of evenly spaced pieces of a file of ``size`` bytes, the first and the last among them."""
    digest = hashlib.sha256()
    if size <= _SAMPLES * _SAMPLE_BYTES:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    else:
        for number in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """In words, the first difference between two manifests; None without one."""
    for key, value in here.items():
        other = there.get(key)
        if other == value:
            continue
        if key == "model":
            return "the files of the model are others or were changed since"
        if isinstance(other, dict) and isinstance(value, dict):
            name = next(name for name in [*value, *other] if value.get(name) != other.get(name))
            return f"{key} {name!r} is {json.dumps(other.get(name))} there and {json.dumps(value.get(name))} here"
        return f"{key} is {json.dumps(other)[:80]} there and {json.dumps(value)[:80]} here"
    return None


def read_packed(directory: Path) -> dict[str, QuantizedTensor]:
    """The quantized layers in ``directory``, by name: exactly what was written. Raises as ``open_packed``."""
    return dict(open_packed(directory))


def open_packed(directory: Path) -> PackedModel:
    """The quantized model in ``directory``, of which only the headers are read until a layer is asked for.

    Raises ``InputError`` when the directory holds no such model, or anything in it does not fit together: a file, key,
    tensor, dtype or shape that is missing, malformed or more than the formats have.
    """
    return PackedModel(directory)


class PackedModel(Mapping[str, QuantizedTensor]):
    """The layers of a quantized model on disk, by name; each is read when it is asked for.

    Reading a layer checks its scales, selectors, zero points and outliers, and raises ``InputError`` where one is
    outside of what its format has. Codes are taken as they are.

    Attributes:
        formats, shapes: format and (outputs, inputs) of every layer, by name.
        datatypes: definitions of the user's data types; opening the model makes them known by their names.
        settings: how the layers were quantized.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise InputError(f"cannot read {directory}: no such directory; expected {_WRITTEN_BY}")
        checkpoint = SafetensorsCheckpoint(directory)
        description, where = self._description(checkpoint.files)
        self.datatypes: Mapping[str, Mapping[str, Any]] = description["datatypes"]
        self.settings: Mapping[str, str] = description["settings"]
        for name, definition in self.datatypes.items():
            _make_known(name, definition, where)
        self.formats: dict[str, Format] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        for name, layer in description["layers"].items():
            self.formats[name], self.shapes[name] = _checked_layer(layer, f"{where}: layer {name!r}")
        self._headers: dict[str, dict[str, TensorHeader]] = {name: {} for name in self.formats}
        for key, header in checkpoint.headers.items():
            module, weight, part = key.rpartition(".weight.")
            if weight and part and module in self._headers:
                self._headers[module][key] = header
        for name, headers in self._headers.items():
            _check_parts(name, self.formats[name], self.shapes[name], headers, directory)

    def _description(self, files: Iterable[Path]) -> tuple[dict[str, Any], str]:
        """The ``quantization_config`` that all files and config.json agree on, and where it stands."""
        found: dict[Path, tuple[Any, str]] = {}
        for file in files:
            text = (open_safetensors(file).metadata() or {}).get(_CONFIG_KEY)
            if text is None:
                raise InputError(f"{file} was not written by termwise; expected {_WRITTEN_BY}")
            found[file] = _parsed(text, f"{file}: {_CONFIG_KEY} of its metadata")
        config_file = self.directory / "config.json"
        if config_file.is_file():
            value = read_json(config_file).get(_CONFIG_KEY)
            found[config_file] = _parsed(json.dumps(value), f"{config_file}: {_CONFIG_KEY}")
        first, *others = found
        for file in others:
            if found[file][1] != found[first][1]:
                raise InputError(f"{file}: {_CONFIG_KEY} differs from that of {first.name}; expected the same")
        where = f"{first}: {_CONFIG_KEY}"
        return _checked_description(found[first][0], where), where

    def __getitem__(self, name: str) -> QuantizedTensor:
        return _read_layer(name, self.formats[name], self.shapes[name], self._headers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.formats)

    def __len__(self) -> int:
        return len(self.formats)


def _parsed(text: str, where: str) -> tuple[Any, str]:
    """A JSON value and its canonical text. Raises ``InputError`` where it is none, or nested beyond reason."""
    try:
        value = json.loads(text)
        return value, json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}; expected {_WRITTEN_BY}") from error


def _checked_keys(value: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    """``value`` where it is a JSON object of exactly these keys."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is {_short(value)}; expected a JSON object with the keys {', '.join(keys)}")
    for key in keys:
        if key not in value:
            raise InputError(f"{where}: key {key!r} is missing; expected the keys {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise InputError(f"{where}: unknown key {key!r}; expected the keys {', '.join(keys)}")
    return value


def _checked_description(value: Any, where: str) -> dict[str, Any]:
    """A ``quantization_config`` whose values have the types that ``describe`` gives them, but for the layers' own."""
    if not isinstance(value, dict) or value.get("quant_method") != METHOD:
        method = value.get("quant_method") if isinstance(value, dict) else value
        raise InputError(f"{where} was not written by termwise ({_short(method)}); expected {_WRITTEN_BY}")
    version = value.get("version")
    if type(version) is not int or version != VERSION:
        raise InputError(f"{where}: version is {_short(version)}; expected {VERSION}")
    description = _checked_keys(value, ("quant_method", "version", "layers", "datatypes", "settings"), where)
    for key, kind, expected in (("layers", dict, "objects"), ("datatypes", dict, "objects"), ("settings", str, "text")):
        entries = description[key]
        if not isinstance(entries, dict):
            raise InputError(f"{where}: {key} is {_short(entries)}; expected a JSON object of {expected} by name")
        for name, entry in entries.items():
            if not isinstance(entry, kind):
                raise InputError(f"{where}: {key}: {name!r} is {_short(entry)}; expected {expected}")
    return description


def _make_known(name: str, definition: Mapping[str, Any], where: str) -> None:
    """Make a data type known by its name. Raises ``InputError`` where it is malformed, or another one has the name."""
    try:
        add_datatype(datatype_from(name, definition, where))
    except OverflowError:
        raise InputError(f"{where}: data type {name!r} has a level beyond float64; expected smaller ones") from None


def _checked_layer(value: Any, where: str) -> tuple[Format, tuple[int, int]]:
    """Format and shape of one layer of a ``quantization_config``."""
    layer = _checked_keys(value, ("format", "shape"), where)
    name, shape = layer["format"], layer["shape"]
    if not isinstance(name, str):
        raise InputError(f"{where}: format is {_short(name)}; expected the name of a format")
    try:
        format = get_format(name)
    except (InputError, ValueError) as error:  # ValueError: a number of more digits than Python reads
        raise InputError(f"{where}: {error}") from None
    sizes = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    if not sizes:
        raise InputError(f"{where}: shape is {_short(shape)}; expected [outputs, inputs]")
    return format, (shape[0], shape[1])


def _short(value: Any) -> str:
    """A value in a message, whatever its size."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_parts(
    name: str, format: Format, shape: tuple[int, int], headers: Mapping[str, TensorHeader], place: Path
) -> None:
    """Raise ``InputError`` unless ``headers``, by tensor name, are the parts of the layer ``name`` and no others."""
    expected = {
        f"{name}.weight.{part}": (layout.shape, DTYPE_NAMES[layout.dtype])
        for part, layout in format.layout(*shape).items()
    }
    scales = f"{name}.weight.{INPUT_SCALES}"
    if scales in headers:
        expected[scales] = (shape[1],), "F32"
    for key, (lengths, dtype) in expected.items():
        if key not in headers:
            raise InputError(f"{place} lacks the tensor {key!r}; {format.name} has it")
        found = headers[key]
        fits = len(found.shape) == len(lengths) and all(
            length in (FREE, actual) for length, actual in zip(lengths, found.shape, strict=True)
        )
        if found.dtype != dtype or not fits:
            shown = "[" + ", ".join("any" if length == FREE else str(length) for length in lengths) + "]"
            raise InputError(
                f"{found.file}: tensor {key!r} is {found.dtype} {list(found.shape)}; "
                f"expected {dtype} {shown} for {format.name}"
            )
    for key in headers:
        if key not in expected:
            raise InputError(f"{headers[key].file}: unknown tensor {key!r}; {format.name} has no such part")


def _read_layer(
    name: str, format: Format, shape: tuple[int, int], headers: Mapping[str, TensorHeader]
) -> QuantizedTensor:
    """The layer ``name`` from the tensors ``headers``, which have been checked. No file stays open."""
    opened = {file: open_safetensors(file) for file in {header.file for header in headers.values()}}
    parts: dict[str, NDArray[np.generic]] = {
        key.removeprefix(f"{name}.weight."): opened[header.file].get_tensor(key) for key, header in headers.items()
    }
    order = [*format.layout(*shape), INPUT_SCALES]
    tensor = QuantizedTensor(format=format, shape=shape, parts={part: parts[part] for part in order if part in parts})
    for part in tensor.parts:
        problem = _problem(tensor, part)
        if problem is not None:
            raise InputError(f"{headers[f'{name}.weight.{part}'].file}: tensor '{name}.weight.{part}' {problem}")
    return tensor


def _problem(tensor: QuantizedTensor, part: str) -> str | None:
    """What is wrong with the values of a part, None if nothing is. Codes may be any."""
    values, format = tensor.parts[part], tensor.format
    choices = sum(not datatype.name.startswith("abfloat") for datatype in format.datatypes)
    if part == "outlier_positions" and values.size != tensor.parts["outlier_values"].size:
        return f"has {values.size} places for {tensor.parts['outlier_values'].size} values; expected one for each"
    if not values.size:
        return None
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return "holds a NaN or an infinity; expected finite numbers"
    least, greatest = values.min(), values.max()
    if part == "scales" and format.scale_type == "e8m0":
        return "holds the scale 255, a NaN; expected 0 to 254" if greatest == 255 else None
    if part == "scales" and format.scale_type == "e4m3":
        within = least >= 1 and greatest <= _LARGEST_E4M3
        return None if within else f"holds a scale that is no positive E4M3 number; expected 1 to {_LARGEST_E4M3}"
    if part.endswith(("scale", "scales")):
        return f"holds the scale {least}; expected positive ones" if least <= 0 else None
    if part == "zero_points":
        top = (1 << format.weight_bits) - 1
        return f"holds the zero point {greatest}; expected 0 to {top}" if greatest > top else None
    if part == "matrix_type":
        return f"is {greatest}; expected 0 to {choices - 1}" if greatest >= choices else None
    if part == "selectors":
        rows = tensor.shape[::-1] if format.groups_along_outputs else tensor.shape
        chosen = unpack(values.astype(np.uint8, copy=False), format.selector_bits, format.groups(rows[1])).max()
        return f"selects data type {chosen}; expected 0 to {choices - 1}" if chosen >= choices else None
    if part == "outlier_positions":
        places = values.astype(np.int64)
        if greatest >= tensor.shape[0] * tensor.shape[1] or (np.diff(places) <= 0).any():
            return f"does not ascend within {tensor.shape[0]} × {tensor.shape[1]} weights; expected places among them"
    return None
