"""What a search costs is known before it begins, and it never costs more."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import ConfigError
from trainer.rewrite.budget import Costs, Ledger, OverBudget, Plan, Stage, Way, planned, stages
from trainer.rewrite.prune import ranks, survivors


@st.composite
def ways(draw: st.DrawFn) -> Way:
    steps = draw(st.integers(2, 30))
    passes_T = tuple(draw(st.lists(st.sampled_from([1, 2]), min_size=steps, max_size=steps)))
    places = sorted(draw(st.sets(st.integers(1, steps - 1), max_size=4)))
    return Way(draw(st.integers(1, 8)), passes_T, tuple(Stage(place, draw(st.floats(0.05, 1.0))) for place in places))


costs = st.builds(Costs, token=st.floats(0, 3), look=st.floats(0, 3))


def carry_out(ledger: Ledger, way: Way, alive: int) -> None:
    """The painting of a search as `search.py` does it, without models."""
    own, looks = way.whole(1)
    ledger.spend(passes=own, looks=looks)
    done = 0
    if not alive:
        return
    for stage in way.stages:
        for step in range(done, stage.after):
            ledger.spend(passes=alive * way.pictures * way.passes_T[step])
        done = stage.after
        if stage.left(alive) < alive:
            ledger.spend(looks=alive * way.pictures)
        alive = stage.left(alive)
    for step in range(done, len(way.passes_T)):
        ledger.spend(passes=alive * way.pictures * way.passes_T[step])
    ledger.spend(looks=alive * way.pictures)


@settings(max_examples=400, deadline=None)
@given(st.data(), ways(), costs, st.floats(0, 3000), st.integers(0, 24), st.integers(1, 96))
def test_no_search_spends_what_is_not_there(
    data: st.DataObject, way: Way, prices: Costs, limit: float, wanted: int, most: int
) -> None:
    ledger, kept, drawn = Ledger(prices, limit), 0, 0
    try:
        plan = planned(ledger, wanted, most, way)
    except ConfigError as error:
        passes, looks = way.whole(1)
        assert passes + looks * prices.look > limit - 1e-6 and "--budget" in str(error)
        return
    while True:
        assert 0 <= plan.rewrites <= wanted - drawn and plan.cost(prices) <= ledger.left + 1e-6
        if plan.rewrites < wanted - drawn:  # one more would not have fitted
            passes, looks = way.painting(kept + plan.rewrites + 1)
            own, own_looks = way.whole(1)
            assert Plan(0, (plan.rewrites + 1) * most, own + passes, own_looks + looks).cost(prices) > ledger.left - 1e-6
        if not plan.rewrites:
            break
        ledger.spend(tokens=sum(data.draw(st.lists(st.integers(1, most), min_size=plan.rewrites, max_size=plan.rewrites))))
        drawn, kept = drawn + plan.rewrites, kept + data.draw(st.integers(0, plan.rewrites))
        plan = planned(ledger, wanted - drawn, most, way, have=kept)
    carry_out(ledger, way, kept)
    assert ledger.spent <= limit + 1e-6 * max(1.0, limit)


@given(ways(), st.integers(0, 24))
def test_a_plan_without_a_limit_is_what_is_done(way: Way, rewrites: int) -> None:
    ledger = Ledger()
    plan = planned(ledger, rewrites, 7, way)
    ledger.spend(tokens=7 * rewrites)
    carry_out(ledger, way, rewrites)
    assert (plan.rewrites, plan.tokens, plan.passes, plan.looks) == (rewrites, ledger.tokens, ledger.passes, ledger.looks)
    assert ledger.left == math.inf


def test_pruning_buys_rewrites() -> None:
    plain = planned(Ledger(Costs(token=0), 200), 64, 40, Way(1, (1,) * 20))
    pruned = planned(Ledger(Costs(token=0), 200), 64, 40, Way(1, (1,) * 20, stages("ttsnap", 20)))
    assert plain.rewrites == 9 and pruned.rewrites > 2 * plain.rewrites


def test_the_published_schedule_costs_what_ttsnap_says() -> None:
    """Of 20 steps S = 2, 6, 11, shares .4, .4, .5, each multiplying the ones before: cost per candidate in passes and looks."""
    n, (passes, looks) = 250, Way(1, (1,) * 20, stages("ttsnap", 20)).painting(250)
    assert passes == n * 2 + n * 0.4 * 4 + n * 0.16 * 5 + n * 0.08 * 9
    assert looks == n * (1 + 0.4 + 0.16 + 0.08)


def test_a_ledger_refuses_before_anything_is_done() -> None:
    ledger = Ledger(Costs(token=0.5, look=2), 10)
    ledger.spend(tokens=4, passes=5, looks=1)
    assert (ledger.spent, ledger.left) == (9, 1) and ledger.allows(passes=1) and not ledger.allows(looks=1)
    with pytest.raises(OverBudget, match="are more than the 1 that are left"):
        ledger.spend(tokens=3)
    assert ledger.tokens == 4


def test_too_small_a_budget_says_what_is_needed() -> None:
    with pytest.raises(
        ConfigError, match=r"4 pictures of your own prompt alone take 40, with one rewrite 144; raise --budget, or lower"
    ):
        planned(Ledger(limit=39), 8, 64, Way(4, (1,) * 10))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2", "write AFTER:SHARE"),
        ("a:0.5", "write AFTER:SHARE"),
        ("0:0.5", "in order"),
        ("5:0.5,3:0.5", "in order"),
        ("10:0.5", "in order"),
    ],
)
def test_stages_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Way(1, (1,) * 10, stages(text, 10))


def test_stages() -> None:
    assert stages("2:0.5,5:0.25", 10) == (Stage(2, 0.5), Stage(5, 0.25))
    assert [stage.after for stage in stages("ttsnap", 20)] == [2, 6, 11] and [s.after for s in stages("auto", 10)] == [7]
    assert stages("ttsnap", 2) == (Stage(1, pytest.approx(0.08)),) and stages("auto", 1) == ()
    with pytest.raises(ConfigError, match="share above 0"):
        Way(1, (1,) * 10, (Stage(2, 1.5),))


def test_ranks_share_ties_and_put_what_is_missing_last() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, np.nan, 2.0])).tolist() == [3.5, 1.0, 3.5, 0.0, 2.0]


def test_survivors_are_the_best_by_their_ranks() -> None:
    values = np.array([[0.9, 0.1, 0.5, np.nan], [0.2, 0.1, 0.9, 5.0]])
    assert survivors(values, [1, 0], 2) == [0, 2]
    assert survivors(values, [0, 1], 2) == [2, 3]
    assert survivors(values, [1, 1], 2) == [0, 2]
    assert survivors(np.full((1, 3), np.nan), [1], 1) == [0]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.data())
def test_as_many_survive_as_shall(values: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(values)))
    kept = survivors(np.array([values]), [1.0], keep)
    assert len(kept) == keep and kept == sorted(kept)
    assert min(values[i] for i in kept) >= max([v for i, v in enumerate(values) if i not in kept], default=-9)
