"""Time the cases: every competitor gives the same numbers first, then they are timed in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tfnas.bench.cases import Case
from tfnas_ext.timing import StopRule, Timer, measure_interleaved

PHASES = ("inference", "step")
Run = Callable[[], tuple[Tensor, ...]]  # one run of a phase: the output and, in a step, the gradients
# Error (2-norm) against plain PyTorch in float32 that is allowed in any case: beyond it, twice that of the eager ones.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2}


class ResultsDifferError(RuntimeError):
    """Two competitors do not compute the same: nothing of this case was timed."""


@dataclass(frozen=True)
class Row:
    """One case in one phase. `times_ms` are medians by competitor, "ours" first; `noise` is our relative spread."""

    case: str
    phase: str
    dtype: str
    times_ms: dict[str, float]
    noise: float
    gflops: float

    @property
    def best_other(self) -> str:
        return min((name for name in self.times_ms if name != "ours"), key=self.times_ms.__getitem__)

    @property
    def ratio(self) -> float:
        """Time of the fastest other one over ours: below 1 we lose."""
        return self.times_ms[self.best_other] / self.times_ms["ours"]

    def as_dict(self) -> dict[str, Any]:
        times = {f"{name}_ms": round(ms, 4) for name, ms in self.times_ms.items()}
        facts = {"best_other": self.best_other, "ratio": round(self.ratio, 3), "noise": round(self.noise, 3)}
        return {"case": self.case, "phase": self.phase, "dtype": self.dtype, **times, **facts, "gflops": self.gflops}


def measure_cases(
    cases: Iterable[Case],
    *,
    phases: Iterable[str] = PHASES,
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    compiled: bool = False,
    timer: Timer,
    rule: StopRule,
) -> Iterator[Row]:
    """Rows of all cases, phase by phase, as they come.

    "inference" is a forward pass of a module in evaluation mode without gradients; "step" a forward pass in training,
    running statistics included, and the gradients of all parameters (and of a block's input).

    Competitors: "ours" (fused blocks), "eager_nchw", "eager_channels_last", and "compiled" (`torch.compile` of the
    latter) where asked for. Raises `ResultsDifferError`.
    """
    for case in cases:
        for dtype in dtypes:
            modules = _competitors(case, dtype, compiled)
            for phase in phases:
                calls = {name: _call(case, name, module, phase, dtype) for name, module in modules.items()}
                exact = copy.deepcopy(modules["eager_channels_last"]).float()
                _check_equal(case, phase, dtype, calls, _call(case, "exact", exact, phase, dtype)())
                samples = measure_interleaved(calls, timer=timer, rule=rule, warm_up=2, rejection=False)
                times = {name: found.median_ms for name, found in samples.items()}
                passes = 3 if phase == "step" else 1
                gflops = round(2 * passes * case.multiply_adds / times["ours"] / 1e6, 1)
                noise = samples["ours"].rel_spread
                yield Row(case.name, phase, str(dtype).removeprefix("torch."), times, noise, gflops)


def matmul_flops(timer: Timer, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large product, the best of twenty calls."""
    size = 1024
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    timer.warm_up(lambda: torch.mm(a, b), 2)
    return 2 * size**3 / min(timer.sample(lambda: torch.mm(a, b)).ms for _ in range(20)) * 1e3


def _competitors(case: Case, dtype: torch.dtype, compiled: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = case.plain().to(dtype)
    channels_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    modules = {"ours": case.fused(plain), "eager_nchw": plain, "eager_channels_last": channels_last}
    if compiled:
        modules["compiled"] = copy.deepcopy(channels_last)
        modules["compiled"].compile()
    return modules


def _call(case: Case, name: str, module: nn.Module, phase: str, dtype: torch.dtype) -> Run:
    generator = torch.Generator().manual_seed(1)
    computed = next(module.parameters()).dtype  # `dtype`, or a wider one for the same images
    x = torch.randn(case.input_shape, generator=generator).to(dtype).to(computed)
    if name != "eager_nchw":
        x = x.contiguous(memory_format=torch.channels_last)
    if phase == "inference":

        def infer() -> tuple[Tensor, ...]:
            module.eval()
            with torch.no_grad():
                return (module(x),)

        return infer
    x.requires_grad_(case.input_gradient)
    leaves = [*([x] if case.input_gradient else []), *module.parameters()]
    dout: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        module.train()
        out = module(x)
        if not dout:
            dout.append(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(computed))
        return (out.detach(), *torch.autograd.grad(out, leaves, dout[0]))

    return step


def _check_equal(case: Case, phase: str, dtype: torch.dtype, calls: dict[str, Run], exact: tuple[Tensor, ...]) -> None:
    # Gradients of what a batch norm undoes are zero but for rounding: none counts for less than a share of all.
    least = TOLERANCE[dtype] / 10 * float(torch.stack([t.norm() for t in exact[1:]] or [torch.tensor(0.0)]).norm())
    errors = {
        name: [
            float((a.to(b.dtype) - b).norm() / b.norm().clamp_min(least if index else 0.0))
            for index, (a, b) in enumerate(zip(call(), exact, strict=True))
        ]
        for name, call in calls.items()
    }
    for name, found in errors.items():
        for index, error in enumerate(found):
            allowed = max(TOLERANCE[dtype], 2 * errors["eager_nchw"][index], 2 * errors["eager_channels_last"][index])
            if not error <= allowed:
                what = "output" if index == 0 else f"gradient {index - 1}"
                raise ResultsDifferError(
                    f"{case.name}, {phase}, {dtype}: {what} of {name!r} is off by {error:.1e} (relative 2-norm, "
                    f"allowed {allowed:.1e}): nothing was timed"
                )
