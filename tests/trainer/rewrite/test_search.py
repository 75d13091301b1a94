"""Best of N and refining, with a tiny language model, a tiny image policy (both of random weights) and a service over HTTP."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trainer import tiny as tiny_image
from tests.trainer.language import tiny as tiny_language
from tests.trainer.rewrite.critic import Critic, serve
from trainer.config import ConfigError, EvalConfig, RewardConfig, SamplingConfig
from trainer.policies.sd3 import SD3Policy
from trainer.rewrite.budget import Costs, Ledger, Stage, Way
from trainer.rewrite.judging import Estimate, Judges, parse_rewards, scale_of, totals
from trainer.rewrite.painter import Painter
from trainer.rewrite.refine import proposals, refine
from trainer.rewrite.search import Candidate, Found, confirm, search, seeds_of, settle
from trainer.rewrite.writers import LocalWriter, Written, usable
from trainer.sampling.rollout import sample
from trainer.scoring import NoService
from trainer.types import Prompt

STEPS, MOST = 6, 10
BAG = "a photo of a bag"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> SD3Policy:
    return SD3Policy.load(tiny_image.write(tmp_path_factory.mktemp("image")), lora={"rank": 2, "alpha": 4})


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> LocalWriter:
    folder = tiny_language.write(tmp_path_factory.mktemp("language"))
    return LocalWriter(tiny_language.policy(folder, instruction="rewrite the prompt"), "tiny", MOST)


@pytest.fixture
def critic() -> Iterator[Critic]:
    with serve() as service:
        yield service


def painter(policy: SD3Policy, ledger: Ledger | None = None, micro_batch: int = 5, **more: Any) -> Painter:
    size = SamplingConfig(steps=4, window=2, window_last=3, height=16, width=16, micro_batch=micro_batch)
    return Painter(policy, size, EvalConfig(steps=STEPS, **more), ledger or Ledger())


def judges(service: Critic, *names: str, **more: Any) -> Judges:
    return Judges({name: RewardConfig(url=service.url) for name in names or ("brightness", "alignment")}, **more)


class Says:
    """A writer that says what a test wants; the tokens count as words."""

    name, most = "the test", 12

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def write(self, prompt: str, n: int, seed: int, temperature: float, first: int = 0) -> list[Written]:
        return [Written(text, text, len(text.split()), -1.0, True, None) for text in self.texts[first : first + n]]


RED = ("a small red bag", "a large blue boot", "a red dress", "a coat")


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_pictures_are_those_of_the_sampler(policy: SD3Policy, guidance: float) -> None:
    prompts, seeds = [BAG, "red boot", "a coat"], [3, 4, 5]
    ledger = Ledger()
    mine = painter(policy, ledger, micro_batch=2, guidance=guidance)
    canvas = mine.advance(mine.begin(prompts, seeds), STEPS)
    theirs = sample(
        policy,
        [Prompt(i, text) for i, text in enumerate(prompts)],
        seeds,
        sigmas=mine.sigmas,
        shape=mine.shape,
        window=None,
        guidance=guidance,
        micro_batch=2,
    )
    assert torch.equal(canvas.x_BCHW, theirs.latents_BCHW) and np.array_equal(mine.look(canvas), theirs.images_BHWC)
    assert ledger.passes == 3 * STEPS * (2 if guidance != 1 else 1) and ledger.looks == 3


def test_a_preview_is_where_the_flow_would_go(policy: SD3Policy) -> None:
    mine = painter(policy)
    canvas = mine.advance(mine.begin([BAG, "a coat"], [1, 2]), 3)
    before = mine.advance(mine.begin([BAG, "a coat"], [1, 2]), 2)
    v = policy.velocity(before.x_BCHW, mine.sigmas[2], before.condition)
    assert torch.allclose(canvas.guess_BCHW, before.x_BCHW - mine.sigmas[2] * v, atol=1e-6)
    assert torch.equal(mine.advance(canvas.keep([1]), STEPS).x_BCHW, mine.advance(canvas, STEPS).x_BCHW[1:]) or torch.allclose(
        mine.advance(canvas.keep([1]), STEPS).x_BCHW, mine.advance(canvas, STEPS).x_BCHW[1:], atol=1e-5
    )
    whole = mine.advance(canvas, STEPS)
    assert torch.allclose(whole.guess_BCHW, whole.x_BCHW, atol=1e-5)


def test_guidance_in_some_steps_counts_twice_there(policy: SD3Policy) -> None:
    assert painter(policy, guidance=3.0, guided_steps=(1, 3)).passes_T == (1, 2, 2, 1, 1, 1)


def test_the_best_is_found_and_everything_is_judged_by_the_users_words(policy: SD3Policy, critic: Critic) -> None:
    ledger = Ledger()
    tool = painter(policy, ledger)
    found = search(BAG, Says(*RED), tool, judges(critic, "brightness"), Way(3, tool.passes_T), ledger, wanted=4, seed=7)
    assert [one.text for one in found.candidates] == [BAG, *RED] and critic.prompts == {BAG}
    means = []
    for one in found.candidates:
        assert one.values_RK is not None and one.images is not None and one.values_RK.shape == (1, 3)
        alone = painter(policy, micro_batch=3)
        image = alone.look(alone.advance(alone.begin([one.text] * 3, seeds_of(7, 3)), STEPS))
        assert np.abs(image.astype(int) - one.images.astype(int)).max() <= 1
        assert one.values_RK[0] == pytest.approx(one.images.mean((1, 2, 3)) / 255)
        means.append(one.values_RK.mean())
    assert found.best == int(np.argmax(means)) and found.candidates[0].gain.mean == 0
    assert (ledger.tokens, ledger.passes, ledger.looks) == (sum(len(text.split()) for text in RED), 5 * 3 * STEPS, 15)


def test_the_best_is_measured_again_on_fresh_pictures(policy: SD3Policy, critic: Critic) -> None:
    ledger = Ledger(limit=200)
    tool, told = painter(policy, ledger), judges(critic, "brightness")
    ledger.hold(passes=2 * 5 * STEPS, looks=10)
    found = search(BAG, Says(*RED), tool, told, Way(1, tool.passes_T), ledger, wanted=4, seed=7)
    assert ledger.held == 60
    found.best = 2  # whichever it was
    ledger.held = 0.0
    before = ledger.passes
    confirm(found, tool, told, 5, seed=7)
    assert ledger.passes - before == 60 and found.confirmed is not None
    fresh = painter(policy)
    images = [fresh.look(fresh.advance(fresh.begin([one.text] * 5, seeds_of(7, 5, True)), STEPS)) for one in found.candidates]
    grey_NK = np.stack([image.mean((1, 2, 3)) / 255 for image in images])
    gain_K = (grey_NK[found.best] - grey_NK[0]) / grey_NK[[0, 2]].std()
    assert found.confirmed.mean == pytest.approx(gain_K.mean(), rel=0.02)
    assert found.confirmed.error == pytest.approx(gain_K.std(ddof=1) / 5**0.5, rel=0.05)
    with pytest.raises(ConfigError, match="--confirm"):
        Ledger(limit=10).hold(passes=20, looks=0)


def test_noises_are_shared_so_that_gains_are_paired(policy: SD3Policy, critic: Critic) -> None:
    tool = painter(policy)
    same = search(BAG, Says(f"{BAG} ."), tool, judges(critic, "brightness"), Way(4, tool.passes_T), Ledger(), wanted=1)
    own, other = same.candidates
    assert own.values_RK is not None and other.values_RK is not None
    change = other.values_RK[0] - own.values_RK[0]
    scale = np.concatenate([own.values_RK[0], other.values_RK[0]]).std()
    assert other.gain.mean == pytest.approx(change.mean() / scale) and other.gain.error == pytest.approx(
        change.std(ddof=1) / 2 / scale
    )


def test_the_worst_are_dropped_by_their_previews(policy: SD3Policy, critic: Critic) -> None:
    ledger = Ledger()
    tool = painter(policy, ledger)
    way = Way(2, tool.passes_T, (Stage(2, 0.5), Stage(4, 0.5)))
    found = search(BAG, Says(*RED), tool, judges(critic, "brightness"), way, ledger, wanted=4, seed=1)
    rewrites = found.candidates[1:]
    assert sorted(str(one.dropped_after) for one in rewrites) == ["2", "2", "4", "None"]
    assert found.candidates[0].dropped_after is None and found.candidates[0].previews == []
    first = {one.text: one.previews[0][1][0] for one in rewrites}
    assert all(value is not None for value in first.values())
    kept = {one.text for one in rewrites if one.dropped_after != 2}
    assert kept == set(sorted(first, key=lambda text: first[text] or 0.0)[2:])
    looked = painter(policy)
    canvas = looked.advance(looked.begin([text for text in RED for _ in range(2)], seeds_of(1, 2) * 4), 2)
    seen = looked.look(canvas).reshape(4, 2, -1).mean((1, 2)) / 255
    assert [first[text] for text in RED] == pytest.approx(seen, abs=2e-3)
    assert ledger.passes == 2 * (STEPS + 4 * 2 + 2 * 2 + 1 * 2) and ledger.looks == 2 * (1 + 4 + 2 + 1)
    assert all(one.images is None for one in rewrites if one.dropped_after)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(1, 160), st.integers(0, 5), st.integers(1, 2), st.booleans(), st.floats(0, 1))
def test_a_search_stays_within_any_budget(
    policy: SD3Policy, writer: LocalWriter, critic: Critic, limit: float, wanted: int, pictures: int, prunes: bool, token: float
) -> None:
    ledger = Ledger(Costs(token, 0.25), limit)
    tool = painter(policy, ledger)
    way = Way(pictures, tool.passes_T, (Stage(2, 0.5),) if prunes else ())
    critic.says = [f"a bag number {i}" for i in range(100)]
    told = judges(critic, "brightness", "critic", critic="critic")
    try:
        found = search(BAG, writer, tool, told, way, ledger, wanted=wanted, temperature=3.0)
        refine(found, tool, told, way, ledger, rounds=3)
    except ConfigError as error:
        assert "--budget" in str(error) and ledger.spent == 0
    finally:
        told.close()
    assert ledger.spent <= limit + 1e-6


def test_what_a_rewrite_does_not_use_is_the_next_ones(policy: SD3Policy, critic: Critic) -> None:
    """Room for two of the longest length at first; they are short, and all four fit."""
    ledger = Ledger(limit=STEPS + 4 * STEPS + 2 + 12 + 12)
    tool, texts = painter(policy, ledger), ("red bag", "blue boot", "red dress", "coat")
    found = search(BAG, Says(*texts), tool, judges(critic, "brightness"), Way(1, tool.passes_T), ledger, wanted=4)
    assert [one.text for one in found.candidates[1:]] == list(texts) and found.notes == []
    assert ledger.tokens == 7 and ledger.left >= 0


def test_the_same_seed_finds_the_same(policy: SD3Policy, writer: LocalWriter, critic: Critic) -> None:
    def run(seed: int) -> list[tuple[str, str]]:
        tool = painter(policy)
        found = search(BAG, writer, tool, judges(critic), Way(2, tool.passes_T), Ledger(), wanted=4, seed=seed, temperature=3.0)
        return [(one.text, str(one.total)) for one in found.candidates]

    assert run(3) == run(3) and [text for text, _ in run(3)] != [text for text, _ in run(4)]


def test_a_writer_with_nothing_usable_leaves_the_users_own_prompt(policy: SD3Policy, writer: LocalWriter, critic: Critic) -> None:
    tool = painter(policy)
    found = search(BAG, writer, tool, judges(critic), Way(2, tool.passes_T), Ledger(), wanted=5, temperature=0.0)
    assert len(found.candidates) == 1 and found.best == 0 and sum(found.left_out.values()) == 5
    assert any("your own prompt stands" in note for note in found.notes)


def test_usable_leaves_out_faults_and_what_was_said_before() -> None:
    def one(text: str, fault: Any = None) -> Written:
        return Written(text, text, 1, 0.0, True, fault)

    kept, left = usable([one("x bag"), one("", "empty"), one("x bag"), one("b", "subject"), one("y")], BAG)
    assert [w.text for w in kept] == ["x bag", "y"] and left == {"empty": 1, "again": 1, "subject": 1}


def test_what_the_painter_does_not_read_is_said(policy: SD3Policy, critic: Critic) -> None:
    tool, long = (
        painter(policy),
        "a red bag of a red boot of a red coat of a red dress",
    )  # 8 tokens are read, two of them around the text
    found = search("a bag", Says("a red bag", long), tool, judges(critic), Way(1, tool.passes_T), Ledger(), wanted=2)
    assert [one.unread for one in found.candidates] == [False, False, True]


@pytest.mark.parametrize(
    "prompt",
    [
        "\u6d77\u8fba\u306e\u72ac",
        "\u0441\u043e\u0431\u0430\u043a\u0430 \u043d\u0430 \u043f\u043b\u044f\u0436\u0435",
        "a\U0001f415bag",
    ],
)
def test_prompts_in_any_script(policy: SD3Policy, writer: LocalWriter, critic: Critic, prompt: str) -> None:
    tool = painter(policy)
    found = search(prompt, writer, tool, judges(critic), Way(1, tool.passes_T), Ledger(), wanted=2, temperature=3.0)
    assert found.candidates[0].text == prompt and found.candidates[0].total.mean is not None


def test_a_prompt_that_is_too_long_is_said(policy: SD3Policy, writer: LocalWriter, critic: Critic) -> None:
    tool = painter(policy)
    with pytest.raises(ConfigError, match="max_prompt_tokens"):
        search("a bag " * 400, writer, tool, judges(critic), Way(1, tool.passes_T), Ledger(), wanted=1)


def test_scores_that_are_missing_are_missing(policy: SD3Policy, critic: Critic) -> None:
    tool, told = painter(policy), judges(critic)
    critic.broken = {"brightness", "alignment"}
    way = Way(2, tool.passes_T, (Stage(2, 0.5),))
    found = search(BAG, Says(*RED[:2]), tool, told, way, Ledger(), wanted=2)
    assert found.best == 0 and found.failures == {"urn:verism:broken": 2 * (2 + 2 * (2 + 1))}
    assert all(one.total.mean is None for one in found.candidates) and found.candidates[2].dropped_after == 2


def test_no_service_is_said_with_the_command_that_starts_one(free_port: int) -> None:
    with pytest.raises(NoService, match="verism-serve"):
        Judges({"brightness": RewardConfig(url=f"http://127.0.0.1:{free_port}")})


def fake(values: dict[str, Sequence[Sequence[float]]]) -> Found:
    """Candidates with these values (R, K) each; the first is the user's own."""
    made = [Candidate(text, "rewrite", values_RK=np.array(rows, dtype=np.float64)) for text, rows in values.items()]
    return Found(next(iter(values)), made, {}, {})


