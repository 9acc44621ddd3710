from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("amaranth", reason="the hardware needs termwise[fpga]")

from termwise.algorithms.errors import InputError, TermwiseError
from termwise.algorithms.formats import get_format
from termwise.algorithms.quantize import quantize
from termwise.algorithms.reference import multiply
from termwise.flow.cli import main
from termwise.flow.hardware import run_layer
from termwise.rtl.accelerator import AcceleratorDesign
from termwise.rtl.array import ArrayDesign
from termwise.rtl.board import PINS, BoardDesign, SerialTransport, SimulatedLine, constraints
from termwise.rtl.driver import Driver
from termwise.rtl.registers import OFFSETS, register_table
from termwise.rtl.serial_link import UartReceiver, UartTransmitter

SMALL = BoardDesign(
    accelerator=AcceleratorDesign(
        array=ArrayDesign(rows=2, columns=2, types=("bitmod_fp4",)), weight_words=64, activation_words=64
    ),
    divisor=5,
)


@pytest.fixture(scope="module")
def line() -> SimulatedLine:
    return SimulatedLine(SMALL)


def test_a_layer_over_the_serial_line_is_the_reference(line: SimulatedLine) -> None:
    """Larger than the memories, and more beats than the link holds: every bit passes the two pins."""
    random = np.random.default_rng(0)
    tensor = quantize(random.standard_normal((5, 300)).astype(np.float32), get_format("bitmod-w4g64"))
    activations = random.standard_normal((3, 300)).astype(np.float16)
    result = Driver(SMALL.accelerator, SerialTransport(line)).run(tensor, activations)
    spec = SMALL.accelerator.array.processing_element
    assert np.array_equal(result.outputs, multiply(spec, tensor, activations).astype(np.float16))
    assert result.operand_beats > 2 * 256


def test_bytes_that_are_no_command_are_answered_and_do_no_harm(line: SimulatedLine) -> None:
    line.write(b"x")
    assert line.read(1) == b"?"
    assert Driver(SMALL.accelerator, SerialTransport(line)).read("status") in (0, 2)


def test_a_register_that_does_not_exist_is_refused_over_the_line(line: SimulatedLine) -> None:
    transport = SerialTransport(line)
    with pytest.raises(TermwiseError, match="refused an access"):
        transport.write(OFFSETS["cycles"], 1)


def test_a_line_without_a_board_is_a_sentence() -> None:
    class Silent:
        def write(self, data: bytes) -> int:
            return len(data)

        def read(self, size: int = 1) -> bytes:
            return b""

    with pytest.raises(TermwiseError, match="sent 0 of 1 bytes"):
        Driver(SMALL.accelerator, SerialTransport(Silent()))


def test_a_bit_is_never_shorter_than_the_receiver_needs() -> None:
    for part in (UartReceiver, UartTransmitter):
        with pytest.raises(InputError, match="3 clock cycles per bit"):
            part(3)


def test_every_pin_has_a_place_of_its_own() -> None:
    assert len(set(PINS.values())) == len(PINS)
    for name, site in PINS.items():
        assert f'LOCATE COMP "{name}" SITE "{site}";' in constraints()


def test_a_layer_of_tiny_on_the_accelerator_of_the_board() -> None:
    found = run_layer("tiny", None, "bitmod-w4g128", 2)
    assert found["equal"]
    assert found["values"] == 2 * found["outputs"]
    assert sum(found["cycles_by_cause"].values()) == found["cycles"]


@pytest.mark.shared
@pytest.mark.parametrize("format", ["bitmod-w3g128", "bitmod-w6g128"])
def test_a_layer_of_gpt2_on_the_accelerator_of_the_board(shared: Path, format: str) -> None:
    assert run_layer(str(shared / "models" / "gpt2-124m-attn"), None, format, 2)["equal"]


def test_layers_and_formats_that_do_not_exist_are_refused() -> None:
    for arguments, expected in (
        (("tiny", "--layer", "nothing"), "unknown layer 'nothing'"),
        (("tiny", "--format", "olive-w4"), "the bit-serial PE (BitMoD) takes"),
        (("llama-2-7b",), "expected a model with weights"),
    ):
        result = CliRunner().invoke(main, ["board", "run", *arguments, "--json"])
        assert result.exit_code == 2, result.output
        assert expected in result.stderr


def test_the_documentation_has_the_registers_of_the_hardware() -> None:
    text = (Path(__file__).parent.parent / "docs" / "rtl.md").read_text(encoding="utf-8")
    assert register_table() in text


def test_the_command_prints_one_document() -> None:
    result = CliRunner().invoke(main, ["board", "run", "tiny", "--tokens", "1", "--json"])
    assert json.loads(result.stdout)["equal"]
