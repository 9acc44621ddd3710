"""On-chip buffers: energy, area, access time and leakage of SRAM as a function of capacity, word width and banks.

A buffer of B banks keeps ``word_bits / B`` bits of every word in each bank, and an access reads or writes all banks, as
in the simulator published with BitMoD (HPCA 2025). Energy, area and leakage are B times those of a bank; the access
time is a bank's. Wires between banks are not counted, there and here.

A bank of C bits (ECC not counted) with words of w bits is described by five terms with non-negative coefficients:

=============  ===============================  ==================================================================
term           expression                       stands for
=============  ===============================  ==================================================================
base           1                                sense amplifiers, control: what a bank of any size has
wires          sqrt(C)                          address wires, word lines and decoder; a side of the bank is sqrt(C)
data tree      w · max(0, sqrt(C) − overlap·w)  w data wires to the subarray; none where one row is as wide as the bank
word           w²                               the cells that a word of w bits touches if its subarray is w wide
cells          C                                all cells
=============  ===============================  ==================================================================

Their coefficients are fitted to CACTI 7 by ``python -m termwise.sim.sram_fit``, which prints them as they stand below
together with the errors. The points (``sram_points.json``) are runs of CACTI in the configuration that gave the
published ones: they reproduce all nine buffers of BitMoD (eight banks of 64 KiB) and the banks of 4 and 8 KiB of ANT to
every printed digit. CACTI does not move smoothly, because it picks another organization from point to point; that is
most of the error. ``SramModel`` refuses what lies outside the points: banks from 1 KiB to 4 MiB, 16 to 512 bits of a
word in a bank, at least 32 words (CACTI finds no organization for fewer).

Relative errors over the 98 points, root mean square / largest, in per cent (``tests/test_sram.py`` holds the numbers):

==========  ===========  ===========================  =============================  ================
quantity    fit          with each point left out     with each capacity left out    published ones
==========  ===========  ===========================  =============================  ================
read        10.5 / 35.1  11.7 / 39.7                  12.4 / 44.8                    9.1 / 16.1
write       7.4 / 19.5   7.9 / 20.6                   8.1 / 20.6                     4.5 / 10.3
area        6.5 / 17.6   6.9 / 19.8                   7.1 / 19.8                     4.3 / 6.7
time        6.1 / 15.3   6.5 / 16.0                   6.9 / 15.9                     6.5 / 8.7
leakage     4.3 / 16.4   4.8 / 19.1                   6.5 / 30.0                     -
==========  ===========  ===========================  =============================  ================

(The published banks are among the points of the fit.)

What is thin: published are only banks of 4, 8 and 64 KiB, and one of 128 B by ANT, which is outside the range and which
this configuration does not reproduce (0.264 against 0.295 pJ a read). Everything else rests on CACTI alone, at one
technology (28 nm, high-performance transistors, 360 K, one read and one write port). Leakage is CACTI's too, with no
published value beside it; at 360 K with these transistors it is high.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from termwise.algorithms.errors import InputError

SMALLEST_BANK_BYTES, LARGEST_BANK_BYTES = 1024, 4 << 20
NARROWEST_BANK_BITS, WIDEST_BANK_BITS = 16, 512
FEWEST_WORDS = 32
SMALLEST_BUFFER_BYTES, LARGEST_BUFFER_BYTES = 4 << 10, 4 << 20


class SramCoefficients(NamedTuple):
    """What one quantity of a bank is made of; see the table of this module for the terms."""

    base: float
    wires: float
    data_tree: float
    word: float
    cells: float
    overlap: float

    def of_bank(self, bank_bytes: float, width_bits: float) -> float:
        """The quantity for a bank of ``bank_bytes`` with words of ``width_bits``."""
        return sum(
            coefficient * term
            for coefficient, term in zip(self[:5], bank_terms(bank_bytes, width_bits, self.overlap), strict=True)
        )


def bank_terms(bank_bytes: float, width_bits: float, overlap: float) -> tuple[float, float, float, float, float]:
    """The five terms of a bank: base, wires, data tree, word, cells."""
    bits = 8 * bank_bytes
    side = math.sqrt(bits)
    return 1.0, side, width_bits * max(0.0, side - overlap * width_bits), width_bits * width_bits, bits


COEFFICIENTS: dict[str, SramCoefficients] = {
    "read_pj": SramCoefficients(
        base=0.0,
        wires=0.005519,
        data_tree=0.0001878,
        word=6.819e-05,
        cells=3.622e-07,
        overlap=1.5,
    ),
    "write_pj": SramCoefficients(
        base=0.134,
        wires=0.002559,
        data_tree=0.000177,
        word=6.619e-05,
        cells=6.438e-07,
        overlap=0.3,
    ),
    "area_mm2": SramCoefficients(
        base=8.218e-05,
        wires=0.0,
        data_tree=4.086e-07,
        word=1.385e-07,
        cells=3.3e-07,
        overlap=2.3,
    ),
    "access_ns": SramCoefficients(
        base=0.07921,
        wires=0.0005608,
        data_tree=1.144e-07,
        word=4.135e-08,
        cells=0.0,
        overlap=0.7,
    ),
    "leakage_mw": SramCoefficients(
        base=0.0,
        wires=0.002116,
        data_tree=7.42e-06,
        word=1.205e-06,
        cells=7.52e-05,
        overlap=0.5,
    ),
}


@dataclass(frozen=True, kw_only=True)
class SramModel:
    """A buffer. All figures are for 28 nm, 360 K, one read port and one write port.

    Attributes:
        capacity_bytes: 4 KiB to 4 MiB.
        word_bits: width of a port: what one access reads or writes.
        banks: banks that share every word.

    Raises ``InputError`` where the model has no points: banks below 1 KiB, fewer than 16 or more than 512 bits of a
    word in a bank, or fewer than 32 words.
    """

    capacity_bytes: int
    word_bits: int
    banks: int

    def __post_init__(self) -> None:
        """Refuse what lies outside the points of the fit."""
        for name in ("capacity_bytes", "word_bits", "banks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"buffer: {name} is {value!r}; expected a whole number from 1")
        if not SMALLEST_BUFFER_BYTES <= self.capacity_bytes <= LARGEST_BUFFER_BYTES:
            raise InputError(
                f"buffer: capacity_bytes is {self.capacity_bytes}; "
                f"expected {SMALLEST_BUFFER_BYTES} to {LARGEST_BUFFER_BYTES}, the range of the model"
            )
        if not SMALLEST_BANK_BYTES * self.banks <= self.capacity_bytes:
            raise InputError(
                f"buffer: {self.capacity_bytes} bytes in {self.banks} banks; "
                f"expected at least {SMALLEST_BANK_BYTES} bytes a bank, the range of the model"
            )
        if not NARROWEST_BANK_BITS * self.banks <= self.word_bits <= WIDEST_BANK_BITS * self.banks:
            raise InputError(
                f"buffer: words of {self.word_bits} bits in {self.banks} banks; expected "
                f"{NARROWEST_BANK_BITS} to {WIDEST_BANK_BITS} bits of a word in a bank, the range of the model"
            )
        if 8 * self.capacity_bytes < FEWEST_WORDS * self.word_bits:
            raise InputError(
                f"buffer: {self.capacity_bytes} bytes in words of {self.word_bits} bits; "
                f"expected at least {FEWEST_WORDS} words, the range of the model"
            )

    def _of_bank(self, quantity: str) -> float:
        return COEFFICIENTS[quantity].of_bank(self.capacity_bytes / self.banks, self.word_bits / self.banks)

    @property
    def read_pj(self) -> float:
        """Energy of reading one word."""
        return self.banks * self._of_bank("read_pj")

    @property
    def write_pj(self) -> float:
        """Energy of writing one word."""
        return self.banks * self._of_bank("write_pj")

    @property
    def area_mm2(self) -> float:
        """Area of all banks."""
        return self.banks * self._of_bank("area_mm2")

    @property
    def access_ns(self) -> float:
        """Time from the address to the data."""
        return self._of_bank("access_ns")

    @property
    def leakage_mw(self) -> float:
        """Standing power of all banks."""
        return self.banks * self._of_bank("leakage_mw")
