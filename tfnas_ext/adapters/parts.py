"""What an adapter says about a block (`BlockParts`), and whether the kernels can run it as it is (`check_parts`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfnas_ext.adapters.activations import activation_name, gate_name
from tfnas_ext.backends import KERNEL_SIZES


class NotAccelerated(Exception):
    """A block that is left alone; the message is the reason, as the report gives it."""


@dataclass(frozen=True)
class SqueezeExciteParts:
    """Two 1x1 convolutions with biases, the activation between them and the gate's function after them.

    Attributes:
        act: a module, or a key of `reference.ACTIVATIONS`.
        gate: a module, or a key of `reference.GATES`.
    """

    reduce: nn.Module
    expand: nn.Module
    act: nn.Module | str
    gate: nn.Module | str = "sigmoid"


@dataclass(frozen=True)
class BlockParts:
    """The modules of a block by their role, in timm's names; a block without expansion has no `conv_pw` and `bn1`.

    Attributes:
        acts: the activations after the norms, one a norm but the last: modules, or keys of `reference.ACTIVATIONS`.
        residual: whether the input is added.
        drop_path: what is applied to the branch before the input is added: a module, or None.
        drop: the same for blocks that do it without a module: called in training with the block and the branch.
    """

    conv_pw: nn.Module | None
    bn1: nn.Module | None
    conv_dw: nn.Module
    bn2: nn.Module
    se: SqueezeExciteParts | None
    conv_pwl: nn.Module
    bn3: nn.Module
    acts: tuple[nn.Module | str, ...]
    residual: bool
    drop_path: nn.Module | None = None
    drop: Callable[[nn.Module, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class CheckedParts:
    """Parts that the kernels can run; only what may change without notice is still read from the modules."""

    conv_pw: nn.Conv2d | None
    conv_dw: nn.Conv2d
    conv_pwl: nn.Conv2d
    bn1: nn.BatchNorm2d | None
    bn2: nn.BatchNorm2d
    bn3: nn.BatchNorm2d
    se_reduce: nn.Conv2d | None
    se_expand: nn.Conv2d | None
    act: str
    se_act: str
    se_gate: str
    residual: bool
    drop_path: nn.Module | None
    drop: Callable[[nn.Module, Tensor], Tensor] | None
    norms: tuple[nn.BatchNorm2d, ...]


def check_parts(block: nn.Module, parts: BlockParts) -> CheckedParts:
    """Raises `NotAccelerated` with the reason where the kernels would not give what the modules give."""
    names = {id(module): name or "the block" for name, module in block.named_modules()}
    for module in block.modules():
        _check_untouched(module, names[id(module)])
    conv_pw = None if parts.conv_pw is None else _pointwise(parts.conv_pw, names)
    conv_dw = _depthwise(parts.conv_dw, names)
    conv_pwl = _pointwise(parts.conv_pwl, names)
    bn1 = None if parts.bn1 is None else _norm(parts.bn1, names)
    bn2, bn3 = _norm(parts.bn2, names), _norm(parts.bn3, names)
    norms = tuple(norm for norm in (bn1, bn2, bn3) if norm is not None)
    if len({norm.eps for norm in norms}) > 1:
        raise NotAccelerated(f"its batch norms have different eps: {', '.join(str(norm.eps) for norm in norms)}")
    acts = {activation_name(act) for act in parts.acts}
    if None in acts:
        unknown = next(act for act in parts.acts if activation_name(act) is None)
        raise NotAccelerated(f"activation {_kind(unknown)} is not known to the kernels")
    if len(acts) != 1:
        raise NotAccelerated(f"its activations differ: {', '.join(sorted(str(act) for act in acts))}")
    act = str(acts.pop())
    se_reduce = se_expand = None
    se_act, se_gate = act, "sigmoid"
    if parts.se is not None:
        se_reduce, se_expand = (_pointwise(conv, names, bias=True) for conv in (parts.se.reduce, parts.se.expand))
        se_act, se_gate = _names_of(parts.se)
    channels = (conv_dw if conv_pw is None else conv_pw).in_channels
    if parts.residual and (conv_dw.stride != (1, 1) or channels != conv_pwl.out_channels):
        raise NotAccelerated("it adds its input to an output of another shape")
    return CheckedParts(
        conv_pw=conv_pw,
        conv_dw=conv_dw,
        conv_pwl=conv_pwl,
        bn1=bn1,
        bn2=bn2,
        bn3=bn3,
        se_reduce=se_reduce,
        se_expand=se_expand,
        act=act,
        se_act=se_act,
        se_gate=se_gate,
        residual=parts.residual,
        drop_path=None if isinstance(parts.drop_path, nn.Identity) else parts.drop_path,
        drop=parts.drop,
        norms=norms,
    )


def condition(module: nn.Module) -> tuple[object, ...]:
    """What was checked of a module and can be set on a finished one: its plain attributes, and which tensors it has.

    Left out: `training`, which is read in every call, and private ones, in which torch keeps notes of its own.
    """
    state = {k: v for k, v in module.__dict__.items() if k[0] != "_" and k != "training"}
    plain = [value for value in state.values() if type(value) in (bool, int, float, str, tuple)]
    return (*plain, *(name for name, tensor in module._parameters.items() if tensor is not None))


def has_hooks(module: nn.Module) -> bool:
    """Whether something of the module's own besides `forward` runs when it is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether something runs when any module at all is called: profilers and counters of modules ask for it."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def _check_untouched(module: nn.Module, name: str) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise NotAccelerated(f"{name} is a TorchScript module")
    if torch.nn.utils.parametrize.is_parametrized(module):
        raise NotAccelerated(f"{name} has a parametrization")
    if has_hooks(module):
        raise NotAccelerated(f"{name} has hooks")
    if "forward" in module.__dict__:
        raise NotAccelerated(f"forward of {name} was replaced")
    for key, tensor in _tensors(module):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise NotAccelerated(f"{key} of {name} is a {type(tensor).__name__}")


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _kind(what: object) -> str:
    return repr(what) if isinstance(what, str) else type(what).__name__


