"""A run's configuration: a recipe, then `key=value` on top, checked before anything starts.

    verism-train world rewards.detector.url=http://localhost:8001 steps=40

Everything is frozen once the run starts and is written to the run's folder. A key that nothing reads is an error.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shared.schema import MAX_ITEMS, MAX_PAIRS, pairs_of
from trainer.losses.clips import clip_range

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A recipe or an override cannot be used; the message says what to write instead."""


class Stopped(RuntimeError):
    """A run ended before its time, with all its files sound; the message says what to do."""


class Frozen(BaseModel):
    """Unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyConfig(BaseModel):
    """`use` names a registered policy; every other key is an option of that policy, checked in its own file."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str
    path: str

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class PromptsConfig(Frozen):
    """JSONL files with a `prompt` per line (and `class`, for the class hit)."""

    train: Path
    eval: Path


def _guided(section: str, guided: tuple[int, int] | None, guidance: float, steps: int) -> None:
    if guided is None:
        return
    if not 0 <= guided[0] < guided[1] <= steps:
        raise ValueError(f"{section}.guided_steps={list(guided)} must be [first, last) with 0 <= first < last <= {steps}")
    if guidance == 1.0:
        raise ValueError(f"{section}.guided_steps needs {section}.guidance: 1 is none")


class SamplingConfig(Frozen):
    """How pictures are drawn. `window` steps inside [window_first, window_last) are stochastic and trained, the others an ODE."""

    steps: int = Field(default=10, ge=2, description="steps from noise to picture")
    window: int | None = Field(
        default=3, ge=1, description="trained steps; null for losses that need no path: the whole way is the ODE"
    )
    window_first: int = Field(default=0, ge=0, description="first step that may be trained; step 0 starts from pure noise")
    window_last: int = Field(default=5, ge=1, description="one behind the last step that may be trained; the last of all never is")
    window_kind: Literal["random", "fixed", "sliding"] = Field(
        default="random", description="a place drawn for every step and group; always the first; or walking on as MixGRPO does"
    )
    window_stride: int = Field(default=1, ge=1, description="sliding: steps to move by")
    window_every: int = Field(default=25, ge=1, description="sliding: training steps at one place")
    window_back: bool = Field(
        default=True, description="sliding: go back to the first place after the last, instead of staying there"
    )
    window_strategy: Literal["progressive", "exp_decay"] = Field(
        default="progressive", description="sliding: the same time at every place, or less and less behind window_hold"
    )
    window_decay: float = Field(default=0.1, ge=0, description="exp_decay: k in window_every exp(-k max(0, place - window_hold))")
    window_hold: int | None = Field(default=None, ge=0, description="exp_decay: up to this place the full time; null is the middle")
    kind: Literal["sde", "dance", "cps"] = Field(default="sde", description="the stochastic step")
    noise_level: float = Field(default=0.7, gt=0, description="a of the stochastic step; for cps up to 1")
    noise_schedule: Literal["flat", "early"] = Field(
        default="flat", description="one level for all steps, or more in early steps with the same sum of variances"
    )
    noise_power: float = Field(default=1.0, gt=0, description="early: how fast the level falls, ((steps - i) / steps)^power")
    prefix: Literal["own", "shared"] = Field(
        default="own", description="shared: members go one way up to the window, walked once, and differ by the window alone"
    )
    branches: int | None = Field(
        default=None,
        ge=2,
        description="shared: members to one way, so group.size / branches ways in a group; null is the whole group",
    )
    branch_at: int | None = Field(
        default=None, ge=0, description="shared: steps of the window before this one are common too; null parts at its start"
    )
    same_noise: bool = Field(default=False, description="the same as prefix=shared, its older name")
    solver: Literal["euler", "dpm2m"] = Field(default="euler", description="how the steps that are not trained are walked")
    steps_after: int | None = Field(
        default=None, ge=1, description="so many steps behind the window at most, along the same curve; null is all that are left"
    )
    ahead: bool = Field(
        default=False,
        description="sample the next step's pictures before this one's are learned from: rewards have time, one step off-policy",
    )
    guidance: float = Field(default=1.0, ge=0, description="1 is none and costs one pass instead of two")
    guided_steps: tuple[int, int] | None = Field(
        default=None, description="[first, last) of the steps that are guided, the others with guidance 1; null is all"
    )
    height: int = Field(default=512, ge=8, description="pixels, a multiple of the policy's unit")
    width: int = Field(default=512, ge=8, description="pixels, a multiple of the policy's unit")
    micro_batch: Annotated[int, BeforeValidator(lambda value: 0 if value == "auto" else value)] = Field(
        default=16,
        ge=0,
        description="pictures per forward pass; groups that fit share one, and a window; "
        "auto (or 0): the most that memory takes, tried at the start and kept for the run",
    )
    draw_batch: int | None = Field(
        default=None,
        ge=1,
        description="pictures per forward pass in sampling and evaluations, where no graph is kept and more fit; null is micro_batch. "
        "Other sizes round differently: the first trajectory's ratios show whether by too much",
    )

    @property
    def batch(self) -> int:
        """Pictures per forward pass where nothing is learned from it; groups that fit share a window."""
        return self.draw_batch or self.micro_batch

    def copies(self, size: int) -> int:
        """How many members of a group of `size` share a first noise, and a way up to the window."""
        return (self.branches or size) if self.same_noise or self.prefix == "shared" else 1

    @model_validator(mode="after")
    def _possible(self) -> "SamplingConfig":
        _guided("sampling", self.guided_steps, self.guidance, self.steps)
        if self.window is None:
            if self.copies(2) > 1:
                raise ValueError(
                    "without a window members of one way are one picture: set sampling.prefix=own and same_noise=false"
                )
            if self.steps_after is not None:
                raise ValueError(
                    "sampling.steps_after counts steps behind the window, and sampling.window is null: set sampling.steps"
                )
            return self
        if self.window_last > self.steps - 1:
            raise ValueError(
                f"sampling.window_last is {self.window_last}, but the last of {self.steps} steps is never trained: "
                f"{self.steps - 1} at most"
            )
        if self.window > self.window_last - self.window_first:
            raise ValueError("sampling.window is longer than [window_first, window_last)")
        if self.window_kind == "sliding" and self.window_stride > self.window:
            raise ValueError("sampling.window_stride is longer than sampling.window: steps in between would never be trained")
        if self.copies(2) == 1 and (self.branches, self.branch_at) != (None, None):
            raise ValueError("sampling.branches and branch_at are about members that share a way: set sampling.prefix=shared")
        if self.branch_at is not None and not self.branch_at < self.window_first + self.window:
            raise ValueError(
                f"sampling.branch_at={self.branch_at} is behind the first window, whose members would be one picture: "
                f"{self.window_first + self.window - 1} at most"
            )
        if self.steps_after is not None and self.steps_after >= self.steps - self.window_first - self.window:
            raise ValueError(
                f"sampling.steps_after={self.steps_after} is not fewer than the steps behind the earliest window: "
                f"{self.steps - self.window_first - self.window - 1} at most, or null"
            )
        return self


