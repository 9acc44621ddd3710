"""A model in memory whose linear layers can be replaced: their weights, and what their inputs pass through.

A linear layer then computes quantize(x / input_scales) @ weightsᵀ + bias, with ``weights`` that hold the input scales
already. transformers' own modules run: ``torch.nn.Linear`` and ``Conv1D`` (GPT-2) take other weights, and a hook before
their ``forward`` changes the input. Layers with the same input (queries, keys and values) quantize it each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.models import Model

Float32 = NDArray[np.float32]


@cache
def _threads() -> int:
    """Threads of every forward pass: those that torch had at the first one.

    Numba's parallel loops set the number for torch too (they share OpenMP), and sums depend on it in the last bits.
    """
    import torch

    return torch.get_num_threads()


class ActivationQuantizer(Protocol):
    """What the input of a linear layer passes through."""

    def __call__(self, activations: Float32) -> Float32:
        """The values that a linear layer multiplies with, float32, of ``activations``, float32 [tokens, channels].

        No token may change another one's values: windows of a batch are filled up with tokens that do not count.
        """


class LoadedModel:
    """A model in memory, float32 on the CPU, for evaluation. Raises ``InputError`` where it cannot be run.

    ``encoder``: the model is one that reads a sentence as a whole (BERT), not one that predicts the next token.
    """

    def __init__(self, model: Model, *, encoder: bool = False) -> None:
        self._name = model.name
        self._module: Any = model.load(encoder=encoder)
        self._linears = {linear.name: linear for linear in model.structure.linears}
        self._original: dict[str, Any] = {}
        self._inputs: dict[str, _InputHook] = {}

    def replace(
        self,
        name: str,
        weights: Float32,
        *,
        activation: ActivationQuantizer | None = None,
        input_scales: Float32 | None = None,
    ) -> None:
        """Put ``weights``, float32 [outputs, inputs], in the place of linear layer ``name``.

        ``activation`` quantizes the layer's input, and ``input_scales``, positive float32 [inputs], divides it before
        that; ``weights`` are then those that have been multiplied by the scales. Without them the input is untouched,
        whatever an earlier call said. A head that shares its tensor with the embedding gets one of its own, so the
        embedding stays as it is. Raises ``InputError`` for scales of another length, or that are not positive.
        """
        import torch

        linear = self._linears[name]
        if input_scales is not None:
            if input_scales.shape != (linear.inputs,):
                raise InputError(f"{name}: input scales {list(input_scales.shape)}; expected [{linear.inputs}]")
            if not (np.isfinite(input_scales).all() and (input_scales > 0).all()):
                raise InputError(f"{name}: an input scale is not a positive number; expected all of them positive")
        layer = self._module.get_submodule(name)
        self._original.setdefault(name, layer.weight)
        values = weights.T if linear.transposed else weights
        layer.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)), requires_grad=False)
        if name in self._inputs:
            self._inputs.pop(name).remove()
        if activation is not None or input_scales is not None:
            self._inputs[name] = _InputHook(layer, name, activation, input_scales)

    def restore(self) -> None:
        """Put the model's own weights back; inputs are untouched again."""
        for name, parameter in self._original.items():
            self._module.get_submodule(name).weight = parameter
        self._original.clear()
        for hook in self._inputs.values():
            hook.remove()
        self._inputs.clear()

    def observe_inputs(self, observer: Callable[[str, Float32], None], *, tokens: int | None = None) -> None:
        """Run the model over its text and hand ``observer`` every linear layer's name and input.

        Inputs are float32 [tokens, channels], sequence by sequence without anything to fill up; a sequence is not begun
        when ``tokens`` tokens have been read. The layers run with the weights that are in place.
        """
        import torch

        read = 0
        with torch.inference_mode(), ExitStack() as stack:
            for name in self._linears:
                hook = _Observer(name, observer)
                handle = self._module.get_submodule(name).register_forward_pre_hook(hook, prepend=True)
                stack.callback(handle.remove)
            for sequence in self.sequences():
                if tokens is not None and read >= tokens:
                    break
                self._forward(torch.from_numpy(sequence)[None])
                read += len(sequence)

    def sequences(self) -> Sequence[NDArray[np.int64]]:
        """The text as the model reads it: int64 [tokens] each."""
        raise NotImplementedError

    def _forward(self, tokens: Any) -> Any:
        """The model's output for ``tokens``, a torch tensor, int64 [sequences, tokens]."""
        import torch

        torch.set_num_threads(_threads())
        return self._output(tokens)

    def _output(self, tokens: Any) -> Any:
        raise NotImplementedError

    def _check_inputs(self) -> None:
        """Raise ``TermwiseError`` if the model never gave an input to a layer whose input is to be quantized."""
        for name, hook in self._inputs.items():
            if not hook.called:
                raise TermwiseError(
                    f"{self._name} multiplies with the weights of {name} without calling that layer, "
                    "so its input cannot be quantized"
                )


class _Observer:
    """A hook that hands a layer's input on."""

    def __init__(self, name: str, observer: Callable[[str, Float32], None]) -> None:
        self._name, self._observer = name, observer

    def __call__(self, _: Any, arguments: tuple[Any, ...]) -> None:
        """Called by torch before the layer's ``forward``."""
        self._observer(self._name, arguments[0].detach().flatten(0, -2).float().numpy())


class _InputHook:
    """A hook that divides a layer's input by scales and quantizes it."""

    def __init__(self, layer: Any, name: str, quantizer: ActivationQuantizer | None, scales: Float32 | None) -> None:
        import torch

        self.called = False
        self._name, self._quantizer = name, quantizer
        self._scales = None if scales is None else torch.from_numpy(np.ascontiguousarray(scales, dtype=np.float32))
        self._handle = layer.register_forward_pre_hook(self)

    def __call__(self, _: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Called by torch before the layer's ``forward``; returns the arguments that it gets."""
        import torch

        self.called = True
        values = arguments[0]
        if self._scales is not None:
            values = values / self._scales
        if self._quantizer is not None:
            if not torch.isfinite(values).all():
                raise TermwiseError(f"the input of {self._name} is NaN or infinite with the weights in place")
            try:
                quantized = self._quantizer(values.flatten(0, -2).float().numpy())
            except InputError as error:
                raise TermwiseError(f"the input of {self._name}: {error}") from None
            values = torch.from_numpy(quantized).view_as(values).to(values.dtype)
        return (values, *arguments[1:])

    def remove(self) -> None:
        """Leave the layer's input alone from now on."""
        self._handle.remove()
