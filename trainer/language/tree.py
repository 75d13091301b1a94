"""The tree of a step: P prompts, J rewrites of each, K pictures of each rewrite; and what the pictures say of the rewrites.

N = P J rewrites and B = N K pictures stand prompt by prompt, rewrite by rewrite. A rewrite is worth the mean of its pictures' rewards, those
that were scored; its advantage is against the other rewrites of its prompt, less what its text costs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer.advantages.common import Advantages
from trainer.registry import resolve
from trainer.sampling.rollout import noise_seed, sample
from trainer.sampling.sampler import Sampler
from trainer.types import Prompt, Rollout


@dataclass(frozen=True)
class Tree:
    """P, J and K."""

    prompts: int
    rewrites: int
    pictures: int

    @property
    def prompt_N(self) -> Tensor:
        """(N,): which prompt each rewrite is of."""
        return torch.arange(self.prompts).repeat_interleave(self.rewrites)

    @property
    def prompt_B(self) -> Tensor:
        """(B,): which prompt each picture is of."""
        return self.prompt_N.repeat_interleave(self.pictures)

    @property
    def rewrite_B(self) -> Tensor:
        """(B,): which rewrite each picture is of."""
        return torch.arange(self.prompts * self.rewrites).repeat_interleave(self.pictures)

    def passes(self, micro_batch: int) -> Iterator[list[range]]:
        """Ranges of rewrites that are painted together, in lists that hold whole trees: one is asked about at once."""
        tree, part = self.rewrites * self.pictures, max(1, micro_batch // self.pictures)
        if tree <= micro_batch:
            several = micro_batch // tree * self.rewrites
            end = self.prompts * self.rewrites
            yield from ([range(first, min(first + several, end))] for first in range(0, end, several))
            return
        for prompt in range(self.prompts):
            first, end = prompt * self.rewrites, (prompt + 1) * self.rewrites
            yield [range(n, min(n + part, end)) for n in range(first, end, part)]


@dataclass(frozen=True)
class Worth:
    """means_RN of each reward over a rewrite's scored pictures (NaN where there are none), their standard errors sem_RN (NaN below two), and
    counts_RN."""

    means_RN: Tensor
    sem_RN: Tensor
    counts_RN: Tensor


def worth(values_RB: Tensor, mask_RB: Tensor, tree: Tree, same_noise: bool) -> Worth:
    """Of each rewrite. With `same_noise` picture k of all rewrites of a prompt comes from one noise, and what that does to all of them is no
    error of their differences: it is taken out of the standard errors."""
    shape = (len(values_RB), tree.prompts, tree.rewrites, tree.pictures)
    known = (mask_RB & values_RB.isfinite()).view(shape)
    x = torch.where(known, values_RB.double().view(shape), torch.nan)
    counts = known.sum(3)
    left, loss = x, 1.0
    if same_noise and tree.rewrites > 1:
        left, loss = x - x.nanmean(2, keepdim=True), tree.rewrites / (tree.rewrites - 1)
    squares = (left - left.nanmean(3, keepdim=True)).square().nansum(3) * loss
    sem = torch.where(counts > 1, (squares / (counts - 1).clamp(min=1) / counts.clamp(min=1)).sqrt(), torch.nan)
    return Worth(x.nanmean(3).flatten(1), sem.flatten(1), counts.flatten(1))


def rewrite_advantages(
    values_RB: Tensor,
    mask_RB: Tensor,
    weights_R: Tensor,
    costs_N: Tensor,
    masked_N: Tensor,
    tree: Tree,
    *,
    use: str,
    options: Mapping[str, Any],
    same_noise: bool = False,
    names: Sequence[str] = (),
) -> Advantages:
    """(N,): by the rule `use` from the means over pictures, then less the cost of the text against the group's mean cost, |A| <= clip.

    Higher `values_RB` are better. A picture counts for a rewrite when every reward with a weight scored it (with `missing` skip for each
    reward that did); a rewrite without any, or masked, counts nowhere. Numbers of each reward with a weight: the mean standard error of a
    rewrite's mean, the deviation between rewrites of a prompt, and the share of that variance which the error does not explain.
    """
    used = weights_R > 0
    known_RB = mask_RB & values_RB.isfinite()
    if options.get("missing", "mask") == "mask":
        known_RB = known_RB & known_RB[used].all(0)
    of = worth(values_RB, known_RB, tree, same_noise)
    there_RN = (of.counts_RN > 0) & ~masked_N.bool()
    group_N = tree.prompt_N
    out: Advantages = resolve("advantages", use)(of.means_RN, there_RN, group_N, weights_R, **options)
    values_N = out.values_B.double()
    for group in torch.unique(group_N):
        members = (group_N == group) & out.weights_B.bool()
        if bool(members.any()):
            values_N[members] += costs_N[members].mean() - costs_N[members]
    values_N = values_N.clamp(-options["clip"], options["clip"])
    numbers: dict[str, float] = {}
    for row in torch.nonzero(used).flatten().tolist():
        numbers |= {f"{names[row] if names else row}/{key}": value for key, value in _signal(of, row, tree).items()}
    return replace(out, values_B=values_N.float(), numbers={**out.numbers, **numbers})


def _signal(of: Worth, row: int, tree: Tree) -> dict[str, float]:
    """How far rewrites differ, and how well that is known."""
    means_PJ = of.means_RN[row].view(tree.prompts, tree.rewrites)
    known = means_PJ.isfinite()
    squares_P = (means_PJ - means_PJ.nanmean(1, keepdim=True)).square().nansum(1)
    enough = known.sum(1) > 1
    out: dict[str, float] = {}
    errors = of.sem_RN[row][of.sem_RN[row].isfinite()]
    if len(errors):
        out["sem"] = float(errors.mean())
    if bool(enough.any()):
        between = float((squares_P[enough] / (known.sum(1)[enough] - 1)).mean())
        out["between"] = between**0.5
        if len(errors) and between > 0:
            out["reliability"] = max(0.0, 1 - float(errors.square().mean()) / between)
    return out


def paint(
    sampler: Sampler, step: int, rewrites: Sequence[Prompt], places: range, tree: Tree, *, same_noise: bool, learned: bool
) -> Rollout:
    """The K pictures of each rewrite, in one rollout with one window, that of its first prompt; the ODE alone unless they are `learned` from.

    `rewrites` have the users' ids and the words to paint; `places` are theirs among the step's. With `same_noise` picture k has the same
    seed in all rewrites of a prompt.
    """
    c, s = sampler.config, sampler.config.sampling
    copies = s.copies(tree.pictures) if learned else 1
    total = tree.prompts * (1 if same_noise else tree.rewrites)
    chosen, seeds, starts = [], [], []
    for place, rewrite in zip(places, rewrites, strict=True):
        n = place // tree.rewrites if same_noise else place
        for k in range(tree.pictures):
            chosen.append(rewrite)
            seeds.append(noise_seed(c.seed, step, rewrite.id, n * tree.pictures + k))
            starts.append(noise_seed(c.seed, step, rewrite.id, -1 - n - total * (k // copies)))
    return sample(
        sampler.policy,
        chosen,
        seeds,
        sigmas=sampler.sigmas,
        shape=sampler.shape,
        window=sampler.window(step, places.start // tree.rewrites) if learned else None,
        noise_level=sampler.levels,
        kind=s.kind,
        guidance=s.guidance,
        guided=s.guided_steps,
        group=places.start,
        start_seeds=starts if copies > 1 else None,
        branch_at=s.branch_at if learned else None,
        solver=s.solver,
        steps_after=s.steps_after if learned else None,
        micro_batch=s.batch,
    )
