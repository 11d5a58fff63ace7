"""Versions of the software that took part, as recorded in run folders and shown by `tfnas info`."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from tfnas_ext import __version__


def software_versions() -> dict[str, str | None]:
    """Versions of tfnas, Python, torch, its CUDA, numpy and torchvision; None where something is not there."""
    return {
        "tfnas": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": _version("numpy"),
        "torchvision": _version("torchvision"),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
