"""SIGKILL at any moment: what is resumed ends as if nothing had happened. `TFNAS_SLOW=1` kills 100 times."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kill_cases import (
    Run,
    assert_same_end,
    end_of,
    measured_search,
    search_of_targets,
    short_search,
    short_training,
    with_table,
)
from warm import WarmParent

SLOW = os.environ.get("TFNAS_SLOW") == "1"
KILLS = 100 if SLOW else 5


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmParent]:
    with WarmParent(tmp_path_factory.mktemp("warm")) as parent:
        yield parent


def _uninterrupted(run: Run, warm: WarmParent, folder: Path) -> tuple[dict[str, object], float]:
    """The end, and how long it took to get there in seconds."""
    ended = run.start(warm, folder)
    assert ended.code == 0, ended.output
    return end_of(folder), ended.seconds


def test_killed_at_random_moments(warm: WarmParent, tmp_path: Path) -> None:
    """Anywhere from the first line to the last: start, table, steps, checkpoints, derivation."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    runs = {"search": short_search(tmp_path / "search"), "train": short_training(tmp_path / "train")}
    expected = {kind: _uninterrupted(run, warm, tmp_path / f"{kind} whole") for kind, run in runs.items()}
    kills = tries = 0
    while kills < KILLS:
        tries += 1
        assert tries < 3 * KILLS + 10, f"{kills} kills in {tries} tries: the runs are faster than they were"
        kind = rng.choice(list(runs))
        run, (end, seconds) = runs[kind], expected[kind]
        folder = tmp_path / f"{kind} {tries}"
        after_s = rng.random() * seconds
        if run.start(warm, folder, kill_after_s=after_s).code is not None:
            continue
        kills += 1
        print(f"kill {kills}: {kind} after {after_s:.3f} s of {seconds:.3f}")
        assert_same_end(run.finish(warm, folder), end)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["search", *(pytest.param(k, marks=pytest.mark.slow) for k in ("train", "targets"))])
def test_killed_before_and_after_every_write(warm: WarmParent, tmp_path: Path, kind: str) -> None:
    """Before each call that moves a file (slow: that changes anything), which is after the one before it."""
    if kind == "search":
        run = short_search(tmp_path / kind, epochs=2, warmup_epochs=1, steps_per_epoch=1)
    elif kind == "targets":
        run = search_of_targets(tmp_path / kind)
    else:
        run = short_training(tmp_path / kind, epochs=2, steps_per_epoch=1)
    expected, _ = _uninterrupted(run, warm, tmp_path / "whole")
    number, killed = 0, []
    while True:
        number += 1
        folder = tmp_path / f"call {number}"
        ended = run.start(warm, folder, kill_at_call=number, calls="" if SLOW else "os.rename")
        if ended.code == 0:
            break
        assert ended.code is None, ended.output
        killed.append(ended.call)
        assert_same_end(run.finish(warm, folder), expected)
        shutil.rmtree(folder)
    print(killed)
    assert sum("checkpoint" in call for call in killed) >= 3


def test_killed_again_and_again(warm: WarmParent, tmp_path: Path) -> None:
    """A run that never gets further than a few steps at a time still comes to the same end."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    run = short_search(tmp_path / "search")
    expected, seconds = _uninterrupted(run, warm, tmp_path / "whole")
    folder = tmp_path / "parts"
    for _ in range(30 if SLOW else 3):
        if run.start(warm, folder, kill_after_s=seconds * rng.uniform(0.3, 1.0)).code is not None:
            break
    assert_same_end(run.finish(warm, folder), expected)


@pytest.mark.slow
def test_killed_while_measuring_the_table(warm: WarmParent, tmp_path: Path) -> None:
    """The table is what it happens to be; with it, the run is what it is without a kill."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    run = measured_search(tmp_path / "search")
    _, seconds = _uninterrupted(run, warm, tmp_path / "whole")
    unfinished = 0
    for number in range(10):
        folder = tmp_path / f"parts {number}"
        run.start(warm, folder, kill_after_s=seconds * rng.random())
        unfinished += not (folder / "lut.json").exists()
        end = run.finish(warm, folder)
        given = with_table(run, folder / "lut.json")
        assert_same_end(end, _uninterrupted(given, warm, tmp_path / f"given {number}")[0])
    print(f"{unfinished} of 10 kills before the table was done")
    assert unfinished > 0
