"""One reward on one device, as a lane drives it: collate, run, and a score whatever breaks. And its warm-up.

A reward may split `score(items)` into `prepare(items)`, which runs in a helper thread beside another batch, and `forward(prepared)`,
which runs on the device; `score` is then the one after the other. With `join([prepared, ...])` too, which makes one of several, pictures are
prepared as they come.
"""

import logging
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from services.reward import Item, Reward
from services.scheduler import DeviceLost, OutOfMemory
from shared.schema import Score

log = logging.getLogger("verism.worker")
MEMORY_SHARE = 0.85
WARM_UP_SIDE = 512
WARM_UP_S = 20.0


class RewardWork:
    """`services.scheduler.Work` over a reward; `info` is that of the version which it serves."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.info = reward, reward.info
        self._split = hasattr(reward, "prepare") and hasattr(reward, "forward")
        self.join = self._join if self._split and hasattr(reward, "join") else None

    @property
    def ready(self) -> bool:
        """False while what the reward needs beside this process (an engine) is not there; a reward may say so by a `ready` of its own."""
        return bool(getattr(self.reward, "ready", True))

    def collate(self, questions: Sequence[Item]) -> tuple[int, Any]:
        items = list(questions)
        return len(items), self.reward.prepare(items) if self._split else items  # type: ignore[attr-defined]

    def _join(self, pieces: Sequence[tuple[int, Any]]) -> tuple[int, Any]:
        return sum(count for count, _ in pieces), self.reward.join([ready for _, ready in pieces])  # type: ignore[attr-defined]

    def run(self, collated: tuple[int, Any]) -> list[Score]:
        count, ready = collated
        try:
            scores: list[Score] = self.reward.forward(ready) if self._split else self.reward.score(ready)  # type: ignore[attr-defined]
        except Exception as error:
            kind = device_error(error)
            if kind is None:
                raise
            raise kind(str(error)) from error
        if len(scores) != count:
            raise RuntimeError(f"{self.info.name} returned {len(scores)} scores for {count} items")
        return scores

    def failed(self, question: Item, error: Exception) -> Score:
        if isinstance(error, OutOfMemory):
            height, width, _ = question.image.shape
            title = f"{self.info.name} has not enough memory for a picture of {width}x{height}; send a smaller one"
            return Score.failed("out-of-memory", title)
        log.error("reward %s failed on an item of shape %s", self.info.name, question.image.shape, exc_info=error)
        return Score.failed("scoring-failed", f"{self.info.name} could not score this item; the service's log says why")

    def recover(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


def device_error(error: Exception) -> type[OutOfMemory] | type[DeviceLost] | None:
    """OutOfMemory, DeviceLost, or None for an error that belongs to the batch."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return OutOfMemory
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's CPU allocator
        return OutOfMemory
    lost = getattr(torch, "AcceleratorError", None)
    if (lost is not None and isinstance(error, lost)) or (isinstance(error, RuntimeError) and "CUDA error" in str(error)):
        return DeviceLost
    return None


def warm_up(work: RewardWork, most: int, device: str, budget_s: float = WARM_UP_S) -> tuple[int, list[tuple[int, float]]]:
    """(batch cap, [(n, seconds)]): n doubles until throughput has not risen twice in a row, memory is 85 % used, or the budget is spent.

    The cap is the smallest n within 5 % of the best throughput: larger batches would only make others wait.
    """
    seen: list[tuple[int, float]] = []
    n, stale, best, began = 1, 0, 0.0, time.perf_counter()
    while n <= most and stale < 2 and time.perf_counter() - began < budget_s and _memory_used(device) < MEMORY_SHARE:
        try:
            seconds = timed(work, n)
        except OutOfMemory:
            work.recover()
            break
        seen.append((n, seconds))
        stale = 0 if n / seconds > 1.05 * best else stale + 1
        best = max(best, n / seconds)
        n *= 2
    return next((n for n, seconds in seen if n / seconds >= 0.95 * best), 1), seen


def best_threads(work: RewardWork, n: int = 8) -> int:
    """Sets, and returns, the threads of a forward pass on the CPU: doubled as long as n pictures gain a tenth."""
    torch = sys.modules.get("torch")
    if torch is None:
        return 1
    most, chosen, fastest, threads = torch.get_num_threads(), 1, float("inf"), 1
    if most == 1:
        return 1
    while threads <= most:
        torch.set_num_threads(threads)
        seconds = timed(work, n)
        if seconds > 0.9 * fastest:
            break
        chosen, fastest, threads = threads, seconds, 2 * threads
    torch.set_num_threads(chosen)
    return chosen


def timed(work: RewardWork, n: int, times: int = 3) -> float:
    """Median seconds of a batch of n pictures of 512x512, after one that does not count."""
    picture = np.random.default_rng(0).integers(0, 256, (WARM_UP_SIDE, WARM_UP_SIDE, 3), dtype=np.uint8)
    items = [Item(picture, 'a photo of a sign that says "a"')] * n
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work.run(work.collate(items))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def pick_device(wish: str) -> str:
    """`auto` is cuda where torch is installed and sees one, else cpu; anything else is taken as it is."""
    if wish != "auto":
        return wish
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory_used(device: str) -> float:
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1.0 - float(free) / float(total)
