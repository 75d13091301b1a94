"""How pictures are drawn: windows, branches, levels of noise, solvers, guided steps, and what is refused before anything starts."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer import tiny
from tests.trainer.run.service import recipe, serve
from trainer import loop
from trainer.config import ConfigError, RunConfig, load, validate
from trainer.losses.guard import guard
from trainer.metrics import read
from trainer.policies import flow
from trainer.policies.sd3 import SD3Policy
from trainer.registry import REGISTRY, resolve
from trainer.sampling.rollout import ratio_deviation, replay, sample
from trainer.sampling.sampler import Sampler, geometry, members
from trainer.sampling.solvers import spaced
from trainer.sampling.windows import window_of
from trainer.types import Condition, Prompt, Rollout, Window

SIZE = (16, 24)
WINDOW = Window(2, 3)
BAGS = [Prompt(0, "a photo of a bag")] * 4


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> SD3Policy:
    made = SD3Policy.load(
        tiny.write(tmp_path_factory.mktemp("tiny")), max_sequence_length=tiny.LENGTH, lora={"rank": 2, "alpha": 4}
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def draw(policy: Any, window: Window | None = WINDOW, seeds: tuple[int, ...] = (1, 2, 3, 4), **more: Any) -> Rollout:
    options = {"sigmas": policy.sigmas(8, *SIZE), "shape": policy.latent_shape(*SIZE), "micro_batch": 4, **more}
    return sample(policy, BAGS, list(seeds), window=window, **options)


class Calls:
    """A policy in front of another one, which keeps what it was asked: (rows, sigma, guidance)."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.seen = policy, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, condition: Condition, guidance: float = 1.0) -> torch.Tensor:
        self.seen.append((len(x), round(float(sigma), 6), guidance))
        out: torch.Tensor = self.policy.velocity(x, sigma, condition, guidance)
        return out


# windows

SPANS = st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(0, 8)).map(lambda n: (n[1], n[0], n[0] + n[1] + n[2]))
OPTIONS = st.fixed_dictionaries(
    {
        "stride": st.integers(1, 6),
        "every": st.integers(1, 9),
        "back": st.booleans(),
        "strategy": st.sampled_from(["progressive", "exp_decay"]),
        "decay": st.floats(0, 2),
        "hold": st.none() | st.integers(0, 9),
    }
)


@pytest.mark.parametrize("kind", sorted(REGISTRY["window"]))
@settings(max_examples=50, deadline=None)
@given(span=SPANS, options=OPTIONS, seed=st.integers(0, 9), step=st.integers(0, 10_000), group=st.integers(0, 99))
def test_a_window_lies_in_its_range_and_depends_on_seed_step_and_group(
    kind: str, span: tuple[int, int, int], options: dict[str, Any], seed: int, step: int, group: int
) -> None:
    length, first, last = span
    window = window_of(seed, step, group, *span, kind=kind, **options)
    assert window.length == length and first <= window.start and window.start + length <= last, "never short, never behind the last"
    assert window == window_of(seed, step, group, *span, kind=kind, **options)
    with pytest.raises(ValueError, match="does not fit"):
        window_of(seed, step, group, last - first + 1, first, last, kind=kind, **options)


@settings(max_examples=50, deadline=None)
@given(span=SPANS, options=OPTIONS)
def test_every_step_is_trained_at_some_time(span: tuple[int, int, int], options: dict[str, Any]) -> None:
    length, first, last = span
    options["stride"] = min(options["stride"], length)
    long = options["every"] * (last - first) + 1
    slid = [window_of(0, step, 0, *span, kind="sliding", **options) for step in range(long)]
    assert {i for window in slid for i in window} == set(range(first, last))
    assert slid[0].start == first
    drawn = {window_of(1, step, 0, *span).start for step in range(400)}
    assert drawn == set(range(first, last - length + 1))
    assert {window_of(1, step, 0, *span, kind="fixed").start for step in range(9)} == {first}


def test_a_sliding_window_dwells_where_the_noise_is_high() -> None:
    def dwells(**options: Any) -> list[int]:
        starts = [window_of(0, step, 0, 4, 0, 23, kind="sliding", back=False, **options).start for step in range(600)]
        return [starts.count(place) for place in range(19)]

    assert dwells() == [25] * 19
    paper = dwells(strategy="exp_decay", decay=0.1, hold=13)
    assert paper == [25] * 14 + [round(25 * math.exp(-0.1 * n)) for n in range(1, 6)]
    assert dwells(strategy="exp_decay", decay=9.0, hold=0)[1:] == [1] * 18, "one step at least"
    assert window_of(0, 10_000, 0, 4, 0, 23, kind="sliding", back=False).start == 19
    assert window_of(0, 20 * 25 + 26, 0, 4, 0, 23, kind="sliding").start == 1


