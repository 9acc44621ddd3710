"""Formats: what a user names when a weight matrix is to be quantized, and how many bytes it then takes.

A name is ``FAMILY-wBITS`` with an optional ``aBITS`` for activations and ``gGROUP``: ``bitmod-w4g128``,
``int-asym-w3g64``, ``olive-w4a4``. In the place of a family may stand one data type: ``fp6_e2m3-w6g128``,
``flint4-w4``. Without a group, an output channel (a row of the matrix) is one group. ``fp16`` has neither. The block
formats of OCP and NVIDIA have short names: ``mxfp4`` is ``mxfp4-w4g32``, ``nvfp4`` is ``nvfp4-w4g16``.

| family   | data types of a group                    | kept per group beside the codes                            |
|----------|------------------------------------------|------------------------------------------------------------|
| fp16     | IEEE binary16                            | nothing                                                    |
| type     | the one that is named                    | scale                                                      |
| int      | symmetric integer                        | scale                                                      |
| int-asym | unsigned integer minus a zero point      | scale, FP16; zero point, 8 bits                            |
| bitmod   | one per special value; INT6 or INT8      | scale, 8 bits under an FP32 scale of the row; type, 2 bits |
| olive    | int4 or flint4, or int8; abfloat         | scale, FP16                                                |
| ant      | integer or flint                         | scale, FP16; type, 1 bit (without groups: per matrix)      |
| gobo     | a dictionary of centroids per matrix     | nothing; outliers of the matrix: position and FP32 value   |

Behind the name may stand options, ``:key=value`` each; what is not named has its default:

| option    | of families  | values                                                                                  |
|-----------|--------------|-----------------------------------------------------------------------------------------|
| axis      | most         | ``input`` (default): groups along the inputs; ``output``: along the outputs (AdaDim)    |
| scale     | type, int    | ``fp16`` (default); ``e8m0``, a power of two as in MX; ``e4m3`` under an FP32 one, as   |
|           |              | in NVFP4                                                                                |
| rounding  | type, int    | ``lower`` (default), ``even`` (default of e8m0 and e4m3), ``nearest``, ``floor``        |
| special   | bitmod 3, 4  | one to eight special values: ``bitmod-w4g128:special=5,-5``                             |
| compat    | bitmod 3, 4  | ``authors-fp16``: the authors' selection, in their FP16 arithmetic                      |
| outlier   | olive 8      | ``e4m3`` (default, the paper), ``e2m5`` (the authors' code)                             |
| types     | ant          | some of ``int,flint,pot,float``; default ``int,flint``                                  |
| search    | ant          | ``absmax`` (default with groups): scale max / level; ``mse``: 75 to 150 % of it         |
| threshold | gobo         | log-probability below which a weight is an outlier; default -4                          |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from termwise.algorithms.datatypes import (
    ROUNDINGS,
    DataType,
    Rounding,
    datatypes,
    get_datatype,
    special_value_type,
)
from termwise.algorithms.errors import InputError, unknown_name

Family = Literal["fp16", "type", "int", "int-asym", "bitmod", "olive", "ant", "gobo"]
ScaleType = Literal["fp16", "e8m0", "e4m3"]

WEIGHT_BITS: Mapping[Family, tuple[int, ...]] = MappingProxyType(
    {
        "fp16": (16,),
        "int": tuple(range(2, 9)),
        "int-asym": tuple(range(2, 9)),
        "bitmod": (3, 4, 6, 8),
        "olive": (4, 8),
        "ant": tuple(range(3, 9)),
        "gobo": (3, 4),
    }
)
"""The widths of a weight that each family offers; a family ``type`` has those of its data type."""

BLOCK_GROUPS: Mapping[str, int] = MappingProxyType(
    {
        "mxfp4": 32,
        "mxfp6_e2m3": 32,
        "mxfp6_e3m2": 32,
        "mxfp8_e4m3": 32,
        "mxfp8_e5m2": 32,
        "mxint8": 32,
        "nvfp4": 16,
    }
)
"""Group size of the formats with a short name (OCP section 5.2: 32; NVFP4: 16)."""

ANT_TYPES: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "int": {bits: f"int{bits}" for bits in range(3, 9)},
        "flint": {bits: f"flint{bits}" for bits in range(3, 9)},
        "pot": {bits: f"pot{bits}" for bits in range(3, 7)},
        "float": {3: "fp3_e2m0", 4: "fp4_e2m1", 5: "fp5_e2m2", 6: "fp6_e2m3", 8: "fp8_e4m3"},
    }
)
"""ANT's kinds of data types (section IV), by the width of a code."""

