"""The array: rows × columns of PEs, decoders on its borders, dequantizers, chains and column accumulators.

``docs/microarchitecture.md``, sections 3 and 4. What is issued completes: nothing in the array waits. Who issues keeps
the ends of two groups apart (``ArrayDesign.group_distance``) and lets a tile drain before the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.operands import HALF_BIAS
from termwise.algorithms.processing_element import ACCUMULATOR_ROWS, BitParallelSpec, ProcessingElementSpec
from termwise.rtl.accumulator import ROW_BITS, VALUE_CONTROL, ColumnAccumulator
from termwise.rtl.bit_serial import HALF_EXPONENT_BITS
from termwise.rtl.borders import (
    CENTROIDS,
    GROUP_WORD,
    LAYER,
    OUTLIER_COUNTS,
    ROW_END,
    SCALE_PRODUCT_CYCLES,
    BitParallelDatapath,
    BitSerialDatapath,
    Datapath,
    DictionaryDatapath,
    ScaleKind,
)
from termwise.rtl.float32 import BIAS, Steps, half_to_float, leading_zeros
from termwise.rtl.handover import ChainLink, Dequantizer
from termwise.rtl.processing_element import TERM_CONTROL, decode_half, delayed
from termwise.rtl.term_generator import TERM_BITS, WeightType, weight_types

Movement = Literal["broadcast", "systolic"]
SYSTOLIC_DISTANCE = 2 * ACCUMULATOR_ROWS

ARRAY_CONTROL = data.StructLayout(
    {"term": TERM_CONTROL, "first_group": 1, "last_group": 1, "number": TERM_BITS, "odd": 1}
)
"""Of a term that enters the array: its place in the group, the group's in the tile, its number, its step's parity."""


@dataclass(frozen=True, kw_only=True)
class ArrayDesign:
    """An array that can be built.

    Attributes:
        processing_element: its PEs.
        rows, columns: outputs and tokens of a tile.
        scale: of a group beside a ``bit_serial`` PE: an 8-bit integer (BitMoD's) or an FP16 number.
        group_inputs: the largest group; it sets the widths of sums that lose nothing.
        bits: 4 or 8, of the codes beside OliVe's and ANT's PEs.
        types: of weights, beside a ``bit_serial`` PE; all that it takes where there are none.
        movement: of operands.
        outliers: of a row, beside GOBO's PEs; a power of two.

    Raises ``InputError`` for what cannot be built.
    """

    processing_element: ProcessingElementSpec = field(default_factory=BitSerialSpec)
    rows: int = 4
    columns: int = 4
    scale: ScaleKind = "integer"
    group_inputs: int = 128
    bits: int = 8
    types: tuple[str, ...] = ()
    movement: Movement = "broadcast"
    outliers: int = 128

    def __post_init__(self) -> None:
        for name, most in (("rows", 256), ("columns", 256), ("group_inputs", 1 << 16)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise InputError(f"an array with {name} = {value!r}; expected 1 to {most}")
        if self.bits not in (4, 8):
            raise InputError(f"an array with codes of {self.bits} bits; expected 4 or 8")
        if self.movement not in ("broadcast", "systolic"):
            raise InputError(f"movement {self.movement!r}; expected 'broadcast' or 'systolic'")
        _ = self.datapath

    @cached_property
    def datapath(self) -> Datapath:
        """The PE with its borders."""
        spec = self.processing_element
        if isinstance(spec, BitSerialSpec):
            known = {entry.name: entry for entry in weight_types(spec)}
            unknown = [name for name in self.types if name not in known]
            if unknown:
                raise InputError(f"no weights of type {unknown[0]!r}; expected some of {', '.join(known)}")
            types: tuple[WeightType, ...] = tuple(known[name] for name in self.types or known)
            return BitSerialDatapath(spec, self.scale, self.group_inputs, types)
        if isinstance(spec, Fp16MacSpec | BitParallelSpec):
            return BitParallelDatapath(spec, self.bits)
        if isinstance(spec, DictionarySpec):
            return DictionaryDatapath(spec, self.outliers)
        raise InputError(f"no array of {spec.kind} PEs can be built; expected another kind")

    @property
    def blocks(self) -> int:
        """Column accumulators of a column, of up to 8 rows each."""
        return -(-self.rows // ACCUMULATOR_ROWS)

    @property
    def movement_cycles(self) -> int:
        """From the first PE to the last one."""
        return self.rows + self.columns - 2 if self.movement == "systolic" else 0

    @property
    def group_distance(self) -> int:
        """Least distance of the last terms of two groups (D); 0 where there are none."""
        distance = self.datapath.timing.group_distance_cycles
        return max(distance, SYSTOLIC_DISTANCE) if distance and self.movement == "systolic" else distance

    @property
    def drain_cycles(self) -> int:
        """From the last issue of a tile until its outputs may leave."""
        return self.datapath.timing.drain_cycles + self.movement_cycles


class Array(wiring.Component):
    """rows × columns PEs and their accumulators.

    Latency: a term that enters changes the sums ``stages - 1`` cycles later; outputs of a tile stand in the output
    memory ``drain_cycles - 1`` cycles after its last term has entered. One term per cycle, no flow control.

    Ports:
        control: ``ARRAY_CONTROL``.
        weights: the codes of a step, a row's word after the other.
        groups: ``GROUP_WORD`` of each row; they stay as they are until the group's last term.
        activations: the values of a step, a column's word after the other.
        exponents: of each column's group, with numerics ``shared_exponent``.
        channel_scales: FP32 of each row; they stay as they are until the tile has drained.
        column_scales: FP16 of each column, with codes as activations; likewise.
        layer: ``LAYER``, from the cycle before the first term on.
        exchange: outputs of the tile change places with the write-back register.
        read_row: which row of the write-back register ``outputs`` shows.
        outputs: FP16 of each column.
        row_end: ``ROW_END``, with GOBO's PEs, where ``ends`` says that the term follows a row.
        centroids: FP32, likewise; they stay as they are while a layer runs.
        outliers: FP32 of each row, likewise, for the term.
        outlier_counts: ``OUTLIER_COUNTS`` of each row, likewise, until the tile's last term.
    """

    def __init__(self, design: ArrayDesign) -> None:
        self.design = design
        path = design.datapath
        of_dictionary: dict[str, wiring.Member] = {
            "ends": In(1),
            "row_end": In(ROW_END),
            "centroids": In(data.ArrayLayout(32, CENTROIDS)),
            "outliers": In(data.ArrayLayout(32, design.rows)),
            "outlier_counts": In(data.ArrayLayout(OUTLIER_COUNTS, design.rows)),
        }
        super().__init__(
            {
                **(of_dictionary if path.outliers else {}),
                "control": In(ARRAY_CONTROL),
                "weights": In(data.ArrayLayout(path.weight_bits, design.rows)),
                "groups": In(data.ArrayLayout(GROUP_WORD, design.rows)),
                "activations": In(data.ArrayLayout(path.activation_bits, design.columns)),
                "exponents": In(data.ArrayLayout(HALF_EXPONENT_BITS, design.columns)),
                "channel_scales": In(data.ArrayLayout(32, design.rows)),
                "column_scales": In(data.ArrayLayout(16, design.columns)),
                "layer": In(LAYER),
                "exchange": In(1),
                "read_row": In(range(design.rows)),
                "outputs": Out(data.ArrayLayout(16, design.columns)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design, path = self.design, self.design.datapath
        skew = design.movement == "systolic"
        control = data.View(ARRAY_CONTROL, self.control.as_value())
        in_pe = delayed(m, self.control.term.as_value(), 1, "term")
        sum_after = path.timing.stages - 1  # cycles from a term's entry until its sum shows (h)
        ends = Signal()
        m.d.comb += ends.eq(control.term.valid & control.term.last)
        groups_end = Cat(ends, control.first_group, control.last_group)
        at_sum = delayed(m, groups_end, sum_after, "at_sum")
        at_load = delayed(m, at_sum, path.scale_bits, "at_load")
        before_sum = delayed(m, ends, sum_after - 1, "before_sum")

        # Borders.
        centroid = Signal(32)
        if path.outliers:
            m.d.comb += centroid.eq(self.centroids[self.row_end.number])
        weights: list[Value] = []
        scale_bits: list[Value] = []
        row_values: list[Value] = []
        for row in range(design.rows):
            m.submodules[f"row_border_{row}"] = border = path.row_border()
            m.d.comb += border.codes.eq(self.weights[row])
            if path.outliers:
                m.d.comb += [
                    border.ends.eq(self.ends),
                    border.row_end.eq(self.row_end),
                    border.centroid.eq(centroid),
                    border.outlier.eq(self.outliers[row]),
                    border.outliers.eq(self.outlier_counts[row]),
                ]
            else:
                m.d.comb += [
                    border.group.eq(self.groups[row]),
                    border.layer.eq(self.layer),
                    border.term.eq(control.number),
                ]
            if hasattr(border, "odd"):
                m.d.comb += border.odd.eq(control.odd)
            weights.append(delayed(m, border.weight.as_value(), row * skew, f"weight_{row}"))
            bit, value = self._scale(m, row, ends, before_sum, at_sum[0])
            scale_bits.append(delayed(m, bit, row * skew, f"scale_bit_{row}"))
            row_values.append(delayed(m, value, row * skew, f"row_value_{row}"))
        activations: list[Value] = []
        exponents: list[Value] = []
        for column in range(design.columns):
            m.submodules[f"column_border_{column}"] = border = path.column_border()
            m.d.comb += [
                border.values.eq(self.activations[column]),
                border.layer.eq(self.layer),
                border.exponent.eq(self.exponents[column]),
            ]
            if hasattr(border, "odd"):
                m.d.comb += border.odd.eq(control.odd)
            activation = Value.cast(border.activation)
            activations.append(delayed(m, activation, column * skew, f"activation_{column}"))
            exponents.append(self._group_exponent(m, column, ends, at_sum[0], at_load[0]))

        # PEs, dequantizers and chains; operands move on by a register from PE to PE.
        in_pes = [in_pe]
        starts = [before_sum]
        loads = [at_load[0]]
        for place in range(1, design.rows + design.columns - 1):
            in_pes.append(delayed(m, in_pes[-1], skew, f"term_at_{place}"))
            starts.append(delayed(m, starts[-1], skew, f"start_at_{place}"))
            loads.append(delayed(m, loads[-1], skew, f"load_at_{place}"))
        chains: list[list[Value]] = []
        for column in range(design.columns):
            values: list[Value] = []
            for row in range(design.rows):
                weight = delayed(m, weights[row], skew, f"weight_{row}_{column}") if column else weights[row]
                activation = (
                    delayed(m, activations[column], skew, f"act_{row}_{column}") if row else activations[column]
                )
                bit = delayed(m, scale_bits[row], skew, f"bit_{row}_{column}") if column else scale_bits[row]
                weights[row], activations[column], scale_bits[row] = weight, activation, bit
                m.submodules[f"pe_{row}_{column}"] = element = path.processing_element()
                m.d.comb += [
                    element.weight.eq(weight),
                    element.activation.eq(activation),
                    element.control.eq(in_pes[row + column]),
                ]
                values.append(self._handed_over(m, element, starts[row + column], bit, f"{row}_{column}"))
            chains.append(self._chains(m, values, loads[column:], f"column_{column}"))
        row_chains = self._chains(m, row_values, loads, "rows") if path.row_bits else [Const(0, 0)] * design.blocks

        # Column accumulators.
        found: list[list[Value]] = []
        for column in range(design.columns):
            control_of_rows = self._value_control(m, delayed(m, at_load, column * skew, f"load_of_{column}"), column)
            outputs = []
            for block in range(design.blocks):
                m.submodules[f"accumulator_{block}_{column}"] = accumulator = ColumnAccumulator(path.parts)
                later = block * ACCUMULATOR_ROWS * skew  # operands come to the block's first row that much later
                self._connect(
                    m,
                    accumulator,
                    (block, column),
                    chains[column][block],
                    row_value=delayed(m, row_chains[block], column * skew, f"row_value_{block}_{column}"),
                    group_exponent=delayed(m, exponents[column], later, f"group_exponent_{block}_{column}"),
                    control=delayed(m, control_of_rows, later, f"control_{block}_{column}"),
                )
                # Rows of a block that do not exist are written, too, and never read.
                m.d.comb += [
                    accumulator.exchange.eq(self.exchange),
                    accumulator.read_row.eq(self.read_row[:ROW_BITS]),
                ]
                outputs.append(accumulator.output)
            found.append(outputs)
        for column, outputs in enumerate(found):
            if design.blocks == 1:
                m.d.comb += self.outputs[column].eq(outputs[0])
            else:
                with m.Switch(self.read_row[ROW_BITS:]):
                    for block, output in enumerate(outputs):
                        with m.Case(block):
                            m.d.comb += self.outputs[column].eq(output)
        return m

    def _scale(self, m: Module, row: int, ends: Value, before_sum: Value, at_sum: Value) -> tuple[Value, Value]:
        """A row's scale bit by bit from the cycle before the sum on, and what it sends along, from the cycle after it.

        The group's word is held from the group's last term on, for the next group's may follow at once.
        """
        path = self.design.datapath
        held = Signal(GROUP_WORD, name=f"finished_group_{row}")
        with m.If(ends):
            m.d.sync += held.eq(self.groups[row])
        bit: Value = Const(0, 1)
        if path.scale_bits:
            shifting = Signal(path.scale_bits, name=f"scale_{row}")
            from_here = Mux(before_sum, path.scale_significand(held), shifting)
            m.d.sync += shifting.eq(from_here << 1)
            bit = from_here[path.scale_bits - 1]
        if not path.row_bits:
            return bit, Const(0, 0)
        if not path.scale_bits:  # the chain loads in the cycle of the sum
            return bit, path.row_value(held)
        value = Signal(path.row_bits, name=f"row_value_{row}")
        with m.If(at_sum):
            m.d.sync += value.eq(path.row_value(held))
        return bit, value

    def _group_exponent(self, m: Module, column: int, ends: Value, at_sum: Value, at_load: Value) -> Value:
        """The exponent of a column's group, from the cycle after the chain has loaded on."""
        if not self.design.datapath.group_exponents:
            return Const(0, 0)
        skew = self.design.movement == "systolic"
        value: Value = self.exponents[column]
        for place, moment in enumerate((ends, at_sum, at_load)):
            held = Signal(HALF_EXPONENT_BITS, name=f"group_exponent_{column}_{place}")
            with m.If(moment):
                m.d.sync += held.eq(value)
            value = held
        return delayed(m, value, column * skew, f"group_exponent_{column}")

    def _handed_over(self, m: Module, element: Any, next_start: Value, next_bit: Value, name: str) -> Value:
        """What a PE loads into the chain: its sum, or sum · scale, and the sum's exponent."""
        path = self.design.datapath
        sum_, exponent = path.sum(element)
        if not path.scale_bits:
            return Cat(sum_, exponent)
        m.submodules[f"dequantizer_{name}"] = dequantizer = Dequantizer(path.sum_bits, path.scale_bits)
        m.d.comb += [
            dequantizer.sum.eq(sum_),
            dequantizer.next_start.eq(next_start),
            dequantizer.next_scale_bit.eq(next_bit),
        ]
        if not path.sum_exponent_bits:
            return dequantizer.product
        held = Signal(path.sum_exponent_bits, name=f"exponent_{name}")
        with m.If(delayed(m, next_start, 1, f"start_{name}")):
            m.d.sync += held.eq(exponent)
        return Cat(dequantizer.product, held)

    def _chains(self, m: Module, values: list[Value], loads: list[Value], name: str) -> list[Value]:
        """Ends of the chains of a column, one for each block of 8 rows."""
        found = []
        for first in range(0, len(values), ACCUMULATOR_ROWS):
            behind: Value = Const(0, len(values[first]))
            for row in reversed(range(first, min(first + ACCUMULATOR_ROWS, len(values)))):
                m.submodules[f"chain_{name}_{row}"] = link = ChainLink(len(values[row]))
                m.d.comb += [link.own.eq(values[row]), link.behind.eq(behind), link.load.eq(loads[row])]
                behind = link.value
            found.append(behind)
        return found

    def _value_control(self, m: Module, at_load: Value, column: int) -> Value:
        """``VALUE_CONTROL`` of the values that come out of a column's chains: 8 rows after each load."""
        skew = self.design.movement == "systolic"
        running, row, wait = Signal(name=f"runs_{column}"), Signal(ROW_BITS, name=f"row_{column}"), Signal()
        first, last = Signal(name=f"first_{column}"), Signal(name=f"last_{column}")
        with m.If(at_load[0]):
            m.d.sync += [running.eq(1), row.eq(0), wait.eq(0), first.eq(at_load[1]), last.eq(at_load[2])]
        with m.Elif(running):
            moves = wait if skew else Const(1)
            m.d.sync += wait.eq(~wait)
            with m.If(moves):
                m.d.sync += row.eq(row + 1)
                with m.If(row == ACCUMULATOR_ROWS - 1):
                    m.d.sync += running.eq(0)
        valid = running & ~wait if skew else running
        return Cat(valid, row, first, last)  # VALUE_CONTROL

    def _connect(
        self,
        m: Module,
        accumulator: ColumnAccumulator,
        place: tuple[int, int],
        chain: Value,
        *,
        row_value: Value,
        group_exponent: Value,
        control: Value,
    ) -> None:
        """Value, exponent and scales of the column accumulator of a (block, column)."""
        design, path = self.design, self.design.datapath
        block, column = place
        term = data.View(VALUE_CONTROL, control)
        width = path.sum_bits + path.scale_bits
        m.d.comb += [accumulator.value.eq(chain[:width]), accumulator.control.eq(control)]
        offset = self.layer.exponent_offset
        if path.scale_bits:
            m.d.comb += accumulator.exponent.eq(offset + chain[width:] + row_value + group_exponent)
        if path.parts.scales:
            operand = decode_half(m, row_value)
            if path.column_scales:
                of_column = decode_half(m, self.column_scales[column])
                product = _product_of_halves(m, operand, of_column, offset, f"{block}_{column}")
                m.d.comb += accumulator.scale.eq(product)
            else:
                scale = half_to_float(Steps(m, f"scale_{block}_{column}", registered=False), operand)
                m.d.comb += accumulator.scale.eq(_times_power_of_two(scale, offset))
        if path.parts.channel_scales:
            with m.Switch(term.row):
                for row in range(ACCUMULATOR_ROWS):
                    if block * ACCUMULATOR_ROWS + row < design.rows:
                        with m.Case(row):
                            m.d.comb += accumulator.channel_scale.eq(
                                self.channel_scales[block * ACCUMULATOR_ROWS + row]
                            )


def _times_power_of_two(number: Value, exponent: Value) -> Value:
    """An FP32 number that comes from FP16, times a power of two that leaves it normal; 0 stays 0."""
    return Cat(number[:23], (number[23:31] + exponent)[:8] & number[:31].any().replicate(8), number[31])


def _product_of_halves(m: Module, left: data.View, right: data.View, offset: Value, name: str) -> Value:
    """FP32 of the product of two FP16 numbers and a power of two, exact: 22 significant bits.

    In ``SCALE_PRODUCT_CYCLES``.
    """
    steps = Steps(m, f"scale_{name}", registered=True)
    # 1: the operands; multipliers are far from the rest. Leading zeros, of subnormal numbers.
    left_significand, right_significand, left_zeros, right_zeros, exponent, negative = steps.end(
        left=left.significand,
        right=right.significand,
        left_zeros=leading_zeros(steps, left.significand, "left")[:4],
        right_zeros=leading_zeros(steps, right.significand, "right")[:4],
        exponent=left.exponent + right.exponent,
        negative=left.sign ^ right.sign,
    )
    # 2: the product, below 2^22.
    product, zeros, nonzero, exponent, negative = steps.end(
        product=left_significand * right_significand,
        zeros=left_zeros + right_zeros,
        nonzero=left_significand.any() & right_significand.any(),
        exponent=exponent + offset + (BIAS - 2 * HALF_BIAS + 20),
        negative=negative,
    )
    # 3: the registers behind the multiplier.
    product, zeros, nonzero, exponent, negative = steps.end(
        product=product, zeros=zeros, nonzero=nonzero, exponent=exponent - zeros, negative=negative
    )
    # 4: normalisation: the first one comes to the top or to the bit below; a product of 0 is +0 or -0.
    wide = steps.signal((product << zeros)[:22], "wide")
    fraction = Mux(wide[-1], wide[:-1], Cat(Const(0, 1), wide[:-2]))
    biased = (exponent + wide[-1])[:8]
    (result,) = steps.end(result=Cat(Const(0, 2), Mux(nonzero, fraction, 0), Mux(nonzero, biased, 0), negative))
    assert steps.count == SCALE_PRODUCT_CYCLES
    return result
