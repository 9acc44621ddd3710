from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.reference import float32_of
from termwise.rtl.accumulator import AccumulatorParts, ColumnAccumulator
from termwise.rtl.compiled_model import CompiledModel

BIT_SERIAL = AccumulatorParts(integer_bits=23, channel_scales=True)
HALF_ACTIVATIONS = AccumulatorParts(scales=True, channel_scales=True)
INTEGER_ACTIVATIONS = AccumulatorParts(integer_bits=32, scales=True)
FINISHED = AccumulatorParts(adds=False)


def test_latency_is_the_one_of_the_specification() -> None:
    for parts, timing in (
        (BIT_SERIAL, BitSerialSpec().pipeline(get_format("bitmod-w4g128"), 128, 8)),
        (HALF_ACTIVATIONS, FlintSpec().pipeline(get_format("ant-w4g128"), 128, 8)),
        (INTEGER_ACTIVATIONS, OutlierVictimSpec(activations="integer").pipeline(get_format("olive-w4a4"), 128, 8)),
        (FINISHED, Fp16MacSpec().pipeline(get_format("fp16"), 128, 8)),
    ):
        assert ColumnAccumulator(parts).latency == timing.accumulator_cycles


@pytest.mark.parametrize(
    "parts", [BIT_SERIAL, HALF_ACTIVATIONS, INTEGER_ACTIVATIONS, FINISHED], ids=["bit serial", "2.4", "2.5", "finished"]
)
def test_outputs_are_the_sums_of_their_groups_in_order(parts: AccumulatorParts) -> None:
    """Tiles of groups of 8 rows, one value per cycle; the halves of the output memory change places after each tile."""
    random = np.random.default_rng(0)
    tiles, groups = 40, 1 if not parts.adds else 5
    shape = (tiles, groups, 8)
    spread = 1 << random.integers(0, 22, shape)
    numbers = random.integers(-(1 << 22), 1 << 22, shape) // spread
    exponents = random.integers(-34, -8, shape)
    floats = np.ldexp(numbers.astype(np.float32), exponents)
    floats[0, 0, :3] = [0, np.float32(1e38), np.float32(-3e38)]
    scales = np.ldexp(random.integers(1, 1 << 22, shape).astype(np.float32), -22)
    channel = np.ldexp(random.integers(1 << 23, 1 << 24, (tiles, 8)).astype(np.float32), random.integers(-30, -18))
    outputs = np.zeros((tiles, 8), dtype=np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        for tile in range(tiles):
            y = np.zeros(8, dtype=np.float32)
            for group in range(groups):
                value = floats[tile, group]
                if parts.integer_bits:
                    pairs = zip(numbers[tile, group], exponents[tile, group], strict=True)
                    value = np.array([float32_of(int(number), int(exponent)) for number, exponent in pairs])
                value = value * scales[tile, group] if parts.scales else value
                y = y + value if parts.adds else value
            outputs[tile] = (y * channel[tile] if parts.channel_scales else y).astype(np.float16)
    accumulator = ColumnAccumulator(parts)
    model = CompiledModel(accumulator)
    row = np.arange(8)
    found = []
    for tile in range(tiles):
        for group in range(groups):
            ports = {
                "value": numbers[tile, group] if parts.integer_bits else floats[tile, group].view(np.uint32),
                "control": 1 | row << 1 | (group == 0) << 4 | (group == groups - 1) << 5,
                "exponent": exponents[tile, group],
                "scale": scales[tile, group].view(np.uint32),
                "channel_scale": channel[tile].view(np.uint32),
            }
            model.run({name: values for name, values in ports.items() if name in model.inputs}, 8)
        # The last value came in the cycle before; in the cycle that the latency names the halves may change places.
        if accumulator.latency > 1:
            model.run({}, accumulator.latency - 1)
        model.run({"exchange": 1}, 1)
        found.append(model.run({"read_row": row}, 8)["output"])
    shown = np.array(found).astype(np.uint16).view(np.float16)
    assert np.array_equal(shown, outputs, equal_nan=True), np.argwhere(shown != outputs)[:4]
    assert not np.isnan(outputs).all()
    assert len(np.unique(outputs)) > 100
