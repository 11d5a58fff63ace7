"""Names that are not text: refused by every command before it begins; a folder above may have one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from kill_cases import short_search
from tfnas.cli import COMMANDS, main, search_main
from tfnas.cli.codes import BAD_INPUT, OK
from tfnas.config import ConfigError
from tfnas.config_io import SEARCH, ConfigKind
from tfnas.train_config import TRAIN

NAME = os.fsdecode(b"caf\xe9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    try:
        path.mkdir()
    except OSError:
        pytest.skip("the file system takes text only")
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["{}", "--output={}", "--run={}"])
def test_an_argument_of_other_bytes(
    command: str, option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, option.format(folder / "x")]) == BAD_INPUT
    err = capsys.readouterr().err
    assert "caf\\xe9/x: expected text in the encoding of file names here" in err
    assert list(folder.iterdir()) == []


def test_search_has_a_command_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tfnas-search", "--output", str(folder / "x")])
    assert search_main() == BAD_INPUT
    assert "expected text" in capsys.readouterr().err


@pytest.mark.parametrize("name", [NAME, "a\0b", "\ud800"])
@pytest.mark.parametrize("kind", [SEARCH, TRAIN])
@pytest.mark.parametrize("key", ["output", "data", "dataset.test_source"])
def test_a_configuration_in_python(key: str, kind: ConfigKind[Any], name: str) -> None:
    """Such a name could not be read again from the configuration that a run stores."""
    with pytest.raises(ConfigError, match=rf"^{key}: expected text, got {re.escape(ascii(name))}; rename it"):
        kind.load("quickstart", {key: name})


def test_a_folder_above(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything works inside it; the report names it as the shell would."""
    run = short_search(tmp_path / "search", epochs=1, warmup_epochs=0, steps_per_epoch=2)
    monkeypatch.chdir(folder)
    for command in (
        ["search", f"--config={run.config}", "--output=."],
        ["report", "."],
        ["train", "--run=.", "--epochs=1", "--threads=1", "--steps_per_epoch=2"],
        ["evaluate", "."],
        ["export", "state-dict", "x.safetensors", "--run=."],
        ["search", "--resume", "--output=."],
    ):
        assert main(command) == OK, capsys.readouterr().err
    assert "caf\\xe9" in (folder / "report.html").read_text(encoding="utf-8")
