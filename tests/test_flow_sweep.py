"""Sweeps: what is computed once stays, whatever kills the process; bad input writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from termwise.algorithms.formats import get_format
from termwise.algorithms.models import open_model
from termwise.algorithms.perplexity import Evaluator, perplexity
from termwise.algorithms.quantize import quantize
from termwise.algorithms.shapes import known_shape
from termwise.algorithms.text import read_text
from termwise.flow.cli import main
from termwise.sim.accelerators import get_accelerator
from termwise.sim.simulate import simulate

REPOSITORY = Path(__file__).resolve().parent.parent
FORMATS = ("fp16", "int-w4g16", "bitmod-w3g32", "olive-w4")
ACCELERATORS = ("fp16", "olive", "bitmod-lossy")

FLOAT32 = 1e-5
"""Relative difference of perplexities that the order of float32 sums makes (it depends on where arrays lie)."""


def write_specification(folder: Path, model: Path | str, **changes: Any) -> Path:
    keys = {
        "version": 1,
        "question": "Which format?",
        "model": str(model),
        "formats": list(FORMATS),
        "accelerators": list(ACCELERATORS),
        "context": 8,
        **changes,
    }
    path = folder / "spec.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()), encoding="utf-8")
    return path


def sweep(*arguments: Path | str) -> Result:
    return CliRunner().invoke(main, ["sweep", *map(str, arguments), "--json"], catch_exceptions=False)


def assert_same_points(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal in everything; perplexities up to the order of float32 sums."""
    for one, other in zip(found, expected, strict=True):
        assert one == {**other, "perplexity": pytest.approx(other["perplexity"], rel=FLOAT32)}


