"""The engines: their sections compute the same network, and what cannot run says why."""

from __future__ import annotations

import builtins
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tfnas.latency.additivity import random_architectures
from tfnas.latency.conditions import make_engine
from tfnas.latency.engine import Conditions, EngineUnavailable
from tfnas.latency.engine_fused import FusedEngine
from tfnas.latency.engine_onnxruntime import BoundSession, OnnxGraph, OnnxruntimeEngine
from tfnas.latency.engine_torch import TorchEngine, make_block
from tfnas.network import Head, Stem, build_network
from tfnas.space_io import load_space

from tfnas_ext.backends import choose_backend

SMALL = load_space("small")


def run(sections: list[Any], x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        for section in sections:
            x = section(x)
    return x


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_sections_are_the_network(layout: str, dtype: str) -> None:
    engine = TorchEngine(SMALL, Conditions(batch=2, layout=layout, dtype=dtype))
    (arch,) = random_architectures(SMALL, 1, seed=3)
    x = engine.input()
    assert x.shape == (2, 1, 28, 28)
    assert x.dtype == getattr(torch, dtype)
    sections = engine.network(arch)
    assert len(sections) == 2 + sum(len(stage) for stage in arch.stages)
    logits = run(sections, x)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    block = engine.block(SMALL.layers[1].key(4), 96)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    y = torch.zeros(2, 24, 14, 14, dtype=x.dtype).contiguous(memory_format=memory_format)
    assert run([block], y).is_contiguous(memory_format=memory_format)


def onnx_error(module: torch.nn.Module, x: torch.Tensor) -> float:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = OnnxGraph(onnx).model(module.eval())
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = module.double()(x.double())
    got = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("act", ["relu", "relu6", "swish", "hard_swish"])
def test_onnx_graphs_compute_the_modules(act: str) -> None:
    torch.manual_seed(0)
    space = load_space("small", {"head_act": act, "stem_act": act})
    x = torch.randn(2, 1, 28, 28)
    assert onnx_error(Stem(space), x) < 1e-5
    assert onnx_error(Head(space), torch.randn(2, 160, 7, 7)) < 1e-5
    for layer in (space.layers[0], space.layers[1]):
        for candidate in (0, 3):
            key = layer.key(candidate)
            key = type(key)(**{**vars(key), "act": act})
            y = torch.randn(2, key.in_channels, key.resolution, key.resolution)
            assert onnx_error(make_block(key, 50), y) < 1e-5, key


def test_onnxruntime_runs_whole_networks() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    engine = make_engine(SMALL, Conditions(engine="onnxruntime", batch=2))
    (arch,) = random_architectures(SMALL, 1, seed=3)
    (whole,) = engine.network(arch)
    torch.manual_seed(0)
    assert run([whole], engine.input()).shape == (2, 10)
    network = build_network(arch).eval()
    assert (
        onnx_error(torch.nn.Sequential(network.stem, *network.stages, network.head), torch.randn(1, 1, 28, 28)) < 1e-5
    )


def test_missing_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EngineUnavailable, match=r"pip install 'tfnas-ext\[export\]'"):
        make_engine(SMALL, Conditions(engine="onnxruntime"))


def test_onnxruntime_sections_follow_the_input_and_own_their_output() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    block = make_engine(SMALL, Conditions(engine="onnxruntime")).block(SMALL.layers[1].key(4), 96)
    torch.manual_seed(0)
    a, b = torch.randn(1, 24, 14, 14), torch.randn(3, 24, 14, 14)
    first, other = block(a).clone(), block(b)
    assert other.shape == (3, 24, 14, 14)
    strided = a.contiguous(memory_format=torch.channels_last)
    assert torch.equal(block(strided), first)
    assert block(b).data_ptr() == other.data_ptr()
    torch.testing.assert_close(block(b[:1]), other[:1], rtol=1e-5, atol=1e-6)


def test_onnxruntime_without_a_provider_for_the_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineUnavailable, match=r"no CUDAExecutionProvider.*install onnxruntime-gpu"):
        OnnxruntimeEngine(SMALL, Conditions(engine="onnxruntime", device="cuda"))


