"""What stands around the PEs of an array: borders of rows and columns, by kind of PE.

A kind of PE is a ``Datapath``: how wide its words in the operand memories are, what decodes them on the borders, the
PE, and how a sum becomes a number in the column accumulator (``docs/microarchitecture.md``, section 3). A new PE is a
new ``Datapath``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.dictionary import DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import (
    HALF_SIGNIFICAND_BITS,
    BitParallelSpec,
    PipelineTiming,
)
from termwise.rtl.accumulator import AccumulatorParts
from termwise.rtl.bit_parallel import HALF_NORMAL, INTEGER_NORMAL, HalfMac, IntegerMac, normal_half, normal_integer
from termwise.rtl.bit_serial import (
    HALF_EXPONENT_BITS,
    ActivationAligner,
    BitSerialPe,
    activation_layout,
    least_sum_bits,
    weight_terms,
)
from termwise.rtl.decoders import CENTROID_INDEX_BITS, ShiftedIntegerDecoder, shifted_integer_layout
from termwise.rtl.dictionary import DictionaryPe, Operation, check_outliers, dictionary_term
from termwise.rtl.float32 import Steps, half_to_float
from termwise.rtl.processing_element import decode_half, delayed
from termwise.rtl.term_generator import (
    MOST_BITS,
    SPECIAL_VALUE,
    SPECIAL_VALUES,
    TERM_BITS,
    TermGenerator,
    WeightType,
)

ScaleKind = Literal["integer", "half"]
GROUP_WORD = data.StructLayout({"scale": 16, "selector": 8})
"""What lies beside the codes of a group: its scale, and what its codes mean (special value or zero point or type)."""

TYPE_BITS = 5
LAYER = data.StructLayout(
    {
        "type": TYPE_BITS,
        "typed_groups": 1,
        "exponent_offset": signed(10),
        "special_values": data.ArrayLayout(SPECIAL_VALUE, SPECIAL_VALUES),
        "paired": 1,
        "bias": 4,
        "activation_type": TYPE_BITS,
        "activation_paired": 1,
        "activation_bias": 4,
    }
)
"""What stays the same for a layer.

