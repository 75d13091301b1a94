"""JSON or msgpack of `POST /v1/compare`, both ways. There is no form: a tournament has too much to say for one."""

from typing import Any

import msgspec

from shared.errors import BadRequest, Invalid, UnsupportedMedia
from shared.schema import MAX_PAIRS, CompareAnswer, CompareGroup, CompareRequest
from shared.wire import JSON, MSGPACK, MULTIPART, Body, checked, decode_base64, image_fields, media_type, refuse_pickle

_DECODE: dict[str, Any] = {JSON: msgspec.json.decode, MSGPACK: msgspec.msgpack.decode}


def parse(header: str | None, body: Body) -> tuple[CompareRequest, str]:
    """The request and the media type that it came in. BadRequest when it cannot be read, Invalid when it is not a request."""
    kind = media_type(header)
    if kind == MULTIPART:
        raise UnsupportedMedia(f"send {JSON} or {MSGPACK}; only /score takes a form")
    refuse_pickle(body)
    try:
        raw: Any = _DECODE[kind](body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadRequest(f"the body is not {kind.rpartition('/')[2]}") from error
    if kind == JSON and isinstance(raw, dict) and isinstance(raw.get("images"), list):
        for index, image in enumerate(raw["images"]):
            decode_base64(image, f"images[{index}]")
    request = checked(CompareRequest, raw, "groups")
    if request.pairs > MAX_PAIRS:
        title = f"groups: {request.pairs} pairs are more than {MAX_PAIRS}: send fewer groups, or take plan anchor or swiss"
        raise Invalid(title, limit=MAX_PAIRS, observed=request.pairs)
    return request, kind


def pack(request: CompareRequest) -> bytes:
    """A request as msgpack; its pictures go as they are, without a copy before this one."""
    plain = {name: getattr(request, name) for name in CompareRequest.model_fields if name not in ("images", "groups")}
    groups = [{name: getattr(group, name) for name in CompareGroup.model_fields} for group in request.groups]
    return msgspec.msgpack.encode({**plain, "images": [image_fields(image) for image in request.images], "groups": groups})


def parse_answer(body: bytes) -> CompareAnswer:
    """The client's side of `wire.render_answer`, of msgpack."""
    return CompareAnswer.model_validate(msgspec.msgpack.decode(body))
