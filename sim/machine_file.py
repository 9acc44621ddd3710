"""Machines of the user's: an ``Accelerator`` as a TOML file, read and written (``docs/machines.md`` is for users).

A file names what it changes of a ``base``, or everything. The parameters of a PE and the numbers of external memory are
those of their specifications (``BitSerialSpec`` and its like, ``Dram``), so a parameter that is added there is a key
here. pydantic checks tables, keys and types; values are checked where they are defined, by the objects themselves.
Every complaint is one sentence with the file and the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from termwise.algorithms.errors import InputError, unknown_name
from termwise.sim.accelerators import (
    PROCESSING_ELEMENTS,
    Accelerator,
    ArrayShape,
    Dataflow,
    MachineError,
    Movement,
    accelerator_names,
    check_machine,
    get_accelerator,
    is_machine_file,
)
from termwise.sim.dram import Dram, dram_names, get_dram

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,63}")

_FIELD_OF_KEY: Final[Mapping[str, str]] = {
    "name": "name",
    "system": "system",
    "clock_mhz": "clock_mhz",
    "key_value_bits": "key_value_bits",
    "energy_set": "energy_set",
    "sources": "sources",
    "formats.prefill": "prefill_format",
    "formats.decode": "decode_format",
    "processing_element.energy_pj_per_cycle": "pe_energy_pj_per_cycle",
    "processing_element.area_um2": "pe_area_um2",
    "processing_element.place_and_route_factor": "place_and_route_factor",
    "array.movement": "movement",
    "array.dataflow": "dataflow",
    "array.prefill": "prefill_array",
    "array.decode": "decode_array",
    "buffers.port_reads_per_step": "port_reads_per_step",
    "buffers.weights.bytes": "weight_buffer_bytes",
    "buffers.weights.banks": "weight_buffer_banks",
    "buffers.activations.bytes": "activation_buffer_bytes",
    "buffers.activations.banks": "activation_buffer_banks",
    "buffers.accumulator_bytes": "accumulator_bytes",
    "memory": "memory",
}
"""Key in the file (tables joined by dots) -> field of ``Accelerator``, in the order in which a file is written."""

_KEY_OF_FIELD: Final = {field: key for key, field in _FIELD_OF_KEY.items()}
_PE_FIGURES: Final = ("energy_pj_per_cycle", "area_um2", "place_and_route_factor")
"""Keys of the table of the PE that are no parameters of its specification."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Texts = Annotated[tuple[str, ...], Field(strict=False)]


class _Side(_Table):
    rows: int
    columns: int


class _Array(_Table):
    movement: Movement = "broadcast"
    dataflow: Dataflow = "output_stationary"
    prefill: _Side
    decode: _Side


class _Buffer(_Table):
    bytes: int
    banks: int


class _Buffers(_Table):
    port_reads_per_step: int = 1
    weights: _Buffer
    activations: _Buffer
    accumulator_bytes: int = 0


class _Formats(_Table):
    prefill: str
    decode: str


def _model_of(specification: type, title: str, /, **more: Any) -> type[BaseModel]:
    """A table with the fields of a frozen specification as keys; those without a default are required."""
    hints = get_type_hints(specification)
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(specification):
        kind = _Texts if hints[field.name] == tuple[str, ...] else hints[field.name]
        keys[field.name] = (kind, ... if field.default is dataclasses.MISSING else field.default)
    return create_model(title, __base__=_Table, **{**keys, **more})


def _machine_model(kind: str) -> type[BaseModel]:
    """The whole file, with the parameters of this ``kind`` of PE."""
    element = _model_of(
        PROCESSING_ELEMENTS[kind],
        "ProcessingElement",
        kind=(Literal[kind], ...),
        energy_pj_per_cycle=(float | None, None),
        area_um2=(float | None, None),
        place_and_route_factor=(float, 1.5),
    )
    memory = _model_of(Dram, "Memory", name=(str | None, None), preset=(str | None, None))
    tables: dict[str, Any] = {
        "name": (str, ...),
        "system": (str, ...),
        "clock_mhz": (int, ...),
        "key_value_bits": (int, ...),
        "energy_set": (str | None, None),
        "sources": (_Texts, ()),
        "formats": (_Formats, ...),
        "processing_element": (element, ...),
        "array": (_Array, ...),
        "buffers": (_Buffers, ...),
        "memory": (memory, ...),
    }
    return create_model("Machine", __base__=_Table, **tables)


def read_machine(name: str) -> Accelerator:
    """The machine that the TOML file called ``name`` describes.

    Raises ``InputError``: a file that cannot be read or is not TOML, unknown and missing keys, values of a wrong type
    or that no machine has, parts that do not go together, and a name that belongs to a machine of termwise's.
    """
    path = Path(name).expanduser()
    try:
        document = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; expected a machine in TOML") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; expected TOML, which is UTF-8 text") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML: {' '.join(str(error).split())}") from error
    return machine_from(document, str(path))


