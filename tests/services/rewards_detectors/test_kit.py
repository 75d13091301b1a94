"""Checkpoints from outside: what is read, what is refused, and that nothing is unpickled."""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from services.config import ROOT
from services.registry import resolve
from services.reward import Item
from services.rewards._detector_kit import WeightsOptions, batched, fill, folded, in_one_call, read_state, sha256
from services.rewards._resize import upload
from tests.services.rewards_detectors import tiny


class Mischief:
    """An object whose unpickling would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
def test_a_pickle_inside_is_refused_and_not_run(where: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "model.pth", Mischief(tmp_path / "ran")
    weights = {"a": torch.zeros(2)}
    torch.save({"beside": {"model": weights, "args": trace}, "inside": {**weights, "b": trace}, "alone": trace}[where], path)
    with pytest.raises(ValueError, match="model.pth is not a file of tensors.*safetensors"):
        read_state(path)
    assert not trace.folder.exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 not a zip", b"\x80\x04K\x01.", bytes(4096)])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_broken_files_are_refused(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"model{suffix}"):
        read_state(path)


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {"epoch": 3}, {"model": {}}])
def test_a_file_without_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_state(tmp_path / "m.pth")


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 1}])
def test_nests_and_prefixes_of_trainers_are_read(nest: Any, tmp_path: Path) -> None:
    state = {"module.a.weight": torch.arange(3.0), "module.b": torch.ones(1)}
    torch.save(nest(state), tmp_path / "m.pth")
    found = read_state(tmp_path / "m.pth")
    assert list(found) == ["a.weight", "b"] and torch.equal(found["a.weight"], torch.arange(3.0))


def test_a_trainers_arguments_are_let_through(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1.0, data="x")}, tmp_path / "m.pth")
    assert list(read_state(tmp_path / "m.pth")) == ["a"]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_locating_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name it with `file`"):
        WeightsOptions(path=tmp_path).locate()
    for name in ("a.safetensors", "b.pth"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"found \['a.safetensors', 'b.pth'\]"):
        WeightsOptions(path=tmp_path).locate()
    assert WeightsOptions(path=tmp_path, file="b.pth").locate().name == "b.pth"
    assert WeightsOptions(path=tmp_path / "a.safetensors").locate().name == "a.safetensors"
    assert sha256(tmp_path / "b.pth") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either `path`"),
        ({"path": "x", "hub": "a/b"}, "either `path`"),
        ({"hub": "a/b"}, "`revision`"),
        ({"hub": "a/b", "file": "c.pth"}, "`revision`"),
        ({"hub": "a/b", "file": "c.pth", "revision": "main"}, "revision"),
        ({"path": "x", "pth": "y"}, "pth"),
    ],
)
def test_sources_are_checked_first(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WeightsOptions.model_validate(options)


def test_a_hub_id_is_read_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache on disk, as it lies there after a download; another commit is not taken instead."""
    commit, other = "a" * 40, "b" * 40
    snapshot = tmp_path / "models--someone--OmniAID" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, snapshot / "checkpoint.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    options = {"hub": "someone/OmniAID", "file": "checkpoint.safetensors"}
    assert list(read_state(WeightsOptions(revision=commit, **options).locate())) == ["a"]
    with pytest.raises(OSError, match="."):
        WeightsOptions(revision=other, **options).locate()


def test_what_does_not_fit_is_counted() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    with pytest.raises(ValueError, match=r"head.pth does not fit: missing: 0.weight, 0.bias, 1.weight and 5 more"):
        fill(module, {}, "head.pth")
    good = {k: torch.full_like(v, 3) for k, v in module.state_dict().items()}
    fill(module, {**good, "0.extra": torch.ones(1)}, "head.pth", (".extra",))
    assert (module[3].bias == 3).all()


def test_batches_keep_the_order_of_mixed_sizes() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*side, 3), dtype=np.uint8) for side in ((20, 30), (16, 16), (20, 30), (40, 17))]
    calls: list[int] = []

    def resize(several: Sequence[Any]) -> torch.Tensor:
        calls.append(len(several))
        return torch.nn.functional.adaptive_avg_pool2d(upload(several, torch.device("cpu")).float(), 1).expand(-1, -1, 8, 8)

    out = batched(images, torch.device("cpu"), 8, resize)
    assert sorted(calls) == [1, 1, 2]
    np.testing.assert_allclose(out[:, :, 0, 0], [i.reshape(-1, 3).mean(0) for i in images], rtol=1e-5)


@pytest.mark.parametrize("name", ["detector", "safety", "omniaid", "dino_head"])
def test_the_two_halves_of_a_batch_are_its_score(name: str) -> None:
    """What is prepared in one thread and run in another gives what `score` gives."""
    options = {"detector": {"folder": ROOT / "world" / "detector"}, "safety": {}}
    reward = resolve(name).load(name, options[name] if name in options else tiny.contract_options(name), "cpu")
    rng = np.random.default_rng(0)
    batch = [Item(rng.integers(0, 256, (*side, 3), dtype=np.uint8)) for side in ((28, 28), (40, 17), (28, 28))]
    with ThreadPoolExecutor(1) as helper:
        prepared = helper.submit(reward.prepare, batch).result()
    assert reward.forward(prepared) == reward.score(batch)


class Swapped(torch.nn.Module):
    """Lists its children in another order than it calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1)
        self.norm.running_mean = torch.tensor([1.0, -2.0, 3.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.last(torch.relu(self.first(x))))
        return out


def test_folding_keeps_the_output_or_does_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean, norm.running_var = torch.randn_like(norm.running_mean), torch.rand_like(norm.running_var) + 0.5
    x = torch.randn(2, 3, 64, 64)
    lean = folded(model, x)
    assert len(norms) == 49 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in lean.modules())
    with torch.inference_mode():
        torch.testing.assert_close(lean(x + 1), model(x + 1), rtol=1e-4, atol=1e-4 * float(model(x + 1).abs().max()))
    swapped = Swapped().eval()
    assert folded(swapped, x) is swapped


def test_a_model_in_one_call_is_the_model_or_stays_itself() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    run, pixels = in_one_call(model, torch.randn(2, 3, 8, 8)), torch.randn(5, 3, 8, 8)
    assert run is not model and torch.equal(run(pixels), model(pixels))

    class Fixed(torch.nn.Module):
        """Decides in Python: a trace would keep what the trial decided."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum((1, 2, 3)) * (2 if len(x) > 1 else 3)

    fixed = Fixed().eval()
    assert in_one_call(fixed, torch.ones(2, 3, 8, 8)) is fixed
