"""Searches for several targets: each as if alone, one warm-up, a comparison, resumable whenever they are killed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from process_cases import raise_failures, run_processes, start_outside_the_sources
from search_cases import assert_equal_bits, results_of, tiny_config, tiny_file
from tfnas import Callback, search, search_targets
from tfnas.architecture import load_architecture
from tfnas.bilevel import BilevelSearch
from tfnas.callbacks import Record
from tfnas.checkpoint import has_checkpoint, load_checkpoint
from tfnas.cli import run_command
from tfnas.comparison import COMPARISON_STEM, comparison_markdown, read_row
from tfnas.config import ConfigError, SearchConfig
from tfnas.config_io import load_config, parse_search_arguments
from tfnas.interrupt import SearchInterrupted
from tfnas.latency.lut_io import load_table
from tfnas.scaling import reachable_range_ms
from tfnas.several_targets import target_folder
from tfnas.space_io import load_space
from tfnas.target import TargetOutOfReach

SLOW = os.environ.get("TFNAS_SLOW") == "1"


def _targets(folder: Path, count: int = 2) -> list[float]:
    """Targets spread over the reachable range of the tiny search in `folder`."""
    tiny_config(folder)
    low, high = reachable_range_ms(load_space(folder / "tiny.yaml"), load_table(folder / "table.json"))
    return [round(low + (high - low) * (k + 1) / (count + 1), 4) for k in range(count)]


def _config(folder: Path, **changes: Any) -> SearchConfig:
    changes.setdefault("target_latency_ms", _targets(folder))
    return tiny_config(folder, **changes)


def _ends(folder: Path, targets: list[float]) -> list[dict[str, Any]]:
    ends = []
    for target in targets:
        end = results_of(target_folder(folder, target))
        end["metrics"][0].pop("space")
        ends.append(end)
    return ends


def _alone(folder: Path, targets: list[float], **changes: Any) -> list[dict[str, Any]]:
    for target in targets:
        search(tiny_config(folder, target_latency_ms=target, output=str(target_folder(folder, target)), **changes), [])
    return _ends(folder, targets)


class _Recorder(Callback):
    def __init__(self) -> None:
        self.kinds: list[tuple[str, int]] = []
        self.closed = 0

    def on_start(self, record: Record) -> None:
        self.kinds.append(("start", record["step"]))

    def on_epoch(self, record: Record) -> None:
        self.kinds.append(("epoch", record["epoch"]))

    def on_end(self, record: Record) -> None:
        self.kinds.append(("end", 0))

    def close(self) -> None:
        self.closed += 1


def test_each_is_what_it_would_be_alone_after_one_warm_up(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    config = _config(tmp_path, steps_per_epoch=2)
    assert isinstance(config.target_latency_ms, list)
    targets = config.target_latency_ms
    recorder = _Recorder()
    result = search_targets(config, [recorder])
    rest = [("start", 2), ("epoch", 1), ("epoch", 2), ("end", 0)]
    assert recorder.kinds == [("start", 0), ("epoch", 0), *rest, *rest]
    assert recorder.closed == 3
    assert_equal_bits(_ends(tmp_path / "run", targets), _alone(tmp_path / "alone", targets, steps_per_epoch=2))

    assert [row.target_latency_ms for row in result.rows] == targets
    for row in result.rows:
        arch, facts = load_architecture(tmp_path / "run" / row.folder / "architecture.json")
        latency, target = facts["lut_latency_ms"], facts["target_latency_ms"]
        assert (row.lut_latency_ms, row.met) == (latency, 0.99 * target <= latency <= target)
        assert row.depths == [len(ops) for ops in arch.stages]
        assert row.inherited_accuracy is not None
        assert 0 <= row.inherited_accuracy <= 1
    comparison = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert comparison["targets"] == [dataclasses.asdict(row) for row in result.rows]
    assert (tmp_path / "run" / "comparison.md").read_text() == comparison_markdown(result.rows)
    if find_spec("matplotlib"):
        assert (tmp_path / "run" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    # one of them is a run like any other: it goes on by itself
    own = target_folder(tmp_path / "run", targets[0])
    before = results_of(own)
    search(dataclasses.replace(load_config(own / "config.yaml"), resume=True), [])
    assert_equal_bits(results_of(own), before)


def test_without_warm_up_or_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    config = _config(tmp_path, epochs=1, warmup_epochs=0, steps_per_epoch=2)
    said: list[str] = []
    callback = Callback()
    callback.on_message = said.append  # type: ignore[method-assign]
    assert len(search_targets(config, [callback]).rows) == 2
    assert not (tmp_path / "run" / f"{COMPARISON_STEM}.png").exists()
    assert any("tfnas-ext[plots]" in text for text in said)


def test_impossible_ones_are_named_before_the_first_epoch(tmp_path: Path) -> None:
    possible = _targets(tmp_path)[0]
    recorder = _Recorder()
    with pytest.raises(TargetOutOfReach, match=r"target_latency_ms 0\.0001, 1e\+06 is out of reach"):
        search_targets(_config(tmp_path, target_latency_ms=[possible, 0.0001, 1e6]), [recorder])
    assert recorder.kinds == []
    assert not has_checkpoint(tmp_path / "run" / "warm-up")


def test_a_failure_before_the_start_leaves_the_folder_free(tmp_path: Path) -> None:
    config = _config(tmp_path, epochs=1, warmup_epochs=0, steps_per_epoch=1)
    with pytest.raises(ValueError, match="nowhere"):
        search_targets(dataclasses.replace(config, data="nowhere"), [])
    assert len(search_targets(config, []).rows) == 2


def test_trained_accuracy_joins_the_comparison(tmp_path: Path) -> None:
    config = _config(tmp_path, epochs=1, warmup_epochs=0, steps_per_epoch=1)
    rows = search_targets(config, []).rows
    training = tmp_path / "run" / rows[0].folder / "training"
    training.mkdir()
    config.resume = True
    for record in ({"kind": "end"}, {"kind": "end", "test": {}}, {"kind": "end", "test": 1}):
        (training / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(ValueError, match=rf"{rows[0].folder}: its records lack what a comparison shows"):
            search_targets(config, [])
    (training / "metrics.jsonl").write_text(json.dumps({"kind": "end", "test": {"top1": 0.75}}) + "\n")
    again = search_targets(config, []).rows
    assert [row.trained_accuracy for row in again] == [0.75, None]
    assert "| trained % |" in (tmp_path / "run" / "comparison.md").read_text().splitlines()[0]
    assert [dataclasses.replace(row, trained_accuracy=None) for row in again] == list(rows)


def test_commands_for_one_search_name_those_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search_targets(_config(tmp_path, epochs=1, warmup_epochs=0, steps_per_epoch=1), [])
    names = ", ".join(sorted(path.name for path in (tmp_path / "run").glob("target-*")))
    folder = str(tmp_path / "run")
    for command in (
        ["report", folder],
        ["train", "--run", folder],
        ["evaluate", folder],
        ["export", "onnx", str(tmp_path / "x"), "--run", folder],
    ):
        assert run_command(command[0], command[1:]) == 2
        assert f"it holds several searches, name one of {names} in it" in capsys.readouterr().err


def _signal_at(config: SearchConfig, step: int, number: int) -> None:
    """Send this process a signal in a step of the last target's search (0: of the warm-up)."""
    original = BilevelSearch._take_step

    def signalled(self: BilevelSearch, position: int) -> None:
        if self.step == step:
            os.kill(os.getpid(), number)
        original(self, position)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BilevelSearch, "_take_step", signalled)
        search_targets(config, [])


