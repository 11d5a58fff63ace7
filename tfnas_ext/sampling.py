"""Which candidate runs in each layer: the paths of bi-sampling and the Gumbel-softmax weights (paper, Sec. 3.3, Eq. 3).

All noise is counter-based: Philox4x32-10 keyed by (seed, step, layer, path). The same numbers come from C++, from plain
PyTorch on any device and on every process, in any order, and a resumed search needs to know its step only.

The second path of a step is drawn from the operations that the first did not take (Table 3). In a layer with a single
usable candidate there is nothing else to draw, and both paths run it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfnas_ext.backends import choose_backend

SECOND_PATHS = ("none", "random", "gumbel", "min", "max")

# The streams of one step: what a number is drawn for.
FIRST_PATH, SECOND_PATH, MIXTURE = 0, 1, 2

_MASK32 = 0xFFFFFFFF
_MAX_LAYERS = 1 << 24


def uniforms(seed: int, step: int, layers: int, candidates: int, path: int, *, backend: str | None = None) -> Tensor:
    """Independent uniform numbers, one per layer and candidate.

    Args:
        seed: run's seed, in [0, 2**63).
        step: step of the search, in [0, 2**63).
        layers: L.
        candidates: C.
        path: `FIRST_PATH`, `SECOND_PATH` or `MIXTURE`, for independent numbers in one step.
        backend: `cpu`, `reference` or None (the fastest); all give the same bits.

    Returns:
        float64 [L, C] on the CPU, in the open interval (0, 1).
    """
    _check_counter(seed, step)
    _check_size(layers, candidates, path)
    if choose_backend("cpu", backend) == "reference":
        return _uniforms(seed, step, layers, candidates, path, torch.device("cpu"))
    return torch.ops.tfnas.uniforms(layers, candidates, seed, step, path)


def sample_paths(
    log_alpha: Tensor,
    tau: float,
    seed: int,
    step: int,
    second: str = "random",
    valid_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Draws the candidate of every layer for one path or two, in one call and without a synchronisation on a GPU.

    The first path takes the largest of (log_alpha + Gumbel noise) / tau, which is the candidate with the largest weight
    in Eq. 3: candidate i comes with probability alpha_i, whatever `tau` is. The second path, from the other candidates:
    `random` each as likely; `gumbel` as the first path, with fresh noise; `min` and `max` the smallest and the largest
    log_alpha (ties: the first); `none` no second path.

    Args:
        log_alpha: float32 or float64 [L, C], log-probabilities (a constant per layer added to them changes nothing).
        tau: temperature, positive.
        seed: run's seed, in [0, 2**63).
        step: step of the search, in [0, 2**63).
        second: how the second path is drawn.
        valid_mask: bool [L, C], the candidates that each layer has; None: all of them. Values of `log_alpha` elsewhere
            are not looked at.
        backend: `cpu`, `cuda`, `reference` or None (the fastest); all give the same choice.

    Returns:
        int64 [2, L], or [1, L] for `none`, on log_alpha's device.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong shape or dtype. On the CPU also where a
            valid log_alpha is not finite or a layer has no valid candidate; on a GPU these are not read back.
    """
    _check_counter(seed, step)
    _check_tau(tau)
    if choose_backend(log_alpha.device, backend) == "reference":
        return _sample_paths(log_alpha.detach(), tau, seed, step, second, valid_mask)
    return torch.ops.tfnas.sample_paths(log_alpha.detach(), tau, seed, step, second, valid_mask)


