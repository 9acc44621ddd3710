"""External memory: the kernel equals the burst-by-burst reference, and both keep the laws of a memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from termwise.algorithms.errors import InputError
from termwise.sim.dram import Dram, DramCounts, counts, dram_names, get_dram, new_state
from termwise.sim.dram_reference import DramReference
from termwise.sim.kernels import READ, WRITE, DramTiming, serve_request, serve_requests

DEVICES = tuple(name for name in dram_names() if name != "ideal")

Request = tuple[int, int, int, int]  # address, bytes, direction, earliest start cycle


def run_kernel(timing: DramTiming, requests: list[Request]) -> tuple[list[int], DramCounts]:
    state = new_state(timing)
    ends = np.zeros(len(requests), np.int64)
    serve_requests(timing, state, np.array(requests, np.int64).reshape(-1, 4), ends)
    return ends.tolist(), counts(state)


def run_reference(timing: DramTiming, requests: list[Request]) -> tuple[list[int], DramCounts]:
    memory = DramReference(timing)
    return [memory.serve(*request) for request in requests], memory.counts()


SMALL: dict[str, Any] = {
    "name": "small",
    "channels": 2,
    "bytes_per_transfer": 2,
    "megatransfers_per_second": 1600,
    "burst_length": 4,
    "row_bytes": 32,
    "banks": 4,
    "bank_groups": 2,
    "row_to_column_ns": 12,
    "precharge_ns": 11,
    "row_active_ns": 30,
    "read_latency_ns": 10,
    "write_latency_ns": 6,
    "read_to_precharge_ns": 5,
    "write_recovery_ns": 13,
    "write_to_read_ns": 7,
    "read_to_write_ns": 2,
    "refresh_ns": 60,
    "refresh_interval_ns": 400,
}


def random_dram(generator: np.random.Generator) -> Dram:
    """Memory with few and small rows, so that short requests meet every boundary, and times of every order."""

    def time(limit: int) -> float:
        return float(generator.choice([0, generator.integers(0, limit * 1000) / 1000]))

    bank_groups = int(generator.choice([1, 2, 3, 4]))
    fields: dict[str, Any] = {
        "name": "random",
        "channels": int(generator.integers(1, 4)),
        "bytes_per_transfer": int(generator.choice([1, 2, 3])),
        "megatransfers_per_second": int(generator.integers(800, 9000)),
        "burst_length": int(generator.choice([1, 2, 4])),
        "bank_groups": bank_groups,
        "banks": bank_groups * int(generator.choice([1, 2, 3])),
        "row_to_column_ns": time(20),
        "precharge_ns": time(20),
        "row_active_ns": time(45),
        "read_latency_ns": time(20),
        "write_latency_ns": time(15),
        "read_to_precharge_ns": time(8),
        "write_recovery_ns": time(20),
        "write_to_read_ns": time(12),
        "read_to_write_ns": time(5),
    }
    fields["row_bytes"] = fields["bytes_per_transfer"] * fields["burst_length"] * int(generator.integers(1, 12))
    if generator.random() < 0.7:
        fields["refresh_ns"] = time(80)
        fields["refresh_interval_ns"] = float(generator.integers(200, 800))
    return Dram(**fields)


def random_requests(generator: np.random.Generator, dram: Dram, count: int) -> list[Request]:
    """Near and far addresses, streams that go on where the last one ended, gaps of time, both directions."""
    requests: list[Request] = []
    address, cycle = 0, 0
    for _ in range(count):
        if generator.random() < 0.5:
            address = int(generator.integers(0, 20 * dram.row_bytes * dram.banks))
        size = int(generator.choice([0, 1, 7, dram.burst_bytes, dram.row_bytes, generator.integers(1, 4000)]))
        cycle += int(generator.choice([0, 0, 3, 50, generator.integers(0, 4000)]))
        early = int(generator.choice([0, 0, 0, 20]))
        direction = int(generator.integers(0, 2))
        requests.append((address, size, direction, max(0, cycle - early)))
        address += size
    return requests


@pytest.mark.parametrize("seed", range(8))
def test_kernel_equals_reference_on_random_memories(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for case in range(120):
        dram = random_dram(generator)
        timing = dram.timing(int(generator.choice([1, 333, 500, 700, 1000, 1600, 10_000])))
        requests = random_requests(generator, dram, 10)
        message = f"seed {seed}, case {case}: {dram}, {timing.clock_mhz} MHz, {requests}"
        assert run_kernel(timing, requests) == run_reference(timing, requests), message


@pytest.mark.parametrize("name", dram_names())
def test_kernel_equals_reference_on_presets(name: str) -> None:
    generator = np.random.default_rng(5)
    dram = get_dram(name)
    unit = dram.row_bytes or 64
    for clock_mhz in (500, 1000):
        requests: list[Request] = []
        for _ in range(60):
            address = int(generator.integers(0, 64)) * unit * 3
            requests.append(
                (address, int(generator.integers(1, 12_000)), int(generator.integers(0, 2)), 200 * len(requests))
            )
        timing = dram.timing(clock_mhz)
        assert run_kernel(timing, requests) == run_reference(timing, requests)


@settings(max_examples=150)
@given(data=st.data())
def test_kernel_equals_reference_on_shrinkable_sequences(data: st.DataObject) -> None:
    timing = Dram(**SMALL).timing(data.draw(st.sampled_from([400, 1000])))
    request = st.tuples(st.integers(0, 2000), st.integers(0, 300), st.sampled_from([READ, WRITE]), st.integers(0, 3000))
    requests = data.draw(st.lists(request, max_size=12))
    assert run_kernel(timing, requests) == run_reference(timing, requests)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("direction", [READ, WRITE])
def test_stream_stays_within_its_bound_of_the_peak(name: str, direction: int) -> None:
    """A stream of n bursts on a channel takes n bursts on the bus and, besides, at most

    * once: tRCD and the latency before the first data (rows are closed at first);
    * per refresh: the wait until rows may close, tRP, tRFC, tRCD and the latency. Rows may close at most
      max(tRAS, CL or CWL + burst + recovery) after the last column command, whose data still use the bus.

    Everything else is hidden if the other banks of a group keep the bus busy for longer than a row needs to be
    written back, closed and opened, which the first assertion checks.
    """
    dram = get_dram(name)
    timing = dram.timing(1000)
    latency = timing.read_latency_ps if direction == READ else timing.write_latency_ps
    until_close = (
        timing.read_to_precharge_ps
        if direction == READ
        else timing.write_latency_ps + timing.burst_ps + timing.write_recovery_ps
    )
    until_close = max(until_close, timing.row_active_ps)
    stripe_ps = timing.bursts_per_row * timing.bank_groups * timing.burst_ps
    reopen_ps = until_close + timing.precharge_ps + timing.row_to_column_ps + latency
    assert (timing.banks_per_group - 1) * stripe_ps > reopen_ps

    size = 8 << 20
    (end,), done = run_kernel(timing, [(0, size, direction, 0)])
    bursts_of_channel = size // timing.burst_bytes // timing.channels
    refreshes = done.refreshes // timing.channels
    once_ps = timing.row_to_column_ps + latency
    refresh_ps = until_close + timing.precharge_ps + timing.refresh_ps + timing.row_to_column_ps + latency
    busy_ps = bursts_of_channel * timing.burst_ps
    assert refreshes >= busy_ps // timing.refresh_interval_ps
    assert once_ps + busy_ps <= end * 1000 <= once_ps + busy_ps + refreshes * refresh_ps + 1000
    assert done.conflict_bursts + done.miss_bursts + done.hit_bursts == size // timing.burst_bytes


@pytest.mark.parametrize("name", DEVICES)
def test_a_stream_without_refresh_waits_only_once(name: str) -> None:
    """4 GiB take tRCD, CL and their bursts, to the picosecond."""
    dram = dataclasses.replace(get_dram(name), refresh_interval_ns=0)
    timing = dram.timing(1000)
    size = 4 << 30
    (end,), _ = run_kernel(timing, [(0, size, READ, 0)])
    bursts_of_channel = size // timing.burst_bytes // timing.channels
    picoseconds = timing.row_to_column_ps + timing.read_latency_ps + bursts_of_channel * timing.burst_ps
    assert end == -(-picoseconds // 1000)


@pytest.mark.parametrize("name", DEVICES)
def test_a_stream_in_pieces_takes_as_long_as_in_one(name: str) -> None:
    timing = get_dram(name).timing(1000)
    size, piece = 1 << 18, 1 << 14
    whole, _ = run_kernel(timing, [(0, size, READ, 0)])
    pieces, _ = run_kernel(timing, [(address, piece, READ, 0) for address in range(0, size, piece)])
    assert pieces[-1] == whole[-1]


@pytest.mark.parametrize("name", dram_names())
def test_nothing_is_faster_than_the_peak(name: str) -> None:
    generator = np.random.default_rng(11)
    dram = get_dram(name)
    for _ in range(40):
        clock_mhz = int(generator.integers(100, 3000))
        requests = [
            (int(generator.integers(0, 1 << 24)), int(generator.integers(1, 1 << 16)), int(generator.integers(0, 2)), 0)
            for _ in range(int(generator.integers(1, 6)))
        ]
        ends, _ = run_kernel(dram.timing(clock_mhz), requests)
        asked = sum(request[1] for request in requests)
        assert asked * clock_mhz * 1_000_000 <= max(ends) * dram.peak_bytes_per_second(clock_mhz)


@pytest.mark.parametrize("name", DEVICES)
def test_single_bursts_far_apart_cost_their_page_latency(name: str) -> None:
    """A closed row costs tRCD, another open row tRP and tRCD, the open row nothing besides latency and burst."""
    dram = dataclasses.replace(get_dram(name), channels=1, refresh_interval_ns=0)
    timing = dram.timing(1000)
    next_row = timing.burst_bytes * timing.bursts_per_row * timing.bank_groups * timing.banks_per_group
    access_ps = timing.read_latency_ps + timing.burst_ps
    expected = [
        (0, timing.row_to_column_ps + access_ps),
        (next_row, timing.precharge_ps + timing.row_to_column_ps + access_ps),
        (next_row, access_ps),
    ]
    requests = [(address, 1, READ, 10_000 * index) for index, (address, _) in enumerate(expected)]
    ends, done = run_kernel(timing, requests)
    for index, (_, picoseconds) in enumerate(expected):
        assert ends[index] - requests[index][3] == -(-picoseconds // 1000)
    assert (done.miss_bursts, done.conflict_bursts, done.hit_bursts) == (1, 1, 1)


def test_turnaround_waits_as_the_parameters_say() -> None:
    """Read, write, read in one open row of one channel; every wait is added up by hand, in ns."""
    timing = Dram(**(SMALL | {"channels": 1, "refresh_interval_ns": 0})).timing(1000)
    ends, done = run_kernel(timing, [(0, 1, READ, 0), (0, 1, WRITE, 0), (0, 1, READ, 0)])
    burst = 2.5
    read_end = 12 + 10 + burst
    write_end = read_end + 2 + burst
    assert ends == [25, 29, int(np.ceil(write_end + 7 + 10 + burst))]
    assert done.turnarounds == 2


def test_refresh_closes_rows_and_blocks_the_channel() -> None:
    """A row opened before a refresh is closed by it: the burst after it is a miss and waits until the refresh ends."""
    timing = Dram(**(SMALL | {"channels": 1})).timing(1000)
    ends, done = run_kernel(timing, [(0, 1, READ, 0), (0, 1, READ, 400)])
    assert (done.refreshes, done.miss_bursts) == (1, 2)
    assert ends[1] == int(np.ceil(400 + 11 + 60 + 12 + 10 + 2.5))  # due, tRP, tRFC, tRCD, CL, burst


def test_idle_time_is_refreshed_once_per_interval() -> None:
    timing = Dram(**(SMALL | {"channels": 1})).timing(1000)
    _, done = run_kernel(timing, [(0, 1, READ, 0), (0, 1, READ, 4_000_100)])
    assert done.refreshes == 4_000_100 // 400


def test_an_idle_bank_is_prepared_while_data_of_another_row_move() -> None:
    """Two rows in different banks: the second costs no time; in the same bank it costs closing and opening."""
    timing = Dram(**(SMALL | {"channels": 1, "bank_groups": 1, "refresh_interval_ns": 0})).timing(1000)
    row, bank = timing.burst_bytes * timing.bursts_per_row, timing.banks_per_group
    other_bank, _ = run_kernel(timing, [(0, row, READ, 0), (row, row, READ, 0)])
    same_bank, _ = run_kernel(timing, [(0, row, READ, 0), (row * bank, row, READ, 0)])
    bursts = 2 * timing.bursts_per_row
    assert other_bank[1] == -(-(12_000 + 10_000 + bursts * 2500) // 1000)
    last_column = 12_000 + (timing.bursts_per_row - 1) * 2500
    close = max(30_000, last_column + 5000)
    assert same_bank[1] == -(-(close + 11_000 + 12_000 + 10_000 + timing.bursts_per_row * 2500) // 1000)


def test_ideal_memory_takes_whole_cycles_of_its_width() -> None:
    timing = get_dram("ideal").timing(1000)
    state = new_state(timing)
    cycle = 0
    for size in (1, 31, 32, 33, 4096, 4097):
        cycle += -(-size // 32)
        assert serve_request(timing, state, 12345, size, READ, 0) == cycle
    assert serve_request(timing, state, 0, 64, WRITE, cycle + 10) == cycle + 12
    assert (counts(state).read_bytes, counts(state).written_bytes) == (1 + 31 + 32 + 33 + 4096 + 4097, 64)


def test_empty_request_leaves_no_trace() -> None:
    for name in dram_names():
        timing = get_dram(name).timing(1000)
        state = new_state(timing)
        assert serve_request(timing, state, 77, 0, WRITE, 9) == 9
        assert np.array_equal(state, new_state(timing))


def test_presets_move_their_nominal_bandwidth() -> None:
    expected = {"ddr4-3200": 25_600, "lpddr5x-8533": 68_264, "hbm2e": 460_800, "hbm3": 819_200}
    assert {name: get_dram(name).peak_bytes_per_second(1000) // 10**6 for name in DEVICES} == expected
    assert get_dram("ideal").peak_bytes_per_second(500) == 16 * 10**9


def test_every_preset_names_its_sources() -> None:
    for name in dram_names():
        dram = get_dram(name)
        assert dram.name == name
        assert dram.sources
        assert dram.energy_pj_per_bit is None or dram.energy_pj_per_bit > 0


def test_count_after_a_name_sets_channels_or_bytes() -> None:
    assert get_dram("hbm3@8").channels == 8
    assert get_dram("ideal@64").ideal_bytes_per_cycle == 64


@pytest.mark.parametrize("name", ["ddr5", "hbm3@", "hbm3@0", "hbm3@-1", "hbm3@1.5", "ideal@x", ""])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        get_dram(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", 0),
        ("megatransfers_per_second", 0),
        ("bytes_per_transfer", -1),
        ("burst_length", True),
        ("row_bytes", 33),
        ("bank_groups", 3),
        ("banks", 0),
        ("precharge_ns", -1),
        ("read_latency_ns", float("nan")),
        ("refresh_interval_ns", 70),
        ("energy_pj_per_bit", 0.0),
        ("ideal_bytes_per_cycle", 0),
        ("ideal_bytes_per_cycle", 32),
    ],
)
def test_impossible_memories_are_refused_by_the_name_of_the_field(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field if field != "ideal_bytes_per_cycle" or value == 0 else "channels"):
        Dram(**(SMALL | {field: value}))


@pytest.mark.parametrize("clock_mhz", [0, -5, 10_001, 1.5, True])
def test_impossible_clocks_are_refused(clock_mhz: Any) -> None:
    with pytest.raises(InputError, match="clock"):
        get_dram("hbm3").timing(clock_mhz)


def test_times_are_whole_picoseconds_rounded_up() -> None:
    timing = get_dram("lpddr5x-8533").timing(1000)
    assert timing.burst_ps == 1876  # 16 / 8533 MT/s = 1875.07 ps
    assert timing.read_latency_ps == 21_574  # the decimal number, not a sum of binary fractions
