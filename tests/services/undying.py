"""A service that many clients of a test enter and leave."""

from typing import Any

from fastapi import FastAPI


def undying(service: FastAPI) -> Any:
    """The service as an ASGI application that does not shut down when one of its clients does."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await service(scope, receive, send)
            return
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})

    return app
