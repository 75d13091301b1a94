"""One run: sample groups -> rewards over HTTP -> advantages -> loss over the window -> step. Read `Run.step` first.

Everything random is a function of (seed, step), so a killed run that resumes from its last checkpoint repeats the same numbers.
"""

import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from trainer import alarm, checkpoint, memory, parallel, plan, sharding
from trainer.advantages.aggregate import aggregate, check, features_for, gate_of, per_group
from trainer.advantages.common import Advantages
from trainer.adversary import Adversary
from trainer.ahead import Ahead, Drawn
from trainer.config import FORWARD, ConfigError, ParallelConfig, PromptsConfig, RunConfig, Stopped, dump
from trainer.learning import Learner, rows_of
from trainer.metrics import Metrics, read
from trainer.parallel import ALONE, World
from trainer.profile import Profile
from trainer.registry import resolve
from trainer.regularizers.gardo import together
from trainer.sampling.rollout import noise_seed, ratio_deviation
from trainer.sampling.sampler import Sampler
from trainer.scoring import Rewards, Scorer
from trainer.types import Prompt, Rollout


class GaveUp(Stopped):
    """No scores for too long; the run is saved."""


class DiskFull(Stopped):
    """Nothing could be saved, three times in a row or at the end; the last good checkpoint stands."""


