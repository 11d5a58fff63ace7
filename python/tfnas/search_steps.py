"""The two steps of one search as functions of a batch; all else they read lies in tensors on the device.

So each can be captured once and replayed for any step: the step counter, temperature, learning rate, the latencies of
all candidates and the choice drawn from them are values in device memory, not constants of the captured step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfnas.architecture_adam import ArchitectureAdam
from tfnas.config import SearchConfig
from tfnas.latency.objective import LayerLatencies, expected_latency_ms, latency_objective
from tfnas.processes import ALONE, Processes
from tfnas.step_graphs import make_runner
from tfnas.steps import architecture_step, weight_step
from tfnas.supernet import Supernet
from tfnas_ext.sampling import gumbel_softmax_weights_at, sample_paths_at


class SearchSteps:
    """Weight steps and architecture steps of `supernet`, as `config` wants them.

    Captured in CUDA graphs where the device, the engine and `config.cuda_graphs` allow it.

    Args:
        latencies: of all candidates at the present widths, on the supernet's device.
        target_latency_ms: of the latency term.
        processes: who shares the steps; several exchange gradients through the host's library, not in a graph.
    """

    def __init__(
        self,
        supernet: Supernet,
        config: SearchConfig,
        latencies: LayerLatencies,
        target_latency_ms: float,
        processes: Processes = ALONE,
    ) -> None:
        self.supernet, self.config, self.latencies = supernet, config, latencies
        self._target_latency_ms, self._processes = target_latency_ms, processes
        device = supernet.log_alpha.device
        self.runner = make_runner(device, supernet.engine.capturable, config.cuda_graphs and processes.world_size == 1)
        adam = config.architecture
        self.adam: ArchitectureAdam = supernet.architecture_adam(adam.lr, adam.betas, adam.weight_decay)
        self._clock = torch.tensor([config.seed, 0], device=device)
        self._tau = torch.ones((), dtype=torch.float64, device=device)
        self._lr_tensor = torch.zeros((), dtype=supernet.weight_dtype, device=device)
        self._lr: float | Tensor = self._lr_tensor
        self._second = "none"

    def begin(self, step: int, lr: float, tau: float, second: str) -> None:
        """What holds from weight step number `step` on, which is the next; each weight step counts one further."""
        self._clock[1].fill_(step - 1)
        self._tau.fill_(tau)
        self._lr_tensor.fill_(lr)
        # an engine that works on the host wants numbers from the host
        self._lr = self._lr_tensor if self.supernet.engine.capturable else lr
        self._second = second

    def set_latencies(self, latencies: LayerLatencies) -> None:
        """After a change of widths: the candidates' latencies are others, and so is what a step launches."""
        self.latencies = latencies
        self.runner.forget()

    def weight(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step on freshly sampled paths; float64 [P + 3]: images, right answers of the first path, norm, losses."""
        return self.runner.run(f"weight, second path {self._second}", self._weight, (images, labels))

    def architecture(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step on the mixture, of the number of the weight step before; float64 [3]: right answers, norm, loss."""
        return self.runner.run("architecture", self._architecture, (images, labels))

    def _weight(self, images: Tensor, labels: Tensor) -> Tensor:
        net, weights = self.supernet, self.config.weights
        self._clock[1].add_(1)
        choices = sample_paths_at(net.log_alpha, self._tau, self._clock, self._second, net.alpha_mask)
        done = weight_step(
            net,
            images,
            labels,
            choices,
            lr=self._lr,
            momentum=weights.momentum,
            weight_decay=weights.weight_decay,
            max_norm=weights.max_norm,
            processes=self._processes,
        )
        figures = [done.images[None], done.correct[:1], done.norm[None], done.losses]
        return torch.cat([figure.double() for figure in figures])

    def _architecture(self, images: Tensor, labels: Tensor) -> Tensor:
        net = self.supernet
        u = gumbel_softmax_weights_at(net.log_alpha, self._tau, self._clock, net.alpha_mask)
        done = architecture_step(
            net,
            self.adam,
            images,
            labels,
            u,
            self._latency_term,
            max_norm=self.config.architecture.max_norm,
            processes=self._processes,
        )
        figures = [done.correct, done.norm, done.cross_entropy + done.latency_term]
        return torch.stack([figure.double() for figure in figures])

    def _latency_term(self, u: Tensor, v: Tensor) -> Tensor:
        """lambda * C(LAT) of the mixture, 0-d."""
        objective = self.config.objective
        return latency_objective(
            objective.name,
            expected_latency_ms(self.supernet.space, self.latencies, u, v),
            self._target_latency_ms,
            weight=objective.latency_weight,
            exponent=objective.exponent,
        )
