"""One reward on one device: a batch in, a score for each, whatever breaks.

A batch that raises is halved until the bad item is alone; it gets its error, the others their scores.
"""

import logging
from collections.abc import Sequence

from services.reward import Item, Reward
from shared.schema import Score

log = logging.getLogger("verism.worker")


def score_batch(reward: Reward, items: Sequence[Item], bisected: list[int] | None = None) -> list[Score]:
    """Never raises, for anything that a reward does to an item; `bisected` counts the splits."""
    items = list(items)
    try:
        scores = reward.score(items)
        if len(scores) != len(items):
            raise RuntimeError(f"{reward.info.name} returned {len(scores)} scores for {len(items)} items")
        return scores
    except Exception:
        if len(items) == 1:
            log.exception("reward %s failed on an item of shape %s", reward.info.name, items[0].image.shape)
            return [Score.failed("scoring-failed", f"{reward.info.name} could not score this item; the service's log says why")]
        if bisected is not None:
            bisected.append(len(items))
        half = len(items) // 2
        return score_batch(reward, items[:half], bisected) + score_batch(reward, items[half:], bisected)


def pick_device(wish: str) -> str:
    """`auto` is cuda where torch is installed and sees one, else cpu; anything else is taken as it is."""
    if wish != "auto":
        return wish
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"
