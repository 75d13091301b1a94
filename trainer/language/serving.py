"""How a vLLM server that rewrites is started: as an engine's child, or by hand where it can see the exchange folder:
`python -m trainer.language.serving FOLDER --port 8010 --rank 16`.

Then the engine is told its `url`, and the key in the variable that `key_env` names.
"""

import argparse
import os
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as the largest
LOOPBACK = "127.0.0.1"
CHILD = ("python", "port", "context", "memory", "cpu_cache_gib", "max_num_seqs", "eager", "extra", "environment", "start_s", "log")


class VllmOptions(BaseModel):
    """Of the engine that samples by vLLM. Without a `url` a server is started here, and started again when it dies."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    url: str | None = Field(default=None, pattern=r"^https?://[^\s]+$", description="a running server, e.g. http://gpu1:8010")
    key_env: str | None = Field(default=None, description="url: environment variable with the server's key")
    exchange: Path | None = Field(
        default=None, description="folder for weights on their way, which both sides see; default: one under the temporary folder"
    )
    checksum: bool = Field(
        default=True, description="ask what the server holds; off only for a LoRA on a server that was not started by serving.py"
    )
    band: float | None = Field(
        default=None, gt=0, description="largest difference of log-probabilities; default: 2e-4 in float32, 0.2 in half precision"
    )
    concurrent: int = Field(default=64, ge=1, le=1024, description="rewrites on their way at once")
    timeout_s: float = Field(default=600.0, gt=0, description="longest wait for one answer")
    outage_s: float = Field(default=900.0, gt=0, description="longest wait for a server that is gone")
    python: Path = Field(default=ROOT / ".venv-vllm" / "bin" / "python", description="interpreter that has vLLM: `make vllm`")
    port: int | None = Field(default=None, ge=1, le=65535, description="loopback port of the server; default: any free one")
    context: int | None = Field(default=None, ge=16, description="longest prompt and rewrite in tokens; default: the model's")
    memory: float | None = Field(default=None, gt=0, le=1, description="share of a GPU's memory; default: vLLM's")
    cpu_cache_gib: int = Field(default=1, ge=1, description="on a CPU: memory for attention's cache")
    max_num_seqs: int = Field(default=64, ge=1, description="most rewrites in one forward pass")
    eager: bool | None = Field(default=None, description="neither compiled nor captured; default: so on a CPU")
    extra: tuple[str, ...] = Field(default=(), description="further arguments of `vllm serve`")
    environment: dict[str, str] = Field(default={}, description="further environment variables of the server")
    start_s: float = Field(default=900.0, gt=0, description="longest start-up")
    log: Path | None = Field(default=None, description="file for what the server says; default: one under the temporary folder")

    @model_validator(mode="after")
    def _of_one_kind(self) -> "VllmOptions":
        if self.url is not None and (told := [name for name in CHILD if name in self.model_fields_set]):
            raise ValueError(f"with a `url` no server is started: leave {', '.join(told)} away")
        if self.url is None and (told := [name for name in ("key_env", "checksum") if name in self.model_fields_set]):
            raise ValueError(f"{', '.join(told)}: for a server at a `url`; without one, leave it away")
        return self


def command(
    options: VllmOptions,
    model: str,
    port: int,
    *,
    rank: int | None,
    dtype: str,
    cpu: bool,
    host: str = LOOPBACK,
    revision: str | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Arguments for the interpreter that has vLLM, and its environment; `rank` is the LoRA's, None where whole models are pushed.
    ValueError for a rank that vLLM does not take."""
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", host, "--port", str(port)]
    arguments += ["--served-model-name", "base", "--dtype", dtype, "--max-num-seqs", str(options.max_num_seqs)]
    # What is trained is the whole distribution: no checkpoint's own sampling settings, log-probabilities at the temperature of the draw.
    arguments += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    arguments += ["--worker-extension-cls", "verism_weights.Weights", "--middleware", "verism_weights.Guard"]
    arguments += ["--uvicorn-log-level", "warning", "--disable-log-stats"]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1"}
    environment["PYTHONPATH"] = str(HERE / "inside_vllm")
    if rank is not None:
        if rank > RANKS[-1]:
            raise ValueError(
                f"vLLM takes LoRAs up to rank {RANKS[-1]}, this one has {rank}; sample by transformers, or train a smaller one"
            )
        arguments += ["--enable-lora", "--max-lora-rank", str(next(r for r in RANKS if r >= rank)), "--max-loras", "1"]
        arguments += ["--max-cpu-loras", "2"]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if revision is not None:
        arguments += ["--revision", revision, "--tokenizer-revision", revision]
    if options.context is not None:
        arguments += ["--max-model-len", str(options.context)]
    if cpu if options.eager is None else options.eager:
        arguments.append("--enforce-eager")
        environment["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles small functions even so, for minutes on a CPU
    if cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_cache_gib)
    elif options.memory is not None:
        arguments += ["--gpu-memory-utilization", f"{options.memory:g}"]
    return [*arguments, *options.extra], environment | options.environment


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    own, extra = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(
        prog="python -m trainer.language.serving", epilog="After --: further arguments of vLLM's server."
    )
    parser.add_argument("model", type=Path, help="folder of the base model, as transformers saves it")
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--rank", type=int, help="of the LoRA that is trained; without it whole models are pushed")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--cpu", action="store_true", help="vLLM for CPUs")
    told = parser.parse_args(own)
    if not os.environ.get("VLLM_API_KEY"):
        parser.error("set VLLM_API_KEY: whoever has the key can change the weights")
    options = VllmOptions(extra=tuple(extra))
    if not options.python.is_file():
        parser.error(f"no interpreter {options.python}; `make vllm` builds it")
    model = str(told.model.resolve())
    arguments, environment = command(options, model, told.port, rank=told.rank, dtype=told.dtype, cpu=told.cpu, host=told.host)
    os.execve(options.python, [str(options.python), *arguments], {**os.environ, **environment})
    return 0


if __name__ == "__main__":
    sys.exit(main())
