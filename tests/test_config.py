"""Configurations: round trips, overrides, validation, nearest-name suggestions."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tfnas.config import ConfigError, SearchConfig, WeightsConfig
from tfnas.config_io import (
    CONFIG_FOLDER,
    SEARCH,
    ConfigKind,
    config_to_dict,
    config_to_yaml,
    load_config,
    parse_search_arguments,
)
from tfnas.train_config import TRAIN


def test_built_in_names() -> None:
    assert SEARCH.names() == ["fashion-mnist", "imagenet", "quickstart"]


@pytest.mark.parametrize("name", SEARCH.names())
def test_round_trip_of_built_in(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert SEARCH.from_dict(config_to_dict(config)) == config
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config
    assert parse_search_arguments(["--config", str(path)]) == config


@pytest.mark.parametrize("name", SEARCH.names())
def test_built_in_files_name_every_key(name: str) -> None:
    values = yaml.safe_load((CONFIG_FOLDER / f"{name}.yaml").read_text())
    default = config_to_dict(SearchConfig())
    assert list(values) == list(default)
    for key, value in default.items():
        if isinstance(value, dict):
            assert list(values[key]) == list(value), key


def test_defaults_are_those_of_the_imagenet_file() -> None:
    """The dataclasses' optimizer, sampling and objective defaults are the paper's."""
    default, imagenet = config_to_dict(SearchConfig()), config_to_dict(load_config("imagenet"))
    for key in ("epochs", "warmup_epochs", "batch_size", "weights", "architecture", "sampling", "objective"):
        assert default[key] == imagenet[key], key


def test_no_arguments_mean_quickstart() -> None:
    assert parse_search_arguments([]) == load_config("quickstart")


def test_overrides_reach_groups_and_keep_the_rest() -> None:
    config = parse_search_arguments(
        ["--weights.lr", "0.5", "--target_latency_ms", "3.5", "--architecture.betas=[0.1,0.2]"]
    )
    quickstart = load_config("quickstart")
    assert config.weights == dataclasses.replace(quickstart.weights, lr=0.5)
    assert config.target_latency_ms == 3.5
    assert config.architecture.betas == (0.1, 0.2)
    assert config.epochs == quickstart.epochs
    assert load_config("imagenet", {"weights.lr": 2.0, "epochs": 12}).weights == WeightsConfig(lr=2.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--resume"], True),
        (["--resume", "--epochs", "30"], True),
        (["--resume", "false"], False),
        (["--resume=true"], True),
        ([], False),
    ],
)
def test_switch(arguments: list[str], expected: bool) -> None:
    assert parse_search_arguments(arguments).resume is expected


def test_resume_without_config_reads_the_run_folder(tmp_path: Path) -> None:
    stored = dataclasses.replace(load_config("imagenet"), epochs=77, output=str(tmp_path))
    (tmp_path / "config.yaml").write_text(config_to_yaml(stored))
    resumed = parse_search_arguments(["--resume", "--output", str(tmp_path)])
    assert resumed == dataclasses.replace(stored, resume=True)
    assert parse_search_arguments(["--output", str(tmp_path)]).epochs == load_config("quickstart").epochs
    assert parse_search_arguments(["--resume", "--output", str(tmp_path / "nothing")]).epochs != 77


def test_print_config_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_search_arguments(["--config", "imagenet", "--weights.momentum", "0.5", "--print_config"])
    assert exit_.value.code in (0, None)
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    expected = load_config("imagenet")
    expected.weights.momentum = 0.5
    assert load_config(path) == expected
    assert parse_search_arguments([f"--config={path}"]) == expected


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--wieghts.lr", "3"], ["'wieghts.lr'", "'weights.lr'"]),
        (["--target_latency", "3"], ["'target_latency_ms'"]),
        (["--epochs", "-1"], ["epochs", "at least 1", "-1"]),
        (["--epochs", "many"], ["epochs", "many"]),
        (["--config", "quikstart"], ["quikstart", "quickstart", "imagenet"]),
        (["--config"], ["--config", "quickstart"]),
        (["--seed", "1.5"], ["seed", "1.5"]),
        (["--architecture.betas", "[0.5]"], ["architecture.betas"]),
        (["stray"], ["stray"]),
        (["--derive", "magic"], ["derive", "repair", "paper"]),
        (["--profile.engine", "tensorrt"], ["profile.engine", "onnxruntime", "tensorrt"]),
        (["--target_latency_ms", "-2"], ["target_latency_ms", "-2"]),
        (["--target_latency_ms", ".nan"], ["target_latency_ms"]),
        (["--warmup_epochs", "100"], ["warmup_epochs", "100"]),
        (["--dataset.held_out_fraction", "1.5"], ["dataset.held_out_fraction", "0.99"]),
    ],
)
def test_bad_arguments(arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_search_arguments(arguments)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("weights:\n  learning_rate: 3\n", ["learning_rate", "'weights.lr'"]),
        ("epoch: 3\n", ["epoch", "'epochs'"]),
        ("weights: [3", ["not valid YAML"]),
        ("- 1\n- 2\n", ["keys and values"]),
        ("[" * 2_000, ["not valid YAML"]),
        ("epochs: 3\nseed: 1\nepochs: 4\n", ["not valid YAML", "'epochs' twice", "line 1"]),
        ("a: \x00", ["not valid YAML"]),
        ("weights: {lr: " + "9" * 400 + "}", ["too large"]),
        ("epochs: " + "9" * 5000, ["not valid YAML"]),
        ("weights: 3\n", ["weights"]),
        ("weights: {lr: .nan}\n", ["weights.lr must be between"]),
        ("", ["holds no keys"]),
        ("# epochs: 3\n", ["holds no keys"]),
        ("space: !!python/object/apply:os.system [true]\n", ["not valid YAML"]),
    ],
)
def test_bad_files(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    options = [["--config", str(path)], [f"--config={path}", "--print_config"]]
    reads = [partial(load_config, path), *(partial(parse_search_arguments, arguments) for arguments in options)]
    for read in reads:
        with pytest.raises(ConfigError) as error:
            read()
        for part in parts:
            assert part in str(error.value)


def test_a_folder_of_the_same_name_does_not_hide_a_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert SEARCH.path("quickstart") == CONFIG_FOLDER / "quickstart.yaml"


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (TRAIN, "accumulation_steps"),
        (TRAIN, "batch_size"),
        (SEARCH, "log.held_out_batches"),
        (SEARCH, "epochs"),
        (SEARCH, "dataset.evaluation_batch_size"),
    ],
)
def test_counts_that_no_iterator_takes_are_refused(kind: ConfigKind[Any], key: str) -> None:
    """They would end the run on its way, with a message that does not name the key."""
    with pytest.raises(ConfigError, match=rf"^{key} must be between \d+ and {sys.maxsize}, got {10**30}"):
        kind.load("quickstart", {key: 10**30})
