"""A tile cycle by cycle: the reference's outputs, the simulator's cycles, values in the cycles that the page names."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from termwise.algorithms import reference
from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionarySpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import ProcessingElementSpec
from termwise.algorithms.quantize import quantize
from termwise.algorithms.workload import Gemm
from termwise.sim.accelerators import ArrayShape, get_accelerator
from termwise.sim.cycle import run_tile_program
from termwise.sim.plan import plan_product
from termwise.sim.simulate import product_of
from termwise.sim.tile_run import run_tile
from termwise.sim.value_timing import value_timing

CASES: tuple[tuple[ProcessingElementSpec, str], ...] = (
    (BitSerialSpec(), "bitmod-w4g128"),
    (BitSerialSpec(), "bitmod-w3g8"),
    (BitSerialSpec(), "bitmod-w4g6"),
    (BitSerialSpec(), "int-w8g30"),
    (BitSerialSpec(), "int-asym-w4g16"),
    (BitSerialSpec(numerics="exact"), "bitmod-w4g32"),
    (BitSerialSpec(numerics="shared_exponent"), "int-w6g32"),
    (BitSerialSpec(numerics="shared_exponent", rounding="nearest_even"), "bitmod-w3g32"),
    (BitSerialSpec(skip_zero_terms="tile"), "bitmod-w3g16"),
    (BitSerialSpec(skip_zero_terms="row"), "bitmod-w3g16"),
    (OutlierVictimSpec(), "olive-w4"),
    (FlintSpec(), "ant-w4g32"),
    (Fp16MacSpec(), "fp16"),
    (DictionarySpec(), "gobo-w3"),
)


def operands(outputs: int, inputs: int, tokens: int) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    random = np.random.default_rng(outputs + inputs)
    weights = (random.standard_t(3, (outputs, inputs)) * 0.05).astype(np.float32)
    return weights, random.standard_normal((tokens, inputs)).astype(np.float16)


@pytest.mark.parametrize(("spec", "name"), CASES)
def test_outputs_are_the_reference_and_cycles_the_simulator(spec: ProcessingElementSpec, name: str) -> None:
    for outputs, inputs, tokens in ((3, 70, 2), (1, 9, 1)):
        weights, activations = operands(outputs, inputs, tokens)
        tensor = quantize(weights, name)
        run = run_tile(spec, tensor, activations)
        expected = reference.multiply(spec, tensor, activations)
        assert np.array_equal(run.outputs.view(np.uint32), expected.view(np.uint32))
        values = value_timing(spec, tensor, outputs)
        assert run.busy_cycles == int(values.step_cycles.sum())
        assert run.drain_cycles == int(values.drain_cycles[0])
        array = ArrayShape(rows=outputs, columns=tokens)
        machine = get_accelerator("gobo" if name.startswith("gobo") else "fp16")
        gemm = Gemm(name="", tokens=tokens, reduction=inputs, outputs=outputs, operand="weight", repeats=1)
        changed = type(machine)(
            **{
                **{field: getattr(machine, field) for field in machine.__dataclass_fields__},
                "processing_element": spec,
                "prefill_array": array,
                "decode_array": array,
            }
        )
        program = plan_product(product_of(gemm, changed, "prefill", tensor.format))
        count = run_tile_program(program, values=values)
        assert (run.busy_cycles, run.scale_cycles) == (count.busy_cycles, count.stalls.scale)
        assert run.drain_cycles == count.stalls.drain


def test_registers_show_a_value_in_the_cycle_that_the_page_names() -> None:
    weights, activations = operands(1, 8, 1)
    tensor = quantize(weights, "bitmod-w4g4")
    run = run_tile(BitSerialSpec(), tensor, activations)
    # Two groups of one step of two terms: the second's last term waits for 8 cycles after the first's.
    states = {change.cycle: change.value for change in run.changes if change.name == "state"}
    assert [states[cycle] for cycle in (0, 1, 2)] == ["ISSUE"] * 3
    assert [states[cycle] for cycle in range(3, 9)] == ["SCALE"] * 6
    assert (states[9], states[10]) == ("ISSUE", "DRAIN")
    assert (run.busy_cycles, run.scale_cycles, run.drain_cycles) == (4, 6, 7 + 8 + 8 + 22)
    assert states[10 + 45] == "LEAVE"
    # Last terms in 1 and 9: sums 8 later; then 8 for the dequantizer, one for the chain, 4 and 7 for the accumulator.
    assert [change.cycle for change in run.changes if change.name == "sum"] == [8, 9, 10, 17]
    assert [change.cycle for change in run.changes if change.name == "dequantizing"] == [9, 17, 17, 25]
    assert [change.cycle for change in run.changes if change.name == "y"] == [17 + 1 + 11, 25 + 1 + 11]


def test_a_tile_that_is_too_large_to_walk_is_refused() -> None:
    weights, activations = operands(64, 512, 16)
    with pytest.raises(InputError, match="524288 products"):
        run_tile(Fp16MacSpec(), quantize(weights, "fp16"), activations)
