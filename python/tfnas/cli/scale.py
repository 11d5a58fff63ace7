"""`tfnas scale`: fit an architecture's widths to a latency target by a table (elasticity scaling, Algorithm 1)."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from tfnas.architecture import Architecture, architecture_to_dict, load_architecture, save_architecture
from tfnas.cli.codes import OK
from tfnas.latency.lut_io import load_table
from tfnas.scaling import ScalingResult, architecture_range_ms, fit_widths


def scale(
    architecture: str, lut: Path, target_latency_ms: float, output: Path | None = None, json: bool = False
) -> int:
    """Fit an architecture's widths to a target latency by a table (elasticity scaling, Algorithm 1).

    Operations and depths stay; every width stays within its candidate's bounds. A target below what the narrowest
    widths give ends with exit code 2 and the range of latencies within reach; nothing is written then.

    Args:
        architecture: Architecture file, or a built-in name (`tf-nas-a`).
        lut: Latency table.
        target_latency_ms: Latency to come up to from below, in ms.
        output: Architecture file to write.
        json: Print one JSON object.

    Returns:
        The exit code.
    """
    arch, _ = load_architecture(architecture)
    table = load_table(lut)
    result = fit_widths(arch, table, target_latency_ms)
    range_ms = architecture_range_ms(arch, table)
    if result.lut_latency_ms > target_latency_ms:
        raise ValueError(
            f"target_latency_ms {target_latency_ms:g} is out of reach: with its operations and depths {architecture} "
            f"has {range_ms[0]:.4f} to {range_ms[1]:.4f} ms by {lut}"
        )
    facts = {"target_latency_ms": target_latency_ms, "lut_latency_ms": result.lut_latency_ms}
    if output is not None:
        save_architecture(output, result.architecture, **facts)
    if json:
        more = {
            "range_ms": list(range_ms),
            "gammas": list(result.gammas),
            "binding": result.binding,
            "widths": [[op.width for op in ops] for ops in result.architecture.stages],
        }
        print(json_format.dumps(facts | more | {"architecture": architecture_to_dict(result.architecture)}, indent=1))
    else:
        print("\n".join(_lines(arch, result, target_latency_ms, range_ms)))
    return OK


def _lines(
    arch: Architecture, result: ScalingResult, target_latency_ms: float, range_ms: tuple[float, float]
) -> list[str]:
    first = arch.space.first_stage
    lines = [
        f"{result.lut_latency_ms:.4f} ms by the table, target {target_latency_ms:.4f} ms "
        f"(this network reaches {range_ms[0]:.4f} to {range_ms[1]:.4f} ms)"
    ]
    for step, gamma in enumerate(result.gammas):
        lines.append(f"stages {first + step}..{first + len(arch.stages) - 1}: gamma {gamma:.4f}")
    for (layer, old), (_, new) in zip(arch.layers(), result.architecture.layers(), strict=True):
        place = f"stage {layer.stage + first} layer {layer.position + 1}"
        lines.append(f"{place}: {new.candidate:<10} width {old.width:>5} -> {new.width:>5}")
    if result.binding == "maximum":
        lines.append("all widths are at their maximum: this network cannot be made slower")
    return lines
