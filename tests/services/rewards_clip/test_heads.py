"""Aesthetic, ImageReward and HPSv3 against plain forwards over the published layouts, picture by picture."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, relu
from transformers import AutoTokenizer, CLIPModel, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

from services.reward import Item
from services.rewards.aesthetic import Aesthetic
from services.rewards.hpsv3 import REWARD, HpsV3, read_template, scaled_sides
from services.rewards.image_reward import MEAN, STD, ImageReward
from tests.services.rewards_clip import tiny

PROMPTS = ["a red bag", "two dogs and more words than the first", "a red bag", "x", "one"]


def batch(prompts: list[str] = PROMPTS) -> list[Item]:
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (64, 64), (40, 30), (33, 90), (16, 17)]
    return [Item(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), p) for (h, w), p in zip(sizes, prompts, strict=True)]


def head(state: dict[str, Tensor], x: Tensor) -> float:
    for index in (0, 2, 4, 6, 7):
        x = linear(x, state[f"layers.{index}.weight"], state[f"layers.{index}.bias"])
    return float(x.squeeze())


@torch.no_grad()
def test_aesthetic_is_the_head_on_the_normalised_embedding() -> None:
    options = tiny.made("aesthetic")
    reward, model = Aesthetic.load("aesthetic", options, "cpu"), CLIPModel.from_pretrained(options["folder"])
    state = torch.load(options["head"], weights_only=True)
    expected = []
    for item in batch():
        features = model.get_image_features(pixel_values=reward.pixels([item.image])).pooler_output
        expected.append(head(state, normalize(features, dim=-1)))
    scores = reward.score([Item(item.image) for item in batch()])
    assert [s.value for s in scores] == pytest.approx(expected, abs=1e-5) and np.std(expected) > 1e-3
    assert reward.pixels.rounded_centre and reward.info.needs == []


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    options = tiny.made("aesthetic")
    torch.save(tiny.head_state(17), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth does not fit.*0.weight is \(1024, 17\), not \(1024, 16\)"):
        Aesthetic.load("aesthetic", {**options, "head": str(tmp_path / "other.pth")}, "cpu")


@torch.no_grad()
def blip(state: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """BLIP's text encoder looking at one picture, on the published tensors: the state of the first token (D,)."""
    v = {k.removeprefix("blip.visual_encoder."): t for k, t in state.items() if "visual_encoder" in k}
    x = torch.nn.functional.conv2d(pixels, v["patch_embed.proj.weight"], v["patch_embed.proj.bias"], stride=8)
    x = torch.cat([v["cls_token"], x.flatten(2).transpose(1, 2)], 1) + v["pos_embed"]
    norm = lambda x, name, eps, w: layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)  # noqa: E731
    dense = lambda x, name, w: linear(x, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    for layer in range(2):
        b = f"blocks.{layer}"
        qkv = dense(norm(x, f"{b}.norm1", 1e-6, v), f"{b}.attn.qkv", v)
        x = x + dense(attend(*qkv.chunk(3, -1)), f"{b}.attn.proj", v)
        x = x + dense(gelu(dense(norm(x, f"{b}.norm2", 1e-6, v), f"{b}.mlp.fc1", v)), f"{b}.mlp.fc2", v)
    patches = norm(x, "norm", 1e-6, v)
    t = {k.removeprefix("blip.text_encoder."): w for k, w in state.items() if "text_encoder" in k}
    y = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(y, "embeddings.LayerNorm", 1e-12, t)
    for layer in range(2):
        b = f"encoder.layer.{layer}"
        for kind, seen in (("attention", None), ("crossattention", patches)):
            keys = y if seen is None else seen
            q, k, w = dense(y, f"{b}.{kind}.self.query", t), *(dense(keys, f"{b}.{kind}.self.{x}", t) for x in ("key", "value"))
            y = norm(y + dense(attend(q, k, w), f"{b}.{kind}.output.dense", t), f"{b}.{kind}.output.LayerNorm", 1e-12, t)
        inner = dense(gelu(dense(y, f"{b}.intermediate.dense", t)), f"{b}.output.dense", t)
        y = norm(y + inner, f"{b}.output.LayerNorm", 1e-12, t)
    return y[0, 0]


def attend(q_1LD: Tensor, k_1LD: Tensor, v_1LD: Tensor, heads: int = 2) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q_1LD, k_1LD, v_1LD))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def test_image_reward_is_blip_of_the_published_checkpoint() -> None:
    folder = tiny.made("image_reward")["folder"]
    reward = ImageReward.load("image_reward", {"folder": folder}, "cpu")
    state, tokenizer = torch.load(folder / "ImageReward.pt", weights_only=True), AutoTokenizer.from_pretrained(folder)
    mlp = {k.removeprefix("mlp."): v for k, v in state.items() if k.startswith("mlp.")}
    expected = []
    for item in batch():
        ids = tokenizer(item.prompt, return_tensors="pt").input_ids
        expected.append((head(mlp, blip(state, reward.pixels([item.image]), ids)) - MEAN) / STD)
    assert [s.value for s in reward.score(batch())] == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 1e-3


