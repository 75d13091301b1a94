"""The values that move through a run, and the legend of the axes in their names.

B samples, P prompts (groups), G members of a group, T trained steps of the window, R rewards, C H W latent axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file."""

    id: int
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Condition:
    """What a policy needs to know of B prompts: tensors whose first axis is B."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: slice | Tensor) -> "Condition":
        return Condition({k: v[index] for k, v in self.tensors.items()})


@dataclass(frozen=True)
class Window:
    """The steps that are stochastic and trained: start, start + 1, ..., start + length - 1."""

    start: int
    length: int

    def __iter__(self) -> Any:
        return iter(range(self.start, self.start + self.length))


@dataclass(frozen=True)
class Rollout:
    """B samples of one group: everything that scoring and the loss need.

    `states_BT` holds T + 1 latents (B, T + 1, C, H, W) float32: before the first trained step up to after the last one. `levels_T` is the
    noise level of each trained step; `guided` the steps [first, last) that `guidance` holds in, all when null.
    """

    prompts: tuple[Prompt, ...]
    group: int
    window: Window
    sigmas: Tensor
    levels_T: tuple[float, ...]
    kind: str
    guidance: float
    condition: Condition
    states_BT: Tensor
    logp_old_BT: Tensor
    mean_old_BT: Tensor
    latents_BCHW: Tensor
    images_BHWC: NDArray[np.uint8]
    guided: tuple[int, int] | None = None

    def guidance_at(self, place: float) -> float:
        """The guidance of step `place`: 1 (none, one pass) outside the guided steps."""
        return guidance_at(self.guidance, self.guided, place)


def guidance_at(guidance: float, guided: tuple[int, int] | None, place: float) -> float:
    """`guidance` inside the steps [first, last) of `guided` or when it is null, 1 elsewhere."""
    return guidance if guided is None or guided[0] <= place < guided[1] else 1.0


class ImagePolicy(Protocol):
    """What the trainer asks of an image model; nothing else knows which model it is."""

    device: torch.device

    def encode(self, prompts: list[str]) -> Condition: ...
    def velocity(self, latents_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor: ...
    def decode(self, latents_BCHW: Tensor) -> NDArray[np.uint8]: ...
    def sigmas(self, steps: int, height: int, width: int) -> Tensor: ...
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]: ...
    def trainable(self) -> dict[str, torch.nn.Parameter]: ...
    def reference(self) -> Any: ...
    def fingerprint(self) -> str: ...
