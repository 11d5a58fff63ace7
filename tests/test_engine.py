"""Engines against a naive body of modules, in float64: outputs, gradients, clipping and SGD, widths, depth spaces."""

from __future__ import annotations

import pytest
import torch
from engine_case import SKIP, Case, candidates, close, small_body
from torch import Tensor

from tfnas_ext.engine import engine_names, make_engine, run_mixture, run_paths
from tfnas_ext.engine_spec import BodySpec, CandidateSpec, LayerSpec
from tfnas_ext.packed import PackedLayer, copy_named

ENGINES = pytest.mark.parametrize("engine", engine_names())
DEPTH_SPACES = pytest.mark.parametrize("depth_space", ["sink", "skip-in", "skip-out"])


@ENGINES
@DEPTH_SPACES
@pytest.mark.parametrize("seed", range(3))
def test_paths(depth_space: str, engine: str, seed: int) -> None:
    case = Case(small_body(depth_space), engine, seed)
    outs = run_paths(case.engine, case.x, case.choices, case.v)
    wants = [case.naive.path(case.x, choice, case.v) for choice in case.choices.tolist()]
    for out, want in zip(outs, wants, strict=True):
        close(out, want)
    douts = [case.normal(*out.shape) for out in outs]
    torch.autograd.backward(outs, douts, inputs=[case.x])
    dx, case.x.grad = case.x.grad, None
    torch.autograd.backward(wants, douts)
    assert dx is not None
    assert case.x.grad is not None
    close(dx, case.x.grad)
    got = case.named_gradients()
    want_grads = {name: p.grad for name, p in case.naive.named_parameters() if p.grad is not None}
    assert got.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        close(got[name], grad)


@ENGINES
@DEPTH_SPACES
@pytest.mark.parametrize("seed", range(3))
def test_mixture(depth_space: str, engine: str, seed: int) -> None:
    case = Case(small_body(depth_space), engine, seed)
    inputs = [case.x, case.u.requires_grad_()] + ([] if case.v is None else [case.v.requires_grad_()])
    out = run_mixture(case.engine, case.x, case.u, case.v)
    want = case.naive.mixture(case.x, case.u, case.v)
    close(out, want)
    dout = case.normal(*out.shape)
    got_grads = torch.autograd.grad(out, inputs, dout)
    for got, grad in zip(got_grads, torch.autograd.grad(want, inputs, dout), strict=True):
        close(got, grad)
    assert case.engine.read_gradients() == []


@ENGINES
@DEPTH_SPACES
def test_mixture_gradients_are_slopes(depth_space: str, engine: str) -> None:
    """Central differences along random directions (gradcheck runs several backwards per forward, an engine one)."""
    case = Case(small_body(depth_space), engine, seed=5, shape=(2, 5, 5))
    inputs = [case.x.detach(), case.u] + ([] if case.v is None else [case.v])
    dout = case.normal(*run_mixture(case.engine, inputs[0], case.u, case.v).shape)

    def value(tensors: list[Tensor]) -> Tensor:
        return (run_mixture(case.engine, tensors[0], tensors[1], tensors[2] if tensors[2:] else None) * dout).sum()

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    grads = torch.autograd.grad(value(leaves), leaves)
    step = 1e-6
    for which, grad in enumerate(grads):
        for _ in range(3):
            direction = case.normal(*grad.shape)
            ends = [
                [t + sign * step * direction if i == which else t for i, t in enumerate(inputs)] for sign in (1, -1)
            ]
            slope = (value(ends[0]) - value(ends[1])) / (2 * step)
            close((grad * direction).sum(), slope, 1e-5)


@ENGINES
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clip_and_sgd_follows_torch(engine: str, max_norm: float) -> None:
    """Five steps of changing paths equal `clip_grad_norm_` and `SGD` on modules whose other gradients are None."""
    case = Case(small_body("sink"), engine, seed=7)
    lr, momentum, decay = 0.3, 0.9, 1e-2
    dense = case.normal(6, 5)
    dense_buffer = torch.zeros_like(dense)
    dense_naive = torch.nn.Parameter(dense.clone())
    parameters = [*case.naive.parameters(), dense_naive]
    optimizer = torch.optim.SGD(parameters, lr, momentum, weight_decay=decay)
    frozen = {name: tensor.clone() for name, tensor in case.state().items()}
    for step in range(5):
        choices = torch.stack([torch.randperm(4, generator=case.generator)[:2] for _ in case.layers], 1)
        if step == 3:
            choices[1] = choices[0]
        x, target = case.normal(3, 4, 8, 8), case.normal(3, 5, 4, 4)
        outs = run_paths(case.engine, x, choices, case.v)
        leaf = dense.clone().requires_grad_()
        torch.stack([((out - target) ** 3).mean() for out in outs]).sum().backward()
        leaf.pow(2).sum().backward()
        assert leaf.grad is not None
        norm = case.engine.clip_and_sgd_(lr, momentum, decay, max_norm, [(dense, leaf.grad, dense_buffer)])
        optimizer.zero_grad(set_to_none=True)
        wants = [case.naive.path(x, choice, case.v) for choice in choices.tolist()]
        (torch.stack([((out - target) ** 3).mean() for out in wants]).sum() + dense_naive.pow(2).sum()).backward()
        want_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        assert norm.dim() == 0
        close(norm, want_norm)
    close(dense, dense_naive.detach())
    state = case.state()
    for name, parameter in case.naive.named_parameters():
        prefix = tuple(slice(0, n) for n in parameter.shape)
        close(state[name][prefix], parameter.detach())
        frozen[name][prefix] = state[name][prefix]
        assert torch.equal(frozen[name], state[name]), f"{name}: channels beyond the width changed"


