"""The alignment model: a tiny CLIPModel, contrastively trained on the photographs and their captions."""

import random
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from world import captions, photographs
from world.recipes import words
from world.recipes.progress import track

FOLDER = Path(__file__).parents[1] / "alignment"


def make(steps: int = 1200, folder: Path = FOLDER, batch: int = 128, seed: int = 0) -> None:
    """Soft-target contrastive training: every caption of a picture's class is a positive for it (SupCon, 2004.11362)."""
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokenizer, vectors = words.load()
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    text = {
        "vocab_size": len(vectors),
        "hidden_size": words.WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": words.MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,  # type: ignore[attr-defined]
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 4,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).train()
    embedding = model.text_model.get_input_embeddings()
    embedding.weight.data.copy_(vectors)
    embedding.weight.requires_grad_(False)
    images, classes = photographs.load("train")
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.3) / 0.35
    labels = torch.from_numpy(classes)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in track(range(steps), "alignment"):
        chosen = torch.randint(len(pixels), (batch,), generator=generator)
        x = pixels[chosen]
        if torch.rand((), generator=generator) < 0.5:
            x = x.flip(-1)
        dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
        tokens = tokenizer(  # type: ignore[operator]
            [captions.sample(int(c), rng) for c in labels[chosen]],
            padding="max_length",
            max_length=words.MAX_LENGTH,
            return_tensors="pt",
        )
        out = model(pixel_values=x.roll((dy, dx), (-2, -1)), **tokens)
        same = (labels[chosen][:, None] == labels[chosen][None, :]).float()
        target = same / same.sum(1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(out.logits_per_image, target)
        loss = (loss + torch.nn.functional.cross_entropy(out.logits_per_text, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=np.log(30.0))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size=28, image_mean=[0.3] * 3, image_std=[0.35] * 3, resample=3
    ).save_pretrained(folder)
