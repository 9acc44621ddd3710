"""External memory one burst at a time: the definition that ``termwise.sim.dram`` computes in closed form.

Plain Python, for reading: a channel serves one burst after another, a refresh is an event like any other, and no two
bursts are ever treated together. Mapping, commands and times are those of the docstring of ``termwise.sim.dram``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from termwise.sim.dram import DramCounts
from termwise.sim.kernels import READ, WRITE, DramTiming


@dataclass
class _Bank:
    open_row: int | None = None
    column_ready: int = 0  # ps: activation + tRCD, while a row is open
    close_ready: int = 0  # ps: when the open row may be precharged
    activate_ready: int = 0  # ps: when a row may be activated, while none is open


@dataclass
class _Channel:
    banks: list[_Bank]
    next_refresh: int | None  # ps; None where nothing is refreshed
    bus_free: int = 0  # ps
    direction: int | None = None


@dataclass
class DramReference:
    """Memory that serves requests in order. ``serve`` is ``termwise.sim.dram.serve_request`` with its own state."""

    timing: DramTiming
    last_start: int = 0
    hit_bursts: int = 0
    miss_bursts: int = 0
    conflict_bursts: int = 0
    turnarounds: int = 0
    refreshes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    channels: list[_Channel] = field(default_factory=list)

    def __post_init__(self) -> None:
        """All rows closed, all buses free."""
        banks = self.timing.bank_groups * self.timing.banks_per_group
        self.channels = [
            _Channel(banks=[_Bank() for _ in range(banks)], next_refresh=self.timing.refresh_interval_ps or None)
            for _ in range(max(1, self.timing.channels))
        ]

    def counts(self) -> DramCounts:
        """What the memory did up to now."""
        return DramCounts(
            hit_bursts=self.hit_bursts,
            miss_bursts=self.miss_bursts,
            conflict_bursts=self.conflict_bursts,
            turnarounds=self.turnarounds,
            refreshes=self.refreshes,
            read_bytes=self.read_bytes,
            written_bytes=self.written_bytes,
        )

    def serve(self, address: int, size: int, direction: int, start_cycle: int) -> int:
        """The cycle at whose beginning the last byte of the request has been moved."""
        timing = self.timing
        if size == 0:
            return start_cycle
        if timing.ideal_bytes_per_cycle:
            self.last_start = max(self.last_start, start_cycle)
            channel = self.channels[0]
            channel.bus_free = max(self.last_start, channel.bus_free) + -(-size // timing.ideal_bytes_per_cycle)
            self._count_bytes(size, direction)
            return channel.bus_free
        self.last_start = max(self.last_start, -(-start_cycle * 1_000_000 // timing.clock_mhz))
        end = 0
        for burst in range(address // timing.burst_bytes, (address + size - 1) // timing.burst_bytes + 1):
            end = max(end, self._serve_burst(burst, direction))
            self._count_bytes(timing.burst_bytes, direction)
        return -(-end * timing.clock_mhz // 1_000_000)

    def _count_bytes(self, size: int, direction: int) -> None:
        if direction == READ:
            self.read_bytes += size
        else:
            self.written_bytes += size

    def _serve_burst(self, burst: int, direction: int) -> int:
        """Move one burst; returns when its data have left the bus, in ps."""
        timing = self.timing
        rest, channel_index = divmod(burst, timing.channels)
        rest, group = divmod(rest, timing.bank_groups)
        rest = rest // timing.bursts_per_row  # the column decides nothing
        row, bank_in_group = divmod(rest, timing.banks_per_group)
        channel = self.channels[channel_index]
        bank = channel.banks[group * timing.banks_per_group + bank_in_group]
        latency = timing.read_latency_ps if direction == READ else timing.write_latency_ps

        while True:
            activate = None
            if bank.open_row == row:
                column = bank.column_ready
            else:
                if bank.open_row is None:
                    activate = max(self.last_start, bank.activate_ready)
                else:
                    activate = max(self.last_start, bank.close_ready) + timing.precharge_ps
                column = activate + timing.row_to_column_ps
            column = max(column, self.last_start, channel.bus_free - latency)
            if (channel.direction, direction) == (WRITE, READ):
                column = max(column, channel.bus_free + timing.write_to_read_ps)
            if (channel.direction, direction) == (READ, WRITE):
                column = max(column, channel.bus_free + timing.read_to_write_ps - latency)
            if channel.next_refresh is None or column < channel.next_refresh:
                break
            self._refresh(channel, channel.next_refresh)

        data_end = column + latency + timing.burst_ps
        if activate is None:
            self.hit_bursts += 1
        else:
            if bank.open_row is None:
                self.miss_bursts += 1
            else:
                self.conflict_bursts += 1
            bank.open_row = row
            bank.column_ready = activate + timing.row_to_column_ps
            bank.close_ready = activate + timing.row_active_ps
        after_access = (
            column + timing.read_to_precharge_ps if direction == READ else data_end + timing.write_recovery_ps
        )
        bank.close_ready = max(bank.close_ready, after_access)
        if channel.direction is not None and channel.direction != direction:
            self.turnarounds += 1
        channel.direction = direction
        channel.bus_free = data_end
        return data_end

    def _refresh(self, channel: _Channel, due: int) -> None:
        """Close every open row as soon as all may close, then block all banks."""
        open_banks = [bank for bank in channel.banks if bank.open_row is not None]
        begin = due
        if open_banks:
            begin = max(due, *(bank.close_ready for bank in open_banks)) + self.timing.precharge_ps
        begin = max([begin] + [bank.activate_ready for bank in channel.banks if bank.open_row is None])
        for bank in channel.banks:
            bank.open_row = None
            bank.activate_ready = begin + self.timing.refresh_ps
        channel.next_refresh = due + self.timing.refresh_interval_ps
        self.refreshes += 1
