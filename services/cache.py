"""Nothing is scored twice: an LRU of scores, and callers who ask the same at once share one answer.

Keys are keyed blake3 hashes over length-prefixed records, so no picture can be made to collide with another's score. A key holds the
version of the weights, so a swap leaves nothing stale.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from blake3 import blake3

from services.reward import Item
from shared.schema import RewardInfo, Score

_SECRET = secrets.token_bytes(32)


def pixels_digest(item: Item) -> bytes:
    """32 bytes of a picture and its references: every one with its shape."""
    digest = blake3(key=_SECRET)
    for image in (item.image, *item.references):
        height, width, _ = image.shape
        digest.update(height.to_bytes(4, "little") + width.to_bytes(4, "little"))
        digest.update(image.data.cast("B"))
    return digest.digest()


def key_of(info: RewardInfo, item: Item, pixels: bytes) -> bytes:
    """What a score depends on: reward, version, weights, preprocessing, prompt, pixels."""
    digest = blake3(key=_SECRET)
    prompt = b"\0" if item.prompt is None else b"\1" + item.prompt.encode()
    for part in (
        info.name.encode(),
        str(info.version).encode(),
        (info.weights_sha256 or "").encode(),
        info.preprocessing.encode(),
        prompt,
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    digest.update(pixels)
    return digest.digest()


class Cache:
    """Up to `size` good scores of one reward; errors are never kept."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[bytes, Score] = OrderedDict()
        self._flying: dict[bytes, asyncio.Future[Score | None]] = {}

    async def through(self, keys: Sequence[bytes], ask: Callable[[list[int]], Awaitable[Sequence[Score]]]) -> list[Score]:
        """A score for each key; `ask` gets the indices that nobody has asked for. Its error is that of this call only: who waited
        for the same asks again."""
        out: dict[int, Score] = {}
        while len(out) < len(keys):
            mine: list[int] = []
            others: list[tuple[int, asyncio.Future[Score | None]]] = []
            for index, key in enumerate(keys):
                if index in out:
                    continue
                if (kept := self._kept.get(key)) is not None:
                    self._kept.move_to_end(key)
                    out[index] = kept.model_copy(update={"cached": True})
                elif (flying := self._flying.get(key)) is not None:
                    others.append((index, flying))
                else:
                    self._flying[key] = asyncio.get_running_loop().create_future()
                    mine.append(index)
            if mine:
                try:
                    for index, score in zip(mine, await ask(mine), strict=True):
                        out[index] = score
                        self._keep(keys[index], score)
                finally:
                    for index in mine:  # who waits for a question that got no answer asks for it itself
                        flying = self._flying.pop(keys[index])
                        flying.set_result(out.get(index))
            for index, flying in others:
                await asyncio.wait([flying])
                shared = flying.result()
                if shared is not None:
                    out[index] = shared.model_copy(update={"cached": True}) if shared.status == "ok" else shared
        return [out[index] for index in range(len(keys))]

    def _keep(self, key: bytes, score: Score) -> None:
        if score.status != "ok" or self.size == 0:
            return
        self._kept[key] = score
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