def test_onnxruntime_on_a_gpu_works_on_the_timed_stream_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls are queued behind a closed gate, on the stream whose time stamps count."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    engine = OnnxruntimeEngine(SMALL, Conditions(engine="onnxruntime", device="cuda"))
    streams = {"own": SimpleNamespace(device_index=0, cuda_stream=77), "default": SimpleNamespace(cuda_stream=0)}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams["own"])
    assert engine._provider_options() == {"device_id": "0", "user_compute_stream": "77"}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams["default"])
    with pytest.raises(EngineUnavailable, match="default"):
        engine._provider_options()
    assert engine._run_options().get_run_config_entry("disable_synchronize_execution_providers") == "1"

    given: list[Any] = []
    session = SimpleNamespace(
        io_binding=lambda: SimpleNamespace(bind_input=lambda *_: None, bind_output=lambda *_: None),
        run=lambda *_: (torch.zeros(1, 1).numpy(),),
        run_with_iobinding=lambda _, options: given.append(options),
    )
    BoundSession(session, torch.device("cpu"), "no waiting")(torch.zeros(1, 1))
    assert given == ["no waiting"]


@pytest.mark.parametrize("bad", [{"layout": "channels_last"}, {"dtype": "float16"}])
def test_onnxruntime_refuses_conditions_not_its_own(bad: dict[str, str]) -> None:
    with pytest.raises(EngineUnavailable, match=next(iter(bad))):
        make_engine(SMALL, Conditions(engine="onnxruntime", **bad))


def native_kernels() -> bool:
    return hasattr(torch.ops.tfnas, "mbinvres_inference") and choose_backend("cpu") == "cpu"


def test_fused_computes_the_same_network() -> None:
    if not native_kernels():
        pytest.skip("the native module is not there, or not chosen")
    engine = make_engine(SMALL, Conditions(engine="fused", layout="channels_last", batch=2))
    plain = TorchEngine(SMALL, Conditions(layout="channels_last", batch=2))
    for layer in (SMALL.layers[0], SMALL.layers[1]):
        for candidate in (0, 3, 7):
            key = layer.key(candidate)
            ours, theirs = engine.block(key, 50), plain.block(key, 50)
            assert isinstance(ours, torch.nn.Module)
            assert isinstance(theirs, torch.nn.Module)
            ours.load_state_dict(theirs.state_dict())
            x = torch.randn(2, key.in_channels, key.resolution, key.resolution)
            x = x.contiguous(memory_format=torch.channels_last)
            expected = run([theirs.double()], x.double())
            assert float((run([ours], x) - expected).abs().max() / expected.abs().max()) < 1e-5, key
    (arch,) = random_architectures(SMALL, 1, seed=3)
    assert run(engine.network(arch), engine.input()).shape == (2, 10)


def test_fused_refuses_what_the_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineUnavailable, match="layout"):
        make_engine(SMALL, Conditions(engine="fused"))
    with pytest.raises(EngineUnavailable, match="CPU only"):
        FusedEngine(SMALL, Conditions(engine="fused", layout="channels_last", device="cuda"))
    monkeypatch.setenv("TFNAS_BACKEND", "reference")
    with pytest.raises(EngineUnavailable, match="no native kernels"):
        make_engine(SMALL, Conditions(engine="fused", layout="channels_last"))


def test_every_block_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch runs uncompiled what comes after eight versions of one `forward`."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    engine = TorchEngine(SMALL, Conditions(engine="compile"))
    blocks = [engine.block(SMALL.layers[1].key(0), width) for width in range(40, 50)]
    for count, block in enumerate(blocks, start=1):
        run([block], torch.zeros(1, 24, 14, 14))
        assert len(graphs) == count
    for block in blocks:
        run([block], torch.zeros(1, 24, 14, 14))
    assert len(graphs) == len(blocks)


@pytest.mark.slow
def test_compile_runs_blocks_and_networks() -> None:
    engine = TorchEngine(SMALL, Conditions(engine="compile"))
    (arch,) = random_architectures(SMALL, 1, seed=3)
    assert run(engine.network(arch), engine.input()).shape == (1, 10)
    block = engine.block(SMALL.layers[1].key(4), 96)
    assert run([block], torch.zeros(1, 24, 14, 14)).shape == (1, 24, 14, 14)