class Known:
    """What `settle` asks of judges."""

    names, signs_R, weights_R, alignment = ("realism", "alignment"), np.array([1.0, 1.0]), np.array([1.0, 1.0]), "alignment"


def test_a_rewrite_that_lost_the_subject_is_not_chosen() -> None:
    found = fake(
        {
            "own": [[0.1, 0.2, 0.1, 0.2], [0.8, 0.9, 0.8, 0.9]],
            "pretty": [[0.9, 0.99, 0.9, 0.99], [0.75, 0.85, 0.76, 0.85]],
            "good": [[0.3, 0.4, 0.3, 0.4], [0.81, 0.89, 0.79, 0.9]],
        }
    )
    settle(found, Known())  # type: ignore[arg-type]
    own, pretty, good = found.candidates
    assert pretty.lost is not None and pretty.lost.mean == pytest.approx(-0.0475) and good.lost is None and own.lost is None
    assert pretty.gain.mean is not None and good.gain.mean is not None and pretty.gain.mean > good.gain.mean > 0
    assert found.best == 2


def test_totals_are_deviations_with_signs_and_weights() -> None:
    values = np.array([[[1.0, 3.0], [5.0, np.nan]], [[2.0, 2.0], [2.0, 2.0]]])
    out = totals(values, scale_of(values), np.array([-1.0, 1.0]), np.array([3.0, 1.0]))
    scaled = (np.array([1, 3, 5]) - 3) / np.std([1, 3, 5])
    assert out[0] == pytest.approx(-0.75 * scaled[:2]) and out[1, 0] == pytest.approx(-0.75 * scaled[2]) and np.isnan(out[1, 1])
    assert Estimate.of(np.array([1.0, 3.0, np.nan])) == Estimate(2.0, 1.0) and str(Estimate.of(np.array([np.nan]))) == "-"


