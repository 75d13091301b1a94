"""The learner over a random Stable Diffusion 3 of a thousand weights: every loss, what it is compared with, and what may go wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer import tiny
from tests.trainer.run.service import recipe, serve
from trainer import loop
from trainer.advantages.common import Advantages
from trainer.advantages.group_relative import group_relative
from trainer.checkpoint import CheckpointError, Saved
from trainer.config import FORWARD, ConfigError, RunConfig, validate
from trainer.learning import Diverged, Learner, rows_of
from trainer.objectives import Forward
from trainer.policies.sd3 import SD3Policy
from trainer.real import RealPictures
from trainer.sampling.rollout import sample
from trainer.snapshots import Snapshot, old_decay
from trainer.types import Prompt, Rollout, Window

PROMPTS = [Prompt(0, "a photo of a bag"), Prompt(1, "a red boot")]
SIZE, GROUP = 16, 4
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "guard": {},
    "nft": {"times": 2},
    "awm": {"times": 2, "time_weight": "t"},
    "dpo": {"times": 3},
    "dgpo": {"times": 3},
    "crd": {"times": 2},
    "rft": {"times": 3, "keep": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("learning"))


@pytest.fixture
def policy(folder: Path) -> Any:
    return load(folder)


def load(folder: Path) -> Any:
    """With an adapter that is not zero, so that everything has a gradient."""
    made = SD3Policy.load(folder, max_sequence_length=tiny.LENGTH, lora={"rank": 4, "alpha": 8})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.trainable().items():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def config(loss: str, /, *, micro_batch: int = 64, **changes: Any) -> RunConfig:
    options = {"use": loss, **LOSSES[loss], **changes.pop("loss", {})}
    window = {"window": None} if loss in FORWARD else {"window": 2, "window_last": 4}
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "policy": {"use": "sd3", "path": "somewhere"},
            "prompts": {"train": "train.jsonl", "eval": "eval.jsonl"},
            "sampling": {"steps": 6, "height": SIZE, "width": SIZE, "micro_batch": micro_batch, **window},
            "group": {"prompts": 2, "size": GROUP},
            "rewards": {"brightness": {"url": "http://localhost:1"}},
            "optim": {"lr": 1e-2, **changes.pop("optim", {})},
            "loss": options,
            **changes,
        }
    )


def draw(policy: Any, c: RunConfig, step: int = 0, first: int = 0, prompts: list[Prompt] = PROMPTS) -> Rollout:
    members = [(n, prompt) for prompt in prompts for n in range(c.group.size)]
    return sample(
        policy,
        [prompt for _, prompt in members],
        [1000 * step + 100 * prompt.id + n for n, prompt in members],
        sigmas=policy.sigmas(c.sampling.steps, SIZE, SIZE),
        shape=policy.latent_shape(SIZE, SIZE),
        window=Window(1, 2) if c.sampling.window else None,
        group=first,
    )


def judged(rewards: torch.Tensor, size: int = GROUP) -> Advantages:
    """Advantages of one reward over groups of `size`."""
    rewards = rewards.double()[None]
    group = torch.arange(rewards.shape[1]) // size
    return group_relative(rewards, torch.ones_like(rewards, dtype=torch.bool), group, torch.ones(1))


def brightness(rollout: Rollout) -> torch.Tensor:
    return torch.from_numpy(rollout.images_BHWC.reshape(len(rollout.prompts), -1).mean(1)).float()


def given(rollout: Rollout, seed: int = 1) -> Advantages:
    return judged(torch.randn(len(rollout.prompts), generator=torch.Generator().manual_seed(seed)))


def gradients(learner: Learner, rollout: Rollout, advantages: Advantages, step: int = 0) -> list[torch.Tensor]:
    """The gradients that `finish` steps along, each one vector."""
    taken: list[torch.Tensor] = []
    update = learner._update

    def catch() -> bool:
        taken.append(
            torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in learner.weights.values()])
        )
        return update()

    learner._update = catch  # type: ignore[method-assign]
    learner.learn([rollout], advantages, step)
    learner._update = update  # type: ignore[method-assign]
    return taken


def gradient(learner: Learner, rollout: Rollout, advantages: Advantages, step: int = 0) -> torch.Tensor:
    """That of the first update; zero where there is nothing to learn from."""
    taken = gradients(learner, rollout, advantages, step)
    return taken[0] if taken else torch.zeros(sum(p.numel() for p in learner.weights.values()))


def moved(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.weights.values()])


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_without_advantages_there_is_no_gradient(loss: str, policy: Any) -> None:
    c = config(loss)
    rollout = draw(policy, c)
    learner = Learner(policy, c)
    real = gradient(learner, rollout, given(rollout))
    none = gradient(Learner(policy, c), rollout, judged(torch.ones(len(rollout.prompts))))
    assert real.abs().max() > 1e-6
    assert none.abs().max() < 1e-4 * real.abs().max()


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_micro_batch_changes_nothing(loss: str, folder: Path) -> None:
    """Nor in a second update, where what the first one was compared with is kept; with a sample that nobody scored."""
    found = []
    for size in (64, 8, 3, 1):
        policy = load(folder)
        c = config(loss, micro_batch=size, kl={"weight": 0.1}, optim={"updates": 2, "lr": 1e-7})
        rollout = draw(policy, c)
        rewards = torch.randn(1, 8, generator=torch.Generator().manual_seed(1)).double()
        mask = torch.ones(1, 8, dtype=torch.bool)
        mask[0, 1] = False
        advantages = group_relative(rewards, mask, torch.arange(8) // GROUP, torch.ones(1))
        found.append(gradients(Learner(policy, c), rollout, advantages))
    for other in found[1:]:
        assert len(other) == 2
        for mine, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_rollout_by_rollout_is_the_same_as_at_once(loss: str, folder: Path) -> None:
    """Also where a part of a group is missing, and where the total was expected to be another."""
    ends = []
    for way in ("learn", "in turn", "in turn, all expected"):
        policy = load(folder)
        c = config(loss, kl={"weight": 0.1}, optim={"updates": 2})
        rollouts = [draw(policy, c, first=n, prompts=[PROMPTS[n]]) for n in range(2)]
        rewards = torch.randn(1, 8, generator=torch.Generator().manual_seed(5)).double()
        mask = torch.ones(1, 8, dtype=torch.bool)
        mask[0, 2] = False
        advantages = group_relative(rewards, mask, torch.arange(8) // GROUP, torch.ones(1))
        learner = Learner(policy, c)
        if way == "learn":
            numbers = learner.learn(rollouts, advantages, 0)
        else:
            parts = [rows_of(advantages, slice(4 * n, 4 * n + 4)) for n in range(2)]
            learner.begin(8.0 if "all" in way else sum(map(learner.objective.weight, rollouts, parts)), 0)
            for rollout, part in zip(rollouts, parts, strict=True):
                learner.accumulate(rollout, part)
            numbers = learner.finish()
        assert learner.updates == 2 and numbers["skipped_updates"] == 0
        ends.append(moved(learner))
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-3, atol=1e-4)  # Adam divides by its first gradient, whatever its size


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_twenty_steps_make_brighter_pictures(loss: str, folder: Path) -> None:
    """From fixed noise along the ODE, so that the difference has no chance in it; pictures differ by 0.6 among themselves."""
    policy = SD3Policy.load(folder, max_sequence_length=tiny.LENGTH, lora={"rank": 4, "alpha": 8})
    options = ({"times": 5} if loss in FORWARD else {}) | ({"beta": 30.0} if loss == "dpo" else {})
    c = config(loss, loss=options, group={"prompts": 2, "size": 16})
    learner = Learner(policy, c)

    def level() -> float:
        shape, sigmas = policy.latent_shape(SIZE, SIZE), policy.sigmas(6, SIZE, SIZE)
        seeds, prompts = [7_000_000 + n for n in range(16)], [PROMPTS[n % 2] for n in range(16)]
        return float(brightness(sample(policy, prompts, seeds, sigmas=sigmas, shape=shape, window=None)).mean())

    before = level()
    for step in range(20):
        with learner.sampling_weights():
            rollout = draw(policy, c, step)
        numbers = learner.learn([rollout], judged(brightness(rollout), 16), step)
        assert all(np.isfinite(value) for value in numbers.values())
    assert level() > before + 0.1


def test_noise_and_times_belong_to_the_row_and_not_to_the_batch(policy: Any) -> None:
    c = config("nft", loss={"times": 5})
    together, alone = draw(policy, c), draw(policy, c, first=1, prompts=PROMPTS[1:])
    forward = Learner(policy, c).objective
    assert isinstance(forward, Forward)
    one, other = (forward._at(rollout, torch.tensor([row]), 2, 7) for rollout, row in ((together, 5), (alone, 1)))
    assert torch.equal(one.noise, other.noise) and torch.equal(one.t_B, other.t_B)
    assert not torch.equal(one.noise, forward._at(together, torch.tensor([5]), 2, 8).noise)
    times = torch.cat([forward._at(together, torch.tensor([0]), number, 7).t_B for number in range(5)])
    assert torch.equal(times.sort().values, together.sigmas[:5].sort().values), "each of the sampler's times once, not the last"
    rows = forward._at(together, torch.arange(8), 0, 7)
    assert len(rows.noise.unique(dim=0)) == 8
    shared = Forward(policy, config("dgpo"))._at(together, torch.arange(8), 0, 7)
    assert len(shared.noise.unique(dim=0)) == 2 and len(shared.t_B[:4].unique()) == 1
    torch.testing.assert_close(shared.x[5], (1 - shared.t_B[5]) * together.latents_BCHW[5] + shared.t_B[5] * shared.noise[5])
    even = Forward(policy, config("nft", loss={"times": 4, "time_from": "uniform"}))
    spread = [float(even.draw(("row", 3), number, 7, together.sigmas, (1,))[0]) for number in range(4)]
    assert [int(4 * t) for t in spread] == [0, 1, 2, 3]


def test_a_gradient_that_is_no_number_changes_nothing(policy: Any) -> None:
    c = config("grpo", optim={"max_bad_updates": 2, "updates": 2})
    learner = Learner(policy, c)
    rollout = draw(policy, c)
    learner.learn([rollout], given(rollout), 0)
    before = {k: v.clone() for k, v in learner.state()[0].items()}
    velocity, policy.velocity = policy.velocity, lambda *rest, **more: velocity(*rest, **more) * torch.nan
    numbers = learner.learn([rollout], given(rollout), 1)
    assert numbers["skipped_updates"] == 1 and "grad_norm" not in numbers
    after, meta = learner.state()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert (meta["updates"], meta["bad_updates"]) == (2, 1)
    good, policy.velocity = policy.velocity, velocity
    assert learner.learn([rollout], given(rollout), 2)["skipped_updates"] == 0
    assert learner.state()[1]["bad_updates"] == 0 and not torch.equal(
        after["weights/" + next(iter(learner.weights))], moved(learner)
    )
    policy.velocity = good
    learner.learn([rollout], given(rollout), 3)
    with pytest.raises(Diverged, match=r"2 updates in a row.*optim\.lr.*--resume"):
        learner.learn([rollout], given(rollout), 4)
    assert all(p.isfinite().all() for p in learner.weights.values())


def shift(learner: Learner, by: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in learner.weights.values():
            parameter.add_(by)


def test_an_adaptive_reference_becomes_the_policy(folder: Path) -> None:
    def kl_after(step: int, **kl: Any) -> list[float]:
        policy = load(folder)
        c = config("grpo", kl={"weight": 0.1, **kl})
        learner, seen = Learner(policy, c), []
        rollout = draw(policy, c)
        for number in range(step):
            seen.append(learner.learn([rollout], given(rollout), number)["kl"])
        return seen

    initial = kl_after(4)
    assert initial[0] > 0 and initial[1] != initial[0]
    every = kl_after(4, reference="adaptive", reset_every=2)
    assert every[:2] == initial[:2] and every[2] == 0 and 0 < every[3] < initial[3]
    above = kl_after(4, reference="adaptive", reset_above=initial[0] * 0.999)
    assert above[0] == initial[0] and above[1] == 0
    never = kl_after(4, reference="adaptive", reset_above=1e6)
    assert never == initial


def test_the_kl_holds_back_the_gated_samples_only(policy: Any) -> None:
    """The mean over those that the gate names, whatever the micro-batch, on either objective."""
    for loss in ("grpo", "nft"):
        c = config(loss, kl={"weight": 0.5})
        rollout = draw(policy, c)
        quiet = judged(torch.ones(8))
        gate = torch.tensor([0.0, 1, 0, 0, 0, 0, 1, 0])
        found = []
        for size in (64, 3):
            cut = config(loss, kl={"weight": 0.5}, micro_batch=size)
            held = Advantages(quiet.values_B, quiet.weights_B, 0, 0, kl_gate_B=gate)
            start = moved(learner := Learner(policy, cut))
            found.append(gradient(learner, rollout, held))
            restore(learner, start)
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)
        mine = Advantages(quiet.values_B, gate.clone(), 0, 0)
        alone = gradient(learner := Learner(policy, c), rollout, mine)
        restore(learner, start)
        torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-7)
        none = Advantages(quiet.values_B, quiet.weights_B, 0, 0, kl_gate_B=torch.zeros(8))
        assert gradient(learner := Learner(policy, c), rollout, none).abs().max() < 1e-6
        restore(learner, start)


def restore(learner: Learner, flat: torch.Tensor) -> None:
    done = 0
    with torch.no_grad():
        for parameter in learner.weights.values():
            parameter.copy_(flat[done : (done := done + parameter.numel())].view_as(parameter))


def test_the_old_policy_follows_slowly_and_draws_the_pictures(policy: Any) -> None:
    assert [old_decay(1, n) for n in (0, 100, 499, 10_000)] == [0.0, 0.1, 0.499, 0.5]
    assert [round(old_decay(2, n), 4) for n in (0, 75, 76, 175, 10_000)] == [0.0, 0.0, 0.0075, 0.75, 0.999]
    c = config("nft", loss={"old": "ema"})
    learner = Learner(policy, c)
    assert learner.old is not None
    start = moved(learner)
    learner.updates = 400
    rollout = draw(policy, c)
    learner.learn([rollout], given(rollout), 0)
    now = moved(learner)
    with learner.sampling_weights():
        old = moved(learner)
    torch.testing.assert_close(old, 0.401 * start + 0.599 * now, rtol=0, atol=1e-6)
    assert torch.equal(moved(learner), now)
    with pytest.raises(KeyError), learner.sampling_weights():
        raise KeyError
    assert torch.equal(moved(learner), now), "an error while sampling leaves the policy trained"


@pytest.mark.parametrize("loss", ["nft", "grpo"])
def test_a_resumed_learner_goes_on_with_the_same_numbers(loss: str, folder: Path) -> None:
    kl = {"weight": 0.1, "reference": "adaptive", "reset_every": 2}
    c = config(loss, loss={"old": "ema"} if loss == "nft" else {}, kl=kl, optim={"updates": 2})

    def steps(learner: Learner, first: int, last: int) -> list[dict[str, float]]:
        out = []
        for step in range(first, last):
            with learner.sampling_weights():
                rollout = draw(learner.policy, c, step)
            out.append(learner.learn([rollout], given(rollout, step), step))
        return out

    whole = Learner(load(folder), c)
    whole.updates = 300  # so that the old policy is another
    steps(whole, 0, 3)
    tensors, meta = whole.state()
    assert any(k.startswith("reference/") for k in tensors) and meta["reference_age"] == 1
    saved = Saved({k: v.detach().clone() for k, v in tensors.items()}, json.loads(json.dumps(meta)))
    expected = steps(whole, 3, 6)
    again = Learner(load(folder), c)
    again.load_state(saved)
    assert steps(again, 3, 6) == expected
    assert torch.equal(moved(again), moved(whole))
    for mine, theirs in ((again.old, whole.old), (again.reference, whole.reference)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert all(torch.equal(mine.held[k], theirs.held[k]) for k in mine.held)
    short = Saved({k: v for k, v in saved.tensors.items() if "proj" not in k}, saved.meta)
    with pytest.raises(CheckpointError, match=r"policy\.lora"):
        again.load_state(short)


def per_reward(count: int = 8) -> Advantages:
    rows = torch.randn(2, count, generator=torch.Generator().manual_seed(4)).clamp(-5, 5)
    return Advantages(rows.mean(0), torch.ones(count), 0, 0, per_reward_RB=rows)


def marble(**loss: Any) -> RunConfig:
    two = {name: {"url": "http://localhost:1"} for name in ("one", "two")}
    return config("nft", loss={"marble_every": 2, **loss}, rewards=two, advantages={"per_reward": True}, kl={"weight": 0.1})


def test_marble_steps_along_the_shortest_mix_of_the_rewards_gradients(folder: Path) -> None:
    """Weighed anew: a backward pass for each reward; in between: one, through the mixed optimality. Both are the same gradient."""
    c, advantages = marble(), per_reward()
    plain = config("nft", kl={"weight": 0.1})
    rollout = draw(load(folder), c)
    rows = advantages.per_reward_RB
    assert rows is not None

    def mix(weights: list[float], step: int) -> torch.Tensor:
        own = [Advantages(row, torch.ones(8), 0, 0) for row in rows]
        found = [gradient(Learner(load(folder), plain), rollout, one, step) for one in own]
        return weights[0] * found[0] + weights[1] * found[1]

    learner = Learner(load(folder), c)
    weighed = gradient(learner, rollout, advantages, step=0)
    first = learner.marble
    assert sum(first) == pytest.approx(1) and min(first) > 0 and first != [0.5, 0.5]
    torch.testing.assert_close(weighed, mix(first, 0), rtol=1e-3, atol=1e-6)
    between = Learner(load(folder), c)
    between.marble = first
    torch.testing.assert_close(gradient(between, rollout, advantages, step=1), mix(first, 1), rtol=1e-3, atol=1e-6)
    assert between.marble == first, "weighed every second step"
    numbers = learner.learn([rollout], advantages, 1)
    assert [numbers["marble/one"], numbers["marble/two"]] == first == learner.state()[1]["marble"]
    learner.learn([rollout], advantages, 2)
    assert max(abs(x - y) for x, y in zip(learner.marble, first, strict=True)) <= 0.1, "a tenth of what is found at a time"


def test_marble_asks_for_the_rewards_own_advantages(policy: Any) -> None:
    c = marble()
    rollout = draw(policy, c)
    with pytest.raises(ValueError, match="rewards' own advantages"):
        Learner(policy, c).learn([rollout], given(rollout), 0)


IN_A_RUN: dict[str, dict[str, Any]] = {
    "guard": {"loss": {"use": "guard"}, "kl": {"use": "x_kl", "weight": 0.1, "reference": "adaptive", "reset_every": 1}},
    "nft": {"loss": {"use": "nft", "old": "ema", "times": 2}, "kl": {"weight": 1e-4}},
    "awm": {"loss": {"use": "awm", "times": 2, "time_weight": "huber"}, "optim": {"lr": 1e-3, "updates": 2}},
    "crd": {"loss": {"use": "crd", "times": 2, "old": "ema", "old_decay": 2}},
    "dpo": {"loss": {"use": "dpo", "times": 2}, "kl": {"weight": 0.1}},
    "dgpo": {"loss": {"use": "dgpo", "times": 2}},
    "rft": {"loss": {"use": "rft", "times": 2, "keep": 0.25}},
}


@pytest.mark.parametrize("loss", sorted(IN_A_RUN))
def test_a_run_with_it_goes_on_where_it_was_stopped(loss: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the service, the loop and the checkpoints."""
    monkeypatch.chdir(root)

    def run(folder: Path, resume: bool, steps: int) -> list[dict[str, Any]]:
        raw = recipe(service.url, steps=3, **IN_A_RUN[loss])
        if loss in FORWARD:
            raw["sampling"] = {"steps": 4, "window": None, "height": 28, "width": 28, "micro_batch": 8, "solver": "dpm2m"}
        made = loop.Run(RunConfig.model_validate(raw), folder, resume=resume)
        try:
            lines = [made.step() for _ in range(steps)]
            made.save()
        finally:
            made.close()
        return [{k: v for k, v in line.items() if not k.startswith(("seconds", "pictures/"))} for line in lines]

    with serve() as service:
        whole = run(tmp_path / "whole", False, 3)
        halves = run(tmp_path / "halves", False, 2) + run(tmp_path / "halves", True, 1)
    assert halves == whole
    assert all(line["grad_norm"] > 0 and line["skipped_updates"] == 0 for line in whole)


