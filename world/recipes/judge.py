"""The small judge: a Qwen2.5-VL of a few million parameters in the published models' folder format, trained here on `lessons`.

Its eyes are trained first, with heads that are thrown away (what is it, what is wrong with it, which word stands there). Then the rest
learns captions, and every question that the shipped rewards ask in turn, the answers by next-token cross-entropy.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from trainer.honesty import grey
from world import captions, photographs
from world.recipes import lessons
from world.recipes.lessons import DEFECTS, DONE, WORDS, Lesson, Picture, Quiz, Stock, Teacher
from world.recipes.monitors import fit_cnn
from world.recipes.progress import track

FOLDER = Path(__file__).parents[1] / "judge"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IDS = {
    "image_token_id": "image_pad",
    "video_token_id": "video_pad",
    "vision_start_token_id": "vision_start",
    "vision_end_token_id": "vision_end",
}
LABELS = ("real", "fake", "yes", "no", *"ABCDEFGHI", *"123456789")
# Roles and turns as Qwen's, without its default system text.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Contractions, words with what stands before them, single digits, marks, line ends, spaces: how Qwen2 cuts text before BPE.
CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SIDES = {"min_pixels": 28 * 28, "max_pixels": 40 * 40}  # every square picture becomes 28x28: 16 patches, 4 tokens
FIRST = ("prompt_echo", "forensic_chat")
QUESTIONS = (
    "prompt_echo",
    "forensic_chat",
    "artifact_reward",
    "z_reward",
    "unified_reward",
    "rational_rewards",
    "ocr_judge",
    "auto_rubric",
    "auto_rubric_propose",
    "reward_dance",
    "unified_compare",
    "unified_verdict",
    "edit_score",
    "edit_score_quality",
)
# What is hard, or asked in few tokens, oftener.
ROUND = (*QUESTIONS, "prompt_echo", "auto_rubric", "z_reward", "reward_dance", "auto_rubric", "unified_compare")
# What was weak after both, twice and more.
MENDED = (
    *QUESTIONS,
    *("auto_rubric", "unified_verdict", "edit_score", "reward_dance", "unified_reward", "auto_rubric"),
    *("rational_rewards", "unified_verdict", "edit_score", "edit_score_quality", "unified_compare", "prompt_echo"),
)
# What a last pass, at half the rate, repeats: answers that are sampled have to be sure.
LAST = (
    *[name for name in QUESTIONS if name != "auto_rubric_propose"],
    *("edit_score", "unified_reward", "edit_score", "rational_rewards", "unified_compare", "edit_score", "unified_verdict"),
    "reward_dance",
)
RATED = (*["rational_rewards"] * 6, "auto_rubric", "auto_rubric", "prompt_echo")
KEPT = (*["auto_rubric_propose"] * 5, "unified_reward", "unified_reward", "prompt_echo", "prompt_echo")
MUON = 0.01


def tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE cut as Qwen2's; every label (plain, capitalised, after a space) and every word of captions, questions and answers
    is one token."""
    words = [s for label in LABELS for v in dict.fromkeys((label, label.capitalize(), label.upper())) for s in (v, f" {v}")]
    sentences = [text for text, _ in captions.all_captions(captions.WORDINGS, captions.TEMPLATES)]
    questions = [lessons.template(name).text for name in sorted(QUESTIONS)]
    bpe = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(CUT), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*words, *sentences, *questions, *lessons.sayings()], trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL)}
    merges = [tuple(pair) for pair in model["merges"]]
    out = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", additional_special_tokens=SPECIAL[1:], padding_side="left"
    )
    out.chat_template = CHAT
    return out


def config(
    tokens: Qwen2Tokenizer, layers: int = 3, width: int = 256, sight: int = 128, depth: int = 2, patch: int = 14
) -> Qwen2_5_VLConfig:
    """`width` and `sight` must be multiples of 64: vLLM's CPU attention takes no smaller head."""
    ids = {name: tokens.convert_tokens_to_ids(f"<|{token}|>") for name, token in IDS.items()}
    text = {
        "vocab_size": -(-len(tokens) // 64) * 64,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": depth,
        "hidden_size": sight,
        "num_heads": sight // 64,
        "intermediate_size": 2 * sight,
        "out_hidden_size": width,
        "patch_size": patch,
        "window_size": 112,
        "fullatt_block_indexes": [depth - 1],
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def processor(tokens: Qwen2Tokenizer, patch: int, sides: dict[str, int]) -> Qwen2_5_VLProcessor:
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=patch, **sides),
        tokenizer=tokens,
        video_processor=Qwen2VLVideoProcessor(patch_size=patch),
        chat_template=CHAT,
    )


