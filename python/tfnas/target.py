"""Before the first epoch: the latency table, the reachable range by it, and the target inside that range."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tfnas.architecture import Architecture, Op, count_multiply_adds
from tfnas.config import ConfigError, ProfileConfig, SearchConfig
from tfnas.latency.chain import run_through
from tfnas.latency.compare import require_conditions
from tfnas.latency.conditions import make_engine, make_timer, prepared_process
from tfnas.latency.engine import Conditions, EngineUnavailable, require_device
from tfnas.latency.header import device_name, device_uuid, tf32_use
from tfnas.latency.lut import LatencyTable, LatencyTableError
from tfnas.latency.lut_io import load_table, save_table
from tfnas.latency.measure import conditions_of, measure_network_ms
from tfnas.latency.profile import ProfileOptions, Progress, build_table
from tfnas.run import PARTIAL_TABLE_FILE
from tfnas.scaling import reachable_range_ms
from tfnas.space import Space

# Homogeneous networks bound the range only roughly: another mix of operations may be a little faster or slower.
_ROUGH_MARGIN = 1.3
_EXTREMES = 2
_EXTREME_PASSES = 3


class TargetOutOfReach(ConfigError):
    """No network of the space can have the target latency; the message gives the range that can be reached."""


@dataclass(frozen=True)
class Target:
    """The latency to meet and the range that the space reaches by the table, in ms."""

    target_latency_ms: float
    reachable_range_ms: tuple[float, float]
    is_midpoint: bool


def choose_target(space: Space, table: LatencyTable, target_latency_ms: float | list[float] | None) -> Target:
    """The target in ms, None meaning the middle of the reachable range; of several the first.

    Raises `TargetOutOfReach`, naming all that are.
    """
    low, high = reachable_range_ms(space, table)
    if target_latency_ms is None:
        return Target((low + high) / 2, (low, high), True)
    targets = as_list(target_latency_ms)
    wrong = [f"{target:g}" for target in targets if not low <= target <= high]
    if wrong:
        raise TargetOutOfReach(
            f"target_latency_ms {', '.join(wrong)} is out of reach: networks of space {space.name!r} have "
            f"{low:.4f} to {high:.4f} ms by the latency table"
        )
    return Target(targets[0], (low, high), False)


def as_list(target_latency_ms: float | list[float]) -> list[float]:
    """One target or several as a list."""
    return target_latency_ms if isinstance(target_latency_ms, list) else [target_latency_ms]


def obtain_table(
    config: SearchConfig, space: Space, device: torch.device, file: Path, say: Callable[[str], None]
) -> LatencyTable:
    """The table in `file` if a run already has one, else `config.lut`, else one measured here; kept in `file`.

    Raises `LatencyTableError` where it does not cover the space or was measured under other conditions than
    `config.profile` on this device (unless `config.lut_conditions` is `ignore`), `TargetOutOfReach` where measuring the
    extreme networks alone shows that no table could help.
    """
    if file.is_file():
        table = load_table(file)
    elif config.lut is not None:
        table = load_table(config.lut)
        if config.lut_conditions == "require":
            require_own_conditions(table, space, profile_conditions(config.profile, device))
    else:
        conditions = profile_conditions(config.profile, device)
        if config.target_latency_ms is not None:
            check_rough_range(space, conditions, as_list(config.target_latency_ms))
        table = measure_table(space, config.profile, conditions, file, config.seed, say)
    table.require_space(space)
    save_table(file, table)
    file.with_name(PARTIAL_TABLE_FILE).unlink(missing_ok=True)
    return table


def require_own_conditions(table: LatencyTable, space: Space, conditions: Conditions) -> None:
    """Raise `LatencyTableError`, saying what differs and what to do, unless measured here as `conditions` say.

    What a table does not state, as imported ones do not, is not held against it.
    """
    wanted = {
        "device": device_name(conditions.device),
        "device_uuid": device_uuid(conditions.device),
        "engine": conditions.engine,
        "batch": conditions.batch,
        "resolution": space.resolution,
        "threads": conditions.threads,
        "dtype": conditions.dtype,
        "tf32": tf32_use(conditions),
        "layout": conditions.layout,
    }
    try:
        require_conditions(table, wanted)
    except LatencyTableError as error:
        raise LatencyTableError(
            f"{error}. Set the `profile` options to the table's, or, to search for the conditions it was measured "
            "under, `--lut_conditions ignore`"
        ) from None


def measure_table(
    space: Space, profile: ProfileConfig, conditions: Conditions, file: Path, seed: int, say: Callable[[str], None]
) -> LatencyTable:
    """Measure a table; samples are kept beside `file` until it is done, so that an interrupted build goes on."""
    say(
        f"measuring a latency table of space {space.name!r} for about {profile.budget_s:.0f} s: {conditions.engine} on "
        f"{conditions.device}, batch {conditions.batch}, {conditions.threads} threads"
    )
    partial = file.with_name(PARTIAL_TABLE_FILE)
    options = ProfileOptions(conditions=conditions, budget_s=profile.budget_s, seed=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = build_table(space, options, partial=partial, progress=_Announcer(say))
    for warning in caught:
        say(str(warning.message))
    save_table(file, table)
    return table


def profile_conditions(profile: ProfileConfig, device: torch.device | str) -> Conditions:
    """Under what a configuration wants latencies to be measured."""
    return Conditions(
        device=str(device),
        engine=profile.engine,
        batch=profile.batch_size,
        threads=profile.threads,
        dtype=profile.dtype,
        layout=profile.layout,
    )


def check_rough_range(space: Space, conditions: Conditions, targets_ms: list[float]) -> None:
    """Measure the extreme networks only (seconds, where a table takes minutes); raises `TargetOutOfReach`."""
    low, high = rough_range_ms(space, conditions)
    wrong = [f"{target:g}" for target in targets_ms if not low / _ROUGH_MARGIN <= target <= high * _ROUGH_MARGIN]
    if wrong:
        raise TargetOutOfReach(
            f"target_latency_ms {', '.join(wrong)} is out of reach: the smallest and largest networks of space "
            f"{space.name!r} take about {low:.4g} to {high:.4g} ms here ({conditions.engine} on {conditions.device}, "
            f"batch {conditions.batch}, {conditions.threads} threads)"
        )


def rough_range_ms(space: Space, conditions: Conditions) -> tuple[float, float]:
    """Latency in ms of the fastest shallow and the slowest deep network made of one candidate throughout.

    Only the networks with the fewest and the most multiply-adds are measured.
    """
    smallest, largest = (sorted(of, key=count_multiply_adds) for of in zip(*extreme_architectures(space), strict=True))
    with prepared_process(conditions):
        engine, timer = make_engine(space, conditions), make_timer(conditions)
        x = engine.input()

        def measured_ms(arch: Architecture) -> float:
            network = engine.network(arch)
            run_through(network, x)
            return min(timer.run(network, x).total_ms for _ in range(_EXTREME_PASSES))

        return min(map(measured_ms, smallest[:_EXTREMES])), max(map(measured_ms, largest[-_EXTREMES:]))


def extreme_architectures(space: Space) -> Iterator[tuple[Architecture, Architecture]]:
    """For every candidate: the shallowest network at minimum widths and the deepest at maximum widths."""
    for c, candidate in enumerate(space.candidates):
        if candidate.is_skip:
            continue
        stages = space.layers_of_stage
        smallest = tuple((Op.of(layers[0], c, layers[0].min_width(c)),) for layers in stages)
        largest = tuple(tuple(Op.of(layer, c, layer.max_width(c)) for layer in layers) for layers in stages)
        yield Architecture(space, smallest), Architecture(space, largest)


def measured_latency_ms(arch: Architecture, table: LatencyTable) -> tuple[float | None, str | None]:
    """Latency in ms of the whole network under the table's conditions, or None and the reason why it was not measured.

    A table of another machine says nothing about this one: then nothing is measured.
    """
    header = table.header
    if not header.get("device_uuid"):
        return None, "the latency table does not say which device it was measured on"
    try:
        conditions = conditions_of(header)
        require_device(conditions.device)
        if header["device_uuid"] != device_uuid(conditions.device):
            return None, f"the latency table was measured on another device ({header.get('device')})"
        return measure_network_ms(arch, conditions).median_ms, None
    except (EngineUnavailable, RuntimeError) as error:
        return None, str(error)


class _Announcer:
    """Says how far a build is, not more often than every tenth of it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._next = say, 0.1

    def __call__(self, progress: Progress) -> None:
        if progress.share >= self._next:
            self._next = progress.share + 0.1
            self._say(f"latency table: {100 * progress.share:.0f} %, about {progress.seconds_left:.0f} s left")
