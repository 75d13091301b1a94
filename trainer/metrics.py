"""What a run leaves behind to be read: metrics.jsonl, image grids, TensorBoard events, Weights & Biases."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from trainer.config import RunConfig


class Metrics:
    """One JSON object per line. Opening with `resume_at` drops every line after that step, so a resumed run repeats none.

    `quiet` writes nothing anywhere: for all ranks but the first; `tensorboard` writes its events too, `wandb` (a configuration that may have
    that key) to Weights & Biases. A disk that is full is no end: lines wait in memory, and `sync` raises OSError as long as some do; pictures,
    TensorBoard's file and W&B are given up with a word to `warn`.
    """

    def __init__(
        self,
        run: Path,
        resume_at: int | None = None,
        quiet: bool = False,
        tensorboard: bool = True,
        wandb: "RunConfig | None" = None,
    ) -> None:
        self.path, self.quiet = run / "metrics.jsonl", quiet
        self.warn: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2)
        kept = [line for line in read(self.path) if line["step"] <= resume_at] if resume_at is not None else []
        self.evaluations: list[dict[str, Any]] = [line for line in kept if line["kind"] == "eval"]
        self._waiting, self._file = b"", -1
        self._board: Any = None
        self._wandb: Any = None
        if quiet:
            return
        if wandb is not None and wandb.wandb is not None:
            from trainer.watch.wandb_board import Board

            self._wandb = Board(wandb, run)
        beside = self.path.with_name(".metrics.building")
        beside.write_text("".join(_line(line) for line in kept))
        beside.replace(self.path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        if not tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter  # 6 MB

        self._board = SummaryWriter(str(run / "tb"), purge_step=None if resume_at is None else resume_at + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append a line; numbers go to TensorBoard too. A number that is not finite is written as null."""
        line: dict[str, Any] = {"kind": kind, "step": step}
        for key, value in values.items():
            number = isinstance(value, float)
            line[key] = None if number and not math.isfinite(value) else value
            if kind in ("step", "eval") and isinstance(line[key], (int, float)):
                self._show("add_scalar", f"{kind}/{key}", line[key], step)
        self._tell("line", line)
        if not self.quiet:
            self._waiting += _line(line).encode()
            with contextlib.suppress(OSError):  # `sync` says so before anything counts on the lines
                self._push()
        if kind == "eval":
            self.evaluations.append(line)
        return line

    def grid(self, run: Path, step: int, images_BHWC: NDArray[np.uint8], limit: int) -> Path:
        """grids/step_00000.png, and the same in TensorBoard."""
        path = run / "grids" / f"step_{step:05d}.png"
        if self.quiet:
            return path
        picture = grid(images_BHWC[:limit])
        try:
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
        except OSError as error:
            self.warn(f"{path} could not be written ({error.strerror or error}); the run goes on without it")
        self._show("add_image", "grid", picture, step, dataformats="HWC")
        self._tell("grid", step, picture)
        return path

    def sync(self) -> None:
        """To the disk, before a checkpoint counts on it; OSError when it will not go there."""
        if not self.quiet:
            self._push()
            os.fsync(self._file)
            self._show("flush")

    def close(self) -> None:
        """Flush and close."""
        if self._file < 0:
            return
        try:
            self.sync()
        except OSError as error:
            self.warn(f"the last lines of {self.path} could not be written ({error.strerror or error})")
        self._show("close")
        self._tell("close")
        os.close(self._file)
        self._file = -1

    def _push(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]

    def _show(self, method: str, *arguments: Any, **more: Any) -> None:
        """A method of TensorBoard's writer, which is left alone once its file cannot be written."""
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*arguments, **more)
        except (OSError, ValueError) as error:
            self._board = None
            self.warn(f"TensorBoard's file could not be written ({error}); metrics.jsonl goes on without it")

    def _tell(self, method: str, *arguments: Any) -> None:
        """W&B, which is left alone once it fails: a run goes on without it."""
        if self._wandb is None:
            return
        try:
            getattr(self._wandb, method)(*arguments)
        except Exception as error:  # its own errors are of many kinds, and none of them is worth a run
            self._wandb = None
            self.warn(f"Weights & Biases was given up ({type(error).__name__}: {error}); metrics.jsonl goes on without it")


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
