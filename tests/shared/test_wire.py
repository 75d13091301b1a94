"""Three spellings, one request."""

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import wire
from shared.errors import BadRequest, Invalid, UnsupportedMedia, VerismError
from shared.image import encode
from shared.schema import ImageData, ItemAnswer, RewardUsed, Score, ScoreAnswer, ScoreItem, ScoreRequest


def request(count: int = 2, prompt: str | None = "a bag") -> ScoreRequest:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 18, 3), dtype=np.uint8)
    items = [ScoreItem(id=f"{i}:p.png", prompt=prompt, image=encode(p, "png")) for i, p in enumerate(pixels)]
    return ScoreRequest(request_id="r", rewards=["detector"], priority="train", deadline_ms=900, items=items)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.one_of(st.none(), st.text(max_size=40).filter(lambda t: "\r" not in t)))
def test_json_multipart_and_msgpack_are_one_request(count: int, prompt: str | None) -> None:
    asked = request(count, prompt)
    from_json = wire.parse_json(wire.json_request(asked)).request
    from_pack = wire.parse_msgpack(wire.pack_request(asked)).request
    parts = [wire.Part("image", "p.png", item.image.data) for item in asked.items]
    parts += [wire.Part("rewards", None, b"detector"), wire.Part("request_id", None, b"r")]
    parts += [wire.Part("priority", None, b"train"), wire.Part("deadline_ms", None, b"900")]
    if prompt is not None:
        parts.append(wire.Part("prompt", None, prompt.encode()))
    from_form = wire.parse_form(parts).request
    assert from_json == from_pack == asked
    assert from_form == asked


def test_answers_round_trip() -> None:
    scores = {"a": Score.ok(0.5, parts={"logit": 0.0}, in_domain=True), "b": Score.failed("x", "why")}
    answer = ScoreAnswer(
        request_id="r", rewards={"a": RewardUsed(version=1, preprocessing="p")}, items=[ItemAnswer(id="0", scores=scores)]
    )
    for kind in (wire.JSON, wire.MSGPACK):
        assert wire.parse_answer(wire.render_answer(answer, kind), kind) == answer


@pytest.mark.parametrize(
    "change, message",
    [
        ({"items": []}, "items: List should have at least 1"),
        ({"items": "x"}, "items: Input should be a valid list"),
        ({"itmes": []}, "items: Field required"),
        ({"priority": "now"}, "priority"),
        ({"extra": 1}, "extra: Extra inputs"),
    ],
)
def test_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    raw = json.loads(wire.json_request(request()))
    if "itmes" in change:
        del raw["items"]
    with pytest.raises(Invalid, match=message.replace("(", "\\(")):
        wire.parse_json(json.dumps({**raw, **change}).encode())


def test_errors_name_the_item() -> None:
    raw = json.loads(wire.json_request(request()))
    raw["items"][1]["image"]["data"] = "%%%"
    with pytest.raises(Invalid, match=r"items\[1\]\.image\.data: not base64"):
        wire.parse_json(json.dumps(raw).encode())
    raw["items"][1]["image"]["data"] = base64.b64encode(b"x").decode()
    raw["items"][1]["image"]["height"] = -1
    with pytest.raises(Invalid, match=r"items\[1\]\.image\.height"):
        wire.parse_json(json.dumps(raw).encode())


def test_repeated_ids_and_long_prompts_are_refused() -> None:
    raw = json.loads(wire.json_request(request()))
    raw["items"][1]["id"] = raw["items"][0]["id"]
    with pytest.raises(Invalid, match="ids repeat"):
        wire.parse_json(json.dumps(raw).encode())
    raw = json.loads(wire.json_request(request()))
    raw["items"][0]["prompt"] = "x" * 9000
    with pytest.raises(Invalid, match="8192 bytes"):
        wire.parse_json(json.dumps(raw).encode())


def test_pickles_are_named_and_refused() -> None:
    with pytest.raises(UnsupportedMedia, match="pickle"):
        wire.parse_msgpack(b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x06images\x94]\x94s.")
    with pytest.raises(UnsupportedMedia, match="never read"):
        wire.media_type("application/octet-stream")
    with pytest.raises(UnsupportedMedia, match="never read"):
        wire.media_type("application/x-pickle")


def test_a_pickle_that_calls_itself_json_is_named() -> None:
    with pytest.raises(UnsupportedMedia, match="pickle"):
        wire.parse_json(b"\x80\x04]\x94.")


def test_ids_may_be_left_out_in_json_and_msgpack() -> None:
    raw = {"items": [{"image": {"encoding": "rgb8", "height": 16, "width": 16, "data": ""}}] * 2}
    for parsed in (wire.parse_json(json.dumps(raw).encode()), wire.parse_msgpack(msgspec.msgpack.encode(raw))):
        assert [item.id for item in parsed.request.items] == ["0", "1"] and parsed.request.request_id


@pytest.mark.parametrize(
    "extra, message",
    [
        ([wire.Part("prompt", None, b"\xff\xfe")], "prompt: not UTF-8"),
        ([wire.Part("request_id", None, b"a")] * 2, "request_id: given 2 times"),
        ([wire.Part("deadline_ms", None, b"soon")], "deadline_ms: Input should be a valid integer"),
        ([wire.Part("priority", None, b"now")], "priority: Input should be 'interactive'"),
    ],
)
def test_form_errors_name_the_field(extra: list[wire.Part], message: str) -> None:
    good = wire.Part("image", "a.png", encode(np.zeros((16, 16, 3), np.uint8), "png").data)
    with pytest.raises(Invalid, match=message):
        wire.parse_form([good, *extra])


