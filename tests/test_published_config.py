"""The published code's `model.config`: round trips, forks with other stages, contradictions."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from random_spaces import random_architecture, random_space
from tfnas.architecture import Architecture, Op, count_multiply_adds, load_architecture
from tfnas.cli import run_command
from tfnas.published_config import (
    from_published_config,
    load_published_config,
    save_published_config,
    to_published_config,
)
from tfnas.space_io import load_space


def _config() -> dict[str, Any]:
    return copy.deepcopy(to_published_config(load_architecture("tf-nas-a")[0]))


def test_tf_nas_a_in_the_published_format() -> None:
    config = _config()
    assert list(config) == [
        *("first_stem", "second_stem", "stage1", "stage2", "stage3", "stage4", "stage5", "stage6"),
        *("feature_mix_layer", "classifier"),
    ]
    assert config["first_stem"] == {
        **{"name": "ConvLayer", "kernel_size": 3, "stride": 2, "groups": 1, "has_shuffle": False, "bias": False},
        **{"in_channels": 3, "out_channels": 32, "use_bn": True, "affine": True, "act_func": "relu"},
        "ops_order": "weight_bn_act",
    }
    assert config["stage2"][2] == {
        **{"name": "MBInvertedResBlock", "in_channels": 40, "mid_channels": 170, "se_channels": 80},
        **{"out_channels": 40, "kernel_size": 5, "stride": 1, "groups": 1, "has_shuffle": False, "bias": False},
        **{"use_bn": True, "affine": True, "act_func": "swish"},
    }
    assert config["second_stem"]["mid_channels"] == config["second_stem"]["in_channels"] == 32
    assert config["classifier"] == {
        **{"name": "LinearLayer", "in_features": 1280, "out_features": 1000, "bias": True, "use_bn": False},
        **{"affine": False, "act_func": None, "ops_order": "weight_bn_act"},
    }


def test_tf_nas_a_round_trip(tmp_path: Path) -> None:
    arch, _ = load_architecture("tf-nas-a")
    save_published_config(tmp_path / "model.config", arch)
    assert load_published_config(tmp_path / "model.config") == arch
    assert load_published_config(tmp_path / "model.config", space=arch.space) == arch


@pytest.mark.parametrize("seed", range(40))
def test_random_round_trips(seed: int) -> None:
    """The same network comes back; the same architecture too, given its space and candidates that differ."""
    rng = random.Random(seed)
    space = random_space(rng)
    arch = random_architecture(rng, space)
    stages = []
    for ops, layers in zip(arch.stages, space.layers_of_stage, strict=True):
        widened = []
        for op, layer in zip(ops, layers, strict=False):
            maximum = layer.max_width(layer.candidate_index(op.candidate))
            widened.append(replace(op, width=max(op.width, min(layer.in_channels + 1, maximum))))
        stages.append(tuple(widened))
    arch = Architecture(space, tuple(stages))
    config = json.loads(json.dumps(to_published_config(arch)))
    back = from_published_config(config, space=space)
    assert to_published_config(back) == config
    assert back.space == space
    assert back.keys() == arch.keys()


def test_classes_and_image_channels_may_differ() -> None:
    config = _config()
    config["classifier"]["out_features"] = 10
    config["first_stem"]["in_channels"] = 1
    arch = from_published_config(config)
    assert arch.space == replace(load_space("imagenet"), num_classes=10, image_channels=1)
    assert from_published_config(config, space=load_space("imagenet")) == arch


def test_the_resolution_is_given_by_the_caller() -> None:
    arch = from_published_config(_config(), resolution=192)
    assert arch.space == load_space("imagenet", {"resolution": 192})


def test_a_fork_with_fewer_stages_gets_a_space_of_its_own() -> None:
    config = _config()
    del config["stage6"]
    config["feature_mix_layer"]["in_channels"] = 192
    arch = from_published_config(config)
    original, _ = load_architecture("tf-nas-a")
    assert arch.stages == original.stages[:5]
    assert [stage.depth for stage in arch.space.stages] == [2, 3, 4, 4, 4]
    assert count_multiply_adds(arch) < count_multiply_adds(original)
    with pytest.raises(ValueError, match=r"does not belong to search space 'imagenet': it has 5 stages, there 6"):
        from_published_config(config, space=load_space("imagenet"))


def test_more_and_deeper_stages_are_read() -> None:
    config = _config()
    config["stage7"] = [{**config["stage6"][0], "in_channels": 320, "mid_channels": 2000, "se_channels": 640}]
    config["stage1"].append(dict(config["stage1"][1]))
    arch = from_published_config(config)
    assert [len(ops) for ops in arch.stages] == [3, 3, 4, 4, 4, 1, 1]
    with pytest.raises(ValueError, match="stages, there 6"):
        from_published_config(config, space=load_space("imagenet"))
    del config["stage7"]
    with pytest.raises(ValueError, match="stage1 has 3 layers, there at most 2"):
        from_published_config(config, space=load_space("imagenet"))


def test_a_candidate_of_another_space_is_read_with_that_space() -> None:
    config = _config()
    config["stage3"][1]["kernel_size"] = 7
    with pytest.raises(ValueError, match=r"stage3\[1\]: no candidate has kernel_size 7, se_channels 0.*known: k3_e3"):
        from_published_config(config)
    wide = {"name": "k7", "kernel_size": 7, "expansion": 6, "min_expansion": 4, "max_expansion": 8}
    names = [candidate.name for candidate in load_space("imagenet").candidates]
    space = load_space("imagenet", {"candidates": [*names, wide]})
    assert from_published_config(config, space=space).stages[2][1] == Op("k7", 7, 500, 0)


def test_skip_in_spaces_are_accepted() -> None:
    space = load_space("imagenet", {"depth_space": "skip-in"})
    assert from_published_config(_config(), space=space).stages == load_architecture("tf-nas-a")[0].stages


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("first_stem", None, "first_stem: expected a mapping"),
        ("first_stem.kernel_size", 5, "first_stem.kernel_size: expected 3, got 5"),
        ("first_stem.stride", 4, "first_stem.stride: expected one of 1, 2"),
        ("first_stem.act_func", "gelu", "first_stem.act_func: expected one of relu, relu6, swish, h-swish"),
        ("first_stem.padding", 1, "first_stem.padding: unknown key"),
        ("second_stem.mid_channels", 64, "second_stem.mid_channels: expected 32 as the blocks before it"),
        ("second_stem.act_func", "swish", "second_stem.act_func: expected 'relu'"),
        ("stage1", [], "stage1: expected a non-empty list"),
        ("stage0", [], "stage0: unknown key"),
        ("stage8", [], "stage8: unknown key"),
        ("stage1.0.name", "IdentityLayer", r'stage1\[0\]\.name: expected "MBInvertedResBlock", got \'IdentityLayer\''),
        ("stage1.0.groups", 2, r"stage1\[0\]\.groups: expected 1, got 2"),
        ("stage1.0.bias", 0, r"stage1\[0\]\.bias: expected false, got 0"),
        ("stage1.0.affine", False, r"stage1\[0\]\.affine: expected true"),
        ("stage1.0.mid_channels", 16, r"stage1\[0\]\.mid_channels: expected more than in_channels \(16\)"),
        ("stage1.0.mid_channels", 129, r"stage1\[0\]: no candidate has kernel_size 3, se_channels 32"),
        ("stage1.0.se_channels", -1, r"stage1\[0\]\.se_channels: expected an integer from 0 to 1048576"),
        ("stage1.1.stride", 2, r"stage1\[1\]\.stride: expected 1 as the blocks before it ask for, got 2"),
        ("stage1.1.act_func", "swish", r"stage1\[1\]\.act_func: expected 'relu'"),
        ("stage2.0.in_channels", 25, r"stage2\[0\]\.in_channels: expected 24"),
        ("stage2.1.out_channels", 48, r"stage2\[1\]\.out_channels: expected 40"),
        ("feature_mix_layer.in_channels", 192, "feature_mix_layer.in_channels: expected 320"),
        ("feature_mix_layer.stride", 2, "feature_mix_layer.stride: expected 1"),
        ("classifier.in_features", 1024, "classifier.in_features: expected 1280"),
        ("classifier.bias", False, "classifier.bias: expected true"),
        ("classifier.out_features", 0, "classifier.out_features: expected an integer from 1 to 1048576"),
        ("classifier.out_features", 2**70, "classifier.out_features: expected an integer from 1 to 1048576"),
        ("second_stem.se_channels", 2**70, "second_stem.se_channels: expected an integer from 0 to 1048576"),
        ("clasifier", {}, "clasifier: unknown key; did you mean 'classifier'"),
    ],
)
def test_contradictions_are_named(path: str, value: Any, message: str, tmp_path: Path) -> None:
    config = _config()
    *parents, last = path.split(".")
    target: Any = config
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[last] = value
    file = tmp_path / "bad.config"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        load_published_config(file)
    assert "bad.config" in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"first_stem": 1}'])
def test_other_content_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "odd.config").write_text(content)
    with pytest.raises(ValueError, match=r"odd\.config"):
        load_published_config(tmp_path / "odd.config")


def test_blocks_without_expansion_cannot_be_written() -> None:
    arch, _ = load_architecture("tf-nas-a")
    first = replace(arch.stages[0][0], width=16)
    narrow = Architecture(arch.space, ((first, *arch.stages[0][1:]), *arch.stages[1:]))
    with pytest.raises(ValueError, match="layer 0: the published code has no block with an expansion to 16 channels"):
        to_published_config(narrow)


def test_every_command_reads_it_as_an_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = load_architecture("tf-nas-a")[0]
    save_published_config(tmp_path / "model.config", arch)
    assert load_architecture(tmp_path / "model.config") == (arch, {})
    assert run_command("info", ["--architecture", str(tmp_path / "model.config")]) == 0
    (tmp_path / "model.config").write_text((tmp_path / "model.config").read_text().replace('"stage2"', '"stage8"'))
    capsys.readouterr()
    assert run_command("info", ["--architecture", str(tmp_path / "model.config")]) == 2
    err = capsys.readouterr().err
    assert "model.config" in err
    assert "stage8" in err