class GroupConfig(Frozen):
    """`prompts` groups of `size` pictures make a step."""

    prompts: int = Field(default=8, ge=1)
    size: int = Field(default=8, ge=2)
    allow_small: bool = Field(default=False, description="train with groups of fewer than 4, whose z-scores are mostly noise")

    @model_validator(mode="after")
    def _large_enough(self) -> "GroupConfig":
        if self.size < 4 and not self.allow_small:
            raise ValueError("group.size below 4 gives z-scores that are mostly noise; raise it or set group.allow_small=true")
        return self


class MapConfig(Frozen):
    """A reward mapped to [0, 1], higher is better, before anything is made of it."""

    use: Literal["affine", "sigmoid"] = "sigmoid"
    zero: float = Field(default=0.0, description="affine: the value that counts as 0; above `one` where lower is better")
    one: float = Field(default=1.0, description="affine: the value that counts as 1; clipped beyond both")
    centre: float = Field(default=0.0, description="sigmoid: the value that counts as one half")
    scale: float = Field(
        default=1.0, gt=0, description="sigmoid: how far from the centre counts as 0.73; 0.27 where lower is better"
    )

    @model_validator(mode="after")
    def _two_ends(self) -> "MapConfig":
        if self.zero == self.one:
            raise ValueError("zero and one are the same value: name the reward that counts as 0 and the one that counts as 1")
        given = self.model_fields_set & ({"centre", "scale"} if self.use == "affine" else {"zero", "one"})
        if any(getattr(self, key) != type(self).model_fields[key].default for key in given):
            right = "zero and one" if self.use == "affine" else "centre and scale"
            raise ValueError(f"{', '.join(sorted(given))} is not read by use: {self.use}, which takes {right}")
        return self


class GateConfig(Frozen):
    """A reward as a condition, in the units its service gives: a sample outside [min, max] fails it."""

    min: float | None = Field(default=None, description="smallest value that passes")
    max: float | None = Field(default=None, description="largest value that passes")
    below: Literal["worst", "mask"] = Field(
        default="worst", description="what fails gets the worst value of its group in every reward, or is left out"
    )

    @model_validator(mode="after")
    def _a_condition(self) -> "GateConfig":
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min or max: the value from which, or up to which, a sample passes")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("nothing passes a gate whose min is above its max")
        return self


class UncertaintyConfig(Frozen):
    """Advantages of samples that a judge is unsure of count less: A exp(-U / tau)."""

    part: str = Field(
        default="sigma", description="U: the score's own `sigma`, a part (`spread`), or `standard_error` of a reward that compares"
    )
    square: bool = Field(default=False, description="U is the part squared: a variance, where it is a deviation")
    tau: float = Field(default=1.0, gt=0, description="the U at which an advantage counts e^-1")


class CompareConfig(Frozen):
    """The reward is the win rate in its own group, asked at the service's /v1/compare (Pref-GRPO, 2508.20751)."""

    plan: Literal["all", "anchor", "swiss"] = Field(
        default="all", description="every pair; all against `anchors` members; or rounds among those of like standing"
    )
    anchors: int | None = Field(default=None, ge=1, description="anchor: so many first members of a group meet all; null is one")
    rounds: int | None = Field(default=None, ge=1, description="swiss: rounds; null is log2 of the group")
    hard: bool = Field(default=False, description="count a verdict as a win, a tie or a loss, not as a probability")

    @model_validator(mode="after")
    def _of_its_plan(self) -> "CompareConfig":
        if self.anchors is not None and self.plan != "anchor":
            raise ValueError("compare.anchors belongs to plan anchor: set compare.plan=anchor, or leave it away")
        if self.rounds is not None and self.plan != "swiss":
            raise ValueError("compare.rounds belongs to plan swiss: set compare.plan=swiss, or leave it away")
        return self


