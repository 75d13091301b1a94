"""How likely is the prompt as the answer to "describe this image"? After PromptEcho (2604.12652).

Mean log-probability of the prompt's tokens under a frozen vision-language model that sees the picture; the chat template's tokens do not
count. Within a group of one prompt the mean orders pictures as the sum does.
"""

import math

from services.engines import Failure
from services.reward import Item
from services.rewards.judge_kit import Judge, JudgeOptions, failed
from shared.schema import Score


class PromptEcho(Judge):
    """At most 0, in nats a token; `parts.tokens` says how many there were, `parts.sum` what they add up to."""

    template, needs, limits = "prompt_echo", ("prompt",), None
    description = "mean log-probability of the prompt as a description of the picture, by a vision-language model"

    def __init__(self, name: str, options: JudgeOptions, device: str) -> None:
        if options.dialect == "openai":
            raise ValueError(
                f"{name} needs the log-probabilities of a given text, which an OpenAI server does not tell; serve the model by vLLM "
                "and leave `dialect` away, or give its `folder`"
            )
        super().__init__(name, options, device)

    def _scores(self, items: list[Item]) -> list[Score]:
        prompts = [(item.prompt or "").strip() for item in items]
        chats = [self.question.chat([item.image], {}, prompt) for item, prompt in zip(items, prompts, strict=True)]
        out = []
        for answer in self.engine.echo(chats):
            if isinstance(answer, Failure):
                out.append(failed(answer))
                continue
            total = math.fsum(answer.logprobs_T)
            count = len(answer.logprobs_T)
            out.append(Score.ok(total / count, parts={"sum": total, "tokens": float(count)}))
        return out
