"""What policies of pictures and of words share: a network of which an adapter or every weight is trained, and what it was before."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor

from trainer.policies.texts import fingerprint
from trainer.sharding import wearing


class Trained:
    """`trainable`, `reference` and `fingerprint` of a policy; trained weights are float32 whatever the network runs in."""

    def _prepare(self, network: Any, lora: Any, seed: int) -> None:
        """Freeze all but an adapter by the options `lora`; None trains every weight."""
        self._of, self._fingerprint = network.requires_grad_(False), fingerprint(network)
        if lora is None:
            network.float().requires_grad_(True)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._add_adapter(lora)
            if lora.start is not None:
                self._go_on_from(self._read_adapter(lora))
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()
        # what the policy was: all weights, or the adapter it starts from; a fresh adapter is switched off instead
        keeps = lora is None or lora.start is not None
        self._initial = {k: p.detach().cpu().clone() for k, p in self.trainable().items()} if keeps else None

    def _add_adapter(self, lora: Any) -> None:
        """Of random weights. ConfigError: no layer has such a name."""
        raise NotImplementedError

    def _read_adapter(self, lora: Any) -> Mapping[str, Tensor]:
        """The tensors of `lora.start`, scaled for this adapter's alpha and rank."""
        raise NotImplementedError

    def _go_on_from(self, weights: Mapping[str, Tensor]) -> None:
        set_peft_model_state_dict(self._of, dict(weights))
        digest = hashlib.sha256(self._fingerprint.encode())
        for name, tensor in sorted(weights.items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        self._fingerprint = digest.hexdigest()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What the optimiser may change, by name."""
        return {k: p for k, p in self._of.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy is what it was before training."""
        if self._initial is None:
            self._of.disable_adapters()
            try:
                yield
            finally:
                self._of.enable_adapters()
            return
        with wearing(self.trainable(), self._initial):
            yield

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and a sample of values of the base weights (and of `lora.start`): policies differ in it."""
        return self._fingerprint
