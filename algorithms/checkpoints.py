"""The tensors of a checkpoint, read from disk one at a time, in pieces of bounded size.

Pickles (``pytorch_model.bin``) are never opened, because opening one runs the code that it holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError

FLOATING_TYPES = ("F32", "F16", "BF16")
"""The dtypes that a weight may have, as safetensors names them."""

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TensorHeader:
    """What a checkpoint says of one tensor without its values: the file, the shape, the dtype (safetensors' name)."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """A named collection of tensors on disk."""

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        """The header of every tensor, by its name in the checkpoint."""

    def read(self, name: str, *, transposed: bool = False) -> NDArray[np.float16] | NDArray[np.float32]:
        """Tensor ``name``, C-contiguous: float16 stays, float32 stays, bfloat16 becomes float32 (exactly).

        ``transposed`` swaps the two axes of a matrix. Raises ``InputError`` for NaN or infinite values (with their
        number), for another dtype, and for a tensor without elements.
        """


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises ``InputError`` when it cannot be read, is not JSON, or is not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; expected a JSON object") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; expected a JSON object") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}; expected a JSON object")
    return value


class SafetensorsCheckpoint:
    """The safetensors files of one directory, as one collection.

    With an index (``*.safetensors.index.json``) the shards that it names count; otherwise ``model.safetensors`` if
    there is one; otherwise every ``*.safetensors``.

    Raises ``InputError`` when there is no such file, an index names a missing shard or tensor, a file is truncated or
    not in the format, or two files hold a tensor of the same name.
    """

    def __init__(self, directory: Path) -> None:
        self.files, index = _files_and_index(directory)
        self._headers: dict[str, TensorHeader] = {}
        for file in self.files:
            for header in read_headers(file, open_safetensors(file)):
                if header.name in self._headers:
                    other = self._headers[header.name].file.name
                    raise InputError(
                        f"{file} and {other} both hold the tensor {header.name!r}; expected every tensor in one file"
                    )
                self._headers[header.name] = header
        for name, shard in index.items():
            if name not in self._headers:
                raise InputError(
                    f"{directory / shard} lacks the tensor {name!r}; the index of the checkpoint names it there"
                )

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        """The header of every tensor, by its name in the checkpoint."""
        return self._headers

    def read(self, name: str, *, transposed: bool = False) -> NDArray[np.float16] | NDArray[np.float32]:
        """As ``Checkpoint.read``. Holds the result and one chunk of about 1 M elements, nothing else.

        The file is mapped into memory for this call only, so that a large model does not fill it page by page.
        """
        header = self._headers[name]
        check_weight(header)
        stored = open_safetensors(header.file).get_slice(name)
        result: NDArray[Any] = np.empty(
            header.shape[::-1] if transposed else header.shape,
            dtype=np.float16 if header.dtype == "F16" else np.float32,
        )
        bad = 0
        rows = max(1, _CHUNK_ELEMENTS * header.shape[0] // result.size)
        for start in range(0, header.shape[0], rows):
            chunk: NDArray[Any] = stored[start : min(start + rows, header.shape[0])].astype(result.dtype, copy=False)
            bad += chunk.size - int(np.count_nonzero(np.isfinite(chunk)))
            if transposed:
                result[:, start : start + rows] = chunk.T
            else:
                result[start : start + rows] = chunk
        check_finite(header, bad)
        return result


def check_weight(header: TensorHeader) -> None:
    """Raise ``InputError`` unless the tensor has a floating dtype that is read here, and at least one element."""
    if header.dtype not in FLOATING_TYPES:
        raise InputError(
            f"{header.file}: tensor {header.name!r} has dtype {header.dtype}; "
            f"expected one of {', '.join(FLOATING_TYPES)} (weights that are not quantized yet)"
        )
    if math.prod(header.shape) == 0 or not header.shape:
        raise InputError(
            f"{header.file}: tensor {header.name!r} has shape {list(header.shape)}; expected at least one element"
        )


def check_finite(header: TensorHeader, bad: int) -> None:
    """Raise ``InputError`` if ``bad``, the number of NaN or infinite values in the tensor, is not zero."""
    if bad:
        raise InputError(
            f"{header.file}: tensor {header.name!r} holds {bad} NaN or infinite values of {math.prod(header.shape)}; "
            "expected finite weights"
        )


def _files_and_index(directory: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The safetensors files of ``directory`` that count, and the index: tensor name to file name, empty without."""
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if indices:
        index_file = indices[0]
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError(
                f"{index_file}: key 'weight_map' is missing or malformed; expected tensor name to file name"
            )
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise InputError(f"{index_file} names the shard {shard!r}; expected a file name without a folder")
        present = {path.name for path in directory.iterdir() if path.is_file()}
        missing = [shard for shard in shards if shard not in present]
        if missing:
            raise InputError(
                f"{index_file} names {len(missing)} missing shard{'s' if len(missing) > 1 else ''}: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; expected them in {directory}"
            )
        return tuple(directory / shard for shard in shards), weight_map
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        found = f" (found only {pickled[0]}, and pickled weights are never opened)" if pickled else ""
        raise InputError(f"{directory} holds no *.safetensors file{found}; expected a model in Hugging Face format")
    whole = directory / "model.safetensors"
    return ((whole,) if whole in files else tuple(files)), {}


def open_safetensors(file: Path) -> Any:
    """The ``safetensors.safe_open`` of ``file``, which maps it into memory. Raises ``InputError``."""
    import ml_dtypes  # noqa: F401  # gives numpy the dtype that safetensors names bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(file), framework="np")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is not a whole safetensors file: {' '.join(str(error).split())}; "
            "expected a file as its publisher wrote it (fetch it again)"
        ) from error


def read_headers(file: Path, opened: Any) -> list[TensorHeader]:
    """The headers in one safetensors file."""
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
    return [
        TensorHeader(name=name, file=file, shape=tuple(stored.get_shape()), dtype=stored.get_dtype())
        for name, stored in slices.items()
    ]
