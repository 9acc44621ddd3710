from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from termwise.algorithms.errors import InputError, MissingToolError
from termwise.flow.cli import main
from termwise.flow.synthesis import Synthesizer, baseline_of, baseline_path, compare, yosys_version
from termwise.rtl import toolchain
from termwise.rtl.gates import TRANSISTORS, gate_area
from termwise.rtl.synthesis import (
    TARGETS,
    FigureError,
    areas,
    clock_of,
    counted,
    gate_script,
    get_target,
    statistics_of,
)
from termwise.rtl.toolchain import Tool, ToolError, ToolKind, version_numbers
from termwise.rtl.units import UNITS, get_unit
from termwise.rtl.verilog import port_table, verilog

SMALL = "dequantizer"


def run(*arguments: Path | str) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def synthesized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Records, and the figures of a small unit on ECP5."""
    folder = tmp_path_factory.mktemp("runs")
    result = run("synth", SMALL, "--target", "ecp5", "--json", "--runs", folder)
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_a_unit_has_its_figures_from_real_tools(synthesized: tuple[Path, dict[str, Any]]) -> None:
    _, figures = synthesized
    assert {"lut", "ff", "dsp", "bram", "fmax_mhz"} <= set(figures)
    assert figures["ff"] == 40  # 15 bits are held, 23 are the product, and two bits of control
    assert figures["lut"] > 20
    assert figures["dsp"] == figures["bram"] == 0
    assert 50 < figures["fmax_mhz"] < 1000
    assert "Yosys" in figures["tools"]["yosys"]


def test_a_record_is_used_again(synthesized: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, figures = synthesized
    monkeypatch.setattr("termwise.flow.synthesis.synthesize", lambda *_: pytest.fail("it was synthesized again"))
    again = run("synth", SMALL, "--json", "--runs", folder)
    assert json.loads(again.stdout) == figures


def test_gates_are_counted_by_their_transistors(tmp_path: Path) -> None:
    figures = Synthesizer(tmp_path, 0, print).figures(get_unit(SMALL), get_target("asic"))
    assert figures["ff"] == 40
    assert figures["area_nand2"] > 40 * gate_area("$_DFF_P_", 1)
    assert figures["lut"] is None
    assert figures["notes"]


def test_a_baseline_tells_what_became_worse(synthesized: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, figures = synthesized
    version = yosys_version(figures["tools"]["yosys"])
    arguments = ("synth", SMALL, "--runs", folder, "--baseline", "--baselines", tmp_path)
    missing = run(*arguments)
    assert missing.exit_code == 2
    assert "no baseline" in missing.stderr
    path = baseline_path(tmp_path, version)
    path.write_text(baseline_of([figures]))
    assert run(*arguments).exit_code == 0
    better = {**figures, "lut": round(figures["lut"] / 1.05)}
    path.write_text(baseline_of([better]))
    worse = run(*arguments)
    assert worse.exit_code == 1
    assert re.search(r"lut .*worse", worse.stdout)
    assert [row["figure"] for row in compare([figures], tmp_path) if row["worse"]] == ["lut"]
    path.write_text("{}")
    with pytest.raises(InputError, match="no figures of dequantizer ecp5"):
        compare([figures], tmp_path)


def test_unknown_units_and_targets_are_refused(tmp_path: Path) -> None:
    for arguments, expected in (
        (("synth", "dequantiser"), "did you mean 'dequantizer'"),
        (("synth", SMALL, "--target", "stratix"), "unknown target 'stratix'"),
        (("synth", "accelerator", "--target", "asic", "--runs", tmp_path / "runs"), "which gates are not"),
        (("rtl", "bit_seril"), "did you mean 'bit_serial'"),
        (("rtl", SMALL, "--out", "/proc/x"), "cannot write"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert expected in result.stderr
    assert not (tmp_path / "runs").exists()


def script(path: Path, text: str) -> str:
    """A program that does ``text``."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def test_a_tool_that_fails_gives_its_last_lines_and_its_log(tmp_path: Path) -> None:
    tool = Tool(script(tmp_path / "bad", "echo first; echo the reason; exit 3"), "bad", "1.0")
    with pytest.raises(ToolError, match=r"bad failed with status 3: first / the reason; see .*bad\.log"):
        tool.run([], tmp_path, "bad.log")
    assert (tmp_path / "bad.log").read_text().endswith("the reason\n")


def test_a_tool_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    tool = Tool(script(tmp_path / "slow", "echo begun; exec sleep 60"), "slow", "1.0")
    with pytest.raises(ToolError, match=r"slow did not end within 0\.5 s: begun"):
        tool.run([], tmp_path, "slow.log", timeout=0.5)


def test_missing_and_old_tools_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ToolKind("no-such-tool", "no-such-wheel", (2, 0))
    with pytest.raises(MissingToolError, match=r"was not found: pip install 'termwise\[fpga\]'"):
        toolchain.find(kind)
    script(tmp_path / "old-tool", "echo Old 1.9")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(MissingToolError, match=r"is too old \(Old 1\.9; 2\.0 is needed\)"):
        toolchain.find(ToolKind("old-tool", "no-such-wheel", (2, 0)))
    assert toolchain.find(ToolKind("old-tool", "no-such-wheel", (1, 8))).version == "Old 1.9"


def test_a_missing_tool_is_status_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: ToolKind) -> Tool:
        raise MissingToolError("yosys was not found: pip install 'termwise[fpga]'")

    monkeypatch.setattr("termwise.flow.synthesis.find", missing)
    result = run("synth", SMALL, "--runs", tmp_path)
    assert result.exit_code == 3
    assert "pip install" in result.stderr


