"""The CUDA engine in every precision against plain PyTorch, on a GPU or under the emulator."""

from __future__ import annotations

import random

import torch
from engine_case import Case, random_body
from torch import Tensor

from tfnas_ext.engine import SupernetEngine, make_engine, run_mixture, run_paths
from tfnas_ext.engine_cuda import shape_refusal
from tfnas_ext.packed import ROLES, PackedLayer

# Name -> activations, torch's setting for float32 products, what is added to twice the error of plain PyTorch.
PRECISIONS = {
    "fp64": (torch.float64, "highest", 1e-9),
    "fp32": (torch.float32, "highest", 1e-5),
    "tf32": (torch.float32, "high", 4e-3),
    "bf16": (torch.bfloat16, "high", 4e-2),
}


def sink_case(seed: int) -> Case:
    rng = random.Random(seed)
    while True:
        spec = random_body(rng)
        # the batch norm after an expansion of one channel forgets its weights: their gradients are rounding alone
        if shape_refusal(spec) is None and all(layer.in_channels > 1 for layer in spec.layers):
            strides = sum(layer.stride == 2 for layer in spec.layers)
            return Case(spec, "reference", seed, (4, 4 * 2**strides + 1, 5 * 2**strides))


def engine_on(device: str, case: Case, dtype: torch.dtype, name: str) -> tuple[SupernetEngine, list[PackedLayer]]:
    """An engine with the case's weights and widths."""
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    layers = [PackedLayer(spec, dtype=weight_dtype) for spec in case.spec.layers]
    for layer, source in zip(layers, case.layers, strict=True):
        layer.load_state_dict(source.state_dict())
        layer.to(device)
    engine = make_engine(name, case.spec, layers)
    engine.set_widths(case.widths)
    return engine, layers


def everything(device: str, case: Case, engine: SupernetEngine, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of two paths and of the mixture by name, in float64 on the CPU, flat.

    Gradients of weights by what they are of, in all layers together: a single one may cancel to nothing.
    """
    x = case.x.detach().to(device, dtype).requires_grad_()
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert case.v is not None
    u, v = (tensor.detach().to(device, weight_dtype).requires_grad_() for tensor in (case.u, case.v))
    outs = run_paths(engine, x, case.choices.to(device), v)
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(device, dtype) for out in outs]
    found: dict[str, list[Tensor]] = {"outputs of the paths": outs, "dx": [torch.autograd.grad(outs, x, douts)[0]]}
    for _, _, role, grad in engine.read_gradients():
        found.setdefault("d se" if ROLES[role].startswith("se_") else f"d {ROLES[role]}", []).append(grad)
    mixed = run_mixture(engine, x, u, v)
    grads = torch.autograd.grad(mixed, [x, u, v], douts[0])
    found["output of the mixture"] = [mixed]
    found |= {f"mixture d{name}": [grad] for name, grad in zip("xuv", grads, strict=True)}
    return {name: torch.cat([t.detach().double().cpu().flatten() for t in parts]) for name, parts in found.items()}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the 2-norm."""
    return {name: ((got[name] - exact).norm() / exact.norm().clamp(min=1e-2)).item() for name, exact in want.items()}


def require_precision(device: str, engine: str, precision: str, seed: int) -> None:
    """Error against float64 at most twice that of plain PyTorch at the same precision, plus a floor.

    That of tf32 at most twice plain bfloat16's, which has three bits less: not all of plain PyTorch's products run in
    tf32 where they may.
    """
    dtype, products, floor = PRECISIONS[precision]
    case = sink_case(seed)
    want = everything(device, case, engine_on(device, case, torch.float64, "reference")[0], torch.float64)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = products != "highest"
    try:
        ours = errors(everything(device, case, engine_on(device, case, dtype, engine)[0], dtype), want)
        plain_dtype = torch.bfloat16 if precision == "tf32" else dtype
        plain_engine = engine_on(device, case, plain_dtype, "reference")[0]
        plain = errors(everything(device, case, plain_engine, plain_dtype), want)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    for name, error in ours.items():
        assert error <= 2 * plain[name] + floor, f"{name}: {error:.2e} against {plain[name]:.2e} of plain PyTorch"
