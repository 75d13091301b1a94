"""`POST /v1/compare` with a comparer that looks at brightness and leans to what is shown first: what is asked, counted, refused, missing."""

import asyncio
import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from services.app import create_app
from services.compare_http import work_of
from services.config import ServiceConfig
from services.reward import Comparer, Item, Pair
from shared import wire
from shared.image import encode
from shared.schema import MAX_PAIRS, CompareAnswer, RewardInfo, Score
from tests.services.test_fuzz import deep, sound

LEAN = 0.1


class Brighter:
    """P(first wins) = 1/2 + (its grey - the other's) / 512 + LEAN. Grey 13 raises, 14 cannot be judged, 15 is slow."""

    info: RewardInfo
    asked: list[tuple[int, int]] = []
    scored: list[int] = []

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        made = cls()
        made.info = RewardInfo(name=name, mode="pairwise", version=3, description="brighter")
        return made

    def score(self, batch: Sequence[Item]) -> list[Score]:
        assert not any(isinstance(item, Pair) for item in batch)
        self.scored.append(len(batch))
        return [Score.ok(float(item.image.mean()) / 255) for item in batch]

    def compare(self, pairs: Sequence[Pair]) -> list[Score]:
        assert all(isinstance(pair, Pair) for pair in pairs)
        greys = [(int(pair.image.mean()), int(pair.references[0].mean())) for pair in pairs]
        self.asked.extend(greys)
        if any(13 in both for both in greys):
            raise ValueError("secret detail")
        out = []
        for first, second in greys:
            if first == 14:
                out.append(Score.failed("answer-unparsable", "no verdict", status="parse_error"))
            else:
                out.append(Score.ok(min(max(0.5 + (first - second) / 512 + LEAN, 0.0), 1.0)))
        return out


CONFIG: dict[str, Any] = {
    "device": "cpu",
    "rewards": {"brighter": {"use": f"{__name__}:Brighter", "batch_cap": 16}, "size": {"use": "jpeg_size", "batch_cap": 16}},
    "max_body_bytes": 300_000,
    "max_request_pixels": 40_000,
}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(ServiceConfig.model_validate(CONFIG)), raise_server_exceptions=False) as test:
        yield test


def picture(grey: int, side: int = 16) -> dict[str, Any]:
    data = encode(np.full((side, side, 3), grey, np.uint8), "png").data
    return {"encoding": "png", "height": side, "width": side, "data": base64.b64encode(data).decode()}


def body(greys: Sequence[int], groups: Sequence[Sequence[Any]] | None = None, **more: Any) -> dict[str, Any]:
    listed = [{"images": list(group)} for group in groups or [range(len(greys))]]
    return {"reward": "brighter", "images": [picture(grey) for grey in greys], "groups": listed, **more}


def ask(client: TestClient, asked: dict[str, Any]) -> CompareAnswer:
    answer = client.post("/v1/compare", json=asked)
    assert answer.status_code == 200, answer.text
    return CompareAnswer.model_validate(answer.json())


def test_it_is_a_comparer_and_says_so(client: TestClient) -> None:
    made = Brighter.load("brighter", {}, "cpu")
    assert isinstance(made, Comparer)
    listed = client.get("/v1/rewards").json()
    assert {r["name"]: r["mode"] for r in listed["rewards"]} == {"brighter": "pairwise", "size": "pointwise"}
    assert listed["limits"]["pairs"] == MAX_PAIRS


def test_both_orders_are_asked_once_and_averaged(client: TestClient) -> None:
    Brighter.asked.clear()
    greys = [100, 200, 150]
    (group,) = ask(client, body(greys)).groups
    assert sorted(Brighter.asked) == sorted((a, b) for a in greys for b in greys if a != b)
    for verdict in group.pairs:
        fair = 0.5 + (greys[verdict.first] - greys[verdict.second]) / 512
        assert verdict.value == pytest.approx(fair) and verdict.orders == pytest.approx((fair + LEAN, fair - LEAN))
    wanted = [0.5 + sum(greys[i] - g for g in greys) / 2 / 512 for i in range(3)]
    assert [row.win_rate for row in group.items] == pytest.approx(wanted)
    assert group.shown_first == pytest.approx(0.5 + LEAN)
    assert all(row.pairs == 2 and row.missing == 0 and row.standard_error for row in group.items)
    hard = ask(client, body(greys, hard=True)).groups[0]
    assert [row.win_rate for row in hard.items] == [0.0, 1.0, 0.5]


