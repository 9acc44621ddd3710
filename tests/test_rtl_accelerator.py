from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from termwise.algorithms.activations import StaticQuantizer
from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.dictionary import DictionarySpec
from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.formats import activation_format, get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.models import open_model
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.quantize import QuantizedTensor, quantize
from termwise.algorithms.reference import multiply, multiply_integers
from termwise.rtl.accelerator import AcceleratorDesign
from termwise.rtl.array import ArrayDesign
from termwise.rtl.driver import Driver, Schedule, operand_beats, plan
from termwise.rtl.layer_image import layer_image
from termwise.rtl.operand_memory import MemoryDesign
from termwise.rtl.program import Allocation
from termwise.rtl.registers import ERRORS, OFFSETS, REGISTERS
from termwise.rtl.simulated_board import SimulatedBoard

TYPES = ("bitmod_fp4", "bitmod_fp3", "int6", "int8")
SMALL: dict[str, Any] = {"weight_words": 64, "activation_words": 64, "group_words": 16, "panels": 4}
PAPER = AcceleratorDesign(array=ArrayDesign(rows=4, columns=3, types=TYPES), **SMALL)
SHARED = AcceleratorDesign(
    array=ArrayDesign(
        processing_element=BitSerialSpec(numerics="shared_exponent"),
        rows=3,
        columns=2,
        types=TYPES,
        movement="systolic",
    ),
    **SMALL,
)
DICTIONARY = AcceleratorDesign(array=ArrayDesign(processing_element=DictionarySpec(), rows=3, columns=2), **SMALL)


@functools.cache
def board(design: AcceleratorDesign) -> SimulatedBoard:
    return SimulatedBoard(design)


def driver(design: AcceleratorDesign, gaps: tuple[int, int] = (0, 0)) -> Driver:
    """A driver of an accelerator that has just been switched on."""
    own = board(design)
    own.model.reset()
    own.gaps = gaps
    return Driver(design, own)


def layer(
    name: str, outputs: int, inputs: int, tokens: int, seed: int = 0
) -> tuple[QuantizedTensor, NDArray[np.float16]]:
    random = np.random.default_rng(seed)
    weights = random.standard_normal((outputs, inputs)).astype(np.float32) * 0.05
    activations = random.standard_normal((tokens, inputs)) * np.exp(random.standard_normal((tokens, inputs)))
    return quantize(weights, get_format(name)), activations.astype(np.float16)


def expected(
    design: AcceleratorDesign, tensor: QuantizedTensor, activations: NDArray[np.float16]
) -> NDArray[np.float16]:
    return multiply(design.array.processing_element, tensor, activations).astype(np.float16)


@pytest.mark.parametrize("design", [PAPER, SHARED], ids=["paper", "shared exponent, systolic"])
def test_layers_larger_than_the_memories_are_those_of_the_reference(design: AcceleratorDesign) -> None:
    own = driver(design)
    schedules = set()
    for place, (name, *shape) in enumerate(
        [
            ("bitmod-w4g32", 4, 64, 2),
            ("bitmod-w3g32", 9, 200, 5),
            ("bitmod-w4g16", 17, 90, 3),
            ("bitmod-w6g64", 5, 130, 7),
            ("bitmod-w8g32", 1, 33, 1),
            ("bitmod-w4g64", 30, 64, 20),
        ]
    ):
        tensor, activations = layer(name, *shape, seed=place)
        result = own.run(tensor, activations)
        schedule = plan(design, layer_image(design.array, tensor, activations))
        schedules.add((schedule.weight_allocation, schedule.activation_allocation, schedule.weights_stationary))
        assert np.array_equal(result.outputs, expected(design, tensor, activations)), (name, shape, schedule)
        assert sum(result.cycles_by_cause.values()) == result.cycles
    assert len(schedules) >= 3


def test_every_schedule_gives_the_same_outputs() -> None:
    """All allocations of both operands, either of them stationary, blocks and chunks that do not divide."""
    tensor, activations = layer("bitmod-w4g16", 14, 70, 8)
    image = layer_image(PAPER.array, tensor, activations)
    wanted = expected(PAPER, tensor, activations)
    roomy = AcceleratorDesign(array=PAPER.array, weight_words=256, activation_words=256, group_words=64, panels=16)
    own = driver(roomy)
    busy = set()
    tried = 0
    for weights, activations_, stationary, chunk, panels in itertools.product(
        Allocation, Allocation, (True, False), (18, 7), (1, 2, 4)
    ):
        kept = weights if stationary else activations_
        if kept == Allocation.CHUNKS and panels > 1:
            continue
        schedule = Schedule(
            chunk_steps=chunk,
            panels_per_block=panels,
            weights_stationary=stationary,
            weight_allocation=weights,
            activation_allocation=activations_,
        )
        result = own.run_image(image, schedule)
        assert np.array_equal(result.outputs, wanted), schedule
        busy.add(result.cycles_by_cause["busy"])
        tried += 1
    assert tried > 40
    assert busy == {image.row_tiles * image.column_tiles * image.row_steps * image.terms}


