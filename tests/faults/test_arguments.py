"""Options out of range and files of the wrong kind, through every command: exit code 2, and the message names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from latency_tables import synthetic_table
from tfnas.cli import main
from tfnas.cli.codes import BAD_INPUT
from tfnas.config import MAX_THREADS
from tfnas.latency.lut_io import save_table
from tfnas.space_io import load_space

NUMBERS = {
    "scale tf-nas-a TABLE": {"target_latency_ms": ["-1", "0", ".nan", ".inf", "1e-300"]},
    "lut check TABLE --space imagenet": {
        "architectures": ["-1", "2"],
        "budget_s": ["0", "-1", ".nan"],
        "seed": ["-1"],
    },
    "lut build NEW": {
        "batch": ["0", "-1"],
        "threads": ["0", "-1", f"{MAX_THREADS + 1}"],
        "budget_s": ["0", "-1", ".nan"],
        "seed": ["-1"],
    },
    "export onnx NEW --architecture tf-nas-a --weights fresh": {"resolution": ["0", "-3"], "seed": ["-1", f"{2**63}"]},
    "export timm NEW --architecture tf-nas-a --weights fresh": {"resolution": ["224"]},
    "bench --only r112": {"threads": ["0", "-1", f"{MAX_THREADS + 1}"], "batch": ["1"], "seconds": ["0", ".nan"]},
}
CASES = [
    (command, option, value)
    for command, options in NUMBERS.items()
    for option, values in options.items()
    for value in values
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_table(folder / "TABLE", synthetic_table(load_space("imagenet")))
    (folder / "FOLDER").mkdir()
    (folder / "EMPTY").touch()
    (folder / "BYTES").write_bytes(os.urandom(4000))
    (folder / "LIST").write_text("[1, 2]")
    return folder


def refused(files: Path, line: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line, in whose words names of `files` become paths, ends with exit code 2 and names `named`."""
    before = sorted(path.name for path in files.iterdir())
    arguments = [str(files / word) if word.isupper() else word for word in line.split()]
    assert main(arguments) == BAD_INPUT
    error = capsys.readouterr().err
    assert named in error.replace(str(files / named), named)
    assert "Traceback" not in error
    assert sorted(path.name for path in files.iterdir()) == before


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_a_value_out_of_range_is_named(
    command: str, option: str, value: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = "time_limit_s" if option == "seconds" else option
    refused(files, f"{command} --{option}={value}", named, capsys)


@pytest.mark.parametrize("name", ["FOLDER", "EMPTY", "BYTES", "LIST", "MISSING"])
@pytest.mark.parametrize(
    "command",
    [
        "info --architecture {}",
        "info --architecture tf-nas-a --lut {}",
        "scale {} TABLE --target_latency_ms=100",
        "scale tf-nas-a {} --target_latency_ms=100",
        "lut show {}",
        "lut compare TABLE {}",
        "lut check {}",
        "lut import {} NEW",
        "lut export {} NEW.csv",
        "lut build NEW --config {}",
        "export state-dict NEW --architecture {} --weights fresh",
        "export state-dict NEW --architecture tf-nas-a --weights {}",
        "export state-dict NEW --run {}",
        "evaluate {}",
        "report {}",
        "train --run {}",
        "train --architecture {}",
        "search --config {}",
        "search --space {}",
    ],
)
def test_a_file_of_the_wrong_kind_is_named(
    command: str,
    name: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where a search without --output makes its folder
    refused(files, command.format(name), name, capsys)


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "tpu", "cpu:x", ""])
def test_a_device_to_measure_on_that_is_not_here(
    device: str, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(files, f"lut build NEW --device={device}", "device", capsys)


def test_timm_weights_may_not_have_the_name_of_their_description(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(files, "export timm NEW.json --architecture tf-nas-a --weights fresh", "NEW.json", capsys)
