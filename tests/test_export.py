"""Export and evaluation from the command line: what is written computes the same network elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tfnas.export
import torch
from latency_tables import synthetic_table
from tfnas.architecture import load_architecture, save_architecture
from tfnas.cli import run_command
from tfnas.data import DataOptions, build_data
from tfnas.export import ExportMismatch, export_onnx, export_timm
from tfnas.latency.lut_io import save_table
from tfnas.published_config import load_published_config
from tfnas.space_io import load_space
from tfnas.train import train
from tfnas.weights import fresh_network, network_with, read_weights, save_weights
from train_cases import tiny_architecture, train_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search's folder, as far as it matters here, with a training of one epoch in it."""
    folder = tmp_path_factory.mktemp("search")
    config = train_config(folder, epochs=1, output=str(folder / "training"), dataset__fake_images_per_class=14)
    save_table(folder / "lut.json", synthetic_table(load_architecture(config.architecture)[0].space))
    train(config, [])
    return folder


def _run(*arguments: Any) -> int:
    return run_command("export", [str(argument) for argument in arguments])


def test_state_dict(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    assert _run("--format", "state-dict", "--run", trained, "--output", file) == 0
    arch, _ = load_architecture(trained / "training" / "architecture.json")
    theirs, facts = read_weights(trained / "training" / "best.safetensors")
    ours = network_with(arch, file).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    exported = {name: json.loads(value) for name, value in read_weights(file)[1].items() if name != "format"}
    assert exported == {"classes": ["fake_0", "fake_1", "fake_2", "fake_3"], "mean": [0.5], "std": [0.2]}
    assert {name: json.loads(facts[name]) for name in exported} == exported


def test_onnx_gives_the_same_logits_at_any_batch(trained: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    file = tmp_path / "n.onnx"
    assert _run("--format", "onnx", "--run", trained / "training", "--output", file) == 0
    arch, _ = load_architecture(trained / "training" / "architecture.json")
    network = network_with(arch, trained / "training" / "best.safetensors")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        images = torch.randn(batch, arch.space.image_channels, 8, 8, generator=torch.Generator().manual_seed(batch))
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, network(images).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_timm_gives_the_same_logits(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from tfnas.timm_export import to_timm

    file = tmp_path / "t.safetensors"
    assert _run("--format", "timm", "--run", trained, "--weights", "last", "--output", file) == 0
    arch, _ = load_architecture(trained / "training" / "architecture.json")
    network = network_with(arch, trained / "training" / "last.safetensors")
    model = to_timm(fresh_network(arch, 3)).eval()
    model.load_state_dict(read_weights(file)[0])
    images = torch.randn(4, arch.space.image_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), network(images), rtol=1e-5, atol=1e-5)
    described = json.loads(file.with_suffix(".json").read_text())
    assert described["widths"] == [[op.width for op in ops] for ops in arch.stages]
    assert [len(stage) for stage in described["arch_def"]] == [1, *map(len, arch.stages)]


def test_published_config(tmp_path: Path) -> None:
    assert _run("--format", "published-config", "--architecture", "tf-nas-a", "--output", tmp_path / "m.config") == 0
    assert load_published_config(tmp_path / "m.config") == load_architecture("tf-nas-a")[0]


def test_timm_description_replaces_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`net.json` beside `net.safetensors` may be the architecture itself."""
    pytest.importorskip("timm")
    arch = tmp_path / "net.json"
    save_architecture(arch, tiny_architecture(tmp_path))
    before = arch.read_bytes()
    arguments = ["--format", "timm", "--architecture", arch, "--weights", "fresh", "--output"]
    assert _run(*arguments, tmp_path / "net.safetensors") == 2
    assert "the description would replace" in capsys.readouterr().err
    assert arch.read_bytes() == before
    assert not (tmp_path / "net.safetensors").exists()
    for seed in ("0", "1"):  # its own it may
        assert _run(*arguments, tmp_path / "other.safetensors", "--seed", seed) == 0


def test_fresh_weights_follow_the_seed(trained: Path, tmp_path: Path) -> None:
    names = {"a": 0, "b": 0, "c": 1}
    for name, seed in names.items():
        options = ("--weights", "fresh", "--seed", seed, "--output", tmp_path / name)
        assert _run("--format", "state-dict", "--run", trained, *options) == 0
    a, b, c = (read_weights(tmp_path / name)[0] for name in names)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["head.classifier.weight"], c["head.classifier.weight"])


@pytest.mark.parametrize(
    ("export", "needed"), [(export_onnx, ("onnx", "onnxscript", "onnxruntime")), (export_timm, ("timm",))]
)
def test_a_mismatch_is_refused_and_nothing_written(
    tmp_path: Path, export: Any, needed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in needed:
        pytest.importorskip(module)
    monkeypatch.setattr(tfnas.export, "ONNX_TOLERANCE", -1.0)
    monkeypatch.setattr(tfnas.export, "TIMM_TOLERANCE", -1.0)
    with pytest.raises(ExportMismatch, match="other logits"):
        export(tmp_path / "file", fresh_network(tiny_architecture(tmp_path), 0))
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--format", "onxx"], "onnx"),
        (["--format", "onnx"], "--run"),
        (["--format", "onnx", "--run", "nowhere"], "nowhere"),
        (["--format", "onnx", "--architecture", "tf-nas-a"], "--weights"),
        (["--format", "onnx", "--architecture", "tf-nas-a", "--weights", "nothing.safetensors"], "nothing.safetensors"),
        (["--format", "onnx", "--architecture", "tf-nas-b", "--weights", "fresh"], "tf-nas-a"),
    ],
)
def test_bad_input_exits_2(tmp_path: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*arguments, "--output", tmp_path / "x") == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = (trained / "training" / "metrics.jsonl").read_text().splitlines()
    expected = json.loads(metrics[-1])["test"]
    assert run_command("evaluate", ["--run", str(trained), "--json", "--threads", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {key: facts[key] for key in expected} == expected
    assert facts["lut_latency_ms"] > 1
    assert facts["measured_latency_ms"] is None
    assert "which device" in facts["not_measured_because"]
    assert run_command("evaluate", ["--run", str(trained / "training")]) == 0
    out = capsys.readouterr().out
    assert f"top-1 {100 * expected['top1']:.2f} %" in out
    assert "not measured" in out


def test_evaluate_refuses(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(trained / "architecture.json", tmp_path)
    assert run_command("evaluate", ["--run", str(tmp_path)]) == 2
    assert "tfnas train --run" in capsys.readouterr().err
    assert run_command("evaluate", ["--run", str(trained), "--weights", "bset"]) == 2
    assert "best or last" in capsys.readouterr().err


def test_evaluate_refuses_a_table_before_the_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_table(tmp_path / "other.json", synthetic_table(load_space("small")))
    monkeypatch.setattr("tfnas.cli.evaluate.build_data", lambda *a: pytest.fail("the images were read"))
    for name, part in (("missing.json", "no such file"), ("other.json", "has no curve for")):
        assert run_command("evaluate", ["--run", str(trained), "--lut", str(tmp_path / name)]) == 2
        assert part in capsys.readouterr().err


def _archive(path: Path, brightness: int, names: str, test: bool = True) -> str:
    """Images of four classes; those of a class hold one gray value."""
    labels = np.arange(20) % 4
    pixels = np.broadcast_to((brightness + 40 * labels)[:, None, None], (20, 8, 8)).astype(np.uint8)
    arrays = {"train_images": pixels, "train_labels": labels}
    if test:
        arrays |= {"test_images": pixels[:9], "test_labels": labels[:9]}
    np.savez(path, class_names=np.array(list(names)), **arrays)  # type: ignore[arg-type]
    return str(path)


def test_evaluate_on_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own test images, in the training's normalisation; classes in another order would be wrong in silence."""
    own = _archive(tmp_path / "own.npz", 0, "abcd")
    _archive(tmp_path / "test.npz", 90, "abcd")
    config = train_config(tmp_path, epochs=1, data=own, dataset={"test_source": str(tmp_path / "test.npz")})
    network = train(config, []).network
    folder = str(tmp_path / "run")

    def evaluated(data: str) -> dict[str, Any]:
        assert run_command("evaluate", [folder, "--data", data, "--json", "--threads", "1"]) == 0
        facts: dict[str, Any] = json.loads(capsys.readouterr().out)
        return facts

    spread = build_data(DataOptions(own), 0).train.normalisation
    for brightness in (0, 60):
        other = _archive(tmp_path / f"{brightness}.npz", brightness, "wxyz")
        labels = torch.arange(9) % 4
        levels = (brightness + 40.0 * labels) / 255
        values = ((levels - spread.mean[0]) / spread.std[0])[:, None, None, None]
        with torch.no_grad():
            logits = network.double()(values.expand(9, 1, 8, 8).double())
        expected = float(torch.nn.functional.cross_entropy(logits, labels))
        assert evaluated(other)["loss"] == pytest.approx(expected, rel=1e-4)
    for data, part in (
        (_archive(tmp_path / "order.npz", 0, "abdc"), "class 'd' is number 2 there, and was 3 in training"),
        (_archive(tmp_path / "no test.npz", 0, "abcd", test=False), "no test images"),
        ("fake", "has 10 classes, the trained network 4"),
    ):
        assert run_command("evaluate", [folder, "--data", data]) == 2
        assert part in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("mean", "[0.5"), ("std", "1"), ("classes", '{"a": 1}')])
def test_evaluate_refuses_a_header_that_is_none(
    trained: Path, tmp_path: Path, name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "training", tmp_path / "run")
    weights, facts = read_weights(tmp_path / "run" / "best.safetensors")
    save_weights(tmp_path / "run" / "best.safetensors", weights, facts | {name: value})
    assert run_command("evaluate", ["--run", str(tmp_path / "run")]) == 2
    assert f"{name} in the weights' header: expected a JSON list" in capsys.readouterr().err
