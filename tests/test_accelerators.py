"""The descriptions of accelerators, and the table of buffer energies."""

from __future__ import annotations

import dataclasses
import json

import pytest

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.workload import PHASES, Phase
from termwise.sim.accelerators import (
    ArrayShape,
    accelerator_names,
    check_machine,
    get_accelerator,
    published_accelerator_names,
)
from termwise.sim.dram import get_dram
from termwise.sim.memory import PORT_WIDTHS_BITS, READ_PJ, WRITE_PJ, buffer_access_pj, buffer_write_pj_per_bit


@pytest.mark.parametrize("name", accelerator_names())
def test_accelerator_takes_its_own_formats(name: str) -> None:
    accelerator = get_accelerator(name)
    assert accelerator.name == accelerator.system == name
    for phase in PHASES:
        weights = get_format(accelerator.default_format(phase))
        assert accelerator.processing_element.cycles_per_step(weights) >= 1
    assert accelerator.processing_element.key_value_cycles_per_step(accelerator.key_value_bits) >= 1


@pytest.mark.parametrize("name", accelerator_names())
def test_presets_are_machines(name: str) -> None:
    check_machine(get_accelerator(name))


@pytest.mark.parametrize("name", accelerator_names())
def test_both_phases_use_the_same_processing_elements(name: str) -> None:
    accelerator = get_accelerator(name)
    assert accelerator.prefill_array.processing_elements == accelerator.decode_array.processing_elements


def test_arrays_have_about_equal_area() -> None:
    areas = {
        name: get_accelerator(name).pe_area_um2 * get_accelerator(name).prefill_array.processing_elements / 1e6
        for name in published_accelerator_names()
    }
    # Array areas in mm² that the published simulator prints.
    assert areas == pytest.approx(
        {"fp16": 1.512, "ant": 1.350, "olive": 1.519, "bitmod-lossless": 1.544, "bitmod-lossy": 1.544}, abs=5e-4
    )


def test_suffix_sets_the_array_of_both_phases() -> None:
    accelerator = get_accelerator("olive@8x128")
    assert accelerator.name == "olive@8x128"
    assert accelerator.system == "olive"
    assert accelerator.prefill_array == accelerator.decode_array == ArrayShape(rows=8, columns=128)


@pytest.mark.parametrize(
    "name", ["olive@", "olive@8", "olive@8x", "olive@0x8", "olive@8x-1", "olive@8X8", "olive@9999x8", "olive@8x8@2x2"]
)
def test_malformed_array_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected ROWSxCOLUMNS"):
        get_accelerator(name)


def test_unknown_accelerator_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="unknown accelerator 'bitmod-lossi': did you mean 'bitmod-lossy'"):
        get_accelerator("bitmod-lossi")
    with pytest.raises(InputError, match="unknown accelerator 'tpu'"):
        get_accelerator("tpu@8x8")


def test_digest_depends_on_every_field() -> None:
    accelerator = get_accelerator("bitmod-lossy")
    assert accelerator.digest() == get_accelerator("bitmod-lossy").digest()
    digests = {accelerator.digest()}
    changed_fields = 0
    for entry in dataclasses.fields(accelerator):
        value = getattr(accelerator, entry.name)
        if entry.name == "processing_element":
            changed = get_accelerator("fp16").processing_element
        elif isinstance(value, ArrayShape):
            changed = ArrayShape(rows=3, columns=5)
        elif isinstance(value, tuple):
            changed = (*value, "another source")
        elif entry.name == "memory":
            changed = get_dram("ideal@33")
        elif entry.name == "movement":
            changed = "systolic"
        elif entry.name in ("dataflow", "accumulator_bytes"):
            continue  # one needs the other; together below
        elif entry.name == "energy_set":
            changed = "bitmod-2024"
        else:
            changed = value + type(value)(1)
        digests.add(dataclasses.replace(accelerator, **{entry.name: changed}).digest())
        changed_fields += 1
    stationary = dataclasses.replace(accelerator, dataflow="weight_stationary", accumulator_bytes=1 << 16)
    digests |= {stationary.digest(), dataclasses.replace(stationary, accumulator_bytes=1 << 17).digest()}
    assert len(digests) == changed_fields + 3


@pytest.mark.parametrize("name", [*accelerator_names(), "fp16@4x4"])
def test_dictionary_is_json(name: str) -> None:
    document = get_accelerator(name).to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["processing_element"]["kind"] == get_accelerator(name).processing_element.kind


def test_buffer_energy_is_the_table_at_its_widths_and_grows_between_them() -> None:
    for width, read_pj, write_pj in zip(PORT_WIDTHS_BITS, READ_PJ, WRITE_PJ, strict=True):
        assert buffer_access_pj("read", width) == read_pj
        assert buffer_access_pj("write", width) == write_pj
    energies = [buffer_access_pj("read", width) for width in range(64, 4096, 8)]
    assert energies == sorted(energies)
    assert buffer_access_pj("read", 448) == pytest.approx((82.830 + 92.794) / 2)


