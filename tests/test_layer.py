"""A layer with its values: outputs bit for bit those of the reference, cycles those of the simulator."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from termwise.algorithms import reference
from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.models import open_model
from termwise.algorithms.quantize import quantize
from termwise.sim.accelerators import get_accelerator
from termwise.sim.cycle import run_tile_program
from termwise.sim.layer import run_layer

CASES = (
    ("bitmod-lossy", "bitmod-w4g128"),
    ("bitmod-lossy", "bitmod-w3g64"),
    ("bitmod-lossless", "int-w8"),
    ("olive", "olive-w4"),
    ("ant", "ant-w4g128"),
    ("fp16", "fp16"),
    ("gobo", "gobo-w3"),
)


@pytest.mark.parametrize(("system", "format"), CASES)
def test_outputs_of_a_layer_of_tiny_are_the_reference(system: str, format: str) -> None:
    model = open_model("tiny")
    name = next(name for name in model.matrix_names if name.endswith("down_proj"))
    weights = model.matrix(name)[:10]
    activations = np.random.default_rng(0).standard_normal((3, weights.shape[1])).astype(np.float16)
    tensor = quantize(weights, format)
    accelerator = get_accelerator(f"{system}@8x4")
    run = run_layer(accelerator, tensor, activations)
    expected = reference.multiply(accelerator.processing_element, tensor, activations)
    assert np.array_equal(run.accumulators.view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(run.outputs, expected.astype(np.float16))
    assert run.count.busy_cycles + run.count.stalls.total == run.count.cycles
    assert run.count == run_layer(accelerator, tensor, activations, stepped=True).count
    if system != "gobo":  # nothing else depends on the values
        assert run.count == run_tile_program(run.program)


@pytest.mark.parametrize(("system", "format"), [case for case in CASES if case[0] != "gobo"])
def test_a_reduction_in_passes_ends_the_groups_that_it_cuts(system: str, format: str) -> None:
    random = np.random.default_rng(1)
    weights = (random.standard_t(4, (6, 1024)) * 0.05).astype(np.float32)
    activations = random.standard_normal((5, 1024)).astype(np.float16)
    tensor = quantize(weights, format)
    accelerator = dataclasses.replace(
        get_accelerator(f"{system}@4x4"),
        weight_buffer_bytes=2048,
        weight_buffer_banks=1,
        activation_buffer_bytes=2048,
        activation_buffer_banks=1,
    )
    run = run_layer(accelerator, tensor, activations)
    assert run.pass_inputs < 1024
    element = accelerator.processing_element
    expected = reference.multiply(element, tensor, activations, pass_inputs=run.pass_inputs)
    assert np.array_equal(run.accumulators.view(np.uint32), expected.view(np.uint32))
    whole = reference.multiply(element, tensor, activations)
    grouped = format == "fp16" or tensor.format.group_size is not None
    assert np.array_equal(run.accumulators, whole) == grouped


def test_skipped_terms_change_the_cycles_and_not_a_bit() -> None:
    random = np.random.default_rng(2)
    tensor = quantize((random.standard_t(4, (6, 512)) * 0.05).astype(np.float32), "bitmod-w3g128")
    activations = random.standard_normal((4, 512)).astype(np.float16)
    base = get_accelerator("bitmod-lossy@2x4")
    skipping = dataclasses.replace(base, processing_element=BitSerialSpec(skip_zero_terms="row"))
    run, skipped = run_layer(base, tensor, activations), run_layer(skipping, tensor, activations)
    assert np.array_equal(run.accumulators, skipped.accumulators)
    assert skipped.count.busy_cycles < run.count.busy_cycles