@pytest.mark.parametrize("gaps", [(200, 0), (0, 250), (128, 128)], ids=["slow source", "slow sink", "both"])
def test_back_pressure_loses_nothing(gaps: tuple[int, int]) -> None:
    tensor, activations = layer("bitmod-w4g32", 13, 130, 7)
    fast, slow = driver(PAPER).run(tensor, activations), driver(PAPER, gaps).run(tensor, activations)
    assert np.array_equal(slow.outputs, fast.outputs)
    assert slow.cycles > fast.cycles
    causes = ("busy", "drain")
    assert [slow.cycles_by_cause[cause] for cause in causes] == [fast.cycles_by_cause[cause] for cause in causes]


def test_ends_of_groups_keep_their_distance() -> None:
    """Groups of one step are shorter than the column accumulator; the sequencer counts what it waits."""
    tensor, activations = layer("bitmod-w4g8", 4, 64, 1)
    result = driver(PAPER).run(tensor, activations)
    groups, terms = 8, 2
    distance = PAPER.array.group_distance
    assert result.cycles_by_cause["scale"] == (groups - 1) * (distance - 2 * terms)
    assert result.cycles_by_cause["drain"] == PAPER.array.drain_cycles
    assert np.array_equal(result.outputs, expected(PAPER, tensor, activations))


@pytest.mark.parametrize(
    ("design", "name"),
    [
        (AcceleratorDesign(array=ArrayDesign(processing_element=Fp16MacSpec(), rows=3, columns=2), **SMALL), "fp16"),
        (
            AcceleratorDesign(
                array=ArrayDesign(processing_element=OutlierVictimSpec(), rows=3, columns=2, bits=4), **SMALL
            ),
            "olive-w4",
        ),
        (
            AcceleratorDesign(
                array=ArrayDesign(processing_element=OutlierVictimSpec(activations="integer"), rows=2, columns=3),
                **SMALL,
            ),
            "olive-w8a8",
        ),
    ],
    ids=["fp16_mac", "outlier_victim", "codes on both sides"],
)
def test_accelerators_of_other_kinds(design: AcceleratorDesign, name: str) -> None:
    tensor, activations = layer(name, 7, 101, 5)
    own = driver(design)
    stored = activation_format(tensor.format)
    if stored is None:
        assert np.array_equal(own.run(tensor, activations).outputs, expected(design, tensor, activations))
        return
    floats = activations.astype(np.float32)
    codes = StaticQuantizer(calibrated=quantize(floats.reshape(1, -1), stored)).quantize(floats)
    spec = design.array.processing_element
    assert np.array_equal(own.run(tensor, codes).outputs, multiply_integers(spec, tensor, codes).astype(np.float16))


# ---- GOBO ----


def indices(outputs: int, inputs: int, tokens: int, seed: int = 0) -> tuple[QuantizedTensor, NDArray[np.float16]]:
    """Indices with up to 6 outliers in a row, of which the first input and the last one; none in every third row."""
    random = np.random.default_rng(seed)
    weights = random.uniform(-0.02, 0.02, (outputs, inputs)).astype(np.float32)
    for row in range(1, outputs, 3):
        places = random.choice(inputs, 3, replace=False)
        weights[row, [0, 1, inputs - 1, *places]] = random.uniform(0.3, 0.5, 6)
        weights[row - 1, places] = -0.4
    activations = random.standard_normal((tokens, inputs)) * np.exp(random.standard_normal((tokens, inputs)))
    format = get_format("gobo-w3" if seed % 2 else "gobo-w4")
    return quantize(weights, format), activations.astype(np.float16)