class RewardConfig(Frozen):
    """One reward service. `part` trains on a named part of the score (a detector's `logit`, which does not saturate)."""

    url: str | list[str]
    weight: float = Field(default=1.0, ge=0, description="0: measured, but not trained on (gates and gardo.aux may name it)")
    part: str | None = Field(default=None, description="a named part of the score instead of its value")
    role: Literal["base", "bonus"] | None = Field(default=None, description="for advantages.use=base_bonus")
    map: MapConfig | None = Field(default=None, description="to [0, 1]; null takes the service's own range where a rule needs one")
    gate: GateConfig | None = Field(default=None, description="a condition that samples have to meet")
    uncertainty: UncertaintyConfig | None = Field(default=None, description="advantages count less where the score is unsure")
    compare: CompareConfig | None = Field(default=None, description="train on the win rate in the group, not on single scores")

    @model_validator(mode="after")
    def _fits(self) -> "RewardConfig":
        part = None if self.uncertainty is None else self.uncertainty.part
        if self.compare is not None and self.part is not None:
            raise ValueError("a win rate has no parts: leave `part` away, or `compare`")
        if self.compare is not None and part not in (None, "standard_error"):
            raise ValueError("the uncertainty of a win rate is its standard error: set uncertainty.part=standard_error")
        if self.compare is None and part == "standard_error":
            raise ValueError("uncertainty.part=standard_error is of a reward that compares: set `compare`, or name sigma or a part")
        if self.role is not None and self.weight == 0:
            raise ValueError(f"role={self.role} needs a weight above 0: the reward is part of the product")
        if self.uncertainty is not None and self.weight == 0:
            raise ValueError(
                "uncertainty weighs what is trained on, and this reward's weight is 0: raise it, or leave uncertainty away"
            )
        return self


Rule = Literal["base_bonus", "best", "best_worst", "gdpo", "group_relative", "log_tame", "product", "rwr"]
# What each rule reads besides eps, clip and min_valid.
READS: dict[str, tuple[str, ...]] = {
    "base_bonus": ("std", "base_share", "base_guard"),
    "best": ("combine",),
    "best_worst": ("combine",),
    "gdpo": ("ddof", "missing"),
    "group_relative": ("combine", "std", "ddof", "missing"),
    "log_tame": ("std", "tame_above"),
    "product": ("std",),
    "rwr": (),
}


class AdvantageConfig(Frozen):
    """From rewards to advantages: how much better than its own group."""

    use: Rule = Field(default="group_relative", description="the rule; docs/training.md compares them")
    combine: Literal["normalize_then_sum", "sum_then_normalize"] = Field(
        default="normalize_then_sum", description="z-score each reward and sum, or sum the rewards as they are"
    )
    std: Literal["group", "global", "none"] = Field(
        default="group", description="divide by the group's deviation, or the whole step's; none by nothing (Dr. GRPO)"
    )
    ddof: Literal[0, 1] = Field(default=0, description="of deviations: 0 divides by n (Flow-GRPO), 1 by n - 1 (TRL)")
    missing: Literal["mask", "skip"] = Field(
        default="mask", description="a sample that lacks a reward is left out; skip: the reward is left out of its sum (TRL)"
    )
    eps: float = Field(default=1e-4, gt=0, description="added to a deviation before dividing by it")
    clip: float = Field(default=5.0, gt=0, description="largest |A|")
    min_valid: int = Field(default=2, ge=2, description="a group with fewer scored members is left out of the step")
    base_share: float = Field(default=0.4, ge=0, le=1, description="base_bonus: what the base is worth without a bonus")
    base_guard: float | None = Field(
        default=None, ge=0, le=1, description="base_bonus: no bonus for a base (in [0, 1]) up to this; FIRM's editing has 0.25"
    )
    tame_above: float | None = Field(default=None, description="log_tame: tame rewards with std / mean above; null is their mean")
    per_reward: bool = Field(default=False, description="hand the z-scores of each reward to the loss too (MARBLE)")

    @model_validator(mode="after")
    def _read(self) -> "AdvantageConfig":
        for key in ("combine", "std", "ddof", "missing", "base_share", "base_guard", "tame_above"):
            if key not in READS[self.use] and getattr(self, key) != type(self).model_fields[key].default:
                rules = [rule for rule, keys in READS.items() if key in keys]
                raise ValueError(f"advantages.{key} is not read by use={self.use}: leave it away, or set use={' or '.join(rules)}")
        if self.std == "none" and self.use != "group_relative":
            raise ValueError(f"advantages.std=none is not known to use={self.use}: set use=group_relative, or std=group")
        if self.per_reward and self.missing == "skip":
            raise ValueError("advantages.per_reward needs every reward of a sample: leave missing=skip away")
        return self

    def options(self) -> dict[str, Any]:
        """What the rule takes."""
        return {key: getattr(self, key) for key in ("eps", "clip", "min_valid", *READS[self.use])}


