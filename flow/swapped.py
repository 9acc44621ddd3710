"""A language model whose linear layers stay packed: it generates, beside the same model with dequantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from termwise.algorithms.errors import InputError
from termwise.algorithms.models import Model
from termwise.algorithms.quantize import QuantizedTensor
from termwise.algorithms.text import Text

PROMPT_TOKENS = 16
GENERATED_TOKENS = 32


def generate(model: Model, tensors: Mapping[str, QuantizedTensor], text: Text) -> dict[str, Any]:
    """Continue the beginning of ``text``, greedily, in FP16, on a GPU where there is one.

    Args:
        model: a language model.
        tensors: packed weights of linear layers by name.
        text: whose first tokens are the prompt.

    Returns:
        device, layers; prompt and text; tokens, and how many of them come before the first that differs with
        dequantized weights (``same_tokens``); largest difference of the prompt's logits, and their range.

    Raises ``InputError`` for tensors without a kernel, or that the model's code does not call as layers.
    """
    import torch

    from termwise.algorithms.perplexity import Evaluator
    from termwise.gpu_ref import swap_linears

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompt = torch.from_numpy(Evaluator(model, text).sequences()[0][:PROMPT_TOKENS])[None].to(device)

    def run(module: Any) -> tuple[Any, list[int]]:
        with torch.inference_mode():
            logits = module(input_ids=prompt, use_cache=False).logits.float()
            found = module.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=GENERATED_TOKENS,
                max_new_tokens=GENERATED_TOKENS,
                pad_token_id=0,
            )
        return logits, found[0, prompt.shape[1] :].tolist()

    transposed = {linear.name for linear in model.structure.linears if linear.transposed}
    module: Any = model.load().half().to(device)
    for name, tensor in tensors.items():
        values = torch.from_numpy(tensor.dequantize())
        layer = module.get_submodule(name)  # a head that shares its tensor with the embedding gets one of its own
        layer.weight = torch.nn.Parameter((values.T if name in transposed else values).half().to(device), False)
    expected_logits, expected = run(module)
    replaced = swap_linears(module, lambda name, _: tensors.get(name))
    missing = sorted(set(tensors) - set(replaced))
    if missing:
        raise InputError(f"{model.name} has no linear layer {missing[0]}; expected a layer of every packed matrix")
    logits, found = run(module)
    same = next(
        (place for place, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other), len(found)
    )
    tokenizer = model.tokenizer()
    begun = int(int(prompt[0, 0]) == tokenizer.begin_of_sequence)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        "layers": len(replaced),
        "prompt": tokenizer.decode(prompt[0, begun:].tolist()),
        "text": tokenizer.decode(found),
        "tokens": len(found),
        "same_tokens": same,
        "logit_difference": float((logits - expected_logits).abs().max()),
        "logit_range": float(expected_logits.max() - expected_logits.min()),
    }
