"""JSON, multipart or msgpack: three spellings of one request.

JSON and msgpack are the schema itself (JSON with base64 `data`); multipart is for curl and browsers: files named `image`, and
the fields `prompt`, `rewards`, `request_id`, `priority`, `deadline_ms`.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
import pybase64
from pydantic import BaseModel, ValidationError

from shared.errors import BadImage, BadRequest, Invalid, UnsupportedMedia
from shared.image import from_file
from shared.schema import (
    MAX_ITEMS,
    PROMPT_BYTES,
    Encoding,
    ImageData,
    Priority,
    Problem,
    ScoreAnswer,
    ScoreItem,
    ScoreRequest,
)

JSON, MSGPACK, MULTIPART = "application/json", "application/msgpack", "multipart/form-data"
Body = bytes | bytearray | memoryview
OWN_CHUNK = 1 << 16  # pictures of fewer bytes travel in one chunk with what stands before them
_PACK = msgspec.msgpack.Encoder()
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Part:
    """One part of a form: a field (`filename` None) or a file."""

    name: str
    filename: str | None
    data: bytes


@dataclass(frozen=True)
class Parsed:
    """A valid request, and the items that are already known to be broken (by index), such as an uploaded file that is no picture."""

    request: ScoreRequest
    broken: dict[int, Problem]


def media_type(header: str | None) -> str:
    """The bare type of a Content-Type header; UnsupportedMedia unless it is one of the three."""
    bare = (header or "").split(";")[0].strip().lower()
    bare = {"application/x-msgpack": MSGPACK, "application/vnd.msgpack": MSGPACK}.get(bare, bare)
    if bare not in (JSON, MSGPACK, MULTIPART):
        extra = "; pickles are never read: anyone who sends one could run code here" if "pickle" in bare or "octet" in bare else ""
        raise UnsupportedMedia(f"send {JSON}, {MULTIPART} or {MSGPACK}, not {bare or 'an unnamed type'}{extra}")
    return bare


def checked(model: type[M], raw: Any, several: str) -> M:
    """`raw` as a request, with ids made up where it and its `several` have none. Invalid names the first place that is wrong."""
    if isinstance(raw, dict):
        raw.setdefault("request_id", uuid.uuid4().hex)
        for index, one in enumerate(raw[several] if isinstance(raw.get(several), list) else []):
            if isinstance(one, dict):
                one.setdefault("id", str(index))
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ""
        for step in first["loc"]:
            path += f"[{step}]" if isinstance(step, int) else (f".{step}" if path else str(step))
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise Invalid(f"{path or 'request'}: {first['msg']}{more}") from error


def decode_base64(image: Any, path: str) -> None:
    if isinstance(image, dict) and isinstance(image.get("data"), str):
        try:
            image["data"] = pybase64.b64decode(image["data"], validate=True)
        except ValueError as error:
            raise Invalid(f"{path}.data: not base64") from error


def refuse_pickle(body: Body) -> None:
    if body[:1] == b"\x80" and body[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise UnsupportedMedia("this is a pickle; pickles are never read. Send msgpack: shared.client does")


def parse_json(body: bytes) -> Parsed:
    """BadRequest when it is no JSON, Invalid when it is not a request."""
    refuse_pickle(body)
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("the body is not JSON") from error
    if isinstance(raw, dict) and isinstance(raw.get("items"), list):
        for index, item in enumerate(raw["items"]):
            if isinstance(item, dict):
                decode_base64(item.get("image"), f"items[{index}].image")
                references = item.get("references")
                for number, reference in enumerate(references if isinstance(references, list) else []):
                    decode_base64(reference, f"items[{index}].references[{number}]")
    return Parsed(checked(ScoreRequest, raw, "items"), {})


def parse_msgpack(body: Body) -> Parsed:
    """BadRequest when it is no msgpack (a pickle is told so), Invalid when it is not a request.

    The `data` of raw pixels is a read-only memoryview into `body`, which must not change as long as the request lives.
    """
    refuse_pickle(body)
    request = _quick(body)
    if request is None:  # so that what is wrong is said in the schema's words
        try:
            raw = msgspec.msgpack.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise BadRequest("the body is not msgpack") from error
        request = checked(ScoreRequest, raw, "items")
    return Parsed(request, {})


class _Image(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    encoding: Encoding
    height: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    width: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    data: memoryview


_Name = Annotated[str, msgspec.Meta(max_length=256)]


class _Item(msgspec.Struct, forbid_unknown_fields=True):
    image: _Image
    id: _Name | msgspec.UnsetType = msgspec.UNSET
    group: _Name | None = None
    prompt: str | None = None
    references: list[_Image] = []
    meta: dict[str, Any] = {}


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    items: Annotated[list[_Item], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)]
    request_id: _Name | msgspec.UnsetType = msgspec.UNSET
    rewards: list[str] | None = None
    priority: Priority = "interactive"
    deadline_ms: Annotated[int, msgspec.Meta(gt=0)] | None = None
    require_version: dict[str, int] | None = None


_REQUEST = msgspec.msgpack.Decoder(_Request)


def _quick(body: Body) -> ScoreRequest | None:
    """The request without pydantic and without copies of raw pixels; None for whatever is not wholly as it should be."""
    try:
        raw = _REQUEST.decode(memoryview(body).toreadonly())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    ids = [str(index) if item.id is msgspec.UNSET else item.id for index, item in enumerate(raw.items)]
    prompts = {item.prompt for item in raw.items if item.prompt is not None}
    if len(set(ids)) != len(ids) or any(len(prompt.encode()) > PROMPT_BYTES for prompt in prompts):
        return None
    return ScoreRequest.model_construct(
        request_id=uuid.uuid4().hex if raw.request_id is msgspec.UNSET else raw.request_id,
        rewards=raw.rewards,
        priority=raw.priority,
        deadline_ms=raw.deadline_ms,
        require_version=raw.require_version,
        items=[
            ScoreItem.model_construct(
                id=name,
                group=item.group,
                prompt=item.prompt,
                image=_seen(item.image),
                references=[_seen(reference) for reference in item.references],
                meta=item.meta,
            )
            for name, item in zip(ids, raw.items, strict=True)
        ],
    )


def _seen(image: _Image) -> ImageData:
    """Files are small and go to decoders that want bytes; raw pixels stay where they are."""
    data = image.data if image.encoding == "rgb8" else bytes(image.data)
    return ImageData.model_construct(encoding=image.encoding, height=image.height, width=image.width, data=data)


def parse_form(parts: Sequence[Part]) -> Parsed:
    """A form: any number of files `image`, one `prompt` for all or one each, and the options. Invalid for an unknown field."""
    known = {"image", "prompt", "rewards", "request_id", "priority", "deadline_ms"}
    unknown = sorted({part.name for part in parts} - known)
    if unknown:
        raise Invalid(f"unknown form field {unknown[0]!r}; known: {', '.join(sorted(known))}")

    def texts(name: str) -> list[str]:
        try:
            return [part.data.decode() for part in parts if part.name == name]
        except UnicodeDecodeError as error:
            raise Invalid(f"{name}: not UTF-8 text") from error

    files, prompts = [part for part in parts if part.name == "image"], texts("prompt")
    if not files:
        raise Invalid("image: the form holds no picture; send it as `curl -F image=@photo.jpg URL/score` does")
    if len(prompts) not in (0, 1, len(files)):
        raise Invalid(f"prompt: give none, one for all pictures, or one each: {len(prompts)} for {len(files)} pictures")
    broken: dict[int, Problem] = {}
    items = []
    for index, part in enumerate(files):
        try:
            image = from_file(part.data)
        except BadImage as error:
            broken[index] = error.problem()
            image = ImageData(encoding="rgb8", height=1, width=1, data=b"")
        prompt = prompts[index] if len(prompts) > 1 else (prompts[0] if prompts else None)
        items.append({"id": f"{index}:{(part.filename or 'image')[:200]}", "image": image, "prompt": prompt})
    raw: dict[str, Any] = {"items": items}
    for name in ("request_id", "priority", "deadline_ms"):
        if given := texts(name):
            if len(given) > 1:
                raise Invalid(f"{name}: given {len(given)} times; give it once")
            raw[name] = given[0]
    if rewards := texts("rewards"):
        raw["rewards"] = [name.strip() for text in rewards for name in text.split(",") if name.strip()]
    return Parsed(checked(ScoreRequest, raw, "items"), broken)


def pack_request(request: ScoreRequest) -> bytes:
    """A request as msgpack."""
    return b"".join(pack_chunks(request))


def pack_chunks(request: ScoreRequest) -> list[bytes | memoryview]:
    """What `pack_request` joins: large pictures are the buffers that the request holds, not copies."""
    chunks: list[bytes | memoryview] = []
    count = len(request.items)
    small = bytearray(_open({**_plain(request), "items": None}))
    small += bytes([0x90 | count]) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    for item in request.items:
        data = memoryview(item.image.data)
        small += _open({**_item(item), "image": None}) + _open({**image_fields(item.image), "data": None})
        small += b"\xc6" + data.nbytes.to_bytes(4, "big")
        if data.nbytes < OWN_CHUNK:
            small += data
        else:
            chunks += [bytes(small), data]
            small.clear()
    return [*chunks, bytes(small)] if small else chunks


def _open(last_is_none: dict[str, Any]) -> bytes:
    """A map in msgpack that ends before its last value."""
    return _PACK.encode(last_is_none)[:-1]


def json_request(request: ScoreRequest) -> bytes:
    """A request as JSON with base64 data."""
    items = [{**_item(item), "image": image_fields(item.image)} for item in request.items]
    return msgspec.json.encode({**_plain(request), "items": items})


def image_fields(image: ImageData) -> dict[str, Any]:
    return {"encoding": image.encoding, "height": image.height, "width": image.width, "data": image.data}


def _item(item: ScoreItem) -> dict[str, Any]:
    """Without its image."""
    return {
        "id": item.id,
        "group": item.group,
        "prompt": item.prompt,
        "references": [image_fields(reference) for reference in item.references],
        "meta": item.meta,
    }


def _plain(request: ScoreRequest) -> dict[str, Any]:
    """Without its items."""
    return {
        "request_id": request.request_id,
        "rewards": request.rewards,
        "priority": request.priority,
        "deadline_ms": request.deadline_ms,
        "require_version": request.require_version,
    }


def render_answer(answer: BaseModel, kind: str) -> bytes:
    """The answer as JSON, or as msgpack for who asked in msgpack."""
    plain = answer.model_dump(mode="python")
    return _PACK.encode(plain) if kind == MSGPACK else msgspec.json.encode(plain)


def parse_answer(body: bytes, kind: str) -> ScoreAnswer:
    """The client's side of `render_answer`."""
    return ScoreAnswer.model_validate(msgspec.msgpack.decode(body) if kind == MSGPACK else msgspec.json.decode(body))
