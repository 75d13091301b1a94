"""What Verism adds to vLLM's server, on a class that answers as vLLM's does; the real one is in tests/e2e/test_vllm.py."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from services.engines.inside_vllm.verism_serve import LOWEST, tell_prompts, told


def output(ids: Sequence[int], logprobs: Sequence[float]) -> Any:
    """vLLM's RequestOutput of a prompt: the first token has no log-probability, the others a row by token."""
    rows = [None, *({token: SimpleNamespace(logprob=one)} for token, one in zip(ids[1:], logprobs, strict=True))]
    return SimpleNamespace(prompt_token_ids=list(ids), prompt_logprobs=rows)


def made() -> type[Any]:
    class Serving:
        async def chat_completion_full_generator_batch(self, request: Any, generators: Any, *more: Any) -> Any:
            for one in generators:
                async for _ in one:
                    pass
            return SimpleNamespace(choices=[SimpleNamespace(index=i) for i in reversed(range(len(generators)))], more=more)

    tell_prompts(Serving)
    return Serving


async def steps(*outputs: Any) -> AsyncIterator[Any]:
    for one in outputs:
        yield one


def asked(**request: Any) -> Any:
    """Two questions; the second one's output comes in two steps, of which the last is whole."""
    generators = [steps(output([5, 6], [-1.0])), steps(None, output([7, 8, 9], [-2.0, float("-inf")]))]
    return asyncio.run(made()().chat_completion_full_generator_batch(SimpleNamespace(**request), generators, "id", 2))


def test_each_choice_gets_its_own_prompts_numbers() -> None:
    answer = asked(prompt_logprobs=0)
    assert answer.more == ("id", 2)
    by_index = {choice.index: choice for choice in answer.choices}
    assert by_index[0].prompt_token_ids == [5, 6] and by_index[0].prompt_logprobs == [None, -1.0]
    assert by_index[1].prompt_token_ids == [7, 8, 9] and by_index[1].prompt_logprobs == [None, -2.0, LOWEST]


def test_who_does_not_ask_for_them_gets_vllms_own_answer() -> None:
    for request in ({}, {"prompt_logprobs": None}):
        assert [vars(choice) for choice in asked(**request).choices] == [{"index": 1}, {"index": 0}]


def test_rows_that_do_not_fit_the_prompt_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        told(SimpleNamespace(prompt_token_ids=[1, 2, 3], prompt_logprobs=[None, None]))


def test_a_server_of_another_build_is_left_alone() -> None:
    with pytest.raises(AttributeError):
        tell_prompts(type("Other", (), {}))
