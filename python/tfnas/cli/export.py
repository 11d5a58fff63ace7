"""`tfnas export`: a network as safetensors, ONNX, timm weights and strings, or the published code's configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from tfnas.architecture import load_architecture
from tfnas.cli.codes import FAILED, OK
from tfnas.export import (
    ExportMismatch,
    export_onnx,
    export_published_config,
    export_state_dict,
    export_timm,
)
from tfnas.trained import IMAGES_FACTS, find_in_run
from tfnas.weights import fresh_network, network_with, read_facts


def export(
    format: Literal["state-dict", "onnx", "timm", "published-config"],
    output: Path,
    run: Path | None = None,
    architecture: str | None = None,
    weights: str = "best",
    seed: int = 0,
    resolution: int | None = None,
) -> int:
    """Write a network in a format that other programs read.

    Args:
        format: `state-dict` (safetensors), `onnx` (batch dynamic), `timm` (safetensors and a JSON description beside
            them), `published-config` (the published code's model.config, without weights).
        output: File to write.
        run: Folder of a training, or of a search whose network has been trained there.
        architecture: Architecture file, or a built-in name (`tf-nas-a`), instead of a run.
        weights: With a run, `best` or `last`; with an architecture, a safetensors file; `fresh` for random weights.
        seed: Of fresh weights.
        resolution: Height and width of the ONNX input; null takes the search space's.

    Returns:
        The exit code.
    """
    if (run is None) == (architecture is None):
        raise ValueError("name the network by --run or by --architecture, one of the two")
    if resolution is not None and format != "onnx":
        raise ValueError(f"--resolution is of the ONNX input; format {format} has none")
    if not output.parent.is_dir():
        raise ValueError(f"output {output}: its folder does not exist")
    if run is not None:
        found = find_in_run(run, "best" if weights == "fresh" else weights)
        arch, file = found.architecture, found.weights
        if file is None and weights != "fresh" and format != "published-config":
            raise ValueError(
                f"run {run} has no trained weights; train it by `tfnas train --run {run}`, or take --weights fresh"
            )
    else:
        arch, _ = load_architecture(str(architecture))
        file = None if weights in ("best", "fresh") else Path(weights)
        if weights == "best" and format != "published-config":
            raise ValueError("with --architecture, name the weights by --weights: a safetensors file, or fresh")
    if format == "published-config":
        export_published_config(output, arch)
        print(f"written to {output}")
        return OK
    network = fresh_network(arch, seed) if file is None or weights == "fresh" else network_with(arch, file)
    try:
        if format == "state-dict":
            export_state_dict(output, network, _facts(file) if weights != "fresh" else None)
            print(f"written to {output}")
        elif format == "onnx":
            difference = export_onnx(output, network, resolution)
            checked = "not checked: onnxruntime is not installed"
            if difference is not None:
                checked = f"onnxruntime gives the same logits up to {difference:.2g}"
            print(f"written to {output} ({checked})")
        else:
            difference = export_timm(output, network)
            print(f"written to {output} and {output.with_suffix('.json')} (same logits in timm up to {difference:.2g})")
    except (ExportMismatch, ImportError) as error:
        print(f"tfnas export: error: {error}", file=sys.stderr)
        return FAILED
    return OK


def _facts(file: Path | None) -> dict[str, str]:
    """What the header of the weights says of the images they are for."""
    facts = read_facts(file) if file is not None else {}
    return {name: facts[name] for name in IMAGES_FACTS if name in facts}
