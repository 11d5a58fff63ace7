"""`FusedBlock`: what a block becomes. The object, its children, parameters and buffers stay; only its class changes."""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tfnas_ext.adapters import NotAccelerated, block_parts
from tfnas_ext.adapters.parts import CheckedParts, condition, has_global_hooks, has_hooks
from tfnas_ext.drop_in_run import run_block

_STATE = "_tfnas_drop_in"


class BlockState:
    """The parts of one block as last looked up; found again wherever the block has changed since, or was copied."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.parts: CheckedParts | None = None
        self._block: weakref.ref[nn.Module] | None = None
        self._children: tuple[nn.Module | None, ...] = ()
        self._inner: tuple[tuple[nn.Module, type[nn.Module], tuple[nn.Module | None, ...]], ...] = ()
        self._condition: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockState, (self.dtype,)  # copies belong to other blocks

    def look_up(self, block: nn.Module, original: type[nn.Module]) -> None:
        """Raises nothing: a block that can no longer be fused has no parts."""
        self._block = weakref.ref(block)
        self._children = tuple(block._modules.values())
        self._inner = tuple((m, type(m), tuple(m._modules.values())) for m in block.modules() if m is not block)
        try:
            self.parts = block_parts(block, original)
        except NotAccelerated:
            self.parts = None
        self._condition = tuple(condition(module) for module in block.modules())

    def is_of(self, block: nn.Module) -> bool:
        """Whether this is about `block` and nothing that matters has changed in it."""
        if self._block is None or self._block() is not block or tuple(block._modules.values()) != self._children:
            return False
        for module, kind, children in self._inner:
            if type(module) is not kind or tuple(module._modules.values()) != children or has_hooks(module):
                return False
            if "forward" in module.__dict__:
                return False
        return condition(block) == self._condition[0] and all(
            condition(module) == found for (module, *_), found in zip(self._inner, self._condition[1:], strict=True)
        )


class FusedBlock(nn.Module):
    """Base of the classes that `fused_class` makes; its `forward` runs the kernels, or else the original class's."""

    _tfnas_original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs:
            state: BlockState = self.__dict__[_STATE]
            if torch.compiler.is_compiling():
                if not _unchanged(state, self):
                    return super().forward(*args, **kwargs)
            elif not state.is_of(self):
                state = self.__dict__[_STATE] = BlockState(state.dtype)
                state.look_up(self, self._tfnas_original)
            if state.parts is not None and not _module_calls_count():
                out = run_block(self, state.parts, args[0], state.dtype)
                if out is not None:
                    return out
        return super().forward(*args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` calls first; it knows nothing of classes made at run time."""
        raise RuntimeError(
            f"{type(self).__name__} runs on fused kernels, which TorchScript cannot compile: call "
            "tfnas_ext.restore(model) before torch.jit.script"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return new_fused, (self._tfnas_original,), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__[_STATE].look_up(self, self._tfnas_original)


def _unchanged(state: BlockState, block: nn.Module) -> bool:
    """Looked at while a graph is made, which then keeps to the answer."""
    return state.is_of(block)


# What `torch.compiler.assume_constant_result` does; that imports the compiler, a second and 110 MB for everybody.
_unchanged._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _module_calls_count() -> bool:
    """Whether somebody wants to see every module's call."""
    return not torch.compiler.is_compiling() and has_global_hooks()


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `accelerate`, if it was replaced."""
    return module._tfnas_original if isinstance(module, FusedBlock) else type(module)


_CLASSES: dict[type[nn.Module], type[FusedBlock]] = {}


def fused_class(original: type[nn.Module]) -> type[FusedBlock]:
    """The subclass of `original` with `FusedBlock`'s forward."""
    if original not in _CLASSES:
        _CLASSES[original] = _make_class(original)
    return _CLASSES[original]


def _make_class(original: type[nn.Module]) -> type[FusedBlock]:
    names = {"_tfnas_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return types.new_class(f"Fused{original.__name__}", (FusedBlock, original), exec_body=lambda ns: ns.update(names))


def new_fused(original: type[nn.Module]) -> FusedBlock:
    """An empty instance, which copying and unpickling fill."""
    cls = fused_class(original)
    return cls.__new__(cls)


def fuse(module: nn.Module, dtype: torch.dtype | None) -> None:
    original = original_class(module)
    module.__class__ = fused_class(original)
    state = module.__dict__[_STATE] = BlockState(dtype)
    state.look_up(module, original)


def unfuse(module: FusedBlock) -> None:
    module.__class__ = module._tfnas_original  # type: ignore[assignment]
    module.__dict__.pop(_STATE, None)
