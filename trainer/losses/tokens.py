"""What a language policy learns from the tokens it drew: GRPO and its relatives, as TRL has them, and the parts around them.

| use | a token's term, ratio r = exp(new - old) | summed over | normaliser of a step |
| --- | --- | --- | --- |
| grpo (2402.03300) | -min(r A, clip(r) A) | rows' means over their tokens | rows |
| bnpo (2506.02864) | the same | the batch's mean over its tokens | batches |
| dr_grpo (2503.20783) | the same | tokens | rows x longest completion allowed |
| dapo (2503.14476) | the same | tokens | tokens |
| cispo (2506.13585) | -min(r, clip_high) A new, the weight without gradient | tokens | tokens |
| sapo (2511.20347) | -4 / tau sigmoid(tau (r - 1)) A, tau by the sign of A | rows' means over their tokens | rows |
| gspo (2507.18071) | grpo with r of the sequence, exp(mean(new - old)) | rows | rows |
| luspo (2602.05261) | gspo times the row's length | rows | rows |
| vespo (2602.10693) | -phi(r of the sequence, exp(sum(new - old))) A new, phi without gradient | tokens | tokens |

The normaliser is a number of the whole step, not of a micro-batch, so the values of all its micro-batches add up to the step's loss. Over
several ranks whose gradients are averaged: the number over all ranks divided by their count. Only bnpo depends on how the step is cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Use = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "luspo", "vespo"]
Level = Literal["token", "sequence"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

CLIPS: dict[str, tuple[float, float]] = {  # (low, high) as published; cispo has an upper bound of r alone, sapo and vespo none
    "grpo": (0.2, 0.2),
    "bnpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "luspo": (2e-3, 2.5e-3),
    "cispo": (float("nan"), 5.0),  # ScaleRL, 2510.13786
}
OF_SEQUENCES = ("gspo", "luspo")
BY_ROWS = ("grpo", "sapo", "gspo", "luspo")
BY_TOKENS = ("dapo", "cispo", "vespo")
FARTHEST = 20.0  # of a log-ratio: beyond it, exp leaves float32 and no loss learns anything


@dataclass(frozen=True)
class TokenLoss:
    """A scalar to add up over the step's micro-batches, and numbers to log: means over this one's tokens, or its rows where a ratio belongs
    to a sequence (`ratio_dev` is the largest |r - 1|, `tokens` their count)."""

    value: Tensor
    diagnostics: Mapping[str, float]


def step_normaliser(use: Use, *, rows: int, tokens: int, batches: int = 1, longest: int | None = None) -> float:
    """What the sum of a step of `rows` completions with `tokens` active tokens, taken in `batches`, is divided by; see the module. TRL
    counts rows without an active token too.

    `longest`: tokens a completion may have, for dr_grpo; ValueError without it.
    """
    if use in BY_ROWS:
        return float(max(rows, 1))
    if use in BY_TOKENS:
        return float(max(tokens, 1))
    if use == "bnpo":
        return float(max(batches, 1))
    if use == "dr_grpo":
        if longest is None:
            raise ValueError(
                "dr_grpo divides by rows times the tokens a completion may have: give `longest`, and its loss `normaliser`"
            )
        return float(max(rows, 1) * longest)
    raise ValueError(f"unknown token loss {use!r}; known: {', '.join(get_args(Use))}")


def without_truncated(mask_BT: Tensor, ended_B: Tensor) -> Tensor:
    """The mask with whole rows gone whose completion was cut off: what they would have become is not known (DAPO's overlong filter)."""
    return mask_BT.bool() & ended_B.bool()[:, None]


def importance(
    trainer_BT: Tensor,
    sampler_BT: Tensor,
    mask_BT: Tensor,
    *,
    mode: Correction = "sequence_mask",
    high: float | None = 3.0,
    low: float | None = None,
) -> Tensor:
    """(B, T) or, for a `sequence_` mode, (B, 1), without gradient: what a token that another engine drew counts, p_trainer / p_sampler.

    Both under the weights that drew it. Beyond [low, high] a ratio is moved to the bound (`_truncate`) or is 0 (`_mask`). A token whose
    log-probability the sampler did not give (NaN) counts as no difference; masked tokens have 1. ValueError for `_truncate` without bounds.
    """
    if mode not in get_args(Correction):
        raise ValueError(f"unknown correction {mode!r}; known: {', '.join(get_args(Correction))}")
    if mode.endswith("truncate") and low is None and high is None:
        raise ValueError(f"{mode} needs a bound: give `high`, e.g. 3, or `low`")
    with torch.no_grad():
        known_BT = mask_BT.bool() & ~sampler_BT.isnan()
        apart = torch.where(known_BT, trainer_BT - sampler_BT, 0.0)
        ratio = (apart.sum(1, keepdim=True) if mode.startswith("sequence") else apart).clamp(-FARTHEST, FARTHEST).exp()
        if mode.endswith("truncate"):
            return ratio.clamp(low, high)
        beyond = torch.zeros_like(ratio, dtype=torch.bool)
        if high is not None:
            beyond |= ratio > high
        if low is not None:
            beyond |= ratio < low
        return torch.where(beyond, 0.0, ratio)


def k3(new_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """Schulman's estimate of KL(new || reference) from one drawn token: exp(ref - new) - (ref - new) - 1 >= 0."""
    apart = (ref_BT - new_BT).clamp(-FARTHEST, FARTHEST)
    return torch.expm1(apart) - apart


def token_loss(
    new_BT: Tensor,
    old_BT: Tensor,
    mask_BT: Tensor,
    advantages_B: Tensor,
    *,
    use: Use = "dapo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    normaliser: float | None = None,
    beta: float = 0.0,
    ref_BT: Tensor | None = None,
    unbiased_kl: bool = True,
    is_ratio_BT: Tensor | None = None,
    level: Level | None = None,
    delta: float | None = None,
    tau: tuple[float, float] = (1.0, 1.05),
    gamma: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0)),
) -> TokenLoss:
    """The loss of a micro-batch from log-probabilities (B, T) at the sampling temperature: `new_BT` has the gradient, `old_BT` drew.

    Whatever stands where `mask_BT` is False, NaN too, has no influence. `clip_low`, `clip_high`: None is the published range of `CLIPS`.
    `normaliser`: see the module; None takes this batch for the whole step (dr_grpo needs it). `beta` adds the k3 KL to `ref_BT`;
    `unbiased_kl` multiplies it by r, so that its gradient is the reverse KL's (2512.02556). `is_ratio_BT` (B, T) or (B, 1) from `importance`
    weighs the policy's term (in vespo it is part of the sequence's ratio), not the KL. `level`: what r belongs to; None is the loss's own.
    `delta` bounds r from above where a bad token is not clipped (2505.07291). `tau` and `gamma` ((k, lambda)) are of sapo and vespo, for
    A > 0 (vespo: A >= 0) and for the others. ValueError for what does not go together.
    """
    low, high, level = _settled(use, clip_low, clip_high, level, delta)
    if beta != 0 and ref_BT is None:
        raise ValueError("beta needs the reference's log-probabilities: give ref_BT, or set beta=0")
    mask = mask_BT.bool()
    count_B = mask.sum(1).clamp(min=1)
    new, old = torch.where(mask, new_BT, 0.0), torch.where(mask, old_BT.detach(), 0.0)
    a = torch.where(mask.any(1), advantages_B, 0.0).to(new.dtype)[:, None]
    share = is_ratio_BT
    if share is not None:
        share = torch.where(mask if share.shape[1] > 1 else mask.any(1, keepdim=True), share.detach(), 1.0).to(new.dtype)
    apart = new - old
    if level == "sequence":
        apart = (apart.sum(1) / count_B)[:, None]
    r = apart.clamp(-FARTHEST, FARTHEST).exp()
    numbers: dict[str, Tensor] = {}
    if use == "cispo":
        terms = -r.clamp(max=high).detach() * a * new
        numbers["clipfrac_high"] = (r > high) & (a > 0)
    elif use == "sapo":
        heat = torch.full_like(a, tau[1]).masked_fill(a > 0, tau[0])
        terms = -4 / heat * torch.sigmoid(heat * (r - 1)) * a
    elif use == "vespo":
        phi = _gamma_weight(new.detach() - old, a, mask, share, gamma)
        terms = -phi * a * new
        numbers["phi"] = phi
    else:
        bounded = r if delta is None else r.clamp(max=delta)
        terms = -torch.minimum(bounded * a, r.clamp(1 - low, 1 + high) * a)
        numbers["clipfrac_low"], numbers["clipfrac_high"] = (r < 1 - low) & (a < 0), (r > 1 + high) & (a > 0)
    if share is not None and use != "vespo":
        terms = terms * share
    if beta != 0:
        assert ref_BT is not None
        kl = k3(new, torch.where(mask, ref_BT.detach(), 0.0))
        terms = terms + beta * (kl * r if unbiased_kl else kl)
        numbers["kl"] = kl
    terms = torch.where(mask, terms, 0.0)
    if use in ("grpo", "sapo", "gspo"):
        value = (terms.sum(1) / count_B).sum()
    elif use == "bnpo":
        value = terms.sum() / mask.sum().clamp(min=1)
    else:
        value = terms.sum()
    value = value / (_alone(use, mask) if normaliser is None else normaliser)
    return TokenLoss(value, _told(r, mask, share, numbers))