def machine_from(document: Mapping[str, Any], where: str) -> Accelerator:
    """The machine that a TOML ``document`` describes; ``where`` it comes from is said in errors (``InputError``)."""
    given = dict(document)
    if "name" not in given:
        raise InputError(f"{where}: key 'name' is missing; expected what results call this machine")
    base = given.pop("base", None)
    if base is not None:
        given = _changed(_base(base, where), given, f"the user's, on the base of {base}")
    given.setdefault("system", given["name"])
    machine = _validated(given, where)
    accelerator = _built(machine, where)
    try:
        check_machine(accelerator)
    except MachineError as error:
        raise _keyed(error, where) from None
    _check_name(accelerator, where)
    return accelerator


def _base(name: object, where: str) -> Accelerator:
    if not isinstance(name, str) or is_machine_file(name):
        raise InputError(f"{where}: key 'base' is {_shown(name)}; expected one of {', '.join(accelerator_names())}")
    try:
        return get_accelerator(name)
    except InputError as error:
        raise InputError(f"{where}: key 'base': {error}") from None


def _changed(base: Accelerator, given: dict[str, Any], source: str) -> dict[str, Any]:
    """The document of ``base`` with the keys that are ``given`` in its place.

    Another PE, or one with another parameter, loses the energy and the area of the base's, and is no published system.
    Memory that names a preset or itself replaces that of the base.
    """
    document = _document(base)
    element, old = given.get("processing_element"), document["processing_element"]
    if isinstance(element, dict):
        parameters = {key: value for key, value in element.items() if key not in _PE_FIGURES}
        if parameters.get("kind", old["kind"]) != old["kind"]:
            document["processing_element"] = {}
        elif any(old.get(key) != value for key, value in parameters.items()):
            document["processing_element"] = {
                key: old[key] for key in old if key not in ("energy_pj_per_cycle", "area_um2")
            }
        if document["processing_element"] != old:
            document["system"] = given["name"]
    memory = given.get("memory")
    if isinstance(memory, dict) and ("preset" in memory or "name" in memory):
        document["memory"] = {}
    document["sources"] = [*document["sources"], source]
    return _overlaid(document, given)


