"""Prompts of a bench: JSONL (`prompt`, and if there is one `long`, `id`), or text with a prompt on each line."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.schema import PROMPT_BYTES
from trainer.config import ConfigError

_LINE, _MOST = 100_000, 100_000  # bytes of a line; prompts
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class BenchPrompt:
    """`text` is what a user would type, `long` the same at length; a picture of it is called `id`.png."""

    id: str
    text: str
    long: str | None = None

    def form(self, form: Literal["short", "long"]) -> str:
        """ConfigError where there is no long one."""
        if form == "short":
            return self.text
        if self.long is None:
            raise ConfigError(f'prompt {self.id!r} has no long form: write "long" beside "prompt" in its line, or take form: short')
        return self.long


def read_prompts(path: Path) -> list[BenchPrompt]:
    """In the file's order. ConfigError names the line and what to write."""
    if not path.is_file():
        raise ConfigError(f'no file {path}; lines are {{"id": "a1", "prompt": "a cat", "long": "..."}}, or plain prompts')
    out, known = list[BenchPrompt](), set[str]()
    with path.open("rb") as file:
        for number in range(1, 10 * _MOST):
            raw = file.readline(_LINE + 1)
            if not raw:
                break
            if len(raw) > _LINE or len(out) >= _MOST:
                raise ConfigError(f"{path}, line {number}: a line has at most {_LINE} bytes, and a file {_MOST} prompts")
            try:
                line = raw.decode().strip()
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}, line {number}: not UTF-8; save it so") from error
            if not line:
                continue
            prompt = _of_json(path, number, line) if path.suffix == ".jsonl" else BenchPrompt(f"{number:04d}", line)
            if prompt.id in known:
                raise ConfigError(f"{path}, line {number}: id {prompt.id!r} is given twice")
            for text in (prompt.text, prompt.long or ""):
                if len(text.encode()) > PROMPT_BYTES:
                    raise ConfigError(f"{path}, line {number}: a prompt has at most {PROMPT_BYTES} bytes; shorten it")
            known.add(prompt.id)
            out.append(prompt)
    if not out:
        raise ConfigError(f"{path} holds no prompts")
    return out


def _of_json(path: Path, number: int, line: str) -> BenchPrompt:
    shape = f'{path}, line {number}: write {{"id": "a1", "prompt": "a cat", "long": "..."}}'
    try:
        told = json.loads(line)
        text, long = told["prompt"] if "prompt" in told else told["short"], told.get("long")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(shape) from error
    name = str(told.get("id", f"{number:04d}"))
    if not isinstance(text, str) or not text.strip() or not isinstance(long, str | None):
        raise ConfigError(shape)
    if _ID.fullmatch(name) is None:
        raise ConfigError(f"{path}, line {number}: an id becomes a file's name: letters, digits and ._- alone")
    return BenchPrompt(name, text.strip(), None if long is None else long.strip() or None)
