"""What callbacks and trackers are told, that they cannot harm a run, and that the documented ones work."""

from __future__ import annotations

import os
import re
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from search_cases import tiny_config, tiny_file
from tfnas import Callback, search
from tfnas.callbacks import Record, scalars
from tfnas.cli import run_command
from tfnas.config_io import config_to_dict
from tfnas.interrupt import SearchInterrupted
from tfnas.run import read_metrics
from tfnas.train import train
from train_cases import train_config

DOCUMENT = Path(__file__).parents[1] / "docs" / "tracking.md"


class Recorder(Callback):
    """Keeps the name of every call and its argument."""

    def __init__(self, fails_in: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self._fails_in = fails_in

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") and name != "close":
            return super().__getattribute__(name)

        def record(*values: Any) -> None:
            self.calls.append((name, *values))
            if name == self._fails_in:
                raise ConnectionError("no network")

        return record

    def of(self, name: str) -> list[Any]:
        return [values[0] for hook, *values in self.calls if hook == name and values]


def test_a_search_tells_all_it_writes(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    recorder = Recorder()
    search(config, [recorder])
    assert [name for name, *_ in recorder.calls if name != "on_message"] == (
        ["on_config", "on_start"] + ["on_step", "on_step", "on_epoch"] * 3 + ["on_end", "close"]
    )
    assert recorder.of("on_config") == [config_to_dict(config)]
    told = [values[0] for name, *values in recorder.calls if name not in ("on_config", "on_message", "close")]
    assert told == read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_a_training_tells_all_it_writes(tmp_path: Path) -> None:
    config = train_config(tmp_path, epochs=1)
    recorder = Recorder()
    train(config, [recorder])
    assert recorder.of("on_config") == [config_to_dict(config)]
    told = [values[0] for name, *values in recorder.calls if name not in ("on_config", "on_message", "close")]
    assert told == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert recorder.calls[-1] == ("close",)


@pytest.mark.parametrize("hook", ["on_config", "on_start", "on_step", "on_epoch", "on_end", "on_message", "close"])
def test_an_exception_silences_the_callback_and_nothing_else(tmp_path: Path, hook: str) -> None:
    failing, other = Recorder(fails_in=hook), Recorder()
    config = tiny_config(tmp_path, epochs=1, warmup_epochs=0)
    with pytest.warns(RuntimeWarning, match=rf"Recorder\.{hook} failed .* ConnectionError: no network") as caught:
        result = search(config, [failing, other])
    assert len([w for w in caught if "no network" in str(w.message)]) == 1
    assert result.met
    assert [name for name, *_ in failing.calls].count(hook) == 1
    assert [name for name, *_ in failing.calls].count("close") == 1
    assert failing.calls[-1] == ("close",)
    assert [name for name, *_ in other.calls].count("on_step") == 2
    assert other.calls[-1] == ("close",)


def test_close_follows_a_failure(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="nowhere"):
        search(tiny_config(tmp_path, data="nowhere"), [recorder])
    assert recorder.calls[-1] == ("close",)
    assert recorder.of("on_end") == []


def test_scalars() -> None:
    record = {
        "kind": "epoch",
        "step": 4,
        "epoch": 1,
        "epochs": 3,
        "loss": 0.5,
        "validation": {"images": 7, "top1": 0.25, "top5": None},
        "met": True,
        "widths": [[1, 2]],
        "name": "x",
    }
    assert scalars(record) == {"epoch/loss": 0.5, "epoch/validation/images": 7, "epoch/validation/top1": 0.25}


class _Module(types.ModuleType):
    """A stand-in for a tracker's package that keeps what is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> _Module:
            self.calls.append((name, arguments, options))
            return self

        return call

    @property
    def summary(self) -> _Module:
        return self


def _documented(title: str) -> str:
    """The first Python block under a heading of the document."""
    section = DOCUMENT.read_text().split(f"## {title}\n")[1]
    block = re.search(r"```python\n(.*?)```", section, re.S)
    assert block is not None
    return block[1]


@pytest.mark.parametrize(
    ("title", "package", "name", "log"),
    [("Weights & Biases", "wandb", "WandB", "log"), ("MLflow", "mlflow", "MLflow", "log_metrics")],
)
def test_documented_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str, package: str, name: str, log: str
) -> None:
    module = _Module(package)
    monkeypatch.setitem(sys.modules, package, module)
    space: dict[str, Any] = {}
    code = _documented(title)
    assert len([line for line in code[code.index("class") :].splitlines() if line]) <= 12
    exec(code, space)
    config = tiny_config(tmp_path, epochs=2)
    search(config, [space[name]()])
    calls = module.calls
    opened = calls[0]
    assert opened[2].get("name", opened[2].get("run_name")) == config.output
    assert any(config_to_dict(config) in (*arguments, *options.values()) for _, arguments, options in calls)
    logged = [(arguments[0], options["step"]) for call, arguments, options in calls if call == log and options]
    assert [step for _, step in logged] == [2, 4, 4, 6, 8, 8]
    epochs = [figures["epoch/loss"] for figures, _ in logged if "epoch/loss" in figures]
    assert epochs == [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "epoch"]
    assert "end/lut_latency_ms" in calls[-2][1][0]
    assert calls[-1][0] in ("finish", "end_run")


def _tags(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Stop(Callback):
        def on_step(self, record: Record) -> None:
            if record["step"] == 7:
                os.kill(os.getpid(), signal.SIGINT)

    config = tiny_config(tmp_path, tensorboard=True, log__every_steps=1)
    with pytest.raises(SearchInterrupted):
        search(config, [Stop()])
    config.resume = True
    search(config, [])
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    tags = _tags(tmp_path / "run")
    for kind, count in (("step", 12), ("epoch", 3)):
        expected = [(r["step"], pytest.approx(r["loss"])) for r in records if r["kind"] == kind]
        assert len(expected) == count
        assert tags[f"{kind}/loss"] == expected
    assert len(tags["end/lut_latency_ms"]) == 1


def test_tensorboard_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tfnas.tensorboard.importlib.util.find_spec", lambda name: None)
    assert run_command("search", ["--config", str(tiny_file(tmp_path)), "--tensorboard"]) == 2
    assert "tfnas-ext[track]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