class GardoConfig(Frozen):
    """GARDO (2512.24138), off by default: hold only doubtful samples back, and pay more for good ones that differ."""

    gate: bool = Field(default=False, description="the KL acts only on samples whose trained reward the `aux` rewards do not share")
    aux: list[str] = Field(default=[], description="rewards of weight 0 that the trained one is checked against")
    direction: Literal["proxy_over_aux", "released"] = Field(
        default="proxy_over_aux", description="doubt what the trained reward ranks above the others; or the released code's sign"
    )
    share: float = Field(default=0.1, gt=0, lt=1, description="of the samples with U >= 0: held back at the start")
    share_min: float = Field(default=0.02, gt=0, lt=1, description="least that the share falls to")
    share_max: float = Field(default=0.2, gt=0, lt=1, description="most that the share grows to")
    history: int = Field(
        default=20, ge=1, description="steps that the mean U is compared with; so many pass before the share moves"
    )
    when_none: Literal["none", "all"] = Field(
        default="none", description="what is held back when no sample is doubtful; the released NFT takes all"
    )
    diversity: bool = Field(
        default=False, description="instead of the rule: (r - mean), times how far a good sample is from its like"
    )
    features: str = Field(default="monitors", description="of diversity: eval.monitors, or package.module:function of your own")

    @model_validator(mode="after")
    def _whole(self) -> "GardoConfig":
        if self.gate and not self.aux:
            raise ValueError("gardo.gate compares the trained reward with others: name rewards of weight 0 in gardo.aux")
        if self.aux and not self.gate:
            raise ValueError("gardo.aux is read by gardo.gate alone: set gardo.gate=true, or leave aux away")
        if not self.share_min <= self.share <= self.share_max:
            raise ValueError("gardo.share must lie between share_min and share_max")
        return self


# Losses on clean pictures noised again; the others are on the steps of a window.
FORWARD = ("awm", "crd", "dgpo", "dpo", "nft", "rft")
# What each loss reads besides `use`.
LOSS_READS: dict[str, tuple[str, ...]] = {
    "grpo": ("clip_low", "clip_high"),
    "guard": ("clip_low", "clip_high"),
    "nft": (
        "beta",
        "largest",
        "times",
        "time_from",
        "shared_noise",
        "old",
        "old_decay",
        *("marble_every", "marble_smooth", "marble_unit"),
    ),
    "awm": ("clip_low", "clip_high", "times", "time_from", "time_weight", "shared_noise", "old", "old_decay"),
    "dpo": ("beta", "times", "time_from"),
    "dgpo": ("beta", "times", "time_from"),
    "crd": ("beta", "largest", "times", "time_from", "shared_noise", "old", "old_decay"),
    "rft": ("keep", "keep_above", "real", "real_share", "times", "time_from", "shared_noise"),
}


class LossConfig(Frozen):
    """What is learned from a picture and its advantage. grpo and guard learn from the steps of the window; the others from the picture
    alone, noised again, so that any solver may draw it (sampling.window=null)."""

    use: Literal["awm", "crd", "dgpo", "dpo", "grpo", "guard", "nft", "rft"] = Field(
        default="grpo", description="the loss; docs/training.md compares them"
    )
    clip_low: float | None = Field(
        default=None,
        gt=0,
        description="grpo, guard, awm: how far the ratio may fall; null is published for this loss and kind of step",
    )
    clip_high: float | None = Field(default=None, gt=0, description="grpo, guard, awm: how far the ratio may rise")
    beta: float | None = Field(
        default=None,
        gt=0,
        description="nft 1 (0.1 is bolder), dpo 2000, dgpo 100, crd 1: null is that; its meaning is the loss's own",
    )
    largest: float = Field(default=5.0, gt=0, description="nft, crd: the advantage at which a picture is good for certain")
    times: int = Field(default=4, ge=1, description="times at which each picture is noised again, one pass each")
    time_from: Literal["schedule", "uniform"] = Field(
        default="schedule", description="times of the sampler's own steps without the last, none twice; or any, spread evenly"
    )
    time_weight: Literal["uniform", "t", "t2", "huber"] = Field(
        default="uniform", description="awm: weight of an error by its time"
    )
    shared_noise: bool | None = Field(
        default=None, description="members of a group share noise and times; null is what the loss needs (dgpo, dpo, crd: true)"
    )
    old: Literal["last", "ema"] = Field(
        default="last",
        description="nft, awm, crd: the old policy is the one of the step's start, or a slow average that then also draws the pictures",
    )
    old_decay: Literal[1, 2] = Field(
        default=1, description="ema: 1 keeps up to half of the old policy, rising slowly; 2 none for 75 updates, then up to 0.999"
    )
    keep: float | None = Field(default=None, gt=0, le=1, description="rft: share of each group that is learned from, the best")
    keep_above: float | None = Field(default=None, description="rft: learn from pictures whose advantage is above this instead")
    real: Path | None = Field(default=None, description="rft: real pictures: a folder, a JSONL file or an npz")
    real_share: float = Field(default=0.0, ge=0, lt=1, description="rft: weight of the real pictures in the loss")
    marble_every: int | None = Field(
        default=None,
        ge=1,
        description="nft: mix the rewards' gradients to the shortest, weighed anew every so many steps; null sums rewards",
    )
    marble_smooth: float = Field(default=0.9, ge=0, lt=1, description="share of the earlier weights that stays")
    marble_unit: bool = Field(default=True, description="weigh gradients by their directions alone, not by their lengths")

    @model_validator(mode="after")
    def _belongs(self) -> "LossConfig":
        for name, about in type(self).model_fields.items():
            if name != "use" and name not in LOSS_READS[self.use] and getattr(self, name) != about.default:
                users = ", ".join(use for use, names in LOSS_READS.items() if name in names)
                off = "null" if about.default is None else about.default
                raise ValueError(f"{name} is nothing that loss.use={self.use} reads (only {users}): set loss.{name}={off}")
        if self.use == "rft" and (self.keep is None) == (self.keep_above is None):
            raise ValueError("rft learns from the better pictures: set one of loss.keep, e.g. 0.25, and loss.keep_above, e.g. 0")
        if (self.real is None) != (self.real_share == 0):
            raise ValueError("loss.real and loss.real_share go together: set both, e.g. real_share=0.2, or neither")
        return self