def record_times(run: Path) -> dict[str, tuple[int, int]]:
    """Modification time and inode of every record."""
    found = {path: path.stat() for path in sorted((run / "records").rglob("*.json"))}
    return {str(path.relative_to(run)): (state.st_mtime_ns, state.st_ino) for path, state in found.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> dict[str, Any]:
    """A sweep that was run once: its document, and where it is."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_specification(folder, small_model, text=str(small_text))
    result = sweep(path, "--out", folder / "run")
    assert result.exit_code == 0, result.stderr
    return {**json.loads(result.stdout), "specification": path, "run": folder / "run"}


def test_every_combination_is_a_point_or_is_skipped_with_a_reason(finished: dict[str, Any]) -> None:
    keys = ("model", "format", "accelerator", "phase")
    found = [tuple(entry[key] for key in keys) for entry in finished["points"] + finished["skipped"]]
    expected = {
        ("small", format, accelerator, phase)
        for format in FORMATS
        for accelerator in ACCELERATORS
        for phase in ("prefill", "decode")
    }
    assert set(found) == expected
    assert len(found) == len(expected)
    assert all(entry["reason"] for entry in finished["skipped"])
    assert {(entry["format"], entry["accelerator"]) for entry in finished["skipped"]} == {
        ("fp16", "olive"),
        ("fp16", "bitmod-lossy"),
        ("bitmod-w3g32", "olive"),
        ("olive-w4", "bitmod-lossy"),
    }


def test_a_point_holds_what_quantizer_evaluator_and_simulator_say(
    finished: dict[str, Any], small_model: Path, small_text: Path
) -> None:
    model, text = open_model(small_model), read_text(small_text)
    for point in finished["points"]:
        format = get_format(point["format"])
        simulation = simulate(
            model.shape, get_accelerator(point["accelerator"]), phase=point["phase"], weights=format, context=8
        ).to_dict()
        energy = simulation["energy_uj"]
        assert (point["latency_cycles"], point["latency_ms"]) == (simulation["cycles"], simulation["latency_ms"])
        assert (point["energy_uj"], point["pe_energy_uj"]) == (energy["total"], energy["pe"])
        assert point["dram_energy_uj"] == energy["dram"]
        assert point["sram_energy_uj"] == energy["sram_read"] + energy["sram_write"]
        parts = sum(point[key] for key in ("dram_energy_uj", "sram_energy_uj", "pe_energy_uj"))
        assert point["energy_uj"] == pytest.approx(parts, rel=1e-12)
        assert point["status"] == "done"
    for name in FORMATS:
        format = get_format(name)
        expected = perplexity(
            model, text, replace=lambda layer, weights, format=format: quantize(weights, format).dequantize()
        )
        points = [point for point in finished["points"] if point["format"] == name]
        tensors = [(weights, quantize(weights, format)) for _, weights in model.matrices()]
        signal_power = sum(float((weights.astype(np.float64) ** 2).sum()) for weights, _ in tensors)
        noise = sum(float(((w.astype(np.float64) - t.dequantize()) ** 2).sum()) for w, t in tensors)
        bits = 8 * sum(t.nbytes for _, t in tensors) / sum(w.size for w, _ in tensors)
        assert points
        for point in points:
            assert point["perplexity"] == pytest.approx(expected.per_token, rel=FLOAT32)
            assert point["sqnr_db"] == pytest.approx(10 * np.log10(signal_power / noise), rel=1e-12)
            assert point["bits_per_weight"] == pytest.approx(bits, rel=1e-12)


def test_pareto_marks_are_within_model_and_phase(finished: dict[str, Any]) -> None:
    for point in finished["points"]:
        rivals = [other for other in finished["points"] if other["phase"] == point["phase"]]
        for mark, keys in {
            "pareto": ("perplexity", "latency_ms", "energy_uj"),
            "pareto_latency": ("perplexity", "latency_ms"),
            "pareto_energy": ("perplexity", "energy_uj"),
        }.items():
            dominated = any(
                all(other[key] <= point[key] for key in keys) and any(other[key] < point[key] for key in keys)
                for other in rivals
            )
            assert point[mark] is not dominated


def test_the_text_and_the_files_are_named(finished: dict[str, Any], small_text: Path) -> None:
    assert finished["text"] == {"name": small_text.name, "digest": read_text(small_text).digest}
    for key in ("page", "report"):
        assert Path(finished[key]).is_file()
    assert Path(finished["report"]).parent == finished["run"]


def test_a_second_run_computes_nothing_and_imports_no_torch(finished: dict[str, Any]) -> None:
    before = record_times(finished["run"])
    program = (
        "import sys\n"
        "from termwise.flow.cli import main\n"
        "try:\n"
        f"    main(['sweep', {str(finished['specification'])!r}, '--out', {str(finished['run'])!r}, '--json'])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert (document["computed"], document["reused"]) == (0, len(finished["points"]) + len(finished["skipped"]))
    assert document["points"] == finished["points"]
    assert done.stderr.splitlines()[-1] == "[]"
    assert record_times(finished["run"]) == before


def test_another_accelerator_evaluates_no_format_again(
    finished: dict[str, Any], tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished["run"], run)
    before = record_times(run)
    monkeypatch.setattr(Evaluator, "perplexity", lambda self: pytest.fail("evaluated"))
    path = write_specification(
        tmp_path, small_model, text=str(small_text), accelerators=[*ACCELERATORS, "bitmod-lossy@8x8"]
    )
    result = sweep(path, "--out", run)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["computed"] == 2 * len(FORMATS)
    after = record_times(run)
    assert {name: after[name] for name in before} == before


def test_a_corrupt_record_is_computed_again_with_a_warning(finished: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished["run"], run)
    point = sorted((run / "records" / "points").iterdir())[0]
    point.write_text(point.read_text()[:100])
    result = sweep(finished["specification"], "--out", run)
    assert result.exit_code == 0
    assert str(point) in result.stderr
    assert "warning" in result.stderr
    assert_same_points(json.loads(result.stdout)["points"], finished["points"])
    assert json.loads(point.read_text())["digest"] == point.stem


def test_processes_give_the_same_results(finished: dict[str, Any], tmp_path: Path) -> None:
    result = sweep(finished["specification"], "--out", tmp_path / "run", "--workers", "2")
    assert result.exit_code == 0, result.stderr
    assert_same_points(json.loads(result.stdout)["points"], finished["points"])


def test_a_killed_sweep_goes_on_where_it_stopped(
    finished: dict[str, Any], tmp_path: Path, small_model: Path, small_text: Path
) -> None:
    run = tmp_path / "run"
    # The third evaluation never ends, so the process is alive, and busy, when it is killed.
    program = (
        "import time\n"
        "from termwise.algorithms.perplexity import Evaluator\n"
        "whole, calls = Evaluator.perplexity, []\n"
        "def slow(self):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        time.sleep(1000)\n"
        "    return whole(self)\n"
        "Evaluator.perplexity = slow\n"
        "from termwise.flow.cli import main\n"
        f"main(['sweep', {str(finished['specification'])!r}, '--out', {str(run)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        waiting_until = time.monotonic() + 300
        points = run / "records" / "points"
        while not ((run / "records" / "quality").is_dir() and len(list(points.glob("*.json"))) >= 16):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < waiting_until
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    kept = record_times(run)
    assert len([name for name in kept if "quality" in name]) == 2
    report = CliRunner().invoke(main, ["report", str(run), "--json"])
    assert report.exit_code == 0, report.stderr
    assert json.loads(report.stdout)["missing"]
    result = sweep(finished["specification"], "--out", run)
    assert result.exit_code == 0, result.stderr
    after = record_times(run)
    assert {name: after[name] for name in kept} == kept
    assert len(after) > len(kept)
    document = json.loads(result.stdout)
    assert document["computed"] == len(after) - len(kept)
    assert_same_points(document["points"], finished["points"])
    assert not document["missing"]


def test_an_interrupt_says_what_is_kept(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = Evaluator.perplexity

    def interrupted(self: Evaluator) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Evaluator, "perplexity", interrupted)
    result = sweep(finished["specification"], "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stdout == ""
    kept = len(record_times(tmp_path / "run"))
    assert kept
    assert f"the {kept} finished records" in result.stderr


def test_a_failing_format_is_recorded_and_the_sweep_goes_on(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from termwise.flow import quality

    whole = quality.quantize

    def failing(weights: Any, format: Any, **extra: Any) -> Any:
        if format.name == "int-w4g16":
            raise ArithmeticError("no\nluck")
        return whole(weights, format, **extra)

    monkeypatch.setattr(quality, "quantize", failing)
    run = tmp_path / "run"
    result = sweep(finished["specification"], "--out", run)
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert {entry["format"] for entry in document["failed"]} == {"int-w4g16"}
    assert {entry["reason"] for entry in document["failed"]} == {"ArithmeticError: no luck"}
    assert "failed" in result.stderr
    others = [point for point in finished["points"] if point["format"] != "int-w4g16"]
    keys = ("format", "accelerator", "phase")
    assert [[point[key] for key in keys] for point in document["points"]] == [
        [point[key] for key in keys] for point in others
    ]
    monkeypatch.setattr(quality, "quantize", whole)
    again = sweep(finished["specification"], "--out", run)
    assert again.exit_code == 0
    assert_same_points(json.loads(again.stdout)["points"], finished["points"])


def test_a_model_that_cannot_be_run_is_judged_by_its_weights(tmp_path: Path, small_model: Path) -> None:
    folder = tmp_path / "matrices"
    folder.mkdir()
    shutil.copy(small_model / "model.safetensors", folder)
    result = sweep(write_specification(tmp_path, folder), "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert {point["perplexity"] for point in document["points"]} == {None}
    assert all("config.json" in point["perplexity_reason"] for point in document["points"])
    assert document["models"][0]["accuracy"] == "sqnr_db"
    for point in document["points"]:
        rivals = [other for other in document["points"] if other["phase"] == point["phase"]]
        dominated = any(
            other["sqnr_db"] >= point["sqnr_db"]
            and all(other[key] <= point[key] for key in ("latency_ms", "energy_uj"))
            and any(other[key] != point[key] for key in ("sqnr_db", "latency_ms", "energy_uj"))
            for other in rivals
        )
        assert point["pareto"] is not dominated
    assert "signal to quantization noise" in Path(document["report"]).read_text(encoding="utf-8")


def test_a_known_shape_needs_no_weights(tmp_path: Path) -> None:
    path = write_specification(tmp_path, "opt-125m", formats=["fp16", "int-w4g128"], phases=["decode"])
    result = sweep(path, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["text"] is None
    for point in document["points"]:
        expected = simulate(
            known_shape("opt-125m"),
            get_accelerator(point["accelerator"]),
            phase="decode",
            weights=get_format(point["format"]),
            context=8,
        )
        assert (point["perplexity"], point["sqnr_db"], point["latency_cycles"]) == (None, None, expected.cycles)


def test_without_a_specification_it_is_the_quickstart(tmp_path: Path) -> None:
    document = json.loads(sweep("--model", "opt-125m", "--out", tmp_path / "run").stdout)
    quickstart = tomllib.loads((REPOSITORY / "sweeps" / "quickstart.toml").read_text(encoding="utf-8"))
    points = document["points"]
    assert document["specification"]["formats"] == quickstart["formats"]
    assert document["command"].startswith("termwise sweep --model opt-125m")
    assert {point["accelerator"] for point in points} == set(quickstart["accelerators"])
    for accelerator in quickstart["accelerators"]:
        for phase in quickstart["phases"]:
            taken = [p for p in points if (p["accelerator"], p["phase"]) == (accelerator, phase)]
            assert len(taken) >= 6, f"{accelerator} takes fewer than six formats"


def test_the_default_folder_carries_the_model(
    tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_specification(tmp_path, "tiny", formats=["int-w4g16"], accelerators=["bitmod-lossy"])
    result = sweep(path, "--model", small_model, "--text", small_text)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["run"] == "runs/spec-small"
    assert (tmp_path / "runs" / "spec-small" / "index.html").is_file()


def nan_model(small_model: Path, folder: Path) -> Path:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(small_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["nan", "truncated", "no weights", "no such model", "text", "empty text"])
def test_bad_models_and_texts_write_nothing(tmp_path: Path, small_model: Path, small_text: Path, kind: str) -> None:
    folder = tmp_path / "model"
    text = small_text
    if kind == "nan":
        nan_model(small_model, folder)
    elif kind == "truncated":
        shutil.copytree(small_model, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        folder.mkdir()
    elif kind == "text":
        folder, text = small_model, tmp_path / "none.txt"
    elif kind == "empty text":
        folder, text = small_model, tmp_path / "empty.txt"
        text.write_text("  \n")
    path = write_specification(tmp_path, folder, text=str(text))
    result = sweep(path, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("termwise: error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "strange folder"])
def test_a_run_folder_that_cannot_be_one_is_left_alone(finished: dict[str, Any], tmp_path: Path, kind: str) -> None:
    out = tmp_path / "run"
    if kind == "strange folder":
        out.mkdir()
        (out / "index.html").write_text("mine")
    else:
        out.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = sweep(finished["specification"], "--out", out / "below" if kind == "below a file" else out)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(out) in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_full_disk_is_one_sentence_and_no_half_file(finished: dict[str, Any], tmp_path: Path) -> None:
    # No file may grow beyond 1,000 bytes, as if the disk were full: the first record does not fit.
    program = (
        "import resource, sys\n"
        "from termwise.flow.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"main(['sweep', {str(finished['specification'])!r}, '--out', {str(tmp_path / 'run')!r}, '--json'])\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    sentences = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(sentences) == 1
    assert str(tmp_path / "run") in sentences[0]
    assert "Traceback" not in done.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or json.loads(path.read_text())