# levels of noise


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(4, 30), power=st.floats(0.1, 2), kind=st.sampled_from(["sde", "dance", "cps"]), level=st.floats(0.05, 0.45)
)
def test_early_noise_falls_and_keeps_the_sum_of_variances(steps: int, power: float, kind: str, level: float) -> None:
    sigmas = torch.linspace(1, 0, steps + 1)
    span = {"first": 1, "last": steps - 1}
    early = flow.noise_levels(sigmas, level, kind, schedule="early", power=power, **span)  # type: ignore[arg-type]
    flat = flow.noise_levels(sigmas, level, kind, **span)  # type: ignore[arg-type]
    assert flat == (level,) * steps and len(early) == steps
    assert all(now > then for now, then in zip(early[1 : steps - 2], early[2 : steps - 1], strict=True))

    def variance(levels: tuple[float, ...]) -> float:
        at = torch.zeros(1, 3)
        steps_at = [
            flow.step(at, at, sigmas, torch.tensor([i]), levels[i], kind, noise=torch.ones(1, 3)) for i in range(1, steps - 1)
        ]
        return float(sum(out.prev.double().square().mean() for out in steps_at))

    assert math.isclose(variance(early), variance(flat), rel_tol=1e-4)


def test_more_noise_than_cps_can_add_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lower sampling\.noise_level"):
        flow.noise_levels(torch.linspace(1, 0, 11), 0.95, "cps", schedule="early", power=2.0, last=9)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
def test_the_level_of_its_own_step_judges_a_step(policy: SD3Policy, kind: str) -> None:
    sigmas = policy.sigmas(8, *SIZE)
    levels = flow.noise_levels(sigmas, 0.4, kind, schedule="early", power=1.0, last=7)
    rollout = draw(policy, noise_level=levels, kind=kind)
    assert rollout.levels_T == levels[2:5] and len(set(rollout.levels_T)) == 3
    assert ratio_deviation(policy, rollout, 4) < 1e-5
    for column in range(3):
        out, _ = replay(policy, rollout, column)
        expected = flow.deviation(sigmas, torch.full((4,), 2 + column), levels[2 + column], kind)[0]
        torch.testing.assert_close(out.diffusion_B, expected)
    if kind == "sde":
        assert out.logp_B is not None
        root = math.sqrt(float(sigmas[4] - sigmas[5]))
        means = out.mean, rollout.mean_old_BT[:, 2]
        loss = guard(out.logp_B, rollout.logp_old_BT[:, 2], *means, float(out.diffusion_B[0]), root, torch.ones(4), 1e-3, 1e-3)
        torch.testing.assert_close(loss.values_B * root**2, -torch.ones(4), rtol=1e-4, atol=1e-4)


# branches


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50))
def test_members_share_their_way_in_rows_and_nothing_else(groups: int, ways: int, copies: int, step: int) -> None:
    size = ways * copies
    prompts = [Prompt(n % 2, "same") for n in range(groups)]  # a prompt may come twice in a step
    parts = [members(prompts[n : n + 1], n, size, copies, groups, 0, step) for n in range(groups)]
    chosen, seeds, starts = members(prompts, 0, size, copies, groups, 0, step)
    assert len(set(seeds)) == groups * size == len(chosen)
    assert seeds == [seed for _, part, _ in parts for seed in part], "however many groups are drawn together"
    if copies == 1:
        assert starts is None
        return
    assert starts is not None and len(set(starts)) == groups * ways
    assert all(len(set(starts[n : n + copies])) == 1 for n in range(0, len(starts), copies))


def test_branches_part_at_the_window_and_their_ways_are_walked_once(policy: SD3Policy) -> None:
    calls = Calls(policy)
    rollout = draw(calls, start_seeds=(8, 8, 9, 9))
    assert [rows for rows, *_ in calls.seen] == [2] * 2 + [4] * 6, "two ways, then everybody"
    first = rollout.states_BT[:, 0]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3]) and not torch.equal(first[0], first[2])
    second = rollout.states_BT[:, 1]
    assert len({row.numpy().tobytes() for row in second}) == 4
    assert ratio_deviation(policy, rollout, 4) < 1e-5


