"""Engines that run vision-language models: questions with pictures in, log-probabilities and texts out."""

import atexit
import importlib
from threading import Lock

from services.engines.base import Chat, Echo, Engine, Failure, First, Generated, Picture, Sampling
from services.engines.options import EngineOptions, VllmOptions

__all__ = [
    "Chat",
    "Echo",
    "Engine",
    "EngineOptions",
    "Failure",
    "First",
    "Generated",
    "Picture",
    "Sampling",
    "VllmOptions",
    "open_engine",
]
ENGINES = {
    "transformers": "services.engines.transformers:TransformersEngine",
    "vllm": "services.engines.vllm:VllmEngine",
}
_open: dict[tuple[str, str], Engine] = {}
_lock = Lock()


def open_engine(options: EngineOptions, device: str) -> Engine:
    """The engine of these options; rewards that ask for the same share it. Closed when the process ends.

    ValueError, FileNotFoundError say what is wrong.
    """
    with _lock:
        key = options.model_dump_json(), device
        known = _open.get(key)
        if known is None:
            module, _, name = ENGINES[options.engine].partition(":")
            known = _open[key] = getattr(importlib.import_module(module), name)(options, device)
            atexit.register(known.close)
        return known
