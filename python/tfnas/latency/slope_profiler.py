"""Measures sections one by one by the slope over chains of copies; on a GPU the chains are captured graphs.

A block that can follow itself (same shape in and out) does: its input is warm from the copy before it, as in a
network, its weights are cold. Others run on independent inputs, one a copy. Whole networks, those of reference too, are
timed without time stamps inside, on a GPU as captured graphs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tfnas.latency.chain import Section, Sections, run_through
from tfnas.latency.chain_profiler import ChainProfiler
from tfnas.latency.measurements import Config, Sample
from tfnas_ext.timing import Samples, Timer
from tfnas_ext.timing_cuda import CudaTimer
from tfnas_ext.timing_slope import measure_slope

LENGTHS = (1, 2, 4)
_BASE_EVERY = 16  # visits between two samples of stem and head


class SlopeProfiler(ChainProfiler):
    """`ChainProfiler` whose samples of single sections are slopes, taken with `section_timer`."""

    def __init__(self, *args: Any, section_timer: Timer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section_timer = section_timer
        self._chains: dict[Config | str, dict[int, Callable[[], object]]] = {}
        self._visits = 0
        self._references = [self._undivided(network) for network in self._references]

    def measure_networks(self, networks: Sequence[Sections], *args: Any, **kwargs: Any) -> list[Samples]:
        """As `ChainProfiler.measure_networks`, without time stamps inside the networks."""
        return super().measure_networks([self._undivided(network) for network in networks], *args, **kwargs)

    def _undivided(self, network: Sections) -> list[Section]:
        """A whole network as one section, which on a GPU replays what was captured on the network's input.

        Captured, it is one entry of the queue behind the gate: a thousand kernels would not fit there.
        """
        if not isinstance(self.section_timer, CudaTimer) or not self.section_timer.graph:
            return [lambda x: run_through(network, x)]

        def call() -> None:
            run_through(network, self._input)

        self.section_timer.warm_up(call, 3)
        replay = self.section_timer.replayed(call)

        def section(x: torch.Tensor) -> torch.Tensor:
            replay()
            return x

        return [section]

    def _visit(self, waiting: Sequence[Config]) -> None:
        self._forget(set(self._chains) - set(waiting) - {"stem", "head"})
        if self._visits % _BASE_EVERY == 0:
            self._sample("stem", self.engine.stem, self._input, self.measurements.stem)
            self._sample("head", self.engine.head, run_through(self._filling[:-1], self._input), self.measurements.head)
        self._visits += 1
        fewest = min(self.measurements.count(config) for config in waiting)
        config = self.rng.choice(np.array([i for i, c in enumerate(waiting) if self.measurements.count(c) == fewest]))
        key, width = waiting[int(config)]
        shape = (self.engine.conditions.batch, key.in_channels, key.resolution, key.resolution)
        layout = torch.channels_last if self.engine.conditions.layout == "channels_last" else torch.contiguous_format
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._input)
        x = x.contiguous(memory_format=layout)
        samples = self.measurements.blocks[key, width]
        follows_itself = key.stride == 1 and key.in_channels == key.out_channels
        self._sample((key, width), lambda: self.engine.block(key, width), x, samples, follows_itself)

    def _sample(
        self,
        name: Config | str,
        make: Callable[[], Section],
        x: torch.Tensor,
        samples: list[Sample],
        follows_itself: bool = False,
    ) -> None:
        if name not in self._chains:
            copies = [make() for _ in range(max(LENGTHS))]
            inputs = [x.clone() for _ in copies]
            self._chains[name] = {n: chain_of(copies[:n], inputs, follows_itself) for n in LENGTHS}
            for chain in self._chains[name].values():
                self.section_timer.warm_up(chain, 3)
        slope = measure_slope(self.section_timer, self._chains[name], rng=self.rng)
        # a slope of noise may come out at or below 0: nothing real is that fast
        disturbed = slope.disturbed or slope.slope_ms <= 0
        samples.append(Sample(max(slope.slope_ms, 1e-6), self.measurements.next_pass(), disturbed))
        self._run_reference(self.measurements.reference)

    def _forget(self, names: set[Config | str]) -> None:
        for name in names:
            chains = self._chains.pop(name)
            if isinstance(self.section_timer, CudaTimer):
                self.section_timer.forget(chains.values())


def chain_of(copies: Sections, inputs: Sequence[torch.Tensor], follows_itself: bool) -> Callable[[], object]:
    """A call that runs `copies` one after the other: each on the output of the one before, or each on its own input."""

    @torch.inference_mode()
    def run() -> None:
        y = inputs[0]
        for copy, x in zip(copies, inputs, strict=False):
            y = copy(y if follows_itself else x)

    return run
