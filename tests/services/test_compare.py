"""Plans, win rates and standard errors: what holds for every group, whatever the verdicts."""

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.compare import Tournament, both_orders, win_rates
from shared.schema import Plan, pairs_of, swiss_rounds

P = st.floats(0, 1)


@st.composite
def matrices(draw: st.DrawFn) -> NDArray[np.float64]:
    """p_NN with p_NN[j, i] = 1 - p_NN[i, j], some pairs missing."""
    n = draw(st.integers(2, 8))
    p_NN = np.full((n, n), np.nan)
    for i in range(n):
        for j in range(i):
            if (p := draw(st.none() | P)) is not None:
                p_NN[i, j], p_NN[j, i] = p, 1 - p
    return p_NN


def played(n: int, plan: Plan, anchors: list[int], rounds: int | None, strength: list[float]) -> list[list[tuple[int, int]]]:
    tournament, out = Tournament(n, plan, anchors, rounds), []
    while pairs := tournament.next():
        out.append(pairs)
        for i, j in pairs:
            tournament.record((i, j), None if strength[i] < 0 else 1 / (1 + math.exp(strength[j] - strength[i])))
    return out


@settings(deadline=None)
@given(st.integers(2, 40), st.sampled_from(["all", "anchor", "swiss"]), st.data())
def test_every_plan_keeps_its_number_of_pairs_and_asks_none_twice(n: int, plan: Plan, data: st.DataObject) -> None:
    anchors = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=n)) if plan == "anchor" else []
    rounds = data.draw(st.none() | st.integers(1, 64)) if plan == "swiss" else None
    strength = data.draw(st.lists(st.floats(-1, 5), min_size=n, max_size=n))
    made = played(n, plan, anchors, rounds, strength)
    flat = [pair for one in made for pair in one]
    assert len(flat) == len(set(flat)) == pairs_of(n, plan, len(anchors), rounds)
    assert all(0 <= i < j < n for i, j in flat)
    if plan == "anchor":
        assert all(set(pair) & set(anchors or [0]) for pair in flat)
    if plan == "swiss":
        assert len(made) == swiss_rounds(n, rounds)
        for one in made:  # everyone plays once in a round, but for one where they are odd
            assert len({i for pair in one for i in pair}) == 2 * (n // 2)


def test_numbers_of_pairs() -> None:
    assert pairs_of(24, "all") == 276 and pairs_of(24, "anchor") == 23 and pairs_of(24, "anchor", 2) == 45
    assert pairs_of(24, "swiss") == 60 and pairs_of(2, "swiss") == 1 and pairs_of(256, "all") == 32_640


def test_swiss_pairs_equals_and_finds_the_order() -> None:
    strength = [float(x) for x in np.random.default_rng(0).permutation(16)]
    tournament, gaps = Tournament(16, "swiss", rounds=8), []
    while pairs := tournament.next():
        gaps.append(np.mean([abs(strength[i] - strength[j]) for i, j in pairs]))
        for i, j in pairs:
            tournament.record((i, j), float(strength[i] > strength[j]))
    assert gaps[3] < gaps[0]
    order = np.argsort(win_rates(tournament.p_NN).rate_N)
    assert strength[order[-1]] == 15 and strength[order[0]] == 0
    assert np.corrcoef(win_rates(tournament.p_NN).rate_N, strength)[0, 1] > 0.9


@given(matrices(), st.booleans())
def test_rates_are_means_and_add_up(p_NN: NDArray[np.float64], hard: bool) -> None:
    rates = win_rates(p_NN, hard)
    assert (rates.known_N == np.isfinite(p_NN).sum(1)).all()
    there = rates.known_N > 0
    assert (np.isfinite(rates.rate_N) == there).all() and (np.isfinite(rates.error_N) == there).all()
    assert ((rates.rate_N[there] >= 0) & (rates.rate_N[there] <= 1) & (rates.error_N[there] > 0)).all()
    points = np.nansum(np.where(there, rates.rate_N, 0) * rates.known_N)
    assert points == pytest.approx(np.isfinite(p_NN).sum() / 2), "each pair shares out one point"


@given(matrices(), st.randoms(use_true_random=False))
def test_the_order_of_the_pictures_does_not_matter(p_NN: NDArray[np.float64], random: Random) -> None:
    order = list(range(len(p_NN)))
    random.shuffle(order)
    shuffled, rates = win_rates(p_NN[np.ix_(order, order)]), win_rates(p_NN)
    np.testing.assert_allclose(shuffled.rate_N, rates.rate_N[order])
    np.testing.assert_allclose(shuffled.error_N, rates.error_N[order])


@given(matrices())
def test_a_missing_verdict_is_not_a_tie(p_NN: NDArray[np.float64]) -> None:
    filled = np.where(np.isnan(p_NN) & ~np.eye(len(p_NN), dtype=bool), 0.5, p_NN)
    for i, (rate, other) in enumerate(zip(win_rates(p_NN).rate_N, win_rates(filled).rate_N, strict=True)):
        missing = np.isnan(p_NN[i]).sum() - 1
        if missing and np.isfinite(rate) and abs(rate - 0.5) > 1e-6:
            assert abs(other - 0.5) < abs(rate - 0.5), "ties pull to the middle, missing verdicts do not"


@given(P, P)
def test_both_orders_cancel_what_leans_to_a_place(p: float, q: float) -> None:
    value, back = both_orders(p, q), both_orders(q, p)
    assert value is not None and back is not None and value + back == pytest.approx(1)
    assert both_orders(p, p) == pytest.approx(0.5), "who says the first, whatever it is, says nothing"
    assert both_orders(None, p) is both_orders(p, None) is None


def test_pref_grpo_counts_wins_and_half_ties() -> None:
    p_NN = np.array([[np.nan, 0.9, 0.5, 0.51], [0.1, np.nan, 0.4, 0.7], [0.5, 0.6, np.nan, 0.2], [0.49, 0.3, 0.8, np.nan]])
    assert win_rates(p_NN, hard=True).rate_N.tolist() == pytest.approx([2.5 / 3, 1 / 3, 1.5 / 3, 1 / 3])


def test_the_standard_error_covers_the_spread_of_repeated_tournaments() -> None:
    rng = np.random.default_rng(0)
    for p in (0.5, 0.8, 0.95):
        for m in (5, 23):
            p_NN = np.full((1, m), 0.0)
            spread, said = [], []
            for _ in range(2000):
                p_NN[0] = rng.random(m) < p
                rates = win_rates(p_NN)
                spread.append(rates.rate_N[0])
                said.append(rates.error_N[0])
            assert np.std(spread) == pytest.approx(np.mean(said), rel=0.35)
