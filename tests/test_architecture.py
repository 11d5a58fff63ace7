"""Architecture files: round trips, the shipped TF-NAS-A, and everything a bad file may hold."""

from __future__ import annotations

import copy
import json
import os
import random
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from random_spaces import random_architecture, random_space
from tfnas.architecture import (
    Architecture,
    Op,
    architecture_from_dict,
    architecture_to_dict,
    builtin_architectures,
    count_multiply_adds,
    count_parameters,
    load_architecture,
    save_architecture,
)
from tfnas.space_io import load_space


@pytest.mark.parametrize("seed", range(40))
def test_random_architectures_survive_a_round_trip(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    arch = random_architecture(rng, random_space(rng))
    facts = {"target_latency_ms": 1.5, "seed": seed, "repaired": seed % 2 == 0, "versions": {"torch": "2.14"}}
    save_architecture(tmp_path / "a.json", arch, measured_latency_ms=None, **facts)
    assert load_architecture(tmp_path / "a.json") == (arch, facts)
    assert architecture_from_dict(json.loads(json.dumps(architecture_to_dict(arch)))) == arch


def test_tf_nas_a() -> None:
    arch, facts = load_architecture("tf-nas-a")
    assert builtin_architectures() == ["tf-nas-a"]
    assert facts["target_latency_ms"] == 18.0
    assert arch.space == load_space("imagenet")
    assert [op.width for _, op in arch.layers()] == [
        *(83, 128, 138, 297, 170, 248, 500, 424, 477),
        *(504, 796, 723, 555, 813, 1370, 1138, 1359, 1203),
    ]
    for layer, op in arch.layers():
        c = layer.candidate_index(op.candidate)
        assert layer.min_width(c) <= op.width <= layer.max_width(c)
    # published: 457 M multiply-adds, and 456.748 M / 8.7575 M by the finer count
    assert count_multiply_adds(arch) == 456_747_736
    assert count_parameters(arch) == 8_757_527


def test_keys_belong_to_the_space() -> None:
    arch, _ = load_architecture("tf-nas-a")
    keys, widths = zip(*arch.keys(), strict=True)
    assert set(keys) <= set(arch.space.keys)
    assert list(widths) == [op.width for _, op in arch.layers()]


def test_shallow_architectures_have_fewer_layers() -> None:
    full, _ = load_architecture("tf-nas-a")
    shallow = Architecture(full.space, tuple(ops[:1] for ops in full.stages))
    assert [layer.position for layer, _ in shallow.layers()] == [0] * 6
    assert count_parameters(shallow) < count_parameters(full)


def test_architecture_of_a_skip_in_space_lists_kept_layers_only() -> None:
    space = load_space("small", {"depth_space": "skip-in"})
    layers = space.layers_of_stage[0]
    arch = Architecture(space, tuple((Op.of(stage[0], 0, 5),) for stage in space.layers_of_stage))
    with pytest.raises(ValueError, match=r"stages\[0\]\[1\]\.candidate: unknown candidate 'skip'"):
        replace(arch, stages=((arch.stages[0][0], Op.of(layers[1], 8, 0)), *arch.stages[1:]))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 2, "schema_version: this version reads 1, got 2"),
        ("schema_version", "1", "schema_version: expected an integer"),
        ("stagse", [], "stagse: unknown key; did you mean 'stages'"),
        ("lut_latency", 3.0, "lut_latency: unknown key; did you mean 'lut_latency_ms'"),
        ("lut_latency_ms", "18", "lut_latency_ms: expected a number, got '18'"),
        ("lut_latency_ms", -1, "lut_latency_ms: expected a finite number of at least 0"),
        ("seed", 1.5, "seed: expected an integer"),
        ("repaired", 1, "repaired: expected true or false"),
        ("title", "", "title: expected a non-empty string"),
        ("versions", [1], "versions: expected a mapping"),
        ("space", "imagnet", "unknown search space 'imagnet'; did you mean 'imagenet'"),
        ("space", 5, "space: expected the name of a search space or all of its fields"),
        ("space", {"name": "x"}, "space: resolution: missing"),
        ("stages", [], "stages: expected a non-empty list"),
        ("stages", [[]], "stages: expected 6 lists, one for each stage of search space 'imagenet', got 1"),
        ("stages.0", [], r"stages\[0\]: expected 1 to 2 layers, got 0"),
        ("stages.0", 3, r"stages\[0\]: expected a list of operations, got 3"),
        ("stages.0.1", None, r"stages\[0\]\[1\]: expected a mapping"),
        ("stages.0.1.candidate", "k3_e4", r"stages\[0\]\[1\]\.candidate: unknown candidate 'k3_e4'; did you mean"),
        ("stages.0.1.candidate", "k3_e6", r"stages\[0\]\[1\]\.kernel_size: expected 3 for k3_e6 .*got 5"),
        ("stages.0.1.width", 0, r"stages\[0\]\[1\]\.width: expected an integer of at least 1, got 0"),
        (
            "stages.0.1.width",
            193,
            r"stages\[0\]\[1\]\.width: expected an integer from 1 to 192 for k5_e6 with",
        ),
        ("stages.0.1.width", 100.0, r"stages\[0\]\[1\]\.width: expected an integer, got 100.0"),
        ("stages.0.1.se_channels", 24, r"stages\[0\]\[1\]\.se_channels: expected 0 for k5_e6"),
        ("stages.0.1.widht", 1, r"stages\[0\]\[1\]\.widht: unknown key; did you mean 'width'"),
    ],
)
def test_bad_entries_are_named(path: str, value: Any, message: str, tmp_path: Path) -> None:
    arch, facts = load_architecture("tf-nas-a")
    save_architecture(tmp_path / "good.json", arch, **facts)
    data = json.loads((tmp_path / "good.json").read_text()) | {"space": "imagenet"}
    *parents, last = path.split(".")
    target: Any = data
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[int(last) if last.isdigit() else last] = value
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        load_architecture(file)
    assert "bad.json" in str(error.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    arch, _ = load_architecture("tf-nas-a")
    save_architecture(tmp_path / "good.json", arch)
    text = (tmp_path / "good.json").read_text().rstrip()
    file = tmp_path / "cut.json"
    for length in random.Random(0).sample(range(len(text)), 60):
        file.write_text(text[:length])
        with pytest.raises(ValueError, match=r"cut\.json: .*truncated"):
            load_architecture(file)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"[]", b"null", b'{"a": 1, "a": 2}', b'{"seed": NaN}', b"[" * 99999]
)
def test_other_content_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"architecture file .*odd\.json"):
        load_architecture(tmp_path / "odd.json")


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'tf-nas-a'"):
        load_architecture("tf-nas-b")
    with pytest.raises(FileNotFoundError, match="neither a file nor built in"):
        load_architecture(tmp_path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    arch, _ = load_architecture("tf-nas-a")
    file = tmp_path / "a.json"
    save_architecture(file, arch, seed=1)
    before = file.read_bytes()
    for facts in ({"seed": -1}, {"sed": 1}, {"lut_latency_ms": float("nan")}, {"details": {"x": float("inf")}}):
        with pytest.raises(ValueError):
            save_architecture(file, arch, **facts)
    with pytest.raises(TypeError):
        save_architecture(file, arch, details={"x": object()})
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_construction_checks(tmp_path: Path) -> None:
    arch, _ = load_architecture("tf-nas-a")
    stages = copy.deepcopy(arch.stages)
    for bad in (
        replace(stages[0][0], width=True),
        replace(stages[0][0], width=10**9),
        replace(stages[0][0], kernel_size=5),
    ):
        with pytest.raises(ValueError, match=r"stages\[0\]\[0\]"):
            Architecture(arch.space, ((bad, stages[0][1]), *stages[1:]))
    with pytest.raises(ValueError, match=r"stages\[5\]: expected 1 to 1 layers, got 2"):
        Architecture(arch.space, (*stages[:5], stages[5] * 2))
