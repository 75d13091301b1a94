"""From rewards to advantages: what every rule keeps to, each formula by hand and against the authors' code, maps, gates, GARDO."""

import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.schema import RewardInfo
from trainer.advantages import transforms
from trainer.advantages.aggregate import aggregate, check, features_for, gate_of
from trainer.advantages.common import Advantages
from trainer.config import READS, AdvantageConfig, ConfigError, Rule, RunConfig, validate
from trainer.registry import REGISTRY, resolve
from trainer.regularizers import gardo
from trainer.scoring import Rewards

FILE = Path(os.environ.get("VERISM_VECTORS", Path(__file__).parents[2] / "data" / "reference_vectors.npz"))
FEATURES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5], [0.3, -1.0], [1.0, 2.0], [2.0, 1.0], [0.1, 0.1]])


def diverse(rewards: Tensor, mask: Tensor, group: Tensor, weights: Tensor, **options: Any) -> Advantages:
    """GARDO's rule as the others are called, with features that depend on the first reward's bits alone."""
    first = torch.nan_to_num(rewards[0], nan=0.0).double()
    features = torch.stack([torch.cos(5 * first), torch.sin(5 * first), torch.sin(31 * first) + 0.1], 1)
    return gardo.diverse(rewards, mask, group, weights, features, **options)


