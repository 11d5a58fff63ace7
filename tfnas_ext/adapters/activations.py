"""Activation modules of torch, timm and the published code by their class names."""

from __future__ import annotations

from torch import nn

from tfnas_ext.reference import ACTIVATIONS, GATES

_ACTIVATION_CLASSES = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "swish",
    "Swish": "swish",
    "SwishMe": "swish",
    "Hardswish": "hard_swish",
    "HardSwish": "hard_swish",
    "HardSwishMe": "hard_swish",
}
_GATE_CLASSES = {
    "Sigmoid": "sigmoid",
    "Hardsigmoid": "hard_sigmoid",
    "HardSigmoid": "hard_sigmoid",
    "HardSigmoidMe": "hard_sigmoid",
}


def activation_name(act: nn.Module | str) -> str | None:
    """The key of `reference.ACTIVATIONS` for a module (or such a key itself), None where there is none."""
    name = act if isinstance(act, str) else _ACTIVATION_CLASSES.get(type(act).__name__)
    return name if name in ACTIVATIONS else None


def gate_name(gate: nn.Module | str) -> str | None:
    """The key of `reference.GATES` for a module (or such a key itself), None where there is none."""
    name = gate if isinstance(gate, str) else _GATE_CLASSES.get(type(gate).__name__)
    return name if name in GATES else None
