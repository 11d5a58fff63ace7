"""How wrong is a latency table? Held-out widths, networks measured whole, tables built anew; all in fresh processes.

    python benchmarks/lut_accuracy.py --space imagenet --layout nchw --json result.json
    python benchmarks/lut_accuracy.py --device cuda --batch 32 --builds 1

What is printed, and written with `--json`:
  builds      seconds, measured widths and noise of every table built
  held_out    widths that are no knots of the first table, half of them multiples of 16, measured in a fresh process:
              relative errors of its interpolation, median and 95th percentile
  networks    random networks that the correction was not fitted on, measured in a fresh process: MAPE, bias,
              largest error, rank correlation (as `tfnas lut check`)
  agreement   every further table against the first: the common scale, and how far entries are apart after it

Errors are at equal speed of the machine (`scale`), as the reference networks tell it, or for widths some that the table
measured; the raw ones are given as well.
`--prefix` names a command to start every measuring process with, for instance one that pins or prioritises it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tfnas.files import write_text_atomically
from tfnas.latency.check import check_table
from tfnas.latency.compare import compare_tables
from tfnas.latency.engine import Conditions
from tfnas.latency.header import device_name
from tfnas.latency.knots import searchable_ranges
from tfnas.latency.lut import LatencyTable
from tfnas.latency.lut_io import load_table, save_table
from tfnas.latency.measure import conditions_of, measure_blocks_ms
from tfnas.latency.measurements import Config
from tfnas.latency.profile import ProfileOptions, build_table
from tfnas.space_io import load_space

from tfnas_ext.timing import StopRule

CONDITIONS = ("device", "engine", "batch", "threads", "layout")


def step_build(args: argparse.Namespace) -> dict[str, Any]:
    """Build one table and save it."""
    conditions = Conditions(**{name: getattr(args, name) for name in CONDITIONS})
    start = time.monotonic()
    table = build_table(load_space(args.space), ProfileOptions(conditions, budget_s=args.budget_s, seed=args.seed))
    save_table(args.table, table)
    return {"seconds": time.monotonic() - start, "header": dict(table.header), "base_ms": table.base_ms}


def step_held_out(args: argparse.Namespace) -> dict[str, Any]:
    """Measure widths that the table interpolates and compare."""
    table = load_table(args.table)
    configs = held_out_widths(table, load_space(args.space), args.held_out, args.seed)
    rng = np.random.default_rng((args.seed, 4))
    knots = [(key, int(rng.choice(curve.widths))) for key, curve in table.curves.items()]
    samples = measure_blocks_ms(
        load_space(args.space),
        [*configs, *knots],
        conditions_of(table.header),
        rule=StopRule(0.01, min_samples=12, max_samples=80),
        time_limit_s=args.budget_s / 2,
        seed=args.seed,
    )
    measured = np.array([s.median_ms for s in samples])
    predicted = np.array([table.latency_ms(key, width) for key, width in (*configs, *knots)])
    # how fast the machine is today: one width of every curve that the table did measure
    scale = float(np.median(measured[len(configs) :] / predicted[len(configs) :]))
    samples, measured, predicted = samples[: len(configs)], measured[: len(configs)], predicted[: len(configs)]
    error = np.abs(predicted * scale / measured - 1)
    raw = np.abs(predicted / measured - 1)
    aligned = np.array([width % 16 == 0 for _, width in configs])
    return {
        "widths": len(configs),
        "scale": scale,
        "median": float(np.median(error)),
        "p95": float(np.percentile(error, 95)),
        "median_aligned": float(np.median(error[aligned])),
        "median_others": float(np.median(error[~aligned])),
        "raw_median": float(np.median(raw)),
        "raw_p95": float(np.percentile(raw, 95)),
        "half_width": min(1.0, float(np.median([s.relative_half_width for s in samples]))),
        "worst": [[str(configs[i][0]), configs[i][1], float(error[i])] for i in np.argsort(-error)[:5]],
    }


def step_networks(args: argparse.Namespace) -> dict[str, Any]:
    """Measure random networks whole and compare."""
    result = check_table(
        load_table(args.table), load_space(args.space), args.architectures, args.seed, budget_s=args.budget_s / 2
    )
    facts = asdict(result)
    return {name: value for name, value in facts.items() if name not in ("predicted_ms", "measured_ms")}


def held_out_widths(table: LatencyTable, space: Any, count: int, seed: int) -> list[Config]:
    """`count` random (key, width) that are no knots, half of them multiples of 16 where the curve has any."""
    rng = np.random.default_rng((seed, 3))
    ranges = searchable_ranges(space)
    keys = list(ranges)
    result: list[Config] = []
    while len(result) < count:
        key = keys[int(rng.integers(len(keys)))]
        low, high = ranges[key]
        width = int(rng.integers(low, high + 1))
        if len(result) % 2 == 0:
            width = width // 16 * 16
        if low <= width <= high and width not in table.curves[key].widths and (key, width) not in result:
            result.append((key, width))
    return result


def agreement(first: LatencyTable, other: LatencyTable) -> dict[str, float]:
    """Relative differences of two tables over the knots of both, after one common scale."""
    found = compare_tables(first, other)
    return {
        "entries": found.entries,
        "scale": found.scale,
        "median": found.deviation_median,
        "p95": found.deviation_p95,
    }


STEPS = {"build": step_build, "held_out": step_held_out, "networks": step_networks}


def in_fresh_process(args: argparse.Namespace, step: str, table: Path, seed: int) -> dict[str, Any]:
    """Run one step of this script in a process of its own and return what it found."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [*shlex.split(args.prefix), sys.executable, __file__, "--step", step, "--table", str(table)]
        for name in ("space", *CONDITIONS, "budget_s", "held_out", "architectures"):
            command += [f"--{name}", str(getattr(args, name))]
        command += ["--seed", str(seed), "--json", str(answer)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
        result: dict[str, Any] = json.loads(answer.read_text())
    # the mean number of running processes over the last minute: more than this one means an unquiet machine
    return result | {"load_average": os.getloadavg()[0]}


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """Build the tables, then ask the questions about the first."""
    result: dict[str, Any] = {
        "machine": {"device": device_name(args.device), "cores": os.cpu_count(), "torch": torch.__version__},
        "space": args.space,
        "conditions": {name: getattr(args, name) for name in CONDITIONS},
        "budget_s": args.budget_s,
    }
    folder = Path(args.tables or tempfile.mkdtemp(prefix="lut_accuracy_"))
    folder.mkdir(parents=True, exist_ok=True)
    tables = [folder / f"{args.space}-{args.layout}-{i}.json" for i in range(args.builds)]
    result["builds"] = []
    for i, table in enumerate(tables):
        result["builds"].append(in_fresh_process(args, "build", table, seed=i))
        print(json.dumps({"build": i, "seconds": result["builds"][-1]["seconds"]}), flush=True)
        if i == 0:
            for step in ("networks", "held_out"):
                result[step] = in_fresh_process(args, step, table, seed=0)
                print(json.dumps({step: result[step]}), flush=True)
    loaded = [load_table(table) for table in tables]
    result["agreement"] = [agreement(loaded[0], other) for other in loaded[1:]]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="imagenet")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--layout", default="nchw", choices=("nchw", "channels_last"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget_s", type=float, default=240.0, help="seconds a table; half of it for each question")
    parser.add_argument("--builds", type=int, default=3)
    parser.add_argument("--architectures", type=int, default=40)
    parser.add_argument("--held_out", type=int, default=120)
    parser.add_argument("--tables", help="folder to keep the tables in")
    parser.add_argument("--prefix", default="", help="command before each measuring process")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    result = STEPS[args.step](args) if args.step else run_all(args)
    text = json.dumps(result, indent=1)
    if args.json:
        write_text_atomically(args.json, text + "\n")
    if not args.step:
        print(text)


if __name__ == "__main__":
    main()
