"""The one command for a machine with a GPU, rehearsed on the CPU, and its report of times that are made up here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from termwise.gpu_ref import benchmark, build, checks
from termwise.gpu_ref.benchmark import BASELINE, Timing, against_baseline
from termwise.gpu_ref.run import draw_roofline, main, report, sanitize


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "results"
    result = CliRunner().invoke(main, ["--rehearse", "--out", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((folder / "results.json").read_text())
    return folder


@pytest.mark.slow
def test_a_rehearsal_checks_every_kernel_and_writes_golden_vectors(rehearsal: Path) -> None:
    document = json.loads((rehearsal / "results.json").read_text())
    assert {check["name"].partition("-")[0] for check in document["checks"]} == {*build.STEMS}
    assert all(check["wrong"] == 0 and check["cases"] > 0 for check in document["checks"])
    assert document["timings"] == []
    assert document["benchmarks_skipped"]
    assert len(document["golden"]) == 2 * len(checks.EXACT_PAIRS)
    for name in document["golden"]:
        with safe_open(rehearsal / name, "numpy") as file:
            assert file.metadata()["device"] == "the kernels' twins on the CPU"
            assert "results" in file.keys()  # noqa: SIM118
    assert "0 of " in (rehearsal / "report.md").read_text()


def test_a_wrong_number_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = checks.run_exact

    def with_a_flipped_bit(*arguments: object) -> object:
        found, packed = computed(*arguments)  # type: ignore[arg-type]
        found.view("u4")[0, 0] ^= 1
        return found, packed

    monkeypatch.setattr(checks, "run_exact", with_a_flipped_bit)
    monkeypatch.setattr(checks, "EXACT_PAIRS", checks.EXACT_PAIRS[:1])
    (check,) = checks.exact_checks(torch.device("cpu"), outputs=2, tokens=1, keep=lambda _: None)
    assert (check.wrong, check.cases) == (3, 6)


def test_a_folder_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    result = CliRunner().invoke(main, ["--rehearse", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "expected a new or empty directory" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "finds no GPU" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_sanitizer_that_is_missing_is_skipped_and_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert sanitize("memcheck")["status"] == "skipped"


def test_every_kernel_of_the_benchmark_is_called_and_a_refusal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with a clock that is made up: what is measured on a GPU is the same calls."""

    def called(calls: list[Callable[[], torch.Tensor]]) -> tuple[float, float]:
        for call in calls:
            assert call().shape[1] == 256
        return 2.0, 0.0

    monkeypatch.setattr(benchmark, "_time", called)
    monkeypatch.setattr(benchmark, "_rotated", lambda *_: 2)
    monkeypatch.setattr(benchmark, "SHAPES", ((256, 384),))
    monkeypatch.setattr(benchmark, "FORMATS", (*benchmark.FORMATS, "nf4-w4g64"))
    found = benchmark.benchmark(torch.device("cpu"), 1e9, lambda _: None)
    timed = {entry.kernel for entry in found if entry.error is None}
    assert timed >= {BASELINE, "bitmod-w4g128", "bitmod-w3g128", "bitmod-w6g128", "olive-w4", "ant-w4g128"}
    (refusal, *_) = [entry.error for entry in found if entry.kernel == "nf4-w4g64"]
    assert refusal is not None
    assert "more than three significant bits" in refusal
    fast = next(entry for entry in found if entry.kernel == "bitmod-w4g128" and entry.tokens == 1)
    # 4 bits of a code, 16 of 128 weights for scale and type, a channel's scale, the tables.
    assert fast.weight_bytes == 256 * 384 // 2 + 256 * 3 * 2 + 256 * 4 + 64


def test_ratios_are_to_the_baseline_of_the_same_shape() -> None:
    timings = [
        Timing(BASELINE, 64, 128, 1, microseconds=6.0),
        Timing(BASELINE, 64, 128, 16, error="no"),
        Timing("bitmod-w4g128", 64, 128, 1, microseconds=2.0),
        Timing("bitmod-w4g128", 64, 128, 16, microseconds=2.0),
        Timing("bitmod-w4g128", 64, 256, 1, microseconds=2.0),
        Timing("torch int4", 64, 128, 1, error="no such kernel"),
    ]
    assert [entry.against_fp16 for entry in against_baseline(timings)] == [1.0, None, 3.0, None, None, None]


def test_the_report_of_times_tells_errors_from_times(tmp_path: Path) -> None:
    timing = {"kernel": "bitmod-w4g128", "outputs": 64, "inputs": 128, "tokens": 1, "microseconds": 2.0, "spread": 0.1}
    timing |= {"weight_bytes": 4224, "bytes_per_second": 2.0e9, "share_of_peak": 0.5, "against_fp16": 3.25}
    failed = dict.fromkeys(timing) | {"kernel": "torch int4", "outputs": 64, "inputs": 128, "tokens": 1}
    document = {
        "environment": {"device": "a device"},
        "checks": [],
        "sanitizers": [{"tool": "memcheck", "status": "passed", "reason": ""}],
        "benchmarks_skipped": None,
        "bandwidth_bytes_per_second": 4e9,
        "timings": [timing | {"error": None}, failed | {"error": "no such kernel"}],
        "exact_seconds": {"device": 0.5, "twin": 50.0},
    }
    text = report(document)
    assert "| bitmod-w4g128 | 64 | 128 | 1 | 2.0 | 10.0 | 0.00 | 50 | 3.25 |" in text
    assert "| torch int4 | 64 | 128 | 1 | no such kernel |" in text
    assert "100 times" in text
    draw_roofline(document, tmp_path)
    assert (tmp_path / "roofline.png").stat().st_size > 5000
