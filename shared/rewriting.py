"""What who trains a rewriter and who serves one agree on: the chat that asks for a rewrite, and what of the answer is the rewrite.

>>> clean('Sure! Here is the prompt:\\n\\n"A brown dog running on a beach at dusk."').text
'A brown dog running on a beach at dusk.'
>>> fault("a dog on a beach", "A photo of a red car.")
'subject'

Pure text: no model, no tokenizer. Whatever comes in may be hostile.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from shared.schema import PROMPT_BYTES

# As trainer/language/instructions/realism.txt says it; a test compares the two.
INSTRUCTION = (
    "You rewrite prompts for an image generator, so that its pictures look like real photographs. Keep what the user asks for: "
    "every subject, its number, its colour and quoted text. Add in a few words what a camera would see: place, light, surface, "
    "small flaws. Answer with the new prompt alone, one sentence."
)

Fault = Literal["empty", "refusal", "repeats", "instruction", "same", "subject", "too-long"]
FAULTS: dict[str, str] = {
    "empty": "nothing is left of the answer",
    "refusal": "the model declined",
    "repeats": "it repeats itself",
    "instruction": "it quotes the instruction",
    "same": "it is the user's own prompt",
    "subject": "no word of what the user asked for is left",
    "too-long": f"it is longer than {PROMPT_BYTES} bytes",
}
assert set(FAULTS) == set(get_args(Fault))

_THOUGHT = re.compile(r"<(think|thinking|reasoning|thought)>.*?(?:</\1>|\Z)", re.S | re.I)
_FENCE = re.compile(r"^\s*```[\w-]*\s*$", re.M)
_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>")
_ITEM = re.compile(r"^\s*(?:[-*+\u2022\u2013\u2014]|\(?[0-9]{1,2}[.):]|#{1,6})\s+(?=\S)")
_OPENING = re.compile(
    r"(?:sure|certainly|of course|okay|ok|absolutely)(?: thing)?(?:[.!,:]\s*|\s*$)"
    r"|(?:here(?:'s|\u2019s| is| are)|below is|this is)\b[^\n:]{0,80}\b"
    r"(?:prompt|rewrite|version|description|caption|option|result)s?\b[^\n:]{0,80}:\s*"
    r"|(?:the\s+|my\s+|your\s+)?(?:(?:re-?written|new|final|improved|enhanced|refined|revised|updated|detailed|image|optimi[sz]ed)\s+)*"
    r"(?:prompt|rewrite|description|version|caption|output|answer|result)(?:\s*\(?[0-9]{1,2}\)?)?\s*:\s*",
    re.I,
)
_CLOSING = re.compile(
    r"(?:notes?|explanation)\s*:|(?:(?:i|we) (?:hope|have|added|kept)|let me know|feel free|this (?:prompt|rewrite|version))\b",
    re.I,
)
_REFUSAL = re.compile(
    r"(?:(?:i am|i(?:'|\u2019)?m) (?:sorry|not able|unable)|sorry,|i cannot|i can(?:'|\u2019)t|as an ai\b)",
    re.I,
)
_QUOTES = {
    '"': '"',
    "'": "'",
    "`": "`",
    "\u201c": "\u201d",
    "\u2018": "\u2019",
    "\u00ab": "\u00bb",
    "\u201e": "\u201c",
    "\u300c": "\u300d",
}
# Words that carry no subject: articles, prepositions, pronouns, and what every picture is called.
_PLAIN = frozenset(
    re.findall(
        r"\w+",
        "a an the of on in at by for from to with without and or but is are was were be been being it its this that these those there here as "
        "into onto over under near next i me my we our you your he she they his her their them some any one two no not very so too can could "
        "would should want need like make show give please something photo photos photograph photographs photography picture pictures image "
        "images drawing painting shot style",
    )
)
_LETTERS = frozenset(
    ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
)  # without spaces: a letter counts as a word


@dataclass(frozen=True)
class Cleaned:
    """The rewrite, of one line, and what was taken away: thinking, fence, marks, opening, list, notes, markup, quotes."""

    text: str
    removed: tuple[str, ...] = ()


def messages(instruction: str, prompt: str, system: bool = True) -> list[dict[str, str]]:
    """The chat: the instruction as the system's message, or in front of the user's prompt; without an instruction the prompt alone."""
    if not instruction.strip():
        return [{"role": "user", "content": prompt}]
    if system:
        return [{"role": "system", "content": instruction}, {"role": "user", "content": prompt}]
    return [{"role": "user", "content": f"{instruction}\n\n{prompt}"}]


def takes_system(render: Callable[[Sequence[dict[str, str]]], str]) -> bool:
    """Whether a chat template shows what the system says; some drop it, some refuse the role."""
    word = "rewriting-probe"
    try:
        return word in render(messages(word, "a"))
    except Exception:  # a template raises what it likes: jinja's errors, or those of the code that it calls
        return False


def row_seed(seed: int, prompt: str, copy: int) -> int:
    """Of one rewrite: a function of the caller's seed, the prompt and the copy's number, not of its place among others."""
    digest = hashlib.sha256(f"rewrite/{seed}/{copy}/{prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def clean(text: str) -> Cleaned:
    """The rewrite alone, on one line, without what models put around it. A thought that never ended leaves nothing."""
    removed: list[str] = []

    def change(name: str, new: str, old: str) -> str:
        if new.strip() != old.strip():
            removed.append(name)
        return new

    text = "".join(c for c in text[: 4 * PROMPT_BYTES] if c == "\n" or not _unseen(c))
    text = change("thinking", _THOUGHT.sub(" ", text), text)
    text = change("fence", _FENCE.sub("", text), text)
    text = change("marks", _MARK.sub(" ", text), text).strip()
    for _ in range(4):  # "Sure! Here is the prompt: ..."
        plain = text.lstrip("*_# \n")
        if (found := _OPENING.match(plain)) is None:
            break
        text = change("opening", plain[found.end() :].lstrip("*_ \n" if plain != text else None), text)
    blocks = [block for block in re.split(r"\n\s*\n", text) if block.strip()]
    lines = [line for line in (blocks[0] if blocks else "").split("\n") if line.strip()]
    if lines and _ITEM.match(lines[0]):  # a list: its first item, which may run over several lines
        stop = next((i for i, line in enumerate(lines[1:], 1) if _ITEM.match(line)), len(lines))
        lines = change("list", "\n".join([_ITEM.sub("", lines[0]), *lines[1:stop]]), text).split("\n")
    elif len(blocks) > 1:
        removed.append("notes" if _CLOSING.match(blocks[1].lstrip("*_# (")) else "paragraphs")
    while len(lines) > 1 and _CLOSING.match(lines[-1].lstrip("*_# (")):
        removed.append("notes")
        lines = lines[:-1]
    line = " ".join(" ".join(lines).split())
    line = change("markup", line.replace("**", "").replace("__", "").strip("*_# "), line)
    while len(line) > 1 and _QUOTES.get(line[0]) == line[-1] and line[-1] not in line[1:-1] and line[0] not in line[1:-1]:
        line = change("quotes", line[1:-1].strip(), line)
    return Cleaned("" if not any(c.isalnum() for c in line) else line, tuple(dict.fromkeys(removed)))


def fault(prompt: str, rewrite: str, instruction: str = "") -> Fault | None:
    """What makes a cleaned rewrite useless, or None. Which words stand for the same thing nobody knows here: see `kept`."""
    if not rewrite:
        return "empty"
    if len(rewrite.encode()) > PROMPT_BYTES:
        return "too-long"
    if _REFUSAL.match(rewrite):
        return "refusal"
    if _folded(rewrite) == _folded(prompt):
        return "same"
    if repeats(rewrite):
        return "repeats"
    if instruction and _quotes(rewrite, instruction):
        return "instruction"
    return "subject" if kept(prompt, rewrite) == 0 and len(_subjects(prompt)) > 1 else None


def repeats(text: str) -> bool:
    """A word four times in a row, or more than half of the word triples seen before."""
    words = _words(text)
    row = longest = 1
    for one, other in pairwise(words):
        row = row + 1 if one == other else 1
        longest = max(longest, row)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return longest >= 4 or (len(triples) >= 8 and len(set(triples)) < 0.5 * len(triples))


def kept(prompt: str, rewrite: str) -> float | None:
    """Share in [0, 1] of the prompt's content words that the rewrite has too, up to their endings; None where words cannot tell: the
    prompt has none, or the rewrite is in another script. A synonym counts as lost, so a small share proves little and none at all a bit."""
    wanted, there = _subjects(prompt), _words(rewrite)
    scripts = {_script(word) for word in wanted}
    if not wanted or not scripts & {_script(word) for word in there}:
        return None
    return sum(any(_same(word, other) for other in there) for word in wanted) / len(wanted)


def _subjects(text: str) -> list[str]:
    return [
        word for word in dict.fromkeys(_words(text)) if word not in _PLAIN and not word.isdecimal() and _script(word) != "HIRAGANA"
    ]


def _words(text: str) -> list[str]:
    """Case folded, without punctuation; in scripts without spaces each letter by itself."""
    out = []
    for run in re.split(r"[\s\u2010-\u2015/-]+", unicodedata.normalize("NFKC", text).casefold()):
        word = run.strip("".join(c for c in set(run) if not _letter(c)))
        out += [c for c in word if _letter(c)] if any(_script(c) in _LETTERS for c in word) else [word] if word else []
    return out


def _letter(char: str) -> bool:
    return unicodedata.category(char)[0] in "LNM"


def _script(word: str) -> str:
    return next((unicodedata.name(c, "?").split(" ")[0] for c in word if c.isalpha()), "")


def _same(word: str, other: str) -> bool:
    """beach and beaches, city and cities."""
    short = min(len(word), len(other))
    if short < 3:
        return word == other
    stem = max(3, short - 1)
    return word[:stem] == other[:stem] and abs(len(word) - len(other)) <= 4


def _folded(text: str) -> str:
    return " ".join(_words(text))


def _quotes(text: str, instruction: str, length: int = 8) -> bool:
    """So many words of the instruction in a row."""
    words, told = _words(text), _words(instruction)
    runs = {tuple(told[i : i + length]) for i in range(len(told) - length + 1)}
    return any(tuple(words[i : i + length]) in runs for i in range(len(words) - length + 1))


def _unseen(char: str) -> bool:
    """Control letters, and those that turn the direction of a line; joiners of Indic scripts and of emoji stay."""
    return (
        unicodedata.category(char) in ("Cc", "Cs", "Cn", "Co") and not char.isspace()
    ) or char in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
