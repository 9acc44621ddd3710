"""Safetensors files as streams of bytes: tensors are copied from file to file without being held or converted.

The layout is that of the safetensors format: the length of the header (8 bytes, little-endian), the header (JSON: name
to dtype, shape and offsets; ``__metadata__`` of strings), the data without gaps. Several files get the names and the
index that Hugging Face checkpoints have.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "uint8": "U8",
        "int8": "I8",
        "uint16": "U16",
        "int16": "I16",
        "float16": "F16",
        "uint32": "U32",
        "int32": "I32",
        "float32": "F32",
        "uint64": "U64",
        "int64": "I64",
        "float64": "F64",
    }
)
"""What safetensors calls the element types of numpy."""

_COPIED_AT_ONCE = 16 << 20
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that is about to be written.

    Attributes:
        name: its name in the file.
        dtype: safetensors' name of the element type (``F16``, ``BF16``, ``U8``, ...).
        shape: its axes.
        nbytes: its size in bytes.
        chunks: called once; yields the bytes in order, C-contiguous and little-endian, ``nbytes`` in all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def stored_array(
    name: str, dtype: str, shape: tuple[int, ...], values: Callable[[], NDArray[np.generic]]
) -> StoredTensor:
    """The tensor of an array of numpy type ``dtype`` and ``shape``, which ``values`` makes when it is written."""

    def chunks() -> Iterator[memoryview]:
        array = np.ascontiguousarray(values())
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape}; announced as {dtype} {shape}")
        yield array.reshape(-1).view(np.uint8).data

    size = math.prod(shape) * np.dtype(dtype).itemsize
    return StoredTensor(name=name, dtype=DTYPE_NAMES[dtype], shape=shape, nbytes=size, chunks=chunks)


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors in a safetensors file that has been opened and checked before, to be copied as they are."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))

    def copy_of(begin: int, size: int) -> Callable[[], Iterator[bytes]]:
        def chunks() -> Iterator[bytes]:
            with file.open("rb") as stream:
                stream.seek(8 + length + begin)
                for start in range(0, size, _COPIED_AT_ONCE):
                    yield stream.read(min(_COPIED_AT_ONCE, size - start))

        return chunks

    return {
        name: StoredTensor(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            chunks=copy_of(entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_tensors(file: Path, tensors: Iterable[StoredTensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, and wait until it is on the disk. One chunk of one tensor is in memory at a time."""
    ordered = sorted(tensors, key=lambda tensor: -_item_bytes(tensor))  # wide types first: all stay aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in ordered:
            written = sum(stream.write(chunk) for chunk in tensor.chunks())
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name} gave {written} bytes; announced as {tensor.nbytes}")
        stream.flush()
        os.fsync(stream.fileno())


def write_shards(
    directory: Path, tensors: Iterable[StoredTensor], metadata: Mapping[str, str], *, shard_bytes: int
) -> None:
    """Write ``model.safetensors`` in ``directory``, or several shards and their index where that would be too large.

    Every file has the ``metadata``, and at most ``shard_bytes`` of data unless it holds but one tensor.
    """
    shards: list[list[StoredTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_tensors(directory / WEIGHTS_FILE, shards[0], metadata)
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / name, shard, metadata)
        places.update({tensor.name: name for tensor in shard})
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _item_bytes(tensor: StoredTensor) -> int:
    """Size of one element; 0 for an empty tensor."""
    return tensor.nbytes // (math.prod(tensor.shape) or 1)
