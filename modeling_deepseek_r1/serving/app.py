"""The HTTP side: routes, limits, keys, errors in OpenAI's form. An ASGI application, whatever runs it."""

import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .answers import Answer, ChatShape, TextShape, stream, whole
from .metrics import Metrics
from .prompts import Prompt
from .protocol import ApiError, ChatRequest, Sampling, TextRequest, parse
from .texts import Message
from .versions import Canary, Version, Versions

CLIENT_GONE = 499
"""Status in the metrics of a request whose client did not wait; nobody else sees it."""

ANSWERED_BY = "modeling_deepseek_r1.model"
"""Where a request's scope says which model it was given to."""


@dataclass(frozen=True)
class Settings:
    """What the application allows.

    Attributes:
        api_key: without it, `/v1/...` is refused; None: open to all.
        max_tokens: of an answer, where the request does not say.
        max_body: bytes of a request, images and sound included.
        body_timeout, timeout: seconds in which the request must have come, and the answer have gone.
    """

    api_key: str | None = None
    max_tokens: int = 1024
    max_body: int = 2 * 2**20
    body_timeout: float = 30.0
    timeout: float = 600.0


class Service:
    """The endpoints.

    Args:
        versions: that answer.
        settings: limits and the key.
    """

    def __init__(self, versions: Versions, settings: Settings):
        self.versions, self.settings = versions, settings
        self.metrics = Metrics({version.name: version.engine for version in versions.all})
        self.created = int(time.time())

    async def health(self, request: Request) -> Response:
        running = all(version.engine.is_running for version in self.versions.all)
        return JSONResponse({"status": "ok" if running else "stopped"}, 200 if running else 503)

    async def read_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(version) for version in self.versions.all]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._model(self.versions.named(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        parsed = parse(ChatRequest, await self._body(request))
        version = self._choose(request, parsed)
        calls = bool(parsed.tools) and parsed.tool_choice != "none"
        prompt = await version.prompts.of_chat(parsed)

        def make_message(ids: list[int]) -> Message:
            return Message(version.tokenizer, version.template, version.tokenizer.decode(ids), calls)

        answer = self._answer(version, parsed, [prompt], make_message, keep_special=version.template is not None)
        return await self._respond(request, parsed, answer, ChatShape(parsed, version.tokenizer), version.name)

    async def texts(self, request: Request) -> Response:
        parsed = parse(TextRequest, await self._body(request))
        version = self._choose(request, parsed)
        prompts = await version.prompts.of_texts(parsed)

        def make_message(ids: list[int]) -> Message:
            return Message(version.tokenizer, None, "", False)

        answer = self._answer(version, parsed, prompts, make_message, keep_special=False)
        return await self._respond(request, parsed, answer, TextShape(parsed, version.tokenizer), version.name)

    def _model(self, version: Version) -> dict:
        return {
            "id": version.name,
            "object": "model",
            "created": self.created,
            "owned_by": "modeling-deepseek-r1",
            "max_model_len": version.engine.context,
        }

    def _choose(self, request: Request, parsed: Sampling) -> Version:
        version = self.versions.choose(parsed)
        request.scope[ANSWERED_BY] = version.name
        return version

    async def _body(self, request: Request) -> bytes:
        """ApiError 413 where it is too large, 408 where it does not come."""
        limit, body = self.settings.max_body, bytearray()
        too_large = ApiError(413, f"the request is larger than {limit} bytes", "request_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        try:
            with anyio.fail_after(self.settings.body_timeout):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, f"the request did not come in {self.settings.body_timeout:g} seconds", "timeout") from error
        return bytes(body)

    def _answer(self, version: Version, parsed: Sampling, prompts: list[Prompt], make_message, keep_special: bool) -> Answer:
        answer = Answer(
            version.engine,
            parsed,
            prompts,
            version.tokenizer,
            make_message,
            keep_special=keep_special,
            ends=version.ends,
            max_tokens=self.settings.max_tokens,
            timeout=self.settings.timeout,
            on_first_token=self.metrics.first_token_seconds.labels(version.name).observe,
        )
        answer.submit()
        return answer

    async def _respond(
        self, request: Request, parsed: Sampling, answer: Answer, shape: ChatShape | TextShape, name: str
    ) -> Response:
        if parsed.stream:
            with_usage = parsed.stream_options is not None and parsed.stream_options.include_usage
            # An answer that is late ends with an error; a reader who does not even take that is left.
            return EventStream(stream(answer, shape, name, with_usage), self.settings.timeout + 5, answer.cancel)
        body = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(cancel_on_disconnect, request, group.cancel_scope)
                body = await whole(answer, shape, name)
                group.cancel_scope.cancel()
        except* ApiError as errors:
            raise errors.exceptions[0] from None
        finally:
            answer.cancel()
        if body is None:
            raise ClientDisconnect
        return JSONResponse(body)


async def cancel_on_disconnect(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


class EventStream(StreamingResponse):
    """Server-sent events. `seconds` after its beginning it ends in any case; however it ends, even before it has begun, `close`
    is called."""

    def __init__(self, events: AsyncIterator[str], seconds: float, close: Callable[[], None]):
        super().__init__(
            events, media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        self._seconds, self._close = seconds, close

    async def __call__(self, scope, receive, send) -> None:
        try:
            with anyio.move_on_after(self._seconds):
                await super().__call__(scope, receive, send)
        finally:
            self._close()


class Gate:
    """Asks for the key and counts requests, around everything else."""

    def __init__(self, app, service: Service, paths: set[str]):
        self.app, self.service, self.paths = app, service, paths

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), CLIENT_GONE
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def watching(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"].startswith("/v1/") and not self._is_open(scope):
                await error_response(ApiError(401, "no API key, or a wrong one", "invalid_api_key"))(scope, receive, watching)
            else:
                await self.app(scope, receive, watching)
        except ClientDisconnect:
            pass
        finally:
            metrics, model = self.service.metrics, scope.get(ANSWERED_BY, "")
            metrics.requests.labels(path, status, model).inc()
            metrics.seconds.labels(path, model).observe(time.monotonic() - began)

    def _is_open(self, scope) -> bool:
        key = self.service.settings.api_key
        given = Request(scope).headers.get("authorization", "").encode()
        return key is None or hmac.compare_digest(given, f"Bearer {key}".encode())


def error_response(error: ApiError) -> JSONResponse:
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}, 503: {"retry-after": "5"}}
    return JSONResponse(error.body, error.status, headers.get(error.status))


async def on_api_error(request: Request, error: ApiError) -> Response:
    return error_response(error)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    response = error_response(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
    response.headers.update(error.headers or {})
    return response


async def on_bug(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "an error of the server; its log says more", "internal_error"))


def create_app(version: Version, settings: Settings, canary: Canary | None = None) -> Starlette:
    """The application; engines start and stop with it. ValueError where both versions are called the same."""
    versions = Versions(version, canary)
    service = Service(versions, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for one in versions.all:
            one.engine.start()
        try:
            yield
        finally:
            for one in versions.all:
                await anyio.to_thread.run_sync(one.engine.stop)

    routes = [
        Route("/health", service.health),
        Route("/metrics", service.read_metrics),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.texts, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Gate, service=service, paths={route.path for route in routes})],
        exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_bug},
    )
