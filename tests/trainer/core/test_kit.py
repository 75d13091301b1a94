"""What the families share: texts encoded once, kept on disk, encoders away; decoding in parts; compile and its fallback; bad folders."""

import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from peft import LoraConfig
from pydantic import ValidationError

from tests.trainer import tiny_families
from tests.trainer.core.test_families import LENGTHS, PROMPTS, SMALL, build, push, velocity
from trainer.config import RECIPES, ConfigError, load
from trainer.policies import kit
from trainer.policies.sd3 import SD3Policy
from trainer.policies.texts import Row, size_of
from trainer.registry import REGISTRY, resolve

TEXTS = [p.text for p in PROMPTS]


def sd35_medium() -> SD3Transformer2DModel:
    """The configuration of stable-diffusion-3.5-medium."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def counted(policy: Any) -> list[str]:
    """The texts that reach the encoders from now on."""
    seen: list[str] = []
    encode = policy._text

    def text(prompt: str) -> Row:
        seen.append(prompt)
        return encode(prompt)

    policy._text = text
    return seen


def same(a: Any, b: Any) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_a_text_is_encoded_once_and_the_encoders_leave(family: str, tmp_path: Path) -> None:
    policy = build(tmp_path, family=family)
    seen, moves = counted(policy), []
    policy.texts.stay = False  # as on an accelerator, where "cpu" is away
    for module in policy.texts.encoders:
        module.to = lambda where: moves.append(str(where))  # type: ignore[assignment]
    policy.prepare(TEXTS)
    negative = [policy.options.negative_prompt] if policy.two_passes else []
    assert seen == [*negative, *dict.fromkeys(TEXTS)]
    assert moves == ["cpu"] * 2 * len(policy.texts.encoders)
    velocity(policy, 3.0)
    policy.encode(TEXTS)
    assert len(seen) == len(negative) + 2 and len(moves) == 2 * len(policy.texts.encoders), "known texts call nobody back"
    policy.encode(["a coat"])
    assert seen[-1] == "a coat" and len(moves) == 4 * len(policy.texts.encoders)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_texts_on_disk_serve_the_next_run(family: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = build(tmp_path / "a", family=family, text_cache=cache)
    plain = build(tmp_path / "b", family=family)
    expected = plain.encode(TEXTS)
    first.prepare(TEXTS)
    assert same(first.encode(TEXTS), expected) and not first.texts.known, "with a folder, memory holds none"
    second = build(tmp_path / "c", family=family, text_cache=cache)
    seen = counted(second)
    assert same(second.encode(TEXTS), expected) and torch.equal(velocity(second, 3.0), velocity(plain, 3.0)) and not seen
    files = sorted(cache.rglob("*"))
    assert not [f for f in files if f.name.endswith(".building")]
    damaged = next(f for f in files if f.suffix == ".safetensors")
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert same(second.encode(TEXTS), expected) and len(seen) <= 1
    other = build(tmp_path / "d", 1, family=family, text_cache=cache)
    seen = counted(other)
    other.encode(TEXTS)
    assert len(seen) >= 2, "other encoders do not read these"
    longer = build(tmp_path / "e", family=family, text_cache=cache, max_sequence_length=LENGTHS[family] - 1)
    seen = counted(longer)
    longer.encode(TEXTS)
    assert len(seen) >= 2, "nor does another length"


def test_memory_for_texts_is_bounded(tmp_path: Path) -> None:
    plain = build(tmp_path / "a", family="flux")
    one = size_of(plain.texts.rows(["a bag"])["a bag"])
    policy = build(tmp_path / "b", family="flux", text_memory_gb=2.5 * one / 1e9)
    texts, seen = ["a bag", "a boot", "a coat", "a dress"], counted(policy)
    assert same(policy.encode(texts), plain.encode(texts)) and list(policy.texts.known) == texts[2:]
    assert policy.texts.held == 2 * one and len(seen) == 4
    assert same(policy.encode(texts), plain.encode(texts)) and len(seen) == 6, "what made room is encoded again"
    policy.texts.stay = False
    policy.prepare(["a shirt", "a red bag", "a small bag", "a blue bag"])
    assert len(seen) == 7 and list(policy.texts.known) == texts[:2], "full: nothing known makes room for what may come"


def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    policy, plain = build(tmp_path / "a", text_cache=tmp_path / "file"), build(tmp_path / "b")
    with pytest.warns(UserWarning, match=r"policy.text_cache: .*file cannot be written, texts stay in memory"):
        condition = policy.encode(TEXTS)
    assert same(condition, plain.encode(TEXTS)) and same(policy.encode(TEXTS), condition)


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_decoding_in_parts_is_decoding(family: str, tmp_path: Path) -> None:
    policy = build(tmp_path, family=family)
    parts = build(tmp_path / "b", family=family, decode_pixels=16 * 24 * 2)
    latents = torch.randn(5, *policy.latent_shape(16, 24), generator=torch.Generator().manual_seed(2))
    rows: list[int] = []
    decode = parts.pipeline.vae.decode
    parts.pipeline.vae.decode = lambda z, **more: rows.append(len(z)) or decode(z, **more)
    whole, cut = policy.decode(latents), parts.decode(latents)
    assert rows == [2, 2, 1] and np.abs(whole.astype(int) - cut).max() <= 1
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
    torch.testing.assert_close(policy.encode_pixels(images), parts.encode_pixels(images), rtol=1e-4, atol=1e-4)
    assert build(tmp_path / "c", family=family, vae_tiling=True).pipeline.vae.use_tiling


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_checkpointing_gives_the_same_gradients(family: str, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = build(tmp_path / str(checkpointing), family=family, gradient_checkpointing=checkpointing)
        push(policy)
        x = torch.randn(2, *policy.latent_shape(16, 24), generator=torch.Generator().manual_seed(3))
        policy.velocity(x, torch.tensor(0.6), policy.encode(TEXTS[1:3]), 2.0).square().sum().backward()
        gradients.append({k: p.grad for k, p in policy.trainable().items()})
    for name, own in gradients[0].items():
        other = gradients[1][name]
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_compiled_it_is_the_same_network(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's tracing with the eager backend: inductor itself takes minutes here."""
    plain = build(tmp_path / "a", family=family)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own remarks on what it imports
        warnings.filterwarnings("error", message="policy.compile")
        policy = build(tmp_path / "b", family=family, compile=True)
        push(plain)
        push(policy)
        torch.testing.assert_close(velocity(policy), velocity(plain), rtol=1e-4, atol=1e-5)
        with policy.reference(), plain.reference():
            torch.testing.assert_close(velocity(policy), velocity(plain), rtol=1e-4, atol=1e-5)
    assert policy._compiled is not None
    assert set(policy.trainable()) == set(plain.trainable()), "names stay, so checkpoints fit both"
    torch._dynamo.reset()


