"""Search steps on a tiny supernet, and a run of them in which everything changes that may change."""

from __future__ import annotations

import torch
from naive_supernet import tiny_space
from tfnas.config import SearchConfig
from tfnas.latency.objective import LayerLatencies
from tfnas.search_steps import SearchSteps
from tfnas.step_graphs import StepRunner
from tfnas.supernet import Supernet
from torch import Tensor

CONFIG = SearchConfig(seed=5)


def make_steps(engine: str, runner: StepRunner, device: str = "cpu", dtype: torch.dtype = torch.float64) -> SearchSteps:
    torch.manual_seed(2)
    supernet = Supernet(tiny_space(), engine, dtype, device)
    latencies = LayerLatencies(torch.rand(supernet.log_alpha.shape, dtype=torch.float64), 0.5).to(supernet.log_alpha)
    steps = SearchSteps(supernet, CONFIG, latencies, 1.0)
    steps.runner = runner
    return steps


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, 2, 3, 6, 7, dtype=torch.float64, generator=generator)
    return [(batch, torch.randint(0, 5, (2,), generator=generator)) for batch in images]


def run_steps(these: SearchSteps) -> list[Tensor]:
    """Six weight steps and three architecture steps over a change of rate and temperature, and one of widths."""
    found = []
    like = these.supernet.log_alpha
    for step, (images, labels) in enumerate(batches(6)):
        images, labels = images.to(like), labels.to(like.device)
        if step in (0, 2):
            these.begin(step, 0.1 / (step + 1), 5.0 - step, "random")
        if step == 3:
            widths = [[width - 1 for width in row] for row in these.supernet.widths]
            these.supernet.set_widths(widths)
            these.set_latencies(LayerLatencies(these.latencies.block_ms * 1.5, 0.7))
        found.append(these.weight(images, labels))
        if step < 3:
            found.append(these.architecture(images.flip(0), labels.flip(0)))
    return found


def state_of(these: SearchSteps) -> dict[str, Tensor]:
    adam = dict(enumerate([*these.adam.first_moments, *these.adam.second_moments, these.adam.steps]))
    moments = {f"adam {i}": tensor for i, tensor in adam.items()}
    return {**these.supernet.state_dict(), **these.supernet.optimizer_state(), **moments}
