"""Files that hold a program instead of what they should: refused by every command that reads one, and nothing runs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_cases import short_search, short_training
from tfnas.cli import main
from tfnas.cli.codes import BAD_INPUT, OK
from tfnas.run import PARTIAL_TABLE_FILE


class _Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.trap),)


def _plain(trap: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(_Planted(trap), protocol=2))


def _torch(trap: Path, path: Path) -> None:
    torch.save({"format_version": 1, "step": _Planted(trap)}, path)


def _old_torch(trap: Path, path: Path) -> None:
    torch.save({"format_version": 1, "step": _Planted(trap)}, path, _use_new_zipfile_serialization=False)


def _yaml(trap: Path, path: Path) -> None:
    path.write_text(f"space: !!python/object/apply:os.mkdir ['{trap}']\n")


FORMS = [_plain, _torch, _old_torch, _yaml]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs a command, which must end with exit code 2 and a message that names the file, and nothing else."""

    def run(path: Path, *arguments: str) -> None:
        assert main(list(arguments)) == BAD_INPUT
        assert path.name in capsys.readouterr().err
        assert not (tmp_path / "trap").exists()

    return run


def test_the_trap_works(tmp_path: Path) -> None:
    _plain(tmp_path / "trap", tmp_path / "x")
    pickle.loads((tmp_path / "x").read_bytes())
    assert (tmp_path / "trap").is_dir()


@pytest.mark.parametrize("plant", FORMS)
def test_planted(plant: Callable[[Path, Path], None], tmp_path: Path, refused: Callable[..., None]) -> None:
    search = short_search(tmp_path / "search", epochs=1, warmup_epochs=1, steps_per_epoch=2)
    training = short_training(tmp_path / "train")
    trap = tmp_path / "trap"
    output = f"--output={tmp_path / 'out'}"

    def planted(name: str) -> Path:
        plant(trap, tmp_path / name)
        return tmp_path / name

    for suffix in ("json", "pkl", "csv", "yaml"):
        table = planted(f"table.{suffix}")
        refused(table, "search", f"--config={search.config}", output, f"--lut={table}")
    config = planted("config.yaml")
    refused(config, "search", f"--config={config}", output)
    refused(config, "train", f"--config={config}", output)
    space = planted("space.yaml")
    refused(space, "search", f"--config={search.config}", output, f"--space={space}")
    arch = planted("architecture.json")
    refused(arch, "train", f"--config={training.config}", output, f"--architecture={arch}")
    refused(arch, "info", "--architecture", str(arch))
    weights = planted("best.safetensors")
    given = ["--architecture", str(tmp_path / "train" / "architecture.json"), "--weights", str(weights)]
    refused(weights, "export", "--format", "state-dict", "--output", str(tmp_path / "o"), *given)
    data = planted("images.npz")
    refused(data, "search", f"--config={search.config}", output, f"--data={data}")


@pytest.mark.parametrize(
    "plant", [_plain, _torch, *(pytest.param(f, marks=pytest.mark.slow) for f in (_old_torch, _yaml))]
)
@pytest.mark.parametrize("kind", ["search", "train"])
def test_planted_in_a_run(
    plant: Callable[[Path, Path], None], kind: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    make = {"search": short_search, "train": short_training}[kind]
    run = make(tmp_path / kind, epochs=1, steps_per_epoch=2, **({"warmup_epochs": 1} if kind == "search" else {}))
    folder = tmp_path / "run"
    command = [kind, f"--config={run.config}", f"--output={folder}", "--resume"]
    assert main(command) == OK
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = ["config.yaml", "lut.json"] if kind == "search" else ["config.yaml"]
    for name in names:
        plant(tmp_path / "trap", folder / name)
        refused(folder / name, *command)
        (folder / name).write_bytes(kept[name])
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        plant(tmp_path / "trap", folder / name)
    refused(folder / "checkpoint.pt", *command)
    if kind == "search":
        (folder / "lut.json").unlink()
        plant(tmp_path / "trap", folder / PARTIAL_TABLE_FILE)
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            (folder / name).write_bytes(kept[name])
        measured = [argument for argument in command if not argument.startswith("--config")]
        (folder / "config.yaml").write_text(kept["config.yaml"].decode().replace(f"lut: {tmp_path}", "lut: null #"))
        refused(folder / PARTIAL_TABLE_FILE, *measured)


def test_planted_arrays(tmp_path: Path, refused: Callable[..., None]) -> None:
    """Object arrays inside a proper archive."""
    data, trap = tmp_path / "images.npz", tmp_path / "trap"
    np.savez(data, images=np.array([_Planted(trap)] * 4, dtype=object), labels=np.arange(4))
    search = short_search(tmp_path / "search")
    refused(data, "search", f"--config={search.config}", f"--output={tmp_path / 'out'}", f"--data={data}")
