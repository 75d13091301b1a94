"""What a vision-language engine is: three verbs over a batch of chats. It knows nothing of rewards or HTTP services.

first      log-probabilities of chosen spellings at the first position of the answer
echo       log-probabilities of the tokens of a given answer, the chat template's tokens left out
generate   n answers

Each verb gives one entry for each chat, in order: an answer, or the `Failure` of this chat alone. A device that is out of memory raises
what the device raises, so that a lane can send a smaller batch.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
_SECRET = secrets.token_bytes(32)


@dataclass(frozen=True, eq=False)
class Chat:
    """One question: texts and pictures (H, W, 3) uint8 in the order in which the model reads them.

    `continuation` is how the assistant's answer begins: `echo` measures it, the other verbs go on after it.
    """

    parts: tuple[str | Picture, ...]
    system: str | None = None
    continuation: str | None = None

    @property
    def images(self) -> tuple[Picture, ...]:
        return tuple(part for part in self.parts if not isinstance(part, str))

    def messages(self, picture: Callable[[Picture], Any]) -> list[dict[str, Any]]:
        """As OpenAI's chat has them; `picture` makes the part of a picture."""
        content = [_text(part) if isinstance(part, str) else picture(part) for part in self.parts]
        out: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            out.insert(0, {"role": "system", "content": [_text(self.system)]})
        if self.continuation is not None:
            out.append({"role": "assistant", "content": [_text(self.continuation)]})
        return out


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@dataclass(frozen=True)
class First:
    """`logprobs` by spelling, over the whole vocabulary; what the engine did not return is absent, and then at most `ceiling`."""

    logprobs: Mapping[str, float]
    ceiling: float = float("-inf")


@dataclass(frozen=True)
class Echo:
    """Log-probability of each token of the continuation."""

    logprobs_T: tuple[float, ...]


@dataclass(frozen=True)
class Generated:
    """One answer; not `finished` when it was cut at max_tokens."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Failure:
    """Why one chat got no answer: the last part of a urn, and what to do."""

    type: str
    title: str
    retryable: bool = False
    status: Literal["parse_error", "refused", "timeout", "error"] = "error"


@dataclass(frozen=True)
class Sampling:
    """How to generate. At temperature 0 the likeliest token is taken and all n answers are one. A seed gives the same answers again."""

    n: int = 1
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0


@runtime_checkable
class Engine(Protocol):
    """One model; its methods may be called from several threads."""

    name: str
    weights_sha256: str | None
    context: int | None
    reserved: re.Pattern[str]  # tokens that no prompt may hold

    @property
    def ready(self) -> bool:
        """Whether a question asked now would be answered."""
        ...

    def tokens(self, texts: Sequence[str]) -> list[list[int]] | None:
        """Token ids of each text by itself; None when the engine does not tell."""
        ...

    def first(self, chats: Sequence[Chat], spellings: Sequence[str]) -> list[First | Failure]:
        """Every spelling is one token (or stands for its first one)."""
        ...

    def echo(self, chats: Sequence[Chat]) -> list[Echo | Failure]:
        """Every chat has a continuation."""
        ...

    def generate(self, chats: Sequence[Chat], sampling: Sampling) -> list[tuple[Generated, ...] | Failure]:
        """`sampling.n` answers for each chat."""
        ...

    def close(self) -> None:
        """Let go of the model, or of the process that holds it."""
        ...


def continued(opened: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens of `whole` come after what it shares with `opened`."""
    shared = next((i for i, (a, b) in enumerate(zip(opened, whole, strict=False)) if a != b), min(len(opened), len(whole)))
    return len(whole) - shared


def too_long(tokens: int | None, context: int | None) -> Failure:
    """Of a question that the model cannot read to its end."""
    said = (
        f"question and pictures are {tokens} tokens, the model reads {context}" if tokens else f"the model reads {context} tokens"
    )
    title = f"{said}; send smaller pictures or a shorter prompt, or set `processor: {{size: ...}}`"
    return Failure("question-too-long", title, status="refused")


def picture_id(image: Picture) -> str:
    """Of pixels and shape, with this process's secret: nobody else can name a picture."""
    height, width, _ = image.shape
    hasher = blake3(height.to_bytes(4, "little") + width.to_bytes(4, "little"), key=_SECRET)
    return str(hasher.update(np.ascontiguousarray(image).data.cast("B")).hexdigest(16))
