"""Latency tables that several tests use: the published ones, where they are found, and synthetic ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tfnas.latency.knots import searchable_ranges
from tfnas.latency.lut import Curve, LatencyTable
from tfnas.space import Space


def published_table_path(name: str = "latency_gpu.pkl") -> Path:
    """Path of a table published with TF-NAS, in the folder TFNAS_PUBLISHED_LUT; skips the test where there is none."""
    path = Path(os.environ.get("TFNAS_PUBLISHED_LUT", "")) / name
    if not path.is_file():
        pytest.skip(f"no published latency table {path} (set TFNAS_PUBLISHED_LUT to its folder)")
    return path


def synthetic_table(space: Space, *, seed: int = 0, monotone: bool = True, base_ms: float = 1.0) -> LatencyTable:
    """A table covering `space`: latency grows with width, kernel and resolution; not monotone on request."""
    rng = np.random.default_rng(seed)
    curves = {}
    for key, (low, high) in searchable_ranges(space).items():
        widths = np.unique(np.r_[np.arange(low, high, max(1, (high - low) // 12)), high])
        scale = key.kernel_size * (1 + 0.2 * (key.se_channels > 0)) * rng.uniform(0.5, 1.5)
        latency_ms = 0.05 + scale * widths / widths[-1] * 0.1
        if not monotone:
            latency_ms = latency_ms * rng.uniform(0.7, 1.3, widths.size)
        curves[key] = Curve(widths, latency_ms)
    return LatencyTable(base_ms, curves, {"source": "synthetic"})
