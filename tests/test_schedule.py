"""Schedules against the paper's and the published code's figures."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tfnas.config_io import load_config
from tfnas.schedule import is_warmup, learning_rate, temperature


def test_published_temperature() -> None:
    config = load_config("imagenet")
    assert [temperature(config, epoch) for epoch in (0, 9, 10)] == [5.0, 5.0, 5.0]
    assert temperature(config, 11) == pytest.approx(4.8)
    # 5.0 x 0.96^80 = 0.19 is what the published code's temperature has become once the last epoch is over
    assert temperature(config, 90) == pytest.approx(0.1908, abs=1e-4)


def test_linear_temperature_ends_at_its_final_value() -> None:
    config = load_config("imagenet", {"sampling.tau_schedule": "linear"})
    values = [temperature(config, epoch) for epoch in range(90)]
    assert values[:11] == [5.0] * 11
    assert values[89] == pytest.approx(0.2)
    steps = [a - b for a, b in itertools.pairwise(values[10:])]
    assert max(steps) == pytest.approx(min(steps))


def test_linear_temperature_of_one_searching_epoch_is_finite() -> None:
    config = dataclasses.replace(load_config("quickstart"), epochs=1, warmup_epochs=0)
    assert temperature(config, 0) == 5.0


def test_learning_rate_is_pytorchs_cosine() -> None:
    config = load_config("imagenet")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.025)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 90)
    for epoch in range(90):
        assert learning_rate(config, epoch) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_warmup() -> None:
    config = load_config("imagenet")
    assert [is_warmup(config, epoch) for epoch in (0, 9, 10, 89)] == [True, True, False, False]
