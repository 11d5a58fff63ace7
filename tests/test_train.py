"""Training end to end on a tiny network: what it writes, that it learns, repeats and resumes, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from search_cases import assert_equal_bits
from tfnas.architecture import load_architecture, save_architecture
from tfnas.checkpoint import load_checkpoint
from tfnas.cli import run_command
from tfnas.cli.train import parse_train_arguments
from tfnas.config import ConfigError
from tfnas.config_io import config_to_dict, config_to_yaml, load_config
from tfnas.data.errors import DataError
from tfnas.evaluate import evaluate_network
from tfnas.interrupt import TrainingInterrupted
from tfnas.network import build_network
from tfnas.progress import PlainProgress
from tfnas.run import read_metrics
from tfnas.schedule import averaging_decay, warmup_cosine
from tfnas.train import make_network, train
from tfnas.train_config import TRAIN, TrainConfig
from tfnas.train_loop import TrainingFailed, TrainLoop, update_average_
from tfnas.train_progress import TRAINING
from tfnas.weights import network_with, read_weights
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_cases import tiny_architecture, train_config, train_values

from tfnas_ext._native import MODULE

TIMES = ("images_per_s", "time_left_s", "seconds", "output", "weights_file", "architecture")


def results_of(folder: Path) -> dict[str, Any]:
    """What two equal trainings have in common."""
    state, _ = load_checkpoint(folder)
    state.pop("metrics_bytes")
    records = [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(folder / "metrics.jsonl")]
    weights = {name: read_weights(folder / f"{name}.safetensors") for name in ("best", "last")}
    return {"state": state, "metrics": records, "weights": weights}


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(train_config(tmp_path), [PlainProgress(wording=TRAINING)])
    folder = tmp_path / "run"
    records = read_metrics(folder / "metrics.jsonl")
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["kind"] for r in (records[0], records[-1])] == ["start", "end"]
    # 4 classes of 14 images, a fifth held out: 44 images are 6 passes of 8 (the last of 4), two a step
    assert records[0]["steps_per_epoch"] == 3
    assert len(epochs) == 3
    accuracies = [epoch["validation"]["top1"] for epoch in epochs]
    assert result.best_accuracy == max(accuracies)
    assert result.best_epoch == accuracies.index(max(accuracies))
    assert read_weights(folder / "best.safetensors")[1]["epoch"] == str(result.best_epoch)
    assert load_architecture(folder / "architecture.json")[1] == {"seed": 7}
    assert TRAIN.load(folder / "config.yaml") == train_config(tmp_path)
    printed = capsys.readouterr().out
    assert "best weights: epoch" in printed
    assert f"best {100 * max(accuracies):.2f} %" in printed


def test_one_step_is_sgd_on_the_mean_loss(tmp_path: Path) -> None:
    """Accumulated passes, smoothing, clipping, decay and average against float64 by hand."""
    changes: dict[str, Any] = {"regularization__dropout": 0.0, "regularization__drop_connect": 0.0, "epochs": 1}
    config = train_config(tmp_path, steps_per_epoch=2, optimizer__max_norm=0.5, optimizer__weight_decay=0.1, **changes)
    seen: list[list[tuple[Tensor, Tensor]]] = []
    original = TrainLoop._optimize

    def spying(self: TrainLoop, batches: list[tuple[Tensor, Tensor]]) -> None:
        seen.append(batches)
        original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "_optimize", spying)
        train(config, [])
    arch, _ = load_architecture(config.architecture)
    net = make_network(dataclasses.replace(config, engine="eager"), arch, torch.device("cpu")).double().train()
    average = copy.deepcopy(net)
    momenta = [torch.zeros_like(p) for p in net.parameters()]
    for step, batches in enumerate(seen):
        assert [len(labels) for _, labels in batches] == [8, 8]
        net.zero_grad()
        for images, labels in batches:
            (F.cross_entropy(net(images.double()), labels, label_smoothing=0.1) / 2).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None))
        lr = warmup_cosine(step, 2, 1, 0.1, 0.0)
        for p, m in zip(net.parameters(), momenta, strict=True):
            assert p.grad is not None
            m.mul_(0.9).add_(p.grad * min(1.0, 0.5 / norm) + 0.1 * p.data)
            p.data -= lr * m
        kept = 0.0 if step == 0 else 2 / 11
        for a, p in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
            if a.is_floating_point():
                a.mul_(kept).add_((1 - kept) * p)
    weights, _ = read_weights(tmp_path / "run" / "last.safetensors")
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[name].double(), value, rtol=1e-4, atol=1e-5)


def test_the_moving_average_is_torchs_and_reads_nothing_back(tmp_path: Path) -> None:
    arch = tiny_architecture(tmp_path)

    def torchs(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        get_ema_multi_avg_fn(averaging_decay(0.3, int(updates)))(averaged, current, updates)

    net = build_network(arch)
    ours, theirs = AveragedModel(net, use_buffers=True), AveragedModel(net, multi_avg_fn=torchs, use_buffers=True)
    for step in range(4):
        net(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step)))
        for parameter in net.parameters():
            parameter.data.add_(0.1 * step)
        update_average_(ours, net, 0.3)
        theirs.update_parameters(net)
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    with torch.device("meta"):  # whose tensors have no values to read
        elsewhere = build_network(arch)
    average = AveragedModel(elsewhere, use_buffers=True)
    for _ in range(3):
        update_average_(average, elsewhere, 0.3)
    assert average.n_averaged == 3


def test_it_learns(tmp_path: Path) -> None:
    """On the shipped images, even 8 pixels wide, test accuracy must come far above chance (0.1)."""
    config = train_config(
        tmp_path, data="quickstart", epochs=3, batch_size=32, accumulation_steps=1, optimizer__lr=0.2, dataset={}
    )
    result = train(config, [])
    assert result.test is not None
    print("seed", config.seed, "test", result.test)
    assert result.test.top1 > 0.35
    assert result.test.top5 is not None
    assert result.test.top5 > 0.8
    # the fake space has four classes; the classifier follows the data
    assert load_architecture(tmp_path / "run" / "architecture.json")[0].space.num_classes == 10


@pytest.mark.parametrize(
    ("stop_at", "changes"),
    [
        *itertools.product([1, 3, 7], [{}, {"steps_per_epoch": 5, "ema_decay": None, "accumulation_steps": 1}]),
        (3, {"precision": "bfloat16"}),
        (7, {"precision": "bfloat16", "engine": "eager", "optimizer__nesterov": True, "validation": "test"}),
    ],
)
def test_resumes_bit_for_bit(tmp_path: Path, stop_at: int, changes: dict[str, Any]) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train(train_config(tmp_path / "whole", **changes), [])
    config = train_config(tmp_path / "parts", **changes)
    original = TrainLoop._optimize

    def stopping(self: TrainLoop, batches: list[tuple[Tensor, Tensor]]) -> None:
        original(self, batches)
        if self.step == stop_at:
            raise KeyboardInterrupt

    config.checkpoint.every_steps = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "_optimize", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config, [])
    torch.manual_seed(stop_at)  # what the caller does with the global generator must not matter
    train(dataclasses.replace(config, resume=True), [])
    assert_equal_bits(results_of(tmp_path / "whole" / "run"), results_of(tmp_path / "parts" / "run"))


def test_a_folder_that_was_moved_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own copy of the architecture is enough; another network under the old name is still refused."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    train(train_config(tmp_path / "whole"), [])
    with pytest.MonkeyPatch.context() as patch:
        original = TrainLoop._optimize

        def stopping(self: TrainLoop, batches: list[tuple[Tensor, Tensor]]) -> None:
            original(self, batches)
            if self.step == 4:
                raise KeyboardInterrupt

        patch.setattr(TrainLoop, "_optimize", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(train_config(tmp_path / "parts"), [])
    (tmp_path / "parts").rename(tmp_path / "moved")
    resume = ["--resume", "--output", str(tmp_path / "moved" / "run")]
    (tmp_path / "parts").mkdir()
    save_architecture(tmp_path / "parts" / "architecture.json", tiny_architecture(tmp_path, head_channels=24))
    assert run_command("train", resume) == 2
    assert "belongs to another training: its architecture is" in capsys.readouterr().err
    (tmp_path / "parts" / "architecture.json").unlink()
    assert run_command("train", resume) == 0
    assert "architecture.json is gone; going on with" in capsys.readouterr().out
    assert_equal_bits(results_of(tmp_path / "whole" / "run"), results_of(tmp_path / "moved" / "run"))


def test_stops_on_a_signal_after_a_checkpoint(tmp_path: Path) -> None:
    import os
    import signal

    config = train_config(tmp_path)
    original = TrainLoop._optimize

    def signalled(self: TrainLoop, batches: list[tuple[Tensor, Tensor]]) -> None:
        original(self, batches)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "_optimize", signalled)
        with pytest.raises(TrainingInterrupted, match="--resume") as stopped:
            train(config, [])
    assert stopped.value.signal_number == signal.SIGINT
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 4


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    train(train_config(tmp_path, epochs=1), [])
    assert torch.equal(state, torch.get_rng_state())


def test_bfloat16_differs_a_little(tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        (tmp_path / precision).mkdir()
        train(train_config(tmp_path / precision, epochs=1, precision=precision), [])
        records = read_metrics(tmp_path / precision / "run" / "metrics.jsonl")
        losses[precision] = next(r["loss"] for r in records if r["kind"] == "epoch")
        weights, _ = read_weights(tmp_path / precision / "run" / "last.safetensors")
        assert all(w.dtype != torch.bfloat16 for w in weights.values())
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_validation_none_trains_on_everything_and_keeps_the_last(tmp_path: Path) -> None:
    result = train(train_config(tmp_path, validation="none", epochs=2), [])
    assert result.best_accuracy is None
    assert result.best_epoch == 1
    folder = tmp_path / "run"
    assert read_metrics(folder / "metrics.jsonl")[0]["train_images"] == 4 * 14
    assert_equal_bits(read_weights(folder / "best.safetensors"), read_weights(folder / "last.safetensors"))


def test_non_finite_loss_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    original = TrainLoop._optimize

    def poisoned(self: TrainLoop, batches: list[tuple[Tensor, Tensor]]) -> None:
        original(self, [(x * (math.nan if self.step == 4 else 1.0), y) for x, y in batches])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "_optimize", poisoned)
        with pytest.raises(TrainingFailed, match="step 4 is not finite"):
            train(train_config(tmp_path), [])
    state, _ = load_checkpoint(tmp_path / "run")
    assert state["step"] == 3
    assert all(value.isfinite().all() for value in state["network"].values())


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.05), (1, 0.1), (2, 0.1), (6, 0.055), (10, 0.01)], ids=lambda v: str(v)
)
def test_schedule(step: int, expected: float) -> None:
    assert warmup_cosine(step, 10, 2, 0.1, 0.01) == pytest.approx(expected)


def test_averaging_forgets_the_first_weights() -> None:
    """After n updates the initial weights must have lost their share long before decay^n would let them."""
    share = 1.0
    for updates in range(1, 100):
        share *= averaging_decay(0.999, updates)
    assert share < 1e-8
    assert averaging_decay(0.9, 1000) == 0.9


def test_accuracy_by_hand() -> None:
    class Shift(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 7, 1, 1, generator=generator), torch.arange(n) % 7) for n in (9, 4)]
    got = evaluate_network(Shift(), batches, "float32")
    x, y = torch.cat([b[0] for b in batches]).flatten(1), torch.cat([b[1] for b in batches])
    order = x.argsort(1, descending=True)
    assert got.images == 13
    assert got.top1 == sum(int(order[i, 0] == y[i]) for i in range(13)) / 13
    assert got.top5 == sum(int(y[i] in order[i, :5]) for i in range(13)) / 13
    assert got.loss == pytest.approx(float(F.cross_entropy(x.double(), y)), rel=1e-6)


@pytest.mark.parametrize("name", TRAIN.names())
def test_built_in_configurations(name: str, tmp_path: Path) -> None:
    config = TRAIN.load(name)
    values = yaml.safe_load(TRAIN.path(name).read_text())
    default = config_to_dict(TrainConfig())
    assert list(values) == list(default)
    assert all(list(values[key]) == list(v) for key, v in default.items() if isinstance(v, dict))
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert TRAIN.parse(["--config", str(path)]) == config
    if name == "imagenet":
        assert (config.epochs, config.optimizer, config.regularization) == (
            250,
            TrainConfig().optimizer,
            TrainConfig().regularization,
        )


def test_run_brings_the_searchs_architecture_and_images(tmp_path: Path) -> None:
    search = load_config("quickstart", {"data": "fake", "dataset.fake_images_per_class": 9, "dataset.classes": 4})
    (tmp_path / "config.yaml").write_text(config_to_yaml(search))
    with pytest.raises(ConfigError, match=r"no architecture\.json"):
        parse_train_arguments(["--run", str(tmp_path)])
    train_values(tmp_path)
    config = parse_train_arguments(["--run", str(tmp_path), "--dataset.padding", "1", "--epochs", "4"])
    assert config.architecture == str(tmp_path / "architecture.json")
    assert (config.data, config.output, config.epochs) == ("fake", str(tmp_path / "training"), 4)
    assert (config.dataset.fake_images_per_class, config.dataset.classes, config.dataset.padding) == (9, 4, 1)
    assert config.dataset.held_out_fraction == TRAIN.load("quickstart").dataset.held_out_fraction
    assert parse_train_arguments([f"--run={tmp_path}", "--output", "x"]).output == "x"
    search.num_classes = 10
    (tmp_path / "config.yaml").write_text(config_to_yaml(search))
    assert parse_train_arguments([f"--run={tmp_path}"]).dataset.classes is None
    # a stored training's configuration needs nothing from the search any more
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "config.yaml").write_text(config_to_yaml(dataclasses.replace(config, data="quickstart")))
    assert parse_train_arguments([f"--run={tmp_path}", "--resume"]).data == "quickstart"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--architecture", "tf-nas-b"], ["tf-nas-b", "tf-nas-a"]),
        (["--optimiser.lr", "1"], ["'optimiser.lr'", "'optimizer.lr'"]),
        (["--epochs", "0"], ["epochs", "at least 1"]),
        (["--ema_decay", "1"], ["ema_decay", "0.999999999"]),
        (["--precision", "float16"], ["precision", "bfloat16"]),
        (["--optimizer.momentum", "0", "--optimizer.nesterov", "true"], ["nesterov", "momentum"]),
        (["--run"], ["--run"]),
        (["--run", "nowhere"], ["nowhere", "finished search"]),
        (["--data", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_exits_2(
    tmp_path: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("train", ["--output", str(tmp_path / "run"), *arguments]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in parts), err


def test_refusals(tmp_path: Path) -> None:
    config = train_config(tmp_path, epochs=1)
    train(config, [])
    with pytest.raises(ConfigError, match="--resume"):
        train(config, [])
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        train(train_config(tmp_path, epochs=1, optimizer__lr=0.3, resume=True), [])
    with pytest.raises(DataError, match="at least 2"):
        train(train_config(tmp_path, dataset__fake_images_per_class=1, output=str(tmp_path / "other")), [])


@pytest.mark.parametrize("command", ["search --resume --output {run}", "train --run {run} --output {run}2"])
def test_a_training_is_no_search(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(train_config(tmp_path, epochs=1), [])
    name, *arguments = command.format(run=tmp_path / "run").split()
    assert run_command(name, arguments) == 2
    assert f"{tmp_path / 'run' / 'config.yaml'}: not a configuration of tfnas search: " in capsys.readouterr().err


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    train(train_config(tmp_path, epochs=1), [])
    best = tmp_path / "run" / "best.safetensors"
    other, _ = load_architecture("tf-nas-a")
    with pytest.raises(ValueError, match=r"has shape|is missing"):
        network_with(other, best)
    best.write_bytes(best.read_bytes()[:-10])
    arch, _ = load_architecture(tmp_path / "architecture.json")
    with pytest.raises(ValueError, match="truncated"):
        network_with(arch, best)
    with pytest.raises(FileNotFoundError, match="no such file"):
        network_with(arch, tmp_path / "nothing.safetensors")


@pytest.mark.skipif(MODULE is None, reason="the native module is not built")
def test_engines_train_alike(tmp_path: Path) -> None:
    """`fused` and `eager` take the same steps up to rounding; `auto` is `fused` on a CPU with kernels."""
    weights = {}
    for engine in ("eager", "fused", "auto"):
        folder = tmp_path / engine
        config = train_config(tmp_path, engine=engine, epochs=1, steps_per_epoch=2, output=str(folder))
        train(config, [])
        weights[engine] = read_weights(folder / "last.safetensors")[0]
    assert_equal_bits(weights["fused"], weights["auto"])
    assert any(not torch.equal(weights["fused"][name], weights["eager"][name]) for name in weights["fused"])
    for name, value in weights["eager"].items():
        torch.testing.assert_close(weights["fused"][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_fused_is_refused_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFNAS_BACKEND", "reference")
    with pytest.raises(ConfigError, match="engine: fused cannot run every block on cpu; take auto or eager"):
        train(train_config(tmp_path, engine="fused"), [])
