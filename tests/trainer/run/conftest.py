"""Every run here names its files from the repository's root; most tests share one service."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.run.service import Service, serve


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serve() as running:
        yield running