def test_versions_are_compared_as_numbers() -> None:
    assert version_numbers("Yosys 0.66 (git sha1 86f2)") == (0, 66)
    assert version_numbers("nextpnr-0.11.1") > version_numbers("nextpnr-0.7")
    assert version_numbers("none") == (0, 0)


def test_figures_that_are_missing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FigureError, match="cells LUT9; expected those of ecp5"):
        counted({"LUT4": 1, "LUT9": 3}, TARGETS["ecp5"])
    with pytest.raises(FigureError, match=r"cells \(none\)"):
        counted({}, TARGETS["ecp5"])
    path = tmp_path / "stat.json"
    for text in ("", "{}", '{"design": {"num_cells_by_type": {}}}'):
        path.write_text(text)
        with pytest.raises(FigureError, match="no counts of cells"):
            statistics_of(path)
    path.write_text('{"fmax": {}}')
    with pytest.raises(FigureError, match="no clock"):
        clock_of(path)
    with pytest.raises(FigureError, match="cells LUT4; expected gates"):
        areas({"modules": {"top": {"num_cells_by_type": {"LUT4": 1}}}}, "top")


def test_cells_count_for_what_they_take() -> None:
    found = counted({"LUT4": 10, "CCU2C": 3, "TRELLIS_DPR16X4": 2, "TRELLIS_FF": 7, "MULT18X18D": 1}, TARGETS["ecp5"])
    assert (found["lut"], found["ff"], found["dsp"], found["carry"]) == (10 + 2 * 3 + 4 * 2, 7, 1, 3)


def test_shares_of_modules_sum_to_the_whole() -> None:
    modules = {
        "\\top": {"num_cells_by_type": {"$_NAND_": 4, "\\top_pe_0_1": 3}},
        "\\top_pe_0_1": {"num_cells_by_type": {"$_NAND_": 2, "$_DFF_P_": 1}},
    }
    found = areas({"modules": modules}, "top")
    assert found["area_nand2"] == 4 + 3 * (2 + TRANSISTORS["$_DFF_P_"] / 4)
    assert found["ff"] == 3
    assert sum(found["parts"].values()) == pytest.approx(1, abs=2e-4)  # each share is rounded to four places
    assert set(found["parts"]) == {"pe", "other"}


def test_verilog_is_the_same_every_time_and_names_its_ports(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert run("rtl", "bit_serial", "--out", tmp_path / folder).exit_code == 0
    texts = [(tmp_path / folder / "bit_serial.v").read_text() for folder in ("a", "b")]
    assert texts[0] == texts[1]
    modules = re.findall(r"^module (\w+)", texts[0], re.MULTILINE)
    parts = ("exponent_match", "multiplier", "group_accumulator")
    assert set(modules) == {"bit_serial", *(f"bit_serial_{part}" for part in parts)}
    for port in port_table(UNITS["bit_serial"].build()):
        assert re.search(rf"\b{port['direction']} .*\b{port['name']};", texts[0]), port
        assert f".{port['name']}(" in (tmp_path / "a" / "bit_serial_instance.v").read_text()
        assert f"| `{port['name']}` |" in (tmp_path / "a" / "bit_serial.md").read_text()
    assert f"latency: {UNITS['bit_serial'].build().latency} cycles" in (tmp_path / "a" / "bit_serial.md").read_text()


@pytest.mark.parametrize("unit", ["dequantizer", "term_generator", "pair_decoder"])
@pytest.mark.parametrize("target", ["ecp5", "asic"])
def test_netlists_are_proved_to_do_what_the_verilog_does(unit: str, target: str, tmp_path: Path) -> None:
    """What is counted is the unit, by yosys' own equivalence check."""
    (tmp_path / "unit.v").write_text(verilog(UNITS[unit].build(), "unit"))
    mapped = (
        gate_script("unit", flat=True)
        if target == "asic"
        else f"{get_target(target).synthesize.format(top='unit')}; techmap -autoproc -map +/ecp5/cells_sim.v"
    )
    proof = (
        f"read_verilog unit.v; {mapped}; setattr -unset init w:*; rename unit gate; design -stash gate; "
        "read_verilog unit.v; hierarchy -top unit; proc; flatten; memory_map; setattr -unset init w:*; "
        "rename unit gold; design -copy-from gate -as gate gate; async2sync; equiv_make gold gate equiv; "
        "hierarchy -top equiv; flatten; opt_clean; equiv_simple -undef; equiv_induct -undef; equiv_status {}"
    )
    tool = toolchain.find(toolchain.YOSYS)
    tool.run(["-q", "-l", "log", "-p", proof.format("-assert")], tmp_path, "log")
    wrong = proof.replace("rename unit gold;", "connect -set {} 0; rename unit gold;", 1)
    output = next(port["name"] for port in port_table(UNITS[unit].build()) if port["direction"] == "output")
    with pytest.raises(ToolError, match="unproven"):
        tool.run(["-q", "-l", "log", "-p", wrong.replace("{}", output, 1).format("-assert")], tmp_path, "log")


def test_instances_that_are_alike_share_a_module() -> None:
    text = verilog(UNITS["outlier_victim_array_4x4"].build(), "array")
    modules = re.findall(r"^module (\w+)", text, re.MULTILINE)
    assert sum("_pe_" in module for module in modules) == 1
    assert len(re.findall(r"^  array_pe_0_0 pe_\d_\d \(", text, re.MULTILINE)) == 16


def test_every_unit_is_listed() -> None:
    result = run("rtl", "--json")
    assert [unit["name"] for unit in json.loads(result.stdout)["units"]] == list(UNITS)
    assert set(map(str, TARGETS)) == {"ecp5", "ice40", "xc7", "xcup", "gowin", "asic"}
