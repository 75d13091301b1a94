"""Is it free of artefacts? ArtifactReward, the guard of Understanding Reward Hacking: a vision-language model says yes or no first.

P(no artefact) = sigmoid(l_no - l_yes), as its code computes; a label that was not among the answers is an error here, and 0 or 1 there.
"""

from services.rewards.judge_kit import FirstToken, Read


class ArtifactReward(FirstToken):
    """P(no artefact) in [0, 1]; `parts.margin` is l_no - l_yes."""

    template, labels = "artifact_reward", ("yes", "no")
    description = "P(no visible artefact) at the first word of a vision-language model"

    def _value(self, read: Read) -> tuple[float, dict[str, float]]:
        return read.p["no"], {"margin": read.margin("no", "yes")}
