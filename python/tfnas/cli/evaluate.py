"""`tfnas evaluate`: accuracy of a trained network on the test images, its latency measured against the table."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import Any

import torch

from tfnas.architecture import Architecture
from tfnas.cli.codes import OK
from tfnas.data import build_data
from tfnas.evaluate import evaluate_network
from tfnas.latency.lut_io import load_table
from tfnas.pipeline import choose_device, data_options, on_device
from tfnas.target import measured_latency_ms
from tfnas.threads import use_threads
from tfnas.train_config import TrainConfig
from tfnas.trained import find_in_run, require_classes, with_facts
from tfnas.weights import network_with, read_facts
from tfnas_ext import accelerate


def evaluate(
    run: Path,
    weights: str = "best",
    data: str | None = None,
    lut: Path | None = None,
    skip_latency: bool = False,
    device: str = "auto",
    threads: int | None = None,
    json: bool = False,
) -> int:
    """Accuracy of a trained network on the test images, its latency measured against the table.

    Args:
        run: Folder of a training, or of a search whose network has been trained there.
        weights: `best` or `last`.
        data: Images, where not those of the training; normalised as those were.
        lut: Latency table; null takes the search's.
        skip_latency: Leave out measuring the latency, which is done where the table is of this machine.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`; of the accuracy, not of the latency.
        threads: CPU threads; null takes PyTorch's choice.
        json: Print one JSON object.

    Returns:
        The exit code.
    """
    found = find_in_run(run, weights)
    if found.training is None or found.weights is None:
        raise ValueError(f"run {run} has no {weights} weights; train it by `tfnas train --run {run}`")
    config = found.training if data is None else _with_data(found.training, data)
    # What can be refused at once is not refused after the images.
    table_file = lut or found.table
    table = load_table(table_file) if table_file is not None else None
    by_table = table.architecture_ms(found.architecture) if table is not None else None
    facts: dict[str, Any] = {"run": str(run), "weights": str(found.weights), "data": config.data}
    use_threads(threads)
    chosen = choose_device(device)
    with on_device(chosen):
        facts |= _accuracy(config, found.architecture, found.weights, chosen)
    if table is not None:
        facts["lut_latency_ms"] = by_table
        measured, reason = (None, "not asked for") if skip_latency else measured_latency_ms(found.architecture, table)
        facts["measured_latency_ms"] = measured
        if reason is not None:
            facts["not_measured_because"] = reason
    if json:
        print(json_format.dumps(facts, indent=1))
    else:
        print("\n".join(_lines(facts)))
    return OK


def _with_data(config: TrainConfig, data: str) -> TrainConfig:
    """Other images; nothing said about where the training's own lie holds for them."""
    return dataclasses.replace(
        config, data=data, dataset=dataclasses.replace(config.dataset, format="auto", test_source=None)
    )


def _accuracy(config: TrainConfig, arch: Architecture, weights: Path, device: torch.device) -> dict[str, Any]:
    trained_on = read_facts(weights)
    config = dataclasses.replace(config, dataset=with_facts(config.dataset, trained_on))
    space = dataclasses.replace(arch.space, resolution=config.resolution or arch.space.resolution)
    images = build_data(data_options(config, space, device), config.seed)
    if images.test is None:
        raise ValueError(f"data {config.data} has no test images; name others by --data")
    if images.num_classes != arch.space.num_classes:
        raise ValueError(
            f"data {config.data} has {images.num_classes} classes, the trained network {arch.space.num_classes}"
        )
    require_classes(images, config.data, trained_on)
    network = network_with(arch, weights).to(device).to(memory_format=torch.channels_last)
    accelerate(network)  # on a CPU: batch norms folded, one fused forward pass a block
    result = evaluate_network(network, images.test.epoch(0), config.precision)
    return {"selected_by": config.validation, **dataclasses.asdict(result)}


def _lines(facts: dict[str, Any]) -> list[str]:
    top5 = f", top-5 {100 * facts['top5']:.2f} %" if facts["top5"] is not None else ""
    remark = " (the weights were chosen by these same images)" if facts["selected_by"] == "test" else ""
    lines = [
        f"{facts['weights']} on {facts['images']} test images of {facts['data']}",
        f"top-1 {100 * facts['top1']:.2f} %{top5}, loss {facts['loss']:.4f}{remark}",
    ]
    if "lut_latency_ms" in facts:
        by_table, measured = facts["lut_latency_ms"], facts["measured_latency_ms"]
        against = f"not measured: {facts.get('not_measured_because')}"
        if measured is not None:
            against = f"measured {measured:.4f} ms ({100 * (measured / by_table - 1):+.1f} %)"
        lines.append(f"latency {by_table:.4f} ms by the table, {against}")
    return lines
