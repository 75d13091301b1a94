"""When detectors are refitted while the generator learns, and on what; the refit itself is the service's (services/fitting).

A step's pictures serve both sides: the generator learns from their scores, then they are a detector's fakes, against references of the same
captions. One version scores a whole step, and requests name it: a service that has another answers 409, and the step is drawn again. A
version is served when `publish` says so and at no other time, so nothing a service does by itself changes a step.

    after a step:  due? -> real and generated pictures -> fit -> wait -> publish -> the next step's version
    overlap:       due? -> kept; the next step begins it, scores by the old version, and publishes at its end

Schedules: every n steps; when the mean reward exceeds a threshold (RealGen V2, 2512.00473); where references score below samples
(Adv-GRPO, 2511.20256). Several detectors are refitted one after the other, and at least one judge never is (trainer/config.py).
"""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.client import RequestFailed
from shared.errors import ServiceUnreachable
from shared.fit_wire import FitState
from shared.fitting import FitClient
from trainer.checkpoint import CheckpointError
from trainer.config import AdversaryConfig, ConfigError, RunConfig, ScheduleConfig, Stopped
from trainer.parallel import World
from trainer.references import Examples, References
from trainer.sampling.rollout import noise_seed
from trainer.scoring import NoService, Rewards, Scorer
from trainer.types import Prompt, Rollout

T = TypeVar("T")
WRONG_VERSION = "urn:verism:wrong-version"
LOST = ("fit-lost", "no-lease", "leased")  # of a refit that was cut short, which can be made again
TRIES = 3
PAUSE_S = 0.5
PATIENCE_S = 5.0  # beyond the time that a lease lasts


class DetectorGone(Stopped):
    """The version that a run learns from cannot be had any more; the message says what to do."""


@dataclass
class Standing:
    """A detector as the run knows it: the version that scores, and what refits came to."""

    version: int
    refits: int = 0
    kept_out: int = 0
    accuracy: float | None = None
    due: int | None = None  # a step whose pictures wait for an overlapped refit


@dataclass(frozen=True)
class Fakes:
    """A step's generated pictures that were chosen for a refit, in a fixed order."""

    images: NDArray[np.uint8]
    prompts: list[Prompt]