@ENGINES
def test_gradients_are_consumed_and_replaced(engine: str) -> None:
    case = Case(small_body("sink"), engine, seed=9)
    with pytest.raises(RuntimeError, match="backward_paths"):
        case.engine.clip_and_sgd_(0.1, 0.9, 0, 5, [])
    for row in (0, 1):
        run_paths(case.engine, case.x, case.choices[row : row + 1], case.v)[0].pow(2).sum().backward()
        seen = {layer: candidate for layer, candidate, _, _ in case.engine.read_gradients()}
        assert [seen[layer] for layer in sorted(seen)] == case.choices[row].tolist()
    case.engine.clip_and_sgd_(0.1, 0.9, 0, 5, [])
    assert case.engine.read_gradients() == []


@ENGINES
@pytest.mark.parametrize("same", [False, True])
def test_gradient_buffers_are_the_gradients(engine: str, same: bool) -> None:
    """What is done to the buffers is done to every gradient; their sizes depend on choices and widths alone."""
    sizes = []
    for seed in (13, 14):
        case = Case(small_body("sink"), engine, seed=seed)
        case.engine.set_widths([[c.max_width - 1 for c in layer.candidates] for layer in case.spec.layers])
        assert case.engine.gradient_buffers() == []
        choices = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3] if same else [3, 1, 0, 2]])
        sum(out.pow(2).sum() for out in run_paths(case.engine, case.x, choices, case.v)).backward()
        before = [grad.clone() for *_, grad in case.engine.read_gradients()]
        sizes.append([buffer.numel() for buffer in case.engine.gradient_buffers()])
        for buffer in case.engine.gradient_buffers():
            buffer.mul_(3)
        for old, (*_, new) in zip(before, case.engine.read_gradients(), strict=True):
            torch.testing.assert_close(new, 3 * old)
        case.engine.clip_and_sgd_(0.1, 0.9, 0, 5, [])
        assert case.engine.gradient_buffers() == []
    assert sizes[0] == sizes[1]


@ENGINES
def test_reset_momentum(engine: str) -> None:
    case = Case(small_body("sink"), engine, seed=10)
    run_paths(case.engine, case.x, case.choices, case.v)[0].pow(3).sum().backward()
    case.engine.clip_and_sgd_(0.1, 0.9, 0, 5, [])
    assert any(m.any() for layer in case.layers for m in layer.momenta())
    case.engine.reset_momentum_()
    assert not any(m.any() for layer in case.layers for m in layer.momenta())


@ENGINES
def test_no_tape_without_gradients_and_one_backward(engine: str) -> None:
    case = Case(small_body("sink"), engine, seed=11)
    with torch.no_grad():
        out = run_paths(case.engine, case.x, case.choices, case.v)[0]
        assert not out.requires_grad
        assert not run_mixture(case.engine, case.x, case.u, case.v).requires_grad
    out = run_paths(case.engine, case.x, case.choices, case.v)[0]
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        out.sum().backward()


@ENGINES
def test_paths_train_weights_of_inputs_without_gradient(engine: str) -> None:
    case = Case(small_body("sink"), engine, seed=12)
    run_paths(case.engine, case.x.detach(), case.choices, case.v)[1].pow(2).sum().backward()
    assert case.engine.read_gradients()


@ENGINES
def test_bad_input(engine: str) -> None:
    case = Case(small_body("sink"), engine, seed=13)
    x, v, choices = case.x.detach(), case.v, case.choices
    assert v is not None
    for bad_choices in (choices[0], choices[:, :2], torch.cat([choices, choices])):
        with pytest.raises(ValueError, match="choices must be"):
            run_paths(case.engine, x, bad_choices, v)
    for value in (-1, 4):
        wrong = choices.clone()
        wrong[0, 2] = value
        with pytest.raises(ValueError, match="choices: layer 2"):
            run_paths(case.engine, x, wrong, v)
    with pytest.raises(ValueError, match="x must be"):
        run_paths(case.engine, x[:, :3], choices, v)
    for bad_v in (None, v[:1], v[:, :1]):
        with pytest.raises(ValueError, match="v must be"):
            run_mixture(case.engine, x, case.u, bad_v)
    with pytest.raises(ValueError, match="u must be"):
        run_mixture(case.engine, x, case.u[:, :3], v)
    for width in (0, 9):
        wrong_widths = [list(row) for row in case.widths]
        wrong_widths[0][0] = width
        with pytest.raises(ValueError, match=r"widths: layer 0, k3_e2 must be in 1\.\.8"):
            case.engine.set_widths(wrong_widths)
    with pytest.raises(ValueError, match="widths must have one row"):
        case.engine.set_widths(case.widths[1:])


