"""Mutated quantized models and files of data types: each is read, or refused with an InputError, or it is a failure.

    python benchmarks/fuzz_readers.py [--inputs 100000] [--seed 0]

Small models in one file and in shards, of all kinds of formats, get one to three mutations each: of a JSON value or
structure (config.json, the index, the description in the metadata, the header of the safetensors file; or of
config.json and metadata alike, so that they still agree), or of bytes (changed, inserted, removed, cut off). What is
read is also dequantized. Prints the counts as one JSON document; on a failure the seed of the input, and exits with 1.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import json
import random
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from termwise.algorithms.datatypes import add_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.models import open_model
from termwise.algorithms.packed_model import PackedModelWriter, open_packed
from termwise.algorithms.quantize import quantize
from termwise.algorithms.user_datatypes import datatype_from, parse_datatypes

Files = dict[str, bytes]

FORMATS = (
    "int-w4g8",
    "int-asym-w3g8",
    "bitmod-w4g8",
    "bitmod-w3g8:special=3,-3,6",
    "olive-w4",
    "ant-w4g8",
    "gobo-w3",
    "mxfp4",
    "nvfp4",
    "fp6_e2m3-w6g8",
    "fp16",
    "int-w4g4:axis=output",
    "mine-w2g8",
)
OWN_TYPE = {"bits": 2, "levels": [0, 1.5, -1], "source": "mine"}
SHAPE = (4, 24)
CONFIG_KEY = "quantization_config"
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2,
    10**30,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "int-w4g8",
    "gobo-w4",
    "F32",
    "I64",
    "BOOL",
    "F8_E4M3",
    "\ud800",
    "\0",
    "../x",
    "x" * 300,
    [],
    [0, 0],
    [-1, 4],
    [1 << 63, 2],
    {},
    {"format": "fp16", "shape": [4, 24]},
    [[[[[[]]]]]],
)


@functools.cache
def bases() -> tuple[Files, ...]:
    """The files of the unchanged models: each kind of format alone, and all of them in shards."""
    from safetensors.numpy import save_file

    add_datatype(datatype_from("mine", OWN_TYPE, "here"))
    random_weights = np.random.default_rng(0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, names in enumerate([*((name,) for name in FORMATS), FORMATS]):
            weights = {f"l{i}.weight": random_weights.standard_t(3, SHAPE) * 0.02 for i in range(len(names))}
            source = Path(folder) / f"source{number}"
            source.mkdir()
            tensors = {name: values.astype(np.float16) for name, values in weights.items()}
            save_file({**tensors, "norm": np.ones(3, np.float32)}, source / "x.safetensors")
            model = open_model(source)
            formats = {f"l{i}": get_format(name) for i, name in enumerate(names)}
            out = Path(folder) / f"packed{number}"
            with PackedModelWriter(
                model,
                formats,
                out,
                {"method": "nearest"},
                shard_bytes=1 << 30 if len(names) == 1 else 300,
            ) as writer:
                for i, name in enumerate(names):
                    tensor = quantize(model.matrix(f"l{i}"), name)
                    if i % 2:
                        tensor = tensor.with_input_scales(np.full(SHAPE[1], 0.5, np.float32))
                    writer.add(f"l{i}", tensor)
                writer.finish()
            files = {path.name: path.read_bytes() for path in out.iterdir()}
            first = min(name for name in files if name.endswith(".safetensors"))
            description = json.loads(_header(files[first])[0]["__metadata__"][CONFIG_KEY])
            files["config.json"] = json.dumps({"model_type": "llama", CONFIG_KEY: description}).encode()
            found.append(files)
    return tuple(found)


def _header(data: bytes) -> tuple[Any, bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _mutate_json(value: Any, chance: random.Random) -> Any:
    """``value`` with one place changed, removed, renamed, doubled or swapped."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or chance.random() < 0.02:
        return copy.deepcopy(chance.choice(VALUES))
    container, key = chance.choice(places)
    kind = chance.randrange(6)
    old = container[key]
    if kind == 0 and isinstance(old, str):
        at = chance.randrange(len(old) + 1)
        container[key] = old[:at] + chance.choice(["", "0", "9", "g", "-", ":", "=", ",", "w8"]) + old[at + 1 :]
    elif kind == 1 and type(old) is int:
        container[key] = old + chance.choice([-(1 << 40), -8, -1, 1, 8, 1 << 40])
    elif kind == 2:
        del container[key]
    elif kind == 3 and isinstance(container, dict):
        container[chance.choice([f"{key}x", "l1", "l1.weight.codes", ""])] = container.pop(key)
    elif kind == 4:
        other, other_key = chance.choice(places)
        container[key] = copy.deepcopy(other[other_key])
    else:
        container[key] = copy.deepcopy(chance.choice(VALUES))
    return value


