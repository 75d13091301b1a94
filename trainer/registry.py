"""What a recipe can name: one line each, loaded when asked for."""

import difflib
import importlib
from typing import Any

REGISTRY: dict[str, dict[str, str]] = {
    "policy": {
        "flux": "trainer.policies.flux:FluxPolicy",
        "qwen_image": "trainer.policies.qwen_image:QwenImagePolicy",
        "sd3": "trainer.policies.sd3:SD3Policy",
        "z_image": "trainer.policies.z_image:ZImagePolicy",
    },
    "loss": {"grpo": "trainer.losses.grpo:grpo", "guard": "trainer.losses.guard:guard"},
    # On clean pictures noised again instead of on a trajectory.
    "forward_loss": {
        "awm": "trainer.losses.awm:awm",
        "crd": "trainer.losses.crd:crd",
        "dgpo": "trainer.losses.dgpo:dgpo",
        "dpo": "trainer.losses.dpo:dpo",
        "nft": "trainer.losses.nft:nft",
        "rft": "trainer.losses.rft:rft",
    },
    "regularizer": {"v_kl": "trainer.regularizers.kl:v_kl", "x_kl": "trainer.regularizers.kl:x_kl"},
    "window": {
        "fixed": "trainer.sampling.windows:fixed",
        "random": "trainer.sampling.windows:random",
        "sliding": "trainer.sampling.windows:sliding",
    },
    "solver": {"dpm2m": "trainer.sampling.solvers:DPM2M", "euler": "trainer.sampling.solvers:Euler"},
    "advantages": {
        "base_bonus": "trainer.advantages.base_bonus:base_bonus",
        "best": "trainer.advantages.best_worst:best",
        "best_worst": "trainer.advantages.best_worst:best_worst",
        "gdpo": "trainer.advantages.gdpo:gdpo",
        "group_relative": "trainer.advantages.group_relative:group_relative",
        "log_tame": "trainer.advantages.log_tame:log_tame",
        "product": "trainer.advantages.product:product",
        "rwr": "trainer.advantages.rwr:rwr",
    },
}


def resolve(kind: str, name: str) -> Any:
    """The class or function behind a name; ValueError lists the known names and the nearest."""
    known = REGISTRY[kind]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {kind} {name!r}; {hint}known: {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
