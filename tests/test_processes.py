"""What the processes of a run exchange: means and sums in one all-reduce, the first one's values, equality."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from process_cases import raise_failures, run_processes
from tfnas import pipeline, train
from tfnas.cli import run_command
from tfnas.config import ConfigError, SearchConfig
from tfnas.interrupt import ProcessFailed
from tfnas.pipeline import choose_device, on_device
from tfnas.processes import ALONE, ProcessesDiverged, open_processes
from tfnas.train_config import TrainConfig
from torch import Tensor

CPU = torch.device("cpu")


def _tensors(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    strided = torch.randn(3, 4, 2, 2, generator=generator).to(memory_format=torch.channels_last)
    means = [torch.randn(5, generator=generator), strided, torch.randn(2, 3, generator=generator).t(), torch.empty(0)]
    return means, [torch.tensor(7 + rank), torch.tensor([0.5 * rank], dtype=torch.float64)]


def _reduce() -> Any:
    with open_processes(CPU) as processes:
        means, sums = _tensors(processes.rank)
        calls = 0
        all_reduce = torch.distributed.all_reduce

        def counting(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            all_reduce(*arguments)

        torch.distributed.all_reduce = counting
        processes.reduce_(means, sums)
        before = processes.stop_agreed()
        processes.wants_stop = processes.rank == 1
        processes.reduce_([], [torch.zeros(1)])
        return calls, means, sums, before, processes.stop_agreed()


def test_means_and_sums_in_one_all_reduce() -> None:
    world = 3
    results = raise_failures(run_processes(world, _reduce))
    parts = [_tensors(rank) for rank in range(world)]
    for calls, means, sums, before, after in results:
        assert calls == 2
        assert (before, after) == (False, True)
        for index, mean in enumerate(means):
            expected = torch.stack([part[0][index].double() for part in parts]).mean(0)
            torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(mean, results[0][1][index])
        assert [float(total) for total in sums] == [7 + 8 + 9, 1.5]
        assert sums[0].dtype == torch.int64


def _from_first(fails: bool) -> Any:
    def compute() -> str:
        if os.environ["RANK"] != "0":
            raise AssertionError("called elsewhere")
        if fails:
            raise ConfigError("key must be 3, got 4")
        return "value"

    with open_processes(CPU) as processes:
        return processes.from_first(compute)


def test_the_firsts_value_or_error_reaches_all() -> None:
    assert raise_failures(run_processes(2, _from_first, False)) == ["value", "value"]
    first, second = run_processes(2, _from_first, True)
    assert isinstance(first, ConfigError)
    assert isinstance(second, ProcessFailed)
    assert "process 0 failed" in str(second)


def _require_equal(different: str) -> None:
    with open_processes(CPU) as processes:
        alpha, widths = torch.zeros(2, 3), [[4, 5]]
        if processes.rank == 2 and different == "alpha":
            alpha[0, 1] = 1e-45
        if processes.rank == 1 and different == "widths":
            widths = [[4, 6]]
        processes.require_equal({"alpha": [alpha, torch.empty(0)], "widths": [str(widths)]}, "after epoch 3")


@pytest.mark.parametrize(("different", "rank"), [("alpha", 2), ("widths", 1)])
def test_a_difference_is_named(different: str, rank: int) -> None:
    for result in run_processes(3, _require_equal, different):
        assert isinstance(result, ProcessesDiverged)
        assert "after epoch 3: the processes no longer hold the same values, different from process 0's are: " in str(
            result
        )
        assert f"{different} of process {rank}." in str(result)


def _one_leaves() -> None:
    with open_processes(CPU) as processes:
        if processes.rank == 1:
            return
        processes.reduce_([torch.zeros(3)])


def test_a_process_that_ends_is_an_error_of_the_others() -> None:
    first, second = run_processes(2, _one_leaves)
    assert second is None
    assert isinstance(first, ProcessFailed)
    assert "another process has ended" in str(first)


def test_alone_everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.ones(2)
    ALONE.reduce_([value], [value])
    assert value.tolist() == [1.0, 1.0]
    assert ALONE.from_first(lambda: 3) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"), open_processes(CPU):
        pass


def test_the_command_says_so_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*arguments: Any) -> None:
        raise ProcessFailed("process 1: process 0 failed and says why")

    monkeypatch.setattr("tfnas.pipeline.search", fail)
    assert run_command("search", ["--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "tfnas search: process 1: process 0 failed and says why\n"


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="name cuda, not cuda:0"):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="cuda:1 asked for"):
        choose_device("cuda")


@pytest.mark.parametrize("run", [lambda: pipeline.search(SearchConfig()), lambda: train.train(TrainConfig())])
def test_the_gpu_of_a_run_is_the_current_one(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its pinned memory, and with it a context, would be of the first GPU in every process."""
    current: list[torch.device] = []

    @contextmanager
    def device(one: torch.device) -> Iterator[None]:
        current.append(one)
        yield
        current.pop()

    def stop(device: torch.device) -> None:
        raise LookupError(current[-1])

    assert isinstance(on_device(torch.device("cpu")), nullcontext)
    monkeypatch.setattr(torch.cuda, "device", device)
    for module in (pipeline, train):
        monkeypatch.setattr(module, "choose_device", lambda name: torch.device("cuda:1"))
        monkeypatch.setattr(module, "open_processes", stop)
    with pytest.raises(LookupError, match="cuda:1"):
        run()
