"""Path sampling: Philox, the same bits from every implementation, the right distributions, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tfnas_ext import sampling
from tfnas_ext.backends import native_module
from tfnas_ext.sampling import (
    FIRST_PATH,
    MIXTURE,
    SECOND_PATH,
    SECOND_PATHS,
    gumbel_softmax_weights,
    sample_paths,
    uniforms,
)

needs_native = pytest.mark.skipif(native_module() is None, reason="native module not built")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
SIGNIFICANCE = 1e-4  # of each chi-square test; seeds are fixed, so a pass stays a pass


def random_case(seed: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a few layers and a mask that leaves each layer at least one candidate."""
    generator = torch.Generator().manual_seed(seed)
    layers, candidates = (int(torch.randint(1, 12, (1,), generator=generator)) for _ in range(2))
    log_alpha = torch.randn(layers, candidates, generator=generator).log_softmax(dim=1)
    valid = torch.rand(layers, candidates, generator=generator) < 0.6
    valid[torch.arange(layers), torch.randint(candidates, (layers,), generator=generator)] = True
    return log_alpha, valid


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_words_that_random123_publishes(
    counter: list[int], key: tuple[int, int], expected: list[int]
) -> None:
    words = sampling._philox4x32_10([torch.tensor([word]) for word in counter], key)
    assert [int(word) for word in words] == expected


def test_portable_log_is_the_logarithm() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.rand(10_000, dtype=torch.float64, generator=generator),
            1 - 2.0 ** -torch.arange(1, 54).double(),
            2.0 ** torch.arange(-60, 60).double(),
            torch.tensor([math.sqrt(0.5), math.nextafter(math.sqrt(0.5), 0)], dtype=torch.float64),
        ]
    )
    torch.testing.assert_close(sampling._portable_log(x), x.log(), rtol=5e-16, atol=0)


@needs_native
@pytest.mark.parametrize(
    ("seed", "step"), [(0, 0), (1, 0), (0, 1), (2**63 - 1, 2**63 - 1), (2**32, 2**32), (12345, 678)]
)
def test_uniforms_are_the_same_bits_from_native_and_reference(seed: int, step: int) -> None:
    for path in (FIRST_PATH, SECOND_PATH, MIXTURE):
        for layers, candidates in ((1, 1), (3, 2), (18, 8), (5, 9)):
            native = uniforms(seed, step, layers, candidates, path, backend="cpu")
            reference = uniforms(seed, step, layers, candidates, path, backend="reference")
            assert native.dtype == torch.float64
            assert torch.equal(native, reference)
            noise = torch.ops.tfnas.gumbel_noise(layers, candidates, seed, step, path, "cpu")
            assert torch.equal(noise, sampling._gumbel(reference))


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniforms_are_uniform_and_independent_of_shape_step_and_path(backend: str) -> None:
    u = uniforms(3, 5, 4000, 8, FIRST_PATH, backend=backend)
    assert u.min() > 0
    assert u.max() < 1
    stats = pytest.importorskip("scipy.stats")
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > SIGNIFICANCE
    # A layer's numbers do not depend on how many layers or candidates are drawn with it.
    assert torch.equal(u[:7, :3], uniforms(3, 5, 7, 3, FIRST_PATH, backend=backend))
    # Neighbouring seeds, steps, paths and candidates are uncorrelated (standard error 1 / sqrt(32000) = 0.0056).
    others = [
        uniforms(4, 5, 4000, 8, FIRST_PATH, backend=backend),
        uniforms(3, 6, 4000, 8, FIRST_PATH, backend=backend),
        uniforms(3, 5, 4000, 8, SECOND_PATH, backend=backend),
        uniforms(3, 5, 4000, 8, MIXTURE, backend=backend),
        u.roll(1, dims=1),
        u.roll(1, dims=0),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1])) < 0.025


