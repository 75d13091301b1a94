"""What is differentiated: the steps of a window (`Trajectory`), or clean pictures noised again (`Forward`).

Both cut a rollout into micro-batches and give each one's share of the step's mean, on which `backward` is called. Masked samples count
nowhere, and the size of a micro-batch changes nothing but memory.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.advantages.common import Advantages
from trainer.config import FORWARD, RunConfig
from trainer.losses.awm import weighted
from trainer.losses.common import Loss, velocity_error
from trainer.losses.rft import kept
from trainer.registry import resolve
from trainer.sampling.rollout import replay
from trainer.types import Condition, ImagePolicy, Rollout

Log = Callable[[Mapping[str, float], float], None]
Key = tuple[object, ...]


@dataclass(frozen=True)
class Share:
    """One micro-batch: its part of the step's loss; where each reward is asked for, `rewards` are theirs and `loss` is the rest."""

    loss: Tensor | None
    rewards: tuple[Tensor, ...] = ()


@dataclass
class Beside:
    """The policies beside the trained one, and what of theirs is worth keeping: they do not change between the updates of a step."""

    reference: Callable[[], AbstractContextManager[None]]
    old: Callable[[], AbstractContextManager[None]] | None  # None: what the policy is when the step begins
    keep: bool  # there will be another update
    step: int
    log: Log
    total: float  # samples that count
    held: float | None  # of these, whom the KL holds back; None is all
    cache: dict[Key, Tensor]

    def cached(self, key: Key, value: Callable[[], Tensor]) -> Tensor:
        """`value()`, computed once."""
        if key in self.cache:
            return self.cache[key]
        out = value()
        if self.keep:
            self.cache[key] = out
        return out


class Objective:
    """`weight` of a rollout, and the `shares` of its micro-batches."""

    def __init__(self, policy: ImagePolicy, config: RunConfig) -> None:
        self.policy, self.config = policy, config
        self.loss_of = resolve("forward_loss" if config.loss.use in FORWARD else "loss", config.loss.use)
        self.kl_of = resolve("regularizer", config.kl.use)
        clip = config.clip_range()
        self.clip = {"clip_low": clip[0], "clip_high": clip[1]} if clip is not None else {}

    def weight(self, rollout: Rollout, advantages: Advantages) -> float:
        """How much of what is averaged over is in a rollout."""
        return float(advantages.weights_B.sum())

    def shares(self, rollout: Rollout, advantages: Advantages, beside: Beside, per_reward: bool = False) -> Iterator[Share]:
        raise NotImplementedError

    def _held(self, kl_B: Tensor, gate_B: Tensor | None, weights_B: Tensor, beside: Beside) -> tuple[Tensor, dict[str, float]]:
        """The KL's addition to the loss (B,), whose mean over all that count is the mean over those it holds back; and its numbers."""
        logged = {"kl": float((kl_B.detach() * weights_B).sum() / weights_B.sum().clamp(min=1))}
        if gate_B is None:
            return self.config.kl.weight * kl_B, logged
        gate_B = gate_B.to(kl_B)
        held = float((gate_B * weights_B).sum())
        if held:
            beside.log({"kl_held": float((kl_B.detach() * gate_B * weights_B).sum() / held)}, held)
        scale = beside.total / beside.held if beside.held else 1.0
        return self.config.kl.weight * scale * gate_B * kl_B, logged


