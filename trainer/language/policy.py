"""The rewriter: a causal language model with a chat template that turns a user's prompt into one that is painted.

`RewriterPolicy.load("smollm2")` is the embedded one, a folder or a hub id any other. `chat.py` makes tokens of texts, `network.py` draws and
scores tokens; here is what is loaded, what is trained and what is saved.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from trainer.config import ConfigError
from trainer.language import smollm2
from trainer.language.chat import Chat, PromptTooLong, clean, read_instruction, shown
from trainer.language.network import Network
from trainer.language.types import Completions
from trainer.policies.products import by_onednn
from trainer.policies.trained import Trained

__all__ = ["LoraOptions", "PromptTooLong", "RewriterOptions", "RewriterPolicy", "TransformersEngine"]


class LoraOptions(BaseModel):
    """A low-rank adapter, zero at first."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0, description="the adapter is scaled by alpha / rank")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear",
        description="ends of the names of the layers that get one; all-linear: attention and MLP, not the head",
    )
    start: Path | None = Field(default=None, description="PEFT folder to go on from; the reference is then that adapter")


class RewriterOptions(BaseModel):
    """What `RewriterPolicy.load` takes besides device and seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str = Field(description='folder as transformers saves it, a hub id, or "smollm2" for the packaged SmolLM2-135M-Instruct')
    revision: str | None = Field(default=None, description="commit of a hub id")
    lora: LoraOptions | None = Field(default=LoraOptions(), description="null trains every weight")
    instruction: str = Field(default="realism", description="NAME of instructions/NAME.txt, a file, or the text; empty for none")
    chat_template: Path | None = Field(default=None, description="Jinja file to take in place of the tokenizer's own")
    thinking: bool = Field(default=False, description="given to templates that know enable_thinking")
    max_prompt_tokens: int = Field(default=512, ge=1, description="of instruction, template and prompt together")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the network")
    gradient_checkpointing: bool = Field(default=False, description="activations are computed again in the backward pass")
    onednn: bool = Field(default=True, description="on a CPU: products with float32 weights by oneDNN instead of MKL")


class RewriterPolicy(Trained):
    """A `LanguagePolicy`. `tokenizer` and `model` are transformers' own, `end_ids` the tokens that end a turn, `folder` where the base model's
    files are (or its hub id), `dtype` what it is computed in."""

    def __init__(self, model: Any, tokenizer: Any, options: RewriterOptions, device: str = "cpu", seed: int = 0) -> None:
        self.options, self.model, self.tokenizer = options, model, tokenizer
        self.device = torch.device(device)
        self.folder: str = model.name_or_path
        self.dtype: torch.dtype = getattr(torch, options.dtype)
        self.chat = Chat(tokenizer, read_instruction(options.instruction), _template(options.chat_template), options.thinking)
        self.end_ids = _ends(model, tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.end_ids[0])
        self._prepare(model, options.lora, seed)
        model.to(self.device).eval()
        if options.gradient_checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if options.onednn:
            by_onednn(model)
        casts = options.lora is None and self.dtype != torch.float32
        self.network = Network(model, self.end_ids, self.dtype if casts else None, packs=options.onednn)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", seed: int = 0, **options: Any) -> Self:
        """Read model and tokenizer. FileNotFoundError: nothing there; ConfigError: nothing that can rewrite, and what to give instead."""
        chosen = RewriterOptions(path=str(path), **options)
        where, local = _place(chosen.path)
        source = {"revision": chosen.revision, "local_files_only": local, "trust_remote_code": False}
        dtype = torch.float32 if chosen.lora is None else getattr(torch, chosen.dtype)
        try:
            config = AutoConfig.from_pretrained(where, **source)
            if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ()):
                raise ConfigError(
                    f"{chosen.path} is {config.architectures}: a rewriter is a causal language model (...ForCausalLM)"
                )
            tokenizer = AutoTokenizer.from_pretrained(where, **source)
            model, report = AutoModelForCausalLM.from_pretrained(
                where, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **source
            )
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            first = " ".join(str(error).split())[:400]
            raise FileNotFoundError(
                f"{chosen.path} cannot be loaded as a language model, whole and in safetensors: {first}"
            ) from error
        if wrong := [*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])]:
            raise FileNotFoundError(
                f"{chosen.path}: {len(wrong)} weights are missing or of another shape, {sorted(wrong)[0]} first"
            )
        return cls(model, tokenizer, chosen, device, seed)

    def prompt_ids(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Instruction and prompt by the chat template, with what opens the answer. PromptTooLong names the prompt and the limit."""
        return self._prompt_ids(prompts, 1)

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, temperature: float, max_new_tokens: int, micro_batch: int = 64
    ) -> Completions:
        """One rewrite for each prompt from the whole distribution; row b is a function of seeds[b], whatever the batch, but for rounding.

        Temperature 0 takes the likeliest token, and its log-probabilities are those at temperature 1.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one for each")
        prompt_ids = self._prompt_ids(prompts, max_new_tokens)
        ids_BT, logp_BT, mask_BT = self.network.draw(
            prompt_ids, seeds, temperature=temperature, most=max_new_tokens, micro_batch=micro_batch
        )
        return self._completions(prompts, prompt_ids, ids_BT, mask_BT, logp_BT, temperature)

    def answer_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens with which the model would write each text after `prompt_ids`, and the one that ends the turn."""
        return [(*self.chat.plain(clean(text)), self._end) for text in texts]

    def text(self, ids: Sequence[int]) -> str:
        """What an answer says, stripped, without control tokens."""
        return self.chat.text(ids[:-1] if ids and ids[-1] in self.end_ids else ids)

    def logp(self, completions: Completions) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T) float32 of the completions' tokens at their temperature, and the entropy (B, T) of what could have followed,
        under the present weights, with gradient where grad is on; both 0 where masked. Rows of one prompt together cost it once."""
        return self.network.logp(completions.prompt_ids, completions.ids_BT, completions.mask_BT, completions.temperature)

    def save(self, folder: Path, quiet: bool = False) -> None:
        """A PEFT adapter folder (adapter_config.json, adapter_model.safetensors); without LoRA model and tokenizer as transformers saves them.

        `quiet` writes nothing.
        """
        if quiet:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.options.lora is None:
            shows = transformers_logging.is_progress_bar_enabled()
            transformers_logging.disable_progress_bar()  # one for each synchronisation of an engine says nothing
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if shows:
                transformers_logging.enable_progress_bar()
            return
        weights = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        kept = {f"{_PREFIX}{k}": v.detach().cpu().contiguous() for k, v in weights.items()}
        save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        self.model.peft_config["default"].save_pretrained(folder)

    def _completions(
        self,
        prompts: Sequence[str],
        prompt_ids: Sequence[tuple[int, ...]],
        ids_BT: Tensor,
        mask_BT: Tensor,
        logp_BT: Tensor,
        temperature: float,
    ) -> Completions:
        drawn = [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
        ended_B = torch.tensor([bool(ids) and ids[-1] in self.end_ids for ids in drawn], dtype=torch.bool)
        texts, longest = tuple(self.text(ids) for ids in drawn), max([1, *map(len, drawn)])
        ids_BT, mask_BT, logp_BT = (tensor[:, :longest].contiguous() for tensor in (ids_BT, mask_BT, logp_BT))
        return Completions(tuple(prompts), tuple(prompt_ids), texts, ids_BT, mask_BT, logp_BT, ended_B, temperature)

    @property
    def _end(self) -> int:
        """What the template's own turns end with, as far as the tokenizer says."""
        own = self.tokenizer.eos_token_id
        return own if own in self.end_ids else self.end_ids[0]

    def _prompt_ids(self, prompts: Sequence[str], room: int) -> list[tuple[int, ...]]:
        known = {prompt: self.chat.ids(prompt) for prompt in dict.fromkeys(prompts)}
        limit, context = self.options.max_prompt_tokens, self.network.context
        for prompt, ids in known.items():
            if len(ids) > limit:
                raise PromptTooLong(
                    f"the prompt {shown(prompt)} has {len(ids)} tokens with its instruction, and max_prompt_tokens is {limit}: "
                    "shorten it, or raise max_prompt_tokens"
                )
            if context is not None and len(ids) + room > context:
                raise PromptTooLong(
                    f"the prompt {shown(prompt)} has {len(ids)} tokens with its instruction; with {room} new ones that is more than the "
                    f"{context} that the model reads: shorten it, or lower max_new_tokens"
                )
        return [known[prompt] for prompt in prompts]

    def _add_adapter(self, lora: LoraOptions) -> None:
        names = [name for name, module in self.model.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in () if lora.targets == "all-linear" else lora.targets:
            if not any(n == target or n.endswith(f".{target}") for n in names):
                known = ", ".join(sorted({n.rpartition(".")[2] for n in names}))
                raise ConfigError(f"lora.targets: no linear layer of this model ends in {target!r}; there are: {known}")
        targets = lora.targets if lora.targets == "all-linear" else list(lora.targets)
        self.model.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0)
        )

    def _read_adapter(self, lora: LoraOptions) -> dict[str, Tensor]:
        """The tensors of a PEFT folder, scaled for this adapter's alpha and rank."""
        folder = Path(str(lora.start))
        try:
            about = json.loads((folder / "adapter_config.json").read_text())
            theirs = {k.removeprefix(_PREFIX): v.float() for k, v in load_file(folder / "adapter_model.safetensors").items()}
            rank, alpha = int(about["r"]), float(about["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FileNotFoundError(
                f"lora.start: {folder} is no PEFT folder with adapter_config.json and adapter_model.safetensors: {error}"
            ) from error
        if rank != lora.rank:
            raise ConfigError(f"lora.start: {folder} has rank {rank}: set lora.rank to it")
        if any(about.get(key) for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")):
            raise ConfigError(
                f"lora.start: {folder} is not a plain LoRA (DoRA, rsLoRA or ranks by layer): merge it into the model instead"
            )
        mine = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        if odd := sorted(theirs.keys() ^ mine.keys()) or sorted(k for k in mine if theirs[k].shape != mine[k].shape):
            raise ConfigError(f"lora.start: {folder} adapts other layers than lora.targets ({odd[0]}, {len(odd)} in all)")
        return {k: v * (alpha / lora.alpha) if ".lora_B." in k else v for k, v in theirs.items()}


class TransformersEngine:
    """An `Engine`: the policy's own model draws, so there is nothing to synchronise."""

    def __init__(self, policy: RewriterPolicy, micro_batch: int = 64) -> None:
        self.policy, self.micro_batch = policy, micro_batch

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], *, temperature: float, max_new_tokens: int) -> Completions:
        return self.policy.sample(
            prompts, seeds, temperature=temperature, max_new_tokens=max_new_tokens, micro_batch=self.micro_batch
        )

    def sync(self, step: int) -> Mapping[str, Any]:
        """Nothing to do: the weights that draw are the ones that are trained."""
        return {"engine": "transformers", "synced": "not needed"}

    def close(self) -> None:
        """Nothing was started."""


_PREFIX = "base_model.model."


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read as a Jinja file: {error}") from error


def _place(path: str) -> tuple[str, bool]:
    """(what transformers is to load, whether it is a folder here)."""
    if path == "smollm2":
        return str(smollm2.folder()), True
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is not a model as transformers saves it: config.json is missing")
        return str(folder), True
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir():
        raise FileNotFoundError(f"no language model at {path}: give a folder with config.json, a hub id (owner/name), or smollm2")
    return path, False


def _ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """All tokens that end a turn, by the generation config, the model's and the tokenizer's."""
    for found in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    raise ConfigError(f"{model.name_or_path} does not say which token ends a turn: add eos_token_id to its generation_config.json")