def test_image_reward_cuts_at_35_tokens_and_says_so() -> None:
    folder, long = tiny.made("image_reward")["folder"], "words " * 40
    image = batch()[0].image
    reward = ImageReward.load("image_reward", {"folder": folder}, "cpu")
    cut, short = reward.score([Item(image, long), Item(image, "a")])
    assert cut.parts == {"truncated": 1.0} and short.parts == {}
    refusing = ImageReward.load("image_reward", {"folder": folder, "long_prompts": "refuse"}, "cpu")
    refused, same = refusing.score([Item(image, long), Item(image, "a")])
    assert refused.status == "refused" and same.value == pytest.approx(short.value, abs=1e-6)


def test_image_reward_says_what_its_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"med_config\.json"):
        ImageReward.load("image_reward", {"folder": tmp_path}, "cpu")
    tiny.image_reward(tmp_path)
    torch.save({"mlp.layers.0.weight": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match="no BLIP checkpoint"):
        ImageReward.load("image_reward", {"folder": tmp_path}, "cpu")
    tiny.image_reward(tmp_path)
    med = json.loads((tmp_path / "med_config.json").read_text())
    del med["vocab_size"]
    (tmp_path / "med_config.json").write_text(json.dumps(med))
    with pytest.raises(ValueError, match="lacks 'vocab_size'"):
        ImageReward.load("image_reward", {"folder": tmp_path}, "cpu")


@torch.no_grad()
def test_hpsv3_is_the_head_on_transformers_qwen2_vl(tmp_path: Path) -> None:
    """One at a time through the library's own generation class, the picture resized by PIL beforehand."""
    model = tiny.hpsv3(tmp_path)
    options = {"folder": tmp_path, "weights": str(tmp_path / "HPSv3.safetensors"), "template": tmp_path / "template.txt"}
    reward = HpsV3.load("hpsv3", {**options, "pixels": 6 * 28 * 28}, "cpu")
    state, tokenizer = load_file(tmp_path / "HPSv3.safetensors"), AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
    processor, image_id = Qwen2VLImageProcessor.from_pretrained(tmp_path), model.config.image_token_id
    expected = []
    for item in batch():
        height, width = scaled_sides(*item.image.shape[:2], 28, 6 * 28 * 28)
        made = processor(Image.fromarray(item.image).resize((width, height), Image.Resampling.BICUBIC), return_tensors="pt")
        pads = "<|image_pad|>" * int(made.image_grid_thw.prod() // 4)
        asked = tiny.TEMPLATE.replace("{text_prompt}", item.prompt or "")
        text = f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        states = model(input_ids=ids, mm_token_type_ids=(ids == image_id).int(), output_hidden_states=True, **made).hidden_states
        x = states[-1][0, ids[0].tolist().index(tokenizer.convert_tokens_to_ids(REWARD))]
        for index in (0, 3, 5):
            x = linear(x if index == 0 else relu(x), state[f"rm_head.{index}.weight"], state[f"rm_head.{index}.bias"])
        expected.append((float(x[0]), math.exp(float(x[1]))))
    scores = reward.score(batch())
    assert [s.value for s in scores] == pytest.approx([mean for mean, _ in expected], abs=5e-3)
    assert [s.sigma for s in scores] == pytest.approx([sigma for _, sigma in expected], abs=5e-3)
    assert np.std([mean for mean, _ in expected]) > 0.05
    assert isinstance(model, Qwen2VLForConditionalGeneration)


def test_hpsv3_scores_do_not_depend_on_the_batch() -> None:
    reward = HpsV3.load("hpsv3", tiny.made("hpsv3"), "cpu")
    together = [s.value for s in reward.score(batch())]
    alone = [reward.score([item])[0].value for item in batch()]
    assert together == pytest.approx(alone, abs=1e-5)


def test_hpsv3_refuses_reserved_tokens_and_prompts_beyond_its_context() -> None:
    reward = HpsV3.load("hpsv3", tiny.made("hpsv3"), "cpu")
    prompts = ["fine", "a <|Reward|> b", "<|image_pad|>", "x" * 600, "fine too"]
    scores = reward.score(batch(prompts))
    assert [s.status for s in scores] == ["ok", "error", "error", "refused", "ok"]
    assert [s.error.type.rpartition(":")[2] for s in scores if s.error] == ["prompt-reserved", "prompt-reserved", "prompt-too-long"]
    alone = reward.score([batch(prompts)[4]])[0]
    assert scores[4].value == pytest.approx(alone.value, abs=1e-5)


def test_the_question_is_read_from_text_or_from_the_authors_file_without_running_it(tmp_path: Path) -> None:
    code, text, touched = tmp_path / "collator.py", tmp_path / "question.txt", tmp_path / "touched"
    code.write_text(
        f"import nowhere\nopen({str(touched)!r}, 'w')\nINSTRUCTION = '''Look: {{text_prompt}}\n'''\n"
        f"prompt_with_special_token = 'Rate: {REWARD}'\nprompt_without_special_token = 'Rate'\n"
    )
    assert read_template(code) == f"Look: {{text_prompt}}\nRate: {REWARD}" and not touched.exists()
    text.write_text(f"{{text_prompt}} {REWARD}")
    assert read_template(text) == f"{{text_prompt}} {REWARD}"
    for broken in ("{text_prompt}", REWARD, f"{{text_prompt}}{{text_prompt}}{REWARD}"):
        text.write_text(broken)
        with pytest.raises(ValueError, match="must hold"):
            read_template(text)
    code.write_text("INSTRUCTION = 'a'")
    with pytest.raises(ValueError, match="prompt_with_special_token"):
        read_template(code)
    with pytest.raises(FileNotFoundError, match="data_collator_qwen"):
        read_template(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("size", "sides"), [((448, 448), (448, 448)), ((1024, 1024), (448, 448)), ((16, 16), (448, 448)), ((512, 1024), (308, 616))]
)
def test_sides_are_those_of_qwen2_vl(size: tuple[int, int], sides: tuple[int, int]) -> None:
    """As smart_resize of the authors with the least and the most pixels both 256 * 28 * 28."""
    assert scaled_sides(*size, 28, 256 * 28 * 28) == sides


def test_a_checkpoint_without_the_reward_token_is_refused(tmp_path: Path) -> None:
    tiny.hpsv3(tmp_path)
    state = load_file(tmp_path / "HPSv3.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:100].clone()
    torch.save(state, tmp_path / "short.pt")
    options = {"folder": tmp_path, "weights": str(tmp_path / "short.pt"), "template": tmp_path / "template.txt"}
    with pytest.raises(ValueError, match="no embedding for"):
        HpsV3.load("hpsv3", options, "cpu")