def test_swapping_a_pair_flips_its_verdict(client: TestClient) -> None:
    one, other = ask(client, body([100, 200], [[0, 1], [1, 0]])).groups
    assert one.pairs[0].value == pytest.approx(1 - (other.pairs[0].value or 0))
    assert [row.win_rate for row in one.items] == pytest.approx([row.win_rate for row in other.items[::-1]])


def test_pictures_are_uploaded_and_decoded_once(client: TestClient) -> None:
    def decoded() -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith('verism_decode_seconds_count{encoding="png"}'))

    greys = [20 * i for i in range(1, 9)]
    before = decoded()
    answer = ask(client, body(greys, [range(8), [0, 3], [7, 3, 1]]))
    assert decoded() - before == 8
    assert [len(group.pairs) for group in answer.groups] == [28, 1, 3]


def test_pictures_by_digest_are_those_by_position(client: TestClient) -> None:
    greys = [100, 200, 150]
    digests = [hashlib.sha256(base64.b64decode(picture(grey)["data"])).hexdigest() for grey in greys]
    by_place, by_digest = (ask(client, body(greys, [group])).groups for group in ([2, 0, 1], [digests[2], 0, digests[1]]))
    assert by_place == by_digest
    answer = client.post("/v1/compare", json=body(greys, [[digests[0], "0" * 64]]))
    assert answer.status_code == 422 and answer.json()["title"].startswith("groups[0].images[1]: no picture of this sha256")


def test_a_corrupt_picture_leaves_its_pairs_missing(client: TestClient) -> None:
    asked = body([100, 50, 200, 150])
    asked["images"][1]["data"] = base64.b64encode(base64.b64decode(asked["images"][1]["data"])[:40]).decode()
    (group,) = ask(client, asked).groups
    assert group.items[1].win_rate is group.items[1].standard_error is None and group.items[1].missing == 3
    assert group.items[1].error is not None and group.items[1].error.type == "urn:verism:image-unreadable"
    assert [row.pairs for row in group.items] == [2, 0, 2, 2]
    assert {(v.first, v.second) for v in group.pairs if v.error} == {(0, 1), (1, 2), (1, 3)}
    whole = ask(client, body([100, 200, 150])).groups[0]
    assert [group.items[i].win_rate for i in (0, 2, 3)] == pytest.approx([row.win_rate for row in whole.items])


@pytest.mark.parametrize(("bad", "kind"), [(13, "scoring-failed"), (14, "answer-unparsable")])
def test_a_pair_without_a_verdict_is_missing_and_no_tie(client: TestClient, bad: int, kind: str) -> None:
    (group,) = ask(client, body([100, 200, bad])).groups
    assert [v.value is None for v in group.pairs] == [False, True, True]
    assert {v.error.type for v in group.pairs if v.error} == {f"urn:verism:{kind}"}
    assert [row.pairs for row in group.items] == [1, 1, 0] and group.items[2].win_rate is None
    assert group.items[0].win_rate == pytest.approx(0.5 - 100 / 512), "what is missing pulls nobody to the middle"
    assert "secret" not in str(group)


def test_anchors_and_swiss(client: TestClient) -> None:
    greys = [30 * i for i in range(1, 8)]
    anchored = ask(client, body(greys, plan="anchor")).groups[0]
    assert {(v.first, v.second) for v in anchored.pairs} == {(0, i) for i in range(1, 7)}
    named = body(greys, plan="anchor")
    named["groups"][0]["anchors"] = [3]
    assert all(3 in (v.first, v.second) for v in ask(client, named).groups[0].pairs)
    Brighter.asked.clear()
    swiss = ask(client, body(greys, plan="swiss", hard=True)).groups[0]
    assert len(swiss.pairs) == 9 and len(Brighter.asked) == 18
    rates = [row.win_rate for row in swiss.items]
    assert rates[6] == max(rates) and rates[0] == min(rates)  # type: ignore[type-var]


def test_scores_and_pairs_share_a_lane_and_never_a_batch(client: TestClient) -> None:
    image = {"image": ("a.png", encode(np.full((16, 16, 3), 51, np.uint8), "png").data)}
    answer = client.post("/score", files=image, data={"rewards": "brighter"}).json()
    assert answer["items"][0]["scores"]["brighter"]["value"] == pytest.approx(0.2)
    assert ask(client, body([100, 200])).rewards["brighter"].version == 3


