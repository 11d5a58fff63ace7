"""The CUDA timer's logic on a scripted device: gate, batches, cold cache, graphs, clock guard, slope."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scripted_device import ScriptedDevice, StrictDevice
from tfnas.latency.chain_cuda import CudaChainTimer
from tfnas.latency.check import check_table
from tfnas.latency.conditions import make_timer
from tfnas.latency.engine import Conditions, EngineUnavailable
from tfnas.latency.profile import ProfileOptions, build_table
from tfnas.space_io import load_space

from tfnas_ext.timing import StopRule, measure
from tfnas_ext.timing_cuda import ClockGuard, CudaTimer, GateTimeout
from tfnas_ext.timing_slope import fit_slope, measure_slope


def test_a_reading_is_queued_behind_the_gate() -> None:
    device = ScriptedDevice()
    reading = CudaTimer(device).sample(lambda: device.work(0.25))
    assert reading.ms == pytest.approx(0.25)
    assert not reading.disturbed
    assert device.log == ["sync", "closed", "event", "work", "event", "opened", "sync"]


def test_cold_flushes_before_the_gate() -> None:
    device = ScriptedDevice()
    CudaTimer(device, cold=True).sample(lambda: device.work(1.0))
    assert device.log[:3] == ["flush", "sync", "closed"]


def test_a_batch_shares_one_event_pair() -> None:
    device = ScriptedDevice(event_ms=0.008)
    single = CudaTimer(device).sample(lambda: device.work(0.01))
    batched = CudaTimer(device, batch=16).sample(lambda: device.work(0.01))
    assert single.ms == pytest.approx(0.018)
    assert batched.ms == pytest.approx(0.0105)
    with pytest.raises(ValueError, match="cold"):
        CudaTimer(device, cold=True, batch=2)
    with pytest.raises(ValueError, match="batch"):
        CudaTimer(device, batch=0)


def test_graphs_are_captured_once_per_call() -> None:
    device = ScriptedDevice()
    timer = CudaTimer(device, graph=True)
    calls = [lambda: device.work(1.0), lambda: device.work(2.0)]
    for call in calls:
        timer.warm_up(call, 2)
    assert [timer.sample(call).ms for call in calls * 2] == [1.0, 2.0, 1.0, 2.0]
    assert device.captures == 2


def test_graphs_are_replayed_and_belong_to_one_call_until_forgotten() -> None:
    device = ScriptedDevice()
    timer = CudaTimer(device, graph=True)
    called = 0

    def call() -> None:
        nonlocal called
        called += 1
        device.now_ms += 1.0

    assert [timer.sample(call).ms for _ in range(3)] == [1.0, 1.0, 1.0]
    assert called == device.captures == 1
    # calls that nobody else keeps: one must not find the graph of another that lived at its address
    assert [timer.sample(partial(setattr, device, "now_ms", device.now_ms + ms)).ms for ms in (2.0, 3.0, 4.0)] == [
        2.0, 3.0, 4.0,
    ]  # fmt: skip
    timer.forget([call])
    timer.sample(call)
    assert called == 2


def test_work_that_synchronises_is_reported_and_the_gate_opened() -> None:
    device = ScriptedDevice()

    def call() -> None:
        device.work(1.0)
        device.synchronize()

    with pytest.raises(GateTimeout, match=r"\.item\(\)"):
        CudaTimer(device).sample(call)
    assert not device.closed
    assert device.log.count("closed") == 2
    device = ScriptedDevice()
    with pytest.raises(ZeroDivisionError):
        CudaTimer(device).sample(lambda: 1 / 0)
    assert not device.closed


def test_throttled_readings_are_rejected_counted_and_waited_out() -> None:
    device = ScriptedDevice(clocks_mhz=[1700.0] * 20 + [1200.0] * 5 + [1700.0] * 1000)
    guard = ClockGuard(pause_s=0.1, longest_pause_s=0.4)
    timer = CudaTimer(device, guard=guard)
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        device.work(1.5 if 20 < calls - 3 <= 25 else 1.0)

    samples = measure(call, timer=timer, rule=StopRule(min_samples=50), warm_up=3)
    assert np.all(samples.values_ms == 1.0)
    assert samples.rejected == guard.rejected == 5
    assert device.slept_s == pytest.approx(0.1 + 0.2 + 0.4 + 0.4 + 0.4)


def test_one_boost_of_the_clock_makes_no_reading_bad() -> None:
    guard = ClockGuard()
    assert all(guard.accepts(mhz) for mhz in [1700.0] * 5 + [2100.0] + [1700.0] * 5)
    assert not guard.accepts(1600.0)


def test_a_clock_that_stays_low_becomes_the_usual_one() -> None:
    guard = ClockGuard()
    assert all(guard.accepts(1980.0) for _ in range(5000))
    assert [guard.accepts(1900.0) for _ in range(60)].count(False) < 30
    assert guard.accepts(1900.0)
    assert guard.wanted_pause_s == 0
    assert guard.usual_mhz == 1900.0


def test_an_unreadable_clock_rejects_nothing() -> None:
    guard = ClockGuard()
    assert guard.accepts(None)
    assert not guard.known
    assert guard.accepts(1000.0)
    assert guard.known


def test_slope_ignores_the_intercept_and_outliers() -> None:
    rng = np.random.default_rng(1)
    lengths = np.array([1, 2, 4, 8] * 6)
    times = 0.7 + 0.05 * lengths + rng.normal(0, 1e-4, lengths.size)
    times[::6] += 1.0
    slope = fit_slope(lengths, times)
    assert slope.slope_ms == pytest.approx(0.05, abs=3e-4)
    assert slope.intercept_ms == pytest.approx(0.7, abs=0.01)
    assert 0 < slope.stderr_ms < 1e-3
    with pytest.raises(ValueError, match="different"):
        fit_slope(np.array([2, 2]), np.array([1.0, 1.1]))


def test_the_error_of_a_slope_is_that_of_many_slopes() -> None:
    rng = np.random.default_rng(2)
    lengths = np.array([1, 2, 4, 8] * 6)
    fits = [fit_slope(lengths, 0.7 + 0.05 * lengths + rng.normal(0, 0.01, lengths.size)) for _ in range(400)]
    scatter = float(np.std([fit.slope_ms for fit in fits]))
    assert float(np.median([fit.stderr_ms for fit in fits])) == pytest.approx(scatter, rel=0.25)


def test_chains_are_read_in_random_order_and_not_for_ever() -> None:
    device = ScriptedDevice(clocks_mhz=[1700.0, *(0.9**n * 1700.0 for n in range(1, 100))])  # ever slower
    order: list[int] = []

    def chain(length: int) -> Callable[[], object]:
        return lambda: (order.append(length), device.work(0.03 * length))

    lengths = (1, 2, 4, 8)
    chains = {n: chain(n) for n in lengths}
    slope = measure_slope(CudaTimer(device), chains, rng=np.random.default_rng(0))
    readings = 3 * len(lengths)
    assert len(order) == 3 * readings - 2  # the very first counts at once
    assert slope.rejected == len(order) - 1
    assert slope.disturbed
    assert slope.slope_ms == pytest.approx(0.03)
    order.clear()
    measure_slope(
        CudaTimer(ScriptedDevice()), {n: lambda n=n: order.append(n) for n in lengths}, rng=np.random.default_rng(0)
    )  # type: ignore[misc]
    rounds = [order[at : at + 4] for at in range(0, readings, 4)]
    assert [sorted(of) for of in rounds] == [list(lengths)] * 3
    assert rounds[0] != rounds[1] or rounds[1] != rounds[2]


def test_measured_slope_is_the_marginal_cost() -> None:
    device = ScriptedDevice(event_ms=0.02, clocks_mhz=[1700.0] * 6 + [900.0] + [1700.0])

    def chain(length: int) -> Callable[[], object]:
        slow = 2.0 if device.reads == 6 else 1.0
        return lambda: [device.work(0.03 * slow) for _ in range(length)]

    slope = measure_slope(CudaTimer(device), {n: chain(n) for n in (1, 2, 4, 8)}, rng=np.random.default_rng(0))
    assert slope.slope_ms == pytest.approx(0.03)
    assert slope.rejected == 1
    assert not slope.disturbed  # it was taken again
    assert device.reads == 3 * 4 + 1


def test_a_chain_is_stamped_between_sections() -> None:
    device = ScriptedDevice()

    def section(ms: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            device.work(ms)
            return x + 1

        return run

    timer = CudaChainTimer(CudaTimer(device))
    assert timer.clock_facts() == {}
    result = timer.run([section(1.0), section(0.5), section(0.25)], torch.zeros(1))
    assert result.sections_ms.tolist() == [1.0, 0.5, 0.25]
    assert not result.disturbed.any()
    assert device.log.count("closed") == 1
    assert timer.clock_facts() == {"usual_mhz": 1700.0, "rejected": 0}


def test_a_module_built_without_cuda_says_what_it_lacks() -> None:
    if hasattr(torch.ops.tfnas, "timing_close_gate"):
        pytest.skip("built with CUDA")
    with pytest.raises(EngineUnavailable, match="'cuda:0': the CUDA timer needs tfnas_ext's native module"):
        make_timer(Conditions(device="cuda:0"))


def test_a_chain_whose_gate_gave_up_is_run_again_from_its_input() -> None:
    """As after a process was stopped for a while, or where memory was allocated behind the gate."""
    device = StrictDevice()
    seen: list[int] = []
    ran: set[int] = set()

    def section(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            device.launch(index + 1.0, 1, index in ran)
            ran.add(index)
            seen.append(int(x))
            return x + 1

        return run

    result = CudaChainTimer(CudaTimer(device)).run([section(0), section(1)], torch.tensor(5))
    assert seen == [5, 6, 5, 6]
    assert device.timeouts == 1
    assert result.sections_ms.tolist() == [1.0, 2.0]
    assert not result.disturbed.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_on_a_gpu_a_table_predicts_networks(engine: str) -> None:
    space = load_space("small", {"candidates": ["k3_e3", "k5_e6"]})
    conditions = Conditions(device="cuda", engine=engine, batch=16)
    if engine == "onnxruntime":
        pytest.importorskip("onnx")
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime knows no CUDA")
    table = build_table(space, ProfileOptions(conditions, budget_s=8.0, noise_limit=0.9, fit_architectures=10))
    table.require_space(space)
    assert table.header["mode"] == "slope"
    assert table.header["sm_clock"]["usual_mhz"] > 100
    result = check_table(table, space, 10, budget_s=3.0)
    assert result.mape < 0.1
    assert result.scale == pytest.approx(1.0, abs=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [1280, 2048])
def test_on_a_gpu_events_agree_with_cupy(size: int) -> None:
    """CuPy's timer counts how long a call takes to reach the idle device: sixteen calls a reading make that small."""
    cupyx = pytest.importorskip("cupyx.profiler", reason="cupy is not installed")
    x, calls = torch.randn(size, size, device="cuda"), 16
    ours = measure(lambda: x @ x, timer=CudaTimer(batch=calls), rule=StopRule(0.002, min_samples=30, time_limit_s=3.0))
    theirs = cupyx.benchmark(lambda: [x @ x for _ in range(calls)], n_repeat=100)
    assert ours.median_ms > 0.05
    assert ours.median_ms == pytest.approx(float(np.median(theirs.gpu_times)) * 1e3 / calls, rel=0.02)
