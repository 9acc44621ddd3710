"""Data types: the values that a code of a few bits stands for, as exact data.

A data type is a table: code -> integer numerator over a power of two. Everything else (largest magnitude, rounding
thresholds, bit-serial terms, decoder tables) is derived from it. To add a type, add one entry to ``_define`` below: the
quantizers, the packer and the simulator read this table and nothing else. A user's own types come from a TOML file
(``user_datatypes``) and are found here by name like the others.

BitMoD's special value may be any that the PE can multiply: ``bitmod_fp4_sv_pos_7`` is FP4 with +7 in place of minus
zero, ``bitmod_fp4_sv_neg_2.5`` the one with -2.5.

Sources: BitMoD = "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration", HPCA 2025, Table IV; OliVe = "OliVe:
Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair Quantization", ISCA 2023, section 3; ANT =
"ANT: Exploiting Adaptive Numerical Data Type for Low-bit Deep Neural Network Quantization", MICRO 2022; OCP = "OCP
Microscaling Formats (MX) Specification v1.0"; OFP8 = "OCP 8-bit Floating Point Specification (OFP8) v1.0"; QLoRA =
"QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, appendix E; NVFP4 = NVIDIA's 4-bit floating point with
E4M3 scales of 16 values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cache, cached_property, partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError, unknown_name

Rounding = Literal["lower", "even", "nearest", "floor"]
"""Where a value between two levels goes. ``lower``: the nearest, of equals the lower one (BitMoD, Algorithm 1);
``even``: the nearest, of equals the one with the even code (IEEE 754, OCP); ``nearest``: the nearest, of equals the one
farther from zero; ``floor``: toward zero. The last three are microxcaling's names."""

ROUNDINGS: tuple[Rounding, ...] = ("lower", "even", "nearest", "floor")

LONGEST_NUMERATOR = 40
"""Bits of a numerator: times a scale of 11 bits, a sum of two neighbours is still exact in a float64."""


def signed_digit_weight(value: int) -> int:
    """Least number of signed powers of two that add up to ``value`` (weight of its non-adjacent form).

    >>> [signed_digit_weight(value) for value in (0, 1, 3, 5, 7, 11)]
    [0, 1, 2, 2, 2, 3]
    """
    magnitude = abs(value)
    return ((3 * magnitude) ^ magnitude).bit_count()


