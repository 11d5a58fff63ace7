"""The benchmark loop on a scripted clock: stop rule, rejection, interleaving, drift."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tfnas_ext.timing import (
    CpuTimer,
    Samples,
    StopRule,
    measure,
    measure_interleaved,
    median_interval,
    median_interval_rank,
    smoothed_drift,
)
from tfnas_ext.timing_host import (
    flush_cache,
    peak_resident_bytes,
    pinned_threads,
    set_allocator,
)


class ScriptedClock:
    """Time moves only when a call says so."""

    def __init__(self) -> None:
        self.wall = 0
        self.cpu = 0
        self.switches = 0

    def wall_ns(self) -> int:
        return self.wall

    def thread_ns(self) -> int:
        return self.cpu

    def involuntary_switches(self) -> int:
        return self.switches

    def work(self, ms: float, *, stolen_ms: float = 0.0, switches: int = 0) -> None:
        self.wall += round((ms + stolen_ms) * 1e6)
        self.cpu += round(ms * 1e6)
        self.switches += switches

    def elapsed_s(self) -> float:
        return self.wall / 1e9


def script(clock: ScriptedClock, values_ms: list[float]) -> Callable[[], None]:
    source: Iterator[float] = iter(values_ms * 1000)
    return lambda: clock.work(next(source))


def test_median_interval_rank_is_exact() -> None:
    # P(all six above the median) * 2 = 2/64 = 0.031 < 0.05, and with five 2/32 = 0.0625: too few
    assert median_interval_rank(5) is None
    assert median_interval_rank(6) == 0
    # published 95 % ranks (from 1) of the median's interval: n = 20 -> 6, n = 50 -> 18, n = 100 -> 40
    assert [median_interval_rank(n) for n in (20, 50, 100)] == [5, 17, 39]


def test_median_interval_covers_the_true_median() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(2000):
        low, high = median_interval(rng.lognormal(size=25))
        covered += low <= 1.0 <= high
    assert 0.945 <= covered / 2000 <= 0.98, covered


def test_stop_rule_waits_for_precision_and_then_stops() -> None:
    clock = ScriptedClock()
    quiet = measure(
        script(clock, [1.0, 1.001]),
        timer=CpuTimer(threads=1, clock=clock),
        rule=StopRule(0.005, min_samples=12),
        elapsed_s=clock.elapsed_s,
    )
    assert quiet.converged
    assert quiet.count == 12
    assert quiet.median_ms == pytest.approx(1.0005)
    noisy_values = list(np.random.default_rng(3).normal(1.0, 0.05, 997).clip(0.5))
    noisy = measure(
        script(clock, noisy_values),
        timer=CpuTimer(threads=1, clock=clock),
        rule=StopRule(0.005, min_samples=12, time_limit_s=60.0),
        elapsed_s=clock.elapsed_s,
    )
    assert noisy.converged
    # the half width shrinks as 1.25 * 1.96 * sigma / sqrt(n): about 600 samples for 0.5 % of 5 % noise
    assert 200 < noisy.count < 2000
    assert noisy.relative_half_width <= 0.005


def test_time_limit_ends_it_and_is_told() -> None:
    clock = ScriptedClock()
    samples = measure(
        script(clock, list(np.random.default_rng(5).uniform(1.0, 3.0, 500))),
        timer=CpuTimer(threads=1, clock=clock),
        rule=StopRule(0.001, time_limit_s=0.1),
        elapsed_s=clock.elapsed_s,
    )
    assert not samples.converged
    assert 45 <= samples.count <= 55
    assert samples.rel_stdev > 0.3


def test_the_time_limit_is_for_each_of_several_calls() -> None:
    clock = ScriptedClock()
    noise = list(np.random.default_rng(5).uniform(1.0, 3.0, 500))
    samples = measure_interleaved(
        {name: script(clock, noise) for name in "abcd"},
        timer=CpuTimer(threads=1, clock=clock),
        rule=StopRule(0.001, time_limit_s=0.1),
        elapsed_s=clock.elapsed_s,
    )
    assert all(45 <= found.count <= 55 for found in samples.values())


def test_rejected_readings_count_towards_the_most_that_are_taken() -> None:
    clock = ScriptedClock()
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        clock.work(1.0 + calls % 7, switches=calls % 2)

    rule = StopRule(0.001, max_samples=20, time_limit_s=10.0)
    samples = measure(call, timer=CpuTimer(threads=1, clock=clock), rule=rule, warm_up=0, elapsed_s=clock.elapsed_s)
    assert (calls, samples.count, samples.rejected) == (20, 10, 10)


@pytest.mark.parametrize("cold", [True, False])
def test_a_cold_reading_evicts_the_caches_first(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr("tfnas_ext.timing.flush_cache", lambda: log.append("flush"))
    CpuTimer(threads=1, cold=cold, clock=ScriptedClock()).sample(lambda: log.append("call"))
    assert log == ["flush", "call"] if cold else ["call"]


@pytest.mark.parametrize("how", ["stolen", "switched"])
def test_preempted_readings_are_rejected_and_counted(how: str) -> None:
    clock = ScriptedClock()
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        disturbed = calls % 3 == 0
        stolen = 0.5 if disturbed and how == "stolen" else 0.0
        clock.work(1.0, stolen_ms=stolen, switches=int(disturbed and how == "switched"))

    samples = measure(
        call,
        timer=CpuTimer(threads=1, clock=clock),
        rule=StopRule(min_samples=20),
        warm_up=3,
        elapsed_s=clock.elapsed_s,
    )
    assert np.all(samples.values_ms == 1.0)
    assert samples.rejected == pytest.approx(samples.count / 2, abs=1)


def test_a_machine_never_quiet_still_gets_numbers() -> None:
    clock = ScriptedClock()
    samples = measure(
        lambda: clock.work(1.0, stolen_ms=1.0, switches=1),
        timer=CpuTimer(threads=1, clock=clock),
        rule=StopRule(time_limit_s=0.1),
        elapsed_s=clock.elapsed_s,
    )
    assert not samples.converged
    assert samples.count > 10
    assert samples.median_ms == pytest.approx(2.0)


def test_waiting_threads_are_no_interference() -> None:
    clock = ScriptedClock()
    timer = CpuTimer(threads=2, clock=clock)
    assert not timer.sample(lambda: clock.work(1.0, stolen_ms=1.0)).disturbed
    assert timer.sample(lambda: clock.work(1.0, switches=1)).disturbed


def test_interleaving_divides_the_drift_out() -> None:
    clock = ScriptedClock()
    speed = 1.0

    def work(ms: float) -> None:
        nonlocal speed
        speed *= 1.002  # the machine slows down all the time
        clock.work(ms * speed)

    samples = measure_interleaved(
        {"a": lambda: work(1.0), "b": lambda: work(2.0)},
        timer=CpuTimer(threads=1, clock=clock),
        rule=StopRule(0.0001, min_samples=60, max_samples=60, time_limit_s=100.0),
        reference=lambda: work(0.5),
        elapsed_s=clock.elapsed_s,
    )
    plain = measure_interleaved(
        {"a": lambda: work(1.0)},
        timer=CpuTimer(threads=1, clock=clock),
        rule=StopRule(0.0001, min_samples=60, max_samples=60, time_limit_s=100.0),
        elapsed_s=clock.elapsed_s,
    )
    assert plain["a"].rel_stdev > 0.03
    assert samples["a"].rel_stdev < 0.01
    assert samples["b"].median_ms / samples["a"].median_ms == pytest.approx(2.0, rel=0.005)


def test_the_order_is_seeded() -> None:
    orders: list[list[str]] = []
    for seed in (1, 1, 2):
        order: list[str] = []
        clock = ScriptedClock()

        def call(name: str, order: list[str] = order, clock: ScriptedClock = clock) -> Callable[[], None]:
            return lambda: (order.append(name), clock.work(1.0))[1]

        measure_interleaved(
            {name: call(name) for name in "abcdef"},
            timer=CpuTimer(threads=1, clock=clock),
            warm_up=0,
            seed=seed,
            elapsed_s=clock.elapsed_s,
        )
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:6]) == list("abcdef")


def test_drift_of_slots_is_separate() -> None:
    reference = np.ones((20, 2))
    reference[10:, 1] = 1.5
    drift = smoothed_drift(reference)
    assert np.all(drift[:, 0] == 1.0)
    assert drift[-1, 1] / drift[0, 1] == pytest.approx(1.5)
    assert smoothed_drift([2.0]).tolist() == [1.0]


def test_samples_with_few_values() -> None:
    one = Samples(np.array([2.0]))
    assert one.median_ms == 2.0
    assert one.rel_stdev == 0.0
    assert one.relative_half_width == math.inf


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"half_width": 0.0}, "half_width"),
        ({"half_width": math.nan}, "half_width"),
        ({"min_samples": 0}, "min_samples"),
        ({"max_samples": 5}, "max_samples"),
        ({"time_limit_s": 0.0}, "time_limit_s"),
    ],
)
def test_bad_stop_rules_are_refused(bad: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        StopRule(**bad)  # type: ignore[arg-type]


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        measure_interleaved({})


def test_real_clock_and_cold_cache() -> None:
    x = torch.ones(1000)
    samples = measure(lambda: x.add_(1), rule=StopRule(0.2, min_samples=6, time_limit_s=0.2))
    assert 0 < samples.median_ms < 100
    flush_cache()
    assert CpuTimer(cold=True).sample(lambda: x.add_(1)).ms > 0


def test_threads_are_pinned_and_restored() -> None:
    before = torch.get_num_threads()
    with pinned_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads"), pinned_threads(0):
        pass


def test_allocator_settings_are_reported() -> None:
    settings = set_allocator()
    assert settings is None or settings["mmap_max"] == 0


PLACES = """
import contextlib, numpy as np, torch
from tfnas_ext.timing_host import displaced_allocations, set_allocator

set_allocator()
rng = np.random.default_rng(3)
for where in (displaced_allocations, contextlib.nullcontext, displaced_allocations):
    found = set()
    for _ in range(32):
        with where(rng) if where is displaced_allocations else where():
            found.add(torch.empty(1 << 21).data_ptr())
    print(len(found))
"""


def test_displaced_allocations_lie_elsewhere(tmp_path: Path) -> None:
    """In a process of its own: what a used heap has free decides where things lie."""
    done = subprocess.run([sys.executable, "-c", PLACES], cwd=tmp_path, capture_output=True, text=True, check=True)
    _, alike, displaced = map(int, done.stdout.split())
    assert 4 * alike <= displaced, f"{alike} places alike, {displaced} displaced, of 32 each"


def test_peak_resident_bytes_is_this_process_alone() -> None:
    """A child of a large parent starts with its own peak."""
    ballast = bytearray(b"\x01" * (512 << 20))  # written to, so resident
    code = "from tfnas_ext.timing_host import peak_resident_bytes; print(peak_resident_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert peak_resident_bytes() > len(ballast)
    assert 50 << 20 < int(child.stdout) < peak_resident_bytes()
