"""How fast a search goes and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable

# Roughly what a step past warm-up costs in warm-up steps (second path, half a mixture step), until one has been timed.
_SEARCH_STEP_COST = 4.0


class Pace:
    """Times weight steps, those of warm-up and those past it apart; one `start` per stretch without interruption."""

    def __init__(self, warmup_steps: int, total_steps: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self._warmup_steps, self._total_steps, self._now_s = warmup_steps, total_steps, now_s
        self._step_s: dict[bool, float] = {}
        self._images = 0
        self._start_s = now_s()
        self._start_step = 0

    def start(self, step: int) -> None:
        """Begin a stretch at weight step `step` (an epoch's training, say), all in warm-up or all past it."""
        self._start_step, self._start_s, self._images = step, self._now_s(), 0

    def count(self, images: int) -> None:
        """A weight step with `images` images is done."""
        self._images += images

    def images_per_s(self) -> float:
        """Of the current stretch."""
        return self._images / max(self._now_s() - self._start_s, 1e-9)

    def time_left_s(self, step: int) -> float:
        """Seconds to the end of the search when `step` weight steps are done."""
        if step > self._start_step:
            seconds = (self._now_s() - self._start_s) / (step - self._start_step)
            self._step_s[self._start_step < self._warmup_steps] = seconds
        warmup_s, search_s = self._step_s.get(True), self._step_s.get(False)
        if search_s is None:
            search_s = _SEARCH_STEP_COST * (warmup_s or 0.0)
        warmup_left = max(0, self._warmup_steps - step)
        return warmup_left * (warmup_s or 0.0) + (self._total_steps - step - warmup_left) * search_s
