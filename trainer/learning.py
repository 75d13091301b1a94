"""From judged pictures to an optimiser step: `begin`, `accumulate` a rollout as soon as its rewards are there, `finish`.

Gradients add up in the order in which rollouts come; the weights change in `finish` alone. Nothing here knows of services.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer import checkpoint
from trainer.advantages.common import Advantages
from trainer.config import FORWARD, ConfigError, RunConfig, Stopped
from trainer.losses.clips import far_off
from trainer.losses.marble import mixed, simplex_weights
from trainer.objectives import Beside, Forward, Objective, Trajectory
from trainer.parallel import ALONE, World
from trainer.policies.ema import EMA
from trainer.real import RealPictures
from trainer.sharding import like, whole
from trainer.snapshots import Snapshot, old_decay
from trainer.types import ImagePolicy, Rollout


class Diverged(Stopped):
    """Update after update had a gradient that is no number; the weights are those before the first of them."""


class Learner:
    """The optimiser, the average, the old policy, the reference and the loss over a policy's trained weights."""

    def __init__(self, policy: ImagePolicy, config: RunConfig, world: World = ALONE) -> None:
        """Of `world`, each rank accumulates rollouts of its own, and all take the same steps."""
        self.policy, self.config, self.world = policy, config, world
        loss, o = config.loss, config.optim
        self.objective: Objective = (Forward if loss.use in FORWARD else Trajectory)(policy, config)
        self.weights = policy.trainable()
        self.optimizer = torch.optim.AdamW(self.weights.values(), o.lr, o.betas, o.eps, o.weight_decay)
        self.ema = EMA(self.weights, config.ema.decay, config.ema.every)
        self.old = Snapshot(self.weights) if loss.old == "ema" else None
        self.reference: Snapshot | None = None  # None: what the policy was before training
        self.reference_age = self.updates = self.bad_updates = 0
        self.marble: list[float] = []  # weight of each reward's loss
        self.lr_scale = 1.0
        self.real: RealPictures | None = None
        if loss.real is not None:
            if not hasattr(policy, "encode_pixels"):
                raise ConfigError(f"loss.real needs a policy that encodes pictures, and {type(policy).__name__} does not")
            self.real = RealPictures(loss.real, config.sampling.height, config.sampling.width)
        if (note := far_off(loss.use, config.sampling.kind, loss.clip_low, loss.clip_high)) != "":
            warnings.warn(note, stacklevel=2)

    def learn(self, rollouts: Sequence[Rollout], advantages: Advantages, step: int) -> dict[str, float]:
        """`begin`, `accumulate` each rollout, `finish`; the advantages' rows stand in the order of the rollouts."""
        given, done = [], 0
        for rollout in rollouts:
            own = slice(done, done := done + len(rollout.prompts))
            given.append((rollout, rows_of(advantages, own)))
        gate_B = advantages.kl_gate_B
        held = float((gate_B * advantages.weights_B).sum()) if gate_B is not None else None
        total = self.world.total(sum(self.objective.weight(*each) for each in given))
        self.begin(total, step, None if held is None else self.world.total(held))
        for each in given:
            self.accumulate(*each)
        return self.finish()

    @contextlib.contextmanager
    def sampling_weights(self) -> Iterator[None]:
        """Inside, the policy is the one that pictures to learn from are drawn with: the old one, where it has weights of its own."""
        with self.old.worn() if self.old is not None else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the policy is what the KL (and dpo and dgpo) hold it to."""
        with self.policy.reference() if self.reference is None else self.reference.worn():
            yield

    def begin(self, total: float, step: int, held: float | None = None) -> None:
        """Start training step `step` (counted from 0), whose samples will weigh `total` in all (one each, if all are scored).

        Where they come to weigh something else, `finish` divides by what they weighed. `held`: how many of them the KL holds back, where
        a gate chooses.
        """
        self._seen: dict[str, list[tuple[float, float]]] = {}
        self._given: list[tuple[Rollout, Advantages]] = []
        self._weighed, self._more = 0.0, self.config.optim.updates > 1
        old = self.old.worn if self.old is not None else None
        self._beside = Beside(self.as_reference, old, self._more, step, self._log, total, held, {})
        every = self.config.loss.marble_every
        self._weighing = every is not None and (step % every == 0 or not self.marble)
        self._per_reward: list[list[Tensor]] = []
        self._lr = self.config.optim.lr_at(step) * self.lr_scale
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._lr
        self.optimizer.zero_grad(set_to_none=True)

    def accumulate(self, rollout: Rollout, advantages: Advantages) -> None:
        """Add one rollout's share of the gradient; `advantages` has its rows alone."""
        self._weighed += self.objective.weight(rollout, advantages)
        self._given.append((rollout, advantages))
        if self._weighing:
            self._add_apart(rollout, advantages)
        else:
            self._add(rollout, advantages)

    def drop(self) -> None:
        """End the step as if it had not begun: nothing was scored."""
        self.optimizer.zero_grad(set_to_none=True)
        self._given, self._per_reward, self._beside.cache = [], [], {}

    def finish(self) -> dict[str, float]:
        """`optim.updates` optimiser steps over all that was accumulated; the step's numbers. Diverged after too many bad ones in a row.

        `skipped_updates` counts those whose gradient was no number: they change nothing, and end the step.
        """
        real_share = self.config.loss.real_share if self.real is not None else 0.0
        skipped, self._weighed = 0, self.world.total(self._weighed)
        for number in range(self.config.optim.updates):
            if number:
                self._beside.total, self._beside.keep = self._weighed or 1.0, number + 1 < self.config.optim.updates
                for rollout, advantages in self._given:
                    self._add(rollout, advantages)
                self._sum()
            else:
                self._sum()
                if self._weighing:
                    self._weigh()
                if self._weighed not in (0.0, self._beside.total):
                    self._scale(self._beside.total / self._weighed)
            if real_share:
                self._scale(1 - real_share)
                self._add_real(real_share)
            elif self._weighed == 0:
                break  # nothing to learn from: no pair, or nothing kept
            if not self._update():
                skipped = 1
                break
        return self._numbers(skipped)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds of this, by all ranks together: tensors `weights/NAME`, `ema/NAME`, `optim/NAME/KEY`, where there are any
        `old/NAME` and `reference/NAME`, and a JSON mapping."""
        tensors: dict[str, Tensor] = {f"weights/{k}": v for k, v in self.weights.items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.average.items()}
        tensors |= {f"optim/{k}": v for k, v in checkpoint.flatten(self.optimizer, self.weights).items()}
        for name, snapshot in (("old", self.old), ("reference", self.reference)):
            if snapshot is not None:
                tensors |= {f"{name}/{k}": v for k, v in snapshot.held.items()}
        tensors = {k: whole(v) for k, v in tensors.items()}
        about = {"updates": self.updates, "bad_updates": self.bad_updates, "reference_age": self.reference_age}
        return tensors, {**about, "marble": self.marble}

    def load_state(self, saved: checkpoint.Saved) -> None:
        """Put back what `state` gave; CheckpointError for weights of another kind."""
        self.adopt(saved)
        checkpoint.unflatten(self.optimizer, self.weights, saved.under("optim"))
        self.updates, self.bad_updates = saved.meta["updates"], saved.meta.get("bad_updates", 0)
        self.reference_age, self.marble = saved.meta.get("reference_age", 0), list(saved.meta.get("marble", []))

    @torch.no_grad()
    def adopt(self, saved: checkpoint.Saved) -> None:
        """The weights and what goes along with them: their average, the old policy, the reference."""
        weights, average = saved.under("weights"), saved.under("ema")
        if weights.keys() != self.weights.keys():
            raise checkpoint.CheckpointError("the checkpoint trains other weights than policy.lora names: use the run's own config")
        for name, parameter in self.weights.items():
            parameter.copy_(like(weights[name], parameter))
            self.ema.average[name].copy_(like(average[name], parameter))
        if self.old is not None:
            self.old.load(saved.under("old") or weights)  # a checkpoint of another algorithm has none
        self.reference = None
        if reference := saved.under("reference"):
            self.reference = Snapshot(self.weights)
            self.reference.load(reference)

    def _add(self, rollout: Rollout, advantages: Advantages) -> None:
        """The gradient of one rollout, with one loss for all rewards."""
        if self.config.loss.marble_every is not None:
            weights_R = torch.tensor(self.marble, dtype=torch.float64)
            values_B = mixed(per_reward(advantages), weights_R, self.config.loss.largest)
            advantages = dataclasses.replace(advantages, values_B=values_B)
        for share in self.objective.shares(rollout, advantages, self._beside):
            if share.loss is not None:
                share.loss.backward()

    def _add_apart(self, rollout: Rollout, advantages: Advantages) -> None:
        """The gradient of each reward's own loss, kept apart; that of the KL goes where it always goes."""
        own, count = list(self.weights.values()), len(per_reward(advantages))
        if not self._per_reward:
            self._per_reward = [[torch.zeros_like(p) for p in own] for _ in range(count)]
        for share in self.objective.shares(rollout, advantages, self._beside, per_reward=True):
            for k, loss in enumerate(share.rewards):
                last = k == count - 1 and share.loss is None
                found = torch.autograd.grad(loss, own, retain_graph=not last, allow_unused=True)
                for total, gradient in zip(self._per_reward[k], found, strict=True):
                    if gradient is not None:
                        total += gradient
            if share.loss is not None:
                share.loss.backward()

    def _weigh(self) -> None:
        """New weights of the rewards from their gradients, smoothed, and the gradient that they mix."""
        if not self._per_reward:
            return
        self.world.add(gradient for gradients in self._per_reward for gradient in gradients)
        flat_K = [torch.cat([g.flatten() for g in gradients]) for gradients in self._per_reward]
        gram_KK = torch.stack([torch.stack([(a.double() @ b.double()).cpu() for b in flat_K]) for a in flat_K])
        if bool(gram_KK.isfinite().all()):
            found, smooth = simplex_weights(gram_KK, self.config.loss.marble_unit), self.config.loss.marble_smooth
            before = torch.tensor(self.marble, dtype=torch.float64) if self.marble else found
            self.marble = (smooth * before + (1 - smooth) * found).tolist()
        weights = self.marble or [1 / len(flat_K)] * len(flat_K)
        for place, parameter in enumerate(self.weights.values()):
            mix = torch.stack([a * gradients[place] for a, gradients in zip(weights, self._per_reward, strict=True)]).sum(0)
            parameter.grad = mix if parameter.grad is None else parameter.grad + mix
        self._per_reward = []

    def _add_real(self, share: float) -> None:
        """The gradient of real pictures, drawn for this step, with a weight of `share`."""
        assert self.real is not None
        step, loss = self._beside.step, self.config.loss
        pictures = self.world.total(sum(len(rollout.prompts) for rollout, _ in self._given))
        count = max(1, round(share / (1 - share) * (self._weighed or pictures)))
        source = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        images, prompts = self.real.of(torch.randint(len(self.real), (count,), generator=source).tolist())
        x0: Tensor = self.policy.encode_pixels(images)  # type: ignore[attr-defined]
        rollout = self._given[0][0]
        assert isinstance(self.objective, Forward) and loss.real is not None
        for part in self.objective.real(x0, prompts, rollout.guidance, rollout.sigmas, step, self._log):
            (share * part).backward()

    def _sum(self) -> None:
        """Every rank's gradient becomes the sum of all."""
        if self.world.size > 1:
            for parameter in self.weights.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = (p.grad for p in self.weights.values() if p.grad is not None)
            self.world.add(grad for grad in grads if not isinstance(grad, DTensor))  # FSDP has summed its own

    def _scale(self, factor: float) -> None:
        for parameter in self.weights.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _update(self) -> bool:
        """One optimiser step; False, and nothing changes, where the gradient is no number."""
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.optim.max_grad_norm)))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            self.bad_updates += 1
            if self.bad_updates >= self.config.optim.max_bad_updates:
                raise Diverged(
                    f"{self.bad_updates} updates in a row had a gradient that is no number, and were skipped; the weights are as before. "
                    "Usual remedies: policy.dtype=bfloat16 or float32 instead of float16, a lower optim.lr, a lower sampling.guidance, "
                    "a window that leaves out the last steps. Then go on with --resume, or raise optim.max_bad_updates."
                )
            return False
        self.bad_updates = 0
        self._log({"grad_norm": norm}, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.updates)
        self.updates += 1
        return True

    def _numbers(self, skipped: int) -> dict[str, float]:
        """The step's numbers; the old policy and the reference follow where they should."""
        seen: dict[str, list[Sequence[float]]] = {}
        for told in self.world.tell(self._seen):
            for key, pairs in told.items():
                seen.setdefault(key, []).extend(pairs)
        self._given, self._beside.cache = [], {}
        out = {key: sum(v * w for v, w in pairs) / sum(w for _, w in pairs) for key, pairs in seen.items()}
        if "ratio_dev" in seen:
            out["ratio_dev"] = max(value for value, _ in seen["ratio_dev"])
        out |= {f"marble/{name}": weight for name, weight in zip(self._trained(), self.marble, strict=False)}
        kl = self.config.kl
        if self.old is not None:
            self.old.mix(old_decay(self.config.loss.old_decay, self.updates))
        if kl.reference == "adaptive":
            self.reference_age += 1
            moved = out.get("kl_held", out.get("kl", 0.0))
            far = kl.reset_above is not None and moved > kl.reset_above
            if far or (kl.reset_every is not None and self.reference_age >= kl.reset_every):
                self.reference, self.reference_age = Snapshot(self.weights), 0
            out["reference_age"] = float(self.reference_age)
        return {**out, "skipped_updates": float(skipped), "lr": self._lr}

    def _trained(self) -> list[str]:
        return [name for name, reward in self.config.rewards.items() if reward.weight > 0]

    def _log(self, numbers: Mapping[str, float], weight: float) -> None:
        for key, value in numbers.items():
            self._seen.setdefault(key, []).append((value, max(weight, 1e-9)))


def per_reward(advantages: Advantages) -> Tensor:
    """(R, B); ValueError where the rewards' own advantages are missing."""
    if advantages.per_reward_RB is None:
        raise ValueError(
            "loss.marble_every mixes the rewards' own advantages, and these have none: a rule that adds z-scores gives them"
        )
    return advantages.per_reward_RB


def rows_of(advantages: Advantages, rows: slice) -> Advantages:
    """The advantages of some samples; whatever else is per sample (`_B`, `_RB`) along with them."""
    parts = {f.name: getattr(advantages, f.name) for f in dataclasses.fields(advantages)}
    own: dict[str, Any] = {k: v[..., rows] for k, v in parts.items() if k.endswith("B") and isinstance(v, Tensor)}
    return dataclasses.replace(advantages, **own)
