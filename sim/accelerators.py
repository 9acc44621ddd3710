"""The machines that are compared: one frozen description each, read by the simulators and restated by none.

Constants: BitMoD (HPCA 2025, sections IV-C and V-A) and the constants of its public simulator, state of November 2024.
The four published systems have different array shapes so that their areas are about equal. A name may carry another
array, behind an ``@``:

* ``bitmod-lossy@32x32`` has 32 rows (output channels) and 32 columns (tokens) in both phases;
* ``bitmod-lossy@iso-pe`` has the array of the FP16 baseline in each phase;
* ``bitmod-lossy@iso-area`` keeps the rows and has, in each phase, the most columns with which its PEs take no more area
  than those of the FP16 baseline.

A name that ends in ``.toml`` or has a path separator is a file of the user's (``termwise.sim.machine_file``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionarySpec
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import Format, get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import SYSTOLIC_GROUP_DISTANCE, PipelineTiming, ProcessingElementSpec
from termwise.algorithms.workload import PHASES, Phase
from termwise.sim.dram import MAXIMUM_CLOCK_MHZ, Dram, get_dram

MAXIMUM_ARRAY_SIDE = 4096
MAXIMUM_BUFFER_BYTES = 1 << 40
MAXIMUM_KEY_VALUE_BITS = 16
_SOURCE = "BitMoD, HPCA 2025, sections IV-C and V-A"
_SIMULATOR_SOURCE = "constants of the simulator published with BitMoD, state of November 2024"
_BUFFER_SOURCE = "CACTI 7, 512 KiB in 8 banks, 28 nm (see termwise.sim.memory)"

Movement = Literal["broadcast", "systolic"]
Dataflow = Literal["output_stationary", "weight_stationary"]

ACCUMULATOR_BYTES = 4
"""Of a word of the accumulator memory, FP32."""
"""How operands reach the PEs (docs/microarchitecture.md, section 3): all in the same cycle, or from PE to PE."""

PROCESSING_ELEMENTS: dict[str, type[ProcessingElementSpec]] = {
    spec.kind: spec for spec in (Fp16MacSpec, BitSerialSpec, OutlierVictimSpec, FlintSpec, DictionarySpec)
}
"""Specification of every kind of PE."""


class MachineError(InputError):
    """A field of a machine that no machine can have; ``field``, ``value`` and ``expected`` say which and why."""

    def __init__(self, name: str, field: str, value: object, expected: str) -> None:
        super().__init__(f"accelerator {name!r}: {field} is {value!r}; expected {expected}")
        self.field, self.value, self.expected = field, value, expected


@dataclass(frozen=True, kw_only=True)
class ArrayShape:
    """PEs of an array: ``rows`` hold output channels, ``columns`` hold tokens. Raises ``InputError`` for no array."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        for side in ("rows", "columns"):
            if not _is_count(getattr(self, side), MAXIMUM_ARRAY_SIDE):
                raise InputError(
                    f"{side} of the array is {getattr(self, side)!r}; "
                    f"expected a whole number from 1 to {MAXIMUM_ARRAY_SIDE}"
                )

    @property
    def processing_elements(self) -> int:
        """PEs in the array."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator: the whole machine of ``docs/microarchitecture.md``.

    Attributes:
        name: as results call it, and as ``get_accelerator`` takes it where it comes with termwise.
        system: the published system that it is, whatever its array: the name of the precisions in
            ``termwise.sim.published``. A machine that is none has a name of its own here.
        processing_element: the PE; it tells lanes, cycles per dot-product step and which formats it takes.
        prefill_array, decode_array: shape of the array in either phase (the same PEs, wired differently).
        movement: how operands reach the PEs.
        dataflow: what stays in the PEs while a tile is computed: its outputs, or, step by step, the weights, for as
            many tokens as the accumulator memory has room for (``docs/microarchitecture.md``, section 9).
        accumulator_bytes: size of that memory, 4 bytes for each output of a tile; 0 where outputs stay in the PEs.
        prefill_format, decode_format: name of the weight format when the user names none.
        key_value_bits: width of keys and values: 16 is FP16, 8 is INT8.
        weight_buffer_bytes, activation_buffer_bytes: on-chip buffers, each two halves (double buffered).
        weight_buffer_banks, activation_buffer_banks: banks that share every word of a buffer.
        port_reads_per_step: reads of either buffer in one dot-product step. A bit-serial PE holds its operands for
            two cycles or more, so a port of half the width is read twice.
        memory: external memory behind one channel.
        pe_energy_pj_per_cycle: energy of a computing cycle of one PE before place and route, which multiplies it by
            ``place_and_route_factor``; None where it is not known.
        pe_area_um2: area of one PE in 28 nm, with its share of the encoder or decoder; None where it is not known.
        energy_set: name of the energies (``termwise.sim.energy``); None is ``bitmod-2024`` for the published buffers
            and ``bitmod-2024-any-buffer`` for others.
        clock_mhz: clock of the array, the buffers and the channel.
        sources: where the numbers come from.

    Raises ``MachineError`` (an ``InputError``) for numbers that no machine has. ``check_machine`` holds the parts
    against each other.
    """

    name: str
    system: str
    processing_element: ProcessingElementSpec
    prefill_array: ArrayShape
    decode_array: ArrayShape
    prefill_format: str
    decode_format: str
    key_value_bits: int
    port_reads_per_step: int
    pe_energy_pj_per_cycle: float | None = None
    pe_area_um2: float | None = None
    place_and_route_factor: float = 1.5
    movement: Movement = "broadcast"
    dataflow: Dataflow = "output_stationary"
    accumulator_bytes: int = 0
    weight_buffer_bytes: int = 512 * 1024
    weight_buffer_banks: int = 8
    activation_buffer_bytes: int = 512 * 1024
    activation_buffer_banks: int = 8
    memory: Dram = dataclasses.field(default_factory=lambda: get_dram("ideal"))
    energy_set: str | None = None
    clock_mhz: int = 1000
    sources: tuple[str, ...] = (_SOURCE, _SIMULATOR_SOURCE, _BUFFER_SOURCE)

    def __post_init__(self) -> None:
        counts = {
            "key_value_bits": MAXIMUM_KEY_VALUE_BITS,
            "clock_mhz": MAXIMUM_CLOCK_MHZ,
            "port_reads_per_step": None,
            "weight_buffer_bytes": MAXIMUM_BUFFER_BYTES,
            "weight_buffer_banks": None,
            "activation_buffer_bytes": MAXIMUM_BUFFER_BYTES,
            "activation_buffer_banks": None,
        }
        for field, most in counts.items():
            if not _is_count(getattr(self, field), most):
                raise self._error(field, "a whole number from 1" + ("" if most is None else f" to {most}"))
        if not _is_count(self.processing_element.lanes):
            lanes = self.processing_element.lanes
            raise MachineError(self.name, "processing_element.lanes", lanes, "a whole number from 1")
        for field in ("pe_energy_pj_per_cycle", "pe_area_um2", "place_and_route_factor"):
            value = getattr(self, field)
            if value is None and field != "place_and_route_factor":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise self._error(field, "a finite number above 0")
        if self.movement not in get_args(Movement):
            raise self._error("movement", " or ".join(get_args(Movement)))
        if self.dataflow not in get_args(Dataflow):
            raise self._error("dataflow", " or ".join(get_args(Dataflow)))
        elements = max(self.prefill_array.processing_elements, self.decode_array.processing_elements)
        least = ACCUMULATOR_BYTES * elements if self.dataflow == "weight_stationary" else 0
        most = MAXIMUM_BUFFER_BYTES if least else 0
        whole = isinstance(self.accumulator_bytes, int) and not isinstance(self.accumulator_bytes, bool)
        if not whole or not least <= self.accumulator_bytes <= most:
            expected = f"{least} to {most}, {ACCUMULATOR_BYTES} bytes or more for every PE" if least else "0"
            raise self._error("accumulator_bytes", f"{expected} with dataflow {self.dataflow}")
        if self.energy_set is not None:
            from termwise.sim.energy import energy_set_names

            if self.energy_set not in energy_set_names():
                raise self._error("energy_set", " or ".join(energy_set_names()))

    def _error(self, field: str, expected: str) -> MachineError:
        return MachineError(self.name, field, getattr(self, field), expected)

    def array(self, phase: Phase) -> ArrayShape:
        """Shape of the array in ``phase``."""
        return self.prefill_array if phase == "prefill" else self.decode_array

    def default_format(self, phase: Phase) -> str:
        """Name of the weight format in ``phase`` when the user names none."""
        return self.prefill_format if phase == "prefill" else self.decode_format

    @property
    def placed_pe_pj_per_cycle(self) -> float | None:
        """Energy of a computing cycle of one PE after place and route; None where it is not known."""
        if self.pe_energy_pj_per_cycle is None:
            return None
        return self.pe_energy_pj_per_cycle * self.place_and_route_factor

    @property
    def ideal_bytes_per_cycle(self) -> int:
        """Bytes that ideal memory moves in a cycle. Raises ``InputError`` for memory that is not ideal."""
        if self.memory.ideal_bytes_per_cycle is None:
            raise InputError(
                f"accelerator {self.name!r}: memory {self.memory.name!r} has no fixed bytes per cycle; expected ideal"
            )
        return self.memory.ideal_bytes_per_cycle

    def array_of_products(self, phase: Phase, elements: int) -> ArrayShape:
        """The array in ``phase`` as one of square groups of ``elements`` PEs, each of which computes one product.

        Raises ``MachineError`` where a side is no multiple of that of a group.
        """
        array, side = self.array(phase), math.isqrt(elements)
        if array.rows % side or array.columns % side:
            expected = (
                f"sides that are multiples of {side}: {elements} PEs compute one product of up to 8 bits together"
            )
            raise MachineError(self.name, f"{phase}_array", f"{array.rows}x{array.columns}", expected)
        return ArrayShape(rows=array.rows // side, columns=array.columns // side)

    def token_groups(self, array: ArrayShape) -> int:
        """How many times tokens of ``array`` may take turns on the same weights; 1 where outputs stay in the PEs."""
        return max(1, self.accumulator_bytes // (ACCUMULATOR_BYTES * array.processing_elements))

    def movement_cycles(self, phase: Phase) -> int:
        """Cycles by which the last PE of the array is behind the first (``docs/microarchitecture.md``, section 3)."""
        array = self.array(phase)
        return array.rows + array.columns - 2 if self.movement == "systolic" else 0

    def group_distance_cycles(self, pipeline: PipelineTiming) -> int:
        """Least distance of the last terms of two groups (``docs/microarchitecture.md``, section 3)."""
        least = SYSTOLIC_GROUP_DISTANCE if self.movement == "systolic" and pipeline.has_groups else 0
        return max(pipeline.group_distance_cycles, least)

    def array_area_um2(self, phase: Phase) -> float | None:
        """Area of all PEs in ``phase``; None where that of one is not known."""
        return None if self.pe_area_um2 is None else self.pe_area_um2 * self.array(phase).processing_elements

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready; the PE as its kind and its parameters."""
        fields: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "processing_element":
                parameters = {}
                if dataclasses.is_dataclass(value) and not isinstance(value, type):
                    parameters = dataclasses.asdict(value)
                value = {"kind": value.kind, **parameters}
            elif isinstance(value, Dram):
                value = {**dataclasses.asdict(value), "sources": list(value.sources)}
            elif isinstance(value, ArrayShape):
                value = dataclasses.asdict(value)
            elif isinstance(value, tuple):
                value = list(value)
            fields[entry.name] = value
        return fields

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of all fields as canonical JSON. Equal machines have equal digests."""
        text = json.dumps(_plain(self.to_dict()), sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _is_count(value: object, most: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1 and (most is None or value <= most)


def _plain(value: Any) -> Any:
    """``value`` with whole floats as integers, since 18 and 18.0 are equal and are written differently in JSON."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _machine(system: str, element: ProcessingElementSpec, **fields: Any) -> Accelerator:
    return Accelerator(
        name=system,
        system=system,
        processing_element=element,
        **fields,
    )


def _fp16() -> Accelerator:
    return _machine(
        "fp16",
        Fp16MacSpec(),
        prefill_array=ArrayShape(rows=32, columns=24),
        decode_array=ArrayShape(rows=64, columns=12),
        prefill_format="fp16",
        decode_format="fp16",
        key_value_bits=16,
        port_reads_per_step=1,
        pe_energy_pj_per_cycle=0.77,
        pe_area_um2=1968.7,
    )


def _ant() -> Accelerator:
    return _machine(
        "ant",
        FlintSpec(),
        prefill_array=ArrayShape(rows=32, columns=32),
        decode_array=ArrayShape(rows=64, columns=16),
        prefill_format="ant-w4g128",
        decode_format="ant-w4g128",
        key_value_bits=8,
        port_reads_per_step=1,
        pe_energy_pj_per_cycle=0.56,
        pe_area_um2=1318.6,
    )


def _olive() -> Accelerator:
    return _machine(
        "olive",
        OutlierVictimSpec(),
        prefill_array=ArrayShape(rows=36, columns=32),
        decode_array=ArrayShape(rows=72, columns=16),
        prefill_format="olive-w4",
        decode_format="olive-w4",
        key_value_bits=8,
        port_reads_per_step=1,
        pe_energy_pj_per_cycle=0.613,
        pe_area_um2=1318.6,
    )


def _bitmod(system: str, prefill_format: str, decode_format: str) -> Accelerator:
    return _machine(
        system,
        BitSerialSpec(),
        prefill_array=ArrayShape(rows=32, columns=32),
        decode_array=ArrayShape(rows=64, columns=16),
        prefill_format=prefill_format,
        decode_format=decode_format,
        key_value_bits=8,
        port_reads_per_step=2,
        pe_energy_pj_per_cycle=0.56,
        pe_area_um2=1507.7,
    )


def _gobo() -> Accelerator:
    baseline = _fp16()
    return _machine(
        "gobo",
        DictionarySpec(),
        prefill_array=baseline.prefill_array,
        decode_array=baseline.decode_array,
        prefill_format="gobo-w3",
        decode_format="gobo-w3",
        key_value_bits=16,
        port_reads_per_step=1,
        sources=(
            "GOBO, MICRO 2020: 3-bit indices into 8 centroids, FP32 outliers, activations and attention not quantized",
            "array, clock, buffers and external memory: those of the FP16 baseline, so that machines compare at equal "
            "numbers of PEs",
            "energy and area of a PE: not known; that outlier control takes 55 % of the array's area is all that was "
            "found",
        ),
    )


def _integer_array(
    system: str, element: ProcessingElementSpec, weight_format: str, sources: tuple[str, ...]
) -> Accelerator:
    """An array of 4-bit PEs with integer activations, as OliVe and ANT compare them."""
    array = ArrayShape(rows=64, columns=64)
    return Accelerator(
        name=system,
        system=system,
        processing_element=element,
        prefill_array=array,
        decode_array=array,
        movement="systolic",
        prefill_format=weight_format,
        decode_format=weight_format,
        key_value_bits=8,
        port_reads_per_step=1,
        weight_buffer_bytes=128 * 1024,
        activation_buffer_bytes=256 * 1024,
        memory=get_dram("ideal@128"),
        clock_mhz=500,
        sources=(
            *sources,
            "banks of the buffers and the width of keys and values: not known; those of the machines of BitMoD's "
            "comparison stand here",
            "energy of a PE, and its area in 28 nm: not known",
        ),
    )


def _olive_int() -> Accelerator:
    return _integer_array(
        "olive-int",
        OutlierVictimSpec(activations="integer"),
        "olive-w4a4",
        (
            "OliVe, ISCA 2023: an output-stationary systolic array of 4096 4-bit PEs with decoders on two borders, "
            "four PEs for an 8-bit product; a PE takes 50.01 µm² in 22 nm",
            "clock, buffers and external memory: not found for OliVe; those of ANT's public simulator stand here",
        ),
    )


def _ant_int() -> Accelerator:
    return _integer_array(
        "ant-int",
        FlintSpec(activations="integer"),
        "ant-w4a4",
        (
            "ANT, MICRO 2022, configuration of its public simulator: 32 × 32 PEs of 8 bits, each four of 4 bits; "
            "500 MHz; 128 KiB for weights, 256 KiB for activations; 1024 bits of external memory per cycle. Its "
            "128 KiB for outputs are the write-back register here",
        ),
    )


_PUBLISHED: dict[str, Callable[[], Accelerator]] = {
    "fp16": _fp16,
    "ant": _ant,
    "olive": _olive,
    "bitmod-lossless": lambda: _bitmod("bitmod-lossless", "int-w6g128", "int-w6g128"),
    "bitmod-lossy": lambda: _bitmod("bitmod-lossy", "bitmod-w4g128", "bitmod-w3g128"),
}
_SYSTEMS: dict[str, Callable[[], Accelerator]] = {
    **_PUBLISHED,
    "gobo": _gobo,
    "olive-int": _olive_int,
    "ant-int": _ant_int,
}
BASELINE = "fp16"


def accelerator_names() -> tuple[str, ...]:
    """The names that ``get_accelerator`` accepts; each may be followed by ``@ROWSxCOLUMNS`` or ``@iso-...``."""
    return tuple(_SYSTEMS)


def published_accelerator_names() -> tuple[str, ...]:
    """Those of the comparison in BitMoD, section V, whose cycles and energies are published."""
    return tuple(_PUBLISHED)


def is_machine_file(name: str) -> bool:
    """Whether ``name`` (perhaps with an array behind an ``@``) is the path of a file, and no name of termwise's."""
    return _split(name)[0].endswith(".toml") or any(
        separator in name for separator in (os.sep, os.altsep) if separator is not None
    )


def _split(name: str) -> tuple[str, str | None]:
    """The machine and the array behind the ``@``; the folders and the name of a file may have an ``@`` of their own."""
    place = name.find("@", max(0, name.rfind(os.sep), name.rfind(".toml")))
    return (name, None) if place < 0 else (name[:place], name[place + 1 :])


def get_accelerator(name: str) -> Accelerator:
    """The accelerator called ``name``: of ``accelerator_names()`` or a TOML file; an array may follow behind an ``@``.

    The array is ``ROWSxCOLUMNS``, ``iso-pe`` or ``iso-area``, see this module. Raises ``InputError`` for an unknown
    name, a malformed array, one that does not fit the buffers, an area that is not known, and whatever is wrong in a
    file.

    >>> get_accelerator("bitmod-lossy@16x8").decode_array
    ArrayShape(rows=16, columns=8)
    """
    system, array = _split(name)
    if is_machine_file(name):
        from termwise.sim.machine_file import read_machine

        accelerator = read_machine(system)
    else:
        make = _SYSTEMS.get(system)
        if make is None:
            raise unknown_name("accelerator", system, accelerator_names())
        accelerator = make()
    if array is None:
        return accelerator
    arrays = [_array(accelerator, phase, array, name) for phase in PHASES]
    varied = dataclasses.replace(
        accelerator, name=f"{accelerator.name}@{array}", prefill_array=arrays[0], decode_array=arrays[1]
    )
    check_machine(varied)
    return varied


def _array(accelerator: Accelerator, phase: Phase, array: str, name: str) -> ArrayShape:
    """What stands behind the ``@`` of ``name``, in ``phase``."""
    baseline = _SYSTEMS[BASELINE]()
    if array == "iso-pe":
        return baseline.array(phase)
    if array == "iso-area":
        area = baseline.pe_area_um2
        if accelerator.pe_area_um2 is None or area is None:
            raise InputError(f"accelerator {name!r}: the area of its PE is not known; expected an area, or @iso-pe")
        rows = accelerator.array(phase).rows
        # Areas are the decimals that were written, so that the baseline at equal area is the baseline.
        whole = Fraction(str(area)) * baseline.array(phase).processing_elements
        columns = whole // (rows * Fraction(str(accelerator.pe_area_um2)))
        if not 1 <= columns <= MAXIMUM_ARRAY_SIDE:
            raise InputError(
                f"accelerator {name!r}: {columns} columns of {rows} PEs take the area of the {BASELINE} array; "
                f"expected 1 to {MAXIMUM_ARRAY_SIDE}"
            )
        return ArrayShape(rows=rows, columns=columns)
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", array)
    if match is None or max(int(match[1]), int(match[2])) > MAXIMUM_ARRAY_SIDE:
        raise InputError(
            f"accelerator {name!r}: the shape of the array is {array!r}; expected ROWSxCOLUMNS, "
            f"such as {accelerator.name}@32x32, with both sides from 1 to {MAXIMUM_ARRAY_SIDE}, iso-pe or iso-area"
        )
    return ArrayShape(rows=int(match[1]), columns=int(match[2]))


def check_machine(accelerator: Accelerator) -> None:
    """Hold the parts of a machine against each other, in both phases, with its own formats.

    Raises ``MachineError`` (an ``InputError``) where the PE does not take its own formats or keys and values, where
    sums of a group do not fit its accumulator, where the array has no whole groups of the PEs that a product takes, or
    where half a buffer is smaller than one dot-product step.
    """
    element = accelerator.processing_element

    def error(field: str, expected: str) -> MachineError:
        return MachineError(accelerator.name, field, getattr(accelerator, field), expected)

    try:
        element.key_value_cycles_per_step(accelerator.key_value_bits)
    except InputError as reason:
        raise error("key_value_bits", f"what its PE takes: {reason}") from None
    for phase in PHASES:
        field = f"{phase}_format"
        try:
            weights = get_format(accelerator.default_format(phase))
            element.cycles_per_step(weights)
            if weights.group_size is not None:
                check_group(accelerator, weights, weights.group_size)
        except InputError as reason:
            raise error(field, f"a format that its PE takes: {reason}") from None
    for buffer in ("weight_buffer_bytes", "activation_buffer_bytes"):
        step_bits, phase = max((_step_bits(accelerator, phase, buffer), phase) for phase in PHASES)
        if 4 * getattr(accelerator, buffer) < step_bits:
            array = accelerator.array(phase)
            raise error(
                buffer,
                f"at least {-(-step_bits // 4)}, twice one dot-product step of the {array.rows} × {array.columns} PEs "
                f"of {phase}",
            )


def _step_bits(accelerator: Accelerator, phase: Phase, buffer: str) -> int:
    """Bits of one dot-product step of the whole array in a buffer; codes alone, scales stand beside them."""
    element, key_value_bits = accelerator.processing_element, accelerator.key_value_bits
    weights = get_format(accelerator.default_format(phase))
    elements = element.processing_elements_per_product(weights)
    key_value_elements = element.key_value_processing_elements_per_product(key_value_bits)
    array, key_value_array = (accelerator.array_of_products(phase, count) for count in (elements, key_value_elements))
    if buffer == "activation_buffer_bytes":
        bits = array.columns * element.activation_bits(weights)
        key_value_bits = key_value_array.columns * element.key_value_activation_bits(key_value_bits)
    else:
        bits = array.rows * weights.weight_bits
        key_value_bits *= key_value_array.rows
    return element.lanes * max(bits, key_value_bits)


def check_group(accelerator: Accelerator, weights: Format, inputs: int) -> None:
    """Raises ``InputError`` where the sum of a group of ``inputs`` weights may not fit the accumulator of the PE."""
    if isinstance(accelerator.processing_element, BitSerialSpec):
        accelerator.processing_element.check_group(weights, inputs)
