"""Engines on random bodies in float64, and their rounding in float32 and bfloat16 against that of plain modules."""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch
from engine_case import Case, close, random_body, small_body
from naive_body import NaiveBody
from torch import Tensor

from tfnas_ext.engine import engine_names, make_engine, run_mixture, run_paths
from tfnas_ext.packed import PackedLayer

ENGINES = pytest.mark.parametrize("engine", engine_names())
SEEDS = range(300 if os.environ.get("TFNAS_SLOW") == "1" else 16)


def random_case(engine: str, seed: int) -> Case:
    rng = random.Random(1000 + seed)
    spec = random_body(rng)
    # at least 4 pixels where the map is smallest, or batch norms amplify rounding without bound
    strides = sum(layer.stride == 2 for layer in spec.layers)
    shape = (rng.randint(2, 4), rng.randint(1, 12) * 2**strides - rng.randint(0, 1), 2 * 2**strides + rng.randint(0, 5))
    return Case(spec, engine, seed, (shape[0], max(1, shape[1]), shape[2]))


@ENGINES
@pytest.mark.parametrize("seed", SEEDS)
def test_random_bodies(engine: str, seed: int) -> None:
    case = random_case(engine, seed)
    paths = 1 + seed % 2
    outs = run_paths(case.engine, case.x, case.choices[:paths], case.v)
    wants = [case.naive.path(case.x, choice, case.v) for choice in case.choices[:paths].tolist()]
    douts = [case.normal(*out.shape) for out in outs]
    dx = torch.autograd.grad(outs, case.x, douts)[0]
    parameters = dict(case.naive.named_parameters())
    grads = torch.autograd.grad(wants, [case.x, *parameters.values()], douts, allow_unused=True)
    for out, want in zip(outs, wants, strict=True):
        close(out, want, 1e-7)
    scale = dx.abs().max().item() + 1
    close(dx / scale, grads[0] / scale, 1e-6)
    want_grads = {name: grad for name, grad in zip(parameters, grads[1:], strict=True) if grad is not None}
    got = case.named_gradients()
    assert got.keys() == want_grads.keys()
    for name, grad in want_grads.items():
        close(got[name], grad, 1e-6)

    inputs = [case.x, case.u.requires_grad_()] + ([] if case.v is None else [case.v.requires_grad_()])
    out, want = run_mixture(case.engine, case.x, case.u, case.v), case.naive.mixture(case.x, case.u, case.v)
    close(out, want, 1e-7)
    dout = case.normal(*out.shape)
    want_mixture = torch.autograd.grad(want, inputs, dout, allow_unused=True)
    for got_grad, grad in zip(torch.autograd.grad(out, inputs, dout), want_mixture, strict=True):
        close(got_grad, torch.zeros_like(got_grad) if grad is None else grad, 1e-6)


def results(case: Case, engine: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Outputs and gradients of paths and mixture by an engine at `dtype`, in float64 for comparison."""
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    layers = [PackedLayer(spec, dtype=weight_dtype) for spec in case.spec.layers]
    for layer, source in zip(layers, case.layers, strict=True):
        layer.load_state_dict(source.state_dict())
    made = make_engine(engine, case.spec, layers)
    made.set_widths(case.widths)
    x = case.x.detach().to(dtype).requires_grad_()
    u, v = (t.detach().to(weight_dtype).requires_grad_() for t in (case.u, case.v) if t is not None)
    outs = run_paths(made, x, case.choices, v)
    assert all(out.dtype == dtype for out in outs)
    generator = torch.Generator().manual_seed(seed)
    douts = [torch.randn(out.shape, dtype=torch.float64, generator=generator) for out in outs]
    dx = torch.autograd.grad(outs, x, [dout.to(dtype) for dout in douts])[0]
    weights = [grad for _, _, _, grad in made.read_gradients()]
    assert all(grad.dtype == weight_dtype for grad in weights)
    mixed = run_mixture(made, x, u, v)
    grads = torch.autograd.grad(mixed, [x, u, v], douts[0].to(dtype))
    assert [grad.dtype for grad in grads] == [dtype, weight_dtype, weight_dtype]
    flat = torch.cat([grad.flatten() for grad in weights])
    return [t.detach().double() for t in (*outs, dx, flat, mixed, *grads)]


def plain_results(case: Case, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """The same by modules whose weights and activations all have `dtype`."""
    naive: NaiveBody = copy.deepcopy(case.naive).to(dtype)
    x, u, v = (t.detach().to(dtype).requires_grad_() for t in (case.x, case.u, case.v) if t is not None)
    outs = [naive.path(x, choice, v.detach()) for choice in case.choices.tolist()]
    generator = torch.Generator().manual_seed(seed)
    douts = [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(dtype) for out in outs]
    parameters = list(naive.parameters())
    dx, *weights = torch.autograd.grad(outs, [x, *parameters], douts, allow_unused=True)
    mixed = naive.mixture(x, u, v)
    grads = torch.autograd.grad(mixed, [x, u, v], douts[0])
    flat = torch.cat([grad.flatten() for grad in weights if grad is not None])
    return [t.detach().double() for t in (*outs, dx, flat, mixed, *grads)]


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(2))
def test_rounding_is_at_most_twice_that_of_plain_torch(engine: str, dtype: torch.dtype, seed: int) -> None:
    case = Case(small_body("sink"), engine, seed, shape=(8, 14, 14))
    exact = results(case, "reference", torch.float64, seed)
    got, plain = results(case, engine, dtype, seed), plain_results(case, dtype, seed)
    # weight gradients come in another order from modules: both are compared with their own exact values
    plain_exact = plain_results(case, torch.float64, seed)
    for which, (a, b, want, plain_want) in enumerate(zip(got, plain, exact, plain_exact, strict=True)):
        few = want.numel() < 100  # gradients of mixing weights: errors of a few sums scatter
        floor = (1e-6 if few else 2e-7) if dtype == torch.float32 else 1e-2
        error, plain_error = (a - want).norm() / want.norm(), (b - plain_want).norm() / plain_want.norm()
        assert error <= 2 * plain_error + floor, f"result {which}: {error:.3g}, plain torch {plain_error:.3g}"
