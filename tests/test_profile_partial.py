"""The file that keeps a build's samples: of one build at a time, refused where it is damaged or of another build."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damaged import damage
from profile_fakes import FakeEngine, Machine
from tfnas.cli import main
from tfnas.cli.codes import BAD_INPUT
from tfnas.latency import profile
from tfnas.latency.measurements import PARTIAL_SCHEMA_VERSION, Measurements
from tfnas.latency.partial_file import own_partial, partial_path
from tfnas.latency.profile import ProfileOptions, build_table
from tfnas.space import Space
from tfnas.space_io import load_space

SMALL = load_space("small")
OPTIONS = ProfileOptions(budget_s=1.5, max_samples=8, noise_limit=0.9, fit_architectures=4)


def build(partial: Path, options: ProfileOptions = OPTIONS, space: Space = SMALL) -> None:
    machine = Machine(noise=0.01)
    engine = FakeEngine(machine, conditions=options.conditions)
    build_table(space, options, engine=engine, timer=machine.timer(), now_s=machine.now_s, partial=partial)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A partial file's text."""
    partial = tmp_path_factory.mktemp("kept") / "partial"
    build(partial)
    return partial.read_text()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"options": replace(OPTIONS, seed=1)}, "seed: 0 there, 1 now"),  # its networks are others
        ({"options": replace(OPTIONS, fit_architectures=5)}, "fit_architectures: 4 there, 5 now"),
        ({"options": replace(OPTIONS, mode="slope")}, "mode"),
        ({"space": load_space("small", {"num_classes": 11})}, "space.num_classes: 10 there, 11 now"),  # another head
        ({"space": load_space("small", {"image_channels": 3})}, "space.image_channels"),
    ],
)
def test_samples_of_another_build_are_not_mixed_in(
    kept: str, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    partial = tmp_path / "partial"
    partial.write_text(kept)
    build(partial)  # the same: goes on
    partial.write_text(kept)
    with pytest.raises(ValueError, match=named) as caught:
        build(partial, **change)
    assert str(partial) in str(caught.value)
    assert partial.read_text() == kept


@pytest.mark.parametrize("name", ["torch", "device_uuid"])
def test_samples_of_another_machine_or_torch_are_not_mixed_in(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "partial").write_text(kept)
    monkeypatch.setattr(profile, "device_uuid", lambda device: "another")
    monkeypatch.setattr(profile.torch, "__version__", "1.0")
    with pytest.raises(ValueError, match=f"{name}: "):
        build(tmp_path / "partial")


def cut_reference(document: dict[str, Any]) -> None:
    document["reference"][0].pop()


def late_pass(document: dict[str, Any]) -> None:
    document["stem"][0][1] = document["passes"]


def negative_time(document: dict[str, Any]) -> None:
    document["blocks"][0]["samples"][0][0] = -1.0


def strange_curve(document: dict[str, Any]) -> None:
    document["blocks"][0]["key"]["resolution"] = 5


def width_out_of_range(document: dict[str, Any]) -> None:
    document["blocks"][0]["width"] = 10**6


def reversed_reference(document: dict[str, Any]) -> None:
    document["reference"].reverse()


def fewer_networks(document: dict[str, Any]) -> None:
    document["networks"].pop()


def conditions_list(document: dict[str, Any]) -> None:
    document["conditions"] = [1]


def other_schema(document: dict[str, Any]) -> None:
    document["partial_schema_version"] = PARTIAL_SCHEMA_VERSION - 1


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_cut_file_is_told_and_left(kept: str, tmp_path: Path, share: float) -> None:
    partial = tmp_path / "partial"
    partial.write_text(kept[: int(share * len(kept))])
    with pytest.raises(ValueError, match=r"partial: .*truncated.*; delete it"):
        build(partial)
    assert partial.read_text() == kept[: int(share * len(kept))]


@pytest.mark.parametrize(
    "break_it",
    [
        cut_reference, late_pass, negative_time, strange_curve, width_out_of_range, reversed_reference, fewer_networks,
        conditions_list, other_schema,
    ],
)  # fmt: skip
def test_damage_is_told_and_the_file_left(kept: str, tmp_path: Path, break_it: Callable[[Any], None]) -> None:
    document, partial = json.loads(kept), tmp_path / "partial"
    break_it(document)
    partial.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="delete it") as caught:
        build(partial)
    assert str(partial) in str(caught.value)
    assert json.loads(partial.read_text()) == document


def test_random_damage_is_a_value_error_or_no_damage(kept: str, tmp_path: Path) -> None:
    document, path = json.loads(kept), tmp_path / "partial"
    document["blocks"] = document["blocks"][:3]
    conditions = document["conditions"]
    refused = 0
    for seed in range(150):
        path.write_text(json.dumps(damage(random.Random(seed), document)))
        try:
            data = Measurements.load(path, conditions)
            if data.stem and data.head:
                data.slowness()
        except ValueError:
            refused += 1
    assert refused > 50


def test_two_builds_of_one_output(tmp_path: Path) -> None:
    output = tmp_path / "lut.json"
    with own_partial(output) as partial:
        assert partial == partial_path(output)
        with pytest.raises(ValueError, match=r"lut\.json: another build is at work"), own_partial(output):
            pass
        with own_partial(tmp_path / "other.json"):
            pass
    with own_partial(output):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "said"), [("folder", "is a folder"), ("no/file", "No such file"), ("", "folder")])
def test_an_output_that_cannot_be_written_is_told_first(
    tmp_path: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("tfnas.cli.lut_build.build_table", lambda *_, **__: pytest.fail("measured in vain"))
    assert main(["lut", "build", f"--output={name}", "--space=small"]) == BAD_INPUT
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_a_device_as_output_keeps_nothing_beside_it(tmp_path: Path) -> None:
    link = tmp_path / "device"
    link.symlink_to("/dev/null")
    with own_partial(link) as partial:
        assert partial is None
        assert list(tmp_path.iterdir()) == [link]
