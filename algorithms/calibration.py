"""What a text tells of the inputs of linear layers, one transformer block at a time.

The model's own code (transformers) reads the text block by block, so that a model need not fit into memory: beside the
embedding there is one block's weights at a time, the hidden states between two blocks, and what is added up of the
current block's inputs. Every step calls the model as a whole. The blocks before the current one return the hidden
states that were kept, the current one runs, and the call is broken off behind it. So masks, positions and whatever
else a block is given are what the model's code makes of them, and the inputs equal those of an ordinary run exactly,
as long as no weights are replaced.

A model is a chain of blocks if each block gets as its hidden states the very tensor that the one before returned, and
returns nothing else; that is checked, and another model is refused. What stands before the first block and behind the
last one (a projection of the embeddings, a pooler, the head) is a stage of its own.

Windows are those of ``perplexity``; for an encoder (BERT) those of ``embeddings``, one per document. Windows of one
length are read together, so there is no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.embeddings import sentences
from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.models import Model, check_vocabulary
from termwise.algorithms.perplexity import MAXIMUM_WINDOW, text_windows
from termwise.algorithms.text import Text

MAXIMUM_WINDOWS = 128
"""Windows that are read unless another number is asked for; GPTQ (section 4) takes as many sequences."""

_TOKENS_AT_ONCE = MAXIMUM_WINDOW


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """Statistics of X [rows, inputs], the input of a linear layer over the whole text; a row is mostly a token.

    Attributes:
        rows: how many there were.
        mean_magnitude: mean |x| of every input channel, float64 [inputs].
        max_magnitude: max |x| of every input channel, float32 [inputs].
        gram: Xᵀ X, float64 [inputs, inputs]. Products of at most 2048 rows are float32, as the inputs are, and twice as
            fast as float64; their sum is float64, so that the error does not grow with the length of the text.
        sample: rows drawn at random, each set of them equally likely, float32 [rows drawn, inputs].
    """

    rows: int
    mean_magnitude: NDArray[np.float64]
    max_magnitude: NDArray[np.float32]
    gram: NDArray[np.float64]
    sample: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SharedInput:
    """The ``statistics`` of one tensor that all of the linear ``layers`` read, in the order of their calls."""

    layers: tuple[str, ...]
    statistics: InputStatistics


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the model whose turn it is: a block, or what stands before the first or behind the last block.

    Attributes:
        name: path of the block's module; ``before the blocks`` and ``behind the blocks`` for the others.
        layers: names of the linear layers in it.
    """

    name: str
    layers: tuple[str, ...]
    _statistics: Callable[[], tuple[SharedInput, ...]]
    _replace: Callable[[str, NDArray[np.float32]], None]

    def statistics(self) -> tuple[SharedInput, ...]:
        """Statistics of the inputs with the stage's weights as they are; without layers that are never called.

        Raises ``TermwiseError``, which names the layer, where an input is NaN or infinite.
        """
        return self._statistics()

    def replace(self, name: str, weights: NDArray[np.float32]) -> None:
        """Let later stages see what layer ``name`` makes with ``weights``, float32 [outputs, inputs]."""
        self._replace(name, weights)


