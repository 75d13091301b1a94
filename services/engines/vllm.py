"""A vLLM server over its OpenAI-compatible API: at a URL, or a supervised child on loopback. vLLM batches; here only questions go out.

A picture travels once: as a lossless PNG with an id, and after that as its id alone, as long as the server still has it. The server
that Verism starts has a route for many questions with raw pixels (`inside_vllm`), which spares it half of the work; others are asked by
vLLM's own routes. Label log-probabilities are asked for by token id, so none is missing; a server without that field (`dialect: openai`)
gives its likeliest few.
"""

import base64
import io
import json
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, TypeVar

import httpx
import msgspec
from PIL import Image

from services.engines.base import Chat, Echo, Failure, First, Generated, Picture, Sampling, continued, picture_id, too_long
from services.engines.options import EngineOptions, digest, reserved
from shared.vllm_server import Server, free_port

A = TypeVar("A")
log = logging.getLogger("verism.vllm")
_TOP = 20  # what OpenAI's API gives at most
_KNOWN = 16_384
_TOGETHER = (
    6  # questions of one request, where vLLM has its route for several: its engine works on one while its server reads the next
)
_MANY = 48  # of one to the route of inside_vllm, which hands them on piece by piece
OWN = "/v1/verism/questions"
SERVE = Path(__file__).parent / "inside_vllm" / "verism_serve.py"
GONE = Failure("engine-gone", "the judge's engine is not there; it is started again, so ask once more in a minute", retryable=True)


