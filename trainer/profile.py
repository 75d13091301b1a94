"""Where the seconds of a step went: encoding and decoding are timed at the policy, the loop knows the rest."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

PARTS = {
    "rewrite": "rewriting",
    "sample": "sampling",
    "decode": "decoding",
    "encode": "text encoding",
    "wait": "waiting for rewards",
    "train": "training",
}


class Profile:
    """Times `encode` and `decode` of a policy from now on."""

    def __init__(self, policy: Any) -> None:
        self._device, self._spent = policy.device, {"decode": 0.0, "encode": 0.0}
        for name in self._spent:
            setattr(policy, name, self._timed(name, getattr(policy, name)))

    def start(self) -> None:
        """A new step begins."""
        self._spent = dict.fromkeys(self._spent, 0.0)

    def split(self, sampled: float) -> dict[str, float]:
        """`seconds/sample` without decoding and encoding, which stand beside it, out of seconds of all three."""
        parts = {f"seconds/{name}": spent for name, spent in self._spent.items()}
        return {"seconds/sample": max(0.0, sampled - sum(parts.values())), **parts}

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            self._settle()
            start = time.monotonic()
            try:
                return function(*arguments, **more)
            finally:
                self._settle()
                self._spent[name] += time.monotonic() - start

        return timed

    def _settle(self) -> None:
        """An accelerator works on while Python is further on."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def words(line: Mapping[str, Any]) -> str:
    """The shares of a step's seconds, from its line of metrics."""
    seconds = {label: line[f"seconds/{name}"] for name, label in PARTS.items() if line.get(f"seconds/{name}") is not None}
    whole = sum(seconds.values())
    shares = ", ".join(f"{label} {100 * part / max(whole, 1e-9):.0f} %" for label, part in seconds.items())
    return f"step {line['step']} took {whole:.1f} s: {shares}"