class Calibration:
    """The windows of a text, and a model's way through them, stage by stage.

    ``maximum_windows``: so many windows are read, spread evenly over the text. ``quantized_inputs``: a stage sees the
    outputs of replaced weights before it (as GPTQ, section 4, has it); otherwise those of the model's own.
    ``sample_rows`` rows of every input are kept, drawn with ``seed``.

    Raises ``InputError``: a model without code, tokenizer, or chain of blocks; a text with fewer tokens than one window
    (the model's context, at most 2048 tokens, or what its tokenizer cuts sentences to); a tokenizer of another model.
    """

    def __init__(
        self,
        model: Model,
        text: Text,
        *,
        maximum_windows: int = MAXIMUM_WINDOWS,
        quantized_inputs: bool = True,
        sample_rows: int = 0,
        seed: int = 0,
    ) -> None:
        if maximum_windows < 1:
            raise InputError(f"calibration on {maximum_windows} windows; expected at least one")
        self._model, self._text = model, text
        self._quantized_inputs, self._sample_rows, self._seed = quantized_inputs, sample_rows, seed
        module = model.skeleton()[0]
        windows, self.window_tokens = _windows(model, module.config, text)
        found = sum(window.size for window in windows)
        if found < self.window_tokens:
            raise InputError(
                f"the text {text.name} has {found} tokens for the calibration of {model.name}; "
                f"expected at least one window of {self.window_tokens}"
            )
        chosen = np.linspace(0, len(windows) - 1, min(len(windows), maximum_windows)).round().astype(int)
        self.windows = [windows[index] for index in chosen]
        check_vocabulary(model, module, self.windows)
        _block_names(module, model)

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return sum(window.size for window in self.windows)

    def stages(self) -> Iterator[Stage]:
        """The stages in the order in which the model runs them; a stage is over when the next one is asked for.

        Each iteration begins anew, with the model's own weights. Raises ``InputError`` where the model turns out to be
        no chain of blocks.
        """
        runner = _Runner(self._model, self.windows, self._text.name)

        def stage(at: int, name: str, layers: tuple[str, ...]) -> Stage:
            def statistics() -> tuple[SharedInput, ...]:
                collector = _Collector(self._sample_rows, self._seed, self._text.name)
                runner.run(at, observe=collector, layers=layers, between=collector.next_batch)
                return collector.result()

            def replace(layer: str, weights: NDArray[np.float32]) -> None:
                if self._quantized_inputs:
                    runner.replace(layer, weights)

            return Stage(name=name, layers=layers, _statistics=statistics, _replace=replace)

        before = runner.layers_before()
        if before:
            yield stage(-1, "before the blocks", before)
        for at, name in enumerate(runner.blocks):
            runner.load(name)
            yield stage(at, name, runner.layers_in(name))
            runner.run(at, keep=True)
            runner.release(name)
        behind = tuple(layer for layer in runner.layers_outside if layer not in before)
        if behind:
            yield stage(len(runner.blocks), "behind the blocks", behind)


class _Halt(Exception):  # noqa: N818  # no error: what follows is not wanted
    """The model has run as far as it should."""