def test_msgpack_in_and_out(client: TestClient) -> None:
    asked = body([100, 200])
    asked["images"] = [{"encoding": "rgb8", "height": 16, "width": 16, "data": bytes([g]) * 768} for g in (100, 200)]
    answer = client.post("/v1/compare", content=msgspec.msgpack.encode(asked), headers={"content-type": wire.MSGPACK})
    assert answer.headers["content-type"] == wire.MSGPACK
    group = CompareAnswer.model_validate(msgspec.msgpack.decode(answer.content)).groups[0]
    assert group.pairs[0].value == pytest.approx(0.5 - 100 / 512) and not group.items[0].lossy


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"reward": "lighter"}, 404, "brighter, size"),
        ({"reward": "size"}, 422, "cannot compare; here can: brighter"),
        ({"require_version": 2}, 409, "version 3"),
        ({"groups": [{"images": [0, 0]}]}, 422, "named twice"),
        ({"groups": [{"images": [0, 9]}]}, 422, "there are 2 pictures"),
        ({"groups": [{"images": [0]}]}, 422, "groups[0].images"),
        ({"groups": [{"images": [0, -1]}]}, 422, "groups[0].images[1]"),
        ({"groups": []}, 422, "groups"),
        ({"groups": [{"images": [0, 1], "anchors": [0]}]}, 422, "plan anchor"),
        ({"groups": [{"images": [0, 1], "anchors": [2]}], "plan": "anchor"}, 422, "there are 2 pictures"),
        ({"groups": [{"id": "a", "images": [0, 1]}, {"id": "a", "images": [0, 1]}]}, 422, "repeat"),
        ({"groups": [{"images": [0, 1], "prompt": "x" * 9000}]}, 422, "shorten"),
        ({"rounds": 2}, 422, "swiss"),
        ({"plan": "some"}, 422, "plan"),
        ({"flavour": 1}, 422, "flavour"),
        ({"images": [picture(1)]}, 422, "images"),
        ({"images": [{**picture(1), "data": "%"}] * 2}, 422, "images[0].data: not base64"),
    ],
)
def test_what_is_refused(client: TestClient, changes: dict[str, Any], status: int, said: str) -> None:
    answer = client.post("/v1/compare", json={**body([100, 200]), **changes})
    assert answer.status_code == status and said in answer.json()["title"], answer.text
    sound(answer)


def test_the_number_of_pairs_is_bounded_before_anything_is_decoded(client: TestClient) -> None:
    Brighter.asked.clear()
    asked = body([100] * 92)  # 4186 pairs
    answer = client.post("/v1/compare", json=asked)
    assert answer.status_code == 422 and (answer.json()["limit"], answer.json()["observed"]) == (MAX_PAIRS, 4186)
    many = client.post("/v1/compare", json=body([1, 2], [[0, 1]] * 257))
    assert many.status_code == 422 and not Brighter.asked
    swiss = client.post("/v1/compare", json={**asked, "plan": "swiss"})
    assert swiss.status_code == 200 and len(swiss.json()["groups"][0]["pairs"]) == 7 * 46


def test_limits_of_score_hold_here_too(client: TestClient) -> None:
    answer = client.post("/v1/compare", content=b"0" * 400_000, headers={"content-type": wire.JSON})
    assert answer.status_code == 413
    form = client.post("/v1/compare", files={"image": ("a.png", b"x")})
    assert form.status_code == 415 and "form" in form.json()["title"]
    pickled = client.post("/v1/compare", content=b"\x80\x04K\x01.", headers={"content-type": wire.MSGPACK})
    assert pickled.status_code == 415 and "never read" in pickled.json()["title"]
    large = {**body([1, 2, 3]), "images": [picture(10, 150), picture(20, 150), picture(200)]}  # more pixels than a request may have
    (group,) = ask(client, large).groups
    assert [row.error is None for row in group.items] == [True, False, False]
    assert group.items[1].error is not None and group.items[1].error.type == "urn:verism:image-too-large"


