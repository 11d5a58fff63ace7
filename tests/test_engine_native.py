"""The native engine against the reference engine: long runs, types, used tapes, refusals, memory."""

from __future__ import annotations

import gc

import pytest
import torch
from test_engine import small_body
from torch import Tensor

from tfnas_ext import _native
from tfnas_ext.engine import make_engine, run_mixture, run_paths
from tfnas_ext.engine_native import native_refusal
from tfnas_ext.engine_spec import BodySpec, CandidateSpec, LayerSpec
from tfnas_ext.packed import PackedLayer
from tfnas_ext.timing_host import pinned_threads

pytestmark = pytest.mark.skipif(_native.MODULE is None, reason="the native module is not built")


def body() -> BodySpec:
    """Widths that are no multiples of 16, SE, three activations, large maps (strips) and small ones (channels)."""

    def layer(cin: int, cout: int, stride: int, act: str) -> LayerSpec:
        ops = (
            CandidateSpec("k3", 3, 3 * cin),
            CandidateSpec("k5_se", 5, 3 * cin, cin),
            CandidateSpec("k3_wide_se", 3, 6 * cin, 7),
            CandidateSpec("k7", 7, 2 * cin + 1),
        )
        return LayerSpec(cin, cout, stride, act, stride == 1 and cin == cout, ops)

    first = (layer(6, 8, 2, "hard_swish"), layer(8, 8, 1, "hard_swish"))
    return BodySpec((first, (layer(8, 12, 2, "swish"), layer(12, 12, 1, "swish"), layer(12, 12, 1, "swish"))))


