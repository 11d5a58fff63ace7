"""The CUDA kernels under the CPU emulator: compiled by the host compiler, run in three thread orders.

The sanitizer builds (`cmake -DTFNAS_SANITIZE=ON` and `=THREAD`) run here with TFNAS_SLOW=1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulator"
# ctest runs all of them; the sweep over all combinations in four precisions takes a minute to compile and run.
SWEEPS = ("test_identities",)
KERNEL_TESTS = [
    pytest.param(path.stem, marks=[pytest.mark.slow] if path.stem in SWEEPS else [])
    for path in sorted(EMULATOR.glob("test_*.cpp"))
]
PLANTED = (
    "missing_barrier",
    "barrier_after_return",
    "divergent_barriers",
    "exited_lane",
    "warp_against_block",
    "unwritten_shared",
    "too_many_threads",
    "too_much_shared",
)
CXX = os.environ.get("CXX", "c++")

pytestmark = pytest.mark.skipif(shutil.which(CXX.split()[0]) is None, reason=f"no C++ compiler ({CXX}) on PATH")


def run(*command: str, timeout_s: int = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator")


def compile_test(name: str, folder: Path) -> Path:
    program = folder / name
    if not program.exists():
        sources = [str(EMULATOR / "emulator.cpp"), str(EMULATOR / f"{name}.cpp")]
        include = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc' / 'kernels'}"]
        result = run(*CXX.split(), "-std=c++20", "-O1", "-w", "-DTFNAS_EMULATE", *include, *sources, "-o", str(program))
        assert result.returncode == 0, result.stderr
    return program


@pytest.mark.parametrize("name", KERNEL_TESTS)
def test_kernels_match_float64(name: str, build_folder: Path) -> None:
    result = run(str(compile_test(name, build_folder)))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_rejected(bug: str, build_folder: Path) -> None:
    result = run(str(compile_test("test_emulator", build_folder)), bug)
    assert result.returncode == 1, f"{bug} was accepted"
    assert "rejected:" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["ON", "THREAD"])
def test_sanitizers_find_only_what_was_planted(sanitize: str, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on PATH")
    configure = run("cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DTFNAS_SANITIZE={sanitize}")
    assert configure.returncode == 0, configure.stderr
    build = run("cmake", "--build", str(tmp_path), "-j", "2", timeout_s=900)
    assert build.returncode == 0, build.stdout + build.stderr
    result = run("ctest", "--test-dir", str(tmp_path), "--output-on-failure", timeout_s=1800)
    assert result.returncode == 0, result.stdout


def test_kernels_include_no_torch_header() -> None:
    files = list((ROOT / "csrc" / "kernels").iterdir())
    assert len(files) > 20
    for path in files:
        for line in path.read_text().splitlines():
            assert not re.match(r"\s*#\s*include\b.*(torch|ATen|c10|pybind11)", line), f"{path}: {line}"
