"""Energy sets: the constants of the paper where they stand, and None for what is not known."""

from __future__ import annotations

import dataclasses

import pytest

from termwise.algorithms.errors import InputError
from termwise.sim.accelerators import get_accelerator, published_accelerator_names
from termwise.sim.dram import get_dram
from termwise.sim.energy import EnergySet, energies_of, energy_set_names, get_energy_set
from termwise.sim.memory import buffer_access_pj
from termwise.sim.sram import SramModel

BUFFER = {"capacity_bytes": 512 * 1024, "banks": 8}


def test_published_constants_of_the_paper() -> None:
    """Facts of the published simulator: pJ per PE and cycle times 1.5, and 2400 pJ for 128 bits."""
    energies = get_energy_set("bitmod-2024")
    published = {"fp16": 0.77, "ant": 0.56, "olive": 0.613, "bitmod-lossless": 0.56, "bitmod-lossy": 0.56}
    assert dict(energies.pe_cycle_pj) == {system: energy * 1.5 for system, energy in published.items()}
    assert energies.dram_pj_per_bit == 2400 / 128


@pytest.mark.parametrize("name", published_accelerator_names())
def test_energies_are_those_that_the_simulator_charges(name: str) -> None:
    accelerator = get_accelerator(name)
    for energy_set in energy_set_names():
        charged = energies_of(dataclasses.replace(accelerator, energy_set=energy_set))
        assert dataclasses.replace(charged, pe_cycle_pj=get_energy_set(energy_set).pe_cycle_pj) == get_energy_set(
            energy_set
        )
        energy = accelerator.placed_pe_pj_per_cycle
        assert charged.processing_element_pj(accelerator.system) == energy
        assert get_energy_set(energy_set).processing_element_pj(accelerator.system) == energy


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "bitmod-2024"),
        ({"clock_mhz": 500}, "bitmod-2024"),
        ({"weight_buffer_bytes": 256 * 1024}, "bitmod-2024-any-buffer"),
        ({"activation_buffer_banks": 4}, "bitmod-2024-any-buffer"),
        ({"weight_buffer_bytes": 256 * 1024, "energy_set": "bitmod-2024"}, "bitmod-2024"),
    ],
)
def test_the_buffers_choose_the_energies_unless_a_set_is_named(changes: dict[str, object], expected: str) -> None:
    accelerator = dataclasses.replace(get_accelerator("bitmod-lossy"), **changes)  # type: ignore[arg-type]
    assert energies_of(accelerator).name == expected


def test_figures_of_the_machine_stand_in_the_place_of_those_of_the_set() -> None:
    accelerator = dataclasses.replace(
        get_accelerator("bitmod-lossy"),
        pe_energy_pj_per_cycle=2.0,
        place_and_route_factor=1.25,
        memory=get_dram("hbm2e"),
    )
    assert energies_of(accelerator).processing_element_pj("bitmod-lossy") == 2.5
    assert energies_of(accelerator).dram_pj_per_bit == get_dram("hbm2e").energy_pj_per_bit
    unknown = dataclasses.replace(accelerator, pe_energy_pj_per_cycle=None, memory=get_dram("hbm3"))
    assert energies_of(unknown).processing_element_pj("bitmod-lossy") is None
    assert energies_of(unknown).dram_pj_per_bit is None


@pytest.mark.parametrize("word_bits", [128, 288, 300, 1024, 2048])
def test_buffers_of_the_published_set_are_those_of_the_table(word_bits: int) -> None:
    energies = get_energy_set("bitmod-2024")
    for access in ("read", "write"):
        assert energies.sram_access_pj(access, word_bits=word_bits, **BUFFER) == buffer_access_pj(access, word_bits)


def test_unknown_events_are_none() -> None:
    energies = get_energy_set("bitmod-2024")
    assert energies.term_pj is None
    assert energies.mac_pj is None
    assert energies.alignment_pj is None
    assert energies.dequantization_pj is None
    assert energies.pe_leakage_mw is None
    assert energies.processing_element_pj("no-such-system") is None
    assert energies.sram_access_pj("read", capacity_bytes=65536, word_bits=256, banks=8) is None
    assert energies.sram_leakage_mw(word_bits=256, **BUFFER) is None
    assert EnergySet(name="x", technology="y").sram_access_pj("read", word_bits=256, **BUFFER) is None


def test_buffers_of_any_size_follow_the_model() -> None:
    energies = get_energy_set("bitmod-2024-any-buffer")
    model = SramModel(capacity_bytes=65536, word_bits=256, banks=4)
    size = {"capacity_bytes": 65536, "word_bits": 256, "banks": 4}
    assert energies.sram_access_pj("read", **size) == model.read_pj
    assert energies.sram_access_pj("write", **size) == model.write_pj
    assert energies.sram_leakage_mw(**size) == model.leakage_mw
    with pytest.raises(InputError, match="range of the model"):
        energies.sram_access_pj("read", capacity_bytes=65536, word_bits=8, banks=4)


def test_no_constant_is_zero_and_every_set_names_its_sources() -> None:
    for name in energy_set_names():
        energies = get_energy_set(name)
        assert energies.name == name
        assert energies.sources
        assert all(getattr(energies, field.name) != 0 for field in dataclasses.fields(energies))


@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), float("inf")])
def test_energies_of_nothing_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="None if not known"):
        EnergySet(name="x", technology="y", mac_pj=value)


def test_unknown_set_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="bitmod-2024"):
        get_energy_set("bitmod-2025")


def test_ideal_memory_has_the_published_energy() -> None:
    assert get_dram("ideal").energy_pj_per_bit == get_energy_set("bitmod-2024").dram_pj_per_bit