@pytest.mark.parametrize("window", [Window(2, 3), Window(0, 3)])
def test_branches_may_part_inside_the_window(policy: SD3Policy, window: Window) -> None:
    rollout = draw(policy, window, start_seeds=(8, 8, 9, 9), branch_at=window.start + 2)
    for place, distinct in enumerate([2, 2, 2, 4]):
        rows = rollout.states_BT[:, place]
        assert len({tuple(np.round(row.flatten().numpy(), 4)) for row in rows}) == distinct, place
    assert ratio_deviation(policy, rollout, 4) < 1e-5
    early = draw(policy, window, start_seeds=(8, 8, 9, 9), branch_at=window.start)
    assert torch.equal(early.states_BT, draw(policy, window, start_seeds=(8, 8, 9, 9)).states_BT)


# solvers


class Gaussian:
    """Data N(mean, deviation^2) in every dimension, whose flow is known: x_s = (1 - s) mean + d(s) x_1, d(s)^2 = (1-s)^2 dev^2 + s^2."""

    device = torch.device("cpu")
    mean, deviation = 1.5, 0.4

    def spread(self, s: torch.Tensor) -> torch.Tensor:
        return torch.sqrt((1 - s) ** 2 * self.deviation**2 + s**2)

    def at(self, start: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (1 - s) * self.mean + self.spread(s) * start

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, *_: Any) -> torch.Tensor:
        slope = (sigma - (1 - sigma) * self.deviation**2) / self.spread(sigma) ** 2
        return (-self.mean + slope * (x - (1 - sigma) * self.mean)).float()

    def encode(self, prompts: list[str]) -> Condition:
        return Condition({"none": torch.zeros(len(prompts))})

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return np.zeros((len(latents), 1, 1, 3), np.uint8)


def test_the_known_flow_is_one() -> None:
    s = torch.linspace(0.99, 0.01, 25, dtype=torch.float64)
    start, bell, small = torch.tensor(0.7, dtype=torch.float64), Gaussian(), 1e-6
    slopes = (bell.at(start, s + small) - bell.at(start, s - small)) / (2 * small)
    torch.testing.assert_close(bell.velocity(bell.at(start, s), s).double(), slopes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver, order", [("euler", 1.0), ("dpm2m", 2.0)])
@pytest.mark.parametrize("highest", [1.0, 0.9])
def test_the_order_of_a_solver(solver: str, order: float, highest: float) -> None:
    """Halved steps leave a half, or a quarter at most, of the error where the path ends before 0 (the step to 0 is the same in both)."""
    bell, start = Gaussian(), torch.tensor([[0.7], [-1.1]])
    top = torch.tensor(highest)

    def error(steps: int) -> float:
        sigmas = torch.linspace(highest, 0.2, steps + 1)
        x, walk = bell.at(start, top), resolve("solver", solver)(sigmas)
        for i in range(steps):
            x = walk.step(x, bell.velocity(x, sigmas[i]), i)
        return float((x - bell.at(start, sigmas[-1])).abs().max())

    errors = [error(steps) for steps in (8, 16, 32)]
    orders = [math.log2(errors[n] / errors[n + 1]) for n in range(2)]
    assert all(found > order - 0.2 for found in orders), (errors, orders)
    assert solver != "euler" or all(found < 1.2 for found in orders), "the other one is better by its order"


@pytest.mark.parametrize("solver", sorted(REGISTRY["solver"]))
def test_a_solver_ends_at_the_picture(solver: str) -> None:
    bell, seeds = Gaussian(), [1, 2]
    prompts = [Prompt(0, "a")] * 2
    sigmas = torch.linspace(1, 0, 21)
    out = sample(bell, prompts, seeds, sigmas=sigmas, shape=(3,), window=None, solver=solver)  # type: ignore[arg-type]
    start = torch.stack([torch.randn((1, 3), generator=torch.Generator().manual_seed(seed))[0] for seed in seeds])
    exact = bell.at(start, torch.tensor(0.0))
    error = float((out.latents_BCHW - exact).abs().max())
    assert out.latents_BCHW.dtype == torch.float32
    assert error < {"euler": 0.1, "dpm2m": 0.02}[solver], error


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("highest", [1.0, 0.95])
def test_dpm2m_is_the_librarys_on_the_same_sigmas(highest: float) -> None:
    """Its own table (use_flow_sigmas) starts at 0.999 and is spaced by its own rule; with ours it walks the same way."""
    bell = Gaussian()
    theirs = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2)
    theirs.set_timesteps(9)
    tables = [theirs.sigmas.clone(), torch.cat([3 * (s := torch.linspace(highest, 0.1, 9)) / (1 + 2 * s), torch.zeros(1)])]
    for sigmas in tables:
        theirs = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
        theirs.set_timesteps(9)
        theirs.sigmas, theirs.timesteps = sigmas, torch.arange(9)
        x = y = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(3))
        walk = resolve("solver", "dpm2m")(sigmas)
        for i in range(9):
            x = walk.step(x, bell.velocity(x, sigmas[i]), i)
            y = theirs.step(bell.velocity(y, sigmas[i]), theirs.timesteps[i], y, return_dict=False)[0]
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@given(st.integers(3, 30), st.integers(0, 20), st.integers(1, 30))
def test_fewer_steps_keep_to_the_curve(steps: int, first: int, count: int) -> None:
    first = min(first, steps - 1)
    table = torch.linspace(1, 0, steps + 1) ** 2
    sigmas, places = spaced(table, first, count)
    assert len(places) == len(sigmas) - 1 == min(count, steps - first)
    assert sigmas[0] == table[first] and sigmas[-1] == 0 and bool((sigmas.diff() < 0).all()) and sigmas.dtype == torch.float32
    along = np.interp(list(places), range(steps + 1), table)
    np.testing.assert_allclose(sigmas[:-1], along, rtol=1e-5, atol=1e-7)
    for other in (None, steps):
        assert torch.equal(spaced(table, first, other)[0], table[first:])