def new(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The untrained judge."""
    torch.manual_seed(seed)
    tokens = tokenizer()
    model = Qwen2_5_VLForConditionalGeneration(config(tokens, sight=192, depth=3, patch=7))
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = tokens.pad_token_id
    return model, processor(tokens, 7, SIDES)


def keep(weight: Tensor, *rows: Any) -> None:
    """Training leaves these rows (or other indices) as they are."""
    mask = torch.ones_like(weight)
    for one in rows:
        mask[one] = 0
    weight.register_hook(lambda gradient: gradient * mask)


@torch.no_grad()
def notice_steps(tower: Any, steady: float = 10.0, sharp: float = 20.0) -> None:
    """Writes into the first layer, for good, what it does not find by itself: how grey levels step from a pixel to the next.

    84 channels of a patch are differences of neighbours; on each stand three hinges, at a rise of 0, 17 and 34 levels. They are summed up
    in three channels: all rises, those beyond 34, and those between, of which a banded picture has none. The last channel is steady, so
    that the norm leaves the differences their size.
    """
    patch, block = tower.patch_embed.proj.weight, tower.blocks[0]
    mixed, gate, up, down = block.attn.proj, block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj
    side = patch.shape[-1]
    here = [(y, x) for y in range(side) for x in range(side - 1)]
    pairs = [((y, x), (y, x + 1)) for y, x in here] + [((x, y), (x + 1, y)) for y, x in here]
    seen, units, told = slice(0, len(pairs)), slice(0, 3 * len(pairs)), slice(-4, None)
    places: tuple[tuple[Any, ...], ...] = (
        (patch, seen, told),
        (mixed.weight, seen, told),
        (mixed.bias, seen, told),
        *((weight, units) for weight in (gate.weight, gate.bias, up.weight, up.bias)),
        (down.weight, (slice(None), units), told),
        (down.bias, told),
    )
    for weight, *rows in places:
        for row in rows:
            weight[row] = 0
        keep(weight, *rows)
    spread = (steady**2 / len(mixed.bias) + 0.3) ** 0.5  # of all channels, before the norm
    mixed.bias[-1] = steady
    up.bias[units] = 1 / sharp
    for k, (one, other) in enumerate(pairs):
        patch[k, :, :, one[0], one[1]], patch[k, :, :, other[0], other[1]] = 1 / 6, -1 / 6
        for n, (rise, sums) in enumerate(((0.0, (0.3, 0.0, 1.0)), (0.25, (0.0, 0.0, -2.0)), (0.5, (0.0, 0.5, 1.0)))):
            gate.weight[3 * k + n, k], gate.bias[3 * k + n] = sharp * spread, -sharp * rise
            down.weight[-4:-1, 3 * k + n] = torch.tensor(sums)


class Eyes(torch.nn.Module):
    """The vision tower with a head for each thing to be seen, on the mean of a picture's tokens: what attention can read off."""

    HEADS = {"kind": 10, "defect": 1 + len(DEFECTS), "fake": 2, "word": 1 + len(WORDS), "edit": 1 + len(DONE), "severity": 1}

    def __init__(self, tower: torch.nn.Module, width: int, tokens: int) -> None:
        super().__init__()
        self.tower, self.tokens = tower, tokens
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(width, size) for name, size in self.HEADS.items()})

    def forward(self, pixels: Tensor, grid: Tensor) -> dict[str, Tensor]:
        seen_TD = self.tower(pixels, grid_thw=grid).pooler_output
        mean_BD = seen_TD.view(len(grid), self.tokens, -1).mean(1)
        return {name: head(mean_BD) for name, head in self.heads.items()}


