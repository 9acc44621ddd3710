"""Units that can be written as Verilog and synthesized, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from termwise.algorithms.bit_serial import BitSerialSpec, Numerics
from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.errors import unknown_name
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import ProcessingElementSpec
from termwise.rtl.accelerator import Accelerator, AcceleratorDesign
from termwise.rtl.accumulator import AccumulatorParts, ColumnAccumulator
from termwise.rtl.array import Array, ArrayDesign
from termwise.rtl.bit_parallel import HalfMac, IntegerMac
from termwise.rtl.bit_serial import ActivationAligner, BitSerialPe, least_sum_bits
from termwise.rtl.borders import NARROW_TYPES, WIDE_TYPES
from termwise.rtl.decoders import ShiftedIntegerDecoder
from termwise.rtl.dictionary import DictionaryPe
from termwise.rtl.float32 import Float32Adder, Float32Multiplier
from termwise.rtl.handover import Dequantizer
from termwise.rtl.term_generator import TermGenerator, weight_types

Kind = Literal["pe", "block", "array"]
BITMOD_TYPES = ("bitmod_fp3", "bitmod_fp4", "int6", "int8")
"""The data types of BitMoD's formats, which its own term generator reads."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Something that can be built.

    Attributes:
        name: as commands take it, and of the Verilog module.
        summary: one line.
        kind: ``pe``, ``block`` (around PEs) or ``array``.
        build: makes the component.
        products_per_cycle: of a PE, multiplications of a weight and an activation that it does.
        megahertz: what place and route aims at.
        has_memories: whether it has block memories, which gates are not.
    """

    name: str
    summary: str
    kind: Kind
    build: Callable[[], Any]
    products_per_cycle: Fraction | None = None
    megahertz: int = 120
    has_memories: bool = False


def _bit_serial(numerics: Numerics) -> Callable[[], BitSerialPe]:
    spec = BitSerialSpec(numerics=numerics)
    # The largest numerator of BitMoD's types is -128, of groups of 128.
    return lambda: BitSerialPe(spec, least_sum_bits(spec, 128, 128))


def _generator(names: tuple[str, ...] | None) -> Callable[[], TermGenerator]:
    spec = BitSerialSpec()
    types = tuple(entry for entry in weight_types(spec) if names is None or entry.name in names)
    return lambda: TermGenerator(spec, types)


def _decoder(names: tuple[str, ...], outlier: str | None) -> Callable[[], ShiftedIntegerDecoder]:
    types = tuple(map(get_datatype, names))
    return lambda: ShiftedIntegerDecoder(types, None if outlier is None else get_datatype(outlier))


def _accumulator() -> ColumnAccumulator:
    return ColumnAccumulator(AccumulatorParts(integer_bits=23, channel_scales=True))


def _four_by_four(kind: str, summary: str, spec: ProcessingElementSpec, megahertz: int, bits: int = 8) -> Unit:
    types = BITMOD_TYPES if isinstance(spec, BitSerialSpec) else ()
    design = ArrayDesign(processing_element=spec, rows=4, columns=4, types=types, bits=bits)
    return Unit(
        name=f"{kind}_array_4x4",
        summary=f"4 × 4 PEs, {summary}",
        kind="array",
        build=lambda: Array(design),
        megahertz=megahertz,
    )


def board_design() -> AcceleratorDesign:
    """The accelerator of the board: 4 × 4 PEs of BitMoD, published numerics, every type of its formats."""
    return AcceleratorDesign(array=ArrayDesign(rows=4, columns=4, types=BITMOD_TYPES))


def _pe(name: str, summary: str, build: Callable[[], Any], products: int, megahertz: int = 120) -> Unit:
    return Unit(
        name=name, summary=summary, kind="pe", build=build, products_per_cycle=Fraction(products), megahertz=megahertz
    )


def _block(name: str, summary: str, build: Callable[[], Any]) -> Unit:
    return Unit(name=name, summary=summary, kind="block", build=build)


def _units() -> Mapping[str, Unit]:
    aligned = BitSerialSpec(numerics="shared_exponent")
    integers = OutlierVictimSpec(activations="integer")
    narrow, wide = "abfloat4_e2m1_b2", "abfloat8_e4m3_b4"
    found = [
        _pe("fp16_mac", "FP16 × FP16 into FP32", HalfMac, 1),
        _pe("fp16_mac_int8", "FP16 × shifted integer of up to 8 bits into FP32", lambda: HalfMac("integer"), 1),
        # 4 lanes, 2 terms: 2 products per cycle.
        _pe("bit_serial", "BitMoD, published numerics, 4 lanes", _bit_serial("paper"), 2, 80),
        _pe("bit_serial_shared_exponent", "BitMoD, aligned once per group, 4 lanes", _bit_serial("shared_exponent"), 2),
        _pe("bit_serial_exact", "BitMoD, nothing is lost within a group, 4 lanes", _bit_serial("exact"), 2),
        _pe("outlier_victim", "OliVe, codes of 4 bits on both sides", lambda: IntegerMac(4), 1),
        _pe("outlier_victim_8bit", "OliVe, codes of 8 bits: four multipliers of 4 bits", lambda: IntegerMac(8), 1),
        _pe("flint", "ANT, codes of 4 bits: the PE of outlier_victim", lambda: IntegerMac(4), 1),
        _pe("dictionary", "GOBO, 8 centroids", lambda: DictionaryPe(3), 1),
        _block("term_generator", "of a row, 4 lanes, BitMoD's data types", _generator(BITMOD_TYPES)),
        _block("term_generator_all_types", "of a row, 4 lanes, every built-in type", _generator(None)),
        _block("activation_aligner", "of a column, 4 lanes, shared exponent", lambda: ActivationAligner(aligned)),
        _block("flint_decoder", "of codes of up to 4 bits", _decoder(NARROW_TYPES, None)),
        _block("pair_decoder", "OliVe's, of 4 bits", _decoder(("int4", "flint4"), narrow)),
        _block("pair_decoder_8bit", "OliVe's, of 8 bits", _decoder(("int8",), wide)),
        _block("pair_decoder_all_types", "OliVe's, of up to 8 bits, every type", _decoder(WIDE_TYPES, wide)),
        _block("dequantizer", "of a bit_serial PE: sum × 8-bit scale, a bit per cycle", lambda: Dequantizer(15, 8)),
        _block("column_accumulator", "of 8 rows of bit_serial PEs", _accumulator),
        _block("float32_adder", "FP32 + FP32", Float32Adder),
        _block("float32_multiplier", "FP32 × FP32", Float32Multiplier),
        _four_by_four("bit_serial", "published numerics", BitSerialSpec(), 80),
        _four_by_four("bit_serial_shared_exponent", "shared exponent", aligned, 150),
        _four_by_four("outlier_victim", "codes of 4 bits on both sides", integers, 150, bits=4),
        _four_by_four("fp16_mac", "FP16", Fp16MacSpec(), 40),
        Unit(
            name="accelerator",
            summary="4 × 4 PEs of BitMoD with memories, controller and registers",
            kind="array",
            build=lambda: Accelerator(board_design()),
            megahertz=50,
            has_memories=True,
        ),
    ]
    return {unit.name: unit for unit in found}


UNITS: Mapping[str, Unit] = _units()


def get_unit(name: str) -> Unit:
    """The unit of a name. Raises ``InputError`` with the nearest name."""
    if name not in UNITS:
        raise unknown_name("unit", name, UNITS)
    return UNITS[name]
