"""One stochastic step for every flow model, and its log-probability.

sigma runs from 1 (noise) to 0 (data), x = (1 - sigma) x0 + sigma eps, v = eps - x0. With s = sigma_i, n = sigma_{i+1},
dt = n - s < 0 and eps_hat = x + (1 - s) v every kind but `cps` is

    mean = x + dt (v + g^2 / (2 s) eps_hat),   std = g sqrt(-dt),   x' = mean + std z

and the kinds differ in g: `sde` a sqrt(s / (1 - s)) (Flow-GRPO, 2505.05470; at s = 1 the denominator uses sigma_1),
`dance` a (DanceGRPO, 2505.07818), `ode` 0. `cps` keeps the coefficients (Flow-CPS): x' = (1 - n) x0_hat + n cos(a pi/2) eps_hat
+ n sin(a pi/2) z, and its log-probability is -mean((x' - mean)^2), without constants.

Everything is float32. Log-probabilities are means over all axes but the first: clip ranges depend on that.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["sde", "dance", "cps", "ode"]
KINDS: tuple[str, ...] = get_args(Kind)
_LOG_ROOT_2PI = math.log(math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class Step:
    """prev and mean like x; diffusion_B is g (for cps: the full standard deviation); std_B the deviation of `prev`; logp_B."""

    prev: Tensor
    mean: Tensor
    diffusion_B: Tensor
    std_B: Tensor
    logp_B: Tensor | None


def deviation(sigmas: Tensor, index_B: Tensor, noise_level: float, kind: str) -> tuple[Tensor, Tensor]:
    """(g, standard deviation of the noise) of the steps from sigmas[index] on, both (B,); for cps they are the same."""
    s_B, n_B = sigmas[index_B], sigmas[index_B + 1]
    if kind == "cps":
        std_B = n_B * math.sin(min(noise_level, 1.0) * math.pi / 2)
        return std_B, std_B
    diffusion_B = {
        "sde": lambda: noise_level * torch.sqrt(s_B / (1 - torch.where(s_B == 1, sigmas[1], s_B))),
        "dance": lambda: torch.full_like(s_B, noise_level),
        "ode": lambda: torch.zeros_like(s_B),
    }[kind]()
    return diffusion_B, diffusion_B * torch.sqrt(s_B - n_B)


def noise_levels(
    sigmas: Tensor, level: float, kind: str, *, schedule: str = "flat", power: float = 1.0, first: int = 0, last: int | None = None
) -> tuple[float, ...]:
    """The noise level of each of the N steps: `flat` the same, `early` more where the picture is decided.

    `early` follows HiCoGen's theorem that noise early gives the most diversity; the form is ours: the amplitude of step i falls as
    ((N - i) / N)^power and is scaled so that the variance summed over the steps [first, last) stays that of `flat`. ValueError where cps
    cannot hold so much noise in a step (its level ends at 1).
    """
    steps = len(sigmas) - 1
    if schedule == "flat":
        return (level,) * steps
    index = torch.arange(first, steps - 1 if last is None else last, device=sigmas.device)
    unit = deviation(sigmas, index, 1.0, kind)[1].double().square().cpu()
    shape = torch.tensor([((steps - i) / steps) ** power for i in range(steps)], dtype=torch.float64)
    flat = math.sin(min(level, 1.0) * math.pi / 2) if kind == "cps" else level
    amplitude = flat * shape * torch.sqrt(unit.sum() / (shape[index.cpu()] ** 2 * unit).sum())
    if kind != "cps":
        return tuple(amplitude.tolist())
    if float(amplitude[first]) > 1:
        raise ValueError(
            "the first steps would need more noise than cps can add: lower sampling.noise_level or sampling.noise_power"
        )
    return tuple((torch.asin(amplitude.clamp(max=1)) * 2 / math.pi).tolist())


def step(
    x: Tensor,
    v: Tensor,
    sigmas: Tensor,
    index_B: Tensor,
    noise_level: float,
    kind: str,
    *,
    noise: Tensor | None = None,
    prev: Tensor | None = None,
) -> Step:
    """One step from sigmas[index] to sigmas[index + 1] for latents of any shape (B, ...).

    Give `noise` to draw x' or `prev` to judge a given x' (it is detached). `ode` has no log-probability (None), nor
    has a batch with a step of zero deviation (cps excepted). Raises ValueError for an unknown kind or when neither or both
    of `noise` and `prev` are given.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of step {kind!r}; known: {', '.join(KINDS)}")
    if kind != "ode" and (noise is None) == (prev is None):
        raise ValueError("give exactly one of `noise` (to draw) and `prev` (to judge)")
    x, v = x.float(), v.float()
    sigmas = sigmas.to(device=x.device, dtype=torch.float32)
    index_B = index_B.to(x.device)
    s_B, n_B = sigmas[index_B], sigmas[index_B + 1]
    shape = (-1, *(1,) * (x.ndim - 1))
    s, n = s_B.view(shape), n_B.view(shape)
    dt = (n_B - s_B).view(shape)
    diffusion_B, std_B = deviation(sigmas, index_B, noise_level, kind)
    if kind == "cps":
        x0, eps = x - s * v, x + (1 - s) * v
        mean = (1 - n) * x0 + torch.sqrt(n**2 - std_B.view(shape) ** 2) * eps
    else:
        drift = diffusion_B.view(shape) ** 2 / (2 * s)
        mean = x * (1 + drift * dt) + v * (1 + drift * (1 - s)) * dt
    if kind == "ode":
        return Step(mean, mean, diffusion_B, std_B, None)
    std = std_B.view(shape)
    drawn = mean + std * noise.float() if noise is not None else prev.detach().float()  # type: ignore[union-attr]
    squared = (drawn.detach() - mean) ** 2
    axes = tuple(range(1, x.ndim))
    if kind == "cps":
        logp = -squared.mean(axes)
    else:
        logp = -(squared / (2 * std**2)).mean(axes) - torch.log(std_B) - _LOG_ROOT_2PI
    return Step(drawn, mean, diffusion_B, std_B, logp if kind == "cps" or bool((std_B > 0).all()) else None)