@dataclass(frozen=True, kw_only=True)
class DataType:
    """One number format of a single value.

    Attributes:
        name: canonical name, for example ``bitmod_fp4_ea_pos``; ``get_datatype(name)`` returns the type again.
        bits: width of a code.
        numerators: for every code 0 .. 2**bits - 1 the numerator of its level, or None where the code is no level.
        fraction_bits: a level is its numerator / 2**fraction_bits.
        integer: True for two's complement integers, whose bit-serial terms are radix-4 Booth digits.
        special: what a code means that is no ordinary level, or stands outside the type's regular pattern.
        other_values: values of codes that are no levels: minus zero, infinities, NaN, the most negative integer. No
            quantizer writes them; ``decode`` and ``encode`` know them.
        source: the paper or specification that defines the type.
    """

    name: str
    bits: int
    numerators: tuple[int | None, ...]
    fraction_bits: int
    source: str
    integer: bool = False
    special: Mapping[int, str] = field(default_factory=dict, hash=False)
    other_values: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if len(self.numerators) != 1 << self.bits:
            raise ValueError(f"{self.name}: {len(self.numerators)} codes given; expected {1 << self.bits}")
        levels = [numerator for numerator in self.numerators if numerator is not None]
        if len(set(levels)) != len(levels):
            raise ValueError(f"{self.name}: two codes stand for one level; mark one of them as no level (None)")
        # One object for every NaN: dictionaries compare by identity first, so that equal types are equal.
        others = {code: math.nan if math.isnan(value) else value for code, value in self.other_values.items()}
        object.__setattr__(self, "other_values", others)

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew by its fields, so that a copy from another process equals this one."""
        return partial(type(self), **{entry.name: getattr(self, entry.name) for entry in fields(self)}), ()

    @cached_property
    def sorted_codes(self) -> tuple[int, ...]:
        """The codes that are levels, from the least level to the greatest."""
        pairs = [(numerator, code) for code, numerator in enumerate(self.numerators) if numerator is not None]
        return tuple(code for _, code in sorted(pairs))

    @cached_property
    def sorted_numerators(self) -> tuple[int, ...]:
        """The numerators of the levels in ascending order."""
        return tuple(sorted(numerator for numerator in self.numerators if numerator is not None))

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels in ascending order; exact, since each is a small integer over a power of two."""
        return tuple(numerator / (1 << self.fraction_bits) for numerator in self.sorted_numerators)

    @cached_property
    def max_numerator(self) -> int:
        """The largest magnitude among the numerators."""
        return max(abs(numerator) for numerator in self.sorted_numerators)

    @property
    def maximum(self) -> float:
        """The largest magnitude among the levels: the divisor of a group's absolute maximum that gives its scale."""
        return self.max_numerator / (1 << self.fraction_bits)

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """Value of every code, float64 [2**bits]; a code without one is a NaN that carries the code."""
        table = np.empty(1 << self.bits)
        for code, numerator in enumerate(self.numerators):
            value = self.other_values.get(code, math.nan) if numerator is None else float(self._level(numerator))
            table[code] = _nan_of(code) if math.isnan(value) else value
        return table

    def _level(self, numerator: int) -> Fraction:
        return Fraction(numerator, 1 << self.fraction_bits)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Values of ``codes``, uint8 of any shape. What is no number becomes NaN, from which ``encode`` finds it."""
        return self.values[codes]

    def encode(self, values: NDArray[np.floating], rounding: Rounding = "even") -> NDArray[np.uint8]:
        """Codes of ``values``, floating point of any shape; beyond the levels the outermost one (saturation).

        Whatever ``decode`` gives comes back as its code. Other NaN take the type's first NaN code; a negative value
        that rounds to zero takes minus zero where the type has one. Raises ``InputError`` for a NaN where it has none.
        """
        exact = values.astype(np.float64)
        levels = np.array(self.levels)
        codes = np.array(self.sorted_codes, dtype=np.uint8)
        above = np.minimum(np.searchsorted(levels, exact), levels.size - 1)  # least level that is not below
        below = np.maximum(above - 1, 0)
        up, down = levels[above] - exact, exact - levels[below]
        if rounding == "floor":
            higher = exact < 0
            higher |= up <= 0
        else:
            tie = {
                "lower": np.zeros(exact.shape, dtype=np.bool_),
                "even": codes[above] % 2 == 0,
                "nearest": exact > 0,
            }[rounding]
            higher = (up < down) | ((up == down) & tie)
        encoded = np.where(higher, codes[above], codes[below])
        zero = self.sorted_codes[self.sorted_numerators.index(0)] if 0 in self.sorted_numerators else None
        nan_codes = [code for code, value in self.other_values.items() if math.isnan(value)]
        missing = np.isnan(exact)
        if missing.any():
            payload = (exact.view(np.uint64) & _PAYLOAD).astype(np.intp)
            known = np.isnan(self.values)
            carried = missing & (payload < known.size) & known[np.minimum(payload, known.size - 1)]
            carried &= exact.view(np.uint64) == _NAN | payload.astype(np.uint64) | _CARRIES
            if not nan_codes and (missing & ~carried).any():
                raise InputError(f"{self.name} has no code for NaN; expected numbers")
            encoded = np.where(missing, nan_codes[0] if nan_codes else 0, encoded)
            encoded = np.where(carried, payload, encoded)
        for code, value in self.other_values.items():
            if value == 0:
                encoded = np.where(np.signbit(exact) & (encoded == zero) & ~missing, code, encoded)
            elif not math.isnan(value):
                encoded = np.where(exact == value, code, encoded)
        return encoded.astype(np.uint8)

    @cached_property
    def terms(self) -> int:
        """Signed powers of two that a bit-serial PE needs for any level (BitMoD section IV-A).

        Integers take radix-4 Booth digits, one per two bits; other types the least number of signed powers of two.
        """
        if self.integer:
            return (self.bits + 1) // 2
        return max(signed_digit_weight(numerator) for numerator in self.sorted_numerators)


def common_unit(datatypes: Sequence[DataType]) -> int:
    """The greatest power of two that divides all numerators of all ``datatypes``."""
    union = 0
    for datatype in datatypes:
        for numerator in datatype.sorted_numerators:
            union |= abs(numerator)
    return max(union & -union, 1)


_NAN = np.uint64(0x7FF8_0000_0000_0000)
_CARRIES = np.uint64(0x0000_0001_0000_0000)
_PAYLOAD = np.uint64(0xFF)


def _nan_of(code: int) -> float:
    """A NaN that carries ``code`` in its payload, beside a mark that tells it from an ordinary one."""
    return float(np.array([_NAN | _CARRIES | np.uint64(code)]).view(np.float64)[0])


def _signed(magnitudes: list[int], special: int | None) -> tuple[int | None, ...]:
    """Sign-magnitude table: ``magnitudes`` by low bits, then their negatives; minus zero becomes ``special``."""
    negatives: list[int | None] = [-magnitude for magnitude in magnitudes]
    negatives[magnitudes.index(0)] = special
    return (*magnitudes, *negatives)


def _float_magnitudes(exponent_bits: int, significand_bits: int) -> list[int]:
    """Non-negative levels by code of a float without infinities or NaN, over its least subnormal number."""
    codes = range(1 << (exponent_bits + significand_bits))
    one = 1 << significand_bits
    return [
        (one | code % one) << (code // one - 1) if code >= one else code  # normal, or subnormal
        for code in codes
    ]


def _flint_magnitudes(bits: int) -> list[int]:
    """Levels of the unsigned flint of ``bits`` bits by code (ANT; the leading-one position codes the exponent)."""
    half = 1 << (bits - 1)
    magnitudes = list(range(half))
    for low in range(half):
        if low == 0:
            magnitudes.append(1 << (2 * (bits - 1)))
        else:
            leading_zeros = bits - 1 - low.bit_length()
            magnitudes.append((low << 1) << (2 * leading_zeros))
    return magnitudes


def _define() -> Iterator[DataType]:
    for bits in range(2, 9):
        half = 1 << (bits - 1)
        yield DataType(
            name=f"int{bits}",
            bits=bits,
            numerators=(*range(half), None, *range(1 - half, 0)),
            fraction_bits=0,
            integer=True,
            special={half: "no level: the range is symmetric"},
            other_values={half: float(-half)},
            source="BitMoD section III (symmetric integers)",
        )
    for bits, source in ((3, "BitMoD Table IV"), (4, "OCP section 5.3.3; BitMoD Table IV")):
        magnitudes = _BITMOD_MAGNITUDES[bits]
        yield DataType(
            name=f"fp{bits}_e2m{bits - 3}",
            bits=bits,
            numerators=_signed(magnitudes, None),
            fraction_bits=bits - 3,
            special=_minus_zero(bits),
            other_values={len(magnitudes): -0.0},
            source=source,
        )
        for kind, value in _BITMOD_NAMED[bits].items():
            yield _bitmod(f"bitmod_fp{bits}_{kind}", bits, value, "BitMoD Table IV")
    for exponent_bits, significand_bits, source in (
        (2, 2, "BitMoD section III (FP5-E2M2)"),
        (3, 1, "BitMoD section III (FP5-E3M1)"),
        (2, 3, "OCP section 5.3.2 (FP6-E2M3)"),
        (3, 2, "OCP section 5.3.2 (FP6-E3M2)"),
    ):
        magnitudes = _float_magnitudes(exponent_bits, significand_bits)
        yield DataType(
            name=f"fp{1 + exponent_bits + significand_bits}_e{exponent_bits}m{significand_bits}",
            bits=1 + exponent_bits + significand_bits,
            numerators=_signed(magnitudes, None),
            fraction_bits=(1 << (exponent_bits - 1)) - 2 + significand_bits,
            special=_minus_zero(1 + exponent_bits + significand_bits),
            other_values={len(magnitudes): -0.0},
            source=source,
        )
    yield _fp8("fp8_e4m3", 4, 3, finite_codes=0x7F, source="OFP8 section 5.1; OCP section 5.3.1")
    yield _fp8("fp8_e5m2", 5, 2, finite_codes=0x7C, source="OFP8 section 5.1; OCP section 5.3.1")
    yield DataType(
        name="nf4",
        bits=4,
        numerators=tuple(int(Fraction(level) * (1 << _NF4_FRACTION_BITS)) for level in _NF4_LEVELS),
        fraction_bits=_NF4_FRACTION_BITS,
        source="QLoRA appendix E",
    )
    for bits in range(3, 7):
        magnitudes = [0, *(1 << exponent for exponent in range((1 << (bits - 1)) - 1))]
        yield DataType(
            name=f"pot{bits}",
            bits=bits,
            numerators=_signed(magnitudes, None),
            fraction_bits=0,
            special=_minus_zero(bits),
            other_values={len(magnitudes): -0.0},
            source="ANT section II (power of two)",
        )
    for bits in range(3, 9):
        yield DataType(
            name=f"flint{bits}",
            bits=bits,
            numerators=_signed(_flint_magnitudes(bits - 1), None),
            fraction_bits=0,
            special={1 << (bits - 1): "minus zero: never written; OliVe's victim identifier"},
            other_values={1 << (bits - 1): -0.0},
            source="ANT section IV; OliVe section 3",
        )
    for exponent_bits, significand_bits, bias, source in (
        (2, 1, 2, "OliVe section 3.3"),
        (2, 1, 3, "OliVe section 3.3"),
        (4, 3, 4, "OliVe section 3.3 (8 bits; the bias is ours: the least that clears 127; clipped to 2^15)"),
        (2, 5, 2, "the OliVe authors' 8-bit variant (the bias is ours: the least that clears 127)"),
    ):
        yield _abfloat(exponent_bits, significand_bits, bias, source)


_BITMOD_MAGNITUDES = {3: [0, 1, 2, 4], 4: [0, 1, 2, 3, 4, 6, 8, 12]}
"""Numerators by code of FP3, and of FP4 over 2: the types that take a special value (BitMoD Table IV)."""

_BITMOD_NAMED = {
    3: {"er_pos": 3, "er_neg": -3, "ea_pos": 6, "ea_neg": -6},
    4: {"er_pos": 10, "er_neg": -10, "ea_pos": 16, "ea_neg": -16},
}
"""Numerators of the special values that the paper chose, in the order in which its quantizer tries them."""

_NF4_FRACTION_BITS = 28
_NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Levels by code, as the FP32 numbers of QLoRA's table."""


