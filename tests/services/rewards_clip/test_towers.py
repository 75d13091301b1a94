"""Rewards on two towers against the libraries and the layouts that their weights were published in, picture by picture."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, multi_head_attention_forward, normalize
from transformers import AutoTokenizer, CLIPImageProcessor, Siglip2ImageProcessor, SiglipImageProcessor

from services.reward import Item
from services.rewards.alignment import Alignment
from services.rewards.clip_kit import Cosine
from services.rewards.clip_towers import from_open_clip
from services.rewards.hpsv2 import HpsV2
from services.rewards.pickscore import PickScore
from tests.services.rewards_clip import tiny

PROMPTS = ["a red bag", "what is 42?", "a red bag", "Two DOGS", "é ü 猫"]
LONG = "many words about one picture " * 20


def batch() -> list[Item]:
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (64, 64), (40, 30), (33, 90), (16, 17)]
    return [Item(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), p) for (h, w), p in zip(sizes, PROMPTS, strict=True)]


def values(reward: Cosine, items: list[Item] | None = None) -> list[float]:
    scores = reward.score(items or batch())
    assert all(score.value is not None for score in scores), scores
    return [float(score.value or 0) for score in scores]


@torch.no_grad()
def clip_cosines(model: Any, folder: Path) -> list[float]:
    """As the model card of a CLIP says: the library's processor, tokenizer and features, one picture at a time."""
    processor, tokenizer = CLIPImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    out = []
    for item in batch():
        pixels = processor(Image.fromarray(item.image), return_tensors="pt")
        text = tokenizer(
            [item.prompt], truncation=True, max_length=model.config.text_config.max_position_embeddings, return_tensors="pt"
        )
        a, b = model.get_image_features(**pixels).pooler_output, model.get_text_features(**text).pooler_output
        out.append(float((normalize(a, dim=-1) * normalize(b, dim=-1)).sum()))
    return out


@pytest.mark.parametrize("positions", [24, 248])
def test_clip_and_longclip_are_transformers_own(tmp_path: Path, positions: int) -> None:
    model = tiny.clip(tmp_path, positions=positions)
    reward = Alignment.load("alignment", {"folder": tmp_path}, "cpu")
    assert values(reward) == pytest.approx(clip_cosines(model, tmp_path), abs=1e-5)
    assert np.std(values(reward)) > 0.01
    assert reward.info.weights_sha256 and reward.info.range == (-1.0, 1.0) and reward.info.needs == ["prompt"]
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="50KB")
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (sharded / file).write_text((tmp_path / file).read_text())
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert values(Alignment.load("alignment", {"folder": sharded}, "cpu")) == values(reward)


