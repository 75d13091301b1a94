"""`fit:` of a reward in a service's configuration: how it is refitted. Read before anything loads; without torch.

    detector:
      use: detector
      folder: world/detector
      fit: {folder: runs/fitting/detector, optim: {lr: 0.0003}, head: {kind: linear}}

Defaults are RealGen V2's (2512.00473 and its code), where it has one.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimOptions(BaseModel):
    """Of all that a reward offers to be trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    use: Literal["adamw", "adam"] = "adamw"
    lr: float = Field(default=4e-5, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)


class ReplayOptions(BaseModel):
    """Past pairs that are learned from again, so that what a generator did once is not forgotten."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int = Field(default=1000, ge=0, le=100_000, description="pairs of a real and a generated picture; 0 for none")
    share: float = Field(default=0.5, ge=0, le=0.9, description="of the pictures of a step")


class FitOptions(BaseModel):
    """`head` is the reward's own to check, `augment` is services.fitting.augment's (null: nothing is changed)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path | None = Field(default=None, description="where versions and replayed pictures lie; default runs/fitting/NAME")
    head: dict[str, Any] = {}
    optim: OptimOptions = OptimOptions()
    batch: int = Field(default=16, ge=1, le=1024, description="new pairs of a step; replayed ones come on top")
    rounds: int = Field(default=20, ge=1, le=10_000, description="most passes over the new pictures")
    until_accuracy: float = Field(default=0.90, gt=0.5, le=1.0, description="a refit ends with the round that reaches it")
    steps: int | None = Field(default=None, ge=1, description="most steps of the optimiser in one refit")
    ema: float = Field(default=0.99, ge=0, lt=1, description="decay of the average of the weights; the average is what scores")
    replay: ReplayOptions = ReplayOptions()
    augment: dict[str, Any] | None = {}
    held_out: float = Field(default=0.2, ge=0.05, le=0.5, description="share of the pictures that a version proves itself on")
    worse: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="how far below the served version's accuracy on these a version may be and still be served",
    )
    least: int = Field(default=8, ge=4, description="pictures of each side")
    keep: int = Field(default=4, ge=1, description="newest versions that can be rolled back to")
    snapshots: int = Field(default=64, ge=1, description="snapshots that are kept beside these; the oldest leaves")
    share: float = Field(default=0.25, gt=0, le=1, description="of a core's time, while something is being scored")
    threads: int = Field(default=1, ge=1, le=64, description="CPU threads of a refit's forward and backward passes")
    waiting_bytes: int = Field(default=512 * 2**20, ge=2**20, description="pixels that may wait for a refit")
    seed: int = 0

    def place(self, name: str) -> Path:
        return self.folder if self.folder is not None else Path("runs") / "fitting" / name
