"""Adapters: how a block of somebody's network is read as the parts of ours. By class name, or registered by class."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tfnas_ext.adapters import published, timm, torchvision
from tfnas_ext.adapters.parts import BlockParts, CheckedParts, NotAccelerated, SqueezeExciteParts, check_parts

Adapter = Callable[[nn.Module], BlockParts]

__all__ = [
    "Adapter",
    "BlockParts",
    "NotAccelerated",
    "SqueezeExciteParts",
    "block_parts",
    "knows",
    "knows_name",
    "register_block",
]

_REGISTERED: dict[type[nn.Module], Adapter] = {}

# Blocks of the same families that the kernels do not run: named in the report instead of passed over in silence.
_UNSUPPORTED = {
    "CondConvResidual": "its weights differ from image to image",
    "EdgeResidual": "it expands by a full convolution, not a pointwise one",
    "FusedMBConv": "it expands by a full convolution, not a pointwise one",
    "UniversalInvertedResidual": "it may have depthwise convolutions at its ends",
}


def register_block(cls: type[nn.Module], adapter: Adapter) -> None:
    """Teaches `accelerate` a block of one's own.

    Args:
        cls: the block's class; subclasses that keep its `forward` are included. A class that is known already, built in
            or registered before, gets the new adapter.
        adapter: called with a block, returns its `BlockParts`, or raises `NotAccelerated` with the reason why this one
            must be left alone. It only names modules: whether the kernels can run them is checked by `accelerate`,
            which also compares the results of every block before it replaces it.

    Raises:
        TypeError: `cls` is no module class, or `adapter` cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of torch.nn.Module, got {cls!r}")
    if not callable(adapter):
        raise TypeError(f"adapter must be a function of a block, got {adapter!r}")
    _REGISTERED[cls] = adapter


def _inverted_residual(block: nn.Module) -> BlockParts:
    """timm's and torchvision's two classes have one name."""
    children = dict(block.named_children())
    if "conv_dw" in children:
        return timm.inverted_residual(block)
    if "block" in children:
        return torchvision.mbconv(block)
    if "conv" in children:
        return torchvision.mobilenet_v2(block)
    raise NotAccelerated("it is neither timm's nor torchvision's InvertedResidual")


_BY_NAME: dict[str, Adapter] = {
    "InvertedResidual": _inverted_residual,
    "DepthwiseSeparableConv": timm.depthwise_separable,
    "MBConv": torchvision.mbconv,
    "MBInvertedResBlock": published.mb_inverted_res_block,
    "MBInvRes": timm.inverted_residual,
}


def _find(cls: type[nn.Module]) -> tuple[type[nn.Module], Adapter | None] | None:
    """The class that is known, `cls` or one that it derives from, and its adapter (None where it is unsupported)."""
    for base in cls.__mro__:
        if base in _REGISTERED:
            return base, _REGISTERED[base]
        name = base.__name__
        if issubclass(base, nn.Module) and (name in _BY_NAME or name in _UNSUPPORTED):
            return base, _BY_NAME.get(name)
    return None


def knows(cls: type[nn.Module]) -> bool:
    """Whether blocks of this class are looked at (they may still be left alone, with a reason)."""
    return _find(cls) is not None


def knows_name(name: str) -> bool:
    """Whether a class of this name is looked at: all that is left of a class in TorchScript."""
    return name in _BY_NAME or name in _UNSUPPORTED or any(cls.__name__ == name for cls in _REGISTERED)


def block_parts(block: nn.Module, cls: type[nn.Module]) -> CheckedParts:
    """The checked parts of `block`, whose class (before it was replaced, if it was) is `cls`.

    Raises:
        NotAccelerated: with the reason.
    """
    found = _find(cls)
    if found is None:
        raise NotAccelerated(f"{cls.__name__} is not known; see register_block")
    base, adapter = found
    if adapter is None:
        raise NotAccelerated(_UNSUPPORTED[base.__name__])
    if cls.forward is not base.forward:
        raise NotAccelerated(f"{cls.__name__} has a forward of its own, other than {base.__name__}'s")
    return check_parts(block, adapter(block))
