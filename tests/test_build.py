"""The build's decisions: which sources, which compiler, CUDA or not."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def toolchain() -> ModuleType:
    return load("_toolchain")


def test_the_torch_that_is_there_is_the_one_required() -> None:
    backend = load("_build")
    installed = importlib.metadata.version("torch")
    assert backend.find_torch(sys.path) == installed
    assert backend.torch_requirement(installed) == f"torch=={installed}"
    assert backend.torch_requirement(None) == "torch>=2.10"
    assert backend.get_requires_for_build_wheel() == []


def test_torch_is_fetched_for_a_build_only(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load("_build")
    monkeypatch.setattr(backend, "find_torch", lambda folders=None: None)
    monkeypatch.setattr(backend._toolchain, "native_problem", lambda: None)
    monkeypatch.delenv("TFNAS_TORCH", raising=False)
    assert backend.get_requires_for_build_wheel() == [backend.TORCH_RANGE]
    monkeypatch.setenv("TFNAS_TORCH", "torch==2.13.0")
    assert backend.get_requires_for_build_editable() == ["torch==2.13.0"]
    monkeypatch.setattr(backend._toolchain, "native_problem", lambda: "no compiler")
    assert backend.get_requires_for_build_wheel() == []


def test_native_module_can_be_left_out(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFNAS_NATIVE", "0")
    assert "TFNAS_NATIVE=0" in toolchain.native_problem()


def test_every_source_exists_and_every_native_file_is_listed() -> None:
    groups = ("ops", "cpu", "cuda", "engine", "timing", "bindings")
    torch_free = ("torch_free", "torch_free_kernels", "torch_free_tests", "kernel_tests")
    listed = {file for group in (*groups, *torch_free) for file in SOURCES[group]} | set(SOURCES["cpu_per_isa"])
    assert [file for file in sorted(listed) if not (ROOT / file).is_file()] == []
    folders = (ROOT / "csrc", ROOT / "tests" / "native")
    present = {str(file.relative_to(ROOT)) for folder in folders for file in folder.rglob("*.c[pu]*")}
    sources = {file for file in present if file.endswith((".cpp", ".cu"))}
    assert sources - listed == set(), "add these to csrc/sources.json"
    for file, isas in SOURCES["cpu_per_isa"].items():
        assert set(isas) <= set(SOURCES["isa_flags"]), file


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_objects_for_one_instruction_set_define_nothing_that_others_share() -> None:
    """A weak symbol of an AVX-512 object that common code has too could replace it, and crash older processors."""
    objects = {isa: list((ROOT / "build").glob(f"torch-*/temp.*/{isa}/**/*.o")) for isa in SOURCES["isa_flags"]}
    if not any(objects.values()):
        pytest.skip("nothing was compiled per instruction set in this folder")
    for isa, files in objects.items():
        for file in files:
            symbols = subprocess.run(["nm", "-C", str(file)], capture_output=True, text=True, check=True).stdout
            weak = [line for line in symbols.splitlines() if line[16:].startswith((" W ", " V ", " u "))]
            # The personality routine's reference is the same in every object, whatever its instruction set.
            shared = [line for line in weak if f"::{isa}::" not in line and "DW.ref." not in line]
            assert shared == [], file


def test_kernels_include_no_torch_header() -> None:
    for file in sorted((ROOT / "csrc" / "kernels").glob("*")):
        for line in file.read_text().splitlines():
            assert not line.startswith(("#include <torch", "#include <ATen", "#include <c10")), f"{file}: {line}"


def test_architectures_of_nvcc_flags(toolchain: ModuleType) -> None:
    flags = [f"-gencode=arch=compute_{code}" for code in ("90,code=compute_90", "120,code=sm_120", "80,code=sm_80")]
    assert toolchain.architectures(flags) == ("sm_80", "sm_120", "compute_90")
    assert toolchain.architectures(["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"]) == ("sm_90a", "compute_90a")
    assert toolchain.architectures([]) == ()


def test_missing_compiler_is_a_reason_not_a_crash(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "no C++ compiler (/nonexistent/c++)" in toolchain.compiler_problem()


@pytest.mark.skipif(os.name != "posix", reason="needs a shell script")
def test_a_compiler_that_fails_is_a_reason(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "old-c++"
    compiler.write_text("#!/bin/sh\necho 'error: unrecognized option -std=c++20' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "could not compile C++20" in toolchain.compiler_problem()
    assert "unrecognized option" in toolchain.compiler_problem()


def test_cuda_decision(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = toolchain.Nvcc("/opt/cuda", "13.0")
    monkeypatch.delenv("TFNAS_CUDA", raising=False)
    assert toolchain.cuda_problem("13.2", nvcc, ["a.cu"]) is None
    assert "torch is a CPU build" in toolchain.cuda_problem(None, nvcc, ["a.cu"])
    assert "nvcc was not found" in toolchain.cuda_problem("13.0", None, ["a.cu"])
    assert "nvcc is 13.0 (/opt/cuda) but torch was built with CUDA 12.8" in toolchain.cuda_problem(
        "12.8", nvcc, ["a.cu"]
    )
    assert "no CUDA sources" in toolchain.cuda_problem("13.0", nvcc, [])
    monkeypatch.setenv("TFNAS_CUDA", "0")
    assert toolchain.cuda_problem("13.0", nvcc, ["a.cu"]) == "TFNAS_CUDA=0"
    monkeypatch.setenv("TFNAS_CUDA", "1")
    assert toolchain.cuda_problem("13.0", nvcc, ["a.cu"]) is None
    with pytest.raises(SystemExit, match="TFNAS_CUDA=1, but torch is a CPU build"):
        toolchain.cuda_problem(None, nvcc, ["a.cu"])
    monkeypatch.setenv("TFNAS_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        toolchain.cuda_problem("13.0", nvcc, ["a.cu"])
