"""The accelerators that are compared: one frozen description each, read by the simulators and restated by none.

Constants: BitMoD (HPCA 2025, sections IV-C and V-A) and the constants of its public simulator, state of November 2024.
The four systems have different array shapes so that their areas are about equal. A name may carry another shape of the
array: ``bitmod-lossy@32x32`` has 32 rows (output channels) and 32 columns (tokens) in both phases.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError, unknown_name
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import ProcessingElementSpec
from termwise.algorithms.workload import Phase

MAXIMUM_ARRAY_SIDE = 4096
_SOURCE = "BitMoD, HPCA 2025, sections IV-C and V-A"
_SIMULATOR_SOURCE = "constants of the simulator published with BitMoD, state of November 2024"
_BUFFER_SOURCE = "CACTI 7, 512 KiB in 8 banks, 28 nm (see termwise.sim.memory)"


@dataclass(frozen=True, kw_only=True)
class ArrayShape:
    """PEs of an array: ``rows`` hold output channels, ``columns`` hold tokens."""

    rows: int
    columns: int

    @property
    def processing_elements(self) -> int:
        """PEs in the array."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One accelerator.

    Attributes:
        name: as ``get_accelerator`` takes it.
        system: the name without the shape of the array.
        processing_element: the PE; it tells lanes, cycles per dot-product step and which formats it takes.
        prefill_array, decode_array: shape of the array in either phase (the same PEs, wired differently).
        prefill_format, decode_format: name of the weight format when the user names none.
        key_value_bits: width of keys and values: 16 is FP16, 8 is INT8.
        weight_buffer_bytes, activation_buffer_bytes: on-chip buffers, each two halves; ``buffer_banks`` banks.
        port_reads_per_step: reads of either buffer in one dot-product step. A bit-serial PE holds its operands for
            two cycles or more, so a port of half the width is read twice.
        dram_bytes_per_cycle: whole bursts of the one channel to external memory.
        dram_pj_per_bit, pe_energy_pj_per_cycle: energies; the latter before place and route, which multiplies it by
            ``place_and_route_factor``.
        pe_area_um2: area of one PE in 28 nm, with its share of the encoder or decoder.
        clock_mhz: clock of the array, the buffers and the channel.
        sources: where the numbers come from.
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
    pe_energy_pj_per_cycle: float
    pe_area_um2: float
    place_and_route_factor: float = 1.5
    weight_buffer_bytes: int = 512 * 1024
    activation_buffer_bytes: int = 512 * 1024
    buffer_banks: int = 8
    dram_bytes_per_cycle: int = 32
    dram_pj_per_bit: float = 18.75
    clock_mhz: int = 1000
    sources: tuple[str, ...] = (_SOURCE, _SIMULATOR_SOURCE, _BUFFER_SOURCE)

    def array(self, phase: Phase) -> ArrayShape:
        """Shape of the array in ``phase``."""
        return self.prefill_array if phase == "prefill" else self.decode_array

    def default_format(self, phase: Phase) -> str:
        """Name of the weight format in ``phase`` when the user names none."""
        return self.prefill_format if phase == "prefill" else self.decode_format

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
            elif isinstance(value, ArrayShape):
                value = dataclasses.asdict(value)
            elif isinstance(value, tuple):
                value = list(value)
            fields[entry.name] = value
        return fields

    def digest(self) -> str:
        """SHA-256 (hexadecimal) of all fields as canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _fp16() -> Accelerator:
    return Accelerator(
        name="fp16",
        system="fp16",
        processing_element=Fp16MacSpec(),
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
    return Accelerator(
        name="ant",
        system="ant",
        processing_element=FlintSpec(),
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
    return Accelerator(
        name="olive",
        system="olive",
        processing_element=OutlierVictimSpec(),
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
    return Accelerator(
        name=system,
        system=system,
        processing_element=BitSerialSpec(),
        prefill_array=ArrayShape(rows=32, columns=32),
        decode_array=ArrayShape(rows=64, columns=16),
        prefill_format=prefill_format,
        decode_format=decode_format,
        key_value_bits=8,
        port_reads_per_step=2,
        pe_energy_pj_per_cycle=0.56,
        pe_area_um2=1507.7,
    )


_SYSTEMS: dict[str, Callable[[], Accelerator]] = {
    "fp16": _fp16,
    "ant": _ant,
    "olive": _olive,
    "bitmod-lossless": lambda: _bitmod("bitmod-lossless", "int-w6g128", "int-w6g128"),
    "bitmod-lossy": lambda: _bitmod("bitmod-lossy", "bitmod-w4g128", "bitmod-w3g128"),
}


def accelerator_names() -> tuple[str, ...]:
    """The names that ``get_accelerator`` accepts; each may be followed by ``@ROWSxCOLUMNS``."""
    return tuple(_SYSTEMS)


def get_accelerator(name: str) -> Accelerator:
    """The accelerator called ``name``: one of ``accelerator_names()``, or one followed by ``@ROWSxCOLUMNS``.

    Raises ``InputError`` for an unknown name or a malformed shape.

    >>> get_accelerator("bitmod-lossy@16x8").decode_array
    ArrayShape(rows=16, columns=8)
    """
    system, at, sides = name.partition("@")
    make = _SYSTEMS.get(system)
    if make is None:
        raise unknown_name("accelerator", system, accelerator_names())
    accelerator = make()
    if not at:
        return accelerator
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", sides)
    if match is None or max(int(match[1]), int(match[2])) > MAXIMUM_ARRAY_SIDE:
        raise InputError(
            f"accelerator {name!r}: the shape of the array is {sides!r}; expected ROWSxCOLUMNS, "
            f"such as {system}@32x32, with both sides from 1 to {MAXIMUM_ARRAY_SIDE}"
        )
    array = ArrayShape(rows=int(match[1]), columns=int(match[2]))
    return dataclasses.replace(accelerator, name=name, prefill_array=array, decode_array=array)