def pictures(folder: Path, value: int = 250, count: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    for n in range(count):
        Image.fromarray(np.full((20 + 4 * n, 24, 3), value, np.uint8)).save(folder / f"{n}.png")


def test_real_pictures_come_from_a_folder_a_list_or_an_array(tmp_path: Path) -> None:
    pictures(tmp_path / "some")
    with pytest.raises(ConfigError, match=r"0\.png has no prompt: write it into 0\.txt"):
        RealPictures(tmp_path / "some", 16, 16)
    for n in range(3):
        (tmp_path / "some" / f"{n}.txt").write_text(f"bag {n}\n")
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps({"image": f"some/{n}.png", "prompt": f"bag {n}"}) + "\n" for n in range(3)))
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, None, :, None] * 8, (3, 16, 32, 3))
    np.savez(tmp_path / "all.npz", images=ramp, prompts=np.array([f"bag {n}" for n in range(3)]))
    for path in (tmp_path / "some", listed, tmp_path / "all.npz"):
        real = RealPictures(path, 16, 16)
        images, prompts = real.of([2, 0])
        assert len(real) == 3 and images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
        assert prompts == ["bag 2", "bag 0"]
    assert images[0, 0, :, 0].tolist() == [8 * n for n in range(8, 24)], "the middle, not squeezed"


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("missing", None, "a folder of NAME.png"),
        ("a.jsonl", '{"image": "../other.png", "prompt": "x"}', "line 1: no picture"),
        ("a.jsonl", '{"image": "/etc/hostname", "prompt": "x"}', "line 1: no picture"),
        ("a.jsonl", '{"picture": "x"}', "line 1: write"),
        ("a.jsonl", "", "holds no pictures"),
        ("a.npz", "not an archive", r"a\.npz"),
    ],
)
def test_what_is_no_real_picture_is_said(name: str, content: str | None, says: str, tmp_path: Path) -> None:
    (tmp_path / "other.png").write_bytes(b"")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        RealPictures(path, 16, 16)


