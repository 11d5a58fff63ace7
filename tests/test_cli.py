"""The `tfnas` command: dispatch, exit codes, `info`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latency_tables import synthetic_table
from tfnas.cli import COMMANDS, main
from tfnas.latency.lut_io import save_table
from tfnas.space_io import load_space


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


def test_scale_takes_a_bare_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    save_table(table, synthetic_table(load_space("imagenet")))
    arguments = ["scale", "--architecture", "tf-nas-a", "--lut", str(table), "--target_latency_ms"]
    assert main([*arguments, "1e6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["binding"] == "maximum"
    assert main([*arguments, "0.001", "--json"]) == 2
    assert "out of reach" in capsys.readouterr().err
