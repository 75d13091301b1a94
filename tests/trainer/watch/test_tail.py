"""A file that grows is read once, line by line, whatever is done to it."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.watch import tail
from trainer.watch.files import names, opened, plain, small, stamp
from trainer.watch.tail import Tail


def everything(reader: Tail) -> list[bytes]:
    out: list[bytes] = []
    while True:
        before, lines = reader.offset, reader.next()
        assert lines is not None
        out += lines
        if reader.offset == before:
            return out


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b".")), max_size=30), st.lists(st.integers(1, 50), min_size=1)
)
def test_each_line_once_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("tail")
    reader, data, got = Tail(folder, "f"), b"".join(line + b"\n" for line in lines), []
    with (folder / "f").open("wb") as file:
        n = 0
        while data:
            size = cuts[n % len(cuts)]
            file.write(data[:size])
            file.flush()
            data, n = data[size:], n + 1
            got += everything(reader)
    assert got == lines


def test_a_half_written_line_waits(tmp_path: Path) -> None:
    path, reader = tmp_path / "f", Tail(tmp_path, "f")
    path.write_bytes(b"one\ntw")
    assert everything(reader) == [b"one"] and reader.behind == 2
    with path.open("ab") as file:
        file.write(b"o\n")
    assert everything(reader) == [b"two"] and reader.behind == 0


@pytest.mark.parametrize("how", ["replaced", "shortened", "rewritten", "removed"])
def test_another_file_of_the_same_name_is_said(tmp_path: Path, how: str) -> None:
    path, reader = tmp_path / "f", Tail(tmp_path, "f")
    path.write_bytes(b"1\n2\n3\n")
    assert everything(reader) == [b"1", b"2", b"3"]
    if how == "replaced":  # as a resumed run does
        (tmp_path / "g").write_bytes(b"1\n2\n4\n5\n")
        (tmp_path / "g").replace(path)
    elif how == "shortened":
        os.truncate(path, 2)
    elif how == "rewritten":  # longer, in place
        path.write_bytes(b"9\n8\n7\n6\n")
    else:
        path.unlink()
    assert reader.next() is None
    want = {"replaced": [b"1", b"2", b"4", b"5"], "shortened": [b"1"], "rewritten": [b"9", b"8", b"7", b"6"], "removed": []}[how]
    assert everything(reader) == want
    assert reader.there == (how != "removed")


def test_a_line_longer_than_a_chunk_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK", 16)
    reader = Tail(tmp_path, "f")
    (tmp_path / "f").write_bytes(b"short\n" + b"x" * 100 + b"\nafter\n")
    assert everything(reader) == [b"short", b"after"] and reader.left_out == 1


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    inside, secret = tmp_path / "run", tmp_path / "secret"
    (inside / "grids").mkdir(parents=True)
    secret.write_text("secret\n")
    (inside / "metrics.jsonl").symlink_to(secret)
    os.mkfifo(inside / "done.json")  # opening it would wait for ever
    (inside / "away").symlink_to(tmp_path)
    for parts in (("metrics.jsonl",), ("done.json",), ("grids",), ("away", "secret"), ("none",), ("a\0b",)):
        assert small(inside, *parts, limit=10) is None, parts
    assert stamp(inside, "metrics.jsonl") is None and stamp(inside, "done.json") is None
    assert everything(Tail(inside, "metrics.jsonl")) == []
    assert names(inside / "away") == [] and sorted(names(inside)) == ["away", "done.json", "grids", "metrics.jsonl"]
    with opened(tmp_path, "secret") as (handle, (_, _, size, _)):
        assert os.pread(handle, 100, 0) == b"secret\n" and size == 7


def test_a_run_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_text("1\n")
    (tmp_path / "latest").symlink_to(tmp_path / "real")
    assert everything(Tail(tmp_path / "latest", "f")) == [b"1"]


def test_text_that_can_be_shown() -> None:
    assert plain("a\u202eb\x00c\nd") == "a b c d" and plain("é 写 ✓") == "é 写 ✓"
    assert plain("x" * 300) == "x" * 200 + "…" and plain(None) == "" and plain(["x"]) == "?" and plain(3) == "3"
