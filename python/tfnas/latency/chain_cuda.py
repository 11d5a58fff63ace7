"""Timing a network section by section on a GPU: events between the sections, all queued behind a closed gate."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tfnas.latency.chain import Pass, Sections
from tfnas_ext.timing_cuda import CudaTimer


class CudaChainTimer:
    """Chain timer of device time: what the GPU takes, not how long the host takes to queue it.

    An event between two sections costs each of them about a microsecond; it is part of the table and, through the
    correction fitted on whole networks, taken out of its predictions.
    """

    def __init__(self, timer: CudaTimer | None = None) -> None:
        self.timer = CudaTimer() if timer is None else timer

    def clock_facts(self) -> dict[str, float]:
        """The SM clock that was usual during the readings, and how many were rejected because it had dropped."""
        guard = self.timer.guard
        return {"usual_mhz": guard.usual_mhz, "rejected": guard.rejected} if guard.known else {}

    def run(self, sections: Sections, x: torch.Tensor) -> Pass:
        activation = x

        def step(index: int) -> Callable[[], object]:
            def call() -> None:
                nonlocal activation
                activation = sections[index](activation if index else x)  # from the input, also when tried again

            return call

        with torch.inference_mode():
            times_ms, disturbed = self.timer.stamped([step(index) for index in range(len(sections))])
        return Pass(np.array(times_ms), np.full(len(sections), disturbed))
