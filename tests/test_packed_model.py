"""Packed models on disk: what is read is what was written, everything else stands as it was, and nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from termwise.algorithms import datatypes
from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import format_names, get_format
from termwise.algorithms.models import Model, open_model
from termwise.algorithms.packed_model import PackedModelWriter, open_packed, read_packed
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.algorithms.user_datatypes import datatype_from

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def write(model: Model, formats: Any, directory: Path, **options: Any) -> dict[str, QuantizedTensor]:
    """Quantize and write; what was written, by layer."""
    written = {}
    with PackedModelWriter(model, formats, directory, **options) as writer:
        for name, matrix in model.matrices():
            format = formats.get(name) if isinstance(formats, Mapping) else formats
            if format is not None:
                written[name] = quantize(matrix, format)
                writer.add(name, written[name])
        writer.finish()
    return written


def matrices(directory: Path, *names: str, shape: tuple[int, int] = (6, 40)) -> Model:
    """A set of random FP16 matrices ``<name>.weight``."""
    random = np.random.default_rng(1)
    directory.mkdir(exist_ok=True)
    weights = {f"{name}.weight": (random.standard_normal(shape) * 0.1).astype(np.float16) for name in names}
    save_file(weights, directory / "x.safetensors")
    return open_model(directory)


def assert_equal(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert (found.format, found.shape) == (expected.format, expected.shape)
    assert found.parts.keys() == expected.parts.keys()
    for part, values in expected.parts.items():
        assert found.parts[part].dtype == values.dtype
        np.testing.assert_array_equal(found.parts[part], values)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("tied", [False, True])
def test_reading_inverts_writing(tmp_path: Path, save_small_llama: Callable[..., Path], tied: bool) -> None:
    model = open_model(save_small_llama(tmp_path / "model", context=16, tied=tied))
    tensors = write(model, get_format("bitmod-w3g16"), tmp_path / "packed")
    found = read_packed(tmp_path / "packed")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert_equal(found[name], tensor)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(values.nbytes for key, values in stored.items() if ".weight." in key) == sum(
        tensor.nbytes for tensor in tensors.values()
    )
    original = load_file(tmp_path / "model" / "model.safetensors")
    kept = {key for key in original if "norm" in key or "embed" in key}
    assert {key for key in stored if ".weight." not in key} == kept
    for key in kept:
        np.testing.assert_array_equal(stored[key], original[key])
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config.pop("quantization_config")["layers"]["model.layers.0.mlp.up_proj"] == {
        "format": "bitmod-w3g16",
        "shape": [48, 32],
    }
    assert config == json.loads((tmp_path / "model" / "config.json").read_text())
    assert (tmp_path / "packed" / "tokenizer.json").read_bytes() == (tmp_path / "model/tokenizer.json").read_bytes()
    assert not (tmp_path / "packed.partial").exists()


def test_every_format_is_read_as_it_was_written(tmp_path: Path) -> None:
    names = [*format_names(), "int-w4g16:axis=output", "bitmod-w4g16:special=5,-5,8", "int-w8a8g16"]
    model = matrices(tmp_path / "model", *(f"layer{number}" for number in range(len(names))))
    formats = {f"layer{number}": get_format(name) for number, name in enumerate(names)}
    tensors = write(model, formats, tmp_path / "packed")
    found = open_packed(tmp_path / "packed")
    assert [format.name for format in found.formats.values()] == names
    for name, tensor in tensors.items():
        assert_equal(found[name], tensor)
        np.testing.assert_array_equal(found[name].dequantize(), tensor.dequantize())


def test_input_scales_and_settings_come_back(tmp_path: Path) -> None:
    model = matrices(tmp_path / "model", "a")
    scales = np.linspace(0.5, 2, 40, dtype=np.float32)
    tensor = quantize(model.matrix("a"), "int-w4g8").with_input_scales(scales)
    with PackedModelWriter(model, {"a": tensor.format}, tmp_path / "packed", {"method": "awq"}) as writer:
        writer.add("a", tensor)
        writer.finish()
    found = open_packed(tmp_path / "packed")
    assert_equal(found["a"], tensor)
    assert found.settings == {"method": "awq"}


def test_a_data_type_of_the_user_is_read_where_it_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = {"bits": 3, "levels": [0, 1, 2.5, "minus zero", -1, -2.5, "unused", "unused"], "source": "mine"}
    monkeypatch.setattr(datatypes, "_added", {})
    datatypes.add_datatype(datatype_from("own3", definition, "here"))
    model = matrices(tmp_path / "model", "a")
    tensors = write(model, get_format("own3-w3g8"), tmp_path / "packed")
    expected = tensors["a"].dequantize()
    monkeypatch.setattr(datatypes, "_added", {})
    found = open_packed(tmp_path / "packed")
    assert found.datatypes == {"own3": definition}
    np.testing.assert_array_equal(found["a"].dequantize(), expected)
    other = {**definition, "levels": [0, 1, -1]}
    monkeypatch.setattr(datatypes, "_added", {"own3": datatype_from("own3", other, "here")})
    with pytest.raises(InputError, match="own3 is defined already, with other levels"):
        open_packed(tmp_path / "packed")


def test_layers_without_a_format_and_other_dtypes_are_kept_bit_for_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    original: dict[str, NDArray[Any]] = {
        "a.weight": random.standard_normal((4, 8)).astype(np.float16),
        "b.weight": random.standard_normal((4, 8)).astype(ml_dtypes.bfloat16),
        "norm": random.standard_normal(5).astype(ml_dtypes.bfloat16),
        "mask": np.array([[True], [False], [True]]),
        "steps": np.array(7, dtype=np.int64),
    }
    save_file(original, tmp_path / "x.safetensors")
    model = open_model(tmp_path)
    write(model, {"a": get_format("int-w4")}, tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "model.safetensors", framework="np") as stored:
        assert set(stored.keys()) == {"a.weight.codes", "a.weight.scales", *original} - {"a.weight"}
        for name in original.keys() - {"a.weight"}:
            assert stored.get_tensor(name).dtype == original[name].dtype
            assert stored.get_tensor(name).tobytes() == original[name].tobytes()


@pytest.mark.parametrize("shard_bytes", [1, 3000, 1 << 30])
def test_shards_hold_the_same_as_one_file(tmp_path: Path, small_model: Path, shard_bytes: int) -> None:
    whole = transformers.LlamaForCausalLM.from_pretrained(small_model)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model = open_model(tmp_path / "sharded")
    tensors = write(model, get_format("ant-w4g16"), tmp_path / "packed", shard_bytes=shard_bytes)
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 1 << 30)
    for file in files:
        values = load_file(file)
        assert len(values) == 1 or sum(value.nbytes for value in values.values()) <= shard_bytes
    for name, tensor in read_packed(tmp_path / "packed").items():
        assert_equal(tensor, tensors[name])
    stored = {key: value for file in files for key, value in load_file(file).items()}
    original = load_file(small_model / "model.safetensors")
    assert {key for key in stored if ".weight." not in key} == {key for key in original if "_proj" not in key} - {
        "lm_head.weight"
    }


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    model = matrices(tmp_path / "model", "a", "b", "c")
    format = get_format("olive-w4")
    tensors = write(model, format, tmp_path / "at-once", settings={"seed": "1"})
    with pytest.raises(KeyboardInterrupt), PackedModelWriter(model, format, tmp_path / "x", {"seed": "1"}) as writer:
        writer.add("a", tensors["a"])
        writer.add("b", tensors["b"])
        raise KeyboardInterrupt
    assert not (tmp_path / "x").exists()
    with PackedModelWriter(open_model(tmp_path / "model"), format, tmp_path / "x", {"seed": "1"}) as writer:
        for name in ("a", "b"):
            found = writer.done(name)
            assert found is not None
            assert_equal(found, tensors[name])
        assert writer.done("c") is None
        with pytest.raises(ValueError, match="'c' has not been added"):
            writer.finish()
        writer.add("c", tensors["c"])
        writer.finish()
    assert contents(tmp_path / "x") == contents(tmp_path / "at-once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-once", "model", "x"]


def test_a_killed_run_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    model = matrices(tmp_path / "model", "a", "b")
    program = (
        "import sys, os, signal; from pathlib import Path\n"
        "from termwise.algorithms.models import open_model\n"
        "from termwise.algorithms.formats import get_format\n"
        "from termwise.algorithms.packed_model import PackedModelWriter\n"
        "from termwise.algorithms.quantize import quantize\n"
        "model, format = open_model(sys.argv[1]), get_format('int-w4g8')\n"
        "with PackedModelWriter(model, format, Path(sys.argv[2])) as writer:\n"
        "    writer.add('a', quantize(model.matrix('a'), format))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "model", tmp_path / "x"], check=False)
    assert done.returncode == -signal.SIGKILL
    with PackedModelWriter(model, get_format("int-w4g8"), tmp_path / "x") as writer:
        found = writer.done("a")
        assert found is not None
        assert_equal(found, quantize(model.matrix("a"), "int-w4g8"))
        assert writer.done("b") is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"formats": get_format("int-w3")}, r"layers 'a' is .*int-w4.* there and .*int-w3.* here"),
        ({"settings": {"seed": "2"}}, 'settings \'seed\' is "1" there and "2" here'),
        ({"settings": {}}, "settings 'seed' is \"1\" there and null here"),
        ({"datatypes": {"mine": {"bits": 2, "levels": [0, 1]}}}, "datatypes 'mine' is null there"),
        ({"formats": {"a": get_format("int-w4")}}, "layers 'b' is .* there and null here"),
        ({"weights": 0.5}, "the files of the model are others or were changed"),
    ],
)
def test_unfinished_work_with_other_settings_is_refused_until_told_to_restart(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    model = matrices(tmp_path / "model", "a", "b")
    first: dict[str, Any] = {"formats": get_format("int-w4"), "settings": {"seed": "1"}}
    with PackedModelWriter(model, directory=tmp_path / "x", **first) as writer:
        writer.add("a", quantize(model.matrix("a"), "int-w4"))
    if changed.pop("weights", None):
        weights = load_file(tmp_path / "model" / "x.safetensors")
        weights["a.weight"][0, 0] += 1
        save_file(weights, tmp_path / "model" / "x.safetensors")
        model = open_model(tmp_path / "model")
    second = {**first, **changed}
    with pytest.raises(InputError, match=said) as caught:
        PackedModelWriter(model, directory=tmp_path / "x", **second)
    assert str(tmp_path / "x.partial") in str(caught.value)
    with PackedModelWriter(model, directory=tmp_path / "x", restart=True, **second) as writer:
        assert writer.done("a") is None


def test_what_a_run_cannot_use_is_refused(tmp_path: Path) -> None:
    model = matrices(tmp_path / "model", "a")
    format = get_format("int-w4")
    tensor = quantize(model.matrix("a"), format)
    with pytest.raises(InputError, match="unknown layer 'x'"):
        PackedModelWriter(model, {"x": format}, tmp_path / "p")
    with PackedModelWriter(model, format, tmp_path / "p") as writer:
        with pytest.raises(InputError, match="another process is writing"):
            PackedModelWriter(model, format, tmp_path / "p")
        with pytest.raises(InputError, match="unknown layer 'x'"):
            writer.add("x", tensor)
        with pytest.raises(InputError, match=r"got int-w3 \[6, 40\]; expected int-w4 \[6, 40\]"):
            writer.add("a", quantize(model.matrix("a"), "int-w3"))
        writer.add("a", tensor)
        writer.finish()
    with pytest.raises(InputError, match="exists already"):
        PackedModelWriter(model, format, tmp_path / "p")
    save_file({"a.weight": np.ones((2, 2), np.float16), "a.weight.codes": np.ones(3)}, tmp_path / "model/x.safetensors")
    with pytest.raises(InputError, match=r"'a\.weight\.codes' has the name of a part of layer 'a'"):
        PackedModelWriter(open_model(tmp_path / "model"), format, tmp_path / "q")


def test_a_run_without_a_finished_layer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    model = matrices(tmp_path / "m", "a")
    tensor = quantize(model.matrix("a"), "int-w4")
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with (
        pytest.raises(InputError, match=r"cannot write .*No space left on device"),
        PackedModelWriter(model, tensor.format, tmp_path / "packed") as writer,
    ):
        writer.add("a", tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_bad_input_leaves_nothing_of_its_own_and_keeps_what_an_earlier_run_left(tmp_path: Path) -> None:
    model = matrices(tmp_path / "m", "a", "b")
    tensor = quantize(model.matrix("a"), "int-w4")
    with pytest.raises(InputError), PackedModelWriter(model, tensor.format, tmp_path / "packed") as writer:
        writer.add("a", tensor)
        raise InputError("tensor 'b' holds NaN")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with PackedModelWriter(model, tensor.format, tmp_path / "packed") as writer:
        writer.add("a", tensor)
    with pytest.raises(InputError), PackedModelWriter(model, tensor.format, tmp_path / "packed"):
        raise InputError("cannot read the model for a moment")
    with PackedModelWriter(model, tensor.format, tmp_path / "packed") as writer:
        assert writer.done("a") is not None


@pytest.mark.parametrize("error", [None, 0.0, 0.1, 1e-300])
def test_the_output_error_of_a_finished_layer_is_kept_exactly(tmp_path: Path, error: float | None) -> None:
    model = matrices(tmp_path / "m", "a")
    tensor = quantize(model.matrix("a"), "int-w4")
    with PackedModelWriter(model, tensor.format, tmp_path / "packed") as writer:
        writer.add("a", tensor, error)
    with PackedModelWriter(model, tensor.format, tmp_path / "packed") as writer:
        assert writer.output_error("a") == error


def test_a_full_disk_at_the_end_keeps_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model = matrices(tmp_path / "m", "a")
    tensor = quantize(model.matrix("a"), "int-w4")
    with monkeypatch.context() as patched, PackedModelWriter(model, tensor.format, tmp_path / "packed") as writer:
        writer.add("a", tensor)
        patched.setattr("termwise.algorithms.packed_model.write_shards", full)
        with pytest.raises(InputError, match=r"cannot write .*packed: No space left on device"):
            writer.finish()
    assert not (tmp_path / "packed").exists()
    with PackedModelWriter(model, tensor.format, tmp_path / "packed") as writer:
        writer.finish()
    assert_equal(read_packed(tmp_path / "packed")["a"], tensor)


def test_a_damaged_unfinished_layer_is_told(tmp_path: Path) -> None:
    model = matrices(tmp_path / "m", "a")
    with PackedModelWriter(model, get_format("int-w4"), tmp_path / "p") as writer:
        writer.add("a", quantize(model.matrix("a"), "int-w4"))
        file = tmp_path / "p.partial" / "layer-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"layer-00000\.safetensors is not a whole safetensors file"):
            writer.done("a")


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    write(matrices(tmp_path / "m", "a"), get_format("int-w4"), tmp_path / "packed")
    with pytest.raises(InputError):
        open_model(tmp_path / "packed").matrix_names  # noqa: B018


def test_what_is_not_packed_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((4, 8), np.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="was not written by termwise"):
        read_packed(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read_packed(tmp_path / "nowhere")


def change_tensors(directory: Path, change: Callable[[dict[str, NDArray[Any]]], None]) -> None:
    """Write ``model.safetensors`` again with other tensors and the same metadata."""
    file = directory / "model.safetensors"
    with safe_open(file, framework="np") as stored:
        metadata = stored.metadata()
    values = load_file(file)
    change(values)
    save_file(values, file, metadata)


def change_metadata(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write ``model.safetensors`` again with another description and the same tensors."""
    file = directory / "model.safetensors"
    with safe_open(file, framework="np") as stored:
        description = json.loads(stored.metadata()["quantization_config"])
    change(description)
    save_file(load_file(file), file, {"quantization_config": json.dumps(description)})


