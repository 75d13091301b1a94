"""What pictures say of rewrites: means over those that were scored, their errors, advantages against the other rewrites of a prompt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.advantages.common import Advantages
from trainer.config import AdvantageConfig
from trainer.language.tree import Tree, rewrite_advantages, worth

NAN = float("nan")
PLAIN = AdvantageConfig().options()


def judged(values_RB: Tensor, tree: Tree, **more: object) -> Advantages:
    rewrites = tree.prompts * tree.rewrites
    given_: dict[str, object] = {
        "mask_RB": values_RB.isfinite(),
        "weights_R": torch.ones(len(values_RB), dtype=torch.float64),
        "costs_N": torch.zeros(rewrites, dtype=torch.float64),
        "masked_N": torch.zeros(rewrites, dtype=torch.bool),
        "use": "group_relative",
        "options": PLAIN,
        **more,
    }
    return rewrite_advantages(values_RB, tree=tree, **given_)  # type: ignore[arg-type]


def test_by_hand() -> None:
    """Two prompts, two rewrites, two pictures: means 1, 3 and 5, 5."""
    out = judged(torch.tensor([[0.0, 2, 3, 3, 4, 6, 5, 5]], dtype=torch.float64), Tree(2, 2, 2))
    assert torch.allclose(out.values_B, torch.tensor([-1.0, 1, 0, 0]), atol=1e-3)
    assert out.zero_variance_groups == 1 and out.dropped_groups == 0 and out.weights_B.tolist() == [1] * 4
    # of the means 1 and 3: half the difference squared times two; of 5 and 5 nothing; the mean variance is 1
    assert out.numbers["0/between"] == pytest.approx(1.0)
    # errors: std 2**.5 / 2**.5 = 1, 0, 1, 0
    assert out.numbers["0/sem"] == pytest.approx(0.5) and out.numbers["0/reliability"] == pytest.approx(0.5)


def test_a_missing_picture_is_no_zero_and_a_rewrite_without_any_counts_nowhere() -> None:
    values = torch.tensor([[10.0, NAN, 12, 14, NAN, NAN]], dtype=torch.float64)
    of = worth(values, values.isfinite(), Tree(1, 3, 2), same_noise=False)
    assert of.means_RN[0, :2].tolist() == [10.0, 13.0] and of.means_RN[0, 2].isnan() and of.counts_RN.tolist() == [[1, 2, 0]]
    assert of.sem_RN[0].isnan().tolist() == [True, False, True] and float(of.sem_RN[0, 1]) == pytest.approx(1.0)
    out = judged(values, Tree(1, 3, 2))
    assert out.weights_B.tolist() == [1, 1, 0] and torch.allclose(out.values_B, torch.tensor([-1.0, 1, 0]), atol=1e-3)


def test_a_picture_counts_when_every_reward_scored_it_unless_told_to_skip() -> None:
    values = torch.tensor([[0.0, 8, 4, 4], [1.0, NAN, 1, 1]], dtype=torch.float64)
    whole = judged(values, Tree(1, 2, 2))
    assert whole.values_B.tolist() == pytest.approx([-0.5, 0.5], abs=1e-3), "of the first rewrite only the 0 is left"
    skipped = judged(values, Tree(1, 2, 2), options=AdvantageConfig(missing="skip").options())
    assert skipped.values_B.tolist() == pytest.approx([0.0, 0.0], abs=1e-6), "0 and 8 against 4 and 4"


def test_what_one_noise_does_to_all_rewrites_is_no_error_of_their_differences() -> None:
    """Pictures k differ by 10, rewrites by exactly 1: the difference is known without error, the means are not."""
    values = torch.tensor([[0.0, 10, 20, 1, 11, 21]], dtype=torch.float64)
    own, same = (worth(values, values.isfinite(), Tree(1, 2, 3), same_noise=same) for same in (False, True))
    assert float(own.sem_RN[0, 0]) == pytest.approx(10 / 3**0.5) and float(same.sem_RN.abs().max()) == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(own.means_RN, same.means_RN)
    assert judged(values, Tree(1, 2, 3), same_noise=True).numbers["0/reliability"] == pytest.approx(1.0)
    assert judged(values, Tree(1, 2, 3)).numbers["0/reliability"] == 0.0


def test_the_error_under_one_noise_is_unbiased() -> None:
    """Over many trees of pure noise the error's square is the variance of a mean, whether the noise is shared or not."""
    torch.manual_seed(0)
    values = torch.randn(1, 4000 * 3 * 4, dtype=torch.float64)
    for same in (False, True):
        sem = worth(values, torch.ones_like(values, dtype=torch.bool), Tree(4000, 3, 4), same).sem_RN
        assert float(sem.square().mean()) == pytest.approx(1 / 4, rel=0.03)


def test_costs_count_against_the_groups_mean_and_masked_rewrites_nowhere() -> None:
    values = torch.tensor([[1.0, 1, 1, 5]], dtype=torch.float64)
    costs = torch.tensor([0.0, 1, 0.5, 9], dtype=torch.float64)
    out = judged(values, Tree(1, 4, 1), costs_N=costs, masked_N=torch.tensor([False, False, False, True]))
    assert out.values_B.tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0]) and out.weights_B.tolist() == [1, 1, 1, 0]
    same = judged(values, Tree(1, 4, 1), costs_N=torch.ones(4, dtype=torch.float64))
    assert torch.allclose(same.values_B, judged(values, Tree(1, 4, 1)).values_B), "what costs all the same teaches nothing"


def test_weights_are_the_rewriters_own() -> None:
    values = torch.tensor([[0.0, 1], [1.0, 0]], dtype=torch.float64)
    only = judged(values, Tree(1, 2, 1), weights_R=torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert only.values_B.tolist() == pytest.approx([1, -1], abs=1e-3) and set(only.numbers) == {"1/between"}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**31), st.floats(0, 3))
def test_advantages_of_a_prompt_add_up_to_nothing_and_ignore_what_is_common(
    p: int, j: int, k: int, seed: int, shift: float
) -> None:
    tree, source = Tree(p, j, k), torch.Generator().manual_seed(seed)
    values = torch.randn(2, p * j * k, generator=source, dtype=torch.float64)
    costs = torch.rand(p * j, generator=source, dtype=torch.float64)
    out = judged(values, tree, costs_N=costs)
    assert out.values_B.view(p, j).sum(1).abs().max() < 1e-4
    moved = judged(values + shift * torch.arange(p).repeat_interleave(j * k), tree, costs_N=costs + shift)
    assert torch.allclose(moved.values_B, out.values_B, atol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 80))
def test_passes_hold_every_rewrite_once_and_submissions_whole_trees(p: int, j: int, k: int, micro: int) -> None:
    tree = Tree(p, j, k)
    several = list(tree.passes(micro))
    assert [n for parts in several for part in parts for n in part] == list(range(p * j))
    for parts in several:
        assert parts[0].start % j == 0 and parts[-1].stop % j == 0, "whole trees are asked about"
        assert all(len(part) * k <= max(micro, k) for part in parts)
    assert len(tree.rewrite_B) == len(tree.prompt_B) == p * j * k