def _settled(
    use: str, low: float | None, high: float | None, level: Level | None, delta: float | None
) -> tuple[float, float, Level]:
    """Clip range and level with what was published for what is not given."""
    if use not in get_args(Use):
        raise ValueError(f"unknown token loss {use!r}; known: {', '.join(get_args(Use))}")
    if use not in CLIPS and (low, high) != (None, None):
        raise ValueError(f"{use} does not clip: leave clip_low and clip_high away")
    if use == "cispo" and low is not None:
        raise ValueError("cispo bounds the ratio from above alone: leave clip_low away")
    if delta is not None and use in ("cispo", "sapo", "vespo"):
        raise ValueError(f"delta is the second bound of losses that clip, and {use} is none: leave delta away")
    if use in OF_SEQUENCES and level == "token":
        raise ValueError(f"{use} has one ratio for a sequence: leave level away, or use grpo")
    if use == "vespo" and level == "sequence":
        raise ValueError("vespo has its own ratio of a sequence: leave level away")
    known = CLIPS.get(use, (0.0, 0.0))
    chosen = known[0] if low is None else low, known[1] if high is None else high
    if chosen[1] < 0 or (use in CLIPS and use != "cispo" and not 0 <= chosen[0] < 1):
        raise ValueError(f"{use}: a clip range of {chosen[0]:g} and {chosen[1]:g}; clip_low is in [0, 1), clip_high at least 0")
    if delta is not None and delta <= 1:
        raise ValueError(
            f"delta={delta:g} bounds the ratio from above: set it above 1, best above 1 + clip_high = {1 + chosen[1]:g}"
        )
    return *chosen, level or ("sequence" if use in OF_SEQUENCES else "token")