class Adversary:
    """All detectors of a run. What changes here is a part of its checkpoints; rank 0 alone talks to services."""

    def __init__(self, config: RunConfig, folder: Path, prompts: Sequence[Prompt], world: World) -> None:
        """Reads the references: ConfigError for what cannot be refitted on. No service is asked before `start`."""
        assert config.references is not None
        s = config.sampling
        self.config, self.world, self.folder = config, world, folder
        self.references = References(config.references, s.height, s.width, config.seed)
        self.references.check(prompts)
        self.prompts = list(prompts)
        self._place = {(prompt.id, prompt.text): n for n, prompt in enumerate(prompts)}
        self.standing: dict[str, Standing] = {}
        self.warn: Callable[[str], None] = lambda text: None
        self._due: dict[str, Fakes] = {}
        self._begun: set[str] = set()
        self._detectors: dict[str, Detector] = {}
        self._scorer: Scorer | None = None
        self._moved = (-1, 0)  # a step, and how often its version was gone

    def start(self, scorer: Scorer, resumed: bool) -> list[str]:
        """Take the leases; on a resume, go back to the checkpoint's versions. What there is to tell.

        NoService where a detector cannot be had, ConfigError without a key, CheckpointError where a version is not kept.
        """
        told: list[str] = [self.references.note] if self.references.note else []
        self._scorer = scorer

        def work() -> dict[str, Any]:
            for name, one in self.config.adversary.items():
                self._detectors[name] = detector = Detector(name, one, self.folder, self.config.reward_outage_s)
                served, waited = detector.open()
                if waited:
                    told.append(waited)
                if resumed:
                    detector.back_to(self.standing[name].version, self.folder)
                else:
                    self.standing[name] = Standing(served)
                    if served > 1:
                        told.append(
                            f"{name} is at version {served}: it was refitted before this run. For one that was not, give the service another "
                            "`fit.folder` and start it again"
                        )
            return {name: one.version for name, one in self.standing.items()}

        versions = self._by_first(work)
        for name, version in versions.items():
            self.standing.setdefault(name, Standing(version))
        self._pin()
        return told

    @property
    def versions(self) -> dict[str, int]:
        """That score now."""
        return {name: one.version for name, one in self.standing.items()}

    def moved(self, rewards: Rewards, step: int) -> bool:
        """Whether scores are missing because a pinned version is gone; then it is back, or DetectorGone says why not."""
        if not rewards.failures.get(WRONG_VERSION):
            return False
        last, count = self._moved
        self._moved = (step, count + 1 if last == step else 1)

        def work() -> None:
            for name, detector in self._detectors.items():
                detector.restore(self.standing[name].version)
            self._begun.clear()  # what ran there was ended with it
            if self._moved[1] > TRIES:
                raise DetectorGone(
                    f"step {step + 1} was drawn {TRIES} times, and each time a detector was not the version that it asked for, though its "
                    f"admin listener says so ({self._places()}): is each `admin` the same service as its reward's `url`? Mend that, and go "
                    "on with --resume."
                )

        self._by_first(work)
        self.warn(f"a detector's version changed under step {step + 1}; it is back at {self.versions}, and the step is drawn again")
        return True

    def begin(self) -> None:
        """Begin the refits that overlap the step to come, with the last step's pictures."""

        def work() -> None:
            for name, fakes in self._due.items():
                step = self.standing[name].due
                if name in self._begun or step is None:
                    continue
                with suppress(RequestFailed, ServiceUnreachable):  # `refitted` does it again, and says what is wrong
                    self._detectors[name].begin(*self._sides(fakes, step))
                    self._begun.add(name)

        self._by_first(work)

    def after(self, step: int, rollouts: Sequence[Rollout], rewards: Rewards) -> dict[str, float]:
        """After step `step` (counted from 0), whose pictures are `rollouts` (this rank's) and whose scores `rewards` (all ranks'): refits that
        are due, or end. The step's numbers."""
        out: dict[str, float] = {}
        for name, one in self.config.adversary.items():
            standing, numbers, mean = self.standing[name], dict[str, float](), self._mean(name, rewards)
            fakes: Fakes | None = None
            if one.schedule.use == "reference_below":  # by the version that scored the samples, so before another is served
                fakes = self._fakes(one, step, rollouts)
                numbers |= self._references_of(name, partial(self._real, fakes, step), mean)
            if standing.due is not None:
                numbers |= self._refitted(name, standing.due, self._due.get(name))
                standing.due = None
                self._due.pop(name, None)
                self._begun.discard(name)
            if due(one.schedule, step, mean, numbers.get("gap")):
                fakes = fakes or self._fakes(one, step, rollouts)
                if one.overlap:
                    standing.due, self._due[name] = step, fakes
                else:
                    numbers |= self._refitted(name, step, fakes)
            numbers |= {"version": standing.version, "refits": standing.refits, "kept_out": standing.kept_out}
            out |= {f"adversary/{name}/{key}": value for key, value in numbers.items()}
        self._pin()
        return out

    def look(self, rewards: Rewards) -> dict[str, float]:
        """Of an evaluation: references beside its samples, by the version that scored them."""
        assert self._scorer is not None and self.config.references is not None
        out: dict[str, float] = {}
        examples = cache(partial(self.references.some, self.config.references.evaluated))  # decoded once
        for name in self.config.adversary:
            standing = self.standing[name]
            numbers = self._references_of(name, examples, self._mean(name, rewards))
            numbers |= {"version": standing.version, "refits": standing.refits}
            if standing.accuracy is not None:
                numbers["accuracy"] = standing.accuracy
            out |= {f"adversary/{name}/{key}": value for key, value in numbers.items()}
        return out

    def snapshot(self) -> None:
        """Have each service keep what it serves, for the checkpoint that is about to be written."""

        def work() -> None:
            for name, detector in self._detectors.items():
                if (problem := detector.snapshot()) is not None:
                    self.warn(
                        f"version {self.standing[name].version} of {name} may not outlive this checkpoint: {problem}. Without it --resume "
                        "will refuse; mend the service before the run goes on for long"
                    )

        self._by_first(work)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Versions, counts, and the pictures of refits that have yet to begin."""
        tensors = {f"{name}/generated": torch.from_numpy(fakes.images) for name, fakes in self._due.items()}
        asked = {name: [self._place_of(prompt) for prompt in fakes.prompts] for name, fakes in self._due.items()}
        values = {name: vars(one) | {"prompts": asked.get(name, [])} for name, one in self.standing.items()}
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """What `state` gave; `start` then tells the services."""
        self.standing, self._due = {}, {}
        self._begun.clear()
        for name, held in values.items():
            self.standing[name] = Standing(**{key: value for key, value in held.items() if key != "prompts"})
            if f"{name}/generated" in tensors:
                self._due[name] = Fakes(tensors[f"{name}/generated"].numpy(), [self.prompts[n] for n in held["prompts"]])

    def close(self) -> None:
        """Give the leases back."""
        for detector in self._detectors.values():
            detector.close()

    def _place_of(self, prompt: Prompt) -> int:
        return self._place[prompt.id, prompt.text]

    def _places(self) -> str:
        return ", ".join(f"{name}: {one.admin}" for name, one in self.config.adversary.items())

    def _pin(self) -> None:
        assert self._scorer is not None
        self._scorer.pin(self.versions)

    def _by_first(self, work: Callable[[], T]) -> T:
        """What rank 0 does, told to all; what stops it stops all."""
        value: Any = None
        problem: Exception | None = None
        if self.world.rank == 0:
            try:
                value = work()
            except (Stopped, NoService, ConfigError, CheckpointError) as error:
                problem = error
        told = self.world.same({"value": value, "problem": None if problem is None else str(problem)})
        if told["problem"] is not None:
            raise problem or DetectorGone(told["problem"])
        return told["value"]  # type: ignore[no-any-return]

    def _mean(self, name: str, rewards: Rewards) -> float:
        """NaN where nothing was scored."""
        assert self._scorer is not None
        row = rewards.values_RB[self._scorer.names.index(name)]
        scored = row[row.isfinite()]
        return float(scored.mean()) if len(scored) else math.nan

    def _references_of(self, name: str, examples: Callable[[], Examples], mean: float) -> dict[str, float]:
        """How references score, and by how much better than the samples."""

        def work() -> float:
            assert self._scorer is not None
            some = examples()
            values = self._scorer.values(name, some.images, some.prompts)
            return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

        assert self._scorer is not None
        reference = self._by_first(work)
        sign = float(self._scorer.signs_R[self._scorer.names.index(name)])
        return {"reference_mean": reference, "gap": sign * (reference - mean)}

    def _fakes(self, config: AdversaryConfig, step: int, rollouts: Sequence[Rollout]) -> Fakes:
        """The same for all ranks: pictures by (seed, step), as many of each group as of any other."""
        groups, size = self.config.group.prompts, self.config.group.size
        count = config.pictures or groups * size
        rng = torch.Generator().manual_seed(noise_seed(self.config.seed, step, -4, -4))
        members = torch.stack([torch.randperm(size, generator=rng) for _ in range(groups)])  # (P, G)
        order = torch.randperm(groups, generator=rng)
        chosen = [int(p) * size + int(members[p, g]) for g in range(size) for p in order][:count]
        own = self.world.rows(groups * size)
        mine = [(place, i) for place, i in enumerate(chosen) if own.start <= i < own.stop]
        images = np.concatenate([r.images_BHWC for r in rollouts])
        prompts = [prompt for r in rollouts for prompt in r.prompts]
        told = self.world.tell(
            {
                "places": [place for place, _ in mine],
                "images": images[[i - own.start for _, i in mine]],
                "prompts": [self._place_of(prompts[i - own.start]) for _, i in mine],
            }
        )
        places = np.argsort([place for one in told for place in one["places"]])
        asked = [n for one in told for n in one["prompts"]]
        every = np.concatenate([one["images"] for one in told])
        return Fakes(every[places], [self.prompts[asked[n]] for n in places])

    def _sides(self, fakes: Fakes, step: int) -> tuple[Examples, Examples]:
        """Real and generated examples of a refit."""
        real, groups = self.references.drawn(fakes.prompts, step)
        return real, Examples([*fakes.images], [prompt.text for prompt in fakes.prompts], groups)

    def _real(self, fakes: Fakes, step: int) -> Examples:
        return self._sides(fakes, step)[0]

    def _refitted(self, name: str, step: int, fakes: Fakes | None) -> dict[str, float]:
        """A refit from its pictures to the version that is served, or the end of one that was begun; its numbers."""
        standing, before = self.standing[name], self.standing[name].version

        def work() -> dict[str, Any]:
            assert fakes is not None
            start = time.monotonic()
            state = self._detectors[name].refit(before, lambda: self._sides(fakes, step), begun=name in self._begun)
            numbers = {
                "accuracy": state.accuracy,
                "accuracy_before": state.accuracy_before,
                "loss": state.losses.get("total"),
                "seconds": time.monotonic() - start,
            }
            for text in state.warnings:
                self.warn(f"refit of {name} after step {step + 1}: {text}")
            good = state.outcome == "published"
            if not good:
                what = {"kept_out": "kept out", "failed": "failed"}.get(state.outcome, state.outcome)
                self.warn(f"the refit of {name} after step {step + 1} was {what}: {state.reason}. Version {before} goes on")
            return {"good": good, "version": state.version if good else before, "numbers": numbers}

        told = self._by_first(work)
        numbers = {key: value for key, value in told["numbers"].items() if value is not None}
        standing.version = told["version"]
        if told["good"]:
            standing.refits, standing.accuracy = standing.refits + 1, numbers.get("accuracy", standing.accuracy)
        else:
            standing.kept_out += 1
        return numbers


def due(schedule: ScheduleConfig, step: int, mean: float, gap: float | None) -> bool:
    """Whether a refit follows step `step` (counted from 0), whose samples' mean reward is `mean` and whose references are better by `gap`."""
    if schedule.use == "every":
        return (step + 1) % (schedule.steps or 1) == 0
    if schedule.use == "above":
        return (step == 0 and schedule.warm_up) or mean > (schedule.mean or 0.0)
    return gap is not None and gap < 0


