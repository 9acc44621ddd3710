"""A quantized model on disk: safetensors beside a config.json with a ``quantization_config``.

``model.safetensors`` holds, for every linear layer, the packed arrays of its format as ``<module>.weight.<part>``
(see ``Format.layout``), and every other tensor of the checkpoint as it was. ``quantization_config`` names the method
``termwise``, the format, and the shape of each quantized layer; the file's metadata repeats it, so that a set of
matrices needs no config.json. Tokenizer files are copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.checkpoints import FLOATING_TYPES
from termwise.algorithms.errors import InputError
from termwise.algorithms.files import directory_written_beside
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.models import Model
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.tokenization import TOKENIZER_FILES

WEIGHTS_FILE = "model.safetensors"
METHOD = "termwise"


def write_packed(model: Model, tensors: Mapping[str, QuantizedTensor], format: Format, directory: Path) -> None:
    """Write ``model`` with the linear layers ``tensors``, by name, to ``directory``, whole or not at all.

    All packed arrays are in memory at once. Raises ``InputError`` when ``directory`` holds something already or cannot
    be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    replaced = {linear.tensor for linear in model.structure.linears if linear.name in tensors}
    replaced.discard(model.structure.embedding or "")  # a head may share it; the table stays
    description = {
        "quant_method": METHOD,
        "version": 1,
        "format": format.name,
        "layers": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    arrays: dict[str, NDArray[Any]] = {
        f"{name}.weight.{part}": np.ascontiguousarray(values)
        for name, tensor in tensors.items()
        for part, values in tensor.parts.items()
    }
    for name, header in model.checkpoint.headers.items():
        if name not in replaced and header.dtype in FLOATING_TYPES:
            arrays[name] = model.checkpoint.read(name)
    with directory_written_beside(directory) as temporary:
        try:
            save_file(arrays, temporary / WEIGHTS_FILE, metadata={"quantization_config": json.dumps(description)})
        except SafetensorError as error:  # the library's own kind, also for a full disk
            raise InputError(f"cannot write {directory}: {error}; expected a writable place with free space") from error
        if model.config is not None:
            config = {**model.config, "quantization_config": description}
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in TOKENIZER_FILES:
            if model.location.is_dir() and (model.location / name).is_file():
                shutil.copyfile(model.location / name, temporary / name)


def read_packed(directory: Path) -> dict[str, QuantizedTensor]:
    """The quantized layers in ``directory``, by name: exactly what ``write_packed`` was given.

    Raises ``InputError`` when the directory holds no such model.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / WEIGHTS_FILE
    try:
        with safe_open(str(path), framework="np") as stored:
            description = json.loads((stored.metadata() or {}).get("quantization_config", "{}"))
            if description.get("quant_method") != METHOD:
                raise InputError(
                    f"{path} was not written by termwise; expected the output of 'termwise quantize --out'"
                )
            format = get_format(description["format"])
            return {
                name: QuantizedTensor(
                    format=format,
                    shape=(shape[0], shape[1]),
                    parts={part: stored.get_tensor(f"{name}.weight.{part}") for part in format.layout(*shape)},
                )
                for name, shape in description["layers"].items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}; expected the output of 'termwise quantize --out'") from error
