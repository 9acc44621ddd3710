"""Models in the legacy format of llama2.c: one ``.bin`` with a header of seven int32, and a tokenizer ``.bin``.

Source of both layouts: karpathy/llama2.c (``export.py``, ``run.c``, ``tokenizer.py``). A model file holds, in float32
and without names: the embedding, then per kind of weight all layers (attention norm, query, key, value, output, feed-
forward norm, w1 = gate, w2 = down, w3 = up), the final norm, the two rotary tables and, only if the vocabulary size
in the header is negative, the output head (otherwise it is the embedding).

llama2.c rotates neighbouring pairs of features (0 with 1, 2 with 3, ...), transformers rotates feature i with i +
half a head. The rows of every query and key head are therefore reordered on reading: even rows first, then odd rows.
"""

from __future__ import annotations

import heapq
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.checkpoints import TensorHeader, check_finite, check_weight
from termwise.algorithms.errors import InputError
from termwise.algorithms.tokenization import Encoding

_HEADER = struct.Struct("<7i")
_FIRST_BYTE_TOKEN = 3
_FIRST_PIECE = 259
BEGIN_OF_SEQUENCE = 1


class Llama2cCheckpoint:
    """One llama2.c model file, presented as the checkpoint of a ``LlamaForCausalLM``.

    ``config`` is the content of the config.json that such a model would have; ``files`` is the one file. Raises
    ``InputError`` when the file is not in the format (the header is implausible or the length is not what it implies).
    """

    def __init__(self, file: Path) -> None:
        self.files = (file,)
        sizes = _read_header(file)
        if sizes is None:
            raise InputError(f"{file} is not a llama2.c model; expected seven int32 and the weights that they imply")
        dim, hidden, layers, heads, key_value_heads, vocabulary, context = sizes
        self._tensors = _layout(sizes)
        self._head_size = dim // heads
        self._headers = {
            name: TensorHeader(name=name, file=file, shape=shape, dtype="F32")
            for name, (shape, _) in self._tensors.items()
        }
        self.config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "bos_token_id": BEGIN_OF_SEQUENCE,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": dim,
            "intermediate_size": hidden,
            "max_position_embeddings": context,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": key_value_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": vocabulary > 0,
            "vocab_size": abs(vocabulary),
        }

    @property
    def headers(self) -> Mapping[str, TensorHeader]:
        """The header of every tensor, by the name that it has in a Hugging Face checkpoint."""
        return self._headers

    def read(self, name: str, *, transposed: bool = False) -> NDArray[np.float16] | NDArray[np.float32]:
        """As ``Checkpoint.read``; always float32, query and key rows in the order that transformers expects."""
        header = self._headers[name]
        check_weight(header)
        offset = self._tensors[name][1]
        stored = np.memmap(header.file, dtype="<f4", mode="r", offset=offset, shape=header.shape)
        values = np.array(stored, dtype=np.float32)
        check_finite(header, values.size - int(np.count_nonzero(np.isfinite(values))))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            outputs, inputs = header.shape
            pairs = values.reshape(outputs // self._head_size, self._head_size // 2, 2, inputs)
            values = pairs.swapaxes(1, 2).reshape(outputs, inputs)
        return np.ascontiguousarray(values.T) if transposed else np.ascontiguousarray(values)


def is_model(file: Path) -> bool:
    """Whether ``file`` is a llama2.c model: its length is exactly what its header implies."""
    return _read_header(file) is not None


def _read_header(file: Path) -> tuple[int, int, int, int, int, int, int] | None:
    """Dim, hidden, layers, heads, key-value heads, vocabulary and context; None if ``file`` is something else."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(_HEADER.size)
        length = file.stat().st_size
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}; expected a llama2.c model") from error
    if len(raw) < _HEADER.size:
        return None
    sizes = _HEADER.unpack(raw)
    dim, _, _, heads, key_value_heads, vocabulary, _ = sizes
    if min(*sizes[:5], sizes[6]) <= 0 or vocabulary == 0 or dim % heads or heads % key_value_heads or dim // heads % 2:
        return None
    shape, offset = list(_layout(sizes).values())[-1]
    end = offset + 4 * math.prod(shape)
    if vocabulary > 0:
        end += _rotary_bytes(sizes)
    return sizes if end == length else None


def _rotary_bytes(sizes: tuple[int, int, int, int, int, int, int]) -> int:
    """Bytes of the two rotary tables, [context, head size / 2] each, which transformers computes anew."""
    return 2 * sizes[6] * (sizes[0] // sizes[3] // 2) * 4


def _layout(sizes: tuple[int, int, int, int, int, int, int]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and offset in bytes of every tensor, by its Hugging Face name, in the order of the file."""
    dim, hidden, layers, heads, key_value_heads, vocabulary, _ = sizes
    key_value = dim // heads * key_value_heads
    per_layer: list[tuple[str, tuple[int, ...]]] = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (key_value, dim)),
        ("self_attn.v_proj", (key_value, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    ]
    order: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (abs(vocabulary), dim))]
    for kind, shape in per_layer:
        order += [(f"model.layers.{layer}.{kind}.weight", shape) for layer in range(layers)]
    order.append(("model.norm.weight", (dim,)))
    tensors: dict[str, tuple[tuple[int, ...], int]] = {}
    offset = _HEADER.size
    for name, shape in order:
        tensors[name] = (shape, offset)
        offset += 4 * math.prod(shape)
    if vocabulary < 0:
        tensors["lm_head.weight"] = ((-vocabulary, dim), offset + _rotary_bytes(sizes))
    return tensors


