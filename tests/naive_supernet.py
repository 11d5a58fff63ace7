"""A whole supernet of ordinary modules around `naive_body`, at given widths: what `Supernet` is compared with."""

from __future__ import annotations

import torch
from naive_body import ACTS, NaiveBody, NaiveSE
from tfnas.space import Candidate, Space, Stage
from torch import Tensor, nn

from tfnas_ext.engine_spec import BodySpec


def tiny_space(depth_space: str = "sink", candidates: int = 3) -> Space:
    """Two stages of depth 3 and 1 on three-channel images, every kind of candidate; not a size is a multiple of 8."""
    ops = (
        Candidate("k3_e2", 3, 1.5, 1, 2),
        Candidate("k5_e3_se1", 5, 2, 1.5, 3, 0.5),
        Candidate("k3_e4_se2", 3, 3, 2, 4, 1),
    )
    return Space(
        name="tiny",
        resolution=13,
        image_channels=3,
        num_classes=5,
        stem_channels=6,
        stem_stride=2,
        stem_act="relu",
        fixed_channels=4,
        fixed_se_channels=2,
        stages=(Stage(6, 3, 2, "swish"), Stage(7, 1, 1, "hard_swish")),
        candidates=ops[:candidates],
        head_channels=11,
        head_act="swish",
        depth_space=depth_space,
    )


class NaiveSupernet(nn.Module):
    """`stem` and `head` are sequences whose parameters come in the order of the package's."""

    def __init__(self, space: Space, spec: BodySpec, widths: list[list[int]]):
        super().__init__()
        c, fixed = space.stem_channels, space.fixed_channels
        stem_act, head_act = ACTS[space.stem_act], ACTS[space.head_act]
        self.stem = nn.Sequential(
            nn.Conv2d(space.image_channels, c, 3, space.stem_stride, 1, bias=False),
            nn.BatchNorm2d(c, affine=False, track_running_stats=False),
            stem_act(),
            nn.Conv2d(c, c, 3, 1, 1, groups=c, bias=False),
            nn.BatchNorm2d(c, affine=False, track_running_stats=False),
            stem_act(),
            NaiveSE(c, space.fixed_se_channels, space.stem_act) if space.fixed_se_channels else nn.Identity(),
            nn.Conv2d(c, fixed, 1, bias=False),
            nn.BatchNorm2d(fixed, affine=False, track_running_stats=False),
        )
        self.body = NaiveBody(spec, widths)
        self.head = nn.Sequential(
            nn.Conv2d(space.stages[-1].out_channels, space.head_channels, 1, bias=False),
            nn.BatchNorm2d(space.head_channels, affine=False, track_running_stats=False),
            head_act(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(space.head_channels, space.num_classes),
        )
        self.log_alpha = nn.Parameter(torch.zeros(len(spec.layers), spec.max_candidates))
        self.log_beta = nn.Parameter(torch.zeros(1))

    def load(self, state: dict[str, Tensor]) -> None:
        """Weights and architecture parameters from a `Supernet`'s state dict."""
        for module, prefix in ((self.stem, "stem."), (self.head, "head.")):
            tensors = [tensor for name, tensor in state.items() if name.startswith(prefix)]
            for parameter, tensor in zip(module.parameters(), tensors, strict=True):
                parameter.data.copy_(tensor)
        self.body.load_prefixes(state)
        self.log_alpha = nn.Parameter(state["log_alpha"].clone())
        self.log_beta = nn.Parameter(state["log_beta"].clone())

    def weights(self) -> list[nn.Parameter]:
        return [*self.stem.parameters(), *self.body.parameters(), *self.head.parameters()]

    def depth(self) -> Tensor | None:
        if self.body.spec.depth_space == "skip-in":
            return None
        return torch.exp(self.log_beta) / torch.exp(self.log_beta).sum(1, keepdim=True)

    def path(self, images: Tensor, choice: list[int]) -> Tensor:
        v = self.depth()
        return self.head(self.body.path(self.stem(images), choice, None if v is None else v.detach()))

    def mixture(self, images: Tensor, u: Tensor) -> Tensor:
        return self.head(self.body.mixture(self.stem(images), u, self.depth()))
