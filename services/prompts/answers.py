"""Strict reading of what a judge wrote. Each function gives what stands in the text, or None: it never raises and never guesses."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 100_000
_NUMBER = r"[-+]?[0-9]{1,12}(?:\.[0-9]{1,20})?"  # UnifiedReward 2.0 writes 15 decimals
_END = r"(?![0-9]|\.[0-9]|\s*(?:%|/|[-–]\s*[0-9]))"
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.S | re.I)
_REFUSALS = re.compile(
    r"\b(?:i(?:'|’)?\s?a?m (?:very |really )?(?:sorry|unable|not able)|i (?:can(?:no|'|’)t|won(?:'|’)t|am not able)|sorry\b|as an ai\b"
    r"|i must decline|unable to (?:assist|comply|help))",
    re.I,
)


def is_refusal(text: str) -> bool:
    """Whether an answer opens by declining, in English."""
    return _REFUSALS.search(text[:80]) is not None


def number(text: str, low: float, high: float, label: str | None = None) -> float | None:
    """The number after `label` and a colon, or, without a label, the whole text. None when it is missing, cut off, outside
    [low, high], a percentage, a fraction of anything but `high`, or given twice with different values."""
    if len(text) > _LONGEST:
        return None
    if label is None:
        found = [text.strip()] if re.fullmatch(_NUMBER, text.strip()) else []
    else:
        pattern = rf"(?<!\w){re.escape(label)}\W{{0,4}}?\s*[:=][ \t]*\**[ \t]*({_NUMBER})(?:\s*/\s*{high:g}(?![0-9]|\.[0-9]))?{_END}(?!\w)"
        found = re.findall(pattern, text, re.I)
    values = {float(one) for one in found}
    value = values.pop() if len(values) == 1 else None
    return value if value is not None and low <= value <= high else None


def json_value(text: str) -> Any:
    """The one JSON object or list of an answer: the whole text, or its only fenced block, or what its first to its last bracket hold."""
    if len(text) > _LONGEST:
        return None
    blocks = _FENCE.findall(text)
    if len(blocks) > 1:
        return None
    body = (blocks[0] if blocks else text).strip()
    for opening, closing in ("{}", "[]") if body.find("{") <= body.find("[") and "{" in body or "[" not in body else ("[]", "{}"):
        start, end = body.find(opening), body.rfind(closing)
        if 0 <= start < end:
            try:
                return json.loads(body[start : end + 1], parse_constant=_no_constant, object_pairs_hook=_once)
            except (ValueError, RecursionError):
                return None
    return None


def json_scores(text: str, count: int, low: float, high: float, key: str | None = None) -> tuple[float, ...] | None:
    """`count` numbers in [low, high] from a JSON list, or from the list under `key` of a JSON object."""
    value = json_value(text)
    if key is not None:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list) or len(value) != count:
        return None
    numbers = [_number(one, low, high) for one in value]
    return None if None in numbers else tuple(one for one in numbers if one is not None)


def json_fields(text: str, names: Sequence[str], low: float, high: float) -> dict[str, float] | None:
    """The numbers in [low, high] under `names` of a JSON object, all of them."""
    value = json_value(text)
    if not isinstance(value, dict):
        return None
    numbers = {name: _number(value.get(name), low, high) for name in names}
    return None if None in numbers.values() else {name: one for name, one in numbers.items() if one is not None}


def tagged(text: str, tag: str) -> str | None:
    """What stands between <tag> and </tag>; None when it is missing, nested, or given twice with different contents."""
    if len(text) > _LONGEST:
        return None
    pieces = re.split(rf"<{re.escape(tag)}>", text, flags=re.I)[1:]
    ended = [re.split(rf"</{re.escape(tag)}>", piece, maxsplit=1, flags=re.I) for piece in pieces]
    found = {piece[0].strip() for piece in ended}
    return found.pop() if len(found) == 1 and all(len(piece) == 2 for piece in ended) else None


def boxed(text: str) -> str | None:
    r"""What stands in \boxed{...}, without braces inside; None when it is missing, or given twice with different contents."""
    found = {one.strip() for one in re.findall(r"\\boxed\{([^{}]*)\}", text[:_LONGEST])}
    return found.pop() if len(found) == 1 and len(text) <= _LONGEST else None


def choice(text: str, patterns: Mapping[str, str]) -> str | None:
    """The one name whose pattern (a regular expression, case ignored) occurs in the text; None when it is none or several."""
    found = [name for name, pattern in patterns.items() if len(text) <= _LONGEST and re.search(pattern, text, re.I)]
    return found[0] if len(found) == 1 else None


def _number(value: Any, low: float, high: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return None
    return float(value) if math.isfinite(value) else None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key is given twice")
    return out
