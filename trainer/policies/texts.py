"""Texts as a network takes them: each encoded once, the encoders on the device only meanwhile, kept on disk or in bounded memory."""

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Row = dict[str, Tensor]


class Texts:
    """`rows` gives texts encoded, in main memory.

    `encode` encodes one on `device` with the modules `encoders`. `stay` leaves these there, otherwise they are in main memory between
    calls. With `folder` every text is a file, named after the encoders' weights, `about` (what else shapes a text) and the text itself, and
    memory holds none; without, memory holds `most` bytes, where the oldest make room.
    """

    def __init__(
        self,
        encode: Callable[[str], Row],
        encoders: Sequence[torch.nn.Module],
        device: torch.device,
        *,
        stay: bool,
        folder: Path | None,
        most: float,
        about: str,
    ) -> None:
        self.encode, self.encoders, self.device, self.stay = encode, encoders, device, stay
        self.folder, self.most, self.about = folder, most, about
        self.known: dict[str, Row] = {}
        self.held = 0
        self._key = ""
        for module in encoders:
            module.requires_grad_(False).eval().to(device if stay else "cpu")

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode these ahead, as far as memory reaches, so that the encoders need not come back. Nothing where they stay anyway."""
        new = [t for t in dict.fromkeys(texts) if t not in self.known and not (self.folder and self._place(t).is_file())]
        if new and not self.stay:
            with self._here():
                for text in new:
                    row = self._encoded(text)
                    if self.folder is None and self.held + size_of(row) > self.most:
                        break
                    self._keep(text, row)

    def rows(self, texts: Sequence[str]) -> dict[str, Row]:
        """Each text's tensors, without a batch axis."""
        found = {text: self.known[text] for text in texts if text in self.known}
        if self.folder is not None:
            for text in dict.fromkeys(texts).keys() - found.keys():
                if (row := read_row(self._place(text))) is not None:
                    found[text] = row
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            with self._here():
                for text in new:
                    found[text] = self._encoded(text)
                    self._keep(text, found[text])
        return found

    @torch.no_grad()
    def _encoded(self, text: str) -> Row:
        return {k: v.cpu() for k, v in self.encode(text).items()}

    def _keep(self, text: str, row: Row) -> None:
        if self.folder is not None:
            try:
                return write_row(self._place(text), row)
            except (OSError, SafetensorError) as error:
                warnings.warn(f"policy.text_cache: {self.folder} cannot be written, texts stay in memory: {error}", stacklevel=4)
                self.folder = None
        self.known[text] = row
        self.held += size_of(row)
        while self.held > self.most and len(self.known) > 1:
            self.held -= size_of(self.known.pop(next(iter(self.known))))

    def _place(self, text: str) -> Path:
        assert self.folder is not None
        if not self._key:
            digest = hashlib.sha256(self.about.encode())
            for module in self.encoders:
                digest.update(fingerprint(module).encode())
            self._key = digest.hexdigest()[:16]
        return self.folder / self._key / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        try:
            for module in self.encoders:
                module.to(self.device)
            yield
        finally:
            if not self.stay:
                for module in self.encoders:
                    module.to("cpu")
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, types and the first values of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def size_of(row: Row) -> int:
    """Bytes of an encoded text."""
    return sum(v.numel() * v.element_size() for v in row.values())


def read_row(path: Path) -> Row | None:
    """An encoded text, or None where there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def write_row(path: Path, row: Row) -> None:
    """Whole or not at all, also when several runs write the same text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".building")
    os.close(handle)
    try:
        save_file({k: v.contiguous() for k, v in row.items()}, beside)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