def test_make_engine_refuses() -> None:
    case = Case(small_body("sink"), "reference", seed=14)
    with pytest.raises(ValueError, match="engine must be one of auto"):
        make_engine("fast", case.spec, case.layers)
    with pytest.raises(ValueError, match="layers must be"):
        make_engine("reference", case.spec, case.layers[1:])


@pytest.mark.parametrize("candidate", range(4))
def test_permutation_keeps_the_function_and_moves_momentum(candidate: int) -> None:
    case = Case(small_body("sink"), "reference", seed=20 + candidate)
    case.engine.set_widths([[c.max_width for c in spec.candidates] for spec in case.spec.layers])
    choices = torch.full((1, 4), candidate)

    def step() -> Tensor:
        out = run_paths(case.engine, case.x.detach(), choices, case.v)[0]
        (out**3).sum().backward()
        case.engine.clip_and_sgd_(0.1, 0.9, 1e-3, 5, [])
        return out.detach()

    step()
    twin = Case(small_body("sink"), "reference", seed=20 + candidate)
    for mine, other in zip(case.layers, twin.layers, strict=True):
        other.load_state_dict(mine.state_dict())
        copy_named(other.momentum_state(), mine.momentum_state(), "momentum")
    twin.engine.set_widths([[c.max_width for c in spec.candidates] for spec in case.spec.layers])
    before = case.state()[f"stages.0.0.{case.spec.layers[0].candidates[candidate].name}.conv_dw.weight"].clone()
    for layer in case.layers:
        layer.permute_(candidate, torch.randperm(layer.spec.candidates[candidate].max_width, generator=case.generator))
    after = case.state()[f"stages.0.0.{case.spec.layers[0].candidates[candidate].name}.conv_dw.weight"]
    assert not torch.equal(before, after)
    for _ in range(3):
        first = step()
        second = run_paths(twin.engine, case.x.detach(), choices, case.v)[0]
        (second**3).sum().backward()
        twin.engine.clip_and_sgd_(0.1, 0.9, 1e-3, 5, [])
        close(first, second.detach())


def test_packed_layer_state() -> None:
    case = Case(small_body("skip-in"), "reference", seed=30)
    layer = case.layers[1]
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert {name.split(".")[0] for name in state} == {c.name for c in layer.spec.candidates if not c.is_skip}
    assert state["k3_e2_se1.se.conv_reduce.weight"].shape == (6, 12, 1, 1)
    other = PackedLayer(layer.spec, dtype=torch.float64)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(layer.weights(), other.weights(), strict=True))
    state["k3_e2.conv_dw.weight"] = state["k3_e2.conv_dw.weight"][1:]
    with pytest.raises(RuntimeError, match=r"k3_e2.conv_dw.weight must be \[12, 1, 3, 3\], not \[11, 1, 3, 3\]"):
        other.load_state_dict(state)
    del state["k3_e2.conv_dw.weight"]
    state["k9.conv_dw.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*k3_e2.conv_dw.weight|Unexpected.*k9.conv_dw.weight"):
        other.load_state_dict(state)
    with pytest.raises(KeyError, match="momentum: names missing"):
        copy_named(other.momentum_state(), {}, "momentum")
    with pytest.raises(ValueError, match="order must be a permutation"):
        layer.permute_(0, torch.zeros(12, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CandidateSpec("a.b", 3, 4), "without dots"),
        (lambda: CandidateSpec("a", 4, 4), "kernel_size must be odd"),
        (lambda: CandidateSpec("skip", 3, 0), "is the identity"),
        (lambda: LayerSpec(4, 4, 1, "gelu", True, candidates(4)), "act must be one of"),
        (lambda: LayerSpec(4, 4, 3, "relu", True, candidates(4)), "stride 1 or 2"),
        (lambda: LayerSpec(4, 6, 1, "relu", True, candidates(4)), "residual, gated and the identity"),
        (lambda: LayerSpec(4, 6, 1, "relu", False, (*candidates(4), SKIP)), "residual, gated and the identity"),
        (lambda: LayerSpec(4, 4, 1, "relu", True, (SKIP,)), "one that is not the identity"),
        (lambda: LayerSpec(4, 4, 1, "relu", True, candidates(4)[:1] * 2), "distinct names"),
        (lambda: BodySpec(()), "stages must not be empty"),
        (lambda: BodySpec(small_body("skip-out").stages, "sink"), "gated layers belong to"),
        (lambda: BodySpec(small_body("sink").stages, "none"), "depth_space must be one of"),
        (lambda: BodySpec(small_body("sink").stages[::-1]), "in_channels"),
    ],
)
def test_bad_specs(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
