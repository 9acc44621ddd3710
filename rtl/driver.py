"""The driver: programs an accelerator, feeds it a layer in the order that it asks for, and collects the outputs.

It knows the hardware by its registers and streams alone. What carries them is a ``Transport``: a model of the hardware
in this process, or a board behind a serial line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.quantize import QuantizedTensor
from termwise.rtl.accelerator import BEAT_BITS, AcceleratorDesign
from termwise.rtl.borders import OUTLIER_COUNTS
from termwise.rtl.layer_image import LayerImage, layer_image
from termwise.rtl.loader import OperandDesign
from termwise.rtl.program import PACKED, PROGRAM, Allocation
from termwise.rtl.registers import ERRORS, IDENTITY, OFFSETS, WORD_BITS
from termwise.rtl.sequencer import CAUSES

Beats = NDArray[np.uint32]


class Transport(Protocol):
    """What carries registers and streams."""

    def write(self, offset: int, value: int) -> None:
        """Write a register."""

    def read(self, offset: int) -> int:
        """Read a register."""

    def transfer(self, operands: Beats, outputs: int) -> Beats:
        """Send all ``operands`` and receive ``outputs`` beats; fewer where the accelerator reports an error."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a layer is cut and what stays: the fields of ``PROGRAM`` beside the sizes.

    Raises nothing; ``plan`` makes one that fits.
    """

    chunk_steps: int
    panels_per_block: int
    weights_stationary: bool
    weight_allocation: Allocation
    activation_allocation: Allocation


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """A layer that the accelerator computed.

    Attributes:
        outputs: float16 [tokens, outputs].
        cycles: of the whole layer.
        cycles_by_cause: of each of ``CAUSES``; they sum to ``cycles``.
        operand_beats, output_beats: of the streams.
    """

    outputs: NDArray[np.float16]
    cycles: int
    cycles_by_cause: dict[str, int]
    operand_beats: int
    output_beats: int


def plan(design: AcceleratorDesign, image: LayerImage) -> Schedule:
    """The schedule that loads least: as much stays in the memories as fits.

    Raises ``InputError`` where not even a group, with numerics that align a group's activations, fits into a half.
    """
    loader = design.loader
    steps = {
        "weights": (loader.weights.memory, loader.weights.steps_per_word),
        "activations": (loader.activations.memory, loader.activations.steps_per_word),
    }
    whole_groups = design.array.datapath.group_exponents

    def fits(operand: str, row_steps: int, panels: int, share: int) -> bool:
        """Whether so many steps of so many panels fit into 1 / ``share`` of a memory."""
        memory, each = steps[operand]
        words = -(-row_steps // each) * panels
        groups = (-(-row_steps // image.group_steps) + (row_steps < image.row_steps)) * panels
        return words <= memory.steps // share and (
            (groups <= memory.groups // share or not memory.group_bits)
            and (panels <= memory.panels // share or not memory.panel_bits)
        )

    # From multiples of 8 steps on, every chunk begins with a byte of the packed rows.
    chunk = next(
        (
            steps_
            for unit in ((image.group_steps,) if whole_groups else (8, 2))
            for steps_ in range(image.row_steps, 0, -1)
            if (steps_ % unit == 0 or steps_ == image.row_steps)
            and all(fits(operand, steps_, 1, 2) for operand in steps)
        ),
        None,
    )
    if chunk is None:
        raise InputError(
            f"a group of {image.group_steps} steps does not fit into half a memory; expected an accelerator with more"
        )
    tiles = {"weights": image.row_tiles, "activations": image.column_tiles}
    best: tuple[int, Schedule] | None = None
    for stationary in ("weights", "activations"):
        moving = "activations" if stationary == "weights" else "weights"
        allocations: dict[str, Allocation] = {}
        panels = 1
        if fits(stationary, image.row_steps, tiles[stationary], 1):
            allocations[stationary], panels = Allocation.RESIDENT, tiles[stationary]
        elif fits(stationary, image.row_steps, 1, 2):
            allocations[stationary] = Allocation.PANELS
            while panels < tiles[stationary] and fits(stationary, image.row_steps, panels + 1, 2):
                panels += 1
        else:
            allocations[stationary] = Allocation.CHUNKS
        if fits(moving, image.row_steps, tiles[moving], 1):
            allocations[moving] = Allocation.RESIDENT
        elif fits(moving, image.row_steps, 1, 2):
            allocations[moving] = Allocation.PANELS
        else:
            allocations[moving] = Allocation.CHUNKS
        schedule = Schedule(
            chunk_steps=chunk,
            panels_per_block=panels,
            weights_stationary=stationary == "weights",
            weight_allocation=allocations["weights"],
            activation_allocation=allocations["activations"],
        )
        beats = sum(len(part) for part in operand_beats(design, image, schedule))
        if best is None or beats < best[0]:
            best = beats, schedule
    assert best is not None
    return best[1]


def program_fields(design: AcceleratorDesign, image: LayerImage, schedule: Schedule) -> dict[str, int]:
    """The registers of ``PROGRAM``."""
    return {
        "row_tiles": image.row_tiles,
        "column_tiles": image.column_tiles,
        "row_steps": image.row_steps,
        "group_steps": min(image.group_steps, image.row_steps),
        "chunk_steps": schedule.chunk_steps,
        "panels_per_block": schedule.panels_per_block,
        "last_rows": image.outputs - (image.row_tiles - 1) * design.array.rows,
        "last_columns": image.tokens - (image.column_tiles - 1) * design.array.columns,
        "terms": image.terms,
        "weights_stationary": int(schedule.weights_stationary),
        "weight_allocation": int(schedule.weight_allocation),
        "activation_allocation": int(schedule.activation_allocation),
        **_packed_fields(image, "weight", image.weight_code_bits, design.loader.weights),
        **_packed_fields(image, "activation", image.activation_code_bits, design.loader.activations),
    }


def _packed_fields(image: LayerImage, operand: str, bits: int, design: OperandDesign) -> dict[str, int]:
    """``PACKED`` of an operand."""
    codes = design.codes
    last_of_group, last_of_row = codes, (image.inputs - 1) % codes + 1
    if design.steps_per_word == 1:  # a group ends with a word of its own
        last_of_group = (image.group_inputs - 1) % codes + 1
        last_of_row = ((image.inputs - 1) % image.group_inputs) % codes + 1
    sizes = (1, codes, last_of_group, last_of_row)
    return {f"{operand}_{name}": bits * size for name, size in zip(PACKED, sizes, strict=True)}


def tiles_in_order(image: LayerImage, schedule: Schedule) -> Iterator[tuple[int, int, int, int, int]]:
    """(row tile, column tile, stationary place in its block, moving panel, first panel of the block), in order."""
    stationary, moving = image.row_tiles, image.column_tiles
    if not schedule.weights_stationary:
        stationary, moving = moving, stationary
    for block in range(0, stationary, schedule.panels_per_block):
        for panel in range(moving):
            for place in range(min(schedule.panels_per_block, stationary - block)):
                tiles = (block + place, panel) if schedule.weights_stationary else (panel, block + place)
                yield *tiles, place, panel, block


def _columns_of_beats(values: NDArray[Any]) -> Beats:
    """[rows, values of up to 32 bits] as [rows, beats], a value each."""
    return values.view(f"<u{values.dtype.itemsize}").astype(np.uint32)


def _packed_part(rows: NDArray[np.uint8], first_bit: int, last_bit: int) -> Beats:
    """The bits from the first to before the last one of packed ``rows`` [rows, bytes], as [rows, beats]."""
    if first_bit % 8:
        bits = np.unpackbits(rows, axis=1, bitorder="little")[:, first_bit:last_bit]
        part = np.packbits(bits, axis=1, bitorder="little")
    else:
        part = rows[:, first_bit // 8 : -(-last_bit // 8)]
    padded = np.pad(part, ((0, 0), (0, -part.shape[1] % (BEAT_BITS // 8))))
    return np.ascontiguousarray(padded).view("<u4")


def operand_beats(design: AcceleratorDesign, image: LayerImage, schedule: Schedule) -> list[Beats]:
    """The operands in the order in which the loader asks for them."""
    path = design.array.datapath
    found: list[Beats] = []
    for row_tile, column_tile, place, panel, block in tiles_in_order(image, schedule):
        for begin in range(0, image.row_steps, schedule.chunk_steps):
            end = min(begin + schedule.chunk_steps, image.row_steps)
            codes = [image.codes_before(step) for step in (begin, end)]
            for operand in ("weights", "activations"):
                is_weights = operand == "weights"
                allocation = schedule.weight_allocation if is_weights else schedule.activation_allocation
                first_visit = panel == 0 if is_weights == schedule.weights_stationary else place == 0
                if allocation == Allocation.RESIDENT and is_weights != schedule.weights_stationary:
                    first_visit = first_visit and block == 0
                if not first_visit and allocation != Allocation.CHUNKS:
                    continue
                parts = []
                if is_weights:
                    rows = slice(row_tile * image.rows, (row_tile + 1) * image.rows)
                    if path.outliers:
                        found.extend(_rows_with_outliers(image, rows, *codes))
                        continue
                    if path.parts.channel_scales and begin == 0:
                        parts.append(_columns_of_beats(image.channel_scales[rows, None]))
                    groups = slice(-(-begin // image.group_steps), -(-end // image.group_steps))
                    parts.append(_columns_of_beats(image.groups[rows, groups]))
                    bits, packed = image.weight_code_bits, image.weights[rows]
                else:
                    rows = slice(column_tile * image.columns, (column_tile + 1) * image.columns)
                    if path.column_scales and begin == 0:
                        parts.append(_columns_of_beats(image.column_scales[rows, None]))
                    bits, packed = image.activation_code_bits, image.activations[rows]
                parts.append(_packed_part(packed, codes[0] * bits, codes[1] * bits))
                found.append(np.concatenate(parts, axis=1).ravel())
    return found


def _rows_with_outliers(image: LayerImage, rows: slice, begin: int, end: int) -> Iterator[Beats]:
    """Of each row: with its first inputs ``OUTLIER_COUNTS``; outliers from ``begin`` to before ``end``; its indices."""
    bits = image.weight_code_bits
    indices = _packed_part(image.weights[rows], begin * bits, end * bits)
    most = max(len(places) for places, _ in image.outliers[rows])
    for (places, values), own in zip(image.outliers[rows], indices, strict=True):
        here = slice(*np.searchsorted(places, [begin, end]))
        pairs = np.stack([(places[here] - begin).astype(np.uint32), values[here].view(np.uint32)], axis=1)
        counts = [] if begin else [len(places) | most << OUTLIER_COUNTS["most"].offset]
        yield np.concatenate([np.array([*counts, len(pairs)], np.uint32), pairs.ravel(), own])


class Driver:
    """Runs layers on an accelerator behind a ``transport``.

    Raises ``TermwiseError`` where what answers is not an accelerator of this ``design``.
    """

    def __init__(self, design: AcceleratorDesign, transport: Transport) -> None:
        self.design, self.transport = design, transport
        identity, found = self.read("identity"), self.read("design")
        if identity != IDENTITY:
            raise TermwiseError(f"identity 0x{identity:08x}; expected an accelerator, 0x{IDENTITY:08x}")
        if found != design.digest:
            raise TermwiseError(f"an accelerator of design 0x{found:08x}; expected 0x{design.digest:08x}")

    def read(self, name: str) -> int:
        """A register."""
        return self.transport.read(OFFSETS[name])

    def write(self, name: str, value: int) -> None:
        """A register."""
        self.transport.write(OFFSETS[name], value)

    def run(
        self,
        tensor: QuantizedTensor,
        activations: NDArray[np.float16] | QuantizedTensor,
        schedule: Schedule | None = None,
    ) -> LayerResult:
        """Compute activations · weightsᵀ: [tokens, inputs] by ``tensor`` [outputs, inputs].

        Raises ``InputError`` for what the accelerator cannot compute, ``TermwiseError`` with the text of its error.
        """
        image = layer_image(self.design.array, tensor, activations)
        return self.run_image(image, schedule or plan(self.design, image))

    def run_image(self, image: LayerImage, schedule: Schedule) -> LayerResult:
        """The same for an image that was made before."""
        for name, value in program_fields(self.design, image, schedule).items():
            width = PROGRAM[name].width
            if value >= 1 << width:
                raise InputError(f"{name} = {value}; the accelerator takes {(1 << width) - 1} at most")
            self.write(name, value)
        words = [name for name in OFFSETS if name.startswith("layer_")]
        for place, name in enumerate(words):
            self.write(name, image.layer >> WORD_BITS * place & ((1 << WORD_BITS) - 1))
        for number, centroid in enumerate(image.centroids.view(np.uint32)):
            self.write(f"centroid_{number}", int(centroid))
        array = self.design.array
        expected = sum(
            self._rows(image, row_tile) * -(-16 * self._columns(image, column_tile) // BEAT_BITS)
            for row_tile, column_tile, *_ in tiles_in_order(image, schedule)
        )
        beats = np.concatenate(operand_beats(self.design, image, schedule))
        self.write("interrupt_enable", 2)
        self.write("control", 1)
        found = self.transport.transfer(beats, expected)
        error = self.read("error")
        if error or len(found) < expected:
            self.write("control", 2)
            raise TermwiseError(f"the accelerator stopped: {ERRORS.get(error, 'unknown error')}")
        outputs = np.zeros((image.column_tiles * array.columns, image.row_tiles * array.rows), np.uint16)
        halves = found.view("<u2")
        place = 0
        for row_tile, column_tile, *_ in tiles_in_order(image, schedule):
            rows, columns = self._rows(image, row_tile), self._columns(image, column_tile)
            width = columns + columns % 2
            tile = halves[place : place + rows * width].reshape(rows, width)[:, :columns]
            first_row, first_column = row_tile * array.rows, column_tile * array.columns
            outputs[first_column : first_column + columns, first_row : first_row + rows] = tile.T
            place += rows * width
        return LayerResult(
            outputs=outputs[: image.tokens, : image.outputs].view(np.float16),
            cycles=self.read("cycles"),
            cycles_by_cause={cause: self.read(f"{cause}_cycles") for cause in CAUSES},
            operand_beats=len(beats),
            output_beats=expected,
        )

    def _rows(self, image: LayerImage, row_tile: int) -> int:
        return min(self.design.array.rows, image.outputs - row_tile * self.design.array.rows)

    def _columns(self, image: LayerImage, column_tile: int) -> int:
        return min(self.design.array.columns, image.tokens - column_tile * self.design.array.columns)