@pytest.mark.parametrize(
    ("format", "part", "value", "said"),
    [
        ("int-w4", "scales", np.nan, "holds a NaN"),
        ("int-w4", "scales", 0, "expected positive"),
        ("bitmod-w4g8", "group_scales", 0, "expected positive"),
        ("bitmod-w4g8", "channel_scales", np.inf, "infinity"),
        ("bitmod-w4g8:special=5,-5,8", "selectors", 255, "selects data type 3; expected 0 to 2"),
        ("int-asym-w4", "zero_points", 16, "zero point 16; expected 0 to 15"),
        ("olive-w4", "matrix_type", 2, "expected 0 to 1"),
        ("mxfp4", "scales", 255, "a NaN; expected 0 to 254"),
        ("nvfp4", "scales", 127, "no positive E4M3 number; expected 1 to 126"),
        ("gobo-w3", "outlier_positions", 240, "does not ascend within 6 × 40 weights"),
        ("fp16", "values", np.nan, "holds a NaN"),
    ],
)
def test_values_that_no_quantizer_writes_are_refused(
    tmp_path: Path, format: str, part: str, value: float, said: str
) -> None:
    random = np.random.default_rng(5)
    weights = (random.standard_t(2, (6, 40)) * 0.02).astype(np.float16)
    (tmp_path / "m").mkdir()
    save_file({"a.weight": weights}, tmp_path / "m" / "x.safetensors")
    write(open_model(tmp_path / "m"), get_format(format), tmp_path / "p")
    change_tensors(tmp_path / "p", lambda values: values[f"a.weight.{part}"].reshape(-1).__setitem__(-1, value))
    with pytest.raises(InputError, match=rf"model\.safetensors: tensor 'a\.weight\.{part}' .*{said}"):
        open_packed(tmp_path / "p")["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values.pop("a.weight.scales"), r"lacks the tensor 'a\.weight\.scales'; int-w4 has it"),
        (lambda values: values.update({"a.weight.x": np.ones(2)}), r"unknown tensor 'a\.weight\.x'"),
        (
            lambda values: values.update({"a.weight.codes": values["a.weight.codes"][:5]}),
            r"'a\.weight\.codes' is U8 \[5, 20\]; expected U8 \[6, 20\] for int-w4",
        ),
        (
            lambda values: values.update({"a.weight.scales": values["a.weight.scales"].astype(np.float32)}),
            r"'a\.weight\.scales' is F32 \[6, 1\]; expected F16 \[6, 1\]",
        ),
        (
            lambda values: values.update({"a.weight.input_scales": np.ones(39, np.float32)}),
            r"'a\.weight\.input_scales' is F32 \[39\]; expected F32 \[40\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_format_are_refused(
    tmp_path: Path, change: Callable[[dict[str, NDArray[Any]]], None], said: str
) -> None:
    write(matrices(tmp_path / "m", "a"), get_format("int-w4"), tmp_path / "p")
    change_tensors(tmp_path / "p", change)
    with pytest.raises(InputError, match=said):
        open_packed(tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.update(version=1), "version is 1; expected 2"),
        (lambda config: config.update(version=True), "version is True; expected 2"),
        (lambda config: config.update(quant_method="gptq"), r"not written by termwise \('gptq'\)"),
        (lambda config: config.pop("layers"), "key 'layers' is missing"),
        (lambda config: config.update(extra=1), "unknown key 'extra'"),
        (lambda config: config.update(layers=[]), r"layers is \[\]; expected a JSON object"),
        (lambda config: config["layers"].update(a=1), "layers: 'a' is 1; expected objects"),
        (lambda config: config["layers"]["a"].pop("shape"), "layer 'a': key 'shape' is missing"),
        (lambda config: config["layers"]["a"].update(shape=[6.0, 40]), r"shape is \[6\.0, 40\]"),
        (lambda config: config["layers"]["a"].update(shape=[6, 0]), r"shape is \[6, 0\]"),
        (lambda config: config["layers"]["a"].update(format="int-w9"), "int has no 9-bit weights"),
        (lambda config: config["layers"]["a"].update(format=4), "format is 4"),
        (lambda config: config["layers"]["a"].update(format="int-w4g" + "9" * 5000), "layer 'a'"),
        (lambda config: config["layers"].update(b=config["layers"]["a"]), r"lacks the tensor 'b\.weight\.codes'"),
        (lambda config: config.update(settings={"a": 1}), "settings: 'a' is 1; expected text"),
    ],
)
def test_descriptions_that_are_malformed_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    write(matrices(tmp_path / "m", "a"), get_format("int-w4"), tmp_path / "p")
    change_metadata(tmp_path / "p", change)
    with pytest.raises(InputError, match=said):
        open_packed(tmp_path / "p")


