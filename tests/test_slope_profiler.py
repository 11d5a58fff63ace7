"""Sections measured by slopes: what a chain runs on, which samples count, what is kept in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from profile_fakes import HEAD_MS, STEM_MS, FakeEngine, Machine, smooth_ms
from scripted_device import DeviceEngine, StrictDevice
from tfnas.latency import slope_profiler
from tfnas.latency.additivity import random_architectures
from tfnas.latency.chain_cuda import CudaChainTimer
from tfnas.latency.conditions import make_profiler
from tfnas.latency.engine import Conditions
from tfnas.latency.knots import searchable_ranges
from tfnas.latency.measurements import Measurements
from tfnas.latency.profile import ProfileOptions, build_table
from tfnas.latency.slope_profiler import SlopeProfiler, chain_of
from tfnas.space_io import load_space

from tfnas_ext.timing import StopRule
from tfnas_ext.timing_cuda import CudaTimer
from tfnas_ext.timing_slope import Slope

SMALL = load_space("small")
RULE = StopRule(0.5, min_samples=2, max_samples=2)


@pytest.mark.parametrize(("follows_itself", "seen"), [(True, [1, 2, 4]), (False, [1, 10, 100])])
def test_a_chain_runs_on_its_own_outputs_or_on_inputs_of_their_own(follows_itself: bool, seen: list[int]) -> None:
    inputs: list[int] = []

    def copy(x: torch.Tensor) -> torch.Tensor:
        inputs.append(int(x))
        return 2 * x

    chain_of([copy] * 3, [torch.tensor(v) for v in (1, 10, 100)], follows_itself)()
    assert inputs == seen


@pytest.mark.parametrize(
    ("slope_ms", "rejected", "disturbed"),
    [(0.5, 0, False), (0.5, 1, False), (0.5, 3, True), (0.0, 0, False), (-0.1, 0, False)],
)
def test_samples_of_disturbed_or_impossible_slopes_are_marked(
    slope_ms: float, rejected: int, disturbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slope = Slope(slope_ms, 0.0, 0.0, rejected, disturbed)
    monkeypatch.setattr(slope_profiler, "measure_slope", lambda *_, **__: slope)
    machine = Machine()
    data = Measurements()
    timer = machine.timer()
    profiler = SlopeProfiler(SMALL, FakeEngine(machine), timer, data, section_timer=timer.timer, now_s=machine.now_s)
    key, (low, _) = next(iter(searchable_ranges(SMALL).items()))
    profiler.measure([(key, low)], RULE, 1e9)
    samples = data.blocks[key, low]
    assert samples
    assert all(sample.ms > 0 for sample in samples)
    assert {sample.disturbed for sample in samples} == {disturbed or slope_ms <= 0}


class ForgettingTimer(CudaTimer):
    """Its graphs are remembered by number only; readings are those of a real slope."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.held, self.graph = machine, set[int](), False

    def warm_up(self, call: Callable[[], object], calls: int) -> None:
        self.held.add(id(call))

    def sample(self, call: Callable[[], object]) -> object:  # type: ignore[override]
        return self.machine.timer().timer.sample(call)

    def forget(self, calls: object) -> None:
        self.held -= {id(call) for call in calls}  # type: ignore[attr-defined]


def test_graphs_of_widths_that_are_done_are_freed() -> None:
    machine = Machine()
    timer = ForgettingTimer(machine)
    profiler = SlopeProfiler(
        SMALL, FakeEngine(machine), machine.timer(), Measurements(), section_timer=timer, now_s=machine.now_s
    )
    configs = [(key, low) for key, (low, _) in searchable_ranges(SMALL).items()]
    for start in range(0, 12, 4):
        profiler.measure(configs[start : start + 4], RULE, 1e9)
    lengths = len(slope_profiler.LENGTHS)
    assert len(timer.held) <= (2 + 4) * lengths  # stem, head, and the last ones
    assert np.isfinite(profiler.measurements.slowness()).all()


def test_a_gpu_times_deep_networks_and_nothing_for_the_first_time_behind_the_gate() -> None:
    """More kernels than the device's queue holds; every thirtieth reading at a lower clock."""
    device = StrictDevice(clocks_mhz=([1700.0] * 29 + [1500.0]) * 10_000)
    engine = DeviceEngine(Machine(), device=device, kernels=200)
    timer = CudaChainTimer(CudaTimer(device))
    options = ProfileOptions(mode="slope", budget_s=30.0, fit_architectures=10)
    table = build_table(SMALL, options, engine=engine, timer=timer, now_s=device.now_s)
    table.require_space(SMALL)
    assert device.timeouts == 0
    for key, curve in table.curves.items():
        wanted = [smooth_ms(key, int(width)) for width in curve.widths]
        np.testing.assert_allclose(curve.latency_ms, wanted, rtol=1e-6)
    assert table.base_ms == pytest.approx(STEM_MS + HEAD_MS)
    assert table.header["additivity"]["mape"] < 0.01
    clock = table.header["sm_clock"]
    assert clock["usual_mhz"] == 1700
    assert clock["rejected"] == sum(mhz < 1700 for mhz in device.clocks_mhz[: device.reads])  # of both timers


def test_networks_are_checked_on_a_gpu_as_they_are_measured_for_its_table() -> None:
    device = StrictDevice()
    engine = DeviceEngine(Machine(), device=device, kernels=200, conditions=Conditions(device="cuda"))
    profiler = make_profiler(
        SMALL, engine.conditions, Measurements(), engine=engine, timer=CudaChainTimer(CudaTimer(device))
    )
    assert isinstance(profiler, SlopeProfiler)
    archs = random_architectures(SMALL, 3, seed=0)
    measured = profiler.measure_networks([engine.network(arch) for arch in archs], RULE, 1e9)
    assert device.timeouts == 0
    for arch, samples in zip(archs, measured, strict=True):
        blocks = [smooth_ms(key, width) for key, width in arch.keys()]  # noqa: SIM118
        assert samples.median_ms == pytest.approx(STEM_MS + HEAD_MS + sum(blocks))