RULES: dict[str, Callable[..., Advantages]] = {name: resolve("advantages", name) for name in REGISTRY["advantages"]}
ALL = {**RULES, "gardo": diverse}
LOOKS_AT_THE_BATCH = ("gdpo", "log_tame")
NEVER_ZERO = ("rwr",)  # the reward itself: equal ones are equal, not 0


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards in [0, 1] on a coarse grid (so that ties happen), with holes; groups in any order; weights, the first above 0."""
    groups, size, rewards = draw(st.integers(1, 4)), draw(st.integers(2, 5)), draw(st.integers(2, 3))
    count = groups * size
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    values = torch.from_numpy(rng.integers(0, draw(st.integers(1, 40)) + 1, (rewards, count)) / 40.0)
    mask = torch.from_numpy(rng.random((rewards, count)) < draw(st.sampled_from([1.0, 0.8, 0.4])))
    group = torch.from_numpy(rng.permutation(np.repeat(np.arange(groups), size)))
    weights = torch.tensor([1.0, 0.5, 0.0][:rewards], dtype=torch.float64)
    return torch.where(mask, values, torch.nan), mask, group, weights


@pytest.mark.parametrize("name", sorted(ALL))
@settings(max_examples=25, deadline=None)
@given(case=cases(), seed=st.integers(0, 1000))
def test_what_every_rule_keeps_to(name: str, case: tuple[Tensor, ...], seed: int) -> None:
    rewards, mask, group, weights = case
    rule, count = ALL[name], rewards.shape[1]
    out = rule(rewards, mask, group, weights)
    scored = mask[weights > 0].all(0)
    assert out.values_B.dtype == torch.float32 and out.values_B.isfinite().all() and float(out.values_B.abs().max()) <= 5
    assert not out.weights_B[~scored].any() and not out.values_B[out.weights_B == 0].any()
    assert set(out.weights_B.tolist()) <= {0.0, 1.0}
    assert float(rule(rewards, mask, group, weights, clip=0.25).values_B.abs().max()) <= 0.25
    # members in another order, and ranks' groups under other numbers
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    moved = rule(rewards[:, order], mask[:, order], 7 - group[order], weights)
    torch.testing.assert_close(moved.values_B, out.values_B[order], rtol=1e-4, atol=1e-5)
    assert torch.equal(moved.weights_B, out.weights_B[order])
    # whoever is masked has left: nobody else notices what stood there
    left = rule(rewards[:, scored], mask[:, scored], group[scored], weights) if bool(scored.any()) else out
    if bool(scored.any()):
        torch.testing.assert_close(left.values_B, out.values_B[scored], rtol=1e-6, atol=1e-7)
    junk = torch.where(scored, rewards, 1e6)
    assert torch.equal(rule(junk, mask, group, weights).values_B, out.values_B) or name == "gardo"
    # equal rewards are exactly 0
    same = torch.where(group == 0, rewards[:, :1].nan_to_num(0.3), rewards)
    zero = rule(same, mask | (group == 0), group, weights)
    if name not in NEVER_ZERO:
        assert not zero.values_B[group == 0].any()
        assert zero.zero_variance_groups >= (1 if int((group == 0).sum()) > 1 else 0)
    if name not in LOOKS_AT_THE_BATCH:
        alone = rule(rewards[:, group == 0], mask[:, group == 0], group[group == 0], weights)
        torch.testing.assert_close(alone.values_B, out.values_B[group == 0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(ALL))
def test_nothing_scored_and_nothing_weighed(name: str) -> None:
    nothing = torch.full((2, 4), torch.nan)
    out = ALL[name](nothing, torch.zeros(2, 4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), torch.ones(2))
    assert not out.values_B.any() and not out.weights_B.any() and out.dropped_groups == 1
    with pytest.raises(ValueError, match="weights"):
        ALL[name](torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), torch.zeros(2))


def test_the_configuration_knows_the_rules_and_what_they_read() -> None:
    assert set(get_args(Rule)) == set(REGISTRY["advantages"]) == set(READS)
    for name, keys in READS.items():
        inner = RULES["best_worst"] if name == "best" else RULES[name]
        taken = {k for k, p in inspect.signature(inner).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        assert taken - {"eps", "clip", "min_valid", "base", "worst"} == set(keys), name
        assert AdvantageConfig(use=name).options().keys() == {"eps", "clip", "min_valid", *keys}  # type: ignore[arg-type]


# By hand: four members, one group, population deviation

ONE = torch.zeros(4, dtype=torch.long)
GIVEN = torch.ones(2, 4, dtype=torch.bool)


def z(*values: float) -> list[float]:
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / (std + 1e-4) for v in values]


def test_a_product_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.5, 0.5, 0.0], [0.25, 1.0, 0.25, 1.0]])
    out = RULES["product"](rewards, GIVEN, ONE, torch.tensor([1.0, 0.5]))
    assert out.values_B.tolist() == pytest.approx(z(0.5, 0.5, 0.25, 0.0), abs=1e-6)  # u1 * sqrt(u2)
    with pytest.raises(ValueError, match=r"rewards\.NAME\.map"):
        RULES["product"](rewards * 2, GIVEN, ONE, torch.ones(2))


def test_base_and_bonus_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.5, 0.25, 0.0], [0.0, 1.0, 1.0, 1.0]])
    rule = RULES["base_bonus"]
    out = rule(rewards, GIVEN, ONE, torch.ones(2))
    assert out.values_B.tolist() == pytest.approx(z(0.4, 0.5, 0.25, 0.0), abs=1e-6)  # FIRM: ins * (0.4 + 0.6 q)
    guarded = rule(rewards, GIVEN, ONE, torch.ones(2), base_share=0.6, base_guard=0.25)  # its editing: exec <= 2 of 5 is 0.6 * exec
    assert guarded.values_B.tolist() == pytest.approx(z(0.6, 0.5, 0.15, 0.0), abs=1e-6)
    turned = rule(rewards.flip(0), GIVEN, ONE, torch.ones(2), base=1)
    assert torch.equal(turned.values_B, out.values_B)
    three = torch.cat([rewards, torch.tensor([[1.0, 0.0, 0.0, 0.5]])])
    mean = rule(three, torch.ones(3, 4, dtype=torch.bool), ONE, torch.tensor([1.0, 3.0, 1.0]))
    assert mean.values_B.tolist() == pytest.approx(z(0.4 + 0.6 * 0.25, 0.5 * (0.4 + 0.6 * 0.75), 0.25 * 0.85, 0.0), abs=1e-6)
    with pytest.raises(ValueError, match="role=bonus"):
        rule(rewards, GIVEN, ONE, torch.tensor([1.0, 0.0]))


def test_taming_by_hand() -> None:
    wild, calm = [0.0, 0.0, 0.0, 8.0], [1.0, 1.1, 0.9, 1.0]
    out = RULES["log_tame"](torch.tensor([wild, calm]), GIVEN, ONE, torch.ones(2))
    assert out.numbers == {"tamed_rewards": 1.0}  # h is 1.73 and 0.07, their mean 0.9
    expected = z(*(math.log1p(w) + c for w, c in zip(wild, calm, strict=True)))
    assert out.values_B.tolist() == pytest.approx(expected, abs=1e-5)
    kept = RULES["log_tame"](torch.tensor([wild, calm]), GIVEN, ONE, torch.ones(2), tame_above=2.0)
    assert kept.values_B.tolist() == pytest.approx(z(*(w + c for w, c in zip(wild, calm, strict=True))), abs=1e-5)
    with pytest.raises(ValueError, match="turned round where lower is better"):
        RULES["log_tame"](torch.tensor([[-1.0, 0.0, 1.0, 2.0], calm]), GIVEN, ONE, torch.ones(2))


def test_best_and_worst_by_hand() -> None:
    rewards = torch.tensor([[3.0, 1.0, 2.0, 3.0], [0.0] * 4])
    assert RULES["best_worst"](rewards, GIVEN, ONE, torch.ones(2)).values_B.tolist() == [0.5, -1.0, 0.0, 0.5]
    assert RULES["best"](rewards, GIVEN, ONE, torch.ones(2)).values_B.tolist() == [0.5, 0.0, 0.0, 0.5]
    uneven = torch.tensor([[100.0, 0.0, 90.0, 0.0], [0.0, 1.0, 0.9, 0.0]])  # by sums the first reward decides, by z-scores both do
    assert RULES["best_worst"](uneven, GIVEN, ONE, torch.ones(2)).values_B.argmax() == 2
    summed = RULES["best_worst"](uneven, GIVEN, ONE, torch.ones(2), combine="sum_then_normalize")
    assert summed.values_B.tolist() == [1.0, 0.0, 0.0, -1.0]


def test_other_deviations_and_missing_rewards_by_hand() -> None:
    """TRL's choices: n - 1, no deviation at all, and a sum over the rewards that a sample has."""
    one = torch.tensor([[0.0, 1.0, 2.0, 5.0]])
    args = one, torch.ones(1, 4, dtype=torch.bool), ONE, torch.ones(1)
    rule = RULES["group_relative"]
    assert rule(*args, std="none").values_B.tolist() == [-2.0, -1.0, 0.0, 3.0]
    deviation = math.sqrt(14 / 3) + 1e-4
    assert rule(*args, ddof=1).values_B.tolist() == pytest.approx([-2 / deviation, -1 / deviation, 0.0, 3 / deviation])
    assert RULES["gdpo"](*args, ddof=1).values_B.tolist() == pytest.approx(
        [-2 / deviation, -1 / deviation, 0.0, 3 / deviation], abs=1e-4
    )
    rewards = torch.tensor([[0.0, 4.0, math.nan, math.nan], [1.0, math.nan, 3.0, math.nan]])
    holes = rewards, ~rewards.isnan(), ONE, torch.tensor([1.0, 2.0])
    assert not rule(*holes).weights_B.any(), "one sample alone has both"
    summed = rule(*holes, missing="skip", std="none", combine="sum_then_normalize")  # 2, 4 and 6; the last has none
    assert summed.values_B.tolist() == [-2.0, 0.0, 2.0, 0.0] and summed.weights_B.tolist() == [1, 1, 1, 0]
    each = rule(*holes, missing="skip", std="none")  # -2 2 . . and -1 . 1 ., weighed 1 and 2
    assert each.values_B.tolist() == pytest.approx([-4 / 3, 2 / 3, 2 / 3, 0.0]) and each.weights_B.tolist() == [1, 1, 1, 0]
    alone = torch.tensor([[1.0, math.nan, math.nan, math.nan], [math.nan, 2.0, math.nan, math.nan]])
    none = rule(alone, ~alone.isnan(), ONE, torch.ones(2), missing="skip")
    assert not none.weights_B.any() and none.dropped_groups == 1, "nothing to compare with"
    flat = RULES["gdpo"](torch.ones(2, 4), ~rewards.isnan(), ONE, torch.ones(2), missing="skip")
    assert not flat.values_B.any() and flat.zero_variance_groups == 1 and flat.dropped_groups == 0


