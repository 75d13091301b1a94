"""From rewrites and their advantages to an optimiser step of the rewriter. Nothing here knows of pictures or services."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.advantages.common import Advantages
from trainer.language.config import LanguageConfig
from trainer.language.types import Completions, LanguagePolicy
from trainer.learning import Diverged
from trainer.losses.tokens import importance, step_normaliser, token_loss
from trainer.policies.ema import EMA


class TokenLearner:
    """AdamW over a rewriter's trained weights, their average where there is one, and the token loss."""

    def __init__(self, policy: LanguagePolicy, config: LanguageConfig) -> None:
        self.policy, self.config, o = policy, config, config.optim
        self.weights = policy.trainable()
        self.optimizer = torch.optim.AdamW(self.weights.values(), o.lr, o.betas, o.eps, o.weight_decay)
        self.ema = EMA(self.weights, config.ema.decay, config.ema.every) if config.ema is not None else None
        self.updates = self.bad_updates = 0

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the policy holds the average, where there is one."""
        with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
            yield

    def learn(
        self, completions: Completions, advantages: Advantages, step: int, *, lr_scale: float = 1.0, foreign: bool = False
    ) -> dict[str, float]:
        """`optim.updates` optimiser steps over the rewrites that count, and the step's numbers.

        Where a `foreign` engine drew them, the policy's own log-probabilities are computed first, and what it would not have drawn counts
        less. Diverged after too many gradients in a row that are no number.
        """
        c, out = self.config, dict[str, float]()
        kept = chosen(completions, torch.nonzero(advantages.weights_B).flatten())
        lr = c.optim.lr_at(step) * lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not len(kept):
            return {"lr": lr, "skipped_updates": 0.0}
        values_B = advantages.values_B[advantages.weights_B.bool()]
        rows = [slice(n, n + c.micro_batch) for n in range(0, len(kept), c.micro_batch)]
        parts = [kept.rows(one) for one in rows]
        total = step_normaliser(
            c.loss.use, rows=len(kept), tokens=int(kept.mask_BT.sum()), batches=len(parts), longest=c.max_new_tokens
        )
        asked = foreign or c.optim.updates > 1
        old = [self._logp(part) for part in parts] if asked else None
        reference: list[Tensor] | None = None
        if c.kl.weight > 0:
            with self.policy.reference():
                reference = [self._logp(part) for part in parts]
        seen: list[tuple[dict[str, float], float]] = []
        skipped = 0.0
        for _ in range(c.optim.updates):
            seen = []
            for n, part in enumerate(parts):
                seen.append(
                    self._add(part, values_B[rows[n]], total, old[n] if old else None, reference[n] if reference else None, foreign)
                )
            norm = self._update()
            if not math.isfinite(norm):
                skipped = 1.0
                break
            out["grad_norm"] = norm
        weight = sum(w for _, w in seen) or 1.0
        for key in dict.fromkeys(key for numbers, _ in seen for key in numbers):
            told = [(numbers[key], w) for numbers, w in seen if key in numbers]
            out[key] = max(v for v, _ in told) if key.endswith("dev") else sum(v * w for v, w in told) / sum(w for _, w in told)
        return {**out, "tokens": weight, "lr": lr, "skipped_updates": skipped}

    def _add(
        self, part: Completions, values_B: Tensor, total: float, old: Tensor | None, reference: Tensor | None, foreign: bool
    ) -> tuple[dict[str, float], float]:
        """The gradient of one micro-batch's share; its numbers, and how many tokens they are of."""
        c, device = self.config, self.policy.device
        new_BT, entropy_BT = self.policy.logp(part)
        mask_BT, drawn_BT = part.mask_BT.to(device), part.logp_BT.to(device)
        old_BT = new_BT.detach() if old is None else old
        share = None
        if foreign and c.loss.correction != "off":
            share = importance(old_BT, drawn_BT, mask_BT, mode=c.loss.correction, high=c.loss.correction_high)
        loss = token_loss(
            new_BT,
            old_BT,
            mask_BT,
            values_B.to(device),
            use=c.loss.use,
            clip_low=c.loss.clip_low,
            clip_high=c.loss.clip_high,
            normaliser=total,
            beta=c.kl.weight,
            ref_BT=reference,
            is_ratio_BT=share,
            level=c.loss.level,
            delta=c.loss.delta,
        )
        loss.value.backward()  # type: ignore[no-untyped-call]
        tokens = float(mask_BT.sum())
        apart_BT = torch.where(mask_BT, (old_BT - drawn_BT).abs(), 0.0)
        more = {"entropy": float(entropy_BT.detach().sum()) / tokens, "engine_gap": float(apart_BT.sum()) / tokens}
        numbers = {key: value for key, value in loss.diagnostics.items() if key != "tokens"}
        return {**numbers, **more, "engine_dev": float(apart_BT.max())}, tokens

    @torch.no_grad()
    def _logp(self, part: Completions) -> Tensor:
        return self.policy.logp(part)[0].detach()

    def _update(self) -> float:
        """One optimiser step; the norm of the gradient, and where that is no number nothing changes."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), self.config.optim.max_grad_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            self.bad_updates += 1
            if self.bad_updates >= self.config.optim.max_bad_updates:
                raise Diverged(
                    f"{self.bad_updates} updates of the rewriter in a row had a gradient that is no number, and were skipped; the weights are "
                    "as before. Usual remedies: language.policy.dtype=float32, a lower language.optim.lr, language.kl.weight=0.02. Then go on "
                    "with --resume, or raise language.optim.max_bad_updates."
                )
            return norm
        self.bad_updates = 0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.updates)
        self.updates += 1
        return norm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors `weights/NAME`, `ema/NAME`, `optim/NAME/KEY`, and a JSON mapping."""
        tensors: dict[str, Tensor] = {f"weights/{k}": v for k, v in self.weights.items()}
        if self.ema is not None:
            tensors |= {f"ema/{k}": v for k, v in self.ema.average.items()}
        tensors |= {f"optim/{k}": v for k, v in checkpoint.flatten(self.optimizer, self.weights).items()}
        return tensors, {"updates": self.updates, "bad_updates": self.bad_updates, "fingerprint": self.policy.fingerprint()}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put back what `state` gave; CheckpointError for another model."""
        self.adopt(tensors, values)
        checkpoint.unflatten(self.optimizer, self.weights, checkpoint.Saved(tensors, values).under("optim"))
        self.updates, self.bad_updates = values["updates"], values["bad_updates"]

    @torch.no_grad()
    def adopt(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The weights and their average alone."""
        if values["fingerprint"] != self.policy.fingerprint():
            raise checkpoint.CheckpointError(
                f"the checkpoint's rewriter was trained on another model: its base weights are {values['fingerprint'][:12]}, those of "
                f"language.policy.path are {self.policy.fingerprint()[:12]}. Point it at the model it belongs to, or take another --run-dir."
            )
        saved = checkpoint.Saved(tensors, values)
        weights, average = saved.under("weights"), saved.under("ema")
        checkpoint.check_shapes(self.weights, weights)
        for name, parameter in self.weights.items():
            parameter.copy_(weights[name].to(parameter.device))
            if self.ema is not None:
                self.ema.average[name].copy_(average.get(name, weights[name]).to(parameter.device))


def chosen(completions: Completions, rows: Tensor) -> Completions:
    """Some of them, by number."""
    told = rows.tolist()
    return dataclasses.replace(
        completions,
        prompts=tuple(completions.prompts[n] for n in told),
        prompt_ids=tuple(completions.prompt_ids[n] for n in told),
        texts=tuple(completions.texts[n] for n in told),
        ids_BT=completions.ids_BT[rows],
        mask_BT=completions.mask_BT[rows],
        logp_BT=completions.logp_BT[rows],
        ended_B=completions.ended_B[rows],
    )
