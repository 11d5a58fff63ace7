"""Which backend runs, why others do not, and what the package says without its native module."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import tfnas_ext
from tfnas_ext import _native, backends

ROOT = Path(__file__).resolve().parents[1]

needs_native = pytest.mark.skipif(backends.native_module() is None, reason="native module not built")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new process that imports the very package this one has, installed or not."""
    folder = str(Path(tfnas_ext.__file__).parents[1])
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=folder,  # which `python -c` searches first
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_report_names_every_backend_and_reference_always_runs() -> None:
    report = tfnas_ext.backend_report()
    assert [row.name for row in report] == [
        "cuda",
        "cpu (avx512_bf16)",
        "cpu (avx512)",
        "cpu (avx2)",
        "cpu (generic)",
        "reference",
    ]
    assert all(row.reason for row in report)
    assert report[-1].available


def test_choose_backend_refuses_by_name_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFNAS_BACKEND", raising=False)
    assert tfnas_ext.choose_backend("cpu", "reference") == "reference"
    assert tfnas_ext.choose_backend("meta") == "reference"
    with pytest.raises(ValueError, match="backend must be one of auto, cuda, cpu, reference, got 'gpu'"):
        tfnas_ext.choose_backend("cpu", "gpu")
    with pytest.raises(tfnas_ext.BackendUnavailableError, match="the tensors are on cpu"):
        tfnas_ext.choose_backend("cpu", "cuda")
    monkeypatch.setenv("TFNAS_BACKEND", "reference")
    assert tfnas_ext.choose_backend("cpu") == "reference"
    monkeypatch.setenv("TFNAS_BACKEND", "fast")
    with pytest.raises(ValueError, match="TFNAS_BACKEND must be one of"):
        tfnas_ext.choose_backend("cpu")


def test_without_native_module_the_reason_is_in_every_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFNAS_BACKEND", raising=False)
    monkeypatch.setattr(_native, "MODULE", None)
    monkeypatch.setattr(_native, "REASON", "the reason")
    assert tfnas_ext.choose_backend("cpu") == "reference"
    assert backends.cpu_capability() is None
    with pytest.raises(tfnas_ext.BackendUnavailableError, match="the reason"):
        tfnas_ext.choose_backend("cpu", "cpu")
    report = tfnas_ext.backend_report()
    assert [row.available for row in report] == [False] * 5 + [True]
    assert all("the reason" in row.reason for row in report[:-1])


def test_module_built_for_another_torch_is_not_loaded() -> None:
    info = _native.BuildInfo(native=True, torch_version="1.0.0")
    module, reason = _native._load(info, torch.__version__)
    assert module is None
    assert "compiled for torch 1.0.0" in reason
    assert torch.__version__ in reason
    assert _native.REINSTALL in reason


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ("sm_80", "sm_90", "compute_90"), True),
        ((8, 9), ("sm_80", "sm_90", "compute_90"), True),  # machine code of its generation
        ((7, 5), ("sm_80", "sm_90", "compute_90"), False),  # older than all
        ((12, 0), ("sm_80", "sm_90", "compute_90"), True),  # by PTX
        ((10, 0), ("sm_90",), False),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("compute_100a",), False),
        ((10, 3), ("compute_100f",), True),
        ((12, 0), ("compute_100f",), False),
        ((9, 0), (), False),
    ],
)
def test_which_gpus_a_binary_has_code_for(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    assert backends.runs_on(capability, architectures) == runs


@needs_native
def test_a_gpu_older_than_the_binary_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    info = _native.BuildInfo(native=True, cuda_version="13.0", cuda_archs=("sm_80", "sm_90", "compute_90"))
    monkeypatch.setattr(_native, "INFO", info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.delenv("TFNAS_BACKEND", raising=False)
    row = tfnas_ext.backend_report()[0]
    assert not row.available
    assert "Tesla T4 has compute capability 7.5" in row.reason
    assert f"TORCH_CUDA_ARCH_LIST=7.5 {_native.REINSTALL}" in row.reason
    assert tfnas_ext.choose_backend("cuda") == "reference"
    with pytest.raises(tfnas_ext.BackendUnavailableError, match="it has sm_80, sm_90, compute_90"):
        tfnas_ext.choose_backend("cuda", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    row = tfnas_ext.backend_report()[0]
    assert row.available
    assert row.reason == "Tesla T4; built with CUDA 13.0 for sm_80, sm_90, compute_90"


def test_missing_compiler_is_told_with_what_to_do() -> None:
    module, reason = _native._load(_native.BuildInfo(native=False, reason="no C++ compiler"), torch.__version__)
    assert module is None
    assert reason.startswith("no C++ compiler;")
    assert _native.REINSTALL in reason


def test_one_warning_without_native_module_and_none_when_reference_is_asked_for() -> None:
    code = """
        import sys, types, warnings
        info = types.ModuleType("tfnas_ext._build_info")
        info.native, info.reason, info.torch_version = False, "it was never compiled", ""
        info.cuda_version = info.cuda_reason = ""
        info.cuda_archs = info.isas = []
        sys.modules["tfnas_ext._build_info"] = info
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import tfnas_ext, tfnas_ext.backends
        print(sum("reference" in str(w.message) and "it was never compiled" in str(w.message) for w in caught))
    """
    assert run_python(code, TFNAS_BACKEND="").stdout.split() == ["1"]
    assert run_python(code, TFNAS_BACKEND="reference").stdout.split() == ["0"]


@needs_native
@pytest.mark.parametrize("capability", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_cpu_capability_from_the_environment(capability: str) -> None:
    module = backends.native_module()
    assert module is not None
    best = backends.CPU_CAPABILITIES.index(module.best_cpu_capability())
    result = run_python(
        "from tfnas_ext import backends; print(backends.cpu_capability())", TFNAS_CPU_CAPABILITY=capability
    )
    if backends.CPU_CAPABILITIES.index(capability) <= best:
        assert result.stdout.split() == [capability]
    else:
        assert "this processor has at most" in result.stderr


@needs_native
def test_wrong_cpu_capability_is_an_error_that_names_the_choices_and_the_report_survives() -> None:
    result = run_python(
        """
        import tfnas_ext
        print([row.name for row in tfnas_ext.backend_report() if row.available])
        tfnas_ext.backends.cpu_capability()
        """,
        TFNAS_CPU_CAPABILITY="sse9",
    )
    assert result.stdout.strip() == "['reference']"
    assert "ValueError" in result.stderr
    assert "must be generic, avx2, avx512 or avx512_bf16, got 'sse9'" in result.stderr


def test_importing_leaves_the_compiler_alone(tmp_path: Path) -> None:
    """torch._dynamo costs a second and 110 MB, which only those who compile shall pay."""
    code = "import sys, tfnas_ext, tfnas.supernet, tfnas.steps; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "False\n"
