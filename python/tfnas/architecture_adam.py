"""Adam on the architecture parameters: clipped gradients in, renormalised log-probabilities out, nothing read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_EPS = 1e-8


class ArchitectureAdam:
    """Adam as PyTorch's (`weight_decay` an L2 penalty) on `log_alpha` and `log_beta`, which stay log-probabilities.

    Its state lies in tensors that are never replaced, so a captured step goes on from wherever they are.

    Args:
        parameters: `log_alpha` and `log_beta` ([rows, columns], contiguous), changed in place.
        masks: bool tensors of the same shapes: the entries that exist. The others are -inf and get no moments.
        lr, betas, weight_decay: as in `torch.optim.Adam`.
        fused: a step is one launch of the package's CUDA kernel; off, tensor operations on any device.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        masks: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        self.parameters, self.masks = [p.detach() for p in parameters], list(masks)
        self.lr, self.betas, self.weight_decay, self.fused = lr, betas, weight_decay, fused
        self.first_moments = [torch.zeros_like(p) for p in self.parameters]
        self.second_moments = [torch.zeros_like(p) for p in self.parameters]
        self.steps = torch.zeros((), dtype=self.parameters[0].dtype, device=self.parameters[0].device)

    @torch.no_grad()
    def step_(self, grads: Sequence[Tensor], max_norm: float) -> Tensor:
        """One step from `grads` (of all entries), scaled down to the norm `max_norm` together; their norm before, 0-d.

        Afterwards every row is normalised: its exponentials sum to 1.
        """
        if self.fused:
            alpha, beta = (
                [p, m, s] for p, m, s in zip(self.parameters, self.first_moments, self.second_moments, strict=True)
            )
            return torch.ops.tfnas._adam_step(
                *(alpha, grads[0].contiguous(), self.masks[0], beta, grads[1].contiguous(), self.masks[1]),
                *(self.steps, self.lr, *self.betas, self.weight_decay, _EPS, max_norm),
            )
        kept = [torch.where(mask, grad, 0) for grad, mask in zip(grads, self.masks, strict=True)]
        norm = torch.nn.utils.get_total_norm(kept)
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1)
        self.steps += 1
        beta1, beta2 = self.betas
        step_size, root = self.lr / (1 - beta1**self.steps), (1 - beta2**self.steps).sqrt()
        rows = zip(self.parameters, self.masks, kept, self.first_moments, self.second_moments, strict=True)
        for parameter, mask, grad, first, second in rows:
            value = torch.where(mask, parameter, 0)
            grad = coefficient * grad + self.weight_decay * value
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            value = value - step_size * first / (second.sqrt() / root + _EPS)
            parameter.copy_(value.masked_fill(~mask, -torch.inf).log_softmax(1))
        return norm

    def reset_(self) -> None:
        """Forget all moments and the number of steps."""
        for tensor in self.state():
            tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Moments and number of steps (not copies), for `load_state_dict`."""
        return {"first": self.first_moments, "second": self.second_moments, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, bit for bit. ValueError where it is of other parameters."""
        source = [*state["first"], *state["second"], state["steps"]]
        shapes = [list(tensor.shape) for tensor in self.state()]
        if [list(tensor.shape) for tensor in source] != shapes:
            raise ValueError(f"Adam's state must have shapes {shapes}, not {[list(tensor.shape) for tensor in source]}")
        for tensor, saved in zip(self.state(), source, strict=True):
            tensor.copy_(saved)

    def state(self) -> list[Tensor]:
        """All of it, not copies."""
        return [*self.first_moments, *self.second_moments, self.steps]