def test_a_form_without_a_picture_says_how_to_send_one() -> None:
    with pytest.raises(Invalid, match="curl -F image=@photo.jpg"):
        wire.parse_form([wire.Part("prompt", None, b"a bag")])


def test_a_form_with_a_broken_file_keeps_its_neighbours() -> None:
    good = encode(np.zeros((16, 16, 3), np.uint8), "png").data
    parsed = wire.parse_form([wire.Part("image", "a.png", good), wire.Part("image", "b.txt", b"hello")])
    assert set(parsed.broken) == {1} and parsed.broken[1].type == "urn:verism:image-unreadable"
    with pytest.raises(Invalid, match="unknown form field 'imgae'"):
        wire.parse_form([wire.Part("imgae", "a.png", good)])
    with pytest.raises(Invalid, match="one for all pictures"):
        wire.parse_form([wire.Part("image", "a.png", good)] + [wire.Part("prompt", None, b"x")] * 2)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_hostile_bodies_raise_our_errors_only(body: bytes) -> None:
    for parse in (wire.parse_json, wire.parse_msgpack):
        with pytest.raises(VerismError):
            parse(body)


@settings(max_examples=80, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5) | st.binary(max_size=5),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(st.sampled_from(["items", "image", "id", "data", "references", "meta"]), c, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_hostile_structures_raise_our_errors_only(raw: Any) -> None:
    with pytest.raises(VerismError):
        wire.parse_msgpack(msgspec.msgpack.encode(raw))


def test_deep_json_is_refused() -> None:
    with pytest.raises(BadRequest):
        wire.parse_json(b"[" * 100_000)


def test_a_score_is_finite_or_an_error() -> None:
    for bad in (float("nan"), float("inf")):
        assert Score.ok(bad).status == "error" and Score.ok(bad).value is None
        assert Score.ok(0.5, parts={"x": bad}).status == "error"
        assert Score.ok(0.5, sigma=bad).status == "error"
    with pytest.raises(ValueError, match="exactly when"):
        Score(status="error", value=0.0)
    assert ImageData(encoding="rgb8", height=1, width=1, data=b"abc").data == b"abc"


def test_raw_pixels_are_seen_where_they_lie() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (160, 150, 3), dtype=np.uint8)
    image = ImageData.model_construct(encoding="rgb8", height=160, width=150, data=pixels.data.cast("B"))
    small = ScoreItem(id="b", image=encode(pixels[:16, :16], "rgb8"))
    asked = ScoreRequest.model_construct(
        request_id="r",
        rewards=None,
        priority="train",
        deadline_ms=None,
        require_version=None,
        items=[ScoreItem(id="a", image=image), small],
    )
    chunks = wire.pack_chunks(asked)
    assert [len(chunk) >= wire.OWN_CHUNK for chunk in chunks] == [False, True, False]
    assert np.shares_memory(np.frombuffer(chunks[1], np.uint8), pixels)
    body = bytearray(b"".join(chunks))
    assert bytes(body) == wire.pack_request(asked)
    request = wire.parse_msgpack(body).request
    seen = np.frombuffer(request.items[0].image.data, np.uint8)
    assert np.shares_memory(seen, np.frombuffer(body, np.uint8)) and not seen.flags.writeable
    assert np.array_equal(seen.reshape(pixels.shape), pixels) and request.items[1] == small


changes = st.dictionaries(
    st.sampled_from(["request_id", "rewards", "priority", "deadline_ms", "require_version", "items", "extra"]),
    st.sampled_from([None, "", "a", "bulk", 0, 7, -1, 1.0, 2.5, True, "12", b"b", [], ["a"], [1], {"a": 1}, {"a": "1"}, "x" * 300]),
    max_size=2,
)
inside = st.dictionaries(
    st.sampled_from(["id", "group", "prompt", "references", "meta", "image", "extra", "encoding", "height", "width", "data"]),
    st.sampled_from(
        [None, "", "0", "png", "gif", 0, 16, 70_000, 16.0, True, "16", b"b", "text", [], {}, {"a": [1, b"x"]}, "\u00e9" * 5000]
    ),
    max_size=2,
)


@settings(max_examples=300, deadline=None)
@given(changes, st.lists(inside, min_size=1, max_size=3))
def test_the_quick_way_says_what_the_schema_says(change: dict[str, Any], items: list[dict[str, Any]]) -> None:
    """Whatever it takes, pydantic takes, as the same request; and it takes every request without oddities."""
    raw: dict[str, Any] = {"request_id": "r", "items": []}
    for number, one in enumerate(items):
        image: dict[str, Any] = {"encoding": "rgb8", "height": 16, "width": 16, "data": b"abc"}
        item: dict[str, Any] = {"id": str(number), "image": image}
        for name, value in one.items():
            (image if name in ("encoding", "height", "width", "data") else item)[name] = value
        raw["items"].append(item)
    body = msgspec.msgpack.encode({**raw, **change})
    quick = wire._quick(body)
    if quick is not None:
        assert quick == wire.checked(ScoreRequest, msgspec.msgpack.decode(body), "items")
    elif not change and not any(items):
        raise AssertionError("a plain request goes the long way")
