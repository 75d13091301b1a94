"""Every family on random pipelines of its real classes: shifted, without its T5, checkpointed, compiled, in half precision, its own LoRA."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from tests.trainer import tiny, tiny_families
from tests.trainer.core import test_learning
from tests.trainer.tiny_families import paint
from trainer.checkpoint import CheckpointError, Saved, check_model
from trainer.config import ConfigError
from trainer.learning import Learner
from trainer.losses.grpo import grpo
from trainer.policies import flow, kit
from trainer.policies.flux import positions
from trainer.registry import resolve
from trainer.sampling.rollout import ratio_deviation, replay, sample
from trainer.types import Prompt, Rollout, Window

CLIP = 1e-4  # the published range of an SDE with mean log-probabilities; rounding must stay under a tenth of it
SMALL = {"rank": 2, "alpha": 4}


LENGTHS = {"flux": tiny.LENGTH, "qwen_image": 64, "sd3": tiny.LENGTH, "z_image": 16}
SHAPES = ("t5", "dynamic_shift", "guidance_embeds")


def build(folder: Path, seed: int = 0, family: str = "sd3", **options: Any) -> Any:
    """A policy over random base weights of that seed; SHAPES are options of the pipeline, the rest are the policy's."""
    shape = {key: options.pop(key) for key in SHAPES if key in options}
    path = tiny_families.write(family, folder, seed=seed, **shape)
    return resolve("policy", family).load(path, **{"max_sequence_length": LENGTHS[family], "lora": SMALL, **options})


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "t5, dynamic shift": {"t5": True, "dynamic_shift": True},
    "without its t5": {"t5": True, "text_encoder_3": False},
    "every weight": {"lora": None},
    "checkpointing": {"gradient_checkpointing": True},
    "flux": {"family": "flux"},
    "flux, every weight": {"family": "flux", "lora": None, "gradient_checkpointing": True},
    "z_image": {"family": "z_image"},
    "z_image, every weight": {"family": "z_image", "lora": None, "gradient_checkpointing": True},
    "qwen_image": {"family": "qwen_image"},
    "qwen_image, every weight": {"family": "qwen_image", "lora": None, "gradient_checkpointing": True},
}
CASES = [pytest.param(options, id=name) for name, options in VARIANTS.items()]
PROMPTS = [Prompt(0, "a photo of a bag")] * 2 + [Prompt(1, "a red boot")] * 2


@pytest.fixture(autouse=True)
def quiet() -> None:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def draw(
    policy: Any, *, guidance: float = 1.0, kind: str = "sde", micro_batch: int = 4, size: tuple[int, int] = (16, 24)
) -> Rollout:
    return sample(
        policy,
        PROMPTS,
        list(range(4)),
        sigmas=policy.sigmas(6, *size),
        shape=policy.latent_shape(*size),
        window=Window(1, 2),
        kind=kind,
        guidance=guidance,
        micro_batch=micro_batch,
    )


