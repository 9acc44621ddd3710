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
from termwise.sim.published import PUBLISHED_STATES, simulate_published
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
        assert entry["source"]
        if entry["family"] == "gobo":
            assert entry["bits_per_weight"] is None
        else:
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
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {"report.md", "layers.png", "layers.svg", "quantization.json"} <= {path.name for path in before}
    assert_bad_input(run(*command), str(out), "expected a new or empty directory")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_interrupted_quantization_goes_on(
    tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from termwise.algorithms import packed_model
    from termwise.flow import quality

    command = ["quantize", small_model, "--format", "bitmod-w4g16", "--text", small_text, "--no-score", "--out"]
    document_of(run(*command, tmp_path / "whole", "--json"))
    made: list[str] = []
    whole = quality.quantize

    def interrupted(weights: Any, format: Any, *, name: str) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(name)
        return whole(weights, format, name=name)

    monkeypatch.setattr(quality, "quantize", interrupted)
    assert run(*command, tmp_path / "packed").exit_code == 130
    assert not (tmp_path / "packed").exists()
    monkeypatch.setattr(
        quality, "quantize", lambda *given, **named: (made.append(named["name"]), whole(*given, **named))[1]
    )
    document = document_of(run(*command, tmp_path / "packed", "--json"))
    assert made == list(open_model(small_model).matrix_names)  # each once
    assert [layer["name"] for layer in document["layers"]] == made
    one, other = (packed_model.read_packed(tmp_path / folder) for folder in ("whole", "packed"))
    for name in made:
        for part, values in one[name].parts.items():
            np.testing.assert_array_equal(other[name].parts[part], values)


def test_an_interrupted_calibration_ends_in_the_same_report(
    tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from termwise.algorithms.packed_model import PackedModelWriter

    text = tmp_path / "long.txt"
    text.write_text(" ".join([small_text.read_text().replace("\n", " ")] * 8))
    command = ["quantize", small_model, "--format", "int-w4g16", "--calibrate", "gptq", "--no-score"]
    command += ["--calibration-text", text, "--json", "--out"]
    whole = document_of(run(*command, tmp_path / "whole"))
    added: list[str] = []
    add = PackedModelWriter.add

    def interrupted(writer: Any, name: str, *rest: Any) -> None:
        if len(added) == 4:
            raise KeyboardInterrupt
        add(writer, name, *rest)
        added.append(name)

    with monkeypatch.context() as patched:
        patched.setattr(PackedModelWriter, "add", interrupted)
        assert run(*command, tmp_path / "packed").exit_code == 130
    resumed = document_of(run(*command, tmp_path / "packed"))
    places = ("out", "report")
    assert {key: value for key, value in resumed.items() if key not in places} == {
        key: value for key, value in whole.items() if key not in places
    }
    assert any(layer["output_error"] for layer in resumed["layers"][:4])
    for file in ("model.safetensors", "quantization-report/report.md"):
        assert (tmp_path / "packed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_calibration_activations_and_the_cache_are_measured(
    tmp_path: Path, small_model: Path, small_text: Path
) -> None:
    long_text = tmp_path / "long.txt"
    long_text.write_text(small_text.read_text() * 40)
    command = ["quantize", small_model, "--text", small_text, "--calibration-text", long_text, "--json"]
    plain = document_of(run(*command, "--format", "int-w4g16"))
    calibrated = document_of(run(*command, "--format", "int-w4g16", "--calibrate", "gptq"))
    assert all(layer["output_error"] > 0 for layer in (*plain["layers"], *calibrated["layers"]))
    assert plain["calibration"] == "none"
    assert calibrated["calibration"] == "gptq"
    activations = document_of(run(*command, "--format", "int-w4a4g16"))
    assert activations["sqnr_db"] == plain["sqnr_db"]
    static = document_of(run(*command, "--format", "olive-w4a4"))
    cached = document_of(run(*command, "--format", "int-w4g16", "--kv-cache", "int-asym-w2g8"))
    after = {document["perplexity"]["after"] for document in (plain, calibrated, activations, static, cached)}
    assert len(after) == 5
    assert set(static["histogram"]) == {"normal-normal", "outlier-normal", "outlier-outlier"}
    assert sum(static["histogram"].values()) == pytest.approx(1)


def test_a_choice_of_formats_is_made_written_and_used(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    words = small_text.read_text().split()
    other = tmp_path / "other.txt"
    other.write_text(" ".join(words[::-1]) * 20)
    command = [
        "mix",
        small_model,
        "--bits",
        "5",
        "--format",
        "int-w3g16",
        "--format",
        "int-w8g16",
        "--generations",
        "1",
    ]
    command += ["--calibration-text", other, "--text", small_text, "--out", tmp_path / "mixed.toml"]
    chosen = document_of(run(*command, "--report", tmp_path / "report", "--json"))
    assert chosen["bits_per_weight"] <= 5
    assert (tmp_path / "report" / "report.md").is_file()
    command = ["quantize", small_model, "--formats", tmp_path / "mixed.toml", "--text", small_text, "--json"]
    document = document_of(run(*command))
    assert document["bits_per_weight"] == pytest.approx(chosen["bits_per_weight"])
    assert {layer["format"] for layer in document["layers"]} == {"int-w3g16", "int-w8g16"}


def test_special_values_are_listed_beside_the_papers(small_model: Path) -> None:
    document = document_of(
        run("special-values", small_model, "--bits", "3", "--group", "16", "--largest", "4", "--json")
    )
    assert document["paper"]["values"] == [3, -3, 6, -6]
    assert [len(table["values"]) for table in document["tables"]] == [1, 2, 3, 4]
    assert document["tables"][3]["relative_error"] <= document["paper"]["relative_error"]
    assert "the paper's: bitmod-w3g16" in run("special-values", small_model, "--bits", "3", "--group", "16").stdout


def test_a_packed_model_is_exported(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    command = ["quantize", small_model, "--format", "int-w4g16", "--text", small_text, "--no-score"]
    document_of(run(*command, "--out", tmp_path / "packed", "--json"))
    command = ["export", tmp_path / "packed", "--model", small_model]
    document_of(run(*command, "--to", "compressed-tensors", "--out", tmp_path / "exported", "--json"))
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert_bad_input(run(*command, "--to", "gguf", "--out", tmp_path / "x.gguf"), "int-w4g16", "GGUF")
    assert not (tmp_path / "x.gguf").exists()


def test_a_type_of_ones_own_is_a_format(
    tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERMWISE_DATATYPES", "")
    file = tmp_path / "mine.toml"
    file.write_text("[datatype.cubes]\nbits = 3\nlevels = [0, 1, 8, 27, -1, -8, -27]\n")
    command = ["--datatypes", file, "quantize", small_model, "--format", "cubes-w3g16", "--text", small_text]
    assert document_of(run(*command, "--json"))["format"] == "cubes-w3g16"
    file.write_text("[datatype.cubes]\nbits = 3\nlevels = [1, 8]\n")
    assert_bad_input(run(*command), str(file), "'cubes': no level is 0")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("accelerator", ["fp16", "olive", "bitmod-lossy@16x16"])
def test_simulate_says_what_the_simulator_says(accelerator: str, phase: Any) -> None:
    arguments = ["simulate", "opt-125m", "--accelerator", accelerator, "--phase", phase, "--context", "32"]
    expected = simulate(known_shape("opt-125m"), get_accelerator(accelerator), phase=phase, context=32)
    document = document_of(run(*arguments, "--json"))
    said = json.loads(json.dumps(expected.to_dict()))
    assert {key: document[key] for key in said} == {**said, "notes": document["notes"]}
    assert document["notes"][: len(expected.notes)] == list(expected.notes)
    text = run(*arguments).stdout
    assert f"{expected.cycles:,} cycles" in text
    assert all(kind["name"] in text for kind in document["layer_kinds"])
    assert all(note in text for note in document["notes"])


@pytest.mark.parametrize("state", PUBLISHED_STATES)
def test_simulate_gives_the_published_model(state: str) -> None:
    document = document_of(
        run(
            "simulate",
            "yi-6b",
            "--accelerator",
            "bitmod-lossy",
            "--model-of",
            state,
            "--phase",
            "decode",
            "--json",
        )
    )
    expected = simulate_published(
        known_shape("yi-6b"), get_accelerator("bitmod-lossy"), phase="decode", state=PUBLISHED_STATES[state]
    )
    assert document == json.loads(json.dumps(expected.to_dict()))
    assert (document["model_of"], document["cycles"], document["latency_ms"]) == (
        state,
        expected.cycles,
        expected.latency_ms,
    )
    assert set(document["energy_uj"]) == {"pe", "sram_read", "sram_write", "dram", "total"}
    text = run("simulate", "yi-6b", "--accelerator", "bitmod-lossy", "--model-of", state, "--phase", "decode").stdout
    assert f"the closed form {state}" in text
    assert f"{expected.cycles:,} cycles" in text
    assert "buffer reads" in text


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
        (["quantize", "MODEL"], ["one of --format FORMAT and --formats FILE"]),
        (["quantize", "MODEL", "--format", "fp16", "--formats", "x.toml"], ["one of --format"]),
        (["quantize", "MODEL", "--formats", "x.toml"], ["x.toml", "No such file"]),
        (["quantize", "MODEL", "--format", "int-w4:axis=up"], ["axis=up: expected one of input, output"]),
        (["quantize", "MODEL", "--format", "int-w4", "--compat", "authors-fp16"], ["compat=authors-fp16"]),
        (["quantize", "MODEL", "--format", "int-w4", "--calibrate", "gptq"], ["expected --calibration-text FILE"]),
        (["quantize", "MODEL", "--format", "int-w4", "--calibrate", "gptx"], ["did you mean 'gptq'"]),
        (["quantize", "MODEL", "--format", "int-w4", "--kv-cache", "nope"], ["unknown format 'nope'"]),
        (
            ["quantize", "MODEL", "--format", "int-w4", "--kv-cache", "int-w4", "--no-score"],
            ["--kv-cache", "--no-score"],
        ),
        (["quantize", "MODEL", "--format", "olive-w4a4"], ["olive-w4a4", "expected a calibration text"]),
        (["mix", "MODEL", "--bits", "4"], ["expected --calibration-text FILE"]),
        (["special-values", "MODEL", "--bits", "5"], ["expected 3 or 4 bits"]),
        (["export", "none", "--model", "MODEL", "--to", "gguf", "--out", "x"], ["none"]),
        (["export", "none", "--model", "MODEL", "--to", "gguf", "--out", "x", "--exact-scales"], ["--exact-scales"]),
        (["export", "none", "--model", "MODEL", "--to", "onnx", "--out", "x"], ["unknown layout 'onnx'"]),
        (["--datatypes", "none.toml", "formats"], ["cannot read none.toml"]),
        (["simulate", "opt-1.3b", "--accelerator", "oliv"], ["unknown accelerator 'oliv'", "did you mean 'olive'"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant@0x4"], ["ROWSxCOLUMNS"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--format", "fp16"], ["needs another decoder"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--phase", "decod"], ["did you mean 'decode'"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--phase", "generate"], ["did you mean 'generation'"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--output-tokens", "4"], ["--phase generation"]),
        (["simulate", "opt-125m", "--accelerator", "ant", "--vector-lanes", "0"], ["vector lanes is 0"]),
        (["simulate", "opt-125m", "--accelerator", "ant", "--memory", "hbm2"], ["unknown memory", "mean 'hbm2e'"]),
        (["simulate", "opt-125m", "--accelerator", "ant", "--energy-set", "bitmod"], ["mean 'bitmod-2024'"]),
        (
            ["simulate", "opt-125m", "--accelerator", "ant", "--phase", "generation", "--output-tokens", "0"],
            ["output tokens is 0"],
        ),
        (
            ["simulate", "opt-1.3b", "--accelerator", "ant", "--model-of", "published", "--out", "x"],
            ["--out x", "published"],
        ),
        (
            ["simulate", "opt-1.3b", "--accelerator", "ant", "--model-of", "published", "--phase", "generation"],
            ["--phase generation", "published"],
        ),
        (["simulate", "opt-125m", "--accelerator", "ant", "--out", "MODEL"], ["exists already"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--context", "0"], ["context is 0"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--batch", "two"], ["'two' is not a valid integer"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--model-of", "cycles"], ["did you mean 'cycle'"]),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--model-of", "published", "--batch", "2"], ["batch"]),
        (
            ["simulate", "mistral-7b", "--accelerator", "olive", "--model-of", "published-2025"],
            ["olive", "mistral-7b", "prefill", "llama-2-7b"],
        ),
        (["simulate", "opt-1.3b", "--accelerator", "ant", "--model-of", "publish"], ["publish", "published-2025"]),
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
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "no-such-model", "--format", "int-w4", "--report", "file"],
        ["quantize", "no-such-model", "--format", "int-w4", "--out", "file/x"],
        ["mix", "no-such-model", "--bits", "4", "--report", "file"],
        ["mix", "no-such-model", "--bits", "4", "--out", "file/x.toml"],
        ["mix", "no-such-model", "--bits", "4", "--out", "folder.toml"],
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_opened(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.toml").mkdir()
    assert_bad_input(run(*arguments), f"cannot write {arguments[-1]}")


def test_no_command_shows_the_help_as_it_is_laid_out() -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) > 10
    assert any(line.strip().startswith("quantize ") for line in result.stderr.splitlines())


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
