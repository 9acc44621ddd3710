"""Energy per event, as sets: every constant of one set has a technology and a source.

An event that a set does not know is None, never 0: a simulation that meets it has no energy, and says which event it
was. A constant that stands elsewhere is taken from there and not restated: the energies of PEs from
``termwise.sim.accelerators``, that of external memory from ``termwise.sim.dram``, the table of the buffers from
``termwise.sim.memory``, their model from ``termwise.sim.sram``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from termwise.algorithms.errors import InputError, unknown_name
from termwise.sim.accelerators import Accelerator, get_accelerator, published_accelerator_names
from termwise.sim.dram import get_dram
from termwise.sim.memory import buffer_access_pj, buffer_write_pj_per_bit
from termwise.sim.sram import SramModel

TABLE_CAPACITY_BYTES, TABLE_BANKS = 512 * 1024, 8


@dataclass(frozen=True, kw_only=True)
class EnergySet:
    """Energy per event. Everything that is None is not known to this set.

    Attributes:
        name: as ``get_energy_set`` takes it.
        technology: process and operating point.
        pe_cycle_pj: (system, pJ) of one cycle of one PE that computes, everything inside it together, after place and
            route.
        term_pj: one term times one activation in one lane.
        mac_pj: one multiply-accumulate.
        alignment_pj: aligning one product to the group's exponent.
        dequantization_pj: scaling one group's sum.
        sram: where the energy of a buffer access comes from: ``"table"`` for the buffers of the BitMoD artifact
            (512 KiB in 8 banks, by port width), ``"model"`` for ``termwise.sim.sram``.
        dram_pj_per_bit: external memory, a bit moved.
        pe_leakage_mw: standing power of one PE.
        sources: where the constants come from, a sentence each.
    """

    name: str
    technology: str
    pe_cycle_pj: tuple[tuple[str, float], ...] = ()
    term_pj: float | None = None
    mac_pj: float | None = None
    alignment_pj: float | None = None
    dequantization_pj: float | None = None
    sram: Literal["table", "model"] | None = None
    dram_pj_per_bit: float | None = None
    pe_leakage_mw: float | None = None
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse energies of 0 or less: an event that is not known is None."""
        values: dict[str, float | None] = {f"pe_cycle_pj of {system}": energy for system, energy in self.pe_cycle_pj}
        for name in ("term_pj", "mac_pj", "alignment_pj", "dequantization_pj", "dram_pj_per_bit", "pe_leakage_mw"):
            values[name] = getattr(self, name)
        for name, value in values.items():
            if value is not None and not 0 < value < float("inf"):
                raise InputError(
                    f"energy set {self.name!r}: {name} is {value!r}; expected a number above 0, or None if not known"
                )

    def processing_element_pj(self, system: str) -> float | None:
        """Energy of one computing cycle of one PE of ``system`` (``Accelerator.system``), or None."""
        return dict(self.pe_cycle_pj).get(system)

    def sram_access_pj(
        self, access: Literal["read", "write"], *, capacity_bytes: int, word_bits: float, banks: int
    ) -> float | None:
        """Energy of one access of the full width of a buffer's port, or None where the set does not know the buffer.

        The width is a mean where a step's weights take no whole number of bits; the model rounds it up. Raises
        ``InputError`` for a buffer that the model of the set has no points for.
        """
        if self.sram == "table" and (capacity_bytes, banks) == (TABLE_CAPACITY_BYTES, TABLE_BANKS):
            return buffer_access_pj(access, word_bits)
        if self.sram == "model":
            model = SramModel(capacity_bytes=capacity_bytes, word_bits=math.ceil(word_bits), banks=banks)
            return model.read_pj if access == "read" else model.write_pj
        return None

    def sram_write_pj_per_bit(self, *, capacity_bytes: int, word_bits: float, banks: int) -> float | None:
        """Energy of writing one bit of a buffer through its port, or None; as ``sram_access_pj``."""
        if self.sram == "table" and (capacity_bytes, banks) == (TABLE_CAPACITY_BYTES, TABLE_BANKS):
            return buffer_write_pj_per_bit(word_bits)
        energy = self.sram_access_pj("write", capacity_bytes=capacity_bytes, word_bits=word_bits, banks=banks)
        return None if energy is None else energy / math.ceil(word_bits)

    def sram_leakage_mw(self, *, capacity_bytes: int, word_bits: float, banks: int) -> float | None:
        """Standing power of a buffer, or None where the set does not know it. Raises as ``sram_access_pj``."""
        if self.sram != "model":
            return None
        return SramModel(capacity_bytes=capacity_bytes, word_bits=math.ceil(word_bits), banks=banks).leakage_mw


