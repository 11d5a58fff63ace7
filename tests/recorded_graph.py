"""A stand-in for captured CUDA graphs on the CPU: what a step launched is recorded, and replayed on the same tensors.

As with a real graph, whatever the step took from the host is frozen: a number, a Python choice, a tensor that has since
been replaced. Reading a value back while recording fails.
"""

from __future__ import annotations

from typing import Any

import torch
from tfnas.step_graphs import Step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "item", "equal")


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in READS, f"{func} reads a value back"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class RecordingRunner:
    """Behaves as `tfnas.step_graphs.GraphRunner`."""

    def __init__(self) -> None:
        self.forget()
        self.replays = 0

    def forget(self) -> None:
        self._steps: dict[tuple[object, ...], tuple[tuple[Tensor, ...], Recording | None, Tensor | None]] = {}

    def run(self, name: str, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        key = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._steps:
            self._steps[key] = (tuple(torch.empty_like(tensor) for tensor in inputs), None, None)
            return step(*inputs)
        places, recording, out = self._steps[key]
        for place, given in zip(places, inputs, strict=True):
            place.copy_(given)
        if recording is None:
            with Recording() as recording:
                out = step(*places)
            self._steps[key] = (places, recording, out)
        else:
            recording.replay()
            self.replays += 1
        assert out is not None
        return out.clone()
