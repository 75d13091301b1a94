"""What Verism adds to vLLM's server, without one; the real one is in tests/e2e/test_vllm.py."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from services.engines import vllm
from services.engines.inside_vllm import verism_serve
from services.engines.inside_vllm.verism_serve import LOWEST, parted, told


def output(ids: Sequence[int], logprobs: Sequence[float], *texts: str) -> Any:
    """vLLM's RequestOutput: the prompt's first token has no log-probability, the others a row by token."""
    rows = [None, *({token: SimpleNamespace(logprob=one)} for token, one in zip(ids[1:], logprobs, strict=True))]
    top = [{7: SimpleNamespace(logprob=-0.5), 9: SimpleNamespace(logprob=float("-inf"))}]
    made = [SimpleNamespace(index=i, text=text, finish_reason="stop", logprobs=top) for i, text in enumerate(texts)]
    return SimpleNamespace(prompt_token_ids=list(ids), prompt_logprobs=rows, outputs=made)


def test_answers_look_like_those_of_the_chat_route() -> None:
    rows = told(output([5, 6, 8], [-2.0, float("-inf")], "a", "b"), prompt=True)
    assert [(row["index"], row["message"]["content"], row["finish_reason"]) for row in rows] == [(0, "a", "stop"), (1, "b", "stop")]
    top = rows[0]["logprobs"]["content"][0]["top_logprobs"]
    assert top == [{"token": "token_id:7", "logprob": -0.5}, {"token": "token_id:9", "logprob": LOWEST}]
    assert rows[0]["prompt_token_ids"] == [5, 6, 8] and rows[0]["prompt_logprobs"] == [None, -2.0, LOWEST]
    assert "prompt_logprobs" not in told(output([5, 6], [-1.0], "a"), prompt=False)[0]


def test_rows_that_do_not_fit_the_prompt_are_an_error() -> None:
    odd = output([1, 2], [0.0], "a")
    odd.prompt_token_ids = [1, 2, 3]
    with pytest.raises(ValueError, match="zip"):
        told(odd, prompt=True)


def test_pictures_are_taken_out_of_the_messages() -> None:
    shown = {"type": "image_url", "image_url": {"size": [1, 1], "rgb": b"abc"}, "uuid": "x"}
    messages = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": [shown, {"type": "text", "text": "Which?"}]}]
    texts, pictures = parted(messages)
    assert pictures == [shown] and texts[0] == messages[0]
    assert texts[1]["content"] == [{"type": "image_url", "image_url": None, "uuid": "0"}, {"type": "text", "text": "Which?"}]
    assert messages[1]["content"][0] is shown


def test_both_sides_name_the_same_route() -> None:
    assert vllm.OWN == verism_serve.ROUTE