def outliers_by_row(tensor: QuantizedTensor) -> NDArray[np.int64]:
    return np.bincount(tensor.parts["outlier_positions"] // tensor.shape[1], minlength=tensor.shape[0])


@pytest.mark.parametrize("movement", ["broadcast", "systolic"])
def test_rows_of_indices_end_with_centroids_and_outliers(movement: str) -> None:
    design = DICTIONARY
    if movement == "systolic":
        design = AcceleratorDesign(array=replace(DICTIONARY.array, movement="systolic"), **SMALL)
    own = driver(design)
    for place, shape in enumerate([(3, 30, 2), (7, 101, 5), (9, 60, 4), (4, 31, 9), (1, 1, 1)]):
        tensor, activations = indices(*shape, seed=place)
        result = own.run(tensor, activations)
        wanted = expected(design, tensor, activations)
        assert np.array_equal(result.outputs.view(np.uint16), wanted.view(np.uint16)), shape
        outputs, _, tokens = shape
        most = [outliers_by_row(tensor)[first : first + 3].max() for first in range(0, outputs, 3)]
        # X of the definition: a cycle, the centroids, the outliers of the row that has the most.
        ends = sum(1 + len(tensor.parts["dictionary"]) + count for count in most)
        assert result.cycles_by_cause["drain"] == -(-tokens // 2) * (len(most) * design.array.drain_cycles + ends), (
            shape
        )
    assert [*outliers_by_row(indices(7, 101, 5, 1)[0])][:3] == [3, 6, 0]


def test_every_schedule_of_indices_gives_the_same_outputs() -> None:
    """Outliers stay until the end of their rows, whatever is loaded meanwhile, and in whatever chunks they come."""
    tensor, activations = indices(8, 50, 5, seed=1)
    image = layer_image(DICTIONARY.array, tensor, activations)
    wanted = expected(DICTIONARY, tensor, activations)
    roomy = AcceleratorDesign(array=DICTIONARY.array, weight_words=256, activation_words=256, panels=8)
    for weights, activations_, stationary, chunk in itertools.product(
        Allocation, Allocation, (True, False), (50, 24, 8)
    ):
        schedule = Schedule(
            chunk_steps=chunk,
            panels_per_block=1,
            weights_stationary=stationary,
            weight_allocation=weights,
            activation_allocation=activations_,
        )
        for gaps in ((0, 0), (0, 200)):
            result = driver(roomy, gaps).run_image(image, schedule)
            assert np.array_equal(result.outputs, wanted), schedule


def test_a_real_layer_of_indices_is_that_of_the_reference() -> None:
    """Keys of the embedded model: a row of them has 70 outliers."""
    model = open_model("tiny")
    name = "model.layers.3.self_attn.k_proj"
    weights = dict(model.matrices())[name]
    tensor = quantize(weights, get_format("gobo-w3"))
    assert outliers_by_row(tensor).max() > 50
    activations = np.random.default_rng(0).standard_normal((2, tensor.shape[1])).astype(np.float16)
    found = driver(DICTIONARY).run(tensor, activations).outputs
    assert np.array_equal(found.view(np.uint16), expected(DICTIONARY, tensor, activations).view(np.uint16))


def test_more_outliers_than_there_is_room_for_are_refused() -> None:
    tensor, activations = indices(3, 160, 2)
    many, _ = layer("gobo-w4:threshold=1", 3, 1200, 2)
    most = outliers_by_row(many)
    with pytest.raises(InputError, match=f"row {most.argmax()} has {most.max()} outliers; the array was built for 128"):
        layer_image(DICTIONARY.array, many, np.zeros((1, 1200), np.float16))
    image = layer_image(DICTIONARY.array, tensor, activations)
    places, values = np.arange(129), np.ones(129, np.float32)
    broken = replace(image, outliers=((places, values), *image.outliers[1:]))
    with pytest.raises(TermwiseError, match="does not fit into its half"):
        driver(DICTIONARY).run_image(broken, plan(DICTIONARY, image))


# ---- bad programming ----


def test_activations_that_are_not_finite_end_the_load_and_nothing_hangs() -> None:
    tensor, activations = layer("bitmod-w4g32", 4, 64, 2)
    own = driver(PAPER)
    image = layer_image(PAPER.array, tensor, activations)
    infinite = image.activations.copy()
    infinite.view(np.uint16)[0, 5] = 0x7C00
    broken = type(image)(**{**image.__dict__, "activations": infinite})
    with pytest.raises(TermwiseError, match="an activation is infinite or no number"):
        own.run_image(broken, plan(PAPER, image))
    assert np.array_equal(own.run(tensor, activations).outputs, expected(PAPER, tensor, activations))


def test_loads_beyond_their_half_are_an_error() -> None:
    tensor, activations = layer("bitmod-w4g32", 8, 400, 3)
    own = driver(PAPER)
    image = layer_image(PAPER.array, tensor, activations)
    for allocation in Allocation:
        schedule = Schedule(
            chunk_steps=image.row_steps,
            panels_per_block=1,
            weights_stationary=True,
            weight_allocation=allocation,
            activation_allocation=Allocation.CHUNKS,
        )
        with pytest.raises(TermwiseError, match="does not fit into its half"):
            own.run_image(image, schedule)
    assert np.array_equal(own.run(tensor, activations).outputs, expected(PAPER, tensor, activations))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("terms", 0, 3),
        ("row_steps", 0, 3),
        ("chunk_steps", 1000, 3),
        ("layer_0", 31, 5),
        ("weight_code_bits", 5, 6),
        ("weight_word_bits", 17, 6),
        ("activation_row_bits", 65, 6),
    ],
)
def test_bad_programs_set_their_error(field: str, value: int, error: int) -> None:
    own = driver(PAPER)
    tensor, activations = layer("bitmod-w4g32", 4, 64, 2)
    own.run(tensor, activations)
    own.write(field, value)
    own.write("control", 1)
    assert own.read("error") == error
    assert ERRORS[error]
    assert own.read("status") == 4
    own.write("control", 2)
    assert own.read("status") == own.read("error") == 0


