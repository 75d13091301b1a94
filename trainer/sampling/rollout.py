"""Sample a group along the flow, and judge the same trajectory again with changed weights.

Before the window the ODE, inside it stochastic steps whose states and log-probabilities are kept (float32), after it the ODE
again, so that rewards see clean pictures.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.policies import flow
from trainer.types import Condition, ImagePolicy, Prompt, Rollout, Window


def noise_seed(run: int, step: int, prompt: int, copy: int) -> int:
    """Seed of one sample: a hash, so that it does not depend on ranks or batch sizes."""
    digest = hashlib.sha256(f"{run}/{step}/{prompt}/{copy}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def window_of(seed: int, step: int, group: int, length: int, first: int, last: int) -> Window:
    """A window of `length` steps inside [first, last), drawn from (seed, step, group): the same for all members of a group."""
    places = last - first - length + 1
    if places < 1:
        raise ValueError(f"a window of {length} steps does not fit into [{first}, {last}); change sampling.window")
    return Window(first + noise_seed(seed, step, group, -1) % places, length)


def _noise(seeds: Sequence[int], count: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, count, ...) standard normal, row b from seeds[b] alone."""
    rows = [torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def _walk(
    policy: ImagePolicy,
    condition: Condition,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sigmas: Tensor,
    shape: tuple[int, ...],
    guidance: float,
    micro_batch: int,
) -> Tensor:
    """(B, ...) where the ODE stands after `sigmas`; who shares noise and prompt is computed once."""
    keys = list(zip(seeds, (p.text for p in prompts), strict=True))
    firsts = {key: keys.index(key) for key in dict.fromkeys(keys)}
    places = {key: n for n, key in enumerate(firsts)}
    chosen = torch.tensor(list(firsts.values()), device=policy.device)
    out = []
    for rows in chosen.split(micro_batch):
        x = _noise([seeds[i] for i in rows.tolist()], 1, shape, policy.device)[:, 0]
        for i in range(len(sigmas) - 1):
            v = policy.velocity(x, sigmas[i], condition[rows], guidance)
            x = flow.step(x, v, sigmas, torch.full((len(x),), i, device=x.device), 0.0, "ode").prev
        out.append(x)
    return torch.cat(out)[torch.tensor([places[key] for key in keys], device=policy.device)]


@torch.no_grad()
def sample(
    policy: ImagePolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    sigmas: Tensor,
    shape: tuple[int, ...],
    window: Window | None,
    noise_level: float = 0.7,
    kind: str = "sde",
    guidance: float = 1.0,
    group: int = 0,
    start_seeds: Sequence[int] | None = None,
    micro_batch: int = 64,
) -> Rollout:
    """B pictures, of one group or several with one window.

    `start_seeds` draws the first noise from other seeds than the window's: equal ones let the members of a group share it, and differ by
    the window alone. Without a window the whole path is the ODE, and there is nothing to train on. Kernels round differently for other
    batch sizes: `micro_batch` has to be the one that the loss uses.
    """
    steps = len(sigmas) - 1
    trained = list(window) if window is not None else []
    if trained and not 0 <= trained[0] <= trained[-1] < steps - 1:
        raise ValueError(f"the window {trained} must lie inside the first {steps - 1} of {steps} steps: the last is never trained")
    condition = policy.encode([p.text for p in prompts])
    begun: Tensor | None = None
    if start_seeds is not None and trained and trained[0] > 0:  # members of a group go one way until the window: it is walked once
        begun = _walk(policy, condition, prompts, start_seeds, sigmas[: trained[0] + 1], shape, guidance, micro_batch)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for start in range(0, len(prompts), micro_batch):
        rows = slice(start, start + micro_batch)
        noise = _noise(seeds[rows], 1 + len(trained), shape, policy.device)
        if start_seeds is not None and begun is None:
            noise[:, 0] = _noise(start_seeds[rows], 1, shape, policy.device)[:, 0]
        x, cond = noise[:, 0], condition[rows]
        if begun is not None:
            x = begun[rows]
        states, logps, means = [], [], []
        for i in range(trained[0] if begun is not None else 0, steps):
            v = policy.velocity(x, sigmas[i], cond, guidance)
            index = torch.full((len(x),), i, device=x.device)
            if i in trained:
                out = flow.step(x, v, sigmas, index, noise_level, kind, noise=noise[:, 1 + trained.index(i)])
                if out.logp_B is None:
                    raise ValueError("a trained step has no noise: raise sampling.noise_level or choose another sampling.kind")
                states.append(x)
                logps.append(out.logp_B)
                means.append(out.mean)
                x = out.prev
                if i == trained[-1]:
                    states.append(x)
            else:
                x = flow.step(x, v, sigmas, index, 0.0, "ode").prev
        empty = x.new_zeros(len(x), 0)
        parts.append(
            (
                x,
                torch.stack(states, 1) if states else empty,
                torch.stack(logps, 1) if logps else empty,
                torch.stack(means, 1) if means else empty,
            )
        )
    latents, states_BT, logp_BT, mean_BT = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Rollout(
        prompts=tuple(prompts),
        group=group,
        window=window or Window(0, 0),
        sigmas=sigmas,
        noise_level=noise_level,
        kind=kind,
        guidance=guidance,
        condition=condition,
        states_BT=states_BT,
        logp_old_BT=logp_BT,
        mean_old_BT=mean_BT,
        latents_BCHW=latents,
        images_BHWC=policy.decode(latents),
    )


def replay(policy: ImagePolicy, rollout: Rollout, column: int, rows: slice | None = None) -> tuple[flow.Step, Tensor]:
    """Judge trained step `column` (0-based inside the window) with the present weights: the step, and the velocity it used."""
    rows = rows or slice(None)
    x = rollout.states_BT[rows, column]
    condition: Condition = rollout.condition[rows]
    i = rollout.window.start + column
    v = policy.velocity(x, rollout.sigmas[i], condition, rollout.guidance)
    index = torch.full((len(x),), i, device=x.device)
    prev = rollout.states_BT[rows, column + 1]
    return flow.step(x, v, rollout.sigmas, index, rollout.noise_level, rollout.kind, prev=prev), v


@torch.no_grad()
def ratio_deviation(policy: ImagePolicy, rollout: Rollout, micro_batch: int = 64) -> float:
    """max |ratio - 1| of a fresh trajectory under unchanged weights: what rounding alone does to the ratio."""
    worst = 0.0
    for column in range(rollout.window.length):
        for start in range(0, len(rollout.prompts), micro_batch):
            rows = slice(start, start + micro_batch)
            out, _ = replay(policy, rollout, column, rows)
            assert out.logp_B is not None
            ratio = torch.exp(out.logp_B - rollout.logp_old_BT[rows, column])
            worst = max(worst, float((ratio - 1).abs().max()))
    return worst