@settings(max_examples=25, deadline=None)
@given(case=cases(), use=st.sampled_from(["group_relative", "gdpo"]), ddof=st.integers(0, 1))
def test_where_nothing_is_missing_skipping_changes_nothing(case: tuple[Tensor, ...], use: str, ddof: int) -> None:
    rewards, mask, group, weights = case
    whole = mask.all(0)
    if bool(whole.any()):
        args = rewards[:, whole], mask[:, whole], group[whole], weights
        plain, skipping = (RULES[use](*args, ddof=ddof, missing=missing) for missing in ("mask", "skip"))
        torch.testing.assert_close(plain.values_B, skipping.values_B, rtol=1e-6, atol=1e-7)
        assert torch.equal(plain.weights_B, skipping.weights_B)
        assert (plain.zero_variance_groups, plain.dropped_groups) == (skipping.zero_variance_groups, skipping.dropped_groups)


# Against the authors' code


@pytest.fixture(scope="module")
def vectors() -> Any:
    with np.load(FILE, allow_pickle=False) as file:
        return {key: file[key] for key in file.files if "adv" in key}


def test_flow_factory(vectors: Any) -> None:
    rewards = torch.from_numpy(np.stack([vectors["ffadv_r1"], vectors["ffadv_r2"]]))
    group, weights = torch.from_numpy(vectors["ffadv_group_id"]), torch.tensor([1.0, 0.25], dtype=torch.float64)
    args = rewards, torch.ones_like(rewards, dtype=torch.bool), group, weights
    options: dict[str, Any] = {"eps": 1e-12, "clip": 1e9}  # theirs is max(std, 1e-6), far below these deviations
    for std in ("group", "global"):
        out = RULES["group_relative"](*args, combine="sum_then_normalize", std=std, **options)
        np.testing.assert_allclose(out.values_B, vectors[f"ffadv_sum_{std}std"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(RULES["gdpo"](*args, **options).values_B, vectors["ffadv_gdpo"], rtol=1e-5, atol=1e-6)


def test_flow_grpos_other_modes(vectors: Any) -> None:
    rewards, group = torch.from_numpy(vectors["adv_rewards"])[None], torch.from_numpy(vectors["adv_group_id"])
    args = rewards, torch.ones_like(rewards, dtype=torch.bool), group, torch.ones(1)
    differ = group != 4  # that group's rewards are all equal: the code there names one best all the same, ours none
    several = group != 3  # and this one has a single member
    np.testing.assert_allclose(RULES["rwr"](*args, min_valid=1).values_B, vectors["adv_rwr_groupstd"], rtol=1e-5, atol=1e-6)
    both = (differ & several).numpy()
    np.testing.assert_array_equal(RULES["best"](*args).values_B[both], vectors["adv_sft_groupstd"][both])
    np.testing.assert_array_equal(RULES["best_worst"](*args).values_B[both], vectors["adv_dpo_groupstd"][differ[several]])


# Maps, gates, trust


def test_maps() -> None:
    values = torch.tensor([1.0, 3.0, 5.0, 9.0])
    assert transforms.affine(values, 1, 5).tolist() == [0.0, 0.5, 1.0, 1.0]
    assert transforms.affine(values, 5, 1).tolist() == [1.0, 0.5, 0.0, 0.0]
    assert transforms.sigmoid(values, 3, 2).tolist() == pytest.approx(
        [1 / (1 + math.e), 0.5, 1 / (1 + 1 / math.e), 0.952574], abs=1e-6
    )
    assert transforms.sigmoid(values, 3, -2)[0] > 0.5


def test_a_gate_gives_the_worst_of_the_group_or_masks() -> None:
    rewards = torch.tensor([[5.0, 1.0, 2.0, 7.0, 8.0, 9.0]])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    passes = torch.tensor([False, True, True, False, False, False])
    known = torch.tensor([True, True, True, True, True, False])
    given = torch.ones(1, 6, dtype=torch.bool)
    values, mask = transforms.gate(rewards, given, group, passes, known, "worst")
    assert values.tolist() == [[1.0, 1.0, 2.0, 7.0, 7.0, 9.0]] and mask.tolist() == [known.tolist()]
    values, mask = transforms.gate(rewards, given, group, passes, known, "mask")
    assert values.tolist() == rewards.tolist() and mask.tolist() == [[False, True, True, False, False, False]]
    assert rewards[0, 0] == 5.0, "what was given stays as it was"


def test_trust() -> None:
    assert transforms.trusted(torch.tensor([2.0, -2.0, 0.0]), torch.tensor([0.0, 1.0, 9.0])).tolist() == pytest.approx(
        [2.0, -2.0 / math.e, 0.0]
    )


# All together


class Services:
    """What `aggregate` asks of a Scorer, without services."""

    def __init__(self, config: RunConfig, **infos: Any) -> None:
        self.names = tuple(config.rewards)
        self.infos = {name: RewardInfo(name=name, **infos.get(name, {})) for name in self.names}
        self.signs_R = torch.tensor([1.0 if self.infos[n].higher_is_better else -1.0 for n in self.names], dtype=torch.float64)
        self.weights_R = torch.tensor([r.weight for r in config.rewards.values()], dtype=torch.float64)


def config(rewards: dict[str, Any], **more: Any) -> RunConfig:
    base = {
        "name": "x",
        "policy": {"use": "sd3", "path": "p"},
        "prompts": {"train": "t", "eval": "e"},
        "rewards": {name: {"url": "http://127.0.0.1:1", **options} for name, options in rewards.items()},
        "eval": {"monitors": "world/monitors"},
        "group": {"size": 4},
    }
    return validate({**base, **more}, "x")


def given_rewards(*rows: list[float], uncertainty: dict[str, Tensor] | None = None) -> Rewards:
    values = torch.tensor(rows, dtype=torch.float64)
    return Rewards(values, values.isfinite(), {}, {}, uncertainty=uncertainty or {})


def run(config: RunConfig, rewards: Rewards, features: Tensor | None = None, gate: Any = None, **infos: Any) -> Advantages:
    services: Any = Services(config, **infos)
    check(config, services)
    return aggregate(config, services, rewards, torch.arange(rewards.values_RB.shape[1]) // 4, features, gate)


def test_the_plain_recipe_is_the_rule_alone() -> None:
    rewards = given_rewards([1.0, 2.0, math.nan, 4.0, 0.1, 0.2, 0.3, 0.4], [3.0, 2.0, 1.0, 0.0, 9.0, 8.0, 1.0, 7.0])
    out = run(config({"a": {"weight": 0.7}, "b": {"weight": 0.3}}), rewards, b={"higher_is_better": False})
    signed = rewards.values_RB * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    plain = RULES["group_relative"](signed, rewards.mask_RB, torch.arange(8) // 4, weights)
    assert torch.equal(out.values_B, plain.values_B) and torch.equal(out.weights_B, plain.weights_B)
    assert out.per_reward_RB is None and out.kl_gate_B is None and out.numbers == {}


def test_z_scores_of_each_reward_for_marble() -> None:
    rewards = given_rewards([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 9.0], [0.0, 0.0, 5.0, 0.0])
    out = run(config({"a": {}, "seen": {"weight": 0}, "b": {"weight": 0.5}}, advantages={"per_reward": True}), rewards)
    assert out.per_reward_RB is not None and out.per_reward_RB.shape == (2, 4), "only rewards with a weight have gradients to mix"
    torch.testing.assert_close((out.per_reward_RB * torch.tensor([[1.0], [0.5]])).sum(0) / 1.5, out.values_B)


def test_ranges_of_services_map_where_a_rule_multiplies() -> None:
    rewards = given_rewards([1.0, 5.0, 3.0, 5.0], [0.0, 10.0, 10.0, 0.0])
    known: dict[str, Any] = {"a": {"range": (1.0, 5.0)}, "b": {"range": (0.0, 10.0), "higher_is_better": False}}
    made = config({"a": {}, "b": {}}, advantages={"use": "product"})
    out = run(made, rewards, **known)
    assert out.values_B.tolist() == pytest.approx(z(0.0, 0.0, 0.0, 1.0), abs=1e-6)
    with pytest.raises(ConfigError, match=r"b has no known range: set rewards\.b\.map"):
        run(made, rewards, a=known["a"])
    with pytest.raises(ConfigError, match=r"part 'logit' of a has no known range"):
        run(config({"a": {"part": "logit"}, "b": {}}, advantages={"use": "product"}), rewards, **known)
    mapped = config({"a": {}, "b": {"map": {"use": "affine", "zero": 10, "one": 0}}}, advantages={"use": "product"})
    assert torch.equal(run(mapped, rewards, **known).values_B, out.values_B)
    with pytest.raises(ConfigError, match="lower is better, so `zero` stands above `one`: exchange"):
        run(config({"a": {}, "b": {"map": {"use": "affine", "zero": 0, "one": 10}}}), rewards, **known)


def test_roles_choose_the_base() -> None:
    rewards = given_rewards([0.0, 1.0, 1.0, 1.0], [1.0, 0.5, 0.25, 0.0])
    rules = {"use": "base_bonus"}
    out = run(
        config({"q": {"role": "bonus"}, "seen": {"weight": 0}, "ins": {"role": "base"}}, advantages=rules),
        given_rewards([0.0, 1.0, 1.0, 1.0], [7.0] * 4, [1.0, 0.5, 0.25, 0.0]),
        q={"range": (0.0, 1.0)},
        ins={"range": (0.0, 1.0)},
    )
    assert out.values_B.tolist() == pytest.approx(z(0.4, 0.5, 0.25, 0.0), abs=1e-6)
    for roles in ({"q": {}, "ins": {"role": "base"}}, {"q": {"role": "base"}, "ins": {"role": "base"}}, {"q": {"role": "base"}}):
        with pytest.raises(ConfigError, match="one reward with role=base and one or more with role=bonus"):
            run(config(roles, advantages=rules), rewards)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "no known range"),
        ({"range": (-1.0, 1.0)}, "as low as -1"),
        ({"range": (0.0, 1.0), "higher_is_better": False}, "turned round"),
    ],
)
def test_taming_needs_rewards_above_minus_one(info: dict[str, Any], words: str) -> None:
    rewards = given_rewards([0.0, 0.5, 1.0, 0.2])
    with pytest.raises(ConfigError, match=words):
        run(config({"a": {}}, advantages={"use": "log_tame"}), rewards, a=info)
    tamed = config({"a": {"map": {"use": "sigmoid"}}}, advantages={"use": "log_tame"})
    assert run(tamed, rewards, a=info).values_B.abs().max() > 1


def test_a_reward_as_a_condition() -> None:
    rewards = given_rewards([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0], [0.9, 0.9, 0.9, 0.1, 0.9, math.nan, 0.9, 0.9])
    out = run(config({"a": {}, "safe": {"weight": 0, "gate": {"min": 0.5}}}), rewards)
    assert out.values_B[:4].tolist() == pytest.approx(z(1.0, 2.0, 3.0, 1.0), abs=1e-6)
    assert out.weights_B.tolist() == [1, 1, 1, 1, 1, 0, 1, 1], "a condition that is not known masks, and is no failure"
    assert out.numbers["reward/safe/gated"] == pytest.approx(1 / 7)
    out = run(config({"a": {}, "safe": {"weight": 0, "gate": {"max": 0.5, "below": "mask"}}}), rewards)
    assert out.weights_B.tolist() == [0] * 8, "three of the first four fail, and one alone is no group"


def test_what_is_uncertain_counts_less() -> None:
    plain = run(config({"a": {}}), given_rewards([1.0, 2.0, 3.0, 4.0]))
    unsure = {"a": torch.tensor([0.0, 1.0, 2.0, math.nan], dtype=torch.float64)}
    out = run(
        config({"a": {"uncertainty": {"part": "spread", "tau": 2.0, "square": True}}}),
        given_rewards([1.0, 2.0, 3.0, 4.0], uncertainty=unsure),
    )
    assert out.weights_B.tolist() == [1, 1, 1, 0], "a score without its uncertainty is a missing one"
    without = z(1.0, 2.0, 3.0)
    assert out.values_B.tolist() == pytest.approx(
        [without[0], without[1] * math.exp(-0.5), without[2] * math.exp(-2.0), 0.0], abs=1e-6
    )
    assert out.numbers["trust"] == pytest.approx((1 + math.exp(-0.5) + math.exp(-2)) / 3)
    assert plain.weights_B.all()


@pytest.mark.parametrize("use", sorted(REGISTRY["advantages"]))
@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_every_option_together_never_gives_what_is_not_finite(use: str, case: tuple[Tensor, ...]) -> None:
    values, mask, group, _ = case
    rewards = {
        "a": {"map": {"use": "sigmoid", "centre": 0.5, "scale": 0.2}, "uncertainty": {"part": "spread"}},
        "b": {"map": {"use": "affine", "zero": 0, "one": 0.5}, "gate": {"min": 0.2}},
    }
    if use == "base_bonus":
        rewards["a"]["role"], rewards["b"]["role"] = "base", "bonus"
    made = config(rewards, advantages={"use": use, "per_reward": True})
    services: Any = Services(made)
    check(made, services)
    given = Rewards(values[:2], mask[:2], {}, {}, uncertainty={"a": values[1]})
    out = aggregate(made, services, given, group)
    assert out.values_B.isfinite().all() and out.per_reward_RB is not None and out.per_reward_RB.isfinite().all()
    assert not out.values_B[~mask[:2].all(0)].any() and all(math.isfinite(number) for number in out.numbers.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": {"a": {"role": "base"}}}, "advantages.use=base_bonus alone"),
        ({"rewards": {"a": {"gate": {}}}}, "a gate needs min or max"),
        ({"rewards": {"a": {"gate": {"min": 2, "max": 1}}}}, "nothing passes"),
        ({"rewards": {"a": {"map": {"use": "affine", "scale": 2}}}}, "takes zero and one"),
        ({"rewards": {"a": {"map": {"use": "affine", "zero": 1}}}}, "same value"),
        ({"rewards": {"a": {"compare": {}, "part": "logit"}}}, "no parts"),
        ({"rewards": {"a": {"compare": {}, "uncertainty": {"part": "spread"}}}}, "standard_error"),
        ({"rewards": {"a": {"uncertainty": {"part": "standard_error"}}}}, "set `compare`"),
        ({"rewards": {"a": {}, "b": {"weight": 0, "uncertainty": {}}}}, "weight is 0"),
        ({"rewards": {"a": {"compare": {"rounds": 2}}}}, "plan=swiss"),
        ({"rewards": {"a": {"compare": {"anchors": 2}}}}, "plan=anchor"),
        ({"rewards": {"a": {"compare": {"plan": "anchor", "anchors": 4}}}}, "3 at most"),
        ({"rewards": {"a": {"compare": {}}}, "group": {"size": 100}}, "plan=swiss"),
        ({"rewards": {"a": {"compare": {"plan": "swiss"}}}, "group": {"size": 300}}, "lower group.size"),
        ({"rewards": {"a": {"compare": {}}}, "eval": {}}, "Set eval.monitors"),
        ({"rewards": {"a": {"compare": {}}}, "checkpoint_best": "total"}, "checkpoint_best=heldout:NAME"),
        ({"rewards": {"a": {}, "b": {"weight": 0, "compare": {}}}, "checkpoint_best": "heldout:b"}, "name another"),
        ({"advantages": {"use": "product", "combine": "sum_then_normalize"}}, "use=best or best_worst or group_relative"),
        ({"advantages": {"tame_above": 1.0}}, "use=log_tame"),
        ({"advantages": {"use": "rwr", "ddof": 1}}, "use=gdpo or group_relative"),
        ({"advantages": {"use": "product", "std": "none"}}, "std=none is not known to use=product"),
        ({"advantages": {"missing": "skip", "per_reward": True}}, "leave missing=skip away"),
        ({"gardo": {"diversity": True}, "advantages": {"missing": "skip"}}, "leave advantages.ddof and missing away"),
        ({"gardo": {"gate": True}}, "name rewards of weight 0 in gardo.aux"),
        ({"gardo": {"aux": ["a"]}}, "gardo.gate=true"),
        ({"gardo": {"gate": True, "aux": ["b"]}}, "no reward here"),
        ({"gardo": {"gate": True, "aux": ["a"]}, "kl": {"weight": 0.1}}, "rewards.a.weight=0"),
        ({"rewards": {"a": {}, "b": {"weight": 0}}, "gardo": {"gate": True, "aux": ["b"]}}, "set kl.weight"),
        ({"gardo": {"diversity": True}, "eval": {}}, "needs eval.monitors"),
        ({"gardo": {"diversity": True}, "advantages": {"use": "rwr"}}, "leave one away"),
        ({"gardo": {"diversity": True}, "advantages": {"std": "global"}}, "leave advantages.combine and std away"),
        ({"gardo": {"share": 0.5}}, "between share_min and share_max"),
        ({"gardo": {"shares": 0.5}}, "did you mean 'gardo.share'"),
        ({"rewards": {"a": {"gate": {"mim": 1}}}}, r"did you mean 'rewards\.a\.gate\.min'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(change: dict[str, Any], words: str) -> None:
    change = dict(change)
    with pytest.raises(ConfigError, match=words):
        config(change.pop("rewards", {"a": {}}), **change)


# GARDO


def test_ranks() -> None:
    assert gardo.ranks(torch.tensor([0.3, 0.9, 0.9, 0.1])).tolist() == [3.0, 1.5, 1.5, 4.0]


def test_distrust_has_both_signs() -> None:
    proxy = torch.tensor([4.0, 3.0, 2.0, 1.0, math.nan])
    aux = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 4.0, 9.0]])
    u = gardo.distrust(proxy, aux)
    assert u[:4].tolist() == [3.0, 0.5, -0.5, -3.0] and u[4].isnan()  # ranks 1 2 3 4 against the means 4 2.5 2.5 1
    assert gardo.distrust(proxy, aux, "released")[:4].tolist() == [-3.0, -0.5, 0.5, 3.0]


