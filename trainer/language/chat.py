"""Text to tokens and back by a model's chat template, where the user's text is only ever text.

A prompt may hold "<|im_end|>" or whatever else the tokenizer takes for a control token. Such a prompt is encoded in pieces, cut inside
those words, and one that still yields a control token of its own is refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from shared.rewriting import messages, takes_system
from trainer.config import ConfigError

INSTRUCTIONS = Path(__file__).parent / "instructions"
_MARK = "verismusertext"


class PromptTooLong(ConfigError):
    """A prompt does not fit; the message names it and the limit."""


def read_instruction(given: str) -> str:
    """The text of instructions/NAME.txt, of a file, or `given` itself where it is more than one word; "" for none.

    A file under instructions/ never changes, since runs name it: another wording is another file.
    """
    if not given.strip() or len(given.split()) > 1:
        return given.strip()
    for path in (INSTRUCTIONS / f"{given.removesuffix('.txt')}.txt", Path(given)):
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    known = ", ".join(sorted(path.stem for path in INSTRUCTIONS.glob("*.txt")))
    raise ConfigError(f"no instruction {given!r}; known: {known}; or give a file, or the text itself")


class Chat:
    """A tokenizer with a chat template, and what the model is told before every prompt.

    The instruction is the system message where the template shows one, else it stands in front of the user's text. `thinking` is passed to
    templates that know it as enable_thinking. ConfigError: no template, or one that does not show the user's text.
    """

    def __init__(self, tokenizer: Any, instruction: str = "", template: str | None = None, thinking: bool = False) -> None:
        self.tokenizer, self.instruction, self.thinking = tokenizer, instruction, thinking
        if template is not None:
            tokenizer.chat_template = template
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template, so nothing tells prompt and answer apart: take a model "
                "tuned to answer (its name often ends in Instruct), or give a Jinja file as chat_template"
            )
        added = {token: number for token, number in tokenizer.get_added_vocab().items() if token.strip()}
        self._control = set(added.values()) - {tokenizer.unk_token_id}
        self._words = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True) if len(t) > 1) or "(?!)")
        self.in_system = bool(instruction) and takes_system(self._template)
        text = self._render(_MARK)
        if text.count(_MARK) != 1:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path} shows the user's text {text.count(_MARK)} times and not once: "
                "give another Jinja file as chat_template"
            )
        self._around = text.split(_MARK)
        self._usual = self._controls(self._encode(text))

    def ids(self, prompt: str) -> tuple[int, ...]:
        """Instruction, prompt and what opens the answer. ConfigError: the prompt makes a control token whatever is done."""
        prompt = clean(prompt)
        found = self._encode(self._render(prompt))
        if self._controls(found) != self._usual:
            before, after = self._around
            found = [*self._encode(before), *self.plain(prompt), *self._encode(after)]
            if self._controls(found) != self._usual:
                raise ConfigError(f"the prompt {shown(prompt)} makes a control token of this model's tokenizer: write it otherwise")
        return tuple(found)

    def plain(self, text: str) -> list[int]:
        """Tokens of a text in which no word is a control token."""
        found: list[int] = []
        while match := self._words.search(text):
            found += self._encode(text[: match.start() + 1])
            text = text[match.start() + 1 :]
        return found + self._encode(text)

    def text(self, ids: Sequence[int]) -> str:
        """What an answer says, without control tokens."""
        out: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return out.strip()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [number for number in ids if number in self._control]

    def _render(self, prompt: str) -> str:
        return self._template(messages(self.instruction, prompt, self.in_system))

    def _template(self, chat: Sequence[dict[str, str]]) -> str:
        try:
            out: str = self.tokenizer.apply_chat_template(
                list(chat), tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"the chat template of {self.tokenizer.name_or_path} cannot be filled in: {error}") from error
        return out


def clean(prompt: str) -> str:
    """Stripped, and without halves of characters, which no tokenizer takes."""
    return prompt.encode("utf-8", "replace").decode().strip()


def shown(text: str) -> str:
    """A text as an error names it."""
    return repr(text if len(text) <= 60 else f"{text[:50]}...")
