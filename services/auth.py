"""Who may do what: API keys with scopes, compared in constant time.

    keys:
      trainer: {env: VERISM_KEY_TRAINER, scopes: [score, read]}
      grafana: {sha256: 9f86d0..., scopes: [read]}

A caller sends `Authorization: Bearer KEY` (or `x-api-key: KEY`). Without `keys` everything but the admin listener is open. Keys never
stand in the file: `env` names a variable that holds one, `sha256` is the hash of one. /livez, /readyz, the page and /docs are always open.
"""

import hashlib
import hmac
import os
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import Forbidden, Unauthorized

Scope = Literal["score", "read", "admin"]
OPEN = frozenset({"/livez", "/readyz", "/docs", "/openapi.json"})


class KeyOptions(BaseModel):
    """One key."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    env: str | None = Field(default=None, description="variable that holds the key, of 16 characters or more")
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$", description="hash of the key, as sha256sum prints it")
    scopes: tuple[Scope, ...] = ("score", "read")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.env is None) == (self.sha256 is None):
            raise ValueError("give either `env` (a variable that holds the key) or `sha256` (its hash)")
        return self


class Keys:
    """Raises ValueError when a variable is missing or too short to be a key."""

    def __init__(self, options: Mapping[str, KeyOptions]) -> None:
        self._known: list[tuple[str, bytes, frozenset[str]]] = []
        for name, one in options.items():
            if one.env is not None:
                secret = os.environ.get(one.env, "")
                if len(secret) < 16:
                    raise ValueError(
                        f"keys.{name}: the variable {one.env} holds no key of 16 characters or more; try: openssl rand -hex 32"
                    )
                digest = hashlib.sha256(secret.encode()).digest()
            else:
                digest = bytes.fromhex(one.sha256 or "")
            self._known.append((name, digest, frozenset(one.scopes)))

    def __bool__(self) -> bool:
        return bool(self._known)

    def check(self, headers: Mapping[str, str], scope: Scope) -> str:
        """Name of the key; Unauthorized without one, Forbidden when its scopes lack `scope`. Every key is compared, whatever matches."""
        given = headers.get("x-api-key", "")
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            given = token.strip()
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found: tuple[str, frozenset[str]] | None = None
        for name, known, scopes in self._known:
            if hmac.compare_digest(digest, known):
                found = name, scopes
        if not given or found is None:
            raise Unauthorized("this service wants a key: send it as `Authorization: Bearer KEY`")
        if scope not in found[1]:
            raise Forbidden(f"the key {found[0]!r} may {', '.join(sorted(found[1]))}, but not {scope}")
        return found[0]


def scope_of(method: str, path: str) -> Scope | None:
    """What a route asks for; None for the open ones."""
    if path in OPEN or (method in ("GET", "HEAD") and (path == "/" or path.startswith("/page/"))):
        return None
    return "read" if method in ("GET", "HEAD") else "score"