@pytest.mark.parametrize("solver", sorted(REGISTRY["solver"]))
def test_only_what_is_not_trained_is_walked_otherwise(policy: SD3Policy, solver: str) -> None:
    calls, other = Calls(policy), Calls(policy)
    plain, short = draw(other, solver=solver), draw(calls, solver=solver, steps_after=2)
    sigmas = policy.sigmas(8, *SIZE)
    assert torch.equal(plain.states_BT, short.states_BT) and torch.equal(plain.logp_old_BT, short.logp_old_BT)
    assert len(other.seen) == 8 and len(calls.seen) == 7
    half = float(sigmas[6] + 0.5 * (sigmas[7] - sigmas[6]))
    assert [sigma for _, sigma, _ in calls.seen[5:]] == [round(float(sigmas[5]), 6), round(half, 6)]
    assert torch.isclose(plain.latents_BCHW, short.latents_BCHW, atol=2.0).all()
    if solver != "euler":
        euler = draw(policy)
        assert not torch.equal(plain.states_BT[:, 0], euler.states_BT[:, 0]), "the way to the window is walked by it as well"
        again = resolve("solver", solver)(sigmas[5:])  # restarted: the first step behind the window knows no past
        x = plain.states_BT[:, -1]
        with torch.no_grad():
            for n in range(3):
                x = again.step(x, policy.velocity(x, sigmas[5 + n], plain.condition), n)
        assert torch.equal(x, plain.latents_BCHW)
    assert ratio_deviation(policy, short, 4) < 1e-5


# guidance


def test_guidance_in_some_steps_only_and_judged_as_drawn(policy: SD3Policy) -> None:
    calls = Calls(policy)
    rollout = draw(calls, guidance=2.5, guided=(1, 4))
    assert [guidance for *_, guidance in calls.seen] == [1.0, 2.5, 2.5, 2.5, 1.0, 1.0, 1.0, 1.0]
    calls.seen.clear()
    assert ratio_deviation(calls, rollout, 4) < 1e-5  # type: ignore[arg-type]
    assert [guidance for *_, guidance in calls.seen] == [2.5, 2.5, 1.0]
    calls.seen.clear()
    draw(calls, guidance=2.5, guided=(6, 8), steps_after=2)
    assert [guidance for *_, guidance in calls.seen] == [1.0] * 6 + [2.5], "a shortened way is guided by the place on the curve"


# a run


