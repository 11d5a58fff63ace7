"""Checkpoints and run folders: atomic, plain, refused where they should be."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tfnas.checkpoint import LATEST, PREVIOUS, CheckpointError, has_checkpoint, load_checkpoint, save_checkpoint
from tfnas.config import ConfigError, SearchConfig
from tfnas.config_io import load_config
from tfnas.run import MetricsFile, RunFolder, read_metrics


def _state(step: int) -> dict[str, object]:
    return {"step": step, "weights": {"w": torch.arange(4.0) * step}, "widths": [[1, 2], [3]], "note": "plain"}


def test_round_trip_and_previous(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, _state(step))
    state, remarks = load_checkpoint(tmp_path)
    assert state["step"] == 3
    assert remarks == []
    assert torch.equal(state["weights"]["w"], torch.arange(4.0) * 3)
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([LATEST, PREVIOUS])


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_damaged_latest_falls_back(tmp_path: Path, keep: int) -> None:
    save_checkpoint(tmp_path, _state(1))
    save_checkpoint(tmp_path, _state(2))
    data = (tmp_path / LATEST).read_bytes()
    (tmp_path / LATEST).write_bytes(data[:keep])
    state, remarks = load_checkpoint(tmp_path)
    assert state["step"] == 1
    assert LATEST in remarks[0]


def test_killed_between_the_two_moves(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _state(1))
    os.replace(tmp_path / LATEST, tmp_path / PREVIOUS)
    assert has_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path)[0]["step"] == 1


class _Planted:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("touch planted",)


def test_planted_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format_version": 1, "step": _Planted()}, tmp_path / LATEST)
    (tmp_path / PREVIOUS).write_bytes(pickle.dumps(_Planted()))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert "refused" in str(error.value)
    assert not (tmp_path / "planted").exists()


def test_other_format_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    torch.save({"format_version": 99}, tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="99"):
        load_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="list"):
        load_checkpoint(tmp_path)


def test_failed_write_keeps_the_old_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _state(1))
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_checkpoint(tmp_path, {"bad": lambda: None})
    assert load_checkpoint(tmp_path)[0]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [LATEST]


def _config(folder: Path, **changes: object) -> SearchConfig:
    return dataclasses.replace(load_config("quickstart"), output=str(folder), **changes)


def test_second_run_into_a_folder_is_refused(tmp_path: Path) -> None:
    with RunFolder.open(_config(tmp_path / "run")):
        pass
    with pytest.raises(ConfigError, match="--resume"):
        RunFolder.open(_config(tmp_path / "run"))
    with RunFolder.open(_config(tmp_path / "run", resume=True)) as folder:
        assert load_config(folder.path / "config.yaml").epochs == load_config("quickstart").epochs


def test_two_processes_at_once_are_refused(tmp_path: Path) -> None:
    code = (
        "import sys, dataclasses\nfrom tfnas.config_io import load_config\nfrom tfnas.run import RunFolder\n"
        "RunFolder.open(dataclasses.replace(load_config('quickstart'), output=sys.argv[1], resume=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with RunFolder.open(_config(tmp_path / "run")):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "another process" in done.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_resume_with_another_configuration_names_the_keys(tmp_path: Path) -> None:
    with RunFolder.open(_config(tmp_path)):
        pass
    changed = _config(tmp_path, resume=True, seed=9, epochs=50)
    changed.checkpoint.every_s = 1.0
    with pytest.raises(ConfigError) as error:
        RunFolder.open(changed)
    assert "seed: 0 in the run, now 9" in str(error.value)
    assert "epochs" in str(error.value)
    assert "every_s" not in str(error.value)


def test_output_may_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.open(_config(tmp_path / "file"))


def test_metrics_are_cut_back_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append({"step": 1})
    length = metrics.flush()
    metrics.append({"step": 2})
    metrics.close()
    with open(path, "ab") as file:
        file.write(b'{"ste')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    metrics = MetricsFile(path, length)
    metrics.append({"step": 20})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 20]
    with pytest.raises(ValueError):
        MetricsFile(tmp_path / "other").append({"loss": float("nan")})
