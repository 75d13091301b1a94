"""How a run draws its pictures: the geometry, checked against the policy before anything starts; groups to learn from; evaluations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import ConfigError, RunConfig, SamplingConfig
from trainer.policies import flow
from trainer.sampling.rollout import noise_seed, sample, velocity_of
from trainer.sampling.windows import window_of
from trainer.types import ImagePolicy, Prompt, Rollout, Window

EVALUATION_STEP = -1  # evaluations draw the same noise every time: that of this "step"


class Sampler:
    """`shape` (C, H, W) and `sigmas` (N + 1,) of training, `eval_shape` and `eval_sigmas` of evaluations, `levels` (N) of noise.

    ConfigError when a size does not divide, a schedule is none, the network answers in low precision, or a level of noise is impossible.
    """

    def __init__(self, policy: ImagePolicy, config: RunConfig) -> None:
        self.policy, self.config = policy, config
        s, e = config.sampling, config.eval
        self.shape, self.sigmas = geometry(policy, "sampling", s.steps, s.height, s.width)
        self.eval_shape, self.eval_sigmas = geometry(policy, "eval", e.steps, e.height or s.height, e.width or s.width)
        self.levels = levels(s, self.sigmas)
        probe(policy, self.shape, self.sigmas, s.guidance)

    def window(self, step: int, group: int) -> Window | None:
        """The trained steps of a group at a training step; none where `sampling.window` is null."""
        s = self.config.sampling
        if s.window is None:
            return None
        options: dict[str, Any] = {
            "stride": s.window_stride,
            "every": s.window_every,
            "back": s.window_back,
            "strategy": s.window_strategy,
            "decay": s.window_decay,
            "hold": s.window_hold,
        }
        place = s.window, s.window_first, s.window_last
        return window_of(self.config.seed, step, group, *place, kind=s.window_kind, **options)

    def groups(self, step: int, prompts: Sequence[Prompt], first: int) -> Rollout:
        """A whole group for each prompt, in one rollout with one window; `first` is the place of the first group in the step."""
        c, s = self.config, self.config.sampling
        chosen, seeds, starts = members(prompts, first, c.group.size, s.copies(c.group.size), c.group.prompts, c.seed, step)
        return sample(
            self.policy,
            chosen,
            seeds,
            sigmas=self.sigmas,
            shape=self.shape,
            window=self.window(step, first),
            noise_level=self.levels,
            kind=s.kind,
            guidance=s.guidance,
            guided=s.guided_steps,
            group=first,
            start_seeds=starts,
            branch_at=s.branch_at,
            solver=s.solver,
            steps_after=s.steps_after,
            micro_batch=s.batch,
        )

    def pictures(self, prompts: Sequence[Prompt], first: int) -> NDArray[np.uint8]:
        """(B, H, W, 3) at the size of evaluations, with the same noise every time; `first` is the place of the first among all of them."""
        e = self.config.eval
        return sample(
            self.policy,
            prompts,
            [noise_seed(e.seed, EVALUATION_STEP, p.id, first + i) for i, p in enumerate(prompts)],
            sigmas=self.eval_sigmas,
            shape=self.eval_shape,
            window=None,
            guidance=e.guidance,
            guided=e.guided_steps,
            solver=e.solver,
            micro_batch=self.config.sampling.batch,
        ).images_BHWC


def members(
    prompts: Sequence[Prompt], first: int, size: int, copies: int, total: int, seed: int, step: int
) -> tuple[list[Prompt], list[int], list[int] | None]:
    """(prompt, seed, seed of the first noise) of `size` members for each prompt; the last is None where every member has its own.

    `copies` members in a row share one first noise: a group has size / copies of them. `total` groups make a step.
    """
    each = [(first + n, k, prompt) for n, prompt in enumerate(prompts) for k in range(size)]
    seeds = [noise_seed(seed, step, prompt.id, n * size + k) for n, k, prompt in each]
    starts = [noise_seed(seed, step, prompt.id, -1 - n - total * (k // copies)) for n, k, prompt in each]
    return [prompt for *_, prompt in each], seeds, starts if copies > 1 else None


def geometry(policy: ImagePolicy, section: str, steps: int, height: int, width: int) -> tuple[tuple[int, ...], Tensor]:
    """Latent shape and schedule of a size; ConfigError names the keys of `section` to change."""
    try:
        shape = policy.latent_shape(height, width)
    except ValueError as error:
        raise ConfigError(f"{section}.height and {section}.width: {error}") from error
    sigmas = policy.sigmas(steps, height, width)
    fault = ""
    if sigmas.dtype != torch.float32:
        fault = f"is {str(sigmas.dtype).removeprefix('torch.')}, and low precision moves every ratio; it must be float32"
    elif sigmas.shape != (steps + 1,):
        fault = f"has {sigmas.numel()} points for {steps} steps; it must have one more than steps"
    elif not bool((sigmas.diff() < 0).all()) or float(sigmas[0]) > 1 or float(sigmas[-1]) != 0:
        fault = f"runs {[round(float(sigma), 4) for sigma in sigmas]}; it must fall from 1 at most to exactly 0"
    if fault:
        raise ConfigError(
            f"{section}.steps={steps}: the schedule of {type(policy).__name__} {fault}. Mend the model's scheduler config."
        )
    return shape, sigmas


def levels(s: SamplingConfig, sigmas: Tensor) -> tuple[float, ...]:
    """The noise level of every step; ConfigError where the schedule asks for more noise than a step holds."""
    if s.window is None:
        return (s.noise_level,) * s.steps
    span = {"first": s.window_first, "last": s.window_last}
    try:
        return flow.noise_levels(sigmas, s.noise_level, s.kind, schedule=s.noise_schedule, power=s.noise_power, **span)
    except ValueError as error:
        raise ConfigError(f"sampling.noise_schedule={s.noise_schedule}: {error}") from error


@torch.no_grad()
def probe(policy: ImagePolicy, shape: tuple[int, ...], sigmas: Tensor, guidance: float) -> None:
    """One pass of one picture; ConfigError when the velocity has another shape or is not float32."""
    x = torch.zeros((1, *shape), device=policy.device)
    try:
        v = velocity_of(policy, x, sigmas[0], policy.encode([""]), guidance)
    except TypeError as error:
        raise ConfigError(str(error)) from error
    if v.shape != x.shape:
        raise ConfigError(
            f"{type(policy).__name__}.velocity gives {tuple(v.shape)} for latents of {tuple(x.shape)}: they must agree"
        )
