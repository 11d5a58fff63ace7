"""Files with random damage: a reader returns something valid or raises ValueError, never anything else."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from damaged import damage
from latency_tables import synthetic_table
from tfnas.architecture import architecture_to_dict, load_architecture, save_architecture
from tfnas.config_io import SEARCH, config_to_dict
from tfnas.latency.lut import LatencyTable
from tfnas.latency.lut_import import export_csv
from tfnas.latency.lut_io import load_table, table_to_dict
from tfnas.latency.measure import conditions_of
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


def _latency_table(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    table = synthetic_table(load_space("small"))
    conditions = {"device_type": "cpu", "engine": "eager", "batch": 1, "threads": 1, "dtype": "float32"}
    facts = {"reference_ms": [2.0, 3.0], "noise": {"noisy": True}, "additivity": {"mape": 0.1}, "mode": "chain"}
    good = table_to_dict(dataclasses.replace(table, header=conditions | facts))
    good["curves"] = good["curves"][:2]

    def read(data: Any) -> object:
        (folder / "bad.json").write_text(json.dumps(data))
        found = load_table(folder / "bad.json")
        conditions_of(found.header)
        return found.curves

    return good, read


def _latency_rows(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    """A CSV table, as its rows of fields."""
    export_csv(
        folder / "good.csv", LatencyTable(1.0, dict(list(synthetic_table(load_space("small")).curves.items())[:2]))
    )
    rows = list(csv.reader((folder / "good.csv").open()))

    def read(data: Any) -> object:
        with (folder / "bad.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[row] if not isinstance(row, list) else row for row in data])
        return load_table(folder / "bad.csv").curves

    return rows, read


def _latency_yaml(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    block = "expanded_conv-input:28x28x40-output:28x28x40-expand:{}-kernel:3-stride:1-idskip:1"
    good = {block.format(ratio): {"mean": 0.1 * ratio} for ratio in (3, 6)}

    def read(data: Any) -> object:
        (folder / "bad.yaml").write_text(yaml.safe_dump(data))
        return load_table(folder / "bad.yaml").curves

    return good | {"Conv-input:224x224x3-output:112x112x32": {"mean": 2.0}}, read


def _search_configuration(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    return config_to_dict(SEARCH.load("quickstart")), SEARCH.from_dict


def _training_configuration(folder: Path) -> tuple[Any, Callable[[Any], object]]:
    return config_to_dict(TRAIN.load("quickstart")), TRAIN.from_dict


# reading a configuration takes fifty times as long as the others
KINDS = {
    _architecture_file: 400,
    _space: 400,
    _config: 400,
    _latency_table: 300,
    _latency_rows: 300,
    _latency_yaml: 100,
    _search_configuration: 25,
    _training_configuration: 25,
}


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
