"""The house keeps its own rules: imports, unpickling, where rooms lie, how large the repository is."""

import importlib
import subprocess
from pathlib import Path

import pytest

from tests.house.rules import ROOMS, unsafe_loads, violations

LIMIT_MB = 40


def tracked(root: Path) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    return [root / name for name in listing.stdout.decode().split("\0") if name and (root / name).is_file()]


def sources(root: Path) -> list[Path]:
    folders = (*ROOMS, "world", "bench", "examples", "tests")
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def test_imports_follow_the_table(root: Path) -> None:
    files = sources(root)
    assert {path.relative_to(root).parts[0] for path in files} >= {*ROOMS, "tests"}
    found = [v for path in files for v in violations(path.relative_to(root).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


def test_nothing_unpickles(root: Path) -> None:
    found = [v for path in sources(root) for v in unsafe_loads(path.relative_to(root).as_posix(), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("services/app.py", "import trainer.loop"),
        ("services/app.py", "import torch"),
        ("services/rewards/x.py", "from fastapi import FastAPI"),
        ("services/rewards/x.py", "def f():\n    from ...trainer import loop"),
        ("trainer/loop.py", "from services.reward import Item"),
        ("trainer/loop.py", "from shared.client import RewardClient"),
        ("trainer/loop.py", "from shared import client"),
        ("trainer/loop.py", "import importlib\nimportlib.import_module('services.app')"),
        ("shared/wire.py", "import torch.nn"),
        ("shared/wire.py", "from torch import nn"),
        ("shared/wire.py", "import pickle"),
        ("world/make.py", "from requests import get"),
    ],
)
def test_a_violation_is_found(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainer/scoring.py", "from shared.client import RewardClient"),
        ("trainer/loop.py", "from shared.clients import x\nimport torch"),
        ("services/rewards/x.py", "import torch\nfrom shared.schema import Score"),
        ("services/rewards/x.py", "from . import y"),
        ("shared/wire.py", "from .schema import Score\nimport msgspec"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_an_unsafe_load_is_found() -> None:
    assert unsafe_loads("a.py", "torch.load(p)")
    assert unsafe_loads("a.py", "torch.load(p, weights_only=False)")
    assert unsafe_loads("a.py", "np.load(p, allow_pickle=True)")
    assert not unsafe_loads("a.py", "torch.load(p, weights_only=True)\nnp.load(p)\njson.load(f)")


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_is_this_repositorys(room: str, root: Path) -> None:
    """The names shared, services and trainer exist on the package index too."""
    file = importlib.import_module(room).__file__
    assert file is not None
    assert Path(file).resolve().is_relative_to(root / room)


def test_the_repository_stays_small(root: Path) -> None:
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    sizes = {path: path.stat().st_size for path in tracked(root)}
    largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
    total = sum(sizes.values()) / 1e6
    assert total < LIMIT_MB, f"{total:.1f} MB; largest: {[(str(p.relative_to(root)), sizes[p]) for p in largest]}"
