"""What torch knows of the operators `torch.ops.tfnas.*` besides their kernels: shapes, gradients, autocast.

With it they run under `torch.compile`, `torch.export`, `torch.func`, activation checkpointing and autocast as torch's
own operators do. `width` is a SymInt in all of them, so a compiled function serves every width. Importing this
registers it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfnas_ext import _native

WEIGHT_NAMES = (
    *("conv_pw", "conv_dw", "conv_pwl", "se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias"),
    *("bn1_weight", "bn1_bias", "bn2_weight", "bn2_bias", "bn3_weight", "bn3_bias"),
)
WEIGHTS = len(WEIGHT_NAMES)  # tensor arguments of torch.ops.tfnas.mbinvres besides x

_LANES = 16  # channels of a plane of the CPU kernels
_CHANNELS_DESIGN_PIXELS = 4000  # choose_design in csrc/cpu/mbinvres.cpp


def saved_bytes(
    x: Tensor, conv_pw: Tensor | None, conv_pwl: Tensor, se_channels: int, stride: int, width: int, design: str
) -> int:
    """Size of `saved`: make_plan of csrc/cpu/mbinvres_plan.h for one candidate, in terms a SymInt goes through."""
    batch, in_channels, height, columns = x.shape
    pixels, out_pixels = batch * height * columns, batch * _out_size(height, stride) * _out_size(columns, stride)
    cin, cout, padded = (_round_up(c, m) for c, m in ((in_channels, 8), (conv_pwl.shape[0], 8), (width, _LANES)))
    elements = [padded * out_pixels]
    sums = [*[padded] * (4 if conv_pw is None else 8), out_pixels * cout, *[cout] * 4]
    if conv_pw is not None:
        # 1 where the design is "channels", else 0; arithmetic, since a branch would bind a compiled graph to one side
        small: Any = (
            torch.sym_min(1, _CHANNELS_DESIGN_PIXELS // pixels) if design == "auto" else int(design == "channels")
        )
        elements.append(small * padded * pixels)
        sums += [(1 - small) * cin, (1 - small) * cin * cin]
    if se_channels:
        sums += [batch * padded] * 2 + [batch * _round_up(se_channels, _LANES)] * 2
    sizes = [x.dtype.itemsize * size for size in elements] + [_sum_dtype(x).itemsize * size for size in sums]
    return sum(_round_up(size, 64) for size in sizes)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """What sums and statistics of a block are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def _round_up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def _out_size(size: int, stride: int) -> int:
    return (size + stride - 1) // stride


# ---------------------------------------------------------------- fake kernels
def _check_devices(x: Tensor, tensors: Sequence[Tensor | None], names: Sequence[str]) -> None:
    """One meta tensor among others calls the fake kernel, whose result would lie uninitialised on their device."""
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {tensor.device}")