def test_the_gate_is_above_the_quantile_of_the_positive() -> None:
    u = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, -9.0, -9.0, math.nan], dtype=torch.float64)
    assert gardo.gated(u, 0.5).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]  # the median of 0 1 2 3 4 is 2
    assert gardo.gated(u, 0.1).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]  # 90 % of the way is 3.6
    assert not gardo.gated(torch.tensor([-1.0, -2.0]), 0.5).any()


def test_the_share_follows_the_mean_positive_distrust_and_comes_back() -> None:
    gate = gardo.Gate(share=0.1, history=2)
    apart = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # U 3 1 -1 -3
    near = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([[3.0, 4.0, 2.0, 1.0]])  # U 1 -1 0 0
    gate(*near)
    gate(*near)
    assert gate.share == 0.1
    gate(*apart)
    assert gate.share == pytest.approx(0.11)
    tensors, values = gate.state()
    other = gardo.Gate(history=2)
    other.load_state(tensors, values)
    for _ in range(2):
        assert torch.equal(gate(*apart), other(*apart)) and gate.state() == other.state()
    assert gate.share == pytest.approx(0.11)  # no higher than before
    gate(*near)
    assert gate.share == pytest.approx(0.099)
    for _ in range(60):
        gate.seen = [9.0, 9.0]
        gate(*near)
    assert gate.share == pytest.approx(0.02)
    same = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert gardo.Gate(when_none="all")(*same).all() and not gardo.Gate()(*same).any()


