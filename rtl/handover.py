"""From a group's sum to the column accumulator: dequantizer and chain (``docs/microarchitecture.md``, section 3)."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out


class Dequantizer(wiring.Component):
    """Multiplies the sum of a group by the significand of its scale, a bit per cycle, behind the next group.

    The product has all its bits: as many as the sum and the scale together. (The authors' RTL keeps 21 bits of 23.)

    Latency: ``scale_bits`` cycles from the cycle in which the sum is complete to the product, which is right in that
    one cycle. It takes a new sum every ``scale_bits`` cycles, also in the one in which the last product is there.

    Ports:
        next_start: the sum is complete in the next cycle. (It is kept here: it goes to all PEs and would be late.)
        next_scale_bit: a bit of the scale, the most significant one with ``next_start``, then the others.
        sum: signed, ``sum_bits`` wide; read in the cycle in which it is complete.
        product: signed, ``sum_bits + scale_bits`` wide.
    """

    def __init__(self, sum_bits: int, scale_bits: int) -> None:
        self.latency = scale_bits
        super().__init__(
            {
                "sum": In(signed(sum_bits)),
                "next_start": In(1),
                "next_scale_bit": In(1),
                "product": Out(signed(sum_bits + scale_bits)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        held = Signal.like(self.sum)
        addend = Signal.like(self.sum)
        start, scale_bit = Signal(), Signal()
        m.d.sync += [start.eq(self.next_start), scale_bit.eq(self.next_scale_bit)]
        with m.If(start):
            m.d.sync += held.eq(self.sum)
        m.d.comb += addend.eq(Mux(scale_bit, Mux(start, self.sum, held), 0))
        m.d.sync += self.product.eq(Mux(start, 0, self.product << 1) + addend)
        return m


class ChainLink(wiring.Component):
    """A register of the chain that carries the values of up to 8 PEs of a column to their accumulator, one per cycle.

    Latency 1 cycle.

    Ports: ``load``: take ``own`` in this cycle, else what the link behind holds (``behind``). ``value``: the register.
    """

    latency = 1

    def __init__(self, bits: int) -> None:
        super().__init__({"load": In(1), "own": In(bits), "behind": In(bits), "value": Out(bits)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.sync += self.value.eq(Mux(self.load, self.own, self.behind))
        return m
