"""Traces: intervals are the simulator's cycles, files are what their formats ask for."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from vcd.reader import TokenKind, tokenize

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.formats import get_format
from termwise.algorithms.quantize import quantize
from termwise.algorithms.workload import Gemm
from termwise.flow.cli import main
from termwise.sim.accelerators import get_accelerator
from termwise.sim.cycle import run_tile_program
from termwise.sim.dram import get_dram
from termwise.sim.kernels import TileProgram
from termwise.sim.plan import plan_product
from termwise.sim.simulate import product_of
from termwise.sim.tile_run import run_tile
from termwise.sim.trace import ARRAY, CHANNEL, timeline, write_signals, write_timeline


@pytest.fixture(scope="module")
def program() -> TileProgram:
    """Several tiles, chunks and passes, with groups that are shorter than their scaling."""
    gemm = Gemm(name="", tokens=40, reduction=1100, outputs=50, operand="weight", repeats=1)
    machine = get_accelerator("bitmod-lossy@16x8")
    product = product_of(gemm, machine, "prefill", get_format("bitmod-w4g12"))
    return plan_product(product, passes=2)


@pytest.mark.parametrize("paged", [False, True])
def test_intervals_cover_all_cycles_and_sum_to_the_causes(program: TileProgram, paged: bool) -> None:
    memory = get_dram("ddr4-3200").timing(1000) if paged else None
    program = program._replace(burst_bytes=0) if paged else program
    intervals, count = timeline(program, memory=memory)
    assert count == run_tile_program(program, memory=memory)
    array = [interval for interval in intervals if interval.unit == ARRAY]
    assert [interval.begin for interval in array[1:]] == [interval.end for interval in array[:-1]]
    assert (array[0].begin, array[-1].end) == (0, count.cycles)
    by_cause: Counter[str] = Counter()
    for interval in array:
        by_cause[interval.name] += interval.end - interval.begin
    stalls = {name: cycles for name, cycles in vars(count.stalls).items() if cycles}
    assert stalls.keys() >= {"scale", "weights", "drain", "write_back"}
    assert by_cause == {"busy": count.busy_cycles, **stalls}
    channel = [interval for interval in intervals if interval.unit == CHANNEL]
    assert all(first.end <= second.begin for first, second in itertools.pairwise(channel))
    assert sum(interval.arguments["bytes"] for interval in channel) == count.traffic.total_bytes


@pytest.mark.parametrize("most", [1, 500, 3000])
def test_a_timeline_that_is_cut_is_the_beginning_of_the_whole(program: TileProgram, most: int) -> None:
    whole, _ = timeline(program)
    cut, count = timeline(program, most_cycles=most)
    assert count.cycles == most
    assert count.busy_cycles + count.stalls.total == most
    begun = [interval for interval in whole if interval.begin < most]
    expected = {(i.unit, i.name, i.begin, min(i.end, most), tuple(i.arguments.items())) for i in begun}
    assert {(i.unit, i.name, i.begin, i.end, tuple(i.arguments.items())) for i in cut} == expected


def test_the_timeline_file_has_what_the_trace_event_format_asks_for(program: TileProgram, tmp_path: Path) -> None:
    intervals, count = timeline(program)
    write_timeline(tmp_path / "timeline.json", intervals, title="a product", clock_mhz=500)
    document = json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))
    events = document["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"a product", "array", "channel"}
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(intervals)
    for event in complete:
        assert {"name", "cat", "pid", "tid", "ts", "dur", "args"} <= event.keys()
        assert event["dur"] > 0
    assert max(event["ts"] + event["dur"] for event in complete) == pytest.approx(count.cycles / 500, rel=1e-12)


def test_the_signals_of_a_tile_are_read_back_as_they_were(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensor = quantize((random.standard_normal((2, 12)) * 0.05).astype(np.float32), "bitmod-w4g8")
    run = run_tile(BitSerialSpec(), tensor, random.standard_normal((2, 12)).astype(np.float16))
    write_signals(tmp_path / "tile.vcd", run, comment="a comment")
    names, scopes, cycle = {}, [], 0
    last: dict[tuple[str, str], tuple[int, str]] = {}
    with (tmp_path / "tile.vcd").open("rb") as file:
        for token in tokenize(file):
            if token.kind is TokenKind.SCOPE:
                scopes.append(token.scope.ident)
            elif token.kind is TokenKind.UPSCOPE:
                scopes.pop()
            elif token.kind is TokenKind.VAR:
                names[token.var.id_code] = (scopes[-1], token.var.reference)
            elif token.kind is TokenKind.CHANGE_TIME:
                cycle = token.time_change
            elif token.kind is TokenKind.CHANGE_REAL:
                last[names[token.real_change.id_code]] = (cycle, str(token.real_change.value))
            elif token.kind is TokenKind.CHANGE_STRING:
                last[names[token.string_change.id_code]] = (cycle, token.string_change.value)
    assert cycle == run.cycles + 1
    assert last["sequencer", "state"] == (run.cycles, "LEAVE")
    for token_index, output in np.ndindex(run.outputs.shape):
        found = last[f"pe_{output}_{token_index}", "output"]
        assert found[0] in (0, run.cycles)
        assert float(found[1]) == pytest.approx(float(run.outputs[token_index, output]), rel=1e-15)


def test_the_command_writes_both_files_and_says_what_they_are(tmp_path: Path) -> None:
    arguments = ["simulate", "tiny", "--accelerator", "bitmod-lossy@8x8", "--context", "16"]
    done = CliRunner().invoke(main, [*arguments, "--trace", str(tmp_path / "trace"), "--layer", "lm_head"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "trace").iterdir()} == {"timeline.json", "tile.vcd"}
    assert "are random with seed 0" in " ".join(done.output.split())
    again = CliRunner().invoke(main, [*arguments, "--trace", str(tmp_path / "trace")])
    assert again.exit_code == 2
    assert "exists already" in again.output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layer", "lm_head"], "--layer lm_head: only a trace follows one layer"),
        (["--trace", "{}", "--phase", "generation"], "--trace: a generation has many phases"),
        (["--trace", "{}", "--layer", "head"], "unknown layer 'head'"),
        (["--trace", "{}", "--model-of", "published"], "--trace"),
    ],
)
def test_a_trace_that_cannot_be_is_refused(options: list[str], sentence: str, tmp_path: Path) -> None:
    given = [option.format(tmp_path / "new") for option in options]
    done = CliRunner().invoke(main, ["simulate", "tiny", "--accelerator", "bitmod-lossy@8x8", *given])
    assert done.exit_code == 2
    assert sentence in " ".join(done.output.split())
    assert not (tmp_path / "new").exists()
