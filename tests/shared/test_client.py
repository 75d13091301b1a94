"""The client against services that are slow, full, gone, wrong or several; a transport in the test makes every answer but the last one's."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import client as client_module
from shared import wire
from shared.client import LIMITS, Connections, RequestFailed, RewardClient, RewardClientSync, ScoreTable, _chunks
from shared.errors import Busy, ServiceUnreachable
from shared.image import encode
from shared.schema import ImageData, ItemAnswer, RewardInfo, RewardUsed, Score, ScoreAnswer, ScoreItem, ScoreRequest

Handler = Callable[[httpx.Request], httpx.Response] | Callable[[httpx.Request], Awaitable[httpx.Response]]
ROOT = Path(__file__).resolve().parents[2]
URL = {"mean": "http://one:8001"}


def pictures(count: int, side: int = 16) -> list[np.ndarray]:
    return [np.full((side, side, 3), i % 256, np.uint8) for i in range(count)]


def asked(request: httpx.Request) -> ScoreRequest:
    return wire.parse_msgpack(request.content).request


def mean(item: ScoreItem) -> Score:
    """The first byte of the picture, over 255."""
    return Score.ok(item.image.data[0] / 255, parts={"byte": item.image.data[0]})


def answer(request: httpx.Request, score: Callable[[ScoreItem], Score] = mean, version: int = 1) -> httpx.Response:
    body = asked(request)
    names = body.rewards or []
    used = {name: RewardUsed(version=version, preprocessing="none") for name in names}
    items = [ItemAnswer(id=item.id, scores=dict.fromkeys(names, score(item))) for item in body.items]
    out = ScoreAnswer(request_id=body.request_id, rewards=used, items=items)
    return httpx.Response(200, content=wire.render_answer(out, wire.MSGPACK))


def problem(error: Busy, **headers: str) -> httpx.Response:
    return httpx.Response(error.status, json=error.problem().model_dump(exclude_none=True), headers=headers)


def score(
    handler: Handler, count: int = 3, services: dict[str, str | list[str]] | None = None, timeout_s: float = 5.0
) -> ScoreTable:
    services = services or dict(URL)
    with RewardClientSync(services, timeout_s=timeout_s, transport=httpx.MockTransport(handler)) as client:
        return client.score(pictures(count))


def test_values_stand_in_order_with_their_mask_and_parts() -> None:
    table = score(answer, 300)
    assert table.values_RB.shape == table.mask_RB.shape == (1, 300) and table.mask_RB.all()
    assert np.array_equal(table.values_RB[0], np.arange(300) % 256 / 255)
    assert np.array_equal(table.part("mean", "byte"), np.arange(300.0) % 256) and table.versions == {"mean": 1}
    with pytest.raises(KeyError, match="no part 'bite'; known: byte"):
        table.part("mean", "bite")


def test_a_failed_item_is_nan_and_masked_never_a_number() -> None:
    def second_fails(item: ScoreItem) -> Score:
        return mean(item) if item.id != "1" else Score.ok(float("nan"))

    table = score(lambda request: answer(request, second_fails))
    assert table.mask_RB.tolist() == [[True, False, True]] and np.isnan(table.values_RB[0, 1])
    assert table.failures == {"urn:verism:non-finite-score": 1} and np.isnan(table.part("mean", "byte")[1])


def test_no_pictures_are_no_request() -> None:
    def never(request: httpx.Request) -> httpx.Response:
        raise AssertionError("nothing to ask")

    assert score(never, 0).values_RB.shape == (1, 0)


@pytest.mark.parametrize("header", [True, False])
def test_a_full_service_is_asked_again_when_it_said(header: bool) -> None:
    times: list[float] = []

    def full_once(request: httpx.Request) -> httpx.Response:
        times.append(time.monotonic())
        if len(times) > 1:
            return answer(request)
        if header:
            return httpx.Response(429, headers={"retry-after": "1"}, text="a proxy speaks")
        return problem(Busy("full", retry_after_ms=1000))

    assert score(full_once).mask_RB.all() and len(times) == 2
    assert 1.0 <= times[1] - times[0] < 2.0


def test_waiting_longer_than_the_deadline_is_not_waited() -> None:
    began = time.monotonic()
    table = score(lambda request: problem(Busy("full", retry_after_ms=60_000)), timeout_s=5)
    assert time.monotonic() - began < 2 and table.failures == {"urn:verism:busy": 3} and not table.mask_RB.any()


@pytest.mark.parametrize(
    "status, kind", [(404, "unknown-reward"), (422, "invalid"), (413, "too-large"), (504, "deadline-exceeded")]
)
def test_what_is_not_retryable_is_asked_once(status: int, kind: str) -> None:
    calls: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        calls.append(asked(request).request_id)
        return httpx.Response(status, json={"type": f"urn:verism:{kind}", "title": "why", "retryable": False, "instance": "x"})

    table = score(refuse)
    assert len(calls) == 1 and table.failures == {f"urn:verism:{kind}": 3}
    error = table.scores[0][0].error
    assert error is not None and error.title == "why" and error.status == status
    assert table.scores[0][0].status == ("timeout" if status == 504 else "error")


def test_a_retry_keeps_its_request_id_and_one_deadline() -> None:
    seen: list[tuple[str, int]] = []

    def thrice(request: httpx.Request) -> httpx.Response:
        body = asked(request)
        assert body.deadline_ms is not None
        seen.append((body.request_id, body.deadline_ms))
        return answer(request) if len(seen) == 3 else httpx.Response(503, text="starting")

    assert score(thrice).mask_RB.all()
    assert (
        len({i for i, _ in seen}) == 1 and seen[0][1] <= 5000 and [d for _, d in seen] == sorted((d for _, d in seen), reverse=True)
    )


def test_a_slow_service_ends_with_the_deadline() -> None:
    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        return answer(request)

    began = time.monotonic()
    table = score(slow, timeout_s=0.3)
    assert time.monotonic() - began < 2 and {s.status for s in table.scores[0]} == {"timeout"}
    error = table.scores[0][0].error
    assert error is not None and "http://one:8001 did not answer within 0.3 s" in error.title


def test_a_service_that_is_down_is_named() -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    error = score(down, timeout_s=0.3).scores[0][0].error
    assert error is not None and error.type == "urn:verism:unreachable"
    assert "http://one:8001 does not answer" in error.title and "verism-serve" in error.title
    client = RewardClientSync({"mean": ["http://a", "http://b"]}, transport=httpx.MockTransport(down))
    with client, pytest.raises(ServiceUnreachable, match="http://a or http://b .*verism-serve"):
        client.info()


@pytest.mark.parametrize("body", [b"<html>", b"", msgspec.msgpack.encode({"items": []}), msgspec.msgpack.encode([1])])
def test_an_answer_that_is_none_gives_no_scores(body: bytes) -> None:
    table = score(lambda request: httpx.Response(200, content=body))
    assert table.failures == {"urn:verism:bad-answer": 3} and not table.mask_RB.any()


def test_answers_for_other_items_are_refused() -> None:
    def shuffled(request: httpx.Request) -> httpx.Response:
        whole = wire.parse_answer(answer(request).content, wire.MSGPACK)
        return httpx.Response(200, content=wire.render_answer(whole.model_copy(update={"items": whole.items[::-1]}), wire.MSGPACK))

    assert score(shuffled).failures == {"urn:verism:bad-answer": 3}


def test_weights_that_change_between_requests_mix_no_scores() -> None:
    calls: list[int] = []

    def swapped(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        return answer(request, version=len(calls))

    table = score(swapped, 300)
    assert table.failures == {"urn:verism:version-changed": 300} and table.versions == {}


def test_a_broken_replica_is_left_alone_and_the_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts: list[str] = []

    def one_broken(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return httpx.Response(500, text="oops") if request.url.host == "bad" else answer(request)

    monkeypatch.setattr(client_module, "EJECT_SECONDS", 60.0)
    transport = httpx.MockTransport(one_broken)
    with RewardClientSync({"mean": ["http://bad", "http://good"]}, transport=transport) as client:
        assert all(client.score(pictures(2)).mask_RB.all() for _ in range(12))
    assert hosts.count("bad") <= 1 and hosts.count("good") == 12


def test_replicas_share_the_work() -> None:
    hosts: list[str] = []

    async def steady(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        await asyncio.sleep(0.05)
        return answer(request)

    assert score(steady, 1024, {"mean": ["http://a", "http://b"]}).mask_RB.all()
    assert sorted(hosts) == ["a", "a", "b", "b"]


def test_rewards_are_asked_where_they_are_served() -> None:
    def apart(request: httpx.Request) -> httpx.Response:
        assert asked(request).rewards == [request.url.host]
        return answer(request)

    with RewardClientSync({"a": "http://a", "b": "http://b"}, transport=httpx.MockTransport(apart)) as client:
        assert client.score(pictures(2)).rewards == ("a", "b")
        assert client.score(pictures(2), rewards=["b"]).values_RB.shape == (1, 2)
        with pytest.raises(ValueError, match="no URL for reward 'c'; known: a, b"):
            client.score(pictures(2), rewards=["c"])


def test_info_asks_the_next_replica_and_names_what_is_served() -> None:
    def second(request: httpx.Request) -> httpx.Response:
        if request.url.host == "a":
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"rewards": [RewardInfo(name="mean").model_dump(mode="json")]})

    transport = httpx.MockTransport(second)
    with RewardClientSync({"mean": ["http://a", "http://b"]}, transport=transport) as client:
        assert client.info() == {"mean": RewardInfo(name="mean")}
    client = RewardClientSync({"realism": "http://b"}, transport=transport)
    with client, pytest.raises(RequestFailed, match="http://b does not serve 'realism'; it serves: mean"):
        client.info()


@pytest.mark.parametrize("url", ["localhost:8001", "http://host:port", "ftp://host", "http://", ""])
def test_a_misspelt_url_is_refused_at_once(url: str) -> None:
    began = time.monotonic()
    with RewardClientSync({"mean": url}) as client:
        with pytest.raises(ServiceUnreachable, match="reward 'mean', is not one; write it as http://HOST:PORT"):
            client.info()
        table = client.score(pictures(2))
    assert time.monotonic() - began < 2 and table.failures == {"urn:verism:unreachable": 2} and not table.mask_RB.any()


def test_a_client_without_services_says_what_it_wants() -> None:
    with pytest.raises(ValueError, match="name at least one reward"):
        RewardClient({})
    with pytest.raises(ValueError, match="has no URL"):
        RewardClient({"mean": []})


async def _inside_a_loop() -> ScoreTable:
    with RewardClientSync(URL, transport=httpx.MockTransport(answer)) as client:
        return client.score(pictures(2))


def test_the_sync_face_works_inside_a_running_loop_and_closes_twice() -> None:
    assert asyncio.run(_inside_a_loop()).mask_RB.all()
    client = RewardClientSync(URL, transport=httpx.MockTransport(answer))
    future = client.submit(pictures(2))
    assert future.result(5).mask_RB.all()
    client.close()
    client.close()


@pytest.mark.parametrize("encoding", ["rgb8", "qoi", "png"])
def test_pixels_travel_lossless_in_the_encoding_that_was_asked_for(encoding: str) -> None:
    kinds: set[str] = set()

    def look(request: httpx.Request) -> httpx.Response:
        kinds.update(item.image.encoding for item in asked(request).items)
        return answer(request)

    with RewardClientSync(URL, encoding=encoding, transport=httpx.MockTransport(look)) as client:
        client.score(pictures(2))
    assert kinds == {encoding}


def item(i: int, group: str | None, height: int = 16, data: bytes = b"") -> ScoreItem:
    return ScoreItem(id=str(i), group=group, image=ImageData(encoding="rgb8", height=height, width=16, data=data))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(16, 60_000)), max_size=700))
def test_requests_hold_every_item_once_within_the_limits(shapes: list[tuple[str | None, int]]) -> None:
    items = [item(i, group, height) for i, (group, height) in enumerate(shapes)]
    chunks = _chunks(items)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(items))) and all(chunks)

    def cost(positions: list[int]) -> np.ndarray:
        return np.array([len(positions), 0, sum(items[i].image.height * 16 for i in positions)])

    assert all((cost(chunk) <= LIMITS).all() for chunk in chunks)
    for group in ("a", "b", "c"):
        members = [i for i, x in enumerate(items) if x.group == group]
        if members and (cost(members) <= LIMITS).all():
            assert sum(bool(set(members) & set(chunk)) for chunk in chunks) == 1


def test_a_group_of_large_pictures_is_cut_below_the_body_limit() -> None:
    large = encode(np.zeros((1024, 1024, 3), np.uint8))
    chunks = _chunks([ScoreItem(id=str(i), group="g", image=large) for i in range(24)])
    assert [len(chunk) for chunk in chunks] == [16, 8]


def test_rewards_of_one_service_share_a_request_and_the_key_goes_along() -> None:
    seen: list[httpx.Request] = []

    def both(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        asked = wire.parse_msgpack(request.content).request
        names = asked.rewards or []
        return httpx.Response(
            200,
            content=wire.render_answer(
                ScoreAnswer(
                    request_id=asked.request_id,
                    rewards={n: RewardUsed(version=1, weights_sha256=None, preprocessing="none") for n in names},
                    items=[ItemAnswer(id=i.id, scores={n: Score.ok(float(len(n))) for n in names}) for i in asked.items],
                ),
                wire.MSGPACK,
            ),
        )

    services = {"a": "http://one", "bb": "http://one/", "ccc": "http://two"}
    with RewardClientSync(services, api_key="secret", transport=httpx.MockTransport(both)) as client:
        table = client.score(pictures(3), rewards=["ccc", "a", "bb"])
    assert table.values_RB.tolist() == [[3.0] * 3, [1.0] * 3, [2.0] * 3]
    assert sorted(str(r.url.host) for r in seen) == ["one", "two"]
    assert all(r.headers["authorization"] == "Bearer secret" for r in seen)


def test_pictures_are_sent_from_the_arrays_and_again_when_asked_again() -> None:
    images = [np.random.default_rng(i).integers(0, 256, (200, 150, 3), dtype=np.uint8) for i in range(3)]
    images.append(np.asfortranarray(images[0]))
    streams: list[list[bytes | memoryview]] = []

    async def twice(request: httpx.Request) -> httpx.Response:
        chunks = [chunk async for chunk in request.stream]  # type: ignore[union-attr]
        streams.append(list(chunks))
        assert int(request.headers["content-length"]) == sum(map(len, chunks)) and "transfer-encoding" not in request.headers
        request = httpx.Request("POST", request.url, content=b"".join(chunks))
        return answer(request) if len(streams) == 2 else httpx.Response(503, text="starting")

    class Raw(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return await twice(request)

    with RewardClientSync(dict(URL), transport=Raw()) as client:
        table = client.score(images)
    assert table.values_RB[0].tolist() == [image[0, 0, 0] / 255 for image in images]
    large = [np.frombuffer(chunk, np.uint8) for chunk in streams[1] if len(chunk) > 1000]
    assert [np.shares_memory(chunk, image) for chunk, image in zip(large, images, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize("shape", [(0, 16, 3), (16, 16), (16, 16, 4)])
def test_what_is_no_picture_is_refused_before_it_is_sent(shape: tuple[int, ...]) -> None:
    with RewardClientSync(URL, transport=httpx.MockTransport(answer)) as client, pytest.raises(ValueError):
        client.score([np.zeros(shape, np.uint8)])


def test_no_trace_is_named_where_nobody_set_tracing_up() -> None:
    code = (
        "import httpx, sys, numpy as np; from shared.client import RewardClientSync; seen = []\n"
        "def note(request): seen.append('traceparent' in request.headers); return httpx.Response(500)\n"
        "with RewardClientSync({'a': 'http://a'}, timeout_s=0.2, transport=httpx.MockTransport(note)) as client:\n"
        "    client.score([np.zeros((16, 16, 3), np.uint8)])\n"
        "print(seen[0], [name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"


def test_items_with_a_retryable_error_are_asked_again_alone() -> None:
    seen: list[list[str]] = []

    def gone_twice(request: httpx.Request) -> httpx.Response:
        seen.append([item.id for item in asked(request).items])
        gone, wrong = Score.failed("engine-gone", "later", retryable=True), Score.failed("bad", "never")
        tries = len(seen)
        return answer(
            request, lambda item: wrong if item.id == "0" else gone if item.id in ("1", "3") and tries <= 2 else mean(item)
        )

    table = score(gone_twice, 5)
    assert seen == [["0", "1", "2", "3", "4"], ["1", "3"], ["1", "3"]]
    assert table.mask_RB.tolist() == [[False, True, True, True, True]] and table.failures == {"urn:verism:bad": 1}
    assert table.values_RB[0, 1:].tolist() == [i / 255 for i in range(1, 5)]


def test_items_are_asked_again_until_the_deadline_and_by_one_version_only() -> None:
    gone = Score.failed("engine-gone", "later", retryable=True)
    began = time.monotonic()
    table = score(lambda request: answer(request, lambda item: gone), 2, timeout_s=0.8)
    assert time.monotonic() - began < 2 and table.failures == {"urn:verism:engine-gone": 2}
    tries: list[int] = []

    def swapped(request: httpx.Request) -> httpx.Response:
        tries.append(len(tries))
        return answer(request, lambda item: gone if item.id == "1" and len(tries) == 1 else mean(item), version=len(tries))

    table = score(swapped, 2)
    assert tries == [0, 1] and table.mask_RB.tolist() == [[True, False]] and table.versions == {"mean": 1}


def test_a_connection_whose_caller_left_is_not_used_again() -> None:
    """httpcore may take such a connection for busy ever after."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.004)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
                await asyncio.sleep(0.002)
                writer.write(b"there")
                await writer.drain()
        writer.close()

    async def leave_often() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            for steps in range(60):
                async with httpx.AsyncClient(transport=Connections(1), timeout=2, trust_env=False) as client:
                    leaving = asyncio.create_task(client.get(url))
                    for _ in range(steps):
                        await asyncio.sleep(0)
                    leaving.cancel()
                    await asyncio.gather(leaving, return_exceptions=True)
                    assert (await client.get(url)).text == "there"

    asyncio.run(asyncio.wait_for(leave_often(), 30))
