"""One block of somebody's network on the fused kernels, from the modules it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tfnas_ext import ops
from tfnas_ext.adapters.parts import CheckedParts
from tfnas_ext.reference import BatchStatistics, Norm, SqueezeExcite

_DROP_RATES = (
    "drop_prob",
    "p",
    "rate",
)  # of timm's DropPath, torchvision's StochasticDepth, this project's DropConnect


def run_block(block: nn.Module, parts: CheckedParts, x: Any, dtype: torch.dtype | None) -> Tensor | None:
    """The block's output, running statistics updated as its norms ask for; None where its own code must run.

    Its own code runs for anything but a plain tensor [N, C, H, W] in the CPU's memory, of a type that the kernels
    compute in and that the weights have (any, where `dtype` is given); under autocast, unless it is to bfloat16, which
    the input has already, or `dtype` is given; where some norms use the batch's statistics and some running ones; for
    gradients through running statistics; where PyTorch refuses one value per channel; inside the transforms of
    `torch.func`; and in traces and exports, whose graphs shall hold PyTorch's own operators only.
    """
    if not _takes(x, dtype) or x.shape[1] != (parts.conv_pw or parts.conv_dw).in_channels:
        return None
    by_batch = [norm.training or norm.running_mean is None for norm in parts.norms]
    if any(by_batch) != all(by_batch):
        return None
    tensors, norms = _tensors(parts), [_norm(norm) for norm in parts.norms]
    compute = dtype or x.dtype
    types = {compute, torch.float32} if torch.is_autocast_enabled("cpu") else {compute}
    given = _given(tensors, norms)
    if any(t.device != x.device or (dtype is None and t.dtype not in types) for t in given):
        return None
    if ops.is_transformed([x, *given]):
        return None
    if by_batch[0]:
        stride = parts.conv_dw.stride[0]
        if x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride) == 1:
            return None
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (x, *given)):
        return None
    if dtype is None:
        return _run(block, parts, x, tensors, norms, by_batch[0])
    with torch.autocast("cpu", enabled=False):
        cast = [_as_weight(t, compute) for t in tensors]
        cast_norms = [Norm(*(_as_weight(t, compute) for t in norm)) for norm in norms]
        return _run(block, parts, x.to(compute), cast, cast_norms, by_batch[0]).to(x.dtype)


def _takes(x: Any, dtype: torch.dtype | None) -> bool:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.layout != torch.strided:
        return False
    if x.dim() != 4 or x.numel() == 0 or not x.is_floating_point() or (dtype or x.dtype) not in ops.NATIVE_DTYPES:
        return False
    if dtype is not None or not torch.is_autocast_enabled("cpu") or x.dtype == torch.float64:
        return True
    return x.dtype == torch.get_autocast_dtype("cpu") == torch.bfloat16


def _tensors(parts: CheckedParts) -> list[Tensor | None]:
    """Weights of conv_pw, conv_dw, conv_pwl, and the four of squeeze and excitation."""
    reduce, expand = parts.se_reduce, parts.se_expand
    return [
        None if parts.conv_pw is None else parts.conv_pw.weight,
        parts.conv_dw.weight,
        parts.conv_pwl.weight,
        *((None, None) if reduce is None else (reduce.weight, reduce.bias)),
        *((None, None) if expand is None else (expand.weight, expand.bias)),
    ]


def _norm(module: nn.BatchNorm2d) -> Norm:
    return Norm(module.weight, module.bias, module.running_mean, module.running_var)


def _as_weight(tensor: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """Of the type of the computation; float32 beside bfloat16 stays, which the kernels take and which loses nothing."""
    if tensor is None or (compute == torch.bfloat16 and tensor.dtype == torch.float32):
        return tensor
    return tensor.to(compute)


def _given(tensors: list[Tensor | None], norms: list[Norm]) -> list[Tensor]:
    return [t for t in (*tensors, *(t for norm in norms for t in norm)) if t is not None]


def _run(
    block: nn.Module, parts: CheckedParts, x: Tensor, tensors: list[Tensor | None], norms: list[Norm], by_batch: bool
) -> Tensor:
    drops = parts.residual and _drops(block, parts)
    weights, gate = tensors[:3], tensors[3:]
    options: dict[str, Any] = {
        "se": None if gate[0] is None else SqueezeExcite(*gate),  # type: ignore[arg-type]
        "bn1": norms[0] if parts.bn1 is not None else Norm(),
        "bn2": norms[-2],
        "bn3": norms[-1],
        "stride": parts.conv_dw.stride[0],
        "act": parts.act,
        "residual": parts.residual and not drops,
        "eps": parts.bn3.eps,
        "se_act": parts.se_act,
        "se_gate": parts.se_gate,
    }
    if by_batch and any(norm.training and norm.track_running_stats for norm in parts.norms):
        out, statistics = ops.mbinvres_with_statistics(x, *weights, **options)  # type: ignore[arg-type]
        wide, narrow = x.shape[0] * x.shape[2] * x.shape[3], out.shape[0] * out.shape[2] * out.shape[3]
        update_running(parts, statistics, wide, narrow)
    else:
        out = ops.mbinvres(x, *weights, **options, training=by_batch)  # type: ignore[arg-type]
    if not drops:
        return out
    if parts.drop is not None:
        return parts.drop(block, out) + x
    assert parts.drop_path is not None
    return parts.drop_path(out) + x


def _drops(block: nn.Module, parts: CheckedParts) -> bool:
    """Whether the branch is changed before the input is added to it."""
    if parts.drop is not None:
        return block.training
    module = parts.drop_path
    if module is None:
        return False
    for name in _DROP_RATES:
        if name in module.__dict__:
            return module.training and module.__dict__[name] != 0
    return True


@torch.no_grad()
def update_running(parts: CheckedParts, statistics: BatchStatistics, wide: int, narrow: int) -> None:
    """PyTorch's update of running statistics, all norms of the block at once.

    A batch has `wide` values a channel before the depthwise convolution and `narrow` ones after it.
    """
    rows = [
        (parts.bn1, statistics.mean1, statistics.var1, wide),
        (parts.bn2, statistics.mean2, statistics.var2, narrow),
        (parts.bn3, statistics.mean3, statistics.var3, narrow),
    ]
    running: list[Tensor] = []
    batch: list[Tensor] = []
    variances: list[Tensor] = []
    factors: list[float] = []
    shares: list[float] = []
    counters = [
        norm.num_batches_tracked
        for norm, *_ in rows
        if norm is not None and norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    ]
    if counters:
        torch._foreach_add_(counters, 1)
    for norm, mean, var, count in rows:
        if norm is None or not (norm.training and norm.track_running_stats) or norm.running_mean is None:
            continue
        assert norm.running_var is not None
        assert mean is not None
        assert var is not None
        share = norm.momentum
        if share is None:
            share = 1.0 / float(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0.0
        running += [norm.running_mean, norm.running_var]
        batch += [mean.to(norm.running_mean.dtype), var.to(norm.running_var.dtype)]
        variances.append(batch[-1])
        factors.append(count / max(count - 1, 1))
        shares += [share, share]
    if not running:
        return
    torch._foreach_mul_(variances, factors)
    if len(set(shares)) == 1:
        torch._foreach_lerp_(running, batch, shares[0])
    else:
        torch._foreach_lerp_(running, batch, shares)