@pytest.mark.parametrize("any_shape", [False, True])
def test_siglip_is_transformers_own(tmp_path: Path, any_shape: bool) -> None:
    model = tiny.siglip(tmp_path, any_shape=any_shape)
    kind = Siglip2ImageProcessor if any_shape else SiglipImageProcessor
    processor, tokenizer = kind.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    reward = Alignment.load("alignment", {"folder": tmp_path}, "cpu")
    for item, score in zip(batch(), reward.score(batch()), strict=True):
        text = tokenizer([item.prompt], padding="max_length", truncation=True, max_length=64, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model(input_ids=text, **processor(Image.fromarray(item.image), return_tensors="pt"))
        assert score.value == pytest.approx(float((out.image_embeds * out.text_embeds).sum()), abs=1e-5)
        assert score.parts == pytest.approx({"match": float(out.logits_per_image.sigmoid())}, abs=1e-5)


def test_pickscore_is_the_scaled_cosine(tmp_path: Path) -> None:
    model = tiny.clip(tmp_path, act="gelu")
    reward = PickScore.load("pickscore", {"folder": tmp_path}, "cpu")
    cosines = clip_cosines(model, tmp_path)
    scale = math.exp(float(model.logit_scale.detach()))
    assert scale == pytest.approx(100, rel=1e-3) and reward.info.range == (pytest.approx(-scale), pytest.approx(scale))
    assert values(reward) == pytest.approx([scale * c for c in cosines], abs=1e-3)
    assert [s.parts["cosine"] for s in reward.score(batch())] == pytest.approx(cosines, abs=1e-5)
    smaller = PickScore.load("pickscore", {"folder": tmp_path, "divide_by": 26}, "cpu")
    assert values(smaller) == pytest.approx([v / 26 for v in values(reward)])


def test_pickscore_takes_tokenizer_and_processor_from_elsewhere(tmp_path: Path) -> None:
    bare, full = tmp_path / "bare", tmp_path / "full"
    tiny.clip(bare, processor=False), tiny.clip(full)
    reward = PickScore.load("pickscore", {"folder": bare, "processor": full}, "cpu")
    assert values(reward) == values(PickScore.load("pickscore", {"folder": full}, "cpu"))


@torch.no_grad()
def open_clip_tower(state: dict[str, Tensor], prefix: str, x_1LD: Tensor, heads: int, *, causal: bool) -> Tensor:
    """The blocks of OpenAI's and open_clip's code, on their tensors."""
    x, length, width = x_1LD.transpose(0, 1), x_1LD.shape[1], x_1LD.shape[2]
    mask = torch.full((length, length), -torch.inf).triu(1) if causal else None
    for layer in range(2):
        here = f"{prefix}transformer.resblocks.{layer}."
        w = {k.removeprefix(here): v for k, v in state.items() if k.startswith(here)}
        y = layer_norm(x, (width,), w["ln_1.weight"], w["ln_1.bias"])
        packed, out = (w["attn.in_proj_weight"], w["attn.in_proj_bias"]), (w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        y, _ = multi_head_attention_forward(
            y, y, y, width, heads, *packed, None, None, False, 0.0, *out, training=False, need_weights=False, attn_mask=mask
        )
        x = x + y
        y = layer_norm(x, (width,), w["ln_2.weight"], w["ln_2.bias"])
        x = x + linear(gelu(linear(y, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"])), w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return x.transpose(0, 1)


@torch.no_grad()
def open_clip_cosine(state: dict[str, Tensor], pixels: Tensor, ids: list[int]) -> float:
    """One picture and one text, in the published layout (LongCLIP's second table of positions included)."""
    grid = torch.nn.functional.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"][None, None], grid], 1) + state["visual.positional_embedding"]
    x = layer_norm(x, (48,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = open_clip_tower(state, "visual.", x, 2, causal=False)
    picture = layer_norm(x[:, 0], (48,), state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"]
    positions = state["positional_embedding"]
    if "positional_embedding_res" in state:
        first = (torch.arange(len(positions)) < 20).float()[:, None]
        positions = positions * first + state["positional_embedding_res"] * (1 - first)
    padded = torch.tensor(ids + [0] * (len(positions) - len(ids)))
    y = open_clip_tower(state, "", (state["token_embedding.weight"][padded] + positions)[None], 2, causal=True)
    y = layer_norm(y, (32,), state["ln_final.weight"], state["ln_final.bias"])
    text = y[:, int(padded.argmax())] @ state["text_projection"]
    return float((normalize(picture, dim=-1) * normalize(text, dim=-1)).sum())


def test_hpsv2_is_the_cosine_of_the_open_clip_checkpoint() -> None:
    options = tiny.made("hpsv2")
    state = torch.load(options["weights"], weights_only=True)["state_dict"]
    reward = HpsV2.load("hpsv2", options, "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options["folder"])
    expected = [open_clip_cosine(state, reward.towers.pixels([i.image]), tokenizer(i.prompt).input_ids) for i in batch()]
    assert values(reward) == pytest.approx(expected, abs=1e-5) and np.std(expected) > 0.01
    assert reward.towers.pixels.fit == "pad"


def test_longclip_of_the_authors_reads_248_positions(tmp_path: Path) -> None:
    """The released .pt over the files of a plain CLIP: two tables of positions become one."""
    state = tiny.open_clip_state(tiny.clip(tmp_path, positions=248, act="gelu", weights=False))
    state["positional_embedding_res"] = torch.randn(248, 32, generator=torch.Generator().manual_seed(9))
    torch.save(state, tmp_path / "longclip-L.pt")
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 248', '"max_position_embeddings": 77'))
    reward = Alignment.load("alignment", {"folder": tmp_path, "weights": str(tmp_path / "longclip-L.pt")}, "cpu")
    prompt = "a long text " * 15
    ids = AutoTokenizer.from_pretrained(tmp_path)(prompt).input_ids
    assert 77 < len(ids) <= 248
    [score] = reward.score([Item(batch()[1].image, prompt)])
    expected = open_clip_cosine(state, reward.towers.pixels([batch()[1].image]), ids)
    assert score.value == pytest.approx(expected, abs=1e-5) and score.parts == {}


def test_open_clip_with_another_tower_is_refused() -> None:
    with pytest.raises(ValueError, match=r"visual.layer1.0.conv1.weight is no tensor of a CLIP with a plain ViT"):
        from_open_clip({"visual.conv1.weight": torch.zeros(1), "visual.layer1.0.conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize(("maker", "context"), [(tiny.clip, 24), (tiny.siglip, 64)])
def test_long_prompts_are_cut_and_said_or_refused(tmp_path: Path, maker: Any, context: int) -> None:
    maker(tmp_path)
    short, image = "a bag", batch()[0].image
    cut, plain = Alignment.load("a", {"folder": tmp_path}, "cpu").score([Item(image, LONG), Item(image, short)])
    assert cut.status == "ok" and cut.parts["truncated"] == 1.0 and "truncated" not in plain.parts
    tokens = AutoTokenizer.from_pretrained(tmp_path)(LONG, truncation=True, max_length=context).input_ids
    assert len(tokens) == context
    refusing = Alignment.load("a", {"folder": tmp_path, "long_prompts": "refuse"}, "cpu")
    refused, same = refusing.score([Item(image, LONG), Item(image, short)])
    assert refused.status == "refused" and refused.error and refused.error.type == "urn:verism:prompt-too-long"
    assert same.value == pytest.approx(plain.value, abs=1e-6)


def test_each_prompt_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.clip(tmp_path)
    reward = Alignment.load("a", {"folder": tmp_path}, "cpu")
    encoded: list[str] = []
    encode = reward.towers.texts._encode
    monkeypatch.setattr(reward.towers.texts, "_encode", lambda texts: encoded.extend(texts) or encode(texts))
    first = values(reward)
    assert values(reward) == first
    assert encoded == list(dict.fromkeys(PROMPTS))


def test_weights_that_give_no_number_are_errors_not_scores(tmp_path: Path) -> None:
    tiny.clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["visual_projection.weight"][:] = torch.nan
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scores = Alignment.load("a", {"folder": tmp_path}, "cpu").score(batch())
    assert [s.error.type for s in scores if s.error] == ["urn:verism:non-finite-score"] * 5


def test_half_precision_stays_near(tmp_path: Path) -> None:
    tiny.clip(tmp_path)
    exact = values(Alignment.load("a", {"folder": tmp_path}, "cpu"))
    half = values(Alignment.load("a", {"folder": tmp_path, "dtype": "bfloat16"}, "cpu"))
    assert half == pytest.approx(exact, abs=0.03) and half != exact


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        Alignment.load("a", {"folder": tmp_path}, "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ValueError, match="'blip' model; alignment reads clip, siglip and siglip2"):
        Alignment.load("a", {"folder": tmp_path}, "cpu")
    tiny.clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors does not fit.*1 missing, e.g. visual_projection.weight"):
        Alignment.load("a", {"folder": tmp_path}, "cpu")
