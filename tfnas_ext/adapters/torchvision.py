"""torchvision's blocks: EfficientNet's MBConv, and InvertedResidual of MobileNetV2 and of MobileNetV3.

Recognised by their nested `Sequential`s; torchvision is never imported.
"""

from __future__ import annotations

from torch import nn

from tfnas_ext.adapters.parts import BlockParts, NotAccelerated
from tfnas_ext.adapters.squeeze_excite import squeeze_excite_parts


def mbconv(block: nn.Module) -> BlockParts:
    """`block` = Sequential of [expand] depthwise [squeeze-excitation] project, each a convolution, norm [, act]."""
    children = dict(block.named_children())
    if set(children) - {"block", "stochastic_depth"}:
        raise NotAccelerated(f"it has a part that {type(block).__name__} does not have")
    layers = _sequence(children["block"], "block")
    units = [layer for layer in layers if isinstance(layer, nn.Sequential)]
    others = [layer for layer in layers if not isinstance(layer, nn.Sequential)]
    if len(units) not in (2, 3) or len(others) > 1 or (others and layers.index(others[0]) != len(layers) - 2):
        raise NotAccelerated(
            f"block is no Sequential of [expand,] depthwise, [squeeze-excitation,] project: {len(layers)}"
        )
    *inner, last = units
    first = [_unit(unit, 3, "block") for unit in inner]
    conv_pwl, bn3 = _unit(last, 2, "block")
    return _parts(block, first, others[0] if others else None, conv_pwl, bn3, children.get("stochastic_depth"))


def mobilenet_v2(block: nn.Module) -> BlockParts:
    """`conv` = Sequential of [expand], depthwise (each a convolution, norm and act), convolution, norm."""
    children = dict(block.named_children())
    if set(children) != {"conv"}:
        raise NotAccelerated(f"it has a part that {type(block).__name__} does not have")
    layers = _sequence(children["conv"], "conv")
    if len(layers) not in (3, 4):
        raise NotAccelerated(f"conv is no Sequential of [expand,] depthwise, convolution, norm: {len(layers)} layers")
    *inner, conv_pwl, bn3 = layers
    return _parts(block, [_unit(unit, 3, "conv") for unit in inner], None, conv_pwl, bn3, None)


def _parts(
    block: nn.Module,
    inner: list[list[nn.Module]],
    se: nn.Module | None,
    conv_pwl: nn.Module,
    bn3: nn.Module,
    drop_path: nn.Module | None,
) -> BlockParts:
    residual = getattr(block, "use_res_connect", None)
    if not isinstance(residual, bool):
        raise NotAccelerated("it has no use_res_connect")
    expand, depthwise = (None, inner[0]) if len(inner) == 1 else (inner[0], inner[1])
    return BlockParts(
        conv_pw=None if expand is None else expand[0],
        bn1=None if expand is None else expand[1],
        conv_dw=depthwise[0],
        bn2=depthwise[1],
        se=squeeze_excite_parts(se),
        conv_pwl=conv_pwl,
        bn3=bn3,
        acts=tuple(unit[2] for unit in inner),
        residual=residual,
        drop_path=drop_path,
    )


def _sequence(module: nn.Module, name: str) -> list[nn.Module]:
    if not isinstance(module, nn.Sequential):
        raise NotAccelerated(f"{name} is a {type(module).__name__}, not a Sequential")
    return list(module)


def _unit(module: nn.Module, length: int, name: str) -> list[nn.Module]:
    parts = _sequence(module, f"a layer of {name}")
    if len(parts) != length:
        raise NotAccelerated(
            f"a layer of {name} has {len(parts)} parts instead of {length}: convolution, norm, activation"
        )
    return parts
