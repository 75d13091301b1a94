"""What vLLM's workers say of the weights they hold, and how whole models are loaded anew.

Runs in vLLM's interpreter and imports nothing of Verism: `--worker-extension-cls verism_weights.Weights`, `--middleware verism_weights.Guard`.
"""

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

TAG = "nothing"  # of the whole model that was loaded last


class Guard:
    """ASGI: all but /health wants the server's key. vLLM itself guards only /v1, and /collective_rpc could do anything to its weights."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        if not os.environ.get("VLLM_API_KEY"):
            raise RuntimeError("VLLM_API_KEY is not set: whoever has it can change the weights, so there has to be one")
        self.app, self._wanted = app, f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            told = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(told, self._wanted):
                await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
                await send({"type": "http.response.body", "body": b'{"error": {"message": "the key is missing or wrong"}}'})
                return
        await self.app(scope, receive, send)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tensor: Any) -> str:
    """SHA-256 of the values as float32, whatever the shape."""
    import torch

    return hashlib.sha256(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()


class Weights:
    """Methods of vLLM's workers; what they return is asked for by /collective_rpc."""

    model_runner: Any
    reload_weights: Callable[..., None]  # vLLM's own

    def verism_adapter(self, folder: str) -> dict[str, Any]:
        """Of the adapter that was loaded last: SHA-256 of its file as this machine sees it, tensors that reached a module of the model, and
        the sums of squares of what the kernels read: A, and B with its scale."""
        manager = self.model_runner.lora_manager._adapter_manager
        newest = max(manager.list_adapters(), default=0)
        if newest not in manager.lora_index_to_id:
            return {"sha256": "", "tensors": 0, "squares": [0.0, 0.0]}
        slot, loaded, count, squares = manager.lora_index_to_id.index(newest), manager.get_adapter(newest), 0, [0.0, 0.0]
        for name, module in manager.modules.items():
            layer = manager._get_lora_layer_weights(loaded, name)
            if not layer:
                continue
            for n, (own, read) in enumerate(((layer.lora_a, module.lora_a_stacked), (layer.lora_b, module.lora_b_stacked))):
                count += sum(one is not None for one in (own if isinstance(own, list | tuple) else [own]))
                squares[n] += sum(float(one[slot].double().square().sum()) for one in read)
        return {"sha256": file_digest(Path(folder) / "adapter_model.safetensors"), "tensors": count, "squares": squares}

    def verism_load(self, folder: str, tag: str, names: Sequence[str]) -> dict[str, Any]:
        """The whole model from a folder's safetensors. Of the parameters `names`: digests of what came in, and of what the model then holds
        where that can be read (on a CPU linear layers keep their weights packed); the model's precision."""
        global TAG
        TAG, passed, rows = "nothing", dict[str, str](), dict[str, int]()

        def coming() -> Iterator[tuple[str, Any]]:
            from safetensors import safe_open

            for file in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        tensor = tensors.get_tensor(name)
                        if name in names:
                            passed[name], rows[name] = digest(tensor), len(tensor)
                        yield name, tensor

        self.reload_weights(weights_iterator=coming())
        TAG = tag
        model = self.model_runner.get_model()
        found = {name: held(model, name) for name in names}
        known = {name: one for name, one in found.items() if one is not None and name in rows}
        kept = {name: digest(one[: rows[name]]) for name, one in known.items()}  # vocabularies are padded
        return {"passed": passed, "held": kept, "dtype": str(self.model_runner.dtype).removeprefix("torch.")}

    def verism_tag(self) -> list[str]:
        """Of the whole model that was loaded last; nothing since the server started: ["nothing"]."""
        return [TAG]


def held(model: Any, name: str) -> Any:
    """A parameter by its checkpoint's name, or the rows of the fused one that has it; None where it cannot be read."""
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    if name in parameters:
        return parameters[name] if parameters[name].numel() else None
    head, _, rest = name.rpartition(".")
    layer, _, own = head.rpartition(".")
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        place = f"{layer}.{fused}"
        if own in parts and parameters.get(f"{place}.{rest}") is not None and parameters[f"{place}.{rest}"].numel():
            sizes = model.get_submodule(place).output_partition_sizes
            return parameters[f"{place}.{rest}"].split(list(sizes), 0)[list(parts).index(own)]
    return None