def _overlaid(document: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with the values of ``given``, table by table."""
    both = dict(document)
    for key, value in given.items():
        old = both.get(key)
        both[key] = _overlaid(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def _validated(document: dict[str, Any], where: str) -> dict[str, Any]:
    """``document`` with every table, key and type checked, and defaults in their places (but for those of memory)."""
    element = document.get("processing_element")
    if not isinstance(element, dict):
        raise InputError(
            f"{where}: table 'processing_element' is {'missing' if element is None else _shown(element)}; expected a "
            "table with a kind, or a base that has one"
        )
    kind = element.get("kind")
    if not isinstance(kind, str) or kind not in PROCESSING_ELEMENTS:
        error = unknown_name("kind of PE", kind, PROCESSING_ELEMENTS)
        raise InputError(f"{where}: key 'processing_element.kind': {error}")
    model = _machine_model(kind)
    try:
        machine = model.model_validate(document)
    except ValidationError as error:
        raise _complaint(where, error, model) from None
    memory: BaseModel = getattr(machine, "memory")  # noqa: B009 - pydantic made the model, mypy does not know it
    # What the file does not name of the memory is a preset's, so only named numbers count.
    return {**machine.model_dump(), "memory": memory.model_dump(exclude_unset=True)}


_TOML_TYPES: Final[Mapping[type, str]] = {
    bool: "a truth value",
    int: "a whole number",
    float: "a decimal number",
    str: "text",
    list: "a list",
    dict: "a table",
}


_EXPECTED: Final[Mapping[str, str]] = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a table",
}
"""Kind of failure, as pydantic calls it -> what a file should have held."""


def _shown(value: object) -> str:
    """A value as an error shows it: short, and with its TOML type."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({_TOML_TYPES.get(type(value), type(value).__name__)})"


def _complaint(where: str, error: ValidationError, model: type[BaseModel]) -> InputError:
    """The first failure as one sentence; an unknown key comes first, since a misspelt key also counts as missing."""
    failures = sorted(error.errors(include_url=False), key=lambda failure: failure["type"] != "extra_forbidden")
    failure = failures[0]
    place = [str(part) for part in failure["loc"]]
    key = ".".join(place)
    if failure["type"] == "extra_forbidden":
        accepted = list(_table_at(model, place[:-1]).model_fields)
        accepted += [] if len(place) > 1 else ["base"]
        near = difflib.get_close_matches(place[-1], accepted, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return InputError(f"{where}: unknown key {key!r}: {hint}Accepted: {', '.join(accepted)}")
    if failure["type"] == "missing":
        return InputError(f"{where}: key {key!r} is missing; expected it, or a base that has it")
    wanted = _EXPECTED.get(failure["type"]) or failure["msg"].removeprefix("Input should be ")
    return InputError(f"{where}: key {key!r}: expected {wanted}; found {_shown(failure['input'])}")


def _table_at(model: type[BaseModel], place: list[str]) -> type[BaseModel]:
    """The table at ``place`` of a file."""
    for part in place:
        inner = model.model_fields[part].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        model = inner
    return model


def _built(machine: dict[str, Any], where: str) -> Accelerator:
    """The object of a validated document, which names every key."""
    element = machine["processing_element"]
    kind = element["kind"]
    parameters = {key: value for key, value in element.items() if key not in (*_PE_FIGURES, "kind")}
    fields: dict[str, Any] = {field: _at(machine, key) for key, field in _FIELD_OF_KEY.items() if key != "memory"}
    table = "processing_element"
    try:
        fields["processing_element"] = PROCESSING_ELEMENTS[kind](**parameters)
        table = "memory"
        fields["memory"] = _memory(machine["memory"], machine["name"])
        for phase in ("prefill", "decode"):
            table = f"array.{phase}"
            fields[f"{phase}_array"] = ArrayShape(**machine["array"][phase])
    except InputError as error:
        raise InputError(f"{where}: table {table!r}: {error}") from None
    try:
        return Accelerator(**fields)
    except MachineError as error:
        raise _keyed(error, where) from None


def _memory(table: dict[str, Any], machine: str) -> Dram:
    """The external memory of a table: a preset, a changed preset, or numbers of its own."""
    numbers = {key: value for key, value in table.items() if key not in ("name", "preset")}
    name = table.get("name") or f"memory of {machine}"
    if table.get("preset") is None:
        return Dram(name=name, **numbers)
    try:
        preset = get_dram(table["preset"])
    except InputError as error:
        raise InputError(f"key 'preset': {error}") from None
    if "name" not in table and all(getattr(preset, key) == value for key, value in numbers.items()):
        return preset
    return dataclasses.replace(preset, name=name, **numbers)


def _keyed(error: MachineError, where: str) -> InputError:
    key = _KEY_OF_FIELD.get(error.field, error.field)
    return InputError(f"{where}: key {key!r} is {error.value!r}; expected {error.expected}")


def _check_name(accelerator: Accelerator, where: str) -> None:
    """A name is one word, and one of termwise's means the same machine as there."""
    name = accelerator.name
    if _NAME.fullmatch(name) is None:
        raise InputError(
            f"{where}: key 'name' is {name!r}; expected up to 64 letters, digits and . _ + @ -, first a letter or digit"
        )
    if name.partition("@")[0] not in accelerator_names():
        return
    try:
        same = get_accelerator(name) == accelerator
    except InputError:
        same = False
    if not same:
        raise InputError(
            f"{where}: key 'name' is {name!r}, another machine that comes with termwise; expected a new name"
        )


def _at(document: Mapping[str, Any], key: str) -> Any:
    """The value at ``key`` (tables joined by dots)."""
    value: Any = document
    for part in key.split("."):
        value = value[part]
    return value


def _document(accelerator: Accelerator) -> dict[str, Any]:
    """The TOML document of a machine: every key whose value is known."""
    element = accelerator.processing_element
    assert dataclasses.is_dataclass(element)
    assert not isinstance(element, type)
    document: dict[str, Any] = {}
    for key, field in _FIELD_OF_KEY.items():
        value = getattr(accelerator, field)
        if isinstance(value, ArrayShape):
            value = dataclasses.asdict(value)
        elif isinstance(value, Dram):
            value = _memory_document(value)
        elif isinstance(value, tuple):
            value = list(value)
        *tables, last = key.split(".")
        table = document
        for part in tables:
            if part == "processing_element" and part not in table:
                table[part] = {"kind": element.kind, **dataclasses.asdict(element)}
            table = table.setdefault(part, {})
        if value is not None:
            table[last] = value
    return document


def _memory_document(memory: Dram) -> dict[str, Any]:
    """A preset by its name; anything else by its numbers."""
    if memory.name.partition("@")[0] in dram_names() and get_dram(memory.name) == memory:
        return {"preset": memory.name}
    values = {field.name: (getattr(memory, field.name), field.default) for field in dataclasses.fields(Dram)}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, (value, default) in values.items()
        if value != default
    }


def to_toml(accelerator: Accelerator) -> str:
    """The TOML file of a machine, without a base: ``machine_from`` of it is equal to ``accelerator``."""
    return "\n".join(_lines(_document(accelerator), "")) + "\n"


def _lines(table: Mapping[str, Any], path: str) -> list[str]:
    """Lines of a table: its values, then the tables in it."""
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    if path and lines:
        lines = ["", f"[{path}]", *lines]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{path}.{key}" if path else key)
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[\n" + "".join(f"    {_value(entry)},\n" for entry in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # What JSON writes for text, whole numbers and truth values is TOML too, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