class Trajectory(Objective):
    """grpo and guard: log-probabilities of the window's steps."""

    def shares(self, rollout: Rollout, advantages: Advantages, beside: Beside, per_reward: bool = False) -> Iterator[Share]:
        size, c = len(rollout.prompts), self.config
        total = beside.total * rollout.window.length
        for column in range(rollout.window.length):
            for start in range(0, size, c.sampling.micro_batch):
                rows = slice(start, min(start + c.sampling.micro_batch, size))
                yield Share(self._loss(rollout, column, rows, advantages, total, beside))

    def _loss(self, rollout: Rollout, column: int, rows: slice, advantages: Advantages, total: float, beside: Beside) -> Tensor:
        """The share of one micro-batch at one step of the window in the mean over all scored samples and steps."""
        c, device = self.config, self.policy.device
        advantages_B, weights_B = advantages.values_B[rows].to(device), advantages.weights_B[rows].to(device)
        reference: Tensor | None = None
        if c.kl.weight > 0:  # before the policy's own pass: weights in parts must not change between it and its backward pass

            def before() -> Tensor:
                with torch.no_grad(), beside.reference():
                    step, velocity = replay(self.policy, rollout, column, rows)
                return velocity if c.kl.use == "v_kl" else step.mean

            reference = beside.cached(("reference", rollout.group, column, rows.start), before)
        now, v = replay(self.policy, rollout, column, rows)
        i = rollout.window.start + column
        old = rollout.logp_old_BT[rows, column]
        if c.loss.use == "guard":
            root_dt = math.sqrt(float(rollout.sigmas[i] - rollout.sigmas[i + 1]))
            means = now.mean, rollout.mean_old_BT[rows, column]
            policy_loss = self.loss_of(now.logp_B, old, *means, float(now.diffusion_B[0]), root_dt, advantages_B, **self.clip)
        else:
            policy_loss = self.loss_of(now.logp_B, old, advantages_B, **self.clip)
        loss_B = policy_loss.values_B
        logged = {**policy_loss.diagnostics, "loss": float((loss_B.detach() * weights_B).sum() / weights_B.sum().clamp(min=1))}
        if reference is not None:
            if c.kl.use == "v_kl":
                kl_B = self.kl_of(v, reference)
            else:
                kl_B = self.kl_of(now.mean, reference, now.diffusion_B)
            gate_B = advantages.kl_gate_B[rows].to(device) if advantages.kl_gate_B is not None else None
            held_B, numbers = self._held(kl_B, gate_B, weights_B, beside)
            loss_B, logged = loss_B + held_B, logged | numbers
        beside.log(logged, float(weights_B.sum()))
        return (loss_B * weights_B).sum() / total


@dataclass(frozen=True)
class Noised:
    """Some rows of a rollout at one drawn time each."""

    x0: Tensor
    noise: Tensor
    t_B: Tensor
    x: Tensor
    condition: Condition
    guidance: float


