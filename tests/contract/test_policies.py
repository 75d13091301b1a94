"""What every registered image policy keeps to: SD3 on the embedded pipeline, the others on random pipelines of their real classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import tiny_families
from trainer.registry import REGISTRY, resolve
from trainer.sampling.rollout import ratio_deviation, replay, sample
from trainer.types import Prompt, Window

WORLD = Path(__file__).resolve().parents[2] / "world" / "policy"
SMALL = {"rank": 4, "alpha": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "flux": {"max_sequence_length": 8, "lora": SMALL},
    "qwen_image": {"max_sequence_length": 64, "lora": SMALL},
    "sd3": {"max_sequence_length": 1, "lora": SMALL},
    "z_image": {"max_sequence_length": 16, "lora": SMALL},
}
WINDOW = Window(2, 3)
PROMPTS = [Prompt(0, "a photo of a bag"), Prompt(1, "a pair of jeans"), Prompt(2, "a dress"), Prompt(3, "a coat")]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tiny_families.write(name, tmp_path_factory.mktemp(name)) for name in REGISTRY["policy"] if name != "sd3"}
    return {"sd3": WORLD, **made}


@pytest.fixture(params=sorted(REGISTRY["policy"]))
def policy(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    return resolve("policy", request.param).load(folders[request.param], **OPTIONS[request.param])


def draw(policy: Any, kind: str = "sde", seeds: tuple[int, ...] = (1, 2, 3, 4), window: Window | None = WINDOW, **more: Any) -> Any:
    return sample(
        policy,
        PROMPTS,
        list(seeds),
        sigmas=policy.sigmas(8, 28, 28),
        shape=policy.latent_shape(28, 28),
        window=window,
        kind=kind,
        micro_batch=4,
        **more,
    )


def shake(policy: Any, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable().values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_unchanged_weights_give_back_the_log_probabilities(policy: Any, kind: str, guidance: float) -> None:
    assert ratio_deviation(policy, draw(policy, kind, guidance=guidance), 4) < 1e-4


def test_a_sample_depends_on_its_own_seed_only(policy: Any) -> None:
    one, two = draw(policy), draw(policy, seeds=(1, 9, 3, 4))
    assert np.array_equal(one.images_BHWC[0], two.images_BHWC[0])
    assert not np.array_equal(one.images_BHWC[1], two.images_BHWC[1])
    assert one.images_BHWC.dtype == np.uint8 and one.images_BHWC.shape == (4, 28, 28, 3)


def test_members_may_share_their_first_noise(policy: Any) -> None:
    out = draw(policy, start_seeds=(7, 7, 7, 7), window=Window(0, 2))
    assert torch.equal(out.states_BT[0, 0], out.states_BT[3, 0])
    assert not torch.equal(out.states_BT[0, 1], out.states_BT[3, 1])


def test_the_prompt_matters_and_is_encoded_once(policy: Any) -> None:
    first = policy.encode(["a bag", "a boot"])
    assert not torch.equal(first.tensors["embeds"][0], first.tensors["embeds"][1])
    again = policy.encode(["a boot"])
    assert torch.equal(again.tensors["embeds"][0], first.tensors["embeds"][1])


def test_trained_weights_change_the_picture_and_the_reference_does_not(policy: Any) -> None:
    before = draw(policy, window=None)
    shake(policy)
    after = draw(policy, window=None)
    with policy.reference():
        reference = draw(policy, window=None)
    assert not torch.equal(before.latents_BCHW, after.latents_BCHW)
    torch.testing.assert_close(before.latents_BCHW, reference.latents_BCHW)
    torch.testing.assert_close(draw(policy, window=None).latents_BCHW, after.latents_BCHW)


def test_the_loss_reaches_every_trainable_weight(policy: Any) -> None:
    shake(policy)  # a fresh LoRA's second matrix is zero, and so is the first's gradient
    rollout = draw(policy)
    out, _ = replay(policy, rollout, 0)
    assert out.logp_B is not None
    (out.logp_B * torch.tensor([1.0, -1.0, 0.5, 2.0])).sum().backward()
    # the last block's text stream ends there, so its output weights have no influence
    dead = [k for k, p in policy.trainable().items() if p.grad is None or not p.grad.any()]
    assert len(dead) <= 0.2 * len(policy.trainable()), dead


def test_the_last_step_is_never_trained(policy: Any) -> None:
    with pytest.raises(ValueError, match="never trained"):
        draw(policy, window=Window(5, 3))


def test_sizes_that_do_not_fit_are_refused(policy: Any) -> None:
    unit = policy.scale * policy.patch
    with pytest.raises(
        ValueError, match=rf"multiples of {unit} .*, not {7 * unit + 2}x{3 * unit}; near: height={7 * unit} or {8 * unit} "
    ):
        policy.latent_shape(7 * unit + 2, 3 * unit)
    with pytest.raises(ValueError, match=f"height={unit} and width={unit}$"):
        policy.latent_shape(0, unit)
    assert policy.latent_shape(unit, 3 * unit)[1:] == (policy.patch, 3 * policy.patch)


def test_one_sigma_per_sample_is_each_sample_alone(policy: Any) -> None:
    x = torch.randn(4, *policy.latent_shape(28, 28), generator=torch.Generator().manual_seed(1))
    condition, sigma_B = policy.encode([p.text for p in PROMPTS]), torch.tensor([0.9, 0.6, 0.3, 0.1])
    for guidance in (1.0, 2.5):
        with torch.no_grad():
            together = policy.velocity(x, sigma_B, condition, guidance)
            alone = torch.cat([policy.velocity(x[i : i + 1], sigma_B[i], condition[slice(i, i + 1)], guidance) for i in range(4)])
        assert together.dtype == torch.float32 and together.shape == x.shape
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_pictures_become_latents_and_come_back(policy: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    latents = policy.encode_pixels(images)
    assert latents.shape == (3, *policy.latent_shape(28, 28)) and latents.dtype == torch.float32
    assert latents.isfinite().all() and not torch.equal(latents[0], latents[1])
    assert policy.decode(latents).shape == images.shape
    with pytest.raises(ValueError, match="multiples of"):
        policy.encode_pixels(images[:, :27])


def test_a_missing_policy_is_said() -> None:
    for name in REGISTRY["policy"]:
        with pytest.raises(FileNotFoundError, match="diffusers folder"):
            resolve("policy", name).load("world/polisy")
        with pytest.raises(FileNotFoundError, match="model_index.json"):
            resolve("policy", name).load(WORLD.parent / "detector")


def test_a_pipeline_of_another_family_names_the_right_one(folders: dict[str, Path]) -> None:
    for name in REGISTRY["policy"]:
        for other in REGISTRY["policy"].keys() - {name}:
            with pytest.raises(ValueError, match=rf"this is \w+Pipeline: use policy.use={other}$"):
                resolve("policy", name).load(folders[other])


def test_full_fine_tuning_and_fingerprints() -> None:
    load = resolve("policy", "sd3").load
    full = load(WORLD, max_sequence_length=1, lora=None)
    adapter = load(WORLD, max_sequence_length=1)
    assert sum(p.numel() for p in full.trainable().values()) > 2e6
    assert full.fingerprint() == adapter.fingerprint()
    before = draw(full, window=None)
    shake(full, 0.01)
    with full.reference():
        torch.testing.assert_close(draw(full, window=None).latents_BCHW, before.latents_BCHW)
    assert not torch.equal(draw(full, window=None).latents_BCHW, before.latents_BCHW)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_is_one_that_diffusers_loads(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    policy = resolve("policy", "sd3").load(WORLD, max_sequence_length=1, lora={"rank": 4, "alpha": 8})
    shake(policy)
    policy.save_adapter(tmp_path)
    expected = draw(policy, window=None)
    pipe = StableDiffusion3Pipeline.from_pretrained(WORLD, text_encoder_3=None, tokenizer_3=None)
    pipe.load_lora_weights(tmp_path)
    x, condition = expected.latents_BCHW, policy.encode([p.text for p in PROMPTS]).tensors
    time = torch.full((4,), 500.0)
    with torch.no_grad():
        theirs = pipe.transformer(x, condition["embeds"], condition["pooled"], time, return_dict=False)[0]
        ours = policy.velocity(x, torch.tensor(0.5), policy.encode([p.text for p in PROMPTS]))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