def test_damaged_real_pictures_and_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    (tmp_path / "a.txt").write_text("a bag")
    with pytest.raises(ConfigError, match=r"a\.png"):
        RealPictures(tmp_path, 16, 16).of([0])
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 16, 16, 3), np.uint8), prompts=np.array(["x", None], dtype=object))
    with pytest.raises(ConfigError, match="prompts"):
        RealPictures(tmp_path / "b.npz", 16, 16)
    np.savez(tmp_path / "c.npz", images=np.zeros((1, 16, 16), np.uint8), prompts=np.array(["x"]))
    with pytest.raises(ConfigError, match=r"uint8 \(1, 16, 16\)"):
        RealPictures(tmp_path / "c.npz", 16, 16)


def test_a_share_of_real_pictures_is_a_share_of_the_gradient(folder: Path, tmp_path: Path) -> None:
    pictures(tmp_path)
    for n in range(3):
        (tmp_path / f"{n}.txt").write_text("a photo of a bag")

    def step(**loss: Any) -> torch.Tensor:
        policy = load(folder)
        c = config("rft", loss=loss)
        rollout = draw(policy, c)
        return gradient(Learner(policy, c), rollout, given(rollout) if loss["keep"] < 1 else judged(torch.ones(8)))

    own = step(keep=0.5)
    mixed = step(keep=0.5, real=tmp_path, real_share=0.5)
    real = step(keep=0.9999, real=tmp_path, real_share=0.5)
    assert real.abs().max() > 0 and own.abs().max() > 0
    rest = mixed - 0.5 * own
    assert (
        float(torch.nn.functional.cosine_similarity(rest, step(keep=0.5, real=tmp_path, real_share=0.9) - 0.1 * own, dim=0)) > 0.9
    )
    policy = load(folder)
    policy.encode_pixels = None
    del policy.encode_pixels
    without = type("Bare", (), {"__getattr__": lambda self, name: missing(policy, name)})()
    with pytest.raises(ConfigError, match="encodes pictures"):
        Learner(without, config("rft", loss={"real": tmp_path, "real_share": 0.5}))


