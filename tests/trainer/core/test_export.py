"""A run's LoRA for others: diffusers reads both formats back to the same velocity, ComfyUI knows the names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.trainer import tiny_families
from tests.trainer.core.test_families import LENGTHS, build, push, velocity
from trainer import checkpoint
from trainer.config import ConfigError
from trainer.export import FORMATS, export_adapter
from trainer.registry import resolve

# What `model_lora_keys_unet` of ComfyUI's comfy/lora.py gives a name (read in its source, July 2026): mmdit_to_diffusers and
# flux_to_diffusers behind `transformer.`, z_image_to_diffusers behind `diffusion_model.`, and for Qwen-Image, whose layers are named as in
# diffusers, the names of its own weights.
JOINT = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
COMFYUI = {
    "flux": rf"transformer\.(transformer_blocks\.\d+\.({JOINT}|(ff|ff_context)\.net\.(0\.proj|2))|single_transformer_blocks\.\d+\.{JOINT})",
    "qwen_image": rf"diffusion_model\.transformer_blocks\.\d+\.({JOINT}|(img|txt)_mlp\.net\.(0\.proj|2))",
    "sd3": rf"transformer\.transformer_blocks\.\d+\.{JOINT}",
    "z_image": r"diffusion_model\.(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])",
}


def run_of(policy: Any, family: str, folder: Path, **lora: Any) -> Path:
    """A run folder with nothing but its configuration."""
    folder.mkdir()
    config = {
        "name": family,
        "policy": {"use": family, "path": policy.options.path, "max_sequence_length": LENGTHS[family], "lora": lora},
        "prompts": {"train": "world/prompts/train.jsonl", "eval": "world/prompts/eval.jsonl"},
        "rewards": {"detector": {"url": "http://127.0.0.1:1"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def loaded(policy: Any, family: str, file: Path) -> torch.Tensor:
    """Velocity of the bare base with the file loaded by diffusers."""
    fresh = resolve("policy", family).load(policy.options.path, max_sequence_length=LENGTHS[family], lora={"rank": 1, "alpha": 1})
    fresh.transformer.delete_adapters("default")
    fresh.pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    return velocity(fresh)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_diffusers_reads_both_formats_back(family: str, tmp_path: Path) -> None:
    policy = build(tmp_path / "base", family=family, lora={"rank": 2, "alpha": 6})
    run = run_of(policy, family, tmp_path / "run", rank=2, alpha=6)
    bare = velocity(policy)
    push(policy)
    trained = velocity(policy)
    assert (trained - bare).abs().max() > 1e-2
    average = {f"ema/{name}": p for name, p in policy.trainable().items()}
    checkpoint.save(run, 3, average, {"step": 3})
    files = {format: export_adapter(run, tmp_path / f"{format}.safetensors", format) for format in FORMATS}
    policy.save_adapter(run / "adapter")
    for format, file in files.items():
        torch.testing.assert_close(loaded(policy, family, file), trained, rtol=1e-4, atol=1e-5)
        again = export_adapter(run, tmp_path / "finished" / format, format)  # from adapter/, into a folder
        written, finished = load_file(file), load_file(again)
        assert again.name == "pytorch_lora_weights.safetensors" and written.keys() == finished.keys()
        assert all(torch.equal(written[name], finished[name]) for name in written)
    names = load_file(files["comfyui"]).keys()
    assert len(names) == len(policy.trainable())
    assert all(re.fullmatch(rf"{COMFYUI[family]}\.lora_[AB]\.weight", name) for name in names)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_an_exported_adapter_is_one_to_start_from(family: str, format: str, tmp_path: Path) -> None:
    policy = build(tmp_path / "base", family=family, lora={"rank": 2, "alpha": 6})
    push(policy)
    run = run_of(policy, family, tmp_path / "run", rank=2, alpha=6)
    policy.save_adapter(run / "adapter")
    file = export_adapter(run, tmp_path / "out", format)
    options = {"max_sequence_length": LENGTHS[family], "lora": {"rank": 2, "alpha": 4, "start": str(file)}}
    on = resolve("policy", family).load(tmp_path / "base", **options)
    begun = velocity(on)
    torch.testing.assert_close(begun, velocity(policy), rtol=1e-4, atol=1e-5)
    assert on.fingerprint() != policy.fingerprint()
    push(on)
    assert (velocity(on) - begun).abs().max() > 1e-3
    with on.reference():
        assert torch.equal(velocity(on), begun), "the reference is the LoRA that it started from"
    assert all(p.requires_grad and p.dtype == torch.float32 for p in on.trainable().values())


def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    policy = build(tmp_path / "base")
    policy.save_adapter(tmp_path / "own")

    def start(path: Path, family: str = "sd3", **lora: Any) -> None:
        base = tmp_path / family
        if not base.exists():
            tiny_families.write(family, base)
        given = {"rank": 2, "alpha": 4, "start": str(path), **lora}
        resolve("policy", family).load(base, max_sequence_length=LENGTHS[family], lora=given)

    start(tmp_path / "own")
    with pytest.raises(FileNotFoundError, match="policy.lora.start: no LoRA at .*give a .safetensors file"):
        start(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"has rank \[2\]: set policy.lora.rank to it"):
        start(tmp_path / "own", rank=4)
    with pytest.raises(ConfigError, match="adapts other layers than policy.lora.targets"):
        start(tmp_path / "own", targets=["attn.to_q"])
    with pytest.raises(ConfigError, match="adapts other layers than policy.lora.targets"):
        start(tmp_path / "own", "flux")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(ConfigError, match="is not a LoRA for StableDiffusion3Pipeline"):
        start(tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match="policy.lora.targets: no layer of this transformer ends in 'attn.to_x'"):
        build(tmp_path / "again", lora={"rank": 2, "alpha": 4, "targets": ["attn.to_q", "attn.to_x"]})


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    policy = build(tmp_path / "base")
    run = run_of(policy, "sd3", tmp_path / "run", rank=2, alpha=4)
    with pytest.raises(ConfigError, match="unknown format 'kohya'; known: diffusers, comfyui"):
        export_adapter(run, tmp_path / "out", "kohya")
    with pytest.raises(ConfigError, match="no run folder: config.yaml is missing"):
        export_adapter(tmp_path / "base", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"sd3: no checkpoint in .*first"):
        export_adapter(run, tmp_path / "out")
    checkpoint.save(run, 4, {f"ema/{k}": v for k, v in policy.trainable().items()}, {})
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": 4}))
    with pytest.raises(ConfigError, match="no checkpoint after step 7 .*there are 4"):
        export_adapter(run, tmp_path / "out", step=7)
    assert export_adapter(run, tmp_path / "out", step=4).is_file()
    (run / "adapter").mkdir()
    (run / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read .*remove it to export from a checkpoint"):
        export_adapter(run, tmp_path / "out")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["policy"]["lora"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"trained every weight: its whole transformer is in .*adapter/transformer"):
        export_adapter(run, tmp_path / "out")