def test_operands_come_as_they_are_packed() -> None:
    """The codes of the stream are the bytes of the tensor, row after row."""
    tensor, activations = layer("bitmod-w3g32", 6, 64, 2)
    design = PAPER
    image = layer_image(design.array, tensor, activations)
    beats = operand_beats(design, image, plan(design, image))
    rows, columns = design.array.rows, design.array.columns
    # A channel scale and two groups, then 24 bytes of codes; a token's 128 bytes.
    first = beats[0].reshape(rows, 3 + 6)
    assert first[:, 3:].tobytes() == tensor.parts["codes"][:rows].tobytes()
    assert beats[1].tobytes() == activations[:columns].tobytes()


def test_a_start_while_a_layer_runs_is_refused() -> None:
    own = driver(PAPER)
    tensor, activations = layer("bitmod-w4g32", 4, 64, 2)
    own.run(tensor, activations)
    assert own.read("status") == 2
    own.write("control", 1)
    assert own.read("status") == 1
    own.write("control", 1)
    assert own.read("error") == 4
    own.write("control", 2)
    assert own.read("status") == 0


def test_the_interrupt_is_raised_when_it_is_enabled() -> None:
    own = driver(PAPER)
    tensor, activations = layer("bitmod-w4g32", 4, 64, 2)
    own.run(tensor, activations)
    model = board(PAPER).model
    assert own.read("interrupt") == 1
    assert not model.run({}, 1)["interrupt"][0]
    own.write("interrupt_enable", 1)
    assert model.run({}, 1)["interrupt"][0]
    own.write("control", 2)
    assert not model.run({}, 2)["interrupt"][1]


def test_registers_read_back_and_others_are_refused() -> None:
    own = driver(PAPER)
    random = np.random.default_rng(0)
    values = {
        register: int(random.integers(0, 1 << register.bits))
        for register in REGISTERS
        if register.access == "write" and not register.name.startswith("centroid_")
    }
    for register, value in values.items():
        own.write(register.name, value)
    assert {register: own.read(register.name) for register in values} == values
    with pytest.raises(TermwiseError, match="cannot be written"):
        own.write("cycles", 1)
    with pytest.raises(TermwiseError, match="no register at 0x"):
        own.transport.read(max(OFFSETS.values()) + 4)
    with pytest.raises(TermwiseError, match="no register at 0x"):
        own.read("centroid_0")


def test_a_driver_of_another_design_is_refused() -> None:
    with pytest.raises(TermwiseError, match="an accelerator of design"):
        Driver(SHARED, board(PAPER))


def test_layers_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    tensor, activations = layer("bitmod-w4g32", 4, 64, 2)
    with pytest.raises(InputError, match="expected 64"):
        driver(PAPER).run(tensor, activations[:, :32])
    with pytest.raises(InputError, match="expected a power of two"):
        MemoryDesign(rows=2, step_bits=8, group_bits=0, panel_bits=0, steps=100)
    large, many = layer("bitmod-w4g256", 4, 512, 2)
    with pytest.raises(InputError, match="groups of 256 weights"):
        driver(SHARED).run(large, many)
