"""From text to tokens, with the bytes of text that the tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.checkpoints import read_json
from termwise.algorithms.errors import InputError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
"""The files of a model in Hugging Face format that say how it reads text."""

_OLDER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The tokens of one document.

    ``tokens``: [tokens] int64, without a token that begins the sequence. ``end_bytes``: [tokens] int64, not decreasing,
    the bytes of UTF-8 text up to and with each token; the last one is the length of the document. Where a character is
    split over several tokens, it may count with the first of them.
    """

    tokens: NDArray[np.int64]
    end_bytes: NDArray[np.int64]


class Tokenizer(Protocol):
    """What turns text into the tokens of a model."""

    @property
    def begin_of_sequence(self) -> int | None:
        """The token that begins a sequence, None where the model defines none."""

    def encode(self, text: str) -> Encoding:
        """The tokens of ``text``."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``; what is no UTF-8 in it becomes the replacement character."""


class HuggingFaceTokenizer:
    """The tokenizer in a directory in Hugging Face format.

    ``tokenizer.json`` is read as it is; without it, transformers converts the older files. The token that begins a
    sequence is ``bos_token`` of tokenizer_config.json where that file has the key (null: there is none), otherwise
    ``bos_token_id`` of the model's configuration.

    Raises ``InputError`` when the files cannot be read as a tokenizer, or lack the token that they name.
    """

    def __init__(self, directory: Path, config: dict[str, Any]) -> None:
        self._tokenizer = _read_tokenizer(directory)
        truncation = self._tokenizer.truncation
        self.sentence_tokens: int | None = truncation["max_length"] if truncation else None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.begin_of_sequence: int | None = None
        settings_file = directory / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        if "bos_token" not in settings:
            token = config.get("bos_token_id")
            self.begin_of_sequence = token if isinstance(token, int) else None
        elif settings["bos_token"] is not None:
            content = settings["bos_token"]
            content = content.get("content") if isinstance(content, dict) else content
            self.begin_of_sequence = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
            if self.begin_of_sequence is None:
                raise InputError(f"{settings_file}: bos_token {content!r} is not a token of the tokenizer beside it")

    def encode(self, text: str) -> Encoding:
        """The tokens of ``text``, without special ones."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = np.array(encoded.ids, dtype=np.int64)
        end_characters = np.array([end for _, end in encoded.offsets], dtype=np.int64)
        bytes_up_to = np.zeros(len(text) + 1, dtype=np.int64)
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        np.cumsum(1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000), out=bytes_up_to[1:])
        end_bytes = np.maximum.accumulate(bytes_up_to[end_characters])
        if end_bytes.size:
            end_bytes[-1] = bytes_up_to[-1]
        return Encoding(tokens=tokens, end_bytes=end_bytes)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without special ones."""
        return str(self._tokenizer.decode(list(tokens)))

    def encode_sentence(self, text: str, maximum: int) -> NDArray[np.int64]:
        """The tokens of ``text`` with the special ones that an encoder expects around it, at most ``maximum`` in all.

        int64 [tokens]. ``sentence_tokens`` is the length to which the tokenizer's own file cuts, None if it does not.
        """
        self._tokenizer.enable_truncation(maximum)
        try:
            return np.array(self._tokenizer.encode(text).ids, dtype=np.int64)
        finally:
            self._tokenizer.no_truncation()


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory in Hugging Face format holds a tokenizer."""
    return any((directory / name).is_file() for name in ("tokenizer.json", *_OLDER_TOKENIZERS))


def _read_tokenizer(directory: Path) -> Any:
    """The ``tokenizers.Tokenizer`` of ``directory``."""
    file = directory / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer as FastTokenizer

        try:
            return FastTokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            reason = " ".join(str(error).split())
            raise InputError(
                f"{file} is not a tokenizer: {reason}; expected the file that belongs to the model"
            ) from error
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        return converted.backend_tokenizer
    except Exception as error:  # many kinds, by the missing package or malformed file
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{directory}: its tokenizer cannot be read: {reason}; expected a tokenizer.json") from error
