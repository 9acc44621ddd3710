"""Data types: the values that a code of a few bits stands for, as exact data.

A data type is a table: code -> integer numerator over a power of two. Everything else (largest magnitude, rounding
thresholds, bit-serial terms, decoder tables) is derived from it. To add a type, add one entry to ``_define`` below: the
quantizers, the packer and the simulator read this table and nothing else.

Sources: BitMoD = "BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration", HPCA 2025, Table IV; OliVe = "OliVe:
Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair Quantization", ISCA 2023, section 3; ANT =
"ANT: Exploiting Adaptive Numerical Data Type for Low-bit Deep Neural Network Quantization", MICRO 2022; OCP = "OCP
Microscaling Formats (MX) Specification v1.0".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType

from termwise.algorithms.errors import unknown_name


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
        source: the paper or specification that defines the type.
    """

    name: str
    bits: int
    numerators: tuple[int | None, ...]
    fraction_bits: int
    source: str
    integer: bool = False
    special: Mapping[int, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if len(self.numerators) != 1 << self.bits:
            raise ValueError(f"{self.name}: {len(self.numerators)} codes given; expected {1 << self.bits}")
        levels = [numerator for numerator in self.numerators if numerator is not None]
        if len(set(levels)) != len(levels):
            raise ValueError(f"{self.name}: two codes stand for one level; mark one of them as no level (None)")

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
    def terms(self) -> int:
        """Signed powers of two that a bit-serial PE needs for any level (BitMoD section IV-A).

        Integers take radix-4 Booth digits, one per two bits; other types the least number of signed powers of two.
        """
        if self.integer:
            return (self.bits + 1) // 2
        return max(signed_digit_weight(numerator) for numerator in self.sorted_numerators)


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
            source="BitMoD section III (symmetric integers)",
        )
    for name, layout, fraction_bits, magnitudes, resolution, asymmetry, source in (
        ("fp3", "e2m0", 0, [0, 1, 2, 4], 3, 6, "BitMoD Table IV"),
        ("fp4", "e2m1", 1, [0, 1, 2, 3, 4, 6, 8, 12], 10, 16, "OCP section 5.3.3; BitMoD Table IV"),
    ):
        bits = len(magnitudes).bit_length()
        minus_zero = len(magnitudes)
        yield DataType(
            name=f"{name}_{layout}",
            bits=bits,
            numerators=_signed(magnitudes, None),
            fraction_bits=fraction_bits,
            special={minus_zero: "minus zero: never written"},
            source=source,
        )
        for kind, special in (("er", resolution), ("ea", asymmetry)):
            for sign, value in (("pos", special), ("neg", -special)):
                yield DataType(
                    name=f"bitmod_{name}_{kind}_{sign}",
                    bits=bits,
                    numerators=_signed(magnitudes, value),
                    fraction_bits=fraction_bits,
                    special={minus_zero: f"special value {value / (1 << fraction_bits):+g} in place of minus zero"},
                    source="BitMoD Table IV",
                )
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
            special={len(magnitudes): "minus zero: never written"},
            source=source,
        )
    for bits in range(3, 9):
        yield DataType(
            name=f"flint{bits}",
            bits=bits,
            numerators=_signed(_flint_magnitudes(bits - 1), None),
            fraction_bits=0,
            special={1 << (bits - 1): "minus zero: never written; OliVe's victim identifier"},
            source="ANT section IV; OliVe section 3",
        )
    for bias in (2, 3):
        magnitudes = [(2 + (code & 1)) << ((code >> 1) + bias) for code in range(8)]
        yield DataType(
            name=f"abfloat4_e2m1_b{bias}",
            bits=4,
            numerators=(None, *magnitudes[1:], None, *(-magnitude for magnitude in magnitudes[1:])),
            fraction_bits=0,
            special={0: "not used", 8: "not used: the victim identifier"},
            source="OliVe section 3.3",
        )


@cache
def datatypes() -> Mapping[str, DataType]:
    """Every data type by name, in the order of definition."""
    return MappingProxyType({datatype.name: datatype for datatype in _define()})


def get_datatype(name: str) -> DataType:
    """The data type called ``name``. Raises ``InputError`` with the nearest name when there is none."""
    try:
        return datatypes()[name]
    except KeyError:
        raise unknown_name("data type", name, datatypes()) from None
