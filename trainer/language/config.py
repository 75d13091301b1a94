"""A run that has a rewriter: what `language:` says in a recipe, beside everything that a run of pictures says.

A step is a tree: `group.prompts` prompts, `language.rewrites` rewrites of each, `group.size` pictures of each rewrite. The image policy
learns from the pictures of one rewrite against each other, the rewriter from the rewrites of one prompt.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from trainer.config import AdvantageConfig, EMAConfig, Frozen, GroupConfig, OptimConfig, RunConfig
from trainer.losses.tokens import CLIPS, OF_SEQUENCES, Correction, Level, Use

Mode = Literal["language", "images", "both"]


class RewriterConfig(BaseModel):
    """Which model rewrites; every other key is an option of `RewriterPolicy`, checked in its own file."""

    model_config = ConfigDict(extra="allow", frozen=True)
    path: str = Field(default="smollm2", description="a folder, a name on the hub, or smollm2: the one from its package")

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EngineConfig(BaseModel):
    """Who draws the rewrites; every other key is an option of that engine, checked in its own file."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: Literal["transformers", "vllm"] = "transformers"

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TokenLossConfig(Frozen):
    """What is learned from a rewrite's tokens; trainer/losses/tokens.py has the formulas."""

    use: Use = Field(default="dapo", description="the loss")
    clip_low: float | None = Field(default=None, ge=0, description="how far the ratio may fall; null is published for this loss")
    clip_high: float | None = Field(
        default=None, ge=0, description="how far the ratio may rise; of cispo the bound of the ratio itself"
    )
    level: Level | None = Field(default=None, description="one ratio for a token or for the sequence; null is the loss's own")
    delta: float | None = Field(default=None, gt=1, description="bound of the ratio of bad tokens, which do not clip")
    correction: Correction | Literal["off"] = Field(
        default="sequence_mask", description="what counts less where another engine drew what the policy would not have"
    )
    correction_high: float = Field(default=3.0, gt=1, description="the largest p_policy / p_engine that counts as it is")

    @model_validator(mode="after")
    def _read(self) -> "TokenLossConfig":
        if self.use not in CLIPS and (self.clip_low, self.clip_high) != (None, None):
            raise ValueError(f"{self.use} does not clip: leave clip_low and clip_high away")
        if self.use == "cispo" and self.clip_low is not None:
            raise ValueError("cispo bounds the ratio from above alone: leave clip_low away")
        if self.use in OF_SEQUENCES and self.level == "token":
            raise ValueError(f"{self.use} has one ratio for a sequence: leave level away, or set use=grpo")
        return self


class TokenKLConfig(Frozen):
    """How the rewriter is held near what it was before training: the k3 estimate, token by token."""

    weight: float = Field(default=0.0, ge=0, description="0 is none, and then no reference is asked")


class PenaltyConfig(Frozen):
    """A cost of the text alone, in deviations of the rewards in a group: 1 turns the best of most groups into one of the worse."""

    weight: float = Field(default=1.0, ge=0)


class LengthConfig(PenaltyConfig):
    """Rewrites shorter or longer than this cost the share of the bound by which they miss it."""

    min: int = Field(default=3, ge=1)
    max: int = Field(default=60, ge=1)
    unit: Literal["words", "tokens"] = Field(
        default="words", description="words stand between spaces: take tokens where there are none"
    )

    @model_validator(mode="after")
    def _two_ends(self) -> "LengthConfig":
        if self.min > self.max:
            raise ValueError("no rewrite is longer than min and shorter than max: exchange them")
        return self


class TruncatedConfig(PenaltyConfig):
    """Rewrites whose length ran out: left out of the language loss (DAPO's overlong filter), or in it at this cost."""

    use: Literal["mask", "penalise"] = "mask"
    weight: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _read(self) -> "TruncatedConfig":
        if self.use == "mask" and self.weight > 0:
            raise ValueError("what is masked costs nothing: set use=penalise, or leave weight away")
        return self


class PenaltiesConfig(Frozen):
    """What a rewrite costs by its text alone (trainer/language/penalties.py); weight 0 measures only."""

    length: LengthConfig = LengthConfig()
    format: PenaltyConfig = PenaltyConfig()
    repetition: PenaltyConfig = PenaltyConfig()
    subject: PenaltyConfig = PenaltyConfig(weight=0.5)
    truncated: TruncatedConfig = TruncatedConfig()


class LanguageRewardConfig(Frozen):
    """A reward as the rewriter has it."""

    weight: float | None = Field(
        default=None, ge=0, description="instead of rewards.NAME.weight; 0: the rewriter does not learn from it"
    )
    judged_by: Literal["prompt", "rewrite"] = Field(
        default="prompt", description="whose words the service is asked with: the user's own, or those that were painted"
    )


