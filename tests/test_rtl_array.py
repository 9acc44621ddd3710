from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from termwise.algorithms.activations import StaticQuantizer
from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import activation_format, get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.algorithms.reference import multiply, multiply_integers
from termwise.rtl.array import Array, ArrayDesign
from termwise.rtl.compiled_model import CompiledModel
from termwise.rtl.layer_image import LayerImage, layer_image


@dataclass
class Bench:
    """An array whose operands come as the definition says: every term in its cycle, as early as it may."""

    design: ArrayDesign
    cycles: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = CompiledModel(Array(self.design))

    def run(self, image: LayerImage) -> NDArray[np.float16]:
        """Outputs [tokens, outputs]."""
        design = self.design
        outputs = np.zeros((image.column_tiles * design.columns, image.row_tiles * design.rows), np.uint16)
        for row_tile in range(image.row_tiles):
            for column_tile in range(image.column_tiles):
                found = self._tile(image, row_tile, column_tile)
                rows = slice(row_tile * design.rows, (row_tile + 1) * design.rows)
                outputs[column_tile * design.columns : (column_tile + 1) * design.columns, rows] = found
        return outputs[: image.tokens, : image.outputs].view(np.float16)

    def _tile(self, image: LayerImage, row_tile: int, column_tile: int) -> NDArray[np.uint16]:
        design = self.design
        weights, activations = (
            _words(design, image, operand, tile)
            for operand, tile in (("weights", row_tile), ("activations", column_tile))
        )
        groups = [_packed(words, 24) for words in _tile_of(image.groups, row_tile, design.rows).T]
        exponents = self._exponents(image, column_tile)
        ports: dict[str, list[int]] = {
            name: [] for name in ("weights", "activations", "groups", "exponents", "control")
        }
        distance = design.group_distance
        since = distance
        last_group = len(groups) - 1
        for step in range(image.row_steps):
            group = step // image.group_steps
            for term in range(image.terms):
                first = step % image.group_steps == 0 and term == 0
                ends = (step + 1) % image.group_steps == 0 or step + 1 == image.row_steps
                last = ends and term + 1 == image.terms
                while last and since < distance:
                    for name, port in ports.items():
                        port.append(0 if name == "control" else port[-1])
                    since += 1
                since = 1 if last else since + 1
                ports["weights"].append(weights[step * len(weights) // image.row_steps])
                ports["activations"].append(activations[step * len(activations) // image.row_steps])
                ports["groups"].append(groups[group])
                ports["exponents"].append(exponents[group])
                ports["control"].append(
                    1
                    | first << 1
                    | last << 2
                    | (group == 0) << 3
                    | (group == last_group) << 4
                    | term << 5
                    | (step & 1) << 8
                )
        drain = design.drain_cycles - 2
        for port in ports.values():
            port.extend([0] * drain)
        constants = {
            "layer": image.layer,
            "channel_scales": _packed(_tile_of(image.channel_scales, row_tile, design.rows).view(np.uint32), 32),
            "column_scales": _packed(_tile_of(image.column_scales, column_tile, design.columns).view(np.uint16), 16),
        }
        self.model.run(constants, 1)  # the layer is known a cycle before
        self.model.run({**ports, **constants})
        # Issue is two cycles before a term enters, and the drain is counted from it: now the outputs are there.
        self.model.run({"exchange": 1, **constants}, 1)
        found = self.model.run({"read_row": list(range(design.rows))})["outputs"]
        return np.array([[int(word) >> 16 * column & 0xFFFF for word in found] for column in range(design.columns)])

    def _exponents(self, image: LayerImage, column_tile: int) -> list[int]:
        """The largest exponent of each group and column, packed."""
        if not self.design.datapath.group_exponents:
            return [0] * image.groups.shape[1]
        halves = _tile_of(image.activations.view(np.uint16), column_tile, self.design.columns)
        fields = np.maximum(halves >> 10 & 31, 1)
        return [
            _packed(fields[:, first : first + image.group_inputs].max(axis=1), 5)
            for first in range(0, image.inputs, image.group_inputs)
        ]


TYPES = ("bitmod_fp4", "bitmod_fp3", "int6", "int8")
"""Those of BitMoD's formats: a decoder of fewer types is compiled sooner."""


def _tile_of(values: NDArray[Any], tile: int, size: int) -> NDArray[Any]:
    """``size`` rows, zeros where there are none."""
    rows = values[tile * size : (tile + 1) * size]
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])


def _words(design: ArrayDesign, image: LayerImage, operand: str, tile: int) -> list[int]:
    """The words of a tile's steps, a row after the other in each, as the operand memory shows them."""
    path = design.datapath
    if operand == "weights":
        packed, bits, size = image.weights, image.weight_code_bits, design.rows
        width, steps = max(path.weight_widths), path.weight_steps
    else:
        packed, bits, size = image.activations, image.activation_code_bits, design.columns
        width, steps = max(path.activation_widths), path.activation_steps
    every = np.unpackbits(_tile_of(packed, tile, size), axis=1, bitorder="little")[:, : image.inputs * bits]
    codes = (every.reshape(size, image.inputs, bits).astype(int) << np.arange(bits)).sum(axis=-1)
    found = []
    for step in range(0, image.row_steps, steps):
        own = codes[:, image.codes_before(step) : image.codes_before(min(step + steps, image.row_steps))]
        word = np.zeros((size, path.lanes * steps), int)
        word[:, : own.shape[1]] = own
        found.append(_packed(word.ravel(), width))
    return found


def _packed(values: NDArray[np.integer], bits: int) -> int:
    return sum(int(value) << bits * place for place, value in enumerate(values))


def _tensor(name: str, outputs: int, inputs: int, seed: int) -> QuantizedTensor:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((outputs, inputs)).astype(np.float32) * 0.05
    weights[random.random(weights.shape) < 0.01] *= 8
    return quantize(weights, get_format(name))


def _activations(tokens: int, inputs: int, seed: int) -> NDArray[np.float16]:
    random = np.random.default_rng(seed)
    values = random.standard_normal((tokens, inputs)) * np.exp(random.standard_normal((tokens, inputs)))
    return values.astype(np.float16)


BIT_SERIAL = {
    "paper": ArrayDesign(rows=4, columns=2),
    "shared exponent": ArrayDesign(
        processing_element=BitSerialSpec(numerics="shared_exponent"), rows=9, columns=2, types=TYPES
    ),
    "exact": ArrayDesign(processing_element=BitSerialSpec(numerics="exact"), rows=2, columns=1, types=TYPES),
    "systolic": ArrayDesign(rows=10, columns=3, types=TYPES, movement="systolic"),
    "shared exponent, systolic": ArrayDesign(
        processing_element=BitSerialSpec(numerics="shared_exponent"),
        rows=3,
        columns=3,
        types=TYPES,
        movement="systolic",
    ),
}


@pytest.mark.parametrize("name", BIT_SERIAL)
def test_bitmod_layers_are_those_of_the_reference(name: str) -> None:
    """Formats of every width, with groups that are cut and tiles that are not full."""
    design = BIT_SERIAL[name]
    bench = Bench(design)
    for place, format in enumerate(("bitmod-w4g64", "bitmod-w3g32", "bitmod-w6g16", "bitmod-w8g128")):
        tensor = _tensor(format, design.rows + 3, 150, place)
        activations = _activations(design.columns + 1, 150, place)
        with np.errstate(over="ignore"):
            expected = multiply(design.processing_element, tensor, activations).astype(np.float16)
        found = bench.run(layer_image(design, tensor, activations))
        assert np.array_equal(found, expected), (format, np.argwhere(found != expected)[:3])
        assert len(np.unique(expected)) > expected.size / 2


@pytest.mark.parametrize("movement", ["broadcast", "systolic"])
def test_scales_in_half_precision(movement: str) -> None:
    types = ("int4", "flint4", "int8", "integer4_less_zero_point", "integer7_less_zero_point")
    design = ArrayDesign(scale="half", rows=3, columns=2, types=types, movement=movement)  # type: ignore[arg-type]
    bench = Bench(design)
    for format in ("int-w4g32", "int-asym-w4g32", "ant-w4g16", "int-w8g128", "int-asym-w7g8"):
        tensor, activations = _tensor(format, 5, 100, 1), _activations(3, 100, 2)
        expected = multiply(design.processing_element, tensor, activations).astype(np.float16)
        assert np.array_equal(bench.run(layer_image(design, tensor, activations)), expected), format


@pytest.mark.parametrize(
    ("design", "format"),
    [
        (ArrayDesign(processing_element=Fp16MacSpec(), rows=3, columns=2), "fp16"),
        (ArrayDesign(processing_element=Fp16MacSpec(), rows=3, columns=2), "bitmod-w4g64"),
        (ArrayDesign(processing_element=FlintSpec(), rows=3, columns=2, bits=4), "ant-w4g16"),
        (ArrayDesign(processing_element=FlintSpec(), rows=2, columns=3, movement="systolic"), "ant-w8g32"),
        (ArrayDesign(processing_element=OutlierVictimSpec(), rows=3, columns=2, bits=4), "olive-w4"),
        (ArrayDesign(processing_element=OutlierVictimSpec(), rows=3, columns=2), "olive-w8"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.processing_element.kind,
)
def test_layers_of_the_other_kinds(design: ArrayDesign, format: str) -> None:
    tensor, activations = _tensor(format, 5, 75, 3), _activations(4, 75, 4)
    expected = multiply(design.processing_element, tensor, activations).astype(np.float16)
    assert np.array_equal(Bench(design).run(layer_image(design, tensor, activations)), expected)


@pytest.mark.parametrize("movement", ["broadcast", "systolic"])
@pytest.mark.parametrize(("format", "bits"), [("olive-w4a4", 4), ("olive-w8a8", 8), ("ant-w4a4", 4)])
def test_layers_of_codes_on_both_sides(format: str, bits: int, movement: str) -> None:
    spec = FlintSpec(activations="integer") if format[:3] == "ant" else OutlierVictimSpec(activations="integer")
    design = ArrayDesign(processing_element=spec, rows=4, columns=2, bits=bits, movement=movement)  # type: ignore[arg-type]
    tensor = _tensor(format, 6, 65, 5)
    activations = _activations(3, 65, 6)
    floats = activations.astype(np.float32)
    stored = activation_format(tensor.format)
    assert stored is not None
    codes = StaticQuantizer(calibrated=quantize(floats.reshape(1, -1), stored)).quantize(floats)
    expected = multiply_integers(spec, tensor, codes).astype(np.float16)
    assert np.array_equal(Bench(design).run(layer_image(design, tensor, codes)), expected)


def test_arrays_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(InputError, match="rows = 0; expected 1 to 256"):
        ArrayDesign(rows=0)
    with pytest.raises(InputError, match="no weights of type 'fp9'"):
        ArrayDesign(types=("fp9",))
    with pytest.raises(InputError, match="the array was built for 8-bit scales"):
        layer_image(ArrayDesign(), _tensor("int-w4g32", 4, 32, 0), _activations(1, 32, 0))
    with pytest.raises(InputError, match="the array was built for bitmod_fp4"):
        layer_image(ArrayDesign(types=("bitmod_fp4",)), _tensor("bitmod-w3g32", 4, 32, 0), _activations(1, 32, 0))
