"""Every kernel on a device against what is known of it, and the golden vectors of real layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from termwise.algorithms import reference
from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionarySpec
from termwise.algorithms.files import written_beside
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import activation_format, get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.models import open_model
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import BitParallelSpec, ProcessingElementSpec
from termwise.algorithms.quantize import quantize
from termwise.gpu_ref import exact, quantizers
from termwise.gpu_ref.bit_planes import bit_planes, multiply
from termwise.gpu_ref.quantized_linear import QuantizedLinear

PAPER, EXACT, SHARED = (BitSerialSpec(numerics=name) for name in ("paper", "exact", "shared_exponent"))
EXACT_PAIRS: tuple[tuple[str, ProcessingElementSpec, str], ...] = (
    *(
        (f"bit_serial-{spec.numerics}", spec, format)
        for spec, format in itertools.product(
            (PAPER, EXACT, SHARED), ("bitmod-w4g128", "bitmod-w3g128", "bitmod-w6g128", "int-w8g128", "int-asym-w4g128")
        )
    ),
    ("outlier_victim", OutlierVictimSpec(), "olive-w4"),
    ("outlier_victim", OutlierVictimSpec(), "olive-w8"),
    ("outlier_victim-integer", OutlierVictimSpec(activations="integer"), "olive-w4a4"),
    ("outlier_victim-integer", OutlierVictimSpec(activations="integer"), "olive-w8a8"),
    ("flint", FlintSpec(), "ant-w4g128"),
    ("flint-integer", FlintSpec(activations="integer"), "ant-w4a4"),
    ("dictionary", DictionarySpec(), "gobo-w3"),
    ("fp16_mac", Fp16MacSpec(), "fp16"),
)
"""Name, PE and format of every exact kernel."""

WEIGHT_ONLY_FORMATS = (
    "bitmod-w4g128",
    "bitmod-w3g128",
    "bitmod-w6g128",
    "olive-w4",
    "ant-w4g128",
    "int-asym-w4g128",
    "mxfp4",
)
QUANTIZER_FORMATS = ("bitmod-w4g128", "bitmod-w3g128", "bitmod-w6g128", "olive-w4", "olive-w8")
_ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Check:
    """One kernel in one format: ``cases`` numbers were compared, and ``wrong`` of them are not what they must be."""

    name: str
    format: str
    cases: int
    wrong: int


@dataclass(frozen=True)
class Golden:
    """A real layer: packed weights, activations and what the device computed of them."""

    name: str
    arrays: dict[str, NDArray[Any]]


def run_exact(
    spec: ProcessingElementSpec,
    format: str,
    weights: NDArray[np.float32],
    activations: NDArray[np.float16],
    device: torch.device,
) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """Product of a PE with a matrix in ``format``, and the packed operands, by name."""
    tensor = quantize(weights, format)
    packed: dict[str, NDArray[Any]] = {f"weights.{name}": part for name, part in tensor.parts.items()}
    if isinstance(spec, BitParallelSpec) and spec.activations == "integer":
        stored = activation_format(get_format(format))
        assert stored is not None
        tokens = quantize(activations, stored)
        packed |= {f"activations.{name}": part for name, part in tokens.parts.items()}
        return exact.multiply_integers(spec, tensor, tokens, device=device), packed
    packed["activations"] = activations
    return exact.multiply(spec, tensor, activations, device=device), packed


def _reference(
    spec: ProcessingElementSpec, format: str, weights: NDArray[np.float32], activations: NDArray[np.float16]
) -> NDArray[np.float32]:
    tensor = quantize(weights, format)
    if not isinstance(spec, BitParallelSpec) or spec.activations == "fp16":
        return reference.multiply(spec, tensor, activations)
    stored = activation_format(tensor.format)
    assert stored is not None
    return reference.multiply_integers(spec, tensor, quantize(activations, stored))


def exact_checks(device: torch.device, *, outputs: int, tokens: int, keep: Callable[[Golden], None]) -> Iterator[Check]:
    """Exact kernels on a GPU against their twins, the twins against the reference.

    Of a random matrix [``outputs``, 515] and layers of ``tiny``; the latter are kept.
    """
    model = open_model("tiny")
    names = [name for name in model.matrix_names if name.endswith(("down_proj", "q_proj"))][:2]
    random = np.random.default_rng(0)
    matrices: dict[str, NDArray[np.float32]] = {
        "random": (random.standard_t(4, (outputs, 515)) * 0.05).astype(np.float32)
    }
    matrices |= {name: np.ascontiguousarray(model.matrix(name)[:outputs], dtype=np.float32) for name in names}
    cpu = torch.device("cpu")
    for name, spec, format in EXACT_PAIRS:
        wrong = cases = 0
        for matrix_name, weights in matrices.items():
            activations = random.standard_normal((tokens, weights.shape[1])).astype(np.float16)
            found, packed = run_exact(spec, format, weights, activations, device)
            if device == cpu:
                expected = _reference(spec, format, weights, activations)
            else:
                expected, _ = run_exact(spec, format, weights, activations, cpu)
            wrong += int(np.count_nonzero(found.view(np.uint32) != expected.view(np.uint32)))
            cases += found.size
            if matrix_name != "random":
                keep(Golden(f"{name}-{format}-{matrix_name}", {**packed, "results": found}))
        yield Check(name, format, cases, wrong)


def weight_only_checks(device: torch.device, *, outputs: int, inputs: int) -> Iterator[Check]:
    """Linear layers on ``device`` against FP64, within the bound of ``termwise.gpu_ref.weight_only``."""
    random = np.random.default_rng(1)
    for format in WEIGHT_ONLY_FORMATS:
        tensor = quantize((random.standard_t(4, (outputs, inputs)) * 0.05).astype(np.float32), format)
        weights = tensor.dequantize().astype(np.float64)
        layer = QuantizedLinear(tensor, device=device)
        wrong = cases = 0
        for type, tokens in itertools.product(_ROUNDING, (1, 3, 8, 16, 65)):
            activations = torch.from_numpy(random.standard_normal((tokens, inputs))).to(type)
            found = layer(activations.to(device)).double().cpu().numpy()
            left = activations.double().numpy()
            expected = left @ weights.T
            bound = (inputs + 17) * 2.0**-22 * (np.abs(left) @ np.abs(weights).T)
            bound += _ROUNDING[type] * (np.abs(expected) + bound) + 2.0**-25
            wrong += int(np.count_nonzero(~(np.abs(found - expected) <= bound)))
            cases += found.size
        yield Check("weight_only", format, cases, wrong)


def quantizer_checks(device: torch.device, *, outputs: int) -> Iterator[Check]:
    """Quantizers on ``device`` against those of the CPU, in bytes."""
    model = open_model("tiny")
    name = next(name for name in model.matrix_names if name.endswith("down_proj"))
    weights = np.ascontiguousarray(model.matrix(name)[:outputs], dtype=np.float32)
    for format in QUANTIZER_FORMATS:
        expected, found = quantize(weights, format), quantizers.quantize(weights, format, device=device)
        wrong = sum(int(np.count_nonzero(found.parts[key] != part)) for key, part in expected.parts.items())
        yield Check("quantizers", format, expected.nbytes, wrong)


def bit_plane_checks(device: torch.device) -> Iterator[Check]:
    """Products from bit planes on ``device`` against whole numbers, for every pair of widths."""
    random = np.random.default_rng(2)
    for bits in range(1, 9):
        wrong = cases = 0
        for other in range(1, 9):
            weights = random.integers(0, 1 << bits, (33, 300)).astype(np.uint8)
            activations = random.integers(0, 1 << other, (9, 300)).astype(np.uint8)
            held = [
                bit_planes(torch.from_numpy(codes).to(device), width, "unsigned")
                for codes, width in ((weights, bits), (activations, other))
            ]
            found = multiply(*held).cpu().numpy()
            wrong += int(np.count_nonzero(found != activations.astype(np.int64) @ weights.astype(np.int64).T))
            cases += found.size
        yield Check("bit_planes", f"w{bits}a1..a8", cases, wrong)


def write_golden(golden: Golden, folder: Path, provenance: dict[str, str]) -> Path:
    """Write the arrays as safetensors, with where they come from in the file's metadata; whole or not at all."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in golden.arrays.items()}
    path = folder / f"{golden.name}.safetensors"
    with written_beside(path) as temporary:
        save_file(arrays, temporary, metadata=provenance)
    return path