def push(policy: Any, scale: float = 0.05) -> None:
    """Move every trained weight somewhere else."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def velocity(policy: Any, guidance: float = 1.0) -> torch.Tensor:
    x = torch.randn(2, *policy.latent_shape(16, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out: torch.Tensor = policy.velocity(x, torch.tensor(0.6), policy.encode(["a photo of a bag", "a red boot"]), guidance)
    return out


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_fresh_sample_is_judged_as_it_was_drawn(options: dict[str, Any], guidance: float, tmp_path: Path) -> None:
    policy = build(tmp_path, **options)
    push(policy)
    for kind in ("sde", "dance", "cps"):
        rollout = draw(policy, guidance=guidance, kind=kind)
        assert rollout.states_BT.shape[:2] == (4, 3) and rollout.states_BT.dtype == torch.float32
        assert rollout.images_BHWC.shape == (4, 16, 24, 3) and rollout.images_BHWC.dtype == np.uint8
        assert ratio_deviation(policy, rollout, 4) < CLIP / 10
        before = rollout.logp_old_BT[:, 0]
        assert before.isfinite().all()
    push(policy, 0.2)
    with torch.no_grad():
        after, _ = replay(policy, rollout, 0)
    assert after.logp_B is not None and not torch.allclose(after.logp_B, before, atol=1e-6)


@pytest.mark.parametrize("options", CASES)
def test_the_loss_reaches_every_trained_weight(options: dict[str, Any], tmp_path: Path) -> None:
    policy = build(tmp_path, **options)
    push(policy)
    rollout = draw(policy)
    step, v = replay(policy, rollout, 0)
    assert step.logp_B is not None and v.shape == rollout.states_BT[:, 0].shape and v.dtype == torch.float32
    grpo(step.logp_B, rollout.logp_old_BT[:, 0], torch.tensor([1.0, -1.0, 1.0, -1.0]), CLIP, CLIP).values_B.sum().backward()
    weights = policy.trainable()
    assert weights and all(p.dtype == torch.float32 for p in weights.values())
    still = [name for name, p in weights.items() if p.grad is None or not p.grad.any()]
    # biases of keys cancel in a softmax, and what feeds only a softmax over one entry has no gradient
    assert len(still) <= 0.2 * len(weights), still
    assert all(p.grad.isfinite().all() for p in weights.values() if p.grad is not None)


@pytest.mark.parametrize("options", CASES)
def test_pictures_do_not_depend_on_the_batch(options: dict[str, Any], tmp_path: Path) -> None:
    policy = build(tmp_path, **options)
    whole, parts = draw(policy), draw(policy, micro_batch=1)
    torch.testing.assert_close(whole.states_BT, parts.states_BT, rtol=1e-4, atol=1e-4)
    assert np.abs(whole.images_BHWC.astype(int) - parts.images_BHWC).max() <= 1
    assert not torch.allclose(whole.latents_BCHW[0], whole.latents_BCHW[1]), "other seeds give other pictures"


@pytest.mark.parametrize("options", CASES)
def test_training_changes_the_output_and_the_reference_stays(options: dict[str, Any], tmp_path: Path) -> None:
    policy = build(tmp_path, **options)
    base = velocity(policy)
    with policy.reference():
        torch.testing.assert_close(velocity(policy), base)
    push(policy)
    moved = velocity(policy)
    assert (moved - base).abs().max() > 1e-3
    with policy.reference():
        torch.testing.assert_close(velocity(policy), base)
    assert torch.equal(velocity(policy), moved)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(velocity(policy), moved), "an error inside reference() leaves the policy trained"


@pytest.mark.parametrize("options", CASES)
def test_prompts_and_guidance_matter(options: dict[str, Any], tmp_path: Path) -> None:
    policy = build(tmp_path, **options)
    condition = policy.encode(["a photo of a bag", "a red boot", "a photo of a bag"])
    assert len(condition) == 3 and len(condition[slice(0, 2)]) == 2
    for rows in condition.tensors.values():
        assert torch.equal(rows[0], rows[2])
    assert any(not torch.equal(rows[0], rows[1]) for rows in condition.tensors.values())
    assert (velocity(policy, 3.0) - velocity(policy)).abs().max() > 1e-4
    if policy.two_passes:  # where guidance is an input of the network, a thousandth of it counts
        torch.testing.assert_close(velocity(policy, 1.0), velocity(policy, 1.0 + 1e-7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", CASES)
def test_weights_go_out_and_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    policy, twin, other = (build(tmp_path / str(n), n // 2, **options) for n in range(3))
    push(policy)
    save_file({k: v.detach().contiguous() for k, v in policy.trainable().items()}, tmp_path / "weights.safetensors")
    saved = load_file(tmp_path / "weights.safetensors")
    assert saved.keys() == twin.trainable().keys()
    with torch.no_grad():
        for name, parameter in twin.trainable().items():
            parameter.copy_(saved[name])
    assert torch.equal(velocity(twin), velocity(policy))
    mark = Saved({}, {"fingerprint": policy.fingerprint(), "step": 3})
    check_model(mark, twin.fingerprint())  # training does not change the mark, another base does
    with pytest.raises(CheckpointError, match="another model.*policy.path"):
        check_model(mark, other.fingerprint())


@pytest.mark.parametrize("options", CASES)
def test_the_schedule_runs_from_noise_to_data(options: dict[str, Any], tmp_path: Path) -> None:
    policy = build(tmp_path, **options)
    for steps in (2, 10):
        sigmas = policy.sigmas(steps, 16, 24)
        assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,)
        assert math.isclose(float(sigmas[0]), 1) and float(sigmas[-1]) == 0 and (sigmas.diff() < 0).all()


def walked(policy: Any, start: torch.Tensor, steps: int, guidance: float, size: tuple[int, int]) -> torch.Tensor:
    """Our own ODE from `start`: the trainer's step function along the trainer's schedule."""
    condition, sigmas, x = policy.encode([p.text for p in PROMPTS]), policy.sigmas(steps, *size), start
    with torch.no_grad():
        for i in range(steps):
            v = policy.velocity(x, sigmas[i], condition, guidance)
            x = flow.step(x, v, sigmas, torch.full((len(x),), i), 0.0, "ode").prev
    return x


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_noise_it_is_the_pipeline_itself(options: dict[str, Any], guidance: float, tmp_path: Path) -> None:
    """The library's own sampler, from the same first noise, paints the same latents and the same picture."""
    policy = build(tmp_path, **options)
    push(policy)
    start = torch.randn(4, *policy.latent_shape(16, 24), generator=torch.Generator().manual_seed(5))
    x, texts = walked(policy, start, 5, guidance, (16, 24)), [p.text for p in PROMPTS]
    assert (x - paint(policy, texts, start, 5, guidance)).abs().max() < 1e-4
    assert (
        np.abs(policy.decode(x) - 255 * paint(policy, texts, start, 5, guidance, "np")).max() < 0.51
    )  # half a grey level of rounding


