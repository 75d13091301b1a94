"""GARDO (2512.24138): hold back only the samples whose reward is not to be believed, and pay more for good samples that differ.

Taken from the paper and its released scripts: ranks over the batch, the threshold at a percentile of the positive U, the adaptive share,
the diversity factor without division by the deviation. The released code takes U = rank of the proxy - mean rank of the auxiliaries with
rank 1 the best, which is largest where the proxy is *low*; the paper speaks of the opposite, and that is our default (`proxy_over_aux`).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.advantages.common import Advantages, Scores, usable, weighted_sum

Direction = Literal["proxy_over_aux", "released"]
Features = Callable[[NDArray[np.uint8]], NDArray[np.float64]]


def ranks(values_B: Tensor) -> Tensor:
    """(B,) float64: 1 for the highest value; equal ones share the mean of their places."""
    higher = (values_B[None] > values_B[:, None]).double().sum(1)
    equal = (values_B[None] == values_B[:, None]).double().sum(1)
    return 1 + higher + (equal - 1) / 2


def distrust(proxy_B: Tensor, aux_AB: Tensor, direction: Direction = "proxy_over_aux") -> Tensor:
    """U (B,): by how many places the proxy ranks a sample above the mean of the auxiliaries; `released` is its negative.

    Higher is better in all of them. NaN where one is missing; ranks are among the others.
    """
    known = proxy_B.isfinite() & aux_AB.isfinite().all(0)
    out = torch.full_like(proxy_B, torch.nan, dtype=torch.float64)
    if bool(known.any()):
        aux = torch.stack([ranks(row[known]) for row in aux_AB]).mean(0)
        out[known] = aux - ranks(proxy_B[known])
    return -out if direction == "released" else out


def gated(u_B: Tensor, share: float) -> Tensor:
    """0/1 (B,): U above the (1 - share) quantile (linear) of the U >= 0; NaN is not gated."""
    positive = u_B[u_B >= 0]
    if len(positive) == 0:
        return torch.zeros(len(u_B))
    return (u_B > torch.quantile(positive, 1 - share)).float()


class Gate:
    """The share that is held back, which follows the mean positive U: x1.1 above all of the last 20, x0.9 below all of them.

    The first `history` steps only watch. The state is the share and that history.
    """

    def __init__(
        self,
        *,
        share: float = 0.1,
        share_min: float = 0.02,
        share_max: float = 0.2,
        history: int = 20,
        direction: Direction = "proxy_over_aux",
        when_none: Literal["none", "all"] = "none",
    ) -> None:
        self.share, self.bounds, self.length = share, (share_min, share_max), history
        self.direction: Direction = direction
        self.when_none = when_none
        self.seen: list[float] = []

    def __call__(self, proxy_B: Tensor, aux_AB: Tensor) -> Tensor:
        """0/1 (B,) of this step, and one step of the share."""
        u = distrust(proxy_B, aux_AB, self.direction)
        positive = u[u >= 0]
        if len(positive):
            mean = float(positive.mean())
            if len(self.seen) == self.length:
                factor = 1.1 if mean > max(self.seen) else 0.9 if mean < min(self.seen) else 1.0
                self.share = min(max(self.share * factor, self.bounds[0]), self.bounds[1])
            self.seen = [*self.seen, mean][-self.length :]
        out = gated(u, self.share)
        return torch.ones_like(out) if self.when_none == "all" and not bool(out.any()) else out

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For a checkpoint: no tensors, and plain JSON."""
        return {}, {"share": self.share, "seen": list(self.seen)}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.share, self.seen = float(values["share"]), [float(u) for u in values["seen"]]


def proxy(rewards_RB: Tensor, mask_RB: Tensor, weights_R: Tensor) -> Tensor:
    """(B,): the trained reward as one number for ranks over the batch: the weighted sum of each reward's z-scores there; NaN if missing."""
    rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    inside = rewards[:, valid_B]
    if inside.numel():
        rewards = (rewards - inside.mean(1, keepdim=True)) / inside.std(1, correction=0).clamp(min=1e-12)[:, None]
    return torch.where(valid_B, weighted_sum(rewards, weights)[0], torch.nan)


def nearest(features_BD: Tensor) -> Tensor:
    """d (B,) in [0, 2]: 1 - cosine to the nearest other sample; 0 where all are the same, and for a single one."""
    if len(features_BD) < 2:
        return torch.zeros(len(features_BD), dtype=torch.float64)
    unit = torch.nn.functional.normalize(features_BD.double(), dim=1)
    apart = (1 - unit @ unit.T).clamp(min=0)
    apart.fill_diagonal_(torch.inf)
    return apart.amin(1)


def diverse(
    rewards_RB: Tensor,
    mask_RB: Tensor,
    group_B: Tensor,
    weights_R: Tensor,
    features_BD: Tensor,
    *,
    clip: float = 5.0,
    min_valid: int = 2,
    eps: float = 1e-4,
) -> Advantages:
    """A = (r - mean) (d / mean d where r >= mean, else 1) in the group, of the rewards' weighted mean, without division by a deviation.

    d is `nearest` among the scored members; where all are the same picture the factor is 1. A sample without finite features is masked.
    """
    del eps
    rewards, weights, valid_B = usable(rewards_RB, mask_RB, weights_R)
    valid_B = valid_B & features_BD.isfinite().all(1)
    reward_B = weighted_sum(rewards, weights)[0] / weights.sum()
    values, kept = torch.zeros_like(reward_B), torch.zeros(len(reward_B))
    flat = dropped = 0
    for group in torch.unique(group_B):
        members = (group_B == group) & valid_B
        if int(members.sum()) < min_valid:
            dropped += 1
            continue
        kept[members] = 1.0
        inside = reward_B[members]
        if inside.max() == inside.min():
            flat += 1
            continue
        apart = nearest(features_BD[members])
        factor = apart / apart.mean() if float(apart.mean()) > 1e-12 else torch.ones_like(apart)
        centred = inside - inside.mean()
        values[members] = centred * torch.where(centred >= 0, factor, 1.0)
    return Scores(values[None], kept, flat, dropped).answer(values, clip)


def features_of(name: str, monitors: Any) -> Features:
    """`monitors`, or `package.module:function` from pictures (B, H, W, 3) uint8 to features (B, D); ValueError says what is wrong."""
    if name == "monitors":
        if monitors is None:
            raise ValueError("gardo.features=monitors needs eval.monitors, e.g. world/monitors; or name a function of your own")
        out: Features = monitors.features
        return out
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"gardo.features={name}: {error}; write monitors, or package.module:function") from error
    if not callable(found):
        raise ValueError(
            f"gardo.features={name} is no function: it should take pictures (B, H, W, 3) uint8 and give features (B, D)"
        )
    return found  # type: ignore[no-any-return]


def together(features: Features, images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(B, D) float64 of the pictures of several rollouts; ValueError unless there is one finite row for each picture."""
    out = torch.from_numpy(np.concatenate([np.asarray(features(several), np.float64) for several in images]))
    if out.ndim != 2 or len(out) != sum(map(len, images)):
        raise ValueError(
            f"gardo.features gave {tuple(out.shape)} for {sum(map(len, images))} pictures: it should be one row for each"
        )
    return out
