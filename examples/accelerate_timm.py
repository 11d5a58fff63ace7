"""Someone else's network on the fused kernels: accelerate, train a little, evaluate, restore.

Run it with `python examples/accelerate_timm.py`; it takes seconds on a CPU and needs timm or torchvision, whichever is
there. Images are random.
"""

from __future__ import annotations

import importlib.util
import time

import torch
from torch import nn

import tfnas_ext


def build_network() -> nn.Module:
    """MobileNetV3 of timm, else of torchvision, else the published TF-NAS-A of this project: random weights."""
    if importlib.util.find_spec("timm"):
        import timm

        return timm.create_model("mobilenetv3_large_100", num_classes=10)
    if importlib.util.find_spec("torchvision"):
        from torchvision import models

        return models.mobilenet_v3_large(num_classes=10)
    from tfnas.architecture import load_architecture
    from tfnas.network import build_network as build

    return build(load_architecture("tf-nas-a")[0])


def train(network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    network = build_network().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (8,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)  # made before, and goes on after

    def steps(name: str) -> None:
        network.train()
        train(network, optimizer, images, labels)  # warm up
        start = time.perf_counter()
        losses = [train(network, optimizer, images, labels) for _ in range(3)]
        print(f"{name}: loss {losses[-1]:.3f}, {(time.perf_counter() - start) / 3 * 1e3:.0f} ms a step")

    steps("eager      ")
    report = tfnas_ext.accelerate(network)
    print(report)
    steps("accelerated")

    network.eval()
    with torch.no_grad():  # batch norms folded, one fused forward pass a block
        fast = network(images)
    print(f"restored {len(tfnas_ext.restore(network))} blocks")
    with torch.no_grad():
        plain = network(images)
    print(f"logits differ by {(fast - plain).abs().max() / plain.abs().max():.1e} of the largest")


if __name__ == "__main__":
    main()
