"""Launchers of the CUDA kernels, emulated: the stem's fixed block, float32 by the rule of two, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_engine import emulated
from engine_case import Case, close, small_body
from tfnas.network import Stem
from tfnas.space import Space
from torch import Tensor

from tfnas_ext.engine import make_engine, run_mixture, run_paths
from tfnas_ext.engine_spec import BodySpec, CandidateSpec, LayerSpec
from tfnas_ext.fixed_layer import FixedLayer
from tfnas_ext.packed import ROLES, PackedLayer

__all__ = ["emulated"]  # the fixture


@pytest.mark.parametrize(("channels", "out", "se", "act"), [(6, 6, 3, "swish"), (9, 4, 0, "relu")])
def test_fixed_block_equals_its_modules(emulated: str, channels: int, out: int, se: int, act: str) -> None:
    torch.manual_seed(channels)
    space = Space.__new__(Space)  # the stem reads these alone
    values = {"stem_channels": channels, "fixed_channels": out, "fixed_se_channels": se, "stem_act": act}
    for name, value in (values | {"image_channels": 3, "stem_stride": 1}).items():
        object.__setattr__(space, name, value)
    block = Stem(space, affine=False, running_stats=False).double().block
    weights = list(block.parameters())
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn_like(weight))
    layer = FixedLayer(channels, 3, se, act, block.has_residual, 1e-5, torch.device("cpu"))
    x = torch.randn(2, channels, 7, 5, dtype=torch.float64, requires_grad=True)
    got, want = layer(x, weights), block(x)
    close(got, want)
    dout = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, [x, *weights], dout), torch.autograd.grad(want, [x, *weights], dout), strict=True
    ):
        close(ours, theirs, 1e-8)


def results(engine_name: str, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of two paths and of the mixture, by name, in float64."""
    layers = [PackedLayer(spec, dtype=dtype) for spec in case.spec.layers]
    for layer, source in zip(layers, case.layers, strict=True):
        layer.load_state_dict(source.state_dict())
    engine = make_engine(engine_name, case.spec, layers)
    engine.set_widths(case.widths)
    assert case.v is not None
    x, u, v = (t.detach().to(dtype).requires_grad_() for t in (case.x, case.u, case.v))
    outs = run_paths(engine, x, case.choices, v)
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(dtype) for out in outs]
    found = {"out of path 1": outs[0], "out of path 2": outs[1], "dx": torch.autograd.grad(outs, x, douts)[0]}
    for layer_index, candidate, role, grad in engine.read_gradients():
        found[f"layer {layer_index}, candidate {candidate}: d {ROLES[role]}"] = grad
    mixed = run_mixture(engine, x, u, v)
    grads = torch.autograd.grad(mixed, [x, u, v], douts[0])
    found |= dict(zip(("mixture dx", "mixture du", "mixture dv"), grads, strict=True)) | {"mixture out": mixed}
    return {name: tensor.detach().double() for name, tensor in found.items()}


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3))])
def test_float32_errs_at_most_twice_as_much_as_plain_pytorch(emulated: str, seed: int) -> None:
    """Three tf32 products in place of one of float32; everything else in float32, sums in a fixed order."""
    assert torch.get_float32_matmul_precision() == "highest"
    case = Case(small_body("sink"), "reference", seed, (2, 9, 8))
    want = results("reference", case, torch.float64)
    ours, plain = results(emulated, case, torch.float32), results("reference", case, torch.float32)
    # A gradient may cancel to nothing (of width 1 before a batch norm): measured by the largest of its role.
    scales: dict[str, Tensor] = {}
    for name, exact in want.items():
        role = name.rpartition(": ")[2]
        scales[role] = torch.maximum(scales.get(role, torch.tensor(1e-2)), exact.abs().max())
    for name, exact in want.items():
        scale = scales[name.rpartition(": ")[2]]
        error, allowed = ((ours[name] - exact).abs().max() / scale, (plain[name] - exact).abs().max() / scale)
        assert error <= 2 * allowed + 2e-6, f"{name}: {error:.1e}, plain PyTorch {allowed:.1e}"


