"""Checkpoints and run folders: atomic, plain, refused where they should be."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from search_cases import assert_equal_bits
from tfnas.checkpoint import LATEST, PREVIOUS, CheckpointError, has_checkpoint, load_checkpoint, save_checkpoint
from tfnas.config import ConfigError, SearchConfig
from tfnas.config_io import load_config
from tfnas.run import (
    ARCHITECTURE_FILE,
    METRICS_FILE,
    PARTIAL_TABLE_FILE,
    TABLE_FILE,
    MetricsFile,
    RunFolder,
    read_metrics,
)


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


def test_damage_anywhere_is_found_or_harmless(tmp_path: Path) -> None:
    """Bytes changed, lost or cut off: refused, or all values as they were written."""
    saved = _state(3) | {"sums": {"loss": 1.5}, "adam": {"state": {0: {"step": torch.tensor(1.0)}}, "lr": 0.1}}
    path = save_checkpoint(tmp_path, saved)
    good = path.read_bytes()
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    refused = 0
    for _ in range(3000 if os.environ.get("TFNAS_SLOW") == "1" else 300):
        path.write_bytes(_damaged(rng, good))
        try:
            state, _ = load_checkpoint(tmp_path)
        except CheckpointError:
            refused += 1
        else:
            assert_equal_bits({key: state[key] for key in saved}, saved)
    assert refused > 200


def _damaged(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed))
        action = rng.randrange(4)
        if action == 0:
            changed[at] ^= rng.randrange(1, 256)
        elif action == 1:
            del changed[at : at + rng.randrange(1, 9)]
        elif action == 2:
            changed[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
        else:
            del changed[at:]
        changed = changed or bytearray(b"x")
    return bytes(changed)


def test_damage_under_a_valid_checksum_is_found_or_harmless(tmp_path: Path) -> None:
    """Tensors' descriptions changed and packed anew: refused for what they are, and the checkpoint before is read."""
    save_checkpoint(tmp_path, _state(1))
    path = save_checkpoint(tmp_path, _state(2))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (description,) = (name for name in members if name.endswith("data.pkl"))
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    passed_over = 0
    for _ in range(3000 if os.environ.get("TFNAS_SLOW") == "1" else 300):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, _damaged(rng, data) if name == description else data)
                archive.infolist()[-1].external_attr = 0
        _, remarks = load_checkpoint(tmp_path)
        passed_over += len(remarks)
    assert passed_over > 100


def test_killed_between_the_two_moves(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _state(1))
    os.replace(tmp_path / LATEST, tmp_path / PREVIOUS)
    assert has_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path)[0]["step"] == 1


class _Planted:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, ("touch planted",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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


def _begun_run(path: Path) -> None:
    with RunFolder.open(_config(path)):
        (path / METRICS_FILE).touch()


def test_second_run_into_a_folder_is_refused(tmp_path: Path) -> None:
    _begun_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="--resume"):
        RunFolder.open(_config(tmp_path / "run"))
    with RunFolder.open(_config(tmp_path / "run", resume=True)) as folder:
        assert load_config(folder.path / "config.yaml").epochs == load_config("quickstart").epochs


@pytest.mark.parametrize("left", [TABLE_FILE, PARTIAL_TABLE_FILE, ARCHITECTURE_FILE, METRICS_FILE, LATEST, PREVIOUS])
def test_a_run_that_failed_before_it_began_leaves_the_folder_free(tmp_path: Path, left: str) -> None:
    """A typing error in the images' path must not cost the folder; anything that took time to find must be kept."""
    for seed in (1, 2):
        with RunFolder.open(_config(tmp_path, seed=seed)):
            pass
    with RunFolder.open(_config(tmp_path, seed=3, resume=True)):
        assert load_config(tmp_path / "config.yaml").seed == 3
    (tmp_path / left).touch()
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder.open(_config(tmp_path, seed=3))


def test_runs_without_a_name_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tfnas.run.time.strftime", lambda form: "now")
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as it looks to two processes in the same instant
    paths = []
    for _ in range(3):
        with RunFolder.open(dataclasses.replace(load_config("quickstart"), output=None)) as folder:
            paths.append(folder.path.name)
    assert paths == ["run-now", "run-now-2", "run-now-3"]


@pytest.mark.parametrize("output", ["/proc/run", "/dev/null/run", "{}/file/run"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").touch()
    output = output.format(tmp_path)
    with pytest.raises(ConfigError, match=f"output {output} cannot be written .*--output"):
        RunFolder.open(_config(Path(output)))


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    ours = [".config.yaml.abcdef12.tmp", ".best.safetensors.a_b2c3d4.tmp"]
    others = [".profile", "notes.tmp", ".x.tmp", ".config.yaml.ABCDEFGH.tmp"]
    for name in ours + others:
        (tmp_path / name).touch()
    with RunFolder.open(_config(tmp_path)):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, "config.yaml", ".lock"}


def test_children_of_a_killed_run_do_not_hold_its_folder(tmp_path: Path) -> None:
    """Data workers are forked, and outlive a killed run by seconds: it must be possible to resume at once."""
    folder = RunFolder.open(_config(tmp_path))
    asleep, wake = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wake)
        os.read(asleep, 1)
        os._exit(0)
    try:
        with pytest.raises(ConfigError, match="another process"):
            RunFolder.open(_config(tmp_path))
        folder.close()
        with RunFolder.open(_config(tmp_path)):
            pass
    finally:
        os.close(wake)
        os.waitpid(child, 0)


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
    _begun_run(tmp_path)
    changed = _config(tmp_path, resume=True, seed=9, epochs=50)
    changed.checkpoint.every_s = 1.0
    with pytest.raises(ConfigError) as error:
        RunFolder.open(changed)
    assert "seed: 0 in the run, now 9" in str(error.value)
    assert "epochs" in str(error.value)
    assert "every_s" not in str(error.value)


def test_resume_without_a_folder_begins_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (None, ""):
        with pytest.raises(ConfigError, match="--resume needs --output"):
            RunFolder.open(load_config("quickstart", {"output": output, "resume": True}))
    assert list(tmp_path.iterdir()) == []


def test_output_may_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.open(_config(tmp_path / "file"))


def test_shortened_metrics_keep_their_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}\n{"st')
    MetricsFile(path, 1000).close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_metrics_are_cut_back_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.append({"kind": "step", "step": 1})
    length = metrics.flush()
    metrics.append({"kind": "step", "step": 2})
    metrics.close()
    with open(path, "ab") as file:
        file.write(b'{"ste')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    metrics = MetricsFile(path, length)
    metrics.append({"kind": "step", "step": 20})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 20]
    with pytest.raises(ValueError):
        MetricsFile(tmp_path / "other").append({"loss": float("nan")})