def test_config_and_files_must_agree(tmp_path: Path, small_model: Path) -> None:
    write(open_model(small_model), get_format("int-w4g16"), tmp_path / "p", shard_bytes=20_000)
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    config["quantization_config"]["layers"]["lm_head"]["format"] = "int-w3g16"
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: quantization_config differs from that of model-00001"):
        open_packed(tmp_path / "p")
    (tmp_path / "p" / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        open_packed(tmp_path / "p")


def test_mutated_models_are_read_or_refused_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datatypes, "_added", {})
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import fuzz_readers
    finally:
        sys.path.pop(0)
    counts = fuzz_readers.fuzz(400, seed=1)
    assert counts["read"] + counts["refused"] == counts["types read"] + counts["types refused"] == 400
    assert len(counts) == 4


def test_a_large_layer_is_written_within_a_bound_of_memory(tmp_path: Path) -> None:
    """Matrix 45 MB, its packed form 12 MB and again in the library that writes it, 32 MB for blocks; and a quarter."""
    outputs, inputs = 2048, 11008
    weights = np.empty((outputs, inputs), dtype=np.float16)
    weights[:] = (np.random.default_rng(3).standard_normal((64, inputs)) * 0.02).astype(np.float16).repeat(32, axis=0)
    (tmp_path / "m").mkdir()
    save_file({"a.weight": weights, "b.weight": weights}, tmp_path / "m" / "x.safetensors")
    del weights
    program = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[3]); import quantize_large_model as benchmark\n"
        "import safetensors.numpy, ml_dtypes, numpy\n"
        "from termwise.algorithms.models import open_model\n"
        "from termwise.algorithms.formats import get_format\n"
        "from termwise.algorithms.quantize import quantize\n"
        "quantize(numpy.ones((2, 256), numpy.float16), 'bitmod-w4g128')\n"
        "before = benchmark.anonymous_bytes()\n"
        "with benchmark.PeakMemory() as peak:\n"
        "    benchmark.quantize_model(open_model(sys.argv[1]), get_format('bitmod-w4g128'), Path(sys.argv[2]))\n"
        "print(peak.anonymous_bytes - before)\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "m", tmp_path / "p", BENCHMARKS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1.25 * (45 + 2 * 12 + 32) * 1e6
    assert open_packed(tmp_path / "p").shapes == {"a": (outputs, inputs), "b": (outputs, inputs)}
