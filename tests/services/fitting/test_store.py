"""Versions on disk: whole or not there, the same after a restart, and nothing believed that has changed."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.fitting.replay import PastPair, Replay
from services.fitting.store import Damaged, State, Store, digest_of, key_of
from tests.services.fitting.linear import pictures

DIGEST = digest_of("a reward")
LIKE = {"head.weight": torch.zeros(3, 2), "bias": torch.zeros(())}


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Store]:
    store = Store(folder, DIGEST, LIKE, optim="adamw", **options)
    try:
        yield store
    finally:
        store.close()


def state(version: int, seed: int = 0, pairs: tuple[PastPair, ...] = (), **fields: Any) -> State:
    chance = torch.Generator().manual_seed(100 * seed + version)
    weights, raw = ({name: torch.randn(value.shape, generator=chance) for name, value in LIKE.items()} for _ in range(2))
    optim = {"head.weight/exp_avg": torch.randn(3, 2, generator=chance), "bias/step": torch.tensor(7.0)}
    return State(version, weights, raw, Replay(50, pairs), optim, steps=3 * version, **fields)


def same(one: State, other: State) -> bool:
    def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    return (
        all(equal(getattr(one, part), getattr(other, part)) for part in ("weights", "raw", "optim"))
        and one.replay.pairs == other.replay.pairs
        and (one.version, one.steps, one.accuracy) == (other.version, other.steps, other.accuracy)
    )


images = st.tuples(st.integers(16, 24), st.integers(16, 24), st.integers(0, 3)).map(
    lambda shape: np.random.default_rng(shape[2]).integers(0, 256, (shape[0], shape[1], 3), dtype=np.uint8)
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(images, images, st.none() | st.text(max_size=9)), max_size=6),
    st.none() | st.floats(0, 1),
    st.integers(1, 9),
)
def test_what_is_written_is_read(pairs: list[Any], accuracy: float | None, version: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        held = {key_of(image): image for pair in pairs for image in pair[:2]}
        past = tuple(PastPair(key_of(real), prompt, key_of(made), prompt) for real, made, prompt in pairs)
        was = state(version, pairs=past, accuracy=accuracy)
        with opened(Path(folder)) as store:
            store.write(was, "ab", published=True, pictures=held)
        with opened(Path(folder)) as store:
            assert store.published() == [version] and store.candidate() is None and not store.said
            assert same(store.read(version, 50), was)
            for key, pixels in held.items():
                assert np.array_equal(store.picture(key), pixels)


def test_a_candidate_is_published_and_forgotten(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write(state(1), None, published=True, pictures={})
        store.write(state(2), None, published=False, pictures={})
        assert (store.published(), store.candidate()) == ([1], 2)
        store.write(state(2, seed=5), None, published=False, pictures={})  # fitted once more
    with opened(tmp_path) as store:
        assert (store.published(), store.candidate()) == ([1], 2)
        assert same(store.read(2, 50), state(2, seed=5))
        store.publish(2)
    with opened(tmp_path) as store:
        assert (store.published(), store.candidate()) == ([1, 2], None)
        store.forget_after(1)
        assert store.published() == [1]
    with opened(tmp_path) as store:
        assert store.published() == [1]


def test_only_what_nothing_names_leaves(tmp_path: Path) -> None:
    some = {key_of(one): one for one in pictures(6, 120, 0)}
    keys = list(some)
    with opened(tmp_path, keep=2, snapshots=2) as store:
        for version in range(1, 7):
            pair = PastPair(keys[version - 1], None, keys[0], None)
            store.write(state(version, pairs=(pair,)), None, published=True, pictures=some)
            if version in (1, 2, 3):
                store.snapshot(version)
            store.tidy()
        assert store.published() == [2, 3, 5, 6], "the two newest, and the two newest snapshots"
        left = {file.stem for file in (tmp_path / "pictures").rglob("*.qoi")}
        assert left == {keys[n] for n in (0, 1, 2, 4, 5)}
    with opened(tmp_path, keep=2, snapshots=2) as store:
        assert [store.metas[version].snapshot for version in store.published()] == [True, True, False, False]


def test_one_process_has_a_folder(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ValueError, match="in use by another service"):
        Store(tmp_path, DIGEST, LIKE)
    with opened(tmp_path):
        pass


def test_another_rewards_folder_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write(state(1), None, published=True, pictures={})
    with pytest.raises(ValueError, match="another reward, other weights"):
        Store(tmp_path, digest_of("something else"), LIKE)
    with opened(tmp_path):  # and the lock is free again
        pass


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors"])
def test_weights_that_changed_are_set_aside(tmp_path: Path, name: str) -> None:
    with opened(tmp_path) as store:
        store.write(state(1), None, published=True, pictures={})
        store.write(state(2), None, published=True, pictures={})
    flip(tmp_path / "versions" / "00000002" / name, -3)
    with opened(tmp_path) as store:
        with pytest.raises(Damaged, match="version 2 cannot be read .*set aside"):
            store.read(2, 50)
        assert store.published() == [1] and len(store.said) == 1
        assert (tmp_path / "damaged").is_dir() and len(list((tmp_path / "damaged").iterdir())) == 1
        assert same(store.read(1, 50), state(1))


def test_weights_of_another_shape_or_not_finite_are_not_read(tmp_path: Path) -> None:
    other = State(1, {"bias": torch.zeros(2)}, {"bias": torch.zeros(2)}, Replay(5))
    bad = state(2)
    bad.weights["bias"].fill_(float("nan"))
    with opened(tmp_path) as store:
        for one in (other, bad):
            store.write(one, None, published=True, pictures={})
            with pytest.raises(Damaged, match="does not hold this reward's weights"):
                store.read(one.version, 50)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[" * 100_000, b'{"version": 2}', None, "replay", "traversal", "number"],
)
def test_a_hostile_meta_is_set_aside(tmp_path: Path, content: bytes | str | None) -> None:
    with opened(tmp_path) as store:
        store.write(state(1), None, published=True, pictures={})
        store.write(state(2), None, published=True, pictures={})
    file = tmp_path / "versions" / "00000002" / "meta.json"
    said = json.loads(file.read_text())
    if content is None:
        file.unlink()
    elif content == "replay":
        file.write_text(json.dumps({**said, "replay": [["a", None, "b", None]]}))
    elif content == "traversal":
        file.write_text(json.dumps({**said, "replay": [["../../../../etc/passwd", None, "x" * 64, None]]}))
    elif content == "number":
        file.write_text(json.dumps({**said, "version": 3}))
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)
    shutil.copytree(tmp_path / "versions" / "00000001", tmp_path / "versions" / "one")
    (tmp_path / "versions" / "a file").write_text("x")
    with opened(tmp_path) as store:
        assert store.published() == [1] and len(store.said) == 3
        assert same(store.read(1, 50), state(1))


def test_a_picture_that_changed_is_set_aside(tmp_path: Path) -> None:
    one, other = pictures(2, 100, 0)
    keys = [key_of(one), key_of(other)]
    with opened(tmp_path) as store:
        past = (PastPair(keys[0], None, keys[1], None),)
        store.write(state(1, pairs=past), None, published=True, pictures=dict(zip(keys, (one, other), strict=True)))
    flip(tmp_path / "pictures" / keys[0][:2] / f"{keys[0]}.qoi", 200)
    with opened(tmp_path) as store:
        with pytest.raises(Damaged, match="left out"):
            store.picture(keys[0])
        with pytest.raises(Damaged):
            store.picture(keys[0])
        assert np.array_equal(store.picture(keys[1]), other)


def test_a_kill_while_writing_leaves_what_was(tmp_path: Path) -> None:
    """What a process leaves behind that ends between any two of its writes."""
    with opened(tmp_path) as store:
        store.write(state(1), None, published=True, pictures={})
        store.write(state(2), None, published=True, pictures={})
    versions = tmp_path / "versions"
    shutil.copytree(versions / "00000002", versions / ".00000003.new")
    (versions / ".00000003.new" / "meta.json").unlink()
    shutil.copytree(versions / "00000001", versions / ".00000001.old")
    (versions / "00000002" / "meta.json.new").write_text("{")
    (tmp_path / "pictures" / "ab").mkdir()
    (tmp_path / "pictures" / "ab" / "abc.new").write_text("half")
    with opened(tmp_path) as store:
        assert store.published() == [1, 2] and not store.said
        store.publish(2)
        store.tidy()
    assert sorted(one.name for one in versions.iterdir()) == ["00000001", "00000002"]
    assert not list((tmp_path / "pictures").rglob("*.new"))


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_full_disk_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """However many files there is room for, of two new pictures and a version's."""
    held = {key_of(one): one for one in pictures(3, 120, 0)}
    first, *others = held
    with opened(tmp_path) as store:
        store.write(state(1, pairs=(PastPair(first, None, first, None),)), None, published=True, pictures=held)
        before = sorted(file for file in tmp_path.rglob("*") if file.is_file())
        left = [None] * room

        def full(*arguments: Any) -> None:
            if not left:
                raise OSError(28, "No space left on device")
            left.pop()

        monkeypatch.setattr("services.fitting.store.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.write(state(2, pairs=(PastPair(others[0], None, others[1], None),)), None, published=True, pictures=held)
        assert store.published() == [1] and np.array_equal(store.picture(first), held[first])
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == before
