"""The `tfnas` command: dispatch, exit codes, `info`."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from latency_tables import synthetic_table
from search_cases import tiny_values
from tfnas.cli import COMMANDS, main
from tfnas.cli.codes import OK, TARGET_MISSED
from tfnas.latency.lut_io import save_table
from tfnas.run import read_metrics
from tfnas.space_io import load_space
from train_cases import train_values

from tfnas_ext import _native


def test_help_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert main([]) == 2


def test_unknown_command_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inof"]) == 2
    assert "'info'" in capsys.readouterr().err


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("architectures", [(), ("sm_80", "sm_90", "compute_90")])
def test_info_lists_the_cuda_architectures_of_the_binary(
    architectures: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = _native.BuildInfo(
        native=True, torch_version="2.14.1", cuda_version="13.0" if architectures else "", cuda_archs=architectures
    )
    monkeypatch.setattr(_native, "INFO", built)
    assert main(["info", "--json"]) == 0
    module = json.loads(capsys.readouterr().out)["native_module"]
    assert module["cuda_architectures"] == list(architectures)
    assert module["cuda"] == (built.cuda_version or None)
    assert main(["info"]) == 0
    assert f"  cuda_architectures: {', '.join(architectures) or 'none'}\n" in capsys.readouterr().out


def architectures_in(binary: bytes) -> set[str]:
    """Machine code and PTX in the fat binaries that nvcc puts into an object: headers with a kind and a number each."""
    magic, found = struct.pack("<I", 0xBA55ED50), set()
    at = binary.find(magic)
    while at >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", binary, at)
        entry, end = at + header, at + header + size
        while (version, header) == (1, 16) and entry < end <= len(binary):
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", binary, entry)
            (number,) = struct.unpack_from("<I", binary, entry + 28)
            found.add(f"{'compute' if kind == 1 else 'sm'}_{number}")
            entry += entry_header + entry_size
        at = binary.find(magic, at + 4)
    return found


@pytest.mark.skipif(_native.MODULE is None, reason="native module not built")
def test_info_and_the_binary_agree_on_cuda_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled with CUDA kernels or without."""
    assert _native.MODULE is not None
    assert main(["info", "--json"]) == 0
    module = json.loads(capsys.readouterr().out)["native_module"]
    assert module["compiled"]
    assert (module["cuda"] is not None) == bool(module["cuda_architectures"])
    recorded = {name.rstrip("af") for name in module["cuda_architectures"]}
    assert architectures_in(Path(str(_native.MODULE.__file__)).read_bytes()) == recorded


def test_info_text_and_bad_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["info", "--jsno"]) == 2
    assert "--jsno" in capsys.readouterr().err


def test_python_dash_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tfnas", "--version"]
    # elsewhere: beside the sources, `-m` would import them and not the installed package
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("tfnas ")


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tfnas", "info", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


@pytest.mark.parametrize("kind", ["search", "train"])
def test_a_run_goes_on_when_the_reader_of_its_progress_leaves(kind: str, tmp_path: Path) -> None:
    """As `tfnas search | tee log` does when `tee` ends: hours of work are worth more than their display."""
    values = {"search": tiny_values, "train": train_values}[kind](tmp_path, epochs=1, log__every_steps=1)
    if kind == "search":
        # outside the tolerance by the paper's rule: the exit code says so all the same
        values |= {"derive": "paper", "target_latency_ms": 2.0, "tolerance": 1e-6, "warmup_epochs": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "tfnas", kind, f"--config={tmp_path / 'config.yaml'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == (TARGET_MISSED if kind == "search" else OK)
    err = process.stderr.read()
    process.stderr.close()
    assert "gets no more records; the run goes on: BrokenPipeError" in err
    assert "Traceback" not in err
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["kind"] == "end"


def test_scale_takes_a_bare_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    save_table(table, synthetic_table(load_space("imagenet")))
    arguments = ["scale", "--architecture", "tf-nas-a", "--lut", str(table), "--target_latency_ms"]
    assert main([*arguments, "1e6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["binding"] == "maximum"
    assert main([*arguments, "0.001", "--json"]) == 2
    assert "out of reach" in capsys.readouterr().err


@pytest.mark.parametrize("user", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_wait_briefly_unless_the_user_says_otherwise(user: dict[str, str], tmp_path: Path) -> None:
    """Set before torch loads OpenMP, which reads it once."""
    script = (
        "import os, sys; import tfnas.cli as cli; assert 'torch' not in sys.modules; cli.main(['info', '--json']);"
        "print({k: v for k, v in os.environ.items() if k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}, file=sys.stderr)"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=kept | user, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.strip().splitlines()[-1] == str(user or {"GOMP_SPINCOUNT": "10000"}), done.stderr
