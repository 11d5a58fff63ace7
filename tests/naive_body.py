"""A supernet body as one would write it first: a module per candidate at its width, Python loops, torch's optimizer.

It shares no code with the package but the spec, and is what engines are compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfnas_ext.engine_spec import BodySpec, CandidateSpec, LayerSpec

ACTS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "swish": nn.SiLU, "hard_swish": nn.Hardswish}


class NaiveSE(nn.Module):
    def __init__(self, width: int, se_channels: int, act: str):
        super().__init__()
        self.conv_reduce = nn.Conv2d(width, se_channels, 1)
        self.act = ACTS[act]()
        self.conv_expand = nn.Conv2d(se_channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(3, keepdim=True).mean(2, keepdim=True)
        return x * torch.sigmoid(self.conv_expand(self.act(self.conv_reduce(pooled))))


class NaiveBlock(nn.Module):
    def __init__(self, layer: LayerSpec, candidate: CandidateSpec, width: int, eps: float):
        super().__init__()
        k, act = candidate.kernel_size, ACTS[layer.act]
        self.residual = layer.residual
        self.conv_pw = nn.Conv2d(layer.in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps, affine=False, track_running_stats=False)
        self.act1 = act()
        self.conv_dw = nn.Conv2d(width, width, k, layer.stride, k // 2, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps, affine=False, track_running_stats=False)
        self.act2 = act()
        self.se = NaiveSE(width, candidate.se_channels, layer.act) if candidate.se_channels else nn.Identity()
        self.conv_pwl = nn.Conv2d(width, layer.out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(layer.out_channels, eps, affine=False, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.se(self.act2(self.bn2(self.conv_dw(self.act1(self.bn1(self.conv_pw(x)))))))
        out = self.bn3(self.conv_pwl(out))
        return out + x if self.residual else out


class NaiveBody(nn.Module):
    """`widths[l][i]` as for an engine; weights are loaded with `load_prefixes`."""

    def __init__(self, spec: BodySpec, widths: list[list[int]]):
        super().__init__()
        self.spec = spec
        rows = iter(widths)
        self.stages = nn.ModuleList()
        for stage in spec.stages:
            layers = nn.ModuleList()
            for layer in stage:
                blocks = nn.ModuleDict()
                for candidate, width in zip(layer.candidates, next(rows), strict=True):
                    blocks[candidate.name] = (
                        nn.Identity() if candidate.is_skip else NaiveBlock(layer, candidate, width, spec.eps)
                    )
                layers.append(blocks)
            self.stages.append(layers)

    def load_prefixes(self, full: dict[str, Tensor], prefix: str = "") -> None:
        """Weights from a state dict at maximum widths, cut to this body's."""
        own = self.state_dict()
        self.load_state_dict({k: full[prefix + k][tuple(slice(0, n) for n in t.shape)] for k, t in own.items()})

    def path(self, x: Tensor, choice: list[int], v: Tensor | None) -> Tensor:
        one_hot = torch.zeros(len(choice), self.spec.max_candidates, dtype=x.dtype)
        for index, c in enumerate(choice):
            one_hot[index, c] = 1
        return self._run(x, one_hot, v, only=choice)

    def mixture(self, x: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
        return self._run(x, u, v, only=None)

    def _run(self, x: Tensor, u: Tensor, v: Tensor | None, only: list[int] | None) -> Tensor:
        index = 0
        for s, (stage, specs) in enumerate(zip(self.stages, self.spec.stages, strict=True)):
            sink = None
            for position, (blocks, layer) in enumerate(zip(stage, specs, strict=True)):
                total = None
                for i, block in enumerate(blocks.values()):
                    if only is None or only[index] == i:
                        term = block(x) * u[index, i]
                        total = term if total is None else total + term
                if layer.gated:
                    total = v[index, 0] * x + v[index, 1] * total
                if self.spec.depth_space == "sink":
                    sink = v[s, position] * total if sink is None else sink + v[s, position] * total
                x = total
                index += 1
            if sink is not None:
                x = sink
        return x
