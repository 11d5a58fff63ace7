"""The CUDA engine on a GPU: against plain modules in every precision, bit-repeatable, and captured in a CUDA graph."""

from __future__ import annotations

import math

import pytest
import torch
from engine_case import Case
from naive_body import NaiveBody
from precision_cases import PRECISIONS, engine_on, everything, require_precision, sink_case
from step_cases import batches, make_steps, run_steps, state_of
from tfnas.figures import Figures
from tfnas.step_graphs import DirectRunner, GraphRunner
from torch import Tensor

from tfnas_ext.engine import SupernetEngine, run_paths
from tfnas_ext.engine_cuda import CudaEngine
from tfnas_ext.packed import PackedLayer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(case: Case, dtype: torch.dtype, name: str) -> tuple[SupernetEngine, list[PackedLayer]]:
    return engine_on("cuda", case, dtype, name)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_against_plain_pytorch(precision: str, seed: int) -> None:
    require_precision("cuda", "cuda", precision, seed)


def test_same_bits_twice() -> None:
    case = sink_case(3)
    engine, _ = on_gpu(case, torch.float32, "cuda")
    first, second = (everything("cuda", case, engine, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_captured_step_replays_any_choice() -> None:
    """Forward, backward, clipping and SGD in one graph: replays equal eager steps bit for bit, whatever is sampled."""
    case = sink_case(5)
    eager, eager_layers = on_gpu(case, torch.float32, "cuda")
    graphed, graphed_layers = on_gpu(case, torch.float32, "cuda")
    assert isinstance(eager, CudaEngine)
    assert isinstance(graphed, CudaEngine)
    assert case.v is not None
    x, v = case.x.detach().float().cuda(), case.v.float().cuda()
    choices = case.choices.cuda()

    def step(engine: CudaEngine) -> Tensor:
        outs, tape = engine.forward_paths(x, choices, v, True)
        assert tape is not None
        engine.backward_paths(tape, [torch.sign(out) for out in outs], False)
        return engine.clip_and_sgd_(0.01, 0.9, 1e-4, 5.0, [])

    weights = [weight.clone() for layer in graphed_layers for weight in [*layer.weights(), *layer.momenta()]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(graphed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step(graphed)
    with torch.no_grad():
        state = (weight for layer in graphed_layers for weight in [*layer.weights(), *layer.momenta()])
        for weight, start in zip(state, weights, strict=True):
            weight.copy_(start)
    for shift in range(3):
        counts = torch.tensor([len(layer.candidates) for layer in case.spec.layers])
        choices.copy_((case.choices + shift) % counts)
        want = step(eager)
        graph.replay()
        assert torch.equal(norm, want)
    for ours, theirs in zip(graphed_layers, eager_layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.weights(), theirs.weights(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_captured_search_steps_equal_ordinary_calls_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole steps, sampler and Adam included, over changes of learning rate, temperature and widths."""
    # stem and head are convolutions of cuDNN, whose fastest gradients may add up by atomics
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    graphs = GraphRunner(torch.device("cuda"))
    direct, captured = (make_steps("cuda", runner, "cuda", dtype) for runner in (DirectRunner(), graphs))
    for got, want in zip(run_steps(captured), run_steps(direct), strict=True):
        assert torch.equal(got, want)
    assert any(entry.graph is not None for entry in graphs._steps.values())
    ours, theirs = state_of(captured), state_of(direct)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_replays_never_wait_for_the_device() -> None:
    steps = make_steps("cuda", GraphRunner(torch.device("cuda")), "cuda", torch.float32)
    steps.begin(0, 0.1, 5.0, "random")
    data = [(images.float().cuda(), labels.cuda()) for images, labels in batches(6)]
    figures: Figures[int] = Figures()
    try:
        for step, batch in enumerate(data):
            if step == 2:  # both graphs are there
                torch.cuda.set_sync_debug_mode("error")
            figures.add(step, steps.weight(*batch))
            figures.add(step, steps.architecture(*batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    figures.send()
    rows = figures.take(wait=True)
    assert [step for step, _ in rows] == [step for step in range(6) for _ in range(2)]
    assert all(math.isfinite(value) for _, row in rows for value in row)


def test_a_step_never_waits_for_the_device() -> None:
    case = sink_case(2)
    engine, _ = on_gpu(case, torch.float32, "cuda")
    assert isinstance(engine, CudaEngine)
    assert case.v is not None
    x, v, choices = case.x.detach().float().cuda(), case.v.float().cuda(), case.choices.cuda()
    u = case.u.float().cuda()
    engine.forward_paths(x, choices, v, False)  # prepares buffers, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        outs, tape = engine.forward_paths(x, choices, v, True)
        assert tape is not None
        engine.backward_paths(tape, outs, True)
        engine.clip_and_sgd_(0.01, 0.9, 1e-4, 5.0, [])
        out, mixture = engine.forward_mixture(x, u, v, True)
        assert mixture is not None
        engine.backward_mixture(mixture, out, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_naive_body_agrees_on_the_gpu() -> None:
    """An independent check of the reference engine on this device: modules, one per candidate."""
    case = sink_case(1)
    naive = NaiveBody(case.spec, case.widths).double()
    naive.load_prefixes(case.state())
    engine, _ = on_gpu(case, torch.float64, "cuda")
    assert case.v is not None
    outs = run_paths(engine, case.x.detach().cuda(), case.choices.cuda(), case.v.cuda())
    for out, choice in zip(outs, case.choices.tolist(), strict=True):
        want = naive.path(case.x, choice, case.v)
        assert ((out.cpu() - want).abs().max() / want.abs().max()).item() < 1e-8