def _minus_zero(bits: int) -> dict[int, str]:
    return {1 << (bits - 1): "minus zero: never written"}


def _bitmod(name: str, bits: int, special: int, source: str) -> DataType:
    """FP3 or FP4 with the numerator ``special`` in place of minus zero."""
    magnitudes = _BITMOD_MAGNITUDES[bits]
    fraction_bits = bits - 3
    return DataType(
        name=name,
        bits=bits,
        numerators=_signed(magnitudes, special),
        fraction_bits=fraction_bits,
        special={len(magnitudes): f"special value {special / (1 << fraction_bits):+g} in place of minus zero"},
        source=source,
    )


def _fp8(name: str, exponent_bits: int, significand_bits: int, *, finite_codes: int, source: str) -> DataType:
    """An 8-bit float of OFP8: ``finite_codes`` magnitudes are numbers, E5M2's next one is infinity, the rest NaN."""
    magnitudes: list[int | None] = list(_float_magnitudes(exponent_bits, significand_bits)[:finite_codes])
    magnitudes += [None] * (128 - finite_codes)
    negatives = [None if magnitude is None else -magnitude for magnitude in magnitudes]
    other = {128: -0.0}
    for code in range(finite_codes, 128):
        value = math.inf if code == 0x7C else math.nan
        other |= {code: value, code | 128: -value}
    return DataType(
        name=name,
        bits=8,
        numerators=(*magnitudes, None, *negatives[1:]),
        fraction_bits=(1 << (exponent_bits - 1)) - 2 + significand_bits,
        special={
            code: "minus zero: never written" if value == 0 else "infinity" if math.isinf(value) else "NaN"
            for code, value in sorted(other.items())
        },
        other_values=other,
        source=source,
    )


