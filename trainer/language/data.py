"""What a rewriter is shown before it tries for itself: JSONL, on each line what a user typed and a rewrite of it.

{"prompt": "a coat for winter please", "rewrite": "a natural photo of a winter coat, sharp texture"}
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import ConfigError

LONGEST = 8_000  # characters of either text
_LINE = 100_000  # bytes
_MOST = 1_000_000  # lines
_SHAPE = '{"prompt": "what the user typed", "rewrite": "what to paint from"}'


@dataclass(frozen=True)
class Pair:
    """One line; `line` counts from 1."""

    prompt: str
    rewrite: str
    line: int


def read_pairs(path: Path, *, apart_from: Sequence[Pair] = ()) -> list[Pair]:
    """The pairs of a file, stripped; keys other than `prompt` and `rewrite` are left alone, empty lines and repeated pairs out.

    ConfigError names file, line and what to write instead; for a prompt that is among `apart_from` too, since a held-out pair must be one.
    """
    if not path.is_file():
        raise ConfigError(f"no file {path} ({Path.cwd()}); each line of it is {_SHAPE}")
    pairs, known = dict[tuple[str, str], Pair](), {pair.prompt: pair.line for pair in apart_from}
    with path.open("rb") as file:
        for number in range(1, _MOST + 2):
            raw = file.readline(_LINE + 1)
            if not raw:
                break
            where = f"{path}, line {number}"
            if number > _MOST:
                raise ConfigError(f"{path} has more than {_MOST:,} lines: a cold start needs hundreds; take a part of it")
            if len(raw) > _LINE:
                raise ConfigError(f"{where} is longer than {_LINE:,} bytes: put each pair on a line of its own")
            if not raw.strip():
                continue
            pair = _pair(raw, number, where)
            if pair.prompt in known:
                raise ConfigError(
                    f"{where}: its prompt is line {known[pair.prompt]} of the training pairs too, so it is not held out; remove one of them"
                )
            pairs.setdefault((pair.prompt, pair.rewrite), pair)
    if not pairs:
        raise ConfigError(f"{path} holds no pairs; each line of it is {_SHAPE}")
    return list(pairs.values())


def _pair(raw: bytes, number: int, where: str) -> Pair:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        value = json.loads(text, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not a JSON object ({error}); write {_SHAPE}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is not a JSON object; write {_SHAPE}")
    return Pair(_text(value, "prompt", where), _text(value, "rewrite", where), number)


def _once(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out = dict[str, Any]()
    for key, value in items:
        if key in out:
            raise ValueError(f"{key[:40]!r} is there twice")
        out[key] = value
    return out


def _text(value: dict[str, Any], key: str, where: str) -> str:
    if key not in value:
        raise ConfigError(
            f"{where} has no {key!r} (keys: {', '.join(repr(k[:40]) for k in [*value][:8]) or 'none'}); write {_SHAPE}"
        )
    text = value[key]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            f"{where}: {key} is {'empty' if isinstance(text, str) else f'no text but {type(text).__name__}'}; write {_SHAPE}"
        )
    if len(text) > LONGEST:
        raise ConfigError(f"{where}: {key} has {len(text):,} characters, more than {LONGEST:,}: shorten it")
    for place, letter in enumerate(text):
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t":
            raise ConfigError(
                f"{where}: {key} has the character U+{ord(letter):04X} at {place + 1}, which no text holds: remove it"
            )
    return text.strip()