def sample_paths_at(
    log_alpha: Tensor,
    tau: Tensor,
    clock: Tensor,
    second: str = "random",
    valid_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`sample_paths` where temperature, seed and step lie on log_alpha's device: a captured step draws new paths.

    Args:
        log_alpha, second, valid_mask, backend: as for `sample_paths`.
        tau: float64 0-d, positive.
        clock: int64 [2], (seed, step).

    Returns, raises: as `sample_paths`; values on a GPU are not read back.
    """
    _check_stored(clock, tau, log_alpha.device)
    if choose_backend(log_alpha.device, backend) == "reference":
        return _sample_paths(log_alpha.detach(), tau, clock[0], clock[1], second, valid_mask)
    return torch.ops.tfnas.sample_paths_at(log_alpha.detach(), tau, clock, second, valid_mask)


def gumbel_softmax_weights(
    log_alpha: Tensor,
    tau: float,
    seed: int,
    step: int,
    valid_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The mixture's weights u = softmax((log_alpha + g) / tau) of Eq. 3, with fresh Gumbel noise g for this step.

    Args:
        log_alpha: float32 or float64 [L, C], log-probabilities.
        tau, seed, step, valid_mask, backend: as for `sample_paths`.

    Returns:
        [L, C] of log_alpha's dtype on its device, rows summing to 1, zero where `valid_mask` is False. Differentiable
        with respect to `log_alpha`; the noise is a constant.

    Raises:
        ValueError, TypeError: as for `sample_paths`.
    """
    _check_alpha(log_alpha, valid_mask)
    _check_tau(tau)
    _check_counter(seed, step)
    layers, candidates = log_alpha.shape
    if choose_backend(log_alpha.device, backend) == "reference":
        noise = _gumbel(_uniforms(seed, step, layers, candidates, MIXTURE, log_alpha.device))
    else:
        noise = torch.ops.tfnas.gumbel_noise(layers, candidates, seed, step, MIXTURE, log_alpha.device)
    return _gumbel_softmax(log_alpha, noise, tau, valid_mask)


def gumbel_softmax_weights_at(
    log_alpha: Tensor,
    tau: Tensor,
    clock: Tensor,
    valid_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`gumbel_softmax_weights` where temperature, seed and step lie on the device, as for `sample_paths_at`."""
    _check_alpha(log_alpha, valid_mask, values=False)
    _check_stored(clock, tau, log_alpha.device)
    layers, candidates = log_alpha.shape
    if choose_backend(log_alpha.device, backend) == "reference":
        noise = _gumbel(_uniforms(clock[0], clock[1], layers, candidates, MIXTURE, log_alpha.device))
    else:
        noise = torch.ops.tfnas.gumbel_noise_at(layers, candidates, clock, MIXTURE)
    return _gumbel_softmax(log_alpha, noise, tau.to(log_alpha.dtype), valid_mask)


def _gumbel_softmax(log_alpha: Tensor, noise: Tensor, tau: float | Tensor, valid_mask: Tensor | None) -> Tensor:
    scores = (log_alpha + noise.to(log_alpha.dtype)) / tau
    if valid_mask is not None:
        scores = scores.masked_fill(~valid_mask, -torch.inf)
    return torch.softmax(scores, dim=1)


# The executable specification, in plain PyTorch. It mirrors csrc/kernels/sampling.cuh operation by operation.


def _philox4x32_10(counter: list[Tensor], key: tuple[int | Tensor, int | Tensor]) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    key0, key1 = key
    for _ in range(10):
        # The products wrap around as signed 64-bit numbers; masking the shifted word gives the unsigned high half.
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        high_a, high_b = (a >> 32) & _MASK32, (b >> 32) & _MASK32
        counter = [high_b ^ counter[1] ^ key0, b & _MASK32, high_a ^ counter[3] ^ key1, a & _MASK32]
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return counter


def _uniforms(
    seed: int | Tensor, step: int | Tensor, layers: int, candidates: int, path: int, device: torch.device
) -> Tensor:
    pairs = (candidates + 1) // 2
    pair = torch.arange(pairs, device=device).repeat(layers, 1)
    layer = torch.arange(layers, device=device).unsqueeze(1).expand(layers, pairs) | (path << 24)
    low, high = torch.zeros_like(pair) + (step & _MASK32), torch.zeros_like(pair) + (step >> 32)
    word = _philox4x32_10([pair, layer, low, high], (seed & _MASK32, seed >> 32))
    # 52 random bits k of a pair of words give (k + 1/2) 2^-52, exact in float64.
    bits = torch.stack([(word[1] << 20) | (word[0] >> 12), (word[3] << 20) | (word[2] >> 12)], dim=2)
    return (bits.flatten(1)[:, :candidates].double() + 0.5) * 2.0**-52


def _portable_log(x: Tensor) -> Tensor:
    """Natural logarithm of positive float64, rounded the same everywhere; see csrc/kernels/sampling.cuh."""
    m, exponent = torch.frexp(x)
    small = m < 0.70710678118654757
    m = torch.where(small, m * 2.0, m)
    exponent = exponent - small.to(exponent.dtype)
    f = (m - 1.0) / (m + 1.0)
    f2 = f * f
    series = torch.zeros_like(f)
    for n in range(21, 2, -2):
        series = f2 * (series + 1.0 / n)
    log_m = 2.0 * f + (2.0 * f) * series
    return exponent.double() * 0.69314718055994531 + log_m


def _gumbel(uniform: Tensor) -> Tensor:
    return -_portable_log(-_portable_log(uniform))


def _argmax(scores: Tensor, usable: Tensor) -> Tensor:
    """Index of the first largest usable score of each row."""
    scores = scores.masked_fill(~usable, -torch.inf)
    largest = scores == scores.amax(dim=1, keepdim=True)
    return (largest & usable).to(torch.int8).argmax(dim=1)


def _sample_paths(
    log_alpha: Tensor,
    tau: float | Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    second: str,
    valid_mask: Tensor | None,
) -> Tensor:
    _check_alpha(log_alpha, valid_mask, values=isinstance(tau, float | int))
    if second not in SECOND_PATHS:
        raise ValueError(f"second must be one of {', '.join(SECOND_PATHS)}, got {second!r}")
    layers, candidates = log_alpha.shape
    device = log_alpha.device
    scores = log_alpha.double()
    usable = torch.ones_like(scores, dtype=torch.bool) if valid_mask is None else valid_mask

    def gumbel_choice(path: int, usable: Tensor) -> Tensor:
        noise = _gumbel(_uniforms(seed, step, layers, candidates, path, device))
        return _argmax((scores + noise) / tau, usable)

    first = gumbel_choice(FIRST_PATH, usable)
    if second == "none":
        return first.unsqueeze(0)
    rest = usable & (torch.arange(candidates, device=device) != first.unsqueeze(1))
    if second == "gumbel":
        other = gumbel_choice(SECOND_PATH, rest)
    elif second == "random":
        left = rest.sum(dim=1)
        u = _uniforms(seed, step, layers, 1, SECOND_PATH, device)[:, 0]
        skip = torch.minimum((u * left).long(), left - 1)  # u * left may round up to left
        other = ((rest.cumsum(dim=1) == (skip + 1).unsqueeze(1)) & rest).to(torch.int8).argmax(dim=1)
    else:
        other = _argmax(scores if second == "max" else -scores, rest)
    return torch.stack([first, torch.where(rest.any(dim=1), other, first)])


def _check_counter(seed: int, step: int) -> None:
    for name, value in (("seed", seed), ("step", step)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not 0 <= value < 1 << 63:
            raise ValueError(f"{name} must be in [0, 2**63), got {value}")


def _check_stored(clock: Tensor, tau: Tensor, device: torch.device) -> None:
    for name, tensor, shape, dtype in (("clock", clock, (2,), torch.int64), ("tau", tau, (), torch.float64)):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be {dtype} {list(shape)} on {device}, got {got}")


def _check_size(layers: int, candidates: int, path: int) -> None:
    for name, value in (("layers", layers), ("candidates", candidates)):
        if not 1 <= value <= _MAX_LAYERS:
            raise ValueError(f"the number of {name} must be in [1, 2**24], got {value}")
    if path not in (FIRST_PATH, SECOND_PATH, MIXTURE):
        raise ValueError(f"path must be 0 (first), 1 (second) or 2 (mixture), got {path}")


def _check_tau(tau: float) -> None:
    if not 0.0 < tau < float("inf"):
        raise ValueError(f"tau must be a positive, finite temperature, got {tau}")


def _check_alpha(log_alpha: Tensor, valid_mask: Tensor | None, values: bool = True) -> None:
    if log_alpha.dim() != 2:
        raise ValueError(f"log_alpha must be [layers, candidates], got shape {list(log_alpha.shape)}")
    if log_alpha.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"log_alpha must be float32 or float64, got {log_alpha.dtype}")
    layers, candidates = log_alpha.shape
    _check_size(layers, candidates, MIXTURE)
    if valid_mask is not None:
        if valid_mask.dtype != torch.bool:
            raise TypeError(f"valid_mask must be bool, got {valid_mask.dtype}")
        if valid_mask.shape != log_alpha.shape:
            expected, got = list(log_alpha.shape), list(valid_mask.shape)
            raise ValueError(f"valid_mask must have log_alpha's shape {expected}, got {got}")
        if valid_mask.device != log_alpha.device:
            raise ValueError(f"valid_mask must be on {log_alpha.device} as log_alpha is, got {valid_mask.device}")
    if not values or log_alpha.device.type != "cpu":
        return  # looking at values would wait for the device
    usable = torch.ones_like(log_alpha, dtype=torch.bool) if valid_mask is None else valid_mask
    broken = (usable & ~torch.isfinite(log_alpha)).nonzero()
    if len(broken):
        layer, candidate = broken[0].tolist()
        raise ValueError(
            f"log_alpha[{layer}, {candidate}] is {log_alpha[layer, candidate].item()}; "
            "every valid candidate needs a finite log-probability"
        )
    empty = (~usable.any(dim=1)).nonzero()
    if len(empty):
        raise ValueError(f"valid_mask leaves layer {empty[0].item()} without a candidate")