def truth(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """What each head should say; a class index, or a severity in [0, 1]."""
    defects, words = ["", *DEFECTS], ["", *WORDS]
    return {
        "kind": torch.tensor([one.kind for one in pictures]),
        "defect": torch.tensor([defects.index(one.defect) for one in pictures]),
        "fake": torch.tensor([int(one.fake) for one in pictures]),
        "word": torch.tensor([words.index(one.word) for one in pictures]),
        "edit": torch.tensor([0 if one.edit is None else 1 + one.edit for one in pictures]),
        "severity": torch.tensor([one.severity for one in pictures], dtype=torch.float32),
    }


def sight(rng: np.random.Generator, stock: Stock) -> Picture:
    """Anything that a lesson may show."""
    picture = stock.draw(rng, spoilt=0.0)
    if rng.random() < 0.2:
        picture = lessons.lettered(picture, str(rng.choice(WORDS)), rng)
    elif rng.random() < 0.25:
        picture = lessons.edited(picture, int(rng.integers(len(DONE))))
    return lessons.spoilt_copy(picture, rng) if rng.random() < 0.4 else picture


class Optimizer:
    """Muon for matrices (with it the answers take a third of the steps), AdamW for the rest."""

    def __init__(self, module: torch.nn.Module, steps: int, rate: float, muon: float = 0.02) -> None:
        named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        turned = [weight for name, weight in named if weight.ndim == 2 and not any(one in name for one in ("embed", "heads."))]
        rest = [weight for _, weight in named if all(weight is not one for one in turned)]
        adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.parts = ((adam, rate), (torch.optim.Muon(turned, lr=muon, weight_decay=0.01), muon))
        self.weights, self.steps, self.step = [weight for _, weight in named], steps, 0

    def descend(self, loss: Tensor) -> None:
        """One step; the rate rises for 30 steps and falls by a cosine to 2 %."""
        share = min(1.0, (self.step + 1) / 30) * (0.02 + 0.49 * (1 + math.cos(math.pi * self.step / self.steps)))
        for optimizer, peak in self.parts:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = peak * share
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, _ in self.parts:
            optimizer.step()
        self.step += 1


def open_eyes(model: Any, made: Any, stock: Stock, steps: int, batch: int = 64) -> Eyes:
    """Trains the tower of `model`; what is returned has the heads too."""
    rng = np.random.default_rng(0)
    notice_steps(model.model.visual)
    eyes = Eyes(model.model.visual, model.config.text_config.hidden_size, 4).train()
    optimizer = Optimizer(eyes, steps, 2e-3)
    for step in track(range(steps), "eyes"):
        pictures = [sight(rng, stock) for _ in range(batch)]
        inputs = made.image_processor([one.pixels for one in pictures], return_tensors="pt")
        wanted = truth(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            out = {name: seen.float() for name, seen in eyes(inputs["pixel_values"], inputs["image_grid_thw"]).items()}
        spoilt = wanted.pop("severity")
        losses = {name: functional.cross_entropy(out[name], target) for name, target in wanted.items()}
        losses["kind"] = 2 * losses["kind"]
        losses["severity"] = functional.binary_cross_entropy_with_logits(out["severity"][:, 0], spoilt)
        optimizer.descend(torch.stack(list(losses.values())).sum())
        if step % 100 == 0:
            print(f"  eyes {step}: " + ", ".join(f"{name} {float(loss.detach()):.2f}" for name, loss in losses.items()), flush=True)
    return eyes


def encode(made: Any, batch: Sequence[Lesson]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the model, padded on the left, and how many tokens at the end of each row are the answer (B,)."""
    texts, counts = [], []
    for lesson in batch:
        answer = lesson.answer + "<|im_end|>"
        asked = made.apply_chat_template(
            lesson.chat.messages(lambda picture: {"type": "image"}), tokenize=False, add_generation_prompt=True
        )
        texts.append(asked + answer)
        counts.append(len(made.tokenizer(answer, add_special_tokens=False).input_ids))
    images = [image for lesson in batch for image in lesson.chat.images]
    return dict(made(text=texts, images=images, padding=True, return_tensors="pt")), torch.tensor(counts)


def answer_loss(model: Any, inputs: dict[str, Tensor], counts_B: Tensor, even: bool) -> Tensor:
    """Cross-entropy of the answers' tokens, an answer of n weighing sqrt(n); logits are made for these positions only.

    `even`: the mean over tokens. Else their sum, an answer each: of a sentence that is known by heart but for one word, that word counts.
    """
    hidden_BTD = model.model(**inputs, use_cache=False).last_hidden_state
    length = hidden_BTD.shape[1]
    mask_BT = torch.arange(length)[None] >= (length - counts_B)[:, None]
    logits_NV = model.lm_head(hidden_BTD[:, :-1][mask_BT[:, 1:]])
    losses_N = functional.cross_entropy(logits_NV, inputs["input_ids"][:, 1:][mask_BT[:, 1:]], reduction="none")
    weights_N = (1 / counts_B.sqrt()).repeat_interleave(counts_B)
    return (losses_N * weights_N).sum() / (weights_N.sum() if even else len(counts_B))


def line_ends(tokens: Any) -> Tensor:
    """Whether a line ends with the token of each id (V,)."""
    return torch.tensor([tokens.decode([i]).endswith("\n") for i in range(len(tokens))])


def quiz(made: Any, ends_V: Tensor, quizzes: Sequence[Quiz]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The inputs (B, T), where a line ends (B, T), and the answer to each line, a token each.

    The answers do not stand in the text: each line is judged by the pictures alone, many in the time of one question.
    """
    texts, images, answers = [], [], list[str]()
    for one in quizzes:
        seen = ["<|vision_start|><|image_pad|><|vision_end|>"] * len(one.pictures)
        shown = "\n".join(f"{one.name} {i + 1}: {place}" for i, place in enumerate(seen)) if one.name else seen[0]
        texts.append(f"<|im_start|>user\n{shown}" + "".join(f"{text}\n" for text, _ in one.lines))
        images += [picture.pixels for picture in one.pictures]
        answers += [answer for _, answer in one.lines]
    inputs = dict(made(text=texts, images=images, padding=True, return_tensors="pt"))
    over_BT = (inputs["input_ids"] == made.tokenizer.convert_tokens_to_ids("<|vision_end|>")).cumsum(1)
    after_BT = over_BT == torch.tensor([len(one.pictures) for one in quizzes])[:, None]
    return inputs, ends_V[inputs["input_ids"]] & after_BT, torch.tensor(made.tokenizer.convert_tokens_to_ids(answers))


def quiz_loss(model: Any, inputs: dict[str, Tensor], mask_BT: Tensor, answers_N: Tensor) -> Tensor:
    hidden_BTD = model.model(**inputs, use_cache=False).last_hidden_state
    return functional.cross_entropy(model.lm_head(hidden_BTD[mask_BT]), answers_N)


def learn(
    model: Any,
    made: Any,
    stock: Stock,
    names: Sequence[str],
    quizzes: Sequence[str],
    seed: int,
    even: bool = True,
    rate: float = 1.0,
) -> None:
    """A step for each question of `names`, with 20 of the quizzes in turn, if any; the eyes stay as they are."""
    teacher, seen, ends_V = Teacher(stock, seed), dict[str, float](), line_ends(made.tokenizer)
    model.model.visual.requires_grad_(False)
    optimizer = Optimizer(model, len(names), 3e-3 * rate, MUON * rate)
    model.train()
    for step, name in track(list(enumerate(names)), "questions"):
        inputs, counts_B = encode(made, [teacher.lesson(name) for _ in range(16 if quizzes else 32)])
        with torch.autocast("cpu", torch.bfloat16):
            losses = {name: answer_loss(model, inputs, counts_B, even)}
            if quizzes:
                tested = quizzes[step % len(quizzes)]
                losses[tested] = quiz_loss(model, *quiz(made, ends_V, [getattr(teacher, tested)() for _ in range(20)]))
        optimizer.descend(torch.stack(list(losses.values())).sum())
        for one, loss in losses.items():
            seen[one] = 0.8 * seen.get(one, float(loss.detach())) + 0.2 * float(loss.detach())
        if (step + 1) % 60 == 0:
            print(f"  questions {step + 1}: " + ", ".join(f"{name} {value:.2f}" for name, value in seen.items()), flush=True)
    model.requires_grad_(True).eval()


def looks_of(stock: Stock, steps: int = 400) -> NDArray[np.float32]:
    """How likely each kind seems (N, 10): of photographs to a classifier fitted on the other half of them, of forgeries to both."""
    half, classes = np.arange(len(stock.real)) % 2, torch.from_numpy(stock.classes)
    real, forged = grey(stock.real), grey(stock.forged)
    fitted = [fit_cnn(real[half == k], classes[half == k], 10, steps, f"kinds {k + 1}", seed=k) for k in range(2)]
    with torch.inference_mode():
        seen = [[one(part).softmax(1) for part in torch.cat([real, forged]).split(1000)] for one in fitted]
    first, second = (torch.cat(several).numpy() for several in seen)
    out = (first + second) / 2
    for k, other in enumerate((second, first)):
        out[: len(half)][half == k] = other[: len(half)][half == k]
    return out


def stock_of(forged: NDArray[np.uint8]) -> Stock:
    """The training photographs, and `world.make.forgeries`: five ages, two strengths of guidance each, classes in turn."""
    real, classes = photographs.load("train")
    each = len(forged) // (2 * len(lessons.FORGED))
    return Stock(real, classes, forged, np.arange(len(forged)) % each % 10, np.arange(len(forged)) // (2 * each))


def train(
    forged: NDArray[np.uint8],
    eyes: int = 1700,
    first: int = 110,
    rounds: int = 50,
    again: int = 40,
    mended: int = 34,
    last: int = 12,
) -> tuple[Any, Any]:
    """The judge and its processor: captions and real or fake first, then every question in turn; then with rubrics and pairs in the
    quiz; then what was weak oftener, and of a long answer the words that differ; then edits alone and gentle passes over all in turn,
    with the mean of the weights before and after the longest, which loses least of either."""
    model, made = new()
    stock = stock_of(forged)
    open_eyes(model, made, stock, eyes)
    stock = replace(stock, looks=looks_of(stock))
    learn(model, made, stock, [*FIRST * first, *ROUND * rounds], ["statements"], seed=1)
    learn(model, made, stock, ROUND * again, ["rubrics", "choices"], seed=2)
    learn(model, made, stock, ["asked_for"] * 70, [], seed=3)
    learn(model, made, stock, MENDED * mended, ["rubrics", "choices", "edits"], seed=4, even=False)
    quizzes = ["choices", "edits", "rubrics"]
    learn(model, made, stock, ["edit_score"] * 70, [], seed=6, even=False)
    learn(model, made, stock, LAST * last, quizzes, seed=5, even=False, rate=0.5)
    learn(model, made, stock, ["edit_score"] * 130, ["edits"], seed=8, even=False)
    learn(model, made, stock, (*LAST, "ocr_judge", "ocr_judge") * (last // 3), quizzes, seed=9, even=False, rate=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seldom = (*["ocr_judge"] * 2, *["prompt_echo"] * 2, *["unified_verdict"] * 2)
    learn(model, made, stock, (*LAST, *seldom) * (last + 2), quizzes, seed=10, even=False, rate=0.5)
    model.load_state_dict({name: (value + before[name]) / 2 for name, value in model.state_dict().items()})
    written = (*["rational_rewards"] * 3, *["prompt_echo"] * 2, "unified_reward", "edit_score")
    learn(model, made, stock, (*LAST, *written) * (3 * last // 4), quizzes, seed=11, even=False, rate=0.3)
    learn(model, made, stock, (*LAST, *RATED) * (last // 2), quizzes, seed=12, even=False, rate=0.3)
    learn(model, made, stock, (*LAST, *["prompt_echo"] * 7, *["edit_score"] * 2) * 5, quizzes, seed=13, even=False, rate=0.25)
    learn(model, made, stock, (*LAST, *KEPT) * 4, quizzes, seed=14, even=False, rate=0.25)
    return model, made


def save(model: Any, made: Any, folder: Path = FOLDER) -> None:
    """Half precision in the file, and a config by which it loads in single."""
    model.half().save_pretrained(folder)
    made.save_pretrained(folder)
    model.float()
    told = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")


def make(forged: NDArray[np.uint8]) -> None:
    """About half an hour of one core."""
    save(*train(forged))
