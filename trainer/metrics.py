"""What a run leaves behind to be read: metrics.jsonl, TensorBoard events, image grids."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """One JSON object per line. Opening with `resume_at` drops every line after that step, so a resumed run repeats none."""

    def __init__(self, run: Path, resume_at: int | None = None) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= resume_at] if resume_at is not None else []
        beside = self.path.with_name(".metrics.building")
        beside.write_text("".join(_line(line) for line in kept))
        beside.replace(self.path)
        self.evaluations: list[dict[str, Any]] = [line for line in kept if line["kind"] == "eval"]
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(run / "tb"), purge_step=None if resume_at is None else resume_at + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append a line; numbers go to TensorBoard too. A number that is not finite is written as null."""
        line: dict[str, Any] = {"kind": kind, "step": step}
        for key, value in values.items():
            number = isinstance(value, float)
            line[key] = None if number and not math.isfinite(value) else value
            if kind != "alarm" and isinstance(line[key], (int, float)):
                self._board.add_scalar(f"{kind}/{key}", line[key], step)
        self._file.write(_line(line))
        self._file.flush()
        if kind == "eval":
            self.evaluations.append(line)
        return line

    def grid(self, run: Path, step: int, images_BHWC: NDArray[np.uint8], limit: int) -> Path:
        """grids/step_00000.png, and the same in TensorBoard."""
        picture = grid(images_BHWC[:limit])
        path = run / "grids" / f"step_{step:05d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
        self._board.add_image("grid", picture, step, dataformats="HWC")
        return path

    def sync(self) -> None:
        """To the disk, before a checkpoint counts on it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        self.sync()
        self._file.close()
        self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line that a killed run left unfinished is skipped."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    out = []
    for number, line in enumerate(lines):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number != len(lines) - 1:
                raise ValueError(f"{path}, line {number + 1} is not JSON: remove that line") from error
    return out


def grid(images_BHWC: NDArray[np.uint8], gap: int = 2) -> NDArray[np.uint8]:
    """Pictures (B, H, W, 3) side by side on white, about 8 to 5."""
    count, height, width, _ = images_BHWC.shape
    columns = max(1, min(count, math.ceil(math.sqrt(count * 1.6))))
    rows = math.ceil(count / columns)
    out = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for n, image in enumerate(images_BHWC):
        top, left = gap + (n // columns) * (height + gap), gap + (n % columns) * (width + gap)
        out[top : top + height, left : left + width] = image
    return out


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value) + "\n"
