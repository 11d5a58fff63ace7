"""What is measured beside a table: the rough range before it, the derived network after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from latency_tables import synthetic_table
from profile_fakes import HEAD_MS, STEM_MS, FakeEngine, Machine, smooth_ms
from scripted_device import StrictDevice
from tfnas import target
from tfnas.latency.additivity import random_architectures
from tfnas.latency.chain import Section
from tfnas.latency.engine import Conditions
from tfnas.latency.header import device_uuid
from tfnas.latency.lut import LatencyTable
from tfnas.space_io import load_space

from tfnas_ext.timing_cuda import CudaTimer

SMALL = load_space("small")


class WatchedEngine(FakeEngine):
    """Notes with how many threads each section runs, and how often before it is first timed."""

    def section(self, ms: float) -> Section:
        run = super().section(ms)

        def watched(x: torch.Tensor) -> torch.Tensor:
            self.threads.add(torch.get_num_threads())
            return run(x)

        return watched

    threads: set[int]


def test_the_rough_range_is_measured_as_its_table_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the table's number of threads, with its allocator, and never in the first run of a network."""
    machine = Machine()
    engine = WatchedEngine(machine)
    engine.threads = set()
    allocated: list[bool] = []
    timer = machine.timer()
    seen: list[int] = []

    class Timer:
        def run(self, sections: list[Section], x: torch.Tensor) -> object:
            seen.append(machine.calls)
            return timer.run(sections, x)

    monkeypatch.setattr(target, "make_engine", lambda *_: engine)
    monkeypatch.setattr(target, "make_timer", lambda *_: Timer())
    monkeypatch.setattr("tfnas.latency.conditions.set_allocator", lambda: allocated.append(True))
    before = torch.get_num_threads()
    low, high = target.rough_range_ms(SMALL, Conditions(threads=before + 1))
    assert engine.threads == {before + 1}
    assert torch.get_num_threads() == before
    assert allocated == [True]
    assert seen[0] > 0

    def network_ms(pick: Callable[[list[float]], float], smallest: bool) -> float:
        both = [pair[0 if smallest else 1] for pair in target.extreme_architectures(SMALL)]
        return pick([sum(smooth_ms(key, width) for key, width in arch.keys()) for arch in both])  # noqa: SIM118

    assert low == pytest.approx(STEM_MS + HEAD_MS + network_ms(min, True), rel=0.05)
    assert high == pytest.approx(STEM_MS + HEAD_MS + network_ms(max, False), rel=0.05)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({}, "does not say which device"),
        ({"device_uuid": "another", "device": "Xeon"}, "another device (Xeon)"),
        ({"device_uuid": device_uuid("cpu"), "engine": "tensorrt"}, "got 'tensorrt'"),
        ({"device_uuid": device_uuid("cpu"), "device_type": "npu"}, "got 'npu'"),
    ],
)
def test_a_network_whose_table_cannot_be_followed_is_not_measured(header: dict[str, str], said: str) -> None:
    """A search that took hours does not fail at its end."""
    (arch,) = random_architectures(SMALL, 1, seed=0)
    table = synthetic_table(SMALL)
    measured_ms, reason = target.measured_latency_ms(arch, LatencyTable(table.base_ms, table.curves, header))
    assert measured_ms is None
    assert reason is not None
    assert said in reason


def test_a_network_that_a_gpu_cannot_time_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    device = StrictDevice()

    def measure(arch: object, conditions: object) -> object:
        return CudaTimer(device).sample(lambda: device.launch(1.0, 1, ran_before=False))

    monkeypatch.setattr(target, "measure_network_ms", measure)
    (arch,) = random_architectures(SMALL, 1, seed=0)
    table = synthetic_table(SMALL)
    of_here = LatencyTable(table.base_ms, table.curves, {"device_uuid": device_uuid("cpu")})
    measured_ms, reason = target.measured_latency_ms(arch, of_here)
    assert measured_ms is None
    assert reason is not None
    assert "the timed work waited for the device" in reason