def _fake_out(x: Tensor, conv_pwl: Tensor, stride: int) -> Tensor:
    n, _, h, w = x.shape
    shape = (n, conv_pwl.shape[0], _out_size(h, stride), _out_size(w, stride))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_mbinvres(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(x, args[:WEIGHTS], WEIGHT_NAMES)
    (conv_pw, _, conv_pwl, se_reduce_weight), (stride, _, _, width, _, *design) = args[:4], args[WEIGHTS:]
    se_channels = 0 if se_reduce_weight is None else se_reduce_weight.shape[0]
    statistics = (2 if conv_pw is None else 4) * width + 2 * conv_pwl.shape[0]
    saved = saved_bytes(x, conv_pw, conv_pwl, se_channels, stride, width, *design[:1] or ("auto",))
    out = _fake_out(x, conv_pwl, stride)
    return out, x.new_empty(statistics, dtype=_sum_dtype(x)), x.new_empty(saved, dtype=torch.uint8)


def _fake_backward(dout: Tensor, x: Tensor, saved: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    _check_devices(x, [dout, saved, *args[:WEIGHTS]], ["dout", "saved", *WEIGHT_NAMES])
    mask = args[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last) if mask[0] else None
    weights = zip(args[:WEIGHTS], mask[1:], strict=True)
    return (dx, *(torch.empty_like(w.contiguous()) if wanted else None for w, wanted in weights))


def _fake_inference(x: Tensor, *args: Any) -> Tensor:
    running = ("mean1", "var1", "mean2", "var2", "mean3", "var3")
    _check_devices(x, args[: WEIGHTS + 6], WEIGHT_NAMES + running)
    return _fake_out(x, args[2], args[WEIGHTS + 6])


def _fake_sample_paths(
    log_alpha: Tensor, tau: float, seed: int, step: int, second: str, valid_mask: Tensor | None = None
) -> Tensor:
    return log_alpha.new_empty((1 if second == "none" else 2, log_alpha.shape[0]), dtype=torch.int64)


def _fake_uniforms(layers: int, candidates: int, seed: int, step: int, path: int) -> Tensor:
    return torch.empty((layers, candidates), dtype=torch.float64)


def _fake_gumbel_noise(layers: int, candidates: int, seed: int, step: int, path: int, device: torch.device) -> Tensor:
    return torch.empty((layers, candidates), dtype=torch.float64, device=device)


def _fake_sample_paths_at(
    log_alpha: Tensor, tau: Tensor, clock: Tensor, second: str, valid_mask: Tensor | None = None
) -> Tensor:
    return log_alpha.new_empty((1 if second == "none" else 2, log_alpha.shape[0]), dtype=torch.int64)


def _fake_gumbel_noise_at(layers: int, candidates: int, clock: Tensor, path: int) -> Tensor:
    return torch.empty((layers, candidates), dtype=torch.float64, device=clock.device)


# ---------------------------------------------------------------- gradients
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, statistics, saved = output
    ctx.mark_non_differentiable(statistics, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], saved, *inputs[1 : 1 + WEIGHTS])
    ctx.options = inputs[1 + WEIGHTS :]


def _refuse_inference_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("mbinvres_inference has no gradient; tfnas_ext.ops.mbinvres has one, by the reference backend")


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    mask = list(ctx.needs_input_grad[: 1 + WEIGHTS])
    none = (None,) * len(ctx.options)
    if dout is None or not any(mask):
        return (*(None for _ in mask), *none)
    x, saved, *weights = ctx.saved_tensors
    return (*torch.ops.tfnas.mbinvres_backward(dout, x, saved, *weights, *ctx.options, mask), *none)


def _refuse_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "mbinvres is differentiable once: its backward has no gradient. For second derivatives use "
        "backend='reference', or tfnas_ext.restore(model) after accelerate."
    )


# ---------------------------------------------------------------- autocast
def working_dtype(x: Tensor) -> torch.dtype:
    """The type that the operators run `x` in: its own, but under autocast bfloat16 if that is autocast's, else float32.

    As everywhere in torch, autocast leaves float64 alone.
    """
    if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    bfloat16 = torch.get_autocast_dtype(x.device.type) == torch.bfloat16
    return torch.bfloat16 if bfloat16 else torch.float32


def _autocast(operator: Any, device_type: str, x: Tensor, *args: Any) -> Any:
    """Casts x, and weights of other types than float32 and that; float32 ones keep their precision and gradients."""
    dtype = working_dtype(x)
    kept = (dtype, torch.float32, torch.float64)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype not in kept else value

    with torch.autocast(device_type, enabled=False):
        return operator(x.to(dtype), *(cast(value) for value in args))


if _native.MODULE is not None:
    torch.library.register_fake("tfnas::mbinvres", _fake_mbinvres)
    torch.library.register_fake("tfnas::mbinvres_backward", _fake_backward)
    torch.library.register_fake("tfnas::mbinvres_inference", _fake_inference)
    torch.library.register_fake("tfnas::sample_paths", _fake_sample_paths)
    torch.library.register_fake("tfnas::uniforms", _fake_uniforms)
    torch.library.register_fake("tfnas::gumbel_noise", _fake_gumbel_noise)
    torch.library.register_fake("tfnas::sample_paths_at", _fake_sample_paths_at)
    torch.library.register_fake("tfnas::gumbel_noise_at", _fake_gumbel_noise_at)
    torch.library.register_autograd("tfnas::mbinvres", _backward, setup_context=_setup_context)
    torch.library.register_autograd("tfnas::mbinvres_backward", _refuse_double_backward)
    torch.library.register_autograd("tfnas::mbinvres_inference", _refuse_inference_gradient)
    _LIBRARY = torch.library.Library("tfnas", "IMPL")  # registrations last as long as it does
    for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        for _name in ("mbinvres", "mbinvres_inference"):
            _operator = getattr(torch.ops.tfnas, _name).default
            _LIBRARY.impl(_name, functools.partial(_autocast, _operator, _device_type), _key)
