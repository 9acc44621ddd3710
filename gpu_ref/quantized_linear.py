"""A linear layer of torch whose weights stay packed, and what puts it in the place of a model's own layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError
from termwise.algorithms.formats import Format
from termwise.algorithms.quantize import INPUT_SCALES, QuantizedTensor, quantize
from termwise.gpu_ref.launch import check_device
from termwise.gpu_ref.layout import FastLayout, check_codes, fast_layout, reason_against
from termwise.gpu_ref.operands import Matrix, on_device, operands
from termwise.gpu_ref.weight_only import weight_only, weight_only_any

_TRANSPOSED = "Conv1D"
_POINTERS = 9
"""Members of ``Matrix`` that are pointers; they come first."""


class QuantizedLinear(torch.nn.Module):
    """activations · weightsᵀ + bias with the kernel that its format has: FP16 or BF16 in and out, sums in FP32.

    The state dict holds the packed arrays under their names in ``QuantizedTensor.parts`` (``codes``, ``group_scales``,
    ...), and ``bias``; so a layer reads what another one, or ``quantize``, has written. The weights take no gradients.

    Formats with a reason against the tensor-core kernels (``layout.reason_against``) run on a slower kernel that takes
    all of them but GOBO's and FP16, and groups along the inputs alone.

    Args:
        tensor: the packed weights [outputs, inputs]; a format of weights alone.
        bias: [outputs], or None.
        device: a GPU, or the CPU, where the kernels' twins run.

    Raises ``InputError`` for formats without a kernel, codes that are no levels, and devices without kernels;
    ``MissingToolError`` without a GPU where one is named.
    """

    def __init__(
        self, tensor: QuantizedTensor, bias: torch.Tensor | None = None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        device = torch.device(device)
        check_device(device)
        check_format(tensor.format)
        self.format = tensor.format
        self.out_features, self.in_features = tensor.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise InputError(f"a bias {list(bias.shape)}; expected [{self.out_features}]")
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach().to(device), requires_grad=False)
        self._weights = _Fast.of(tensor, device) if reason_against(tensor.format) is None else _Any.of(tensor, device)
        scales = tensor.parts.get(INPUT_SCALES)
        self._input_scales = None if scales is None else on_device(scales.astype(np.float32), device)

    @property
    def tensor(self) -> QuantizedTensor:
        """The packed weights."""
        parts = self._weights.parts()
        if self._input_scales is not None:
            parts[INPUT_SCALES] = self._input_scales.cpu().numpy()
        return QuantizedTensor(format=self.format, shape=(self.out_features, self.in_features), parts=parts)

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """FP16 or BF16 [..., inputs] to [..., outputs] of the same type.

        Raises ``InputError`` for another type, another number of inputs, or another device.
        """
        if self._input_scales is not None:
            activations = (activations / self._input_scales).to(activations.dtype)
        results = self._weights.multiply(activations)
        return results if self.bias is None else results + self.bias.to(results.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows of the layer."""
        return f"{self.in_features}, {self.out_features}, {self.format.name}, bias={self.bias is not None}"

    def _apply(self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move to another device. Packed weights have no other type: ``half()`` changes the bias alone."""
        super()._apply(change, recurse)  # type: ignore[no-untyped-call]
        device = change(torch.empty(0, device=self._weights.device)).device
        if device != self._weights.device:
            check_device(device)
            self._weights = self._weights.moved(device)
            if self._input_scales is not None:
                self._input_scales = self._input_scales.to(device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in self.tensor.parts.items():
            destination[prefix + name] = torch.from_numpy(np.ascontiguousarray(part))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.tensor.parts
        found: dict[str, NDArray[Any]] = {}
        for name, part in own.items():
            if prefix + name not in state_dict:
                missing_keys.append(prefix + name)
                continue
            given = state_dict.pop(prefix + name).cpu().numpy()
            if given.shape != part.shape or given.dtype != part.dtype:
                error_msgs.append(
                    f"{prefix}{name} is {given.dtype} {list(given.shape)}; expected {part.dtype} {list(part.shape)}"
                )
                continue
            found[name] = given
        if len(found) == len(own):
            tensor = QuantizedTensor(format=self.format, shape=(self.out_features, self.in_features), parts=found)
            try:
                self._weights = type(self._weights).of(tensor, self._weights.device)
                if INPUT_SCALES in found:
                    self._input_scales = on_device(found[INPUT_SCALES], self._weights.device)
            except InputError as error:
                error_msgs.append(f"{prefix}codes: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def check_format(format: Format) -> None:
    """Raises ``InputError`` for a format that no kernel of linear layers takes."""
    if format.activation_bits is not None:
        raise InputError(
            f"{format.name} quantizes activations, which stay in floating point here; "
            f"expected {format.weights_only.name}"
        )
    if format.family in ("fp16", "gobo"):
        raise InputError(f"there is no kernel of a linear layer in {format.name}; expected grids or pairs of a group")
    if format.groups_along_outputs:
        raise InputError(f"the groups of {format.name} lie along the outputs; expected groups along the inputs")


@dataclass(frozen=True)
class _Fast:
    """Weights in the layout of the tensor-core kernels."""

    layout: FastLayout  # its arrays on the CPU share their memory with the tensors there
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, tensor: QuantizedTensor, device: torch.device) -> _Fast:
        layout = fast_layout(tensor)
        arrays = (layout.codes, layout.scales, layout.tables, layout.channel_scales)
        return cls(layout, tuple(on_device(values, device) for values in arrays))

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def moved(self, device: torch.device) -> _Fast:
        return _Fast(self.layout, tuple(held.to(device) for held in self.tensors))

    def parts(self) -> dict[str, NDArray[Any]]:
        return self.layout.parts()

    def multiply(self, activations: torch.Tensor) -> torch.Tensor:
        layout = self.layout
        settings = (layout.kernel, layout.shape[1], layout.group_shift, layout.type_mask, layout.exponent)
        found: torch.Tensor = weight_only(activations, *self.tensors, *settings)
        return found


@dataclass(frozen=True)
class _Any:
    """Weights as they are packed."""

    tensor: QuantizedTensor
    tensors: tuple[torch.Tensor, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, tensor: QuantizedTensor, device: torch.device) -> _Any:
        check_codes(tensor)
        weights = {name: part for name, part in tensor.parts.items() if name != INPUT_SCALES}
        alone = QuantizedTensor(format=tensor.format, shape=tensor.shape, parts=weights)
        given = operands(alone, device)
        names = [name for name, *_ in Matrix._fields_]
        empty = torch.empty(0, device=device)
        held = tuple(given.tensors.get(name, empty) for name in names[:_POINTERS])
        return cls(alone, held, tuple(int(getattr(given.matrix, name)) for name in names[_POINTERS:]))

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def moved(self, device: torch.device) -> _Any:
        return _Any(self.tensor, tuple(held.to(device) for held in self.tensors), self.numbers)

    def parts(self) -> dict[str, NDArray[Any]]:
        return dict(self.tensor.parts)

    def multiply(self, activations: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = weight_only_any(activations, list(self.tensors), list(self.numbers))
        return found


def swap_linears(
    model: torch.nn.Module,
    choose: Callable[[str, torch.nn.Module], QuantizedTensor | Format | str | None],
    progress: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Replace linear layers of ``model`` by quantized ones, in place, each on its layer's device.

    Linear layers are ``torch.nn.Linear`` and transformers' ``Conv1D`` (GPT-2), whose weights lie transposed.

    Args:
        choose: from a layer's name and the layer to its packed weights or a format, or None to keep it.
        progress: is told the name of every layer that is replaced.

    Returns: names of the layers that were replaced. Raises ``InputError``, which names the layer; the layers before it
    are replaced then.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        transposed = type(module).__name__ == _TRANSPOSED
        if not transposed and not isinstance(module, torch.nn.Linear):
            continue
        chosen = choose(name, module)
        if chosen is None:
            continue
        progress(name)
        try:
            weight = module.weight.T if transposed else module.weight
            if not isinstance(chosen, QuantizedTensor):
                chosen = quantize(weight.detach().float().cpu().numpy(), chosen)
            if chosen.shape != tuple(weight.shape):
                raise InputError(f"weights {list(chosen.shape)}; expected {list(weight.shape)}")
            quantized = QuantizedLinear(chosen, module.bias, weight.device)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        owner, _, last = name.rpartition(".")
        setattr(functools.reduce(getattr, filter(None, owner.split(".")), model), last, quantized)
        replaced.append(name)
    return replaced