_NAME = re.compile(
    r"(?P<family>[a-z0-9_]+|int-asym)-w(?P<bits>[1-9][0-9]?)(?:a(?P<activations>[1-9][0-9]?))?"
    r"(?:g(?P<group>[1-9][0-9]{0,8}))?"
)
_ITEM_BYTES = {"uint8": 1, "float16": 2, "float32": 4, "uint32": 4}
FREE = -1
"""A length in a ``PartLayout`` that depends on the weights."""


@dataclass(frozen=True, kw_only=True)
class PartLayout:
    """One array of a packed tensor: its shape (``FREE`` where the weights decide) and its element type."""

    shape: tuple[int, ...]
    dtype: Literal["uint8", "float16", "float32", "uint32"]

    @property
    def bytes(self) -> int:
        """Size of the array in bytes. Raises ``ValueError`` where the weights decide."""
        if FREE in self.shape:
            raise ValueError("the size of this part depends on the weights")
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a weight matrix is stored. Get one by ``get_format(name)``.

    Attributes:
        family: which quantizer (see the module's table).
        weight_bits: bits of one code.
        group_size: inputs that share a scale, counted along the input dimension; None is the whole row.
        type_name: the one data type of family ``type``; None in any other.
        activation_bits: width of quantized activations; None leaves them in floating point.
        options: the options that are not the default, (key, value) in alphabetical order.
    """

    family: Family
    weight_bits: int
    group_size: int | None = None
    type_name: str | None = None
    activation_bits: int | None = None
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The canonical name: ``get_format(format.name) == format``."""
        if self.family == "fp16":
            return "fp16"
        options = "".join(f":{key}={value}" for key, value in self.options)
        if self.type_name is not None and self.group_size == BLOCK_GROUPS.get(self.type_name, 0):
            if self.activation_bits is None:
                return f"{self.type_name}{options}"
            return f"{self.type_name}-w{self.weight_bits}a{self.activation_bits}{options}"
        group = "" if self.group_size is None else f"g{self.group_size}"
        activations = "" if self.activation_bits is None else f"a{self.activation_bits}"
        return f"{self.type_name or self.family}-w{self.weight_bits}{activations}{group}{options}"

    def option(self, key: str) -> str:
        """Value of an option, its default where it is not named."""
        return dict(self.options).get(key) or _default(self, key)

    @property
    def source(self) -> str:
        """The paper or specification that defines the format."""
        return self.datatypes[0].source if self.family == "type" else _SOURCES[self.family]

    @property
    def weights_only(self) -> Format:
        """The same format with activations in floating point."""
        return replace(self, activation_bits=None)

    @property
    def groups_along_outputs(self) -> bool:
        """Whether a group lies along the outputs (``axis=output``): the matrix is then stored transposed."""
        return self.option("axis") == "output"

    @property
    def along_inputs(self) -> Format:
        """The same format with groups along the inputs: what is stored of a transposed matrix."""
        return replace(self, options=tuple(option for option in self.options if option[0] != "axis"))

    @property
    def scale_type(self) -> ScaleType:
        """How the scale of a group is stored, of families ``type`` and ``int``."""
        return self.option("scale")  # type: ignore[return-value]  # checked on reading

    @property
    def rounding(self) -> Rounding:
        """Where a value between two levels goes."""
        return self.option("rounding") if self.family in ("type", "int") else "lower"  # type: ignore[return-value]

    @cached_property
    def datatypes(self) -> tuple[DataType, ...]:
        """The data types that a group may take, in the order in which the quantizer tries them; none for ``fp16``.

        For ``int-asym`` the difference of code and zero point, a signed integer of one bit more. GOBO's dictionary is
        no data type.
        """
        bits = self.weight_bits
        if self.family == "bitmod" and bits in (3, 4):
            values = _values(self.option("special"))
            return tuple(special_value_type(bits, value) for value in values)
        outlier = {4: ("abfloat4_e2m1_b2", "abfloat4_e2m1_b3"), 8: (_OUTLIERS[self.option("outlier")],)}
        normal = {4: ("int4", "flint4"), 8: ("int8",)}
        names: dict[Family, tuple[str, ...]] = {
            "fp16": (),
            "type": (self.type_name or "",),
            "int": (f"int{bits}",),
            "int-asym": (f"int{bits + 1}",) if bits < 8 else (),
            "bitmod": (f"int{bits}",),
            "olive": normal.get(bits, ()) + outlier.get(bits, ()),
            "ant": tuple(ANT_TYPES[kind].get(bits, "") for kind in self.option("types").split(",")),
            "gobo": (),
        }
        return tuple(get_datatype(name) for name in names[self.family])

    def groups(self, inputs: int) -> int:
        """Groups in a row of ``inputs`` weights; the last one is short when the group does not divide the row."""
        return 1 if self.group_size is None else -(-inputs // self.group_size)

    def short_group(self, inputs: int) -> int:
        """Weights in the short last group of a row of ``inputs`` weights; 0 when all groups are full."""
        return 0 if self.group_size is None else inputs % self.group_size

    def layout(self, outputs: int, inputs: int) -> dict[str, PartLayout]:
        """The arrays of a packed ``outputs`` × ``inputs`` matrix, by name.

        Codes lie row by row, least significant bit first, each row padded to whole bytes; so do type selectors. With
        groups along the outputs, rows are the columns of the matrix.
        """
        if self.family == "fp16":
            return {"values": PartLayout(shape=(outputs, inputs), dtype="float16")}
        if self.groups_along_outputs:
            outputs, inputs = inputs, outputs
        groups = self.groups(inputs)
        per_group = (outputs, groups)
        parts = {"codes": PartLayout(shape=(outputs, packed_row_bytes(inputs, self.weight_bits)), dtype="uint8")}
        if self.family == "gobo":
            parts["dictionary"] = PartLayout(shape=(1 << self.weight_bits,), dtype="float32")
            parts["outlier_positions"] = PartLayout(shape=(FREE,), dtype="uint32")
            parts["outlier_values"] = PartLayout(shape=(FREE,), dtype="float32")
            return parts
        if self.family == "bitmod":
            parts["group_scales"] = PartLayout(shape=per_group, dtype="uint8")
            parts["channel_scales"] = PartLayout(shape=(outputs,), dtype="float32")
        elif self.family in ("type", "int") and self.scale_type != "fp16":
            parts["scales"] = PartLayout(shape=per_group, dtype="uint8")
            if self.scale_type == "e4m3":
                parts["tensor_scale"] = PartLayout(shape=(1,), dtype="float32")
        else:
            parts["scales"] = PartLayout(shape=per_group, dtype="float16")
        if self.family == "int-asym":
            parts["zero_points"] = PartLayout(shape=per_group, dtype="uint8")
        elif self.selector_bits:
            selector_bytes = packed_row_bytes(groups, self.selector_bits)
            parts["selectors"] = PartLayout(shape=(outputs, selector_bytes), dtype="uint8")
        elif self.type_per_matrix:
            parts["matrix_type"] = PartLayout(shape=(1,), dtype="uint8")
        return parts

    @property
    def type_per_matrix(self) -> bool:
        """Whether one choice of data type holds for the whole matrix: OliVe's normal type, ANT's without groups."""
        return self.family == "olive" or (self.family == "ant" and self.group_size is None)

    @property
    def selector_bits(self) -> int:
        """Bits that name the data type of a group: 2 for BitMoD's four special values, 1 for ANT's two types."""
        if self.family not in ("bitmod", "ant") or self.type_per_matrix:
            return 0
        return (len(self.datatypes) - 1).bit_length()

    def packed_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a packed ``outputs`` × ``inputs`` matrix, with all its scales and selectors.

        Raises ``InputError`` where they depend on the weights (GOBO's outliers).
        """
        layout = self.layout(outputs, inputs)
        if any(FREE in part.shape for part in layout.values()):
            raise InputError(f"the size of {self.name} depends on the weights; expected a model with weights")
        return sum(part.bytes for part in layout.values())

    def bits_per_weight(self, outputs: int, inputs: int) -> float:
        """Bits per weight of a packed ``outputs`` × ``inputs`` matrix, counted from its bytes."""
        return 8 * self.packed_bytes(outputs, inputs) / (outputs * inputs)


def packed_row_bytes(values: int, bits: int) -> int:
    """Bytes of a row of ``values`` codes of ``bits`` bits: packed without gaps, padded to a whole byte."""
    return -(-values * bits // 8)


_SOURCES: Mapping[Family, str] = MappingProxyType(
    {
        "fp16": "IEEE 754 binary16",
        "int": "BitMoD section III (symmetric integers, FP16 scales)",
        "int-asym": "BitMoD section III-C (24 bits per group)",
        "bitmod": "BitMoD section III-B, Algorithm 1; section III-C",
        "olive": "OliVe section 3, Algorithms 1 and 2",
        "ant": "ANT section IV; by group as BitMoD Table VI",
        "gobo": "GOBO (MICRO 2020)",
    }
)

_OUTLIERS = {"e4m3": "abfloat8_e4m3_b4", "e2m5": "abfloat8_e2m5_b2"}
_PAPER_SPECIAL = {3: "3,-3,6,-6", 4: "5,-5,8,-8"}
_AUTHORS = "authors-fp16"
_EXACT = "exact"


def _default(format: Format, key: str) -> str:
    """Default of option ``key``."""
    block = format.type_name if format.type_name in BLOCK_GROUPS else None
    if key == "scale":
        return "fp16" if block is None else "e4m3" if block == "nvfp4" else "e8m0"
    if key == "rounding":
        return "lower" if format.option("scale") == "fp16" else "even"
    if key == "search":
        return "mse" if format.group_size is None else "absmax"
    if key == "special":
        return _PAPER_SPECIAL.get(format.weight_bits, "")
    return {"axis": "input", "compat": _EXACT, "outlier": "e4m3", "types": "int,flint", "threshold": "-4"}[key]


def _values(text: str) -> tuple[float, ...]:
    return tuple(float(value) for value in text.split(","))


def _option_keys(format: Format) -> tuple[str, ...]:
    """The options that a format has."""
    by_family: dict[Family, tuple[str, ...]] = {
        "fp16": (),
        "type": ("axis", "rounding", "scale"),
        "int": ("axis", "rounding", "scale"),
        "int-asym": ("axis",),
        "bitmod": ("axis", "compat", "special") if format.weight_bits in (3, 4) else ("axis",),
        "olive": ("axis", "outlier") if format.weight_bits == 8 else ("axis",),
        "ant": ("axis", "search", "types"),
        "gobo": ("threshold",),
    }
    return by_family[format.family]


def _checked_option(format: Format, key: str, value: str) -> str:
    """The canonical text of an option's value. Raises ``InputError`` that says what was expected."""
    choices: dict[str, tuple[str, ...]] = {
        "axis": ("input", "output"),
        "scale": ("fp16", "e8m0", "e4m3"),
        "rounding": ROUNDINGS,
        "compat": (_EXACT, _AUTHORS),
        "outlier": tuple(_OUTLIERS),
        "search": ("absmax", "mse"),
    }
    if key in choices:
        if value not in choices[key]:
            raise InputError(f"option {key}={value}: expected one of {', '.join(choices[key])}")
        return value
    if key == "types":
        kinds = value.split(",")
        offered = [kind for kind, types in ANT_TYPES.items() if format.weight_bits in types]
        if not set(kinds) <= set(offered) or len(set(kinds)) != len(kinds):
            raise InputError(f"option types={value}: expected some of {','.join(offered)}, each once")
        return ",".join(kind for kind in ANT_TYPES if kind in kinds)
    try:
        numbers = _values(value)
    except ValueError:
        numbers = (math.nan,)
    if key == "threshold":
        if len(numbers) != 1 or not math.isfinite(numbers[0]):
            raise InputError(f"option threshold={value}: expected a number, the natural logarithm of a density")
        return f"{numbers[0]:.12g}"
    if not all(map(math.isfinite, numbers)) or len(set(numbers)) != len(numbers) or len(numbers) > 8:
        raise InputError(f"option special={value}: expected one to eight different numbers, separated by commas")
    for number in numbers:
        special_value_type(format.weight_bits, number)
    return ",".join(f"{number:g}" for number in numbers)


def _with_options(format: Format, options: list[str], name: str) -> Format:
    """``format`` with the options, ``key=value`` each."""
    keys = _option_keys(format)
    found: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in keys or key in found:
            expected = f"each of {', '.join(keys)} at most once, as key=value" if keys else "none"
            raise InputError(f"format {name!r}: option {option!r}; expected {expected}")
        try:
            found[key] = _checked_option(format, key, value)
        except InputError as error:
            raise InputError(f"format {name!r}: {error}") from None
    chosen = replace(format, options=tuple(sorted(found.items())))
    kept = tuple((key, value) for key, value in chosen.options if value != _default(chosen, key))
    if dict(kept).get("compat") and "special" in dict(kept):
        raise InputError(f"format {name!r}: the authors' selection has no special values of yours; expected one option")
    return replace(format, options=kept)


_ACTIVATION_BITS: Mapping[Family, tuple[int, ...]] = MappingProxyType(
    {
        "fp16": (),
        "type": tuple(range(4, 9)),
        "int": tuple(range(4, 9)),
        "int-asym": tuple(range(4, 9)),
        "bitmod": tuple(range(4, 9)),
        "olive": (4, 8),
        "ant": tuple(range(3, 9)),
        "gobo": (),
    }
)
_SCALE_ACTIVATION_BITS: Mapping[ScaleType, tuple[int, ...]] = MappingProxyType({"e8m0": (4, 6, 8), "e4m3": (4,)})


def get_format(name: str) -> Format:
    """The format called ``name``. Raises ``InputError`` that says which part of the name is wrong."""
    plain, *options = name.split(":")
    if plain == "fp16":
        return _with_options(Format(family="fp16", weight_bits=16), options, name)
    if plain in BLOCK_GROUPS:
        plain = f"{plain}-w{get_datatype(plain).bits}g{BLOCK_GROUPS[plain]}"
    match = _NAME.fullmatch(plain)
    if match is None:
        raise unknown_name("format", name, format_names())
    family: Family = match["family"]  # type: ignore[assignment]  # unless it is a data type, or in no table
    bits = int(match["bits"])
    group = None if match["group"] is None else int(match["group"])
    type_name = None
    if family not in WEIGHT_BITS and family in single_types():
        family, type_name = "type", match["family"]
        group = group or BLOCK_GROUPS.get(type_name)
        if bits != get_datatype(type_name).bits:
            raise InputError(f"format {name!r}: {type_name} has {get_datatype(type_name).bits} bits; got {bits}")
    elif family not in WEIGHT_BITS or family == "fp16":
        raise unknown_name("format", name, format_names())
    elif bits not in WEIGHT_BITS[family]:
        widths = ", ".join(map(str, WEIGHT_BITS[family]))
        raise InputError(f"format {name!r}: {family} has no {bits}-bit weights; expected one of {widths}")
    if family == "olive" and group is not None and group % 2:
        raise InputError(f"format {name!r}: OliVe encodes pairs, so its group must be even; got {group}")
    if family == "gobo" and group is not None:
        raise InputError(f"format {name!r}: GOBO has one dictionary per matrix; expected no group")
    format = Format(family=family, weight_bits=bits, group_size=group, type_name=type_name)
    format = _with_options(format, options, name)
    if match["activations"] is not None:
        wanted = int(match["activations"])
        widths_of_activations = _ACTIVATION_BITS[family]
        if family in ("type", "int"):
            widths_of_activations = _SCALE_ACTIVATION_BITS.get(format.scale_type, widths_of_activations)
        if wanted not in widths_of_activations:
            expected = f"one of {', '.join(map(str, widths_of_activations))}" if widths_of_activations else "none"
            raise InputError(f"format {name!r}: {wanted}-bit activations; expected {expected}")
        format = replace(format, activation_bits=wanted)
    return format


_MX = {4: "mxfp4", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"}


def activation_format(format: Format) -> Format | None:
    """The format that activations are quantized to when weights are in ``format``; None if they stay as they are.

    Raises ``InputError`` where there is none of that width.
    """
    bits = format.activation_bits
    if bits is None:
        return None
    if format.family in ("int", "type") and format.scale_type == "e8m0":
        if bits not in _MX:
            raise InputError(f"{format.name}: MX has no {bits}-bit activations; expected 4, 6 or 8")
        return get_format(_MX[bits])
    if format.family in ("int", "type") and format.scale_type == "e4m3":
        return get_format("nvfp4")
    if format.family not in ("olive", "ant"):
        return get_format(f"int-w{bits}")
    kept = []
    for key, value in format.options:
        if key == "types":
            kinds = [kind for kind in value.split(",") if bits in ANT_TYPES[kind]]
            if not kinds:
                raise InputError(f"{format.name}: none of {value} has {bits}-bit activations; expected int or flint")
            kept.append(f":types={','.join(kinds)}")
        elif key == "outlier" and bits == format.weight_bits:
            kept.append(f":outlier={value}")
    return get_format(f"{format.family}-w{bits}{''.join(kept)}")


def single_types() -> tuple[str, ...]:
    """Data types that a format may name alone: all that have a zero, but the integers, which are a family."""
    return tuple(
        name
        for name, datatype in datatypes().items()
        if 0 in datatype.sorted_numerators and (name in BLOCK_GROUPS or not datatype.integer)
    )


def format_names() -> tuple[str, ...]:
    """One example of every family and width, and of most data types; other group sizes are named likewise."""
    examples = ["fp16"]
    for family, widths in WEIGHT_BITS.items():
        if family != "fp16":
            group = "" if family in ("olive", "gobo") else "g128"
            examples += [f"{family}-w{bits}{group}" for bits in reversed(widths)]
    for name in single_types():
        if not name.startswith("bitmod"):
            examples.append(name if name in BLOCK_GROUPS else f"{name}-w{get_datatype(name).bits}g128")
    return tuple(examples)
