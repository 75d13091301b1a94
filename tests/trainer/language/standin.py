"""A stand-in for a vLLM server: its routes, answered by a policy on transformers. Its twin on the true one: tests/e2e/test_rewriter_vllm.py.

It can be bad in all the ways that the engine has to notice.
"""

import json
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from tests.answering import Answering
from trainer.language.inside_vllm.verism_weights import file_digest
from trainer.language.policy import RewriterPolicy

PREFIX = "base_model.model."


class StandIn(ThreadingHTTPServer):
    """`faults`: "ignores" adapters, "raw" log-probabilities, "forgets" adapters at the next question, "drops" it, "hangs" in it, has
    "no checksum", "stops early" by an abort; "refuses" it."""

    daemon_threads = True

    def __init__(self, policy: RewriterPolicy, scale: float = 1.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.policy, self.scale, self.faults = policy, scale, set[str]()
        self.adapters: dict[str, Path] = {}
        self.asked, self.away, self.lock, self.release = list[dict[str, Any]](), False, threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def end(self) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        if route == "/health":
            return 200, {}
        if route == "/v1/models":
            own: dict[str, Any] = {"id": "base", "max_model_len": self.policy.network.context, "parent": None}
            return 200, {"data": [own, *({"id": name, "parent": "base"} for name in self.adapters)]}
        if route == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = Path(body["lora_path"])
            return 200, "taken"
        if route == "/v1/unload_lora_adapter":
            return (200, "gone") if self.adapters.pop(body["lora_name"], None) else (404, {"error": {"type": "NotFoundError"}})
        if route == "/collective_rpc" and "no checksum" not in self.faults:
            file = Path(body["args"][0]) / "adapter_model.safetensors"
            here, theirs = self.layers(), load_file(file)
            squares = [sum(float(t.double().square().sum()) for n, t in theirs.items() if f"lora_{what}" in n) for what in "AB"]
            config = json.loads((file.parent / "adapter_config.json").read_text())
            squares[1] *= (config["lora_alpha"] / config["r"]) ** 2
            told = {"sha256": file_digest(file), "tensors": len(here & theirs.keys()), "squares": squares}
            return 200, {"results": [told]}
        if route == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    def layers(self) -> set[str]:
        return {PREFIX + name.replace(".default", "") for name in self.policy.trainable()}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["model"]
        if name != "base" and "forgets" in self.faults:
            self.faults.discard("forgets")
            self.adapters.clear()
        if name != "base" and name not in self.adapters:
            return 404, {"error": {"message": f"The model `{name}` does not exist.", "type": "NotFoundError"}}
        if name != "base" and "refuses" in self.faults:
            return 400, {"error": {"message": "max_tokens must be at least 1"}}
        with self.lock, torch.no_grad():
            self.wear(None if name == "base" or "ignores" in self.faults else self.adapters[name])
            network, ids = self.policy.network, tuple(body["prompt"])
            row: dict[str, Any] = {"finish_reason": "length"}
            if "prompt_logprobs" in body:
                rest = torch.tensor([ids[1:]])
                logp = network.logp([ids[:1]], rest, torch.ones_like(rest, dtype=torch.bool), 1.0)[0][0].tolist()
                row["prompt_logprobs"] = [None, *({str(t): {"logprob": v}} for t, v in zip(ids[1:], logp, strict=True))]
                return 200, {"choices": [row]}
            self.asked.append(body)
            temperature = body["temperature"]
            drawn, logp_BT, mask = network.draw(
                [ids], [body["seed"]], temperature=temperature, most=body["max_tokens"], micro_batch=1
            )
            if "raw" in self.faults:
                logp_BT = network.logp([ids], drawn, mask, 1.0)[0]
            if mask.sum() and int(drawn[mask][-1]) in body["stop_token_ids"]:
                row["finish_reason"] = "stop"
            if "stops early" in self.faults:
                self.faults.discard("stops early")
                row["finish_reason"] = "abort"
            row |= {"token_ids": drawn[mask].tolist(), "logprobs": {"token_logprobs": logp_BT[mask].tolist()}}
            return 200, {"choices": [row]}

    def wear(self, folder: Path | None) -> None:
        for name, parameter in self.policy.trainable().items():
            if "lora_B" in name:
                parameter.zero_()
        if folder is None:
            return
        found = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if k in self.layers()}
        config = json.loads((folder / "adapter_config.json").read_text())
        assert self.policy.options.lora is not None
        scale = self.scale * config["lora_alpha"] / self.policy.options.lora.alpha
        set_peft_model_state_dict(
            self.policy.model, {k.removeprefix(PREFIX): v * (scale if "lora_B" in k else 1.0) for k, v in found.items()}
        )


class Handler(Answering):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        self._do(lambda: {})

    def do_POST(self) -> None:
        self._do(lambda: json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _do(self, body: Callable[[], dict[str, Any]]) -> None:
        told, faults = body(), self.server.faults
        if self.server.away:
            self.close_connection = True
            return
        if self.path == "/v1/completions" and "drops" in faults:
            faults.discard("drops")
            self.server.adapters.clear()
            self.close_connection = True
            return
        if self.path == "/v1/completions" and "hangs" in faults:
            self.server.release.wait(20)
        status, answer = self.server.answer(self.path, told)
        self._send(status, (answer if isinstance(answer, str) else json.dumps(answer)).encode())
