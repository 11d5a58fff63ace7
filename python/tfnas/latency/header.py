"""What a table's header says about where and how it was measured."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tfnas.latency.engine import Conditions
from tfnas.space import Space
from tfnas_ext import __version__
from tfnas_ext.backends import cpu_capability
from tfnas_ext.timing_host import cpu_name

MACHINE_ID = Path("/etc/machine-id")


def describe_conditions(conditions: Conditions, space: Space, allocator: dict[str, int] | None) -> dict[str, Any]:
    """Device, engine, batch, resolution, dtype, TF32, layout, threads, versions, allocator and the date (UTC)."""
    return conditions.as_dict() | {
        "device": device_name(conditions.device),
        "device_type": torch.device(conditions.device).type,
        "device_uuid": device_uuid(conditions.device),
        "space": space.name,
        "resolution": space.resolution,
        "engine_version": engine_version(conditions.engine),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tf32": tf32_use(conditions),
        "gpu": gpu_facts(conditions.device),
        "python": platform.python_version(),
        "allocator": allocator,
        "unit": "ms",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def engine_version(engine: str) -> str | None:
    """Version of what runs the networks where torch's does not say it: onnxruntime, or the kernels here; else None."""
    if engine == "onnxruntime":
        with suppress(ImportError):
            return str(import_module("onnxruntime").__version__)
    return f"{__version__}, {cpu_capability()}" if engine == "fused" else None


def tf32_use(conditions: Conditions) -> str | None:
    """What torch computes in TF32 on a GPU: "matmul", "convolutions", both or "none"; None where it has no say."""
    on_gpu = torch.device(conditions.device).type == "cuda"
    if not on_gpu or conditions.engine == "onnxruntime" or conditions.dtype != "float32":
        return None
    settings = {"matmul": torch.backends.cuda.matmul, "convolutions": torch.backends.cudnn.conv}  # type: ignore[attr-defined]
    return ", ".join(name for name, of in settings.items() if of.fp32_precision == "tf32") or "none"


def gpu_facts(device: str) -> dict[str, str]:
    """Driver version and maximum SM clock as `nvidia-smi` gives them; empty for a CPU or without `nvidia-smi`."""
    if torch.device(device).type != "cuda":
        return {}
    wanted = ("driver_version", "clocks.max.sm")
    command = ["nvidia-smi", f"--id={device_uuid(device)}", f"--query-gpu={','.join(wanted)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(wanted, (value.strip() for value in answer.split(",")), strict=False))


def device_of(header: Mapping[str, Any]) -> str:
    """The device that a header names: of several GPUs the very one where it is here, `cpu` where none is named."""
    kind: str = header.get("device_type") or "cpu"
    count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    here = [f"cuda:{index}" for index in range(count)]
    return next((device for device in here if device_uuid(device) == header.get("device_uuid")), kind)


def device_name(device: str) -> str:
    """The processor's or the GPU's name."""
    return cpu_name() if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)


def device_uuid(device: str) -> str:
    """Tells one machine from another: the GPU's UUID, or a digest of the machine's id and processor.

    Without an id, as in most containers, of the number of cores and the processor: a host name is drawn anew there.
    """
    if torch.device(device).type == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    machine = ""
    with suppress(OSError):
        machine = MACHINE_ID.read_text(encoding="utf-8").strip()
    if machine in ("", "uninitialized"):
        machine = f"{os.cpu_count()} cores"
    return hashlib.sha256(f"{machine} {cpu_name()}".encode()).hexdigest()[:16]