class Detector:
    """One reward at its service's admin listener, leased for as long as this is open."""

    def __init__(self, name: str, config: AdversaryConfig, folder: Path, outage_s: float) -> None:
        """ConfigError without a key."""
        self.name, self.config, self.outage_s = name, config, outage_s
        key = os.environ.get(config.key_env)
        if not key:
            raise ConfigError(
                f"adversary.{name}: the admin listener at {config.admin} takes a key, and {config.key_env} holds none here: export "
                f"{config.key_env}=... (the variable that the service's `admin: {{env: ...}}` names), or set adversary.{name}.key_env"
            )
        holder = f"{folder.resolve()} (process {os.getpid()})"[-200:]
        try:
            self.fits = FitClient(config.admin, key, reward=name, holder=holder, seconds=config.lease_s)
        except ServiceUnreachable as error:
            raise ConfigError(f"adversary.{name}.admin: {error}") from error
        self._ended, self._leasing = threading.Event(), threading.Lock()
        self._renewing = threading.Thread(target=self._renew, name=f"lease of {name}", daemon=True)

    def open(self) -> tuple[int, str]:
        """The version served, and what there is to tell; NoService when the lease cannot be had. A lease of a killed run is waited for."""
        until, told = time.monotonic() + self.config.lease_s + PATIENCE_S, ""
        while True:
            try:
                version = self.fits.lease().version
                break
            except (RequestFailed, ServiceUnreachable) as error:
                if _kind(error) == "leased" and time.monotonic() < until:
                    told = f"waited for the lease of {self.name}: {error}"
                    time.sleep(PAUSE_S)
                    continue
                raise NoService(self._why(error)) from error
        self._renewing.start()
        return version, told

    def begin(self, real: Examples, generated: Examples) -> None:
        """Send both sides, and have the service refit in its background."""
        self.fits.add("real", real.images, real.prompts, real.groups)
        self.fits.add("generated", generated.images, generated.prompts, generated.groups)
        self.fits.fit(publish=False, until_accuracy=self.config.schedule.until_accuracy, rounds=self.config.rounds)

    def refit(self, before: int, sides: Callable[[], tuple[Examples, Examples]], begun: bool) -> FitState:
        """How it went, from version `before` on. One that a restart of the service cut short is made again from there."""
        reason: Exception | None = None
        for attempt in range(TRIES):
            try:
                if attempt:
                    self._patiently(lambda: self._anew(before))
                if attempt or not begun:
                    self.begin(*sides())
                state = self.fits.wait(self.config.wait_s)
                return self.fits.publish() if state.outcome == "ready" else state
            except TimeoutError:
                reason = TimeoutError(
                    f"it took longer than adversary.{self.name}.wait_s={self.config.wait_s:g}: raise that, or lower pictures or rounds"
                )
                break
            except (RequestFailed, ServiceUnreachable) as error:
                reason = error
                again = isinstance(error, ServiceUnreachable) or error.problem().retryable  # one that shuts down is away soon
                if not again and _kind(error) not in (*LOST, "refitting"):
                    break
        with suppress(RequestFailed, ServiceUnreachable):
            self._anew(before)  # what was left of it, a candidate or waiting pictures, goes
        return FitState(outcome="failed", version=before, reason=str(reason))

    def restore(self, version: int) -> None:
        """Have `version` served again; DetectorGone when it cannot be."""
        try:
            self._patiently(lambda: self._anew(version))
        except (RequestFailed, ServiceUnreachable) as error:
            if _kind(error) == "leased":
                raise DetectorGone(
                    f"another run refits {self.name} now: {error}. Stop that one, or serve the reward twice, and go on with --resume."
                ) from error
            raise DetectorGone(
                f"version {version} of {self.name} cannot be had back from {self.config.admin} ({error}). Start the service with the "
                "`fit.folder` that it had, and go on with --resume."
            ) from error

    def back_to(self, version: int, run: Path) -> None:
        """The version of a checkpoint, with its replay buffer and optimiser; CheckpointError when it is not kept."""
        try:
            self._patiently(lambda: self._anew(version))
        except ServiceUnreachable as error:
            raise NoService(self._why(error)) from error
        except RequestFailed as error:
            raise CheckpointError(
                f"the checkpoint in {run} was made with version {version} of {self.name}, which {self.config.admin} does not go back to "
                f"({error}): start the service with the `fit.folder` that it had, remove the newest folder in {run}/checkpoints to go on "
                "from the one before, or start anew in another --run-dir"
            ) from error

    def snapshot(self) -> str | None:
        """What went wrong, or nothing."""
        try:
            self._patiently(self._kept)
        except (RequestFailed, ServiceUnreachable) as error:
            return str(error)
        return None

    def close(self) -> None:
        self._ended.set()
        if self._renewing.is_alive():
            self._renewing.join(self.config.lease_s)
        self.fits.close()

    def _anew(self, version: int) -> None:
        """As it was at a version: a running refit ends, waiting pictures and later versions are forgotten."""
        with self._leasing:
            self.fits.lease()
        self.fits.rollback(version)

    def _kept(self) -> None:
        """A snapshot, also by a service that was started again and knows of no lease."""
        with self._leasing:
            self.fits.lease()
        self.fits.snapshot()

    def _patiently(self, work: Callable[[], T]) -> T:
        """Again while the service is away, for as long as scores are waited for; or for as long as a lease lasts, where another has it."""
        start = time.monotonic()
        while True:
            try:
                return work()
            except (RequestFailed, ServiceUnreachable) as error:
                leased = _kind(error) == "leased"
                again = leased or isinstance(error, ServiceUnreachable) or error.problem().retryable
                most = self.config.lease_s + PATIENCE_S if leased else self.outage_s
                if not again or time.monotonic() - start > most:
                    raise
            time.sleep(PAUSE_S)

    def _renew(self) -> None:
        while not self._ended.wait(self.config.lease_s / 3):
            with suppress(RequestFailed, ServiceUnreachable), self._leasing:  # who needs the lease next finds out, and says so
                self.fits.lease()

    def _why(self, error: RequestFailed | ServiceUnreachable) -> str:
        kind = _kind(error)
        if kind == "leased":
            return f"{self.name} is refitted by another run: {error}. Stop that one, or serve the reward once more on other ports"
        if isinstance(error, RequestFailed) and error.problem().status in (401, 403):
            return f"{self.config.admin} does not take the key in {self.config.key_env}: {error}"
        if isinstance(error, RequestFailed):
            fix = "serve it with `fit:`, as examples/serve/adversary.yaml does"
            return f"{self.name} cannot be refitted at {self.config.admin}: {error}; {fix}"
        return f"adversary.{self.name}.admin: {error} See examples/serve/adversary.yaml"


def _kind(error: Exception) -> str:
    """The last part of a problem's urn."""
    return error.problem().type.rpartition(":")[2] if isinstance(error, RequestFailed) else ""