class KLConfig(Frozen):
    """How the policy is held near a reference."""

    use: Literal["v_kl", "x_kl"] = Field(
        default="v_kl", description="difference of velocities, or of the means of a window's step over 2 g^2"
    )
    weight: float = Field(default=0.0, ge=0, description="0 is none; published: 0.04 x_kl, 4e-4 v_kl, 1e-4 for nft")
    reference: Literal["initial", "adaptive"] = Field(
        default="initial", description="the policy before training, or (GARDO) one that becomes the present policy now and then"
    )
    reset_above: float | None = Field(
        default=None, gt=0, description="adaptive: when a step's KL is above this (GARDO: 3e-4 for grpo)"
    )
    reset_every: int | None = Field(default=None, ge=1, description="adaptive: when so many steps have passed (GARDO: 15)")

    @model_validator(mode="after")
    def _when(self) -> "KLConfig":
        never = self.reset_above is None and self.reset_every is None
        if self.reference == "adaptive" and never:
            raise ValueError("kl.reference=adaptive needs to know when: set kl.reset_every, e.g. 15, or kl.reset_above")
        if self.reference == "initial" and not never:
            raise ValueError("kl.reset_above and reset_every move an adaptive reference: set kl.reference=adaptive")
        return self


class OptimConfig(Frozen):
    """The optimiser, AdamW."""

    lr: float = Field(default=3e-4, gt=0, description="learning rate of AdamW")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="memory of AdamW's moments")
    weight_decay: float = Field(default=1e-4, ge=0, description="pull of every weight to 0")
    eps: float = Field(default=1e-8, gt=0, description="added to AdamW's denominator")
    max_grad_norm: float = Field(default=1.0, gt=0, description="a longer gradient is shortened to this")
    updates: int = Field(default=1, ge=1, description="optimiser steps per rollout; above 1 the clip range starts to matter")
    final_lr: float = Field(default=1.0, gt=0, le=1, description="share of lr that is left after lr_steps, along a cosine")
    lr_steps: int | None = Field(default=None, ge=1, description="steps of the cosine; null keeps lr constant")
    max_bad_updates: int = Field(
        default=5, ge=1, description="stop after so many updates in a row whose gradient was no number; each is skipped"
    )

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if self.lr_steps is None:
            return self.lr
        share = 0.5 * (1 + math.cos(math.pi * min(step / self.lr_steps, 1.0)))
        return self.lr * (self.final_lr + (1 - self.final_lr) * share)


class EMAConfig(Frozen):
    decay: float = Field(default=0.9, ge=0, lt=1)
    every: int = Field(default=1, ge=1)


class EvalConfig(Frozen):
    every: int = Field(default=10, ge=1)
    samples: int = Field(default=200, ge=2)
    steps: int = Field(default=10, ge=2)
    guidance: float = Field(default=1.0, ge=0, description="1 is none and costs one pass instead of two")
    guided_steps: tuple[int, int] | None = Field(
        default=None, description="[first, last) of the steps that are guided; null is all"
    )
    solver: Literal["euler", "dpm2m"] = Field(default="euler", description="how the path is walked")
    height: int | None = Field(default=None, ge=8, description="pixels; null is the training's (train small, look at large)")
    width: int | None = Field(default=None, ge=8, description="pixels; null is the training's")
    monitors: Path | None = Field(default=None, description="folder of held-out detectors and features; null for none")
    grid: int = Field(default=40, ge=1)
    seed: int = 1234

    @model_validator(mode="after")
    def _possible(self) -> "EvalConfig":
        _guided("eval", self.guided_steps, self.guidance, self.steps)
        return self


class AlarmConfig(Frozen):
    """When the trained reward rises while what was never a reward gets worse."""

    action: Literal["stop", "rollback", "warn", "off"] = Field(
        default="stop",
        description="end at the best checkpoint; go back to it with a lower learning rate and go on; only say so; do not look",
    )
    patience: int = Field(default=2, ge=1, description="evaluations in a row that look like reward hacking")
    distance_factor: float = Field(
        default=1.05, ge=1, description="distance above this multiple of the best so far counts as worse"
    )
    class_hit_drop: float = Field(default=0.05, ge=0, description="class hit this far below the best so far counts as worse")
    heldout_drop: float = Field(
        default=0.5,
        ge=0,
        description="all that is held out this far below the start counts as worse: log-odds of detectors, standard deviations of rewards",
    )
    rollbacks: int = Field(default=2, ge=1, description="rollback: so many times, then stop")
    rollback_lr: float = Field(default=0.5, gt=0, le=1, description="rollback: the learning rate is multiplied by this each time")


class ParallelConfig(Frozen):
    """Several ranks, as torchrun starts them."""

    timeout_s: float = Field(default=900.0, gt=0, description="a rank that waits longer for the others ends with an error")
    shard: bool = Field(
        default=False, description="FSDP2: each rank holds its part of the network's weights, and fetches the others block by block"
    )


