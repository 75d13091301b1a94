"""Past pairs of a real and a generated picture, by the hashes of their pixels: what a refit learns from again."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class PastPair(NamedTuple):
    """Keys as `services.fitting.store.key_of` makes them."""

    real: str
    real_prompt: str | None
    generated: str
    generated_prompt: str | None


class Replay:
    """At most `size` different pairs. It never changes: a refit that is kept out leaves the one before as it was."""

    def __init__(self, size: int, pairs: Sequence[PastPair] = ()) -> None:
        self.size = size
        self.pairs = tuple(dict.fromkeys(pairs))[-size:] if size else ()

    def __len__(self) -> int:
        return len(self.pairs)

    def draw(self, n: int, generator: torch.Generator) -> list[PastPair]:
        """n of them, none twice; all of them, in another order, where there are fewer."""
        return [self.pairs[int(i)] for i in torch.randperm(len(self), generator=generator)[:n]]

    def with_added(self, pairs: Sequence[PastPair], generator: torch.Generator) -> "Replay":
        """Once it is full each new pair takes the place of a random old one, so that what is old grows rare, not absent."""
        held, known = list(self.pairs), set(self.pairs)
        fresh = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        fresh = [fresh[int(i)] for i in torch.randperm(len(fresh), generator=generator)[: self.size]]
        room = self.size - len(held)
        held += fresh[:room]
        for pair, place in zip(fresh[room:], torch.randperm(len(held) - len(fresh[:room]), generator=generator), strict=False):
            held[int(place)] = pair
        return Replay(self.size, held)
