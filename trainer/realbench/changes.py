"""In what two runs differ: the keys of their configurations."""

from pathlib import Path
from typing import Any

from trainer.realbench.draw import run_config

_LONGEST = 200  # characters of a value


def changes(names: tuple[str, str], runs: tuple[Path, Path]) -> list[dict[str, Any]]:
    """A row for each key that differs, in the order of the first run's. Not URLs: where a service ran changes no number, and one may hold a
    password.
    """
    one, other = (_flat(run_config(run).model_dump(mode="json")) for run in runs)
    rows = []
    for key in [*one, *(key for key in other if key not in one)]:
        if key.rsplit(".")[-1] == "url":
            continue
        a, b = (str(side.get(key, "-"))[:_LONGEST] for side in (one, other))
        if a != b:
            rows.append({"names": list(names), "key": key, "a": a, "b": b})
    return rows


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): value}
    return {key: one for name, inside in value.items() for key, one in _flat(inside, f"{prefix}{name}.").items()}
