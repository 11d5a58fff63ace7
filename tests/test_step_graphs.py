"""Captured steps: replayed for any choice, step, learning rate and temperature, they give what ordinary calls give.

Here on recordings of the emulated CUDA engine's operators (`recorded_graph`); tests/test_engine_gpu.py captures real
graphs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tfnas
import torch
from emulated_engine import emulated
from recorded_graph import Recording, RecordingRunner
from step_cases import CONFIG, batches, make_steps, run_steps, state_of
from tfnas import architecture_adam, search_steps, steps
from tfnas.figures import Figures
from tfnas.latency import objective
from tfnas.search_steps import SearchSteps
from tfnas.step_graphs import DirectRunner, GraphRunner, make_runner
from tfnas.steps import architecture_step, weight_step
from tfnas.supernet import Supernet
from torch import Tensor

from tfnas_ext import engine as engine_module
from tfnas_ext import engine_checks, engine_cuda, fixed_layer, losses, sampling
from tfnas_ext.fixed_layer import FixedLayer
from tfnas_ext.sampling import gumbel_softmax_weights, sample_paths

__all__ = ["emulated"]  # the fixture


def test_replays_equal_ordinary_calls_bit_for_bit(emulated: str) -> None:
    recorder = RecordingRunner()
    direct = make_steps(emulated, DirectRunner())
    replayed = make_steps(emulated, recorder)
    for got, want in zip(run_steps(replayed), run_steps(direct), strict=True):
        assert torch.equal(got, want)
    assert recorder.replays == 3
    ours, theirs = state_of(replayed), state_of(direct)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_steps_equal_the_published_loop_on_plain_pytorch(emulated: str) -> None:
    """Emulated kernels with everything on the device, against plain PyTorch with everything on the host."""
    these = make_steps(emulated, DirectRunner())
    plain = make_steps("reference", DirectRunner())
    net = plain.supernet
    adam = net.architecture_adam(CONFIG.architecture.lr, CONFIG.architecture.betas, CONFIG.architecture.weight_decay)
    these.begin(3, 0.05, 2.0, "random")
    for step, (images, labels) in enumerate(batches(2), start=3):
        choices = sample_paths(net.log_alpha, 2.0, CONFIG.seed, step, "random", net.alpha_mask)
        done = weight_step(net, images, labels, choices, lr=0.05, momentum=0.9, weight_decay=1e-5, max_norm=5.0)
        want = torch.stack([done.images.double(), done.correct[0].double(), done.norm, *done.losses])
        torch.testing.assert_close(these.weight(images, labels), want, rtol=1e-8, atol=1e-9)
        u = gumbel_softmax_weights(net.log_alpha, 2.0, CONFIG.seed, step, net.alpha_mask)
        mixed = architecture_step(net, adam, images, labels, u, plain._latency_term, max_norm=5.0)
        want = torch.stack([mixed.correct.double(), mixed.norm, mixed.cross_entropy + mixed.latency_term])
        torch.testing.assert_close(these.architecture(images, labels), want, rtol=1e-8, atol=1e-9)
    theirs = {**net.state_dict(), **net.optimizer_state()}
    for name, tensor in {**these.supernet.state_dict(), **these.supernet.optimizer_state()}.items():
        torch.testing.assert_close(tensor.exp(), theirs[name].exp(), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_steps_in_other_types_follow_plain_pytorch(emulated: str, dtype: torch.dtype, tolerance: float) -> None:
    """Losses and norms of the first steps."""
    (images, labels), *_ = batches(1)
    rows = []
    for engine in (emulated, "reference"):
        these = make_steps(engine, DirectRunner(), dtype=dtype)
        these.begin(0, 0.05, 2.0, "random")
        given = images.to(these.supernet.weight_dtype)
        rows.append(torch.cat([these.weight(given, labels)[2:], these.architecture(given, labels)[1:]]))
    torch.testing.assert_close(rows[0], rows[1], rtol=tolerance, atol=tolerance)


def test_a_frozen_number_is_noticed() -> None:
    """The stand-in must do what a graph does: keep the host's values of the time of capture."""
    runner, scale, total = RecordingRunner(), [1.0], torch.zeros(())

    def step(x: Tensor) -> Tensor:
        return total.add_(x.sum() * scale[0])

    for _ in range(3):
        runner.run("step", step, (torch.ones(2),))
    scale[0] = 100.0
    assert runner.run("step", step, (torch.full((2,), 3.0),)) == 12
    with pytest.raises(AssertionError, match="reads a value"), Recording():
        total.item()