class LanguageConfig(Frozen):
    """The rewriter and how it learns."""

    mode: Literal["language", "images", "both", "alternating"] = Field(
        default="language", description="who learns: the rewriter, the image policy, both at once, or by turns"
    )
    alternate_every: int = Field(
        default=10, ge=1, description="alternating: so many steps the rewriter, then as many the image policy"
    )
    policy: RewriterConfig | None = Field(default=RewriterConfig(), description="null (mode images alone): nobody rewrites")
    engine: EngineConfig = EngineConfig()
    rewrites: int = Field(default=8, ge=1, description="J, of each prompt")
    temperature: float = Field(
        default=1.0, gt=0, description="of what is learned from; the whole distribution, no top-p and no top-k"
    )
    max_new_tokens: int = Field(default=96, ge=1, description="a rewrite is cut off there")
    eval_temperature: float = Field(default=0.0, ge=0, description="of evaluations; 0 takes the likeliest token")
    same_noise: bool = Field(
        default=True, description="rewrites of a prompt are painted from the same noises, so that they differ by their words alone"
    )
    micro_batch: int = Field(default=16, ge=1, description="completions per pass, in sampling and in training")
    rewards: dict[str, LanguageRewardConfig] = Field(default={}, description="by the names in `rewards`")
    penalties: PenaltiesConfig = PenaltiesConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    loss: TokenLossConfig = TokenLossConfig()
    kl: TokenKLConfig = TokenKLConfig()
    optim: OptimConfig = OptimConfig(lr=1e-5, weight_decay=0.0)
    ema: EMAConfig | None = Field(default=None, description="an average that evaluations look through; null is none")
    shown: int = Field(default=20, ge=1, description="rewrites that the report prints")

    def mode_at(self, step: int) -> Mode:
        """Who learns at a step, counted from 0."""
        if self.mode != "alternating":
            return self.mode
        return "images" if step // self.alternate_every % 2 else "language"

    @field_validator("advantages")
    @classmethod
    def _rule(cls, value: AdvantageConfig, info: ValidationInfo) -> AdvantageConfig:
        known = ("best", "best_worst", "gdpo", "group_relative", "rwr")
        if value.use not in known or value.per_reward:
            raise ValueError(f"of rewrites: use one of {', '.join(known)}, without per_reward; the others are of single pictures")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "LanguageConfig":
        if self.policy is None and (self.mode != "images" or self.rewrites != 1):
            raise ValueError("without language.policy nobody rewrites: set mode=images and rewrites=1, or name a policy")
        if self.mode != "images" and self.rewrites < 2:
            raise ValueError(
                "the rewriter learns from rewrites of one prompt against each other: set language.rewrites to 4 or more"
            )
        low, high = self.penalties.length.min, self.penalties.length.max
        if self.penalties.length.unit == "tokens" and self.penalties.length.weight > 0 and low > self.max_new_tokens:
            raise ValueError(
                f"language.penalties.length asks for {low} to {high} tokens, and max_new_tokens is {self.max_new_tokens}"
            )
        return self


class TreeGroupConfig(GroupConfig):
    """`prompts` prompts make a step, and `size` pictures are painted of each rewrite."""

    size: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _large_enough(self) -> "TreeGroupConfig":
        return self  # the run knows whether pictures are compared at all


class LanguageRunConfig(RunConfig):
    """A whole run with a rewriter."""

    group: TreeGroupConfig = TreeGroupConfig()
    language: LanguageConfig

    @property
    def paints(self) -> bool:
        """Whether the image policy ever learns."""
        return self.language.mode != "language"

    @property
    def writes(self) -> bool:
        """Whether the rewriter ever learns."""
        return self.language.mode != "images"

    @property
    def pictures(self) -> int:
        """Of a step."""
        return self.group.prompts * self.language.rewrites * self.group.size

    def language_weight(self, name: str) -> float:
        """Of a reward, for the rewriter."""
        own = self.language.rewards.get(name, LanguageRewardConfig()).weight
        return self.rewards[name].weight if own is None else own

    @property
    def compared(self) -> int:
        """All pictures of a prompt meet in one tournament: what the rewriter learns from lies between rewrites."""
        return self.language.rewrites * self.group.size

    @model_validator(mode="after")
    def _tree(self) -> "LanguageRunConfig":
        group, language = self.group, self.language
        if self.paints and group.size < 4 and not group.allow_small:
            raise ValueError(
                "group.size is the pictures of one rewrite, and below 4 their z-scores are mostly noise; raise it or set "
                "group.allow_small=true"
            )
        if self.writes and language.rewrites < 4 and not group.allow_small:
            raise ValueError(
                "language.rewrites below 4 gives z-scores that are mostly noise; raise it or set group.allow_small=true"
            )
        for name in language.rewards:
            if name not in self.rewards:
                raise ValueError(f"language.rewards names {name!r}, which is no reward here: it has {', '.join(self.rewards)}")
        if self.writes and sum(map(self.language_weight, self.rewards)) <= 0:
            raise ValueError("all weights of the rewriter's rewards are 0: set language.rewards.NAME.weight, or mode=images")
        if self.sampling.ahead:
            raise ValueError("sampling.ahead draws pictures of the next step, whose rewrites are not known yet: set it to false")
        if not self.paints and (self.gardo.gate or self.gardo.diversity):
            raise ValueError("gardo is about what the image policy learns, and mode=language trains the rewriter alone")
        for name, reward in self.rewards.items():
            if reward.uncertainty is not None and not self.paints:
                raise ValueError(f"rewards.{name}.uncertainty weighs what single pictures teach: the rewriter does not read it")
        return self