def missing(policy: Any, name: str) -> Any:
    """All of the policy but one method."""
    if name == "encode_pixels":
        raise AttributeError(name)
    return getattr(policy, name)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss": {"use": "nft", "clip_low": 1e-4}}, "clip_low is nothing that loss.use=nft reads.*set loss.clip_low=null"),
    ({"loss": {"use": "grpo", "beta": 1.0}}, "beta is nothing that loss.use=grpo reads"),
    ({"loss": {"clip_low": 0.2}}, r"loss\.clip_low=0\.2 does not belong to loss\.use=grpo.*published range is 0\.0001"),
    ({"loss": {"use": "guard"}, "sampling": {"kind": "cps"}}, "guard is not defined for sampling.kind=cps"),
    ({"loss": {"use": "guard", "clip_high": 0.1}}, "clip_high=0.1 does not belong"),
    ({"sampling": {"window": None}}, "loss.use=grpo learns from the steps of a window"),
    ({"loss": {"use": "nft"}, "kl": {"use": "x_kl", "weight": 0.1}}, "set kl.use=v_kl"),
    ({"loss": {"use": "nft", "times": 40}}, "loss.times=40, but 10 steps have 9"),
    ({"loss": {"use": "nft"}, "sampling": {"guided_steps": [0, 3], "guidance": 2.0}}, "leave sampling.guided_steps away"),
    ({"loss": {"use": "rft"}}, "set one of loss.keep"),
    ({"loss": {"use": "rft", "keep": 0.5, "real_share": 0.5}}, "loss.real and loss.real_share go together"),
    ({"loss": {"use": "nft", "marble_every": 5}}, "advantages.per_reward=true"),
    ({"loss": {"use": "nft", "marble_every": 5}, "advantages": {"per_reward": True}}, "weighs several rewards"),
    ({"kl": {"reference": "adaptive", "weight": 0.1}}, "set kl.reset_every"),
    ({"kl": {"reset_every": 3, "weight": 0.1}}, "set kl.reference=adaptive"),
    ({"kl": {"reference": "adaptive", "reset_every": 3}}, "set kl.weight"),
    ({"loss": {"use": "ntf"}}, "'nft'"),
]


