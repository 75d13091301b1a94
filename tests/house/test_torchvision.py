"""The mend of a CPU torch beside an index's torchvision: what it decides, and that child processes get it."""

import importlib.machinery
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import verism_torchvision as mend


@pytest.fixture
def fake_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[importlib.machinery.ModuleSpec]:
    (tmp_path / "__init__.py").write_text("")
    spec = importlib.machinery.ModuleSpec("torchvision", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda *_: spec)
    yield spec


@pytest.mark.parametrize("loads", [True, False])
def test_schemas_are_declared_only_where_the_extension_does_not_load(
    loads: bool, fake_torchvision: importlib.machinery.ModuleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared: list[bool] = []
    monkeypatch.setattr(mend, "extension_loads", lambda folder: loads)
    monkeypatch.setattr(mend, "declare", lambda: declared.append(True))
    finder = mend._Finder()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert finder.find_spec("torch", None) is None
    assert finder in sys.meta_path
    assert finder.find_spec("torchvision", None) is fake_torchvision
    assert finder not in sys.meta_path, "it steps aside after one look"
    assert declared == ([] if loads else [True])


def test_a_folder_without_or_with_a_broken_extension_does_not_load(tmp_path: Path) -> None:
    assert not mend.extension_loads(tmp_path)
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert not mend.extension_loads(tmp_path)


def test_installing_twice_watches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, mend._Finder)])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    mend.install()
    mend.install()
    assert sum(isinstance(f, mend._Finder) for f in sys.meta_path) == 1


def child(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_a_child_process_imports_all_three(tmp_path: Path) -> None:
    done = child("import timm, transformers, torchvision; torchvision.ops.nms; print('imported')", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "imported"


def test_a_child_process_starts_without_torch(tmp_path: Path) -> None:
    done = child("import sys; print('verism_torchvision' in sys.modules, 'torch' in sys.modules)", tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, ["True", "False"]), done.stderr
