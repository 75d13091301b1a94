"""Pictures painted step by step, so that one can look at what they will be, and stop.

A preview costs no pass of its own: it is x0 = x - sigma v at the step that was just taken, decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import EvalConfig, SamplingConfig
from trainer.rewrite.budget import Ledger
from trainer.sampling.rollout import velocity_of
from trainer.sampling.sampler import geometry, probe
from trainer.sampling.solvers import Euler
from trainer.types import Condition, guidance_at


@dataclass(frozen=True)
class Canvas:
    """B pictures after `done` steps: where they stand, and what they would be if the flow went straight on. Latents (B, C, H, W)."""

    x_BCHW: Tensor
    guess_BCHW: Tensor
    condition: Condition
    done: int = 0

    def __len__(self) -> int:
        return len(self.x_BCHW)

    def keep(self, rows: Sequence[int]) -> "Canvas":
        """Some of them."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.x_BCHW.device)
        return Canvas(self.x_BCHW[index], self.guess_BCHW[index], self.condition[index], self.done)


class Painter:
    """A policy and how its pictures are drawn: the steps, size and guidance of a recipe's evaluations, by Euler steps."""

    def __init__(self, policy: Any, sampling: SamplingConfig, evaluation: EvalConfig, ledger: Ledger) -> None:
        """ConfigError where policy and sizes do not fit."""
        self.policy, self.ledger = policy, ledger
        e = evaluation
        self.guidance, self.guided, self.micro_batch = e.guidance, e.guided_steps, sampling.micro_batch or 16
        self.shape, self.sigmas = geometry(policy, "eval", e.steps, e.height or sampling.height, e.width or sampling.width)
        probe(policy, self.shape, self.sigmas, self.guidance)
        twice = bool(getattr(policy, "two_passes", True))
        self.passes_T = tuple(2 if twice and guidance_at(self.guidance, self.guided, i) != 1.0 else 1 for i in range(e.steps))

    @torch.no_grad()
    def begin(self, prompts: Sequence[str], seeds: Sequence[int]) -> Canvas:
        """Noise, one picture for each prompt; row b from seeds[b] alone, as `sample` draws it."""
        noise = [torch.randn((1, *self.shape), generator=torch.Generator().manual_seed(seed))[0] for seed in seeds]
        x_BCHW = torch.stack(noise).to(self.policy.device)
        return Canvas(x_BCHW, x_BCHW, self.policy.encode(list(prompts)))

    @torch.no_grad()
    def advance(self, canvas: Canvas, until: int) -> Canvas:
        """Painted up to `until` steps; each pass is counted before it is done."""
        walk, x_BCHW = Euler(self.sigmas), canvas.x_BCHW
        guess_BCHW = canvas.guess_BCHW
        for i in range(canvas.done, until):
            guidance, rows_x, rows_guess = guidance_at(self.guidance, self.guided, i), [], []
            for start in range(0, len(canvas), self.micro_batch):
                rows = slice(start, start + self.micro_batch)
                part = x_BCHW[rows]
                self.ledger.spend(passes=len(part) * self.passes_T[i])
                v = velocity_of(self.policy, part, self.sigmas[i], canvas.condition[rows], guidance)
                rows_x.append(walk.step(part, v, i))
                rows_guess.append(part - self.sigmas[i] * v)
            x_BCHW, guess_BCHW = torch.cat(rows_x), torch.cat(rows_guess)
        return replace(canvas, x_BCHW=x_BCHW, guess_BCHW=guess_BCHW, done=until)

    def look(self, canvas: Canvas) -> NDArray[np.uint8]:
        """Pictures (B, H, W, 3): finished ones as they are, others as they would be."""
        self.ledger.spend(looks=len(canvas))
        images: NDArray[np.uint8] = self.policy.decode(canvas.x_BCHW if canvas.done == len(self.passes_T) else canvas.guess_BCHW)
        return images