def _abfloat(exponent_bits: int, significand_bits: int, bias: int, source: str) -> DataType:
    """OliVe's outlier type: (2**m + mantissa) << (exponent + bias), without the code 0, magnitudes up to 2**15."""
    one = 1 << significand_bits
    half = 1 << (exponent_bits + significand_bits)
    magnitudes = [(one + code % one) << (code // one + bias) for code in range(half)]
    levels = [None, *(magnitude if magnitude <= 1 << 15 else None for magnitude in magnitudes[1:])]
    special = {0: "not used", half: "not used: the victim identifier"}
    special |= {
        code + sign: "not used: above 2^15" for sign in (0, half) for code in range(1, half) if not levels[code]
    }
    return DataType(
        name=f"abfloat{1 + exponent_bits + significand_bits}_e{exponent_bits}m{significand_bits}_b{bias}",
        bits=1 + exponent_bits + significand_bits,
        numerators=(*levels, *(None if level is None else -level for level in levels)),
        fraction_bits=0,
        special=special,
        source=source,
    )


def _define_blocks(types: Mapping[str, DataType]) -> Iterator[DataType]:
    """Elements of the block formats, whose groups share a scale of 8 bits: MX (OCP) and NVFP4."""
    for name, element, section in (
        ("mxfp4", "fp4_e2m1", "5.3.3"),
        ("mxfp6_e2m3", "fp6_e2m3", "5.3.2"),
        ("mxfp6_e3m2", "fp6_e3m2", "5.3.2"),
        ("mxfp8_e4m3", "fp8_e4m3", "5.3.1"),
        ("mxfp8_e5m2", "fp8_e5m2", "5.3.1"),
    ):
        yield replace(types[element], name=name, source=f"OCP section {section}, E8M0 scale of 32")
    yield replace(
        types["int8"],
        name="mxint8",
        fraction_bits=6,
        special={128: "-2, left unused: the range is symmetric"},
        other_values={128: -2.0},
        source="OCP section 5.3.4, E8M0 scale of 32",
    )
    yield replace(types["fp4_e2m1"], name="nvfp4", source="NVFP4: E4M3 scale of 16 under an FP32 scale of the matrix")


@cache
def _built_in() -> Mapping[str, DataType]:
    types = {datatype.name: datatype for datatype in _define()}
    types |= {datatype.name: datatype for datatype in _define_blocks(types)}
    return MappingProxyType(types)


_added: dict[str, DataType] = {}

_SPECIAL_VALUE = re.compile(r"bitmod_fp(?P<bits>[34])_sv_(?P<sign>pos|neg)_(?P<value>[0-9]{1,3}(?:\.[0-9]{1,2})?)")


def special_value_type(bits: int, value: float) -> DataType:
    """BitMoD's FP3 or FP4 with the special value ``value``; the paper's own types where it is one of theirs.

    Raises ``InputError`` where ``value`` is a level already, or more than the fixed point of the PE can hold
    (I3 I2 I1 I0 . F0, section IV-A: a multiple of 1 at 3 bits, of 0.5 at 4 bits, below 16).
    """
    unit = 1 << (bits - 3)
    numerator = value * unit
    if not (float(numerator).is_integer() and abs(numerator) < 16 * unit):
        raise InputError(f"special value {value:g}: expected a multiple of {1 / unit:g} below 16 for {bits}-bit BitMoD")
    if abs(numerator) in _BITMOD_MAGNITUDES[bits]:
        raise InputError(f"special value {value:g}: it is a level of FP{bits} already; expected another")
    for kind, named in _BITMOD_NAMED[bits].items():
        if named == numerator:
            return get_datatype(f"bitmod_fp{bits}_{kind}")
    return _special_value_type(bits, int(numerator))


@cache
def _special_value_type(bits: int, numerator: int) -> DataType:
    value = abs(numerator) / (1 << (bits - 3))
    name = f"bitmod_fp{bits}_sv_{'neg' if numerator < 0 else 'pos'}_{value:g}"
    return _bitmod(name, bits, numerator, "BitMoD section IV-A (programmable special value)")


def special_value(datatype: DataType) -> float | None:
    """The special value of a BitMoD type, what stands in place of minus zero; None for any other type."""
    if not datatype.name.startswith("bitmod_"):
        return None
    return float(datatype.values[1 << (datatype.bits - 1)])


def add_datatype(datatype: DataType) -> None:
    """Make a type known by its name. Raises ``InputError`` where another one has that name already."""
    known = datatypes().get(datatype.name)
    if known is not None and known != datatype:
        raise InputError(f"the data type {datatype.name} is defined already, with other levels; expected another name")
    if known is None:
        _added[datatype.name] = datatype


def is_built_in(name: str) -> bool:
    """Whether the type ``name`` comes with termwise rather than from a user."""
    return name in _built_in() or _SPECIAL_VALUE.fullmatch(name) is not None


def datatypes() -> Mapping[str, DataType]:
    """Every data type by name: termwise's in the order of definition, then the user's."""
    from termwise.algorithms.user_datatypes import datatypes_of_environment

    return MappingProxyType({**_built_in(), **datatypes_of_environment(), **_added})


def get_datatype(name: str) -> DataType:
    """The data type called ``name``. Raises ``InputError`` with the nearest name when there is none."""
    if name in _built_in():
        return _built_in()[name]
    match = _SPECIAL_VALUE.fullmatch(name)
    if match is not None:
        value = float(match["value"]) * (-1 if match["sign"] == "neg" else 1)
        return special_value_type(int(match["bits"]), value)
    known = datatypes()
    if name not in known:
        raise unknown_name("data type", name, known)
    return known[name]
