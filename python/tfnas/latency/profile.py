"""Builds a latency table: adaptive widths, everything measured in context, additivity checked and corrected.

The order of things: (1) random architectures measured whole, while the process is as fresh as the one that will check
the table; (2) rounds of width measurements, each curve's knots placed by bisection where interpolation was seen to be
wrong. Then the affine correction total = b0 + b1 * sum is fitted to the networks. All samples go through a partial
file, so that an interrupted build continues where it was.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from tfnas.architecture import Architecture
from tfnas.latency.additivity import FITTING, additivity_report, fit_correction, random_architectures
from tfnas.latency.chain import ChainTimer
from tfnas.latency.chain_cuda import CudaChainTimer
from tfnas.latency.chain_profiler import NETWORK_RULE, ChainProfiler
from tfnas.latency.conditions import make_profiler, mode_of, prepared_process
from tfnas.latency.engine import Conditions, Engine
from tfnas.latency.header import describe_conditions, device_uuid, engine_version, tf32_use
from tfnas.latency.knots import KnotPlacement, searchable_ranges
from tfnas.latency.lut import FloatArray, LatencyTable
from tfnas.latency.measurements import Measurements
from tfnas.space import Space
from tfnas.space_io import space_to_dict
from tfnas_ext.timing import StopRule, Timer

_NETWORKS_SHARE = 0.25  # of the budget at most; the rest is for widths
_ROUND_SHARE = 0.4  # of what is left of that, for one round of widths
_PATIENCE = 8  # times as many samples of noisy widths, with the time that is left once all knots are placed
_SAVE_EVERY_S = 5.0


class NoisyMachineWarning(UserWarning):
    """The table was built, but the machine was not quiet enough for the asked precision; its header says how much."""


@dataclass(frozen=True)
class ProfileOptions:
    """How to build a table. Times in seconds, shares as fractions.

    `mode` says how a block is put in context: "chain" (a network of all sections, a time stamp between any two) or
    "slope" (marginal cost in a chain of copies); "auto" takes chain on a CPU, slope on a GPU.

    `budget_s` bounds the whole build (a resumed one: what is left of it); every curve gets both its ends whatever the
    budget. `tolerance` is the interpolation error that makes a curve's interval be split, `half_width` the precision of
    each median (95 %), `noise_limit` the median precision above which the machine counts as noisy.
    """

    conditions: Conditions = field(default_factory=Conditions)
    mode: Literal["auto", "chain", "slope"] = "auto"
    budget_s: float = 240.0
    tolerance: float = 0.02
    half_width: float = 0.01
    noise_limit: float = 0.03
    min_samples: int = 8
    max_samples: int = 30
    max_widths: int = 700
    fit_architectures: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "chain", "slope"):
            raise ValueError(f"mode: expected auto, chain or slope, got {self.mode!r}")
        for name in ("budget_s", "tolerance", "half_width", "noise_limit"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        for name, least in (("min_samples", 3), ("max_samples", self.min_samples), ("fit_architectures", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    @property
    def chosen_mode(self) -> str:
        """ "chain" or "slope"."""
        return mode_of(self.conditions.device) if self.mode == "auto" else self.mode

    @property
    def period(self) -> int:
        """Width alignment that may run faster: 16 floats fill a vector; eager channels-last also likes half of one."""
        return 16 if self.conditions.layout == "nchw" or self.conditions.engine == "fused" else 8


@dataclass(frozen=True)
class Progress:
    """Where a build is. `share` in 0..1, `seconds_left` an estimate bounded by the budget."""

    phase: str
    widths: int
    share: float
    seconds_left: float


def build_table(
    space: Space,
    options: ProfileOptions | None = None,
    *,
    partial: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    engine: Engine | None = None,
    timer: ChainTimer | None = None,
    section_timer: Timer | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> LatencyTable:
    """Measure a latency table of `space` under `options.conditions`; latencies in ms.

    `partial` names a file that keeps all samples while the build runs; if it exists, the build continues from it
    (ValueError when it belongs to other conditions). It is left for the caller to delete once the table is saved.
    On a noisy machine the table is built all the same, with its noise in the header and a `NoisyMachineWarning`.
    Not deterministic, being a measurement; which configurations meet in which chain follows `options.seed`.
    """
    options = ProfileOptions() if options is None else options

    def profiler_of(data: Measurements) -> ChainProfiler:
        return make_profiler(
            space,
            options.conditions,
            data,
            mode=options.mode,
            seed=options.seed,
            engine=engine,
            timer=timer,
            section_timer=section_timer,
            now_s=now_s,
        )

    with prepared_process(options.conditions) as allocator:
        return _Build(space, options, profiler_of, partial, progress, now_s).run(allocator)


def _identity(space: Space, options: ProfileOptions) -> dict[str, Any]:
    """What the samples of a partial file depend on: those of another build must not be mixed in."""
    conditions = options.conditions
    return {
        **{f"space.{name}": value for name, value in space_to_dict(space).items()},
        **conditions.as_dict(),
        "device_uuid": device_uuid(conditions.device),
        "engine_version": engine_version(conditions.engine),
        "tf32": tf32_use(conditions),
        "torch": torch.__version__,
        "mode": options.chosen_mode,
        "seed": options.seed,
        "fit_architectures": options.fit_architectures,
    }


def describe_half_width(noise: Mapping[str, Any]) -> str:
    """How well a table's medians are known, in words, from its header's `noise`."""
    half_width: float = noise["half_width_median"]
    return f"known to +-{100 * half_width:.1f} %" if half_width < 1 else "of too few samples to know how good they are"


class _Build:
    def __init__(
        self,
        space: Space,
        options: ProfileOptions,
        profiler_of: Callable[[Measurements], ChainProfiler],
        partial: str | os.PathLike[str] | None,
        progress: Callable[[Progress], None] | None,
        now_s: Callable[[], float],
    ) -> None:
        self.space, self.options = space, options
        self.partial, self.progress, self.now_s = partial, progress, now_s
        self.identity = _identity(space, options)
        resumed = partial is not None and os.path.exists(partial)
        self.ranges = searchable_ranges(space)
        self.data = Measurements.load(partial, self.identity) if resumed and partial is not None else Measurements()
        if not self.data.fits(self.ranges, options.fit_architectures):
            raise ValueError(f"{partial}: damaged partial latency table (it holds what this space has not); delete it")
        self.spent_before_s = self.data.seconds
        self.start_s = now_s()
        self.saved_s = self.start_s
        self.rule = StopRule(options.half_width, options.min_samples, options.max_samples, options.budget_s)
        self.profiler = profiler_of(self.data)

    @property
    def spent_s(self) -> float:
        return self.spent_before_s + self.now_s() - self.start_s

    def deadline_s(self, share: float) -> float:
        """When `share` of the budget will be used up, on the clock `now_s`."""
        return self.start_s + self.options.budget_s * share - self.spent_before_s

    def run(self, allocator: dict[str, int] | None) -> LatencyTable:
        try:
            archs, whole_ms = self._measure_networks()
            self._measure_widths()
        finally:
            self._keep()  # Ctrl-C loses nothing
        table = LatencyTable(self._base_ms(), self._placement().curves())
        sums_ms = np.array([table.architecture_ms(arch) for arch in archs])
        correction = fit_correction(sums_ms, whole_ms)
        additivity = additivity_report(sums_ms, whole_ms, correction)
        noise = self._noise()
        header = describe_conditions(self.options.conditions, self.space, allocator) | {
            "mode": self.options.chosen_mode,
            "widths_measured": len(self.data.blocks),
            "seconds": round(self.spent_s, 1),
            "reference_ms": list(self.data.networks.reference.medians_ms().values()),
            "tolerance": self.options.tolerance,
            "seed": self.options.seed,
            "noise": noise,
            "additivity": additivity.as_dict(),
            "sm_clock": timer.clock_facts() if isinstance(timer := self.profiler.timer, CudaChainTimer) else {},
        }
        if noise["noisy"]:
            warnings.warn(
                f"the machine was not quiet, or the time too short: medians are {describe_half_width(noise)}, "
                f"+-{100 * self.options.half_width:.1f} % were asked for, and {100 * noise['disturbed_share']:.0f} % "
                "of the timed sections were disturbed; the table's header says so",
                NoisyMachineWarning,
                stacklevel=3,
            )
        self._report("done", 1.0)
        return replace(table, header=header, correction=correction)

    def _measure_widths(self) -> None:
        share = min(1.0, self.spent_s / self.options.budget_s)
        while True:
            room = self.options.max_widths - len(self.data.blocks)
            plan = self._placement().wanted()
            ends = [config for config in plan if config[1] in self.ranges[config[0]]]
            plan = plan[: max(room, 0)] or ends
            share += (1.0 - share) * _ROUND_SHARE
            late = self.now_s() >= self.deadline_s(1.0)
            if not plan or (late and not ends):
                break
            self.profiler.measure(plan, self.rule, self.deadline_s(share), tick=self._tick)
            self._keep()
        patient = replace(self.rule, max_samples=_PATIENCE * self.rule.max_samples)
        self.profiler.measure(list(self.data.blocks), patient, self.deadline_s(1.0), tick=self._tick)

    def _placement(self) -> KnotPlacement:
        """Where to measure next, by everything measured so far."""
        placement = KnotPlacement(self.ranges, tolerance=self.options.tolerance, period=self.options.period)
        slowness = self.data.slowness()
        for key, width in self.data.blocks:
            samples = self.data.samples((key, width), slowness)
            placement.record(key, width, samples.median_ms, rel_stdev=samples.rel_spread, samples=samples.count)
        return placement

    def _base_ms(self) -> float:
        stem, head = self.data.base_samples(self.data.slowness())
        return stem.median_ms + head.median_ms

    def _measure_networks(self) -> tuple[list[Architecture], FloatArray]:
        """Random architectures and their measured totals in ms."""
        archs = random_architectures(self.space, self.options.fit_architectures, seed=(self.options.seed, FITTING))
        networks = [self.profiler.engine.network(arch) for arch in archs]
        deadline_s = self.deadline_s(_NETWORKS_SHARE)
        measured = self.profiler.measure_networks(
            networks, NETWORK_RULE, deadline_s, tick=lambda: self._tick("networks")
        )
        return archs, np.array([s.median_ms for s in measured])

    def _tick(self, phase: str = "widths") -> None:
        if self.now_s() - self.saved_s >= _SAVE_EVERY_S:
            self._keep()
        self._report(phase, self.spent_s / self.options.budget_s)

    def _noise(self) -> dict[str, Any]:
        slowness = self.data.slowness()
        samples = [self.data.samples(config, slowness) for config in self.data.blocks]
        widths = np.array([s.relative_half_width for s in samples])
        half_width = float(np.median(widths))
        disturbed = self.data.disturbed_share()
        # JSON knows no infinity: too few samples for an interval count as "not known at all"
        known = half_width if math.isfinite(half_width) else 1.0
        return {
            "rel_stdev_median": float(np.median([s.rel_stdev for s in samples])),
            "half_width_median": known,
            "disturbed_share": disturbed,
            "drift_range": [float(slowness.min()), float(slowness.max())],
            "noisy": known > self.options.noise_limit or disturbed > 0.5,
        }

    def _keep(self) -> None:
        self.data.seconds = self.spent_s
        self.saved_s = self.now_s()
        if self.partial is not None:
            self.data.save(self.partial, self.identity)

    def _report(self, phase: str, share: float) -> None:
        if self.progress is not None:
            left = max(0.0, self.options.budget_s - self.spent_s)
            self.progress(Progress(phase, len(self.data.blocks), min(1.0, share), 0.0 if phase == "done" else left))