class Network:
    """One engine's copy of the same weights, with a linear head, and its own optimizers."""

    def __init__(self, engine: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.spec = body()
        self.layers = [PackedLayer(layer, dtype=dtype, generator=generator) for layer in self.spec.layers]
        self.engine = make_engine(engine, self.spec, self.layers)
        self.engine.set_widths([[c.max_width - i for i, c in enumerate(x.candidates)] for x in self.spec.layers])
        self.head = torch.randn(5, 12, generator=generator).to(dtype).requires_grad_()
        self.momentum = torch.zeros_like(self.head)
        self.alpha = torch.zeros(5, 4, dtype=dtype).requires_grad_()
        self.beta = torch.zeros(2, 3, dtype=dtype).requires_grad_()
        self.activations = dtype
        self.adam = torch.optim.Adam([self.alpha, self.beta], lr=0.01, betas=(0.5, 0.999))

    def v(self) -> Tensor:
        mask = torch.tensor([[True, True, False], [True, True, True]])
        return self.beta.masked_fill(~mask, -torch.inf).softmax(1)

    def weight_step(self, x: Tensor, labels: Tensor, choices: Tensor) -> float:
        x = x.to(self.activations).requires_grad_()
        outs = run_paths(self.engine, x, choices, self.v())
        loss = sum(
            torch.nn.functional.cross_entropy(out.to(self.head).mean((2, 3)) @ self.head.t(), labels) for out in outs
        )
        assert isinstance(loss, Tensor)
        (grad, _) = torch.autograd.grad(loss, [self.head, x])
        self.engine.clip_and_sgd_(0.05, 0.9, 1e-3, 5.0, [(self.head.detach(), grad, self.momentum)])
        return loss.item()

    def architecture_step(self, x: Tensor, labels: Tensor) -> float:
        out = run_mixture(self.engine, x.detach().to(self.activations), self.alpha.softmax(1), self.v())
        loss = torch.nn.functional.cross_entropy(out.to(self.head).mean((2, 3)) @ self.head.detach().t(), labels)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.item()


def test_fifty_steps_follow_the_reference() -> None:
    """Weight and architecture steps in turn, fixed choices, float32: losses and weights stay together within 0.2 %.

    Both start from the same weights; rounding grows slowly from step to step. The same run of the reference in float64
    lies as far from the reference in float32.
    """
    native, reference = Network("native"), Network("reference")
    generator = torch.Generator().manual_seed(2)
    for step in range(50):
        x = torch.randn(10, 6, 22, 20, generator=generator)
        labels = torch.randint(0, 5, (10,), generator=generator)
        choices = torch.randint(0, 4, (2, 5), generator=generator)
        for a, b in (
            (native.weight_step(x.clone(), labels, choices), reference.weight_step(x.clone(), labels, choices)),
            (native.architecture_step(x, labels), reference.architecture_step(x, labels)),
        ):
            assert abs(a - b) < 2e-3 * abs(b), (step, a, b)
    for mine, theirs in zip(native.layers, reference.layers, strict=True):
        for a, b in zip(mine.weights(), theirs.weights(), strict=True):
            assert ((a - b).norm() / b.norm().clamp_min(1e-3)).item() < 5e-3
    torch.testing.assert_close(native.alpha, reference.alpha, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("mixture", [False, True])
def test_bfloat16_activations(mixture: bool) -> None:
    """The 2x rule: at most twice the reference engine's error in bfloat16, both against the reference in float64."""
    exact, eager, native = Network("reference", torch.float64), Network("reference"), Network("native")
    for network in (eager, native):
        for mine, theirs in zip(network.layers, exact.layers, strict=True):
            for a, b in zip(mine.weights(), theirs.weights(), strict=True):
                a.detach().copy_(b.bfloat16())
                b.detach().copy_(b.bfloat16())
    x = torch.randn(6, 6, 40, 36, generator=torch.Generator().manual_seed(3)).bfloat16()
    results = []
    for network, dtype in ((exact, torch.float64), (eager, torch.bfloat16), (native, torch.bfloat16)):
        engine, inputs = network.engine, x.to(dtype)
        if mixture:
            u = torch.rand(5, 4, generator=torch.Generator().manual_seed(4)).to(network.v().dtype)
            out, tape = engine.forward_mixture(inputs, u, network.v().detach(), True)
            dx, *rest = engine.backward_mixture(tape, torch.ones_like(out) + out, True)
        else:
            choices = torch.tensor([[0, 1, 2, 3, 0]])
            (out,), tape = engine.forward_paths(inputs, choices, network.v().detach(), True)
            dx = engine.backward_paths(tape, [torch.ones_like(out) + out], True)
            rest = [gradient for *_, gradient in engine.read_gradients()]
        assert dx is not None
        assert out.dtype == dx.dtype == dtype
        assert {t.dtype for t in rest} == {network.v().dtype}
        results.append([out, dx, *rest])
    for want, plain, ours in zip(*results, strict=True):
        scale = want.norm().clamp_min(1e-3)
        error, allowed = ((t.double() - want).norm() / scale for t in (ours, plain))
        assert error < 2 * allowed + 4e-3, (error, allowed)


def test_bfloat16_steps_follow_float32() -> None:
    """Weight and architecture steps in turn from the same weights: bfloat16 losses stay within 2 % of float32's."""
    single, low = Network("native"), Network("native")
    low.activations = torch.bfloat16
    generator = torch.Generator().manual_seed(5)
    for step in range(12):
        x = torch.randn(10, 6, 22, 20, generator=generator)
        labels = torch.randint(0, 5, (10,), generator=generator)
        choices = torch.randint(0, 4, (2, 5), generator=generator)
        for a, b in (
            (low.weight_step(x.clone(), labels, choices), single.weight_step(x.clone(), labels, choices)),
            (low.architecture_step(x, labels), single.architecture_step(x, labels)),
        ):
            assert abs(a - b) < 2e-2 * abs(b), (step, a, b)


def test_a_tape_is_used_once() -> None:
    native = Network("native")
    x = torch.randn(4, 6, 12, 10)
    out, tape = native.engine.forward_mixture(x, torch.full((5, 4), 0.25), native.v().detach(), True)
    native.engine.backward_mixture(tape, torch.ones_like(out), True)
    with pytest.raises(RuntimeError, match="used once"):
        native.engine.backward_mixture(tape, torch.ones_like(out), True)


def test_tapes_that_live_at_once_do_not_meet() -> None:
    """Three forwards before their backwards, dropped in another order: each gradient is its own."""
    native = Network("native")
    choices = torch.tensor([[0, 1, 2, 3, 0], [3, 2, 1, 0, 1]])
    inputs = [torch.randn(n, 6, 12, 10, generator=torch.Generator().manual_seed(n)) for n in (2, 5, 3)]

    def gradient(x: Tensor) -> Tensor:
        outs, tape = native.engine.forward_paths(x, choices, native.v().detach(), True)
        dx = native.engine.backward_paths(tape, outs, True)
        assert dx is not None
        return dx

    wants = [gradient(x) for x in inputs]
    passes = [native.engine.forward_paths(x, choices, native.v().detach(), True) for x in inputs]
    native.engine.forward_paths(inputs[1], choices, native.v().detach(), True)
    gc.collect()
    for index in (1, 0, 2):
        outs, tape = passes[index]
        dx = native.engine.backward_paths(tape, outs, True)
        assert dx is not None
        assert torch.equal(dx, wants[index])


def test_same_bits_at_a_fixed_number_of_threads_and_the_same_values_at_others() -> None:
    """Outputs and gradients of paths and mixture: twice with 1, 2 and 3 threads."""
    x = torch.randn(6, 6, 22, 20, generator=torch.Generator().manual_seed(4))
    before = torch.get_num_threads()

    def everything() -> list[Tensor]:
        native = Network("native")
        v = native.v().detach()
        outs, tape = native.engine.forward_paths(x, torch.tensor([[0, 1, 2, 3, 0], [3, 2, 1, 1, 0]]), v, True)
        dx = native.engine.backward_paths(tape, outs, True)
        out, tape = native.engine.forward_mixture(x, torch.full((5, 4), 0.25), v, True)
        dx_mixture, du, dv = native.engine.backward_mixture(tape, out, True)
        gradients = [gradient for *_, gradient in native.engine.read_gradients()]
        return [t for t in (*outs, dx, out, dx_mixture, du, dv, *gradients) if t is not None]

    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            first, second = everything(), everything()
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            results.append(first)
    finally:
        torch.set_num_threads(before)
    scale = max(t.norm().item() for t in results[0][9:])  # gradients that cancel: rounding of the largest one's size
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert ((a - b).norm() / (b.norm() if i < 9 else scale)).item() < 1e-5, i


def test_memory_of_a_mixture() -> None:
    """Kept: y3 of every candidate, and the wide y2 of large maps (5 x 5 only) or y1 of small ones, in float32.

    A layer's scratch lies where the tape of the layers behind it was: the backward needs hardly more than the forward
    left, where scratch on top of all would need 1.4 times as much.
    """
    batch, size, channels, width = 8, 40, 24, 48
    ops = (CandidateSpec("k3", 3, width), CandidateSpec("k5", 5, width))
    layers = [LayerSpec(channels, channels, stride, "relu", stride == 1, ops) for stride in (1, 1, 1, 2, 1)]
    spec = BodySpec((tuple(layers),), depth_space="skip-in")
    packed = [PackedLayer(layer) for layer in layers]
    kept, pixels = 0, batch * size**2
    for layer in layers:
        out_pixels = pixels // layer.stride**2
        kept += 4 * out_pixels * channels  # the layer's output
        kept += 2 * 4 * out_pixels * channels  # y3
        large = pixels > 4000
        wide = 2 if layer.stride == 2 or not large else 1  # at stride 2, 3 x 3 is not cheap to make again either
        kept += wide * 4 * width * (out_pixels if large else pixels)
        pixels = out_pixels
    x = torch.randn(batch, channels, size, size)
    u = torch.full((5, 2), 0.5)
    peaks = []
    for backward in (False, True):
        engine = make_engine("native", spec, packed)
        with pinned_threads(2):  # each has scratch
            out, tape = engine.forward_mixture(x, u, None, True)
            if backward:
                engine.backward_mixture(tape, out, True)
            del tape
        peaks.append(engine._native.memory_bytes())  # type: ignore[attr-defined]
    assert kept < peaks[0] < 1.1 * kept, (kept, peaks)
    assert peaks[0] <= peaks[1] < 1.2 * kept, (kept, peaks)


def test_refusals_say_why() -> None:
    spec = small_body("sink")
    layers = [PackedLayer(layer, dtype=torch.bfloat16) for layer in spec.layers]
    reason = native_refusal(spec, layers)
    assert reason is not None
    assert "bfloat16" in reason
    with pytest.raises(RuntimeError, match="bfloat16"):
        make_engine("native", spec, layers)
    assert make_engine("auto", spec, layers).name == "reference"
    odd = BodySpec(((LayerSpec(4, 4, 1, "relu", True, (CandidateSpec("k9", 9, 8),)),),))
    assert "kernel_size is 9" in str(native_refusal(odd, [PackedLayer(odd.layers[0])]))
    assert make_engine("auto", small_body("sink"), [PackedLayer(x) for x in spec.layers]).name == "native"


@pytest.mark.parametrize("value", ["x", "batch"])
def test_too_small_a_batch_is_refused(value: str) -> None:
    native = Network("native")
    x = torch.randn(1, 6, 1, 1) if value == "batch" else torch.randn(0, 6, 8, 8)
    with pytest.raises(ValueError, match="x must"):
        native.engine.forward_paths(x, torch.zeros(1, 5, dtype=torch.int64), native.v().detach(), False)
