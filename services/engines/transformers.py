"""A vision-language model in this process: AutoProcessor and AutoModelForImageTextToText, in batches padded on the left."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock, RLock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from services.engines import qwen
from services.engines.base import Chat, Echo, Failure, First, Generated, Sampling, continued, too_long
from services.engines.cpu import linears_by_onednn, patches_as_products
from services.engines.options import EngineOptions, digest, reserved

A = TypeVar("A")
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersEngine:
    """One forward pass at a time, whoever asks. Weights are safetensors; code from a repository is never run."""

    def __init__(self, options: EngineOptions, device: str) -> None:
        place, self.device = options.place(), torch.device(device)
        self.name, self.weights_sha256, self.reserved = options.model or place.name, digest(place), reserved(place)
        self.processor: Any = AutoProcessor.from_pretrained(place, **options.processor)
        self.tokenizer: Any = getattr(self.processor, "tokenizer", None)
        if self.tokenizer is None or not hasattr(self.processor, "image_processor"):
            raise ValueError(f"{place} has no processor for pictures and text; is it a vision-language model?")
        if not (getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template):
            raise ValueError(f"{place} holds no chat template (chat_template.jinja); take that of the published model")
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model, told = AutoModelForImageTextToText.from_pretrained(
            place, dtype=DTYPES[options.dtype], use_safetensors=True, output_loading_info=True
        )
        if told["missing_keys"]:
            missing = sorted(told["missing_keys"])
            raise ValueError(f"{place} lacks {len(missing)} weights of its model, e.g. {missing[0]}; take the whole checkpoint")
        self.model = self.model.eval().requires_grad_(False).to(self.device)
        patches_as_products(self.model)
        linears_by_onednn(self.model)
        self._reader = qwen.Reader(self.processor, self.model, self.device) if qwen.fits(self.model) else None
        self._last = _last_positions(self.model)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = min(c for c in (options.context, limit, 1 << 30) if c)
        self._rows, self._lock, self._reading = options.batch, RLock(), Lock()  # tokenizers bear one thread at a time
        self._texts, self._lengths = lru_cache(4096)(self._rendered), lru_cache(4096)(self._counted)
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="processor")
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        ends = self.model.generation_config.eos_token_id
        self._ends = {int(e) for e in (ends if isinstance(ends, list) else [ends]) if e is not None}

    @property
    def ready(self) -> bool:
        return True

    def close(self) -> None:
        """The model goes with its last user."""
        self._helper.shutdown(wait=False, cancel_futures=True)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        with self._reading:
            return [list(self.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]

    @torch.inference_mode()
    def first(self, chats: Sequence[Chat], spellings: Sequence[str]) -> list[First | Failure]:
        ids = [ids[0] for ids in self.tokens(spellings)]

        def read(chats: Sequence[Chat], inputs: dict[str, Any]) -> list[First]:
            logp_BV = self._logits(inputs, 1)[:, -1].float().log_softmax(-1)
            return [First(dict(zip(spellings, row, strict=True))) for row in logp_BV[:, ids].double().cpu().tolist()]

        return self._each(chats, read, self._read)

    @torch.inference_mode()
    def echo(self, chats: Sequence[Chat]) -> list[Echo | Failure]:
        def read(chats: Sequence[Chat], inputs: dict[str, Any]) -> list[Echo]:
            counts = [self._length(chat) for chat in chats]
            longest = max(counts)
            logits_BTV = self._logits(inputs, longest + 1)[:, -longest - 1 : -1].float()
            target_BT = inputs["input_ids"][:, -longest:]
            logp_BT = logits_BTV.gather(-1, target_BT[..., None])[..., 0] - logits_BTV.logsumexp(-1)
            rows = logp_BT.double().cpu().tolist()
            return [Echo(tuple(row[longest - count :])) for row, count in zip(rows, counts, strict=True)]

        return self._each(chats, read, self._read)

    @torch.inference_mode()
    def generate(self, chats: Sequence[Chat], sampling: Sampling) -> list[tuple[Generated, ...] | Failure]:
        draws = sampling.n if sampling.temperature > 0 else 1

        def read(seed: int) -> Callable[[Sequence[Chat], dict[str, Any]], list[Generated]]:
            def one(chats: Sequence[Chat], inputs: dict[str, Any]) -> list[Generated]:
                noise = LogitsProcessorList([_Gumbel(sampling.temperature, seed)] if sampling.temperature > 0 else [])
                settings = GenerationConfig(
                    max_new_tokens=sampling.max_tokens,
                    do_sample=False,
                    eos_token_id=sorted(self._ends) or None,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
                out_BT = self.model.generate(**inputs, generation_config=settings, logits_processor=noise)
                new_BT = out_BT[:, inputs["input_ids"].shape[1] :].cpu().tolist()
                return [self._cut(row) for row in new_BT]

            return one

        columns = [self._each(chats, read(sampling.seed * 1000 + draw), self._inputs) for draw in range(draws)]
        out: list[tuple[Generated, ...] | Failure] = []
        for row in zip(*columns, strict=True):
            failure = next((one for one in row if isinstance(one, Failure)), None)
            answers = tuple(one for one in row if not isinstance(one, Failure))
            out.append(failure if failure is not None else answers * (sampling.n // draws))
        return out

    def _cut(self, ids: list[int]) -> Generated:
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        text = self.tokenizer.decode(ids[:end] if end is not None else ids, skip_special_tokens=True)
        return Generated(text.rstrip("\ufffd"), end is not None)  # bytes of a letter that was cut

    def _logits(self, inputs: dict[str, Any], last: int) -> Tensor:
        """(B, last or more, V): of the last positions, where the model can leave the others away."""
        keeps = {"logits_to_keep": last} if self._keeps else {}
        for part in self._last:
            part.last = last if self._keeps else None
        try:
            seen = self._reader.seen(inputs) if self._reader is not None else inputs
            logits: Tensor = self.model(**seen, use_cache=False, **keeps).logits
        finally:
            for part in self._last:
                part.last = None
        return logits

    def _text(self, chat: Chat) -> str:
        return self._texts(tuple(part if isinstance(part, str) else None for part in chat.parts), chat.system, chat.continuation)

    def _rendered(self, parts: tuple[str | None, ...], system: str | None, continuation: str | None) -> str:
        """The chat template over texts and, for None, pictures. The questions of a group differ in their pictures only."""
        goes_on = continuation is not None
        nothing = np.zeros((1, 1, 3), np.uint8)
        chat = Chat(tuple(nothing if part is None else part for part in parts), system, continuation)
        text: str = self.processor.apply_chat_template(
            chat.messages(lambda picture: {"type": "image"}),
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
        return text

    def _length(self, chat: Chat) -> int:
        """Tokens of the continuation: what the whole text has more than the text that only opens the answer."""
        return self._lengths(self._text(Chat(chat.parts, chat.system)), self._text(chat))

    def _counted(self, opened: str, whole: str) -> int:
        return continued(*self.tokens([opened, whole]))

    def _read(self, chats: Sequence[Chat]) -> dict[str, Any]:
        """What `_logits` takes."""
        if self._reader is None:
            return self._inputs(chats)
        with self._reading:
            return self._reader.inputs(chats, [self._text(chat) for chat in chats])

    def _inputs(self, chats: Sequence[Chat]) -> dict[str, Any]:
        """As the processor makes them."""
        images = [[np.require(image, requirements="W") for image in chat.images] for chat in chats]  # torch wants to own them
        with self._reading:
            made = self.processor(
                text=[self._text(chat) for chat in chats],
                images=[image for several in images for image in several] or None,
                padding=True,
                return_tensors="pt",
            )
        return {k: v.to(self.device) for k, v in made.items() if isinstance(v, Tensor)}

    def _each(
        self,
        chats: Sequence[Chat],
        read: Callable[[Sequence[Chat], dict[str, Any]], list[A]],
        prepare: Callable[[Sequence[Chat]], dict[str, Any]],
    ) -> list[A | Failure]:
        """`read` over batches; a chat that cannot be prepared, or is too long, is a failure of its own. While a batch is on the device,
        the next one's pictures and texts are prepared."""
        out: dict[int, A | Failure] = {}
        made: dict[int, Future[dict[str, Any]]] = {}  # by a batch's first chat
        with self._lock:
            count = -(-len(chats) // self._rows)  # batches, all of about the same size
            cuts = [len(chats) * i // max(count, 1) for i in range(count + 1)]
            waiting = [list(range(a, b)) for a, b in itertools.pairwise(cuts)]
            while waiting:
                rows = waiting.pop(0)
                batch = [chats[i] for i in rows]
                try:
                    inputs = made.pop(rows[0]).result() if rows[0] in made else prepare(batch)
                except (ValueError, IndexError, TypeError) as error:
                    if len(rows) == 1:
                        out[rows[0]] = Failure("question-refused", f"the model's processor refuses this item: {_brief(error)}")
                    else:
                        waiting += [[i] for i in rows]
                    continue
                lengths = inputs["attention_mask"].sum(1).tolist()
                long = [i for i, length in zip(rows, lengths, strict=True) if length > self.context]
                if long:
                    out |= {i: too_long(n, self.context) for i, n in zip(rows, lengths, strict=True) if i in long}
                    waiting += [rest] if (rest := [i for i in rows if i not in long]) else []
                    continue
                if waiting and len(waiting[0]) > 1:
                    made[waiting[0][0]] = self._helper.submit(prepare, [chats[i] for i in waiting[0]])
                out |= dict(zip(rows, read(batch, {k: self._cast(v) for k, v in inputs.items()}), strict=True))
        return [out[i] for i in range(len(chats))]

    def _cast(self, value: Any) -> Any:
        return value.to(self.model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Last(nn.Module):
    """A part that treats positions alike, of (B, T, ...) only the `last` ones; the others are 0. None: all of them."""

    part: nn.Module

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.last: int | None = None

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.last is not None and x_BTC.ndim == 3 and self.last < x_BTC.shape[1]:
            y_BTC = self.part(x_BTC[:, -self.last :])
            if isinstance(y_BTC, Tensor):  # some mixtures of experts give more
                return nn.functional.pad(y_BTC, (0, 0, x_BTC.shape[1] - self.last, 0))
        whole: Tensor = self.part(x_BTC)
        return whole


def _last_positions(model: Any) -> list[_Last]:
    """Nobody reads the last layer's other positions: there only keys and values need them. Empty for a model that is built otherwise."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(getattr(decoder, "language_model", decoder), "layers", None)
    attention = getattr(layers[-1], "self_attn", None) if isinstance(layers, nn.ModuleList) and len(layers) else None
    if attention is None:
        return []
    assert isinstance(layers, nn.ModuleList)
    made = []
    for owner, name in ((attention, "q_proj"), (attention, "o_proj"), (layers[-1], "mlp")):
        if isinstance(part := getattr(owner, name, None), nn.Module):
            made.append(_Last(part))
            setattr(owner, name, made[-1])
    return made


class _Gumbel(LogitsProcessor):  # type: ignore[misc]
    """Greedy over logits / temperature plus Gumbel noise is a sample; the noise of a row does not depend on its neighbours."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_V = torch.rand(scores.shape[-1], generator=self.generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        return scores / self.temperature - (-uniform_V.log()).log().to(scores)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
