"""`tfnas lut build` and `tfnas lut check`: measure a latency table, and find out whether one still holds."""

from __future__ import annotations

import json as json_format
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tfnas.cli.codes import NOISY, OK
from tfnas.config import SearchConfig
from tfnas.config_io import DEFAULT_CONFIG, load_config
from tfnas.interrupt import RunInterrupted, StopRequest
from tfnas.latency.check import CheckResult, check_table
from tfnas.latency.lut_io import load_table, save_table
from tfnas.latency.partial_file import own_partial
from tfnas.latency.profile import NoisyMachineWarning, ProfileOptions, Progress, build_table, describe_half_width
from tfnas.space import Space
from tfnas.space_io import load_space
from tfnas.target import profile_conditions


def build(
    output: Path,
    config: str = DEFAULT_CONFIG,
    space: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    batch: int | None = None,
    threads: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    layout: Literal["nchw", "channels_last"] | None = None,
    budget_s: float | None = None,
    seed: int = 0,
    strict: bool = False,
    json: bool = False,
) -> int:
    """Measure a latency table of a search space and write it.

    A build that is interrupted or killed leaves `OUTPUT.partial` and goes on from there when the same command is given
    again.

    Args:
        output: Table to write (JSON).
        config: Search configuration that names the space and the conditions; what follows overrides it.
        space: Search space, a built-in name or a YAML file.
        device: `cpu`, `cuda` or `cuda:1`; without it and the configuration's, CUDA where there is one.
        engine: What runs the networks: `eager`, `compile`, `fused` or `onnxruntime`. Profile what will be deployed.
        batch: Images a forward pass.
        threads: CPU threads.
        dtype: Type of weights and activations.
        layout: Memory layout of the activations.
        budget_s: Seconds to spend at most; the fewest samples that a table needs are taken in any case.
        seed: Order of the measurements, and the architectures the correction is fitted on.
        strict: End with exit code 3 when the machine was too noisy; the table is written all the same.
        json: Print the table's header as one JSON object.

    Returns:
        The exit code.
    """
    settings = load_config(config)
    profile = settings.profile
    named: dict[str, Any] = {"engine": engine, "batch": batch, "threads": threads, "dtype": dtype, "layout": layout}
    conditions = replace(
        profile_conditions(profile, _device(settings) if device is None else device),
        **{name: value for name, value in named.items() if value is not None},
    )
    options = ProfileOptions(conditions, budget_s=profile.budget_s if budget_s is None else budget_s, seed=seed)
    chosen_space = _space(settings, space)
    with own_partial(output) as partial, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoisyMachineWarning)
        try:
            with StopRequest() as stop, _BuildProgress(stop, quiet=json) as progress:
                table = build_table(chosen_space, options, partial=partial, progress=progress)
        except RunInterrupted as stopped:
            kept = f"{partial} keeps what was measured, the same command goes on" if partial else "nothing was kept"
            print(f"tfnas lut build: {stopped}; {kept}", file=sys.stderr)
            return 128 + stopped.signal_number
        save_table(output, table)
        if partial is not None:
            partial.unlink()
    for warning in caught:
        print(f"tfnas lut build: warning: {warning.message}", file=sys.stderr)
    if json:
        print(json_format.dumps(table.header, indent=2))
    else:
        report, noise = table.header["additivity"], table.header["noise"]
        print(f"{output}: {len(table.curves)} curves from {table.header['widths_measured']} widths")
        print(f"medians {describe_half_width(noise)} (median over widths, 95 % confidence)")
        print(
            f"{report['architectures']} networks measured whole: mean error {100 * report['mape']:.1f} %, "
            f"{100 * report['raw_mape']:.1f} % before correction; rank correlation {report['spearman']:.3f}"
        )
    return NOISY if strict and table.header["noise"]["noisy"] else OK


def check(
    lut: Path,
    config: str = DEFAULT_CONFIG,
    space: str | None = None,
    architectures: int = 40,
    seed: int = 0,
    budget_s: float = 120.0,
    strict: bool = False,
    json: bool = False,
) -> int:
    """Measure random networks whole and say whether a latency table still predicts them.

    Args:
        lut: Table to check; it is measured under the conditions in its header.
        config: Search configuration that names the space.
        space: Search space, a built-in name or a YAML file, instead of the configuration's.
        architectures: Networks to measure, none of them among those the table was fitted on.
        seed: Which networks.
        budget_s: Seconds to spend.
        strict: End with exit code 3 when the table does not hold.
        json: Print one JSON object: `mape`, `bias`, `max_error` as fractions, `spearman`, `scale`, `holds` and more.

    Returns:
        The exit code.
    """
    result = check_table(load_table(lut), _space(load_config(config), space), architectures, seed, budget_s=budget_s)
    if json:
        print(json_format.dumps(result.as_dict(), indent=2))
    else:
        print("\n".join(_check_lines(result)))
    return NOISY if strict and not result.holds else OK


def _check_lines(result: CheckResult) -> list[str]:
    lines = [
        f"{result.architectures} networks, each known to +-{100 * result.half_width:.1f} %",
        f"mean error {100 * result.mape:.2f} %, bias {100 * result.bias:+.2f} %, "
        f"largest {100 * result.max_error:.1f} %, rank correlation {result.spearman:.3f}",
    ]
    if result.scale is not None:
        lines.append(f"the reference networks take {result.scale:.3f} of their time when the table was built")
    lines += [f"note: {remark}" for remark in result.remarks]
    lines.append("the table holds" if result.holds else "the table does not hold: " + "; ".join(result.reasons))
    return lines


def _space(settings: SearchConfig, name: str | None) -> Space:
    overrides = {key: getattr(settings, key) for key in ("num_classes", "resolution", "image_channels")}
    return load_space(name or settings.space, {key: value for key, value in overrides.items() if value is not None})


def _device(settings: SearchConfig) -> str:
    if settings.device != "auto":
        return settings.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _BuildProgress:
    """Says how far a build is and, between two measurements, heeds signals.

    A terminal has one line that is written anew, anything else a line for every phase and tenth of the budget, and for
    every minute beyond it, which a table may need for its fewest samples.
    """

    def __init__(self, stop: StopRequest, *, quiet: bool) -> None:
        self._stop, self._quiet = stop, quiet
        self._said: tuple[str, bool, int] | None = None
        self._in_line = False

    def __enter__(self) -> _BuildProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._in_line:  # what comes next, perhaps an error, has a line of its own
            print(file=sys.stderr, flush=True)

    def __call__(self, progress: Progress) -> None:
        is_last = progress.phase == "done"
        if not self._quiet:
            self._say(progress, ends=is_last or self._stop.signal_number is not None)
        if self._stop.signal_number is not None and not is_last:
            raise RunInterrupted(self._stop.signal_number, "interrupted")

    def _say(self, progress: Progress, *, ends: bool) -> None:
        text = f"{progress.phase}: {progress.widths} widths, {progress.seconds_left:.0f} s left at most"
        within = progress.share < 1.0
        where = progress.phase, within, int(10 * progress.share if within else time.monotonic() / 60)
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text} ", end="", file=sys.stderr, flush=True)
            self._in_line = True
        elif ends or where != self._said:
            print(text, file=sys.stderr, flush=True)
        self._said = where
