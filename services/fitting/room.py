"""One reward that is refitted while it serves: who may, with which pictures, the refit in its own thread, and what is served after it.

The thread has the lowest priority and threads of its own, and rests while something is being scored (`share`). A version is on disk before it
is served, and served between two batches; until then, and whatever happens, the last one is.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError

from services.compare_http import work_of
from services.fitting.augment import AugmentOptions, augment
from services.fitting.options import FitOptions
from services.fitting.refit import (
    Augment,
    Example,
    Pairs,
    Progress,
    Refitted,
    Stopped,
    refit,
    split,
    taken,
    warnings_of,
)
from services.fitting.replay import PastPair, Replay
from services.fitting.store import Damaged, State, Store, digest_of, shapes_of
from services.fitting.types import Fittable, Fitter
from services.metrics import Metrics
from services.reward import Item, Reward
from services.scheduler import Lane
from services.worker import RewardWork, warm_up
from shared.errors import Invalid, TooLarge
from shared.fit_wire import (
    FitRequest,
    FitState,
    Hold,
    KeptVersion,
    Lease,
    Leased,
    NoLease,
    Refitting,
    Side,
    Versions,
    Waiting,
)
from shared.schema import RewardInfo, Score

log = logging.getLogger("verism.fitting")
SIDES: tuple[Side, Side] = ("real", "generated")
AGREES, DISAGREES = 1e-5, 1e-3  # largest difference between a fitter's scores and its reward's: above it a warning, a refusal
STOP_S = 30.0
BUSY_S = 0.5  # scoring goes on for so long after the last batch


class Holder:
    """The lease of one reward: one holder at a time, for so many seconds after it was last shown."""

    def __init__(self, reward: str, now: Callable[[], float] = time.monotonic) -> None:
        self.reward, self._now = reward, now
        self._lease, self._name, self._seconds, self._until = "", "", 0.0, float("-inf")
        self._runs = False

    @property
    def _left(self) -> float:
        return self._until - self._now() if not self._runs or self._until == float("-inf") else self._seconds

    def take(self, asked: Hold, version: int) -> tuple[Lease, bool]:
        """The lease, and whether it is a new one. Leased while another holds it, NoLease for a renewal that comes too late."""
        if asked.lease is not None:
            self.check(asked.lease)
            fresh = False
        else:
            if (left := self._left) > 0:
                raise Leased(
                    f"{self.reward} is being refitted by {self._name!r}, whose lease lasts {left:.0f} s more unless it is renewed: "
                    "refit another reward, or end that run",
                    retry_after_ms=max(1, round(1000 * left)),
                )
            self._lease, fresh = secrets.token_hex(16), True
        self._name, self._seconds = asked.holder, asked.seconds
        self.renew()
        return Lease(reward=self.reward, lease=self._lease, seconds=self._seconds, version=version), fresh

    def check(self, lease: str) -> None:
        """Renews it. NoLease for any other."""
        left = self._left
        if left <= 0 or not hmac.compare_digest(lease.encode(), self._lease.encode()):
            who = f"{self._name!r} has it" if left > 0 else "nobody has it now"
            raise NoLease(
                f"this is not the lease of {self.reward} ({who}; it ran out, or the service was started again): take it again"
            )
        self.renew()

    def renew(self) -> None:
        self._until = self._now() + self._seconds

    def runs(self) -> None:
        """A refit has begun: until it has ended the lease does not run out, unless it is given back."""
        self._runs = True

    def ran(self) -> None:
        if self._left > 0:
            self.renew()
        self._runs = False

    def release(self, lease: str) -> None:
        self.check(lease)
        self._until = float("-inf")


class Room:
    """ValueError says why a reward cannot be refitted as configured. All but the refit itself is called on the event loop."""

    def __init__(self, name: str, reward: Any, use: str, options: FitOptions, device: str, metrics: Metrics) -> None:
        base: RewardInfo = reward.info
        if not isinstance(reward, Fittable):
            raise ValueError(f"reward {name!r}: `fit`: {use} has nothing that could be refitted; leave `fit` away")
        self.name, self.options, self.device, self.metrics = name, options, device, metrics
        self.holder = Holder(name)
        self.augment = augmentation(options)
        try:
            self.fitter: Fitter = reward.fitter(options.head)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: fit.head{_words(error)}") from error
        weights = self.fitter.trainable()
        digest = digest_of(use, options.head, base.weights_sha256, base.preprocessing, shapes_of(weights))
        place, like = options.place(name), {"keep": options.keep, "snapshots": options.snapshots, "seed": options.seed}
        try:
            self.store = Store(place, digest, weights, optim=options.optim.use, **like)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
        try:
            self.at = self._newest() or self._begun(taken(weights), base.version)
            self.reward = self.fitter.reward(self.at.weights, self.at.version)
        except BaseException as error:
            self.store.close()
            if isinstance(error, OSError):
                why = f"fit.folder: {place} cannot be written ({error.strerror}); make room, or name another one"
                raise ValueError(f"reward {name!r}: {why}") from error
            raise
        self._waiting: dict[Side, dict[tuple[str, str | None, str | None], Example]] = {"real": {}, "generated": {}}
        self._lane: Lane[Item, Score] | None = None
        self._lanes: Callable[[], Sequence[Lane[Any, Any]]] = lambda: ()
        self._candidate: tuple[State, RewardWork] | None = None
        self._told = FitState(outcome="idle", version=self.at.version)
        self._thread: threading.Thread | None = None
        self._stop, self._began = threading.Event(), 0.0
        self._one = asyncio.Lock()
        self._seen, self._busy_at, self._rested = 0.0, float("-inf"), 0.0
        self._observe()

    def attach(self, lane: Lane[Item, Score], lanes: Callable[[], Sequence[Lane[Any, Any]]]) -> None:
        """Where versions are swapped in, and the lanes that a refit makes room for."""
        self._lane, self._lanes = lane, lanes

    # What the routes ask for.

    def hold(self, asked: Hold) -> Lease:
        lease, fresh = self.holder.take(asked, self.at.version)
        if fresh:  # what another left behind is not this one's
            self._clear()
        return lease

    def release(self, lease: str) -> None:
        self.holder.release(lease)
        self._clear()

    def add(self, side: Side, examples: Sequence[Example]) -> Waiting:
        """All of them, or none. TooLarge when too many pixels would wait."""
        known = self._waiting[side]
        fresh = {(one.key, one.item.prompt, one.group): one for one in examples}
        held = sum(one.item.image.nbytes for some in self._waiting.values() for one in some.values())
        size = held + sum(one.item.image.nbytes for name, one in fresh.items() if name not in known)
        if size > self.options.waiting_bytes:
            raise TooLarge(
                f"{size / 2**20:.0f} MiB of pictures would wait for a refit of {self.name}, {held / 2**20:.0f} do already: begin it, send "
                f"fewer (a trainer's adversary.{self.name}.pictures), or raise the service's fit.waiting_bytes",
                limit=self.options.waiting_bytes,
                observed=size,
            )
        known.update(fresh)
        self._observe()
        real, generated = (list(self._waiting[one].values()) for one in SIDES)
        return Waiting(real=len(real), generated=len(generated), warnings=warnings_of(real, generated))

    async def fit(self, asked: FitRequest) -> FitState:
        """Begin with what waits. Invalid when that is too little."""
        async with self._one:
            if self.running:
                raise Refitting(f"{self.name} is being refitted: wait until that is done (GET fit)")
            used = {side: dict(some) for side, some in self._waiting.items()}
            real, generated = (list(used[side].values()) for side in SIDES)
            least = self.options.least
            for side, some in (("real", real), ("generated", generated)):
                if (count := len({one.key for one in some})) < least:
                    raise Invalid(
                        f"{count} different {side} pictures are too few to refit {self.name}: send at least {least} of each side",
                        limit=least,
                        observed=count,
                    )
            try:
                learned, proof = await asyncio.to_thread(split, real, generated, self.options.held_out)
            except ValueError as error:
                raise Invalid(str(error)) from error
            warnings = [*warnings_of(real, generated), *self._heard()]
            if self._candidate is not None or self.store.candidate() is not None:
                warnings.append("a version that had been fitted and was not published is forgotten")
                await asyncio.to_thread(self.store.forget_after, self.at.version)
                self._candidate = None
            for side in SIDES:  # what came meanwhile waits for the next one
                self._waiting[side] = {name: one for name, one in self._waiting[side].items() if name not in used[side]}
            self._observe()
            self._began = time.monotonic()
            self._told = FitState(
                outcome="running",
                version=self.at.version,
                rounds=asked.rounds or self.options.rounds,
                real=len(real),
                generated=len(generated),
                replayed=len(self.at.replay),
                warnings=warnings,
            )
            self._stop.clear()
            self.holder.runs()
            self._thread = threading.Thread(
                target=self._run, args=(asked, learned, proof, asyncio.get_running_loop()), name=f"fit-{self.name}", daemon=True
            )
            self.metrics.fit_running.labels(self.name).set(1)
            self._thread.start()
            return self.state

    @property
    def running(self) -> bool:
        return self._thread is not None

    @property
    def state(self) -> FitState:
        update: dict[str, Any] = {"version": self.at.version, "candidate": self.store.candidate()}
        if self._told.outcome == "running":
            update["seconds"] = round(time.monotonic() - self._began, 3)
        return self._told.model_copy(update=update)

    async def publish(self) -> FitState:
        """The version that was fitted with publish=false."""
        async with self._one:
            if self.running:
                raise Refitting(f"{self.name} is being refitted: wait until that is done (GET fit)")
            version = self.store.candidate()
            if version is None:
                raise Refitting(f"no version of {self.name} waits to be published: fit one with publish=false first")
            if self._candidate is None:  # fitted before the service was started again
                state = await asyncio.to_thread(self._read, version)
                self._candidate = state, await asyncio.to_thread(self._work, state)
            state, work = self._candidate
            await asyncio.to_thread(self.store.publish, version)
            await self._serve(state, work)
            await asyncio.to_thread(self.store.tidy)
            self._candidate = None
            self._tell(outcome="published")
            self.metrics.fit_outcomes.labels(self.name, "published").inc()
            return self.state

    async def snapshot(self) -> Versions:
        async with self._one:
            if self.at.version not in self.store.metas:
                raise Invalid(
                    f"version {self.at.version} of {self.name} is served, but was damaged on the disk and set aside: refit it, or go back to "
                    "a kept version"
                )
            await asyncio.to_thread(self.store.snapshot, self.at.version)
        return self.versions()

    async def rollback(self, version: int) -> Versions:
        """To a kept version; a refit that runs is ended first. Later versions are forgotten."""
        async with self._one:
            self._known(version)
            self._stop.set()
            await self._ended()
            self._known(version)  # the refit may have been published, and the version have left
            state = await asyncio.to_thread(self._read, version)
            work = await asyncio.to_thread(self._work, state)
            await asyncio.to_thread(self.store.forget_after, version)
            await self._serve(state, work)
            self._candidate = None
            self._clear()
            self._told = FitState(outcome="idle", version=version, warnings=self._heard())
        return self.versions()

    def versions(self) -> Versions:
        kept = [
            KeptVersion(
                version=version,
                weights_sha256=meta.weights_sha256 or "",
                accuracy=meta.accuracy,
                steps=meta.steps,
                replay=len(meta.replay),
                snapshot=meta.snapshot,
            )
            for version in self.store.published()
            if (meta := self.store.metas.get(version)) is not None
        ]
        return Versions(reward=self.name, version=self.at.version, candidate=self.store.candidate(), kept=kept)

    async def close(self) -> None:
        """End a refit that runs, as if it had not begun, and give the folder back."""
        self._stop.set()
        async with self._one:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended(), STOP_S)
            self.store.close()

    # What is read and served.

    def _newest(self) -> State | None:
        """The newest published version that can be read."""
        for version in reversed(self.store.published()):
            with contextlib.suppress(Damaged):
                state = self.store.read(version, self.options.replay.size)
                if (candidate := self.store.candidate()) is not None and candidate != version + 1:
                    self.store.forget_after(version)
                return state
        return None

    def _begun(self, weights: dict[str, Any], version: int) -> State:
        state = State(version, weights, dict(weights), Replay(self.options.replay.size))
        self.store.forget_after(0)
        self.store.write(state, self.fitter.reward(weights, version).info.weights_sha256, published=True, pictures={})
        return state

    def _known(self, version: int) -> None:
        if version not in self.store.published():
            kept = ", ".join(map(str, self.store.published()))
            raise Invalid(f"version {version} of {self.name} is not kept; kept are {kept} (take a `snapshot` of what must stay)")

    def _read(self, version: int) -> State:
        try:
            return self.store.read(version, self.options.replay.size)
        except Damaged as error:
            raise Invalid(str(error)) from error

    def _work(self, state: State) -> RewardWork:
        return self._warm(self.fitter.reward(state.weights, state.version))

    def _warm(self, reward: Reward) -> RewardWork:
        """So that the first who is scored by it does not wait longer than others."""
        work = work_of(reward)
        warm_up(work, 1, self.device)
        return work

    async def _serve(self, state: State, work: RewardWork) -> None:
        assert self._lane is not None
        await self._lane.swap(work)
        self.at = state
        self.metrics.version.labels(self.name).set(state.version)
        self._observe()

    async def _ended(self) -> None:
        while (thread := self._thread) is not None:
            await asyncio.to_thread(thread.join, 0.1)
            await asyncio.sleep(0.005)

    # The refit's own thread.

    def _run(self, asked: FitRequest, learned: Pairs, proof: Pairs, loop: asyncio.AbstractEventLoop) -> None:
        changes: dict[str, Any]
        try:
            _quiet(self.options.threads)
            changes = self._refitted(asked, learned, proof, loop)
        except Stopped:
            changes = {
                "outcome": "idle",  # as after a restart, so that whoever waits makes it again
                "reason": "it was ended by a rollback, or because the service shuts down; nothing has changed",
            }
        except OSError as error:
            log.error("refit of %s cannot be kept", self.name, exc_info=error)
            changes = {"reason": f"the new version cannot be written ({error.strerror}): make room, and fit again"}
        except ValueError as error:  # a fitter says what it cannot be fitted on
            log.error("refit of %s failed", self.name, exc_info=error)
            changes = {"reason": str(error)}
        except Exception as error:
            log.error("refit of %s failed", self.name, exc_info=error)
            changes = {"reason": f"{type(error).__name__}: the service's log says more; the last version serves on"}
        with contextlib.suppress(RuntimeError):  # a loop that has ended asks no more
            loop.call_soon_threadsafe(self._over, {"outcome": "failed", **changes})

    def _over(self, changes: Mapping[str, Any]) -> None:
        """On the event loop: the refit has ended, and what it ended with, at once."""
        seconds = time.monotonic() - self._began
        self._tell(seconds=round(seconds, 3), **changes)
        self.metrics.fit_outcomes.labels(self.name, changes["outcome"]).inc()
        self.metrics.fit_seconds.labels(self.name).observe(seconds)
        self.metrics.fit_running.labels(self.name).set(0)
        self.holder.ran()
        self._thread = None

    def _refitted(self, asked: FitRequest, learned: Pairs, proof: Pairs, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
        self._rested = self._spent()
        with _own_stream(self.device):
            done = refit(
                self.fitter,
                self.at,
                self.at.version + 1,
                learned,
                proof,
                self.options,
                augment=self.augment,
                past=self._past,
                rounds=asked.rounds,
                until_accuracy=asked.until_accuracy,
                after_step=self._step,
                rest=self._rest,
            )
        for of, accuracy in (("served", done.accuracy_before), ("candidate", done.accuracy)):
            if accuracy is not None:
                self.metrics.fit_accuracy.labels(self.name, of).set(accuracy)
        told: dict[str, Any] = {
            "round": done.round,
            "losses": _finite(done.losses),
            "accuracy": done.accuracy,
            "accuracy_before": done.accuracy_before,
            "evaluated": done.evaluated,
            "warnings": [*self._told.warnings, *self._heard()],
        }
        reward = None if done.state is None else self.fitter.reward(done.state.weights, done.state.version)
        reason = done.reason
        if reward is not None:
            gap = disagreement(reward, done)
            if gap > DISAGREES:
                reason = f"its scores while fitting and while serving differ by {gap:.1e}: this reward's fitter and its score do not agree"
            elif gap > AGREES:
                told["warnings"].append(f"scores while fitting and while serving differ by {gap:.1e}")
        if done.state is None or reward is None or reason is not None:
            return {**told, "outcome": "kept_out", "reason": reason}
        work = self._warm(reward)
        self._rest()  # the last moment to be stopped
        pictures = {one.key: one.item.image for pair in learned for one in pair}
        self.store.write(done.state, reward.info.weights_sha256, published=asked.publish, pictures=pictures)
        if asked.publish:
            asyncio.run_coroutine_threadsafe(self._serve(done.state, work), loop).result()
            self.store.tidy()
        else:
            self._candidate = done.state, work
        return {**told, "outcome": "published" if asked.publish else "ready"}

    def _past(self, pair: PastPair) -> tuple[Item, Item]:
        real, generated = self.store.picture(pair.real), self.store.picture(pair.generated)
        return Item(real, pair.real_prompt), Item(generated, pair.generated_prompt)

    def _step(self, progress: Progress) -> None:
        self._tell(round=progress.round, losses=_finite(progress.losses))
        self.metrics.fit_round.labels(self.name).set(progress.round)
        self.metrics.fit_steps.labels(self.name).inc()
        for part, value in _finite(progress.losses).items():
            self.metrics.fit_loss.labels(self.name, part).set(value)

    def _rest(self) -> None:
        """Leave the core to scoring for as long as `share` asks, while there is any. Stopped when somebody wants the refit to end."""
        busy, now = self._busy(), time.monotonic()
        if busy != self._seen:
            self._seen, self._busy_at = busy, now
        if now - self._busy_at < BUSY_S:
            self._stop.wait((self._spent() - self._rested) * (1 / self.options.share - 1))
        if self._stop.is_set():
            raise Stopped
        self._rested = self._spent()

    def _busy(self) -> float:
        """Another number each time that something has been scored, is being scored, or waits."""
        lanes = self._lanes()
        goes_on = any(lane.running or sum(lane.waiting.values()) > 0 for lane in lanes)
        return sum(lane.busy_s for lane in lanes) + (time.monotonic() if goes_on else 0.0)

    def _spent(self) -> float:
        """Seconds of this thread on its core, or on the GPU."""
        return time.perf_counter() if self.device.startswith("cuda") else time.thread_time()

    # Small things.

    def _tell(self, **changes: Any) -> None:
        self._told = self._told.model_copy(update=changes)

    def _heard(self) -> list[str]:
        """What the store has had to say since somebody last asked."""
        said, self.store.said = self.store.said, []
        return said

    def _clear(self) -> None:
        for side in self._waiting.values():
            side.clear()
        self._observe()

    def _observe(self) -> None:
        self.metrics.fit_replay.labels(self.name).set(len(self.at.replay))
        for side, some in self._waiting.items():
            self.metrics.fit_waiting.labels(self.name, side).set(len(some))


def check(name: str, use: str, kind: Any, options: FitOptions) -> None:
    """Before weights load. ValueError for a reward that nothing can be refitted of, or for options of `augment` that there are not."""
    if not hasattr(kind, "fitter"):
        raise ValueError(
            f"reward {name!r}: `fit`: {use} cannot be refitted; leave `fit` away, or take detector, dino_head, omniaid or pickscore"
        )
    try:
        augmentation(options)
    except ValidationError as error:
        raise ValueError(f"reward {name!r}: fit.augment{_words(error)}") from error


def augmentation(options: FitOptions) -> Augment:
    """What both sides pass before they are learned from."""
    if options.augment is None:
        return lambda items, generator: list(items)
    changes = AugmentOptions.model_validate(options.augment)
    return lambda items, generator: augment(items, changes, generator)


def disagreement(reward: Reward, done: Refitted) -> float:
    """Largest difference between what a fitter says of the evaluated pictures and what its reward does (value or any part), beside 1."""
    gaps = [0.0]
    for said, score in zip(done.evaluated.values(), reward.score(done.items), strict=True):
        if score.value is not None:
            nearest = min((score.value, *score.parts.values()), key=lambda value: abs(value - said))
            gaps.append(abs(nearest - said) / max(1.0, abs(said)))
    return max(gaps)


def _words(error: ValueError) -> str:
    """What is wrong, and where in the options."""
    if not isinstance(error, ValidationError):
        return f": {error}"
    first = error.errors(include_url=False)[0]
    return "".join(f".{step}" for step in first["loc"]) + f": {first['msg']}"


def _finite(losses: Mapping[str, float]) -> dict[str, float]:
    """JSON knows no NaN."""
    return {name: value for name, value in losses.items() if abs(value) < float("inf")}


def _quiet(threads: int) -> None:
    """The calling thread comes last, and its forward passes have `threads` threads; those of other threads stay as they are."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)  # of this thread, and of threads that have not yet asked
    other = threading.Thread(target=torch.set_num_threads, args=(usual,))  # for these it is put back
    other.start()
    other.join()


@contextlib.contextmanager
def _own_stream(device: str) -> Iterator[None]:
    """On CUDA a stream of its own; its work is done when the block ends."""
    if not device.startswith("cuda"):
        yield
        return
    stream = torch.cuda.Stream(torch.device(device))  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.device(torch.device(device)), torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()
