"""Taking a network elsewhere: safetensors, ONNX, timm, the published code's configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tfnas.architecture import Architecture
from tfnas.files import read_json, write_bytes_atomically, write_text_atomically
from tfnas.network import Network
from tfnas.published_config import save_published_config
from tfnas.timm_export import timm_block_strings, to_timm
from tfnas.weights import save_weights

ONNX_TOLERANCE = 1e-4
TIMM_TOLERANCE = 1e-5
_CHECKED_BATCHES = (1, 3)


class ExportMismatch(RuntimeError):
    """The exported network gives other logits than this one; nothing was written."""


def export_state_dict(path: str | os.PathLike[str], network: Network, facts: Mapping[str, str] | None = None) -> None:
    """Write weights and statistics as safetensors, under timm's block names; `facts` go into the header."""
    save_weights(path, network.state_dict(), facts)


def export_published_config(path: str | os.PathLike[str], arch: Architecture) -> None:
    """Write the published code's `model.config` (JSON); see `published_config.to_published_config`."""
    save_published_config(path, arch)


def export_timm(path: str | os.PathLike[str], network: Network) -> float:
    """Write what timm needs: weights under its names (safetensors, at `path`), and beside them a JSON description.

    The description, `path` with the suffix `.json`, holds the block strings and the constructor's other arguments.
    Returns the largest difference of the logits between timm's network and this one; raises `ExportMismatch` above
    1e-5 (of the largest logit), `ImportError` without timm, `ValueError` where both files would have one name, or where
    the description's belongs to a file of another kind.
    """
    path = Path(path)
    if path.suffix == ".json":
        raise ValueError(
            f"output {path}: the weights need another name than the description, such as {path.stem}.safetensors"
        )
    described = path.with_suffix(".json")
    if described.exists() and not _is_description(described):
        raise ValueError(
            f"output {path}: the description would replace {described}, which is something else; take another name"
        )
    network = network.eval()
    model = to_timm(network).eval()
    images = _images(network.architecture, max(_CHECKED_BATCHES))
    with torch.no_grad():
        difference = _difference(model(images).numpy(), network(images).numpy(), TIMM_TOLERANCE, "timm")
    space = network.architecture.space
    description: dict[str, Any] = {
        "arch_def": timm_block_strings(network.architecture),
        "widths": [[op.width for op in ops] for ops in network.architecture.stages],
        "num_classes": space.num_classes,
        "num_features": space.head_channels,
        "in_chans": space.image_channels,
        "stem_size": space.stem_channels,
        "stem_stride": space.stem_stride,
        "stem_act": space.stem_act,
        "head_act": space.head_act,
        "input_size": [space.image_channels, space.resolution, space.resolution],
    }
    save_weights(path, model.state_dict())
    write_text_atomically(described, json.dumps(description, indent=1) + "\n")
    return difference


def _is_description(path: Path) -> bool:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "arch_def" in values


def export_onnx(path: str | os.PathLike[str], network: Network, resolution: int | None = None) -> float | None:
    """Write one ONNX file: input `images` [batch, C, H, W], output `logits` [batch, classes], the batch dynamic.

    Height and width are fixed (`resolution`; None takes the space's). Where onnxruntime is installed the file is run
    with batches of one and three before it is written: the return value is the largest difference of the logits, None
    where it was not checked. Raises `ExportMismatch` above 1e-4 (of the largest logit), `ImportError` without the
    libraries that write ONNX.
    """
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution: expected at least 1, got {resolution}")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"exporting to ONNX needs onnx and onnxscript ({error}): pip install 'tfnas-ext[export]'"
        ) from (error)
    network = network.eval().cpu()
    images = _images(network.architecture, 2, resolution)
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # torch.onnx.export returns nothing only where it writes the file itself
    data = program.model_proto.SerializeToString()
    difference = _check_onnx(data, network, resolution)
    write_bytes_atomically(path, data)
    return difference


def _check_onnx(data: bytes, network: Network, resolution: int | None) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in _CHECKED_BATCHES:
        images = _images(network.architecture, batch, resolution)
        (theirs,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            ours = network(images).numpy()
        largest = max(largest, _difference(theirs, ours, ONNX_TOLERANCE, "onnxruntime"))
    return largest


def _difference(theirs: np.ndarray, ours: np.ndarray, tolerance: float, name: str) -> float:
    """Largest absolute difference of the logits; tolerated up to `tolerance` times the largest logit."""
    difference = float(np.abs(theirs - ours).max())
    if not difference <= tolerance * float(np.abs(ours).max()):
        raise ExportMismatch(f"{name} gives other logits: they differ by up to {difference:.3g}; nothing was written")
    return difference


def _images(arch: Architecture, batch: int, resolution: int | None = None) -> torch.Tensor:
    size = arch.space.resolution if resolution is None else resolution
    shape = (batch, arch.space.image_channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch))
