"""How slow the machine was in a pass: told by the sections of the pass, tied to the reference chain, robust."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
from profile_fakes import FakeEngine, Machine
from tfnas.latency import chain_profiler
from tfnas.latency.chain import ReferenceLog, speed_ratio
from tfnas.latency.chain_profiler import ChainProfiler, kind_of_key, kind_of_layer, reference_networks
from tfnas.latency.engine import Conditions
from tfnas.latency.knots import searchable_ranges
from tfnas.latency.measurements import Measurements, Sample
from tfnas.latency.slowness import pass_slowness
from tfnas.space_io import load_space

from tfnas_ext.timing import StopRule

SMALL = load_space("small")


def scripted(seed: int, things: int, passes: int, each: int, noise: float) -> tuple[np.ndarray, ...]:
    """Readings of `each` random things a pass; returns ms, what, pass, and the true slowness of every pass."""
    rng = np.random.default_rng(seed)
    latency = rng.uniform(0.1, 2.0, things)
    slow = np.exp(rng.normal(0, 0.1, passes).cumsum() * 0.3)
    what = np.concatenate([rng.choice(things, each, replace=False) for _ in range(passes)])
    numbers = np.repeat(np.arange(passes), each)
    ms = latency[what] * slow[numbers] * np.exp(rng.normal(0, noise, what.size))
    return ms, what, numbers, slow / np.median(slow)


@pytest.mark.parametrize("seed", range(3))
def test_both_factors_are_told_apart(seed: int) -> None:
    ms, what, numbers, slow = scripted(seed, things=60, passes=200, each=12, noise=0.0)
    assert pass_slowness(ms, what, numbers, 200) == pytest.approx(slow, rel=2e-3)
    ms, what, numbers, slow = scripted(seed, things=60, passes=200, each=12, noise=0.05)
    error = np.log(pass_slowness(ms, what, numbers, 200) / slow)
    # twelve readings of 5 % each
    assert np.std(error) < 1.3 * 0.05 / np.sqrt(12)


def test_outliers_pull_little() -> None:
    ms, what, numbers, slow = scripted(4, things=40, passes=150, each=12, noise=0.01)
    hit = np.random.default_rng(5).random(ms.size) < 0.05
    found = pass_slowness(np.where(hit, 10 * ms, ms), what, numbers, 150)
    assert np.median(np.abs(np.log(found / slow))) < 0.01


def test_passes_without_readings_are_unknown() -> None:
    found = pass_slowness(np.array([1.0, 2.0, 3.0]), np.array([0, 1, 0]), np.array([0, 0, 2]), 4)
    assert np.isnan(found).tolist() == [False, True, False, True]


def test_the_level_is_that_of_the_reference_chain() -> None:
    """The first half runs at half speed and holds most passes; the reference chain knows the usual speed."""
    data = Measurements()
    rng = np.random.default_rng(0)
    things = [(key, low) for key, (low, _) in searchable_ranges(SMALL).items()][:20]
    latency = rng.uniform(0.1, 1.0, 20)
    for number in range(90):
        slow = 2.0 if number < 60 else 1.0
        assert data.next_pass() == number
        for i in rng.permutation(20)[:12]:
            data.blocks[things[i]].append(Sample(float(latency[i]) * slow, number))
        for _ in range(1 if number < 60 else 3):
            data.reference.add(7.0 * slow, after=data.passes)
    assert data.reference.medians_ms() == {0: pytest.approx(7.0)}
    slowness = data.slowness()
    assert slowness == pytest.approx(np.repeat([2.0, 1.0], [60, 30]), rel=1e-3)
    for i, thing in enumerate(things):
        assert data.samples(thing, slowness).median_ms == pytest.approx(latency[i], rel=1e-3)


def test_a_pass_of_few_sections_takes_the_reference_chain_after_it() -> None:
    data = Measurements()
    assert data.slowness().tolist() == []
    ((thing, _), *_) = ((config, None) for config in searchable_ranges(SMALL).items())
    for slow in (1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0):
        data.blocks[thing, 100].append(Sample(0.4 * slow, data.next_pass()))
        data.reference.add(2.0 * slow, after=data.passes)
    assert data.slowness().tolist() == [1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0]


def test_every_chain_is_a_whole_network() -> None:
    """Also where one shape alone is waited for: the other places give samples of what is known."""
    machine = Machine()
    engine = FakeEngine(machine)
    data = Measurements()
    profiler = ChainProfiler(SMALL, engine, machine.timer(), data, now_s=machine.now_s)
    ends = [(key, width) for key, pair in searchable_ranges(SMALL).items() for width in pair]
    profiler.measure(ends, StopRule(0.01, 4, 6), deadline_s=1e9)
    before = {config: data.count(config) for config in ends}
    passes = data.passes
    key = ends[0][0]
    alone = [(key, width) for width in (50, 60)]
    profiler.measure(alone, StopRule(0.01, 10, 20), deadline_s=1e9)
    assert all(data.count(config) >= 10 for config in alone)
    added = sum(data.count(config) for config in data.blocks) - sum(before.values())
    assert added == (data.passes - passes) * len(SMALL.layers)
    places = sum(kind_of_layer(layer) == kind_of_key(key) for layer in SMALL.layers)
    assert sum(data.count(config) for config in alone) == (data.passes - passes) * min(places, len(alone))


def test_reference_networks_differ_and_tell_the_drift_together() -> None:
    log = ReferenceLog()
    slow = np.repeat([1.0, 1.2, 1.0], 24)
    for number, factor in enumerate(slow):
        log.add((5.0, 9.0, 2.0)[number % 3] * factor, number % 3)
    assert log.medians_ms() == {0: 5.0, 1: 9.0, 2: 2.0}
    np.testing.assert_allclose(log.drift(), slow)
    assert ReferenceLog().drift().shape == (0,)


def test_one_lucky_reference_network_hardly_moves_the_scale() -> None:
    then = dict.fromkeys(range(8), 10.0)
    assert speed_ratio(then | {3: 10.8}, then) == pytest.approx(1.08 ** (1 / 8))
    assert speed_ratio({i: 11.0 for i in then}, then) == pytest.approx(1.1)
    assert speed_ratio({1: 11.0}, then) == pytest.approx(1.1)  # the others have not run yet
    assert speed_ratio({9: 11.0}, then) is None


def test_reference_networks_are_the_same_in_every_process() -> None:
    first, again = FakeEngine(Machine()), FakeEngine(Machine())
    x = first.input()
    for engine in (first, again):
        for network in reference_networks(SMALL, engine):
            for section in network:
                section(x)
    assert first.machine.wall == again.machine.wall > 0
    assert len({len(network) for network in reference_networks(SMALL, first)}) > 1
    assert len(reference_networks(SMALL, FakeEngine(Machine(), conditions=Conditions(engine="compile")))) == 1


def test_every_visit_finds_its_activations_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up and timed passes of a visit share one place, the next visit has another."""
    machine = Machine()
    profiler = ChainProfiler(SMALL, FakeEngine(machine), machine.timer(), Measurements(), now_s=machine.now_s)
    calls: list[int] = []
    untimed = 3  # passes before the first visit
    start = machine.calls + untimed

    @contextlib.contextmanager
    def counted(rng: np.random.Generator) -> Iterator[None]:
        before = machine.calls
        assert before == start + sum(calls)  # nothing runs between two visits
        yield
        calls.append(machine.calls - before)

    monkeypatch.setattr(chain_profiler, "displaced_allocations", counted)
    network = [FakeEngine(machine).section(1.0)]
    profiler.measure_networks([network], StopRule(1e-9, 8, 8), deadline_s=1e9)
    references = [len(network) for network in reference_networks(SMALL, FakeEngine(machine))]
    assert calls == [1 + 2 + 2 * sections for sections in references[:4]]
    config = (next(iter(SMALL.keys)), 60)
    profiler.measure([config], StopRule(1e-9, 40, 40), deadline_s=1e9)
    chain = len(SMALL.layers) + 2
    assert calls[4:] == [3 * chain + references[visit % len(references)] for visit in range(len(calls) - 4)]