class VllmEngine:
    """`concurrent` questions on their way at once, from a pool of threads that all callers share."""

    def __init__(self, options: EngineOptions, device: str) -> None:
        self.options, self.server, self.weights_sha256 = options, None, None
        self._plain = options.dialect == "openai"
        headers = {}
        if options.url is not None:
            base, self.name, folder = options.url.rstrip("/").removesuffix("/v1"), str(options.model), None
            if options.key_env is not None:
                if not os.environ.get(options.key_env):
                    raise ValueError(f"key_env names {options.key_env}, which is not set; export the server's API key in it")
                headers["authorization"] = f"Bearer {os.environ[options.key_env]}"
        else:
            folder = options.place().absolute()  # the server has another working directory
            self.name, self.weights_sha256 = options.model or folder.name, digest(folder)
            key = secrets.token_urlsafe(24)
            headers["authorization"] = f"Bearer {key}"
            port = options.vllm.port or free_port()
            base = f"http://127.0.0.1:{port}"
            arguments, environment = command(options, str(folder), self.name, port, device)
            wanted = {**environment, "VLLM_API_KEY": key, **options.vllm.environment}
            python = options.vllm.python
            if not python.is_file():
                raise FileNotFoundError(f"no interpreter {python}; `make vllm` builds it, or set vllm.python to one that has vLLM")
            self.server = Server(python, arguments, base, wanted, options.vllm.log, options.vllm.start_s)
        self.reserved = reserved(folder)
        limits = httpx.Limits(max_connections=options.concurrent, max_keepalive_connections=options.concurrent)
        # trust_env would send loopback traffic through a proxy that the environment names
        self._http = httpx.Client(base_url=base, headers=headers, timeout=options.timeout_s, limits=limits, trust_env=False)
        self._pool = ThreadPoolExecutor(options.concurrent, thread_name_prefix="vllm")
        self._known: OrderedDict[str, None] = OrderedDict()
        self._alias: OrderedDict[str, str] = OrderedDict()
        self._carried: dict[str, Future[None]] = {}
        self._lock, self._slots = Lock(), Semaphore(1 + -(-options.concurrent // _TOGETHER))
        self._together, self._own = not self._plain, self.server is not None
        self._ids = lru_cache(8192)(self._tokenized)
        self.context: int | None = None
        if self.server is not None:
            self.server.start()
        try:
            self.context = self._meet()
        except BaseException:
            self.close()
            raise

    def _meet(self) -> int | None:
        """The server's context length; ValueError when it is not there or has another model."""
        try:
            answer = self._http.get("/v1/models")
            answer.raise_for_status()
            models = {str(one["id"]): one.get("max_model_len") for one in answer.json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._http.base_url}v1/models does not answer as an OpenAI-compatible server does ({error})"
            ) from error
        if self.name not in models:
            raise ValueError(f"{self._http.base_url} has no model {self.name!r}; it has: {', '.join(sorted(models))}")
        limit = models[self.name]
        return int(limit) if limit else self.options.context

    @property
    def ready(self) -> bool:
        if self.server is not None:
            return self.server.ready
        try:
            return self._http.get("/v1/models", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def tokens(self, texts: Sequence[str]) -> list[list[int]] | None:
        """ValueError when the server cannot be asked."""
        if self._plain:
            return None
        try:
            return [list(self._ids(json.dumps({"prompt": text, "add_special_tokens": False}))) for text in texts]
        except (httpx.HTTPError, _Refused) as error:
            raise ValueError(
                f"{self._http.base_url}tokenize does not answer ({error}); for other servers: dialect: openai"
            ) from error

    def _tokenized(self, body: str) -> tuple[int, ...]:
        answer = self._http.post("/tokenize", json={"model": self.name, **json.loads(body)})
        if answer.status_code != 200:
            raise _Refused(_failure(answer, self))
        return tuple(int(token) for token in answer.json()["tokens"])

    def first(self, chats: Sequence[Chat], spellings: Sequence[str]) -> list[First | Failure]:
        settings: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": _TOP}
        names = {text: text for text in spellings}
        if not self._plain:
            try:
                ids = [row[0] for row in self.tokens(spellings) or []]
            except ValueError:
                return [self._lost()] * len(chats)
            names = {f"token_id:{token}": text for token, text in zip(ids, spellings, strict=True)}
            settings |= {"logprob_token_ids": sorted(set(ids)), "return_tokens_as_token_ids": True}

        def read(answer: Mapping[str, Any], chat: Chat) -> First:
            top = {
                str(one["token"]): float(one["logprob"]) for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            }
            found = {text: top[name] for name, text in names.items() if name in top}
            return First(found, min(top.values()) if len(found) < len(names) else float("-inf"))

        return self._each(chats, settings, read, together=True)

    def echo(self, chats: Sequence[Chat]) -> list[Echo | Failure]:
        if self._plain:
            raise ValueError("an OpenAI server tells no log-probabilities of a given text; take a vLLM server (dialect: vllm)")
        settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "return_token_ids": True}

        def read(answer: Mapping[str, Any], chat: Chat) -> Echo | Failure:
            tail = self._tail(chat)
            ids = answer["prompt_token_ids"]
            if tuple(ids[-len(tail) :]) != tail:
                return Failure("engine-failed", "the server cut the text into other tokens in this place; report this as a bug")
            rows = answer["prompt_logprobs"][-len(tail) :]  # numbers from our server, from others all that vLLM says of a token
            found = (row[str(token)]["logprob"] if isinstance(row, Mapping) else row for row, token in zip(rows, tail, strict=True))
            return Echo(tuple(float(one) for one in found))

        return self._each(chats, settings, read, together=self._own)

    def _tail(self, chat: Chat) -> tuple[int, ...]:
        """Token ids of the continuation, in its place after the chat template's own."""
        texts = tuple(part for part in chat.parts if isinstance(part, str))
        opened, whole = (
            self._ids(json.dumps({"messages": one.messages(_no_picture), **_opening(one)}))
            for one in (Chat(texts, chat.system), Chat(texts, chat.system, chat.continuation))
        )
        return whole[len(whole) - continued(opened, whole) :]

    def generate(self, chats: Sequence[Chat], sampling: Sampling) -> list[tuple[Generated, ...] | Failure]:
        draws = sampling.n if sampling.temperature > 0 else 1
        settings: dict[str, Any] = {"n": draws, "temperature": sampling.temperature, "seed": sampling.seed, "top_p": 1.0}
        settings["max_tokens"] = sampling.max_tokens

        def read(answer: Mapping[str, Any], chat: Chat) -> tuple[Generated, ...]:
            rows = sorted(answer["choices"], key=lambda one: int(one["index"]))
            told = tuple(Generated(str(one["message"]["content"] or ""), one["finish_reason"] == "stop") for one in rows)
            if len(told) != draws:
                raise ValueError(f"{len(told)} answers instead of {draws}")
            return told * (sampling.n // draws)

        return self._each(chats, settings, read, together=draws == 1 or self._own)

    def _each(
        self,
        chats: Sequence[Chat],
        settings: Mapping[str, Any],
        read: Callable[[Mapping[str, Any], Chat], A | Failure],
        together: bool = False,
    ) -> list[A | Failure]:
        """`together`: several questions a request, so that the server sees them at once and has less to unpack."""

        def part(rows: Sequence[int], names: list[list[str]], mine: set[str], waits: list[Future[None]]) -> list[A | Failure]:
            mine_chats = [chats[i] for i in rows]
            try:
                for other in waits:  # whoever sends this picture was handed to the pool before this part
                    other.exception(self.options.timeout_s)
                with self._slots if len(rows) > 1 else nullcontext():
                    answers = self._asked(mine_chats, names, mine, settings)
            except (httpx.HTTPError, TimeoutError):
                return [self._lost()] * len(rows)
            finally:
                with self._lock:
                    for name in mine:
                        self._carried.pop(name).set_result(None)
            return [
                answer if isinstance(answer, Failure) else self._read(read, answer, chat)
                for answer, chat in zip(answers, mine_chats, strict=True)
            ]

        futures: list[tuple[list[int], Future[list[A | Failure]]]] = []
        most = _MANY if self._own else _TOGETHER if self._together else 1
        for rows in _parts(chats, most if together else 1):
            names = [[] if self._plain else [picture_id(image) for image in chats[i].images] for i in rows]
            with self._lock:
                new = {name for several in names for name in several if name not in self._known}
                mine, waits = {n for n in new if n not in self._carried}, [self._carried[n] for n in new if n in self._carried]
                self._carried |= {name: Future() for name in mine}
                try:
                    futures.append((rows, self._pool.submit(part, rows, names, mine, waits)))
                except RuntimeError:  # closed
                    for name in mine:
                        self._carried.pop(name).set_result(None)
                    return [GONE] * len(chats)
        out = {i: answer for rows, future in futures for i, answer in zip(rows, future.result(), strict=True)}
        return [out[i] for i in range(len(chats))]

    def _read(self, read: Callable[[Mapping[str, Any], Chat], A | Failure], answer: Mapping[str, Any], chat: Chat) -> A | Failure:
        try:
            return read(answer, chat)
        except _Refused as refused:
            return refused.failure
        except httpx.HTTPError:
            return self._lost()
        except (KeyError, IndexError, TypeError, ValueError) as error:
            log.warning("an answer of %s cannot be read: %s: %s", self._http.base_url, type(error).__name__, error)
            return Failure("engine-failed", "the engine's answer lacks what was asked for; is it a vLLM server of 0.11 or later?")

    def _asked(
        self, chats: Sequence[Chat], names: Sequence[list[str]], mine: set[str], settings: Mapping[str, Any]
    ) -> list[Mapping[str, Any] | Failure]:
        """The server's answer to each; of several together, where one that cannot be answered is the end of all, one by one then.
        What httpx raises."""
        if (self._own or len(chats) > 1) and (self.server is None or self.server.ready):
            with self._lock:
                whole = {name for several in names for name in several if name in mine or name not in self._known}
            left = set(whole)
            bodies = []
            for chat, several in zip(chats, names, strict=True):
                bodies.append(self._body(chat, several, left & set(several), settings, raw=self._own))
                left -= set(several)  # later ones name it
            answers = self._many(bodies, settings)
            if answers is not None:
                self._has(name for several in names for name in several)
                return answers
            self._rename(whole)
        out: list[Mapping[str, Any] | Failure] = []
        for chat, several in zip(chats, names, strict=True):
            try:
                out.append(self._ask(chat, several, mine, settings))
            except _Refused as refused:
                out.append(refused.failure)
        return out

    def _many(self, bodies: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> list[Mapping[str, Any] | Failure] | None:
        """Several answers of one request; None where they have to be asked one by one."""
        messages = {"messages": [body["messages"] for body in bodies]}
        if self._own:
            kept = ("model", "add_generation_prompt", "continue_final_message")
            body = {**{key: bodies[0][key] for key in kept}, **messages, "sampling": _sampling(settings)}
            sent = msgspec.msgpack.encode(body)
            answer = self._http.post(OWN, content=sent, headers={"content-type": "application/msgpack"})
            if answer.status_code in (404, 405):  # a vLLM that is built otherwise
                self._own = False
            if answer.status_code != 200:
                return None
            return [{"choices": rows, **rows[0]} for rows in msgspec.msgpack.decode(answer.content)["answers"]]
        answer = self._http.post("/v1/chat/completions/batch", json={**bodies[0], **messages})
        if answer.status_code in (404, 405):  # an older server
            self._together = False
        if answer.status_code != 200:
            return None
        rows = sorted(answer.json()["choices"], key=lambda one: int(one["index"]))
        return [{"choices": [row], **row} for row in rows] if len(rows) == len(bodies) else None

    def _ask(self, chat: Chat, names: list[str], mine: set[str], settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The server's answer; pictures that it does not have any more are sent again. _Refused, or what httpx raises."""
        if self.server is not None and not self.server.ready:
            raise _Refused(GONE)
        with self._lock:
            whole = {name for name in names if name in mine or name not in self._known}
        answer = self._http.post("/v1/chat/completions", json=self._body(chat, names, whole, settings))
        if answer.status_code == 400 and "cache miss" in answer.text.lower() and len(whole) < len(set(names)):
            answer = self._http.post("/v1/chat/completions", json=self._body(chat, names, set(names), settings))
        if answer.status_code == 500 and names and (self.server is None or self.server.ready):
            self._rename(names)
            answer = self._http.post("/v1/chat/completions", json=self._body(chat, names, set(names), settings))
        if answer.status_code != 200:
            raise _Refused(_failure(answer, self))
        self._has(names)
        told: Mapping[str, Any] = answer.json()
        return told

    def _rename(self, names: Iterable[str]) -> None:
        """vLLM counts the pictures of a question that it refused as known, though its engine never got them: then 500 is all that it says
        of their ids."""
        with self._lock:
            for name in names:
                self._alias[name] = secrets.token_hex(16)
            while len(self._alias) > _KNOWN:
                self._alias.popitem(last=False)

    def _has(self, names: Iterable[str]) -> None:
        """The server has these pictures."""
        with self._lock:
            for name in names:
                self._known[name] = None
                self._known.move_to_end(name)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)

    def _body(
        self, chat: Chat, names: list[str], whole: set[str], settings: Mapping[str, Any], raw: bool = False
    ) -> dict[str, Any]:
        left = iter(names)

        def picture(image: Picture) -> dict[str, Any]:
            if self._plain:
                return {"type": "image_url", "image_url": {"url": data_url(image)}}
            name = next(left)
            url = (pixels(image) if raw else {"url": data_url(image)}) if name in whole else None
            return {"type": "image_url", "image_url": url, "uuid": self._alias.get(name, name)}

        body = {"model": self.name, "messages": chat.messages(picture), **settings}
        return body if self._plain else {**body, **_opening(chat), "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

    def _lost(self) -> Failure:
        with self._lock:
            self._known.clear()
        return GONE


class _Refused(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.title)
        self.failure = failure


def _parts(chats: Sequence[Chat], most: int) -> list[list[int]]:
    """Positions in parts of about one size, at most `most`; chats that go on, and chats that do not, are never together."""
    out: list[list[int]] = []
    for rows in ([i for i, chat in enumerate(chats) if (chat.continuation is None) is plain] for plain in (True, False)):
        count = -(-len(rows) // most)
        out += [rows[len(rows) * k // count : len(rows) * (k + 1) // count] for k in range(count)]
    return out


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the chat route's settings those of vLLM's SamplingParams."""
    kept = {
        key: settings[key]
        for key in ("n", "temperature", "seed", "top_p", "max_tokens", "prompt_logprobs", "logprob_token_ids")
        if key in settings
    }
    return kept | {"detokenize": "logprob_token_ids" not in kept and "prompt_logprobs" not in kept}


def _opening(chat: Chat) -> dict[str, bool]:
    goes_on = chat.continuation is not None
    return {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}


def _no_picture(image: Picture) -> Any:
    raise AssertionError("only texts are counted")


def pixels(image: Picture) -> dict[str, Any]:
    """Width and height, and the rows of RGB."""
    return {"size": (image.shape[1], image.shape[0]), "rgb": image.tobytes()}


def data_url(image: Picture) -> str:
    """A lossless PNG, lightly packed: packing harder takes longer than sending."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def command(options: EngineOptions, folder: str, name: str, port: int, device: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the server. Its sampling defaults are vLLM's, not those that a checkpoint brings."""
    own = options.vllm
    arguments = [str(SERVE), "--model", folder, "--served-model-name", name]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype, "--max-num-seqs", str(own.max_num_seqs)]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": own.images, "video": 0}), "--max-logprobs", "32"]
    arguments += ["--generation-config", "vllm", "--uvicorn-log-level", "warning", "--disable-log-stats"]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if options.context is not None:
        arguments += ["--max-model-len", str(options.context)]
    if options.processor:
        arguments += ["--mm-processor-kwargs", json.dumps(options.processor)]
    if own.eager:
        arguments.append("--enforce-eager")
        environment["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles small functions even so, for minutes on a CPU
    if device.startswith("cpu"):
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(own.cpu_cache_gib)
    elif own.memory is not None:
        arguments += ["--gpu-memory-utilization", f"{own.memory:g}"]
    return [*arguments, *own.extra], environment


def _failure(answer: httpx.Response, engine: VllmEngine) -> Failure:
    """What an error of the server means for the item. Its own words go to the log."""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.text[:500]
    said, status = message.lower(), answer.status_code
    log.warning("%s says %d: %s", engine.name, status, message[:500])
    if status in (401, 403):
        return Failure("engine-key", "the judge's server refuses the key; set `key_env` to the variable that holds the right one")
    if status == 404:
        return Failure("engine-failed", f"the judge's server has no model {engine.name!r} any more, or no such route")
    if status in (408, 429, 503):
        return Failure("engine-busy", "the judge's server is busy; ask again", retryable=True)
    if "out of memory" in said or "can't allocate memory" in said:
        return Failure("engine-out-of-memory", "the judge's engine has not enough memory for this item; send a smaller picture")
    if status >= 500:
        return GONE
    if "context length" in said or "max_model_len" in said or "maximum model length" in said:
        return too_long(None, engine.context)
    if "image(s) may be provided" in said:
        return Failure("too-many-images", "more pictures in one question than the server takes; set vllm.images to a larger number")
    if "processor" in said or "image" in said:
        return Failure("question-refused", "the model's processor refuses a picture of this item; are its sides too unlike?")
    return Failure("engine-failed", "the judge's server refuses this question; the service's log says why")