def layer_call() -> dict[str, Any]:
    spec = LayerSpec(4, 6, 1, "swish", False, (CandidateSpec("a", 3, 8, 2), CandidateSpec("b", 5, 9)))
    layer = PackedLayer(spec)
    rows = [[3, 0, 0, 8, 2, 0, 0, 0], [5, 8, 72, 9, 0, 16, 2, 8]]
    table = torch.tensor(rows)
    return {
        "x": torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last),
        "weights": [weight.detach() for weight in layer.weights()],
        "table": table,
        "device_table": torch.ops.tfnas._layer_table(table, torch.device("cpu")),
        "choice": torch.zeros(1, dtype=torch.int32),
        "u": None,
        "stride": 1,
        "act": "swish",
        "residual": False,
        "eps": 1e-5,
        "math": "fp32",
    }


def table_with(row: int, column: int, value: int) -> Tensor:
    table = layer_call()["table"].clone()
    table[row, column] = value
    return table


def weights_with(index: int, change: Any) -> list[Tensor]:
    weights = layer_call()["weights"]
    weights[index] = change(weights[index])
    return weights


X = torch.randn(2, 4, 5, 5)
BAD_FORWARD: dict[str, tuple[Any, type[Exception], str]] = {
    "contiguous x": (lambda: {"x": X}, ValueError, "x must be channels_last"),
    "integer x": (lambda: {"x": X.long()}, TypeError, "x must be float32, float64 or bfloat16, got Long"),
    "x of 3 dimensions": (lambda: {"x": X[0]}, ValueError, r"x must be a non-empty \[N, C, H, W\], got \[4, 5, 5\]"),
    "empty batch": (lambda: {"x": X[:0]}, ValueError, "x must be a non-empty"),
    "other channels": (
        lambda: {"x": torch.randn(2, 5, 5, 5).contiguous(memory_format=torch.channels_last)},
        ValueError,
        r"expand must be \[rows, 5\] as x has 5 channels",
    ),
    "weights in float64": (lambda: {"weights": weights_with(0, Tensor.double)}, TypeError, "expand must be Float"),
    "six weights": (lambda: {"weights": weights_with(0, Tensor.clone)[:6]}, ValueError, "weights must be seven"),
    "transposed weight": (
        lambda: {"weights": weights_with(2, lambda w: w.t().contiguous().t())},
        ValueError,
        "project must be contiguous",
    ),
    "few rows": (
        lambda: {"weights": weights_with(0, lambda w: w[:16].contiguous())},
        ValueError,
        "expand must hold at least 68 elements, got 64",
    ),
    "short depthwise": (
        lambda: {"weights": weights_with(1, lambda w: w[:-1].clone())},
        ValueError,
        "depthwise must hold at least 297 elements, got 296",
    ),
    "short SE": (
        lambda: {"weights": weights_with(3, lambda w: w[:-1].clone())},
        ValueError,
        "se_reduce_weight must hold at least 16 elements, got 15",
    ),
    "width 0": (lambda: {"table": table_with(0, 3, 0)}, ValueError, "table: widths must be at least 1, got 0"),
    "kernel 4": (lambda: {"table": table_with(0, 0, 4)}, ValueError, "kernel sizes are 3, 5 or 7, got 4"),
    "negative row": (lambda: {"table": table_with(0, 1, -1)}, ValueError, "table: .* must not be negative, got -1"),
    "int32 table": (lambda: {"table": table_with(0, 3, 8).int()}, ValueError, "table must be a contiguous int64"),
    "stride 3": (lambda: {"stride": 3}, ValueError, "stride must be 1 or 2, got 3"),
    "gelu": (lambda: {"act": "gelu"}, ValueError, "act must be one of relu, relu6, swish, hard_swish, got 'gelu'"),
    "math": (lambda: {"math": "fp16"}, ValueError, "math must be tf32 or fp32, got 'fp16'"),
    "int64 choice": (lambda: {"choice": torch.zeros(1, dtype=torch.int64)}, TypeError, "choice must be Int"),
    "two choices": (lambda: {"choice": torch.zeros(2, dtype=torch.int32)}, ValueError, "choice must be one number"),
    "u and choice": (lambda: {"u": torch.ones(2)}, ValueError, "give choice .* or u .*, not both"),
    "short u": (lambda: {"u": torch.ones(1), "choice": None}, ValueError, "u must hold at least 2 elements, got 1"),
    "residual": (lambda: {"residual": True}, ValueError, "residual needs stride 1 and as many output as input"),
    "no device table": (
        lambda: {"device_table": torch.zeros(4, dtype=torch.uint8)},
        ValueError,
        "device_table must be what _layer_table",
    ),
}


