"""Losses against hand-computed values, finite differences in float64, and zero gradients where there is nothing left to learn."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.fitting.losses import (
    bradley_terry_ties,
    gaussian_ranking,
    hinge,
    orthogonality,
    preference,
    soft_cross_entropy,
    triplet,
)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [one.clone().requires_grad_() for one in inputs]
    return list(torch.autograd.grad(loss(*leaves), leaves))


def test_cross_entropy_by_hand() -> None:
    real = -(0.95 * math.log(sigmoid(1.0)) + 0.05 * math.log(sigmoid(-1.0)))
    made = [-(0.05 * math.log(sigmoid(z)) + 0.95 * math.log(sigmoid(-z))) for z in (0.5, -2.0)]
    assert soft_cross_entropy(t(1.0), t(0.5, -2.0)).item() == pytest.approx((real + sum(made) / 2) / 2)


def test_cross_entropy_is_softmax_over_two_classes() -> None:
    """As RealGen V2 computes it: CrossEntropyLoss with targets (0.95, 0.05) and (0.05, 0.95), index 0 real."""
    real, made, loss = draw(5, 2), draw(7, 2, seed=1), torch.nn.CrossEntropyLoss()
    theirs = (loss(real, t(0.95, 0.05).expand(5, 2)) + loss(made, t(0.05, 0.95).expand(7, 2))) / 2
    ours = soft_cross_entropy(real[:, 0] - real[:, 1], made[:, 0] - made[:, 1])
    torch.testing.assert_close(ours, theirs)


def test_cross_entropy_rests_at_its_targets() -> None:
    rest = math.log(0.95 / 0.05)
    for gradient in gradients(soft_cross_entropy, t(rest, rest), t(-rest)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    beyond = gradients(soft_cross_entropy, t(rest + 1), t(-rest - 1))
    assert beyond[0].item() > 0 > beyond[1].item(), "past the target it pulls back"


def test_hinge_by_hand() -> None:
    assert hinge(t(2.0, 0.5), t(-2.0, 0.0)).item() == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2))
    real, made = gradients(hinge, t(2.0, 0.5), t(-2.0, 0.0))
    assert real.tolist() == [0, -0.25] and made.tolist() == [0, 0.25], "beyond the margin nothing is learned"


def test_preference_by_hand() -> None:
    expected = -(math.log(sigmoid(1.0)) + math.log(sigmoid(-2.5))) / 2
    assert preference(t(3.0, 0.5), t(2.0, 3.0)).item() == pytest.approx(expected)
    better, worse = gradients(preference, t(3.0), t(2.0))
    assert better.item() == pytest.approx(-sigmoid(-1.0)) and worse.item() == pytest.approx(sigmoid(-1.0))
    assert math.isfinite(preference(t(-1e4), t(1e4)).item())


def test_ties_by_hand() -> None:
    def won(d: float, k: float) -> float:
        return math.exp(d) / (math.exp(d) + k)

    d, k = 0.7, 5.0
    tied = 1 - won(d, k) - won(-d, k)
    never, always = torch.tensor([False]), torch.tensor([True])
    assert bradley_terry_ties(t(d), t(0.0), never).item() == pytest.approx(-math.log(won(d, k)))
    assert bradley_terry_ties(t(d), t(0.0), always).item() == pytest.approx(-math.log(tied))
    both = bradley_terry_ties(t(d, d), t(0.0, 0.0), torch.tensor([False, True]), k=3.0).item()
    assert both == pytest.approx(-(math.log(won(d, 3)) + math.log(1 - won(d, 3) - won(-d, 3))) / 2)
    first, second = gradients(lambda a, b: bradley_terry_ties(a, b, always), t(1.5), t(1.5))
    assert first.item() == second.item() == 0, "a tie of equal scores has nothing to learn"
    with pytest.raises(ValueError, match="`preference`"):
        bradley_terry_ties(t(1.0), t(0.0), never, k=1.0)


def test_as_k_nears_1_there_are_no_ties() -> None:
    a, b = draw(6), draw(6, seed=1)
    torch.testing.assert_close(bradley_terry_ties(a, b, torch.zeros(6, dtype=torch.bool), k=1 + 1e-9), preference(a, b))


def test_gaussian_ranking_is_the_expectation() -> None:
    """Against the mean over a dense grid; and against plain preference where nothing is uncertain."""
    for mean, a, b in ((1.0, 0.5, 0.8), (-2.0, 2.0, 1.0), (0.0, 3.0, 3.0)):
        sigma = math.hypot(a, b)
        z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
        density = torch.exp(-0.5 * z.square())
        expected = (torch.nn.functional.softplus(-(mean + sigma * z)) * density).sum() / density.sum()
        assert gaussian_ranking(t(mean), t(a), t(0.0), t(b)).item() == pytest.approx(expected.item(), abs=1e-4)
    a, b = draw(4), draw(4, seed=1)
    torch.testing.assert_close(gaussian_ranking(a, t(0, 0, 0, 0), b, t(0, 0, 0, 0)), preference(a, b))


def test_uncertainty_costs_and_is_learned_away() -> None:
    sure, unsure = (gaussian_ranking(t(3.0), t(s), t(0.0), t(0.1)).item() for s in (0.1, 4.0))
    assert sure < unsure
    assert gradients(lambda s: gaussian_ranking(t(3.0), s, t(0.0), t(0.1)), t(1.0))[0].item() > 0


def test_triplet_by_hand() -> None:
    anchor, near, far = t(1.0, 0.0)[None], t(0.6, 0.8)[None], t(0.8, 0.6)[None] * 3
    assert triplet(anchor, near, far).item() == pytest.approx(0.2 + 0.8 - 0.6)
    assert triplet(anchor, far, near).item() == 0, "0.2 apart is enough"
    assert all(g.abs().max() == 0 for g in gradients(triplet, anchor, t(1.0, 0.0)[None], t(0.0, 1.0)[None]))


def basis(width: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(width, width, seed=seed))[0]


def test_orthogonality_is_the_authors_sum_over_pairs() -> None:
    """Written out with the frozen basis itself, of which only the complement is kept here."""
    q, experts = basis(8), [draw(8, 3, seed=s) for s in (1, 2, 3)]
    frozen, rest = q[:, :5], q[:, 5:]
    all_of = [frozen, *(torch.nn.functional.normalize(e, dim=0) for e in experts)]
    norms = [(a.T @ b).norm() for i, a in enumerate(all_of) for b in all_of[i + 1 :]]
    torch.testing.assert_close(orthogonality(rest, experts), torch.stack(norms).mean())


def test_orthogonal_experts_cost_nothing_and_learn_nothing() -> None:
    q = basis(8)
    experts = [q[:, 5:6] * 2, q[:, 6:7], q[:, 7:] * 0.1]
    assert orthogonality(q[:, 5:], experts).item() == pytest.approx(0, abs=1e-12)
    found = gradients(lambda *e: orthogonality(q[:, 5:], e), *experts)
    assert all(bool(torch.isfinite(g).all()) for g in found)
    exact = torch.eye(6, dtype=torch.float64)
    at_zero = gradients(lambda *e: orthogonality(exact[:, 4:], e), exact[:, 4:5], exact[:, 5:])
    assert all(g.abs().max() == 0 for g in at_zero), "the norm of exactly nothing has a gradient of 0, not NaN"


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        (soft_cross_entropy, [(4,), (3,)]),
        (hinge, [(4,), (3,)]),
        (preference, [(4,), (4,)]),
        (lambda a, b: bradley_terry_ties(a, b, torch.tensor([True, False, True, False])), [(4,), (4,)]),
        (lambda a, s, b, u: gaussian_ranking(a, s.exp(), b, u.exp()), [(4,)] * 4),
        (triplet, [(4, 5)] * 3),
        (lambda *e: orthogonality(basis(6)[:, 4:], e), [(6, 2)] * 3),
    ],
)
def test_gradients_are_finite_differences(loss: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    inputs = [draw(*shape, seed=i + 10).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(loss, inputs)