def test_the_table_of_differences(tmp_path: Path) -> None:
    """docs/policies.md holds what this prints (pytest -s): our ODE against each pipeline's own, float32, in latents and in grey levels."""
    print(f"\n{'policy':<12}{'guidance':>9}{'steps':>6}{'size':>8}{'latents':>10}{'pictures':>10}")
    for family in tiny_families.FAMILIES:
        policy = build(tmp_path / family, family=family)
        push(policy)
        for guidance, steps, size in ((1.0, 10, (16, 24)), (4.5, 10, (16, 24)), (4.5, 28, (32, 32))):
            start = torch.randn(4, *policy.latent_shape(*size), generator=torch.Generator().manual_seed(steps))
            x, texts = walked(policy, start, steps, guidance, size), [p.text for p in PROMPTS]
            apart = float((x - paint(policy, texts, start, steps, guidance)).abs().max())
            theirs = np.rint(255 * paint(policy, texts, start, steps, guidance, "np"))
            grey = int(np.abs(policy.decode(x) - theirs).max())
            print(f"{family:<12}{guidance:>9}{steps:>6}{'x'.join(map(str, size)):>8}{apart:>10.1e}{grey:>10}")
            assert apart < 1e-4 and grey <= 1 and float(x.abs().max()) > 0.5


@pytest.mark.parametrize("options", CASES)
def test_the_schedule_is_the_pipelines_own(options: dict[str, Any], tmp_path: Path) -> None:
    policy = build(tmp_path, **options)
    for steps, size in ((3, (16, 16)), (4, (16, 24)), (2, (32, 28)), (7, (8, 12))):
        start = torch.randn(1, *policy.latent_shape(*size), generator=torch.Generator().manual_seed(5))
        paint(policy, ["a bag"], start, steps, 1.0)
        assert torch.equal(policy.sigmas(steps, *size), policy.pipeline.scheduler.sigmas)


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_tokens_are_packed_as_the_pipeline_packs_them(family: str, tmp_path: Path) -> None:
    pipeline = build(tmp_path, family=family).pipeline
    for height, width in ((2, 2), (4, 6), (10, 4)):
        x = torch.randn(3, 4, height, width)
        tokens = kit.pack(x)
        assert torch.equal(tokens, pipeline._pack_latents(x, 3, 4, height, width)) and torch.equal(
            kit.unpack(tokens, height, width), x
        )
    if family == "flux":
        assert torch.equal(positions(3, 5), pipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32))


