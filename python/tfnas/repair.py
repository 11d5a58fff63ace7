"""The most probable architecture whose latency range contains a target, by exact search over layers and depths.

Every way to run a stage is a `score` (sum of log-probabilities) with the least and greatest latency its widths can
give. Stages are joined one by one; a partial network is dropped only where another one is at least as probable, at
least as fast at its fastest and at least as slow at its slowest, or where no completion can be more probable than a
network already found. The latter is decided by Lagrangian bounds: for any multipliers a, b >= 0 the score of a network
whose range contains the target is at most score + a (target - least) + b (greatest - target), which splits into stages.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tfnas.latency.lut import FloatArray, IntArray, LatencyTable
from tfnas.scaling import candidate_range_ms
from tfnas.space import Layer, Space

_DUAL_STEPS = 300
_BOUNDS = 24
_ROUNDING = 1e-12
_SKIPPED = -1


@dataclass(frozen=True, eq=False)
class _Options:
    """Ways to run some layers: score [n], least and greatest latency in ms [n], candidate of each layer [n, layers]."""

    score: FloatArray
    low_ms: FloatArray
    high_ms: FloatArray
    choice: IntArray

    def __len__(self) -> int:
        return self.score.size

    def take(self, index: IntArray) -> _Options:
        return _Options(self.score[index], self.low_ms[index], self.high_ms[index], self.choice[index])

    def times(self, other: _Options) -> _Options:
        """Every option of these layers followed by every option of the others."""
        a, b = (grid.ravel() for grid in np.meshgrid(np.arange(len(self)), np.arange(len(other)), indexing="ij"))
        return _Options(
            self.score[a] + other.score[b],
            self.low_ms[a] + other.low_ms[b],
            self.high_ms[a] + other.high_ms[b],
            np.concatenate([self.choice[a], other.choice[b]], axis=1),
        )

    def strongest(self, a: float, b: float) -> int:
        """The option that maximises the Lagrangian for multipliers a, b."""
        return int(np.argmax(self.score - a * self.low_ms + b * self.high_ms))

    def undominated(self) -> _Options:
        """Without options that another one beats or equals in score, least and greatest latency (first of equals)."""
        order = np.lexsort((-self.high_ms, self.low_ms, -self.score))
        lows: list[float] = []
        highs: list[float] = []  # of the kept options with the best ranges; both ascending
        kept = []
        for index in order:
            low, high = self.low_ms[index], self.high_ms[index]
            at = bisect.bisect_right(lows, low)
            if at and highs[at - 1] >= high:
                continue
            kept.append(index)
            end = at
            while end < len(lows) and highs[end] <= high:
                end += 1
            start = at - 1 if at and lows[at - 1] == low else at
            lows[start:end], highs[start:end] = [low], [high]
        return self.take(np.array(kept, dtype=np.int64))


def most_probable_choice(
    space: Space, log_alpha: FloatArray, log_beta: FloatArray, table: LatencyTable, target_latency_ms: float
) -> list[tuple[int, int]] | None:
    """The most probable kept layers and candidates whose latency range over all widths contains the target.

    Probability is the sum of the log alphas of the kept layers' candidates (of `skip` too, where it is one) and of the
    log betas of the depths (`sink`) or gates (`skip-out`). `log_alpha` [L, C] and `log_beta` as in `derive.derive`.
    Returns (supernet layer, candidate) of every kept layer in network order; None where no network has such a range.
    Exact; deterministic, ties go to an arbitrary but fixed network.
    """
    offset_ms, slope = table.correction
    target_ms = (target_latency_ms - offset_ms) / slope - table.base_ms
    stages = [_stage_options(space, s, log_alpha, log_beta, table) for s in range(len(space.stages))]
    choice = _best(stages, target_ms)
    if choice is None:
        return None
    return [(layer, int(c)) for layer, c in enumerate(choice) if c != _SKIPPED]


def _stage_options(
    space: Space, stage: int, log_alpha: FloatArray, log_beta: FloatArray, table: LatencyTable
) -> _Options:
    """All ways to run a stage worth considering, whatever the other stages do."""
    layers = space.layers_of_stage[stage]
    partial = _layer_options(space, layers[0], log_alpha, log_beta, table).undominated()
    if space.depth_space != "sink":
        for layer in layers[1:]:
            partial = partial.times(_layer_options(space, layer, log_alpha, log_beta, table)).undominated()
        return partial
    by_depth = []
    for depth in range(1, len(layers) + 1):
        if depth > 1:
            layer = layers[depth - 1]
            partial = partial.times(_layer_options(space, layer, log_alpha, log_beta, table)).undominated()
        beta = log_beta[stage, depth - 1]
        if beta > -np.inf:
            rest = np.full((len(partial), len(layers) - depth), _SKIPPED, dtype=np.int64)
            choice = np.concatenate([partial.choice, rest], axis=1)
            by_depth.append(_Options(partial.score + beta, partial.low_ms, partial.high_ms, choice))
    return _joined(by_depth).undominated()


def _layer_options(
    space: Space, layer: Layer, log_alpha: FloatArray, log_beta: FloatArray, table: LatencyTable
) -> _Options:
    """The candidates of one layer; leaving it out is one more where the depth space has that choice here."""
    ranges_ms = iter(candidate_range_ms(layer, table))
    gated = space.depth_space == "skip-out" and layer.position > 0
    keep = log_beta[layer.index, 1] if gated else 0.0
    rows: list[tuple[float, float, float, int]] = []
    for c, candidate in enumerate(layer.candidates):
        if candidate.is_skip:
            rows.append((log_alpha[layer.index, c], 0.0, 0.0, _SKIPPED))
        else:
            rows.append((keep + log_alpha[layer.index, c], *next(ranges_ms), c))
    if gated:
        rows.append((log_beta[layer.index, 0], 0.0, 0.0, _SKIPPED))
    rows = [row for row in rows if row[0] > -np.inf]
    score, low_ms, high_ms = (np.array([row[i] for row in rows]) for i in range(3))
    return _Options(score, low_ms, high_ms, np.array([[row[3]] for row in rows], dtype=np.int64))


def _joined(parts: Sequence[_Options]) -> _Options:
    return _Options(
        np.concatenate([part.score for part in parts]),
        np.concatenate([part.low_ms for part in parts]),
        np.concatenate([part.high_ms for part in parts]),
        np.concatenate([part.choice for part in parts]),
    )


def _best(stages: Sequence[_Options], target_ms: float) -> IntArray | None:
    """The choice with the highest score among those with low_ms <= target_ms <= high_ms; None where there is none."""
    # a target equal to a bound is within reach, whatever the order of summation makes of its last bits
    up_to, from_ms = target_ms + _ROUNDING * abs(target_ms), target_ms - _ROUNDING * abs(target_ms)
    multipliers = list(_multipliers(stages, target_ms))
    completions = [[_completion(stages[s:], a, b) for a, b in multipliers] for s in range(1, len(stages) + 1)]
    least_rest = np.cumsum([stage.low_ms.min() for stage in stages][::-1])[::-1]
    greatest_rest = np.cumsum([stage.high_ms.max() for stage in stages][::-1])[::-1]
    best_score, best_choice = -np.inf, None
    partial: _Options | None = None
    for s, stage in enumerate(stages):
        partial = stage if partial is None else partial.times(stage)
        last = s + 1 == len(stages)
        low_rest, high_rest = (0.0, 0.0) if last else (least_rest[s + 1], greatest_rest[s + 1])
        feasible = (partial.low_ms + low_rest <= up_to) & (partial.high_ms + high_rest >= from_ms)
        partial = partial.take(np.flatnonzero(feasible))
        bound = np.full(len(partial), np.inf)
        for (a, b), rest in zip(multipliers, completions[s], strict=True):
            low_ms, high_ms = partial.low_ms + rest.low_ms[0], partial.high_ms + rest.high_ms[0]
            score = partial.score + rest.score[0]
            bound = np.minimum(bound, score + a * (up_to - low_ms) + b * (high_ms - from_ms))
            meets = np.flatnonzero((low_ms <= up_to) & (high_ms >= from_ms))
            if meets.size and score[meets].max() > best_score:
                at = meets[np.argmax(score[meets])]
                best_score, best_choice = score[at], np.concatenate([partial.choice[at], rest.choice[0]])
        partial = partial.take(np.flatnonzero(bound > best_score)).undominated()
    return best_choice


def _completion(stages: Sequence[_Options], a: float, b: float) -> _Options:
    """One option: the ways to run `stages` that maximise the Lagrangian for multipliers a, b."""
    result = _Options(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64))
    for stage in stages:
        result = result.times(stage.take(np.array([stage.strongest(a, b)])))
    return result


def _multipliers(stages: Sequence[_Options], target_ms: float) -> Iterator[tuple[float, float]]:
    """Multipliers with tight bounds: the best of a projected subgradient descent on the dual, and (0, 0)."""
    spread_ms = sum(float(stage.high_ms.max() - stage.low_ms.min()) for stage in stages)
    spread = sum(float(np.ptp(stage.score)) for stage in stages)
    scale = max(spread, 1e-12) / max(spread_ms, 1e-12)
    pair = np.zeros(2)
    found: list[tuple[float, float, float]] = []
    for step in range(_DUAL_STEPS):
        a, b = float(pair[0]), float(pair[1])
        ways = [(stage, stage.strongest(a, b)) for stage in stages]
        slack = np.array(
            [
                target_ms - sum(stage.low_ms[at] for stage, at in ways),
                sum(stage.high_ms[at] for stage, at in ways) - target_ms,
            ]
        )
        found.append((float(sum(stage.score[at] for stage, at in ways) + pair @ slack), a, b))
        size = np.abs(slack).max()
        if size == 0:
            break
        # 1 / step sizes converge; the slack's own size would make long curves overshoot
        pair = np.maximum(0.0, pair - scale * slack / size / (1 + step / 10))
    found.sort()
    unique = dict.fromkeys((a, b) for _, a, b in found)
    yield from list(unique)[:_BOUNDS]
    yield 0.0, 0.0
