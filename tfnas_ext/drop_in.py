"""`accelerate`: other people's networks on the fused kernels, and `restore`.

A block is recognised by its class's name and its structure (see `adapters`), checked part by part, run once beside the
kernels on a small input, and only then replaced: the object stays and gets a subclass of its class, so that names,
parameters, buffers, hooks on it, state dicts and optimizers are what they were.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tfnas_ext import _native, ops
from tfnas_ext.adapters import NotAccelerated, block_parts, knows, knows_name
from tfnas_ext.backends import choose_backend, cpu_capability
from tfnas_ext.drop_in_block import FusedBlock, fuse, original_class, unfuse
from tfnas_ext.drop_in_check import check_same_results
from tfnas_ext.drop_in_report import LeftBlock, ReplacedBlock, Report
from tfnas_ext.nn import MBInvRes


class AccelerateError(ValueError):
    """`accelerate(..., strict=True)` met a block that it would leave alone; the model is unchanged."""


def accelerate(model: nn.Module, *, dtype: torch.dtype | None = None, strict: bool = False) -> Report:
    """Runs the inverted residual blocks of `model` on the fused kernels from now on, in place; undone by `restore`.

    Blocks: timm's `InvertedResidual` and `DepthwiseSeparableConv`, torchvision's `MBConv` and `InvertedResidual`,
    `MBInvertedResBlock` of the published TF-NAS code (inside its mixed operation too), this project's plain networks,
    and what `register_block` was told. Results are PyTorch's up to rounding: outputs, gradients, running statistics,
    in training and evaluation. Everything else of the model is untouched, and so is every block of which the kernels
    would not give the same; the report says why.

    A replaced block has the parameters, buffers, children, state dict and hooks that it had. At run time it falls back
    to its own code, silently and with the same result, wherever the kernels cannot serve a call: see docs/backend.md.

    Args:
        model: any module, or such a block itself. On the CPU; blocks elsewhere are left alone.
        dtype: what the blocks compute in, a native type (float32, float64, bfloat16); None is the type of what they are
            called with. Inputs and weights are converted in every call (float32 weights stay what they are in
            bfloat16), the result is converted back.
        strict: raise if any block is left alone, or if there is none.

    Raises:
        TypeError: `model` is no module, `dtype` no type.
        ValueError: the kernels do not compute in `dtype`.
        AccelerateError: see `strict`. The model is unchanged after any error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    if dtype is not None and dtype not in ops.NATIVE_DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in ops.NATIVE_DTYPES)
        raise ValueError(f"dtype must be one of {known} or None, got {str(dtype).removeprefix('torch.')}")
    blocks: list[nn.Module] = []
    replaced: list[ReplacedBlock] = []
    left: list[LeftBlock] = []
    owners = _owners(model)
    for name, block in _candidates(model):
        original = original_class(block)
        kind = f"{original.__module__.split('.')[0]}.{getattr(block, 'original_name', original.__name__)}"
        try:
            backend = _examine(block, original, dtype, owners)
        except NotAccelerated as reason:
            left.append(LeftBlock(name, kind, str(reason)))
        else:
            blocks.append(block)
            replaced.append(ReplacedBlock(name, kind, backend))
    report = Report(tuple(replaced), tuple(left))
    if strict and (left or not replaced):
        raise AccelerateError(str(report) if left else "model: there is no block in it that `accelerate` knows")
    _replace_all(blocks, dtype)
    return report


def restore(model: nn.Module) -> tuple[str, ...]:
    """Gives every block that `accelerate` replaced its own class back; returns their names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fused = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedBlock)]
    for _, module in fused:
        unfuse(module)
    return tuple(name for name, _ in fused)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Blocks that are known by their class, outermost first; not what is inside of one."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or isinstance(module, MBInvRes):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            known = knows_name(getattr(module, "original_name", ""))
        else:
            known = knows(original_class(module))
        if known:
            inside.update(id(inner) for inner in module.modules())
            yield name, module


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names under which every module of `model` is reached."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        owners.setdefault(id(module), []).append(name)
    return owners


def _examine(
    block: nn.Module, original: type[nn.Module], dtype: torch.dtype | None, owners: dict[int, list[str]]
) -> str:
    """The backend that will run the block; raises `NotAccelerated` with the reason if none will."""
    for inner in block.modules():
        names = owners[id(inner)]
        if len(names) > 1 and next(iter(inner.state_dict()), None) is not None:
            raise NotAccelerated(f"{names[0]} is shared: it is {names[1]} too")
    if isinstance(block, torch.jit.ScriptModule):
        raise NotAccelerated("it is a TorchScript module")
    parts = block_parts(block, original)
    _check_tensors(block, dtype)
    if _native.MODULE is None:
        raise NotAccelerated(f"no native module: {_native.REASON}")
    if choose_backend("cpu") != "cpu":
        raise NotAccelerated("TFNAS_BACKEND=reference would run what the block runs already")
    check_same_results(block, original, parts, dtype)
    return f"cpu ({cpu_capability()})"


def _check_tensors(block: nn.Module, dtype: torch.dtype | None) -> None:
    for name, parameter in block.named_parameters():
        if parameter.device.type != "cpu":
            raise NotAccelerated(f"{name} is on {parameter.device}; drop-in blocks run on the CPU only")
        if dtype is None and parameter.dtype not in ops.NATIVE_DTYPES:
            kind = str(parameter.dtype).removeprefix("torch.")
            advice = ", unless dtype=torch.float32 is given" if parameter.dtype.is_floating_point else ""
            raise NotAccelerated(f"{name} is {kind}, which the kernels do not compute in{advice}")
        if not parameter.dtype.is_floating_point:
            raise NotAccelerated(f"{name} is {str(parameter.dtype).removeprefix('torch.')}")
    kinds = {parameter.dtype for parameter in block.parameters()}
    if len(kinds) > 1:
        raise NotAccelerated(f"its parameters are of several types: {', '.join(sorted(str(kind) for kind in kinds))}")


def _replace_all(blocks: list[nn.Module], dtype: torch.dtype | None) -> None:
    """All or none."""
    before = [(block, type(block), dict(block.__dict__)) for block in blocks]
    try:
        for block in blocks:
            fuse(block, dtype)
    except BaseException:
        for block, kind, state in before:
            block.__class__ = kind
            block.__dict__.clear()
            block.__dict__.update(state)
        raise
