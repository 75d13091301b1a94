"""vLLM's own OpenAI-compatible server, whose route for several questions also tells the prompts' log-probabilities when they are asked for.

Runs in .venv-vllm and imports nothing of Verism. vLLM 0.32 passes `prompt_logprobs` of /v1/chat/completions/batch on to its engine but
leaves them out of the answer. Each choice gets `prompt_token_ids` and `prompt_logprobs`, one number a token, the first one null. Where
vLLM is built otherwise nothing is changed; the caller sees that they are missing and asks one by one.
"""

import math
import runpy
from collections.abc import AsyncIterator, Sequence
from typing import Any

LOWEST = -9999.0  # what vLLM says for minus infinity, which JSON has not


def told(output: Any) -> dict[str, list[Any]]:
    """Of one question."""
    ids = list(output.prompt_token_ids)
    found = [row[token].logprob if row else None for row, token in zip(output.prompt_logprobs, ids, strict=True)]
    return {"prompt_token_ids": ids, "prompt_logprobs": [one if one is None or math.isfinite(one) else LOWEST for one in found]}


def tell_prompts(serving: Any) -> None:
    """`serving` is the class that answers several questions."""
    original = serving.chat_completion_full_generator_batch

    async def full(self: Any, request: Any, generators: Sequence[AsyncIterator[Any]], *more: Any) -> Any:
        if getattr(request, "prompt_logprobs", None) is None:
            return await original(self, request, generators, *more)
        last: dict[int, Any] = {}

        async def watched(index: int, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
            async for output in outputs:
                last[index] = output
                yield output

        answer = await original(self, request, [watched(i, one) for i, one in enumerate(generators)], *more)
        for choice in getattr(answer, "choices", ()):
            for name, value in told(last[choice.index]).items():
                setattr(choice, name, value)
        return answer

    serving.chat_completion_full_generator_batch = full


if __name__ == "__main__":
    try:
        from vllm.entrypoints.openai.chat_completion.batch_serving import (  # type: ignore[import-not-found]
            OpenAIServingChatBatch,
        )

        tell_prompts(OpenAIServingChatBatch)
    except (ImportError, AttributeError):
        pass
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