def test_diversity_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0, 4.0, 0.0]])
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    out = gardo.diverse(rewards, torch.ones(1, 4, dtype=torch.bool), ONE, torch.ones(1), features)
    # nearest: 0 0 1 1, their mean 0.5; the mean reward 2
    assert out.values_B.tolist() == [-1.0, 0.0, 4.0, -2.0]
    same = gardo.diverse(rewards, torch.ones(1, 4, dtype=torch.bool), ONE, torch.ones(1), torch.ones(4, 2))
    assert same.values_B.tolist() == [-1.0, 1.0, 2.0, -2.0]
    features[2] = torch.nan
    assert gardo.diverse(rewards, torch.ones(1, 4, dtype=torch.bool), ONE, torch.ones(1), features).weights_B.tolist() == [
        1,
        1,
        0,
        1,
    ]


def test_gardo_through_the_one_call() -> None:
    made = config(
        {"proxy": {}, "one": {"weight": 0}, "two": {"weight": 0}},
        gardo={"gate": True, "aux": ["one", "two"], "diversity": True, "share": 0.2},
        kl={"weight": 0.04},
    )
    rewards = given_rewards([8.0, 7, 6, 5, 4, 3, 2, 1], [1.0, 2, 3, 4, 5, 6, 7, 8], [1.0, 2, 3, 4, math.nan, 6, 7, 8])
    gate = gate_of(made)
    out = run(made, rewards, FEATURES, gate)
    assert out.kl_gate_B is not None and out.kl_gate_B.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert out.weights_B.all(), "an auxiliary that is missing takes nobody out of the training"
    group = torch.arange(8) // 4
    alone = gardo.diverse(rewards.values_RB[:1], rewards.mask_RB[:1], group, torch.ones(1), FEATURES)
    assert torch.equal(out.values_B, alone.values_B)
    assert out.numbers == {"gardo/share": 0.2, "gardo/held": 0.125}
    with pytest.raises(ValueError, match="features"):
        run(made, rewards, None, gate)
    off = config({"proxy": {}})
    assert gate_of(off) is None and features_for(off, None) is None


def test_features_of_ones_own() -> None:
    images = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    made = config({"a": {}}, gardo={"diversity": True, "features": f"{__name__}:brightness"})
    features = features_for(made, None)
    assert features is not None
    assert gardo.together(features, [images, images]).tolist() == [[13.0, 1.0], [40.0, 1.0]] * 2
    with pytest.raises(ValueError, match="one row for each"):
        gardo.together(lambda pictures: np.zeros(3), [images])
    for name in ("nowhere:function", "trainer.loop", "math:pi"):
        with pytest.raises(ConfigError, match=r"gardo\.features"):
            features_for(config({"a": {}}, gardo={"diversity": True, "features": name}), None)


def brightness(images: np.ndarray) -> np.ndarray:
    return np.stack([images.mean((1, 2, 3)), np.ones(len(images))], 1)
