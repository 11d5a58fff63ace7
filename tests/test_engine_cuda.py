"""The CUDA engine, launchers and kernels included, on CPU tensors under the emulator, against a naive body in float64.

What a GPU adds to this is the device itself: its own compiler, tensor cores, streams and memory. The first run compiles
for some 20 s; the random bodies run with TFNAS_SLOW=1.
"""

from __future__ import annotations

import random

import pytest
import torch
from emulated_engine import emulated
from engine_case import Case, close, random_body, small_body
from precision_cases import PRECISIONS, require_precision
from torch._subclasses.schema_check_mode import SchemaCheckMode

from tfnas_ext.engine import run_mixture, run_paths
from tfnas_ext.engine_cuda import product_math, refusal, shape_refusal
from tfnas_ext.engine_spec import BodySpec, CandidateSpec, LayerSpec

__all__ = ["emulated"]  # the fixture


def random_sink_body(rng: random.Random) -> BodySpec:
    while True:
        spec = random_body(rng)
        if shape_refusal(spec) is None:
            return spec


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_paths_and_mixture(emulated: str, seed: int) -> None:
    rng = random.Random(seed)
    spec = small_body("sink") if seed == 0 else random_sink_body(rng)
    strides = sum(layer.stride == 2 for layer in spec.layers)
    size = 2 * 2**strides
    case = Case(spec, emulated, seed, (2, size + rng.randint(0, 3), size + rng.randint(0, 3)))
    paths = 1 + seed % 2
    outs = run_paths(case.engine, case.x, case.choices[:paths], case.v)
    wants = [case.naive.path(case.x, choice, case.v) for choice in case.choices[:paths].tolist()]
    douts = [case.normal(*out.shape) for out in outs]
    dx = torch.autograd.grad(outs, case.x, douts)[0]
    parameters = dict(case.naive.named_parameters())
    grads = torch.autograd.grad(wants, [case.x, *parameters.values()], douts, allow_unused=True)
    for out, want in zip(outs, wants, strict=True):
        close(out, want, 1e-8)
    close(dx, grads[0], 1e-7)
    got = case.named_gradients()
    want_grads = {name: grad for name, grad in zip(parameters, grads[1:], strict=True) if grad is not None}
    assert got.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        close(got[name], grad, 1e-7)

    assert case.v is not None
    inputs = [case.x, case.u.requires_grad_(), case.v.requires_grad_()]
    out, want = run_mixture(case.engine, *inputs), case.naive.mixture(*inputs)
    close(out, want, 1e-8)
    dout = case.normal(*out.shape)
    for got_grad, grad in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(want, inputs, dout), strict=True
    ):
        close(got_grad, grad, 1e-7)


@pytest.mark.parametrize("same", [False, True])
def test_clip_and_sgd(emulated: str, same: bool) -> None:
    """Three steps equal those of the plain PyTorch engine, also where both paths take the same candidates."""
    ours, plain = (
        Case(small_body("sink"), emulated, 3, (2, 7, 6)),
        Case(small_body("sink"), "reference", 3, (2, 7, 6)),
    )
    dense = [[torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)] for _ in range(2)]
    for step in range(3):
        choices = torch.tensor([[step % 2] * 4, [step % 2 if same else 3] * 4])
        norms = []
        for case, (weight, buffer) in zip((ours, plain), dense, strict=True):
            outs = run_paths(case.engine, case.x, choices, case.v)
            torch.autograd.grad(
                outs, case.x, [torch.sin(torch.arange(out.numel()).double()).view(out.shape) for out in outs]
            )
            for gradients in case.engine.gradient_buffers():
                gradients.div_(2)
            grad = torch.linspace(-1, 1, 5, dtype=torch.float64)
            norms.append(case.engine.clip_and_sgd_(0.1, 0.9, 1e-3, 2.0, [(weight, grad, buffer)]))
        close(norms[0], norms[1], 1e-9)
    close(dense[0][0], dense[1][0], 1e-9)
    for a, b in zip(ours.layers, plain.layers, strict=True):
        for got, want in zip([*a.weights(), *a.momenta()], [*b.weights(), *b.momenta()], strict=True):
            close(got.detach(), want.detach(), 1e-8)
    with pytest.raises(RuntimeError, match="backward_paths"):
        ours.engine.clip_and_sgd_(0.1, 0.9, 0, 5.0, [])


