"""The replay buffer: never too many, nothing invented, nothing twice, the same by the same generator."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from services.fitting.replay import PastPair, Replay

pairs = st.lists(st.integers(0, 60).map(lambda n: PastPair(f"r{n}", None, f"g{n}", "a bag")), max_size=40)


def at(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 20), st.lists(pairs, max_size=5), st.integers(0, 99))
def test_what_is_added_is_there_as_far_as_there_is_room(size: int, rounds: list[list[PastPair]], seed: int) -> None:
    held = Replay(size)
    for new in rounds:
        before, held = held, held.with_added(new, at(seed))
        assert len(held) <= size
        assert len(set(held.pairs)) == len(held)
        assert set(held.pairs) <= set(before.pairs) | set(new)
        assert len(held) == min(size, len(set(before.pairs) | set(new)))
        fresh = set(new) - set(before.pairs)
        assert len(fresh & set(held.pairs)) == min(size, len(fresh)), "what is new is all in, as far as it fits"


@given(pairs, pairs, st.integers(0, 9), st.integers(0, 50))
def test_the_same_generator_gives_the_same(first: list[PastPair], second: list[PastPair], seed: int, n: int) -> None:
    one, other = (Replay(10, first).with_added(second, at(seed)) for _ in range(2))
    assert one.pairs == other.pairs
    drawn = one.draw(n, at(seed))
    assert drawn == other.draw(n, at(seed)) and len(drawn) == min(n, len(one)) == len(set(drawn))
    assert set(drawn) <= set(one.pairs)


def test_adding_leaves_the_one_before_alone() -> None:
    before = Replay(2, [PastPair("r0", None, "g0", None)])
    before.with_added([PastPair(f"r{n}", None, f"g{n}", None) for n in range(5)], at(0))
    assert before.pairs == (PastPair("r0", None, "g0", None),)
