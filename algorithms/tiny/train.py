"""Train the embedded model: ``python -m termwise.algorithms.tiny.train --out DIR``.

A Llama decoder of 3.7 million parameters and a byte-level BPE tokenizer of 1024 tokens learn the training text of
``corpus``. The last weights are kept, after the learning rate has decayed; the held-out text is read only at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from tqdm import tqdm

from termwise.algorithms.tiny import corpus

VOCABULARY = 1024
SEPARATOR = "<|endoftext|>"
CONTEXT = 512
"""Tokens per training sequence and per window of an evaluation; also the largest position of the model."""

PEAK_RATE = 3e-3
FLOOR = 0.02
"""Learning rate at the end, as a fraction of the peak."""
WARM_UP = 150
"""Steps over which the learning rate rises from zero."""
WEIGHT_DECAY = 0.1
CLIP = 1.0
"""Largest norm of the gradient."""
MIXTURE = {"topics": 0.12, "docstrings": 0.43, "source": 0.45}
"""Probability with which a sequence is drawn from each group of documents."""
VALIDATION_FRACTION = 0.025
"""Fraction of the topics and docstring documents kept for monitoring."""

Tokens = npt.NDArray[np.int32]


def train_tokenizer(documents: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer over ``documents``: any text is encoded, and decoded to itself.

    Token 0 is the separator, tokens 1 to 256 are the bytes, the others are merges in the order of their frequency.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def new_model() -> Any:
    """A Llama model with random weights (float32), its head a matrix of its own."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )
    return transformers.LlamaForCausalLM(config)


def encode(tokenizer: Any, document: str) -> Tokens:
    """The tokens of one document, after the separator: int32 (tokens + 1,)."""
    tokens = tokenizer.encode(document, add_special_tokens=False)
    return np.array([tokenizer.bos_token_id, *tokens], dtype=np.int32)


def negative_log_likelihood(
    model: Any, documents: Sequence[Tokens], device: torch.device, *, batch: int = 8
) -> tuple[float, int]:
    """The summed negative log-likelihood (nats) of ``documents`` and the number of tokens it was summed over.

    Each document is cut into windows of ``CONTEXT`` tokens that do not overlap; the first token of each window is
    given, the others are predicted.
    """
    windows = [
        document[start : start + CONTEXT]
        for document in documents
        for start in range(0, len(document), CONTEXT)
        if len(document) - start > 1
    ]
    total, count = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(windows), batch):
            rows = windows[start : start + batch]
            width = max(len(row) for row in rows)
            tokens = np.zeros((len(rows), width), dtype=np.int64)
            targets = np.full((len(rows), width), -100, dtype=np.int64)
            for place, row in enumerate(rows):
                tokens[place, : len(row)] = row
                targets[place, 1 : len(row)] = row[1:]
            logits = model(input_ids=torch.from_numpy(tokens).to(device), use_cache=False).logits.float()
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].reshape(-1, VOCABULARY),
                    torch.from_numpy(targets[:, 1:]).reshape(-1).to(device),
                    ignore_index=-100,
                    reduction="sum",
                )
            )
            count += sum(len(row) - 1 for row in rows)
    model.train(training)
    return total, count


def split_validation(groups: dict[str, list[str]]) -> tuple[dict[str, list[str]], list[str]]:
    """Training documents by group, and a slice of topics and docstrings by a hash of their text, for monitoring.

    Paragraphs that the slice shares with the rest are dropped from the rest.
    """
    validation = [text for name in ("topics", "docstrings") for text in groups[name] if _is_validation(text)]
    chosen = set(validation)
    rest = {
        name: corpus.drop_shared_paragraphs((text for text in documents if text not in chosen), validation)
        for name, documents in groups.items()
    }
    return rest, validation


def _is_validation(text: str) -> bool:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number < VALIDATION_FRACTION * 2.0**64


def _size(documents: Sequence[str]) -> int:
    """Bytes of UTF-8."""
    return sum(len(document.encode()) for document in documents)


