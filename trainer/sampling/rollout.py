"""Sample a group along the flow, and judge the same trajectory again with changed weights.

Before the window the ODE, inside it stochastic steps whose states and log-probabilities are kept (float32), after it the ODE
again, so that rewards see clean pictures.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.policies import flow
from trainer.registry import resolve
from trainer.sampling.solvers import spaced
from trainer.types import Condition, ImagePolicy, Prompt, Rollout, Window, guidance_at


def noise_seed(run: int, step: int, prompt: int, copy: int) -> int:
    """Seed of one sample: a hash, so that it does not depend on ranks or batch sizes."""
    digest = hashlib.sha256(f"{run}/{step}/{prompt}/{copy}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _noise(seeds: Sequence[int], count: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """(B, count, ...) standard normal, row b from seeds[b] alone."""
    rows = [torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def velocity_of(policy: ImagePolicy, x: Tensor, sigma: Tensor, condition: Condition, guidance: float) -> Tensor:
    v = policy.velocity(x, sigma, condition, guidance)
    if v.dtype != torch.float32:
        raise TypeError(
            f"{type(policy).__name__}.velocity gives {str(v.dtype).removeprefix('torch.')}: a trajectory in low precision moves every ratio "
            "by rounding alone. Run the network in any dtype, and return float32."
        )
    return v


def _follow(
    policy: ImagePolicy,
    x: Tensor,
    sigmas: Tensor,
    places: Sequence[float],
    condition: Condition,
    guidance: Callable[[float], float],
    solver: str,
) -> Tensor:
    """Where the ODE from x (B, ...) stands after `sigmas`; `places` are its steps' places on the whole path."""
    walk = resolve("solver", solver)(sigmas)
    for i, place in enumerate(places):
        x = walk.step(x, velocity_of(policy, x, sigmas[i], condition, guidance(place)), i)
    return x


@torch.no_grad()
def sample(
    policy: ImagePolicy,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    sigmas: Tensor,
    shape: tuple[int, ...],
    window: Window | None,
    noise_level: float | Sequence[float] = 0.7,
    kind: str = "sde",
    guidance: float = 1.0,
    guided: tuple[int, int] | None = None,
    group: int = 0,
    start_seeds: Sequence[int] | None = None,
    branch_at: int | None = None,
    solver: str = "euler",
    steps_after: int | None = None,
    micro_batch: int = 64,
) -> Rollout:
    """B pictures, of one group or several with one window.

    `noise_level` is one for all steps or one for each; `guided` the steps [first, last) that are guided; `solver` walks the steps outside
    the window, `steps_after` of them behind it along the same curve (null: all that are left).

    `start_seeds` draws the first noise from other seeds than the window's: who has the same (and the same prompt) goes one way up to the
    window, which is walked once, and differs by the window alone, or by its steps from `branch_at` on. Without a window the whole path
    is the ODE, and there is nothing to train on. Kernels round differently for other batch sizes than
    the loss uses: `ratio_deviation` tells by how much. TypeError when the policy's velocity is not float32.
    """
    steps = len(sigmas) - 1
    trained = list(window) if window is not None else []
    if trained and not 0 <= trained[0] <= trained[-1] < steps - 1:
        raise ValueError(f"the window {trained} must lie inside the first {steps - 1} of {steps} steps: the last is never trained")
    levels = (noise_level,) * steps if isinstance(noise_level, int | float) else tuple(noise_level)
    begin = trained[0] if trained else steps
    common = sum(i < branch_at for i in trained) if branch_at is not None and start_seeds is not None else 0
    tail, tail_places = spaced(sigmas, trained[-1] + 1, steps_after) if trained else (sigmas[:0], ())
    condition = policy.encode([p.text for p in prompts])
    starts = start_seeds or seeds

    def guide(place: float) -> float:
        return guidance_at(guidance, guided, place)

    def to_window(x: Tensor, cond: Condition) -> Tensor:
        return _follow(policy, x, sigmas[: begin + 1], range(begin), cond, guide, solver)

    begun = None
    if start_seeds is not None and trained and begin > 0:
        keys = list(zip(start_seeds, (p.text for p in prompts), strict=True))
        firsts = {key: keys.index(key) for key in dict.fromkeys(keys)}
        ways = torch.tensor(list(firsts.values()), device=policy.device)
        walked = [
            to_window(_noise([starts[i] for i in rows.tolist()], 1, shape, policy.device)[:, 0], condition[rows])
            for rows in ways.split(micro_batch)
        ]
        order = {key: n for n, key in enumerate(firsts)}
        begun = torch.cat(walked)[torch.tensor([order[key] for key in keys], device=policy.device)]
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for start in range(0, len(prompts), micro_batch):
        rows = slice(start, start + micro_batch)
        noise = _noise(seeds[rows], 1 + len(trained), shape, policy.device)
        if start_seeds is not None and begun is None:
            noise[:, 0] = _noise(start_seeds[rows], 1, shape, policy.device)[:, 0]
        if common:
            noise[:, 1 : 1 + common] = _noise([seed ^ 1 for seed in starts[rows]], common, shape, policy.device)
        cond = condition[rows]
        x = begun[rows] if begun is not None else to_window(noise[:, 0], cond)
        states, logps, means = [], [], []
        for column, i in enumerate(trained):
            v = velocity_of(policy, x, sigmas[i], cond, guide(i))
            index = torch.full((len(x),), i, device=x.device)
            out = flow.step(x, v, sigmas, index, levels[i], kind, noise=noise[:, 1 + column])
            if out.logp_B is None:
                raise ValueError("a trained step has no noise: raise sampling.noise_level or choose another sampling.kind")
            states.append(x)
            logps.append(out.logp_B)
            means.append(out.mean)
            x = out.prev
        if trained:
            states.append(x)
            x = _follow(policy, x, tail, tail_places, cond, guide, solver)
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
        levels_T=tuple(levels[i] for i in trained),
        kind=kind,
        guidance=guidance,
        guided=guided,
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
    v = velocity_of(policy, x, rollout.sigmas[i], condition, rollout.guidance_at(i))
    index = torch.full((len(x),), i, device=x.device)
    prev = rollout.states_BT[rows, column + 1]
    return flow.step(x, v, rollout.sigmas, index, rollout.levels_T[column], rollout.kind, prev=prev), v


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
