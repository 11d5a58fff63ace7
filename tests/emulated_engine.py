"""The CUDA engine on CPU tensors: its launchers and kernels compiled by the host compiler for the emulator."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch

import tfnas_ext  # noqa: F401  (defines the operators, where the native module is built)
from tfnas_ext.engine import EngineFactory, register_engine
from tfnas_ext.engine_cuda import CudaEngine, shape_refusal
from tfnas_ext.engine_spec import BodySpec
from tfnas_ext.packed import PackedLayer

ROOT = Path(__file__).resolve().parents[1]
NAME = "cuda-emulated"


@cache
def _load() -> str | None:
    """Compile and load the emulated operators (half a minute of CPU time, once); why it cannot be done, or None."""
    if shutil.which("c++") is None or shutil.which("ninja") is None:
        return "needs a C++ compiler and ninja"
    from torch.utils.cpp_extension import load

    native = hasattr(torch.ops.tfnas, "_layer_forward")
    folder = ROOT / "build" / f"emulated-{torch.__version__}-{'native' if native else 'alone'}"
    folder.mkdir(parents=True, exist_ok=True)
    emulator = ROOT / "tests" / "emulator"
    sources = [str(emulator / "emulated_launchers.cpp"), str(emulator / "emulator.cpp")]
    for kernels in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if "<c10/" in kernels.read_text():  # the sampler's launcher: its kernels are tested without torch
            continue
        wrapper = folder / f"{kernels.stem}.cpp"
        text = f'#include "cuda/{kernels.name}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        sources.append(str(wrapper))
    flags = ["-O1", "-w", "-std=c++20", "-DTFNAS_EMULATE"]
    load(
        f"tfnas_emulated_{'native' if native else 'alone'}",
        sources,
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "csrc" / "kernels"), str(emulator)],
        extra_cflags=flags if native else [*flags, "-DTFNAS_DEFINE_OPERATORS"],
        build_directory=str(folder),
        is_python_module=False,
    )
    return None


_allowed = False


def _refusal(spec: BodySpec, layers: Sequence[PackedLayer]) -> str | None:
    return shape_refusal(spec) if _allowed else "for tests that ask for it"


@pytest.fixture
def emulated() -> Iterator[str]:
    """Name of an engine that is `CudaEngine` on emulated kernels, known to this test alone."""
    global _allowed
    problem = _load()
    if problem is not None:
        pytest.skip(problem)
    register_engine(NAME, EngineFactory(CudaEngine, _refusal))
    _allowed = True
    yield NAME
    _allowed = False
