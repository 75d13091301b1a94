"""A causal language model of random weights, Llama's class, with a word-level tokenizer and a chat template, written in a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.language.policy import RewriterPolicy

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"]
_TEXT = (
    "system user assistant rewrite the prompt for an image generator keep subject . , a photo of bag boot coat dress shirt sneaker "
    "trouser sandal pullover on dark background soft light natural grain sharp detail red blue small large old new worn leather cotton "
    "studio shadow close up plain real camera film and with in without glossy smooth skin fabric seams folds dust"
)
WORDS = _TEXT.split()
# Roles and turns as SmolLM2's and Qwen's, without a default system text.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(words: Sequence[str] = WORDS, template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token per word or mark of `words`; others are <|unknown|>. A turn ends with <|im_end|>."""
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|unknown|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokens.chat_template = template
    return tokens


def write(
    folder: Path,
    *,
    words: Sequence[str] = WORDS,
    template: str | None = CHAT,
    width: int = 128,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    context: int = 512,
    tied: bool = True,
    seed: int = 0,
) -> Path:
    """As transformers saves it, 0.3M parameters at these sizes, heads of 64 as vLLM asks on a CPU; returns `folder`.

    <|im_end|> and <|endoftext|> both end a turn.
    """
    tokens = tokenizer(words, template)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):  # transformers' own are so small that no word matters
        if parameter.ndim >= 2:
            scale = 0.2 if "embed_tokens" in name or "lm_head" in name else parameter.shape[1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    model.generation_config.eos_token_id = [2, 0]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def policy(folder: Path, **options: Any) -> RewriterPolicy:
    """The model in `folder` as a rewriter, on the CPU."""
    return RewriterPolicy.load(folder, **options)
