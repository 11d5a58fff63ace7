"""What changes from epoch to epoch: learning rate, temperature, and which parts of the algorithm are on."""

from __future__ import annotations

import math

from tfnas.config import SearchConfig


def is_warmup(config: SearchConfig, epoch: int) -> bool:
    """Warm-up epochs train weights by the Gumbel path only: no second path, no architecture step, no scaling."""
    return epoch < config.warmup_epochs


def learning_rate(config: SearchConfig, epoch: int) -> float:
    """SGD's learning rate through `epoch` (from 0): a cosine from `weights.lr` to `weights.final_lr`."""
    weights = config.weights
    return weights.final_lr + 0.5 * (weights.lr - weights.final_lr) * (1 + math.cos(math.pi * epoch / config.epochs))


def temperature(config: SearchConfig, epoch: int) -> float:
    """tau of the Gumbel softmax through `epoch` (from 0): fixed in warm-up and the epoch after it, then falling.

    `exponential`: 5.0 * 0.96^n after n epochs past warm-up; `linear`: `tau_final` in the last epoch.
    """
    sampling = config.sampling
    passed = max(0, epoch - config.warmup_epochs)
    if sampling.tau_schedule == "exponential":
        return sampling.tau * sampling.tau_decay**passed
    last = max(1, config.epochs - 1 - config.warmup_epochs)
    # not tau + (tau_final - tau): that rounds a small tau_final to 0
    return sampling.tau * (1 - passed / last) + sampling.tau_final * (passed / last)


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, lr: float, final_lr: float) -> float:
    """Learning rate of `step` (from 0): linear to `lr` over `warmup_steps`, then a cosine to `final_lr`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    passed = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final_lr + 0.5 * (lr - final_lr) * (1 + math.cos(math.pi * passed))


def averaging_decay(decay: float, updates: int) -> float:
    """Decay of a moving average after `updates` updates: grows to `decay`, so that the first weights are forgotten."""
    return min(decay, (1 + updates) / (10 + updates))