def _gamma_weight(
    apart_BT: Tensor, a_B1: Tensor, mask_BT: Tensor, share: Tensor | None, gamma: tuple[tuple[float, float], tuple[float, float]]
) -> Tensor:
    """(B, 1) e^lambda w^k e^(-lambda w), 1 at w = 1, of the sequence's ratio w, with the sampler's ratio in it; w in [1e-8, e^20]."""
    log_w = torch.where(mask_BT, apart_BT.clamp(-FARTHEST, FARTHEST), 0.0).sum(1, keepdim=True)
    least = -18.420680743952367  # log 1e-8
    if share is not None:
        log_w = log_w + share.log().clamp(least, FARTHEST).sum(1, keepdim=True)
    log_w = log_w.clamp(least, FARTHEST)
    good = a_B1 >= 0
    power, decay = (torch.where(good, gamma[0][n], gamma[1][n]) for n in (0, 1))
    return (decay + power * log_w - decay * log_w.exp()).exp()


def _alone(use: Use, mask_BT: Tensor) -> float:
    """The normaliser where this batch is the step."""
    return step_normaliser(use, rows=len(mask_BT), tokens=int(mask_BT.sum()))


def _told(r: Tensor, mask_BT: Tensor, share: Tensor | None, numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over tokens, or over rows of what belongs to a sequence; rows without tokens do not count."""
    with torch.no_grad():
        rows = mask_BT.any(1, keepdim=True)

        def mean(x: Tensor) -> float:
            over = rows if x.shape[1] == 1 else mask_BT
            return float(torch.where(over, x.detach().float(), 0.0).sum() / over.sum().clamp(min=1))

        over = rows if r.shape[1] == 1 else mask_BT
        out = {"ratio": mean(r), "ratio_dev": float(torch.where(over, (r - 1).abs(), 0.0).amax()) if r.numel() else 0.0}
        if share is not None:
            out |= {"importance": mean(share), "importance_dropped": mean(share == 0)}
        return {**out, **{name: mean(value) for name, value in numbers.items()}, "tokens": float(mask_BT.sum())}
