"""Write the card of the embedded model: ``python -m termwise.algorithms.tiny.card``.

The card's figures are measured when it is written, on the held-out topics of the Python that runs this; those of the
training come from the record that ``train`` left beside the weights.
"""

from __future__ import annotations

import json
import platform
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from termwise.algorithms.files import write_text
from termwise.algorithms.formats import get_format
from termwise.algorithms.models import TINY, open_model
from termwise.algorithms.perplexity import Evaluator, Perplexity
from termwise.algorithms.quantize import quantize
from termwise.algorithms.text import held_out_text

FORMATS = (
    "int-w8g128",
    "int-w4g128",
    "int-asym-w4g128",
    "bitmod-w4g128",
    "ant-w4g128",
    "olive-w4",
    "int-w3g128",
    "int-asym-w3g128",
    "bitmod-w3g128",
    "int-w2g128",
)


def measure() -> dict[str, Perplexity]:
    """Perplexity of the FP16 weights, of every format, and of random weights with each layer's standard deviation."""
    model = open_model(TINY)
    evaluator = Evaluator(model, held_out_text())
    results = {"fp16": evaluator.perplexity()}
    for name in FORMATS:
        for layer, weights in model.matrices():
            evaluator.replace(layer, quantize(weights, get_format(name), name=layer).dequantize())
        results[name] = evaluator.perplexity()
    for layer, weights in model.matrices():
        random = np.random.default_rng(zlib.crc32(layer.encode()))
        deviation = float(weights.astype(np.float64).std())
        evaluator.replace(layer, random.normal(0, deviation, weights.shape).astype(np.float32))
    results["random"] = evaluator.perplexity()
    return results


def table(results: dict[str, Perplexity]) -> str:
    """The results as a Markdown table, with the change against FP16."""
    reference = results["fp16"].per_token
    lines = ["| weights | perplexity per token | change | bits per byte |", "|---|--:|--:|--:|"]
    for name, result in results.items():
        label = {"random": "random, of equal standard deviation"}.get(name, f"`{name}`")
        change = 100 * (result.per_token / reference - 1)
        lines.append(f"| {label} | {result.per_token:,.3f} | {change:+,.1f} % | {result.bits_per_byte:.3f} |")
    return "\n".join(lines)


def card(training: dict[str, Any], results: dict[str, Perplexity]) -> str:
    """The model card as Markdown."""
    text = held_out_text()
    size = sum(len(document.encode()) for document in text.documents)
    return f"""---
license: apache-2.0
language: en
---

# tiny

A language model of {training["parameters"] / 1e6:.2f} million parameters that reads Python's documentation. It ships
with termwise so that a number format can be tried on a trained model without a download.

**What it is.** A Llama-architecture decoder: 4 layers, hidden size 256, feed-forward size 768 (SwiGLU), 4 heads and 2
key-value heads (RoPE), RMSNorm, context 512, a head of its own. Byte-level BPE tokenizer of 1024 tokens. FP16.

**What it is not.** It cannot answer questions or write programs. It is far smaller than the models that the formats
were made for: its layers have few outliers, and a format that does well here may not do well there. It is a test
object.

**Data.** The documentation topics that `help()` prints (`pydoc_data.topics`), the docstrings and the source of the
standard library of CPython {training["python"]}, without tests; {training["corpus"]["training_bytes"] / 1e6:.1f} MB.
None of this text is shipped. Topics whose name has a hash below a bound are held out
(`termwise.algorithms.tiny.corpus.is_held_out`), and what they share with the rest is removed from the training text.

**Training.** `{training["command"]}`: seed {training["seed"]}, {training["steps"]:,} steps of
{training["schedule"]["batch"]} sequences, {training["tokens_seen"]:,} tokens, {training["minutes"]:.0f} minutes on
{training["device"]}. Final loss {training["training_loss_nats"]:.3f} nats per token in training (mean of the last 200
steps), {training["validation_loss_nats"]:.3f} on a validation slice of the training documents.

**Evaluation**, on the held-out topics of Python {platform.python_version()} ({len(text.documents)} documents,
{size:,} bytes, SHA-256 `{text.digest[:16]}…`; other versions of Python have other texts), with all linear layers
quantized:

{table(results)}

`python -m termwise.algorithms.tiny.card` writes this card anew.
"""


def main() -> None:
    """Measure, and write README.md beside the weights."""
    directory = Path(open_model(TINY).location)
    training = json.loads((directory / "training.json").read_text(encoding="utf-8"))
    text = card(training, measure())
    write_text(directory / "README.md", text)
    print(text)


if __name__ == "__main__":
    main()
