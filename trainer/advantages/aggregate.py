"""What a step's rewards are worth: maps, gates, the rule that the recipe names, what is uncertain, what the KL holds back.

`check` refuses at the start what the services' own words rule out; `aggregate` is all that the loop calls.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shared.schema import RewardInfo
from trainer.advantages import transforms
from trainer.advantages.common import Advantages, usable, z_scores
from trainer.config import ConfigError, MapConfig, RewardConfig, RunConfig
from trainer.registry import resolve
from trainer.regularizers import gardo
from trainer.scoring import Rewards, Scorer

UNIT = ("product", "base_bonus")  # rules that multiply, and so need rewards in [0, 1]


def aggregate(
    config: RunConfig,
    scorer: Scorer,
    rewards: Rewards,
    group_B: Tensor,
    features_BD: Tensor | None = None,
    gate: gardo.Gate | None = None,
) -> Advantages:
    """Advantages of a step's samples, all ranks' together: some rules, and the gate, look at the whole step.

    `features_BD` are asked for by gardo.diversity, `gate` by gardo.gate, whose state moves on by one step.
    """
    a, names = config.advantages, scorer.names
    values, mask = torch.stack([better(config, scorer, r, rewards) for r in range(len(names))]), rewards.mask_RB
    numbers = dict(rewards.notes)
    uncertainty_B, known_B = _uncertainty(config, rewards)
    mask = mask & known_B
    for row, name in enumerate(names):
        condition = config.rewards[name].gate
        if condition is not None:
            raw, known = rewards.values_RB[row], rewards.mask_RB[row]
            passes = known & (raw >= _or(condition.min, -torch.inf)) & (raw <= _or(condition.max, torch.inf))
            numbers[f"reward/{name}/gated"] = float((known & ~passes).sum() / known.sum().clamp(min=1))
            values, mask = transforms.gate(values, mask, group_B, passes, known, condition.below)
    weights = scorer.weights_R
    if config.gardo.diversity:
        if features_BD is None:
            raise ValueError("gardo.diversity needs features of the pictures")
        out = gardo.diverse(values, mask, group_B, weights, features_BD, clip=a.clip, min_valid=a.min_valid)
    else:
        more = {"base": _base(config, names)} if a.use == "base_bonus" else {}
        out = resolve("advantages", a.use)(values, mask, group_B, weights, **a.options(), **more)
    if a.per_reward:
        used, _, valid_B = usable(values, mask, weights)
        z = z_scores(used, valid_B, group_B, eps=a.eps, min_valid=a.min_valid).z_RB
        out = replace(out, per_reward_RB=(z.clamp(-a.clip, a.clip) * torch.exp(-uncertainty_B)).float())
    if any(reward.uncertainty for reward in config.rewards.values()):
        out = replace(out, values_B=transforms.trusted(out.values_B, uncertainty_B))
        numbers["trust"] = float(torch.exp(-uncertainty_B)[out.weights_B.bool()].mean()) if bool(out.weights_B.any()) else 1.0
    if gate is not None:
        aux = torch.tensor([names.index(name) for name in config.gardo.aux])
        held_B = gate(gardo.proxy(values, mask, weights), torch.where(mask, values, torch.nan)[aux])
        out = replace(out, kl_gate_B=held_B)
        numbers |= {"gardo/share": gate.share, "gardo/held": float(held_B.mean())}
    return replace(out, numbers={**numbers, **out.numbers})


def per_group(config: RunConfig) -> bool:
    """Whether a group's advantages depend on no other group of the step."""
    a = config.advantages
    plain = a.use in ("group_relative", "best_worst", "product", "base_bonus") and a.std == "group" and not a.per_reward
    return plain and not config.gardo.gate and not config.gardo.diversity


def better(config: RunConfig, scorer: Scorer, row: int, rewards: Rewards) -> Tensor:
    """(B,) float64 of one reward, higher is better: mapped to [0, 1] where so configured, else with its sign."""
    name, raw = scorer.names[row], rewards.values_RB[row]
    mapped = map_of(name, config.rewards[name], scorer.infos[name], config.advantages.use)
    if mapped is None:
        return scorer.signs_R[row] * raw
    if mapped.use == "affine":
        return transforms.affine(raw, mapped.zero, mapped.one)
    return transforms.sigmoid(raw, mapped.centre, float(scorer.signs_R[row]) * mapped.scale)


