"""What termwise simulate shows: layer kinds that add up, points below their roofs, a folder that is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from termwise.algorithms.formats import get_format
from termwise.algorithms.shapes import KNOWN_SHAPES, known_shape
from termwise.algorithms.workload import PHASES, workload
from termwise.flow.cli import main
from termwise.flow.figures import STYLE
from termwise.flow.layer_kinds import HEAD, VECTOR, Analysis, LayerKind, analyse, kind_of
from termwise.flow.simulation_figures import (
    breakdown_plots,
    draw_breakdown,
    draw_roofline,
    roof_line,
    roofline_limits,
    roofline_plot,
)
from termwise.flow.simulation_report import NOT_KNOWN, kind_tables, product_table, summary_lines, write_simulation
from termwise.sim.accelerators import accelerator_names, get_accelerator
from termwise.sim.generation import simulate_generation, simulate_phase
from termwise.sim.totals import Totals, summed
from termwise.sim.vector_unit import VectorUnit

MODEL = "opt-125m"
FILES = {
    *("simulation.json", "report.md", "index.html"),
    *(f"{stem}.{suffix}" for stem in ("breakdown", "roofline") for suffix in ("png", "svg")),
}


def run(*arguments: Path | str) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)], catch_exceptions=False)


def analysis_of(accelerator: str, phase: str, **options: Any) -> Analysis:
    shape, machine = known_shape(MODEL), get_accelerator(accelerator)
    if phase == "generation":
        document = simulate_generation(shape, machine, context=32, output_tokens=4, **options)
    else:
        document = simulate_phase(shape, machine, phase=phase, context=32, **options)  # type: ignore[arg-type]
    return analyse(document, machine, shape.head)


@pytest.fixture(scope="module")
def generation() -> Analysis:
    return analysis_of("bitmod-lossy", "generation", vector_unit=VectorUnit(lanes=16))


def test_every_layer_of_every_known_shape_has_a_kind_of_few() -> None:
    for name in KNOWN_SHAPES:
        shape = known_shape(name)
        kinds = {
            kind_of(gemm.name, gemm.operand, shape.head) for gemm in workload(shape, phase="decode", context=4, batch=1)
        }
        others = {"router", "model.decoder.project_in", "model.decoder.project_out"}  # the last two: OPT-350M alone
        assert kinds - others == {
            *("queries, keys, values", "attention scores", "attention values"),
            *("attention output", "gate and up", "down", "head"),
        }, name


def test_a_layer_of_an_unknown_name_is_a_kind_of_its_own() -> None:
    assert kind_of("blocks.*.mixer", "weight", "head") == "blocks.*.mixer"
    assert kind_of("head", "weight", "head") == HEAD
    assert kind_of("encoder.layer.*.attention.output.dense", "weight", None) == "attention output"
    assert kind_of("encoder.layer.*.output.dense", "weight", None) == "down"


@pytest.mark.parametrize("phase", [*PHASES, "generation"])
def test_kinds_add_up_to_the_simulation(phase: str) -> None:
    analysis = analysis_of("olive", phase, vector_unit=VectorUnit(lanes=16))
    assert analysis.kinds[-1].name == VECTOR
    both = summed(kind.totals for kind in analysis.kinds)
    total = analysis.total.totals
    assert (both.cycles, both.busy, both.traffic) == (total.cycles, total.busy, total.traffic)
    assert both.causes == total.causes
    assert sum(kind.multiplications for kind in analysis.kinds) == analysis.total.multiplications
    assert both.energy_uj["total"] == pytest.approx(total.energy_uj["total"], rel=1e-12)
    if phase == "generation":
        assert [entry.name for entry in analysis.phases] == list(PHASES)
        assert sum(entry.totals.cycles for entry in analysis.phases) == total.cycles
        assert sum(entry.multiplications for entry in analysis.phases) == analysis.total.multiplications


@pytest.mark.parametrize("phase", [*PHASES, "generation"])
@pytest.mark.parametrize("accelerator", accelerator_names())
def test_no_point_is_above_its_roofs(accelerator: str, phase: str) -> None:
    found = analysis_of(accelerator, phase).roofline
    highest = max(roof.multiplications_per_cycle for roof in found.roofs)
    machine = get_accelerator(accelerator)
    weights = get_format(machine.default_format("prefill" if phase == "prefill" else "decode"))
    element = machine.processing_element
    pes = machine.prefill_array.processing_elements
    bits = machine.key_value_bits
    steps = (
        element.cycles_per_step(weights) * element.processing_elements_per_product(weights),
        element.key_value_cycles_per_step(bits) * element.key_value_processing_elements_per_product(bits),
    )
    assert {roof.multiplications_per_cycle for roof in found.roofs} == {pes * element.lanes / step for step in steps}
    assert len(found.points) == 7
    for point in found.points:
        speed, intensity = point.multiplications_per_cycle, point.multiplications_per_byte
        assert speed is not None
        assert intensity is not None
        assert 0 < speed <= highest
        assert speed <= intensity * found.bytes_per_cycle
        assert 0 < point.channel_share <= 1


def test_the_roof_is_the_slope_up_to_the_ridge_and_level_beyond(generation: Analysis) -> None:
    found = generation.roofline
    horizontal, vertical = roofline_limits(found)
    for roof in found.roofs:
        start, *_, ridge, end = roof_line(found, roof.multiplications_per_cycle, horizontal, points=5)
        per_second = found.clock_mhz * 1e6
        assert start == pytest.approx((horizontal[0], per_second * found.bytes_per_cycle * horizontal[0]))
        assert ridge[0] == pytest.approx(roof.multiplications_per_cycle / found.bytes_per_cycle)
        assert ridge[1] == pytest.approx(end[1]) == pytest.approx(per_second * roof.multiplications_per_cycle)
        assert vertical[0] < end[1] < vertical[1]


@pytest.mark.parametrize(
    ("busy", "stalls", "channel", "bound"),
    [
        (6, {"weights": 4}, 5.0, "compute"),
        (6, {"weights": 4}, 9.5, "weights"),  # the channel works beside the array, and nearly all of the time
        (3, {"weights": 2, "scale": 5}, 2.0, "scale"),
        (0, {"vector": 10}, 0.0, "vector"),
        (0, {}, 0.0, "–"),
    ],
)
def test_what_takes_the_time_bounds(busy: int, stalls: dict[str, int], channel: float, bound: str) -> None:
    totals = Totals(cycles=busy + sum(stalls.values()), busy=busy, stalls=stalls)
    assert LayerKind(name="kind", multiplications=1, totals=totals, channel_cycles=channel).bound_by == bound


def document_with(document: dict[str, Any]) -> dict[str, Any]:
    """A simulation with a cause and an energy that no code of the page names, and one energy that is not known."""

    def changed(entry: dict[str, Any]) -> dict[str, Any]:
        stalls = {**entry["stalls"], "solar_flare": 7}
        energy = {**entry["energy_uj"], "telemetry": 2.5, "dram": None, "total": None}
        return {**entry, "cycles": entry["cycles"] + 7, "stalls": stalls, "energy_uj": energy}

    layers = [changed(layer) for layer in document["layers"]]
    whole = changed(document)
    more = 7 * (len(layers) - 1)
    whole["stalls"]["solar_flare"] += more
    return {**whole, "cycles": whole["cycles"] + more, "layers": layers, "energy_per_token_uj": None}


def test_new_causes_and_parts_are_shown_and_what_is_not_known_is_said(tmp_path: Path) -> None:
    machine, shape = get_accelerator("ant"), known_shape(MODEL)
    plain = simulate_phase(shape, machine, phase="decode", context=32)
    analysis = analyse(document_with(plain), machine, shape.head)
    time, cost = kind_tables(analysis)
    assert "solar flare" in time.columns
    assert {row[cost.columns.index("energy (µJ)")] for row in cost.rows} == {NOT_KNOWN}
    text = "\n".join(summary_lines(analysis.document))
    assert f"solar flare {7 * len(plain['layers'])} " in text
    assert f"energy: {NOT_KNOWN}" in text
    assert f"DRAM {NOT_KNOWN}" in text
    assert "telemetry 2.5 µJ" in text
    write_simulation(analysis, tmp_path / "out", command="termwise simulate")
    assert json.loads((tmp_path / "out" / "simulation.json").read_text())["energy_uj"]["dram"] is None
    assert "not known: DRAM" in read_figure_text(analysis, tmp_path)


def read_figure_text(analysis: Analysis, folder: Path) -> str:
    """The text of the breakdown, drawn with its letters as text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "svg.fonttype", "none")
        draw_breakdown("title", analysis.kinds, folder)
    return (folder / "breakdown.svg").read_text(encoding="utf-8")