def config(**sections: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "name": "t",
        "policy": {"use": "sd3", "path": "x"},
        "prompts": {"train": "a", "eval": "b"},
        "group": {"prompts": 2, "size": 4},
        "rewards": {"r": {"url": "http://127.0.0.1:1"}},
        **sections,
    }
    raw["sampling"] = {"steps": 8, "height": 16, "width": 24, "micro_batch": 8, **sections.get("sampling", {})}
    return validate(raw, "recipe")


def test_small_to_train_large_to_look_at(policy: SD3Policy) -> None:
    made = config(
        sampling={"guidance": 2.0, "guided_steps": (0, 3)}, eval={"height": 32, "width": 32, "steps": 5, "solver": "dpm2m"}
    )
    sampler = Sampler(policy, made)
    prompts = [Prompt(0, "a bag"), Prompt(1, "a boot")]
    group, images = sampler.groups(3, prompts, 0), sampler.pictures(prompts, 0)
    assert group.images_BHWC.shape == (8, 16, 24, 3) and images.shape == (2, 32, 32, 3)
    assert len(sampler.eval_sigmas) == 6 and group.guidance_at(2) == 2.0 and group.guidance_at(3) == 1.0
    assert np.array_equal(images, sampler.pictures(prompts, 0)) and not np.array_equal(images, sampler.pictures(prompts, 2))
    again = sampler.groups(3, prompts, 0)
    assert torch.equal(again.states_BT, group.states_BT)
    assert not torch.equal(sampler.groups(4, prompts, 0).latents_BCHW, group.latents_BCHW)


def test_every_choice_at_once(policy: SD3Policy) -> None:
    choices = {
        "prefix": "shared", "branches": 2, "window": 2, "window_first": 1, "window_last": 5, "window_kind": "sliding", "window_every": 2,
        "branch_at": 2, "noise_schedule": "early", "noise_power": 0.5, "solver": "dpm2m", "steps_after": 3, "guidance": 2.0,
        "guided_steps": (0, 3),
    }  # fmt: skip
    sampler = Sampler(policy, config(sampling=choices))
    starts = []
    for step in range(8):
        rollout = sampler.groups(step, [Prompt(0, "a bag"), Prompt(1, "a boot")], 0)
        assert ratio_deviation(policy, rollout, 8) < 1e-5
        assert len({row.numpy().tobytes() for row in rollout.latents_BCHW}) == 8, "no two members are one picture"
        starts.append(rollout.window.start)
    assert starts == [1, 1, 2, 2, 3, 3, 1, 1]


def test_without_a_window_there_is_a_picture_and_nothing_else(policy: SD3Policy) -> None:
    raw = config().model_dump(mode="json")
    raw["sampling"]["window"] = None
    with pytest.raises(ConfigError, match=r"loss\.use=grpo learns from the steps of a window"):
        validate(raw, "recipe")
    rollout = draw(policy, None, solver="dpm2m")
    assert rollout.window.length == 0 and rollout.levels_T == () and rollout.latents_BCHW.shape == (4, 4, 8, 12)


