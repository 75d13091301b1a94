"""What has to hold for any input: advantages, losses, steps."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.advantages.group_relative import group_relative
from trainer.losses.awm import awm
from trainer.losses.common import Loss, velocity_error
from trainer.losses.crd import crd
from trainer.losses.dgpo import dgpo
from trainer.losses.grpo import grpo
from trainer.losses.guard import guard
from trainer.losses.nft import nft
from trainer.policies import flow
from trainer.registry import resolve
from trainer.regularizers.kl import v_kl, x_kl
from trainer.sampling.rollout import noise_seed
from trainer.sampling.windows import window_of

finite = st.floats(-100, 100, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_advantages_never_impute(data: st.DataObject) -> None:
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    count = groups * size
    rewards = torch.tensor(data.draw(st.lists(st.lists(finite, min_size=count, max_size=count), min_size=2, max_size=2)))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=2, max_size=2)))
    group = torch.arange(groups).repeat_interleave(size)
    holes = torch.where(mask, rewards, torch.nan)
    out = group_relative(holes, mask, group, torch.tensor([1.0, 0.5]))
    assert out.values_B.isfinite().all() and out.values_B.abs().max() <= 5
    both = mask.all(0)
    assert not out.weights_B[~both].any() and not out.values_B[~both].any()
    # what stands at a masked place changes nothing
    other = group_relative(torch.where(mask, rewards, 1e6), mask, group, torch.tensor([1.0, 0.5]))
    assert torch.equal(out.values_B, other.values_B)
    order = torch.tensor(data.draw(st.permutations(range(count))))
    moved = group_relative(holes[:, order], mask[:, order], group[order], torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(moved.values_B, out.values_B[order])


def test_equal_rewards_give_exactly_zero() -> None:
    rewards = torch.tensor([[0.1] * 4 + [0.3, 0.1, 0.2, 0.4]], dtype=torch.float64)
    out = group_relative(rewards, torch.ones(1, 8, dtype=torch.bool), torch.tensor([0] * 4 + [1] * 4), torch.ones(1))
    assert out.zero_variance_groups == 1
    assert torch.equal(out.values_B[:4], torch.zeros(4))
    assert out.values_B[4:].abs().min() > 0


def test_weights_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="weights"):
        group_relative(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), torch.zeros(4), torch.zeros(1))


def test_zero_advantage_gives_zero_gradient() -> None:
    logp = torch.randn(8, requires_grad=True)
    grpo(logp, logp.detach() + 0.001, torch.zeros(8), 1e-3, 1e-3).values_B.sum().backward()
    assert logp.grad is not None and not logp.grad.any()
    logp.grad = None
    mean = torch.randn(8, 4)
    guard(logp, logp.detach(), mean, mean, 0.5, 0.3, torch.zeros(8), 1e-3, 1e-3).values_B.sum().backward()
    assert logp.grad is not None and not logp.grad.any()


FORWARD: dict[str, Callable[..., Loss]] = {
    "nft": lambda v, old, x0, noise, t, a, g: nft(v, old, x0, noise, t, a),
    "awm": lambda v, old, x0, noise, t, a, g: awm(velocity_error(v, x0, noise), velocity_error(old, x0, noise), a, 1e-3, 1e-3),
    "dgpo": lambda v, old, x0, noise, t, a, g: dgpo(velocity_error(v, x0, noise), velocity_error(old, x0, noise), a, g),
    "crd": lambda v, old, x0, noise, t, a, g: crd(velocity_error(v, x0, noise), velocity_error(old, x0, noise), a, g),
}


@pytest.mark.parametrize("name", sorted(FORWARD))
def test_losses_on_noised_pictures_follow_the_advantages(name: str) -> None:
    """From the old policy: nothing moves without advantages; with them a step lowers the error of the good ones against the bad."""
    generator = torch.Generator().manual_seed(1)
    x0, noise, old = (torch.randn(4, 1, 4, 4, generator=generator) for _ in range(3))
    t, group = torch.tensor([0.9, 0.6, 0.3, 0.5]), torch.tensor([0, 0, 1, 1])

    def gradient(advantages: torch.Tensor) -> torch.Tensor:
        v = old.clone().requires_grad_()
        FORWARD[name](v, old, x0, noise, t, advantages, group).values_B.sum().backward()
        assert v.grad is not None
        return v.grad

    assert gradient(torch.zeros(4)).abs().max() < 1e-6
    v = old - 1e-3 * gradient(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    change = velocity_error(v, x0, noise) - velocity_error(old, x0, noise)
    assert (change[[0, 2]] < 0).all() and (change[[1, 3]] > 0).all()


def test_the_kl_has_a_real_gradient() -> None:
    v, reference = torch.randn(4, 1, 8, 8, requires_grad=True), torch.randn(4, 1, 8, 8, requires_grad=True)
    v_kl(v, reference).mean().backward()
    torch.testing.assert_close(v.grad, 2 * (v - reference).detach() / 64 / 4)
    assert reference.grad is None
    v.grad = None
    x_kl(v, reference, torch.full((4,), 0.5)).mean().backward()
    assert v.grad is not None and v.grad.abs().max() > 0 and reference.grad is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 8), st.sampled_from(["sde", "dance", "cps"]), st.floats(0.05, 1.0))
def test_a_drawn_step_is_judged_the_same(index: int, kind: str, level: float) -> None:
    generator = torch.Generator().manual_seed(index)
    x, v, z = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3))
    sigmas = torch.linspace(1, 0, 11)
    at = torch.full((3,), index)
    drawn = flow.step(x, v, sigmas, at, level, kind, noise=z)
    judged = flow.step(x, v, sigmas, at, level, kind, prev=drawn.prev)
    assert drawn.logp_B is not None and judged.logp_B is not None
    torch.testing.assert_close(drawn.logp_B, judged.logp_B)


def test_without_noise_every_step_is_the_euler_step() -> None:
    x, v = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    sigmas = torch.linspace(1, 0, 11)
    euler = x + (sigmas[4] - sigmas[3]) * v
    for kind in ("sde", "dance", "cps", "ode"):
        out = flow.step(x, v, sigmas, torch.full((2,), 3), 0.0, kind, noise=torch.zeros_like(x))
        torch.testing.assert_close(out.mean, euler)


def test_a_step_asks_for_noise_or_for_what_to_judge() -> None:
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="exactly one"):
        flow.step(x, x, torch.linspace(1, 0, 3), torch.zeros(1, dtype=torch.long), 0.7, "sde")
    with pytest.raises(ValueError, match="known: sde"):
        flow.step(x, x, torch.linspace(1, 0, 3), torch.zeros(1, dtype=torch.long), 0.7, "sed", noise=x)


@given(st.integers(0, 5), st.integers(0, 1000), st.integers(0, 20))
def test_windows_stay_inside_and_repeat(seed: int, step: int, group: int) -> None:
    window = window_of(seed, step, group, 3, 2, 9)
    assert window.start >= 2 and window.start + window.length <= 9
    assert window == window_of(seed, step, group, 3, 2, 9)


def test_windows_and_noise_differ() -> None:
    assert len({window_of(0, s, 0, 3, 0, 9).start for s in range(50)}) > 3
    assert len({noise_seed(r, s, p, k) for r in range(3) for s in range(3) for p in range(3) for k in range(3)}) == 81
    with pytest.raises(ValueError, match="does not fit"):
        window_of(0, 0, 0, 4, 0, 3)


def test_the_registry_names_what_it_knows() -> None:
    assert resolve("loss", "grpo") is grpo
    with pytest.raises(ValueError, match="did you mean 'grpo'"):
        resolve("loss", "grop")
