"""A causal language model that rewrites prompts, in this process: AutoModelForCausalLM, batches padded on the left, an adapter merged.

A token is where the cumulated distribution passes a number in [0, 1) from the row's own generator: a sample of the whole distribution (no
top-p, no top-k), and a function of the row's seed, whatever its neighbours. Kernels round differently for other batches, so that once in a
while a number falls beyond a neighbouring border.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from services.engines.cpu import linears_by_onednn
from services.engines.options import digest, reserved
from shared.errors import Invalid
from shared.rewriting import messages, takes_system

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PromptTooLong(Invalid):
    """More tokens than the rewriter reads."""

    kind = "prompt-too-long"


class PromptReserved(Invalid):
    """It holds a token of the chat template, which would end the user's turn."""

    kind = "prompt-reserved"


@dataclass(frozen=True)
class Question:
    """`ids` as `LanguageModel.ids` makes them; at most `most` tokens are drawn."""

    ids: tuple[int, ...]
    seed: int
    temperature: float
    most: int


@dataclass(frozen=True)
class Drawn:
    """What was written; its tokens with the one that ends the turn, and their log-probabilities."""

    text: str
    ids: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool


class LanguageModel:
    """One forward pass at a time, whoever asks. Weights are safetensors; code from a repository is never run."""

    def __init__(
        self,
        folder: Path,
        adapter: Path | None = None,
        *,
        instruction: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_new_tokens: int = 128,
        max_prompt_tokens: int = 512,
        device: str = "cpu",
    ) -> None:
        """ValueError says what is missing, and FileNotFoundError where there is nothing."""
        if not (folder / "config.json").is_file():
            hint = "it holds a PEFT adapter: name it as `adapter`, and its base model as `folder`" if _is_adapter(folder) else ""
            raise FileNotFoundError(f"{folder} holds no config.json; {hint or 'give the folder of a causal language model'}")
        self.device, self.instruction, self.max_new_tokens = torch.device(device), instruction, max_new_tokens
        self.weights_sha256, self.reserved = digest(folder), reserved(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder} holds no chat template (chat_template.jinja); take that of the published instruct model")
        self.tokenizer.padding_side = "left"
        self.model, told = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"{folder} lacks {len(missing)} weights of its model, e.g. {missing[0]}; take the whole checkpoint")
        own = self.model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id
        self.ends = sorted({int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None})
        if not self.ends:
            raise ValueError(f"{folder} names no token that ends a turn; set eos_token_id in its generation_config.json")
        pad = self.tokenizer.pad_token_id
        self._pad = int(self.ends[0] if pad is None else pad)
        self.model.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=self._pad)  # no penalties, no top-p
        if adapter is not None:
            merge(self.model, adapter)
            self.weights_sha256 = hashlib.sha256(f"{self.weights_sha256}\n{digest(adapter)}".encode()).hexdigest()
        self.model = self.model.eval().requires_grad_(False).to(self.device)
        linears_by_onednn(self.model)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        self.max_prompt_tokens = min(max_prompt_tokens, context - max_new_tokens)
        self._lock = Lock()  # tokenizers bear one thread at a time
        self._system = takes_system(self._render)
        if (length := len(self._tokens("a"))) >= self.max_prompt_tokens:
            raise ValueError(
                f"{folder} reads {context} tokens: the instruction takes {length} and a rewrite up to {max_new_tokens}, which leaves no room "
                "for a prompt; lower max_new_tokens, shorten the instruction, or raise max_prompt_tokens"
            )

    def ids(self, prompt: str) -> tuple[int, ...]:
        """Instruction and prompt by the chat template, with what opens the answer. PromptTooLong, PromptReserved."""
        if (found := self.reserved.search(prompt)) is not None:
            raise PromptReserved(f"the prompt holds the model's reserved token {found[0]}; leave it away")
        ids = self._tokens(prompt)
        if len(ids) > self.max_prompt_tokens:
            raise PromptTooLong(
                f"with the instruction the prompt has {len(ids)} tokens; the rewriter reads {self.max_prompt_tokens}: shorten it",
                limit=self.max_prompt_tokens,
                observed=len(ids),
            )
        return ids

    def _tokens(self, prompt: str) -> tuple[int, ...]:
        with self._lock:
            text = self._render(messages(self.instruction, prompt.strip(), self._system))
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    @torch.inference_mode()
    def draw(self, questions: Sequence[Question]) -> list[Drawn]:
        """As many as were asked, in order."""
        longest = max(len(question.ids) for question in questions)
        pads = [longest - len(question.ids) for question in questions]
        ids_BT = [[self._pad] * pad + list(question.ids) for pad, question in zip(pads, questions, strict=True)]
        mask_BT = [[0] * pad + [1] * (longest - pad) for pad in pads]
        drawing = _Drawing(questions)
        out_BT = self.model.generate(
            input_ids=torch.tensor(ids_BT, device=self.device),
            attention_mask=torch.tensor(mask_BT, device=self.device),
            generation_config=GenerationConfig(
                max_new_tokens=max(question.most for question in questions),
                do_sample=False,
                eos_token_id=self.ends,
                pad_token_id=self._pad,
            ),
            logits_processor=LogitsProcessorList([drawing]),
        )
        rows, logps = out_BT[:, longest:].tolist(), torch.stack(drawing.logps_T, 1).tolist()
        return [self._cut(row, logp, question) for row, logp, question in zip(rows, logps, questions, strict=True)]

    def _cut(self, ids: list[int], logps: list[float], question: Question) -> Drawn:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        ended = end is not None and end < question.most
        count = end + 1 if ended and end is not None else min(question.most, len(ids))
        with self._lock:
            text = self.tokenizer.decode(ids[: count - 1] if ended else ids[:count], skip_special_tokens=True)
        return Drawn(
            text.rstrip("\ufffd").strip(), tuple(ids[:count]), tuple(logps[:count]), ended
        )  # bytes of a letter that was cut

    def _render(self, chat: Sequence[dict[str, str]]) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(chat), tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return text