@needs_native
@pytest.mark.parametrize("second", SECOND_PATHS)
def test_native_and_reference_choose_the_same(second: str) -> None:
    for case in range(60):
        log_alpha, valid = random_case(case)
        if case % 2:
            log_alpha = log_alpha.double()
        mask = valid if case % 3 else None
        for step in (0, case, 2**40 + case):
            tau = 0.2 + case / 10
            native = sample_paths(log_alpha, tau, case, step, second, mask, backend="cpu")
            reference = sample_paths(log_alpha, tau, case, step, second, mask, backend="reference")
            assert native.dtype == torch.int64
            assert native.shape == (1 if second == "none" else 2, len(log_alpha))
            assert torch.equal(native, reference), f"case {case}, step {step}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second", SECOND_PATHS[1:])
def test_paths_are_valid_and_differ_wherever_they_can(second: str, backend: str) -> None:
    for case in range(40):
        log_alpha, valid = random_case(case)
        choice = sample_paths(log_alpha, 1.0, case, case, second, valid, backend=backend)
        assert valid.gather(1, choice.T).all()
        assert torch.equal(choice[0] != choice[1], valid.sum(dim=1) > 1)


def expected_pairs(log_alpha: Tensor, second: str) -> Tensor:
    """Probability of every (first, second) pair, written down from the definitions: [C, C]."""
    alpha = log_alpha.double().softmax(dim=0)
    pairs = torch.zeros(len(alpha), len(alpha), dtype=torch.float64)
    for i in range(len(alpha)):
        rest = [j for j in range(len(alpha)) if j != i]
        for j in rest:
            if second == "random":
                conditional = 1 / len(rest)
            elif second == "gumbel":
                conditional = float(alpha[j] / alpha[rest].sum())
            else:
                pick = min if second == "min" else max
                conditional = float(j == pick(rest, key=lambda c: float(alpha[c])))
            pairs[i, j] = alpha[i] * conditional
    return pairs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second", SECOND_PATHS[1:])
@pytest.mark.parametrize("tau", [0.2, 5.0])
def test_pairs_follow_their_distribution(second: str, tau: float, backend: str) -> None:
    log_alpha = torch.tensor([0.35, 0.05, 0.2, 0.3, 0.1]).log()
    draws = 20_000
    choice = sample_paths(log_alpha.repeat(draws, 1), tau, 11, 0, second, backend=backend)
    counts = torch.zeros(5, 5, dtype=torch.float64)
    counts.index_put_((choice[0], choice[1]), torch.ones(draws, dtype=torch.float64), accumulate=True)
    expected = expected_pairs(log_alpha, second) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    stats = pytest.importorskip("scipy.stats")
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > SIGNIFICANCE


def test_steps_of_one_layer_follow_the_distribution_too() -> None:
    log_alpha = torch.tensor([[0.5, 0.1, 0.4]]).log()
    first = torch.cat([sample_paths(log_alpha, 1.0, 2, step, "none")[0] for step in range(5000)])
    counts = first.bincount(minlength=3).double()
    stats = pytest.importorskip("scipy.stats")
    assert stats.chisquare(counts, log_alpha[0].double().exp() * 5000).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("second", SECOND_PATHS)
