"""What the fitters of several rewards share: a loss on two sides, heads on frozen features, features kept by picture, digests of weights."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from services.fitting.lora import LoraOptions
from services.fitting.losses import hinge, soft_cross_entropy
from services.reward import Item

AT_ONCE = 64  # pictures that go through a network together where no gradient is asked for
KEPT_BYTES = 256 << 20


class LossOptions(BaseModel):
    """How real and generated are told apart; under `fit.head`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    loss: Literal["cross_entropy", "hinge"] = "cross_entropy"
    real: float = Field(default=0.95, gt=0, lt=1, description="target of the cross-entropy for real pictures")
    generated: float = Field(default=0.05, gt=0, lt=1, description="and for generated ones")

    @model_validator(mode="after")
    def _apart(self) -> "LossOptions":
        if self.generated >= self.real:
            raise ValueError(f"`generated` {self.generated} must be below `real` {self.real}: they are targets of P(photograph)")
        return self

    def __call__(self, real: Tensor, generated: Tensor) -> Tensor:
        """Of logits, or of scores around 0, of both sides."""
        return hinge(real, generated) if self.loss == "hinge" else soft_cross_entropy(real, generated, self.real, self.generated)


class HeadOptions(LossOptions):
    """A head on the features of a backbone, which LoRA may change a little."""

    kind: Literal["linear", "mlp"] = "linear"
    hidden: int | None = Field(default=None, ge=1, le=8192, description="width of the MLP's hidden layer; default: 256")
    lora: LoraOptions | None = None
    seed: int = Field(default=0, ge=0, description="of what begins at random: the hidden layer, LoRA's A")

    @model_validator(mode="after")
    def _fits(self) -> "HeadOptions":
        if self.kind == "linear" and self.hidden is not None:
            raise ValueError("a linear head has no `hidden` layer: leave it out, or set `kind: mlp`")
        return self


def head_logits(x_BD: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """(B,): w x + b, and where there is a hidden layer, + v gelu(U (x - mean) / std + c).

    The hidden layer is added to the linear head, not put in its place: with v = 0 the two are one, so a refit begins at what is served.
    """
    logits = x_BD @ tensors["head.weight"] + tensors["head.bias"]
    if "head.out" in tensors:
        inner = (x_BD - tensors["domain.mean"]) / tensors["domain.std"]
        logits = logits + F.gelu(F.linear(inner, tensors["head.hidden"], tensors["head.shift"])) @ tensors["head.out"]
    return logits


def hidden_layer(width: int, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    """U, c and v of a new hidden layer: inputs of variance 1 give units of variance 1, and v is 0."""
    return {
        "head.hidden": torch.randn(hidden, width, generator=generator) * width**-0.5,
        "head.shift": torch.zeros(hidden),
        "head.out": torch.zeros(hidden),
    }


def leaf(tensor: Tensor) -> Tensor:
    """A copy that an optimiser can step: float32, with a gradient."""
    return tensor.detach().float().clone().requires_grad_()


def balanced(real: Tensor, generated: Tensor, threshold: float) -> float:
    """Mean over both sides of the share on the right side of a threshold."""
    real, generated = real.detach(), generated.detach()
    return float(((real > threshold).double().mean() + (generated < threshold).double().mean()) / 2)


def checked(weights: Mapping[str, Tensor], like: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Copies of the weights, detached, as a version keeps them. ValueError where they are not those of this fitter, or not finite."""
    if weights.keys() != like.keys():
        differ = ", ".join(sorted(weights.keys() ^ like.keys())[:3])
        raise ValueError(
            f"these are not the weights that `fit.head` of {name} describes ({differ}); use the options they were fitted with"
        )
    for key, value in weights.items():
        if value.shape != like[key].shape:
            raise ValueError(
                f"{key} is {tuple(value.shape)}, not {tuple(like[key].shape)}: use the options of {name} it was fitted with"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key} of {name} holds a number that is not finite: the refit diverged; lower its learning rate")
    return {key: value.detach().to(like[key].device, torch.float32).clone() for key, value in weights.items()}


def digest(base: str, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over what is frozen (its own digest, `base`) and the values of what was fitted, by name."""
    found = hashlib.sha256(base.encode())
    for name in sorted(weights):
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        found.update(f"\n{name} {list(values.shape)}\n".encode() + values.numpy().tobytes())
    return found.hexdigest()


class Kept:
    """Frozen features by picture: each is computed once while it is among the last `limit` bytes asked for. For one thread.

    A refit begins with `clear`: the last bits of a feature depend on the batch it was computed in, and a refit after a restart should
    give the numbers that it would have given without one.
    """

    def __init__(self, compute: Callable[[list[Item]], tuple[Tensor, ...]], limit: int = KEPT_BYTES) -> None:
        self._compute, self._limit, self._bytes = compute, limit, 0
        self._rows: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()

    def __call__(self, items: Sequence[Item]) -> tuple[Tensor, ...]:
        """Tensors (B, ...), in order, without a gradient."""
        keys = [_key(item.image) for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._rows}
        fresh: dict[bytes, tuple[Tensor, ...]] = {}
        for start in range(0, len(new), AT_ONCE):
            some = list(new.items())[start : start + AT_ONCE]
            with torch.no_grad():
                columns = self._compute([item for _, item in some])
            fresh |= {key: tuple(column[i].clone() for column in columns) for i, (key, _) in enumerate(some)}
        rows = [fresh[key] if key in fresh else self._rows[key] for key in keys]
        for key, row in zip(keys, rows, strict=True):
            if key not in self._rows:
                self._rows[key], self._bytes = row, self._bytes + _size(row)
            self._rows.move_to_end(key)
        while self._bytes > self._limit and self._rows:
            self._bytes -= _size(self._rows.popitem(last=False)[1])
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def clear(self) -> None:
        self._rows.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)


def _key(image: NDArray[np.uint8]) -> bytes:
    found = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    found.update(np.ascontiguousarray(image).data)
    return found.digest()


def _size(row: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in row)
