"""Does a latency table still hold? Other architectures than those its correction was fitted on, measured whole.

Two questions are kept apart: whether the machine is as fast as it was (`scale`, told by the reference networks alone),
and whether the table predicts networks at equal speed of the machine (`bias`, `mape`, `max_error`, `spearman`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from tfnas.latency.additivity import CHECKING, additivity_report, random_architectures
from tfnas.latency.chain import ChainTimer, speed_ratio
from tfnas.latency.chain_profiler import NETWORK_RULE
from tfnas.latency.engine import Conditions, Engine
from tfnas.latency.header import device_name, device_uuid, engine_version, tf32_use
from tfnas.latency.lut import LatencyTable
from tfnas.latency.measure import NAMED, conditions_of, measure_networks_ms
from tfnas.space import Space


@dataclass(frozen=True)
class CheckLimits:
    """What a table must keep to hold, as fractions: mean error, bias, rank correlation, change of machine speed."""

    mape: float = 0.03
    bias: float = 0.02
    spearman: float = 0.95
    scale: float = 0.05


@dataclass(frozen=True)
class CheckResult:
    """Errors over whole networks as fractions of the measured latency: (predicted - measured) / measured.

    `scale` is the machine's slowness now against when the table was built (1.03: 3 % slower), by the reference
    networks; None where the table does not know it. `bias`, `mape`, `max_error` are at equal speed (measured / scale),
    `raw_bias` and `raw_mape` as measured now. `half_width` is the median precision of the measured latencies themselves
    (95 %; 1 where there were too few samples to tell).
    """

    architectures: int
    bias: float
    mape: float
    max_error: float
    spearman: float
    scale: float | None
    raw_bias: float
    raw_mape: float
    half_width: float
    holds: bool
    reasons: tuple[str, ...]
    remarks: tuple[str, ...]
    predicted_ms: tuple[float, ...]
    measured_ms: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_table(
    table: LatencyTable,
    space: Space,
    architectures: int = 40,
    seed: int = 0,
    *,
    limits: CheckLimits | None = None,
    budget_s: float = 120.0,
    conditions: Conditions | None = None,
    engine: Engine | None = None,
    timer: ChainTimer | None = None,
    now_s: Callable[[], float] = time.monotonic,
) -> CheckResult:
    """Measure `architectures` random networks of `space` and compare with `table`, under the table's own conditions.

    The networks are never those the table's correction was fitted on, whatever the seed. Raises `ValueError` for fewer
    than 3 architectures, `LatencyTableError` where the table does not cover the space, `EngineUnavailable` where its
    engine or device is not here. Not deterministic, being a measurement.
    """
    if architectures < 3:
        raise ValueError(f"architectures: expected at least 3 to judge a table by, got {architectures}")
    if seed < 0 or not budget_s > 0:
        raise ValueError(f"expected a seed of at least 0 and a budget_s above 0, got {seed} and {budget_s}")
    limits = CheckLimits() if limits is None else limits
    table.require_space(space)
    conditions = conditions_of(table.header) if conditions is None else conditions
    archs = random_architectures(space, architectures, seed=(seed, CHECKING))
    predicted = np.array([table.architecture_ms(arch) for arch in archs])
    measured = measure_networks_ms(
        archs,
        conditions,
        rule=NETWORK_RULE,
        time_limit_s=budget_s,
        seed=seed,
        engine=engine,
        timer=timer,
        now_s=now_s,
    )
    now_ms = np.array([samples.median_ms for samples in measured])
    reference_ms = cast("dict[int, float]", measured[0].facts["reference_ms"])
    then_ms = table.header.get("reference_ms")
    scale = speed_ratio(reference_ms, dict(enumerate(then_ms))) if isinstance(then_ms, list) else None
    at_equal_speed = additivity_report(predicted, now_ms / (scale or 1.0), (0.0, 1.0))
    raw = additivity_report(predicted, now_ms, (0.0, 1.0))
    result = CheckResult(
        architectures=architectures,
        bias=at_equal_speed.bias,
        mape=at_equal_speed.mape,
        max_error=at_equal_speed.max_error,
        spearman=at_equal_speed.spearman,
        scale=scale,
        raw_bias=raw.bias,
        raw_mape=raw.mape,
        half_width=min(1.0, float(np.median([samples.relative_half_width for samples in measured]))),
        holds=True,
        reasons=(),
        remarks=tuple(_remarks(table, conditions)),
        predicted_ms=tuple(float(v) for v in predicted),
        measured_ms=tuple(float(v) for v in now_ms),
    )
    reasons = tuple(_reasons(result, limits))
    return replace(result, holds=not reasons, reasons=reasons)


def _reasons(result: CheckResult, limits: CheckLimits) -> list[str]:
    reasons = []
    if result.mape > limits.mape:
        reasons.append(f"mean error {100 * result.mape:.1f} %, allowed {100 * limits.mape:.1f} %")
    if abs(result.bias) > limits.bias:
        reasons.append(f"bias {100 * result.bias:+.1f} %, allowed {100 * limits.bias:.1f} %")
    if result.spearman < limits.spearman:
        reasons.append(f"rank correlation {result.spearman:.3f}, wanted {limits.spearman:.3f}")
    if result.scale is not None and abs(result.scale - 1) > limits.scale:
        word = "slower" if result.scale > 1 else "faster"
        reasons.append(f"the machine runs {100 * abs(result.scale - 1):.1f} % {word} than when the table was built")
    return reasons


def _remarks(table: LatencyTable, conditions: Conditions) -> list[str]:
    """What differs between the table's header and here, beyond the conditions that were reproduced."""
    header, remarks = table.header, []
    assumed = [f"{name} {getattr(conditions, name)}" for name in NAMED if not header.get(name)]
    if assumed:
        remarks.append(f"the table does not say all that it was measured under; assumed: {', '.join(assumed)}")
    here = {
        "device": device_name(conditions.device),
        "device_uuid": device_uuid(conditions.device),
        "engine_version": engine_version(conditions.engine),
        "tf32": tf32_use(conditions),
        "torch": torch.__version__,
    }
    for name, value in here.items():
        if header.get(name) not in (None, value):
            remarks.append(f"{name}: {header[name]} when built, {value} now")
    if (header.get("noise") or {}).get("noisy"):
        remarks.append("the table was built on a noisy machine")
    return remarks
