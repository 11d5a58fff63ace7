"""Squeeze-and-excitation modules of timm, torchvision and this package by their structure."""

from __future__ import annotations

from torch import nn

from tfnas_ext.adapters.parts import NotAccelerated, SqueezeExciteParts


def squeeze_excite_parts(module: nn.Module | None) -> SqueezeExciteParts | None:
    """The parts of a squeeze-and-excitation; None for none (None or an `nn.Identity`)."""
    if module is None or isinstance(module, nn.Identity):
        return None
    children, kind = dict(module.named_children()), type(module).__name__
    names = set(children)
    if names in ({"conv_reduce", "act1", "conv_expand", "gate"}, {"conv_reduce", "act1", "conv_expand"}):
        gate = children.get("gate", "sigmoid")
        return SqueezeExciteParts(children["conv_reduce"], children["conv_expand"], children["act1"], gate)
    if names == {"avgpool", "fc1", "fc2", "activation", "scale_activation"}:
        gate = children["scale_activation"]
        return SqueezeExciteParts(children["fc1"], children["fc2"], children["activation"], gate)
    if names == {"fc1", "bn", "act", "fc2", "gate"} and isinstance(children["bn"], nn.Identity):
        if getattr(module, "add_maxpool", False):
            raise NotAccelerated(f"{kind} pools the maximum too")
        return SqueezeExciteParts(children["fc1"], children["fc2"], children["act"], children["gate"])
    raise NotAccelerated(f"{kind} is no squeeze and excitation that the kernels know")
