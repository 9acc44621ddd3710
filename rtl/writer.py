"""The write-back register's way out: FP16 outputs of a tile as a stream."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from termwise.rtl.program import COUNT_BITS


class Writer(wiring.Component):
    """Sends the outputs of a tile: row after row, each row's columns, two to a beat of 32 bits; a row fills its beats.

    A beat per cycle from the cycle after ``begin`` on, if ``ready``. ``valid`` does not wait for ``ready``.

    Ports: ``begin``, with ``rows`` and ``columns`` that count; ``read_row``, ``outputs``: of the array, in the same
    cycle; ``stream``: ``beat_bits`` wide, ``last`` with the last beat of a tile; ``busy`` until that is taken.
    """

    def __init__(self, rows: int, columns: int, beat_bits: int) -> None:
        self.full_rows, self.full_columns, self.beat_bits = rows, columns, beat_bits
        payload = data.StructLayout({"data": beat_bits, "last": 1})
        super().__init__(
            {
                "begin": In(1),
                "rows": In(COUNT_BITS),
                "columns": In(COUNT_BITS),
                "read_row": Out(range(rows)),
                "outputs": In(data.ArrayLayout(16, columns)),
                "stream": Out(stream.Signature(payload)),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        each = self.beat_bits // 16
        rows, columns = Signal(COUNT_BITS), Signal(COUNT_BITS)
        row, column = Signal(range(self.full_rows + 1)), Signal(range(self.full_columns + each))
        row_ends = Signal()
        beats = Signal(-(-self.full_columns // each) * self.beat_bits)
        m.d.comb += [
            beats.eq(self.outputs.as_value()),
            self.read_row.eq(row),
            row_ends.eq(column + each >= columns),
            self.stream.valid.eq(self.busy),
            self.stream.payload.data.eq(beats.word_select((column >> (each.bit_length() - 1)), self.beat_bits)),
            self.stream.payload.last.eq(row_ends & (row + 1 == rows)),
        ]
        with m.If(self.begin):
            m.d.sync += [self.busy.eq(1), row.eq(0), column.eq(0), rows.eq(self.rows), columns.eq(self.columns)]
        with m.Elif(self.busy & self.stream.ready):
            m.d.sync += [column.eq(Mux(row_ends, 0, column + each)), row.eq(row + row_ends)]
            with m.If(self.stream.payload.last):
                m.d.sync += self.busy.eq(0)
        return m
