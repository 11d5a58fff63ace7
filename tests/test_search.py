"""The main job end to end on a tiny space: what it writes, that it repeats, that it learns, what it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from latency_tables import synthetic_table
from search_cases import (
    assert_equal_bits,
    results_of,
    run_command,
    tiny_config,
    tiny_file,
    tiny_space,
)
from tfnas import Callback, search
from tfnas.architecture import load_architecture
from tfnas.bilevel import BilevelSearch, SearchFailed
from tfnas.callbacks import Record
from tfnas.checkpoint import load_checkpoint
from tfnas.cli import run_command as run_here
from tfnas.config import ConfigError
from tfnas.config_io import load_config
from tfnas.latency.lut import LatencyTableError
from tfnas.latency.lut_io import load_table, save_table
from tfnas.run import read_metrics
from tfnas.scaling import reachable_range_ms
from tfnas.space_io import load_space
from tfnas.supernet import Supernet
from tfnas.target import TargetOutOfReach


class Recorder(Callback):
    """Keeps every record."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = 0

    def on_start(self, record: Record) -> None:
        self.records.append(record)

    def on_step(self, record: Record) -> None:
        self.records.append(record)

    def on_epoch(self, record: Record) -> None:
        self.records.append(record)

    def on_end(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


def test_bfloat16_losses_follow_float32(tmp_path: Path) -> None:
    """The same tiny search in both precisions: the loss of every line of metrics within 3 %."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        (tmp_path / precision).mkdir()
        config = tiny_config(tmp_path / precision, precision=precision, engine="auto", elasticity_scaling=False)
        assert search(config).met
        records = read_metrics(tmp_path / precision / "run" / "metrics.jsonl")
        losses[precision] = [record["loss"] for record in records if "loss" in record]
    assert len(losses["float32"]) > 2
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)


def test_end_to_end(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    recorder = Recorder()
    result = search(config, [recorder])
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} >= {
        "architecture.json",
        "lut.json",
        "config.yaml",
        "metrics.jsonl",
        "checkpoint.pt",
        "checkpoint.previous.pt",
    }
    arch, facts = load_architecture(folder / "architecture.json")
    assert arch == result.architecture
    low, high = result.reachable_range_ms
    assert facts["target_latency_ms"] == pytest.approx((low + high) / 2, rel=1e-12)
    assert 0.99 * facts["target_latency_ms"] <= facts["lut_latency_ms"] <= facts["target_latency_ms"]
    assert load_table(folder / "lut.json").architecture_ms(arch) == facts["lut_latency_ms"]
    assert result.met
    assert facts["seed"] == config.seed
    assert facts["versions"]["torch"] == torch.__version__

    assert load_config(folder / "config.yaml") == config
    kinds = [record["kind"] for record in recorder.records]
    assert kinds == ["start", "step", "step", "epoch", "step", "step", "epoch", "step", "step", "epoch", "end"]
    assert read_metrics(folder / "metrics.jsonl") == recorder.records
    assert recorder.closed == 1
    epochs = [record for record in recorder.records if record["kind"] == "epoch"]
    assert [epoch["tau"] for epoch in epochs] == pytest.approx([5.0, 5.0, 4.8])
    assert "scaling" not in epochs[0]
    assert epochs[0]["second_loss"] is None
    assert epochs[1]["second_loss"] > 0
    # the seed network follows the target from the first scaling on
    assert all(0.9 * facts["target_latency_ms"] <= e["derived_latency_ms"] for e in epochs[1:])
    assert all(e["derived_latency_ms"] <= facts["target_latency_ms"] for e in epochs[1:])


def test_warmup_leaves_the_architecture_alone(tmp_path: Path) -> None:
    result = search(tiny_config(tmp_path, epochs=2, warmup_epochs=2), [])
    space = result.supernet.space
    fresh = Supernet(space)
    assert torch.equal(result.supernet.log_alpha, fresh.log_alpha)
    assert torch.equal(result.supernet.log_beta, fresh.log_beta)
    assert result.supernet.widths == fresh.widths
    state, _ = load_checkpoint(tmp_path / "run")
    assert state["architecture_steps"] == 0


def test_repeats_bit_for_bit_and_follows_the_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        search(tiny_config(tmp_path / name), [])
    first, second = results_of(tmp_path / "a" / "run"), results_of(tmp_path / "b" / "run")
    for results in (first, second):
        results["metrics"][0].pop("space")
    assert_equal_bits(first, second)
    (tmp_path / "c").mkdir()
    search(tiny_config(tmp_path / "c", seed=1), [])
    assert not torch.equal(
        first["state"]["supernet"]["weights"]["log_alpha"],
        results_of(tmp_path / "c" / "run")["state"]["supernet"]["weights"]["log_alpha"],
    )


def test_it_learns(tmp_path: Path) -> None:
    """On the shipped images, even 8 pixels wide, held-out accuracy must come far above chance (0.1)."""
    changes = {"data": "quickstart", "epochs": 4, "warmup_epochs": 2, "steps_per_epoch": 25, "batch_size": 32}
    config = tiny_config(tmp_path, weights__lr=0.3, **changes)
    recorder = Recorder()
    search(config, [recorder])
    accuracy = [record["held_out_accuracy"] for record in recorder.records if record["kind"] == "epoch"]
    print("seed", config.seed, "held-out accuracy", accuracy)
    assert accuracy[-1] > 0.25
    assert accuracy[-1] > accuracy[0]


@pytest.mark.parametrize("depth_space", ["skip-in", "skip-out"])
def test_other_depth_spaces(tmp_path: Path, depth_space: str) -> None:
    config = tiny_config(tmp_path)
    config.space = str(tiny_space(tmp_path, depth_space=depth_space))
    save_table(tmp_path / "table.json", synthetic_table(load_space(config.space)))
    result = search(config, [])
    assert result.met
    assert all(stage for stage in result.architecture.stages)


def test_second_optimizer_states_may_be_kept(tmp_path: Path) -> None:
    """`restart_each_epoch` off carries momentum and Adam's moments over: results differ from restarting."""
    finals = []
    for name, restart in (("restart", True), ("keep", False)):
        (tmp_path / name).mkdir()
        changes = {"weights__restart_each_epoch": restart, "architecture__restart_each_epoch": restart}
        result = search(tiny_config(tmp_path / name, **changes), [])
        finals.append((result.supernet.log_alpha.detach().clone(), load_checkpoint(result.folder)[0]["adam"]))
    assert not torch.equal(finals[0][0], finals[1][0])
    assert [float(adam["steps"]) for _, adam in finals] == [2.0, 4.0]


@pytest.mark.parametrize("target", [0.0001, 1e6])
def test_impossible_target_by_a_table(tmp_path: Path, target: float) -> None:
    with pytest.raises(TargetOutOfReach) as error:
        search(tiny_config(tmp_path, target_latency_ms=target), [])
    text = str(error.value)
    assert f"{target:g}" in text
    result = search(dataclasses.replace(tiny_config(tmp_path), output=str(tmp_path / "ok")), [])
    for bound in result.reachable_range_ms:
        assert f"{bound:.4f}" in text


def test_impossible_target_without_a_table_measures_extremes_only(tmp_path: Path) -> None:
    done = run_command("--config", str(tiny_file(tmp_path, lut=None)), "--target_latency_ms", "0.0001")
    assert done.returncode == 2, done.stderr
    assert "out of reach" in done.stderr
    assert "ms" in done.stderr
    assert not (tmp_path / "run" / "lut.json").exists()


def test_paper_rule_exits_3_outside_the_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Near the upper end of the range the strongest network is usually too small at any width."""
    file = tiny_file(tmp_path, epochs=1, warmup_epochs=0, steps_per_epoch=1, log__held_out_every_epochs=0)
    space = load_space(tmp_path / "tiny.yaml")
    low, high = reachable_range_ms(space, load_table(tmp_path / "table.json"))
    target = high - 0.001 * (high - low)
    arguments = ["--config", str(file), "--target_latency_ms", str(target)]
    assert run_here("search", [*arguments, "--derive", "paper"]) == 3
    assert "--derive repair" in capsys.readouterr().err
    assert load_architecture(tmp_path / "run" / "architecture.json")[1]["repaired"] is False
    assert run_here("search", [*arguments, "--output", str(tmp_path / "repaired")]) == 0
    facts = load_architecture(tmp_path / "repaired" / "architecture.json")[1]
    assert facts["repaired"] is True
    assert 0.99 * target <= facts["lut_latency_ms"] <= target
    assert facts["unrepaired"]["lut_latency_ms"] < 0.99 * target


def test_non_finite_loss_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, checkpoint__every_steps=1, log__every_steps=3, weights__lr=0.1)
    original = BilevelSearch._weight_step

    def poisoned(self: BilevelSearch, images: torch.Tensor, *rest: Any) -> None:
        original(self, images * (math.nan if self.step == 6 else 1.0), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BilevelSearch, "_weight_step", poisoned)
        with pytest.raises(SearchFailed) as error:
            search(config, [])
    assert "weight step 6" in str(error.value)
    state, _ = load_checkpoint(tmp_path / "run")
    assert state["step"] == 6
    assert all(value.isfinite().all() for value in state["supernet"]["weights"].values())


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, epochs=1, warmup_epochs=0)
    search(config, [])
    before = (tmp_path / "run" / "architecture.json").read_bytes()
    with pytest.raises(ConfigError, match="--resume"):
        search(config, [])
    assert (tmp_path / "run" / "architecture.json").read_bytes() == before


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"device": "another GPU", "device_uuid": "GPU-1"}, "device is 'another GPU'"),
        ({"engine": "fused", "batch": 1}, "engine is 'fused', wanted 'eager'; batch is 1, wanted 32"),
        ({"threads": 64}, "threads is 64"),
        ({"layout": "channels_last"}, "layout"),
    ],
)
def test_table_of_other_conditions_is_refused_unless_told_otherwise(
    tmp_path: Path, stated: dict[str, Any], said: str
) -> None:
    config = tiny_config(tmp_path, epochs=1)
    assert config.lut is not None
    save_table(config.lut, dataclasses.replace(load_table(config.lut), header=stated))
    with pytest.raises(LatencyTableError, match=re.escape(said)) as error:
        search(config, [])
    assert "lut_conditions ignore" in str(error.value)
    config = dataclasses.replace(config, lut_conditions="ignore", output=str(tmp_path / "other"))
    assert search(config, []).met


def test_table_of_another_space_names_what_is_missing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    save_table(tmp_path / "other.json", synthetic_table(load_space("small")))
    config.lut = str(tmp_path / "other.json")
    with pytest.raises(ValueError, match="does not cover space 'tiny'") as error:
        search(config, [])
    assert "mbinvres_r8_i4_o6_k3_s2_se0_relu" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"space": "imagnet"}, "imagenet"),
        ({"data": "nowhere"}, "nowhere"),
        ({"lut": "nowhere.json"}, "nowhere.json"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "cuda:7"}, "cuda:7"),
    ],
)
def test_bad_input_exits_2(
    tmp_path: Path, changes: dict[str, str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("search", ["--config", str(tiny_file(tmp_path, **changes))]) == 2
    assert part in capsys.readouterr().err