class _Runner:
    """A model whose blocks come into memory one at a time, and the hidden states between them.

    ``blocks``: names of the blocks. ``layers_outside``: the linear layers that stand in none.
    """

    def __init__(self, model: Model, windows: list[NDArray[np.int64]], text_name: str) -> None:
        self._model, self._text_name = model, text_name
        self._module, self._tensors = model.skeleton()
        self._module.config.use_cache = False
        self._linears = {linear.name: linear for linear in model.structure.linears}
        self._head = model.structure.head
        self.blocks = _block_names(self._module, model)
        within = tuple(f"{block}." for block in self.blocks)
        self.layers_outside = tuple(name for name in self._linears if not name.startswith(within))
        self._batches = list(_batches(windows))
        self._states: list[Any] = [None] * len(self._batches)
        self._tuples: dict[int, int] = {}  # length of the tuple that a block returns; absent: a tensor
        self._at = self._batch = self._following = 0
        self._keep = False
        self._given: Any = None
        for index, name in enumerate(self.blocks):
            block = self._module.get_submodule(name)
            block.forward = self._forward_of(index, block.forward)
        self._read(lambda name: not name.startswith(within) and name.rpartition(".")[0] not in self.layers_outside)
        for name in self.layers_outside:
            self._module.get_submodule(name).register_forward_pre_hook(self._loader(name))

    def layers_in(self, block: str) -> tuple[str, ...]:
        """The linear layers of a block."""
        return tuple(name for name in self._linears if name.startswith(f"{block}."))

    def layers_before(self) -> tuple[str, ...]:
        """The linear layers outside of the blocks that run before the first block."""
        found: dict[str, None] = {}
        self._call(-1, 0, observe=lambda name, _: found.setdefault(name), layers=self.layers_outside)
        return tuple(name for name in self.layers_outside if name in found)

    def load(self, name: str) -> None:
        """Read the parameters of the module ``name`` from the checkpoint."""
        self._read(lambda parameter: parameter.startswith(f"{name}."))

    def release(self, name: str) -> None:
        """Give the memory of the module ``name`` back."""
        self._module.get_submodule(name).to("meta")

    def replace(self, name: str, weights: NDArray[np.float32]) -> None:
        """Put ``weights`` [outputs, inputs] in the place of linear layer ``name``."""
        import torch

        values = weights.T if self._linears[name].transposed else weights
        parameter = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)), requires_grad=False)
        self._module.get_submodule(name).weight = parameter

    def run(
        self,
        at: int,
        *,
        keep: bool = False,
        observe: Callable[[str, Any], object] | None = None,
        layers: tuple[str, ...] = (),
        between: Callable[[], None] | None = None,
    ) -> None:
        """Run the stage ``at`` (-1 and the number of blocks: before and behind them) on all batches.

        ``keep`` makes the block's outputs the hidden states; ``observe`` is handed the inputs of ``layers``, and
        ``between`` is called after each batch.
        """
        for batch in range(len(self._batches)):
            self._call(at, batch, keep=keep, observe=observe, layers=layers)
            if between is not None:
                between()

    def _call(
        self,
        at: int,
        batch: int,
        *,
        keep: bool = False,
        observe: Callable[[str, Any], object] | None = None,
        layers: tuple[str, ...] = (),
    ) -> None:
        """Call the model on one batch; see ``run``."""
        import torch

        self._at, self._batch, self._keep, self._following = at, batch, keep, 0
        handles = []
        if observe is not None:
            for name in layers:
                layer = self._module.get_submodule(name)
                handles.append(layer.register_forward_pre_hook(self._observer(name, observe), prepend=True))
        try:
            with torch.inference_mode():
                self._module(input_ids=torch.from_numpy(self._batches[batch]))
        except _Halt:
            return
        finally:
            for handle in handles:
                handle.remove()
            self._given = None
        if at < len(self.blocks):
            raise self._no_chain(f"{self.blocks[max(at, 0)]} is not called")

    def _observer(self, name: str, observe: Callable[[str, Any], object]) -> Callable[..., None]:
        """A hook that hands the input of layer ``name`` on; behind the head nothing is of interest."""

        def hook(_layer: Any, arguments: tuple[Any, ...]) -> None:
            observe(name, arguments[0])
            if name == self._head:
                raise _Halt

        return hook

    def _loader(self, name: str) -> Callable[..., None]:
        """A hook that reads a layer outside of the blocks when it is called for the first time."""

        def hook(layer: Any, _arguments: tuple[Any, ...]) -> None:
            if layer.weight.is_meta:
                self.load(name)

        return hook

    def _read(self, wanted: Callable[[str], bool]) -> None:
        """Read the parameters whose name is ``wanted``, as float32."""
        import torch

        state = {
            name: torch.from_numpy(self._model.checkpoint.read(tensor)).float()
            for name, tensor in self._tensors.items()
            if wanted(name)
        }
        self._module.load_state_dict(state, strict=False, assign=True)

    def _forward_of(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in the place of the ``forward`` of block ``index``: ``own`` in its turn."""

        def forward(*arguments: Any, **options: Any) -> Any:
            if self._at < index:
                raise _Halt
            self._check_call(index, arguments, options)
            if self._at > index:
                self._given = self._states[self._batch]
                length = self._tuples.get(index)
                return self._given if length is None else (self._given, *(None,) * (length - 1))
            output = own(*arguments, **options)
            if self._keep:
                self._states[self._batch] = self._hidden_states_of(index, output)
            raise _Halt

        return forward

    def _check_call(self, index: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Raise ``InputError`` unless block ``index`` follows the one before, on that one's hidden states."""
        name = self.blocks[index]
        if index != self._following:
            raise self._no_chain(f"{name} is called out of turn")
        self._following += 1
        hidden = arguments[0] if arguments else options.get("hidden_states")
        if index and hidden is not self._given:
            raise self._no_chain(f"{name} does not get what the block before it returned")

    def _hidden_states_of(self, index: int, output: Any) -> Any:
        """The hidden states that a block returns. Raises ``InputError`` if it returns more."""
        if isinstance(output, tuple):
            if any(other is not None for other in output[1:]):
                raise self._no_chain(f"{self.blocks[index]} returns more than hidden states")
            self._tuples[index] = len(output)
            output = output[0]
        return output

    def _no_chain(self, reason: str) -> InputError:
        return InputError(
            f"{self._model.name} cannot be calibrated block by block: {reason}; expected a chain of blocks"
        )


class _Collector:
    """Adds up the inputs that it is handed; layers that are handed the same tensor share a sum."""

    def __init__(self, sample_rows: int, seed: int, text_name: str) -> None:
        self._sample_rows, self._seed, self._text_name = sample_rows, seed, text_name
        self._first: dict[str, str] = {}  # of the layers with one input: the first
        self._sums: dict[str, _Sums] = {}
        self._inputs: dict[str, Any] = {}  # of this batch; kept, so that no other tensor takes its identity

    def __call__(self, name: str, values: Any) -> None:
        """Add ``values``, a torch tensor [..., inputs], the input of layer ``name``. Raises ``TermwiseError``."""
        if name not in self._first:
            self._first[name] = next((first for first, other in self._inputs.items() if other is values), name)
        first = self._first[name]
        if first != name:
            if self._inputs.get(first) is not values:
                raise TermwiseError(f"{name} and {first} read the same tensor at first and different ones later")
            return
        self._inputs[name] = values
        if name not in self._sums:
            self._sums[name] = _Sums(values.shape[-1], self._sample_rows, self._seed)
        if not self._sums[name].add(values.flatten(0, -2)):
            raise TermwiseError(f"the input of {name} is NaN or infinite on {self._text_name}")

    def next_batch(self) -> None:
        """Let go of the tensors of a batch."""
        self._inputs.clear()

    def result(self) -> tuple[SharedInput, ...]:
        """One entry for each input, in the order of the calls."""
        return tuple(
            SharedInput(
                layers=tuple(name for name, leader in self._first.items() if leader == first),
                statistics=sums.statistics(),
            )
            for first, sums in self._sums.items()
        )


class _Sums:
    """Sums over the rows of one input."""

    def __init__(self, inputs: int, sample_rows: int, seed: int) -> None:
        import torch

        self._rows = 0
        self._magnitude = torch.zeros(inputs, dtype=torch.float64)
        self._largest = torch.zeros(inputs, dtype=torch.float32)
        self._gram = torch.zeros((inputs, inputs), dtype=torch.float64)
        self._sample_rows = sample_rows
        self._random = np.random.default_rng(seed)
        self._sample = np.empty((0, inputs), dtype=np.float32)
        self._numbers = np.empty(0)  # one random number per row of the sample: the least ones of all rows

    def add(self, values: Any) -> bool:
        """Add ``values``, a float32 torch tensor [rows, inputs]; False if one of them is NaN or infinite."""
        import torch

        magnitudes = values.abs()
        largest = magnitudes.amax(dim=0)
        if not torch.isfinite(largest).all():
            return False
        self._rows += len(values)
        self._magnitude += magnitudes.sum(dim=0, dtype=torch.float64)
        torch.maximum(self._largest, largest, out=self._largest)
        for part in values.split(_TOKENS_AT_ONCE):
            self._gram += part.T @ part
        if self._sample_rows:
            numbers = np.concatenate([self._numbers, self._random.random(len(values))])
            kept = np.sort(np.argsort(numbers, kind="stable")[: self._sample_rows])
            self._numbers = numbers[kept]
            self._sample = np.concatenate([self._sample, values.numpy()])[kept]
        return True

    def statistics(self) -> InputStatistics:
        """What was added up."""
        return InputStatistics(
            rows=self._rows,
            mean_magnitude=(self._magnitude / self._rows).numpy(),
            max_magnitude=self._largest.numpy(),
            gram=self._gram.numpy(),
            sample=self._sample,
        )


def _block_names(module: Any, model: Model) -> tuple[str, ...]:
    """Paths of the transformer blocks: the members of the list that holds the most linear layers, the outermost.

    Raises ``InputError`` where there is none, or there are an encoder's and a decoder's.
    """
    import torch

    if getattr(module.config, "is_encoder_decoder", False):
        raise InputError(
            f"{model.name} cannot be calibrated block by block: it has an encoder and a decoder; "
            "expected one chain of blocks"
        )
    best, most = "", 0
    for path, candidate in module.named_modules():
        if isinstance(candidate, torch.nn.ModuleList):
            count = sum(linear.name.startswith(f"{path}.") for linear in model.structure.linears)
            if count > most:
                best, most = path, count
    if not most:
        raise InputError(f"{model.name} has no list of blocks with linear layers; expected a transformer")
    return tuple(f"{best}.{index}" for index in range(len(module.get_submodule(best))))


def _windows(model: Model, config: Any, text: Text) -> tuple[list[NDArray[np.int64]], int]:
    """The windows of ``text``, int64 [tokens] each, and the tokens of a full one."""
    if model.structure.encoder:
        return sentences(model, config, text)
    context = getattr(config, "max_position_embeddings", None)
    length = min(MAXIMUM_WINDOW, context) if isinstance(context, int) else MAXIMUM_WINDOW
    return text_windows(model, text, length)[0], length


def _batches(windows: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Windows of one length together, int64 [windows, tokens], at most about 2048 tokens, the longest first."""
    by_length: dict[int, list[NDArray[np.int64]]] = {}
    for window in windows:
        by_length.setdefault(window.size, []).append(window)
    for length in sorted(by_length, reverse=True):
        alike = by_length[length]
        at_once = max(1, _TOKENS_AT_ONCE // length)
        for start in range(0, len(alike), at_once):
            yield np.stack(alike[start : start + at_once])
