"""JSON or msgpack of `POST /v1/compare`, both ways. There is no form: a tournament has too much to say for one."""

import uuid
from typing import Any

import msgspec
from pydantic import ValidationError

from shared.errors import BadRequest, Invalid, UnsupportedMedia
from shared.schema import MAX_PAIRS, CompareAnswer, CompareGroup, CompareRequest
from shared.wire import JSON, MSGPACK, MULTIPART, Body, _decode_base64, _image, _refuse_pickle, media_type

_DECODE: dict[str, Any] = {JSON: msgspec.json.decode, MSGPACK: msgspec.msgpack.decode}
_ENCODE: dict[str, Any] = {JSON: msgspec.json.encode, MSGPACK: msgspec.msgpack.encode}


def parse(header: str | None, body: Body) -> tuple[CompareRequest, str]:
    """The request and the media type that it came in. BadRequest when it cannot be read, Invalid when it is not a request."""
    kind = media_type(header)
    if kind == MULTIPART:
        raise UnsupportedMedia(f"send {JSON} or {MSGPACK}; only /score takes a form")
    _refuse_pickle(body)
    try:
        raw: Any = _DECODE[kind](body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadRequest(f"the body is not {kind.rpartition('/')[2]}") from error
    if isinstance(raw, dict):
        raw.setdefault("request_id", uuid.uuid4().hex)
        for index, image in enumerate(raw["images"] if kind == JSON and isinstance(raw.get("images"), list) else []):
            _decode_base64(image, f"images[{index}]")
        for index, group in enumerate(raw["groups"] if isinstance(raw.get("groups"), list) else []):
            if isinstance(group, dict):
                group.setdefault("id", str(index))
    try:
        request = CompareRequest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).lstrip(".")
        raise Invalid(f"{path or 'request'}: {first['msg']}") from error
    if request.pairs > MAX_PAIRS:
        title = f"groups: {request.pairs} pairs are more than {MAX_PAIRS}: send fewer groups, or take plan anchor or swiss"
        raise Invalid(title, limit=MAX_PAIRS, observed=request.pairs)
    return request, kind


def pack(request: CompareRequest) -> bytes:
    """A request as msgpack; its pictures go as they are, without a copy before this one."""
    plain = {name: getattr(request, name) for name in CompareRequest.model_fields if name not in ("images", "groups")}
    groups = [{name: getattr(group, name) for name in CompareGroup.model_fields} for group in request.groups]
    return msgspec.msgpack.encode({**plain, "images": [_image(image) for image in request.images], "groups": groups})


def render_answer(answer: CompareAnswer, kind: str) -> bytes:
    """The answer as JSON, or as msgpack for who asked in msgpack."""
    body: bytes = _ENCODE[kind](answer.model_dump(mode="python"))
    return body


def parse_answer(body: bytes) -> CompareAnswer:
    """The client's side of `render_answer`, of msgpack."""
    return CompareAnswer.model_validate(msgspec.msgpack.decode(body))
