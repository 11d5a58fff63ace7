"""`tfnas train`: train or resume the training of an architecture; see `tfnas.train.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfnas.cli.codes import OK
from tfnas.config import ConfigError
from tfnas.config_io import CONFIG_FILE, SEARCH, config_to_dict
from tfnas.run import ARCHITECTURE_FILE, TRAINING_FOLDER, targets_hint
from tfnas.train_config import TRAIN, TrainConfig

_HELP = """
  --run DIR             train what the search in DIR found: its architecture and its images, into DIR/training
"""


def run(arguments: list[str]) -> int:
    """Train by the command line's configuration; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        TRAIN.parser().print_help()
        print(_HELP)
        return OK
    config = parse_train_arguments(arguments)

    from tfnas.train import train

    train(config)
    return OK


def parse_train_arguments(arguments: list[str]) -> TrainConfig:
    """The configuration of `tfnas train`; what `--run` brings lies between configuration file and other options."""
    rest, folder = _take_run(arguments)
    if folder is None:
        return TRAIN.parse(rest)
    if not any(argument.split("=")[0] == "--output" for argument in rest):
        rest = [*rest, f"--output={folder / TRAINING_FOLDER}"]
    return TRAIN.parse(rest, run_preset(folder))


def run_preset(folder: Path) -> dict[str, Any]:
    """What a training takes over from the search in `folder`: architecture, images and their treatment.

    A `ConfigError` says what is missing where the folder holds no finished search.
    """
    for name in (CONFIG_FILE, ARCHITECTURE_FILE):
        if not (folder / name).is_file():
            raise ConfigError(
                f"--run {folder}: expected the folder of a finished search, it has no {name}{targets_hint(folder)}"
            )
    search = SEARCH.load(folder / CONFIG_FILE)
    dataset = config_to_dict(search)["dataset"]
    dataset.pop("held_out_fraction")
    if search.num_classes is not None:
        # the search saw some classes only; the network is for all of them
        dataset.pop("classes")
    return {
        "architecture": str(folder / ARCHITECTURE_FILE),
        "data": search.data,
        **{f"dataset.{key}": value for key, value in dataset.items()},
    }


def _take_run(arguments: list[str]) -> tuple[list[str], Path | None]:
    rest: list[str] = []
    folder = None
    pending = iter(arguments)
    for argument in pending:
        if argument == "--run" or argument.startswith("--run="):
            value = argument.partition("=")[2] or next(pending, "")
            if not value:
                raise ConfigError("--run needs the folder of a search")
            folder = Path(value)
        else:
            rest.append(argument)
    return rest, folder
