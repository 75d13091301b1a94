"""Is it better than a reference picture of the same prompt? After RewardDance: P(yes) at a vision-language model's first word.

P(yes) / (P(yes) + P(no)): that it is normalised, and that the caller chooses the reference (the item's first), are our choices.
"""

from services.rewards.judge_kit import FirstToken, Read


class RewardDance(FirstToken):
    """P(better than the reference) in [0, 1]; `parts.margin` is l_yes - l_no."""

    template, labels, fields, images, needs = "reward_dance", ("yes", "no"), ("prompt",), 2, ("prompt", "references")
    description = "P(better than the item's first reference) at the first word of a vision-language model"

    def _value(self, read: Read) -> tuple[float, dict[str, float]]:
        return read.p["yes"], {"margin": read.margin("yes", "no")}
