"""Models that generate with packed layers, from the command line and by ``swap_linears``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from termwise.flow.cli import main
from termwise.gpu_ref import QuantizedLinear, swap_linears


def run(*arguments: Path | str) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.parametrize("format", ["bitmod-w4g32", "int-asym-w4g16", "olive-w4"])
def test_a_model_generates_with_packed_layers(format: str, small_model: Path, small_text: Path) -> None:
    result = run("quantize", small_model, "--format", format, "--swap", "--text", small_text, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["swap"]
    assert found["layers"] == 15  # 7 of each of 2 blocks, and the head
    assert found["tokens"] == 32
    assert found["logit_range"] > 0
    # Both run in FP16, of which 2^-8 of the range of the logits is a generous multiple of the rounding of one sum.
    assert found["logit_difference"] <= found["logit_range"] * 2**-8
    assert found["prompt"][0] == small_text.read_text()[0]


def test_the_table_ends_with_what_the_model_said(small_model: Path, small_text: Path) -> None:
    result = run("quantize", small_model, "--format", "bitmod-w4g32", "--swap", "--text", small_text)
    assert result.exit_code == 0
    assert "15 packed layers on" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "gobo-w3"), "no kernel of a linear layer in gobo-w3"),
        (("--format", "int-w4a8g32"), "expected int-w4g32"),
        (("--format", "int-w4g32", "--no-score"), "--swap generates with small: --no-score"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_quantized(
    arguments: tuple[str, ...], said: str, small_model: Path, small_text: Path
) -> None:
    result = run("quantize", small_model, *arguments, "--swap", "--text", small_text)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr


def test_layers_whose_weights_lie_transposed_are_replaced() -> None:
    torch.manual_seed(0)
    configuration = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model: Any = transformers.GPT2LMHeadModel(configuration).half().eval()
    tokens = torch.arange(8)[None]
    before = model(tokens).logits
    replaced = swap_linears(model, lambda name, _: "int-w8g32" if "attn" in name or "mlp" in name else None)
    assert len(replaced) == 4
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantizedLinear)
    after = model(tokens).logits
    # 8 bits: half a step of 1/127 of the largest weight of a group, in every layer.
    assert 0 < (after - before).abs().max() < 0.05 * (before.max() - before.min())
