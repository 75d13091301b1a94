"""From judged pictures to an optimiser step: `begin`, `accumulate` a rollout as soon as its rewards are there, `finish`.

Gradients add up in the order in which rollouts come; the weights change in `finish` alone. Nothing here knows of services.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.advantages.group_relative import Advantages
from trainer.config import RunConfig
from trainer.policies.ema import EMA
from trainer.registry import resolve
from trainer.sampling.rollout import replay
from trainer.types import ImagePolicy, Rollout


class Learner:
    """The optimiser, the average and the loss over a policy's trained weights."""

    def __init__(self, policy: ImagePolicy, config: RunConfig) -> None:
        self.policy, self.config = policy, config
        self.loss_of = resolve("loss", config.loss.use)
        self.kl_of = resolve("regularizer", config.kl.use)
        self.weights = policy.trainable()
        o = config.optim
        self.optimizer = torch.optim.AdamW(self.weights.values(), o.lr, o.betas, o.eps, o.weight_decay)
        self.ema = EMA(self.weights, config.ema.decay, config.ema.every)
        self.updates = 0
        self.lr_scale = 1.0  # below 1 after a rollback

    def learn(self, rollouts: Sequence[Rollout], advantages: Advantages, step: int) -> dict[str, float]:
        """`begin`, `accumulate` each rollout, `finish`; the advantages' rows stand in the order of the rollouts."""
        self.begin(float(advantages.weights_B.sum()), step)
        done = 0
        for rollout in rollouts:
            own = slice(done, done := done + len(rollout.prompts))
            self.accumulate(rollout, rows_of(advantages, own))
        return self.finish()

    @contextlib.contextmanager
    def sampling_weights(self) -> Iterator[None]:
        """Inside, the policy is the one that pictures to learn from are drawn with."""
        yield

    def begin(self, total: float, step: int) -> None:
        """Start training step `step` (counted from 0), whose samples will weigh `total` in all (one each, if all are scored).

        Where they come to weigh something else, `finish` divides by what they weighed.
        """
        self._total, self._weighed = total, 0.0
        self._seen: dict[str, list[tuple[float, float]]] = {}
        self._reference: dict[tuple[int, int, int], Tensor] = {}  # it does not change between updates
        self._given: list[tuple[Rollout, Advantages]] = []
        self._lr = self.config.optim.lr_at(step) * self.lr_scale
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._lr
        self.optimizer.zero_grad(set_to_none=True)

    def accumulate(self, rollout: Rollout, advantages: Advantages) -> None:
        """Add one rollout's share of the gradient; `advantages` has its rows alone."""
        self._weighed += float(advantages.weights_B.sum())
        self._given.append((rollout, advantages))
        self._add(rollout, advantages, self._total)

    def finish(self) -> dict[str, float]:
        """`optim.updates` optimiser steps over all that was accumulated; the step's numbers."""
        for number in range(self.config.optim.updates):
            if number:
                for rollout, advantages in self._given:
                    self._add(rollout, advantages, self._weighed)
            elif self._weighed not in (0.0, self._total):
                for parameter in self.weights.values():
                    if parameter.grad is not None:
                        parameter.grad.mul_(self._total / self._weighed)
            self._update()
        seen, self._given = self._seen, []
        out = {key: sum(v * w for v, w in pairs) / sum(w for _, w in pairs) for key, pairs in seen.items()}
        if "ratio_dev" in seen:
            out["ratio_dev"] = max(value for value, _ in seen["ratio_dev"])
        return {**out, "lr": self._lr}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint holds of this: tensors `weights/NAME`, `ema/NAME`, `optim/NAME/KEY`, and a JSON mapping."""
        tensors: dict[str, Tensor] = {f"weights/{k}": v for k, v in self.weights.items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.average.items()}
        tensors |= {f"optim/{k}": v for k, v in checkpoint.flatten(self.optimizer, self.weights).items()}
        return tensors, {"updates": self.updates}

    def load_state(self, saved: checkpoint.Saved) -> None:
        """Put back what `state` gave; CheckpointError for weights of another kind."""
        self.adopt(saved)
        checkpoint.unflatten(self.optimizer, self.weights, saved.under("optim"))
        self.updates = saved.meta["updates"]

    @torch.no_grad()
    def adopt(self, saved: checkpoint.Saved) -> None:
        """The weights and their average alone."""
        weights, average = saved.under("weights"), saved.under("ema")
        if weights.keys() != self.weights.keys():
            raise checkpoint.CheckpointError("the checkpoint trains other weights than policy.lora names: use the run's own config")
        for name, parameter in self.weights.items():
            parameter.copy_(weights[name])
            self.ema.average[name].copy_(average[name])

    def _add(self, rollout: Rollout, advantages: Advantages, total: float) -> None:
        for column in range(rollout.window.length):
            for rows in self._micro_batches(len(rollout.prompts)):
                self._loss(rollout, column, rows, rows_of(advantages, rows), total * rollout.window.length).backward()

    def _update(self) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.optim.max_grad_norm)
        self._seen.setdefault("grad_norm", []).append((float(norm), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.updates)
        self.updates += 1

    def _loss(self, rollout: Rollout, column: int, rows: slice, advantages: Advantages, total: float) -> Tensor:
        """The share of one micro-batch at one step of the window in the mean over all scored samples and steps."""
        c, device = self.config, self.policy.device
        advantages_B, weights_B = advantages.values_B.to(device), advantages.weights_B.to(device)
        now, v = replay(self.policy, rollout, column, rows)
        i = rollout.window.start + column
        old = rollout.logp_old_BT[rows, column]
        clip = (c.loss.clip_low, c.loss.clip_high)
        if c.loss.use == "guard":
            root_dt = math.sqrt(float(rollout.sigmas[i] - rollout.sigmas[i + 1]))
            means = now.mean, rollout.mean_old_BT[rows, column]
            policy_loss = self.loss_of(now.logp_B, old, *means, float(now.diffusion_B[0]), root_dt, advantages_B, *clip)
        else:
            policy_loss = self.loss_of(now.logp_B, old, advantages_B, *clip)
        loss_B = policy_loss.values_B
        logged = {**policy_loss.diagnostics, "loss": float((loss_B.detach() * weights_B).sum() / weights_B.sum().clamp(min=1))}
        if c.kl.weight > 0:
            key = rollout.group, column, rows.start
            if key not in self._reference:
                with torch.no_grad(), self.policy.reference():
                    before, v_before = replay(self.policy, rollout, column, rows)
                self._reference[key] = v_before if c.kl.use == "v_kl" else before.mean
            if c.kl.use == "v_kl":
                kl_B = self.kl_of(v, self._reference[key])
            else:
                kl_B = self.kl_of(now.mean, self._reference[key], now.diffusion_B)
            loss_B = loss_B + c.kl.weight * kl_B
            logged["kl"] = float((kl_B.detach() * weights_B).sum() / weights_B.sum().clamp(min=1))
        self._log(logged, float(weights_B.sum()))
        return (loss_B * weights_B).sum() / total

    def _log(self, numbers: Mapping[str, float], weight: float) -> None:
        for key, value in numbers.items():
            self._seen.setdefault(key, []).append((value, max(weight, 1e-9)))

    def _micro_batches(self, size: int) -> Iterator[slice]:
        for start in range(0, size, self.config.sampling.micro_batch):
            yield slice(start, min(start + self.config.sampling.micro_batch, size))


def rows_of(advantages: Advantages, rows: slice) -> Advantages:
    """The advantages of some samples; whatever else is per sample (`_B`, `_RB`) along with them."""
    parts = {f.name: getattr(advantages, f.name) for f in dataclasses.fields(advantages)}
    own: dict[str, Any] = {k: v[..., rows] for k, v in parts.items() if k.endswith("B") and isinstance(v, Tensor)}
    return dataclasses.replace(advantages, **own)
