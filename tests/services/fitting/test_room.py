"""Refits behind the admin listener, with the service's own app beside it in one event loop: leases, outcomes, versions, what is on disk."""

import asyncio
import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch

from services.admin import create_admin
from services.app import State, create_app
from services.auth import KeyOptions
from services.config import ServiceConfig, explain
from services.fitting.room import Holder, _quiet
from services.scheduler import Lane
from shared import wire
from shared.errors import VerismError
from shared.fit_wire import FitPicture, FitPictures, FitState, Hold, Leased, NoLease, Side, pack
from shared.image import encode
from shared.schema import ScoreItem, ScoreRequest
from tests.services.fitting.linear import Head, pictures

KEY = "the admin key of a test"
LINEAR = "tests.services.fitting.linear:Linear"
FIT: dict[str, Any] = {"optim": {"lr": 0.05}, "ema": 0.5, "augment": None, "batch": 8, "rounds": 3, "until_accuracy": 1.0}


class Service:
    """Both apps, and what a trainer does with them."""

    def __init__(self, state: State, app: httpx.AsyncClient, admin: httpx.AsyncClient) -> None:
        self.state, self.app, self.admin, self.lease = state, app, admin, ""

    async def post(
        self, path: str, body: dict[str, Any] | bytes, *, method: str = "POST", reward: str = "linear"
    ) -> httpx.Response:
        kind = wire.MSGPACK if isinstance(body, bytes) else wire.JSON
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await self.admin.request(method, f"/admin/rewards/{reward}/{path}", content=content, headers={"content-type": kind})

    async def take(self, holder: str = "a test", seconds: float = 60) -> str:
        answer = await self.post("lease", {"holder": holder, "seconds": seconds})
        assert answer.status_code == 200, answer.text
        self.lease = answer.json()["lease"]
        return self.lease

    async def add(self, side: Side, images: Sequence[np.ndarray]) -> httpx.Response:
        items = [FitPicture(image=encode(image)) for image in images]
        return await self.post("pictures", pack(FitPictures(lease=self.lease, side=side, items=items)))

    async def fit(self, seed: int = 0, mean: float = 140, **asked: Any) -> FitState:
        """Add, begin, wait."""
        for side, centre, number in (("real", 120, 2 * seed), ("generated", mean, 2 * seed + 1)):
            answer = await self.add(side, pictures(40, centre, number))  # type: ignore[arg-type]
            assert answer.status_code == 200, answer.text
        answer = await self.post("fit", {"lease": self.lease, **asked})
        assert answer.status_code == 202, answer.text
        assert answer.json()["outcome"] == "running"
        return await self.done()

    async def done(self) -> FitState:
        while (state := FitState.model_validate((await self.admin.get("/admin/rewards/linear/fit")).json())).outcome == "running":
            await asyncio.sleep(0.01)
        return state

    async def score(self, images: Sequence[np.ndarray], **fields: Any) -> httpx.Response:
        items = [ScoreItem(id=str(i), image=encode(image)) for i, image in enumerate(images)]
        body = wire.json_request(ScoreRequest(request_id=os.urandom(8).hex(), items=items, rewards=["linear"], **fields))
        return await self.app.post("/score", content=body, headers={"content-type": wire.JSON})

    async def values(self, images: Sequence[np.ndarray], **fields: Any) -> tuple[list[float], int, str]:
        said = (await self.score(images, **fields)).json()
        used = said["rewards"]["linear"]
        return [one["scores"]["linear"]["value"] for one in said["items"]], used["version"], used["weights_sha256"]

    async def versions(self) -> dict[str, Any]:
        said: dict[str, Any] = (await self.admin.get("/admin/rewards/linear/versions")).json()
        return said