def test_a_single_candidate_runs_in_both_paths(second: str, backend: str) -> None:
    choice = sample_paths(torch.zeros(3, 1), 1.0, 0, 0, second, backend=backend)
    assert choice.tolist() == [[0, 0, 0]] * (1 if second == "none" else 2)
    mask = torch.tensor([[False, False, True], [True, True, True]])
    choice = sample_paths(torch.zeros(2, 3), 1.0, 0, 0, second, mask, backend=backend)
    assert set(choice[:, 0].tolist()) == {2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_and_max_take_the_first_of_equals(backend: str) -> None:
    log_alpha = torch.zeros(200, 4)
    for second in ("min", "max"):
        first, other = sample_paths(log_alpha, 1.0, 1, 2, second, backend=backend)
        assert torch.equal(other, (first == 0).long())


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_log_alpha_is_not_looked_at(backend: str) -> None:
    log_alpha = torch.tensor([[0.0, math.nan, -1.0, -math.inf]])
    mask = torch.tensor([[True, False, True, False]])
    for second in SECOND_PATHS:
        assert set(sample_paths(log_alpha, 1.0, 0, 0, second, mask, backend=backend).flatten().tolist()) <= {0, 2}
    weights = gumbel_softmax_weights(log_alpha, 1.0, 0, 0, mask, backend=backend)
    assert weights[0, 1] == 0
    assert weights[0, 3] == 0
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_arguments(backend: str) -> None:
    log_alpha, valid = random_case(5)
    plain = sample_paths(log_alpha, 1.0, 0, 0, "random", valid, backend=backend)
    strided = sample_paths(log_alpha.T.contiguous().T, 1.0, 0, 0, "random", valid.T.contiguous().T, backend=backend)
    assert torch.equal(plain, strided)


def test_a_parameter_can_be_sampled_from() -> None:
    log_alpha = torch.nn.Parameter(torch.zeros(2, 3))
    assert not sample_paths(log_alpha, 1.0, 0, 0).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_softmax_weights_are_equation_3(dtype: torch.dtype, backend: str) -> None:
    log_alpha, valid = random_case(8)
    log_alpha = log_alpha.to(dtype)
    u = uniforms(21, 4, *log_alpha.shape, MIXTURE, backend="reference")
    exact = ((log_alpha.double() - (-u.log()).log()) / 0.7).masked_fill(~valid, -torch.inf).softmax(dim=1)
    weights = gumbel_softmax_weights(log_alpha, 0.7, 21, 4, valid, backend=backend)
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(log_alpha), dtype=dtype))


def test_gumbel_softmax_weights_differentiate() -> None:
    log_alpha, valid = random_case(8)
    log_alpha = log_alpha.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: gumbel_softmax_weights(a, 0.5, 1, 2, valid), (log_alpha,))
    gumbel_softmax_weights(log_alpha, 0.5, 1, 2, valid)[:, 0].sum().backward()
    assert log_alpha.grad is not None
    assert (log_alpha.grad[~valid] == 0).all()


