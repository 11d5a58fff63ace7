"""Blocks with timm's names: its InvertedResidual and DepthwiseSeparableConv, and this project's own plain networks.

Recognised by names alone; timm is never imported. Activations are inside the norms (`BatchNormAct2d`) or modules of
their own (`act1`, `act2`).
"""

from __future__ import annotations

from torch import nn

from tfnas_ext.adapters.parts import BlockParts, NotAccelerated
from tfnas_ext.adapters.squeeze_excite import squeeze_excite_parts

_COMMON = {"conv_s2d", "bn_s2d", "conv_dw", "bn1", "bn2", "act1", "act2", "aa", "se", "drop_path", "drop_connect"}


def inverted_residual(block: nn.Module) -> BlockParts:
    """`conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3 drop_path`; without `conv_pw` there is no expansion."""
    children = _children(block, _COMMON | {"conv_pw", "conv_pwl", "bn3"}, ["conv_dw", "bn2", "conv_pwl", "bn3"])
    expands = children.get("conv_pw") is not None
    norms = [children[name] for name in (("bn1", "bn2") if expands else ("bn2",))]
    acts = [_activation(children, name) for name in (("1", "2") if expands else ("2",))]
    _check_linear(children["bn3"])
    return BlockParts(
        conv_pw=children["conv_pw"] if expands else None,
        bn1=norms[0] if expands else None,
        conv_dw=children["conv_dw"],
        bn2=norms[-1],
        se=squeeze_excite_parts(children.get("se")),
        conv_pwl=children["conv_pwl"],
        bn3=children["bn3"],
        acts=tuple(acts),
        residual=_residual(block),
        drop_path=children.get("drop_path") or children.get("drop_connect"),
    )


def depthwise_separable(block: nn.Module) -> BlockParts:
    """`conv_dw bn1 aa se conv_pw bn2 drop_path`: our block without expansion, `conv_pw` being its projection."""
    children = _children(block, _COMMON | {"conv_pw"}, ["conv_dw", "bn1", "conv_pw", "bn2"])
    if getattr(block, "has_pw_act", False):
        raise NotAccelerated("it has an activation after the projection")
    _check_linear(children["bn2"], children.get("act2"))
    return BlockParts(
        conv_pw=None,
        bn1=None,
        conv_dw=children["conv_dw"],
        bn2=children["bn1"],
        se=squeeze_excite_parts(children.get("se")),
        conv_pwl=children["conv_pw"],
        bn3=children["bn2"],
        acts=(_activation(children, "1"),),
        residual=_residual(block),
        drop_path=children.get("drop_path"),
    )


def _children(block: nn.Module, known: set[str], needed: list[str]) -> dict[str, nn.Module]:
    children = {name: child for name, child in block.named_children() if child is not None}
    if "conv_s2d" in children:
        raise NotAccelerated("it begins with a space-to-depth convolution")
    if not isinstance(children.get("aa", nn.Identity()), nn.Identity):
        raise NotAccelerated(f"it has anti-aliasing ({type(children['aa']).__name__})")
    extra = sorted(set(children) - known)
    if extra:
        raise NotAccelerated(f"it has a part that {type(block).__name__} does not have: {extra[0]}")
    missing = [name for name in needed if name not in children]
    if missing:
        raise NotAccelerated(f"it has no {missing[0]}")
    return children


def _activation(children: dict[str, nn.Module], number: str) -> nn.Module:
    inside = getattr(children[f"bn{number}"], "act", None)
    act = children.get(f"act{number}") if inside is None else inside
    if act is None:
        raise NotAccelerated(f"it has no activation after bn{number}")
    return act


def _check_linear(norm: nn.Module, after: nn.Module | None = None) -> None:
    for act in (getattr(norm, "act", None), after):
        if act is not None and not isinstance(act, nn.Identity):
            raise NotAccelerated(f"it has an activation after the projection ({type(act).__name__})")


def _residual(block: nn.Module) -> bool:
    for name in ("has_skip", "has_residual"):
        value = getattr(block, name, None)
        if isinstance(value, bool):
            return value
    raise NotAccelerated("it has neither has_skip nor has_residual")