type: of the weights, an index into the decoder's types; with ``typed_groups`` the group's selector says it instead.
exponent_offset: added to every exponent of a sum: fraction bits of the levels and the bias of the activations.
special_values: of BitMoD.
paired, bias: outlier-victim pairs, and the bias of their outliers.
activation_…: the same of activations that are codes.
"""

CENTROIDS = 1 << CENTROID_INDEX_BITS
ROW_END = data.StructLayout({"centroid": 1, "outlier": 1, "number": CENTROID_INDEX_BITS})
"""Of a term after a row of indices: the centroid of that number, or the next outlier of every row, or nothing."""

OUTLIER_COUNTS = data.StructLayout({"own": 16, "most": 16})
"""Outliers of a row, and of the row of its tile that has the most."""

SCALE_PRODUCT_CYCLES = 4
"""From the scales of a row and a column to the FP32 number that is their product."""

NARROW_TYPES = ("int4", "flint4", "int3", "flint3", "int2")
WIDE_TYPES = ("int8", "flint8", "int5", "int6", "int7", "flint5", "flint6", "flint7")


def _near(m: Module, layer: data.View) -> data.View:
    """``layer`` a cycle later: it does not change while a layer runs, and comes a long way."""
    return data.View(LAYER, delayed(m, layer.as_value(), 1, "layer"))


class Datapath:
    """A kind of PE with its borders.

    Attributes:
        lanes: weights of a step.
        weight_bits, activation_bits: of the words of a step in the operand memories, for one row or column.
        sum_bits, sum_exponent_bits: of what a PE hands over.
        scale_bits: of a scale that the dequantizer multiplies by; 0 where there is none.
        row_bits: of what a row sends along with its values: scale or exponent.
        column_scales: whether a column has a scale of its own, FP16.
        group_exponents: whether activations are aligned to the largest exponent of their group.
        weight_steps, activation_steps: steps of a word in the operand memories: 2 where codes come in pairs.
        weight_widths, activation_widths: bits that a packed code may have; in a word each has the widest.
        types: of weights that its decoder knows; none where weights are no numbers of such types.
        outliers: that a row may have; where there is room for some, terms follow at the end of a row (``ROW_END``).
        parts: of the column accumulator.
        timing: of the pipeline.
    """

    lanes: int
    weight_bits: int
    activation_bits: int
    sum_bits: int
    sum_exponent_bits: int = 0
    scale_bits: int = 0
    row_bits: int = 0
    column_scales: bool = False
    group_exponents: bool = False
    weight_steps: int = 1
    activation_steps: int = 1
    weight_widths: tuple[int, ...] = (16,)
    activation_widths: tuple[int, ...] = (16,)
    types: tuple[Any, ...] = ()
    outliers: int = 0
    parts: AccumulatorParts
    timing: PipelineTiming

    def row_border(self) -> wiring.Component:
        """Ports: codes, group, layer, term → weight; latency 1."""
        raise NotImplementedError

    def column_border(self) -> wiring.Component:
        """Ports: values, layer, exponent → activation; latency 1."""
        raise NotImplementedError

    def processing_element(self) -> Any:
        """The PE."""
        raise NotImplementedError

    def sum(self, processing_element: Any) -> tuple[Value, Value]:
        """(sum, its exponent) of a PE."""
        return Value.cast(processing_element.sum), Const(0, 0)

    def scale_significand(self, group: data.View) -> Value:
        """What the dequantizer multiplies by."""
        raise NotImplementedError

    def row_value(self, group: data.View) -> Value:
        """What a row sends along with its values."""
        return Const(0, 0)


class BitSerialDatapath(Datapath):
    """``bit_serial``: term generators on the rows, aligners on the columns, scales bit by bit behind the next group."""

    def __init__(self, spec: BitSerialSpec, scale: ScaleKind, group_inputs: int, types: tuple[WeightType, ...]) -> None:
        self.spec, self.scale, self.types = spec, scale, types
        self.lanes = spec.lanes
        self.weight_widths = tuple(sorted({entry.bits for entry in types}))
        self.generator_bits = max(self.weight_widths)
        self.weight_bits, self.activation_bits = self.generator_bits * spec.lanes, 16 * spec.lanes
        numerator = max(self._largest_numerator(entry) for entry in types)
        self.significand_bits = least_sum_bits(spec, numerator, group_inputs)
        self.group_exponents = spec.numerics == "shared_exponent"
        self.sum_exponent_bits = 6 if spec.numerics == "paper" else 0
        self.scale_bits = 8 if scale == "integer" else HALF_SIGNIFICAND_BITS
        self.sum_bits = self.significand_bits
        self.row_bits = 0 if scale == "integer" else HALF_EXPONENT_BITS
        self.parts = AccumulatorParts(integer_bits=self.significand_bits + self.scale_bits, channel_scales=True)
        weights = get_format("bitmod-w4g128" if scale == "integer" else "int-w4g128")
        self.timing = spec.pipeline(weights, group_inputs, 1)
        if self.timing.dequantizer_cycles != self.scale_bits:
            raise InputError(f"scales of {self.timing.dequantizer_cycles} bits; expected {self.scale_bits}")

    @staticmethod
    def _largest_numerator(entry: WeightType) -> int:
        if entry.booth:
            return (1 << entry.bits) - 1 if entry.zero_point else 1 << (entry.bits - 1)
        return max(32 if entry.special is not None else 0, *(abs(2 * first + second) for first, second in entry.table))

    def row_border(self) -> wiring.Component:
        return BitSerialRowBorder(TermGenerator(self.spec, self.types))

    def column_border(self) -> wiring.Component:
        return BitSerialColumnBorder(self.spec)

    def processing_element(self) -> BitSerialPe:
        return BitSerialPe(self.spec, self.significand_bits)

    def sum(self, processing_element: Any) -> tuple[Value, Value]:
        exponent = processing_element.sum.exponent if self.sum_exponent_bits else Const(0, 0)
        return processing_element.sum.significand, exponent

    def scale_significand(self, group: data.View) -> Value:
        if self.scale == "integer":
            return group.scale[: self.scale_bits]
        return Cat(group.scale[:10], group.scale[10:15].any())

    def row_value(self, group: data.View) -> Value:
        if self.scale == "integer":
            return Const(0, 0)
        return Cat(group.scale[10] | ~group.scale[10:15].any(), group.scale[11:15])


class BitSerialRowBorder(wiring.Component):
    """The term generator of a row, with the group's selector as it is meant."""

    latency = 1

    def __init__(self, generator: TermGenerator) -> None:
        self.generator = generator
        super().__init__(
            {
                "codes": In(generator.code_bits * generator.spec.lanes),
                "group": In(GROUP_WORD),
                "layer": In(LAYER),
                "term": In(TERM_BITS),
                "weight": Out(weight_terms(generator.spec.lanes)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.generator = generator = self.generator
        layer = _near(m, self.layer)
        m.d.comb += [
            generator.codes.eq(self.codes),
            generator.type.eq(Mux(layer.typed_groups, self.group.selector, layer.type)),
            generator.term.eq(self.term),
            generator.zero_point.eq(self.group.selector[:MOST_BITS]),
            generator.selector.eq(self.group.selector),
            generator.special_values.eq(layer.special_values),
            self.weight.eq(generator.weight),
        ]
        return m


class BitSerialColumnBorder(wiring.Component):
    """FP16 numbers split, or aligned to the exponent of their group."""

    latency = 1

    def __init__(self, spec: BitSerialSpec) -> None:
        self.spec = spec
        super().__init__(
            {
                "values": In(16 * spec.lanes),
                "layer": In(LAYER),
                "exponent": In(HALF_EXPONENT_BITS),
                "activation": Out(activation_layout(spec)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self.spec.numerics == "shared_exponent":
            m.submodules.aligner = aligner = ActivationAligner(self.spec)
            m.d.comb += [
                aligner.halves.eq(self.values),
                aligner.exponent.eq(self.exponent),
                self.activation.eq(aligner.aligned),
            ]
            return m
        for lane in range(self.spec.lanes):
            m.d.sync += self.activation[lane].eq(decode_half(m, self.values.word_select(lane, 16)))
        return m


class BitParallelDatapath(Datapath):
    """``fp16_mac``, and OliVe's and ANT's PEs with FP16 activations or with codes on both sides."""

    lanes = 1

    def __init__(self, spec: Fp16MacSpec | BitParallelSpec, bits: int) -> None:
        self.spec, self.bits = spec, bits
        self.halves = isinstance(spec, Fp16MacSpec)
        self.pairs = isinstance(spec, OutlierVictimSpec)
        self.integers = isinstance(spec, BitParallelSpec) and spec.activations == "integer"
        if spec.lanes != 1:
            raise InputError(f"a {spec.kind} PE of {spec.lanes} lanes; expected 1")
        names = NARROW_TYPES if bits == 4 else WIDE_TYPES
        self.types = () if self.halves else tuple(get_datatype(name) for name in names)
        widths = tuple(sorted({datatype.bits for datatype in self.types}))
        if not self.halves:
            self.weight_widths = widths
        if self.integers:
            self.activation_widths = widths
        # A code comes with its neighbour: the pair.
        self.weight_bits = 16 if self.halves else 2 * bits
        self.activation_bits = 2 * bits if self.integers else 16
        self.weight_steps = 1 if self.halves else 2
        self.activation_steps = 2 if self.integers else 1
        self.sum_bits = 32
        self.row_bits = 0 if self.halves else 16
        self.column_scales = self.integers
        if self.halves:
            self.parts = AccumulatorParts(adds=False)
            self.timing = spec.pipeline(get_format("fp16"), 1, 1)
        elif self.integers:
            self.parts = AccumulatorParts(integer_bits=32, scales=True, scale_lag=SCALE_PRODUCT_CYCLES)
            self.timing = spec.pipeline(get_format("olive-w4a4" if bits == 4 else "olive-w8a8"), 1, 1)
        else:
            self.parts = AccumulatorParts(scales=True, channel_scales=True)
            self.timing = spec.pipeline(get_format("ant-w4g128"), 1, 1)

    def row_border(self) -> wiring.Component:
        return CodeBorder(self, weights=True)

    def column_border(self) -> wiring.Component:
        return CodeBorder(self, weights=False)

    def processing_element(self) -> HalfMac | IntegerMac:
        if self.integers:
            return IntegerMac(self.bits)
        return HalfMac("half" if self.halves else "integer")

    def row_value(self, group: data.View) -> Value:
        return Const(0, 0) if self.halves else group.scale

    def decoder(self) -> ShiftedIntegerDecoder:
        """Of the weights, and of activations that are codes."""
        outlier = get_datatype("abfloat4_e2m1_b2" if self.bits == 4 else "abfloat8_e4m3_b4") if self.pairs else None
        return ShiftedIntegerDecoder(self.types, outlier)


class CodeBorder(wiring.Component):
    """The decoder of a row or a column, or the significand of an FP16 number, normalised."""

    latency = 1

    def __init__(self, datapath: BitParallelDatapath, *, weights: bool) -> None:
        self.datapath, self.weights = datapath, weights
        self.coded = not datapath.halves if weights else datapath.integers
        layout: Any = HALF_NORMAL
        if self.coded:
            layout = shifted_integer_layout(datapath.bits) if datapath.integers else INTEGER_NORMAL
        word = {"codes": In(datapath.weight_bits), "group": In(GROUP_WORD), "term": In(TERM_BITS)}
        column = {"values": In(datapath.activation_bits), "exponent": In(HALF_EXPONENT_BITS)}
        super().__init__(
            {
                **(word if weights else column),
                "layer": In(LAYER),
                "odd": In(1),
                ("weight" if weights else "activation"): Out(layout),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        word = self.codes if self.weights else self.values
        result = self.weight if self.weights else self.activation
        if not self.coded:
            m.d.sync += result.eq(normal_half(m, decode_half(m, word[:16])))
            return m
        m.submodules.decoder = decoder = self.datapath.decoder()
        layer, bits = _near(m, self.layer), self.datapath.bits
        even, odd = word[:bits], word[bits:]
        kind = layer.type if self.weights else layer.activation_type
        if self.weights:
            kind = Mux(layer.typed_groups, self.group.selector, kind)
        m.d.comb += [decoder.code.eq(Mux(self.odd, odd, even)), decoder.type.eq(kind)]
        if self.datapath.pairs:
            m.d.comb += [
                decoder.neighbour.eq(Mux(self.odd, even, odd)),
                decoder.paired.eq(layer.paired if self.weights else layer.activation_paired),
                decoder.bias.eq(layer.bias if self.weights else layer.activation_bias),
            ]
        value = decoder.value if self.datapath.integers else normal_integer(m, decoder.value)
        m.d.sync += result.eq(value)
        return m


class DictionaryDatapath(Datapath):
    """``dictionary``: indices, of which the loader has marked the outliers; the end of a row has terms of its own."""

    lanes = 1
    weight_widths = (3, 4)
    weight_bits = CENTROID_INDEX_BITS + 1
    activation_bits = 16
    sum_bits = 32

    def __init__(self, spec: DictionarySpec, outliers: int) -> None:
        if spec.lanes != 1:
            raise InputError(f"a {spec.kind} PE of {spec.lanes} lanes; expected 1")
        check_outliers(outliers)
        self.outliers = outliers
        self.parts = AccumulatorParts(adds=False)
        self.timing = replace(spec.pipeline(get_format("gobo-w4"), 1, 1), end_of_row_cycles=0)

    def row_border(self) -> wiring.Component:
        return DictionaryRowBorder()

    def column_border(self) -> wiring.Component:
        return DictionaryColumnBorder()

    def processing_element(self) -> DictionaryPe:
        return DictionaryPe(CENTROID_INDEX_BITS, self.outliers)


class DictionaryRowBorder(wiring.Component):
    """What a row does with its index or, at its end, with a centroid or its next outlier.

    Ports:
        codes: index, and whether the weight is an outlier. ends: this term follows the row, with ``ROW_END``.
        centroid: FP32 of that number. outlier: FP32 of the row. outliers: how many the row has.
    """

    latency = 1

    def __init__(self) -> None:
        super().__init__(
            {
                "codes": In(DictionaryDatapath.weight_bits),
                "ends": In(1),
                "row_end": In(ROW_END),
                "centroid": In(32),
                "outlier": In(32),
                "outliers": In(OUTLIER_COUNTS),
                "weight": Out(dictionary_term(CENTROID_INDEX_BITS)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        used = Signal(16)  # outliers of the row that have had their term
        row_end = data.View(ROW_END, self.row_end.as_value())
        weight = Signal(dictionary_term(CENTROID_INDEX_BITS))
        with m.If(~self.ends):
            m.d.sync += used.eq(0)
            m.d.comb += [
                weight.operation.eq(Mux(self.codes[-1], Operation.CAPTURE, Operation.BIN)),
                weight.index.eq(self.codes[:-1]),
            ]
        with m.Else():
            m.d.sync += used.eq(used + row_end.outlier)
            m.d.comb += [
                weight.operation.eq(Operation.NOTHING),
                weight.index.eq(row_end.number),
                weight.value.eq(Mux(row_end.centroid, self.centroid, self.outlier)),
            ]
            with m.If(row_end.centroid):
                m.d.comb += weight.operation.eq(Operation.CENTROID)
            with m.If(row_end.outlier & (used < self.outliers.own)):
                m.d.comb += weight.operation.eq(Operation.OUTLIER)
        m.d.sync += self.weight.eq(weight)
        return m


class DictionaryColumnBorder(wiring.Component):
    """FP16 numbers as FP32."""

    latency = 1

    def __init__(self) -> None:
        super().__init__(
            {"values": In(16), "layer": In(LAYER), "exponent": In(HALF_EXPONENT_BITS), "activation": Out(32)}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        value = half_to_float(Steps(m, "activation", registered=False), decode_half(m, self.values))
        m.d.sync += self.activation.eq(value)
        return m
