"""Machines as TOML: what is written is read back equal, and what is wrong is said in one sentence with its key."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.flow.cli import main
from termwise.flow.specification import read_specification
from termwise.sim.accelerators import Accelerator, ArrayShape, accelerator_names, get_accelerator
from termwise.sim.dram import Dram, dram_names, get_dram
from termwise.sim.machine_file import machine_from, to_toml

MACHINES = Path(__file__).resolve().parent.parent / "docs" / "machines.md"
PRESETS = (*accelerator_names(), "olive@8x128", "bitmod-lossy@iso-area", "fp16@iso-pe")


def written(accelerator: Accelerator) -> Accelerator:
    return machine_from(tomllib.loads(to_toml(accelerator)), "written")


def machine(**changes: Any) -> Accelerator:
    return machine_from({"name": "mine", "base": "bitmod-lossy", **changes}, "mine.toml")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_was_written_is_read_equal(name: str) -> None:
    accelerator = get_accelerator(name)
    assert written(accelerator) == accelerator
    assert written(accelerator).digest() == accelerator.digest()


@st.composite
def machines(draw: st.DrawFn) -> Accelerator:
    base = get_accelerator(draw(st.sampled_from(accelerator_names())))
    element = base.processing_element
    if isinstance(element, BitSerialSpec):
        element = BitSerialSpec(
            lanes=draw(st.integers(1, 16)),
            numerics=draw(st.sampled_from(["paper", "exact", "shared_exponent"])),
            rounding=draw(st.sampled_from(["truncate", "nearest_even"])),
        )
    positive = st.floats(1e-6, 1e6)
    memory = get_dram(draw(st.sampled_from(dram_names())))
    if draw(st.booleans()):
        memory = dataclasses.replace(memory, name="other", energy_pj_per_bit=draw(st.none() | positive))
    side = st.builds(ArrayShape, rows=st.integers(1, 64), columns=st.integers(1, 64))
    group = math.isqrt(element.key_value_processing_elements_per_product(base.key_value_bits))
    side = side.map(lambda array: ArrayShape(rows=group * array.rows, columns=group * array.columns))
    stationary = draw(st.sampled_from([0, 1 << 17, 1 << 20]))  # bytes of accumulators of weight stationary
    return dataclasses.replace(
        base,
        name="mine",
        processing_element=element,
        prefill_array=draw(side),
        decode_array=draw(side),
        movement=draw(st.sampled_from(["broadcast", "systolic"])),
        dataflow="weight_stationary" if stationary else "output_stationary",
        accumulator_bytes=stationary,
        port_reads_per_step=draw(st.integers(1, 4)),
        pe_energy_pj_per_cycle=draw(st.none() | positive),
        pe_area_um2=draw(st.none() | positive),
        place_and_route_factor=draw(positive),
        weight_buffer_bytes=draw(st.integers(1 << 14, 1 << 24)),
        activation_buffer_banks=draw(st.integers(1, 32)),
        memory=memory,
        energy_set=draw(st.sampled_from([None, "bitmod-2024", "bitmod-2024-any-buffer"])),
        clock_mhz=draw(st.integers(1, 10_000)),
        sources=tuple(draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=3))),
    )


@settings(max_examples=60, deadline=None)
@given(machines())
def test_any_machine_that_was_written_is_read_equal(accelerator: Accelerator) -> None:
    assert written(accelerator) == accelerator
    assert written(accelerator).digest() == accelerator.digest()


def test_what_is_not_named_is_the_bases() -> None:
    base = get_accelerator("bitmod-lossy")
    changed = machine(clock_mhz=500, array={"prefill": {"columns": 8}}, buffers={"weights": {"banks": 4}})
    expected = dataclasses.replace(
        base,
        name="mine",
        clock_mhz=500,
        prefill_array=ArrayShape(rows=32, columns=8),
        weight_buffer_banks=4,
        sources=(*base.sources, "the user's, on the base of bitmod-lossy"),
    )
    assert changed == expected


def test_a_pe_with_integer_activations_is_one_key() -> None:
    formats = {"prefill": "olive-w4a4", "decode": "olive-w8a8"}
    changed = machine(base="olive", processing_element={"activations": "integer"}, formats=formats)
    assert changed.processing_element == OutlierVictimSpec(activations="integer")
    assert changed.prefill_array == get_accelerator("olive").prefill_array
    with pytest.raises(InputError, match="activations"):
        machine(base="olive", processing_element={"activations": "int8"}, formats=formats)


def test_another_pe_has_no_energy_no_area_and_is_no_published_system() -> None:
    for element in ({"lanes": 8}, {"kind": "fp16_mac"}):
        formats = {"prefill": "int-w4g128", "decode": "int-w4g128"}
        changed = machine(processing_element=element, formats=formats)
        assert (changed.pe_energy_pj_per_cycle, changed.pe_area_um2, changed.system) == (None, None, "mine")
    figures = {"lanes": 8, "energy_pj_per_cycle": 1, "area_um2": 2000.0}
    changed = machine(processing_element=figures)
    assert (changed.pe_energy_pj_per_cycle, changed.pe_area_um2) == (1, 2000)
    same = machine(processing_element={"lanes": 4, "kind": "bit_serial"})
    assert same.system == "bitmod-lossy"
    assert same.pe_area_um2 == get_accelerator("bitmod-lossy").pe_area_um2


def test_a_kind_of_pe_begins_with_its_own_parameters() -> None:
    changed = machine(processing_element={"kind": "fp16_mac"}, formats={"prefill": "fp16", "decode": "fp16"})
    assert changed.processing_element == Fp16MacSpec()


def test_memory_is_a_preset_a_changed_preset_or_numbers_of_its_own() -> None:
    assert machine(memory={"preset": "hbm3@8"}).memory == get_dram("hbm3@8")
    assert machine(memory={"ideal_bytes_per_cycle": 64}).memory == dataclasses.replace(
        get_dram("ideal"), name="memory of mine", ideal_bytes_per_cycle=64
    )
    slower = machine(memory={"preset": "ddr4-3200", "megatransfers_per_second": 2400, "name": "ddr4-2400"}).memory
    assert slower == dataclasses.replace(get_dram("ddr4-3200"), name="ddr4-2400", megatransfers_per_second=2400)
    own = machine(memory={"name": "own", "ideal_bytes_per_cycle": 8}).memory
    assert own == Dram(name="own", ideal_bytes_per_cycle=8)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"clock": 5}, "unknown key 'clock': did you mean 'clock_mhz'"),
    ({"array": {"prefil": {}}}, "unknown key 'array.prefil': did you mean 'prefill'"),
    ({"processing_element": {"lane": 4}}, "unknown key 'processing_element.lane': did you mean 'lanes'"),
    ({"memory": {"burst": 4}}, "unknown key 'memory.burst'"),
    ({"processing_element": {"kind": "systolic"}}, "key 'processing_element.kind': unknown kind of PE 'systolic'"),
    ({"processing_element": {"kind": 3}}, "key 'processing_element.kind': unknown kind of PE 3"),
    ({"processing_element": 3}, "table 'processing_element' is 3 (a whole number)"),
    ({"processing_element": {"lanes": 0}}, "table 'processing_element': the bit-serial PE has lanes = 0"),
    ({"processing_element": {"kind": "fp16_mac", "lanes": 0}}, "key 'processing_element.lanes' is 0"),
    ({"processing_element": {"numerics": "fast"}}, "key 'processing_element.numerics': expected 'paper', 'exact' or"),
    ({"clock_mhz": 0}, "key 'clock_mhz' is 0; expected a whole number from 1 to 10000"),
    ({"clock_mhz": "1 GHz"}, "key 'clock_mhz': expected a whole number; found \"1 GHz\" (text)"),
    ({"clock_mhz": 1.5}, "key 'clock_mhz': expected a whole number; found 1.5 (a decimal number)"),
    ({"clock_mhz": True}, "key 'clock_mhz': expected a whole number; found true (a truth value)"),
    ({"key_value_bits": 9}, "key 'key_value_bits' is 9; expected what its PE takes"),
    ({"array": {"movement": "mesh"}}, "key 'array.movement': expected 'broadcast' or 'systolic'"),
    ({"array": {"prefill": {"rows": 0}}}, "table 'array.prefill': rows of the array is 0"),
    ({"array": {"decode": {"rows": -4}}}, "table 'array.decode': rows of the array is -4"),
    ({"buffers": {"weights": {"banks": 0}}}, "key 'buffers.weights.banks' is 0"),
    ({"buffers": {"weights": {"bytes": 64}}}, "key 'buffers.weights.bytes' is 64; expected at least 512"),
    ({"buffers": {"activations": {"bytes": 511}}}, "key 'buffers.activations.bytes' is 511; expected at least 512"),
    ({"memory": {"ideal_bytes_per_cycle": 0}}, "table 'memory': memory 'memory of mine': ideal_bytes_per_cycle is 0"),
    ({"memory": {"ideal_bytes_per_cycle": -3}}, "ideal_bytes_per_cycle is -3"),
    ({"memory": {"preset": "ddr9"}}, "table 'memory': key 'preset': unknown memory 'ddr9'"),
    ({"memory": {"preset": "ddr4-3200", "megatransfers_per_second": 0}}, "megatransfers_per_second is 0"),
    ({"memory": {"preset": "ideal@0"}}, "count of ideal_bytes_per_cycle is '0'"),
    ({"energy_set": "x"}, "key 'energy_set' is 'x'; expected bitmod-2024 or"),
    ({"processing_element": {"energy_pj_per_cycle": 0}}, "key 'processing_element.energy_pj_per_cycle' is 0"),
    ({"processing_element": {"area_um2": float("inf")}}, "key 'processing_element.area_um2' is inf"),
    ({"formats": {"prefill": "fp16"}}, "key 'formats.prefill' is 'fp16'; expected a format that its PE takes"),
    ({"formats": {"decode": "int-w4g12x"}}, "key 'formats.decode' is 'int-w4g12x'"),
    (
        {"processing_element": {"numerics": "exact"}, "formats": {"prefill": "int-w8g131072", "decode": "int-w8"}},
        "key 'formats.prefill' is 'int-w8g131072'; expected a format that its PE takes",
    ),
    ({"sources": "mine"}, "key 'sources': expected a list"),
    ({"name": "bitmod-lossy"}, "key 'name' is 'bitmod-lossy', another machine that comes with termwise"),
    ({"name": "olive@3x3"}, "key 'name' is 'olive@3x3', another machine"),
    ({"name": "a machine"}, "key 'name' is 'a machine'; expected up to 64 letters"),
    ({"name": 3}, "key 'name': expected text; found 3"),
    ({"base": "bitmod"}, "key 'base': unknown accelerator 'bitmod'"),
    ({"base": "other.toml"}, "key 'base' is \"other.toml\" (text); expected one of fp16"),
    ({"base": ["fp16"]}, "key 'base' is"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_a_bad_machine_is_refused_with_its_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        machine(**changes)
    assert str(caught.value).startswith("mine.toml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bytes_of_buffer", [512, 511])
def test_half_a_buffer_holds_a_step_of_the_array(bytes_of_buffer: int) -> None:
    """64 rows × 4 lanes × 8 bits of keys are 2048 bits: half of 512 bytes."""
    buffers = {"weights": {"bytes": bytes_of_buffer}}
    if bytes_of_buffer == 512:
        assert machine(buffers=buffers).weight_buffer_bytes == 512
    else:
        with pytest.raises(InputError, match="twice one dot-product step of the 64 × 16 PEs of decode"):
            machine(buffers=buffers)


def test_a_file_without_a_base_names_everything() -> None:
    document = tomllib.loads(to_toml(get_accelerator("bitmod-lossy")))
    document["name"] = "mine"
    for key in ("clock_mhz", "formats", "array", "buffers", "memory", "processing_element"):
        rest = {other: value for other, value in document.items() if other != key}
        with pytest.raises(InputError, match=f"{key}' is missing; expected"):
            machine_from(rest, "mine.toml")
    with pytest.raises(InputError, match="key 'name' is missing"):
        machine_from({}, "mine.toml")


def save(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


MINE = 'name = "mine"\nbase = "bitmod-lossy"\nclock_mhz = 500\n'


def test_a_machine_is_its_content_not_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a@b").mkdir()
    one = get_accelerator(save(tmp_path / "one.toml", MINE))
    two = get_accelerator(save(tmp_path / "a@b" / "two", "# the same\n" + MINE))
    assert (one.name, one, one.digest()) == (two.name, two, two.digest())
    monkeypatch.chdir(tmp_path)
    assert get_accelerator("one.toml") == one
    wide = get_accelerator("one.toml@8x4")
    assert (wide.name, wide.prefill_array) == ("mine@8x4", ArrayShape(rows=8, columns=4))
    assert get_accelerator("a@b/two@iso-pe").prefill_array == get_accelerator("fp16").prefill_array


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.toml: No such file"):
        get_accelerator(str(tmp_path / "none.toml"))
    with pytest.raises(InputError, match=r"bad\.toml: not valid TOML"):
        get_accelerator(save(tmp_path / "bad.toml", "name = "))
    (tmp_path / "bytes.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(InputError, match="not UTF-8"):
        get_accelerator(str(tmp_path / "bytes.toml"))


def test_the_documented_machine_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", MACHINES.read_text(encoding="utf-8"), re.DOTALL)
    accelerator = get_accelerator(save(tmp_path / "example.toml", example))
    assert accelerator.movement == "systolic"
    assert accelerator.processing_element == BitSerialSpec(numerics="exact")
    assert accelerator.memory == get_dram("ideal@16")


def specification(folder: Path, accelerators: list[str]) -> Path:
    keys = {"version": 1, "question": "?", "model": "opt-125m", "formats": ["bitmod-w4g128"]}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in {**keys, "accelerators": accelerators}.items()]
    return Path(save(folder / "sweep.toml", "".join(lines)))


def test_two_machines_of_one_name_in_a_sweep_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "one.toml", MINE)
    same = save(tmp_path / "same.toml", MINE)
    other = save(tmp_path / "other.toml", MINE.replace("500", "600"))
    assert read_specification(specification(tmp_path, [one, "olive", same])).accelerators == (one, "olive")
    with pytest.raises(InputError, match="are two machines called 'mine'"):
        read_specification(specification(tmp_path, [one, other]))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def test_a_sweep_reuses_the_records_of_a_machine_that_moved(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, MINE) for name in ("one.toml", "two.toml")]
    out = str(tmp_path / "run")
    first, second = (
        json.loads(run("sweep", str(specification(tmp_path, [path, "gobo"])), "--out", out, "--json").stdout)
        for path in paths
    )
    assert first["computed"] > 0
    assert (second["computed"], second["points"]) == (0, first["points"])
    assert {point["accelerator"] for point in first["points"]} == {"mine"}
    changed = save(tmp_path / "one.toml", MINE.replace("500", "250"))
    third = json.loads(run("sweep", str(specification(tmp_path, [changed])), "--out", out, "--json").stdout)
    assert third["points"][0]["latency_ms"] == 2 * first["points"][0]["latency_ms"]


def test_a_sweep_shows_points_whose_energy_is_not_known(tmp_path: Path) -> None:
    path = specification(tmp_path, ["gobo", "fp16"])
    path.write_text(path.read_text(encoding="utf-8").replace("bitmod-w4g128", 'gobo-w3", "bitmod-w4g128'))
    document = json.loads(run("sweep", str(path), "--out", str(tmp_path / "run"), "--json").stdout)
    gobo = [point for point in document["points"] if point["accelerator"] == "gobo"]
    assert [point["format"] for point in gobo] == ["gobo-w3", "gobo-w3"]
    for point in gobo:
        assert point["energy_uj"] is point["pe_energy_uj"] is None
        assert point["dram_energy_uj"] > 0
        assert not point["pareto"]
        assert any("does not know that of a cycle of the PE of gobo" in note for note in point["notes"])
    assert all(point["energy_uj"] > 0 for point in document["points"] if point["accelerator"] == "fp16")


def test_the_commands_list_and_show_machines(tmp_path: Path) -> None:
    listed = json.loads(run("accelerators", "--json").stdout)["accelerators"]
    assert [entry["name"] for entry in listed] == list(accelerator_names())
    assert {entry["name"]: entry["digest"] for entry in listed} == {
        name: get_accelerator(name).digest() for name in accelerator_names()
    }
    table = run("accelerators").stdout
    assert all(name in table for name in accelerator_names())
    assert get_accelerator("gobo").sources[0] in table
    shown = run("accelerators", "--show", "olive@8x8").stdout
    assert get_accelerator(save(tmp_path / "shown.toml", shown)) == get_accelerator("olive@8x8")
    (one,) = json.loads(run("accelerators", "--show", "gobo", "--json").stdout)["accelerators"]
    assert one["array_area_mm2"] == {"prefill": None, "decode": None}


def test_a_file_simulates_as_what_it_says(tmp_path: Path) -> None:
    path = save(tmp_path / "shown.toml", to_toml(get_accelerator("bitmod-lossy")))
    arguments = ("simulate", "opt-125m", "--phase", "decode", "--json", "--accelerator")
    assert run(*arguments, path).stdout == run(*arguments, "bitmod-lossy").stdout
