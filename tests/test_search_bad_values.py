"""Searches at the edges of their settings and of what a shell hands them: a message or a result, never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tfnas
import torch
from naive_supernet import tiny_space
from search_cases import command, tiny_config, tiny_file
from tfnas.bilevel import SearchFailed
from tfnas.cli import main
from tfnas.config import ConfigError, SearchConfig
from tfnas.config_io import SEARCH, load_config
from tfnas.data import DataError, DataOptions
from tfnas.pipeline import make_supernet
from tfnas.schedule import temperature

from tfnas_ext import engine as engine_module
from tfnas_ext.engine import EngineFactory, EngineRefused, engine_names
from tfnas_ext.engine_reference import ReferenceEngine
from tfnas_ext.engine_spec import BodySpec
from tfnas_ext.packed import PackedLayer

SHORT = {"epochs": 1, "warmup_epochs": 0, "steps_per_epoch": 2}


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("", "tolerance", 0.0),
        ("", "tolerance", 1.0),
        ("dataset", "padding", 10**20),
        ("objective", "latency_weight", 1e39),
        ("objective", "latency_weight", float("inf")),
        ("objective", "exponent", float("inf")),
        ("objective", "exponent", float("nan")),
        ("sampling", "tau", float("inf")),
        ("sampling", "tau_final", float("inf")),
    ],
)
def test_values_that_end_a_search_late_are_refused_first(group: str, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        SEARCH.from_dict({group: {key: value}} if group else {key: value})


def test_padding_of_data_options() -> None:
    with pytest.raises(DataError, match="padding: expected 0 to 4096"):
        DataOptions("fake", padding=10**20)


def test_linear_temperature_ends_at_a_tiny_one() -> None:
    config = SearchConfig(epochs=5, warmup_epochs=1)
    config.sampling.tau_schedule = "linear"
    config.sampling.tau_final = 1e-30
    assert [temperature(config, epoch) for epoch in (0, 1, 4)] == [5.0, 5.0, 1e-30]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA engine may run here")
def test_an_engine_that_cannot_run_here_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cuda" in engine_names()
    assert issubclass(EngineRefused, RuntimeError)
    assert main(["search", "--config", str(tiny_file(tmp_path, engine="cuda", **SHORT))]) == 2
    assert "engine 'cuda' cannot run here" in capsys.readouterr().err


def test_an_engine_of_another_device_than_the_cpu_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `cuda` on a GPU: weights are drawn on the CPU, where that engine cannot run. Here on the device `meta`."""

    def refusal(spec: BodySpec, layers: Sequence[PackedLayer]) -> str | None:
        device = layers[0].weights()[0].device
        return None if device.type == "meta" else f"the weights are on {device}"

    monkeypatch.setitem(engine_module._FACTORIES, "elsewhere", EngineFactory(ReferenceEngine, refusal))
    config = SearchConfig(engine="elsewhere")
    supernet = make_supernet(config, tiny_space(), torch.device("meta"))
    assert isinstance(supernet.engine, ReferenceEngine)
    assert all(tensor.is_meta for tensor in [*supernet.parameters(), *supernet.buffers()])
    with pytest.raises(EngineRefused, match="the weights are on cpu"):
        make_supernet(config, tiny_space(), torch.device("cpu"))


@pytest.mark.parametrize("every_steps", [1, 100])
def test_an_update_that_leaves_no_number_is_a_failed_search(tmp_path: Path, every_steps: int) -> None:
    config = tiny_config(tmp_path, architecture__lr=1e30, log__every_steps=every_steps, **SHORT | {"epochs": 3})
    with pytest.raises(SearchFailed, match="is not finite"):
        tfnas.search(config)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_devices_are_no_data_and_no_table(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(tiny_file(tmp_path, **SHORT))
    assert main(["search", "--config", config, "--data", path]) == 2
    assert "got the device" in capsys.readouterr().err
    assert main(["search", "--config", config, "--lut", path]) == 2
    assert main(["search", "--config", config, "--lut", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("expected the file of a latency table, got a folder or device") == 2


def test_closed_output_and_names_beyond_the_locale(tmp_path: Path) -> None:
    """One process, closed standard output; one whose encoding lacks the folder's name: both search to the end."""
    config = str(tiny_file(tmp_path, **SHORT))
    closed = f'exec "{sys.executable}" -m tfnas search --config "{config}" --output "{tmp_path / "closed"}" >&-'
    done = subprocess.run(["sh", "-c", closed], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    arguments = command("--config", config, "--output", str(tmp_path / "füße"))
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120, env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "f\\xfc\\xdfe" in done.stdout
    assert "epoch 1/1" in done.stdout


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "weights: &w {lr: *w}",
        "\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]),
        "a: " + "[" * 200 + "]" * 200,
    ],
)
def test_aliases_and_nesting_that_never_end(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["search", "--config", str(path)]) == 2
    assert "or an alias within itself" in capsys.readouterr().err


def test_aliases_that_end(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("epochs: &n 3\nwarmup_epochs: 0\nbatch_size: *n\nweights: &w {lr: 0.5}\n")
    config = load_config(path)
    assert (config.epochs, config.batch_size, config.weights.lr) == (3, 3, 0.5)
