"""What a trained network is worth: accuracy on images it has not seen, latency against the table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tfnas.processes import ALONE, Processes


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
def evaluate_network(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str,
    processes: Processes = ALONE,
) -> Accuracy:
    """Accuracy of `network` in evaluation mode; it is left in the mode it was found in.

    Args:
        batches: Images [N, C, H, W] and int64 labels [N], on the network's device; at least one image in all.
        precision: `float32`, or `bfloat16` for autocast.
        processes: Each brings batches of its own, perhaps none; the accuracy is that of all.
    """
    was_training = network.training
    network.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=next(network.parameters(), torch.empty(0)).device)
    for images, labels in batches:
        if not len(labels):
            continue
        logits = logits_of(network, images, precision)
        classes = logits.shape[1]
        right = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        row = [loss.double(), right[:, 0].sum().double(), right.sum().double()]
        many_classes = torch.full_like(row[0], float(classes > 5))
        sums += torch.stack([*row, torch.full_like(row[0], len(labels)), many_classes])
    network.train(was_training)
    processes.reduce_([], [sums])
    loss_sum, first, among_five, images_seen, with_five = sums.tolist()
    if not images_seen:
        raise ValueError("batches: expected at least one image, got none")
    return Accuracy(
        images=int(images_seen),
        loss=loss_sum / images_seen,
        top1=first / images_seen,
        top5=among_five / images_seen if with_five else None,
    )


def logits_of(network: nn.Module, images: Tensor, precision: str) -> Tensor:
    """float32 logits [N, classes], computed in `precision`."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits: Tensor = network(images)
    return logits.float()
