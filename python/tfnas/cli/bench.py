"""`tfnas bench`: how fast are the fused blocks here, against plain PyTorch?"""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from tfnas.bench.cases import STANDARD, Case, NetworkCase, space_cases
from tfnas.bench.measure import PHASES, ResultsDifferError, Row, matmul_flops, measure_cases
from tfnas.bench.show import rows_table, save_plot, summary
from tfnas.cli.codes import FAILED, OK
from tfnas.cli.terminal import terminal
from tfnas.latency.header import device_name
from tfnas.space_io import load_space
from tfnas.threads import use_threads
from tfnas.versions import software_versions
from tfnas_ext import choose_backend
from tfnas_ext.backends import cpu_capability
from tfnas_ext.ops import NATIVE_DTYPES
from tfnas_ext.timing import CpuTimer, ProcessTimer, StopRule
from tfnas_ext.timing_host import set_allocator


def bench(
    what: Literal["blocks", "network", "all"] = "blocks",
    space: str | None = None,
    architecture: str = "tf-nas-a",
    batch: int = 8,
    only: str = "",
    phase: Literal["inference", "step", "both"] = "both",
    dtype: Literal["float32", "bfloat16", "both"] = "float32",
    compiled: bool = False,
    threads: int | None = None,
    clock: Literal["wall", "process"] = "wall",
    seconds: float = 1.0,
    png: Path | None = None,
    json: bool = False,
) -> int:
    """Time fused blocks against plain PyTorch (eager NCHW, eager channels_last, compiled) on this CPU.

    Results are compared before anything is timed; competitors take turns, so that drift hits all alike. The allocator
    keeps freed memory, for all of them: without that, plain PyTorch spends much of its time on page faults. Rows where
    the fused block is slower are shown too.

    Args:
        what: `blocks`, whole `network`, or `all`.
        space: Time the blocks of this search space at their largest widths, instead of nine typical ones.
        architecture: The network: an architecture file, or a built-in name.
        batch: Images in a batch, for `space` and `network`.
        only: Time only cases whose name contains this text, such as `r28_i40`.
        phase: `inference`, a training `step` (forward pass, all gradients), or `both`.
        dtype: Type of weights and activations: `float32`, `bfloat16` where the kernels take it, or `both`.
        compiled: Also time `torch.compile` of the plain modules; compiling takes a while.
        threads: CPU threads.
        clock: `process` takes CPU time, for a machine that other programs use too (with `--threads 1`).
        seconds: Time limit of each measurement.
        png: Picture to draw the rows into (needs matplotlib, extra `plots`); `.svg` and `.pdf` work too.
        json: Print one JSON object.

    Returns:
        The exit code.
    """
    if choose_backend("cpu") != "cpu":
        raise ValueError("there are no native kernels to time here; `tfnas info` says why")
    use_threads(threads)
    allocator = set_allocator()
    cases = _cases(what, space, architecture, batch, only)
    dtypes = [torch.float32, torch.bfloat16] if dtype == "both" else [getattr(torch, dtype)]
    for wanted in dtypes:
        if wanted not in NATIVE_DTYPES:
            raise ValueError(f"--dtype: the native kernels do not compute in {wanted} here")
    timer = ProcessTimer() if clock == "process" else CpuTimer()
    rule = StopRule(0.01, 10, time_limit_s=seconds)
    rows: list[Row] = []
    total = len(cases) * len(dtypes) * (2 if phase == "both" else 1)
    try:
        for row in measure_cases(
            cases,
            phases=PHASES if phase == "both" else (phase,),
            dtypes=dtypes,
            compiled=compiled,
            timer=timer,
            rule=rule,
        ):
            rows.append(row)
            print(f"{len(rows)}/{total} {row.case}, {row.phase}: {row.ratio:.2f}", file=sys.stderr, flush=True)
    except ResultsDifferError as error:
        print(f"tfnas bench: error: {error}", file=sys.stderr)
        return FAILED
    facts: dict[str, Any] = {"device": device_name("cpu"), "capability": cpu_capability()}
    facts |= {"threads": torch.get_num_threads(), "clock": clock}
    facts["allocator"] = allocator
    facts["matmul_gflops"] = round(matmul_flops(timer) / 1e9, 1)
    if png is not None:
        try:
            save_plot(png, rows, title=f"{facts['device']}, threads: {facts['threads']}")
        except ModuleNotFoundError as error:
            raise ValueError(f"--png: {error}") from None
    if json:
        facts |= {"versions": software_versions(), "rows": [row.as_dict() for row in rows]}
        print(json_format.dumps({"benchmark": "bench"} | facts, indent=2))
        return OK
    console = terminal()
    console.print(rows_table(rows))
    console.print(
        f"{summary(rows)}\n{facts['device']} ({facts['capability']}), threads: {facts['threads']}, {clock} time; "
        f"a large matrix product runs at {facts['matmul_gflops']} GFLOP/s",
        highlight=False,
    )
    return OK


def _cases(what: str, space: str | None, architecture: str, batch: int, only: str) -> Sequence[Case]:
    if batch < 2:
        raise ValueError(f"--batch must be at least 2, not {batch}: batch statistics of one image can be of one value")
    cases: list[Case] = []
    if what in ("blocks", "all"):
        cases += STANDARD if space is None else space_cases(load_space(space), batch)
    if what in ("network", "all"):
        cases.append(NetworkCase(architecture, batch))
    chosen = [case for case in cases if only in case.name]
    if not chosen:
        raise ValueError(f"--only: no case's name contains {only!r}; one is named {cases[0].name!r}")
    return chosen
