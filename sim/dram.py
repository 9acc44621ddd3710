"""External memory with channels, banks, pages, bus turnarounds and refresh, served request by request.

**Controller.** One queue, in order, open pages: a request's bursts are transferred in address order on their channel,
no request passes another, and a row stays open until another row of its bank or a refresh needs it closed. Commands of
a request look ahead: a bank is precharged and activated as early as the bank itself and the start of the request
allow, while data of earlier bursts are still on the bus. The data bus of a channel moves one burst at a time.

**Address mapping**, from the lowest digit of a burst's number (address divided by the bytes of a burst): channel, bank
group, column, bank within the group, row. A sequential stream therefore uses all channels, changes the bank group with
every burst, reads whole rows and then goes to the next bank. The row of one bank in each group, which such a stream
reads together, is called a *stripe*.

**Timing** of a burst whose row is open: the column command waits for tRCD after the row's activation, for the start of
the request, for the data bus (data follow the command by CL or CWL), on a change of direction also for tRTW (idle bus
between read data and write data) or tWTR (end of write data to the read command). A closed row is activated first; a
bank with another open row is precharged first (tRP), not before tRAS after its activation, tRTP after its last read
command and tWR after its last write data. A refresh is due every tREFI on every channel; it goes before the first
column command that would not be issued earlier than it is due, waits until all open rows may close, closes them (tRP)
and blocks all banks of the channel for tRFC.

**Not modelled**: tRRD and tFAW (activations in quick succession), tCCD_L (the mapping changes the group), per-bank
refresh, power-down, command bus conflicts, several ranks, reordering. The first three make a stream no slower with
these presets; a random pattern may be faster here than on a device, or slower than with a controller that reorders.

All times are whole picoseconds, rounded up, so that no burst is faster than the data rate; a request's end is rounded
up to a clock cycle of the accelerator. ``termwise.sim.dram_reference`` serves burst by burst and is the definition.
``termwise.sim.kernels.serve_request`` gives exactly its results at a cost per stripe and refresh.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from termwise.algorithms.errors import InputError, unknown_name
from termwise.sim.kernels import (
    BANK_FIELDS,
    CHANNEL_FIELDS,
    CONFLICTS,
    DIRECTION,
    HITS,
    MISSES,
    NEVER,
    NEXT_REFRESH,
    NO_DIRECTION,
    NO_ROW,
    OPEN_ROW,
    PICOSECONDS_PER_MICROSECOND,
    READ_BYTES,
    REFRESHES,
    SHARED_FIELDS,
    TURNAROUNDS,
    WRITTEN_BYTES,
    DramTiming,
)

MAXIMUM_CLOCK_MHZ = 10_000


@dataclass(frozen=True, kw_only=True)
class Dram:
    """A kind of external memory and how much of it there is.

    Attributes:
        name: as ``get_dram`` takes it.
        channels: independent channels (pseudo-channels for HBM), each with its own data bus and banks.
        bytes_per_transfer: width of the data bus of one channel.
        megatransfers_per_second: transfers on a data bus (both clock edges count).
        burst_length: transfers of a burst.
        row_bytes: bytes of a row of one bank (page), over all devices of the channel.
        banks: banks of a channel; ``bank_groups`` groups of equally many.
        row_to_column_ns: tRCD. ``precharge_ns``: tRP. ``row_active_ns``: tRAS, shortest time from activation to
            precharge.
        read_latency_ns, write_latency_ns: CL and CWL, from the column command to the first data.
        read_to_precharge_ns: tRTP. ``write_recovery_ns``: tWR.
        write_to_read_ns: tWTR, from the end of write data to a read command.
        read_to_write_ns: tRTW, idle bus between read data and write data.
        refresh_ns, refresh_interval_ns: tRFC of an all-bank refresh and tREFI; an interval of 0 is no refresh.
        energy_pj_per_bit: energy of a bit that is moved; None where no published figure is known.
        ideal_bytes_per_cycle: None, or the bytes that memory without latency, pages and refresh moves in a cycle of
            the accelerator; then every other number is 0.
        sources: where the numbers come from, a sentence each.

    Raises ``InputError`` for numbers that no memory can have.
    """

    name: str
    channels: int = 0
    bytes_per_transfer: int = 0
    megatransfers_per_second: int = 0
    burst_length: int = 0
    row_bytes: int = 0
    banks: int = 0
    bank_groups: int = 0
    row_to_column_ns: float = 0
    precharge_ns: float = 0
    row_active_ns: float = 0
    read_latency_ns: float = 0
    write_latency_ns: float = 0
    read_to_precharge_ns: float = 0
    write_recovery_ns: float = 0
    write_to_read_ns: float = 0
    read_to_write_ns: float = 0
    refresh_ns: float = 0
    refresh_interval_ns: float = 0
    energy_pj_per_bit: float | None = None
    ideal_bytes_per_cycle: int | None = None
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no memory can be."""
        if self.energy_pj_per_bit is not None and not 0 < self.energy_pj_per_bit < float("inf"):
            raise self._error("energy_pj_per_bit", "a finite number above 0, or None where it is not known")
        if self.ideal_bytes_per_cycle is not None:
            if not _is_count(self.ideal_bytes_per_cycle):
                raise self._error("ideal_bytes_per_cycle", "a whole number of bytes from 1")
            for field in dataclasses.fields(self):
                if field.default == 0 and getattr(self, field.name) != 0:
                    raise self._error(field.name, "0, because ideal_bytes_per_cycle is given and decides alone")
            return
        for name in (
            "channels",
            "bytes_per_transfer",
            "megatransfers_per_second",
            "burst_length",
            "row_bytes",
            "banks",
        ):
            if not _is_count(getattr(self, name)):
                raise self._error(name, "a whole number from 1")
        if not _is_count(self.bank_groups) or self.banks % self.bank_groups:
            raise self._error("bank_groups", f"a whole number from 1 that divides the {self.banks} banks")
        if self.row_bytes % self.burst_bytes:
            raise self._error("row_bytes", f"a multiple of the {self.burst_bytes} bytes of a burst")
        for field in dataclasses.fields(self):
            if field.name.endswith("_ns") and not 0 <= getattr(self, field.name) < 1e9:
                raise self._error(field.name, "a time in ns from 0 and below one second")
        longest_wait = (
            self.refresh_ns
            + self.precharge_ns
            + self.row_active_ns
            + self.read_to_precharge_ns
            + self.write_latency_ns
            + self.write_recovery_ns
            + self.burst_length * 1000 / self.megatransfers_per_second
        )
        if 0 < self.refresh_interval_ns <= longest_wait:
            raise self._error(
                "refresh_interval_ns", f"0 or more than the {longest_wait:g} ns that a refresh may wait and take"
            )

    def _error(self, field: str, expected: str) -> InputError:
        return InputError(f"memory {self.name!r}: {field} is {getattr(self, field)!r}; expected {expected}")

    @property
    def burst_bytes(self) -> int:
        """Bytes of one burst of one channel: the smallest transfer."""
        return self.bytes_per_transfer * self.burst_length

    def peak_bytes_per_second(self, clock_mhz: int) -> Fraction:
        """What all data buses together move when they never wait; only ``ideal`` memory depends on the clock."""
        if self.ideal_bytes_per_cycle is not None:
            return Fraction(self.ideal_bytes_per_cycle * clock_mhz * 1_000_000)
        return Fraction(self.channels * self.bytes_per_transfer * self.megatransfers_per_second * 1_000_000)

    def timing(self, clock_mhz: int) -> DramTiming:
        """The numbers that ``serve_request`` takes, for an accelerator with a clock of ``clock_mhz``.

        Raises ``InputError`` for a clock that is not a whole number of MHz from 1 to 10,000.
        """
        if not _is_count(clock_mhz) or clock_mhz > MAXIMUM_CLOCK_MHZ:
            raise InputError(
                f"memory {self.name!r}: the clock is {clock_mhz!r} MHz; "
                f"expected a whole number from 1 to {MAXIMUM_CLOCK_MHZ}"
            )
        if self.ideal_bytes_per_cycle is not None:
            rest = (0,) * (len(DramTiming._fields) - 2)
            return DramTiming(clock_mhz, self.ideal_bytes_per_cycle, *rest)
        return DramTiming(
            clock_mhz=clock_mhz,
            ideal_bytes_per_cycle=0,
            channels=self.channels,
            bank_groups=self.bank_groups,
            banks_per_group=self.banks // self.bank_groups,
            burst_bytes=self.burst_bytes,
            bursts_per_row=self.row_bytes // self.burst_bytes,
            burst_ps=-(-self.burst_length * PICOSECONDS_PER_MICROSECOND // self.megatransfers_per_second),
            row_to_column_ps=_picoseconds(self.row_to_column_ns),
            precharge_ps=_picoseconds(self.precharge_ns),
            read_latency_ps=_picoseconds(self.read_latency_ns),
            write_latency_ps=_picoseconds(self.write_latency_ns),
            row_active_ps=_picoseconds(self.row_active_ns),
            read_to_precharge_ps=_picoseconds(self.read_to_precharge_ns),
            write_recovery_ps=_picoseconds(self.write_recovery_ns),
            write_to_read_ps=_picoseconds(self.write_to_read_ns),
            read_to_write_ps=_picoseconds(self.read_to_write_ns),
            refresh_ps=_picoseconds(self.refresh_ns),
            refresh_interval_ps=_picoseconds(self.refresh_interval_ns),
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _picoseconds(nanoseconds: float) -> int:
    """Whole picoseconds, rounded up; the decimal that was written counts, not its binary neighbour."""
    exact = Fraction(str(nanoseconds)) * 1000
    return -(-exact.numerator // exact.denominator)


def _ddr4_3200() -> Dram:
    return Dram(
        name="ddr4-3200",
        channels=1,
        bytes_per_transfer=8,
        megatransfers_per_second=3200,
        burst_length=8,
        row_bytes=8192,
        banks=16,
        bank_groups=4,
        row_to_column_ns=13.75,
        precharge_ns=13.75,
        row_active_ns=32,
        read_latency_ns=13.75,
        write_latency_ns=10,
        read_to_precharge_ns=7.5,
        write_recovery_ns=15,
        write_to_read_ns=7.5,
        read_to_write_ns=1.25,
        refresh_ns=350,
        refresh_interval_ns=7800,
        energy_pj_per_bit=18.75,
        sources=(
            "One 64-bit channel, one rank of eight x8 devices of 8 Gb: 16 banks in 4 groups and pages of 1 KB a device "
            "(JEDEC JESD79-4, addressing of 8 Gb).",
            "tRCD, tRP, CL = 13.75 ns: Micron 16gb_ddr4_dram.pdf Rev. B, table 1, speed grade -062E (3200, 22-22-22).",
            "tRFC1 = 350 ns for 8 Gb, tREFI = 7.8 us up to 85 C: Micron MT40A datasheet, table 159.",
            "tRTP = 7.5 ns: Micron MT40A datasheet, table 157. CWL = 16 clocks, tRAS = 32 ns (52 clocks there, rounded "
            "up), tWR = 15 ns (24 clocks), tWTR_L = 7.5 ns (12 clocks): DRAMsim3, configs/DDR4_8Gb_x8_3200.ini.",
            "tRTW: read to write is CL + BL/2 + 2 - CWL clocks (Ramulator 2), that is 2 clocks of idle bus.",
            "Energy: 1200 pJ for 64 bits, BitMoD (HPCA 2025), section V-A, there for DDR4 of no stated speed.",
        ),
    )


def _lpddr5x_8533() -> Dram:
    return Dram(
        name="lpddr5x-8533",
        channels=4,
        bytes_per_transfer=2,
        megatransfers_per_second=8533,
        burst_length=16,
        row_bytes=2048,
        banks=16,
        bank_groups=4,
        row_to_column_ns=18,
        precharge_ns=18,
        row_active_ns=42,
        read_latency_ns=21.574,
        write_latency_ns=11.256,
        read_to_precharge_ns=7.5,
        write_recovery_ns=34,
        write_to_read_ns=12,
        read_to_write_ns=0.938,
        refresh_ns=280,
        refresh_interval_ns=3906,
        energy_pj_per_bit=None,
        sources=(
            "Four x16 channels (a package of 64 bits), 16 Gb a channel, bank-group mode: 16 banks in 4 groups, 2 KB "
            "pages, BL16: Micron LPDDR5 datasheet y31m_lpddr5_multi_pkg.pdf Rev. A, features.",
            "tRCD, tRPpb = 18 ns, tRAS = 42 ns, tWR = 34 ns, tWTR_L = 12 ns, tRTP = 7.5 ns, one clock of idle bus from "
            "read to write data (WCK to DQ): JEDEC JESD209-5 as given by gem5, dram_interfaces/lpddr5.py. These are "
            "LPDDR5 values; that they hold at 8533 is an assumption.",
            "CL = 23, CWL = 12 clocks of 0.938 ns: Ramulator 2, python/ramulator/dram/lpddr5.py, LPDDR5_8533, there "
            "scaled from LPDDR5-6400: typical, not read from a datasheet.",
            "tRFCab = 280 ns for 16 Gb, tREFI = 3.906 us: JEDEC JESD209-5B as given by Ramulator 2.",
            "Energy: no published figure was found.",
        ),
    )


def _hbm2e() -> Dram:
    return Dram(
        name="hbm2e",
        channels=16,
        bytes_per_transfer=8,
        megatransfers_per_second=3600,
        burst_length=4,
        row_bytes=1024,
        banks=16,
        bank_groups=4,
        row_to_column_ns=14,
        precharge_ns=14,
        row_active_ns=34,
        read_latency_ns=14,
        write_latency_ns=4,
        read_to_precharge_ns=6,
        write_recovery_ns=16,
        write_to_read_ns=8,
        read_to_write_ns=1.112,
        refresh_ns=350,
        refresh_interval_ns=3900,
        energy_pj_per_bit=3.92,
        sources=(
            "One stack: 8 channels of two 64-bit pseudo-channels, 16 banks in 4 groups, 1 KB pages, BL4 (JEDEC "
            "JESD235, pseudo-channel mode); 3.6 Gb/s a pin, 460.8 GB/s.",
            "tRCD, tRP, tRAS, CL, CWL, tRTP, tWR, tWTR_L: DRAMsim3, configs/HBM2_8Gb_x128.ini, in ns. JESD235 leaves "
            "them to the vendor, whose HBM2E values are not public: typical, and those of HBM2.",
            "tRFC = 350 ns for 8 Gb a channel, tREFI = 3.9 us: JEDEC JESD235D as given by Ramulator 2. tRTW: two "
            "clocks of idle bus, Ramulator 2.",
            "Energy: 3.92 pJ/bit of HBM2, ECC included: O'Connor et al., Fine-Grained DRAM, MICRO 2017, section 2; no "
            "figure for HBM2E was found.",
        ),
    )


def _hbm3() -> Dram:
    return Dram(
        name="hbm3",
        channels=32,
        bytes_per_transfer=4,
        megatransfers_per_second=6400,
        burst_length=8,
        row_bytes=1024,
        banks=16,
        bank_groups=4,
        row_to_column_ns=19.375,
        precharge_ns=16.25,
        row_active_ns=28.125,
        read_latency_ns=12.5,
        write_latency_ns=6.25,
        read_to_precharge_ns=5.625,
        write_recovery_ns=20.625,
        write_to_read_ns=6.25,
        read_to_write_ns=5,
        refresh_ns=350,
        refresh_interval_ns=3900,
        energy_pj_per_bit=None,
        sources=(
            "One stack: 16 channels of two 32-bit pseudo-channels, BL8, 1 KB pages, 16 banks in 4 groups of one stack "
            "identifier (JEDEC JESD238, table 4); 6.4 Gb/s a pin, 819.2 GB/s.",
            "tRCD (read), tRP, tRAS, CL, CWL, tRTP, tWR, tWTR_L and tRTW (20 clocks from read to write command, 8 of "
            "them idle bus): Ramulator 2, python/ramulator/dram/hbm3.py, HBM3_6400Mbps, clocks of 0.625 ns. JESD238 "
            "leaves them to the vendor: typical.",
            "tRFCab = 350 ns for 8 Gb a channel: JESD238, table 84, as given by Ramulator 2; tREFI = 3.9 us there.",
            "Energy: no published figure was found.",
        ),
    )


def _ideal() -> Dram:
    return Dram(
        name="ideal",
        ideal_bytes_per_cycle=32,
        energy_pj_per_bit=18.75,
        sources=(
            "Bytes per cycle without latency, as in the simulator published with BitMoD (HPCA 2025): 256 bits a cycle, "
            "2400 pJ for 128 bits.",
        ),
    )


_PRESETS: dict[str, Callable[[], Dram]] = {
    "ideal": _ideal,
    "ddr4-3200": _ddr4_3200,
    "lpddr5x-8533": _lpddr5x_8533,
    "hbm2e": _hbm2e,
    "hbm3": _hbm3,
}


def dram_names() -> tuple[str, ...]:
    """The names that ``get_dram`` accepts; each may be followed by ``@COUNT``."""
    return tuple(_PRESETS)


def get_dram(name: str) -> Dram:
    """The memory called ``name``: one of ``dram_names()``, or one followed by ``@COUNT``.

    The count is the number of channels (pseudo-channels for HBM), and the bytes per cycle for ``ideal``. Raises
    ``InputError`` for an unknown name or a malformed count.

    >>> get_dram("lpddr5x-8533@2").channels
    2
    """
    kind, at, count = name.partition("@")
    make = _PRESETS.get(kind)
    if make is None:
        raise unknown_name("memory", kind, dram_names())
    dram = make()
    if not at:
        return dram
    what = "channels" if dram.ideal_bytes_per_cycle is None else "ideal_bytes_per_cycle"
    if re.fullmatch("[1-9][0-9]{0,3}", count) is None:
        raise InputError(
            f"memory {name!r}: the count of {what} is {count!r}; "
            f"expected a whole number from 1 to 9999, such as {kind}@8"
        )
    if what == "channels":
        return dataclasses.replace(dram, name=name, channels=int(count))
    return dataclasses.replace(dram, name=name, ideal_bytes_per_cycle=int(count))


def new_state(timing: DramTiming) -> NDArray[np.int64]:
    """The state of memory that has just been switched on: int64 [fields], all rows closed, all buses free at cycle 0.

    The first ``SHARED_FIELDS`` numbers are those of ``DramCounts`` and the start of the last request; then
    ``CHANNEL_FIELDS`` for each channel, each followed by ``BANK_FIELDS`` for each of its banks.
    """
    banks = timing.bank_groups * timing.banks_per_group
    state = np.zeros(SHARED_FIELDS + max(1, timing.channels) * (CHANNEL_FIELDS + banks * BANK_FIELDS), np.int64)
    for channel in range(max(1, timing.channels)):
        base = SHARED_FIELDS + channel * (CHANNEL_FIELDS + banks * BANK_FIELDS)
        state[base + DIRECTION] = NO_DIRECTION
        state[base + NEXT_REFRESH] = timing.refresh_interval_ps or NEVER
        for bank in range(banks):
            state[base + CHANNEL_FIELDS + bank * BANK_FIELDS + OPEN_ROW] = NO_ROW
    return state


@dataclass(frozen=True, kw_only=True)
class DramCounts:
    """What the memory did: bursts by what they met, and bytes on the buses (whole bursts)."""

    hit_bursts: int
    miss_bursts: int
    conflict_bursts: int
    turnarounds: int
    refreshes: int
    read_bytes: int
    written_bytes: int


def counts(state: NDArray[np.int64]) -> DramCounts:
    """The counts in a state."""
    return DramCounts(
        hit_bursts=int(state[HITS]),
        miss_bursts=int(state[MISSES]),
        conflict_bursts=int(state[CONFLICTS]),
        turnarounds=int(state[TURNAROUNDS]),
        refreshes=int(state[REFRESHES]),
        read_bytes=int(state[READ_BYTES]),
        written_bytes=int(state[WRITTEN_BYTES]),
    )
