"""Judges through HTTP against a plain loop and against vLLM's own batches: `make bench-judges`, or `python -m bench.judges --rounds 5`.

Three questions about a group of 24 pictures of one prompt: the first token (forensic_chat), the prompt's log-probability (prompt_echo),
and a tournament of all pairs in both orders (unified_compare). The loop is what reward servers of diffusion-RL repositories do:
transformers, one question a forward pass. `vllm.LLM.chat` with the same questions at once is the most that a server of vLLM could reach.
All have the same weights and precision, the same questions and one thread; while one is measured, the others are stopped. Rounds are
interleaved, each task of each with other pictures, and ratios are taken within a round. Beside it: what one /score with two rewards takes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.engines.base import Chat, continued
from services.prompts import read

ROOT = Path(__file__).resolve().parents[1]
GROUP, PROMPT = 24, "a photo of a leather bag"
TASKS = {"first token": "forensic_chat", "prompt's log-probability": "prompt_echo", "tournament": "unified_compare"}
LOOP, HERE, VLLM, OFFLINE = "plain loop", "HTTP with transformers", "HTTP with vLLM", "vLLM offline"
Answers = list[list[float]]


def questions(task: str, pictures: Sequence[NDArray[np.uint8]]) -> list[Chat]:
    """As the rewards ask them; of a tournament each pair in both orders."""
    name = TASKS[task]
    if name == "forensic_chat":
        return [read(name, images=1, labels=("real", "fake")).chat([picture]) for picture in pictures]
    if name == "prompt_echo":
        return [read(name).chat([picture], {}, PROMPT) for picture in pictures]
    template = read(name, ("prompt",), 2, ("first", "second"))
    return [template.chat([a, b], {"prompt": PROMPT}) for i, a in enumerate(pictures) for j, b in enumerate(pictures) if i != j]


def spellings(task: str) -> list[str]:
    """The labels' tokens that all contestants read; every one is a single token of the judges used here."""
    return {"forensic_chat": ["real", "Real", "fake", "Fake"], "unified_compare": ["1", "2"]}.get(TASKS[task], [])


def loop(folder: str, dtype: str) -> Callable[[str, Sequence[NDArray[np.uint8]]], Answers]:
    """One question a forward pass: the model card's few lines."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    processor: Any = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def text_of(chat: Chat) -> str:
        goes_on = chat.continuation is not None
        opening = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        return str(processor.apply_chat_template(chat.messages(lambda picture: {"type": "image"}), tokenize=False, **opening))

    @torch.inference_mode()
    def run(task: str, pictures: Sequence[NDArray[np.uint8]]) -> Answers:
        ids = [processor.tokenizer(text, add_special_tokens=False).input_ids[0] for text in spellings(task)]
        out = []
        for chat in questions(task, pictures):
            inputs = processor(text=[text_of(chat)], images=[Image.fromarray(p) for p in chat.images], return_tensors="pt")
            logp_TV = model(**inputs).logits[0].float().log_softmax(-1)
            if chat.continuation is None:
                out.append(logp_TV[-1, ids].tolist())
                continue
            opened, whole = (
                processor.tokenizer(text_of(one), add_special_tokens=False).input_ids
                for one in (Chat(chat.parts, chat.system), chat)
            )
            count = continued(opened, whole)
            tokens_T = inputs["input_ids"][0, -count:]
            out.append(logp_TV[-count - 1 : -1].gather(-1, tokens_T[:, None])[:, 0].tolist())
        return out

    return run


def offline(folder: str, dtype: str) -> Callable[[str, Sequence[NDArray[np.uint8]]], Answers]:
    """All questions at once, in vLLM's own process. Runs in .venv-vllm."""
    import logging

    os.environ |= vllm_environment()
    from PIL import Image
    from vllm import LLM, SamplingParams

    logging.disable(logging.WARNING)
    llm = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=CONTEXT,
        max_num_seqs=SEQUENCES,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 4, "video": 0},
        max_logprobs=32,
        generation_config="vllm",
    )
    tokenizer = llm.get_tokenizer()

    def run(task: str, pictures: Sequence[NDArray[np.uint8]]) -> Answers:
        chats = questions(task, pictures)
        shown = {
            id(picture): {"type": "image_pil", "image_pil": Image.fromarray(picture)} for chat in chats for picture in chat.images
        }
        ids = [tokenizer.encode(text, add_special_tokens=False)[0] for text in spellings(task)]
        goes_on = chats[0].continuation is not None
        settings = {"prompt_logprobs": 0} if goes_on else {"logprobs": len(ids), "logprob_token_ids": ids}
        told = llm.chat(
            [chat.messages(lambda picture: shown[id(picture)]) for chat in chats],
            SamplingParams(temperature=0, max_tokens=1, **settings),
            use_tqdm=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
        )
        if not goes_on:
            return [[one.outputs[0].logprobs[0][token].logprob for token in ids] for one in told]
        count = len(tokenizer.encode(PROMPT, add_special_tokens=False))
        return [
            [row[token].logprob for row, token in zip(one.prompt_logprobs[-count:], one.prompt_token_ids[-count:], strict=True)]
            for one in told
        ]

    return run


CONTEXT, SEQUENCES = 2048, 64


def vllm_environment() -> dict[str, str]:
    """One thread, bound to no core."""
    return {
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def child(kind: str, folder: str, dtype: str) -> None:
    """Each line `{"task", "pictures"}` (a .npy) is answered by seconds and what was answered."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints
    run = {LOOP: loop, OFFLINE: offline}[kind](folder, dtype)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pictures = list(np.load(asked["pictures"]))
        began = time.perf_counter()
        answers = run(asked["task"], pictures)
        print(json.dumps({"seconds": time.perf_counter() - began, "answers": answers}), file=out, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.judges", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="the judge (default world/judge, or, without that, a tiny one of random weights)"
    )
    parser.add_argument("--side", type=int, default=28, help="side of the pictures in pixels (default 28)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts (default 5)")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: all")
    parser.add_argument("--without", default="", help=f"leave away, with commas: {LOOP}, {HERE}, {VLLM}, {OFFLINE}")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="of everybody's weights (default float32)"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return 0
    from bench import judges_report

    tasks, without = arguments.tasks.split(","), arguments.without.split(",")
    return judges_report.run(arguments.folder, arguments.side, arguments.dtype, arguments.rounds, tasks, without)


if __name__ == "__main__":
    sys.exit(main())
