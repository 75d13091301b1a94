"""One refit: what is learned from and what is not, when it ends, what is kept out, and the same numbers each time."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.fitting.options import FitOptions
from services.fitting.refit import (
    Example,
    Pairs,
    Progress,
    Refitted,
    Stopped,
    generator_of,
    pairs_of,
    put,
    refit,
    restore,
    saved,
    split,
    taken,
    warnings_of,
)
from services.fitting.replay import PastPair, Replay
from services.fitting.store import Damaged, State
from services.reward import Item
from tests.services.fitting.linear import Linear, LinearFitter, pictures

OPTIONS: dict[str, Any] = {"optim": {"lr": 0.05}, "ema": 0.5, "augment": None, "batch": 8, "rounds": 4, "until_accuracy": 1.0}


def examples(images: Sequence[np.ndarray], prompt: str | None = None, groups: Sequence[str] | None = None) -> list[Example]:
    return [Example.of(Item(image, prompt), groups[i] if groups else None) for i, image in enumerate(images)]


def fitter(**head: Any) -> LinearFitter:
    return Linear.load("linear", {}, "cpu").fitter(head)


def begun(one: LinearFitter) -> State:
    weights = taken(one.trainable())
    return State(1, weights, weights, Replay(100))


def parts(seed: int = 0, n: int = 40, mean: float = 135) -> tuple[Pairs, Pairs]:
    return split(examples(pictures(n, 120, seed)), examples(pictures(n, mean, seed + 1)), 0.25)


Pictures = dict[str, np.ndarray]


def run(one: LinearFitter, before: State, both: tuple[Pairs, Pairs], held: Pictures | None = None, **changes: Any) -> Refitted:
    options = FitOptions.model_validate({**OPTIONS, **changes})
    known = held or {}

    def past(pair: PastPair) -> tuple[Item, Item]:
        if pair.real not in known or pair.generated not in known:
            raise Damaged("gone")
        return Item(known[pair.real]), Item(known[pair.generated])

    return refit(one, before, before.version + 1, *both, options, augment=lambda items, generator: list(items), past=past)


def test_it_learns_and_says_how_well() -> None:
    one, both = fitter(), parts()
    steps: list[Progress] = []
    options = FitOptions.model_validate(OPTIONS)
    done = refit(
        one, begun(one), 2, *both, options, augment=lambda items, _: list(items), past=lambda _: 1 / 0, after_step=steps.append
    )
    assert done.outcome == "ready" and done.state is not None and done.reason is None
    assert done.accuracy_before == 0.0 and done.accuracy is not None and done.accuracy > 0.8
    assert done.state.steps == len(steps) == steps[-1].steps and done.state.accuracy == done.accuracy
    assert {"total", "entropy", "accuracy"} <= set(done.losses)
    assert [step.round for step in steps] == sorted(step.round for step in steps)
    assert len(done.state.replay) == len(both[0]), "what was learned from is replayed later"
    reward = one.reward(done.state.weights, 2)
    told = dict(zip(done.evaluated, reward.score(done.items), strict=True))
    assert 8 <= len(told) <= 16
    for key, score in told.items():
        assert score.value == pytest.approx(done.evaluated[key], abs=1e-5)


def test_the_same_seed_and_version_give_the_same_numbers() -> None:
    def twice(seed: int) -> Refitted:
        one = fitter()
        return run(one, begun(one), parts(), seed=seed)

    first, again, other = twice(0), twice(0), twice(1)
    assert first.state is not None and again.state is not None and other.state is not None
    for part in ("weights", "raw", "optim"):
        for name, value in getattr(first.state, part).items():
            assert torch.equal(value, getattr(again.state, part)[name])
    assert first.losses == again.losses and first.evaluated == again.evaluated
    assert first.state.replay.pairs == again.state.replay.pairs
    assert not torch.equal(first.state.raw["weight"], other.state.raw["weight"])


def test_going_on_from_a_state_is_as_if_nothing_had_come_between() -> None:
    """Trained values, average, optimiser and replay buffer are all there is: a fresh fitter goes on with the same numbers."""
    both = [parts(10 * n) for n in range(3)]
    held = {example.key: example.item.image for pair in both for pairs in pair for two in pairs for example in two}
    one = fitter()
    whole = begun(one)
    for pair in both:
        done = run(one, whole, pair, held)
        assert done.state is not None
        whole = done.state
    again = begun(fitter())
    for pair in both:
        done = run(fitter(), again, pair, held)
        assert done.state is not None
        again = done.state
    assert whole.steps == again.steps and whole.replay.pairs == again.replay.pairs
    for part in ("weights", "raw", "optim"):
        for name, value in getattr(whole, part).items():
            assert torch.equal(value, getattr(again, part)[name]), (part, name)


class Spy(LinearFitter):
    """Writes down what it learns from."""

    def __init__(self) -> None:
        base = fitter()
        super().__init__(base.base, base.head)
        self.seen: list[tuple[int, set[int]]] = []

    def losses(self, real: Sequence[Item], generated: Sequence[Item], generator: torch.Generator) -> dict[str, torch.Tensor]:
        self.seen.append((len(real), {id(item.image) for item in (*real, *generated)}))
        return super().losses(real, generated, generator)


def test_a_step_is_half_new_and_half_replayed_and_nothing_held_out() -> None:
    spy = Spy()
    first, second = ((learned[:24], proof) for learned, proof in (parts(0), parts(50)))  # no picture twice
    held = {example.key: example.item.image for two in first[0] for example in two}
    done = run(spy, begun(spy), first, held)
    assert done.state is not None
    spy.seen.clear()
    run(spy, done.state, second, held, rounds=2)
    new = {id(example.item.image) for two in second[0] for example in two}
    old, out = {id(image) for image in held.values()}, {id(example.item.image) for two in second[1] for example in two}
    for size, seen in spy.seen:
        assert len(seen & new) == size == len(seen & old), "as many replayed pairs as new ones, of two pictures each"
        assert not seen & out
    assert set.union(*(seen for _, seen in spy.seen)) & new == new, "a round sees every picture"


def test_replayed_pictures_that_are_gone_are_left_out() -> None:
    one = fitter()
    first = run(one, begun(one), parts(0))
    assert first.state is not None and len(first.state.replay) > 20
    done = run(one, first.state, parts(50), {})
    assert done.outcome == "ready" and done.state is not None
    stale = set(done.state.replay.pairs) & set(first.state.replay.pairs)
    assert len(stale) < len(first.state.replay) / 2, "whichever was drawn has left"


def test_it_stops_at_the_accuracy_or_after_the_steps() -> None:
    one = fitter()
    easy = parts(0, mean=220)
    done = run(one, begun(one), easy, until_accuracy=0.9, rounds=50)
    assert done.round < 10 and done.losses["accuracy"] >= 0.9
    assert done.state is not None
    few = run(fitter(), begun(one), parts(), steps=3)
    assert few.state is not None and few.state.steps == 3


def test_what_diverges_is_kept_out() -> None:
    one = fitter(explode=3)
    done = run(one, begun(one), parts())
    assert done.outcome == "kept_out" and done.state is None
    assert done.reason is not None and "not a finite number after 3 steps" in done.reason and "optim.lr (0.05)" in done.reason
    wild = fitter()
    done = run(wild, begun(wild), parts(), optim={"lr": 1e30}, rounds=10)
    assert done.outcome == "kept_out" and done.state is None


def test_what_is_worse_than_what_is_served_is_kept_out() -> None:
    good = fitter()
    first = run(good, begun(good), parts(0, mean=180), rounds=20)
    assert first.state is not None and first.accuracy is not None and first.accuracy > 0.9
    done = run(fitter(backwards=True), first.state, parts(60, mean=180), replay={"size": 0}, rounds=20)
    assert done.outcome == "kept_out" and done.state is None and done.accuracy is not None and done.accuracy < 0.5
    assert done.reason is not None and "did not learn from" in done.reason
    allowed = run(
        fitter(backwards=True), first.state, parts(60, mean=180), replay={"size": 0}, rounds=1, steps=1, worse=0.5, ema=0.99
    )
    assert allowed.outcome == "ready"


def test_it_can_be_stopped() -> None:
    one, calls = fitter(), []

    def rest() -> None:
        calls.append(1)
        if len(calls) > 4:
            raise Stopped

    options = FitOptions.model_validate(OPTIONS)
    with pytest.raises(Stopped):
        refit(one, begun(one), 2, *parts(), options, augment=lambda items, _: list(items), past=lambda _: 1 / 0, rest=rest)


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 30), st.integers(4, 30), st.integers(0, 4), st.integers(0, 6), st.floats(0.05, 0.5))
def test_a_split_is_of_everything_and_stable(n: int, m: int, seed: int, groups: int, share: float) -> None:
    def side(count: int, name: int) -> list[Example]:
        chance = np.random.default_rng([seed, name])
        images = chance.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        return examples(list(images), None, [str(chance.integers(groups)) for _ in images] if groups > 3 else None)

    real, made = side(n, 0), side(m, 1)
    learned, proof = split(real, made, share)
    for index, some in enumerate((real, made)):
        inside, outside = ({pair[index].key for pair in pairs} for pairs in (learned, proof))
        assert not inside & outside and inside | outside <= {one.key for one in some}
        if index or groups <= 3:  # of the real pictures in a group some are left out
            assert inside | outside == {one.key for one in some}
        assert len(outside) >= 2 and inside
    again = split(list(reversed(real)), list(reversed(made)), share)
    for index in (0, 1):
        assert {pair[index].key for pair in proof} == {pair[index].key for pair in again[1]}
    if groups > 3 and all(one.group == other.group is not None for one, other in learned):
        assert {one.group for one, _ in learned}.isdisjoint({one.group for one, _ in proof})


def test_a_picture_stays_on_its_side_whoever_comes_with_it() -> None:
    images = pictures(120, 120, 0)
    some = {one.key: one.fraction < 0.2 for one in examples(images)}
    assert 10 < sum(some.values()) < 40
    for begin in (0, 20, 40):
        _, proof = split(examples(images[begin : begin + 80]), examples(pictures(80, 140, begin)), 0.2)
        assert all(some[real.key] for real, _ in proof)
        assert len({real.key for real, _ in proof}) == sum(some[one.key] for one in examples(images[begin : begin + 80]))


def test_no_real_picture_that_proves_a_version_is_ever_learned_from_whatever_group_it_comes_in() -> None:
    """As a trainer sends them: at each step other references, in groups of their own, with other prompts."""
    pool, chance = pictures(300, 120, 0, side=16), np.random.default_rng(0)
    learned_from, proved_on = set[str](), set[str]()
    for step in range(12):
        prompts, real = [f"{step}/{n // 8}" for n in range(128)], [pool[n] for n in chance.permutation(300)[:128]]
        made = pictures(128, 140, 1000 + step, side=16)
        both = ([Example.of(Item(one, text), text) for one, text in zip(some, prompts, strict=True)] for some in (real, made))
        learned, proof = split(*both, 0.2)
        learned_from |= {one.key for one, _ in learned}
        proved_on |= {one.key for one, _ in proof}
        assert len({one.key for one, _ in learned}) >= 60 and len({one.key for one, _ in proof}) >= 2
        assert all(one.group == other.group for one, other in [*learned, *proof])
        assert {other.key for _, other in [*learned, *proof]} == {Example.of(Item(one)).key for one in made}
    assert len(proved_on) > 30 and len(learned_from) > 200 and not learned_from & proved_on


def test_what_is_held_out_is_not_replayed() -> None:
    both = parts()
    out = {id(one.item.image) for pair in both[1] for one in pair}
    held = {one.key: one.item.image for pairs in both for pair in pairs for one in pair}
    pairs = [PastPair(a.key, None, b.key, None) for part in both for a, b in part]
    spy = Spy()
    before = begun(spy)
    done = run(spy, State(1, before.weights, before.raw, Replay(100, pairs)), both, held)
    assert done.state is not None and set(pairs) <= set(done.state.replay.pairs), "they may be again by a later version"
    assert not any(out & seen for _, seen in spy.seen)


def test_many_pictures_are_split_in_no_time() -> None:
    """Whoever else asks of the reward waits meanwhile."""
    item = Item(pictures(1, 120, 0)[0])
    both = ([Example(item, f"{side}{n:063x}-28x28") for n in range(10_000)] for side in (0, 1))
    began = time.process_time()
    learned, proof = split(*both, 0.2)
    assert len(learned) > 7500 and len(proof) > 1900 and time.process_time() - began < 5


def test_large_groups_are_held_out_no_oftener_than_single_pictures() -> None:
    names = [str(n // 8) for n in range(320)]
    learned, proof = split(examples(pictures(320, 120, 0), "a bag", names), examples(pictures(320, 140, 1), "a bag", names), 0.2)
    out = {one.group for one, _ in proof}
    assert 3 <= len(out) <= 16 and len(out) + len({one.group for one, _ in learned}) == 40
    few, proof = split(
        examples(pictures(32, 120, 0), "a bag", names[:32]), examples(pictures(32, 140, 1), "a bag", names[:32]), 0.2
    )
    assert len({one.group for one, _ in proof}) <= 2 and len(few) >= 16


def test_pairs_are_of_one_group_else_of_one_prompt() -> None:
    real = [*examples(pictures(2, 100, 0), "a bag", ["a", "b"]), *examples(pictures(2, 100, 1), "a shirt")]
    made = [*examples(pictures(3, 140, 2), "a bag", ["b", "a", "b"]), *examples(pictures(1, 140, 3), "a shirt")]
    pairs = pairs_of(real, made)
    assert {id(one) for pair in pairs for one in pair} == {id(one) for one in (*real, *made)}
    for one, other in pairs:
        assert one.item.prompt == other.item.prompt
        assert one.group == other.group


def test_what_a_reward_could_learn_instead_is_said() -> None:
    small, large = examples(pictures(9, 120, 0)), examples(pictures(9, 130, 1, side=32))
    (said,) = warnings_of(small, large)
    assert "all real pictures are 28x28, but 9 of 9 generated ones are not" in said and "resampler" in said
    (said,) = warnings_of([*small, *large], examples(pictures(4, 1, 1)))
    assert said.startswith("all generated pictures are 28x28")
    assert warnings_of([*small, *large], [*examples(pictures(5, 140, 3)), *examples(pictures(5, 140, 4, side=32))]) == []
    (said,) = warnings_of(small, [*small[:3], *examples(pictures(5, 140, 3))])
    assert said.startswith("3 pictures are on both sides")
    jpeg = [Example.of(one.item, lossy=True) for one in small]
    (said,) = warnings_of(jpeg, examples(pictures(5, 140, 3)))
    assert "JPEG" in said
    assert warnings_of([], []) == []


def test_an_optimisers_state_is_put_back_whole() -> None:
    for kind in (torch.optim.AdamW, torch.optim.Adam):
        leaves = {name: torch.randn(4, generator=generator_of(0, 1)).requires_grad_() for name in ("a.b", "c")}
        steps = kind(list(leaves.values()), lr=0.1)

        def step(leaves: dict[str, torch.Tensor] = leaves, steps: torch.optim.Optimizer = steps) -> None:
            steps.zero_grad()
            sum((leaf - 3).square().sum() for leaf in leaves.values()).backward()
            steps.step()

        step()
        held, kept = saved(steps, leaves), taken(leaves)
        step()
        after = taken(leaves)
        fresh = {name: torch.zeros(4, requires_grad=True) for name in leaves}
        put(fresh, kept)
        other = kind(list(fresh.values()), lr=0.1)
        restore(other, fresh, {**held, "gone/exp_avg": torch.zeros(4), "c/odd": torch.zeros(9)})
        step(fresh, other)
        for name, value in after.items():
            assert torch.equal(value, fresh[name])
