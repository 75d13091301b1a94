"""Our formulas against outputs of the authors' own code; VERISM_VECTORS names another file of the same keys."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import tiny, tiny_families
from trainer.advantages.group_relative import group_relative
from trainer.losses.awm import awm
from trainer.losses.common import velocity_error
from trainer.losses.crd import crd
from trainer.losses.dgpo import dgpo
from trainer.losses.dpo import dpo
from trainer.losses.grpo import grpo
from trainer.losses.guard import guard
from trainer.losses.nft import nft
from trainer.policies.ema import EMA
from trainer.policies.flow import deviation, step
from trainer.policies.flux import FluxPolicy
from trainer.policies.sd3 import SD3Policy
from trainer.regularizers.kl import v_kl, x_kl
from trainer.sampling.sampler import members
from trainer.sampling.windows import window_of
from trainer.types import Prompt

pytestmark = pytest.mark.xdist_group("vectors")  # one process sees which arrays were looked at

FILE = Path(os.environ.get("VERISM_VECTORS", Path(__file__).parents[2] / "data" / "reference_vectors.npz"))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Read(dict[str, np.ndarray]):
    """Arrays by key, and which were asked for."""

    asked: set[str]

    def __getitem__(self, key: str) -> np.ndarray:
        self.asked.add(key)
        return super().__getitem__(key)


@pytest.fixture(scope="module")
def vectors() -> Any:
    with np.load(FILE, allow_pickle=False) as file:
        out = Read({key: file[key] for key in file.files})
    out.asked = set()
    return out


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


@pytest.mark.parametrize("schedule", ["sd3_10", "sd3_40", "flux_6_1024", "flux_28_4096"])
@pytest.mark.parametrize("level", ["03", "07", "09", "12"])
@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_flow_grpo_steps(vectors: Any, schedule: str, level: str, kind: str) -> None:
    at, key = f"sde_{schedule}_", f"sde_{schedule}_a{level}_{kind}_"
    out = step(
        tensor(vectors[at + "sample"]),
        tensor(vectors[at + "model_output"]),
        tensor(vectors[at + "sigmas"]),
        tensor(vectors[at + "step_index"]),
        int(level) / 10,
        kind,
        prev=tensor(vectors[key + "prev"]),
    )
    np.testing.assert_allclose(out.mean, vectors[key + "mean"], **TOLERANCE)
    np.testing.assert_allclose(out.diffusion_B, vectors[key + "std"], **TOLERANCE)
    assert out.logp_B is not None
    np.testing.assert_allclose(out.logp_B, vectors[key + "logp"], **TOLERANCE)
    x, v, noise = (tensor(vectors[at + name]) for name in ("sample", "model_output", "noise"))
    sigmas, index = tensor(vectors[at + "sigmas"]), tensor(vectors[at + "step_index"])
    drawn = step(x, v, sigmas, index, int(level) / 10, kind, noise=noise)
    np.testing.assert_allclose(drawn.prev, vectors[key + "prev"], **TOLERANCE)
    np.testing.assert_allclose(1000 * sigmas[:-1], vectors[at + "timesteps"], **TOLERANCE)


def test_flux_schedules(vectors: Any, tmp_path: Path) -> None:
    policy = FluxPolicy.load(tiny_families.write("flux", tmp_path), max_sequence_length=tiny.LENGTH)
    published = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    policy.pipeline.scheduler.register_to_config(**published)
    for steps, tokens in ((6, 1024), (28, 4096)):
        side = 4 * int(tokens**0.5)  # this autoencoder halves, and a token is 2x2
        np.testing.assert_allclose(policy.sigmas(steps, side, side), vectors[f"sde_flux_{steps}_{tokens}_sigmas"], **TOLERANCE)


def test_sd3_schedules(vectors: Any, tmp_path: Path) -> None:
    policy = SD3Policy.load(tiny.write(tmp_path), max_sequence_length=tiny.LENGTH)
    for steps in (10, 40):
        np.testing.assert_allclose(policy.sigmas(steps, 16, 16), vectors[f"sde_sd3_{steps}_sigmas"], **TOLERANCE)


@pytest.mark.parametrize("shape, steps", [("packed", [2, 9, 13]), ("video", [2, 9])])
@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_other_latent_shapes(vectors: Any, shape: str, steps: list[int], kind: str) -> None:
    key = f"sdeshape_{shape}_"
    out = step(
        tensor(vectors[key + "sample"]),
        tensor(vectors[key + "model_output"]),
        tensor(vectors["sde_flux_28_4096_sigmas"]),
        torch.tensor(steps),
        0.9,
        kind,
        prev=tensor(vectors[f"{key}{kind}_prev"]),
    )
    np.testing.assert_allclose(out.mean, vectors[f"{key}{kind}_mean"], **TOLERANCE)
    np.testing.assert_allclose(out.diffusion_B, vectors[f"{key}{kind}_std"].reshape(-1), **TOLERANCE)
    assert out.logp_B is not None
    np.testing.assert_allclose(out.logp_B, vectors[f"{key}{kind}_logp"], **TOLERANCE)
    x, v = tensor(vectors[key + "sample"]), tensor(vectors[key + "model_output"])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    drawn = step(x, v, tensor(vectors["sde_flux_28_4096_sigmas"]), torch.tensor(steps), 0.9, kind, noise=noise)
    np.testing.assert_allclose(drawn.prev, vectors[f"{key}{kind}_prev"], **TOLERANCE)


@pytest.mark.parametrize("theirs, ours", [("flowsde", "sde"), ("dancesde", "dance"), ("cps", "cps"), ("ode", "ode")])
def test_flow_factory_steps(vectors: Any, theirs: str, ours: str) -> None:
    key = f"ff_{theirs}_"
    out = step(
        tensor(vectors["ff_sample"]),
        tensor(vectors["ff_model_output"]),
        tensor(vectors["sde_sd3_10_sigmas"]),
        tensor(vectors["ff_step_index"]),
        0.7,
        ours,
        prev=tensor(vectors[key + "next"]),
    )
    np.testing.assert_allclose(out.mean, vectors[key + "mean"], **TOLERANCE)
    np.testing.assert_allclose(out.diffusion_B, vectors[key + "std"], **TOLERANCE)
    if ours == "ode":
        assert out.logp_B is None and not vectors[key + "logp"].any(), "no log-probability, where theirs is 0"
    else:
        assert out.logp_B is not None
        np.testing.assert_allclose(out.logp_B, vectors[key + "logp"], **TOLERANCE)


def test_dance_steps(vectors: Any) -> None:
    x = tensor(vectors["dance_sample"]).expand(16, -1, -1, -1)
    v = tensor(vectors["dance_model_output"]).expand(16, -1, -1, -1)
    prev = tensor(vectors["dance_prev"])
    out = step(x, v, tensor(vectors["dance_sigmas"]), torch.arange(16), 0.3, "dance", prev=prev)
    np.testing.assert_allclose(out.mean, vectors["dance_mean"], **TOLERANCE)
    assert out.logp_B is not None
    np.testing.assert_allclose(out.logp_B, vectors["dance_logp"][:, 0], **TOLERANCE)


@pytest.mark.parametrize("index", [1, 5, 8])
def test_steps_of_two_policies_and_their_ratios(vectors: Any, index: int) -> None:
    key = f"derived_guard_step{index}_"
    x, v_old, v_new, noise = (tensor(vectors[f"derived_guard_{name}"]) for name in ("x", "v_old", "v_new", "noise"))
    sigmas, at = tensor(vectors["sde_sd3_10_sigmas"]), torch.full((len(x),), index)
    old = step(x, v_old, sigmas, at, 0.9, "sde", noise=noise)
    new = step(x, v_new, sigmas, at, 0.9, "sde", prev=old.prev)
    assert old.logp_B is not None and new.logp_B is not None
    for name, out in (("old", old), ("new", new)):
        np.testing.assert_allclose(out.mean, vectors[f"{key}mean_{name}"], **TOLERANCE)
        np.testing.assert_allclose(out.logp_B, vectors[f"{key}logp_{name}"], **TOLERANCE)  # type: ignore[arg-type]
    g, root_dt = (float(number) for number in vectors[key + "std_sqrtdt"])
    std_g, std = deviation(sigmas, at, 0.9, "sde")
    np.testing.assert_allclose(std_g, [g] * len(x), **TOLERANCE)
    np.testing.assert_allclose(std, [g * root_dt] * len(x), **TOLERANCE)
    down, wide = -torch.ones(len(x)), 1e9  # an unclipped loss at advantage -1 is the ratio
    logp = new.logp_B, old.logp_B
    plain = grpo(*logp, down, wide, wide).values_B
    np.testing.assert_allclose(plain, vectors[key + "ppo_ratio"], **TOLERANCE)
    ours = guard(*logp, new.mean, old.mean, g, root_dt, down, wide, wide).values_B * root_dt**2
    np.testing.assert_allclose(ours, vectors[key + "guard_ratio"], **TOLERANCE)
    # RealGen's code takes one bias for the whole batch; with that in place of each sample's own, its ratios come out
    bias_B = ((new.mean - old.mean) ** 2).flatten(1).mean(1) / (2 * (g * root_dt) ** 2)
    np.testing.assert_allclose(
        ours * torch.exp((bias_B.mean() - bias_B) * g * root_dt), vectors[key + "guard_ratio_batchbias"], **TOLERANCE
    )


def test_trajectories_in_low_precision_move_the_ratio(vectors: Any) -> None:
    """Their table shows a scale (its inputs are not kept): ours is of that scale, and float32 has none of it."""
    sigmas, levels = tensor(vectors["sde_sd3_10_sigmas"]), {"bf16": torch.bfloat16, "fp16": torch.float16}
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(10, 16, 8, 8, generator=generator) for _ in range(3))
    out = step(x, v, sigmas, torch.arange(10), 0.7, "sde", noise=noise)
    assert out.logp_B is not None
    for name, dtype in levels.items():
        kept = step(x.to(dtype), v, sigmas, torch.arange(10), 0.7, "sde", prev=out.prev.to(dtype))
        assert kept.logp_B is not None
        ours, theirs = (np.abs(r - 1) for r in (torch.exp(kept.logp_B - out.logp_B).numpy(), vectors[f"prec_ratio_{name}_storage"]))
        assert 0.1 < np.median(ours) / np.median(theirs) < 10, (name, ours, theirs)
        assert theirs.max() > 1e-5 < ours.max(), "more than a tenth of a clip range of 1e-4"
    again = step(x, v, sigmas, torch.arange(10), 0.7, "sde", prev=out.prev)
    assert again.logp_B is not None and float((torch.exp(again.logp_B - out.logp_B) - 1).abs().max()) < 2e-6


def test_windows_of_mixgrpo(vectors: Any) -> None:
    """Theirs shrink behind step 19 and are empty once before they start again; ours go back while they are whole."""
    theirs, whole = vectors["mix_window_progressive"], 3 * 20
    assert (theirs[:whole, 1] == 4).all() and (theirs[whole:, 1] < 4).any() and (theirs[:, 1] == 0).any()
    ours = [window_of(0, step, 0, 4, 0, 23, kind="sliding", stride=1, every=3, back=True) for step in range(len(theirs))]
    assert [(window.start, window.length) for window in ours[:whole]] == [tuple(row) for row in theirs[:whole]]
    again = int(np.flatnonzero(theirs[whole:, 0] == 0)[0]) + whole
    count = len(theirs) - again
    assert [window.start for window in ours[whole : whole + count]] == theirs[again:, 0].tolist()
    drawn = {window_of(seed, 0, 0, 4, 0, 23).start for seed in range(400)}
    assert set(vectors["mix_window_random"].tolist()) <= drawn == set(range(20)), "another stream of numbers over the same places"


def test_groups_are_whole_as_the_samplers_make_them(vectors: Any) -> None:
    """The streams differ; what has to hold is the same: every prompt exactly K times, and ours in one piece on one rank."""

    def whole(prompts: np.ndarray, size: int, count: int) -> bool:
        return sorted(Counter(prompts.reshape(-1).tolist()).values()) == [size] * count

    assert all(whole(epoch, 6, 2) for epoch in vectors["sampler_krepeat"])
    assert whole(vectors["sampler_ff_DistributedKRepeatSampler"], 4, 6)
    contiguous = vectors["sampler_ff_GroupContiguousSampler"]
    assert whole(contiguous, 4, 4) and not set(contiguous[0].flat) & set(contiguous[1].flat)
    spread = vectors["sampler_ff_GroupDistributedSampler"]
    assert whole(spread, 4, 4) and all(whole(rank, 2, 4) for rank in spread)
    prompts = [Prompt(id, f"prompt {id}") for id in range(4)]
    chosen, seeds, _ = members(prompts, 0, 4, 1, 4, 7, 0)
    ours = np.array([prompt.id for prompt in chosen])
    assert whole(ours, 4, 4) and len(set(seeds)) == 16
    assert (np.diff(ours.reshape(4, 4), axis=1) == 0).all(), "a group is a row"


@pytest.mark.parametrize("index", [1, 5, 8])
def test_policy_losses_and_kl(vectors: Any, index: int) -> None:
    key = f"derived_guard_step{index}_"
    new, old = tensor(vectors[key + "logp_new"]), tensor(vectors[key + "logp_old"])
    mean_new, mean_old = tensor(vectors[key + "mean_new"]), tensor(vectors[key + "mean_old"])
    advantages = tensor(vectors["derived_guard_adv"]).clamp(-5, 5)
    g, root_dt = (float(number) for number in vectors[key + "std_sqrtdt"])
    plain = grpo(new, old, advantages, 1e-4, 1e-4)
    np.testing.assert_allclose(plain.values_B.mean(), vectors[key + "ppo_loss"], **TOLERANCE)
    guarded = guard(new, old, mean_new, mean_old, g, root_dt, advantages, 2e-6, 2e-6)
    np.testing.assert_allclose(guarded.values_B.mean(), vectors[key + "guard_loss"], rtol=1e-4, atol=1e-6)
    diffusion = torch.full((6,), g)
    np.testing.assert_allclose(x_kl(mean_new, mean_old, diffusion).mean(), vectors[key + "kl_x"], **TOLERANCE)
    v_new, v_old = tensor(vectors["derived_guard_v_new"]), tensor(vectors["derived_guard_v_old"])
    np.testing.assert_allclose(v_kl(v_new, v_old).mean(), vectors[key + "kl_v"], **TOLERANCE)


def test_losses_on_noised_pictures(vectors: Any) -> None:
    keys = ("x0", "eps", "v_old", "v_new", "v_ref", "t", "adv_clamped")
    x0, eps, v_old, v_new, v_ref, t, advantages = (tensor(vectors[f"derived_fwd_{key}"]) for key in keys)
    new, old, ref = (velocity_error(v, x0, eps) for v in (v_new, v_old, v_ref))
    two, one = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long)
    ours = {
        "nft_beta1p0": nft(v_new, v_old, x0, eps, t, advantages, beta=1.0),
        "nft_beta0p1": nft(v_new, v_old, x0, eps, t, advantages, beta=0.1),
        "awm_uniform": awm(new, old, advantages, 1e-5, 1e-5),
        "dpo": dpo(new[:2], new[2:], ref[:2], ref[2:], beta=2.0),
        "dgpo": dgpo(new, ref, advantages, two, beta=100.0),
        "crd": crd(new, old, advantages, one, beta=1.0),
    }
    for name, loss in ours.items():
        np.testing.assert_allclose(loss.values_B.mean(), vectors[f"derived_{name}"], err_msg=name, **TOLERANCE)


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("column", [0, 1])
def test_group_advantages_per_step(vectors: Any, std: str, column: int) -> None:
    rewards = tensor(vectors["adv_rewards_2d"])[None, :, column]
    given = torch.ones_like(rewards, dtype=torch.bool)
    out = group_relative(rewards, given, tensor(vectors["adv_group_id"]), torch.ones(1), std=std, clip=1e9, min_valid=1)  # type: ignore[arg-type]
    np.testing.assert_allclose(out.values_B, vectors[f"adv_grpo_{std}std_2d"][:, column], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("std", ["group", "global"])
def test_group_advantages(vectors: Any, std: str) -> None:
    rewards = tensor(vectors["adv_rewards"])[None]
    out = group_relative(
        rewards,
        torch.ones_like(rewards, dtype=torch.bool),
        tensor(vectors["adv_group_id"]),
        torch.ones(1),
        std=std,  # type: ignore[arg-type]
        clip=1e9,
    )
    expected = vectors[f"adv_grpo_{std}std"]
    scored = out.weights_B.bool()
    assert int((~scored).sum()) == 1  # the group of one is dropped, where the reference gives it 0
    np.testing.assert_allclose(out.values_B[scored], expected[scored.numpy()], rtol=1e-5, atol=1e-6)


def test_realgen_mix_of_two_rewards(vectors: Any) -> None:
    rewards = torch.stack([tensor(vectors["adv_rewards"]), tensor(vectors["adv_rewards_B"])])
    out = group_relative(
        rewards,
        torch.ones_like(rewards, dtype=torch.bool),
        tensor(vectors["adv_group_id"]),
        torch.tensor([1.0, 0.5]),
        clip=1e9,
    )
    scored = out.weights_B.bool()
    np.testing.assert_allclose(out.values_B[scored], vectors["adv_realgen_mix_w1_0p5"][scored.numpy()], rtol=1e-5, atol=1e-6)


def test_ema(vectors: Any) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = EMA({"p": parameter}, decay=0.9, every=8)
    for number, expected in enumerate(vectors["ema_trace"]):
        parameter.data += 0.1
        ema.update(number)
        np.testing.assert_allclose(ema.average["p"], expected, rtol=1e-5)
    with ema.swapped():
        np.testing.assert_allclose(parameter.detach(), vectors["ema_trace"][-1], rtol=1e-5)
    np.testing.assert_allclose(parameter.detach(), [5.0, 6.0], rtol=1e-5)


# other files' arrays, and one without a counterpart: the mean size of a group and the number of prompts, which Flow-GRPO logs
ELSEWHERE = ("trl_", "ffadv_", "adv_rwr_", "adv_sft_", "adv_dpo_", "adv_tracker_stats", "manifest")


def test_every_array_is_looked_at(vectors: Any, request: pytest.FixtureRequest) -> None:
    known = {name for name, value in globals().items() if name.startswith("test_") and callable(value)}
    run = {item.originalname for item in request.session.items if isinstance(item, pytest.Function) and item.path == Path(__file__)}
    if known - run or request.config.option.keyword:
        pytest.skip("only with all tests of this file")
    assert not {key for key in vectors.keys() - vectors.asked if not key.startswith(ELSEWHERE)}
