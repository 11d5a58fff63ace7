"""Which kernels can run here, and why others cannot.

Three backends give the same numbers up to rounding: `cuda` (compiled CUDA kernels), `cpu` (compiled, for the widest
instruction set the processor has) and `reference` (plain PyTorch on any device). The environment variable
`TFNAS_BACKEND` forces one; `TFNAS_CPU_CAPABILITY` (generic, avx2, avx512, avx512_bf16) lowers the instruction set.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from types import ModuleType

import torch

from tfnas_ext import _native
from tfnas_ext._native import BuildInfo

BACKENDS = ("cuda", "cpu", "reference")
KERNEL_SIZES = (3, 5, 7)  # of the depthwise convolutions that compiled kernels know
CPU_CAPABILITIES = ("generic", "avx2", "avx512", "avx512_bf16")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run the call."""


@dataclass(frozen=True)
class Backend:
    """One row of `backend_report`: `reason` says why it is unavailable, or what it runs on."""

    name: str
    available: bool
    reason: str


def build_info() -> BuildInfo:
    """What was compiled into this installation."""
    return _native.INFO


def native_module() -> ModuleType | None:
    """The compiled module `tfnas_ext._C`, or None where it is missing or does not fit the installed torch."""
    return _native.MODULE


def cpu_capability() -> str | None:
    """Instruction set of the CPU kernels in use, or None without the native module.

    Raises:
        ValueError: `TFNAS_CPU_CAPABILITY` is no instruction set, or one that the processor lacks.
    """
    return None if _native.MODULE is None else _native.MODULE.cpu_capability()


def runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether a binary with `architectures` has code for a GPU of compute `capability`.

    Machine code (`sm_86`) runs on GPUs of its generation from its number on, PTX (`compute_86`) on every later one;
    `sm_90a` on that very one.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
        if match is None:
            continue
        compiled = (int(match[2]), int(match[3]))
        one_generation = match[1] == "sm" or match[4] == "f"
        if match[4] == "a":
            runs = compiled == capability
        elif one_generation:
            runs = compiled[0] == capability[0] and compiled[1] <= capability[1]
        else:
            runs = compiled <= capability
        if runs:
            return True
    return False


def missing_cuda_code(device: torch.device | str | None = None) -> str | None:
    """Why the compiled CUDA kernels have no code for `device` (default: the current one), and the remedy; or None."""
    capability, compiled = torch.cuda.get_device_capability(device), _native.INFO.cuda_archs
    if runs_on(capability, compiled):
        return None
    version = ".".join(str(part) for part in capability)
    return (
        f"{torch.cuda.get_device_name(device)} has compute capability {version}, for which this module has no code "
        f"(it has {', '.join(compiled)}); run, in the source folder: "
        f"TORCH_CUDA_ARCH_LIST={version} {_native.REINSTALL}"
    )


def _cuda() -> Backend:
    if _native.MODULE is None:
        return Backend("cuda", False, f"no native module: {_native.REASON}")
    if not _native.INFO.cuda_version:
        return Backend("cuda", False, f"built without CUDA kernels: {_native.INFO.cuda_reason}")
    built = f"built with CUDA {_native.INFO.cuda_version} for {', '.join(_native.INFO.cuda_archs)}"
    if not torch.cuda.is_available():
        return Backend("cuda", False, f"torch finds no CUDA device; {built}")
    problem = missing_cuda_code()
    return Backend("cuda", problem is None, problem or f"{torch.cuda.get_device_name()}; {built}")


def _cpu(capability: str) -> Backend:
    name = f"cpu ({capability})"
    if _native.MODULE is None:
        return Backend(name, False, f"no native module: {_native.REASON}")
    if capability not in _native.INFO.isas:
        return Backend(name, False, "not compiled for this kind of processor")
    best = _native.MODULE.best_cpu_capability()
    if CPU_CAPABILITIES.index(capability) > CPU_CAPABILITIES.index(best):
        return Backend(name, False, f"this processor has at most {best}")
    try:
        chosen = _native.MODULE.cpu_capability()
    except ValueError as error:
        return Backend(name, False, str(error))
    if capability == chosen:
        return Backend(name, True, "in use")
    return Backend(name, True, f"TFNAS_CPU_CAPABILITY={capability} would choose it; in use is {chosen}")


def backend_report() -> list[Backend]:
    """Every backend, fastest first, with the reason why it can or cannot run. Never raises."""
    rows = [_cuda(), *(_cpu(capability) for capability in reversed(CPU_CAPABILITIES))]
    return [*rows, Backend("reference", True, "plain PyTorch, any device")]


def choose_backend(device: torch.device | str, requested: str | None = None) -> str:
    """The backend for tensors on `device`: `requested`, else `TFNAS_BACKEND`, else the fastest that can run there.

    Returns:
        "cuda", "cpu" or "reference".

    Raises:
        ValueError: the name is none of those.
        BackendUnavailableError: the named backend cannot run on `device`; the message says why.
    """
    device = torch.device(device)
    source = "backend" if requested is not None else "TFNAS_BACKEND"
    name = requested if requested is not None else os.environ.get("TFNAS_BACKEND") or None
    if name is None or name == "auto":
        native = _native.MODULE is not None
        if device.type == "cpu" and native:
            return "cpu"
        return "cuda" if device.type == "cuda" and _cuda().available else "reference"
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference":
        return name
    if device.type != name:
        raise BackendUnavailableError(f"{source}={name}, but the tensors are on {device}; move them or use 'reference'")
    problem = None if _native.MODULE is not None else f"there is no native module: {_native.REASON}"
    if name == "cuda" and problem is None and not _cuda().available:
        problem = _cuda().reason
    if problem is not None:
        raise BackendUnavailableError(f"{source}={name}, but {problem}")
    return name