def test_the_critics_prompts_are_painted_until_nothing_is_better(policy: SD3Policy, critic: Critic) -> None:
    ledger = Ledger()
    tool, told = painter(policy, ledger), judges(critic, "brightness", "critic", critic="critic")
    critic.says = ["", 'Refined: "a small red bag"', None, "a red dress", "a coat", "a coat", *["a large blue boot"] * 60]
    found = search(BAG, Says(), tool, told, Way(3, tool.passes_T), ledger, wanted=0)
    assert len(found.candidates) == 1
    refine(found, tool, told, Way(3, tool.passes_T), ledger, rounds=4)
    rounds = [(one.round, one.parent, one.origin) for one in found.candidates[1:]]
    assert rounds[0][:2] == (1, 0) and {origin for *_, origin in rounds} == {"refined"} and critic.prompts == {BAG}
    assert len({one.text for one in found.candidates}) == len(found.candidates)
    totals_N = [one.total.mean for one in found.candidates]
    assert found.candidates[found.best].total.mean == max(t for t in totals_N if t is not None)
    assert any("refining ended" in note for note in found.notes)
    assert ledger.passes == len(found.candidates) * 3 * STEPS and ledger.tokens == 0


def test_what_a_critic_says_is_cleaned_and_judged_by_its_words() -> None:
    found = fake({"a dog on a beach": [[0.1] * 5, [0.1] * 5]})
    said = ('Here is the prompt: "A wet dog."', "", "a red car in the rain", "A wet dog.", "a dog on a beach", None)
    found.candidates[0].texts_K = said
    texts, left = proposals(found, 0)
    assert texts == ["A wet dog."] and left == {"empty": 2, "subject": 1, "again": 2}