def _mutate_bytes(data: bytes, chance: random.Random, first: int = 0) -> bytes:
    """``data`` with bytes from ``first`` on changed, inserted, removed or cut off."""
    if len(data) <= first:
        return data + chance.randbytes(3)
    at = chance.randrange(first, len(data))
    count = chance.choice([1, 1, 1, 2, 8])
    kind = chance.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + chance.randbytes(count) + data[at:]
    if kind == 2:
        return data[:at] + data[at + count :]
    if kind == 3:
        return data[:at] + chance.choice([b"\0", b"\xff"]) * count + data[at + count :]
    return data[:at] + chance.randbytes(count) + data[at + count :]


def mutate(files: Files, chance: random.Random) -> Files:
    """``files`` with one mutation."""
    files = dict(files)
    name = chance.choice(sorted(files))
    kind = chance.randrange(5)
    try:
        if kind == 0:
            files[name] = _mutate_bytes(files[name], chance)
        elif kind == 1 and name.endswith(".safetensors"):
            header, data = _header(files[name])
            files[name] = _with_header(header, _mutate_bytes(data, chance))
        elif kind == 2 and name.endswith(".safetensors"):
            header, data = _header(files[name])
            files[name] = _with_header(_mutate_json(header, chance), data)
        elif kind == 3:
            shards = sorted(name for name in files if name.endswith(".safetensors"))
            parsed = {shard: _header(files[shard]) for shard in shards}
            description = json.loads(parsed[shards[0]][0]["__metadata__"][CONFIG_KEY])
            description = _mutate_json(description, chance)
            changed = shards if chance.random() < 0.8 else shards[:1]
            for shard in changed:
                header, data = parsed[shard]
                header["__metadata__"][CONFIG_KEY] = json.dumps(description)
                files[shard] = _with_header(header, data)
            if changed == shards:
                files["config.json"] = json.dumps({CONFIG_KEY: description}).encode()
        elif name.endswith(".json"):
            files[name] = json.dumps(_mutate_json(json.loads(files[name]), chance)).encode()
        else:
            files[name] = _mutate_bytes(files[name], chance, 8)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        pass  # an earlier mutation left nothing to parse
    return files


def outcome(chance: random.Random, folder: Path) -> str:
    """``read`` or ``refused``, of one mutated model written to ``folder``. Raises what the reader raised otherwise."""
    files = dict(chance.choice(bases()))
    for _ in range(chance.choice([1, 1, 2, 3])):
        files = mutate(files, chance)
    for path in folder.iterdir():
        path.unlink()  # not overwritten: the last one may still be mapped into memory
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        packed = open_packed(folder)
        with np.errstate(all="ignore"):
            for tensor in packed.values():
                assert tensor.dequantize().shape == tensor.shape
    except InputError:
        return "refused"
    return "read"


TYPES = """
[datatype.fp3_mine]
bits = 3
levels = [0, 1, 2, 5, "minus zero", -1, -2, -5]
source = "notes"

[datatype.odd]
bits = 4
levels = [0, 0.5, -0.75, 3, "unused", "nan", "inf", "-inf", 1e3]
"""


def outcome_of_types(chance: random.Random, _: Path) -> str:
    """``types read`` or ``types refused``, of one mutated TOML file of data types."""
    document = tomllib.loads(TYPES)
    if chance.random() < 0.5:
        text = _mutate_bytes(TYPES.encode(), chance).decode("utf-8", "surrogateescape")
        parse: Callable[[str], Any] = tomllib.loads
    else:
        text = json.dumps(_mutate_json(document, chance))
        parse = json.loads
    refused = ""
    try:
        types = parse_datatypes(text, "types.toml", parse)
    except InputError as error:
        types, refused = (), str(error)
    assert "\n" not in refused, refused
    if refused:
        return "types refused"
    for datatype in types:
        codes = np.arange(1 << datatype.bits, dtype=np.uint8)
        assert np.array_equal(datatype.encode(datatype.decode(codes)), codes)
    return "types read"


def fuzz(inputs: int, seed: int, report: Callable[[int], None] = lambda _: None) -> collections.Counter[str]:
    """Counts of the outcomes of ``inputs`` mutated models and as many files of types.

    Raises ``AssertionError`` with the seed of a failure.
    """
    counts: collections.Counter[str] = collections.Counter()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for number in range(inputs):
            try:
                for one in (outcome, outcome_of_types):
                    counts[one(random.Random(f"{seed}:{number}"), Path(folder))] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of the Rust code below is no Exception
                raise AssertionError(f"input {seed}:{number}: {type(error).__name__}: {error}") from error
            if number % 1000 == 999:
                report(number + 1)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        counts = fuzz(arguments.inputs, arguments.seed, lambda done: print(done, end="\r", file=sys.stderr))
    except AssertionError:
        traceback.print_exc()
        sys.exit(1)
    seconds = time.perf_counter() - start
    print(json.dumps({"inputs": arguments.inputs, "seed": arguments.seed, **counts, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
