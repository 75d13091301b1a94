"""Is it a photograph? A vision-language model says real or fake with its first word: RealGen's semantic detector (2512.00473).

z = mean of the logits of a label's two spellings; P(real) = softmax(z_fake, z_real). The published checkpoint is a Qwen2.5-VL-7B tuned on
this question; any vision-language model can be asked, and how well it knows is its own matter.
"""

from services.rewards.judge_kit import FirstToken, Read


class ForensicChat(FirstToken):
    """P(real) in [0, 1]; `parts.margin` is z_real - z_fake."""

    template, labels, rule = "forensic_chat", ("real", "fake"), "mean"
    description = "P(real) at the first word of a vision-language model that was asked whether the picture is a photograph"

    def _value(self, read: Read) -> tuple[float, dict[str, float]]:
        return read.p["real"], {"margin": read.margin("real", "fake")}
