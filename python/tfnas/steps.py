"""The two steps of the bi-level search: one of the weights (Eq. 8), one of the architecture parameters (Eq. 7).

Neither reads a value back from the device: everything they return is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tfnas.architecture_adam import ArchitectureAdam
from tfnas.processes import ALONE, Processes
from tfnas.supernet import Supernet
from tfnas_ext.losses import cross_entropy


class WeightStep(NamedTuple):
    """What the sampled paths gave before the step: `losses` [P], `correct` [P] of `images` (counts), gradient `norm`.

    With several processes: of all of them together, the losses averaged.
    """

    losses: Tensor
    correct: Tensor
    images: Tensor
    norm: Tensor


class ArchitectureStep(NamedTuple):
    """What the mixture gave before the step, all 0-d; the objective is `cross_entropy` + `latency_term`."""

    cross_entropy: Tensor
    latency_term: Tensor
    correct: Tensor
    norm: Tensor


def weight_step(
    supernet: Supernet,
    images: Tensor,
    labels: Tensor,
    choices: Tensor,
    *,
    lr: float | Tensor,
    momentum: float = 0.9,
    weight_decay: float = 1e-5,
    max_norm: float = 5.0,
    processes: Processes = ALONE,
) -> WeightStep:
    """One SGD step on the sum of the sampled paths' cross entropies, with one backward (Eq. 8).

    Gradients of all sampled weights, stem and head together are clipped at the norm `max_norm`. Weights that no path
    uses, channels beyond a width, and architecture parameters stay as they are, their momentum too.

    Args:
        images: [N, C, H, W], floating point, on the supernet's device.
        labels: int64 [N].
        choices: int64 [P, L], a candidate for each layer of each path (`tfnas_ext.sampling.sample_paths`).
        lr, momentum, weight_decay, max_norm: of SGD as in PyTorch, and of the clipping. `lr` may be a 0-d tensor.
        processes: who shares the step, each with images of its own and the same `choices`: gradients are averaged over
            them, by one all-reduce, before they are clipped. Batch norms are each process's own.
    """
    logits = supernet.forward_paths(images, choices)
    fused = supernet.engine.capturable
    each = [cross_entropy(path, labels, fused=fused) for path in logits]
    losses, correct = (torch.stack(values) for values in zip(*each, strict=True))
    dense = supernet.dense_parameters()
    grads = torch.autograd.grad(losses.sum(), dense)
    losses = losses.detach()
    count = torch.full_like(correct[0], len(labels))
    if processes.world_size > 1:
        processes.reduce_([*grads, *supernet.engine.gradient_buffers(), losses], [correct, count])
    rows = [(p.detach(), g, m) for p, g, m in zip(dense, grads, supernet.dense_momenta(), strict=True)]
    norm = supernet.engine.clip_and_sgd_(lr, momentum, weight_decay, max_norm, rows)
    return WeightStep(losses, correct, count, norm)


def architecture_step(
    supernet: Supernet,
    optimizer: ArchitectureAdam,
    images: Tensor,
    labels: Tensor,
    u: Tensor,
    latency_term: Callable[[Tensor, Tensor], Tensor],
    *,
    max_norm: float = 5.0,
    processes: Processes = ALONE,
) -> ArchitectureStep:
    """One step of `optimizer` on cross entropy of the mixture + latency term, with respect to alpha and beta (Eq. 7).

    The gradient of both together is clipped at the norm `max_norm`; afterwards they are log-probabilities again. No
    weight changes.

    Args:
        optimizer: of `supernet.architecture_parameters()` (`Supernet.architecture_adam`).
        images, labels: held-out data, as for `weight_step`.
        u: [L, C], the mixture's weights as a differentiable function of `supernet.log_alpha`, with fresh noise
            (`tfnas_ext.sampling.gumbel_softmax_weights`, Eq. 3).
        latency_term: maps u and v (`Supernet.depth_weights`) to lambda * C(LAT), 0-d and differentiable.
        processes: as for `weight_step`; `u` is the same in all.
    """
    v = supernet.depth_weights()
    logits = supernet.forward_mixture(images, u, v)
    loss, correct = cross_entropy(logits, labels, fused=supernet.engine.capturable)
    latency = latency_term(u, v)
    parameters = supernet.architecture_parameters()
    grads = torch.autograd.grad(loss + latency, parameters, allow_unused=True, materialize_grads=True)
    loss = loss.detach()
    processes.reduce_([*grads, loss], [correct])
    norm = optimizer.step_(grads, max_norm)
    return ArchitectureStep(loss, latency.detach(), correct, norm)


@torch.no_grad()
def evaluation_step(supernet: Supernet, images: Tensor, labels: Tensor, choices: Tensor) -> Tensor:
    """Right answers, int64 [P], of the networks that `choices` [P, L] names; nothing changes."""
    return torch.stack([(path.argmax(1) == labels).sum() for path in supernet.forward_paths(images, choices)])
