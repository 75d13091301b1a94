"""Who writes: a model here by folder, adapter or run, or a service; what they cost, and what is said when there is none."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from starlette.testclient import TestClient

from services.app import create_app
from services.config import ServiceConfig
from tests.answering import Answering
from tests.trainer.language import tiny
from tests.trainer.run import service
from trainer.config import ConfigError
from trainer.rewrite.writers import LocalWriter, RemoteWriter, Writer, open_writer
from trainer.scoring import NoService

TOLD = "rewrite the prompt"
BAG = "a photo of a bag"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes what is said, as the policy saves it."""
    policy = tiny.policy(folder, instruction=TOLD, lora={"rank": 4, "alpha": 12, "targets": ("q_proj", "down_proj")})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.trainable().items():
        parameter.data += (0.3 if "lora_B" in name else 0.0) * torch.randn(parameter.shape, generator=generator)
    out = tmp_path_factory.mktemp("adapter")
    policy.save(out)
    return out


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    rewriter = {"folder": folder, "instruction": TOLD, "max_new_tokens": 10, "max_prompt_tokens": 128}
    with TestClient(create_app(ServiceConfig.model_validate({"device": "cpu", "rewriter": rewriter}))) as test:
        yield test


def through(client: TestClient) -> httpx.MockTransport:
    """The app without a socket."""

    def answer(request: httpx.Request) -> httpx.Response:
        said = client.request(request.method, request.url.path, content=request.content, headers=dict(request.headers))
        return httpx.Response(said.status_code, content=said.content)

    return httpx.MockTransport(answer)


def here(where: Path | str, **more: Any) -> Writer:
    return open_writer(str(where), device="cpu", most=10, **{"instruction": TOLD, **more})


def said(writer: Writer, n: int = 4, seed: int = 1) -> list[str]:
    return [one.said for one in writer.write(BAG, n, seed, 3.0)]


def test_a_model_here_says_what_its_policy_draws(folder: Path) -> None:
    writer = here(folder)
    assert isinstance(writer, LocalWriter) and writer.most == 10
    written = writer.write(BAG, 5, 2, 3.0)
    assert [one.said for one in written] == said(writer, 5, 2) != said(writer, 5, 3) and len({one.said for one in written}) == 5
    assert said(writer, 2, 2) == said(writer, 5, 2)[:2]  # a rewrite is a function of the seed and its own number
    for one in written:
        assert 1 <= one.tokens <= 10 and one.logp < 0 and one.ended == (one.tokens < 10 or one.ended)
    ids = writer.policy.tokenizer(written[0].said, add_special_tokens=False).input_ids
    assert abs(len(ids) - written[0].tokens) <= 4  # words that the tokenizer does not know are not said


def test_an_adapter_on_its_base(folder: Path, adapter: Path) -> None:
    assert said(here(adapter)) != said(here(folder))  # adapter_config.json says where its base is
    assert said(here(adapter, base=str(folder))) == said(here(adapter))
    with pytest.raises(ConfigError, match="no folder of an adapter"):
        here(folder, base=str(folder))


def test_an_adapter_of_a_model_that_is_not_here(adapter: Path, tmp_path: Path) -> None:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": "', '"base_model_name_or_path": "/not/here'))
    with pytest.raises(ConfigError, match="--base"):
        here(tmp_path)
    config.write_text("[]")
    with pytest.raises(ConfigError, match="no mapping"):
        here(tmp_path)
    config.write_text('{"r": "x"}')
    with pytest.raises(ConfigError, match="--base"):
        here(tmp_path)
    with pytest.raises(ConfigError, match="not of a LoRA"):
        here(tmp_path, base="smollm2")


def test_the_rewriter_of_a_run(folder: Path, adapter: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 12, "targets": ["q_proj", "down_proj"]}
    language = {"mode": "language", "policy": {"path": str(folder), "instruction": TOLD, "lora": lora}}
    recipe = service.recipe("http://127.0.0.1:1", language=language)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="has not given its rewriter yet"):
        here(tmp_path)
    (tmp_path / "rewriter").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "rewriter" / file.name).write_bytes(file.read_bytes())
    assert said(open_writer(str(tmp_path), device="cpu", most=10)) == said(here(adapter))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(service.recipe("http://127.0.0.1:1")))
    with pytest.raises(ConfigError, match="pictures alone"):
        here(tmp_path)