@pytest.mark.parametrize("change, says", REFUSED)
def test_what_does_not_go_together_is_refused(change: dict[str, Any], says: str) -> None:
    base = config("grpo").model_dump(mode="json", include={"name", "policy", "prompts", "rewards"})
    with pytest.raises(ConfigError, match=says):
        validate(base | change, "here")


def test_clip_ranges_are_the_published_ones_unless_given() -> None:
    assert config("grpo").clip_range() == (1e-4, 1e-4)
    assert config("guard").clip_range() == (2e-6, 2e-6)
    assert config("grpo", sampling={"kind": "cps"}).clip_range() == (1e-5, 1e-5)
    assert config("grpo", loss={"clip_high": 3e-4}).clip_range() == (1e-4, 3e-4)
    assert config("awm").clip_range() == (1e-5, 1e-5) and config("nft").clip_range() is None


def test_a_clip_range_far_from_the_published_one_is_told(policy: Any) -> None:
    with pytest.warns(UserWarning, match="far from the published 2e-06"):
        Learner(policy, config("guard", loss={"clip_low": 1e-3}))


def test_a_snapshot_is_worn_and_taken_off(policy: Any) -> None:
    weights = policy.trainable()
    name = next(iter(weights))
    snapshot = Snapshot(weights)
    with torch.no_grad():
        weights[name].add_(1.0)
    now = weights[name].detach().clone()
    with snapshot.worn():
        torch.testing.assert_close(weights[name].detach(), now - 1)
    assert torch.equal(weights[name].detach(), now)