class Llama2cTokenizer:
    """The tokenizer of llama2.c: byte-pair encoding that merges the pair with the best score first.

    ``pieces`` and ``scores``: one entry per token. Tokens 0 to 2 are special (1 begins a sequence), 3 to 258 are the
    256 bytes, the others are pieces of text. A space is put before a text that is not empty; a character without a
    piece becomes its UTF-8 bytes; of two merges with the same score the left one goes first.
    """

    begin_of_sequence: int | None = BEGIN_OF_SEQUENCE

    def __init__(self, pieces: list[bytes], scores: list[float]) -> None:
        self.pieces = pieces
        self._token: dict[bytes, int] = {}
        for token in range(_FIRST_PIECE, len(pieces)):
            self._token.setdefault(pieces[token], token)
        self._scores = scores

    @classmethod
    def read(cls, file: Path, vocabulary: int) -> Llama2cTokenizer:
        """Read a tokenizer file: the longest piece (int32), then per token its score (float32), length (int32), bytes.

        Raises ``InputError`` unless ``file`` holds exactly ``vocabulary`` tokens.
        """
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}; expected a llama2.c tokenizer") from error
        pieces: list[bytes] = []
        scores: list[float] = []
        offset = 4
        while offset + 8 <= len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            if length < 0 or offset + length > len(data):
                break
            pieces.append(data[offset : offset + length])
            scores.append(score)
            offset += length
        if offset != len(data) or len(pieces) != vocabulary:
            raise InputError(
                f"{file} is not a llama2.c tokenizer of {vocabulary} tokens: {len(pieces)} were read, "
                f"{len(data) - offset} bytes remain; expected the file that belongs to the model"
            )
        return cls(pieces, scores)

    def encode(self, text: str) -> Encoding:
        """The tokens of ``text``, without one that begins the sequence."""
        tokens: list[int] = []
        for character in " " + text if text else "":
            encoded = character.encode("utf-8")
            piece = self._token.get(encoded)
            tokens += [piece] if piece is not None else [byte + _FIRST_BYTE_TOKEN for byte in encoded]
        merged = self._merge(tokens)
        lengths = [len(self.pieces[token]) if token >= _FIRST_PIECE else 1 for token in merged]
        # The space that was put before the text is not a byte of the text.
        return Encoding(
            tokens=np.array(merged, dtype=np.int64), end_bytes=np.cumsum(np.array(lengths, dtype=np.int64)) - 1
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``; those before the first byte (unknown, begin and end of a sequence) have none."""
        found = b""
        for token in tokens:
            if token >= _FIRST_PIECE:
                found += self.pieces[token]
            elif token >= _FIRST_BYTE_TOKEN:
                found += bytes([token - _FIRST_BYTE_TOKEN])
        return found.decode("utf-8", errors="replace").removeprefix(" ")

    def _text(self, token: int) -> bytes:
        """The bytes of text that a token stands for."""
        return self.pieces[token] if token >= _FIRST_PIECE else bytes([token - _FIRST_BYTE_TOKEN])

    def _merge(self, tokens: list[int]) -> list[int]:
        """Merge neighbours until no pair is a piece. A heap of candidates; those that no longer exist are skipped."""
        alive: list[int | None] = list(tokens)
        following = list(range(1, len(tokens) + 1))
        preceding = list(range(-1, len(tokens) - 1))
        candidates: list[tuple[float, int, int, int, int]] = []

        def consider(left: int) -> None:
            if left < 0 or following[left] >= len(alive):
                return
            first, second = alive[left], alive[following[left]]
            if first is None or second is None:  # never: ``left`` and its follower are alive
                return
            merged = self._token.get(self._text(first) + self._text(second))
            if merged is not None:
                heapq.heappush(candidates, (-self._scores[merged], left, first, second, merged))

        for position in range(len(tokens) - 1):
            consider(position)
        while candidates:
            _, left, first, second, merged = heapq.heappop(candidates)
            right = following[left]
            if alive[left] != first or right >= len(alive) or alive[right] != second:
                continue
            alive[left], alive[right] = merged, None
            following[left] = following[right]
            if following[left] < len(alive):
                preceding[following[left]] = left
            consider(preceding[left])
            consider(left)
        return [token for token in alive if token is not None]


def find_tokenizer(model_file: Path, vocabulary: int) -> Path | None:
    """The tokenizer file beside a model: ``tok<vocabulary>.bin`` or ``tokenizer.bin``; None where there is neither."""
    for name in (f"tok{vocabulary}.bin", "tokenizer.bin"):
        if (model_file.parent / name).is_file():
            return model_file.parent / name
    return None
