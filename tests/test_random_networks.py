"""The comparison of a found network with random ones: who takes part, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tfnas
from latency_tables import synthetic_table
from search_cases import tiny_config
from tfnas.architecture import count_multiply_adds
from tfnas.latency.additivity import random_architectures
from tfnas.space_io import load_space

ROOT = Path(__file__).parent.parent


def test_random_networks_take_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import random_networks

    space = load_space("small")
    table = synthetic_table(space)
    found = random_architectures(space, 1, seed=5)[0]
    archs = random_networks.networks_of_latency(found, table, 5, seed=0)
    assert len({count_multiply_adds(arch) for arch in archs}) == 5
    target_ms = table.architecture_ms(found)
    assert all(0.99 * target_ms <= table.architecture_ms(arch) <= target_ms for arch in archs)


def test_comparison_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import random_networks

    tfnas.search(tiny_config(tmp_path, epochs=1, warmup_epochs=0, steps_per_epoch=1))
    command = ["random_networks.py", "--run", str(tmp_path / "run"), "--networks", "2", "--seeds", "3", "4"]
    command += ["--epochs", "1", "--steps_per_epoch", "1", "--batch_size", "8", "--validation", "none"]
    command += ["--optimizer.lr", "0.01", "--json", str(tmp_path / "result.json")]
    monkeypatch.setattr("sys.argv", command)
    random_networks.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["network"] for row in result["rows"]] == ["found", "random0", "random1"]
    assert all(set(row["test_accuracy"]) == {"3", "4"} for row in result["rows"])
    assert 0 <= result["summary"]["beaten"] <= 2
    monkeypatch.setattr(random_networks, "train", lambda config: pytest.fail("trained again"))
    random_networks.main()
    assert json.loads((tmp_path / "result.json").read_text()) == result
