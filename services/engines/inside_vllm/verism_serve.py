"""vLLM's own OpenAI-compatible server with one more route, for Verism's engine: several questions of one kind a request, in msgpack.

Runs in .venv-vllm and imports nothing of Verism. Pictures come as raw pixels, a text is rendered by vLLM's own chat template and cut into
tokens once, and the engine works on the first questions while the next are prepared; the answers look like those of
/v1/chat/completions, prompts' log-probabilities as one number a token, the first one null. Where vLLM is built otherwise the route is
missing, and the caller takes vLLM's own ones.
"""

import asyncio
import json
import math
import os
import runpy
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

ROUTE = "/v1/verism/questions"
LOWEST = -9999.0  # what vLLM's routes say for minus infinity
AT_ONCE = 6  # questions that are prepared before they are handed to the engine together
_TEXTS = 4096


def parted(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """The messages with an empty picture for each of theirs, and the pictures' parts."""
    pictures: list[Mapping[str, Any]] = []

    def emptied(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part.get("type") != "image_url":
            return part
        pictures.append(part)
        return {"type": "image_url", "image_url": None, "uuid": "0"}

    texts = [
        {**one, "content": [emptied(p) for p in one["content"]] if isinstance(one["content"], list) else one["content"]}
        for one in messages
    ]
    return texts, pictures


def told(output: Any, prompt: bool) -> list[dict[str, Any]]:
    """The choices of one question."""
    rows = []
    for one in output.outputs:
        top = [{"token": f"token_id:{token}", "logprob": _finite(p.logprob)} for token, p in (one.logprobs or [{}])[0].items()]
        row = {"index": one.index, "message": {"content": one.text}, "finish_reason": one.finish_reason}
        rows.append(row | {"logprobs": {"content": [{"top_logprobs": top}]}})
    if prompt:
        ids = list(output.prompt_token_ids)
        found = [row[token].logprob if row else None for row, token in zip(output.prompt_logprobs, ids, strict=True)]
        rows[0] |= {"prompt_token_ids": ids, "prompt_logprobs": [None if one is None else _finite(one) for one in found]}
    return rows


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LOWEST


class Questions:
    """`chat` is vLLM's handler of several conversations."""

    def __init__(self, chat: Any) -> None:
        self.chat, self._texts = chat, OrderedDict[str, Any]()

    async def answer(self, body: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        """Of each question its choices. What vLLM raises for one of them."""
        from vllm import SamplingParams  # type: ignore[import-not-found]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        wanted, running = dict(body["sampling"]), list[asyncio.Task[Any]]()
        room = self.chat.model_config.max_model_len
        try:
            for start in range(0, len(body["messages"]), AT_ONCE):
                ready = [await self._prompt(one, body) for one in body["messages"][start : start + AT_ONCE]]
                for prompt in ready:
                    most = min(wanted["max_tokens"], max(1, room - len(prompt["prompt_token_ids"])))
                    params = SamplingParams(**{**wanted, "max_tokens": most}, output_kind=RequestOutputKind.FINAL_ONLY)
                    running.append(asyncio.create_task(self._last(prompt, params)))
            outputs = await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
        return [told(one, wanted.get("prompt_logprobs") is not None) for one in outputs]

    async def _last(self, prompt: Any, params: Any) -> Any:
        """The whole output, which comes last."""
        outputs = [one async for one in self.chat.engine_client.generate(prompt, params, f"verism-{uuid.uuid4().hex}")]
        return outputs[-1]

    async def _prompt(self, messages: Sequence[Mapping[str, Any]], body: Mapping[str, Any]) -> Any:
        """What the engine takes."""
        from PIL import Image

        texts, pictures = parted(messages)
        opening = {key: body[key] for key in ("add_generation_prompt", "continue_final_message")}
        key = json.dumps([texts, opening])
        if key not in self._texts:
            self._texts[key] = await self._rendered(texts, {"model": body["model"], **opening})
            while len(self._texts) > _TEXTS:
                self._texts.popitem(last=False)
        ids, tok_params = self._texts[key]
        self._texts.move_to_end(key)
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if pictures:
            made = [
                one["image_url"] and Image.frombytes("RGB", tuple(one["image_url"]["size"]), one["image_url"]["rgb"])
                for one in pictures
            ]
            prompt |= {"multi_modal_data": {"image": made}, "multi_modal_uuids": {"image": [one["uuid"] for one in pictures]}}
        return await self.chat.renderer.process_for_engine_async(prompt, time.time(), tok_params=tok_params)

    async def _rendered(self, texts: list[dict[str, Any]], fields: dict[str, Any]) -> tuple[list[int], Any]:
        """Token ids with one for each picture, as vLLM's chat route makes them, and how it cuts texts."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest  # type: ignore[import-not-found]

        online, renderer = self.chat.online_renderer, self.chat.renderer
        request = ChatCompletionRequest(messages=texts, **fields)
        params = request.build_chat_params(online.chat_template, online.chat_template_content_format)
        params = params.with_defaults({**(online.default_chat_template_kwargs or {}), "tools": None, "tokenize": False})
        tok_params = request.build_tok_params(self.chat.model_config)
        _, prompt = await renderer.render_messages_async(texts, params)
        plain = {"prompt": prompt["prompt"]}
        (tokens,) = await renderer.tokenize_prompts_async([plain], tok_params)
        return list(tokens["prompt_token_ids"]), tok_params


def add_route() -> None:
    """Onto vLLM's router of chats."""
    import msgspec
    from fastapi import Request, Response
    from vllm.entrypoints.openai.chat_completion.api_router import router  # type: ignore[import-not-found]
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation  # type: ignore[import-not-found]
    from vllm.v1.engine.exceptions import EngineDeadError  # type: ignore[import-not-found]

    known: dict[int, Questions] = {}

    @with_cancellation  # type: ignore[untyped-decorator]
    async def answered(body: Mapping[str, Any], raw_request: Request) -> list[list[dict[str, Any]]]:
        chat = raw_request.app.state.openai_serving_chat_batch
        return await known.setdefault(id(chat), Questions(chat)).answer(body)

    @router.post(ROUTE)  # type: ignore[untyped-decorator]
    async def questions(raw_request: Request) -> Response:
        try:
            found = await answered(msgspec.msgpack.decode(await raw_request.body()), raw_request)
            status, content = 200, {"answers": found}
        except EngineDeadError as error:
            status, content = 500, {"error": {"message": str(error)}}
        except (ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
            status, content = 400, {"error": {"message": str(error)}}
        return Response(msgspec.msgpack.encode(content), status, media_type="application/msgpack")


def in_one_process() -> None:
    """On a CPU whose threads are bound to no core, the model runs in the engine's process: a worker of its own would spin on a core that the
    server needs, waiting for the engine's next word. vLLM gives it one because that is how it binds threads."""
    from vllm.platforms.cpu import CpuPlatform  # type: ignore[import-not-found]

    original = CpuPlatform.check_and_update_config.__func__

    def check(cls: Any, config: Any) -> None:
        original(cls, config)
        if config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"

    CpuPlatform.check_and_update_config = classmethod(check)


if __name__ == "__main__":
    for change in (add_route, *([in_one_process] if os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind" else [])):
        try:
            change()
        except (ImportError, AttributeError):
            pass
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
