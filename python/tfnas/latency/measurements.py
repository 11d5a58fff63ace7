"""What a table build has measured so far: every sample of every (curve, width), kept in a file that survives a kill.

A sample is a section's time in one pass of a chain together with the reference pass that ran beside it; the drift is
divided out when the samples are read, over the whole log, so that a resumed build joins up without a seam.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfnas.files import read_json, write_text_atomically
from tfnas.latency.chain import FloatArray, ReferenceLog
from tfnas.space import OpKey
from tfnas_ext.timing import Samples

PARTIAL_SCHEMA_VERSION = 1
Config = tuple[OpKey, int]


@dataclass(frozen=True)
class Sample:
    """One timed section: its time in ms, the number of the reference pass beside it, its slot in the network."""

    ms: float
    reference_pass: int
    slot: int
    disturbed: bool = False


def usable(samples: list[Sample], drift: FloatArray) -> Samples:
    """Undisturbed samples (ms, drift divided out), the others counted as rejected.

    Where more than half were disturbed there is no quiet to wait for: then all are used.
    """
    kept = [s for s in samples if not s.disturbed]
    if 2 * len(kept) < len(samples):
        kept = samples
    return Samples(np.array([s.ms / drift[s.reference_pass, s.slot] for s in kept]), len(samples) - len(kept))


@dataclass
class Measurements:
    """Samples of sections by configuration, of stem and head, and the log of reference passes."""

    reference: ReferenceLog = field(default_factory=ReferenceLog)
    blocks: dict[Config, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    stem: list[Sample] = field(default_factory=list)
    head: list[Sample] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, config: Config) -> int:
        """How often `config` was timed, disturbed or not."""
        return len(self.blocks[config]) if config in self.blocks else 0

    def samples(self, config: Config, drift: FloatArray) -> Samples:
        """Usable samples of one configuration; `drift` is `reference.drift()`, best computed once for many."""
        return usable(self.blocks[config], drift)

    def base_samples(self, drift: FloatArray) -> tuple[Samples, Samples]:
        """Usable samples of stem and head."""
        return usable(self.stem, drift), usable(self.head, drift)

    def disturbed_share(self) -> float:
        """Share of all timed sections that something disturbed."""
        every = [s.disturbed for samples in (self.stem, self.head, *self.blocks.values()) for s in samples]
        return float(np.mean(every)) if every else 0.0

    def medians(self, key: OpKey, drift: FloatArray) -> dict[int, float]:
        """Median ms by width, for every measured width of one curve."""
        return {w: self.samples((k, w), drift).median_ms for k, w in sorted(self.blocks) if k == key}

    def save(self, path: str | os.PathLike[str], conditions: Mapping[str, Any]) -> None:
        """Write everything to `path` atomically; `conditions` are those it was measured under."""
        blocks = [
            {"key": asdict(key), "width": width, "samples": [_row(s) for s in samples]}
            for (key, width), samples in self.blocks.items()
        ]
        document = {
            "partial_schema_version": PARTIAL_SCHEMA_VERSION,
            "conditions": dict(conditions),
            "seconds": self.seconds,
            "reference_ms": self.reference.passes_ms,
            "stem": [_row(s) for s in self.stem],
            "head": [_row(s) for s in self.head],
            "blocks": blocks,
        }
        write_text_atomically(path, json.dumps(document))

    @staticmethod
    def load(path: str | os.PathLike[str], conditions: Mapping[str, Any]) -> Measurements:
        """Read what `save` wrote. ValueError when the file is not one, or was measured under other conditions."""
        document = read_json(path)
        if not isinstance(document, dict) or document.get("partial_schema_version") != PARTIAL_SCHEMA_VERSION:
            raise ValueError(f"{path}: not a partial latency table of version {PARTIAL_SCHEMA_VERSION}; delete it")
        then = document["conditions"]
        differing = [k for k in sorted({*then, *conditions}) if then.get(k) != conditions.get(k)]
        if differing:
            said = ", ".join(f"{k}: {then.get(k)!r} there, {conditions.get(k)!r} now" for k in differing)
            raise ValueError(f"{path}: measured under other conditions ({said}); delete it or name another output")
        try:
            result = Measurements(
                ReferenceLog([[float(v) for v in row] for row in document["reference_ms"]]),
                stem=[_sample(s) for s in document["stem"]],
                head=[_sample(s) for s in document["head"]],
                seconds=float(document["seconds"]),
            )
            for block in document["blocks"]:
                key = OpKey(**block["key"])
                result.blocks[key, int(block["width"])] = [_sample(s) for s in block["samples"]]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path}: damaged partial latency table ({error!r}); delete it") from None
        return result


def _row(sample: Sample) -> list[float]:
    return [sample.ms, sample.reference_pass, sample.slot, int(sample.disturbed)]


def _sample(row: list[Any]) -> Sample:
    ms, reference_pass, slot, disturbed = row
    return Sample(float(ms), int(reference_pass), int(slot), bool(disturbed))


def partial_path(output: str | os.PathLike[str]) -> Path:
    """Where a build keeps its samples while it runs: beside the table it will write."""
    return Path(f"{os.fspath(output)}.partial")