def test_causes_without_a_cycle_have_no_column(generation: Analysis) -> None:
    without = analysis_of("bitmod-lossy", "decode")
    assert "vector" not in kind_tables(without)[0].columns
    tables = kind_tables(generation)
    assert [row[0] for row in tables[0].rows] == ["prefill", "decode", "total"]
    assert ["vector" in table.columns for table in tables] == [True, False, True, False]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert "tokens" not in product_table(generation.document).columns
    assert "tokens" in product_table(without.document).columns


def test_equal_simulations_give_equal_files(generation: Analysis, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        write_simulation(generation, tmp_path / folder, command="termwise simulate")
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "other"))
    assert set(one) == FILES
    assert one == other
    assert one["report.md"].startswith(b"`termwise simulate`\n")
    assert b"vector operations" in one["index.html"]


def test_nothing_to_draw_draws_no_roofline(generation: Analysis, tmp_path: Path) -> None:
    from dataclasses import replace

    assert draw_roofline("title", replace(generation.roofline, points=()), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_out_leaves_a_whole_folder_and_json_alone_on_standard_output(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "x"
    arguments = [MODEL, "--accelerator", "fp16", "--phase", "generation", "--context", "8", "--output-tokens", "3"]
    result = run(*arguments, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["phase"] == "generation"
    assert (document["context"], document["output_tokens"]) == (8, 3)
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["x"]
    written = json.loads((out / "simulation.json").read_text(encoding="utf-8"))
    command = written.pop("command")
    assert written == document
    assert (out / "report.md").read_text(encoding="utf-8").splitlines()[0] == f"`{command}`"
    assert command.startswith(f"termwise simulate {MODEL} --accelerator fp16")
    assert f"--out {out}" in command
    assert "--json" not in command
    again = run(*arguments, "--out", out)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize("phase", [*PHASES, "generation"])
def test_the_terminal_says_speed_and_has_no_colour_in_a_pipe(phase: str) -> None:
    arguments = [MODEL, "--accelerator", "bitmod-lossy", "--phase", phase, "--context", "16", "--vector-lanes", "8"]
    result = run(*arguments, *(["--output-tokens", "3"] if phase == "generation" else []))
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert result.stderr == ""
    assert ("time to first token: " in result.stdout) == (phase != "decode")
    assert ("time per output token: " in result.stdout) == (phase == "generation")
    assert "per second, " in result.stdout
    assert "µJ per token" in result.stdout
    assert "bound by" in result.stdout
    assert "vector operations (" in result.stdout


def test_help_has_examples_that_parse() -> None:
    import shlex

    import click

    text = run("--help").stdout
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("termwise simulate ")]
    assert len(examples) >= 3
    command = main.get_command(click.Context(main), "simulate")
    assert command is not None
    for example in examples:
        command.make_context("simulate", shlex.split(example)[2:])


def test_the_plots_of_the_page_are_what_plotly_takes(generation: Analysis) -> None:
    """Plotly's Python objects check every name and value."""
    from plotly.graph_objects import Figure

    for plot in [*breakdown_plots(generation.kinds), roofline_plot(generation.roofline)]:
        figure = Figure(data=plot["traces"], layout=plot["layout"])
        assert len(figure.data) == len(plot["traces"]) > 0


def test_the_memory_and_the_energies_of_the_machine_are_replaced() -> None:
    """The memory is the slope of the roofline: 25.6 GB/s in 1 ns are 25.6 bytes per cycle."""
    arguments = [MODEL, "--accelerator", "bitmod-lossy", "--phase", "decode", "--context", "16", "--json"]
    ideal = json.loads(run(*arguments).stdout)
    result = run(*arguments, "--memory", "ddr4-3200", "--energy-set", "bitmod-2024-any-buffer")
    document = json.loads(result.stdout)
    assert (document["memory"], document["energy_set"]) == ("ddr4-3200", "bitmod-2024-any-buffer")
    assert document["roofline"]["memory"] == "ddr4-3200"
    assert document["roofline"]["bytes_per_cycle"] == 25.6
    assert document["cycles"] > ideal["cycles"]
    assert "leakage" in document["energy_uj"]
    assert "leakage" not in ideal["energy_uj"]
    unknown = json.loads(run(*arguments, "--memory", "hbm3").stdout)
    assert unknown["energy_uj"]["dram"] is None
    assert unknown["energy_per_token_uj"] is None
    assert run(*arguments[:-1], "--memory", "hbm3").stdout.count(NOT_KNOWN) >= len(unknown["layer_kinds"])
