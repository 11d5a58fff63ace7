"""Files with random damage: a reader returns something valid or raises ValueError, never anything else."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged import damage
from tfnas.architecture import architecture_to_dict, load_architecture, save_architecture
from tfnas.config_io import SEARCH, config_to_dict
from tfnas.published_config import from_published_config, to_published_config
from tfnas.space_io import load_space, space_from_dict, space_to_dict
from tfnas.train_config import TRAIN


def _architecture_file(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    arch, facts = load_architecture("tf-nas-a")
    save_architecture(folder / "good.json", arch, **facts, seed=3, repaired=True, versions={"torch": "2"})

    def read(data: Any) -> object:
        (folder / "bad.json").write_text(json.dumps(data))
        return architecture_to_dict(load_architecture(folder / "bad.json")[0])

    return json.loads((folder / "good.json").read_text()), read


def _space(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    return json.loads(json.dumps(space_to_dict(load_space("small")))), lambda data: space_from_dict(data).keys


def _config(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    arch, _ = load_architecture("tf-nas-a")
    return to_published_config(arch), lambda data: from_published_config(data).keys()


def _search_configuration(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    return config_to_dict(SEARCH.load("quickstart")), SEARCH.from_dict


def _training_configuration(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    return config_to_dict(TRAIN.load("quickstart")), TRAIN.from_dict


# reading a configuration takes fifty times as long as the others
KINDS = {_architecture_file: 400, _space: 400, _config: 400, _search_configuration: 25, _training_configuration: 25}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_valid_or_a_value_error(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    good, read = kind(tmp_path)
    read(good)
    refused = 0
    count = KINDS[kind] * (8 if os.environ.get("TFNAS_SLOW") == "1" else 1)
    for seed in range(count):
        bad = damage(random.Random(seed), good)
        try:
            read(bad)
        except ValueError:
            refused += 1
        except Exception as error:  # what must not happen, reported with the seed that makes it
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert refused > count / 2
