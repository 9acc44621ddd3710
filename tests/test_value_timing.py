"""What the values of the weights decide: against a plain reading of section 9 of the microarchitecture."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms.bit_serial import BitSerialSpec, Skipping
from termwise.algorithms.dictionary import DictionaryCoder, DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.operands import weight_operands
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.algorithms.reference import digits
from termwise.sim.value_timing import value_timing

FORMATS = (
    "bitmod-w4g128",
    "bitmod-w3g128",
    "bitmod-w4g30",
    "bitmod-w3g7",
    "int-w6g128",
    "int-w8g64",
    "int-w5",
    "int-asym-w4g32",
    "int-asym-w3g10",
    "ant-w4g32",
    "mxfp4",
)


def weights(outputs: int, inputs: int, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    values = random.standard_t(4, (outputs, inputs)) * 0.05
    values[random.random((outputs, inputs)) < 0.3] = 0
    return values.astype(np.float32)


def plain_steps(spec: BitSerialSpec, tensor: QuantizedTensor, rows: int) -> NDArray[np.int64]:
    """Issue cycles of every step, [tiles of rows, steps], weight by weight."""
    operands = weight_operands(tensor)
    outputs, inputs = tensor.shape
    found = []
    for first in range(0, outputs, rows):
        tile = range(first, min(first + rows, outputs))
        steps = []
        for group in range(operands.groups):
            columns = range(inputs)[operands.columns(group)]
            for begin in range(columns.start, columns.stop, spec.lanes):
                step = range(begin, min(begin + spec.lanes, columns.stop))
                nonzero: list[set[int]] = []
                terms = 0
                for row in tile:
                    of_row = set()
                    for column in step:
                        numerator, booth = int(operands.numerators[row, column]), bool(operands.booth[row, group])
                        of_weight = digits(spec, numerator, booth, operands.bits)
                        terms = max(terms, len(of_weight))
                        of_row |= {term for term, digit in enumerate(of_weight) if digit}
                    nonzero.append(of_row)
                if spec.skip_zero_terms == "tile":
                    terms = max(1, len(set().union(*nonzero)))
                elif spec.skip_zero_terms == "row":
                    terms = max(1, *(len(of_row) for of_row in nonzero))
                steps.append(terms)
        found.append(steps)
    return np.array(found)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("skip", ["none", "tile", "row"])
@pytest.mark.parametrize("lanes", [4, 3])
def test_steps_are_those_of_a_plain_reading(name: str, skip: Skipping, lanes: int) -> None:
    spec = BitSerialSpec(skip_zero_terms=skip, lanes=lanes)
    for seed, (outputs, inputs, rows) in enumerate([(7, 150, 3), (4, 128, 8), (5, 33, 1)]):
        tensor = quantize(weights(outputs, inputs, seed), name)
        timing = value_timing(spec, tensor, rows)
        assert np.array_equal(timing.step_cycles, plain_steps(spec, tensor, rows))
        expected = spec.pipeline(tensor.format, inputs, rows).drain_cycles
        assert timing.drain_cycles.tolist() == [expected] * timing.step_cycles.shape[0]


@pytest.mark.parametrize("name", FORMATS)
def test_skipping_never_takes_longer_and_rows_of_their_own_never_longer_than_the_tile(name: str) -> None:
    tensor = quantize(weights(24, 256), name)
    most = BitSerialSpec().cycles_per_step(tensor.format)
    for rows in (1, 4, 24):
        none, tile, row = (
            value_timing(BitSerialSpec(skip_zero_terms=skip), tensor, rows).step_cycles.astype(int)
            for skip in ("none", "tile", "row")
        )
        assert (row >= 1).all()
        assert (row <= tile).all()
        assert (tile <= none).all()
        assert (none <= most).all()
        if rows == 1:
            assert np.array_equal(row, tile)


def test_a_tile_of_dictionary_indices_drains_for_its_longest_list_of_outliers() -> None:
    values = weights(40, 500)
    values[3, :7] = 5
    tensor = quantize(values, "gobo-w3")
    coder = tensor.coder
    assert isinstance(coder, DictionaryCoder)
    rows = np.bincount(coder.positions // 500, minlength=40)
    assert rows[3] >= 7
    timing = value_timing(DictionarySpec(), tensor, 16)
    most = [int(rows[first : first + 16].max()) for first in (0, 16, 32)]
    assert timing.drain_cycles.tolist() == [4 + 1 + 8 + outliers + 8 + 3 for outliers in most]
    assert timing.step_cycles.shape == (3, 500)
    assert (timing.step_cycles == 1).all()


def test_bit_parallel_elements_do_not_depend_on_values() -> None:
    for spec, name in ((Fp16MacSpec(), "fp16"), (OutlierVictimSpec(), "olive-w4"), (FlintSpec(), "ant-w4g128")):
        tensor = quantize(weights(10, 300), name)
        timing = value_timing(spec, tensor, 4)
        assert timing.step_cycles.shape == (3, 300)
        assert (timing.step_cycles == spec.cycles_per_step(get_format(name))).all()
        assert (timing.drain_cycles == spec.pipeline(get_format(name), 300, 4).drain_cycles).all()


def test_a_format_that_the_element_does_not_take_is_refused() -> None:
    with pytest.raises(InputError, match="olive-w4"):
        value_timing(BitSerialSpec(), quantize(weights(4, 16), "olive-w4"), 4)