_PE_SOURCE = (
    "PE energies: constants of the simulator published with BitMoD (HPCA 2025), pJ a cycle in 28 nm times 1.5 for "
    "place and route; they hold terms, alignment and dequantization together, which are therefore not known apart."
)
_DRAM_SOURCE = "External memory: 1200 pJ for 64 bits, BitMoD, section V-A."


def _pe_cycle_pj() -> tuple[tuple[str, float], ...]:
    energies = {name: get_accelerator(name).placed_pe_pj_per_cycle for name in published_accelerator_names()}
    return tuple((name, energy) for name, energy in energies.items() if energy is not None)


def _bitmod_2024() -> EnergySet:
    return EnergySet(
        name="bitmod-2024",
        technology="28 nm; buffers itrs-hp transistors at 360 K",
        pe_cycle_pj=_pe_cycle_pj(),
        sram="table",
        dram_pj_per_bit=get_dram("ideal").energy_pj_per_bit,
        sources=(
            _PE_SOURCE,
            "Buffers: CACTI 7, 512 KiB in 8 banks, by port width (termwise.sim.memory).",
            _DRAM_SOURCE,
        ),
    )


def _bitmod_2024_any_buffer() -> EnergySet:
    return EnergySet(
        name="bitmod-2024-any-buffer",
        technology="28 nm; buffers itrs-hp transistors at 360 K",
        pe_cycle_pj=_pe_cycle_pj(),
        sram="model",
        dram_pj_per_bit=get_dram("ideal").energy_pj_per_bit,
        sources=(
            _PE_SOURCE,
            "Buffers: fitted to CACTI 7 in the configuration of bitmod-2024, any size, with leakage "
            "(termwise.sim.sram).",
            _DRAM_SOURCE,
        ),
    )


_SETS: dict[str, Callable[[], EnergySet]] = {
    "bitmod-2024": _bitmod_2024,
    "bitmod-2024-any-buffer": _bitmod_2024_any_buffer,
}


def energy_set_names() -> tuple[str, ...]:
    """The names that ``get_energy_set`` accepts."""
    return tuple(_SETS)


def get_energy_set(name: str) -> EnergySet:
    """The set called ``name``. Raises ``InputError`` for an unknown name.

    >>> get_energy_set("bitmod-2024").dram_pj_per_bit
    18.75
    """
    make = _SETS.get(name)
    if make is None:
        raise unknown_name("energy set", name, energy_set_names())
    return make()


def default_energy_set(accelerator: Accelerator) -> str:
    """``bitmod-2024`` where its table knows the buffers, the published ones and no other; else the set with a model."""
    buffers = {
        (accelerator.weight_buffer_bytes, accelerator.weight_buffer_banks),
        (accelerator.activation_buffer_bytes, accelerator.activation_buffer_banks),
    }
    published = buffers == {(TABLE_CAPACITY_BYTES, TABLE_BANKS)} and not accelerator.accumulator_bytes
    return "bitmod-2024" if published else "bitmod-2024-any-buffer"


def energies_of(accelerator: Accelerator) -> EnergySet:
    """The energies of a machine: those of its set, with the figures that the machine itself states in their place.

    These are the energy of its PE, which no set knows of a PE of the user's, and that of its external memory.
    """
    energies = get_energy_set(accelerator.energy_set or default_energy_set(accelerator))
    own = accelerator.placed_pe_pj_per_cycle
    return dataclasses.replace(
        energies,
        pe_cycle_pj=() if own is None else ((accelerator.system, own),),
        dram_pj_per_bit=accelerator.memory.energy_pj_per_bit,
    )
