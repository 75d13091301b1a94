"""Folders of made-up pictures, and a bench on them."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

IDS = [f"p-{i:02d}" for i in range(40)]


def fill(folder: Path, level: float, names: list[str] | None = None, side: int = 20, seed: int = 0) -> Path:
    """Noise around `level` (0 to 1), each picture with a level of its own."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in names if names is not None else IDS:
        own = 255 * np.clip(level + 0.08 * rng.standard_normal(), 0.02, 0.98)
        Image.fromarray(np.clip(own + 6 * rng.standard_normal((side, side, 3)), 0, 255).astype(np.uint8)).save(
            folder / f"{name}.png"
        )
    return folder


def prompts(path: Path) -> Path:
    path.write_text("".join(f'{{"id": "{name}", "prompt": "a thing {name}", "long": "a long thing {name}"}}\n' for name in IDS))
    return path


def bench(path: Path, url: str, **more: Any) -> Path:
    """`real` and `level` as detectors, `fit` as a reward, no features unless asked for."""
    raw: dict[str, Any] = {
        "detectors": {"real": {"url": url}, "level": {"url": url}},
        "rewards": {"fit": {"url": url}},
        "arena": {"reward": "pairs", "url": url, "pairs": 40},
        "features": None,
        "bootstrap": {"rounds": 200},
        "timeout_s": 100,
    }
    path.write_text(yaml.safe_dump(raw | more))
    return path
