"""The losses as functions: derivatives by finite differences in float64, and the choices around them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from trainer.config import FORWARD, LOSS_READS
from trainer.losses.awm import awm, weighted
from trainer.losses.clips import PUBLISHED, clip_range, far_off
from trainer.losses.common import Loss, mean_dims, velocity_error
from trainer.losses.crd import crd
from trainer.losses.dgpo import dgpo
from trainer.losses.dpo import dpo
from trainer.losses.grpo import grpo
from trainer.losses.guard import guard
from trainer.losses.marble import min_norm, mixed, simplex_weights
from trainer.losses.nft import nft, optimality
from trainer.losses.rft import kept, rft
from trainer.registry import REGISTRY
from trainer.regularizers.kl import v_kl, x_kl

A = torch.tensor([1.2, -0.7, 0.4, -1.5], dtype=torch.float64)
TWO = torch.tensor([0, 0, 1, 1])


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 2, 3, 3)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X0, NOISE, OLD, REFERENCE = randn(1), randn(2), randn(3), randn(4)
T = torch.tensor([0.9, 0.6, 0.3, 0.5], dtype=torch.float64)
X = (1 - T.view(-1, 1, 1, 1)) * X0 + T.view(-1, 1, 1, 1) * NOISE


def error(v: Tensor) -> Tensor:
    return velocity_error(v, X0, NOISE)


def logp(mean: Tensor, drawn: Tensor) -> Tensor:
    return -mean_dims((drawn - mean) ** 2) / (2 * 0.5**2)


DRAWN = randn(5)
SMOOTH: dict[str, Callable[[Tensor], Loss]] = {
    # ranges so wide that no sample stands at the edge of the clip
    "grpo": lambda v: grpo(logp(v, DRAWN), logp(OLD, DRAWN), A, 0.999, 1e9),
    "guard": lambda v: guard(logp(v, DRAWN), logp(OLD, DRAWN), v, OLD, 0.7, 0.3, A, 0.999, 1e9),
    "awm": lambda v: awm(weighted(error(v), T, "huber"), weighted(error(OLD), T, "huber"), A, 0.999, 1e9),
    "awm t2": lambda v: awm(weighted(error(v), T, "t2"), weighted(error(OLD), T, "t2"), A, 0.999, 1e9),
    "dpo": lambda v: dpo(error(v)[:2], error(v)[2:], error(REFERENCE)[:2], error(REFERENCE)[2:], beta=2.0),
    "dgpo": lambda v: dgpo(error(v), error(REFERENCE), A, TWO, beta=0.0),  # its weight is not differentiated: here it is a half
    "crd": lambda v: crd(error(v), error(OLD), A, TWO, beta=0.7, largest=3.0),
    "rft": lambda v: rft(error(v)),
    "v_kl": lambda v: Loss(v_kl(v, REFERENCE), {}),
    "x_kl": lambda v: Loss(x_kl(v, REFERENCE, torch.full((4,), 0.6, dtype=torch.float64)), {}),
}


def slope(values: Callable[[Tensor], Tensor], at: Tensor, way: Tensor, by: float = 1e-5) -> float:
    """The derivative of the sum along a direction, by central differences."""
    return float((values(at + by * way).sum() - values(at - by * way).sum()) / (2 * by))


def derivative(values: Callable[[Tensor], Tensor], at: Tensor, way: Tensor) -> float:
    v = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(values(v).sum(), v)
    return float((found * way).sum())


@pytest.mark.parametrize("name", sorted(SMOOTH))
@pytest.mark.parametrize("seed", [11, 12])
def test_derivatives_are_those_of_the_function(name: str, seed: int) -> None:
    def values(v: Tensor) -> Tensor:
        return SMOOTH[name](v).values_B

    v, way = OLD + 0.3 * randn(seed), randn(seed + 10)
    assert values(v).dtype == torch.float64
    assert derivative(values, v, way) == pytest.approx(slope(values, v, way), rel=1e-5, abs=1e-8)
    assert abs(slope(values, v, way)) > 1e-4


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_derivative_of_nft_without_that_of_its_scale(beta: float, sign: float) -> None:
    """The scale is not differentiated: multiplied by it, and divided by what it was, the function itself has the same derivative."""
    certain = sign * torch.full((4,), 5.0, dtype=torch.float64)
    v, way = OLD + 0.3 * randn(13), randn(23)

    def scale(velocity: Tensor) -> Tensor:
        mixed = beta * velocity + (1 - beta) * OLD if sign > 0 else (1 + beta) * OLD - beta * velocity
        return mean_dims((X - T.view(-1, 1, 1, 1) * mixed - X0).abs())

    def values(velocity: Tensor) -> Tensor:
        return nft(velocity, OLD, X0, NOISE, T, certain, beta=beta).values_B

    held = scale(v)
    expected = slope(lambda velocity: values(velocity) * scale(velocity) / held, v, way)
    assert derivative(values, v, way) == pytest.approx(expected, rel=1e-5)


def test_dgpo_weighs_each_group_by_its_own_sigmoid() -> None:
    v = (OLD + 0.3 * randn(14)).requires_grad_()
    (found,) = torch.autograd.grad(dgpo(error(v), error(REFERENCE), A, TWO, beta=50.0).values_B.sum(), v)
    share = 50 * A * (error(v) - error(REFERENCE)).detach() / 2
    weight = torch.sigmoid(torch.stack([share[:2].sum(), share[2:].sum()])).repeat_interleave(2)
    expected = (weight * A).view(-1, 1, 1, 1) * 2 * (v - (NOISE - X0)).detach() / 18
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["grpo", "guard", "awm", "dgpo", "crd", "nft"])
def test_at_zero_advantage_the_old_policy_stays(name: str) -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    at_zero: dict[str, Callable[[Tensor], Loss]] = {
        "grpo": lambda v: grpo(logp(v, DRAWN), logp(OLD, DRAWN), zero, 1e-3, 1e-3),
        "guard": lambda v: guard(logp(v, DRAWN), logp(OLD, DRAWN), v, OLD, 0.7, 0.3, zero, 1e-3, 1e-3),
        "awm": lambda v: awm(error(v), error(OLD), zero, 1e-3, 1e-3),
        "dgpo": lambda v: dgpo(error(v), error(REFERENCE), zero, TWO),
        "crd": lambda v: crd(error(v), error(OLD), zero, TWO),
        "nft": lambda v: nft(v, OLD, X0, NOISE, T, zero),
    }
    v = OLD.clone().requires_grad_()
    (found,) = torch.autograd.grad(at_zero[name](v).values_B.sum(), v)
    assert found.abs().max() < 1e-12


@pytest.mark.parametrize("how, factor", [("uniform", 1.0), ("t", 0.5), ("t2", 0.25)])
def test_errors_are_weighted_by_their_time(how: Any, factor: float) -> None:
    t = torch.tensor([0.5], dtype=torch.float64)
    assert float(weighted(torch.tensor([4.0], dtype=torch.float64), t, how)) == 4 * factor
    assert float(weighted(torch.tensor([4.0], dtype=torch.float64), t, "huber")) == pytest.approx(0.5 * (2 - 1e-5))
    assert float(weighted(torch.zeros(1, dtype=torch.float64), t, "huber")) == pytest.approx(0, abs=1e-12)


finite = st.floats(-3, 3, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6).flatmap(lambda size: st.lists(st.lists(finite, min_size=size, max_size=size), min_size=2, max_size=5)))
@example([[0.0, 0.0], [1.5, -1.25], [-2.0, 1.75]])  # steps of Frank-Wolfe crawl here
def test_min_norm_weights_are_a_minimisers(gradients: list[list[float]]) -> None:
    rows = np.array(gradients)
    count = len(rows)
    gram = torch.from_numpy(rows @ rows.T)
    a = min_norm(gram)
    assert a.min() >= 0 and float(a.sum()) == pytest.approx(1)
    simplex = {"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like}
    theirs = minimize(
        lambda x: x @ gram.numpy() @ x,
        np.full(count, 1 / count),
        jac=lambda x: 2 * gram.numpy() @ x,
        bounds=[(0, 1)] * count,
        constraints=simplex,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    ours, found = float(a @ gram @ a), float(theirs.fun)
    scale = max(float(gram.diagonal().max()), 1e-9)
    assert ours <= found + 1e-7 * scale  # never longer than theirs
    slopes = gram @ a  # and no other mix is shorter: every gradient has at least this much along the mix
    assert float(slopes.min()) >= ours - 1e-8 * scale


def test_weights_of_two_gradients_by_hand() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(min_norm(rows @ rows.T), torch.tensor([0.1, 0.9], dtype=torch.float64))
    torch.testing.assert_close(simplex_weights(rows @ rows.T, unit=False), torch.tensor([0.1, 0.9], dtype=torch.float64))
    by_direction = simplex_weights(rows @ rows.T)
    torch.testing.assert_close(by_direction, torch.tensor([0.25, 0.75], dtype=torch.float64))
    torch.testing.assert_close(by_direction @ rows, torch.tensor([0.75, 0.75], dtype=torch.float64))
    dead = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert simplex_weights(dead @ dead.T).tolist() == [1.0, 0.0], "a reward without a gradient has no say"
    assert simplex_weights(torch.zeros(2, 2)).tolist() == [0.5, 0.5]


@given(st.floats(0, 1), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_nft_is_affine_in_the_optimality_after_its_clipping(share: float, seed: int) -> None:
    rows = 8 * randn(seed, 2, 4)  # beyond the clip too
    weights = torch.tensor([share, 1 - share], dtype=torch.float64)
    v = OLD + 0.3 * randn(seed + 1)
    both = mixed(rows, weights, 5.0)
    torch.testing.assert_close(optimality(both), weights @ optimality(rows))
    apart = sum(w * nft(v, OLD, X0, NOISE, T, row).values_B for w, row in zip(weights, rows, strict=True))
    torch.testing.assert_close(nft(v, OLD, X0, NOISE, T, both).values_B, apart)


def test_the_better_part_of_each_group_is_kept() -> None:
    a = torch.tensor([0.5, -1.0, 2.0, 0.1, 1.0, 1.0, 1.0, 1.0, 0.3, -0.3, 3.0, -3.0])
    w = torch.ones(12)
    assert kept(a, w, 4, share=0.25).nonzero()[:, 0].tolist() == [2, 10], "and none of a group without better ones"
    assert kept(a, w, 4, share=0.5).nonzero()[:, 0].tolist() == [0, 2, 8, 10]
    assert kept(a, w, 4, above=0.2).nonzero()[:, 0].tolist() == [0, 2, 8, 10]
    w[2] = 0
    assert kept(a, w, 4, share=0.25).nonzero()[:, 0].tolist() == [0, 10], "what is not scored is not kept"


def test_every_registered_loss_says_what_it_reads() -> None:
    assert {*REGISTRY["loss"], *REGISTRY["forward_loss"]} == set(LOSS_READS)
    assert set(FORWARD) == set(REGISTRY["forward_loss"])


def test_clip_ranges_have_a_source_and_limits() -> None:
    assert all(0 < value < 1e-2 and source for value, source in PUBLISHED.values())
    assert {name for name, _ in PUBLISHED} == {name for name, reads in LOSS_READS.items() if "clip_low" in reads}
    assert clip_range("nft", "sde", None, None) is None
    with pytest.raises(ValueError, match="does not clip"):
        clip_range("nft", "sde", 1e-4, None)
    with pytest.raises(ValueError, match="sampling.kind=sde"):
        clip_range("guard", "dance", None, None)
    with pytest.raises(ValueError, match=r"clip_high=0\.2"):
        clip_range("grpo", "sde", None, 0.2)
    assert far_off("grpo", "sde", 1e-4, None) == "" == far_off("nft", "sde", None, None) == far_off("grpo", "cps", 1e-3, 1e-3)
    assert "published 1e-05" in far_off("grpo", "cps", 2e-3, 2e-3)
