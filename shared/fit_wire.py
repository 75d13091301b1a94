"""What travels when a reward is refitted: pictures to a service's admin listener, and how the refit goes back.

    POST   /admin/rewards/NAME/lease     Hold -> Lease        who may refit; 409 while another holder has it
    DELETE /admin/rewards/NAME/lease     {lease}              given back
    POST   /admin/rewards/NAME/pictures  FitPictures -> Waiting   msgpack, as often as needed
    POST   /admin/rewards/NAME/fit       FitRequest -> FitState   202: begun in the background with what was sent
    GET    /admin/rewards/NAME/fit       -> FitState
    POST   /admin/rewards/NAME/publish   {lease} -> FitState  a version that was fitted with publish=false is served
    POST   /admin/rewards/NAME/snapshot  {lease} -> Versions  the state as it is, kept until it is rolled back over
    POST   /admin/rewards/NAME/rollback  {lease, version} -> Versions  weights, average, optimiser and replay buffer of then
    GET    /admin/rewards/NAME/versions  -> Versions

Scores come from the last published version until a refit is done, has proved itself on pictures that it did not learn from, and is swapped in
between two batches. A version that was kept out is in the answer, with the reason. Bodies are JSON (pictures in base64) or msgpack.
"""

from typing import Any, Literal, Self, TypeVar

import msgspec
from pydantic import Field, ValidationError, model_validator

from shared.errors import BadRequest, Invalid, UnsupportedMedia, VerismError
from shared.schema import PROMPT_BYTES, Frozen, ImageData
from shared.wire import JSON, MULTIPART, Body, decode_base64, image_fields, media_type, refuse_pickle

Side = Literal["real", "generated"]
Outcome = Literal["idle", "running", "published", "ready", "kept_out", "failed"]
MOST_PICTURES = 256  # of one request
M = TypeVar("M", bound=Frozen)


class Leased(VerismError):
    """Another holder has the lease; `retry_after_ms` says for how long at most."""

    kind, status = "leased", 409


class NoLease(VerismError):
    """Not, or no longer, the lease that is held: take it again."""

    kind, status = "no-lease", 409


class Refitting(VerismError):
    """What was asked for cannot be now: a refit runs, or there is nothing to publish."""

    kind, status = "refitting", 409


class Hold(Frozen):
    """Asks for the lease, or for more time with `lease`."""

    holder: str = Field(min_length=1, max_length=200, description="who, for people who meet a 409")
    seconds: float = Field(default=60.0, gt=0, le=3600)
    lease: str | None = None


class Lease(Frozen):
    """Whoever shows it may refit for `seconds` more."""

    reward: str
    lease: str
    seconds: float
    version: int


class FitPicture(Frozen):
    """One example. `group` ties a generated picture to the real one of the same prompt where a loss compares pairs."""

    image: ImageData
    prompt: str | None = None
    group: str | None = Field(default=None, max_length=256)

    @model_validator(mode="after")
    def _short_prompt(self) -> Self:
        if self.prompt is not None and len(self.prompt.encode("utf-8", "surrogatepass")) > PROMPT_BYTES:
            raise ValueError(f"the prompt is longer than {PROMPT_BYTES} bytes; shorten it")
        return self


class FitPictures(Frozen):
    """Examples of one side."""

    lease: str
    side: Side
    items: list[FitPicture] = Field(min_length=1, max_length=MOST_PICTURES)


class Waiting(Frozen):
    """Examples that the next refit will see; one that is sent twice counts once."""

    real: int
    generated: int
    warnings: list[str] = []


class FitRequest(Frozen):
    """Begin. Settings are the service's configuration (`fit:` of the reward); these say what of them differs this once."""

    lease: str
    publish: bool = Field(default=True, description="serve the version as soon as it has proved itself; else wait for `publish`")
    until_accuracy: float | None = Field(
        default=None, gt=0.5, le=1.0, description="stop at this accuracy on the batches of a round"
    )
    rounds: int | None = Field(default=None, ge=1, le=10_000, description="most passes over the pictures")


class FitState(Frozen):
    """How a refit goes, or went. Accuracies in [0, 1] are of pictures that it did not learn from."""

    outcome: Outcome
    version: int = Field(description="served now")
    candidate: int | None = Field(default=None, description="fitted by this refit")
    round: int = 0
    rounds: int = 0
    real: int = 0
    generated: int = 0
    replayed: int = 0
    losses: dict[str, float] = {}
    accuracy: float | None = None
    accuracy_before: float | None = Field(default=None, description="of the version that was served, on the same pictures")
    evaluated: dict[str, float] = Field(
        default={}, description="some of those pictures by the sha256 of their pixels: the candidate's scores, as /score gives them"
    )
    seconds: float = 0.0
    reason: str | None = Field(default=None, description="of what was kept out or failed: what happened, and what to do")
    warnings: list[str] = []


class KeptVersion(Frozen):
    """A version that can be rolled back to."""

    version: int
    weights_sha256: str
    accuracy: float | None = None
    steps: int = Field(default=0, description="optimiser steps in all")
    replay: int = Field(default=0, description="pairs in the replay buffer")
    snapshot: bool = Field(default=False, description="kept until it is rolled back over, however many come after it")


class Versions(Frozen):
    """What there is of a reward."""

    reward: str
    version: int
    candidate: int | None = None
    kept: list[KeptVersion]


class LeaseBody(Frozen):
    """`publish`, `snapshot`, and the end of a lease."""

    lease: str


class RollbackBody(Frozen):
    """To a kept version; a later one is forgotten."""

    lease: str
    version: int = Field(ge=1)


def parse(model: type[M], header: str | None, body: Body) -> M:
    """A body. BadRequest when it cannot be read, Invalid when it is not what the route takes."""
    kind = media_type(header)
    if kind == MULTIPART:
        raise UnsupportedMedia("send application/json or application/msgpack; only /score takes a form")
    refuse_pickle(body)
    try:
        raw: Any = msgspec.json.decode(body) if kind == JSON else msgspec.msgpack.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadRequest(f"the body is not {kind.rpartition('/')[2]}") from error
    if kind == JSON and isinstance(raw, dict) and isinstance(raw.get("items"), list):
        for index, item in enumerate(raw["items"]):
            if isinstance(item, dict):
                decode_base64(item.get("image"), f"items[{index}].image")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).removeprefix(".")
        raise Invalid(f"{where or 'body'}: {first['msg']}") from error


def pack(pictures: FitPictures) -> bytes:
    """As msgpack."""
    items = [{"image": image_fields(one.image), "prompt": one.prompt, "group": one.group} for one in pictures.items]
    return msgspec.msgpack.encode({"lease": pictures.lease, "side": pictures.side, "items": items})
