"""What the tests of this folder share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler

import pytest

from tests.answering import serving


@pytest.fixture
def served() -> Iterator[Callable[[type[BaseHTTPRequestHandler]], str]]:
    """Starts servers on free ports, and ends them."""
    with ExitStack() as running:
        yield lambda handler: running.enter_context(serving(handler))