def test_buffer_energy_outside_the_table_is_the_narrowest_port_or_several_of_the_widest() -> None:
    assert buffer_access_pj("write", 16) == WRITE_PJ[0]
    assert buffer_access_pj("write", 2048) == 2 * WRITE_PJ[-1]
    assert buffer_write_pj_per_bit(16) == WRITE_PJ[0] / 128
    assert buffer_write_pj_per_bit(2048) == pytest.approx(WRITE_PJ[-1] / 1024)


@pytest.mark.parametrize("name", published_accelerator_names())
@pytest.mark.parametrize("phase", PHASES)
def test_equal_area_is_the_widest_array_that_is_no_larger_than_the_baseline(name: str, phase: Phase) -> None:
    own, varied, baseline = get_accelerator(name), get_accelerator(f"{name}@iso-area"), get_accelerator("fp16")
    array, limit = varied.array(phase), baseline.array_area_um2(phase)
    area = varied.array_area_um2(phase)
    assert area is not None
    assert limit is not None
    assert array.rows == own.array(phase).rows
    one_more = area / array.columns
    # Areas are products of an integer and a decimal of 5 digits, so a relative 1e-12 is far below one step of them.
    assert area <= limit * (1 + 1e-12)
    assert area + one_more > limit * (1 + 1e-12)
    assert varied == dataclasses.replace(
        own, name=f"{name}@iso-area", prefill_array=varied.prefill_array, decode_array=varied.decode_array
    )


def test_the_baseline_at_equal_area_has_its_own_array() -> None:
    baseline = get_accelerator("fp16")
    for name in ("fp16@iso-area", "fp16@iso-pe"):
        assert dataclasses.replace(get_accelerator(name), name="fp16") == baseline


def test_equal_arrays_are_those_of_the_baseline() -> None:
    varied = get_accelerator("olive@iso-pe")
    assert [varied.array(phase) for phase in PHASES] == [get_accelerator("fp16").array(phase) for phase in PHASES]


def test_equal_area_without_a_known_area_is_refused() -> None:
    with pytest.raises(InputError, match="'gobo@iso-area': the area of its PE is not known"):
        get_accelerator("gobo@iso-area")


def test_an_array_that_no_buffer_feeds_is_refused() -> None:
    with pytest.raises(InputError, match=r"'bitmod-lossy@4096x4096': activation_buffer_bytes .* at least"):
        check_machine(
            dataclasses.replace(
                get_accelerator("bitmod-lossy@4096x4096"), activation_buffer_bytes=4096 * 4 * 16 // 4 - 1
            )
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clock_mhz": 0}, "clock_mhz is 0"),
        ({"clock_mhz": 20_000}, "clock_mhz is 20000; expected a whole number from 1 to 10000"),
        ({"weight_buffer_bytes": -1}, "weight_buffer_bytes is -1"),
        ({"port_reads_per_step": 1.5}, "port_reads_per_step is 1.5"),
        ({"pe_area_um2": float("nan")}, "pe_area_um2 is nan"),
        ({"place_and_route_factor": None}, "place_and_route_factor is None"),
        ({"movement": "mesh"}, "movement is 'mesh'; expected broadcast or systolic"),
        ({"dataflow": "row"}, "dataflow is 'row'; expected output_stationary or weight_stationary"),
        ({"accumulator_bytes": 8}, "accumulator_bytes is 8; expected 0 with dataflow output_stationary"),
        ({"dataflow": "weight_stationary"}, "accumulator_bytes is 0; expected "),
        ({"energy_set": "none"}, "energy_set is 'none'"),
        ({"processing_element": Fp16MacSpec(lanes=0)}, "processing_element.lanes is 0"),
    ],
)
def test_numbers_that_no_machine_has_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"accelerator 'fp16': {message}"):
        dataclasses.replace(get_accelerator("fp16"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("sides", [(0, 4), (4, -1), (4097, 1), (True, 4), (2.0, 4)])
def test_an_array_without_pes_is_refused(sides: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"of the array is .* expected a whole number from 1 to 4096"):
        ArrayShape(rows=sides[0], columns=sides[1])


def test_memory_that_is_not_ideal_has_no_bytes_per_cycle() -> None:
    assert get_accelerator("fp16").ideal_bytes_per_cycle == 32
    with pytest.raises(InputError, match="memory 'ddr4-3200' has no fixed bytes per cycle"):
        _ = dataclasses.replace(get_accelerator("fp16"), memory=get_dram("ddr4-3200")).ideal_bytes_per_cycle