def test_a_critic_within_a_budget(policy: SD3Policy, critic: Critic) -> None:
    ledger = Ledger(limit=2 * 2 * STEPS + 1)
    tool, told = painter(policy, ledger), judges(critic, "brightness", "critic", critic="critic")
    critic.says = [f"a bag {word}" for word in ("red", "blue", "small", "old", "new", "worn")]
    found = search(BAG, Says(), tool, told, Way(2, tool.passes_T), ledger, wanted=0)
    refine(found, tool, told, Way(2, tool.passes_T), ledger, rounds=3)
    assert len(found.candidates) == 2 and any(
        "the budget does not hold" in note or "nothing better" in note for note in found.notes
    )


@pytest.mark.parametrize(
    ("texts", "weights", "said"),
    [
        (["realism"], [], "write name=URL"),
        (["realism=ftp://x"], [], "write name=URL"),
        (["a=http://x"], ["b=1"], "of one of a"),
        (["a=http://x"], ["a=much"], "write name=number"),
        (["a=http://x"], ["a=-1"], "a number from 0 on"),
        (["a=http://x"], ["a=nan"], "a number from 0 on"),
    ],
)
def test_rewards_that_cannot_be(texts: list[str], weights: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_rewards(texts, weights)


def test_rewards_are_read(critic: Critic) -> None:
    assert [(name, one.part) for name, one in parse_rewards([]).items()] == [("detector", "logit"), ("alignment", "margin")]
    chosen = parse_rewards(["a=http://x:1/y#logit", "b=http://z"], ["b=0.25"])
    assert (chosen["a"].url, chosen["a"].part, chosen["a"].weight) == ("http://x:1/y", "logit", 1.0) and chosen["b"].weight == 0.25
    with pytest.raises(ConfigError, match="all reward weights are 0"):
        Judges({"brightness": RewardConfig(url=critic.url, weight=0)})
    with pytest.raises(ConfigError, match="none of the rewards"):
        judges(critic, "brightness", critic="judge")


def test_everything_that_was_tried_can_be_told_as_json(policy: SD3Policy, critic: Critic, tmp_path: Path) -> None:
    from trainer.rewrite.command import save, told

    ledger = Ledger()
    tool, asked = painter(policy, ledger), judges(critic)
    found = search(BAG, Says(*RED), tool, asked, Way(2, tool.passes_T, (Stage(2, 0.5),)), ledger, wanted=4)
    result = told(found, ledger, asked.names)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    save(tmp_path / "out", found, result)
    finished = [i for i, one in enumerate(found.candidates) if one.images is not None]
    files = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert files == [f"{i:03d}_{k:02d}.png" for i in finished for k in range(2)] and len(finished) == 3
    assert json.loads((tmp_path / "out" / "result.json").read_text())["rewrite"] == result["rewrite"]
