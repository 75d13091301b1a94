"""Rebuild every shipped weight file: `make world`, or `python -m world.make words policy monitors detector judge alignment prompts cards`.

Steps depend on the ones before them; two CPU cores need well under an hour. `cards` measures everything on held-out
photographs, and writes the model cards and `checksums.json`.
"""

import argparse
import hashlib
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from world import captions, photographs
from world.recipes import alignment, cards, detector, judge, monitors, policy, policy_looks, rewrites, words

WORLD = Path(__file__).parent
AGES = (150, 300, 600, 1000)  # optimiser steps of the young forgers
STEPS = 1500  # and of the shipped policy


def prompts_for(count: int, seed: int) -> tuple[list[str], list[int]]:
    """`count` training captions, classes in turn."""
    rng = random.Random(seed)
    classes = [i % 10 for i in range(count)]
    return [captions.sample(c, rng) for c in classes], classes


def forgeries(seed: int, per_forger: int) -> NDArray[np.uint8]:
    """Pictures of forgers of several ages, with and without guidance; the shipped policy's come last. Cached on disk."""
    file = policy.CACHE / f"forgeries_{seed}_{per_forger}.npy"
    if file.is_file():
        cached: NDArray[np.uint8] = np.load(file)
        return cached
    parts = []
    for folder in [*(policy.CACHE / f"policy_{age}" for age in AGES), policy.FOLDER]:
        pipe = policy.load(folder)
        for guidance in (2.0, 1.0):
            prompts, _ = prompts_for(per_forger, seed)
            parts.append(policy.sample(pipe, prompts, seed, steps=10, guidance=guidance))
            print(f"  sampled {len(prompts)} pictures of {folder.name}, guidance {guidance}", flush=True)
            seed += 1
    pictures = np.concatenate(parts)
    policy.CACHE.mkdir(exist_ok=True)
    np.save(file, pictures)
    return pictures


def write_prompts() -> None:
    """`prompts/{train,eval,heldout}.jsonl`: learned wordings, the same for evaluation (other templates mix), and unseen ones."""
    sets = {
        "train": captions.all_captions(captions.WORDINGS, captions.TEMPLATES),
        "eval": captions.all_captions(captions.WORDINGS, captions.TEMPLATES[:4]),
        "heldout": captions.all_captions(captions.HELD_OUT, captions.TEMPLATES[:4] + captions.HELD_OUT_TEMPLATES),
    }
    (WORLD / "prompts").mkdir(exist_ok=True)
    for name, rows in sets.items():
        random.Random(0).shuffle(rows)
        lines = [
            json.dumps({"id": i, "prompt": text, "class": c, "class_name": photographs.CLASS_NAMES[c]})
            for i, (text, c) in enumerate(rows)
        ]
        (WORLD / "prompts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def make_policy() -> None:
    policy.save(policy.train(STEPS, keep=AGES), policy.FOLDER)


def write_checksums() -> None:
    """SHA-256 of every shipped weight file; `tests/world` compares."""
    files = sorted(p for p in WORLD.rglob("*.safetensors") if policy.CACHE not in p.parents)
    sums = {p.relative_to(WORLD).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (WORLD / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")


RECIPES = {
    "words": words.make,
    "prompts": write_prompts,
    "policy": make_policy,
    "alignment": alignment.make,
    "monitors": lambda: monitors.make(forgeries(seed=1000, per_forger=500)),
    "detector": lambda: detector.make(forgeries(seed=2000, per_forger=800)),
    "judge": lambda: judge.make(forgeries(seed=2000, per_forger=800)),
    "policy_looks": policy_looks.make,
    "rewrites": rewrites.make,
    "cards": lambda: cards.make(forgeries),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"which to run, default all: {', '.join(RECIPES)}")
    chosen = parser.parse_args().recipes or list(RECIPES)
    unknown = sorted(set(chosen) - set(RECIPES))
    if unknown:
        parser.error(f"unknown recipe {unknown[0]!r}; known: {', '.join(RECIPES)}")
    started = time.monotonic()
    for index, name in enumerate(chosen):
        print(f"[{index + 1}/{len(chosen)}] {name}", flush=True)
        torch.manual_seed(0)
        RECIPES[name]()
        print(f"[{index + 1}/{len(chosen)}] {name}: done, {time.monotonic() - started:.0f} s in all", flush=True)
    write_checksums()


if __name__ == "__main__":
    main()
