"""Pairs come from anywhere: what is wrong with a line is said with its number and what to write instead."""

import json
from pathlib import Path

import pytest

from trainer.config import ConfigError
from trainer.language import data
from trainer.language.data import Pair, read_pairs

GOOD = b'{"prompt": "a coat", "rewrite": "a natural photo of a coat"}\n'


def written(folder: Path, *lines: bytes) -> Path:
    path = folder / "pairs.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def test_pairs_are_read_in_order_once_each_with_their_lines(tmp_path: Path) -> None:
    other = json.dumps(
        {"prompt": " пальто\u2028на зиму ", "rewrite": "a coat", "id": 7, "source": {"deep": [1]}}, ensure_ascii=False
    )
    path = written(
        tmp_path, b"\xef\xbb\xbf", GOOD, b"\n  \n", other.encode() + b"\r\n", GOOD, b'{"prompt":"a coat","rewrite":"a bag"}'
    )
    assert read_pairs(path) == [
        Pair("a coat", "a natural photo of a coat", 1),
        Pair("пальто\u2028на зиму", "a coat", 4),
        Pair("a coat", "a bag", 6),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"a coat\ta natural photo of a coat", "line 2 is not a JSON object"),
        (b'["a coat", "a photo"]', "line 2 is not a JSON object"),
        (b"[" * 90_000, "line 2 is not a JSON object"),
        (b'{"prompt": "a", "prompt": "b", "rewrite": "c"}', "'prompt' is there twice"),
        (b'{"prompt": "a coat", "rewritten": "x"}', r"line 2 has no 'rewrite' \(keys: 'prompt', 'rewritten'\)"),
        (b'{"' + b"a\\u001b" * 9_000 + b'": 1}', r"line 2 has no 'prompt'"),
        (b"{}", r"line 2 has no 'prompt' \(keys: none\)"),
        (b'{"prompt": "a coat", "rewrite": " \\n "}', "line 2: rewrite is empty"),
        (b'{"prompt": 3, "rewrite": "x"}', "line 2: prompt is no text but int"),
        (b'{"prompt": "a coat", "rewrite": null}', "line 2: rewrite is no text but NoneType"),
        (b'{"prompt": "a \\ud800 coat", "rewrite": "x"}', r"U\+D800 at 3"),
        (b'{"prompt": "a coat", "rewrite": "x\\u0000y"}', r"rewrite has the character U\+0000 at 2"),
        (b'{"prompt": "a coat", "rewrite": "x\\u001b[2J"}', r"U\+001B"),
        (b'{"prompt": "a \xff coat", "rewrite": "x"}', r"line 2 is not UTF-8 \(byte 15\): save the file as UTF-8"),
        (GOOD.decode().encode("utf-16"), "line 2 is not UTF-8"),
        (json.dumps({"prompt": "a" * 8_001, "rewrite": "x"}).encode(), "8,001 characters, more than 8,000"),
        (b'{"prompt": "' + b"a" * 100_000 + b'"}', "longer than 100,000 bytes"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "line 2 is not a JSON object"),
    ],
)
def test_a_bad_line_is_named_with_what_to_write(tmp_path: Path, line: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_pairs(written(tmp_path, GOOD, line))
    assert str(tmp_path / "pairs.jsonl") in str(caught.value) and len(str(caught.value)) < 600 and "\x1b" not in str(caught.value)


def test_files_that_hold_nothing_or_too_much_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no file"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="no file"):
        read_pairs(tmp_path)
    with pytest.raises(ConfigError, match="holds no pairs"):
        read_pairs(written(tmp_path, b"\n\n"))
    monkeypatch.setattr(data, "_MOST", 2)
    assert len(read_pairs(written(tmp_path, GOOD, GOOD))) == 1
    with pytest.raises(ConfigError, match="more than 2 lines"):
        read_pairs(written(tmp_path, GOOD, GOOD, GOOD))


def test_a_held_out_prompt_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    train = [Pair("a coat", "anything", 9)]
    with pytest.raises(ConfigError, match="line 1: its prompt is line 9 of the training pairs too"):
        read_pairs(written(tmp_path, GOOD), apart_from=train)
    assert read_pairs(written(tmp_path, GOOD), apart_from=[Pair("a bag", "anything", 9)])
