"""`tfnas lut build` killed while it measures: the same command goes on, and no sample that was kept is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from search_cases import tiny_space
from tfnas.cli.codes import OK
from tfnas.latency.lut_io import load_table
from tfnas.latency.profile import ProfileOptions
from tfnas.space_io import load_space

WARM_UP = ProfileOptions().fit_architectures  # reports of progress before the first network is timed
ENDS = [
    ("networks", WARM_UP + 12, signal.SIGKILL),
    ("networks", WARM_UP + 5, signal.SIGKILL),
    ("widths", 2, signal.SIGKILL),
    ("widths", 1, signal.SIGTERM),
    ("widths", 1, signal.SIGINT),
]


def samples_of(partial: Path) -> dict[str, list[Any]]:
    """Every list of samples in a partial file, by what was timed."""
    kept = json.loads(partial.read_text())
    blocks = {f"block {block['key']} {block['width']}": block["samples"] for block in kept["blocks"]}
    networks = {f"network {number}": samples for number, samples in enumerate(kept["networks"])}
    return blocks | networks | {name: kept[name] for name in ("stem", "head", "reference", "networks_reference")}


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path) -> None:
    space, output = tiny_space(tmp_path), tmp_path / "lut.json"
    arguments = [str(output), f"--space={space}", "--batch=1", "--threads=1", "--budget_s=0.5"]
    copies = [str(tmp_path / f"kept {number}") for number in range(len(ENDS))]
    cases = [(*end, copy, arguments) for end, copy in zip(ENDS, copies, strict=True)]
    ended = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("build_ends.py")),
            json.dumps([*cases, ("", 0, 0, "", arguments)]),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    codes = json.loads(ended.stdout.splitlines()[-1])
    assert codes == [-9, -9, -9, 128 + signal.SIGTERM, 128 + signal.SIGINT, OK], ended.stderr
    assert ended.stderr.count("the same command goes on") == 2  # those that can still speak
    before: dict[str, list[Any]] = {}
    for (phase, _, _), copy in zip(ENDS, copies, strict=True):
        now = samples_of(Path(copy))
        assert {name: now[name][: len(samples)] for name, samples in before.items()} == before
        assert sum(map(len, now.values())) > sum(map(len, before.values())), "nothing was measured in between"
        assert any(name.startswith("block") for name in now) == (phase == "widths")
        before = now
    table = load_table(output)
    table.require_space(load_space(space))
    kept = [sample for name, samples in before.items() if name.startswith("block") for sample in samples]
    assert sum(curve.samples.sum() for curve in table.curves.values()) >= sum(not disturbed for _, _, disturbed in kept)
    assert table.header["seconds"] > json.loads(Path(copies[-1]).read_text())["seconds"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("lut")) == ["lut.json"]
