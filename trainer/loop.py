"""One run: sample groups -> rewards over HTTP -> advantages -> loss over the window -> step. Read `Run.step` first.

Everything random is a function of (seed, step), so a killed run that resumes from its last checkpoint repeats the same numbers.
"""

import hashlib
import importlib.metadata
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from trainer import alarm, checkpoint
from trainer.config import ConfigError, PromptsConfig, RunConfig, dump
from trainer.learning import Learner
from trainer.metrics import Metrics, read
from trainer.registry import resolve
from trainer.sampling.rollout import noise_seed, ratio_deviation, sample, window_of
from trainer.scoring import Rewards, Scorer
from trainer.types import Prompt, Rollout

EVALUATION_STEP = -1  # evaluations draw the same noise every time: that of this "step"


class GaveUp(RuntimeError):
    """No scores for too long; the run is saved."""


class Run:
    """A policy, its optimiser, its services and its folder."""

    def __init__(self, config: RunConfig, folder: Path, resume: bool = False) -> None:
        self.config, self.folder = config, folder
        self.prompts = read_prompts(config.prompts)
        self.advantages_of = resolve("advantages", "group_relative")
        self.scorer = Scorer(config.rewards, config.reward_timeout_s)
        self.policy = load_policy(config)
        s = config.sampling
        self.shape = self.policy.latent_shape(s.height, s.width)
        self.sigmas = self.policy.sigmas(s.steps, s.height, s.width)
        self.eval_sigmas = self.policy.sigmas(config.eval.steps, s.height, s.width)
        self.learner = Learner(self.policy, config)
        self.weights = self.learner.weights
        self.monitors = load_monitors(config)
        self.done = self.unscored_steps = 0
        self.versions: dict[str, int] = {name: info.version for name, info in self.scorer.infos.items()}
        folder.mkdir(parents=True, exist_ok=True)
        last = checkpoint.steps(folder)[-1:] if resume else []
        if last:
            self._restore(last[0])
        self.metrics = Metrics(folder, resume_at=self.done if last else None)
        (folder / "config.yaml").write_text(dump(config))
        checkpoint.write_json(folder / "versions.json", self._versions())
        (folder / "done.json").unlink(missing_ok=True)

    @property
    def first(self) -> dict[str, Any] | None:
        """The first evaluation, against which the total is measured."""
        return self.metrics.evaluations[0] if self.metrics.evaluations else None

    def step(self) -> dict[str, Any]:
        """One training step; returns its line of metrics."""
        start, c = time.monotonic(), self.config
        rollouts, futures = [], []
        for first, prompts in self._together(self._prompts_of(self.done)):
            with self.learner.sampling_weights():
                rollouts.append(rollout := self._sample(prompts, first))
            groups = [f"{self.done}/{first + n}" for n in range(len(prompts)) for _ in range(c.group.size)]
            futures.append(self.scorer.submit(rollout.images_BHWC, [p.text for p in rollout.prompts], groups))
        sampled = time.monotonic()
        rewards = self.scorer.collect(futures)
        self.versions.update(rewards.versions)
        scored = time.monotonic()
        group_B = torch.arange(c.group.prompts).repeat_interleave(c.group.size)
        signed_RB = self.scorer.signs_R[:, None] * rewards.values_RB
        advantages = self.advantages_of(signed_RB, rewards.mask_RB, group_B, self.scorer.weights_R, **c.advantages.model_dump())
        usable = bool(advantages.weights_B.any())
        self.unscored_steps = 0 if usable else self.unscored_steps + 1
        numbers = self.learner.learn(rollouts, advantages, self.done) if usable else {}
        self.done += 1
        end, pictures = time.monotonic(), len(group_B)
        return self.metrics.write(
            "step",
            self.done,
            {
                **summary(self.scorer, rewards, self.first, "mean", "std"),
                **numbers,
                "skipped": not usable,
                "failed_scores": int((~rewards.mask_RB).sum()),
                "masked_samples": int((advantages.weights_B == 0).sum()),
                "failures": dict(rewards.failures),
                "zero_std_groups": advantages.zero_variance_groups,
                "dropped_groups": advantages.dropped_groups,
                "seconds/sample": sampled - start,
                "seconds/wait": scored - sampled,
                "seconds/train": end - scored,
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
        rewards = self._score(images, prompts)
        values: dict[str, Any] = {**summary(self.scorer, rewards, self.first, "mean", "std", "sem"), "n": len(prompts)}
        values["failed_scores"] = int((~rewards.mask_RB).sum())
        if self.monitors is not None:
            values.update(self.monitors.measure(images, [p.meta.get("class") for p in prompts]))
        return values, images

    def pictures(self, count: int) -> tuple[NDArray[np.uint8], list[Prompt]]:
        """(B, H, W, 3) uint8 of `count` evaluation prompts, in turn along the ODE."""
        s, known = self.config.sampling, self.prompts[1]
        prompts = [known[i % len(known)] for i in range(count)]
        chunks = []
        with self.learner.ema.swapped():
            for start in range(0, len(prompts), s.micro_batch):
                part = prompts[start : start + s.micro_batch]
                seeds = [noise_seed(self.config.eval.seed, EVALUATION_STEP, p.id, start + i) for i, p in enumerate(part)]
                out = sample(
                    self.policy,
                    part,
                    seeds,
                    sigmas=self.eval_sigmas,
                    shape=self.shape,
                    window=None,
                    guidance=self.config.eval.guidance,
                    micro_batch=s.micro_batch,
                )
                chunks.append(out.images_BHWC)
        return np.concatenate(chunks), prompts

    def accept(self) -> float:
        """max |ratio - 1| of a fresh group under unchanged weights; ConfigError when rounding eats a tenth of the clip range."""
        first, prompts = next(self._together(self._prompts_of(self.done)))
        deviation = ratio_deviation(self.policy, self._sample(prompts, first), self.config.sampling.micro_batch)
        limit = min(self.config.loss.clip_low, self.config.loss.clip_high) / 10
        if not deviation < limit:
            raise ConfigError(
                f"unchanged weights already move the ratio by {deviation:.2g}, and a tenth of the clip range is {limit:.2g}: "
                "clipping would act on rounding. Set policy.dtype=float32, or raise loss.clip_low and loss.clip_high."
            )
        return deviation

    def save(self, best: int | None) -> None:
        """A checkpoint of this moment; metrics first, so that a checkpoint never knows more than they do."""
        self.metrics.sync()
        tensors, learned = self.learner.state()
        meta = {
            **learned,
            "unscored_steps": self.unscored_steps,
            "seed": self.config.seed,
            "fingerprint": self.policy.fingerprint(),
            "config": checkpoint.training(self.config),
            "config_hash": checkpoint.config_hash(self.config),
            "sigmas_hash": digest(self.sigmas),
            "reward_versions": self.versions,
        }
        checkpoint.save(self.folder, self.done, tensors, meta)
        if best is not None:
            checkpoint.write_json(self.folder / "checkpoints" / "best.json", {"step": best, "folder": f"step_{best:06d}"})
        checkpoint.prune(self.folder, self.config.checkpoint_keep, best)

    def adopt(self, folder: Path) -> None:
        """The weights (and their average) of a checkpoint of the same model."""
        saved = checkpoint.read(folder)
        checkpoint.check_model(saved, self.policy.fingerprint())
        self.learner.adopt(saved)

    def close(self) -> None:
        """Close files and connections."""
        self.metrics.close()
        self.scorer.close()

    def _restore(self, step: int) -> None:
        saved = checkpoint.read(checkpoint.folder_of(self.folder, step))
        c = self.config
        checkpoint.check(
            saved,
            fingerprint=self.policy.fingerprint(),
            config=checkpoint.training(c),
            sigmas_hash=digest(self.sigmas),
        )
        self.learner.load_state(saved)
        self.done = saved.meta["step"]
        self.unscored_steps = 0
        self.versions.update(saved.meta["reward_versions"])

    def _together(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[Prompt]]]:
        """(position of the first, prompts) of as many whole groups as fit into a micro-batch, one at least."""
        count = max(1, self.config.sampling.micro_batch // self.config.group.size)
        for first in range(0, len(prompts), count):
            yield first, prompts[first : first + count]

    def _sample(self, prompts: Sequence[Prompt], first: int) -> Rollout:
        """Whole groups, one for each prompt, in one rollout with one window; `first` is the place of the first group in the step."""
        c, s = self.config, self.config.sampling
        size = c.group.size
        members = [(first + n, k, prompt) for n, prompt in enumerate(prompts) for k in range(size)]
        return sample(
            self.policy,
            [prompt for *_, prompt in members],
            [noise_seed(c.seed, self.done, prompt.id, n * size + k) for n, k, prompt in members],
            sigmas=self.sigmas,
            shape=self.shape,
            window=window_of(c.seed, self.done, first, s.window, s.window_first, s.window_last),
            noise_level=s.noise_level,
            kind=s.kind,
            guidance=s.guidance,
            group=first,
            start_seeds=[noise_seed(c.seed, self.done, p.id, -1 - n) for n, _, p in members] if s.same_noise else None,
            micro_batch=s.micro_batch,
        )

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
            "rewards": {name: json.loads(info.model_dump_json()) for name, info in self.scorer.infos.items()},
        }


def train(run: Run, *, stop: Callable[[], bool] = lambda: False, tell: Callable[[dict[str, Any]], None] = lambda line: None) -> str:
    """Steps until the recipe's end, an alarm or `stop()`; returns the reason. `tell` sees every line of metrics.

    GaveUp after `max_unscored_steps` steps in a row without a score, with the run saved.
    """
    c, evaluations = run.config, run.metrics.evaluations
    run.accept()
    if not evaluations:
        tell(run.evaluate())
        run.save(best_step(evaluations))
    reason = ""
    while not reason:
        if run.done >= c.steps:
            reason = "finished"
        elif stop():
            run.save(best_step(evaluations))
            return "interrupted"
        else:
            tell(run.step())
            if run.unscored_steps >= c.max_unscored_steps:
                run.save(best_step(evaluations))
                raise GaveUp(
                    f"{run.unscored_steps} steps in a row without a single score from "
                    f"{', '.join(f'{name} ({reward.url})' for name, reward in c.rewards.items())}; see `failures` in "
                    f"{run.metrics.path}. The run is saved: mend the services and start again with --resume."
                )
            reason = _after(run, evaluations, tell)
    best = best_step(evaluations)
    run.adopt(checkpoint.folder_of(run.folder, best))
    with run.learner.ema.swapped():
        run.policy.save_adapter(run.folder / "adapter")
    checkpoint.write_json(run.folder / "done.json", {"best_step": best, "reason": reason})
    return reason


def look(config: RunConfig, run_folder: Path | None, step: int) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Measure a checkpoint of a run (or the bare policy when `run_folder` is None) and write nothing into the run."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(config, Path(scratch))
        try:
            if run_folder is not None:
                run.adopt(checkpoint.folder_of(run_folder, step))
                told = [line for line in read(run_folder / "metrics.jsonl") if line["kind"] == "eval"]
                run.metrics.evaluations.extend(told[:1])  # the total is measured against the run's own start
            return run.measure()
        finally:
            run.close()


def _after(run: Run, evaluations: list[dict[str, Any]], tell: Callable[[dict[str, Any]], None]) -> str:
    """Evaluation, alarm and checkpoint where they are due; the reason to stop, or nothing."""
    c, reason = run.config, ""
    last = run.done >= c.steps
    due = run.done % c.eval.every == 0 or last
    if due:
        tell(run.evaluate())
        raised = alarm.check(evaluations, c.alarm)
        if raised is not None:
            line = {"reason": raised.reason, "action": c.alarm.action, "best_step": raised.best_step}
            tell(run.metrics.write("alarm", run.done, line))
            reason = f"alarm: {raised.reason}" if c.alarm.action == "stop" else ""
    if due or run.done % c.checkpoint_every == 0:
        run.save(best_step(evaluations))
    return reason


def best_step(evaluations: Sequence[Mapping[str, Any]]) -> int:
    """Step of the best evaluation so far."""
    return int(alarm.best(evaluations)["step"])


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
    count alike, as in the advantages. Without one the values' own mean and deviation serve.
    """
    out = torch.zeros(values_RB.shape[1], dtype=torch.float64)
    for name, row, sign, weight in zip(scorer.names, values_RB, scorer.signs_R, scorer.weights_R, strict=True):
        if weight > 0:
            scored = row[row.isfinite()]
            held = (first or {}).get(f"reward/{name}/mean"), (first or {}).get(f"reward/{name}/std")
            mean = held[0] if held[0] is not None else scored.mean()
            std = held[1] if held[1] is not None else scored.std(correction=1)
            out += sign * weight * (row - mean) / max(float(std), 1e-9)
    return out / scorer.weights_R.sum()


def digest(tensor: Tensor) -> str:
    """SHA-256 of float32 values."""
    return hashlib.sha256(tensor.float().cpu().numpy().tobytes()).hexdigest()
