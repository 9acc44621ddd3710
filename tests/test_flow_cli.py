"""The command line: what it prints, its exit statuses, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from termwise.algorithms.datatypes import datatypes
from termwise.algorithms.formats import format_names, get_format
from termwise.algorithms.models import open_model
from termwise.algorithms.perplexity import perplexity
from termwise.algorithms.quantize import quantization_error, quantize
from termwise.algorithms.shapes import known_shape
from termwise.algorithms.text import read_text
from termwise.flow import cli
from termwise.flow.cli import main
from termwise.sim.accelerators import get_accelerator
from termwise.sim.published import simulate_published
from termwise.sim.simulate import simulate


def run(*arguments: Path | str) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def document_of(result: Result) -> Any:
    """Standard output as one strict JSON document."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} in the document"))


def assert_bad_input(result: Result, *said: str) -> None:
    """Exit status 2, nothing on standard output, one sentence that holds every part of ``said``."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("termwise: error: ")
    assert all(part in lines[0] for part in said), lines[0]


def test_formats_lists_every_datatype_and_format() -> None:
    document = document_of(run("formats", "--json"))
    assert [entry["name"] for entry in document["datatypes"]] == list(datatypes())
    assert [entry["name"] for entry in document["formats"]] == list(format_names())
    for entry in document["formats"]:
        assert entry["bits_per_weight"] == get_format(entry["name"]).bits_per_weight(4096, 4096)
    text = run("formats").stdout
    assert all(name in text for name in (*datatypes(), *format_names()))


@pytest.mark.parametrize("name", ["int-w4g32", "bitmod-w3g16", "olive-w4", "fp16"])
def test_quantize_reports_layers_and_both_perplexities(small_model: Path, small_text: Path, name: str) -> None:
    document = document_of(run("quantize", small_model, "--format", name, "--text", small_text, "--json"))
    model, text, format = open_model(small_model), read_text(small_text), get_format(name)
    assert (document["model"], document["format"]) == ("small", name)
    assert document["text"] == {"name": "words.txt", "digest": text.digest}
    assert [layer["name"] for layer in document["layers"]] == list(model.matrix_names)
    for layer, (_, weights) in zip(document["layers"], model.matrices(), strict=True):
        tensor = quantize(weights, format)
        error = quantization_error(weights, tensor)
        assert layer["shape"] == list(weights.shape)
        assert (layer["sqnr_db"], layer["mse"]) == (error.sqnr_db, error.mse)
        assert layer["bits_per_weight"] == tensor.bits_per_weight
        assert layer["short_group"] == tensor.short_group
        assert bool(layer["note"]) is bool(tensor.short_group)
    # the order of float32 sums depends on where arrays lie
    before, after = document["perplexity"]["before"], document["perplexity"]["after"]
    assert before == pytest.approx(perplexity(model, text).per_token, rel=1e-5)
    expected = perplexity(model, text, replace=lambda _, weights: quantize(weights, format).dequantize())
    assert after == pytest.approx(expected.per_token, rel=1e-5)


def test_a_short_last_group_is_said(small_model: Path, small_text: Path) -> None:
    output = run("quantize", small_model, "--format", "int-w4g32", "--text", small_text).stdout
    assert "last group of every row has 16 of 32 weights" in output
    assert "perplexity per token on words.txt" in output
    assert "bits per weight" in output


def test_an_exact_format_has_no_infinite_number(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a.weight": np.ones((4, 8), dtype=np.float16)}, tmp_path / "model.safetensors")
    document = document_of(run("quantize", tmp_path, "--format", "fp16", "--json"))
    assert document["sqnr_db"] is None
    assert document["layers"][0]["sqnr_db"] is None
    assert document["mse"] == 0
    assert document["perplexity"] is None
    assert "config.json" in document["perplexity_reason"]
    assert "exact" in run("quantize", tmp_path, "--format", "fp16").stdout


def test_quantize_writes_a_packed_model_or_nothing(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    out = tmp_path / "packed"
    command = ["quantize", small_model, "--format", "bitmod-w4g16", "--text", small_text, "--out", out]
    document_of(run(*command, "--json"))
    assert (out / "model.safetensors").is_file()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert_bad_input(run(*command), str(out), "expected a new or empty directory")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("accelerator", ["fp16", "olive", "bitmod-lossy@16x16"])
def test_simulate_says_what_the_simulator_says(accelerator: str, phase: Any) -> None:
    arguments = ["simulate", "opt-125m", "--accelerator", accelerator, "--phase", phase, "--context", "32"]
    expected = simulate(known_shape("opt-125m"), get_accelerator(accelerator), phase=phase, context=32)
    assert document_of(run(*arguments, "--json")) == json.loads(json.dumps(expected.to_dict()))
    text = run(*arguments).stdout
    assert f"{expected.cycles:,} cycles" in text
    assert all(layer.name in text for layer in expected.layers)
    assert all(note in text for note in expected.notes)


def test_simulate_gives_the_published_model() -> None:
    document = document_of(
        run(
            "simulate",
            "yi-6b",
            "--accelerator",
            "bitmod-lossy",
            "--model-of",
            "published",
            "--phase",
            "decode",
            "--json",
        )
    )
    expected = simulate_published(known_shape("yi-6b"), get_accelerator("bitmod-lossy"), phase="decode")
    assert document == json.loads(json.dumps(expected.to_dict()))
    assert document["cycles"] == expected.cycles


def test_simulate_takes_a_model_on_disk(small_model: Path) -> None:
    document = document_of(
        run("simulate", small_model, "--accelerator", "ant", "--format", "int-w4g16", "--batch", "2", "--json")
    )
    assert (document["model"], document["format"], document["batch"]) == ("small", "int-w4g16", 2)


def test_doctor_names_every_required_package() -> None:
    document = document_of(run("doctor", "--json"))
    names = {finding["name"] for finding in document["findings"]}
    assert {"torch", "numba", "click", "g++", "GPU"} <= names
    assert document["complete"]


def test_doctor_exits_with_3_where_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from termwise.flow import doctor

    whole = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda name: None if name == "tqdm" else whole(name))
    result = run("doctor", "--json")
    assert result.exit_code == 3
    assert not json.loads(result.stdout)["complete"]
    assert "tqdm" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "MODEL", "--format", "int-w4g12x"], ["unknown format 'int-w4g12x'", "did you mean"]),
        (["quantize", "MODEL", "--format", "bitmod-w5g128"], ["no 5-bit weights", "3, 4"]),
        (["quantize", "MODEL", "--format", "olive-w4g3"], ["must be even"]),
        (["quantize", "no-such-model", "--format", "fp16"], ["unknown model 'no-such-model'"]),
        (["quantize", "opt-1.3b", "--format", "fp16"], ["no weights"]),
        (["quantize", "MODEL", "--format", "fp16", "--text", "none.txt"], ["none.txt", "No such file"]),
        (["quantize", "MODEL"], ["Missing option '--format'"]),
        (["simulate", "opt-1.3b", "--accelerator", "oliv"], ["unknown accelerator 'oliv'", "did you mean 'olive'"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant@0x4"], ["ROWSxCOLUMNS"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--format", "fp16"], ["needs another decoder"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--phase", "decod"], ["did you mean 'decode'"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--context", "0"], ["context is 0"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--batch", "two"], ["'two' is not a valid integer"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--model-of", "cycles"], ["did you mean 'cycle'"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--model-of", "published", "--batch", "2"], ["batch"]),
        (["simulate", "opt1.3b", "--accelerator", "ant"], ["did you mean 'opt-1.3b'"]),
        (["report", "no-such-run"], ["no-such-run", "folder of a run"]),
        (["sweep", "none.toml"], ["none.toml"]),
        (["sweep", "none.toml", "--workers", "0"], ["--workers"]),
        (["no-such-command"], ["No such command 'no-such-command'"]),
        (["formats", "--no-such-option"], ["No such option"]),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: list[str], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(small_model) if argument == "MODEL" else argument for argument in arguments]
    assert_bad_input(run(*given), *said)
    if arguments[0] in ("quantize", "simulate", "sweep", "report"):
        assert_bad_input(run(*given, "--json"), *said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["empty", "truncated", "nan", "not json"])
def test_bad_models_are_one_sentence_and_write_nothing(
    kind: str, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    weights = folder / "model.safetensors"
    if kind == "empty":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "not json":
        (folder / "config.json").write_text("{")
    else:
        tensors = load_file(weights)
        tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] = np.inf
        save_file(tensors, weights)
    out = tmp_path / "out"
    result = run("quantize", folder, "--format", "int-w4g16", "--text", small_text, "--out", out, "--json")
    result.stderr_bytes = b"\n".join(
        line for line in (result.stderr_bytes or b"").splitlines() if b"perplexity of" not in line
    )
    assert_bad_input(result, str(folder) if kind != "nan" else "k_proj")
    assert not out.exists()


def test_the_operating_systems_refusal_names_the_path(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    result = run("quantize", small_model, "--format", "fp16", "--text", small_text, "--out", file / "below")
    assert result.exit_code == 2
    assert str(file) in result.stderr
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(28, "No space left on device", "/somewhere/x"), 2, "/somewhere/x: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines"),
    ],
)
def test_no_failure_shows_a_traceback(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **extra: Any) -> None:
        raise error

    monkeypatch.setattr(cli.console, "print_json", failing)
    result = run("formats", "--json")
    assert result.exit_code == status
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("termwise: ")
    assert said in lines[0]


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "termwise.flow.cli", "formats"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == cli.PIPE_CLOSED


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from termwise.flow.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    print(sorted({'torch', 'transformers', 'numba', 'plotly', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