def test_mixture_noise_is_fresh() -> None:
    log_alpha = torch.zeros(6, 4)
    weights = [gumbel_softmax_weights(log_alpha, 1.0, 0, step) for step in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    first = sample_paths(torch.zeros(500, 8), 1.0, 0, 0, "none")[0]
    heaviest = gumbel_softmax_weights(torch.zeros(500, 8), 1.0, 0, 0).argmax(dim=1)
    assert (first == heaviest).double().mean() < 0.25  # 1 in 8 by chance


@needs_native
def test_operators_pass_opcheck() -> None:
    log_alpha, valid = random_case(2)
    torch.library.opcheck(torch.ops.tfnas.sample_paths.default, (log_alpha, 1.0, 3, 4, "random", valid))
    torch.library.opcheck(
        torch.ops.tfnas.sample_paths.default, (log_alpha, 1.0, 3, 4, "none"), test_utils="test_faketensor"
    )
    torch.library.opcheck(torch.ops.tfnas.uniforms.default, (3, 4, 5, 6, 0))
    torch.library.opcheck(torch.ops.tfnas.gumbel_noise.default, (3, 4, 5, 6, 0, torch.device("cpu")))
    clock, tau = torch.tensor([3, 4]), torch.tensor(2.0, dtype=torch.float64)
    torch.library.opcheck(torch.ops.tfnas.sample_paths_at.default, (log_alpha, tau, clock, "gumbel", valid))
    torch.library.opcheck(torch.ops.tfnas.gumbel_noise_at.default, (3, 4, clock, 0))


NAN_AT = torch.tensor([[0.0, 0.0], [0.0, math.nan]])
BAD_SAMPLES = [
    ({"log_alpha": torch.zeros(3)}, ValueError, r"log_alpha must be \[layers, candidates\], got shape \[3\]"),
    ({"log_alpha": torch.zeros(2, 2, 2)}, ValueError, "log_alpha must be"),
    ({"log_alpha": torch.zeros(0, 2)}, ValueError, r"number of layers must be in \[1, 2\*\*24\], got 0"),
    ({"log_alpha": torch.zeros(2, 0)}, ValueError, "number of candidates"),
    ({"log_alpha": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "log_alpha must be float32 or float64"),
    ({"log_alpha": torch.zeros(2, 2, dtype=torch.bfloat16)}, TypeError, "log_alpha must be float32 or float64"),
    ({"log_alpha": NAN_AT}, ValueError, r"log_alpha\[1, 1\] is nan"),
    ({"log_alpha": torch.full((1, 2), math.inf)}, ValueError, r"log_alpha\[0, 0\] is inf"),
    ({"log_alpha": torch.full((1, 2), -math.inf)}, ValueError, r"log_alpha\[0, 0\] is -inf"),
    ({"tau": 0.0}, ValueError, "tau must be a positive, finite temperature, got 0"),
    ({"tau": -1.0}, ValueError, "tau must be a positive, finite temperature, got -1"),
    ({"tau": math.nan}, ValueError, "tau must be a positive, finite temperature, got nan"),
    ({"tau": math.inf}, ValueError, "tau must be a positive, finite temperature, got inf"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
    ({"seed": 2**63}, ValueError, r"seed must be in \[0, 2\*\*63\)"),
    ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
    ({"step": -1}, ValueError, r"step must be in \[0, 2\*\*63\), got -1"),
    ({"step": 2**63}, ValueError, r"step must be in \[0, 2\*\*63\)"),
    ({"step": True}, TypeError, "step must be an int, got bool"),
    ({"valid_mask": torch.ones(2, 2)}, TypeError, "valid_mask must be bool"),
    (
        {"valid_mask": torch.ones(2, 3, dtype=torch.bool)},
        ValueError,
        r"valid_mask must have log_alpha's shape \[2, 2\]",
    ),
    ({"valid_mask": torch.tensor([[True, False], [False, False]])}, ValueError, "leaves layer 1 without a candidate"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bad", "error", "message"), BAD_SAMPLES)
def test_bad_arguments_are_named(bad: dict[str, object], error: type[Exception], message: str, backend: str) -> None:
    arguments = {"log_alpha": torch.zeros(2, 2), "tau": 1.0, "seed": 0, "step": 0, **bad}
    with pytest.raises(error, match=message):
        sample_paths(**arguments, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        gumbel_softmax_weights(**arguments, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_second_path_and_sizes_are_named(backend: str) -> None:
    with pytest.raises(ValueError, match="second must be one of none, random, gumbel, min, max, got 'best'"):
        sample_paths(torch.zeros(2, 2), 1.0, 0, 0, "best", backend=backend)
    with pytest.raises(ValueError, match=r"number of layers must be in \[1, 2\*\*24\], got 0"):
        uniforms(0, 0, 0, 3, FIRST_PATH, backend=backend)
    with pytest.raises(ValueError, match=r"number of candidates must be in \[1, 2\*\*24\], got -1"):
        uniforms(0, 0, 3, -1, FIRST_PATH, backend=backend)
    with pytest.raises(ValueError, match="path must be 0"):
        uniforms(0, 0, 3, 3, 7, backend=backend)


@needs_native
def test_the_operator_itself_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="seed must be in"):
        torch.ops.tfnas.sample_paths(torch.zeros(2, 2), 1.0, -1, 0, "none")
    with pytest.raises(ValueError, match="step must be in"):
        torch.ops.tfnas.uniforms(2, 2, 0, -1, 0)
    with pytest.raises(ValueError, match="path must be"):
        torch.ops.tfnas.gumbel_noise(2, 2, 0, 0, 3, "cpu")
    with pytest.raises(ValueError, match="number of layers"):
        torch.ops.tfnas.gumbel_noise(2**40, 1, 0, 0, 0, "cpu")
    with pytest.raises(ValueError, match="number of candidates"):
        torch.ops.tfnas.uniforms(1, 2**40, 0, 0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("second", SECOND_PATHS)
def test_the_choice_on_a_gpu_is_the_same_without_a_synchronisation(second: str) -> None:
    for case in range(10):
        log_alpha, valid = random_case(case)
        expected = sample_paths(log_alpha, 0.5, case, 3, second, valid, backend="reference")
        device_alpha, device_valid = log_alpha.cuda(), valid.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            choice = sample_paths(device_alpha, 0.5, case, 3, second, device_valid)
            gumbel_softmax_weights(device_alpha, 0.5, case, 3, device_valid)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(choice.cpu(), expected)
