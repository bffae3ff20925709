"""The endpoint as a web application: `/v1/chat/completions`, `/v1/models` and `/health`."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vlv.serving.chat import ChatRequest, read_request
from vlv.serving.completion import error_body
from vlv.serving.pictures import MEGABYTE, TooLarge
from vlv.serving.service import Job, NotWritten, Service

WORDS = MEGABYTE  # bytes that a request may have beside its image
PATIENCE = 10  # times the largest body are read to their end, so that the client hears why it is refused
ROUTES = ("/health", "/v1/models", "/v1/chat/completions")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What clients may ask of the server."""

    image_bytes: int = 20 * MEGABYTE
    seconds: float = 120  # from a request's first byte to the last of its answer
    requests: int = 256  # at the same time

    @property
    def body_bytes(self) -> int:
        return math.ceil(self.image_bytes * 4 / 3) + WORDS  # base64 takes four bytes for three


def make_app(service: Service, limits: Limits) -> Starlette:
    """The application, which closes the service when it ends."""

    @asynccontextmanager
    async def closing(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    endpoint = _Endpoint(service, limits)
    chat = Middleware(_OpenRequests, most=limits.requests)
    health, models, completions = ROUTES
    routes = [
        Route(health, endpoint.health),
        Route(models, endpoint.models),
        Route(completions, endpoint.complete, methods=["POST"], middleware=[chat]),
    ]
    return Starlette(
        routes=routes, lifespan=closing, exception_handlers={HTTPException: _answer_error, Exception: _answer_bug}
    )


class _Endpoint:
    def __init__(self, service: Service, limits: Limits):
        self.service, self.limits = service, limits

    async def health(self, request: Request) -> Response:
        running = self.service.batcher.is_running
        return JSONResponse({"status": "ok" if running else "stopped"}, 200 if running else 503)

    async def models(self, request: Request) -> Response:
        model = {"id": self.service.name, "object": "model", "created": 0, "owned_by": "vlv"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.limits.seconds
        try:
            async with asyncio.timeout_at(deadline):
                chat = read_request(await self._read_body(request))
                self._check_model(chat)
                job = await _unless_left(request, self.service.prepare(chat))
                if chat.stream:
                    return StreamingResponse(self._events(job, chat, deadline), media_type="text/event-stream")
                return JSONResponse(await _unless_left(request, self.service.answer(job)))
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads
        except (TooLarge, TimeoutError, NotWritten, ValueError) as error:
            raise HTTPException(*self._status(error)) from error

    async def _read_body(self, request):
        body, size, most = bytearray(), 0, self.limits.body_bytes
        async for piece in request.stream():
            size += len(piece)
            if size <= most:
                body += piece
            elif size > PATIENCE * most:
                break
        if size > most:
            image = f"an image may have {self.limits.image_bytes / MEGABYTE:g} MB"
            raise TooLarge(f"The request's body is larger than {most / MEGABYTE:.1f} MB: {image}.")
        return bytes(body)

    def _check_model(self, chat: ChatRequest):
        name = self.service.name
        if chat.model not in (None, name):
            raise HTTPException(404, f"There is no model {chat.model[:100]!r} here: this server has {name!r}.")

    async def _events(self, job: Job, chat: ChatRequest, deadline: float) -> AsyncIterator[str]:
        """The lines of a stream. An error is one of them, as the status has been sent."""
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        chunks = self.service.stream(job, include_usage)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                yield _event(json.dumps(chunk))
        except (TimeoutError, NotWritten) as error:
            status, sentence = self._status(error)
            yield _event(json.dumps(error_body(sentence, status)))
        finally:
            await chunks.aclose()
        yield _event("[DONE]")

    def _status(self, error: Exception) -> tuple[int, str]:
        """The status that an error is answered with, and its sentence."""
        if isinstance(error, TimeoutError):
            return 504, f"The request took more than {self.limits.seconds:g} seconds, the most that this server gives."
        return 500 if isinstance(error, NotWritten) else 413 if isinstance(error, TooLarge) else 400, str(error)


class _OpenRequests:
    """Refuses a request while too many others are open."""

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most, self.open = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.open >= self.most:
            sentence = f"The server is busy with {self.open} requests: try again later."
            refusal = JSONResponse(error_body(sentence, 503), 503, headers={"Retry-After": "5"})
            await refusal(scope, receive, send)
            return
        self.open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.open -= 1


async def _unless_left(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives; it is cancelled when the client leaves, which raises ClientDisconnect."""

    async def left():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _event(data: str) -> str:
    return f"data: {data}\n\n"


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # Starlette asks it for nothing else
    sentence = error.detail
    if error.status_code == 404 and request.url.path not in ROUTES:
        sentence = f"There is nothing at {request.url.path[:100]}: this server has {', '.join(ROUTES)}."
    elif error.status_code == 405:
        sentence = f"{request.url.path} does not take {request.method} requests."
    return JSONResponse(error_body(sentence, error.status_code), error.status_code, headers=error.headers)


async def _answer_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body("The server failed to answer; its log says why.", 500), 500)
