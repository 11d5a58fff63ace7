"""What a table build has measured so far: every sample of every (curve, width), kept in a file that survives a kill.

A sample is a section's time in one numbered pass of a chain. How slow the machine was in that pass is told from all
samples at once and divided out when they are read, so that a resumed build joins up without a seam.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tfnas.fields import Fields, describe
from tfnas.files import read_json, write_text_atomically
from tfnas.latency.chain import FloatArray, ReferenceLog
from tfnas.latency.slowness import pass_slowness
from tfnas.space import OpKey
from tfnas_ext.timing import Samples

PARTIAL_SCHEMA_VERSION = 4
Config = tuple[OpKey, int]
# Fewer sections than this cannot tell how slow the machine was in their pass: the reference network nearby does.
_TELLING = 5


@dataclass(frozen=True)
class Sample:
    """One timed section: its time in ms and the number of its pass."""

    ms: float
    pass_number: int
    disturbed: bool = False


def usable(samples: list[Sample], slowness: FloatArray) -> Samples:
    """Undisturbed samples (ms, slowness of their pass divided out), the others counted as rejected.

    Where more than half were disturbed there is no quiet to wait for: then all are used.
    """
    kept = _kept(samples)
    return Samples(np.array([s.ms / slowness[s.pass_number] for s in kept]), len(samples) - len(kept))


def _kept(samples: list[Sample]) -> list[Sample]:
    kept = [s for s in samples if not s.disturbed]
    return samples if 2 * len(kept) < len(samples) else kept


@dataclass
class NetworkMeasurements:
    """Total times of whole networks, [networks][samples], and the reference passes that ran beside them."""

    reference: ReferenceLog = field(default_factory=ReferenceLog)
    totals: list[list[Sample]] = field(default_factory=list)


@dataclass
class Measurements:
    """Samples of sections by configuration, of stem and head, reference passes beside them; and whole networks."""

    reference: ReferenceLog = field(default_factory=ReferenceLog)
    networks: NetworkMeasurements = field(default_factory=NetworkMeasurements)
    blocks: dict[Config, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    stem: list[Sample] = field(default_factory=list)
    head: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    passes: int = 0

    def next_pass(self) -> int:
        """The number of a new pass of a chain."""
        self.passes += 1
        return self.passes - 1

    def slowness(self) -> FloatArray:
        """How slow the machine was in every pass, [passes], 1 where the reference networks take their median times.

        Best computed once for many readings; a pass of few sections, or without any, is as slow as the reference
        network after it.
        """
        beside = self._slowness_beside()
        kept = [_kept(samples) for samples in (self.stem, self.head, *self.blocks.values())]
        what = np.repeat(np.arange(len(kept)), [len(samples) for samples in kept])
        numbers = np.array([s.pass_number for samples in kept for s in samples], dtype=np.int64)
        telling = np.bincount(numbers, minlength=self.passes) >= _TELLING
        # where a reference network ran right after a pass, both ran at the same speed: that settles the level
        joints = np.unique(self.reference.after()) - 1
        joints = joints[(joints >= 0) & telling[joints]]
        if joints.size == 0:
            return beside
        use = telling[numbers]
        ms = np.array([s.ms for samples in kept for s in samples])
        found = pass_slowness(ms[use], what[use], numbers[use], self.passes)
        return np.where(telling, found / np.median(found[joints] / beside[joints]), beside)

    def _slowness_beside(self) -> FloatArray:
        """For every pass the slowness of the reference network that ran next, 1 before one ever ran."""
        after = self.reference.after()
        if after.size == 0:
            return np.ones(self.passes)
        number = np.searchsorted(after, np.arange(1, self.passes + 1))
        return self.reference.drift()[number.clip(max=after.size - 1)]

    def count(self, config: Config) -> int:
        """How often `config` was timed, disturbed or not."""
        return len(self.blocks[config]) if config in self.blocks else 0

    def samples(self, config: Config, slowness: FloatArray) -> Samples:
        """Usable samples of one configuration; `slowness` is `self.slowness()`."""
        return usable(self.blocks[config], slowness)

    def base_samples(self, slowness: FloatArray) -> tuple[Samples, Samples]:
        """Usable samples of stem and head."""
        return usable(self.stem, slowness), usable(self.head, slowness)

    def disturbed_share(self) -> float:
        """Share of all timed sections that something disturbed."""
        every = [s.disturbed for samples in (self.stem, self.head, *self.blocks.values()) for s in samples]
        return float(np.mean(every)) if every else 0.0

    def fits(self, ranges: Mapping[OpKey, tuple[int, int]], networks: int) -> bool:
        """Whether all can be of a space: widths of its curves, count of networks."""
        widths = all(key in ranges and ranges[key][0] <= width <= ranges[key][1] for key, width in self.blocks)
        return widths and len(self.networks.totals) in (0, networks)

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
            "passes": self.passes,
            "reference": self.reference.passes,
            "networks_reference": self.networks.reference.passes,
            "networks": [[_row(s) for s in samples] for samples in self.networks.totals],
            "stem": [_row(s) for s in self.stem],
            "head": [_row(s) for s in self.head],
            "blocks": blocks,
        }
        write_text_atomically(path, json.dumps(document))

    @staticmethod
    def load(path: str | os.PathLike[str], conditions: Mapping[str, Any]) -> Measurements:
        """Read what `save` wrote. ValueError when the file is not one, or was measured under other conditions."""
        try:
            document = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete it") from None
        if not isinstance(document, dict) or document.get("partial_schema_version") != PARTIAL_SCHEMA_VERSION:
            raise ValueError(f"{path}: not a partial latency table of version {PARTIAL_SCHEMA_VERSION}; delete it")
        then, now = document.get("conditions"), json.loads(json.dumps(dict(conditions)))
        if not isinstance(then, dict):
            raise ValueError(f"{path}: damaged partial latency table (no conditions); delete it")
        differing = [k for k in sorted({*then, *now}) if then.get(k) != now.get(k)]
        if differing:
            said = ", ".join(f"{k}: {describe(then.get(k))} there, {describe(now.get(k))} now" for k in differing)
            raise ValueError(f"{path}: measured under other conditions ({said}); delete it or name another output")
        try:
            return _measurements(document)
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: damaged partial latency table ({error!r}); delete it") from None


def _measurements(document: dict[str, Any]) -> Measurements:
    numbers = Fields(document, "", optional=list(document))
    passes = numbers.integer("passes", minimum=0)
    beside_networks = _log(document["networks_reference"])
    result = Measurements(
        _log(document["reference"]),
        NetworkMeasurements(beside_networks, [_samples(rows, len(beside_networks)) for rows in document["networks"]]),
        stem=_samples(document["stem"], passes),
        head=_samples(document["head"], passes),
        seconds=numbers.number("seconds"),
        passes=passes,
    )
    for block in document["blocks"]:
        result.blocks[OpKey(**block["key"]), int(block["width"])] = _samples(block["samples"], passes)
    return result


def _row(sample: Sample) -> list[float]:
    return [round(sample.ms, 6), sample.pass_number, int(sample.disturbed)]


def _log(passes: list[Any]) -> ReferenceLog:
    log = ReferenceLog()
    for total_ms, which, after in passes:
        log.add(_above_zero(total_ms), int(which), int(after))
    after = [row[2] for row in log.passes]
    if after != sorted(after):
        raise ValueError("passes of the reference networks that do not match")
    return log


def _samples(rows: list[Any], passes: int) -> list[Sample]:
    """The samples of one section; none may name a pass that never was."""
    samples = [Sample(_above_zero(ms), int(number), bool(disturbed)) for ms, number, disturbed in rows]
    if any(not 0 <= sample.pass_number < passes for sample in samples):
        raise ValueError(f"a sample of a pass beyond the {passes} there were")
    return samples


def _above_zero(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"expected a finite number above 0, got {value!r}")
    return number