def _convolution(module: nn.Module, names: dict[int, str], bias: bool = False) -> tuple[nn.Conv2d, str]:
    name = names.get(id(module), type(module).__name__)
    if type(module) is not nn.Conv2d:
        same = " (TensorFlow's SAME padding)" if "Same" in type(module).__name__ else ""
        raise NotAccelerated(f"{name} is a {type(module).__name__}{same}, not a Conv2d")
    if (module.bias is not None) != bias:
        raise NotAccelerated(f"{name} has {'no' if bias else 'a'} bias")
    if module.dilation != (1, 1) and module.kernel_size != (1, 1):
        raise NotAccelerated(f"{name} has dilation {module.dilation}")
    if module.padding_mode != "zeros":
        raise NotAccelerated(f"{name} has padding_mode {module.padding_mode!r}")
    return module, name


def _pointwise(module: nn.Module, names: dict[int, str], bias: bool = False) -> nn.Conv2d:
    conv, name = _convolution(module, names, bias)
    if conv.groups != 1:
        raise NotAccelerated(f"{name} has {conv.groups} groups")
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding not in ((0, 0), "same", "valid"):
        raise NotAccelerated(
            f"{name} has kernel {conv.kernel_size}, stride {conv.stride} and padding {conv.padding}, "
            "not those of a pointwise convolution"
        )
    return conv


def _depthwise(module: nn.Module, names: dict[int, str]) -> nn.Conv2d:
    conv, name = _convolution(module, names)
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise NotAccelerated(
            f"{name} has {conv.groups} groups for {conv.in_channels} -> {conv.out_channels} channels, not depthwise"
        )
    size = conv.kernel_size[0]
    if conv.kernel_size not in {(k, k) for k in KERNEL_SIZES}:
        raise NotAccelerated(f"{name} has kernel {conv.kernel_size}; the kernels know 3, 5 and 7, square")
    if conv.stride not in ((1, 1), (2, 2)):
        raise NotAccelerated(f"{name} has stride {conv.stride}; the kernels know 1 and 2")
    symmetric = (size // 2, size // 2)
    if conv.padding != symmetric and not (conv.padding == "same" and conv.stride == (1, 1)):
        raise NotAccelerated(f"{name} has padding {conv.padding}, not {symmetric}")
    return conv


def _norm(module: nn.Module, names: dict[int, str]) -> nn.BatchNorm2d:
    name, kind = names.get(id(module), type(module).__name__), type(module)
    plain = kind is nn.BatchNorm2d or (kind.__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d))
    if not plain:
        raise NotAccelerated(f"{name} is a {kind.__name__}, not a BatchNorm2d")
    assert isinstance(module, nn.BatchNorm2d)
    dropped = getattr(module, "drop", None)
    if dropped is not None and not isinstance(dropped, nn.Identity):
        raise NotAccelerated(f"{name} has a {type(dropped).__name__} inside")
    return module


def _names_of(se: SqueezeExciteParts) -> tuple[str, str]:
    act, gate = activation_name(se.act), gate_name(se.gate)
    if act is None:
        raise NotAccelerated(f"squeeze and excitation: activation {_kind(se.act)} is not known to the kernels")
    if gate is None:
        raise NotAccelerated(f"squeeze and excitation: gate {_kind(se.gate)} is not known to the kernels")
    return act, gate
