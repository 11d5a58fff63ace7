"""Table building on a scripted machine: accuracy, noise, drift, resume, budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from profile_fakes import HEAD_MS, STEM_MS, FakeEngine, Machine, smooth_ms
from tfnas.latency import header
from tfnas.latency.additivity import fit_correction, random_architectures, spearman
from tfnas.latency.chain import speed_ratio
from tfnas.latency.conditions import make_engine
from tfnas.latency.engine import Conditions, EngineUnavailable
from tfnas.latency.knots import searchable_ranges
from tfnas.latency.lut import LatencyTable
from tfnas.latency.lut_io import table_from_dict, table_to_dict
from tfnas.latency.measure import conditions_of, measure_network_ms, measure_networks_ms
from tfnas.latency.measurements import Measurements
from tfnas.latency.profile import NoisyMachineWarning, ProfileOptions, Progress, build_table
from tfnas.space import OpKey
from tfnas.space_io import load_space

SMALL = load_space("small")
QUICK = ProfileOptions(budget_s=60.0, max_samples=12)


def build(machine: Machine, engine: FakeEngine | None = None, **kwargs: object) -> LatencyTable:
    options = kwargs.pop("options", QUICK)
    engine = FakeEngine(machine) if engine is None else engine
    table = build_table(SMALL, options, engine=engine, timer=machine.timer(), now_s=machine.now_s, **kwargs)  # type: ignore[arg-type]
    again = table_from_dict(json.loads(json.dumps(table_to_dict(table), allow_nan=False)))  # what is built can be kept
    assert again.header == table.header
    return again


def errors(table: LatencyTable) -> np.ndarray:
    """Relative error of the table at widths all over the space."""
    rng = np.random.default_rng(0)
    result = []
    for key, (lo, hi) in searchable_ranges(SMALL).items():
        for width in rng.integers(lo, hi + 1, 5):
            result.append(table.latency_ms(key, int(width)) / smooth_ms(key, int(width)) - 1)
    return np.array(result)


def test_a_quiet_machine_gives_its_latencies() -> None:
    table = build(Machine())
    table.require_space(SMALL)
    assert table.base_ms == pytest.approx(STEM_MS + HEAD_MS)
    assert np.abs(errors(table)).max() < 1.5 * QUICK.tolerance
    assert table.correction == pytest.approx((0.0, 1.0), abs=0.02)
    header = table.header
    assert header["mode"] == "chain"
    assert (header["engine"], header["batch"], header["threads"], header["layout"]) == ("eager", 1, 1, "nchw")
    assert header["additivity"]["mape"] < 0.01
    assert header["additivity"]["spearman"] > 0.99
    assert not header["noise"]["noisy"]
    json.dumps(header, allow_nan=False)


def test_aligned_widths_get_a_track_of_their_own() -> None:
    def sawtooth(key: OpKey, width: int) -> float:
        return smooth_ms(key, width) * (0.85 if width % 16 == 0 else 1.0)

    machine = Machine(noise=0.002)
    table = build(machine, FakeEngine(machine, sawtooth))
    for key, (lo, hi) in searchable_ranges(SMALL).items():
        for width in (lo, hi, (lo + hi) // 32 * 16, (lo + hi) // 32 * 16 + 1):
            assert table.latency_ms(key, width) == pytest.approx(sawtooth(key, width), rel=0.04), (key, width)


def test_slope_mode_finds_the_marginal_cost() -> None:
    machine = Machine(noise=0.003)
    engine = FakeEngine(machine)
    options = ProfileOptions(mode="slope", budget_s=60.0, max_samples=12)
    table = build(machine, engine, options=options, section_timer=machine.timer().timer)
    assert table.header["mode"] == "slope"
    assert table.base_ms == pytest.approx(STEM_MS + HEAD_MS, rel=0.01)
    assert np.abs(errors(table)).max() < 0.04
    assert table.header["additivity"]["mape"] < 0.01


def test_whole_networks_correct_the_sum() -> None:
    machine = Machine(noise=0.003)
    table = build(machine, FakeEngine(machine, overhead=1.1, offset_ms=0.4))
    b0, b1 = table.correction
    assert b1 == pytest.approx(1.1, abs=0.02)
    assert b0 == pytest.approx(0.4, abs=0.1)
    report = table.header["additivity"]
    assert report["raw_bias"] < -0.08
    assert abs(report["bias"]) < 0.01


def test_drift_does_not_reach_the_table() -> None:
    drifting = Machine(drift_per_s=0.2)
    table = build(drifting)
    error = errors(table)
    # one common scale is left (the machine's middle speed): the curves keep their proportions
    assert drifting.now_s() * 0.2 > 0.2, drifting.now_s()
    assert np.std(error) < 0.02


def test_noise_is_written_and_warned_of() -> None:
    machine = Machine(noise=0.25)
    with pytest.warns(NoisyMachineWarning, match="not quiet"):
        table = build(machine, options=ProfileOptions(budget_s=4.0, max_samples=8))
    assert table.header["noise"]["noisy"]
    assert table.header["noise"]["rel_stdev_median"] > 0.1


def test_disturbed_passes_are_dropped() -> None:
    table = build(Machine(disturbed_share=0.01))
    assert np.abs(errors(table)).max() < 0.03
    assert 0.005 < table.header["noise"]["disturbed_share"] < 0.02


@pytest.mark.parametrize(("max_widths", "most"), [(10, 108), (130, 130)])
def test_no_more_widths_than_allowed_but_both_ends_of_each_curve(max_widths: int, most: int) -> None:
    def uneven(key: OpKey, width: int) -> float:
        return smooth_ms(key, width) * (1 + 0.1 * np.sin(width / 5))

    assert 2 * len(searchable_ranges(SMALL)) == 108
    machine = Machine()
    options = ProfileOptions(budget_s=60.0, max_samples=8, max_widths=max_widths)
    table = build(machine, FakeEngine(machine, uneven), options=options)
    table.require_space(SMALL)
    assert table.header["widths_measured"] == sum(curve.widths.size for curve in table.curves.values()) == most


@pytest.mark.parametrize("budget_s", [0.5, 2.0])
def test_the_budget_holds_and_every_curve_is_covered(budget_s: float) -> None:
    machine = Machine(noise=0.02)
    with pytest.warns(NoisyMachineWarning):
        table = build(machine, options=ProfileOptions(budget_s=budget_s, noise_limit=1e-6))
    table.require_space(SMALL)
    assert machine.now_s() < budget_s + 3.0


@pytest.mark.parametrize(("limit", "among"), [(4_000, "networks"), (16_000, "widths")])
def test_an_interrupted_build_resumes(tmp_path: Path, limit: int, among: str) -> None:
    partial = tmp_path / "lut.json.partial"
    machine = Machine(noise=0.01)
    engine = FakeEngine(machine, limit=limit)
    options = ProfileOptions(budget_s=60.0)
    with pytest.raises(KeyboardInterrupt):
        build(machine, engine, options=options, partial=partial)
    kept = json.loads(partial.read_text())
    before = {(str(b["key"]), b["width"]): b["samples"] for b in kept["blocks"]}
    assert len(before) > 20 if among == "widths" else not before
    assert any(kept["networks"])
    engine.limit = None
    machine.speed = 1.3  # the second process runs slower all along
    table = build(machine, engine, options=options, partial=partial)
    after = json.loads(partial.read_text())
    for block in after["blocks"]:
        old = before.get((str(block["key"]), block["width"]), [])
        assert block["samples"][: len(old)] == old
    for samples, old in zip(after["networks"], kept["networks"], strict=True):
        assert samples[: len(old)] == old
    assert table.header["additivity"]["mape"] < 0.02
    assert np.std(errors(table)) < 0.02
    assert table.header["seconds"] > kept["seconds"]


def test_a_partial_file_of_other_conditions_is_refused(tmp_path: Path) -> None:
    partial = tmp_path / "lut.json.partial"
    machine = Machine()
    build(machine, partial=partial)
    other = FakeEngine(machine, conditions=Conditions(batch=2))
    with pytest.raises(ValueError, match="batch: 1 there, 2 now"):
        build(machine, other, options=ProfileOptions(Conditions(batch=2)), partial=partial)
    partial.write_text(partial.read_text()[:500])
    with pytest.raises(ValueError, match="truncated"):
        build(machine, partial=partial)
    partial.write_text('{"partial_schema_version": 4, "conditions": {}}')
    with pytest.raises(ValueError, match=r"conditions|damaged"):
        build(machine, partial=partial)


def test_progress_counts_down() -> None:
    seen: list[Progress] = []
    machine = Machine()
    build(machine, progress=seen.append)
    assert [p.phase for p in seen][-1] == "done"
    assert {p.phase for p in seen} >= {"networks", "widths", "done"}
    left = [p.seconds_left for p in seen]
    assert left == sorted(left, reverse=True)


def test_a_build_can_be_stopped_before_its_first_sample() -> None:
    """Its networks are warmed first, which takes minutes for large batches."""
    machine = Machine()
    seen: list[int] = []

    def stop(progress: Progress) -> None:
        seen.append(machine.calls)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(machine, progress=stop)
    whole = Machine()
    with pytest.warns(NoisyMachineWarning, match="too few samples"):
        build(whole, options=ProfileOptions(budget_s=1e-3, noise_limit=0.9))
    assert seen[0] < whole.calls / 5


@pytest.mark.parametrize(
    ("bad", "name"),
    [({"budget_s": 0.0}, "budget_s"), ({"tolerance": float("nan")}, "tolerance"), ({"min_samples": 1}, "min_samples")],
)
def test_bad_options_are_refused(bad: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ProfileOptions(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "name"),
    [({"engine": "tensorrt"}, "engine"), ({"layout": "nhwc"}, "layout"), ({"threads": 0}, "threads")],
)
def test_bad_conditions_are_refused(bad: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Conditions(**bad)  # type: ignore[arg-type]


def test_random_architectures_are_seeded_and_in_range() -> None:
    archs = random_architectures(SMALL, 30, seed=4)
    assert archs == random_architectures(SMALL, 30, seed=4) != random_architectures(SMALL, 30, seed=5)
    ranges = searchable_ranges(SMALL)
    for arch in archs:
        for key, width in arch.keys():  # noqa: SIM118
            assert ranges[key][0] <= width <= ranges[key][1]
    assert {len(s) for a in archs for s in a.stages} == {1, 2, 3}


def test_correction_falls_back_to_a_scale() -> None:
    sums = np.array([1.0, 1.001, 1.002])
    assert fit_correction(sums, 2 * sums) == pytest.approx((0.0, 2.0))
    assert fit_correction(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0]))[0] == 0.0


def test_spearman_against_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(2)
    a = rng.integers(0, 6, 40).astype(float)
    b = a + rng.normal(0, 2, 40).round()
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(np.ones(3), b[:3]) == 1.0


def test_measured_networks_agree_with_the_table() -> None:
    machine = Machine(noise=0.005)
    table = build(machine)
    archs = random_architectures(SMALL, 5, seed=9)
    measured = measure_networks_ms(
        archs, conditions_of(table.header), engine=FakeEngine(machine), timer=machine.timer(), now_s=machine.now_s
    )
    for arch, samples in zip(archs, measured, strict=True):
        assert samples.median_ms == pytest.approx(table.architecture_ms(arch), rel=0.02)
        scale = speed_ratio(samples.facts["reference_ms"], dict(enumerate(table.header["reference_ms"])))
        assert scale == pytest.approx(1.0, abs=0.01)


def test_a_real_network_is_measured() -> None:
    (arch,) = random_architectures(SMALL, 1, seed=1)
    samples = measure_network_ms(arch, time_limit_s=0.3)
    assert samples.count >= 2
    assert 0.1 < samples.median_ms < 1000
    assert samples.facts["engine"] == "eager"


def test_measuring_leaves_the_random_state_alone() -> None:
    (arch,) = random_architectures(SMALL, 1, seed=1)
    before = torch.random.get_rng_state()
    measure_network_ms(arch, time_limit_s=0.05)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_conditions_come_from_the_header() -> None:
    header = {"device": "Some CPU", "device_type": "cpu", "engine": "eager", "batch": 4, "layout": "channels_last"}
    assert conditions_of(header) == Conditions(batch=4, layout="channels_last")
    assert conditions_of({"device": "TITAN RTX"}) == Conditions()


def test_of_several_gpus_a_header_means_the_one_it_was_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network searched on cuda:1 is measured there, not on cuda:0 or, being another device, nowhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(header, "device_uuid", {"cuda:0": "GPU-a", "cuda:1": "GPU-b"}.get)
    facts = {"device_type": "cuda", "device_uuid": "GPU-b", "batch": 4}
    assert conditions_of(facts) == Conditions(device="cuda:1", batch=4)
    assert conditions_of(facts | {"device_uuid": "GPU-c"}).device == "cuda"
    assert conditions_of(facts | {"device_type": "cpu"}).device == "cpu"


def test_engines_that_cannot_run_say_why() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EngineUnavailable, match="no CUDA device"):
            make_engine(SMALL, Conditions(device="cuda"))


def test_measurements_survive_the_file(tmp_path: Path) -> None:
    machine = Machine(noise=0.02)
    partial = tmp_path / "p"
    build(machine, options=ProfileOptions(budget_s=3.0, noise_limit=0.9), partial=partial)
    conditions = json.loads(partial.read_text())["conditions"]
    data = Measurements.load(partial, conditions)
    data.save(tmp_path / "q", conditions)
    assert (tmp_path / "q").read_text() == partial.read_text()
