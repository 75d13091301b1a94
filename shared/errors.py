"""Everything that can go wrong between a caller and a reward, as one tree.

VerismError
|- BadRequest 400             the body cannot be read at all
|- Unauthorized 401           no key, or an unknown one
|- Forbidden 403              the key's scopes do not cover this
|- UnknownReward 404          a reward that this service does not serve
|- WrongVersion 409           the caller pinned another version
|- TooLarge 413               body, picture or prompt above its limit
|- UnsupportedMedia 415       not JSON, multipart or msgpack (pickle among them)
|- Invalid 422                readable, but not what the schema asks for
|  `- BadImage 422            one picture cannot be decoded; an error of its item
|- Busy 429                   the queue is full: come back after retry_after_ms
|- NotReady 503               starting or draining: ask again, or ask another replica
|  `- ServiceUnreachable      (client) nothing answers at a URL
|- RequestFailed              (client) what a service said of a whole request, word for word; in shared.client
`- DeadlineExceeded 504       the caller's deadline passed

Each becomes `application/problem+json` (RFC 9457). A message says what to do; it never holds a traceback.
"""

from typing import Any, ClassVar

from shared.schema import Problem


class VerismError(Exception):
    """Base; `kind` is the last part of the urn."""

    kind: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, retry_after_ms: int | None = None, limit: float | None = None, observed: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.retry_after_ms, self.limit, self.observed = message, retry_after_ms, limit, observed

    def problem(self) -> Problem:
        return Problem(
            type=f"urn:verism:{self.kind}",
            title=self.message,
            status=self.status,
            retryable=self.retryable,
            retry_after_ms=self.retry_after_ms,
            limit=self.limit,
            observed=self.observed,
        )


class BadRequest(VerismError):
    kind, status = "malformed", 400


class Unauthorized(VerismError):
    kind, status = "unauthorized", 401


class Forbidden(VerismError):
    kind, status = "forbidden", 403


class UnknownReward(VerismError):
    kind, status = "unknown-reward", 404


class WrongVersion(VerismError):
    kind, status = "wrong-version", 409


class TooLarge(VerismError):
    kind, status = "too-large", 413


class UnsupportedMedia(VerismError):
    kind, status = "unsupported-media-type", 415


class Invalid(VerismError):
    kind, status = "invalid", 422


class BadImage(Invalid):
    """`reason` refines the urn: image-unreadable, image-too-large, image-too-small."""

    kind = "image-unreadable"

    def __init__(self, message: str, reason: str = "image-unreadable", **numbers: Any) -> None:
        super().__init__(message, **numbers)
        self.reason = reason

    def problem(self) -> Problem:
        return super().problem().model_copy(update={"type": f"urn:verism:{self.reason}"})


class Busy(VerismError):
    kind, status, retryable = "busy", 429, True


class NotReady(VerismError):
    kind, status, retryable = "not-ready", 503, True


class DeadlineExceeded(VerismError):
    kind, status = "deadline-exceeded", 504


class ServiceUnreachable(NotReady):
    """The client could not reach a service."""

    kind = "unreachable"