@contextlib.asynccontextmanager
async def serving(folder: Path, head: dict[str, Any] | None = None, **fit: Any) -> AsyncIterator[Service]:
    options = {**FIT, "folder": str(folder), "head": head or {}, **fit}
    rewards = {"linear": {"use": LINEAR, "batch_cap": 16, "fit": options}, "size": {"use": "jpeg_size", "batch_cap": 16}}
    config = ServiceConfig.model_validate({"device": "cpu", "rewards": rewards, "admin": {"sha256": "0" * 64}})
    app = create_app(config, tuned=False)
    state = app.state.verism
    admin = create_admin(state, {"admin": KeyOptions(sha256=hashlib.sha256(KEY.encode()).hexdigest(), scopes=("admin",))})

    def client(one: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(one, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://s", headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    async with client(app) as one, client(admin) as other:
        try:
            yield Service(state, one, other)
        finally:
            await state.drain()


def in_service(test: Callable[[Service], Awaitable[None]], folder: Path, **options: Any) -> None:
    async def run() -> None:
        async with serving(folder, **options) as service:
            await test(service)

    asyncio.run(run())


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said: dict[str, Any] = answer.json()
    assert said["type"].startswith("urn:verism:") and said["title"]
    return said


def test_a_refit_is_published_and_scores_as_it_was_evaluated(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        some = [*pictures(40, 120, 0), *pictures(40, 140, 1)]
        before = await service.values(some)
        await service.take()
        state = await service.fit()
        assert (state.outcome, state.version, state.candidate) == ("published", 2, None) and state.reason is None
        assert (state.real, state.generated, state.replayed) == (40, 40, 0) and state.seconds > 0
        assert state.accuracy is not None and state.accuracy_before == 0.0 and state.accuracy > 0.8
        after = await service.values(some)
        assert before[1:] != after[1:] and after[1] == 2
        scores = {hashlib.sha256(one.tobytes()).hexdigest(): value for one, value in zip(some, after[0], strict=True)}
        assert len(state.evaluated) >= 8
        for key, value in state.evaluated.items():
            assert scores[key] == pytest.approx(value, abs=1e-5), "a fit's own evaluation and /score agree"
        again = await service.fit(1)
        assert (again.version, again.replayed, again.outcome) == (3, 30, "published") or again.replayed > 20
        said = await service.versions()
        assert [one["version"] for one in said["kept"]] == [1, 2, 3] and said["version"] == 3
        assert (await service.score(some[:1], require_version={"linear": 3})).status_code == 200
        expired = problem(await service.score(some[:1], require_version={"linear": 2}), 409)
        assert expired["type"] == "urn:verism:wrong-version" and expired["observed"] == 3
        metrics = (await service.app.get("/metrics")).text
        assert 'verism_weights_version{reward="linear"} 3.0' in metrics
        assert 'verism_fit_outcomes_total{outcome="published",reward="linear"} 2.0' in metrics
        assert 'verism_fit_running{reward="linear"} 0.0' in metrics
        assert 'verism_fit_accuracy{of="candidate",reward="linear"}' in metrics and "verism_fit_loss" in metrics
        assert f'verism_fit_replay_pairs{{reward="linear"}} {float(said["kept"][-1]["replay"])}' in metrics

    in_service(run, tmp_path)


def test_a_restart_serves_the_same_and_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    some = pictures(5, 130, 99)

    async def whole() -> Any:
        async with serving(tmp_path / "whole") as service:
            await service.take()
            return [await service.fit(n) for n in range(3)], await service.values(some), await service.versions()

    async def parts() -> Any:
        states = []
        for n in range(3):
            async with serving(tmp_path / "parts") as service:
                assert (await service.values(some))[1] == n + 1, "a restart serves the newest published version"
                await service.take()
                states.append(await service.fit(n))
                last = await service.values(some), await service.versions()
        return states, *last

    one, other = asyncio.run(whole()), asyncio.run(parts())
    for first, second in zip(one[0], other[0], strict=True):
        assert first.model_copy(update={"seconds": 0}) == second.model_copy(update={"seconds": 0})
    assert one[1:] == other[1:]


def test_rollback_is_to_weights_average_optimiser_and_replay_of_then(tmp_path: Path) -> None:
    some = pictures(5, 130, 99)

    async def run(service: Service) -> None:
        await service.take()
        await service.fit(0)
        at_two = await service.values(some)
        first = await service.fit(1)
        at_three, told = await service.values(some), await service.versions()
        answer = await service.post("rollback", {"lease": service.lease, "version": 2})
        assert answer.status_code == 200 and [one["version"] for one in answer.json()["kept"]] == [1, 2]
        assert await service.values(some) == at_two
        other = await service.fit(7, mean=160)  # other pictures make another version 3
        at_other = await service.values(some)
        assert at_other[1] == 3 and at_other[2] != at_three[2] and at_other[0] != at_three[0], "no score of the forgotten one"
        assert other.version == 3
        assert (await service.post("rollback", {"lease": service.lease, "version": 2})).status_code == 200
        again = await service.fit(1)
        assert again.model_copy(update={"seconds": 0}) == first.model_copy(update={"seconds": 0})
        assert await service.values(some) == at_three and await service.versions() == told
        gone = problem(await service.post("rollback", {"lease": service.lease, "version": 9}), 422)
        assert "kept are 1, 2, 3" in gone["title"]

    in_service(run, tmp_path)


def test_a_snapshot_outlives_what_comes_after_it(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        await service.take()
        await service.fit(0)
        at_two = await service.values(pictures(3, 130, 5))
        said = (await service.post("snapshot", {"lease": service.lease})).json()
        assert [one["snapshot"] for one in said["kept"]] == [True]
        for n in range(1, 4):
            await service.fit(n)
        assert [one["version"] for one in (await service.versions())["kept"]] == [2, 5]
        assert (await service.post("rollback", {"lease": service.lease, "version": 2})).status_code == 200
        assert await service.values(pictures(3, 130, 5)) == at_two

    in_service(run, tmp_path, keep=1)


def test_a_version_that_left_meanwhile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(service: Service) -> None:
        room = service.state.rewards["linear"].room
        await service.take()
        await service.fit(0)

        async def published_just_before_it_was_stopped() -> None:
            room.store._remove(1)

        with monkeypatch.context() as patch:
            patch.setattr(room, "_ended", published_just_before_it_was_stopped)
            gone = problem(await service.post("rollback", {"lease": service.lease, "version": 1}), 422)
            assert "kept are 2" in gone["title"]
        room.store._aside(2, "for the test")
        lost = problem(await service.post("snapshot", {"lease": service.lease}), 422)
        assert "version 2 of linear is served, but was damaged" in lost["title"]

    in_service(run, tmp_path)


def test_what_is_not_published_waits_also_over_a_restart(tmp_path: Path) -> None:
    some = pictures(4, 130, 3)

    async def first(service: Service) -> None:
        await service.take()
        assert problem(await service.post("publish", {"lease": service.lease}), 409)["type"] == "urn:verism:refitting"
        before = await service.values(some)
        state = await service.fit(0, publish=False)
        assert (state.outcome, state.version, state.candidate) == ("ready", 1, 2)
        assert await service.values(some) == before
        answer = await service.post("publish", {"lease": service.lease})
        assert answer.json()["outcome"] == "published" and answer.json()["version"] == 2
        assert (await service.values(some))[1] == 2
        state = await service.fit(1, publish=False)
        assert (state.version, state.candidate) == (2, 3)

    async def second(service: Service) -> None:
        assert (await service.values(some))[1] == 2
        assert (await service.versions())["candidate"] == 3
        await service.take()
        assert (await service.post("publish", {"lease": service.lease})).json()["version"] == 3
        assert (await service.values(some))[1] == 3
        await service.fit(2, publish=False)
        state = await service.fit(3)
        assert state.version == 4 and any("was not published is forgotten" in one for one in state.warnings)
        await service.fit(4, publish=False)
        said = (await service.post("rollback", {"lease": service.lease, "version": 4})).json()
        assert said["candidate"] is None

    in_service(first, tmp_path)
    in_service(second, tmp_path)


@pytest.mark.parametrize(("head", "why"), [({"explode": 2}, "not a finite number"), ({"off": 0.3}, "do not agree")])
def test_what_is_kept_out_changes_nothing(tmp_path: Path, head: dict[str, Any], why: str) -> None:
    async def run(service: Service) -> None:
        before = await service.values(pictures(4, 130, 3))
        await service.take()
        state = await service.fit()
        assert state.outcome == "kept_out" and state.reason is not None and why in state.reason
        assert (state.version, state.candidate) == (1, None)
        assert await service.values(pictures(4, 130, 3)) == before
        assert len((await service.versions())["kept"]) == 1
        assert 'outcome="kept_out"' in (await service.app.get("/metrics")).text

    in_service(run, tmp_path, head=head)


def test_a_worse_version_is_kept_out_and_the_next_one_served(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        fitter = service.state.rewards["linear"].room.fitter
        await service.take()
        first = await service.fit(0, mean=180, rounds=15)
        assert (first.outcome, first.version, first.accuracy) == ("published", 2, 1.0)
        fitter.head = Head(backwards=True, unsure=True)  # all its rounds
        worse = await service.fit(1, mean=180, rounds=15)
        assert (worse.outcome, worse.version, worse.accuracy_before) == ("kept_out", 2, 1.0)
        assert worse.accuracy is not None and worse.accuracy < 0.5
        assert worse.reason is not None and f"{worse.accuracy:.3f}, and 1.000" in worse.reason
        fitter.head = Head()
        last = await service.fit(2, mean=180)
        assert (last.outcome, last.version, last.accuracy, last.accuracy_before) == ("published", 3, 1.0, 1.0)

    in_service(run, tmp_path)


def test_too_little_is_refused_and_what_was_sent_stays(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        await service.take()
        await service.add("real", pictures(20, 120, 0))
        same = pictures(1, 140, 1) * 9
        assert (await service.add("generated", [*pictures(3, 140, 2), *same])).json()["generated"] == 4
        few = problem(await service.post("fit", {"lease": service.lease}), 422)
        assert "4 different generated pictures are too few" in few["title"] and few["limit"] == 8
        answer = await service.add("generated", pictures(9, 140, 2, side=32))
        assert answer.json()["generated"] == 13 and "resampler" in answer.json()["warnings"][0]
        assert (await service.add("generated", pictures(9, 140, 2, side=32))).json()["generated"] == 13, "sent twice, counted once"
        assert (await service.post("fit", {"lease": service.lease})).status_code == 202
        state = await service.done()
        assert (state.real, state.generated) == (20, 13) and any("resampler" in one for one in state.warnings)
        assert "0 different real" in problem(await service.post("fit", {"lease": service.lease}), 422)["title"]

    in_service(run, tmp_path)


def test_two_trainers(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        mine = await service.take("run one")
        await service.add("real", pictures(9, 120, 0))
        refused = problem(await service.post("lease", {"holder": "run two"}), 409)
        assert (
            refused["type"] == "urn:verism:leased" and "'run one'" in refused["title"] and 0 < refused["retry_after_ms"] <= 60_000
        )
        for path, body in (("fit", {}), ("publish", {}), ("snapshot", {}), ("rollback", {"version": 1})):
            said = problem(await service.post(path, {"lease": "of run two", **body}), 409)
            assert said["type"] == "urn:verism:no-lease" and "'run one' has it" in said["title"]
        service.lease = "nonsense"
        assert problem(await service.add("real", pictures(9, 120, 0)), 409)["type"] == "urn:verism:no-lease"
        assert (await service.post("lease", {"holder": "run one", "lease": mine, "seconds": 5})).json()["lease"] == mine
        assert (await service.post("lease", {"lease": mine}, method="DELETE")).status_code == 200
        await service.take("run two")
        assert (await service.add("generated", pictures(9, 120, 0))).json() == {"real": 0, "generated": 9, "warnings": []}
        assert problem(await service.post("fit", {"lease": mine}), 409)["type"] == "urn:verism:no-lease"

    in_service(run, tmp_path)


def test_a_lease_runs_out_and_is_renewed_by_whoever_shows_it() -> None:
    clock = [0.0]
    holder = Holder("detector", lambda: clock[0])
    lease, fresh = holder.take(Hold(holder="one", seconds=10), 1)
    assert fresh and (lease.seconds, lease.version) == (10, 1)
    clock[0] = 9
    holder.check(lease.lease)
    clock[0] = 18
    with pytest.raises(Leased, match="'one', whose lease lasts 1 s more"):
        holder.take(Hold(holder="two"), 1)
    assert not holder.take(Hold(holder="one", seconds=10, lease=lease.lease), 1)[1]
    clock[0] = 28.5
    with pytest.raises(NoLease, match="nobody has it now"):
        holder.check(lease.lease)
    other, fresh = holder.take(Hold(holder="two", seconds=10), 1)
    assert fresh and other.lease != lease.lease
    with pytest.raises(NoLease, match="'two' has it"):
        holder.check(lease.lease)
    with pytest.raises(NoLease):
        holder.check("")
    holder.runs()
    clock[0] = 100
    with pytest.raises(Leased, match="'two', whose lease lasts 10 s more"):
        holder.take(Hold(holder="three"), 1)
    holder.ran()
    clock[0] = 109
    holder.check(other.lease)
    holder.runs()
    holder.release(other.lease)
    holder.ran()
    with pytest.raises(VerismError):
        holder.check(other.lease)


def test_scoring_goes_on_while_a_refit_runs(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        await service.take()
        for side, centre, number in (("real", 120, 0), ("generated", 140, 1)):
            await service.add(side, pictures(40, centre, number))  # type: ignore[arg-type]
        await service.post("fit", {"lease": service.lease})
        seen = set()
        busy = problem(await service.post("fit", {"lease": service.lease}), 409)
        assert busy["type"] == "urn:verism:refitting"
        assert problem(await service.post("publish", {"lease": service.lease}), 409)["type"] == "urn:verism:refitting"
        progress = []
        while (
            state := FitState.model_validate((await service.admin.get("/admin/rewards/linear/fit")).json())
        ).outcome == "running":
            said = (await service.score(pictures(4, 130, len(seen)), priority="train")).json()
            by = {one["scores"]["linear"]["parts"]["version"] for one in said["items"]}
            assert by == {said["rewards"]["linear"]["version"]}, "one version made all of an answer"
            seen |= by
            progress.append((state.round, state.losses.get("total"), state.seconds))
        assert seen == {1.0} or seen == {1.0, 2.0}
        assert (
            state.version == 2 and len({round for round, _, _ in progress}) > 1 and progress == sorted(progress, key=lambda p: p[2])
        )

    in_service(run, tmp_path, head={"seconds": 0.03, "unsure": True})


def test_a_refit_rests_during_one_long_forward_pass_of_whatever_lane(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        served = service.state.rewards["linear"]
        lane, room = served.lane, served.room
        assert lane is not None
        await service.score(pictures(2, 130, 0))
        assert room._busy() == room._busy(), "nothing is scored"
        served.reward.seconds = 0.5
        asked = asyncio.ensure_future(service.score(pictures(2, 130, 1)))
        while not lane.running:
            await asyncio.sleep(0.01)
        assert sum(lane.waiting.values()) == 0 and room._busy() != room._busy()
        await asked
        assert room._busy() == room._busy()
        service.state.rewriter = SimpleNamespace(lane=Lane("rewriter", lane.work))  # type: ignore[assignment]
        assert [one.name for one in room._lanes()] == ["linear", "size", "rewriter"]

    in_service(run, tmp_path)


def test_a_rollback_ends_a_running_refit(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        await service.take()
        for side, centre, number in (("real", 120, 0), ("generated", 140, 1)):
            await service.add(side, pictures(40, centre, number))  # type: ignore[arg-type]
        await service.post("fit", {"lease": service.lease, "rounds": 1000})
        await asyncio.sleep(0.2)
        began = time.monotonic()
        assert (await service.post("rollback", {"lease": service.lease, "version": 1})).json()["version"] == 1
        assert time.monotonic() - began < 10
        assert (await service.done()).outcome == "idle"
        assert (await service.fit(3, rounds=2)).outcome == "published"

    in_service(run, tmp_path, head={"seconds": 0.05, "unsure": True})


def test_a_service_that_ends_drops_a_running_refit(tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        await service.take()
        await service.fit(0, rounds=1)
        for side, centre, number in (("real", 120, 0), ("generated", 140, 1)):
            await service.add(side, pictures(40, centre, number))  # type: ignore[arg-type]
        await service.post("fit", {"lease": service.lease, "rounds": 10_000})
        await asyncio.sleep(0.1)
        await service.state.drain()
        told = service.state.rewards["linear"].room.state
        assert told.outcome == "idle" and "shuts down" in told.reason, "as after a restart: whoever waits makes it again"

    began = time.monotonic()
    in_service(run, tmp_path, head={"seconds": 0.02, "unsure": True})
    assert time.monotonic() - began < 30
    assert not [thread for thread in threading.enumerate() if thread.name == "fit-linear"]

    async def after(service: Service) -> None:
        assert (await service.values(pictures(2, 130, 1)))[1] == 2

    in_service(after, tmp_path, head={"seconds": 0.02, "unsure": True})


def test_a_damaged_newest_version_leaves_the_one_before(tmp_path: Path) -> None:
    async def fill(service: Service) -> None:
        await service.take()
        for n in range(2):
            await service.fit(n)

    async def after(service: Service) -> None:
        assert (await service.values(pictures(2, 130, 1)))[1] == 2
        await service.take()
        state = await service.fit(5)
        assert state.version == 3 and any("version 3 cannot be read" in one for one in state.warnings)

    in_service(fill, tmp_path)
    (tmp_path / "versions" / "00000003" / "weights.safetensors").write_bytes(b"nothing")
    in_service(after, tmp_path)


def test_a_refit_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(service: Service) -> None:
        await service.take()

        def full(*arguments: Any, **others: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(service.state.rewards["linear"].room.store, "write", full)
            state = await service.fit(0)
        assert state.outcome == "failed" and state.reason is not None and "No space left" in state.reason and state.version == 1
        assert (await service.fit(0)).outcome == "published"

    in_service(run, tmp_path)


def test_a_folder_without_room_refuses_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("services.fitting.store.os.fsync", full)
    with pytest.raises(ValueError, match=r"reward 'linear': fit\.folder: .* \(No space left on device\); make room"):
        in_service(lambda service: asyncio.sleep(0), tmp_path)


def test_what_a_fitter_cannot_be_fitted_on_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(service: Service) -> None:
        def refuse(*arguments: Any) -> None:
            raise ValueError("a picture cannot be fitted on: its prompt is missing")

        await service.take()
        monkeypatch.setattr(service.state.rewards["linear"].room.fitter, "losses", refuse)
        state = await service.fit(0)
        assert (state.outcome, state.reason) == ("failed", "a picture cannot be fitted on: its prompt is missing")

    in_service(run, tmp_path)


def test_what_cannot_be_refitted_is_said_before_anything_loads(tmp_path: Path) -> None:
    def made(use: str, fit: dict[str, Any] | None = None, **more: Any) -> None:
        rewards = {"one": {"use": use, "fit": {"folder": str(tmp_path), **(fit or {})}, **more}}
        create_app(ServiceConfig.model_validate({"rewards": rewards, "admin": {"sha256": "0" * 64}}), tuned=False)

    with pytest.raises(ValueError, match="jpeg_size cannot be refitted"):
        made("jpeg_size")
    with pytest.raises(ValueError, match="realism cannot be refitted"):
        made("realism", parts={"one": {"weight": 1}})
    with pytest.raises(ValueError, match=r"fit\.head\.nonsense: "):
        made(LINEAR, {"head": {"nonsense": 1}})
    with pytest.raises(ValueError, match=r"fit\.augment\.flop"):
        made(LINEAR, {"augment": {"flop": 1}})
    betas = {"one": {"use": LINEAR, "fit": {"optim": {"betas": [0.9, 1.0]}}}}
    with pytest.raises(ValueError, match="less than 1"):
        ServiceConfig.model_validate({"rewards": betas, "admin": {"sha256": "0" * 64}})
    rewards = {"one": {"use": LINEAR, "fit": {"optm": {}}}}
    with pytest.raises(ValueError) as error:
        ServiceConfig.model_validate({"rewards": rewards, "admin": {"sha256": "0" * 64}})
    assert "did you mean 'optim'" in explain(error.value, ServiceConfig)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on the admin listener; add"):
        ServiceConfig.model_validate({"rewards": {"one": {"use": LINEAR, "fit": {}}}})
    both = {name: {"use": LINEAR, "fit": {"folder": "same"}} for name in ("one", "two")}
    with pytest.raises(ValueError, match="two rewards name one folder"):
        ServiceConfig.model_validate({"rewards": both, "admin": {"sha256": "0" * 64}})


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_a_refits_thread_is_the_last_in_turn_and_keeps_others_threads() -> None:
    seen: dict[str, int] = {}

    def fitting() -> None:
        _quiet(1)
        seen["nice"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        seen["threads"] = torch.get_num_threads()

    usual, nice = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, 0)
    torch.set_num_threads(3)
    try:
        for target in (fitting, lambda: seen.update(later=torch.get_num_threads())):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert seen == {"nice": 19, "threads": 1, "later": 3} and torch.get_num_threads() == 3
        assert os.getpriority(os.PRIO_PROCESS, 0) == nice
    finally:
        torch.set_num_threads(usual)
