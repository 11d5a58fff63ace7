"""Reading, writing and refusing search spaces."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from random_spaces import random_space
from tfnas.space import ACTIVATIONS, DEPTH_SPACES, Candidate
from tfnas.space_io import builtin_spaces, load_space, save_space, space_from_dict, space_to_dict, validate_space


@pytest.mark.parametrize("name", builtin_spaces())
def test_builtin_spaces_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    space = load_space(name)
    assert space.name == name
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(space_to_dict(space)))
    assert load_space(path) == space
    assert space_from_dict(space_to_dict(space)) == space


@pytest.mark.parametrize("seed", range(40))
def test_random_spaces_survive_a_round_trip(seed: int, tmp_path: Path) -> None:
    space = random_space(random.Random(seed))
    save_space(tmp_path / "space.yaml", space)
    assert load_space(tmp_path / "space.yaml") == space


def test_builtin_names() -> None:
    assert builtin_spaces() == ["imagenet", "imagenet-no-se", "small"]


def test_overrides_replace_fields_and_name_candidates() -> None:
    stages = [{"out_channels": 8, "depth": 5, "stride": 1, "act": "hard_swish"}]
    changes = {
        "resolution": 96,
        "image_channels": 3,
        "num_classes": 7,
        "stages": stages,
        "candidates": ["k5_e6", "k3_e3"],
    }
    space = load_space("small", changes)
    assert (space.resolution, space.image_channels, space.num_classes) == (96, 3, 7)
    assert [layer.act for layer in space.layers] == ["hard_swish"] * 5
    assert space.candidates == (load_space("imagenet").candidates[6], load_space("imagenet").candidates[0])


def test_a_file_may_start_from_another_and_add_candidates(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text("{base: small, name: parent, num_classes: 3}")
    (tmp_path / "child.yaml").write_text(
        "base: parent.yaml\nname: child\ncandidates:\n  - k3_e3_se1\n"
        "  - {name: k7_e2, kernel_size: 7, expansion: 2, min_expansion: 1.5, max_expansion: 2.5}\n"
    )
    space = load_space(tmp_path / "child.yaml")
    assert (space.name, space.num_classes, space.resolution) == ("child", 3, 28)
    assert space.candidates[1] == Candidate("k7_e2", 7, 2, 1.5, 2.5, 0.0)


def _bad(key: str, value: Any) -> dict[str, Any]:
    """`small` as a dict with the entry at dotted `key` set to `value`."""
    data = copy.deepcopy(space_to_dict(load_space("small")))
    *parents, last = key.split(".")
    target: Any = data
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[int(last) if last.isdigit() else last] = value
    return data


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resolution", 0, r"resolution: expected an integer from 1 to 1048576, got 0"),
        ("resolution", 28.0, r"resolution: expected an integer, got 28.0"),
        ("resolution", 2**21, r"resolution: expected an integer from 1 to 1048576"),
        ("stages.0.depth", 10**30, r"stages\[0\]\.depth: expected an integer from 1 to 64"),
        ("candidates.0.max_expansion", 1e308, r"candidates\[0\]\.max_expansion: .* at most 1024"),
        ("candidates.0.max_expansion", 10**400, r"candidates\[0\]\.max_expansion: expected a finite number"),
        ("resolution", True, r"resolution: expected an integer, got True"),
        ("num_classes", "ten", r"num_classes: expected an integer, got 'ten'"),
        ("stem_stride", 3, r"stem_stride: expected one of 1, 2, got 3"),
        ("stem_act", "relu7", r"stem_act: expected one of relu, relu6, swish, hard_swish, got 'relu7'; did you mean"),
        ("head_act", None, r"head_act: expected one of"),
        ("depth_space", "skip_in", r"depth_space: expected one of sink, skip-in, skip-out.*did you mean 'skip-in'"),
        ("stages", [], r"stages: expected a non-empty list"),
        ("stages", {"a": 1}, r"stages: expected a non-empty list"),
        ("stages.2", 7, r"stages\[2\]: expected a mapping"),
        ("stages.1.stride", 4, r"stages\[1\]\.stride: expected one of 1, 2, got 4"),
        ("stages.1.depth", 0, r"stages\[1\]\.depth: expected an integer from 1 to 64, got 0"),
        ("stages.1.act", "swihs", r"stages\[1\]\.act: .*did you mean 'swish'"),
        ("stages.1.out_channel", 4, r"stages\[1\]\.out_channel: unknown key; did you mean 'out_channels'"),
        ("candidates.3.kernel_size", 4, r"candidates\[3\]\.kernel_size: expected one of 3, 5, 7, got 4"),
        ("candidates.3.kernel_size", 11, r"candidates\[3\]\.kernel_size"),
        ("candidates.0.expansion", 5, r"candidates\[0\]\.expansion: expected 0 < min_expansion <= expansion"),
        ("candidates.0.min_expansion", 0, r"candidates\[0\]\.expansion: expected 0 < min_expansion"),
        ("candidates.0.max_expansion", float("inf"), r"candidates\[0\]\.max_expansion: expected a finite number"),
        ("candidates.0.max_expansion", float("nan"), r"candidates\[0\]\.max_expansion: expected a finite number"),
        ("candidates.0.se_expansion", -1, r"candidates\[0\]\.se_expansion: expected a finite number of at least 0"),
        ("candidates.0.se_expansion", 0.01, r"candidates\[0\]\.se_expansion: 0.01 gives no SE channel with 16 input"),
        ("candidates.0.name", "skip", r"candidates\[0\]\.name: expected letters.* other than 'skip'"),
        ("candidates.0.name", "a.b", r"candidates\[0\]\.name"),
        ("candidates.0.name", "k5_e3", r"candidates\[2\]\.name: expected unique names, got 'k5_e3' again"),
        ("candidates.1", "k3e3", r"candidates\[1\]: unknown candidate 'k3e3'; did you mean 'k3_e3'"),
        ("candidates.1", None, r"candidates\[1\]: expected a mapping"),
        ("num_class", 10, r"num_class: unknown key; did you mean 'num_classes'\? \(allowed: name, resolution"),
    ],
)
def test_bad_values_are_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_from_dict(_bad(key, value))


def test_every_missing_key_is_named() -> None:
    complete = space_to_dict(load_space("small"))
    for key in complete:
        partial = {k: v for k, v in complete.items() if k != key}
        if key == "depth_space":
            assert space_from_dict(partial).depth_space == "sink"
            continue
        with pytest.raises(ValueError, match=f"^{key}: missing"):
            space_from_dict(partial)


def test_a_range_without_a_whole_width_is_refused() -> None:
    narrow = {"name": "narrow", "kernel_size": 3, "expansion": 1.02, "min_expansion": 1.02, "max_expansion": 1.02}
    with pytest.raises(ValueError, match=r"candidates\[0\]: no whole width lies in \[1.02, 1.02\] with 16 input"):
        load_space("small", {"candidates": [narrow]})


def test_spaces_built_in_python_are_checked(tmp_path: Path) -> None:
    space = load_space("small")
    object.__setattr__(space, "head_act", "gelu")
    with pytest.raises(ValueError, match="head_act"):
        validate_space(space)
    with pytest.raises(ValueError, match="head_act"):
        save_space(tmp_path / "space.yaml", space)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("depth_space", DEPTH_SPACES)
def test_all_activations_and_depth_spaces_are_accepted(act: str, depth_space: str) -> None:
    space = load_space("small", {"stem_act": act, "head_act": act, "depth_space": depth_space})
    assert (space.stem_act, space.depth_space) == (act, depth_space)


def test_names_and_files_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown search space 'imagnet'; did you mean 'imagenet'"):
        load_space("imagnet")
    with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
        load_space(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1, 2", "not valid YAML"),
        ("", "expected a mapping"),
        ("- 1", "expected a mapping"),
        ("a: 1\na: 2", "found the key 'a' twice"),
        ("x: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("base: 3", "base: expected the name or path"),
        ("base: imagenet-nose", "unknown search space 'imagenet-nose'; did you mean 'imagenet-no-se'"),
        ("base: bad.yaml", "leads back to itself"),
        ("{base: small, resolutoin: 3}", "bad.yaml: resolutoin: unknown key; did you mean 'resolution'"),
        ("{base: small, candidates: [k3_e9]}", r"bad.yaml: candidates\[0\]: unknown candidate 'k3_e9'"),
        ("\x80\x01", "not valid YAML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        load_space(path)
    assert "bad.yaml" in str(error.value)
