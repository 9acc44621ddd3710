"""Formats: what a user names when a weight matrix is to be quantized, and how many bytes it then takes.

A name is ``FAMILY-wBITS`` with an optional ``gGROUP``: ``bitmod-w4g128``, ``int-asym-w3g64``, ``olive-w4``. In the
place of a family may stand one data type: ``fp6_e2m3-w6g128``, ``flint4-w4``. Without a group, an output channel (a
row of the matrix) is one group. ``fp16`` has neither.

| family   | data types of a group                    | kept per group beside the codes                            |
|----------|------------------------------------------|------------------------------------------------------------|
| fp16     | IEEE binary16                            | nothing                                                    |
| type     | the one that is named                    | scale, FP16                                                |
| int      | symmetric integer                        | scale, FP16                                                |
| int-asym | unsigned integer minus a zero point      | scale, FP16; zero point, 8 bits                            |
| bitmod   | one of four special values               | scale, 8 bits under an FP32 scale of the row; type, 2 bits |
| olive    | int4 or flint4 (one per matrix), abfloat | scale, FP16                                                |
| ant      | integer or flint                         | scale, FP16; type, 1 bit                                   |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Literal

from termwise.algorithms.datatypes import DataType, datatypes, get_datatype
from termwise.algorithms.errors import InputError, unknown_name

Family = Literal["fp16", "type", "int", "int-asym", "bitmod", "olive", "ant"]

WEIGHT_BITS: Mapping[Family, tuple[int, ...]] = MappingProxyType(
    {
        "fp16": (16,),
        "int": tuple(range(2, 9)),
        "int-asym": tuple(range(2, 9)),
        "bitmod": (3, 4),
        "olive": (4,),
        "ant": (3, 4),
    }
)
"""The widths of a weight that each family offers; a family ``type`` has those of its data type."""

_NAME = re.compile(r"(?P<family>[a-z0-9_]+|int-asym)-w(?P<bits>[1-9][0-9]*)(?:g(?P<group>[1-9][0-9]*))?")
_ITEM_BYTES = {"uint8": 1, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class PartLayout:
    """One array of a packed tensor: its shape and its element type (``uint8``, ``float16``, ``float32``)."""

    shape: tuple[int, ...]
    dtype: Literal["uint8", "float16", "float32"]

    @property
    def bytes(self) -> int:
        """Size of the array in bytes."""
        size = _ITEM_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a weight matrix is stored. Get one by ``get_format(name)``.

    Attributes:
        family: which quantizer (see the module's table).
        weight_bits: bits of one code.
        group_size: inputs that share a scale, counted along the input dimension; None is the whole row.
        type_name: the one data type of family ``type``; None in any other.
    """

    family: Family
    weight_bits: int
    group_size: int | None = None
    type_name: str | None = None

    @property
    def name(self) -> str:
        """The canonical name: ``get_format(format.name) == format``."""
        if self.family == "fp16":
            return "fp16"
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"{self.type_name or self.family}-w{self.weight_bits}{group}"

    @cached_property
    def datatypes(self) -> tuple[DataType, ...]:
        """The data types that a group may take, in the order in which the quantizer tries them; none for ``fp16``.

        For ``int-asym`` the difference of code and zero point, a signed integer of one bit more.
        """
        bits = self.weight_bits
        names: dict[Family, tuple[str, ...]] = {
            "fp16": (),
            "type": (self.type_name or "",),
            "int": (f"int{bits}",),
            "int-asym": (f"int{bits + 1}",) if bits < 8 else (),
            "bitmod": tuple(f"bitmod_fp{bits}_{kind}" for kind in ("er_pos", "er_neg", "ea_pos", "ea_neg")),
            "olive": ("int4", "flint4", "abfloat4_e2m1_b2", "abfloat4_e2m1_b3"),
            "ant": (f"int{bits}", f"flint{bits}"),
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

        Codes lie row by row, least significant bit first, each row padded to whole bytes; so do type selectors.
        """
        if self.family == "fp16":
            return {"values": PartLayout(shape=(outputs, inputs), dtype="float16")}
        groups = self.groups(inputs)
        per_group = (outputs, groups)
        parts = {"codes": PartLayout(shape=(outputs, packed_row_bytes(inputs, self.weight_bits)), dtype="uint8")}
        if self.family == "bitmod":
            parts["group_scales"] = PartLayout(shape=per_group, dtype="uint8")
            parts["channel_scales"] = PartLayout(shape=(outputs,), dtype="float32")
        else:
            parts["scales"] = PartLayout(shape=per_group, dtype="float16")
        if self.family == "int-asym":
            parts["zero_points"] = PartLayout(shape=per_group, dtype="uint8")
        elif self.family in ("bitmod", "ant"):
            selector_bytes = packed_row_bytes(groups, self.selector_bits)
            parts["selectors"] = PartLayout(shape=(outputs, selector_bytes), dtype="uint8")
        elif self.family == "olive":
            parts["normal_type"] = PartLayout(shape=(1,), dtype="uint8")
        return parts

    @property
    def selector_bits(self) -> int:
        """Bits that name the data type of a group: 2 for BitMoD's four special values, 1 for ANT's two types."""
        return {"bitmod": 2, "ant": 1}.get(self.family, 0)

    def packed_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a packed ``outputs`` × ``inputs`` matrix, with all its scales and selectors."""
        return sum(part.bytes for part in self.layout(outputs, inputs).values())

    def bits_per_weight(self, outputs: int, inputs: int) -> float:
        """Bits per weight of a packed ``outputs`` × ``inputs`` matrix, counted from its bytes."""
        return 8 * self.packed_bytes(outputs, inputs) / (outputs * inputs)


def packed_row_bytes(values: int, bits: int) -> int:
    """Bytes of a row of ``values`` codes of ``bits`` bits: packed without gaps, padded to a whole byte."""
    return -(-values * bits // 8)


def get_format(name: str) -> Format:
    """The format called ``name``. Raises ``InputError`` that says which part of the name is wrong."""
    if name == "fp16":
        return Format(family="fp16", weight_bits=16)
    match = _NAME.fullmatch(name)
    if match is None:
        raise unknown_name("format", name, format_names())
    family: Family = match["family"]  # type: ignore[assignment]  # unless it is a data type, or in no table
    bits = int(match["bits"])
    type_name = None
    if family in single_types():
        family, type_name = "type", match["family"]
        if bits != get_datatype(type_name).bits:
            raise InputError(f"format {name!r}: {type_name} has {get_datatype(type_name).bits} bits; got {bits}")
    elif family not in WEIGHT_BITS or family == "fp16":
        raise unknown_name("format", name, format_names())
    elif bits not in WEIGHT_BITS[family]:
        widths = ", ".join(map(str, WEIGHT_BITS[family]))
        raise InputError(f"format {name!r}: {family} has no {bits}-bit weights; expected one of {widths}")
    group = None if match["group"] is None else int(match["group"])
    if family == "olive" and group is not None and group % 2:
        raise InputError(f"format {name!r}: OliVe encodes pairs, so its group must be even; got {group}")
    return Format(family=family, weight_bits=bits, group_size=group, type_name=type_name)


@cache
def single_types() -> tuple[str, ...]:
    """Data types that a format may name alone: all that have a zero, but the integers, which are a family."""
    return tuple(
        name for name, datatype in datatypes().items() if 0 in datatype.sorted_numerators and not datatype.integer
    )


def format_names() -> tuple[str, ...]:
    """One example of every family and width, and of most data types; other group sizes are named likewise."""
    examples = ["fp16"]
    for family, widths in WEIGHT_BITS.items():
        if family != "fp16":
            group = "" if family == "olive" else "g128"
            examples += [f"{family}-w{bits}{group}" for bits in reversed(widths)]
    examples += [f"{name}-w{get_datatype(name).bits}g128" for name in single_types() if not name.startswith("bitmod")]
    return tuple(examples)