def test_what_is_no_rewriter_is_said(tmp_path: Path) -> None:
    for where, why in ((tmp_path, "config.json is missing"), (tmp_path / "no", "no language model at")):
        with pytest.raises(ConfigError, match=why):
            here(where)
    with pytest.raises(ConfigError, match="a service has its own"):
        here("http://127.0.0.1:1", base="x")


def test_a_service_says_what_the_policy_says_and_counts_its_tokens(client: TestClient, folder: Path) -> None:
    remote = RemoteWriter("http://testserver/", transport=through(client))
    assert remote.most == 10 and remote.name.endswith("at http://testserver")
    written = remote.write(BAG, 70, 5, 3.0)
    assert len(written) == 70 and all(1 <= one.tokens <= 10 for one in written)
    assert [one.said for one in remote.write(BAG, 3, 5, 3.0)] == [one.said for one in written[:3]]
    assert len({one.said for one in written}) > 60
    mine = here(folder).write(BAG, 20, 5, 1.5)  # the same prompt, seeds and way of drawing: the same but for rounding
    assert sum(a.said == b.said for a, b in zip(mine, remote.write(BAG, 20, 5, 1.5), strict=True)) >= 18
    assert remote.write(BAG, 1, 0, 0.0)[0].said == here(folder).write(BAG, 1, 0, 0.0)[0].said
    assert {one.fault for one in remote.write(BAG, 4, 0, 0.0)} == {"repeats"}
    with pytest.raises(ConfigError, match="the rewriter reads 128"):
        remote.write("a bag " * 200, 1, 0, 1.0)


def test_a_service_that_is_not_there_or_none(free_port: int) -> None:
    with pytest.raises(NoService, match=r"no rewriter answers at http://127.0.0.1:\d+: start one with `verism-serve"):
        RemoteWriter(f"http://127.0.0.1:{free_port}")
    with (
        TestClient(
            create_app(ServiceConfig.model_validate({"rewards": {"jpeg_size": {"use": "jpeg_size"}}}), tuned=False)
        ) as plain,
        pytest.raises(NoService, match="serves no rewriter"),
    ):
        RemoteWriter("http://testserver", transport=through(plain))


def test_a_key_is_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_SOMEBODY", "the key of somebody")
    config = {"rewriter": {"folder": folder, "instruction": TOLD}, "keys": {"somebody": {"env": "KEY_OF_SOMEBODY"}}}
    with TestClient(create_app(ServiceConfig.model_validate(config))) as guarded:
        monkeypatch.delenv("VERISM_API_KEY", raising=False)
        with pytest.raises(NoService, match="VERISM_API_KEY"):
            RemoteWriter("http://testserver", transport=through(guarded))
        monkeypatch.setenv("VERISM_API_KEY", "the key of somebody")
        assert len(RemoteWriter("http://testserver", transport=through(guarded)).write(BAG, 2, 0, 1.0)) == 2


def test_a_service_that_answers_otherwise(served: Any) -> None:
    class Odd(Answering):
        def do_GET(self) -> None:
            info = {"name": "odd", "weights_sha256": "", "instruction": "", "max_new_tokens": 4, "max_prompt_tokens": 9}
            self._reply(200, info)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            rewrite = {"text": "a bag", "said": "a bag", "logps": [-1.0] * 9}
            items = [{"prompt": BAG, "rewrites": [rewrite]}]
            self._reply(200, {"request_id": "", "model": "", "weights_sha256": "", "seed": 0, "temperature": 1, "items": items})

    with pytest.raises(NoService, match="answered other than asked"):
        RemoteWriter(served(Odd)).write(BAG, 1, 0, 1.0)  # nine tokens where four are the most

    class Other(Answering):
        def do_GET(self) -> None:
            self._reply(200, {"hello": "world"})

    with pytest.raises(NoService, match="not as a rewriter"):
        RemoteWriter(served(Other))

    class Endless(Answering):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                self._reply(200, "a" * (17 << 20))

    with pytest.raises(NoService, match="more than 16 MiB"):
        RemoteWriter(served(Endless))