@pytest.mark.parametrize("name", BAD_FORWARD)
def test_bad_arguments_of_a_layer(emulated: str, name: str) -> None:
    change, error, message = BAD_FORWARD[name]
    with pytest.raises(error, match=message):
        torch.ops.tfnas._layer_forward(*(layer_call() | change()).values())
    torch.ops.tfnas._layer_forward(*layer_call().values())


def test_bad_arguments_of_a_layers_backward(emulated: str) -> None:
    call = layer_call()
    out, saved = torch.ops.tfnas._layer_forward(*call.values())
    x, *rest = call.values()
    grads = [torch.zeros(16 * 4), torch.zeros(16 * 25), torch.zeros(16 * 6)]
    grads += [torch.zeros_like(weight) for weight in call["weights"][3:]]
    good: dict[str, Any] = {"dout": torch.ones_like(out), "saved": saved, "grads": grads}
    for change, error, message in (
        ({"dout": torch.ones_like(out).double()}, TypeError, "dout must be Float, got Double"),
        ({"dout": out[:1]}, ValueError, "dout must be channels_last and as large as the output"),
        ({"dout": out.contiguous()}, ValueError, "dout must be channels_last"),
        ({"saved": saved[:-300]}, ValueError, "saved must hold at least"),
        ({"grads": grads[:6]}, ValueError, "grads must be seven tensors or none, got 6"),
        ({"grads": [grads[0][:9], *grads[1:]]}, ValueError, r"grads\[0\] must hold 64 elements, got 9"),
    ):
        given = good | change
        with pytest.raises(error, match=message):
            torch.ops.tfnas._layer_backward(x, given["dout"], given["saved"], *rest, True, given["grads"])
    torch.ops.tfnas._layer_backward(x, good["dout"], saved, *rest, True, grads)


