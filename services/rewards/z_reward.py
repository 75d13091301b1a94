"""How good, from 1.0 to 5.0? After Z-Reward: the expectation over nine rubric levels, R = sum of s_k p(s_k | picture, prompt).

Each level is one digit, so that the first token's probabilities tell them all; that is our choice.
"""

import math

from services.rewards.judge_kit import FirstToken, Read
from shared.schema import Score

LEVELS = tuple(f"{1 + k / 2:.1f}" for k in range(9))


class ZReward(FirstToken):
    """In [1, 5]; `sigma` is the standard deviation over the levels, `distribution` their nine probabilities from 1.0 to 5.0."""

    template, labels, fields, needs, limits = "z_reward", LEVELS, ("prompt",), ("prompt",), (1.0, 5.0)
    description = "expected rubric level, 1.0 to 5.0, at the first token of a vision-language model"

    def _scored(self, read: Read) -> Score:
        p = [read.p[level] for level in LEVELS]
        mean = math.fsum(float(level) * one for level, one in zip(LEVELS, p, strict=True))
        sigma = math.sqrt(math.fsum((float(level) - mean) ** 2 * one for level, one in zip(LEVELS, p, strict=True)))
        score = Score.ok(min(max(mean, 1.0), 5.0), parts={"label_mass": read.mass}, sigma=sigma)
        return score.model_copy(update={"distribution": p}) if score.status == "ok" else score