def test_where_compiling_fails_it_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(tmp_path / "a", onednn=False)

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    policy = build(tmp_path / "b", compile=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(velocity(policy), velocity(plain)) and torch.equal(velocity(policy), velocity(plain))
    said = [str(w.message) for w in told if "policy.compile" in str(w.message)]
    assert len(said) == 1 and "going on without it" in said[0] and "no compiler on this machine" in said[0]
    torch._dynamo.reset()


def test_sizes_beyond_the_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="positions for 32 pixels along a side, not for 16x36"):
        build(tmp_path / "a").latent_shape(16, 36)
    with pytest.raises(ConfigError, match="positions for 64 pixels along a side, not for 68x16"):
        build(tmp_path / "b", family="z_image").latent_shape(68, 16)
    assert build(tmp_path / "c", family="flux").latent_shape(400, 16) == (4, 200, 8)


def test_folders_that_are_no_policy_are_said(tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(FileNotFoundError, match=match):
            SD3Policy.load(folder, max_sequence_length=8, **options)

    folder = tiny_families.write("sd3", tmp_path / "a")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("cannot be loaded as StableDiffusion3Pipeline, whole and in safetensors")
    weights.unlink()
    refused("cannot be loaded as StableDiffusion3Pipeline")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(whole)
    refused("cannot be loaded as StableDiffusion3Pipeline")  # pickles are not read
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "KolorsPipeline"}))
    with pytest.raises(ConfigError, match="this is KolorsPipeline: known: StableDiffusion3Pipeline, FluxPipeline"):
        SD3Policy.load(folder)
    (folder / "model_index.json").write_text("{")
    refused("model_index.json is not JSON")
    (folder / "model_index.json").write_text("[]")
    refused("is not a mapping of components")
    with pytest.raises(FileNotFoundError, match="no policy at nobody/nothing.*The hub did not give it"):
        SD3Policy.load("nobody/nothing")
    with pytest.raises(ValidationError, match="text_cashe"):
        SD3Policy.load(folder, text_cashe="here")


def test_every_option_says_what_it_is() -> None:
    for name in REGISTRY["policy"]:
        options = resolve("policy", name).Options
        assert [key for key, field in options.model_fields.items() if not field.description] == []
        assert (
            resolve("policy", name).Pipeline.__name__ in kit.FAMILIES
            and kit.FAMILIES[resolve("policy", name).Pipeline.__name__] == name
        )


RECIPE_OF = {"flux": "flux_dev", "qwen_image": "qwen_image", "sd3": "sd35_medium", "z_image": "z_image"}


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_the_recipes_of_large_models_hold(family: str) -> None:
    """All but the weights: keys, options of the policy, published adapters, and sizes and windows that fit."""
    config = load(recipe := RECIPE_OF[family])
    policy, path = resolve("policy", config.policy.use), config.policy.path
    options = policy.Options(path=path, **config.policy.options())
    assert (RECIPES / f"{recipe}.yaml").is_file() and config.policy.use == family
    assert options.lora == policy.Options(path=path).lora and options.dtype == "bfloat16" and options.gradient_checkpointing
    s = config.sampling
    assert s.height % 32 == s.width % 32 == 0 and s.window_last <= s.steps - 1 and config.group.size >= 16
    assert math.isclose(sum(r.weight for r in config.rewards.values()), len(config.rewards))
    assert SMALL.keys() <= type(options.lora).model_fields.keys()


@pytest.mark.parametrize(
    ("family", "build_network", "layers", "millions"),
    [
        # blocks x adapted layers: 24 x 8, less the last block's text output
        ("sd3", sd35_medium, 24 * 8 - 1, 18.78),
        ("flux", lambda: FluxTransformer2DModel(guidance_embeds=True), 19 * 12 + 38 * 3, 179.31),
        ("z_image", ZImageTransformer2DModel, (30 + 2 + 2) * 7, 158.76),
        ("qwen_image", QwenImageTransformer2DModel, 60 * 12, 424.67),
    ],
)
def test_at_real_size_the_adapter_is_as_published(family: str, build_network: Any, layers: int, millions: float) -> None:
    """The real architectures without memory for weights: how many layers are adapted, how many weights are trained."""
    with torch.device("meta"):
        network = build_network()
        lora = resolve("policy", family).Options(path=".").lora
        network.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)))
    trained = {name: p for name, p in network.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * layers
    assert round(sum(p.numel() for p in trained.values()) / 1e6, 2) == millions