class Run:
    """A policy, its optimiser, its services and its folder."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        resume: bool = False,
        *,
        services: bool = True,
        accept: bool = True,
        world: World = ALONE,
    ) -> None:
        """Whatever cannot work is refused before a service is asked. Without `services` nothing can be scored (a dry run); without `accept`
        the first trajectory is not checked (a look at a checkpoint). Of a `world` only rank 0 writes.
        """
        self.folder, self.world, self.quiet = folder, world, world.rank > 0
        if world.device is not None:
            config = config.model_copy(update={"device": world.device})
        self.told: list[str] = []  # what a resumed run has to say
        self.prompts = read_prompts(config.prompts)
        self.policy = load_policy(config)
        if self.policy.device.type != "cpu":  # the encoders need not come back for each new prompt
            self.policy.prepare([prompt.text for part in self.prompts for prompt in part])
        if config.parallel.shard and services:
            sharding.shard(self.policy, config, world.size)
        self.sampler = Sampler(self.policy, config)
        folder.mkdir(parents=True, exist_ok=True)
        texts = [prompt.text for prompt in self.prompts[0]]
        config = memory.fitted(config, self.policy, texts, self.sampler.shape, folder, known=resume)
        self.config = config = parallel.agreed(world, config)
        self.sampler.config = config
        self.learner = Learner(self.policy, config, world)
        self.weights = self.learner.weights
        self.ahead = Ahead(self.learner)
        self.gate = gate_of(config)
        self.adversary = Adversary(config, folder, self.prompts[0], world) if config.adversary and services and accept else None
        self.stateful = self.parts()
        self.profile = Profile(self.policy)
        self.done = self.unscored_steps = self.unsaved = 0
        self.rollbacks: list[int] = []
        self.versions: dict[str, int] = {}
        resumed = resume and self._resume()
        self.accepted_s = 0.0
        if accept:
            start = time.monotonic()
            with memory.explained(config, lambda: "the first trajectory"):
                self.accept()
            self.accepted_s = time.monotonic() - start
        self.scorer: Scorer = self.judges() if services else cast(Any, None)
        if services:
            check(config, self.scorer)
        known = {name: info.version for name, info in self.scorer.infos.items()} if services else {}
        self.versions = known | self.versions
        self.monitors = load_monitors(config)
        self.features = features_for(config, self.monitors)  # of gardo.diversity
        trains = config if services and accept else None  # a dry run, or a look at a checkpoint, is no run of W&B's
        self.metrics = Metrics(folder, self.done if resumed else None, self.quiet, config.tensorboard, trains)
        if self.adversary is not None:
            self._lease(self.adversary, resumed)
        if not self.quiet:
            (folder / "config.yaml").write_text(dump(config))
            checkpoint.write_json(folder / "versions.json", self._versions())
            (folder / "done.json").unlink(missing_ok=True)

    def parts(self) -> dict[str, checkpoint.Stateful]:
        """What changes in a run beside the learner, by the name under which a checkpoint carries it."""
        found: dict[str, checkpoint.Stateful | None] = {
            "ahead": self.ahead if self.config.sampling.ahead else None,
            "gardo": self.gate,
            "adversary": self.adversary,
        }
        return {name: part for name, part in found.items() if part is not None}

    def judges(self) -> Scorer:
        """The services."""
        return Scorer(self.config.rewards, self.config.reward_timeout_s, self.config.reward_outage_s)

    def _lease(self, adversary: Adversary, resumed: bool) -> None:
        """The detectors are this run's, at the versions that it left them at."""
        try:
            self.told += adversary.start(self.scorer, resumed)
        except BaseException:
            self.close()
            raise
        self.versions |= adversary.versions
        adversary.warn = adversary.references.warn = lambda text: self.metrics.warn(text)

    def plan(self, services: Mapping[str, str]) -> Any:
        """A table of what the run will cost."""
        return plan.table(self, services)

    def gifts(self) -> dict[str, Callable[[Path], None]]:
        """What a finished run gives away, by the name of its folder, and how each is written."""

        def adapter(folder: Path) -> None:
            with self.learner.ema.swapped():
                self.policy.save_adapter(folder, quiet=self.quiet)

        return {"adapter": adapter}

    @property
    def first(self) -> dict[str, Any] | None:
        """The first evaluation, against which the total is measured."""
        return self.metrics.evaluations[0] if self.metrics.evaluations else None

    def step(self) -> dict[str, Any]:
        """One training step; returns its line of metrics.

        Groups are scored while others are sampled, and learned from while others are still scored where their advantages are their own
        affair. With `sampling.ahead` the next step's groups are sampled before this one's are learned from. An `adversary` then refits its
        detectors on the step's pictures; where their version changed under it, the step is drawn again.
        """
        start, c = time.monotonic(), self.config
        if self.adversary is not None:
            self.adversary.begin()
        self.profile.start()
        drawn = self.ahead.take(lambda weights: self._draw(self.done, weights))
        if c.sampling.ahead:
            self.ahead.keep(self._draw(self.done + 1, self.learner.sampling_weights()))
        sampled = time.monotonic()
        waited, accumulated = 0.0, per_group(c)
        if accumulated:
            self.learner.begin(c.group.prompts * c.group.size, self.done)
            for rollout, future in zip(drawn.rollouts, drawn.futures, strict=True):
                asked = time.monotonic()
                rewards = self.scorer.collect([future])
                waited += time.monotonic() - asked
                self.learner.accumulate(rollout, self._judge([rollout], rewards))
        asked = time.monotonic()
        rewards = parallel.rewards_of_all(self.world, self.scorer.collect(drawn.futures))
        waited += time.monotonic() - asked
        if self.adversary is not None and self.adversary.moved(rewards, self.done):
            if accumulated:
                self.learner.drop()
            return self.step()
        self.versions.update(rewards.versions)
        advantages = self._judge(drawn.rollouts, rewards)
        usable = bool(advantages.weights_B.any())
        self.unscored_steps = 0 if usable else self.unscored_steps + 1
        numbers: dict[str, float] = {}
        if accumulated and usable:
            numbers = self.learner.finish()
        elif accumulated:
            self.learner.drop()
        elif usable:
            own = rows_of(advantages, self.world.rows(c.group.prompts * c.group.size))
            numbers = self.learner.learn(drawn.rollouts, own, self.done)
        learned = time.monotonic()
        if self.adversary is not None:
            numbers = {**numbers, **self.adversary.after(self.done, drawn.rollouts, rewards)}
            self.versions |= self.adversary.versions
        self.done += 1
        end, pictures = time.monotonic(), c.group.prompts * c.group.size
        return self.metrics.write(
            "step",
            self.done,
            {
                **summary(self.scorer, rewards, self.first, "mean", "std"),
                **numbers,
                **advantages.numbers,
                "skipped": not usable,
                "failed_scores": rewards.missing,
                "masked_samples": int((advantages.weights_B == 0).sum()),
                "failures": dict(rewards.failures),
                "zero_std_groups": advantages.zero_variance_groups,
                "dropped_groups": advantages.dropped_groups,
                **self.profile.split(sampled - start),
                "seconds/wait": waited,
                "seconds/train": learned - sampled - waited,
                **({"seconds/refit": end - learned} if self.adversary is not None else {}),
                "pictures/second": pictures / (end - start),
            },
        )

    def evaluate(self) -> dict[str, Any]:
        """`measure`, written to the metrics, with a grid."""
        values, images = self.measure()
        self.metrics.grid(self.folder, self.done, images, self.config.eval.grid)
        return self.metrics.write("eval", self.done, values)

    def measure(self) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """The fixed prompts and noise, through the average if so configured: rewards, monitors; and the pictures."""
        images, prompts = self.pictures(self.config.eval.samples)
        own = self.world.rows(len(prompts))
        rewards = parallel.rewards_of_all(self.world, self._score(images[own], prompts[own]))
        while self.adversary is not None and self.adversary.moved(rewards, self.done):
            rewards = parallel.rewards_of_all(self.world, self._score(images[own], prompts[own]))
        values: dict[str, Any] = {**summary(self.scorer, rewards, self.first, "mean", "std", "sem"), "n": len(prompts)}
        values["failed_scores"] = rewards.missing
        if self.adversary is not None:
            values.update(self.adversary.look(rewards))
        if self.monitors is not None:
            values.update(self.monitors.measure(images, [p.meta.get("class") for p in prompts]))
        return values, images

    def pictures(self, count: int) -> tuple[NDArray[np.uint8], list[Prompt]]:
        """(B, H, W, 3) uint8 of `count` evaluation prompts, in turn along the ODE."""
        s, known = self.config.sampling, self.prompts[1]
        prompts = [known[i % len(known)] for i in range(count)]
        starts = [*range(0, count, s.batch)]
        starts += [0] * (-len(starts) % self.world.size)  # ranks that hold parts of one network go through it equally often
        with self.learner.ema.swapped():
            chunks = [self.sampler.pictures(prompts[n : n + s.batch], n) for n in self.world.part(starts)]
        told = [chunk for chunks in self.world.tell(chunks) for chunk in chunks]
        return np.concatenate(told)[:count], prompts

    def accept(self) -> float:
        """max |ratio - 1| of a fresh group under unchanged weights; ConfigError when rounding eats a tenth of the clip range.

        0 for losses that take no ratio of steps.
        """
        clip = self.config.clip_range()
        if clip is None or self.config.loss.use in FORWARD:
            return 0.0
        first, prompts = self._own_groups(self.done)[0]
        own = ratio_deviation(self.policy, self.sampler.groups(self.done, prompts, first), self.config.sampling.micro_batch)
        deviation = max(self.world.tell(own))
        limit = min(clip) / 10
        if not deviation < limit:
            raise ConfigError(
                f"unchanged weights already move the ratio by {deviation:.2g}, and a tenth of the clip range is {limit:.2g}: "
                "clipping would act on rounding. Set policy.dtype=float32, or raise loss.clip_low and loss.clip_high"
                + (", or leave sampling.draw_batch away." if self.config.sampling.draw_batch else ".")
            )
        return deviation

    def save(self) -> None:
        """A checkpoint of this moment; metrics first, so that a checkpoint never knows more than they do. OSError leaves the one before."""
        if self.adversary is not None:
            self.adversary.snapshot()
        tensors, learned = self.learner.state()
        learned["state"] = {}
        for name, part in self.stateful.items():
            own, learned["state"][name] = part.state()
            tensors |= {f"state/{name}/{key}": value for key, value in own.items()}
        problem: OSError | None = None
        if not self.quiet:
            try:
                self._write(tensors, learned)
            except OSError as error:
                problem = error
        said = self.world.same(None if problem is None else str(problem))  # all ranks go on or fail together
        if said is not None:
            raise checkpoint.NotSaved(said) from problem

    def _write(self, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        self.metrics.sync()
        meta = {
            **learned,
            "unscored_steps": self.unscored_steps,
            "rollbacks": self.rollbacks,
            "seed": self.config.seed,
            "fingerprint": self.policy.fingerprint(),
            "config": checkpoint.training(self.config),
            "sigmas_hash": digest(self.sampler.sigmas),
            "reward_versions": self.versions,
        }
        try:
            checkpoint.save(self.folder, self.done, tensors, meta)
        except checkpoint.NotSaved:
            if not checkpoint.prune(self.folder, 1, self._best(saved=True)):  # nothing to be had that way
                raise
            checkpoint.save(self.folder, self.done, tensors, meta)
        best = self._best()
        if best is not None:
            checkpoint.write_json(self.folder / "checkpoints" / "best.json", {"step": best, "folder": f"step_{best:06d}"})
        checkpoint.prune(self.folder, self.config.checkpoint_keep, best)

    def best(self, saved: bool = False) -> int | None:
        """Step of the best evaluation whose checkpoint is there, or, unless `saved`, about to be; None before the first."""
        return self.world.same(self._best(saved))

    def _best(self, saved: bool = False) -> int | None:
        c, evaluations = self.config, self.metrics.evaluations
        there = {*checkpoint.steps(self.folder), *([] if saved else [self.done])} - {*self.rollbacks}
        if c.alarm.action == "rollback":
            there &= {*alarm.sound(evaluations, c.alarm, self.held_out)}
        there &= {int(e["step"]) for e in evaluations}
        if not there:
            return None
        return int(alarm.best(evaluations, by=c.checkpoint_best, held_out=self.held_out, among=there)["step"])

    @property
    def held_out(self) -> dict[str, float]:
        """Sign of each reward that has no weight, and so is not trained on, and is never refitted."""
        signs = zip(self.scorer.names, self.scorer.signs_R.tolist(), strict=True)
        return {name: sign for name, sign in signs if self.config.rewards[name].weight == 0 and name not in self.config.adversary}

    def adopt(self, folder: Path) -> None:
        """The weights (and their average) of a checkpoint of the same model."""
        saved = checkpoint.read(folder)
        checkpoint.check_model(saved, self.policy.fingerprint())
        checkpoint.check_shapes(self.weights, saved.under("weights"))
        self.wear(saved)

    def wear(self, saved: checkpoint.Saved) -> None:
        """What was learned until a checkpoint, without the optimiser."""
        self.learner.adopt(saved)

    def adopt_best(self) -> tuple[int, checkpoint.Saved]:
        """Step and content of the best checkpoint that can be read; damaged ones are set aside, and `told`."""
        while (step := self.best(saved=True)) is not None:
            if (saved := self._readable(step)) is not None:
                return step, saved
        raise checkpoint.CheckpointError(
            f"no checkpoint of an evaluation is left in {self.folder}: start anew in another --run-dir"
        )

    def roll_back(self, saved: checkpoint.Saved) -> None:
        """The weights, average and optimiser of an earlier checkpoint under a lower learning rate; the steps count on. Detectors stay as they
        are: they have seen what fooled them.
        """
        self._put(saved, but="adversary")
        self.ahead.clear()  # drawn with the weights that are left behind
        self.rollbacks.append(self.done)
        self.learner.lr_scale = self.config.alarm.rollback_lr ** len(self.rollbacks)

    def close(self) -> None:
        """Close files and connections; leases are given back."""
        self.metrics.close()
        if self.adversary is not None:
            self.adversary.close()
        if self.scorer:
            self.scorer.close()

    def _resume(self) -> bool:
        """From the newest checkpoint that can be read; False where there never was one."""
        if not self.quiet:
            checkpoint.recover(self.folder)
        self.world.wait()
        steps = checkpoint.steps(self.folder)
        for step in reversed(steps):
            if (saved := self._readable(step)) is not None:
                self._restore(saved)
                return True
        if steps:
            raise checkpoint.CheckpointError(f"{' '.join(self.told)} None is left: start anew in another --run-dir.")
        return False

    def _readable(self, step: int) -> checkpoint.Saved | None:
        """The checkpoint after `step`, or None where it is damaged: then it is set aside, and that is `told`."""
        try:
            return checkpoint.read(checkpoint.folder_of(self.folder, step))
        except checkpoint.Unreadable as error:
            aside = checkpoint.set_aside(self.folder, step) if not self.quiet else self.folder
            self.told.append(
                f"The checkpoint after step {step} is damaged ({error.__cause__}) and now lies in {aside}; the one before counts."
            )
            return None

    def _restore(self, saved: checkpoint.Saved) -> None:
        c = self.config
        self.told += checkpoint.check(
            saved,
            fingerprint=self.policy.fingerprint(),
            config=checkpoint.training(c),
            sigmas_hash=digest(self.sampler.sigmas),
        )
        self._put(saved)
        self.done, self.rollbacks = saved.meta["step"], list(saved.meta.get("rollbacks", []))
        self.learner.lr_scale = c.alarm.rollback_lr ** len(self.rollbacks)
        self.unscored_steps = 0
        self.versions.update(saved.meta["reward_versions"])

    def _put(self, saved: checkpoint.Saved, but: str = "") -> None:
        checkpoint.check_shapes(self.weights, saved.under("weights"))
        self.learner.load_state(saved)
        for name, part in self.stateful.items():
            if name not in saved.meta.get("state", {}):
                raise checkpoint.CheckpointError(f"the checkpoint was written without {name!r}: take another --run-dir")
            if name != but:
                part.load_state(saved.under(f"state/{name}"), saved.meta["state"][name])

    def _together(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[Prompt]]]:
        """(position of the first, prompts) of as many whole groups as fit into a pass of sampling, one at least."""
        count = max(1, self.config.sampling.batch // self.config.group.size)
        for first in range(0, len(prompts), count):
            yield first, prompts[first : first + count]

    def _draw(self, step: int, weights: AbstractContextManager[None]) -> Drawn:
        """This rank's groups of a step, sampled under `weights`, on their way to the services."""
        rollouts, futures = [], []
        with weights:
            for first, prompts in self._own_groups(step):
                rollouts.append(rollout := self.sampler.groups(step, prompts, first))
                groups = [f"{step}/{first + n}" for n in range(len(prompts)) for _ in range(self.config.group.size)]
                futures.append(self.scorer.submit(rollout.images_BHWC, [p.text for p in rollout.prompts], groups))
        return Drawn(rollouts, futures)

    def _judge(self, rollouts: Sequence[Rollout], rewards: Rewards) -> Advantages:
        """Of some whole groups, or of the whole step; `rollouts` are this rank's of them."""
        c, size = self.config, self.config.group.size
        group_B = torch.arange(rewards.values_RB.shape[1] // size).repeat_interleave(size)
        features_BD = None
        if self.features is not None:
            features_BD = self.world.joined(together(self.features, [r.images_BHWC for r in rollouts]))
        return aggregate(c, self.scorer, rewards, group_B, features_BD, self.gate)

    def _own_groups(self, step: int) -> Sequence[tuple[int, Sequence[Prompt]]]:
        """This rank's part of a step's."""
        return self.world.part(list(self._together(self._prompts_of(step))))

    def _prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of one step: epochs in shuffled order, a function of (seed, step)."""
        train, count = self.prompts[0], self.config.group.prompts
        out = []
        for position in range(step * count, (step + 1) * count):
            epoch, place = divmod(position, len(train))
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(noise_seed(self.config.seed, epoch, -2, -2)))
            out.append(train[int(order[place])])
        return out

    def _score(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Rewards:
        return self.scorer.collect([self.scorer.submit(images, [p.text for p in prompts], [""] * len(prompts))])

    def _versions(self) -> dict[str, Any]:
        packages = ("torch", "diffusers", "transformers", "peft", "numpy", "safetensors")
        return {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "packages": {name: importlib.metadata.version(name) for name in packages},
            "policy": self.policy.fingerprint(),
            "rewards": {name: json.loads(info.model_dump_json()) for name, info in self.scorer.infos.items()}
            if self.scorer
            else {},
        }


def train(run: Run, *, stop: Callable[[], bool] = lambda: False, tell: Callable[[dict[str, Any]], None] = lambda line: None) -> str:
    """Steps until the recipe's end, an alarm or `stop()`; returns the reason. `tell` sees every line of metrics, and notes.

    Stopped says what to do: GaveUp after `max_unscored_steps` steps in a row without a score, with the run saved; DiskFull; OutOfMemory.
    """

    def note(text: str) -> None:
        tell({"kind": "note", "step": run.done, "text": text})

    run.metrics.warn = run.scorer.patient.waiting = note
    with memory.explained(run.config, lambda: f"step {run.done + 1}"):
        return _train(run, stop, tell, note)


def _train(run: Run, stop: Callable[[], bool], tell: Callable[[dict[str, Any]], None], note: Callable[[str], None]) -> str:
    c, reason = run.config, ""
    for text in run.told:
        note(text)
    run.told.clear()
    if not run.metrics.evaluations:
        start = run.evaluate()
        tell(start)
        if start["failed_scores"] and all(start[f"reward/{name}/mean"] is None for name in c.rewards):
            raise GaveUp(
                f"the first evaluation got no score at all from {_services(c)}: mend the services and start again with --resume"
            )
        if c.checkpoint_best.startswith("heldout:"):
            alarm.measure_of(c.checkpoint_best, run.metrics.evaluations[0], run.held_out)
        _keep(run, note)
    while not reason:
        if run.done >= c.steps:
            reason = "finished"
        elif run.world.same(stop()):
            _keep(run, note, must=True)
            return "interrupted"
        else:
            tell(run.step())
            if run.unscored_steps >= c.max_unscored_steps:
                _keep(run, note, must=True)
                raise GaveUp(
                    f"{run.unscored_steps} steps in a row without a single score from {_services(c)}; see `failures` in "
                    f"{run.metrics.path}. The run is saved: mend the services and start again with --resume."
                )
            reason = _after(run, tell, note)
    best, saved = run.adopt_best()
    run.wear(saved)
    try:
        _give(run)
        if not run.quiet:
            checkpoint.write_json(run.folder / "done.json", {"best_step": best, "reason": reason})
    except OSError as error:
        raise DiskFull(
            f"what was trained could not be written into {run.folder} ({error}); make room and start again with --resume"
        ) from error
    run.world.wait()
    return reason


def _services(config: RunConfig) -> str:
    return ", ".join(f"{name} ({reward.url})" for name, reward in config.rewards.items())


def _keep(run: Run, note: Callable[[str], None], must: bool = False) -> None:
    """Save. When that fails the run goes on to the next time; DiskFull the third time in a row, or where it `must` be."""
    try:
        run.save()
        run.unsaved = 0
    except OSError as error:
        run.unsaved += 1
        newest = checkpoint.steps(run.folder)[-1:]
        stands = f"the one after step {newest[0]} stands" if newest else "there is none yet"
        if must or run.unsaved >= 3:
            raise DiskFull(
                f"{error}; {stands}. Make room (fewer checkpoints: checkpoint_keep=1), and go on with --resume."
            ) from error
        note(f"{error}; {stands}. The run goes on and tries again at the next checkpoint; make room.")


def _give(run: Run) -> None:
    """Each folder whole or not at all."""
    for name, write in run.gifts().items():
        building, final = run.folder / f".{name}.building", run.folder / name
        if not run.quiet:
            shutil.rmtree(building, ignore_errors=True)
        write(building)
        if not run.quiet:
            shutil.rmtree(final, ignore_errors=True)
            building.rename(final)


def run_of(config: RunConfig, folder: Path, resume: bool = False, **options: Any) -> Run:
    """The run that a configuration is of: with a rewriter, or of pictures alone."""
    if type(config) is RunConfig:
        return Run(config, folder, resume, **options)
    from trainer.language.run import LanguageRun  # which builds on this file

    return LanguageRun(cast(Any, config), folder, resume, **options)


def look(config: RunConfig, run_folder: Path | None, step: int) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Measure a checkpoint of a run (or the bare policy when `run_folder` is None) and write nothing into the run."""
    with tempfile.TemporaryDirectory() as scratch:
        run = run_of(config.model_copy(update={"parallel": ParallelConfig()}), Path(scratch), accept=False)
        try:
            if run_folder is not None:
                run.adopt(checkpoint.folder_of(run_folder, step))
                told = [line for line in read(run_folder / "metrics.jsonl") if line["kind"] == "eval"]
                run.metrics.evaluations.extend(told[:1])  # the total is measured against the run's own start
            return run.measure()
        finally:
            run.close()


def export_whole(config: RunConfig, run_folder: Path, step: int, out: Path) -> None:
    """All weights of a checkpoint that has no adapter, through their average, in diffusers' format in `out`; no service is asked."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(config, Path(scratch), services=False, accept=False)
        try:
            run.adopt(checkpoint.folder_of(run_folder, step))
            _give(run)
        finally:
            run.close()
        shutil.copytree(run.folder / "adapter", out)


def _after(run: Run, tell: Callable[[dict[str, Any]], None], note: Callable[[str], None]) -> str:
    """Evaluation, alarm and checkpoint where they are due; the reason to stop, or nothing."""
    c, reason = run.config, ""
    last = run.done >= c.steps
    due = run.done % c.eval.every == 0 or last
    if due:
        tell(run.evaluate())
        since = run.rollbacks[-1] if run.rollbacks else -1
        raised = alarm.check(run.metrics.evaluations, c.alarm, run.held_out, since, run.best())
        if raised is not None:
            reason = _alarmed(run, raised, last, tell, note)
    if due or run.done % c.checkpoint_every == 0:
        _keep(run, note)
    return reason


def _alarmed(run: Run, raised: alarm.Alarm, last: bool, tell: Callable[[dict[str, Any]], None], note: Callable[[str], None]) -> str:
    """What the recipe chose: the reason to stop, or nothing."""
    chosen = run.config.alarm
    action, best = chosen.action, raised.best_step
    if action == "rollback" and (last or len(run.rollbacks) >= chosen.rollbacks):
        action = "stop"
    saved = None
    if action == "rollback":
        best, saved = run.adopt_best()
    line = {"reason": raised.reason, "action": action, "best_step": best}
    tell(run.metrics.write("alarm", run.done, line))
    if saved is not None:
        run.roll_back(saved)
        left = chosen.rollbacks - len(run.rollbacks)
        note(
            f"back to the weights of step {best} with {run.learner.lr_scale:g} of the learning rate; {left} more such returns, then it stops"
        )
    return f"alarm: {raised.reason}" if action == "stop" else ""


def load_policy(config: RunConfig) -> Any:
    """The policy with its adapter; ConfigError for an option it does not have. The libraries' own progress bars stay off."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    kind = resolve("policy", config.policy.use)
    options = config.policy.options()
    path = config.policy.path
    try:
        return kind.load(path, device=device_of(config), seed=config.seed, **options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["policy", *map(str, first["loc"])])
        raise ConfigError(f"{where}: {first['msg']}; see {error.title} in {kind.__module__} for the options") from error


def device_of(config: RunConfig) -> str:
    """`auto` is the accelerator where there is one."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_monitors(config: RunConfig) -> Any:
    """The held-out judges, or None."""
    if config.eval.monitors is None:
        return None
    from trainer.honesty import Monitors  # only runs with monitors need them

    return Monitors.load(config.eval.monitors, device_of(config))


def read_prompts(paths: PromptsConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts; ConfigError names the file and the line that cannot be read."""
    out: list[list[Prompt]] = []
    for key, name in (("train", paths.train), ("eval", paths.eval)):
        if not Path(name).is_file():
            raise ConfigError(f'prompts.{key}: no file {name} here ({Path.cwd()}); lines are {{"id": 0, "prompt": "..."}}')
        prompts = []
        for number, line in enumerate(Path(name).read_text().splitlines(), 1):
            try:
                raw = json.loads(line)
                prompts.append(Prompt(int(raw.pop("id")), str(raw.pop("prompt")), raw))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ConfigError(f'{name}, line {number}: write {{"id": 0, "prompt": "..."}}') from error
        if not prompts:
            raise ConfigError(f"{name} holds no prompts")
        out.append(prompts)
    return out[0], out[1]


def summary(scorer: Scorer, rewards: Rewards, first: Mapping[str, Any] | None, *kinds: str) -> dict[str, float | None]:
    """Mean, std or sem of each reward as its service gave it, and of the total; None where nothing was scored."""
    out: dict[str, float | None] = {}
    rows = {f"reward/{name}/": row for name, row in zip(scorer.names, rewards.values_RB, strict=True)}
    rows["reward/total_"] = total(scorer, rewards.values_RB, first)
    for prefix, row in rows.items():
        valid = row[row.isfinite()]
        spread = float(valid.std(correction=1)) if len(valid) > 1 else None
        numbers = {
            "mean": float(valid.mean()) if len(valid) else None,
            "std": spread,
            "sem": spread / math.sqrt(len(valid)) if spread is not None else None,
        }
        out.update({prefix + kind: numbers[kind] for kind in kinds})
    out["reward/total"] = out["reward/total_mean"]
    return out


def total(scorer: Scorer, values_RB: Tensor, first: Mapping[str, Any] | None) -> Tensor:
    """(B,): the trained reward, higher is better; NaN where a reward with a weight is missing.

    Weighted mean of the rewards in standard deviations of the `first` evaluation, 0 at its mean, so that a logit and a cosine
    count alike, as in the advantages. Without one the values' own mean and deviation serve. Win rates are left out, for their mean is
    the same whatever the policy; NaN when nothing else has a weight.
    """
    out = torch.zeros(values_RB.shape[1], dtype=torch.float64)
    weights_R = scorer.weights_R * scorer.single_R
    for name, row, sign, weight in zip(scorer.names, values_RB, scorer.signs_R, weights_R, strict=True):
        if weight > 0:
            scored = row[row.isfinite()]
            held = (first or {}).get(f"reward/{name}/mean"), (first or {}).get(f"reward/{name}/std")
            mean = held[0] if held[0] is not None else scored.mean()
            std = held[1] if held[1] is not None else scored.std(correction=1) if len(scored) > 1 else math.nan
            out += sign * weight * (row - mean) / max(float(std), 1e-9)
    return out / weights_R.sum()


def digest(tensor: Tensor) -> str:
    """SHA-256 of float32 values."""
    return hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()
