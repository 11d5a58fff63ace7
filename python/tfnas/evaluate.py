"""What a trained network is worth: accuracy on images it has not seen, latency against the table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Accuracy:
    """Shares (0 to 1) of `images` whose class is the first, or among the first five, of the network's answers.

    `top5` is None where there are five classes or fewer. `loss` is the mean cross entropy.
    """

    images: int
    loss: float
    top1: float
    top5: float | None


@torch.no_grad()
def evaluate_network(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str) -> Accuracy:
    """Accuracy of `network`, in evaluation mode, which it is left in as it was found.

    Args:
        batches: Images [N, C, H, W] and int64 labels [N], on the network's device; at least one.
        precision: `float32`, or `bfloat16` for autocast.
    """
    was_training = network.training
    network.eval()
    sums: Tensor | None = None
    images_seen, classes = 0, 0
    for images, labels in batches:
        logits = logits_of(network, images, precision)
        classes = logits.shape[1]
        right = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        row = torch.stack([loss.double(), right[:, 0].sum().double(), right.sum().double()])
        sums = row if sums is None else sums + row
        images_seen += len(labels)
    network.train(was_training)
    if sums is None:
        raise ValueError("batches: expected at least one, got none")
    loss_sum, first, among_five = sums.tolist()
    return Accuracy(
        images=images_seen,
        loss=loss_sum / images_seen,
        top1=first / images_seen,
        top5=among_five / images_seen if classes > 5 else None,
    )


def logits_of(network: nn.Module, images: Tensor, precision: str) -> Tensor:
    """float32 logits [N, classes], computed in `precision`."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits: Tensor = network(images)
    return logits.float()
