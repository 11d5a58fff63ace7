"""Trains a network and its accelerated copy side by side and compares everything, for the tests of `accelerate`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def train(model: nn.Module, *, size: int, batch: int, steps: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Logits, gradients and buffers of every step of SGD from fixed images and labels, by name.

    Steps are small: large ones from random weights make two orders of summation differ by 1e-8 in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    results: dict[str, Tensor] = {}
    model.train()
    torch.manual_seed(seed)  # drop-path and dropout
    for step in range(steps):
        images = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(10, (batch,), generator=generator)
        logits = model(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        results[f"{step} logits"] = logits.detach()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[f"{step} gradient of {name}"] = parameter.grad.clone()
        optimizer.step()
        results |= {f"{step} {name}": buffer.clone() for name, buffer in model.named_buffers()}
    results |= {f"weight {name}": parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        results["evaluation"] = model(images)
    return results


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative 2-norms of the differences; what is far smaller than its kind is noise and measured against that."""
    assert got.keys() == want.keys()
    largest: dict[str, float] = {}
    for name, value in want.items():
        kind = name.split(" ")[0] + name.rsplit(".", 1)[-1]
        largest[kind] = max(largest.get(kind, 0.0), value.double().norm().item() / max(value.numel(), 1) ** 0.5)
    result = {}
    for name, value in want.items():
        kind = name.split(" ")[0] + name.rsplit(".", 1)[-1]
        scale = max(value.double().norm().item(), 1e-3 * largest[kind] * value.numel() ** 0.5, 1e-30)
        result[name] = (got[name].double() - value.double()).norm().item() / scale
    return result


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(model), copy.deepcopy(model)


def same_objects(before: Any, after: Any) -> bool:
    return len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
