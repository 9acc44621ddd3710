"""GOBO's PE: activations are added by the index of their weight (``docs/microarchitecture.md``, section 2.6)."""

from __future__ import annotations

import enum

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from termwise.algorithms.errors import InputError
from termwise.algorithms.processing_element import HALF_PIPELINE
from termwise.rtl.decoders import CENTROID_INDEX_BITS
from termwise.rtl.float32 import Steps, add, multiply
from termwise.rtl.processing_element import STAGES_OUTSIDE, TERM_CONTROL, delayed


class Operation(enum.IntEnum):
    """What a term of a row does."""

    BIN = 0
    """An activation is added to the bin of its index."""
    CAPTURE = 1
    """The activation of an outlier is kept until the end of the row."""
    CENTROID = 2
    """The sum of the bin of the index, times the centroid, is added to the output."""
    OUTLIER = 3
    """The activation that was captured first of those that are left, times the outlier, is added to the output."""
    NOTHING = 4


def dictionary_term(index_bits: int) -> data.StructLayout:
    """A term of a row: the operation, the index of the bin, and the centroid or the outlier (FP32)."""
    return data.StructLayout({"operation": 3, "index": index_bits, "value": 32})


MOST_OUTLIERS = 1024
"""Of a row."""


def check_outliers(room: int) -> None:
    """Raises ``InputError`` where a PE cannot have ``room`` for so many outliers of a row."""
    if not isinstance(room, int) or not 2 <= room <= MOST_OUTLIERS or room & (room - 1):
        raise InputError(f"room for {room!r} outliers of a row; expected a power of two from 2 to {MOST_OUTLIERS}")


class DictionaryPe(wiring.Component):
    """c[index] ← fl32(c[index] + a); at the end of the row y ← fl32(y + fl32(c[j] · centroid[j])), then the outliers.

    Latency 2 cycles from operands to the bin, 3 to the output; a term per cycle, no flow control. A bin that has been
    written in the last cycle is forwarded; a captured activation may be used two cycles later.

    Ports:
        weight: ``dictionary_term(index_bits)``.
        activation: FP32.
        control: valid, and first of a row, which empties the bins. The centroid of index 0 begins the output.
        sum: FP32: y.

    Raises ``InputError`` for an index of more than 4 bits, and for what ``check_outliers`` refuses.
    """

    latency = HALF_PIPELINE.stages - STAGES_OUTSIDE

    def __init__(self, index_bits: int, outliers: int = 128) -> None:
        if not 1 <= index_bits <= CENTROID_INDEX_BITS:
            raise InputError(f"an index of {index_bits} bits; expected 1 to {CENTROID_INDEX_BITS}")
        check_outliers(outliers)
        self.index_bits, self.outliers = index_bits, outliers
        super().__init__(
            {
                "weight": In(dictionary_term(index_bits)),
                "activation": In(32),
                "control": In(TERM_CONTROL),
                "sum": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # Read of the bin; bins that nothing was added to since the row began count as 0.
        m.submodules.bins = bins = Memory(shape=32, depth=1 << self.index_bits, init=[])
        read, write = bins.read_port(domain="comb"), bins.write_port()
        used = Signal(1 << self.index_bits)
        old = Signal(32)
        held = Signal(dictionary_term(self.index_bits))
        activation = Signal(32)
        valid = delayed(m, self.control.valid, 1, "valid")
        total = Signal(32)  # of the bin that is added to
        adds = Signal()
        m.d.comb += [
            read.addr.eq(self.weight.index),
            adds.eq(valid & (held.operation == Operation.BIN)),
            write.addr.eq(held.index),
            write.data.eq(total),
            write.en.eq(adds),
        ]
        forwarded = Signal()
        empty = Signal()
        starts = Signal()
        m.d.comb += [
            starts.eq(self.control.valid & self.control.first),
            forwarded.eq(adds & (held.index == self.weight.index)),
            empty.eq(starts | ~used.bit_select(self.weight.index, 1)),
        ]
        # Activations of outliers: the first one in is the first one out.
        m.submodules.captured = captured = Memory(shape=32, depth=self.outliers, init=[])
        oldest, newest = captured.read_port(), captured.write_port()
        captures, uses = Signal(), Signal()
        m.d.comb += [
            captures.eq(valid & (held.operation == Operation.CAPTURE)),
            uses.eq(self.control.valid & (self.weight.operation == Operation.OUTLIER)),
            newest.en.eq(captures),
            newest.data.eq(activation),
        ]
        first_captured, first_used = Signal.like(newest.addr), Signal.like(oldest.addr)
        m.d.comb += [newest.addr.eq(first_captured), oldest.addr.eq(first_used)]
        m.d.sync += [first_captured.eq(first_captured + captures), first_used.eq(first_used + uses)]
        with m.If(starts):
            m.d.sync += [first_captured.eq(0), first_used.eq(0)]
        m.d.sync += [
            held.eq(self.weight),
            activation.eq(self.activation),
            old.eq(Mux(forwarded & ~starts, total, Mux(empty, 0, read.data))),
        ]
        with m.If(starts):
            m.d.sync += used.eq(0)
        with m.Elif(adds):
            m.d.sync += used.bit_select(held.index, 1).eq(1)
        # Addition to the bin, or the product.
        m.d.comb += total.eq(add(Steps(m, "bin", registered=False), old, activation))
        product = Signal(32)
        factor = Signal(32)
        begins, finishes = Signal(), Signal()
        m.d.comb += factor.eq(Mux(held.operation == Operation.OUTLIER, oldest.data, old))
        m.d.sync += [
            product.eq(multiply(Steps(m, "product", registered=False), factor, held.value)),
            begins.eq((held.operation == Operation.CENTROID) & (held.index == 0)),
            finishes.eq(valid & ((held.operation == Operation.CENTROID) | (held.operation == Operation.OUTLIER))),
        ]
        # Addition to the output.
        output = Signal(32)
        result = add(Steps(m, "output", registered=False), Mux(begins, 0, output), product)
        with m.If(finishes):
            m.d.sync += output.eq(result)
        m.d.comb += self.sum.eq(output)
        return m