class ScheduleConfig(Frozen):
    """When a detector is refitted, after a step and on that step's pictures."""

    use: Literal["every", "above", "reference_below"] = Field(
        default="every",
        description="every so many steps; above a mean reward (RealGen V2); or where references score below samples (Adv-GRPO)",
    )
    steps: int | None = Field(default=None, ge=1, description="every: this many steps; null is each")
    mean: float | None = Field(
        default=None, description="above: when the step's mean of the reward, in the units that the run trains on, is higher"
    )
    warm_up: bool = Field(default=True, description="above: after the first step too, whatever its mean")
    until_accuracy: float | None = Field(
        default=None, gt=0.5, le=1, description="a refit ends at this accuracy; null is the service's own `fit.until_accuracy`"
    )

    @model_validator(mode="after")
    def _read(self) -> "ScheduleConfig":
        if self.steps is not None and self.use != "every":
            raise ValueError(f"schedule.steps is read by use=every alone: leave it away, or set use=every instead of {self.use}")
        if (self.mean is None) == (self.use == "above"):
            raise ValueError("schedule.use=above and schedule.mean go together: give both, e.g. mean=0.6, or neither")
        if not self.warm_up and self.use != "above":
            raise ValueError("schedule.warm_up is read by use=above alone: leave it away")
        return self


class AdversaryConfig(Frozen):
    """A reward that is refitted while the run learns from it, by its service (trainer/adversary.py)."""

    admin: str = Field(description="URL of the service's admin listener, http://HOST:PORT")
    key_env: str = Field(default="VERISM_ADMIN_KEY", description="the environment variable that holds the listener's key")
    schedule: ScheduleConfig = ScheduleConfig()
    pictures: int | None = Field(
        default=None, ge=8, description="of each side for a refit, spread over the step's prompts; null is all pictures of the step"
    )
    rounds: int | None = Field(
        default=None, ge=1, le=10_000, description="most passes over them; null is the service's own `fit.rounds`"
    )
    wait_s: float = Field(default=600.0, gt=0, description="a refit that takes longer is given up, and the last version serves on")
    lease_s: float = Field(
        default=60.0, ge=2, le=3600, description="so long after a run was killed nobody else may refit; it is renewed in time"
    )
    overlap: bool = Field(
        default=False, description="refit beside the next step and serve the new version after it: one step later, and no waiting"
    )


class ReferencesConfig(Frozen):
    """Real pictures, or another generator's, that detectors are refitted on (trainer/references.py)."""

    path: Path = Field(
        description='JSONL of {"image", "prompt", "class"?}, a folder of pictures (NAME.txt beside each, or not), or world/photographs'
    )
    classes: list[int | str] | None = Field(
        default=None, min_length=1, description="only these, by number or name: moves the generator to a class or a style"
    )
    match: Literal["prefer", "only", "none"] = Field(
        default="prefer",
        description="pictures of the step's own captions (or classes) first; only them; or any",
    )
    least: int = Field(default=64, ge=8, description="with fewer readable pictures the run does not start")
    evaluated: int = Field(default=200, ge=2, description="how many are scored beside the samples at an evaluation")


class WandbConfig(Frozen):
    """A run at Weights & Biases; `pip install 'verism[wandb]'`."""

    project: str = Field(min_length=1)
    entity: str | None = Field(default=None, description="user or team; default: that of the login")
    name: str | None = Field(default=None, description="default: the run's")
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline"] = Field(default="online", description="offline: into the run folder, for `wandb sync`")


