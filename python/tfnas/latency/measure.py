"""Measures whole networks under the conditions of a table, with the same harness that built it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tfnas.architecture import Architecture
from tfnas.latency.chain import ChainTimer
from tfnas.latency.conditions import make_profiler, prepared_process
from tfnas.latency.engine import Conditions, Engine, EngineUnavailable
from tfnas.latency.header import device_of
from tfnas.latency.measurements import Config, Measurements
from tfnas.space import Space
from tfnas_ext.timing import Samples, StopRule

NAMED = ("engine", "batch", "threads", "dtype", "layout")  # conditions that have the same name in a header


def conditions_of(header: Mapping[str, Any]) -> Conditions:
    """The conditions a table's header names; what an imported table does not say is taken from the defaults.

    Raises `EngineUnavailable` for conditions that nothing here can measure under.
    """
    known = {name: header[name] for name in NAMED if header.get(name)}
    try:
        return Conditions(device=device_of(header), **known)
    except ValueError as error:
        raise EngineUnavailable(f"the table's conditions cannot be measured under here: {error}") from None


def measure_network_ms(
    arch: Architecture, conditions: Conditions | None = None, *, time_limit_s: float = 5.0
) -> Samples:
    """Latency of a whole network in ms, one batch of `conditions.batch` images from input to logits.

    The network gets random weights. Samples are drift-free (reference networks run beside it); their `facts` hold
    `reference_ms`, the median of each, by which a table built in another process can be compared (`speed_ratio`).
    Not deterministic, being a measurement. Raises `EngineUnavailable` where the conditions cannot be met.
    """
    rule = StopRule(0.005, min_samples=20)
    return measure_networks_ms([arch], conditions, rule=rule, time_limit_s=time_limit_s)[0]


def measure_networks_ms(
    archs: Sequence[Architecture],
    conditions: Conditions | None = None,
    *,
    rule: StopRule | None = None,
    time_limit_s: float = 60.0,
    seed: int = 0,
    engine: Engine | None = None,
    timer: ChainTimer | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> list[Samples]:
    """`measure_network_ms` for several networks of one space, interleaved at random; `time_limit_s` is for all."""
    if not archs:
        raise ValueError("archs: expected at least one architecture to measure")
    conditions = Conditions() if conditions is None else conditions
    rule = StopRule(0.01, min_samples=10, max_samples=60) if rule is None else rule
    with prepared_process(conditions):
        data = Measurements()
        profiler = make_profiler(archs[0].space, conditions, data, seed=seed, engine=engine, timer=timer, now_s=now_s)
        networks = [profiler.engine.network(arch) for arch in archs]
        results = profiler.measure_networks(networks, rule, now_s() + time_limit_s)
    facts = {"reference_ms": data.networks.reference.medians_ms()} | conditions.as_dict()
    return [replace(samples, facts=facts) for samples in results]


def measure_blocks_ms(
    space: Space,
    configs: Sequence[Config],
    conditions: Conditions | None = None,
    *,
    rule: StopRule | None = None,
    time_limit_s: float = 60.0,
    seed: int = 0,
    engine: Engine | None = None,
    timer: ChainTimer | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> list[Samples]:
    """Latency in ms of single blocks, (curve key, width) each, in context as a table build measures them.

    For checking a table at widths that are not its knots; `facts` as in `measure_network_ms`.
    """
    if not configs:
        raise ValueError("configs: expected at least one (key, width) to measure")
    conditions = Conditions() if conditions is None else conditions
    rule = StopRule(0.01, min_samples=10, max_samples=60) if rule is None else rule
    with prepared_process(conditions):
        data = Measurements()
        profiler = make_profiler(space, conditions, data, seed=seed, engine=engine, timer=timer, now_s=now_s)
        profiler.measure(configs, rule, now_s() + time_limit_s)
    slowness = data.slowness()
    facts = {"reference_ms": data.reference.medians_ms()} | conditions.as_dict()
    return [replace(data.samples(config, slowness), facts=facts) for config in configs]
