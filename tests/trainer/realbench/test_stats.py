"""Known truths come out: coverage, rankings, areas, correlations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from shared.arena import matches
from shared.verdicts import consistent
from trainer.realbench.stats import (
    Resamples,
    auc,
    average_precision,
    bradley_terry,
    calibration_error,
    interval,
    reliability,
    spearman,
)


def coverage(n: int, simulations: int, rounds: int = 400) -> float:
    """How often the interval of a mean holds the truth; scores as detectors give them, near 0 or 1."""
    rng, hits = np.random.default_rng(n), 0
    for seed in range(simulations):
        figure = Resamples({"prompts": range(n)}, rounds, seed).mean(range(n), rng.beta(0.6, 1.2, n))
        hits += figure.low <= 1 / 3 <= figure.high
    return hits / simulations


def test_an_interval_covers_the_truth_at_its_rate() -> None:
    """Three standard errors of 600 simulations are 2.7 %; the slow twin looks closer."""
    assert abs(coverage(60, 600) - 0.95) < 0.03


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("n", [30, 100, 260])
def test_an_interval_covers_the_truth_within_two_percent(n: int) -> None:
    assert abs(coverage(n, 3000, 1000) - 0.95) < 0.02


def arena_coverage(mine: int, photographs: int, simulations: int, rounds: int) -> float:
    """How often the interval of the win rate of equals holds a half: 200 bouts of pictures that some of them are in several times."""
    hits = 0
    for seed in range(simulations):
        rng = np.random.default_rng(seed)
        looks = {name: rng.normal() for name in (*(f"/a{i}" for i in range(photographs)), *(f"/b{i}" for i in range(mine)))}
        sides = {side: sorted(name for name in looks if name.startswith(side)) for side in ("/a", "/b")}
        bouts = matches(sides["/a"], sides["/b"], min(200, max(mine, photographs)), seed)
        values = np.array([float(looks[a] + 0.5 * rng.normal() > looks[b]) for a, b in bouts])
        resamples = Resamples(sides, rounds, seed)
        figure = resamples.average(resamples.met(bouts), values, min(mine, photographs), share=True)
        hits += figure.low <= 0.5 <= figure.high
    return hits / simulations


def test_an_arena_of_few_pictures_covers_the_truth_at_its_rate() -> None:
    """Three standard errors of 200 simulations are 4.6 %; by the photographs alone 41 pictures had 80 %."""
    assert abs(arena_coverage(41, 200, 200, 200) - 0.95) < 0.046


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mine", [20, 41, 100, 260])
def test_an_arena_covers_the_truth_within_two_percent(mine: int) -> None:
    assert abs(arena_coverage(mine, 260, 2000, 500) - 0.95) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ratings_of_three_that_share_no_prompts_cover_the_truth_or_more() -> None:
    """Every picture meets two contestants: draws of both sides make intervals too wide."""
    hits = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        sides = {f"/{name}": [f"{name}{i}" for i in range(count)] for name, count in (("a", 120), ("b", 41), ("c", 60))}
        looks = {key: rng.normal() for keys in sides.values() for key in keys}
        pairs = [(a, b) for a in range(3) for b in range(a + 1, 3)]
        names = list(sides)
        bouts = [(a, b, *both) for a, b in pairs for both in matches(sides[names[a]], sides[names[b]], 120, seed)]
        values = np.array([float(looks[x] + 0.5 * rng.normal() > looks[y]) for *_, x, y in bouts])
        resamples = Resamples(sides, 300, seed)
        counts = resamples.met([(x, y) for *_, x, y in bouts])
        wins = np.zeros((301, 3, 3))
        for place, (a, b, *_) in enumerate(bouts):
            weight = np.append(1.0, counts[:, place])
            wins[:, a, b] += weight * values[place]
            wins[:, b, a] += weight * (1 - values[place])
        theta = bradley_terry(wins)
        figure = interval(float(theta[0, 1] - theta[0, 0]), theta[1:, 1] - theta[1:, 0], 41)
        hits += figure.low <= 0 <= figure.high
    assert hits / 300 > 0.93


def test_differences_are_taken_on_the_same_draws() -> None:
    """Contestants that differ by a constant on every prompt differ for sure, however far apart the prompts are."""
    rng, keys = np.random.default_rng(0), [f"p{i}" for i in range(80)]
    base = dict(zip(keys, rng.normal(0, 10, 80), strict=True))
    resamples = Resamples({"prompts": keys}, 500, 0)
    figure, paired = resamples.difference({k: v + 0.5 for k, v in base.items()}, base)
    assert paired and figure.value == pytest.approx(0.5) and figure.high - figure.low < 1e-6
    others = {f"q{k}": v for k, v in base.items()}
    both = Resamples({"prompts": keys, "/b": list(others)}, 500, 0)
    figure, paired = both.difference({k: v + 0.5 for k, v in base.items()}, others)
    assert not paired and figure.low < 0 < figure.high
    half = {k: v + (0.5 if i % 2 else np.nan) for i, (k, v) in enumerate(base.items())}
    assert resamples.difference(half, base)[0].n == 40


def test_a_share_of_all_or_nothing_keeps_a_width() -> None:
    resamples = Resamples({"prompts": range(30)}, 200, 0)
    figure = resamples.mean(range(30), np.ones(30), share=True)
    assert figure.value == figure.high == 1 and 0.85 < figure.low < 0.95
    figure = resamples.mean(range(30), np.zeros(30), share=True)
    assert figure.low == 0 and 0.05 < figure.high < 0.15
    assert not resamples.mean(range(30), np.full(30, np.nan)).known
    assert np.isnan(resamples.mean([0], np.array([0.4])).low)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=6, unique_by=lambda x: round(x, 1)),
    st.integers(0, 2**31),
    st.floats(0, 0.3),
)
def test_ratings_recover_a_known_ranking_from_noisy_judges(strength: list[float], seed: int, lean: float) -> None:
    """Judges that err by Bradley and Terry's own law, and lean to what is shown first: the order is that of the strengths, wherever they are
    more than three errors apart."""
    rng, count = np.random.default_rng(seed), len(strength)
    wins, games = np.zeros((count, count)), 600
    for i in range(count):
        for j in range(i + 1, count):
            p = 1 / (1 + np.exp(strength[j] - strength[i]))
            forward, backward = (rng.random(games) < np.clip(q + lean, 0, 1) for q in (p, 1 - p))
            verdicts = [consistent(float(f), float(b)) for f, b in zip(forward, backward, strict=True)]
            wins[i, j] = sum(v for v in verdicts if v is not None)
            wins[j, i] = games - wins[i, j]
    ratings = bradley_terry(wins)
    assert ratings.sum() == pytest.approx(0, abs=1e-6)
    for i in range(count):
        for j in range(count):
            if strength[i] - strength[j] > 0.3:
                assert ratings[i] > ratings[j]


def test_ratings_are_the_maximum_of_the_likelihood_and_stay_finite() -> None:
    truth = np.array([1.0, 0.2, -0.3, -0.9])
    p = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    wins = 1e6 * p * (1 - np.eye(4))
    assert bradley_terry(wins) == pytest.approx(truth, abs=1e-4)
    beaten = np.array([[0.0, 10.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    ratings = bradley_terry(beaten)
    assert np.isfinite(ratings[:2]).all() and ratings[0] > ratings[1] and np.isnan(ratings[2])
    assert bradley_terry(np.stack([wins, wins.T]))[1] == pytest.approx(-truth, abs=1e-4)


def test_a_judge_that_always_says_image_1_is_no_preference() -> None:
    assert consistent(1.0, 1.0) == 0.5
    wins = np.full((3, 3), 50.0) * (1 - np.eye(3))
    assert bradley_terry(wins) == pytest.approx([0, 0, 0], abs=1e-12)


def test_areas_agree_with_their_definitions() -> None:
    rng = np.random.default_rng(1)
    real, fake = np.round(rng.normal(0.4, 1, 70), 1), np.round(rng.normal(0, 1, 50), 1)
    value, draws = auc(real, fake, (np.ones((2, 70), np.float32), np.ones((2, 50), np.float32)))
    pairs = [(r > f) + 0.5 * (r == f) for r in real for f in fake]
    assert value == pytest.approx(np.mean(pairs), abs=1e-6) and draws == pytest.approx([value, value], abs=1e-6)
    scores, labels = np.concatenate([real, fake]), np.repeat([1.0, 0.0], [70, 50])
    hits, total = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        total += (labels[chosen].sum() - hits) * labels[chosen].mean()
        hits = labels[chosen].sum()
    assert average_precision(scores, labels)[0] == pytest.approx(total / 70)
    doubled = average_precision(np.repeat(scores, 2), np.repeat(labels, 2))[0]
    assert average_precision(scores, labels, np.full((1, 120), 2, np.float32))[0] == pytest.approx(doubled)


def test_calibration_of_an_honest_and_of_a_bold_detector() -> None:
    rng = np.random.default_rng(2)
    p = rng.random(40_000)
    labels = (rng.random(40_000) < p).astype(float)
    assert calibration_error(p, labels)[0] < 0.01
    assert calibration_error(np.where(p > 0.5, 0.99, 0.01), labels)[0] > 0.2
    assert all(abs(said - real) < 0.05 for said, real, _ in reliability(p, labels))


def test_rank_correlation_is_scipys() -> None:
    rng = np.random.default_rng(3)
    a = np.round(rng.normal(size=100), 1)
    b = a + rng.normal(size=100)
    value, draws = spearman(a, b, np.ones((1, 100), np.float32))
    assert value == pytest.approx(scipy_stats.spearmanr(a, b).statistic) and draws[0] == pytest.approx(value)
    assert np.isnan(spearman(np.ones(100), b, np.ones((1, 100), np.float32))[0])


def test_centring_moves_draws_onto_the_value() -> None:
    draws = np.random.default_rng(4).normal(5, 1, 4000)
    figure = interval(3.0, draws, 100, centred=True)
    assert figure.low == pytest.approx(3 - 1.98, abs=0.15) and figure.high == pytest.approx(3 + 1.98, abs=0.15)
