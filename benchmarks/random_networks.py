"""Is the found network better than random ones of the same latency? All trained alike, with several seeds.

    python benchmarks/random_networks.py --run runs/NAME --config quickstart --json result.json
    python benchmarks/random_networks.py --run runs/NAME --networks 5 --seeds 0 1 2 --epochs 10

Options that are not this script's go to `tfnas train`.

Random networks have depths, operations and widths drawn uniformly; their widths are then scaled (Algorithm 1, then one
by one) to the found network's latency by the search's table, and those within 1 % below it are taken. Every network is
trained once for each seed, in a folder of its own under `--output`; a run that was stopped goes on where it was. The
accuracy is that on test images, which choose nothing (`validation: none` or `held_out`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from tfnas.architecture import Architecture, count_multiply_adds, load_architecture, save_architecture
from tfnas.cli.train import parse_train_arguments
from tfnas.files import write_text_atomically
from tfnas.latency.additivity import random_architectures
from tfnas.latency.lut import LatencyTable
from tfnas.latency.lut_io import load_table
from tfnas.run import ARCHITECTURE_FILE, METRICS_FILE, TABLE_FILE, read_metrics
from tfnas.scaling import fit_widths, refine_widths
from tfnas.train import train
from tfnas.versions import software_versions

TOLERANCE = 0.01
ATTEMPTS = 1000


def networks_of_latency(found: Architecture, table: LatencyTable, count: int, seed: int) -> list[Architecture]:
    """`count` random architectures of the found one's space that take as long by the table, up to 1 % less.

    Raises `ValueError` where a thousand draws do not have so many.
    """
    target_ms = table.architecture_ms(found)
    result: list[Architecture] = []
    for arch in random_architectures(found.space, ATTEMPTS, seed):
        scaled = refine_widths(fit_widths(arch, table, target_ms).architecture, table, target_ms)
        if (1 - TOLERANCE) * target_ms <= table.architecture_ms(scaled) <= target_ms:
            result.append(scaled)
        if len(result) == count:
            return result
    raise ValueError(f"only {len(result)} of {ATTEMPTS} random networks come within 1 % of {target_ms:.4f} ms")


def test_accuracy(folder: Path) -> float | None:
    """Of a finished training, else None."""
    path = folder / METRICS_FILE
    records = read_metrics(path) if path.is_file() else []
    if not records or records[-1]["kind"] != "end":
        return None
    test = records[-1]["test"]
    if test is None:
        raise ValueError(f"{folder}: the data has no test images to compare by; name others with --data")
    accuracy: float = test["top1"]
    return accuracy


def train_one(arguments: list[str], run: Path, folder: Path, arch: Architecture, seed: int) -> float:
    """Test accuracy of `arch` after a training in `folder`, begun, resumed, or found finished there."""
    done = test_accuracy(folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".json")
    save_architecture(path, arch)
    own = ["--run", str(run), "--architecture", str(path), "--output", str(folder), "--seed", str(seed)]
    train(parse_train_arguments([*arguments, *own, "--resume=true"]))
    accuracy = test_accuracy(folder)
    assert accuracy is not None
    return accuracy


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds: the found network's, the random ones', and how many of these it beats."""
    means = {row["network"]: statistics.mean(row["test_accuracy"].values()) for row in rows}
    found, others = means["found"], [mean for name, mean in means.items() if name != "found"]
    spread = statistics.stdev(others) if len(others) > 1 else 0.0
    beaten = sum(found > other for other in others)
    return {"found": found, "random_mean": statistics.mean(others), "random_stdev": spread, "beaten": beaten}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished search")
    parser.add_argument("--networks", type=int, default=5, help="random networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder of the trainings; default: RUN/random_networks")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args, arguments = parser.parse_known_args()
    output = args.output or args.run / "random_networks"
    found, _ = load_architecture(args.run / ARCHITECTURE_FILE)
    table = load_table(args.run / TABLE_FILE)
    drawn = networks_of_latency(found, table, args.networks, seed=0)
    networks = {"found": found} | {f"random{i}": arch for i, arch in enumerate(drawn)}
    rows: list[dict[str, Any]] = [
        {
            "network": name,
            "lut_latency_ms": table.architecture_ms(arch),
            "multiply_adds": count_multiply_adds(arch),
            "test_accuracy": {},
        }
        for name, arch in networks.items()
    ]
    for seed, row in itertools.product(args.seeds, rows):
        name = row["network"]
        accuracy = train_one(arguments, args.run, output / f"{name}-seed{seed}", networks[name], seed)
        row["test_accuracy"][str(seed)] = accuracy
        print(f"{name}, seed {seed}: {100 * accuracy:.2f} %", flush=True)
    result = {"benchmark": "random_networks", "train": arguments, "versions": software_versions()}
    result |= {"rows": rows, "summary": summary(rows)}
    for row in rows:
        accuracies = [100 * accuracy for accuracy in row["test_accuracy"].values()]
        print(f"{row['network']:>8}: {row['lut_latency_ms']:.3f} ms, mean {statistics.mean(accuracies):.2f} %")
    print(result["summary"])
    if args.json:
        write_text_atomically(args.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
