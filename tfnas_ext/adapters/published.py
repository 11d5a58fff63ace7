"""The block of the published TF-NAS code; its mixed operation holds eight of them and needs no adapter of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfnas_ext.adapters.parts import BlockParts, NotAccelerated, SqueezeExciteParts


def mb_inverted_res_block(block: nn.Module) -> BlockParts:
    """`inverted_bottleneck` (or None), `depth_conv`, `squeeze_excite` (or None), `point_linear`, drop-connect."""
    children = {name: child for name, child in block.named_children() if child is not None}
    extra = set(children) - {"inverted_bottleneck", "depth_conv", "squeeze_excite", "point_linear"}
    if extra:
        raise NotAccelerated(f"it has a part that MBInvertedResBlock does not have: {sorted(extra)[0]}")
    if getattr(block, "has_shuffle", False) and getattr(block, "groups", 1) > 1:
        raise NotAccelerated("it shuffles channels")
    expand = _unit(children, "inverted_bottleneck", ("conv", "bn", "act"))
    depthwise = _unit(children, "depth_conv", ("conv", "bn", "act"))
    project = _unit(children, "point_linear", ("conv", "bn"))
    if depthwise is None or project is None:
        raise NotAccelerated("it has no depth_conv or no point_linear")
    se = _unit(children, "squeeze_excite", ("conv_reduce", "act", "conv_expand"))
    residual = getattr(block, "has_residual", None)
    if not isinstance(residual, bool):
        raise NotAccelerated("it has no has_residual")
    return BlockParts(
        conv_pw=None if expand is None else expand[0],
        bn1=None if expand is None else expand[1],
        conv_dw=depthwise[0],
        bn2=depthwise[1],
        se=None if se is None else SqueezeExciteParts(se[0], se[2], se[1]),
        conv_pwl=project[0],
        bn3=project[1],
        acts=tuple(unit[2] for unit in (expand, depthwise) if unit is not None),
        residual=residual,
        drop=_drop_connect,
    )


def _unit(children: dict[str, nn.Module], name: str, parts: tuple[str, ...]) -> list[nn.Module] | None:
    if name not in children:
        return None
    found = dict(children[name].named_children())
    if tuple(found) != parts:
        raise NotAccelerated(f"{name} has the parts {', '.join(found)} instead of {', '.join(parts)}")
    return list(found.values())


def _drop_connect(block: nn.Module, branch: Tensor) -> Tensor:
    """Whole images of the branch dropped with probability `drop_connect_rate`, the others scaled up."""
    rate = float(getattr(block, "drop_connect_rate", 0.0))
    if rate == 0:
        return branch
    keep = 1 - rate
    kept = keep + torch.rand((branch.shape[0], 1, 1, 1), dtype=branch.dtype, device=branch.device)
    return branch / keep * kept.floor_()
