"""`POST /rewrite`: what is asked and what is answered, JSON both ways.

curl -H 'content-type: application/json' -d '{"prompt": "a dog on a beach", "n": 4}' localhost:8005/rewrite
"""

from collections.abc import Sequence
from typing import Annotated, Any, Self

import msgspec
from pydantic import Field, field_validator, model_validator

from shared.errors import BadRequest, UnsupportedMedia
from shared.rewriting import Fault
from shared.schema import PROMPT_BYTES, Frozen, Problem
from shared.wire import JSON, Body, checked, media_type, refuse_pickle

MAX_PROMPTS = 64
MAX_REWRITES = 256


class RewriteRequest(Frozen):
    """Body of `POST /rewrite`."""

    request_id: Annotated[str, Field(max_length=256)]
    prompt: str | list[str] = Field(
        description=f"what the user wants to see, or up to {MAX_PROMPTS} such prompts, each up to {PROMPT_BYTES} bytes"
    )
    n: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description=f"rewrites of each; {MAX_REWRITES} of all together")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None, description="the same seed, prompt and weights give the same rewrites; null draws one, which the answer says"
    )
    temperature: Annotated[float, Field(ge=0, le=4)] = Field(
        default=1.0, description="0 takes the likeliest token each time; else from 0.01"
    )
    deadline_ms: Annotated[int, Field(gt=0)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts(cls, prompt: Any) -> Any:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError('give one text, "a dog on a beach", or a list of texts')
        if not 1 <= len(texts) <= MAX_PROMPTS:
            raise ValueError(f"give 1 to {MAX_PROMPTS} prompts, not {len(texts)}")
        for text in texts:
            if len(text.encode("utf-8", "surrogatepass")) > PROMPT_BYTES:
                raise ValueError(f"the prompt is longer than {PROMPT_BYTES} bytes; shorten it")
            if not any(c.isalnum() for c in text):
                raise ValueError("the prompt is empty: say in words what the picture should show")
        return prompt

    @field_validator("temperature")
    @classmethod
    def _warm(cls, temperature: float) -> float:
        if 0 < temperature < 0.01:
            raise ValueError("give 0, or 0.01 and more")
        return temperature

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        if self.n * len(self.prompts) > MAX_REWRITES:
            raise ValueError(f"{self.n * len(self.prompts)} rewrites are more than {MAX_REWRITES}: lower n, or send fewer prompts")
        return self

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


class Rewrite(Frozen):
    """One rewrite. With a `fault`, `text` is the user's own prompt; with an `error` too, and nothing was drawn."""

    text: str
    fault: Fault | None = Field(default=None, description="why what the model said is not used")
    said: str = Field(default="", description="what the model wrote, as it is")
    logp: float = Field(default=0.0, description="sum of `logps`")
    logps: list[float] = Field(
        default=[], description="log-probability of each token at the temperature, over the whole vocabulary"
    )
    ended: bool = Field(default=True, description="false where the answer was cut at the longest length")
    error: Problem | None = None


class Rewrites(Frozen):
    """The rewrites of one prompt, in order."""

    prompt: str
    rewrites: list[Rewrite]


class RewriterInfo(Frozen):
    """What `GET /v1/rewriter` says. `max_new_tokens` bounds what a rewrite may cost."""

    name: str
    weights_sha256: str
    instruction: str
    max_new_tokens: int
    max_prompt_tokens: int
    licence: str = "see the model card"


class RewriteAnswer(Frozen):
    """Answer of `POST /rewrite`: one entry for each prompt, in order."""

    request_id: str
    model: str
    weights_sha256: str
    seed: int
    temperature: float
    items: list[Rewrites]
    timing_ms: dict[str, float] = {}


def parse(header: str | None, body: Body) -> RewriteRequest:
    """BadRequest when it cannot be read, Invalid when it is not a request."""
    if media_type(header) != JSON:
        raise UnsupportedMedia(f'send {JSON}: curl -H "content-type: {JSON}" -d \'{{"prompt": "a dog on a beach"}}\' URL/rewrite')
    refuse_pickle(body)
    try:
        raw: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadRequest("the body is not JSON") from error
    return checked(RewriteRequest, raw, "")


def pack(prompts: Sequence[str], **fields: Any) -> bytes:
    """The caller's side of `parse`; fields as in RewriteRequest."""
    return msgspec.json.encode({"prompt": list(prompts), **fields})