def map_of(name: str, reward: RewardConfig, info: RewardInfo, rule: str) -> MapConfig | None:
    """The recipe's; where a rule needs [0, 1], the service's own range; ConfigError where it has none, or where the map is turned round."""
    if reward.map is not None:
        if reward.map.use == "affine" and (reward.map.zero < reward.map.one) != info.higher_is_better:
            fix = "above" if not info.higher_is_better else "below"
            kind = "higher" if info.higher_is_better else "lower"
            raise ConfigError(f"rewards.{name}.map: of this reward {kind} is better, so `zero` stands {fix} `one`: exchange them")
        return reward.map
    if rule not in UNIT or reward.weight == 0:
        return None
    low, high = range_of(reward, info)
    if low is None or high is None or low == high:
        raise ConfigError(
            f"advantages.use={rule} multiplies rewards in [0, 1], and "
            + (f"part {reward.part!r} of {name}" if reward.part else name)
            + f" has no known range: set rewards.{name}.map, e.g. {{use: sigmoid, centre: 0, scale: 1}} or {{use: affine, zero: 0, one: 10}}"
        )
    ends = (low, high) if info.higher_is_better else (high, low)
    return MapConfig(use="affine", zero=ends[0], one=ends[1])


def range_of(reward: RewardConfig, info: RewardInfo) -> tuple[float | None, float | None]:
    """What the service says of its smallest and largest value; nothing of parts; of a win rate 0 and 1."""
    if reward.compare is not None:
        return 0.0, 1.0
    return info.range if info.range is not None and reward.part is None else (None, None)


def check(config: RunConfig, scorer: Scorer) -> None:
    """ConfigError for what the services' own words rule out: maps, ranges, what the taming takes the logarithm of."""
    for name, reward in config.rewards.items():
        info = scorer.infos[name]
        mapped = map_of(name, reward, info, config.advantages.use)
        if config.advantages.use == "log_tame" and reward.weight > 0 and mapped is None:
            low, high = range_of(reward, info)
            least = low if info.higher_is_better else (None if high is None else -high)
            if least is None or least <= -1:
                what = "has no known range" if least is None else f"may be as low as {least:g}"
                turned = "" if info.higher_is_better else ", turned round since lower is better,"
                raise ConfigError(
                    f"advantages.use=log_tame takes log(1 + reward), so rewards must stay above -1, and {name}{turned} {what}: "
                    f"set rewards.{name}.map, e.g. {{use: sigmoid, centre: 0, scale: 1}}"
                )


def _uncertainty(config: RunConfig, rewards: Rewards) -> tuple[Tensor, Tensor]:
    """The sum of U / tau over the rewards that have one, and where it is known; 0 and everywhere without."""
    total = torch.zeros(rewards.values_RB.shape[1], dtype=torch.float64)
    for name, reward in config.rewards.items():
        if reward.uncertainty is not None:
            u = rewards.uncertainty[name].abs()
            total += (u**2 if reward.uncertainty.square else u) / reward.uncertainty.tau
    known = total.isfinite()
    return torch.where(known, total, 0.0), known


def _base(config: RunConfig, names: tuple[str, ...]) -> int:
    return next(row for row, name in enumerate(names) if config.rewards[name].role == "base")


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def gate_of(config: RunConfig) -> gardo.Gate | None:
    """The gate that a recipe asks for, in its first state."""
    g = config.gardo
    if not g.gate:
        return None
    return gardo.Gate(
        share=g.share,
        share_min=g.share_min,
        share_max=g.share_max,
        history=g.history,
        direction=g.direction,
        when_none=g.when_none,
    )


def features_for(config: RunConfig, monitors: Any) -> gardo.Features | None:
    """Pictures to features, where gardo.diversity asks for them; ConfigError says what is wrong."""
    if not config.gardo.diversity:
        return None
    try:
        return gardo.features_of(config.gardo.features, monitors)
    except ValueError as error:
        raise ConfigError(str(error)) from error