def test_operators_do_what_their_schemas_say(emulated: str) -> None:
    """Nothing is written that the schema does not mark, and no result is an argument's memory."""
    case = Case(small_body("sink"), emulated, 5, (2, 5, 5))
    with SchemaCheckMode():
        outs = run_paths(case.engine, case.x, case.choices, case.v)
        torch.autograd.grad(outs, case.x, [torch.ones_like(out) for out in outs])
        case.engine.clip_and_sgd_(0.1, 0.9, 1e-3, 2.0, [])
        out = run_mixture(case.engine, case.x, case.u.requires_grad_(), case.v)
        torch.autograd.grad(out.sum(), [case.x, case.u])


def test_choices_are_not_read_on_the_host(emulated: str) -> None:
    """A choice past the last candidate is clamped on the device, and the launch goes on: no check that would wait."""
    case = Case(small_body("sink"), emulated, 4, (2, 5, 5))
    last = torch.tensor([[len(layer.candidates) - 1 for layer in case.spec.layers]])
    outs = [case.engine.forward_paths(case.x, choices, case.v, False)[0][0] for choices in (last, last + 9)]
    assert torch.equal(*outs)


def test_a_tape_keeps_its_choices(emulated: str) -> None:
    """Another forward between a forward and its backward changes neither the gradients nor the step."""
    found = []
    for other in (False, True):
        case = Case(small_body("sink"), emulated, 6, (2, 5, 5))
        choices = torch.tensor([[0] * 4, [1] * 4])
        outs, tape = case.engine.forward_paths(case.x, choices, case.v, True)
        if other:
            case.engine.forward_paths(case.x, 1 - choices, case.v, True)
        case.engine.backward_paths(tape, [torch.sin(out) for out in outs], True)
        rows = case.engine.read_gradients()
        case.engine.clip_and_sgd_(0.1, 0.9, 1e-3, 2.0, [])
        found.append((rows, [weight for layer in case.layers for weight in layer.weights()]))
    (rows, weights), (rows_after, weights_after) = found
    assert [row[:3] for row in rows] == [row[:3] for row in rows_after]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(rows, rows_after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_after, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_what_a_gpu_is_tested_for_holds_here(emulated: str, precision: str, seed: int) -> None:
    """So that there it fails for the device's sake."""
    require_precision("cpu", emulated, precision, seed)


def test_products_follow_both_settings_of_torch() -> None:
    """After the newer one `torch.get_float32_matmul_precision` raises an error: a step must not."""
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        for older, math in (("high", "tf32"), ("highest", "fp32")):
            torch.set_float32_matmul_precision(older)
            assert product_math() == math
        for newer, math in (("tf32", "tf32"), ("ieee", "fp32")):
            matmul.fp32_precision = newer
            assert product_math() == math
    finally:
        torch.set_float32_matmul_precision(before)


def test_refusals() -> None:
    case = Case(small_body("sink"), "reference", 0)
    assert "not on a CUDA device" in str(refusal(case.spec, case.layers))
    assert "depth_space" in str(shape_refusal(small_body("skip-out")))
    layer = LayerSpec(4, 4, 1, "relu", True, (CandidateSpec("a", 9, 8, 0),))
    assert "kernel sizes [9]" in str(shape_refusal(BodySpec(((layer,),))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4, 4, dtype=torch.float64)}, "x must be"),
        ({"choices": torch.zeros(3, 4, dtype=torch.int64)}, "choices must be"),
        ({"choices": torch.full((2, 4), float("nan"))}, "choices must be int64, not torch.float32"),
        ({"v": None}, "v must be"),
        ({"x": torch.zeros(0, 4, 4, 4, dtype=torch.float64)}, "non-empty"),
    ],
)
def test_bad_arguments(emulated: str, change: dict[str, torch.Tensor | None], message: str) -> None:
    case = Case(small_body("sink"), emulated, 0, (2, 5, 5))
    arguments = {"x": case.x, "choices": case.choices, "v": case.v} | change
    with pytest.raises((ValueError, TypeError), match=message):
        case.engine.forward_paths(arguments["x"], arguments["choices"], arguments["v"], False)
    with pytest.raises(ValueError, match=r"widths: layer 0"):
        case.engine.set_widths([[0] * len(layer.candidates) for layer in case.spec.layers])