def test_deadlines_keys_and_a_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_A_READER", "the key of a reader")
    monkeypatch.setenv("KEY_OF_A_TRAINER", "the key of a trainer")
    keys = {"r": {"env": "KEY_OF_A_READER", "scopes": ["read"]}, "t": {"env": "KEY_OF_A_TRAINER", "scopes": ["score"]}}
    app = create_app(ServiceConfig.model_validate({**CONFIG, "keys": keys, "max_waiting_items": 8}))
    with TestClient(app) as one:
        assert one.post("/v1/compare", json=body([1, 2])).status_code == 401
        reader = {"x-api-key": "the key of a reader"}
        assert one.post("/v1/compare", json=body([1, 2]), headers=reader).status_code == 403
        trainer = {"x-api-key": "the key of a trainer"}
        assert one.post("/v1/compare", json=body([1, 2]), headers=trainer).status_code == 200
        lane = app.state.verism.rewards["brighter"].lane
        for _ in range(20):
            lane.time.observe(1, 5.0)
        late = one.post("/v1/compare", json=body([1, 2], deadline_ms=50), headers=trainer)
        assert late.status_code == 504 and "deadline_ms" in late.json()["title"]
        app.state.verism.draining = True
        assert one.post("/v1/compare", json=body([1, 2]), headers=trainer).status_code == 503
        app.state.verism.draining = False


def test_questions_count_at_admission() -> None:
    app = create_app(ServiceConfig.model_validate({**CONFIG, "max_waiting_items": 12}))
    gate = asyncio.Event()
    lane = app.state.verism.rewards["brighter"].lane
    plain = lane.ask

    async def held(*arguments: Any) -> Any:
        await gate.wait()
        return await plain(*arguments)

    async def run() -> list[httpx.Response]:
        lane.ask = held
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://verism") as one:
            first = asyncio.ensure_future(one.post("/v1/compare", json=body([1, 2, 3, 4])))  # 12 questions
            while len(app.state.verism.flights) == 0:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            second = await one.post("/v1/compare", json=body([5, 6]))
            gate.set()
            third = await first
            await app.state.verism.drain()
            return [second, third]

    refused, answered = asyncio.run(run())
    assert refused.status_code == 429 and refused.json()["retryable"] and refused.headers["retry-after"]
    assert answered.status_code == 200


def test_weights_that_change_between_rounds_are_never_mixed() -> None:
    app = create_app(ServiceConfig.model_validate(CONFIG))
    lane = app.state.verism.rewards["brighter"].lane
    plain, calls = lane.ask, []

    async def swapping(*arguments: Any) -> Any:
        told = await plain(*arguments)
        calls.append(told.work.info.version)
        if len(calls) == 1:
            reward = Brighter.load("brighter", {}, "cpu")
            reward.info = reward.info.model_copy(update={"version": 4})
            await lane.swap(work_of(reward))
        return told

    async def run() -> httpx.Response:
        lane.ask = swapping
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://verism") as one:
            answer = await one.post("/v1/compare", json=body([10, 20, 30, 40], plan="swiss"))
            await app.state.verism.drain()
            return answer

    answer = asyncio.run(run())
    assert answer.json()["rewards"]["brighter"]["version"] == 4
    assert calls == [3, 4, 4, 4], "the round by the old weights is asked again"


def test_the_document_has_the_request(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"CompareRequest", "CompareGroup", "CompareAnswer", "ScoreRequest"} <= set(schemas)
    assert "request_id" not in schemas["CompareRequest"]["required"] and schemas["CompareGroup"]["required"] == ["images"]


FIELDS = ("request_id", "reward", "priority", "deadline_ms", "require_version", "plan", "rounds", "hard", "images", "groups", "x")


@settings(max_examples=80, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, deep)), st.sampled_from([wire.JSON, wire.MSGPACK]))
def test_anything_in_any_field(client: TestClient, changes: dict[str, object], kind: str) -> None:
    asked = {**body([100, 200]), **changes}
    encoded = msgspec.msgpack.encode(asked) if kind == wire.MSGPACK else msgspec.json.encode(asked)
    sound(client.post("/v1/compare", content=encoded, headers={"content-type": kind}))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bodies(client: TestClient, data: st.DataObject) -> None:
    whole = bytearray(msgspec.json.encode(body([100, 200])))
    for _ in range(data.draw(st.integers(1, 4))):
        spot = data.draw(st.integers(0, len(whole) - 1))
        whole[spot : spot + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    sound(client.post("/v1/compare", content=bytes(whole), headers={"content-type": wire.JSON}))


def test_nesting_is_no_way_to_the_stack(client: TestClient) -> None:
    for content, kind in ((b"[" * 100_000, wire.JSON), (b"\x91" * 100_000, wire.MSGPACK)):
        answer = client.post("/v1/compare", content=content, headers={"content-type": kind})
        sound(answer)
        assert answer.status_code in (400, 422)
