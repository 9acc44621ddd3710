"""A user's own data types, from a TOML file: levels by code, used everywhere by name like the types of termwise.

    [datatype.fp3_mine]
    bits = 3
    levels = [0, 1, 2, 5, "minus zero", -1, -2, -5]
    source = "my notes"

``levels`` are in the order of the codes, 0 first. A code that is no level says what it is: ``"unused"``,
``"minus zero"``, ``"nan"``, ``"inf"`` or ``"-inf"``; codes behind the last are unused. A level must be a binary
fraction (``0.75``, or the FP32 number nearest to 0.7), since sums and products with it are to be exact.

The environment variable ``TERMWISE_DATATYPES`` names the file, or several, separated as in PATH; ``termwise
--datatypes FILE`` sets it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from termwise.algorithms.datatypes import LONGEST_NUMERATOR, DataType, get_datatype, is_built_in
from termwise.algorithms.errors import InputError

if TYPE_CHECKING:
    from termwise.algorithms.formats import Format

ENVIRONMENT_VARIABLE = "TERMWISE_DATATYPES"
RESERVED_NAMES = frozenset({"fp16", "int", "int_asym", "bitmod", "olive", "ant", "gobo", "type"})
"""Names of families of formats: a type of that name could not be told from them."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_OTHER_VALUES: Mapping[str, float | None] = {
    "unused": None,
    "minus zero": -0.0,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
}


def datatypes_of_environment() -> Mapping[str, DataType]:
    """The types of the files that ``TERMWISE_DATATYPES`` names. Raises ``InputError`` as ``read_datatypes`` does."""
    return _of_paths(os.environ.get(ENVIRONMENT_VARIABLE, ""))


@cache
def _of_paths(paths: str) -> Mapping[str, DataType]:
    found: dict[str, DataType] = {}
    for path in filter(None, paths.split(os.pathsep)):
        for datatype in read_datatypes(Path(path)):
            if datatype.name in found:
                raise InputError(f"{path}: the data type {datatype.name} is defined in another file already")
            found[datatype.name] = datatype
    return found


def read_datatypes(path: Path) -> tuple[DataType, ...]:
    """The types that the TOML file ``path`` defines.

    Raises ``InputError``, which names the file, the type and the value, and says what was expected.
    """
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}; expected a TOML file of data types") from error
    return parse_datatypes(text, str(path), tomllib.loads)


def parse_datatypes(text: str, where: str, parse: Any) -> tuple[DataType, ...]:
    """The types in ``text``; ``where`` it comes from is said in errors, and ``parse`` makes a mapping of it."""
    try:
        document = parse(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no TOML: {' '.join(str(error).split())}") from error
    tables = document.get("datatype") if isinstance(document, dict) else None
    if not isinstance(tables, dict) or not tables or set(document) != {"datatype"}:
        raise InputError(f"{where}: expected tables [datatype.NAME], and nothing else")
    return tuple(datatype_from(name, table, where) for name, table in tables.items())


def datatype_from(name: str, table: object, where: str) -> DataType:
    """The type that ``table`` (keys bits, levels, source) defines. Raises ``InputError``: ``where``, then the fault."""
    from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError

    class Definition(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        bits: StrictInt = Field(ge=2, le=8)
        levels: list[StrictInt | StrictFloat | Literal["unused", "minus zero", "nan", "inf", "-inf"]]
        source: str = "the user's"

    place = f"{where}: data type {name!r}"
    if not _NAME.fullmatch(name):
        raise InputError(f"{place}: expected a name of lower-case letters, digits and underscores")
    if is_built_in(name) or name in RESERVED_NAMES:
        raise InputError(f"{place} comes with termwise; expected another name")
    if name.startswith(("flint", "bitmod_")):
        raise InputError(f"{place}: names that begin with flint or bitmod_ are termwise's; expected another name")
    try:
        definition = Definition.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"][:2])) or "the table"
        wanted = first["msg"].lower()
        if len(first["loc"]) > 2:  # a level is none of several kinds, and pydantic names the first
            wanted = f"expected a number or one of {', '.join(map(repr, _OTHER_VALUES))}"
        got = repr(first["input"])
        got = got if len(got) <= 40 else got[:37] + "..."
        raise InputError(f"{place}: {key}: {wanted}; got {got}") from error
    bits, entries = definition.bits, definition.levels
    if len(entries) > 1 << bits:
        raise InputError(f"{place}: {len(entries)} levels; expected at most {1 << bits}, the codes of {bits} bits")
    levels: dict[int, Fraction] = {}
    other: dict[int, float] = {}
    special: dict[int, str] = {}
    for code, entry in enumerate(entries):
        if isinstance(entry, str):
            value = _OTHER_VALUES[entry]
            special[code] = entry
            if value is not None:
                other[code] = value
        elif isinstance(entry, int) and entry.bit_length() > LONGEST_NUMERATOR:
            raise InputError(f"{place}: a level of {entry.bit_length()} bits; expected at most {LONGEST_NUMERATOR}")
        elif not math.isfinite(entry):
            raise InputError(f"{place}: level {entry}; expected a finite number, or the text {str(entry)!r}")
        else:
            levels[code] = Fraction(entry)
    for code in range(len(entries), 1 << bits):
        special[code] = "unused"
    for name_of_value in ("minus zero", "inf", "-inf"):
        if list(special.values()).count(name_of_value) > 1:
            raise InputError(f"{place}: {name_of_value!r} stands twice; expected one code for it")
    for code, level in levels.items():
        if level in list(levels.values())[: list(levels).index(code)]:
            raise InputError(f"{place}: the level {float(level):g} stands twice; expected every level once")
    if 0 not in levels.values():
        raise InputError(f"{place}: no level is 0; expected one, since a pruned or padded weight is 0")
    if len(levels) < 2:
        raise InputError(f"{place}: no level but 0; expected at least two levels")
    fraction_bits = max(level.denominator.bit_length() - 1 for level in levels.values())
    for level in sorted(levels.values(), key=lambda level: level.denominator, reverse=True):
        if int(abs(level) * (1 << fraction_bits)).bit_length() > LONGEST_NUMERATOR or fraction_bits > 100:
            raise InputError(
                f"{place}: the level {float(level)!r} takes more than {LONGEST_NUMERATOR} bits at the resolution of "
                "the finest level; expected binary fractions, for example FP32 numbers between 0.01 and 1"
            )
    return DataType(
        name=name,
        bits=bits,
        numerators=tuple(
            int(levels[code] * (1 << fraction_bits)) if code in levels else None for code in range(1 << bits)
        ),
        fraction_bits=fraction_bits,
        source=definition.source,
        special=special,
        other_values=other,
    )


def definition_of(datatype: DataType) -> dict[str, Any]:
    """The table of ``datatype``: ``datatype_from(name, definition_of(datatype), where) == datatype``."""
    names = {str(value): name for name, value in _OTHER_VALUES.items() if value is not None}
    entries: list[float | str] = []
    for code, numerator in enumerate(datatype.numerators):
        if numerator is not None:
            entries.append(numerator / (1 << datatype.fraction_bits))
        else:
            entries.append(names[str(datatype.other_values[code])] if code in datatype.other_values else "unused")
    return {"bits": datatype.bits, "levels": entries, "source": datatype.source}


def definitions_of(formats: Iterable[Format]) -> dict[str, dict[str, Any]]:
    """Definitions of the user's types that ``formats`` name, by name: what a result depends on beside their names."""
    named = {format.type_name for format in formats if format.type_name is not None}
    return {name: definition_of(get_datatype(name)) for name in sorted(named) if not is_built_in(name)}
