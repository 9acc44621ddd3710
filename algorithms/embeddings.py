"""Embeddings of sentences by an encoder (BERT), with its own weights and with others in their place.

An embedding is the mean of the last layer's states over the tokens of a document, special tokens included, divided by
its length (Sentence-BERT, EMNLP 2019, section 3; ``1_Pooling/config.json`` beside the model may ask for the first token
instead). A document is cut to the length that the tokenizer's file says, otherwise to the model's context. How much
other weights change is told by the mean cosine between each document's embedding and the one that the model's own
weights gave. transformers' own model code runs in float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.checkpoints import read_json
from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.loaded_model import Float32, LoadedModel
from termwise.algorithms.models import Model, check_vocabulary
from termwise.algorithms.text import Text, text_of
from termwise.algorithms.tokenization import HuggingFaceTokenizer

_TOKENS_AT_ONCE = 1 << 13


def paragraphs(text: Text, *, characters: int = 1, count: int | None = None) -> Text:
    """The first ``count`` lines (None: all) of ``characters`` or more that are no headings, as documents of their own.

    A heading is a line that begins with ``=``, as in WikiText. Raises ``InputError`` if there is no such line.
    """
    lines = (line.strip() for document in text.documents for line in document.splitlines())
    found = [line for line in lines if line and len(line) >= characters and not line.startswith("=")][:count]
    if not found:
        raise InputError(f"the text {text.name} has no paragraph of {characters} characters; expected at least one")
    return text_of(f"{len(found)} paragraphs of {text.name}", found)


class EmbeddingEvaluator(LoadedModel):
    """An encoder in memory, whose linear layers can be replaced between evaluations on the documents of one text.

    Raises ``InputError`` when the model is no encoder that can be run, or the text has no document.
    """

    def __init__(self, model: Model, text: Text) -> None:
        super().__init__(model, encoder=True)
        self._text_name = text.name
        self._first_token = _pools_first_token(model)
        self._documents, self.window_tokens = sentences(model, self._module.config, text)
        if not self._documents:
            raise InputError(f"the text {text.name} is empty; expected a document to embed")
        check_vocabulary(model, self._module, self._documents)
        self._reference = self.embeddings()

    def embeddings(self) -> Float32:
        """Embeddings with the weights that are in place: float32 [documents, channels], each of length 1.

        Raises ``TermwiseError`` when one is NaN or zero, or when an input that is to be quantized never came.
        """
        import torch

        found: dict[int, Float32] = {}
        with torch.inference_mode():
            for indices, tokens, mask in self._batches():
                states = self._states(torch.from_numpy(tokens), torch.from_numpy(mask)).float()
                weights = torch.from_numpy(mask)[..., None].float()
                if self._first_token:
                    weights[:, 1:] = 0
                pooled = torch.where(weights > 0, states, 0.0).sum(dim=1) / weights.sum(dim=1)
                found.update(zip(indices, pooled.numpy(), strict=True))
        self._check_inputs()
        pooled_rows = np.stack([found[index] for index in range(len(self._documents))])
        lengths = np.linalg.norm(pooled_rows.astype(np.float64), axis=1, keepdims=True)
        if not (np.isfinite(lengths).all() and (lengths > 0).all()):
            raise TermwiseError(
                f"an embedding by {self._name} of {self._text_name} is NaN, infinite or zero with the weights in place"
            )
        embeddings: Float32 = (pooled_rows / lengths).astype(np.float32)
        return embeddings

    def cosines(self) -> NDArray[np.float64]:
        """Cosine between each document's embedding with the model's own weights and that with those in place.

        float64 [documents]. Raises ``TermwiseError`` as ``embeddings`` does.
        """
        products: NDArray[np.float64] = self._reference.astype(np.float64) * self.embeddings()
        return np.asarray(products.sum(axis=1))

    def cosine(self) -> float:
        """Mean of ``cosines``."""
        return float(self.cosines().mean())

    def _batches(self) -> Iterator[tuple[list[int], NDArray[np.int64], NDArray[np.int64]]]:
        """Documents of similar length together: indices, tokens and mask, int64 [documents, tokens]."""
        filler = getattr(self._module.config, "pad_token_id", None) or 0
        order = sorted(range(len(self._documents)), key=lambda index: len(self._documents[index]), reverse=True)
        while order:
            longest = len(self._documents[order[0]])
            indices = order[: max(1, _TOKENS_AT_ONCE // longest)]
            tokens = np.full((len(indices), longest), filler, dtype=np.int64)
            mask = np.zeros_like(tokens)
            for row, index in enumerate(indices):
                document = self._documents[index]
                tokens[row, : len(document)] = document
                mask[row, : len(document)] = 1
            yield indices, tokens, mask
            order = order[len(indices) :]

    def sequences(self) -> list[NDArray[np.int64]]:
        """The text as the model reads it: int64 [tokens] each."""
        return self._documents

    def _output(self, tokens: Any) -> Any:
        return self._states(tokens, None)

    def _states(self, tokens: Any, mask: Any) -> Any:
        """States of the last layer: torch tensor [documents, tokens, channels]."""
        return self._module.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state


def sentences(model: Model, config: Any, text: Text) -> tuple[list[NDArray[np.int64]], int]:
    """The documents of ``text`` as an encoder reads them, int64 [tokens] each, and the most tokens that it reads.

    ``config`` is transformers' configuration of the model.
    """
    tokenizer = model.tokenizer()
    assert isinstance(tokenizer, HuggingFaceTokenizer)  # llama2.c has no encoders
    limits = [limit for limit in (tokenizer.sentence_tokens, _context(config)) if limit]
    window_tokens = min(limits, default=512)
    return [tokenizer.encode_sentence(document, window_tokens) for document in text.documents], window_tokens


def _context(config: Any) -> int | None:
    """Tokens that have a position; RoBERTa numbers them from behind the filler's."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return positions - offset


def _pools_first_token(model: Model) -> bool:
    """Whether the embedding is the first token's state; False: the mean of all.

    Raises ``InputError`` for another pooling in ``1_Pooling/config.json``.
    """
    file = model.location / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    modes = [key for key, value in read_json(file).items() if key.startswith("pooling_mode") and value is True]
    if modes == ["pooling_mode_mean_tokens"]:
        return False
    if modes == ["pooling_mode_cls_token"]:
        return True
    raise InputError(f"{file} asks for {', '.join(modes) or 'no pooling'}; expected the mean or the first token alone")