def test_a_shared_prefix_is_what_same_noise_is(policy: SD3Policy) -> None:
    prompts = [Prompt(0, "a bag"), Prompt(1, "a boot")]
    old, new = (Sampler(policy, config(sampling=s)).groups(1, prompts, 0) for s in ({"same_noise": True}, {"prefix": "shared"}))
    assert torch.equal(old.states_BT, new.states_BT)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"noise_level": 0}, "greater than 0"),
        ({"window": 6}, "longer than"),
        ({"window_last": 8}, "never trained: 7 at most"),
        ({"window_kind": "slide"}, "random.*fixed.*sliding"),
        ({"window_kind": "sliding", "window": 2, "window_stride": 3}, "never be trained"),
        ({"branches": 2}, "prefix=shared"),
        ({"branch_at": 1}, "prefix=shared"),
        ({"prefix": "shared", "branches": 3}, "group.size=4 does not divide into sampling.branches=3"),
        ({"prefix": "shared", "branches": 8}, "does not divide"),
        ({"prefix": "shared", "branch_at": 3}, "2 at most"),
        ({"steps_after": 5}, "4 at most"),
        ({"window": None, "prefix": "shared"}, "one picture"),
        ({"window": None, "steps_after": 2}, "sampling.steps"),
        ({"guided_steps": (0, 3)}, "needs sampling.guidance"),
        ({"guidance": 2.0, "guided_steps": (3, 3)}, "first < last <= 8"),
        ({"guidance": 2.0, "guided_steps": (0, 9)}, "first < last <= 8"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_fix(sampling: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(sampling=sampling)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"sampling": {"height": 18}}, r"sampling\.height and sampling\.width: .*multiples of 4"),
        ({"eval": {"height": 30}}, r"eval\.height and eval\.width: .*multiples of 4"),
        (
            {"sampling": {"kind": "cps", "noise_level": 0.95, "noise_schedule": "early", "noise_power": 3.0}},
            r"lower sampling\.noise_level",
        ),
    ],
)
def test_geometry_and_levels_are_checked_before_anything_is_drawn(policy: SD3Policy, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampler(policy, config(**sections))


class Broken(Calls):
    """A policy with one thing wrong."""

    def __init__(self, policy: Any, name: str, change: Callable[[Any], Any]) -> None:
        super().__init__(policy)
        self.name, self.change = name, change

    def velocity(self, *arguments: Any) -> torch.Tensor:
        out: torch.Tensor = self.policy.velocity(*arguments)
        return self.change(out) if self.name == "velocity" else out  # type: ignore[no-any-return]

    def sigmas(self, *arguments: Any) -> torch.Tensor:
        out: torch.Tensor = self.policy.sigmas(*arguments)
        return self.change(out) if self.name == "sigmas" else out  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("velocity", lambda v: v.bfloat16(), "Broken.velocity gives bfloat16.*return float32"),
        ("velocity", lambda v: v[:, :2], "must agree"),
        ("sigmas", lambda s: s.half(), "float16.*must be float32"),
        ("sigmas", lambda s: s.double(), "float64.*must be float32"),
        ("sigmas", lambda s: s.flip(0), "must fall"),
        ("sigmas", lambda s: s + 1e-3 * (s < 0.5), "exactly 0"),
        ("sigmas", lambda s: s[1:], "must have one more"),
        ("sigmas", lambda s: s * 1.01, "from 1 at most"),
    ],
)
def test_a_policy_in_low_precision_or_with_a_strange_schedule_is_refused(
    policy: SD3Policy, name: str, change: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Sampler(Broken(policy, name, change), config())  # type: ignore[arg-type]
    if name == "velocity" and "float32" in words:
        rollout = draw(policy)
        with pytest.raises(TypeError, match="float32"):
            replay(Broken(policy, name, change), rollout, 0)  # type: ignore[arg-type]


def test_the_recipes_can_be_drawn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    world = load("world")
    made = SD3Policy.load(world.policy.path, **world.policy.options())
    sampler = Sampler(made, world)
    assert sampler.shape == geometry(made, "eval", 10, 28, 28)[0] == sampler.eval_shape
    assert sampler.levels == (0.8,) * 10
    windows = [sampler.window(step, 0) for step in range(50)]
    assert {window.start for window in windows if window} == {0, 1, 2, 3}


def test_a_run_draws_as_its_recipe_says(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real steps against a real service: branches, a sliding window, early noise, dpm2m, guided in part; evaluated at twice the size."""
    monkeypatch.chdir(root)
    drawn = {
        "steps": 8, "window": 2, "window_last": 6, "window_kind": "sliding", "window_every": 1, "prefix": "shared", "branches": 2,
        "kind": "cps", "noise_level": 0.5, "noise_schedule": "early", "solver": "dpm2m", "steps_after": 3, "guidance": 2.0,
        "guided_steps": [0, 4], "height": 16, "width": 16, "micro_batch": 8,
    }  # fmt: skip
    policy = {
        "use": "sd3",
        "path": str(tiny.write(tmp_path / "tiny")),
        "max_sequence_length": tiny.LENGTH,
        "lora": {"rank": 2, "alpha": 4},
    }
    evaluated = {"every": 2, "samples": 4, "steps": 4, "grid": 4, "height": 32, "width": 32, "solver": "dpm2m"}
    with serve() as service:
        raw = recipe(service.url, policy=policy, sampling=drawn, eval=evaluated, steps=2)
        run = loop.Run(validate(raw, "recipe"), tmp_path / "run")
        try:
            assert loop.train(run) == "finished"
            assert run.pictures(2)[0].shape == (2, 32, 32, 3)
        finally:
            run.close()
        assert service.pictures == 2 * 8 + 2 * 4
    steps = [line for line in read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["skipped"] for line in steps] == [False, False]
    assert all(line["ratio_dev"] < 1e-5 and line["grad_norm"] > 0 for line in steps), steps
