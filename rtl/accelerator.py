"""The accelerator: array, operand memories, loader, sequencer and write-back behind AXI4-Lite and two streams."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from amaranth.hdl import Cat, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.errors import InputError
from termwise.rtl.array import Array, ArrayDesign
from termwise.rtl.bit_serial import HALF_EXPONENT_BITS
from termwise.rtl.borders import CENTROIDS, GROUP_WORD, OUTLIER_COUNTS
from termwise.rtl.loader import Loader, LoaderDesign, OperandDesign
from termwise.rtl.operand_memory import MemoryDesign, OperandMemory
from termwise.rtl.program import PACKED, PROGRAM
from termwise.rtl.registers import AXI_LITE, IDENTITY, WORD_BITS, RegisterFile
from termwise.rtl.sequencer import CAUSES, Sequencer
from termwise.rtl.writer import Writer

BEAT_BITS = 32
ARRAY_PORTS = {
    "weights": ("weights", "groups", "channel_scales"),
    "activations": ("activations", "exponents", "column_scales"),
}
"""Ports of the array for the words of steps, groups and panels."""


@dataclass(frozen=True, kw_only=True)
class AcceleratorDesign:
    """An accelerator that can be built.

    Attributes:
        array: its array.
        weight_words, activation_words: words of steps of each operand memory, both halves together; powers of two.
        group_words: groups whose scales lie beside the weights; a power of two.
        panels: row tiles whose channel scales, or outliers, lie there; a power of two.

    Raises ``InputError`` for what cannot be built.
    """

    array: ArrayDesign = field(default_factory=ArrayDesign)
    weight_words: int = 1024
    activation_words: int = 1024
    group_words: int = 128
    panels: int = 16

    def __post_init__(self) -> None:
        _ = self.loader
        if self.array.rows * 32 > 1 << 16 or self.array.columns * 16 > 1 << 16:
            raise InputError("an array too wide for a word of its memories; expected at most 2048 rows")

    @cached_property
    def loader(self) -> LoaderDesign:
        """Its memories, and how they are filled."""
        array, path = self.array, self.array.datapath
        weights = MemoryDesign(
            rows=array.rows,
            step_bits=path.weight_bits,
            group_bits=0 if path.outliers else GROUP_WORD.size,
            panel_bits=OUTLIER_COUNTS.size if path.outliers else 32 * path.parts.channel_scales,
            steps=self.weight_words,
            groups=self.group_words,
            panels=self.panels,
            outliers=path.outliers,
        )
        activations = MemoryDesign(
            rows=array.columns,
            step_bits=path.activation_bits,
            group_bits=HALF_EXPONENT_BITS * path.group_exponents,
            panel_bits=16 * path.column_scales,
            steps=self.activation_words,
            groups=self.group_words,
            panels=self.panels,
        )
        return LoaderDesign(
            weights=OperandDesign(
                memory=weights,
                codes=path.lanes * path.weight_steps,
                code_widths=path.weight_widths,
                steps_per_word=path.weight_steps,
            ),
            activations=OperandDesign(
                memory=activations,
                codes=path.lanes * path.activation_steps,
                code_widths=path.activation_widths,
                steps_per_word=path.activation_steps,
                halves=not path.column_scales,
                finds_exponents=path.group_exponents,
            ),
            beat_bits=BEAT_BITS,
        )

    @property
    def digest(self) -> int:
        """The first 32 bits of the SHA-256 of what the design says."""
        return int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:4], "big")


class Accelerator(wiring.Component):
    """Computes a layer: program by AXI4-Lite, operands by a stream in the order of the program, outputs by another.

    Ports:
        bus: AXI4-Lite (``termwise.rtl.registers``).
        operands: beats of 32 bits (``termwise.rtl.loader``), AXI4-Stream without sidebands.
        outputs: beats of 32 bits with ``last`` at the end of a tile (``termwise.rtl.writer``).
        interrupt: level, until the next start or stop.
    """

    def __init__(self, design: AcceleratorDesign) -> None:
        self.design = design
        super().__init__(
            {
                "bus": In(AXI_LITE),
                "operands": In(stream.Signature(BEAT_BITS)),
                "outputs": Out(stream.Signature(data.StructLayout({"data": BEAT_BITS, "last": 1}))),
                "interrupt": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design, array_design, path = self.design, self.design.array, self.design.array.datapath
        m.submodules.registers = registers = RegisterFile(centroids=path.outliers > 0)
        wiring.connect(m, wiring.flipped(self.bus), registers.bus)
        program = Signal(PROGRAM)
        m.d.comb += [getattr(program, name).eq(getattr(registers, name)) for name, _ in PROGRAM]
        clear, begin = Signal(), Signal()

        loader = Loader(design.loader)
        weights, activations = design.loader.weights, design.loader.activations
        sequencer = Sequencer(
            weights.memory,
            activations.memory,
            weight_steps=weights.steps_per_word,
            activation_steps=activations.steps_per_word,
            group_distance=array_design.group_distance,
            drain_cycles=array_design.drain_cycles,
            rows=array_design.rows,
            columns=array_design.columns,
        )
        array = Array(array_design)
        writer = Writer(array_design.rows, array_design.columns, BEAT_BITS)
        for name, part in (("loader", loader), ("sequencer", sequencer), ("array", array), ("writer", writer)):
            m.submodules[name] = ResetInserter(clear)(part)
        m.d.comb += [
            loader.program.eq(program),
            loader.start.eq(begin),
            sequencer.program.eq(program),
            sequencer.start.eq(begin),
            loader.stream.payload.eq(self.operands.payload),
            loader.stream.valid.eq(self.operands.valid),
            self.operands.ready.eq(loader.stream.ready),
        ]
        for operand, memory_design in (("weights", weights.memory), ("activations", activations.memory)):
            m.submodules[f"{operand}_memory"] = memory = OperandMemory(memory_design)
            m.d.comb += memory.row.eq(getattr(loader, operand).row)
            for kind in memory_design.memories:
                for name in (f"{kind}_write", f"{kind}_write_at", f"{kind}_data"):
                    m.d.comb += getattr(memory, name).eq(getattr(getattr(loader, operand), name))
                for name in (f"{kind}_read", f"{kind}_read_at"):
                    m.d.comb += getattr(memory, name).eq(getattr(getattr(sequencer, operand), name))
            m.d.comb += [
                getattr(sequencer, f"{operand}_arrived").eq(getattr(loader, f"{operand}_arrived")),
                getattr(loader, f"{operand}_released").eq(getattr(sequencer, f"{operand}_released")),
            ]
            for kind, port in zip(("step", "group", "panel"), ARRAY_PORTS[operand], strict=True):
                if kind in memory_design.kinds:
                    port = "outlier_counts" if kind == "panel" and memory_design.outliers else port
                    m.d.comb += getattr(array, port).eq(getattr(memory, kind))
            if memory_design.outliers:
                m.d.comb += array.outliers.eq(memory.outlier)
        if path.outliers:
            m.d.comb += [
                sequencer.most_outliers.eq(array.outlier_counts[0].most),
                array.ends.eq(sequencer.ends_row),
                array.row_end.eq(sequencer.row_end),
                array.centroids.eq(Cat(*(getattr(registers, f"centroid_{number}") for number in range(CENTROIDS)))),
            ]
        layer_words = [getattr(registers, name) for name in registers.signature.members if name.startswith("layer_")]
        m.d.comb += [
            array.control.eq(sequencer.control),
            array.layer.eq(Cat(*layer_words)),
            array.exchange.eq(sequencer.exchange),
            array.read_row.eq(writer.read_row),
            writer.outputs.eq(array.outputs),
            writer.begin.eq(sequencer.exchange),
            writer.rows.eq(sequencer.rows),
            writer.columns.eq(sequencer.columns),
            sequencer.write_back_busy.eq(writer.busy),
            self.outputs.payload.eq(writer.stream.payload),
            self.outputs.valid.eq(writer.stream.valid),
            writer.stream.ready.eq(self.outputs.ready),
        ]

        # Control and status.
        error, done, starts, stops, running = Signal(3), Signal(), Signal(), Signal(), Signal()
        bad_counts, bad_type, bad_packing = Signal(), Signal(), Signal()
        counts = [name for name, field in PROGRAM if field.width > 2]
        zero = Cat(*(getattr(program, name) == 0 for name in counts)).any()
        short = (program.group_steps > program.row_steps) | (program.chunk_steps > program.row_steps)
        m.d.comb += [
            starts.eq(registers.control[0]),
            bad_packing.eq(~(_takes(program, "weight", weights) & _takes(program, "activation", activations))),
            running.eq(sequencer.running | begin),
            stops.eq(registers.control[1]),
            bad_counts.eq(zero | short),
            bad_type.eq(array.layer.type >= len(path.types) if path.types else 0),
            registers.identity.eq(IDENTITY),
            registers.design.eq(design.digest),
            registers.status.eq(Cat(running, done, error.any())),
            registers.error.eq(error),
            registers.interrupt.eq(Cat(done, error.any())),
            self.interrupt.eq((registers.interrupt & registers.interrupt_enable).any()),
        ]
        m.d.sync += begin.eq(0)
        with m.If(stops):
            m.d.comb += clear.eq(1)
            m.d.sync += [error.eq(0), done.eq(0)]
        with m.Elif(starts):
            with m.If(running):
                m.d.sync += error.eq(4)
            with m.Else():
                m.d.sync += [done.eq(0), error.eq(Mux(bad_counts, 3, Mux(bad_type, 5, Mux(bad_packing, 6, 0))))]
                m.d.comb += clear.eq(1)
                m.d.sync += begin.eq(~bad_counts & ~bad_type & ~bad_packing)
        with m.Else():
            with m.If(loader.error.any() & ~error.any()):
                m.d.sync += error.eq(loader.error)
            with m.If(sequencer.ends):
                m.d.sync += done.eq(1)

        # Counters.
        for place, cause in enumerate(CAUSES):
            counter = Signal(WORD_BITS, name=f"{cause}_counter")
            m.d.comb += getattr(registers, f"{cause}_cycles").eq(counter)
            m.d.sync += counter.eq(counter + sequencer.cause[place])
            with m.If(clear):
                m.d.sync += counter.eq(0)
        cycles = Signal(WORD_BITS)
        m.d.comb += registers.cycles.eq(cycles)
        m.d.sync += cycles.eq(cycles + sequencer.cause.any())
        with m.If(clear):
            m.d.sync += cycles.eq(0)
        return m


def _takes(program: data.View, operand: str, design: OperandDesign) -> Value:
    """Whether the loader knows codes and words of these widths."""
    width, word, group, row = (getattr(program, f"{operand}_{bits}") for bits in PACKED)
    known = [(width == bits) & (word <= bits * design.codes) for bits in design.code_widths]
    return Cat(*known).any() & (group <= word) & (row <= word)