def test_a_flux_without_embedded_guidance_refuses_it(tmp_path: Path) -> None:
    policy = build(tmp_path, family="flux", guidance_embeds=False)
    start = torch.randn(4, *policy.latent_shape(16, 24), generator=torch.Generator().manual_seed(5))
    texts = [p.text for p in PROMPTS]
    assert (walked(policy, start, 4, 1.0, (16, 24)) - paint(policy, texts, start, 4, 1.0)).abs().max() < 1e-4
    with pytest.raises(ConfigError, match=r"takes no guidance: set sampling.guidance and eval.guidance to 1.0, not 3.5"):
        velocity(policy, 3.5)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_adapters_have_the_published_size_and_places(family: str, tmp_path: Path) -> None:
    """reference-algorithms 1.11: rank and alpha, and every layer of the published names, nothing else."""
    rank, alpha = (32, 64) if family == "sd3" else (64, 128)
    attention = {"to_q", "to_k", "to_v", "to_out.0"}
    joint = attention | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    layers = {f"attn.{name}" for name in joint}
    layers |= {
        "flux": {f"{ff}.{layer}" for ff in ("ff", "ff_context") for layer in ("net.0.proj", "net.2")},
        "qwen_image": {f"{ff}.{layer}" for ff in ("img_mlp", "txt_mlp") for layer in ("net.0.proj", "net.2")},
    }.get(family, set())
    if family == "z_image":
        layers = {f"attention.{name}" for name in attention} | {f"feed_forward.w{n}" for n in (1, 2, 3)}
    policy = build(tmp_path, family=family, lora={})
    linear = {
        name.replace(".base_layer", "")
        for name, module in policy.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    }
    expected = {name for name in linear if any(name.endswith(f".{layer}") for layer in layers)}
    found = policy.trainable()
    assert expected and set(found) == {f"{name}.lora_{side}.default.weight" for name in expected for side in "AB"}
    assert all(p.shape[0] == rank for k, p in found.items() if ".lora_A." in k)
    config = policy.transformer.peft_config["default"]
    assert (config.r, config.lora_alpha) == (rank, alpha)
    assert {name.rsplit(".lora_", 1)[0].split(".", 2)[-1] for name in found} <= layers


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # slower norms, no more
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lora", [SMALL, None])
def test_a_network_in_half_precision_trains_in_float32(family: str, dtype: str, lora: Any, tmp_path: Path) -> None:
    policy = build(tmp_path, family=family, dtype=dtype, lora=lora)
    push(policy)
    seen: set[torch.dtype] = set()
    layers = [m for m in policy.transformer.modules() if isinstance(m, torch.nn.Linear)]
    layers[-1].register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    rollout = draw(policy, guidance=2.0)
    assert seen == {getattr(torch, dtype)}, "the network itself runs in half precision, also when every weight is trained"
    assert next(policy.pipeline.vae.parameters()).dtype == torch.float32
    step, v = replay(policy, rollout, 0)
    assert step.logp_B is not None and v.dtype == torch.float32 and rollout.states_BT.dtype == torch.float32
    assert ratio_deviation(policy, rollout, 4) < CLIP / 10
    step.logp_B.sum().backward()
    assert all(p.dtype == torch.float32 for p in policy.trainable().values())


def test_a_common_way_to_the_window_is_walked_once_and_changes_nothing(tmp_path: Path) -> None:
    policy = build(tmp_path)
    rows: list[int] = []
    velocity = policy.velocity

    def counted(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        rows.append(len(x))
        return velocity(x, *rest, **more)

    policy.velocity = counted  # type: ignore[method-assign]
    sigmas, shape = policy.sigmas(6, 16, 16), policy.latent_shape(16, 16)

    def draw(texts: list[str]) -> Rollout:
        rows.clear()
        prompts = [Prompt(n, text) for n, text in enumerate(texts)]
        return sample(policy, prompts, [5, 6, 7], sigmas=sigmas, shape=shape, window=Window(3, 2), start_seeds=[4, 4, 4])

    apart = draw(["a bag", "a bag ", "a boot"])
    assert rows == [3] * 6, "other prompts, other ways"
    mixed = draw(["a bag", "a bag", "a boot"])
    assert rows == [2] * 3 + [3] * 3
    assert torch.allclose(mixed.latents_BCHW[2], apart.latents_BCHW[2], atol=1e-5)
    together = draw(["a bag"] * 3)
    assert rows == [1] * 3 + [3] * 3
    assert torch.allclose(together.states_BT[:2], mixed.states_BT[:2], atol=1e-5)
    assert torch.allclose(together.states_BT[0], apart.states_BT[0], atol=1e-5)
    assert torch.allclose(together.latents_BCHW[0], apart.latents_BCHW[0], atol=1e-5)
    assert torch.equal(together.states_BT[0, 0], together.states_BT[2, 0]) and not torch.equal(*together.states_BT[:2, 1])
    assert ratio_deviation(policy, together) < CLIP / 10


@pytest.mark.parametrize("loss", ["grpo", "nft"])
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_every_family_learns_from_a_reward(family: str, loss: str, tmp_path: Path) -> None:
    """Brightness, through the trainer's own sampler and learner; judged from fixed noise along the ODE."""
    policy = build(tmp_path, family=family, lora={"rank": 4, "alpha": 8})
    c = test_learning.config(loss, group={"prompts": 2, "size": 16}, optim={"lr": 3e-2})
    learner, prompts = Learner(policy, c), [PROMPTS[n % 4] for n in range(16)]

    def level() -> float:
        sigmas, shape = policy.sigmas(6, 16, 16), policy.latent_shape(16, 16)
        seeds = [7_000_000 + n for n in range(16)]
        return float(sample(policy, prompts, seeds, sigmas=sigmas, shape=shape, window=None).images_BHWC.mean())

    before = level()
    for step in range(10):
        with learner.sampling_weights():
            rollout = test_learning.draw(policy, c, step)
        learner.learn([rollout], test_learning.judged(test_learning.brightness(rollout), 16), step)
    assert level() > before + 0.1
