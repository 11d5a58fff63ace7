"""Runs the search's steps: one call after the other, or replayed as captured CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Step = Callable[..., Tensor]


class StepRunner(Protocol):
    """Calls steps. A step is a function of tensors that changes state in place and returns one tensor."""

    def run(self, name: str, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        """What `step(*inputs)` returns, a tensor of the caller's own; `name` is always given with the same step."""
        ...

    def forget(self) -> None:
        """To be called when something changed that steps read from the host: widths, or a tensor's place."""
        ...


class DirectRunner:
    """Calls every step as an ordinary function."""

    def run(self, name: str, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        return step(*inputs)

    def forget(self) -> None:
        pass


class _Captured:
    """A step for inputs of fixed shapes: they are copied to a fixed place, where the graph reads them."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(torch.empty_like(tensor) for tensor in inputs)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None

    def load(self, inputs: tuple[Tensor, ...]) -> None:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)


class GraphRunner:
    """Captures each step in a CUDA graph and replays it.

    The first call of a step, and the first of any other input shape, runs ordinarily: it is a real step, in which
    buffers are prepared and libraries choose their algorithms. The second is captured and replayed. The graphs share
    one memory pool: they never run at the same time, and what they return is copied out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._steps: dict[tuple[object, ...], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def forget(self) -> None:
        if self._steps:
            torch.cuda.synchronize(self._device)  # replays under way still use what is given up here
        self._steps = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, name: str, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        key = (name, *((tensor.shape, tensor.dtype) for tensor in inputs))
        with torch.cuda.device(self._device):
            captured = self._steps.get(key)
            if captured is None:
                captured = self._steps[key] = _Captured(inputs)
                captured.load(inputs)
                return self._ordinary(step, captured.inputs)
            captured.load(inputs)
            if captured.graph is None:
                self._capture(step, captured)
            assert captured.graph is not None
            assert captured.out is not None
            captured.graph.replay()
            return captured.out.clone()

    def _ordinary(self, step: Step, inputs: tuple[Tensor, ...]) -> Tensor:
        """On the stream that captures, so that what libraries keep for each stream exists before."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = step(*inputs)
        current.wait_stream(self._stream)
        out.record_stream(current)
        return out

    def _capture(self, step: Step, captured: _Captured) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may allocate and copy meanwhile, as the data's do
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            captured.out = step(*captured.inputs)
        captured.graph = graph


def make_runner(device: torch.device, capturable: bool, wanted: bool) -> StepRunner:
    """A `GraphRunner` where graphs are wanted, the device is a GPU and the engine's steps can be captured."""
    return GraphRunner(device) if wanted and capturable and device.type == "cuda" else DirectRunner()