def moved_by_one(tensor: Tensor) -> Tensor:
    """The same tensor at an address that is a multiple of its element's size only."""
    place = tensor.new_empty(tensor.numel() + 1)[1:]
    return place.as_strided(tensor.shape, tensor.stride(), place.storage_offset()).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_may_begin_anywhere(emulated: str, dtype: torch.dtype) -> None:
    call = layer_call()
    weights = [torch.randn(17, 4), torch.randn(297), torch.randn(17, 8), *call["weights"][3:]]
    call |= {"x": call["x"].to(dtype), "weights": weights}
    grads = [torch.zeros(16 * 4), torch.zeros(16 * 25), torch.zeros(16 * 8)]
    grads += [torch.zeros_like(weight) for weight in weights[3:]]
    results = []
    for move in (Tensor.clone, moved_by_one):
        here = call | {"x": move(call["x"]), "weights": [move(weight) for weight in weights]}
        out, saved = torch.ops.tfnas._layer_forward(*here.values())
        x, *rest = here.values()
        dx, _ = torch.ops.tfnas._layer_backward(x, move(torch.ones_like(out)), saved, *rest, True, grads)
        active = [grads[0][: 8 * 4], grads[1].view(16, 25)[:8, :9], grads[2][: 8 * 8], *grads[3:]]
        results.append([out, dx, *(grad.clone() for grad in active)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weight_gradients_alone_of_a_layer_without_expansion(emulated: str) -> None:
    layer = FixedLayer(6, 3, 2, "swish", False, 1e-5, torch.device("cpu"))
    shapes = [(6, 1, 3, 3), (2, 6, 1, 1), (2,), (6, 2, 1, 1), (6,), (5, 6, 1, 1)]
    packed = layer.pack(tuple(torch.randn(shape) for shape in shapes))
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    out, saved = torch.ops.tfnas._layer_forward(x, *layer.arguments(packed))
    found = []
    for need_dx in (True, False):
        grads = [torch.zeros(size) for size in (0, 8 * 9, 8 * 5, *(weight.numel() for weight in packed[3:]))]
        arguments = (x, torch.sin(out), saved, *layer.arguments(packed), need_dx, grads)
        dx, _ = torch.ops.tfnas._layer_backward(*arguments)
        assert dx.numel() == (x.numel() if need_dx else 0)
        found.append([grads[1][: 6 * 9], grads[2][: 6 * 5], *grads[3:]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0])


def test_bad_arguments_around_the_layers(emulated: str) -> None:
    ops, like = torch.ops.tfnas, torch.ones(3)
    with pytest.raises(ValueError, match=r"segments must be a contiguous int64 \[n, 9\], got \[1, 8\]"):
        ops._gradient_norm(torch.zeros(1, 8, dtype=torch.int64), [], 5.0, like)
    alpha = [torch.zeros(2, 3) for _ in range(3)]
    mask, steps = torch.ones(2, 3, dtype=torch.bool), torch.zeros(())
    options = (0.1, 0.9, 0.999, 0.0, 1e-8)

    def adam(**change: Any) -> None:
        values = {"a": alpha, "g": torch.zeros(2, 3), "m": mask, "s": steps, "n": 5.0} | change
        ops._adam_step(values["a"], values["g"], values["m"], alpha, alpha[0], mask, values["s"], *options, values["n"])

    for change, error, message in (
        ({"a": alpha[:2]}, ValueError, "alpha must be three tensors"),
        ({"g": torch.zeros(3, 2)}, ValueError, "alpha: values, moments and gradient must be"),
        ({"g": torch.zeros(2, 3).double()}, TypeError, "alpha must be Float, got Double"),
        ({"m": mask.int()}, TypeError, "mask must be Bool"),
        ({"s": torch.zeros((), dtype=torch.int64)}, TypeError, "steps must be float32 or float64, got Long"),
        ({"n": -1.0}, ValueError, "max_norm must be positive, got -1"),
    ):
        with pytest.raises(error, match=message):
            adam(**change)
    adam()
    outs = [torch.ones(2, 3), torch.ones(2, 3)]
    for call, error, message in (
        (lambda: ops._sink([], torch.ones(2)), ValueError, "outs must be 1 to 16 tensors, got 0"),
        (lambda: ops._sink([outs[0][:0]], torch.ones(1)), ValueError, r"outs must not be empty, got \[0, 3\]"),
        (lambda: ops._sink([outs[0], torch.ones(3, 2)], torch.ones(2)), ValueError, "outs must be alike"),
        (lambda: ops._sink(outs, torch.ones(1)), ValueError, "v must hold at least 2 elements, got 1"),
        (lambda: ops._sink(outs, torch.ones(2).double()), TypeError, "v must be Float, got Double"),
        (lambda: ops._sink([outs[0].int()], torch.ones(1)), TypeError, "outs must be float32, float64 or bfloat16"),
        (lambda: ops._sink_dots(outs, torch.ones(2)), ValueError, "dout must be as outs"),
        (lambda: ops._cross_entropy(outs[0], torch.zeros(3).long()), ValueError, r"labels must be \[2\], got \[3\]"),
        (lambda: ops._cross_entropy(outs[0], torch.zeros(2)), TypeError, "labels must be Long, got Float"),
        (lambda: ops._cross_entropy(outs[0][:0], torch.zeros(0).long()), ValueError, "logits must be a non-empty"),
        (lambda: ops._cross_entropy(outs[0].bfloat16(), torch.zeros(2).long()), TypeError, "logits must be float32"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_more_shared_memory_than_there_is(emulated: str) -> None:
    """Too many channels for the smallest tile: an error with sizes and a remedy, not a failed launch."""
    spec = LayerSpec(320, 1024, 2, "relu", False, (CandidateSpec("a", 7, 8),))
    layers = [PackedLayer(spec, dtype=torch.float64)]
    engine = make_engine(emulated, BodySpec(((spec,),)), layers)
    x = torch.randn(1, 320, 9, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"smallest tile needs more shared memory than the .* choose the engine"):
        engine.forward_paths(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.float64), False)