def test_stopped_by_a_signal_it_names_the_whole(tmp_path: Path) -> None:
    config = _config(tmp_path)
    with pytest.raises(SearchInterrupted, match=rf"all targets by --resume --output {config.output}$"):
        _signal_at(config, 6, signal.SIGINT)
    assert load_checkpoint(tmp_path / "run" / "warm-up")[0]["step"] == 4
    with pytest.raises(ConfigError, match="--resume"):
        search_targets(config, [])
    changed = dataclasses.replace(config, resume=True, target_latency_ms=_targets(tmp_path, 3))
    with pytest.raises(ConfigError, match="target_latency_ms"):
        search_targets(changed, [])


def _killed_at(config: SearchConfig, number: int, counter: Any) -> None:
    """Search, and SIGKILL this process just before it moves a file or folder for the `number`-th time (0: never)."""

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            counter.value += 1
            if counter.value == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    search_targets(config, [])


def _run_killed(config: SearchConfig, number: int) -> int:
    """How often files were moved."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tfnas.several_targets", "tfnas.train"])
    counter = context.Value("i", 0, lock=False)
    process = context.Process(target=_killed_at, args=(config, number, counter))
    start_outside_the_sources([process])
    process.join()
    assert process.exitcode == (-signal.SIGKILL if counter.value == number else 0)
    return int(counter.value)


def test_killed_before_any_write_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """Everything that is kept is moved to its place, so a kill anywhere is like one before the next move."""
    seed = random.randrange(2**32)
    print("seed", seed)
    changes: dict[str, Any] = {"epochs": 2, "steps_per_epoch": 1, "threads": 1}
    (tmp_path / "whole").mkdir()
    targets = _targets(tmp_path / "whole")
    moves = _run_killed(_config(tmp_path / "whole", **changes), 0)
    expected = _ends(tmp_path / "whole" / "run", targets)
    numbers = range(1, moves + 1) if SLOW else random.Random(seed).sample(range(1, moves + 1), 2)
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        config = _config(folder, resume=True, **changes)
        _run_killed(config, number)
        left = sorted(path.name for path in (folder / "run").iterdir())
        print(f"killed before move {number} of {moves}: {left}")
        search_targets(config, [])
        assert_equal_bits(_ends(folder / "run", targets), expected)
        assert not list((folder / "run").glob(".*.tmp"))


def _in_processes(config: SearchConfig) -> Any:
    return search_targets(config, []).rows


@pytest.mark.slow
def test_in_two_processes(tmp_path: Path) -> None:
    config = _config(tmp_path, epochs=2, steps_per_epoch=2)
    first, second = raise_failures(run_processes(2, _in_processes, config))
    assert first == second
    assert [row.target_latency_ms for row in first] == config.target_latency_ms
    assert all(row.lut_latency_ms <= row.target_latency_ms for row in first)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_file(tmp_path, epochs=1, warmup_epochs=1, steps_per_epoch=1)
    targets = _targets(tmp_path)
    arguments = ["--config", str(file), "--target_latency_ms", ",".join(map(str, targets))]
    assert run_command("search", arguments) == 0
    printed = capsys.readouterr().out
    assert "target 2 of 2" in printed
    assert "inherited %" in printed
    assert all(read_row(target_folder(tmp_path / "run", target)) is not None for target in targets)
    assert run_command("search", ["--resume", "--output", str(tmp_path / "run")]) == 0
    assert run_command("search", arguments) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--target_latency_ms", "10,12.5"], [10.0, 12.5]),
        (["--target_latency_ms=10, 12.5", "--epochs", "13"], [10.0, 12.5]),
        (["--target_latency_ms", "[10, 12.5]"], [10.0, 12.5]),
        (["--target_latency_ms", "10"], 10.0),
        (["--target_latency_ms", "null"], None),
    ],
)
def test_how_targets_are_given(arguments: list[str], expected: Any, tmp_path: Path) -> None:
    config = parse_search_arguments(arguments)
    assert config.target_latency_ms == expected
    assert type(config.target_latency_ms) is type(expected)


@pytest.mark.parametrize("given", ["10,10", "10,-2", "10,nan", "[]", "10,x"])
def test_bad_targets(given: str) -> None:
    with pytest.raises(ConfigError, match="target_latency_ms"):
        parse_search_arguments(["--target_latency_ms", given])


def test_one_target_and_several_are_different_functions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="search_targets takes"):
        search(_config(tmp_path), [])
    with pytest.raises(ConfigError, match=r"tfnas\.search takes one"):
        search_targets(tiny_config(tmp_path, target_latency_ms=1.0), [])
