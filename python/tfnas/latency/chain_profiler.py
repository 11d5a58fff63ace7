"""Runs chains made of the configurations still to be measured, so that one pass yields a sample for every slot.

Which configurations share a chain is drawn at random (seeded), least measured first: machine drift and the company a
block keeps are spread over all of them alike. Places that nothing waits for are filled with what is known already:
every chain is a whole network, and no pass is spent on a few sections. A reference network runs once a visit. Every
visit finds its activations at other addresses: samples differ by what such a place is worth, medians do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from tfnas.latency.additivity import REFERENCE, random_architectures
from tfnas.latency.chain import ChainTimer, ReferenceLog, Section, Sections, run_through
from tfnas.latency.engine import Engine
from tfnas.latency.measurements import Config, Measurements, Sample, usable
from tfnas.space import Layer, OpKey, Space
from tfnas_ext.timing import Samples, StopRule
from tfnas_ext.timing_host import displaced_allocations

Kind = tuple[int, int, int, int, str]
_REFERENCES = 8
# Whole networks are few, and all else is scaled to them.
NETWORK_RULE = StopRule(0.005, min_samples=12, max_samples=60)
_LEAST = 3  # samples of everything, however late it is
_LOOK_EVERY = 8  # visits between two looks at the stop rule, at first
_LOOK_SHARE = 0.1  # later this share of all visits so far: looking takes longer the more there is to see


def kind_of_key(key: OpKey) -> Kind:
    """The place in the network a curve belongs to: same input, output and stride, whatever kernel and SE."""
    return key.resolution, key.in_channels, key.out_channels, key.stride, key.act


def kind_of_layer(layer: Layer) -> Kind:
    return layer.resolution, layer.in_channels, layer.out_channels, layer.stride, layer.act


class ChainProfiler:
    """Adds samples to `measurements` for configurations of one space under one engine's conditions.

    `repeats` timed passes follow each change of configurations, after `warm_up` untimed ones, which build primitives
    and bring the weights as near as they are in a network that runs again and again.
    """

    def __init__(
        self,
        space: Space,
        engine: Engine,
        timer: ChainTimer,
        measurements: Measurements,
        *,
        seed: int = 0,
        repeats: int = 2,
        warm_up: int = 1,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.space, self.engine, self.timer, self.measurements = space, engine, timer, measurements
        self.repeats, self.warm_up, self.now_s = repeats, warm_up, now_s
        self.rng = np.random.default_rng(seed)
        self._input = engine.input()
        self._sections: dict[Config, Section] = {}
        self._filling = full_chain(space, engine)
        self.warm(self._filling)
        self._references = reference_networks(space, engine)
        for network in self._references:
            self.warm(network)

    def measure(
        self,
        configs: Iterable[Config],
        rule: StopRule,
        deadline_s: float,
        *,
        tick: Callable[[], None] = lambda: None,
    ) -> bool:
        """Sample `configs` until each meets `rule` or the deadline (of `now_s`) passes, each at least three times.

        Returns whether all met the rule. The samples are in `measurements` whatever happens; `tick` is called often.
        """
        waiting = list(dict.fromkeys(configs))
        met, visits = True, 0
        while True:
            slowness = self.measurements.slowness()
            late = self.now_s() >= deadline_s
            still: list[Config] = []
            for config in waiting:
                count = self.measurements.count(config)
                good = count > 0 and rule.met(self.measurements.samples(config, slowness).values_ms)
                spent = count >= rule.max_samples or (late and count >= _LEAST)
                if good or spent:
                    met &= good
                else:
                    still.append(config)
            waiting = still
            if not waiting:
                return met
            for visit in range(max(_LOOK_EVERY, int(_LOOK_SHARE * visits))):
                self._visit(waiting)
                visits += 1
                if visit % _LOOK_EVERY == 0:
                    tick()
                if visit >= _LOOK_EVERY and self.now_s() >= deadline_s:
                    break

    def measure_networks(
        self,
        networks: Sequence[Sections],
        rule: StopRule,
        deadline_s: float,
        *,
        tick: Callable[[], None] = lambda: None,
    ) -> list[Samples]:
        """Total time (ms) of whole networks, interleaved at random, drift divided out by the reference networks.

        The samples are in `measurements.networks`, which goes on from where it is: `networks` must be those it holds.
        """
        for network in networks:
            self.warm(network)
            tick()  # warming all of them takes minutes where batches are large or networks are compiled
        into = self.measurements.networks
        into.totals += [[] for _ in range(len(networks) - len(into.totals))]
        met = set[int]()
        while True:
            drift = into.reference.drift()
            late = self.now_s() >= deadline_s
            results = [usable(total, drift) for total in into.totals]
            met |= {i for i, samples in enumerate(results) if samples.count and rule.met(samples.values_ms)}
            enough = _LEAST if late else rule.max_samples
            waiting = [i for i, total in enumerate(into.totals) if i not in met and len(total) < enough]
            if not waiting:
                return [replace(samples, converged=i in met) for i, samples in enumerate(results)]
            for index in self.rng.permutation(waiting):
                self._visit_network(networks[int(index)], into.totals[int(index)])
                tick()

    def warm(self, sections: Sections, passes: int = 3) -> None:
        """Run a chain untimed on the network's input."""
        for _ in range(passes):
            run_through(sections, self._input)

    def _visit(self, waiting: Sequence[Config]) -> None:
        queues = self._queues(waiting)
        sections = list(self._filling)
        places = {0: self.measurements.stem, len(sections) - 1: self.measurements.head}
        for place, layer in enumerate(self.space.layers, start=1):
            if queue := queues.get(kind_of_layer(layer)):
                config = queue.pop()
                places[place] = self.measurements.blocks[config]
                sections[place] = self._section(config)
        with displaced_allocations(self.rng):
            self.warm(sections, self.warm_up)
            for _ in range(self.repeats):
                pass_, number = self.timer.run(sections, self._input), self.measurements.next_pass()
                for place, samples in places.items():
                    samples.append(Sample(float(pass_.sections_ms[place]), number, bool(pass_.disturbed[place])))
            self._run_reference(self.measurements.reference)

    def _visit_network(self, network: Sections, total: list[Sample]) -> None:
        log = self.measurements.networks.reference
        with displaced_allocations(self.rng):
            self.warm(network, self.warm_up)
            passes = [self.timer.run(network, self._input) for _ in range(self.repeats)]
            # as hot as the network was: a cold one tells how busy the shared cache is, not how fast the machine
            self.warm(self._references[self._turn(log)], self.warm_up)
            number = self._run_reference(log)  # serves as the number of the passes beside it
        total += [Sample(pass_.total_ms, number, bool(pass_.disturbed.any())) for pass_ in passes]

    def _queues(self, waiting: Sequence[Config]) -> dict[Kind, list[Config]]:
        """What may stand at each place, the first choice last: least measured of what waits, then of the others."""
        first = set(waiting)
        known = [*waiting, *(config for config in self.measurements.blocks if config not in first)]
        queues: dict[Kind, list[Config]] = {}
        for index in self.rng.permutation(len(known)):
            config = known[index]
            queues.setdefault(kind_of_key(config[0]), []).append(config)
        for queue in queues.values():
            queue.sort(key=lambda config: (config not in first, self.measurements.count(config)), reverse=True)
        return queues

    def _run_reference(self, log: ReferenceLog) -> int:
        """One timed pass of the reference network whose turn it is; returns its number in `log`."""
        which = self._turn(log)
        total_ms = self.timer.run(self._references[which], self._input).total_ms
        return log.add(total_ms, which, self.measurements.passes)

    def _turn(self, log: ReferenceLog) -> int:
        return len(log) % len(self._references)

    def _section(self, config: Config) -> Section:
        if config not in self._sections:
            self._sections[config] = self.engine.block(*config)
        return self._sections[config]


def full_chain(space: Space, engine: Engine) -> list[Section]:
    """Stem, all layers with their first candidates at the starting widths, head.

    Stem and head of every chain, and what fills the places that nothing is known for.
    """
    blocks = [engine.block(layer.key(0), layer.start_width(0)) for layer in space.layers]
    return [engine.stem(), *blocks, engine.head()]


def reference_networks(space: Space, engine: Engine) -> list[Sections]:
    """The reference networks of a space, the same in every process, drawn like those that are measured.

    Small and large networks do not slow down alike when the machine does, so both must be of the same kind.
    """
    # whole networks take long to compile: there one has to do
    count = 1 if engine.conditions.engine == "compile" else _REFERENCES
    return [engine.network(arch) for arch in random_architectures(space, count, seed=(0, REFERENCE))]
