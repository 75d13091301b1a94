"""Let a CPU build of torch live with the package index's torchvision, which is compiled for CUDA.

That torchvision cannot load its extension beside a CPU torch, and then its import fails with "operator
torchvision::nms does not exist", which takes timm and transformers down with it. Declaring the two schemas
that it registers shapes for is enough: nothing in Verism calls the operators.

This is the one place where that is mended. `scripts/setup.sh` writes `verism_torchvision.pth` into the
environment, so every Python process started from it, children included, runs `install()`. It costs a finder
on the meta path and nothing else: torch is imported only when torchvision is looked for. Where torchvision's
extension loads, nothing is declared.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []  # a Library's schemas live as long as it does


def extension_loads(folder: Path) -> bool:
    """Whether torchvision's compiled operators in `folder` can be loaded beside this torch."""
    import torch

    files = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    if not files:
        return False
    try:
        torch.ops.load_library(str(files[0]))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError):
        return False
    return hasattr(torch.ops.torchvision, "nms")


def declare() -> None:
    """Declare the schemas `nms` and `qnms`, once."""
    import torch

    if not _kept:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(name + SCHEMA)  # type: ignore[no-untyped-call]
        _kept.append(library)


class _Finder(importlib.abc.MetaPathFinder):
    """Steps aside at the first import of torchvision, after having looked whether it needs help."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or importlib.util.find_spec("torch") is None:
            return spec
        if not extension_loads(Path(spec.origin).parent):
            declare()
        return spec


def install() -> None:
    """Watch for the first import of torchvision."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
