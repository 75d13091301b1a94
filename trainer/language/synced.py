"""Weights in a folder on their way to a vLLM server, and whether that holds them; inside_vllm/verism_weights.py is the other side."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.language.inside_vllm.verism_weights import digest, file_digest
from trainer.language.remote import HELP, Away, Remote, VllmError

CHOSEN = 8  # parameters of a whole model that are compared
CLOSE = 1e-2  # of sums of squares: half precision rounds each number by 0.4 % at most


class SyncFailed(VllmError):
    """The server does not hold the policy's weights, or does not sample from them; the message says what differs, and what to do."""


class Adapter:
    """A PEFT folder: SHA-256 of its weights, how many tensors they are, sums of squares of all A, and of all B with their scale."""

    def __init__(self, folder: Path) -> None:
        self.folder, told = folder, json.loads((folder / "adapter_config.json").read_text())
        scale = told["lora_alpha"] / (math.sqrt(told["r"]) if told.get("use_rslora") else told["r"])
        file = folder / "adapter_model.safetensors"
        self.sha256, self.squares = file_digest(file), [0.0, 0.0]
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            for name in names:
                b = ".lora_B." in name
                self.squares[b] += float((tensors.get_tensor(name).double() * (scale if b else 1.0)).square().sum())
        self.count = len(names)

    def load(self, remote: Remote, name: str, checksum: bool) -> int:
        """Tensors that were compared."""
        if name not in remote.models():
            remote.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self.folder)})
            if name not in remote.models():
                raise SyncFailed(f"the server took the adapter and does not list it; {HELP}")
        if not checksum:
            return 0
        workers = remote.workers("verism_adapter", str(self.folder))
        for told in workers:
            if told["sha256"] != self.sha256:
                raise SyncFailed(
                    f"the server reads another file in {self.folder} than was written: is `exchange` one that both see?"
                )
            if told["tensors"] != self.count:
                raise SyncFailed(
                    f"{told['tensors']} of the adapter's {self.count} tensors reached a module of the server's model: train layers that "
                    "vLLM adapts (lora.targets), and serve the same model"
                )
        if len(workers) == 1:  # of several each has its part of a tensor
            for what, here, there in zip("AB", self.squares, workers[0]["squares"], strict=True):
                if not math.isclose(here, there, rel_tol=CLOSE, abs_tol=1e-12):
                    raise SyncFailed(
                        f"the squares of all {what} in the server sum to {there:.6g}, and here, with their scale, to {here:.6g}: "
                        "does vLLM read this adapter_config.json as PEFT does?"
                    )
        return self.count

    def unload(self, remote: Remote, name: str) -> None:
        remote.post("/v1/unload_lora_adapter", {"lora_name": name})


class Whole:
    """A folder as transformers saves a model; some of `parameters`, drawn by `seed`, are compared with what the server has."""

    def __init__(self, folder: Path, parameters: Mapping[str, Tensor], seed: int) -> None:
        self.folder, names = folder, sorted(parameters)
        chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:CHOSEN].tolist()
        self.some = {names[n]: parameters[names[n]].detach().cpu().clone() for n in chosen}

    def load(self, remote: Remote, name: str, checksum: bool) -> int:
        """Tensors that were compared."""
        for told in remote.workers("verism_load", str(self.folder), name, sorted(self.some)):
            dtype = getattr(torch, told["dtype"])
            for one, parameter in self.some.items():
                if told["passed"].get(one) != digest(parameter):
                    raise SyncFailed(f"{one} came to the server with other values than the policy has: does {self.folder} hold it?")
                if one in told["held"] and told["held"][one] != digest(parameter.to(dtype)):
                    raise SyncFailed(f"the server's model does not hold the {one} that it was given: is it the same model?")
        return len(self.some)

    def unload(self, remote: Remote, name: str) -> None:
        """The next takes its place."""

    @staticmethod
    def still(remote: Remote, name: str) -> None:
        """Away, where the server was started again since this model was loaded."""
        if any(told != [name] for told in remote.workers("verism_tag")):
            raise Away("the server was started again meanwhile, with other weights")