def test_step_path_reads_nothing_back() -> None:
    """By the source: no `.item()`, `.cpu()`, `.tolist()`, `nonzero` or conversion to a Python number in a step."""
    engine = engine_cuda.CudaEngine
    path: list[Callable[..., object]] = [
        *(engine.forward_paths, engine.backward_paths, engine.forward_mixture, engine.backward_mixture),
        *(engine.clip_and_sgd_, engine._check, engine._arguments, engine._forward, engine._backward),
        *(steps.weight_step, steps.architecture_step, architecture_adam.ArchitectureAdam.step_),
        *(SearchSteps.weight, SearchSteps.architecture, SearchSteps._weight, SearchSteps._architecture),
        *(SearchSteps._latency_term, objective.expected_latency_ms, objective._keep_weights),
        *(objective.latency_objective, *objective.OBJECTIVES.values()),
        *(sampling.sample_paths_at, sampling.gumbel_softmax_weights_at, sampling._gumbel_softmax),
        *(Supernet.forward_paths, Supernet.forward_mixture, Supernet._run, Supernet._logits, Supernet.depth_weights),
        *(Supernet._prepare, Supernet._stem, FixedLayer.__call__, FixedLayer.pack, FixedLayer.unpack),
        *(fixed_layer._Fixed, losses.cross_entropy, losses._CrossEntropy),
        *(engine_module.run_paths, engine_module.run_mixture, engine_module._Paths, engine_module._Mixture),
        *(engine_checks.check_inputs, engine_checks.check_choices_shape, GraphRunner.run, GraphRunner._capture),
    ]
    for function in path:
        source = inspect.getsource(function)
        for word in (".item(", ".cpu(", ".tolist(", "nonzero", "float(", "int(", "torch.tensor(", ".numpy("):
            assert word not in source.replace(".float(", ""), f"{function.__qualname__}: {word}"


def test_graphs_are_for_gpus_and_can_be_turned_off() -> None:
    cpu = torch.device("cpu")
    assert isinstance(make_runner(cpu, capturable=True, wanted=True), DirectRunner)
    assert isinstance(make_runner(torch.device("cuda"), capturable=False, wanted=True), DirectRunner)
    assert isinstance(make_runner(torch.device("cuda"), capturable=True, wanted=False), DirectRunner)


def test_figures_come_in_order() -> None:
    figures: Figures[str] = Figures()
    figures.add("a", torch.tensor([1.0, 2.0], dtype=torch.float64))
    figures.add("b", torch.tensor([3.0], dtype=torch.float64))
    assert figures.take(wait=True) == []
    figures.send()
    figures.add("c", torch.tensor([4.0], dtype=torch.float64))
    assert figures.take(wait=False) == [("a", [1.0, 2.0]), ("b", [3.0])]
    figures.send()
    figures.send()
    assert figures.take(wait=True) == [("c", [4.0])]


def test_figures_are_awaited_on_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search on cuda:1 while cuda:0 is the current device: an event of that one would tell nothing of the copy."""
    given = SimpleNamespace(device=torch.device("cuda:1"), shape=(3,), dtype=torch.float64)
    recorded: list[object] = []
    event = SimpleNamespace(record=lambda stream=None: recorded.append(stream), query=lambda: True)
    host = SimpleNamespace(copy_=lambda source, non_blocking: None)
    monkeypatch.setattr(torch, "cat", lambda tensors: given)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: host)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    figures: Figures[str] = Figures()
    figures.add("a", torch.zeros(3, dtype=torch.float64))
    figures.send()
    assert recorded == ["stream of cuda:1"]


@pytest.mark.slow
def test_captured_steps_are_the_search_loop(emulated: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A whole search on replayed steps ends where the same search on ordinary calls ends, metrics included."""
    from search_cases import tiny_config

    ends = []
    for name, runner in (("direct", DirectRunner()), ("replayed", RecordingRunner())):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(search_steps, "make_runner", lambda *_, runner=runner: runner)
        result = tfnas.search(tiny_config(tmp_path / name, engine=emulated, batch_size=2), [])
        ends.append(result)
    ours, theirs = (result.supernet.checkpoint_state()["weights"] for result in ends)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ends[0].architecture == ends[1].architecture