class _Drawing(LogitsProcessor):  # type: ignore[misc]
    """Leaves of each row the token that was drawn, and remembers its log-probability. At temperature 0 the likeliest, at temperature 1."""

    def __init__(self, questions: Sequence[Question]) -> None:
        rows = [torch.rand(q.most, generator=torch.Generator().manual_seed(q.seed), dtype=torch.float64) for q in questions]
        self.uniform_BT = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True
        )  # a row is cut at its `most`, whatever is drawn after
        self.heat_B1 = torch.tensor([[q.temperature] for q in questions])
        self.logps_T: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        heat_B1 = self.heat_B1.to(scores.device)
        logp_BV = (scores.float() / torch.where(heat_B1 > 0, heat_B1, 1.0)).log_softmax(-1)
        sums_BV = logp_BV.double().exp().cumsum(-1)
        if not bool(sums_BV[:, -1].isfinite().all()):
            raise ValueError("the model's logits are not finite")
        target_B1 = self.uniform_BT[:, len(self.logps_T), None].to(scores.device) * sums_BV[:, -1:] * (1 - 1e-12)
        drawn_B1 = torch.searchsorted(sums_BV, target_B1, right=True)
        chosen_B1 = torch.where(heat_B1 > 0, drawn_B1, logp_BV.argmax(-1, keepdim=True))
        self.logps_T.append(logp_BV.gather(-1, chosen_B1)[:, 0].double().cpu())
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen_B1, 0.0)


class _Adapter(BaseModel):
    """What of adapter_config.json matters here; what else changes the result is refused below."""

    model_config = ConfigDict(extra="ignore")
    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    modules_to_save: list[str] | None = None


@torch.no_grad()
def merge(model: nn.Module, folder: Path) -> int:
    """W += scale B A for each layer of a LoRA in PEFT's format; how many there were. ValueError for what is not one, or fits another model."""
    if not _is_adapter(folder):
        raise FileNotFoundError(f"{folder} holds no adapter_config.json; give the folder of a PEFT adapter")
    try:
        config = _Adapter.model_validate(json.loads((folder / "adapter_config.json").read_text()))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        first = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{folder} is not a LoRA in PEFT's format, with weights in safetensors: {first}") from error
    odd = config.peft_type != "LORA" or config.use_dora or config.bias != "none" or config.fan_in_fan_out or config.modules_to_save
    if odd or config.rank_pattern or config.alpha_pattern:
        raise ValueError(
            f"{folder} is more than a plain LoRA; merge it by peft (merge_and_unload), and give the whole model as `folder`"
        )
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    layers = dict(model.named_modules())
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    wanted = {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    if not names or wanted != set(tensors):
        other = sorted(wanted ^ set(tensors)) or ["nothing"]
        raise ValueError(
            f"{folder} holds more or less than pairs of lora_A and lora_B ({other[0]}); merge it by peft, and give the whole"
        )
    for name in names:
        layer = layers.get(name.removeprefix("base_model.model."))
        a, b = (tensors[f"{name}.lora_{side}.weight"].float() for side in "AB")
        if not isinstance(layer, nn.Linear) or layer.weight.shape != (b.shape[0], a.shape[1]) or b.shape[1] != a.shape[0]:
            raise ValueError(f"{folder} adapts {name}, which this model does not have in that shape; is it another base model's?")
        layer.weight += (scale * (b @ a)).to(layer.weight)
    return len(names)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