class RunConfig(Frozen):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    seed: int = 0
    steps: int = Field(default=60, ge=1)
    device: str = "auto"
    policy: PolicyConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    group: GroupConfig = GroupConfig()
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    reward_timeout_s: float = Field(default=120.0, gt=0, description="longest wait for the answer to one request")
    reward_outage_s: float = Field(
        default=300.0,
        ge=0,
        description="so long after its request a step waits for a service that does not answer, and then goes on without its scores",
    )
    max_unscored_steps: int = Field(default=5, ge=1, description="stop after so many steps in a row without a single score")
    adversary: dict[str, AdversaryConfig] = Field(default={}, description="rewards that are refitted, by their names in `rewards`")
    references: ReferencesConfig | None = Field(default=None, description="what `adversary` is refitted on")
    advantages: AdvantageConfig = AdvantageConfig()
    gardo: GardoConfig = GardoConfig()
    loss: LossConfig = LossConfig()
    kl: KLConfig = KLConfig()
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    eval: EvalConfig = EvalConfig()
    alarm: AlarmConfig = AlarmConfig()
    parallel: ParallelConfig = ParallelConfig()
    tensorboard: bool = Field(default=True, description="events for TensorBoard in the run folder's `tb`, beside metrics.jsonl")
    wandb: WandbConfig | None = Field(default=None, description="to Weights & Biases too (docs/watching.md)")
    checkpoint_every: int = Field(default=10, ge=1, description="steps between checkpoints; every evaluation makes one too")
    checkpoint_keep: int = Field(default=2, ge=1, description="newest ones kept; the best is kept besides")
    checkpoint_best: str = Field(
        default="distance",
        pattern=r"^(total|distance|heldout:.+)$",
        description="what makes a checkpoint the best: distance to photographs (without monitors: total), total (the trained reward), or "
        "heldout:NAME, a reward of weight 0 or one of the monitors",
    )

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        s = self.sampling
        if s.window is None and self.loss.use not in FORWARD:
            raise ValueError(f"loss.use={self.loss.use} learns from the steps of a window: give sampling.window a number")
        copies = s.copies(self.group.size)
        if self.group.size % copies or copies > self.group.size:
            raise ValueError(f"group.size={self.group.size} does not divide into sampling.branches={copies}: make it a multiple")
        if sum(r.weight for r in self.rewards.values()) <= 0:
            raise ValueError("all reward weights are 0: nothing would be trained")
        held = self.rewards.get(self.checkpoint_best.removeprefix("heldout:"))
        if self.checkpoint_best.startswith("heldout:") and held is not None and held.weight > 0:
            raise ValueError(f"checkpoint_best={self.checkpoint_best}: that reward is trained on; held out is one with weight=0")
        if self.checkpoint_best.startswith("heldout:") and held is None and self.eval.monitors is None:
            raise ValueError(f"checkpoint_best={self.checkpoint_best} needs a reward of that name with weight=0, or eval.monitors")
        if self.optim.final_lr < 1 and self.optim.lr_steps is None:
            raise ValueError("optim.final_lr needs optim.lr_steps: over how many steps should the learning rate fall?")
        return self

    @model_validator(mode="after")
    def _can_learn(self) -> "RunConfig":
        loss, s = self.loss, self.sampling
        self.clip_range()
        if loss.use in FORWARD:
            if self.kl.use == "x_kl" and self.kl.weight > 0:
                raise ValueError(f"kl.use=x_kl compares steps, and loss.use={loss.use} takes none: set kl.use=v_kl")
            if s.guided_steps is not None:
                raise ValueError(f"loss.use={loss.use} learns at all times with one guidance: leave sampling.guided_steps away")
            if loss.time_from == "schedule" and loss.times > max(1, int(0.99 * s.steps)):
                raise ValueError(
                    f"loss.times={loss.times}, but {s.steps} steps have {max(1, int(0.99 * s.steps))} times to learn at: lower it, raise "
                    "sampling.steps, or set loss.time_from=uniform"
                )
        if loss.marble_every is not None and not self.advantages.per_reward:
            raise ValueError("loss.marble_every mixes the rewards' own advantages: set advantages.per_reward=true")
        if loss.marble_every is not None and sum(r.weight > 0 for r in self.rewards.values()) < 2:
            raise ValueError("loss.marble_every weighs several rewards against each other: give two of them a weight")
        if self.kl.reference == "adaptive" and self.kl.weight == 0 and (self.kl.reset_above or loss.use not in ("dgpo", "dpo")):
            raise ValueError("kl.reference=adaptive moves what the KL holds to, and there is none: set kl.weight, e.g. 0.04")
        if self.gardo.gate and loss.use in ("dpo", "rft"):
            raise ValueError(
                f"gardo.gate holds back single samples, and loss.use={loss.use} takes some of them only: use another loss"
            )
        return self

    def clip_range(self) -> tuple[float, float] | None:
        """(low, high) of the ratio: as given, else as published for this loss and kind of step; None for losses that do not clip."""
        return clip_range(self.loss.use, self.sampling.kind, self.loss.clip_low, self.loss.clip_high)

    @property
    def compared(self) -> int:
        """Pictures that meet in one tournament."""
        return self.group.size

    @property
    def pictures(self) -> int:
        """Of a step."""
        return self.group.prompts * self.group.size

    @model_validator(mode="after")
    def _rewards_fit(self) -> "RunConfig":
        trained = {name: reward for name, reward in self.rewards.items() if reward.weight > 0}
        for name, reward in self.rewards.items():
            if reward.compare is not None:
                _pairs_fit(name, reward.compare, self.compared)
            if reward.role is not None and self.advantages.use != "base_bonus":
                raise ValueError(f"rewards.{name}.role is read by advantages.use=base_bonus alone: set that, or leave role away")
        if self.advantages.use == "base_bonus":
            roles = [reward.role for reward in trained.values()]
            if roles.count("base") != 1 or "bonus" not in roles or None in roles:
                raise ValueError(
                    "advantages.use=base_bonus needs one reward with role=base and one or more with role=bonus among those with a "
                    f"weight; it has {', '.join(f'{name}: {reward.role}' for name, reward in trained.items())}"
                )
        single, by = [name for name, reward in self.rewards.items() if reward.compare is None], self.checkpoint_best
        blind = by == "total" or (by == "distance" and self.eval.monitors is None)
        if trained and not set(single) & set(trained) and blind:
            raise ValueError(
                "win rates tell which picture of a group is better, not whether the policy is: nothing would tell the best checkpoint. "
                "Set eval.monitors and checkpoint_best=distance, or checkpoint_best=heldout:NAME, or give a reward of single pictures a weight"
            )
        if by.startswith("heldout:") and by.removeprefix("heldout:") in set(self.rewards) - set(single):
            raise ValueError(f"checkpoint_best={by} is a win rate, which says nothing across evaluations: name another")
        return self

    @model_validator(mode="after")
    def _adversary_fits(self) -> "RunConfig":
        if not self.adversary:
            if self.references is not None:
                raise ValueError("references are what an adversary is refitted on, and there is none: name one, or leave them away")
            return self
        if hasattr(self, "language"):
            raise ValueError("adversary does not go with a rewriter (`language`) yet: leave one away")
        if self.references is None:
            raise ValueError("adversary needs real pictures: set references.path, a JSONL file or a folder (world/photographs)")
        if self.sampling.ahead:
            raise ValueError("sampling.ahead asks for scores before the refit that they should follow: set it to false")
        for name, one in self.adversary.items():
            reward = self.rewards.get(name)
            if reward is None:
                raise ValueError(f"adversary.{name} is no reward here: it has {', '.join(self.rewards)}")
            if not isinstance(reward.url, str):
                raise ValueError(f"rewards.{name}.url: a reward that is refitted lives in one service; give one URL")
            if reward.compare is not None:
                raise ValueError(
                    f"rewards.{name}.compare: a win rate says nothing of real pictures; leave it, or the adversary, away"
                )
            if one.pictures is not None and one.pictures > self.pictures:
                raise ValueError(
                    f"adversary.{name}.pictures={one.pictures}, but a step has {self.pictures}: lower it, or raise group"
                )
        if self.eval.monitors is None and not set(self.rewards) - set(self.adversary):
            raise ValueError(
                "every reward is refitted, and nothing that never learns would see the run go astray: set eval.monitors, or add a reward "
                "that is not in `adversary` (weight=0 measures it only)"
            )
        by = self.checkpoint_best
        if by == "total" or (by == "distance" and self.eval.monitors is None) or by.removeprefix("heldout:") in self.adversary:
            raise ValueError(
                f"checkpoint_best={by} compares scores of several versions of a detector: set eval.monitors and checkpoint_best=distance, "
                "or checkpoint_best=heldout:NAME of a reward with weight=0 that is not in `adversary`"
            )
        return self

    @model_validator(mode="after")
    def _gardo_fits(self) -> "RunConfig":
        g = self.gardo
        for name in g.aux:
            if name not in self.rewards:
                raise ValueError(f"gardo.aux names {name!r}, which is no reward here: it has {', '.join(self.rewards)}")
            if self.rewards[name].weight > 0:
                raise ValueError(f"gardo.aux names {name!r}, which is trained on: set rewards.{name}.weight=0, or name another")
        if g.gate and self.kl.weight == 0:
            raise ValueError("gardo.gate says which samples the KL holds back, and there is none: set kl.weight, e.g. 0.04")
        if g.diversity and g.features == "monitors" and self.eval.monitors is None:
            raise ValueError("gardo.features=monitors needs eval.monitors, e.g. world/monitors; or name a function of your own")
        if g.diversity and self.advantages.use != "group_relative":
            raise ValueError(
                f"gardo.diversity is a rule of its own, instead of advantages.use={self.advantages.use}: leave one away"
            )
        if g.diversity and (self.advantages.combine, self.advantages.std) != ("normalize_then_sum", "group"):
            raise ValueError("gardo.diversity takes the rewards as they are: leave advantages.combine and std away")
        if g.diversity and (self.advantages.ddof, self.advantages.missing) != (0, "mask"):
            raise ValueError("gardo.diversity takes no deviations and wants every reward: leave advantages.ddof and missing away")
        return self


