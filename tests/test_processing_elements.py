"""Specifications of the PEs: cycles per step as published, and what each PE refuses."""

from __future__ import annotations

import pytest

from termwise.algorithms.bit_serial import BitSerialSpec
from termwise.algorithms.errors import InputError
from termwise.algorithms.flint import FlintSpec
from termwise.algorithms.formats import get_format
from termwise.algorithms.fp16_mac import Fp16MacSpec
from termwise.algorithms.outlier_victim import OutlierVictimSpec
from termwise.algorithms.processing_element import ProcessingElementSpec, UnsupportedFormatError


@pytest.mark.parametrize(
    ("name", "cycles"),
    [  # BitMoD section IV-A: INT8 4, INT6 and INT5 3, FP4 and FP3 with a special value 2
        ("int-w8g128", 4),
        ("int-w6g128", 3),
        ("int-w5g128", 3),
        ("int-w4g128", 2),
        ("int-w3g128", 2),
        ("bitmod-w4g128", 2),
        ("bitmod-w3g128", 2),
        ("ant-w4g128", 2),
        ("int-asym-w4g128", 3),  # code - zero point has 5 bits
        ("int-asym-w3g128", 2),
        ("int-asym-w7g128", 4),
        ("fp4_e2m1-w4g128", 2),
        ("fp5_e2m2-w5g128", 2),
        ("flint4-w4g128", 2),
    ],
)
def test_bit_serial_cycles_are_the_terms(name: str, cycles: int) -> None:
    assert BitSerialSpec().cycles_per_step(get_format(name)) == cycles


def test_keys_and_values_are_booth_digits() -> None:
    assert BitSerialSpec().key_value_cycles_per_step(8) == 4


@pytest.mark.parametrize(
    ("spec", "accepted", "refused"),
    [
        (Fp16MacSpec(), ["fp16", "bitmod-w4g128", "olive-w4", "int-asym-w4g128"], []),
        (
            BitSerialSpec(),
            ["int-w8g128", "bitmod-w3g128", "fp5_e2m2-w5g128"],
            ["fp16", "olive-w4", "int-asym-w8g128", "fp6_e2m3-w6g128", "fp6_e3m2-w6g128"],
        ),
        (OutlierVictimSpec(), ["olive-w4", "int-w8g128", "ant-w4g128"], ["fp16", "bitmod-w4g128", "int-asym-w4g128"]),
        (OutlierVictimSpec(), ["flint4-w4"], ["fp4_e2m1-w4g128"]),
        (FlintSpec(), ["ant-w4g128", "int-w4g128", "flint5-w5"], ["fp16", "olive-w4", "bitmod-w4g128", "fp6_e2m3-w6"]),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_a_pe_takes_what_its_decoder_reads(
    spec: ProcessingElementSpec, accepted: list[str], refused: list[str]
) -> None:
    for name in accepted:
        assert spec.cycles_per_step(get_format(name)) >= 1
    for name in refused:
        with pytest.raises(
            UnsupportedFormatError, match=name.partition("-w")[0] if name != "olive-w4" else "abfloat|olive-w4"
        ):
            spec.cycles_per_step(get_format(name))


@pytest.mark.parametrize("spec", [BitSerialSpec(), OutlierVictimSpec(), FlintSpec()], ids=lambda spec: spec.kind)
def test_wide_keys_and_values_are_refused(spec: ProcessingElementSpec) -> None:
    with pytest.raises(InputError, match="up to 8 bits; got 16"):
        spec.key_value_cycles_per_step(16)


def test_decoded_weights_fill_the_buffer_of_the_baseline() -> None:
    assert Fp16MacSpec().buffer_bits(get_format("int-w4g128"), 64, 256) == 16
    assert BitSerialSpec().buffer_bits(get_format("int-w4g128"), 64, 256) == 4.125


@pytest.mark.parametrize(
    "spec", [Fp16MacSpec(), BitSerialSpec(), OutlierVictimSpec(), FlintSpec()], ids=lambda spec: spec.kind
)
@pytest.mark.parametrize(
    ("name", "reason"),
    [("gobo-w3", "needs GOBO's own datapath"), ("int-w4a8g128", "its activations have 8 bits, and the PE takes FP16")],
)
def test_what_no_modelled_pe_takes_is_refused_with_the_reason(
    spec: ProcessingElementSpec, name: str, reason: str
) -> None:
    with pytest.raises(UnsupportedFormatError, match=reason):
        spec.cycles_per_step(get_format(name))


def test_groups_along_the_outputs_need_a_decoder_before_the_pe() -> None:
    along_outputs = get_format("int-w4g128:axis=output")
    assert Fp16MacSpec().cycles_per_step(along_outputs) == 1
    for spec in (BitSerialSpec(), OutlierVictimSpec(), FlintSpec()):
        with pytest.raises(UnsupportedFormatError, match="its groups lie along the outputs"):
            spec.cycles_per_step(along_outputs)


def test_special_values_of_ones_own_take_two_terms() -> None:
    assert BitSerialSpec().cycles_per_step(get_format("bitmod-w3g128:special=6,-6,7,-7")) == 2
    with pytest.raises(UnsupportedFormatError, match="11 is no sum of two signed powers of two within 5 bits"):
        BitSerialSpec().cycles_per_step(get_format("bitmod-w4g128:special=5.5"))


# Largest magnitude that an activation is multiplied by: 127, a code less its zero point, 8 in halves, and 6.
NUMERATORS = [("int-w8", 127), ("int-asym-w7g128", 127), ("bitmod-w4g128", 16), ("bitmod-w3g128", 6)]


@pytest.mark.parametrize(
    ("spec", "activation"),
    [
        (BitSerialSpec(numerics="exact"), 65504 << 24),
        (BitSerialSpec(numerics="shared_exponent", align_bits=24), 1 << 24),
    ],
    ids=["exact", "shared_exponent"],
)
@pytest.mark.parametrize(("name", "numerator"), NUMERATORS)
def test_the_longest_group_is_the_last_whose_largest_sum_fits_63_bits(
    spec: BitSerialSpec, activation: int, name: str, numerator: int
) -> None:
    weights = get_format(name)
    longest = ((1 << 63) - 1) // (activation * numerator)
    spec.check_group(weights, longest)
    assert longest * activation * numerator < 1 << 63 <= (longest + 1) * activation * numerator
    with pytest.raises(InputError, match=f"groups of at most {longest} weights of {weights.name}"):
        spec.check_group(weights, longest + 1)
    BitSerialSpec().check_group(weights, 1 << 62)
