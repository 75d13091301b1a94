"""Tokens in, tokens and log-probabilities out, of any causal language model of transformers.

What prompts have in common is computed once, for drawing and for learning alike: their first tokens, and a prompt that has several
answers. The keys and values of it are then handed to every row.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.config import ConfigError
from trainer.language.packed import packed

Prompt = tuple[int, ...]
_ROOM = 64  # tokens that keys and values are given room for at once
_STEPS = 16  # as many tokens have to be drawn before packing the weights pays
_EVEN = 16  # lengths are padded to multiples of it: every other shape of product costs oneDNN megabytes for good
_LOGITS = 2**24  # logits that are held at once, 64 MiB


class Roomy(DynamicLayer):
    """Keys and values with room behind them: a token is written, and the others are not copied. Not for gradients."""

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        have = self.get_seq_length()
        need = have + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < need:
            rows, heads, _, width = key_states.shape
            self._buffers = (
                key_states.new_empty(rows, heads, need + _ROOM, width),
                value_states.new_empty(rows, heads, need + _ROOM, value_states.shape[-1]),
            )
            if have:
                self._buffers[0][..., :have, :] = self.keys
                self._buffers[1][..., :have, :] = self.values
        keys, values = self._buffers
        keys[..., have:need, :] = key_states
        values[..., have:need, :] = value_states
        self.keys, self.values = keys[..., :need, :], values[..., :need, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._buffers = None


@dataclass
class _Read:
    """U prompts that the model has read: keys and values, which of P places hold a token, how many do, the state after the last one."""

    cache: Cache
    mask_UP: Tensor
    length_U: Tensor
    last_UD: Tensor

    def select(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.mask_UP, self.length_U, self.last_UD = self.mask_UP[rows], self.length_U[rows], self.last_UD[rows]


class Network:
    """`model` (with a head) on its device; `ends` are the tokens that end a turn; `casts` is what float32 weights are computed in; `packs`
    lets weights be packed for drawing.

    ConfigError for a model whose logits are not its head's, with or without the scales known here.
    """

    def __init__(self, model: Any, ends: Sequence[int], casts: torch.dtype | None = None, packs: bool = False) -> None:
        self.model, self.casts, self.packs = model, casts, packs and casts is None
        self._decoder, self._output = model.get_decoder(), model.get_output_embeddings()
        self.device: torch.device = model.device
        self.ends = torch.tensor(sorted(set(ends)), device=self.device)
        config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale: float = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        # keys and values of other kinds (windows, states) have their own idea of places: there, rows go without padding
        self.shares = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        self._checkpoints = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
        self._probe()

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, temperature: float, most: int, micro_batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, most) int64, their log-probabilities (B, most) float32, and which are the answers' (B, most) bool, on the CPU.

        Row b takes one uniform number a token from a generator of seeds[b], so it does not depend on the others but by rounding.
        """
        ids, logp = torch.zeros(len(prompts), most, dtype=torch.long), torch.zeros(len(prompts), most)
        mask = torch.zeros(len(prompts), most, dtype=torch.bool)
        with packed(self.model) if self.packs and most >= _STEPS else contextlib.nullcontext():
            for rows in self._batches(prompts, micro_batch):
                uniform = [torch.rand(most, generator=torch.Generator().manual_seed(seeds[r]), dtype=torch.float64) for r in rows]
                ids[rows], logp[rows], mask[rows] = self._draw([prompts[r] for r in rows], torch.stack(uniform), temperature)
        return ids, logp, mask

    def logp(self, prompts: Sequence[Prompt], ids_BT: Tensor, mask_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (B, T) float32 of answers, on the device; 0 where masked. Temperature 0 counts as 1."""
        ids_BT, mask_BT = ids_BT.to(self.device), mask_BT.to(self.device)
        states_ND, ids_N = self._states(prompts, ids_BT, mask_BT)[mask_BT], ids_BT[mask_BT]
        count = len(ids_N)
        states_ND, ids_N = functional.pad(states_ND, (0, 0, 0, -count % _EVEN)), functional.pad(ids_N, (0, -count % _EVEN))
        size = max(1, _LOGITS // self._output.weight.shape[0] // _EVEN) * _EVEN
        again = torch.is_grad_enabled() and len(ids_N) > size
        pairs = []
        for states, tokens in zip(states_ND.split(size), ids_N.split(size), strict=True):
            arguments = states, tokens, temperature or 1.0
            pairs.append(checkpoint(self._score, *arguments, use_reentrant=False) if again else self._score(*arguments))
        logp, entropy = (torch.cat(values)[:count] for values in zip(*pairs, strict=True))
        empty = logp.new_zeros(ids_BT.shape)
        return empty.masked_scatter(mask_BT, logp), empty.masked_scatter(mask_BT, entropy)

    def head(self, states: Tensor) -> Tensor:
        """Logits (..., V) float32 after states (..., D)."""
        with self._casting():
            logits: Tensor = self._output(states)
        logits = logits.float()
        if self._scale != 1:
            logits = logits * self._scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _draw(self, prompts: list[Prompt], uniform_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        many, most = uniform_BT.shape
        uniform_BT = uniform_BT.to(self.device)
        ids = torch.zeros(many, most, dtype=torch.long, device=self.device)
        logp, mask = torch.zeros(many, most, device=self.device), torch.zeros(many, most, dtype=torch.bool, device=self.device)
        unique = list(dict.fromkeys(prompts))
        read = self._read(unique)
        rows = torch.arange(many, device=self.device)
        read.select(torch.tensor([unique.index(p) for p in prompts], device=self.device))
        alive = torch.ones_like(rows, dtype=torch.bool)
        holds = torch.cat([read.mask_UP, read.mask_UP.new_ones(many, most)], 1)
        places, state = read.mask_UP.shape[1], read.last_UD
        for t in range(most):
            token, value = pick(self.head(state), uniform_BT[rows, t], temperature)
            ids[rows[alive], t], logp[rows[alive], t], mask[rows[alive], t] = token[alive], value[alive], True
            alive = alive & ~torch.isin(token, self.ends)
            left = int(alive.sum())
            if left == 0 or t == most - 1:
                break
            if left <= 0.75 * len(rows):
                kept = alive.nonzero().squeeze(1)
                read.select(kept)
                rows, alive, token, holds = rows[kept], alive[kept], token[kept], holds[kept]
            state = self._forward(token[:, None], holds[:, : places + t + 1], read.length_U[:, None] + t, read.cache)[:, -1]
        return ids.cpu(), logp.cpu(), mask.cpu()

    def _batches(self, prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
        """Rows that are drawn together; of one prompt length where the model takes no padding."""
        lengths = [0 if self.shares else len(prompt) for prompt in prompts]
        for length in dict.fromkeys(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            yield from (rows[start : start + size] for start in range(0, len(rows), size))

    def _read(self, prompts: list[Prompt]) -> _Read:
        """Different prompts, padded on the right; what they begin with in common is read once."""
        cache = DynamicCache(config=self.model.config)
        if not torch.is_grad_enabled():
            cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        common = 0
        if self.shares and len(prompts) > 1:
            shortest = min(prompts, key=len)[:-1]
            common = next((n for n, id in enumerate(shortest) if any(p[n] != id for p in prompts)), len(shortest))
        if common:
            first = torch.tensor([prompts[0][:common]], device=self.device)
            self._forward(first, None, torch.arange(common, device=self.device)[None], cache)
            cache.reorder_cache(torch.zeros(len(prompts), dtype=torch.long, device=self.device))
        length_U = torch.tensor([len(p) for p in prompts], device=self.device)
        rest_UR = pad_sequence([torch.tensor(p[common:], device=self.device) for p in prompts], batch_first=True)
        if self.shares:
            rest_UR = functional.pad(rest_UR, (0, -rest_UR.shape[1] % _EVEN))
        places_P = torch.arange(common + rest_UR.shape[1], device=self.device)
        mask_UP = places_P < length_U[:, None]
        states = self._forward(rest_UR, mask_UP, self._inside(places_P[None, common:].expand(len(prompts), -1)), cache)
        last_UD = states[torch.arange(len(prompts), device=self.device), length_U - common - 1]
        return _Read(cache, mask_UP, length_U, last_UD)

    def _states(self, prompts: Sequence[Prompt], ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D): the state that each token of the answers follows."""
        more = ids_BT.shape[1] - 1
        if self.shares and not (self._checkpoints and torch.is_grad_enabled()):
            unique = list(dict.fromkeys(prompts))
            read = self._read(unique)
            read.select(torch.tensor([unique.index(p) for p in prompts], device=self.device))
            if more == 0:
                return read.last_UD[:, None]
            padding = (0, -more % _EVEN)
            given_BT, holds_BT = functional.pad(ids_BT[:, :-1], padding), functional.pad(mask_BT[:, :-1], padding)
            places_BT = self._inside(read.length_U[:, None] + torch.arange(given_BT.shape[1], device=self.device))
            states = self._forward(given_BT, torch.cat([read.mask_UP, holds_BT], 1), places_BT, read.cache)
            return torch.cat([read.last_UD[:, None], states[:, :more]], 1)
        rows = [torch.cat([torch.tensor(p, device=self.device), row[:-1]]) for p, row in zip(prompts, ids_BT, strict=True)]
        length_B = torch.tensor([len(p) for p in prompts], device=self.device)
        places_L = torch.arange(max(len(row) for row in rows), device=self.device)
        answer_BL = pad_sequence(
            [torch.cat([m.new_ones(len(p)), m[:-1]]) for p, m in zip(prompts, mask_BT, strict=True)], batch_first=True
        )
        states = self._forward(pad_sequence(rows, batch_first=True), answer_BL, places_L.expand(len(rows), -1), None)
        at_BT = length_B[:, None] - 1 + torch.arange(more + 1, device=self.device)
        return states.gather(1, at_BT[..., None].expand(-1, -1, states.shape[-1]))

    def _inside(self, places: Tensor) -> Tensor:
        """Padding may reach beyond the places that the model has."""
        return places if self.context is None else places.clamp(max=self.context - 1)

    def _forward(self, ids_BT: Tensor, mask_BP: Tensor | None, places_BT: Tensor, cache: Cache | None) -> Tensor:
        with self._casting(), self._checkpointing():
            states: Tensor = self._decoder(
                input_ids=ids_BT,
                attention_mask=mask_BP,
                position_ids=places_BT,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        return states

    def _score(self, states_ND: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits_NV = self.head(states_ND)
        logq_NV = (logits_NV if temperature == 1 else logits_NV / temperature).log_softmax(-1)
        entropy_N = -(logq_NV.exp() * logq_NV.clamp(min=-1e4)).sum(-1)  # what cannot follow counts nothing, in the gradient too
        return logq_NV.gather(1, ids_N[:, None]).squeeze(1), entropy_N

    def _casting(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.casts is None else torch.autocast(self.device.type, self.casts)

    @contextlib.contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Layers compute their activations again only in training mode, which nothing else here is to be in."""
        for layer in self._checkpoints:
            layer.training = torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer in self._checkpoints:
                layer.training = False

    @torch.no_grad()
    def _probe(self) -> None:
        ids = torch.arange(4, device=self.device)[None]
        with self._casting():
            theirs = self.model(input_ids=ids, use_cache=False).logits.float()
        ours = self.head(self._forward(ids, None, ids, None))
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise ConfigError(f"{type(self.model).__name__} does more to its logits than is known here: take another model")


def pick(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A token each (B,) and its log-probability: where the cumulated distribution at `temperature` passes a number in [0, 1).

    At temperature 0 the likeliest, with its log-probability at 1. The sums are of blocks first: most of a vocabulary is never looked at.
    """
    if temperature == 0:
        token_B = logits_BV.argmax(-1)
        return token_B, logits_BV.log_softmax(-1).gather(1, token_B[:, None]).squeeze(1)
    p_BV = torch.softmax(logits_BV / temperature, -1)
    block = 256
    p_BNK = functional.pad(p_BV, (0, -p_BV.shape[1] % block)).unflatten(1, (-1, block))
    sums_BN = p_BNK.sum(-1).double().cumsum(-1)
    below_one = 1 - 1e-12  # a sum never ends before the number that is looked for
    target_B1 = uniform_B[:, None] * sums_BN[:, -1:] * below_one
    n_B1 = torch.searchsorted(sums_BN, target_B1, right=True)
    inner_BK = p_BNK[torch.arange(len(n_B1), device=n_B1.device), n_B1.squeeze(1)].double().cumsum(-1)
    rest_B1 = target_B1 - functional.pad(sums_BN, (1, 0)).gather(1, n_B1)
    k_B1 = torch.searchsorted(inner_BK, torch.minimum(rest_B1, inner_BK[:, -1:] * below_one), right=True)
    token_B1 = n_B1 * block + k_B1
    return token_B1.squeeze(1), p_BV.gather(1, token_B1).log().squeeze(1)
