"""One compiled graph for every width, an exported block for any batch, and NumPy arrays in and out without a copy.

Run it with `python examples/compile_block.py`; it takes seconds on a CPU. The graphs are compiled with a backend that
generates no code ("aot_eager"), so that no C++ compiler is needed; leave the argument out for torch's usual one.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch._dynamo.utils import counters

from tfnas_ext.nn import MBInvRes


def train_compiled(block: MBInvRes) -> None:
    """Training steps at several widths: forward, backward and running statistics are one graph, without recompiling."""
    twin = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    images = torch.randn(4, 16, 14, 14)
    for width in (96, 17, 64, 33, 5):
        got, want = compiled(images, width), twin(images, width)
        got.square().mean().backward()
        want.square().mean().backward()
        print(f"width {width}: largest difference from eager {(got - want).abs().max().item():.1e}")
    print(f"graphs compiled: {counters['stats']['unique_graphs']}")


def export(block: MBInvRes) -> None:
    """A program for any batch, saved and loaded like every other; without gradients it calls the fused operator."""
    block.eval()
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(block, (torch.randn(4, 16, 14, 14),), dynamic_shapes=({0: batch},))
        images = torch.randn(7, 16, 14, 14)
        difference = (program.module()(images) - block(images)).abs().max().item()
    operators = sorted({str(node.target) for node in program.graph.nodes if node.op == "call_function"})
    print(f"exported: {', '.join(operators)}; largest difference on another batch {difference:.1e}")


def with_numpy(block: MBInvRes) -> None:
    """Images [N, H, W, C] of NumPy are channels_last tensors as they lie in memory, and so is the result."""
    images = np.random.default_rng(0).standard_normal((4, 14, 14, 16), dtype=np.float32)
    x = torch.from_dlpack(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = np.from_dlpack(block(x).permute(0, 2, 3, 1))
    print(f"NumPy in {images.shape}, out {out.shape}; no copy: {x.data_ptr() == images.ctypes.data}")


def main() -> None:
    torch.manual_seed(0)
    block = MBInvRes(16, 96, 16, kernel_size=5, se_channels=8, act="swish")
    train_compiled(block)
    export(block)
    with_numpy(block)


if __name__ == "__main__":
    main()
