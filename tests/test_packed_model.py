"""Packed models on disk: what is read is what was written, and everything else stands as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import get_format
from termwise.algorithms.models import open_model
from termwise.algorithms.packed_model import read_packed, write_packed
from termwise.algorithms.quantize import quantize


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["bitmod-w3g16", "olive-w4", "int-asym-w4g16", "fp16"])
def test_reading_inverts_writing(tmp_path: Path, name: str, tied: bool) -> None:
    torch.manual_seed(0)
    configuration = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(configuration).save_pretrained(tmp_path / "model")
    model = open_model(tmp_path / "model")
    tensors = {path: quantize(weights, get_format(name)) for path, weights in model.matrices()}
    write_packed(model, tensors, get_format(name), tmp_path / "packed")

    found = read_packed(tmp_path / "packed")
    assert found.keys() == tensors.keys()
    for path, tensor in tensors.items():
        assert (found[path].format, found[path].shape) == (tensor.format, tensor.shape)
        for part, values in tensor.parts.items():
            np.testing.assert_array_equal(found[path].parts[part], values)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert sum(values.nbytes for key, values in stored.items() if key.count(".weight.")) == sum(
        tensor.nbytes for tensor in tensors.values()
    )
    original = load_file(tmp_path / "model" / "model.safetensors")
    kept = {key for key in original if "norm" in key or "embed" in key}
    assert {key for key in stored if not key.count(".weight.")} == kept
    for key in kept:
        np.testing.assert_array_equal(stored[key], original[key])
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["format"] == name


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((4, 8), np.float16)}, tmp_path / "x.safetensors")
    model = open_model(tmp_path)
    format = get_format("int-w4")
    write_packed(model, {name: quantize(w, format) for name, w in model.matrices()}, format, tmp_path / "packed")
    assert read_packed(tmp_path / "packed")["a"].shape == (4, 8)
    with pytest.raises(InputError):
        open_model(tmp_path / "packed").matrix_names  # noqa: B018


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    (tmp_path / "m").mkdir()
    save_file({"a.weight": np.ones((4, 8), np.float16)}, tmp_path / "m" / "x.safetensors")
    model = open_model(tmp_path / "m")
    format = get_format("int-w4")
    tensors = {name: quantize(weights, format) for name, weights in model.matrices()}
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(InputError, match=r"cannot write .*packed: .*No space left on device"):
        write_packed(model, tensors, format, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_is_not_packed_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": np.ones((4, 8), np.float16)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="was not written by termwise"):
        read_packed(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read_packed(tmp_path / "nowhere")
