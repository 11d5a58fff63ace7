"""Does the sum of the table's entries predict whole networks? Random architectures, the affine fit, and its errors."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from tfnas.architecture import Architecture, Op
from tfnas.latency.lut import FloatArray
from tfnas.space import Space

# Second words of the seeds of `random_architectures`: the networks a table is fitted on, those it is checked on, and
# those that tell the machine's speed.
FITTING, CHECKING, REFERENCE = 1, 2, 3


def random_architectures(space: Space, count: int, seed: int | tuple[int, ...]) -> list[Architecture]:
    """`count` architectures: depth of every stage, candidate and width of every layer drawn uniformly (seeded)."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        stages = []
        for layers in space.layers_of_stage:
            ops = []
            for layer in layers[: int(rng.integers(1, len(layers) + 1))]:
                choices = [c for c, candidate in enumerate(layer.candidates) if not candidate.is_skip]
                c = choices[int(rng.integers(len(choices)))]
                width = int(rng.integers(layer.min_width(c), layer.max_width(c) + 1))
                ops.append(Op.of(layer, c, width))
            stages.append(tuple(ops))
        result.append(Architecture(space, tuple(stages)))
    return result


def fit_correction(sums_ms: FloatArray, whole_ms: FloatArray) -> tuple[float, float]:
    """(b0, b1) of whole = b0 + b1 * sum by least squares of the *relative* errors, so that small networks count too.

    Falls back to pure scaling, (0, b1), where all sums are alike and a line cannot be told from a point.
    """
    if float(np.ptp(sums_ms)) > 0.02 * float(np.median(sums_ms)):
        weighted = np.stack([np.ones_like(sums_ms), sums_ms], axis=1) / whole_ms[:, None]
        (b0, b1), *_ = np.linalg.lstsq(weighted, np.ones_like(whole_ms), rcond=None)
        if b1 > 0:
            return float(b0), float(b1)
    return 0.0, float(np.median(whole_ms / sums_ms))


@dataclass(frozen=True)
class AdditivityReport:
    """Prediction errors over whole networks, as fractions: (predicted - measured) / measured."""

    architectures: int
    bias: float
    mape: float
    max_error: float
    spearman: float
    raw_bias: float
    raw_mape: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def additivity_report(sums_ms: FloatArray, whole_ms: FloatArray, correction: tuple[float, float]) -> AdditivityReport:
    """Errors of the corrected (`bias`, `mape`, `max_error`, `spearman`) and of the plain sum (`raw_*`)."""
    b0, b1 = correction
    error = (b0 + b1 * sums_ms - whole_ms) / whole_ms
    raw = (sums_ms - whole_ms) / whole_ms
    return AdditivityReport(
        architectures=int(whole_ms.size),
        bias=float(error.mean()),
        mape=float(np.abs(error).mean()),
        max_error=float(np.abs(error).max()),
        spearman=spearman(sums_ms, whole_ms),
        raw_bias=float(raw.mean()),
        raw_mape=float(np.abs(raw).mean()),
    )


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Rank correlation (ties share their mean rank); 1 for fewer than two different values."""
    ranks = [_mean_ranks(values) for values in (a, b)]
    if any(np.ptp(r) == 0 for r in ranks):
        return 1.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mean_ranks(values: FloatArray) -> FloatArray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
