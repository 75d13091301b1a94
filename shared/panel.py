"""Many pictures before reward services: some requests always under way, answers as they come, in order.

>>> with Panel({"detector": "http://localhost:8001"}) as panel:
...     for rows, table in panel.told(["detector"], looks): ...
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shared.client import RewardClientSync, ScoreTable
from shared.schema import RewardInfo

BATCH, AHEAD, PIXELS = 64, 4, 12_000_000  # pictures of a request, requests under way, pixels of a request
Look = Callable[[], tuple[NDArray[np.uint8], str | None]]  # a picture (H, W, 3) and its prompt, read when its turn has come


class Panel:
    """Rewards by name, at URLs. VerismError, with what to mend, for one that cannot be asked."""

    def __init__(self, urls: Mapping[str, str], timeout_s: float = 120.0) -> None:
        self._client = RewardClientSync(urls, timeout_s=timeout_s, priority="bulk")
        try:
            self.infos: dict[str, RewardInfo] = self._client.info()
        except BaseException:
            self._client.close()
            raise

    def told(self, rewards: Sequence[str], looks: Sequence[Look]) -> Iterator[tuple[range, ScoreTable]]:
        """Positions of some of `looks` and their scores, in order; the client has tried what failed until its deadline."""
        under_way: deque[tuple[range, Future[ScoreTable]]] = deque()
        first, pixels, images, prompts = 0, 0, list[NDArray[np.uint8]](), list[str | None]()
        for place, look in enumerate(looks):
            image, prompt = look()
            images.append(image)
            prompts.append(prompt)
            pixels += image.shape[0] * image.shape[1]
            if len(images) < BATCH and pixels < PIXELS and place + 1 < len(looks):
                continue
            under_way.append((range(first, place + 1), self._client.submit(images, prompts, None, rewards)))
            first, pixels, images, prompts = place + 1, 0, [], []
            if len(under_way) >= AHEAD:
                rows, future = under_way.popleft()
                yield rows, future.result()
        while under_way:
            rows, future = under_way.popleft()
            yield rows, future.result()

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
