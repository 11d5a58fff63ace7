"""The `tfnas` command: dispatch, exit codes, `info`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tfnas.cli import COMMANDS, main


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


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "tfnas", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("tfnas ")
