"""`RewardClient.compare`: win rates at the caller's own positions, and the same patience and honesty as `score`."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from services.app import create_app
from services.config import ServiceConfig
from shared import client as module
from shared import wire
from shared.client import CompareTable, RewardClient
from tests.services.test_compare_http import CONFIG


def grey(value: int) -> NDArray[np.uint8]:
    return np.full((16, 16, 3), value, np.uint8)


class Between(httpx.AsyncBaseTransport):
    """The true service behind a hand that may answer first; the bodies that came through are kept."""

    def __init__(self, hand: Callable[[int], httpx.Response | Exception | None] = lambda n: None) -> None:
        self.app = create_app(ServiceConfig.model_validate(CONFIG), tuned=False)
        self._service, self._hand, self.bodies = httpx.ASGITransport(self.app), hand, list[Any]()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        self.bodies.append(msgspec.msgpack.decode(content))
        said = self._hand(len(self.bodies))
        if isinstance(said, Exception):
            raise said
        return said or await self._service.handle_async_request(request)


def ask(between: Between, greys: list[int], groups: list[str], timeout_s: float = 30.0, **more: Any) -> CompareTable:
    async def run() -> CompareTable:
        async with RewardClient({"brighter": "http://verism"}, transport=between, timeout_s=timeout_s) as client:
            table = await client.compare([grey(value) for value in greys], groups, **more)
        await between.app.state.verism.drain()
        return table

    return asyncio.run(run())


def problem(status: int, kind: str, retryable: bool, **headers: str) -> httpx.Response:
    body = {"type": f"urn:verism:{kind}", "title": "as it is", "retryable": retryable}
    return httpx.Response(status, json=body, headers=headers)


def test_rates_stand_where_the_pictures_stood() -> None:
    between = Between()
    greys, groups = [100, 40, 200, 60, 150, 9], ["a", "b", "a", "b", "a", "alone"]
    table = ask(between, greys, groups)
    wanted = {0: (150 - 100 * 2 + 200, "a")}
    assert table.rates_B[0] == pytest.approx(0.5 - wanted[0][0] / 1024)
    assert table.rates_B[1] + table.rates_B[3] == pytest.approx(1) and table.rates_B[3] > table.rates_B[1]
    assert table.mask_B.tolist() == [True] * 5 + [False] and np.isnan(table.rates_B[5]) and table.failures == {}
    assert (table.errors_B[:5] > 0).all() and table.version == 3 and set(table.groups) == {"a", "b"}
    assert {(v.first, v.second) for v in table.groups["a"].pairs} == {(0, 2), (0, 4), (2, 4)}
    (body,) = between.bodies
    assert len(body["images"]) == 5, "each picture once, and none that is compared with nothing"


def test_anchors_are_positions_of_the_caller() -> None:
    table = ask(Between(), [10, 20, 30, 40, 50, 60], ["a", "b"] * 3, plan="anchor", anchors=[2, 5])
    assert {(v.first, v.second) for v in table.groups["a"].pairs} == {(0, 2), (2, 4)}
    assert {(v.first, v.second) for v in table.groups["b"].pairs} == {(1, 5), (3, 5)}


def test_what_is_too_much_for_one_request_is_cut_between_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAIRS", 2500)  # 1225 pairs a group
    between = Between()
    table = ask(between, [20 + i for i in range(150)], [str(i // 50) for i in range(150)])
    requests = {body["request_id"]: len(body["groups"]) for body in between.bodies}  # one may be told to come back
    assert sorted(requests.values()) == [1, 2]
    assert table.mask_B.all() and table.failures == {}


def test_missing_pairs_are_counted_and_masked() -> None:
    table = ask(Between(), [100, 200, 14], ["a"] * 3)
    assert table.mask_B.tolist() == [True, True, False]
    assert table.failures == {"urn:verism:answer-unparsable": 2}


def test_only_what_is_retryable_is_asked_again_with_the_same_id() -> None:
    between = Between(lambda n: problem(429, "busy", True, **{"retry-after": "0"}) if n < 3 else None)
    assert ask(between, [1, 2], ["a", "a"]).mask_B.all()
    assert len(between.bodies) == 3 and len({body["request_id"] for body in between.bodies}) == 1
    firm = Between(lambda n: problem(422, "invalid", False))
    table = ask(firm, [1, 2, 3], ["a"] * 3)
    assert len(firm.bodies) == 1 and not table.mask_B.any() and table.failures == {"urn:verism:invalid": 3}


def test_one_deadline_holds_over_all_tries() -> None:
    between, began = Between(lambda n: httpx.ConnectError("refused")), time.monotonic()
    table = ask(between, [1, 2], ["a", "a"], timeout_s=0.6)
    assert time.monotonic() - began < 5 and len(between.bodies) > 1
    assert table.failures == {"urn:verism:unreachable": 1} and table.version is None
    assert all(0 < body["deadline_ms"] <= 600 for body in between.bodies)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"\xc1", msgspec.msgpack.encode({"request_id": "r", "rewards": {}, "groups": []})]
)
def test_an_answer_of_another_kind_is_none(content: bytes) -> None:
    between = Between(lambda n: httpx.Response(200, content=content, headers={"content-type": wire.MSGPACK}))
    table = ask(between, [1, 2], ["a", "a"])
    assert table.failures == {"urn:verism:bad-answer": 1} and not table.mask_B.any() and len(between.bodies) == 1


def test_an_answer_about_pictures_that_were_not_sent_is_none() -> None:
    told = {"id": "a", "items": [], "pairs": [{"first": 0, "second": 7, "value": 0.5}]}
    used = {"brighter": {"version": 1, "preprocessing": "none"}}
    content = msgspec.msgpack.encode({"request_id": "r", "rewards": used, "groups": [told]})
    table = ask(Between(lambda n: httpx.Response(200, content=content)), [1, 2], ["a", "a"])
    assert table.failures == {"urn:verism:bad-answer": 1} and table.groups == {}


def test_two_versions_are_never_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAIRS", 1)
    between = Between()
    told = iter((1, 2))

    def hand(n: int) -> httpx.Response:
        group = between.bodies[n - 1]["groups"][0]["id"]
        rows = [{"image": i, "win_rate": 0.5, "standard_error": 0.1, "pairs": 1} for i in (0, 1)]
        answer = {"id": group, "items": rows, "pairs": [{"first": 0, "second": 1, "value": 0.5}]}
        used = {"brighter": {"version": next(told), "preprocessing": "none"}}
        return httpx.Response(200, content=msgspec.msgpack.encode({"request_id": "r", "rewards": used, "groups": [answer]}))

    between._hand = hand
    table = ask(between, [1, 2, 3, 4], ["a", "a", "b", "b"])
    assert table.failures == {"urn:verism:version-changed": 2} and not table.mask_B.any()


def test_what_the_caller_gets_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="two prompts"):
        ask(Between(), [1, 2], ["a", "a"], prompts=["x", "y"])
    with pytest.raises(ValueError, match="known: brighter"):
        ask(Between(), [1, 2], ["a", "a"], reward="lighter")