def _pairs_fit(name: str, compare: CompareConfig, size: int) -> None:
    if size > MAX_ITEMS:
        raise ValueError(f"rewards.{name}.compare: a group is compared in one request of {MAX_ITEMS} pictures; lower group.size")
    if (compare.anchors or 1) >= size:
        raise ValueError(f"rewards.{name}.compare.anchors={compare.anchors} is the whole group: {size - 1} at most, or plan=all")
    pairs = pairs_of(size, compare.plan, compare.anchors or 1, compare.rounds)
    if pairs > MAX_PAIRS:
        raise ValueError(f"rewards.{name}.compare asks {pairs} pairs of a group, {MAX_PAIRS} at most: set compare.plan=swiss")


def recipe_names() -> list[str]:
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A recipe by name or path with `a.b=value` on top; ConfigError names the wrong key and the nearest right one."""
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(recipe, recipe_names(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no recipe {recipe!r}; {hint}known: {', '.join(recipe_names())}, or the path of a YAML file")
    raw = yaml.safe_load(path.read_text())
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a recipe: it should be a mapping of keys")
    for override in overrides:
        apply(raw, override)
    return validate(raw, str(path))


def validate(raw: dict[str, Any], source: str) -> RunConfig:
    """RunConfig, or a ConfigError in words."""
    kind = kind_of(raw)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] != "extra_forbidden":
            raise ConfigError(f"{source}: {where}: {first['msg']}".replace(": : ", ": ")) from error
        known = fields_at(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = (
            f"did you mean {'.'.join([*map(str, first['loc'][:-1]), near[0]])!r}?" if near else f"known there: {', '.join(known)}"
        )
        raise ConfigError(f"{source}: unknown key {where!r}; {hint}") from error


def kind_of(raw: Mapping[str, Any]) -> type[RunConfig]:
    """The configuration that a recipe is one of: with a `language` section it has a rewriter."""
    if "language" not in raw:
        return RunConfig
    from trainer.language.config import LanguageRunConfig  # which builds on this file

    return LanguageRunConfig


def fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Names that options have where a ValidationError says one is unknown."""
    parts = iter(location)
    for part in parts:
        field = model.model_fields.get(part)
        if field is None:
            break
        inside = get_args(field.annotation)
        if get_origin(field.annotation) is dict:
            next(parts, None)  # its name
            inside = inside[1:]
        kinds = [kind for kind in (field.annotation, *inside) if isinstance(kind, type)]
        model = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return sorted(model.model_fields)


def apply(raw: dict[str, Any], override: str, such_as: str = "steps=40 or rewards.detector.url=http://localhost:8001") -> None:
    """Put `a.b=value` into a mapping; ConfigError for what is none."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r} is not key=value, e.g. {such_as}")
    *path, last = key.split(".")
    target = raw
    for part in path:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{key}: {part!r} is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} cannot be read: {error}") from error
    target[last] = value


_apply = apply  # its name until now


def dump(config: RunConfig) -> str:
    """YAML that `load` reads back to the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
