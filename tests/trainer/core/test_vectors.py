"""Our formulas against outputs of the authors' own code; VERISM_VECTORS names another file of the same keys."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
from trainer.policies.flow import step
from trainer.regularizers.kl import v_kl, x_kl

FILE = Path(os.environ.get("VERISM_VECTORS", Path(__file__).parents[2] / "data" / "reference_vectors.npz"))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def vectors() -> Any:
    with np.load(FILE, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


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
    if ours == "ode":
        assert out.logp_B is None
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