class Forward(Objective):
    """nft, awm, dgpo, crd, dpo and rft: velocities at clean pictures noised again, `loss.times` times each.

    Noise and times are functions of (seed, step, row), or of (seed, step, group) where a group shares them.
    """

    def __init__(self, policy: ImagePolicy, config: RunConfig) -> None:
        super().__init__(policy, config)
        use, loss = config.loss.use, config.loss
        self.whole_groups = use in ("dgpo", "crd")
        self.shared = loss.shared_noise if loss.shared_noise is not None else use in ("dgpo", "crd", "dpo")
        self.options: dict[str, float] = dict(self.clip)
        if loss.beta is not None:
            self.options["beta"] = loss.beta
        if use in ("nft", "crd"):
            self.options["largest"] = loss.largest

    def weight(self, rollout: Rollout, advantages: Advantages) -> float:
        if self.config.loss.use == "dpo":
            return float(len(self._pairs(advantages)[0]))
        if self.config.loss.use == "rft":
            return float(self._kept(advantages).sum())
        return super().weight(rollout, advantages)

    def shares(self, rollout: Rollout, advantages: Advantages, beside: Beside, per_reward: bool = False) -> Iterator[Share]:
        for rows in self._micro_batches(advantages):
            for number in range(self.config.loss.times):
                if self.whole_groups and len(rows) > self.config.sampling.micro_batch:
                    yield from self._in_parts(rollout, advantages, rows, number, beside)
                else:
                    yield self._share(rollout, advantages, rows, number, beside, per_reward)

    def real(self, x0: Tensor, prompts: Sequence[str], guidance: float, sigmas: Tensor, step: int, log: Log) -> Iterator[Tensor]:
        """The shares of real pictures (B, C, H, W) in their own mean, flow matching alone."""
        times, size, sigmas = self.config.loss.times, self.config.sampling.micro_batch, sigmas.cpu()
        for start in range(0, len(x0), size):
            rows = range(start, min(start + size, len(x0)))
            condition = self.policy.encode([prompts[row] for row in rows])
            for number in range(times):
                drawn = [self.draw(("real", row), number, step, sigmas, x0.shape[1:]) for row in rows]
                at = self._noised(x0[rows.start : rows.stop], drawn, condition, guidance)
                error_B = velocity_error(self._velocity(at), at.x0, at.noise)
                log({"real_error": float(error_B.detach().mean())}, len(rows))
                yield error_B.sum() / (len(x0) * times)

    def draw(self, key: Key, number: int, step: int, sigmas: Tensor, shape: Sequence[int]) -> tuple[float, Tensor]:
        """Time and noise of a row (or group): a function of (run seed, step, key, number)."""
        about = f"{self.config.seed}/{step}/{'/'.join(map(str, key))}"
        if self.config.loss.time_from == "schedule":
            known = sigmas[: max(1, int(0.99 * (len(sigmas) - 1)))]
            t = float(known[torch.randperm(len(known), generator=_generator(f"times/{about}"))[number]])
        else:
            inside = float(torch.rand((), generator=_generator(f"time/{about}/{number}")))
            t = max((number + inside) / self.config.loss.times, 1e-3)
        return t, torch.randn(tuple(shape), generator=_generator(f"noise/{about}/{number}"))

    def _micro_batches(self, advantages: Advantages) -> Iterator[Tensor]:
        """Rows that count, as many as fit; whole groups or pairs where the loss needs them."""
        size, most = self.config.group.size, self.config.sampling.micro_batch
        use = self.config.loss.use
        if use == "dpo":
            chosen, rejected = self._pairs(advantages)
            for start in range(0, len(chosen), max(1, most // 2)):
                part = slice(start, start + max(1, most // 2))
                yield torch.cat([chosen[part], rejected[part]])
            return
        counts = self._kept(advantages) if use == "rft" else advantages.weights_B
        unit = max(1, most // size) * size if self.whole_groups else len(counts)
        for start in range(0, len(counts), unit):
            rows = start + counts[start : start + unit].nonzero()[:, 0]
            yield from (rows.split(len(rows) if self.whole_groups else most) if len(rows) else ())

    def _share(
        self, rollout: Rollout, advantages: Advantages, rows: Tensor, number: int, beside: Beside, per_reward: bool
    ) -> Share:
        at = self._at(rollout, rows, number, beside.step)
        key = rollout.group, int(rows[0]), number
        references = self._references(at, key, beside)
        v = self._velocity(at)
        total = beside.total * self.config.loss.times
        values_B = advantages.values_B[rows].to(v)
        group_B = (rows // self.config.group.size).to(v.device)
        loss = self._loss(v, at, values_B, group_B, references, key, beside)
        kl_B, logged = self._kl(v, references, advantages, rows, beside)
        beside.log({**loss.diagnostics, "loss": float(loss.values_B.detach().mean()), **logged}, len(rows))
        if not per_reward:
            own = loss.values_B.sum() + (self._per_unit(kl_B).sum() if kl_B is not None else 0.0)
            return Share(own / total)
        assert advantages.per_reward_RB is not None
        mine = advantages.per_reward_RB[:, rows].to(v)
        losses = [self._loss(v, at, row, group_B, references, key, beside).values_B.sum() / total for row in mine]
        return Share(kl_B.sum() / total if kl_B is not None else None, tuple(losses))

    def _in_parts(self, rollout: Rollout, advantages: Advantages, rows: Tensor, number: int, beside: Beside) -> Iterator[Share]:
        """A group that does not fit into a pass: all errors first, then each part's gradient through what its error is worth."""
        most, total = self.config.sampling.micro_batch, beside.total * self.config.loss.times
        key = rollout.group, int(rows[0]), number
        errors, others = [], []
        for part in rows.split(most):
            at = self._at(rollout, part, number, beside.step)
            with torch.no_grad():
                v = self._velocity(at)
                errors.append(velocity_error(v, at.x0, at.noise))
                references = self._references(at, (*key, int(part[0])), beside)
                others.append(self._other_error(v, at, references, (*key, int(part[0])), beside))
        error_B = torch.cat(errors).requires_grad_()
        values_B = advantages.values_B[rows].to(error_B)
        group_B = (rows // self.config.group.size).to(error_B.device)
        loss = self.loss_of(error_B, torch.cat(others), values_B, group_B, **self.options)
        (worth_B,) = torch.autograd.grad(loss.values_B.sum(), error_B)
        beside.log({**loss.diagnostics, "loss": float(loss.values_B.detach().mean())}, len(rows))
        for part, worth in zip(rows.split(most), worth_B.split(most), strict=True):
            at = self._at(rollout, part, number, beside.step)
            references = self._references(at, (*key, int(part[0])), beside) if self.config.kl.weight else None
            v = self._velocity(at)
            own = (worth * velocity_error(v, at.x0, at.noise)).sum()
            kl_B, logged = self._kl(v, references, advantages, part, beside)
            beside.log(logged, len(part))
            yield Share((own + (kl_B.sum() if kl_B is not None else 0.0)) / total)

    def _loss(
        self, v: Tensor, at: Noised, values_B: Tensor, group_B: Tensor, references: Tensor | None, key: Key, beside: Beside
    ) -> Loss:
        """The loss of one micro-batch, (B,), or (P,) of pairs."""
        use, out = self.config.loss.use, None
        if use == "nft":
            v_old = self._old(v, at, key, beside)
            out = self.loss_of(v, v_old, at.x0, at.noise, at.t_B, values_B, **self.options)
        elif use == "rft":
            out = self.loss_of(velocity_error(v, at.x0, at.noise))
        else:
            error_B, other_B = velocity_error(v, at.x0, at.noise), self._other_error(v, at, references, key, beside)
            if use == "awm":
                error_B, other_B = (weighted(e, at.t_B, self.config.loss.time_weight) for e in (error_B, other_B))
                out = self.loss_of(error_B, other_B, values_B, **self.options)
            elif use == "dpo":
                out = self.loss_of(*error_B.chunk(2), *other_B.chunk(2), **self.options)
            else:
                out = self.loss_of(error_B, other_B, values_B, group_B, **self.options)
        assert isinstance(out, Loss)
        return out

    def _other_error(self, v: Tensor, at: Noised, references: Tensor | None, key: Key, beside: Beside) -> Tensor:
        """(B,) the error of whom the policy is compared with: the reference for dgpo and dpo, the old policy for awm and crd."""
        if self.config.loss.use in ("dgpo", "dpo"):
            assert references is not None
            return velocity_error(references, at.x0, at.noise)
        return velocity_error(self._old(v, at, key, beside), at.x0, at.noise)

    def _references(self, at: Noised, key: Key, beside: Beside) -> Tensor | None:
        """The reference's velocity, where anything asks for it."""
        if self.config.kl.weight == 0 and self.config.loss.use not in ("dgpo", "dpo"):
            return None
        return beside.cached(("reference", *key), lambda: self._without_grad(at, beside.reference))

    def _old(self, v: Tensor, at: Noised, key: Key, beside: Beside) -> Tensor:
        """The old policy's velocity. Without weights of its own it is what the policy is before the step's first update."""
        old = beside.old
        return beside.cached(("old", *key), v.detach if old is None else lambda: self._without_grad(at, old))

    def _without_grad(self, at: Noised, worn: Callable[[], AbstractContextManager[None]]) -> Tensor:
        with torch.no_grad(), worn():
            return self._velocity(at)

    def _kl(
        self, v: Tensor, references: Tensor | None, advantages: Advantages, rows: Tensor, beside: Beside
    ) -> tuple[Tensor | None, dict[str, float]]:
        if self.config.kl.weight == 0:
            return None, {}
        gate_B = advantages.kl_gate_B[rows] if advantages.kl_gate_B is not None else None
        return self._held(self.kl_of(v, references), gate_B, torch.ones(len(rows), device=v.device), beside)

    def _per_unit(self, kl_B: Tensor) -> Tensor:
        """A pair counts once, with the mean of both."""
        return kl_B / 2 if self.config.loss.use == "dpo" else kl_B

    def _at(self, rollout: Rollout, rows: Tensor, number: int, step: int) -> Noised:
        size = self.config.group.size
        x0 = rollout.latents_BCHW[rows.to(rollout.latents_BCHW.device)]
        places = [rollout.group * size + int(row) for row in rows]
        keys: list[Key] = [("group", place // size) if self.shared else ("row", place) for place in places]
        sigmas = rollout.sigmas.cpu()
        drawn = [self.draw(key, number, step, sigmas, x0.shape[1:]) for key in keys]
        return self._noised(x0, drawn, rollout.condition[rows.to(x0.device)], rollout.guidance)

    def _noised(self, x0: Tensor, drawn: Sequence[tuple[float, Tensor]], condition: Condition, guidance: float) -> Noised:
        t_B = torch.tensor([t for t, _ in drawn], device=x0.device)
        noise = torch.stack([noise for _, noise in drawn]).to(x0)
        t = t_B.view(-1, *(1,) * (x0.ndim - 1))
        return Noised(x0, noise, t_B, (1 - t) * x0 + t * noise, condition, guidance)

    def _velocity(self, at: Noised) -> Tensor:
        return self.policy.velocity(at.x, at.t_B, at.condition, at.guidance)

    def _pairs(self, advantages: Advantages) -> tuple[Tensor, Tensor]:
        """Rows of the best and of the worst scored member of each group that has two different ones."""
        chosen, rejected, size = [], [], self.config.group.size
        for start in range(0, len(advantages.values_B), size):
            rows = start + advantages.weights_B[start : start + size].nonzero()[:, 0]
            values = advantages.values_B[rows]
            if len(rows) and bool(values.max() > values.min()):
                chosen.append(int(rows[values.argmax()]))
                rejected.append(int(rows[values.argmin()]))
        return torch.tensor(chosen, dtype=torch.long), torch.tensor(rejected, dtype=torch.long)

    def _kept(self, advantages: Advantages) -> Tensor:
        loss, own = self.config.loss, advantages
        return kept(own.values_B, own.weights_B, self.config.group.size, loss.keep, loss.keep_above)


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(f"learn/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
