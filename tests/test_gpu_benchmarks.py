"""What the GPU check and its benchmarks say and compute without a GPU."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from naive_supernet import tiny_space
from tfnas.supernet import Supernet

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("gpu_step", "gpu_kernels", "data_loading", "gpu_summary")
KERNELS = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "kernels").glob("*.cuh")))


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_dry_run_lists_what_would_run() -> None:
    done = subprocess.run(["benchmarks/gpu_check.sh", "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (
        "build_ext",
        "test_engine_gpu.py",
        "memcheck",
        "racecheck",
        "synccheck",
        "gpu_step.py",
        "gpu_kernels.py",
    ):
        assert word in done.stdout
    # named --kernel-regex before CUDA 12.3, which no torch here has
    assert done.stdout.count("--kernel-name kns=tfnas --report-api-errors no --error-exitcode 1") == 3
    for path in re.findall(r"(?:tests|benchmarks)/\w+\.py", done.stdout):
        assert (ROOT / path).exists(), path
    limits = [int(seconds) for seconds in re.findall(r"at most (\d+) s", done.stdout)]
    assert len(limits) == 10
    assert sum(limits) <= 600
    assert subprocess.run(["benchmarks/gpu_check.sh", "--nonsense"], cwd=ROOT, capture_output=True).returncode == 2


def test_every_script_of_the_check_knows_its_options() -> None:
    """Each starts without a GPU as far as its help, which names what the check gives it."""
    done = subprocess.run(["benchmarks/gpu_check.sh", "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    commands = re.findall(r"(benchmarks/\w+\.py) (.*)", done.stdout)
    assert [script for script, _ in commands] == [f"benchmarks/{name}.py" for name in SCRIPTS]
    starts = [
        subprocess.Popen([sys.executable, script, "--help"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for script, _ in commands
    ]
    for start, (script, arguments) in zip(starts, commands, strict=True):
        text, _ = start.communicate(timeout=120)
        assert start.returncode == 0, script
        for option in re.findall(r"--[\w-]+", arguments):
            assert re.search(rf"{option}\b", text), f"{script} {option}"


def test_the_sanitizers_selection_has_a_test() -> None:
    selection = re.search(r'-k "([^"]+)"', (ROOT / "benchmarks" / "gpu_check.sh").read_text())
    assert selection is not None
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_engine_gpu.py", "-k", selection[1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "test_against_plain_pytorch" in done.stdout, done.stdout


def test_every_floor_is_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = benchmark("gpu_kernels", monkeypatch)
    for pattern in kernels.FLOORS:
        name = re.split("[<]", pattern)[0]
        assert re.search(rf"\b{name}\(", KERNELS), pattern
    name = "void tfnas::cuda::project_backward<float, (tfnas::cuda::Math)1, 4, (tfnas::cuda::DzMode)1>(Args<float>)"
    assert kernels.floor_of(name) == "project_backward<.*1>"
    assert kernels.floor_of("void tfnas::cuda::finish_stats<float>(float*)") is None
    sizes = kernels.LayerBytes(x=1, out=10, wide_out=1000, y3=10000, parts=100000, dh1=100)
    assert kernels.FLOORS["depthwise_backward"](sizes) == 102101


def test_kernel_times_are_medians_of_one_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profile:
        def __init__(self, activities: list[object]) -> None:
            pass

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[SimpleNamespace]:
            def event(name: str, us: float) -> SimpleNamespace:
                return SimpleNamespace(name=name, time_range=SimpleNamespace(elapsed_us=lambda: us))

            return [event("once", us) for us in (3, 90, 5)] + [event("twice", us) for us in (1, 2, 2, 2, 9, 1)]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[int] = []
    kernels = benchmark("gpu_kernels", monkeypatch)
    assert kernels.kernel_times_us(lambda: calls.append(1), 3) == {"once": 5, "twice": 4}
    assert len(calls) == 3


def test_profiled_events_have_names_and_times() -> None:
    """What `kernel_times_us` reads of an event, from a profile of the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).sum()
    assert any(event.name == "aten::sum" and event.time_range.elapsed_us() > 0 for event in profile.events())


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_calls_of_one_step_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a profile of the CPU, operators in place of launches and waits."""
    step_benchmark = benchmark("gpu_step", monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(step_benchmark, "LAUNCH", re.compile("aten::add$"))
    monkeypatch.setattr(step_benchmark, "WAIT", re.compile("aten::mul$"))
    x = torch.ones(3)
    assert step_benchmark.host_calls(lambda: x + x + x + x * x) == (3, 1)


def test_summary_of_what_is_there(tmp_path: Path) -> None:
    step = {"step": "W", "precision": "tf32", "engine": "cuda graph", "median_ms": 1.5, "ratio_vs_best_plain": 8.25}
    step |= {"peak_bytes": 2_400_000_000, "launches": 1, "synchronisations": 0}
    kernel = {"step": "A", "dtype": "float32", "kernel": "expand_dw", "us": 1500, "gb_per_s": 2400.4}
    results = {"step": [step], "kernels": [kernel | {"share_of_copy": 0.8}]}
    for part, rows in results.items():
        (tmp_path / f"day-{part}.json").write_text(json.dumps({"device": "GPU", "rows": rows}))
    command = [sys.executable, "benchmarks/gpu_summary.py", str(tmp_path / "day")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merged = json.loads((tmp_path / "day.json").read_text())
    assert {part: result["rows"] for part, result in merged.items()} == results
    lines = (tmp_path / "day.md").read_text().splitlines()
    assert "| W | tf32 | cuda graph | 1.500 | 8.25 | 2.40 | 1 | 0 |" in lines
    assert "| A | float32 | `expand_dw` | 1.500 | 2400 | 80 |" in lines
    empty = subprocess.run([*command[:-1], str(tmp_path / "other")], cwd=ROOT, capture_output=True, text=True)
    assert empty.returncode == 1
    assert "none of its results" in empty.stderr


def test_benchmarked_steps_compute_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    supernet = Supernet(tiny_space(), "reference")
    images, labels = torch.randn(2, 3, 9, 9), torch.randint(0, 5, (2,))
    steps = benchmark("gpu_step", monkeypatch).make_steps(supernet, images, labels, seed=1)
    for step in steps.values():
        assert math.isfinite(float(step()))
