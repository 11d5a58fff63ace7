"""Loads the native module `tfnas_ext._C` if it was built for the torch that is installed. Warns once if not."""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

REINSTALL = "pip install --force-reinstall --no-deps ."
BUILD_IN_PLACE = "python setup.py build_ext --inplace"


@dataclass(frozen=True)
class BuildInfo:
    """What was compiled into the package.

    `native` is False where no module was compiled, with `reason`; `cuda_version` (of nvcc) and `cuda_archs` are empty
    where it has no CUDA kernels, with `cuda_reason`. `cuda_archs` are machine code (`sm_90`) and PTX (`compute_90`, for
    GPUs from there on); `isas` are the instruction sets of the CPU kernels.
    """

    native: bool
    reason: str = ""
    torch_version: str = ""
    cuda_version: str = ""
    cuda_archs: tuple[str, ...] = ()
    cuda_reason: str = ""
    isas: tuple[str, ...] = ()


def read_build_info() -> BuildInfo:
    try:
        written = importlib.import_module("tfnas_ext._build_info")
    except ModuleNotFoundError:
        folder = os.path.dirname(os.path.dirname(__file__))
        return BuildInfo(
            native=False,
            reason=f"{folder} holds sources; start elsewhere to use an installed copy, or run: {BUILD_IN_PLACE}",
        )
    return BuildInfo(
        native=written.native,
        reason=written.reason,
        torch_version=written.torch_version,
        cuda_version=written.cuda_version,
        cuda_archs=tuple(written.cuda_archs),
        cuda_reason=written.cuda_reason,
        isas=tuple(written.isas),
    )


def _load(info: BuildInfo, torch_version: str) -> tuple[ModuleType | None, str]:
    """The module and an empty reason, or None and why it cannot be used and what to do."""
    if not info.native:
        if "run:" in info.reason or "TFNAS_NATIVE" in info.reason:
            return None, info.reason
        return None, f"{info.reason}; mend that and run, in the source folder: {REINSTALL}"
    if info.torch_version != torch_version:
        return None, (
            f"it was compiled for torch {info.torch_version}, but torch {torch_version} is installed; "
            f"run, in the source folder: {REINSTALL}"
        )
    try:
        return importlib.import_module("tfnas_ext._C"), ""
    except ImportError as error:
        return None, f"it does not load ({error}); run, in the source folder: {REINSTALL}"


INFO = read_build_info()
MODULE, REASON = _load(INFO, torch.__version__)

if MODULE is None and os.environ.get("TFNAS_BACKEND") != "reference":
    warnings.warn(
        f"tfnas_ext runs on the slow 'reference' backend, without its native module: {REASON} "
        "(TFNAS_BACKEND=reference silences this)",
        RuntimeWarning,
        stacklevel=2,
    )