def _batch(
    streams: dict[str, Tokens], generator: np.random.Generator, rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, int64 (rows, CONTEXT) each: windows at random places of the streams."""
    names = list(MIXTURE)
    weights = np.array([MIXTURE[name] for name in names])
    windows = np.empty((rows, CONTEXT + 1), dtype=np.int64)
    for row, choice in enumerate(generator.choice(len(names), size=rows, p=weights / weights.sum())):
        stream = streams[names[choice]]
        start = int(generator.integers(0, len(stream) - CONTEXT))
        windows[row] = stream[start : start + CONTEXT + 1]
    tensor = torch.from_numpy(windows).to(device)
    return tensor[:, :-1], tensor[:, 1:]


def _optimizer(model: Any) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )


def _rate(step: int, progress: float) -> float:
    """Learning rate at a step, where ``progress`` of the training (0 to 1) is done: warm-up, then half a cosine."""
    decay = FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * decay


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write model (float16) and tokenizer to the folder ``out``; each file is replaced in one step."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    half = new_model()
    half.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    half.half().save_pretrained(part)
    tokenizer.save_pretrained(part)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(part.iterdir()):
        file.chmod(0o644)
        os.replace(file, out / file.name)
    part.rmdir()


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write.")
@click.option("--minutes", type=click.FloatRange(min=0.0, min_open=True), help="Train this long, decay included.")
@click.option("--steps", type=click.IntRange(min=1), help="Train this many steps (reproducible); 4000 by default.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences per step.")
@click.option("--device", "device_name", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the CPU.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the model (needs a C++ compiler).")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    out: Path,
    minutes: float | None,
    steps: int | None,
    batch: int,
    device_name: str,
    threads: int | None,
    compiled: bool,
    seed: int,
) -> None:
    """Train the embedded model and write it, with a record of the training, to a folder."""
    if minutes is not None and steps is not None:
        raise click.UsageError("give --minutes or --steps, not both")
    if minutes is None and steps is None:
        steps = 4000
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    device = torch.device(device_name)

    groups = corpus.training_groups()
    documents = [document for group in groups.values() for document in group]
    rest, validation = split_validation(groups)
    tokenizer = train_tokenizer([document for group in rest.values() for document in group])
    streams = {
        name: np.concatenate([encode(tokenizer, document) for document in group]) for name, group in rest.items()
    }
    validation_tokens = [encode(tokenizer, document) for document in validation]
    click.echo(f"tokens: { {name: len(stream) for name, stream in streams.items()} }")
    click.echo(f"validation: {len(validation)} documents, {sum(map(len, validation_tokens))} tokens")

    model = new_model().to(device)
    model.train()
    forward: Any = torch.compile(model) if compiled else model
    optimizer = _optimizer(model)
    losses: list[float] = []
    step, progress = 0, 0.0
    begin = time.monotonic()
    next_report, next_save = 0.05, 0.1
    with tqdm(total=1.0, bar_format="{percentage:5.1f}% {elapsed} {postfix}", mininterval=10.0) as bar:
        while progress < 1.0:
            rate = _rate(step, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs, targets = _batch(streams, generator, batch, device)
            with torch.autocast(device_name, dtype=torch.bfloat16):
                logits = forward(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, VOCABULARY), targets.reshape(-1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
            elapsed = time.monotonic() - begin
            progress = step / steps if steps is not None else elapsed / (60.0 * float(minutes or 0.0))
            bar.set_postfix(
                step=step, loss=f"{np.mean(losses[-50:]):.3f}", tokens=step * batch * CONTEXT, refresh=False
            )
            bar.update(min(1.0, progress) - bar.n)
            if progress >= next_report:
                next_report += 0.05
                total, count = negative_log_likelihood(model, validation_tokens, device)
                bar.write(f"step {step}: training {np.mean(losses[-50:]):.4f}, validation {total / count:.4f} nats")
            if progress >= next_save and progress < 1.0:
                next_save += 0.1
                save(model, tokenizer, out)
    trained = (time.monotonic() - begin) / 60.0
    save(model, tokenizer, out)

    # What is reported is what was written: the float16 weights, computed with in float32 on the CPU.
    written = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    cpu = torch.device("cpu")
    held_out = corpus.held_out_documents()
    held_out_tokens = [encode(tokenizer, document) for document in held_out]
    total, count = negative_log_likelihood(written, held_out_tokens, cpu)
    validation_total, validation_count = negative_log_likelihood(written, validation_tokens, cpu)
    amount = f"--minutes {minutes:g}" if minutes is not None else f"--steps {steps}"
    options = f"{amount} --batch {batch} --device {device_name} {'--compile ' if compiled else ''}--seed {seed}"
    text_tokens = sum(len(tokens) - 1 for tokens in held_out_tokens)
    record = {
        "command": f"python -m termwise.algorithms.tiny.train --out DIR {options}",
        "seed": seed,
        "steps": step,
        "minutes": round(trained, 2),
        "tokens_seen": step * batch * CONTEXT,
        "device": device_name,
        "parameters": sum(parameter.numel() for parameter in written.parameters()),
        "schedule": {
            "peak_rate": PEAK_RATE,
            "floor": FLOOR,
            "warm_up_steps": WARM_UP,
            "weight_decay": WEIGHT_DECAY,
            "clip": CLIP,
            "batch": batch,
            "context": CONTEXT,
            "mixture": MIXTURE,
        },
        "corpus": {
            "training_sha256": corpus.digest(documents),
            "training_bytes": _size(documents),
            "training_groups": {
                name: {"documents": len(rest[name]), "bytes": _size(rest[name]), "tokens": len(streams[name])}
                for name in rest
            },
            "validation_bytes": _size(validation),
            "validation_tokens": sum(map(len, validation_tokens)),
            "held_out_sha256": corpus.digest(held_out),
            "held_out_documents": len(held_out),
            "held_out_bytes": _size(held_out),
            "held_out_tokens": text_tokens,
        },
        "training_loss_nats": float(np.mean(losses[-200:])),
        "validation_loss_nats": validation_total / validation_count,
        "held_out": {
            "window": CONTEXT,
            "predicted_tokens": count,
            "loss_nats": total / count,
            "perplexity": math.exp(total / count),
            # Mean bits per predicted token times tokens per byte of the text.
            "bits_per_byte": total / count / math.log(2.0) * text_tokens / _size(held_out),
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    part = out / "training.json.part"
    part.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(part, out / "training.json")
    click.echo(json.dumps(record["held_out"], indent=2))


if __name__ == "__main__":
    main()
