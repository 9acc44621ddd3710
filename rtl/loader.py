"""The loader: the rows of a layer's chunks, from a stream, into the operand memories.

The stream brings the chunks in the order of the program, for each first its weights, then its activations, as far as
they are not there yet; of either operand row after row (the activations of a token are a row), as many as the tile has.
A row's part of a chunk: with the first chunk of a row its panel word, the channel scale (FP32), or the scale of
activations that are codes (FP16); of weights the words (``GROUP_WORD``) of the groups that begin in the chunk; its
codes, packed as ``termwise.algorithms.packing`` packs rows. Each of these words, and the codes, begin in a beat of
their own.

Beside GOBO's PEs the panel word is ``OUTLIER_COUNTS``, there are no groups, and before its codes each row says how many
outliers follow in this chunk, then for each its place in the chunk and its value (FP32), a beat each, in order. The
loader marks their codes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from termwise.rtl.bit_serial import HALF_EXPONENT_BITS
from termwise.rtl.operand_memory import MemoryDesign, Pointers
from termwise.rtl.program import COUNT_BITS, PACKED, PACKED_BITS, PROGRAM, Allocation, Use, Walker, is_last


class LoadError(enum.IntEnum):
    """Why a load ended."""

    NONE = 0
    MEMORY = 1
    """A word beyond the half of the memory that it belongs to."""
    NOT_FINITE = 2
    """An activation that is infinite or no number."""


_ONE = Const(1)


@dataclass(frozen=True, kw_only=True)
class OperandDesign:
    """How an operand is loaded.

    Attributes:
        memory: where it goes.
        codes: of a word of a row: those of the lanes, or a pair.
        code_widths: bits of a packed code; a word of the memory has fields of the widest.
        steps_per_word: 2 where codes come in pairs.
        halves: whether codes are FP16 numbers, which are checked.
        finds_exponents: the group words are the largest exponents of each group, found on the way; else they come
            from the stream.
    """

    memory: MemoryDesign
    codes: int
    code_widths: tuple[int, ...]
    steps_per_word: int = 1
    halves: bool = False
    finds_exponents: bool = False


def write_members(design: MemoryDesign) -> dict[str, wiring.Member]:
    """Ports that write into an operand memory."""
    found: dict[str, wiring.Member] = {"row": Out(range(design.rows))}
    for kind, (width, depth) in design.memories.items():
        found |= {f"{kind}_write": Out(1), f"{kind}_write_at": Out(range(depth)), f"{kind}_data": Out(width)}
    return found


class Unpacker(wiring.Component):
    """Cuts beats into words of codes.

    A word comes at the earliest in the cycle after the beat of its last bit; one word and one beat per cycle. ``ready``
    does not wait for ``valid``, and no beat is taken without a bit of the words that are wanted.

    Ports:
        wants: there is a word to come, of ``word_bits`` bits; ``last``: no other one after it, else one of
            ``next_bits`` bits. All stay until it has come.
        code_bits: of a code.
        stream: beats.
        valid, word: the codes of a word in the cycle in which it comes, in fields of the widest; zeros above.
        reset: nothing is kept.
    """

    def __init__(self, codes: int, code_widths: tuple[int, ...], beat_bits: int) -> None:
        self.codes, self.code_widths = codes, code_widths
        self.field_bits = max(code_widths)
        super().__init__(
            {
                "wants": In(1),
                "last": In(1),
                "word_bits": In(PACKED_BITS),
                "next_bits": In(PACKED_BITS),
                "code_bits": In(PACKED_BITS),
                "reset": In(1),
                "stream": In(stream.Signature(beat_bits)),
                "valid": Out(1),
                "word": Out(codes * self.field_bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        beat_bits = len(self.stream.payload)
        most = self.codes * self.field_bits
        window = Signal(most + beat_bits)
        count = Signal(range(len(window) + 1))
        # Bits that are left once a word has gone; a beat comes behind them.
        taken = Signal(range(len(window) + 1))
        left = Signal(len(window))
        behind = Signal(range(len(window) + 1))
        m.d.comb += [
            self.valid.eq(self.wants & (count >= self.word_bits)),
            taken.eq(Mux(self.valid, self.word_bits, 0)),
            left.eq(window >> taken),
            behind.eq(count - taken),
            self.stream.ready.eq(self.wants & (~self.valid | (~self.last & (behind < self.next_bits)))),
        ]
        arrives = self.stream.valid & self.stream.ready
        m.d.sync += [
            window.eq(Mux(arrives, left | (self.stream.payload << behind)[: len(window)], left)),
            count.eq(behind + Mux(arrives, beat_bits, 0)),
        ]
        with m.If((self.valid & self.last) | self.reset):
            m.d.sync += [window.eq(0), count.eq(0)]
        # Codes that are no part of the word are zeros.
        kept = Signal(most)
        m.d.comb += kept.eq(window[:most] & ~((Const(-1, most) << self.word_bits)[:most]))
        with m.Switch(self.code_bits):
            for width in self.code_widths:
                with m.Case(width):
                    for place in range(self.codes):
                        field = self.word.word_select(place, self.field_bits)
                        m.d.comb += field.eq(kept[place * width : (place + 1) * width])
        return m


class OperandLoader(wiring.Component):
    """One operand's part of a chunk, from beats into its memory, row after row.

    Takes a beat or writes a word per cycle from the cycle after ``begin`` on, with a cycle between two rows.

    Ports:
        begin: a chunk begins, with ``chunk_first``, ``chunk_last`` (of a row), ``steps``, ``rows``, ``advances`` and
            ``half``, which stay until it ends.
        group_steps, code_bits, word_bits, group_bits, row_bits, resident: of the program; with outliers also
            ``by_chunks``.
        stream: beats.
        memory: to the operand memory.
        ends: in the cycle of the last word.
        error: ``LoadError`` in the cycle of a word.
    """

    def __init__(self, design: OperandDesign, beat_bits: int) -> None:
        self.design, self.beat_bits = design, beat_bits
        super().__init__(
            {
                "begin": In(1),
                "chunk_first": In(1),
                "chunk_last": In(1),
                "steps": In(COUNT_BITS),
                "rows": In(COUNT_BITS),
                "advances": In(1),
                "half": In(1),
                "group_steps": In(COUNT_BITS),
                **{name: In(PACKED_BITS) for name in PACKED},
                "resident": In(1),
                **({"by_chunks": In(1)} if design.memory.outliers else {}),
                "stream": In(stream.Signature(beat_bits)),
                "memory": Out(wiring.Signature(write_members(design.memory))),
                "ends": Out(1),
                "error": Out(2),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        design = self.design
        kinds = design.memory.kinds
        groups_come = "group" in kinds and not design.finds_exponents
        m.submodules.unpacker = unpacker = Unpacker(design.codes, design.code_widths, self.beat_bits)
        pointers = Pointers(m, design.memory, "write")
        place = {kind: Signal.like(pointers.next[kind], name=f"{kind}_place") for kind in kinds}
        row = Signal(COUNT_BITS)
        # Steps of the row that are left; of the group; of the group in which the chunk began; steps after it.
        steps_left, group_left = Signal(COUNT_BITS + 1), Signal(COUNT_BITS + 1)
        group_begun, begins_left = Signal(COUNT_BITS + 1), Signal(signed(COUNT_BITS + 2))
        row_ends = Signal()
        beat_taken = Signal()
        # Steps of the group that are left from this word on, and after it. Where there are none, another one begins.
        begun, left = Signal(COUNT_BITS + 1), Signal(COUNT_BITS + 1)
        each = design.steps_per_word
        moves = {kind: Signal(name=f"{kind}_moves") for kind in kinds}

        def bits_of(steps: Value, group: Value) -> Value:
            """Bits of a word from which on so many steps of the row and of the group are left."""
            in_group = Mux(group <= each, self.group_bits, self.word_bits)
            return Mux((steps <= each) & self.chunk_last, self.row_bits, in_group)

        m.d.comb += [
            self.memory.row.eq(row),
            beat_taken.eq(self.stream.valid & self.stream.ready),
            row_ends.eq(steps_left <= each),
            begun.eq(Mux(group_left == 0, self.group_steps, group_left)),
            left.eq(Mux(begun >= each, begun - each, self.group_steps + begun - each)),
            unpacker.stream.payload.eq(self.stream.payload),
            unpacker.code_bits.eq(self.code_bits),
            unpacker.last.eq(row_ends),
            unpacker.word_bits.eq(bits_of(steps_left, begun)),
            unpacker.next_bits.eq(bits_of(steps_left - each, Mux(left == 0, self.group_steps, left))),
            unpacker.reset.eq(self.begin),
        ]

        for kind in kinds:
            m.d.sync += place[kind].eq(place[kind] + moves[kind])

        def write(kind: str, content: Value, moves_on: Value = _ONE) -> None:
            """A word goes to the place of its kind, if it fits into its half."""
            _, depth = kinds[kind]
            at = place[kind]
            m.d.comb += [
                getattr(self.memory, f"{kind}_write").eq(1),
                getattr(self.memory, f"{kind}_write_at").eq(at),
                getattr(self.memory, f"{kind}_data").eq(content),
                moves[kind].eq(moves_on),
            ]
            in_half = (at >= depth // 2) == self.half
            with m.If((at >= depth) | (~self.resident & ~in_half)):
                m.d.comb += self.error.eq(LoadError.MEMORY)

        def next_group_or_codes(left: Value) -> None:
            if design.memory.outliers:
                m.next = "COUNT"
            elif groups_come:
                with m.If(left > 0):
                    m.next = "GROUP"
                with m.Else():
                    m.next = "CODES"
            else:
                m.next = "CODES"

        outlier = Signal()  # whether the code of this step is one
        if design.memory.outliers:
            outliers = _OutlierList(m, self, steps_done=(self.steps - steps_left)[:COUNT_BITS])
            m.d.comb += outlier.eq(outliers.is_next)

        with m.FSM():
            with m.State("IDLE"), m.If(self.begin):
                pointers.begin_write(self.advances & ~self.resident, self.half)
                pointers.move(**{kind: Const(0) for kind in kinds})
                m.d.sync += row.eq(0)
                with m.If(self.chunk_first):
                    m.d.sync += group_begun.eq(0)
                m.next = "ROW"
            with m.State("ROW"):
                for kind in kinds:
                    m.d.sync += place[kind].eq(pointers.next[kind])
                m.d.sync += [
                    steps_left.eq(self.steps),
                    group_left.eq(group_begun),
                    begins_left.eq(self.steps - group_begun),
                ]
                if "panel" in kinds:
                    with m.If(self.chunk_first):
                        m.next = "PANEL"
                    with m.Else():
                        next_group_or_codes(self.steps - group_begun)
                else:
                    next_group_or_codes(self.steps - group_begun)
            if "panel" in kinds:
                with m.State("PANEL"):
                    m.d.comb += self.stream.ready.eq(1)
                    with m.If(beat_taken):
                        write("panel", self.stream.payload)
                        if design.memory.outliers:
                            m.d.sync += outliers.panel.eq(place["panel"])
                        next_group_or_codes(begins_left)
            if groups_come:
                with m.State("GROUP"):
                    m.d.comb += self.stream.ready.eq(1)
                    with m.If(beat_taken):
                        write("group", self.stream.payload)
                        m.d.sync += begins_left.eq(begins_left - self.group_steps)
                        with m.If(begins_left <= self.group_steps):
                            m.next = "CODES"
            if design.memory.outliers:
                outliers.states(beat_taken, row)
            with m.State("CODES"):
                m.d.comb += [
                    unpacker.wants.eq(1),
                    unpacker.stream.valid.eq(self.stream.valid),
                    self.stream.ready.eq(unpacker.stream.ready),
                ]
                with m.If(unpacker.valid):
                    m.d.sync += [group_left.eq(left), steps_left.eq(steps_left - each)]
                    write("step", Cat(unpacker.word, outlier) if design.memory.outliers else unpacker.word)
                    if design.memory.outliers:
                        m.d.sync += outliers.next.eq(outliers.next + outlier)
                    if design.halves:
                        halves = [unpacker.word.word_select(lane, 16) for lane in range(design.codes)]
                        with m.If(Cat(*(half[10:15].all() for half in halves)).any()):
                            m.d.comb += self.error.eq(LoadError.NOT_FINITE)
                        if design.finds_exponents:
                            write("group", _largest_exponent(m, halves, group_left == 0), (left == 0) | row_ends)
                    with m.If(row_ends):
                        m.d.sync += row.eq(row + 1)
                        m.next = "ROW"
                        with m.If(row + 1 == self.rows):
                            m.d.comb += self.ends.eq(1)
                            m.d.sync += group_begun.eq(left)
                            for kind in kinds:
                                m.d.sync += pointers.next[kind].eq(place[kind] + moves[kind])
                            m.next = "IDLE"
        return m


class _OutlierList:
    """The outliers of a row's part of a chunk: values go to their memory, places are kept until their codes come.

    The values of a row lie beside its panel word; where a chunk is all that stays, they take turns with those of the
    tile before, which are read at the end of its rows.

    Attributes:
        panel: address of the row's panel word.
        next: which place of the list comes next. is_next: the code of this step is that outlier.
    """

    def __init__(self, m: Module, loader: OperandLoader, steps_done: Value) -> None:
        self.m, self.loader = m, loader
        design = loader.design.memory
        self.room = design.outliers
        self.panel = Signal(range(design.panels), name="outlier_panel")
        self.turn = Signal(name="outlier_turn")
        self.next, self.is_next = Signal(COUNT_BITS, name="next_outlier"), Signal(name="is_outlier")
        self.left, self.listed = Signal(COUNT_BITS, name="outliers_left"), Signal(COUNT_BITS, name="outliers_listed")
        self.of_row = Signal(COUNT_BITS, name="outliers_of_row")
        m.submodules.outlier_places = places = Memory(shape=COUNT_BITS, depth=self.room, init=[])
        self.write, read = places.write_port(), places.read_port(domain="comb")
        # How many outliers of each row the chunks before have brought.
        depth = 1 << (design.rows - 1).bit_length()  # any address is one of it
        m.submodules.outlier_counts = counts = Memory(shape=COUNT_BITS, depth=depth, init=[])
        self.count, self.counted = counts.write_port(), counts.read_port(domain="comb")
        m.d.comb += [
            read.addr.eq(self.next),
            self.is_next.eq((self.next < self.listed) & (read.data == steps_done)),
        ]
        with m.If(loader.begin & loader.chunk_first):
            m.d.sync += self.turn.eq(~self.turn)

    def states(self, beat_taken: Value, row: Value) -> None:
        """How many; then place and value of each."""
        m, loader = self.m, self.loader
        stream_, memory = loader.stream, loader.memory
        m.d.comb += [self.counted.addr.eq(row), self.count.addr.eq(row), self.count.data.eq(self.of_row)]
        with m.State("COUNT"):
            m.d.comb += stream_.ready.eq(1)
            with m.If(beat_taken):
                m.d.sync += [
                    self.left.eq(stream_.payload),
                    self.listed.eq(0),
                    self.next.eq(0),
                    self.of_row.eq(Mux(loader.chunk_first, 0, self.counted.data)),
                ]
                m.next = "PLACE"
        with m.State("PLACE"):
            with m.If(self.left == 0):
                m.d.comb += self.count.en.eq(1)
                m.next = "CODES"
            with m.Else():
                m.d.comb += stream_.ready.eq(1)
                with m.If(beat_taken):
                    m.d.comb += [
                        self.write.en.eq(1),
                        self.write.addr.eq(self.listed),
                        self.write.data.eq(stream_.payload),
                    ]
                    m.next = "VALUE"
        with m.State("VALUE"):
            m.d.comb += stream_.ready.eq(1)
            with m.If(beat_taken):
                m.d.comb += [
                    memory.outlier_write.eq(1),
                    memory.outlier_write_at.eq(Mux(loader.by_chunks, self.turn, self.panel) * self.room + self.of_row),
                    memory.outlier_data.eq(stream_.payload),
                ]
                m.d.sync += [
                    self.left.eq(self.left - 1),
                    self.listed.eq(self.listed + 1),
                    self.of_row.eq(self.of_row + 1),
                ]
                with m.If(self.of_row >= self.room):
                    m.d.comb += loader.error.eq(LoadError.MEMORY)
                m.next = "PLACE"


def _largest_exponent(m: Module, halves: list[Value], begins: Value) -> Value:
    """The largest exponent of a group so far, 1 at least."""
    largest = Signal(HALF_EXPONENT_BITS, name="largest")
    running: Value = Mux(begins, 1, largest)
    for lane, half in enumerate(halves):
        greater = Signal(HALF_EXPONENT_BITS, name=f"running_{lane}")
        m.d.comb += greater.eq(Mux(half[10:15] > running, half[10:15], running))
        running = greater
    m.d.sync += largest.eq(running)
    return running


@dataclass(frozen=True, kw_only=True)
class LoaderDesign:
    """A loader of both operands from a stream of ``beat_bits`` bits."""

    weights: OperandDesign
    activations: OperandDesign
    beat_bits: int = 32


class Loader(wiring.Component):
    """Fills halves of the operand memories as they become free, in the order of the program.

    Takes a beat per cycle; two cycles pass between two loads. After an error it takes and drops what comes until it
    is reset, as before every layer.

    Ports:
        program; start: a layer begins.
        stream: beats.
        weights, activations: to the memories.
        weights_arrived, activations_arrived: a load has ended; the next cycle may read it.
        weights_released, activations_released: an allocation has been read for the last time.
        error: ``LoadError``, until the reset.
    """

    def __init__(self, design: LoaderDesign) -> None:
        self.design = design
        self.operands = {"weights": design.weights, "activations": design.activations}
        members: dict[str, wiring.Member] = {
            "program": In(PROGRAM),
            "start": In(1),
            "stream": In(stream.Signature(design.beat_bits)),
            "error": Out(2),
        }
        for operand, own in self.operands.items():
            members |= {
                operand: Out(wiring.Signature(write_members(own.memory))),
                f"{operand}_arrived": Out(1),
                f"{operand}_released": In(1),
            }
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        program = self.program
        m.submodules.walker = walker = Walker()
        chunk = walker.chunk
        m.d.comb += [walker.program.eq(program), walker.start.eq(self.start)]
        failure = Signal(2)
        m.d.comb += self.error.eq(failure)
        loaders, uses, occupied, begins = {}, {}, {}, {}
        for operand, design in self.operands.items():
            allocation = getattr(program, f"{operand[:-1]}_allocation")
            stationary = program.weights_stationary if operand == "weights" else ~program.weights_stationary
            uses[operand] = use = Use(chunk, allocation, stationary)
            m.submodules[operand] = loader = OperandLoader(design, self.design.beat_bits)
            if design.memory.outliers:
                m.d.comb += loader.by_chunks.eq(allocation == Allocation.CHUNKS)
            loaders[operand] = loader
            begins[operand] = Signal(name=f"{operand}_begin")
            advances = Signal(name=f"{operand}_advances")
            if operand == "weights":
                tile, tiles, last = chunk.row_tile, program.row_tiles, program.last_rows
            else:
                tile, tiles, last = chunk.column_tile, program.column_tiles, program.last_columns
            # The first allocation goes to half 0; the half is that of the load from its beginning on.
            half, moved = Signal(name=f"{operand}_half", init=1), Signal(name=f"{operand}_half_of_load")
            occupied[operand] = Signal(2, name=f"{operand}_occupied")
            resident = allocation == Allocation.RESIDENT
            m.d.comb += [
                loader.begin.eq(begins[operand]),
                loader.chunk_first.eq(chunk.first),
                loader.chunk_last.eq(chunk.last),
                loader.rows.eq(Mux(tile == tiles - 1, last, design.memory.rows)),
                loader.steps.eq(chunk.steps),
                loader.advances.eq(use.advances),
                loader.group_steps.eq(program.group_steps),
                loader.resident.eq(resident),
                loader.half.eq(moved),
                *(getattr(loader, name).eq(getattr(program, f"{operand[:-1]}_{name}")) for name in PACKED),
                loader.stream.payload.eq(self.stream.payload),
                advances.eq(begins[operand] & use.advances),
                moved.eq(half ^ (advances & ~resident)),
                getattr(self, f"{operand}_arrived").eq(loader.ends & ~loader.error.any()),
            ]
            m.d.sync += half.eq(moved)
            released = getattr(self, f"{operand}_released")
            m.d.sync += occupied[operand].eq(occupied[operand] + advances - released)
            port = getattr(self, operand)
            for name in port.signature.members:
                m.d.comb += getattr(port, name).eq(getattr(loader.memory, name))
        with m.FSM():
            with m.State("IDLE"), m.If(self.start):
                m.next = "CHECK_WEIGHTS"
            for operand, following in (("weights", "CHECK_ACTIVATIONS"), ("activations", "NEXT")):
                use, loader = uses[operand], loaders[operand]
                with m.State(f"CHECK_{operand.upper()}"):
                    with m.If(~use.new):
                        m.next = following
                    with m.Elif(~use.advances | (occupied[operand] < 2)):
                        m.d.comb += begins[operand].eq(1)
                        m.next = f"LOAD_{operand.upper()}"
                with m.State(f"LOAD_{operand.upper()}"):
                    m.d.comb += [loader.stream.valid.eq(self.stream.valid), self.stream.ready.eq(loader.stream.ready)]
                    with m.If(loader.ends):
                        m.next = following
                    with m.If(loader.error.any()):
                        m.d.sync += failure.eq(loader.error)
                        m.next = "DROP"
            with m.State("NEXT"):
                m.d.comb += walker.next.eq(1)
                with m.If(is_last(chunk)):
                    m.next = "IDLE"
                with m.Else():
                    m.next = "CHECK_WEIGHTS"
            with m.State("DROP"):
                m.d.comb += self.stream.ready.eq(1)
        return m
