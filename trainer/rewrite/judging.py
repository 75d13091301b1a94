"""What the services say of pictures, always asked with the user's own prompt, and what that adds up to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.config import ConfigError, RewardConfig
from trainer.rewrite import WORLD
from trainer.scoring import Scorer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """`values_RB` as the services gave them, NaN where missing; `texts_B` what the critic would rather have as a prompt, if it said."""

    values_RB: Floats
    texts_B: tuple[str | None, ...]
    failures: Mapping[str, int]


class Judges:
    """Rewards by name. The first whose service `needs` a prompt and is called alignment (else the first that needs one) tells a lost subject.

    NoService, with the URL and the command that starts one, where a service is away; ConfigError for what it does not do.
    """

    def __init__(self, rewards: Mapping[str, RewardConfig], critic: str | None = None, timeout_s: float = 120.0) -> None:
        if critic is not None and critic not in rewards:
            raise ConfigError(f"the critic {critic!r} is none of the rewards: {', '.join(rewards)}")
        if not any(reward.weight > 0 for reward in rewards.values()):
            raise ConfigError("all reward weights are 0: nothing would tell good pictures from bad ones")
        self.critic, self._scorer = critic, Scorer(rewards, timeout_s)
        self.names = self._scorer.names
        self.titles = tuple(name if r.part is None else f"{name}.{r.part}" for name, r in rewards.items())
        self.signs_R = self._scorer.signs_R.numpy()
        self.weights_R = self._scorer.weights_R.numpy()
        asking = [name for name in self.names if "prompt" in self._scorer.infos[name].needs and name != critic]
        self.alignment = "alignment" if "alignment" in asking else (asking[0] if asking else None)

    def score(self, images_BHWC: NDArray[np.uint8], prompt: str) -> Judged:
        """Every reward of B pictures."""
        pending = self._scorer.submit(images_BHWC, [prompt] * len(images_BHWC), [""] * len(images_BHWC))
        assert pending.scores is not None
        table, rewards = pending.scores.result(), self._scorer.collect([pending])
        texts: Sequence[str | None] = [None] * len(images_BHWC)
        if self.critic is not None:
            texts = [score.text for score in table.scores[table.rewards.index(self.critic)]]
        return Judged(rewards.values_RB.numpy(), tuple(texts), dict(rewards.failures))

    def close(self) -> None:
        self._scorer.close()


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures and its standard error; None where there are too few."""

    mean: float | None
    error: float | None

    @classmethod
    def of(cls, values: Floats) -> "Estimate":
        known = values[np.isfinite(values)]
        error = float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None
        return cls(float(known.mean()) if len(known) else None, error)

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return f"{self.mean:.3g}" if self.error is None else f"{self.mean:.3g} \u00b1 {self.error:.2g}"


Scale = tuple[tuple[float, float], ...]  # mean and deviation of each reward


def scale_of(values_RNK: Floats) -> Scale:
    """Over all pictures that have a score; a deviation of 0 where they are all the same, or fewer than two."""
    known = [values[np.isfinite(values)] for values in values_RNK]
    return tuple((float(one.mean()), float(one.std())) if len(one) > 1 else (0.0, 0.0) for one in known)


def totals(values_RNK: Floats, scale: Scale, signs_R: Floats, weights_R: Floats) -> Floats:
    """(N, K): every reward in its own deviations, higher is better, weighted, over the sum of weights. A picture without a score of some
    reward that has a weight has no total; a reward that is the same for all counts 0."""
    out = np.zeros(values_RNK.shape[1:])
    for values_NK, (mean, deviation), sign, weight in zip(values_RNK, scale, signs_R, weights_R, strict=True):
        if weight > 0:
            out += sign * weight * (values_NK - mean) / (deviation if deviation > 1e-12 else np.inf)
    return out / weights_R.sum()


def parse_rewards(texts: Sequence[str], weights: Sequence[str] = ()) -> dict[str, RewardConfig]:
    """`name=URL`, or `name=URL#part` for a named part of the score; `name=1.5` for a weight. Default: realism as the log-odds of the
    small world's detector, which do not saturate, and alignment against other prompts."""
    given: dict[str, tuple[str, str | None]] = {}
    for text in texts or [f"detector={WORLD}#logit", f"alignment={WORLD}#margin"]:
        name, separator, url = text.partition("=")
        if not separator or not name or not url.startswith(("http://", "https://")):
            raise ConfigError(f"--rewards {text!r}: write name=URL, e.g. alignment={WORLD}, or name=URL#part")
        where, _, part = url.partition("#")
        given[name] = where, part or None
    chosen: dict[str, float] = {}
    for text in weights:
        name, _, number = text.partition("=")
        try:
            chosen[name] = float(number)
        except ValueError as error:
            raise ConfigError(f"--weight {text!r}: write name=number, e.g. alignment=0.5") from error
        if name not in given or not 0 <= chosen[name] < float("inf"):
            raise ConfigError(f"--weight {text!r}: a number from 0 on, of one of {', '.join(given)}")
    return {name: RewardConfig(url=url, part=part, weight=chosen.get(name, 1.0)) for name, (url, part) in given.items()}
