from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from amaranth.hdl import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from termwise.algorithms.datatypes import get_datatype
from termwise.algorithms.errors import InputError
from termwise.algorithms.reference import shifted_integer
from termwise.rtl.bit_parallel import HalfMac, IntegerMac, normal_half, normal_integer
from termwise.rtl.compiled_model import CompiledModel
from termwise.rtl.decoders import shifted_integer_layout
from termwise.rtl.dictionary import DictionaryPe, Operation
from termwise.rtl.processing_element import TERM_CONTROL, decode_half

COUNT = 6000


class HalfBench(wiring.Component):
    """A ``HalfMac`` with the logic of its borders, without their registers."""

    def __init__(self, weights: str) -> None:
        self.inner = HalfMac(weights)
        weight = 16 if weights == "half" else shifted_integer_layout(8)
        super().__init__({"weight": In(weight), "activation": In(16), "control": In(TERM_CONTROL), "sum": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.inner = self.inner
        half = not isinstance(self.weight, data.View)
        weight = normal_half(m, decode_half(m, self.weight)) if half else normal_integer(m, self.weight)
        m.d.comb += [
            self.inner.weight.eq(weight),
            self.inner.activation.eq(normal_half(m, decode_half(m, self.activation))),
            self.inner.control.eq(self.control),
            self.sum.eq(self.inner.sum),
        ]
        return m


def _halves(random: np.random.Generator, exponents: tuple[int, int]) -> NDArray[np.float16]:
    bits = (
        random.integers(0, 2, COUNT) << 15 | random.integers(*exponents, COUNT) << 10 | random.integers(0, 1024, COUNT)
    )
    bits[random.random(COUNT) < 0.05] &= 0x8000
    return bits.astype(np.uint16).view(np.float16)


def _control(random: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    valid, first = random.random(COUNT) < 0.9, random.random(COUNT) < 0.02
    valid[0] = first[0] = True
    return valid, first


def _running_sums(
    products: NDArray[np.float32], valid: NDArray[np.bool_], first: NDArray[np.bool_]
) -> NDArray[np.float32]:
    sums, total = np.zeros(COUNT, np.float32), np.float32(0)
    for place in range(COUNT):
        if valid[place]:
            total = (np.float32(0) if first[place] else total) + products[place]
        sums[place] = total
    return sums


@pytest.mark.parametrize("exponents", [(0, 31), (13, 17), (0, 3)], ids=["any", "alike", "small"])
@pytest.mark.parametrize("weights", ["half", "integer"])
def test_products_of_half_activations_add_up_in_fp32(weights: str, exponents: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    activations = _halves(random, exponents)
    valid, first = _control(random)
    if weights == "half":
        halves = _halves(random, exponents)
        bits, values = halves.view(np.uint16).astype(np.int64), halves.astype(np.float32)
    else:
        integers, places = random.integers(-127, 128, COUNT), random.integers(0, 13, COUNT)
        bits, values = integers & 255 | places << 8, (integers << places).astype(np.float32)
    bench = HalfBench(weights)
    ports = {
        "weight": bits,
        "activation": activations.view(np.uint16).astype(np.int64),
        "control": valid | first.astype(int) << 1,
    }
    drain = [0] * bench.inner.latency
    shown = CompiledModel(bench).run({name: np.append(port, drain) for name, port in ports.items()})["sum"]
    expected = _running_sums(values * activations.astype(np.float32), valid, first)
    found = shown[bench.inner.latency :].astype(np.uint32).view(np.float32)
    wrong = np.flatnonzero(found.view(np.uint32) != expected.view(np.uint32))
    assert not wrong.size, (wrong[0], found[wrong[0]], expected[wrong[0]])
    assert len(np.unique(expected)) > COUNT / 4


@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_integers_add_up_exactly(bits: int) -> None:
    """Of every pair of codes of integers, flint and abfloats, in random order."""
    names = ("int4", "flint4", "abfloat4_e2m1_b3") if bits == 4 else ("int8", "flint8")
    operands = [
        shifted_integer(datatype, code)
        for datatype in map(get_datatype, names)
        for code in range(1 << datatype.bits)
        if datatype.numerators[code] is not None
    ]
    random = np.random.default_rng(1)
    values = np.array(operands)
    weights, activations = (values[random.integers(0, len(values), COUNT)] for _ in range(2))
    valid, first = _control(random)
    first |= random.random(COUNT) < (0.05 if bits == 4 else 0.3)
    pe = IntegerMac(bits)
    mask = (1 << bits) - 1
    ports = {
        "weight": weights[:, 0] & mask | weights[:, 1] << bits,
        "activation": activations[:, 0] & mask | activations[:, 1] << bits,
        "control": valid | first.astype(int) << 1,
    }
    shown = CompiledModel(pe).run({name: np.append(port, [0] * pe.latency) for name, port in ports.items()})["sum"]
    products = (weights[:, 0] * activations[:, 0]) << (weights[:, 1] + activations[:, 1])
    expected, total = [], 0
    for place in range(COUNT):
        if valid[place]:
            total = (0 if first[place] else total) + int(products[place])
        expected.append((total + (1 << 31)) % (1 << 32) - (1 << 31))
    wrong = np.flatnonzero(shown[pe.latency :] != np.array(expected))
    assert not wrong.size, (weights[wrong[0]], activations[wrong[0]])
    assert len(set(expected)) > COUNT / 4


def test_latencies_are_those_of_the_definition() -> None:
    """Section 3 counts two stages before the PE."""
    assert [pe.latency for pe in (HalfMac(), IntegerMac(4), IntegerMac(8), DictionaryPe(3))] == [2, 3, 4, 2]


def test_activations_of_an_index_add_up_and_meet_their_centroid() -> None:
    random = np.random.default_rng(2)
    pe = DictionaryPe(3)
    model = CompiledModel(pe)
    for length in (1, 2, 40, 300):
        indices = random.integers(0, 2 if length == 40 else 8, length)
        activations = random.standard_normal(length).astype(np.float16).astype(np.float32)
        outlier = random.random(length) < 0.05
        centroids = random.standard_normal(8).astype(np.float32)
        weights = random.standard_normal(length).astype(np.float32)
        bins, y = np.zeros(8, np.float32), np.float32(0)
        for place in range(length):
            if not outlier[place]:
                bins[indices[place]] += activations[place]
        for total, centroid in zip(bins, centroids, strict=True):
            y += total * centroid
        for place in np.flatnonzero(outlier):
            y += activations[place] * weights[place]
        operations = np.where(outlier, Operation.CAPTURE, Operation.BIN)
        rows = [(int(operations[place]), int(indices[place]), 0.0, activations[place]) for place in range(length)]
        rows += [(Operation.CENTROID, index, centroid, 0.0) for index, centroid in enumerate(centroids)]
        rows += [(Operation.OUTLIER, 0, weights[place], 0.0) for place in np.flatnonzero(outlier)]
        rows += [(Operation.NOTHING, 1, 1.0, 1.0)]
        words = [
            int(operation) | int(index) << 3 | int(np.float32(value).view(np.uint32)) << 6
            for operation, index, value, _ in rows
        ]
        control = [1 | (place == 0) << 1 for place in range(len(rows))]
        floats = [int(np.float32(activation).view(np.uint32)) for *_, activation in rows]
        drain = [0] * (pe.latency + 1)
        found = model.run({"weight": words + drain, "activation": floats + drain, "control": control + drain})["sum"]
        assert np.uint32(found[-1]) == y.view(np.uint32), (length, np.uint32(found[-1]).view(np.float32), y)


def test_widths_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(InputError, match="of 6 bits; expected 4 or 8"):
        IntegerMac(6)
    with pytest.raises(InputError, match="'bfloat16'"):
        HalfMac("bfloat16")
    with pytest.raises(InputError, match="an index of 5 bits"):
        DictionaryPe(5)
    with pytest.raises(InputError, match="room for 24 outliers of a row; expected a power of two"):
        DictionaryPe(3, 24)
