"""The routes. None of them administers anything: what is served is decided where it is started."""

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from codesign.engine.models.tokenizer import Tokenizer
from codesign.serve import bounds, metrics, openapi
from codesign.serve.choice import Choice
from codesign.serve.dispatcher import Dispatcher
from codesign.serve.formats import ChatFormat, CompletionFormat, Format
from codesign.serve.generation import EventStream, Generation, WholeAnswer
from codesign.serve.guard import too_large
from codesign.serve.metrics import Metrics
from codesign.serve.prompts import Prompts
from codesign.serve.refusal import Refusal
from codesign.serve.schema import ChatRequest, CompletionRequest, GenerationRequest, parse
from codesign.spec.request import Request


@dataclasses.dataclass(kw_only=True)
class Service:
    """What the routes work with.

    Attributes:
        model: the name that requests must give.
        fingerprint: of the configuration.
        kv_bytes: of the engine's cache.
    """

    model: str
    fingerprint: str
    max_model_len: int
    kv_bytes: int
    tokenizer: Tokenizer
    prompts: Prompts
    dispatcher: Dispatcher
    metrics: Metrics
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))


def make_app(service: Service) -> FastAPI:
    """The application without its guard, which belongs around all of it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # the pages would load scripts from elsewhere
    generates = {"response_model": None}

    @app.post("/v1/completions", **generates)  # type: ignore[arg-type]
    async def completions(http: HttpRequest) -> Response:
        arrived_s = time.monotonic()
        asked = parse(await read_body(http), CompletionRequest)
        check_model(asked)
        return answer(asked, await service.prompts.of_completion(asked), CompletionFormat(), arrived_s)

    @app.post("/v1/chat/completions", **generates)  # type: ignore[arg-type]
    async def chat_completions(http: HttpRequest) -> Response:
        arrived_s = time.monotonic()
        asked = parse(await read_body(http), ChatRequest)
        check_model(asked)
        return answer(asked, await service.prompts.of_chat(asked), ChatFormat(), arrived_s)

    def check_model(asked: GenerationRequest) -> None:
        if (unfit := service.dispatcher.unfit) is not None:
            raise unfit
        if asked.model != service.model:
            message = f"model: only {service.model!r} is served here"
            raise Refusal(404, message, param="model", code="model_not_found")

    def answer(asked: GenerationRequest, requests: Sequence[Request], format: Format, arrived_s: float) -> Response:
        generation = Generation(
            flight=service.dispatcher.open(requests, arrived_s),
            choices=[Choice(service.tokenizer, request.prompt_token_ids, asked.stops) for request in requests],
            format=format,
            model=service.model,
            fingerprint=service.fingerprint,
            prompt_tokens=sum(len(request.prompt_token_ids) for request in requests[:: asked.n or 1]),
            has_token_ids=bool(asked.return_token_ids),
        )
        if asked.stream:
            return EventStream(generation, has_usage_at_end=asked.has_usage_at_end)
        return WholeAnswer(generation)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_document()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        if model != service.model:
            raise Refusal(404, f"model: only {service.model!r} is served here", param="model", code="model_not_found")
        return model_document()

    def model_document() -> dict[str, Any]:
        return {
            "id": service.model,
            "object": "model",
            "created": service.started,
            "owned_by": "codesign",
            "max_model_len": service.max_model_len,
        }

    @app.get("/health", response_model=None)
    async def health() -> Response:
        unfit = service.dispatcher.unfit
        return JSONResponse({"status": "ok"}) if unfit is None else refused(unfit)

    @app.get("/metrics", response_model=None)
    async def prometheus() -> Response:
        live, running = service.dispatcher.num_live, service.dispatcher.num_running
        gauges = {
            "sequences_running": ("Sequences that have output and go on.", running),
            "sequences_waiting": ("Sequences without their first token: waiting or in prefill.", live - running),
            "kv_bytes": ("Bytes of the KV cache.", service.kv_bytes),
        }
        return PlainTextResponse(service.metrics.text(gauges), media_type=metrics.CONTENT_TYPE)

    @app.get("/openapi.json")
    async def schema() -> dict[str, Any]:
        return openapi.document(app, service.model, service.max_model_len)

    @app.exception_handler(Refusal)
    async def on_refusal(_: HttpRequest, refusal: Refusal) -> Response:
        return refused(refusal)

    @app.exception_handler(HTTPException)
    async def on_http_exception(_: HttpRequest, error: HTTPException) -> Response:
        message = "no such route" if error.status_code == 404 else HTTPStatus(error.status_code).phrase
        return refused(Refusal(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def on_bug(_: HttpRequest, error: Exception) -> Response:
        return refused(Refusal(500, "the server made a mistake; its log has more"))

    return app


def refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.document, status_code=refusal.status, headers=refusal.headers)


async def read_body(http: HttpRequest) -> bytes:
    """Raises Refusal: 413 too large, whatever was announced; 408 too slow."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(bounds.BODY_S):
            async for part in http.stream():
                size += len(part)
                if size <= bounds.BODY_BYTES:
                    body += part
                elif size > bounds.DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {bounds.BODY_S:g} s") from None
    if size > bounds.BODY_BYTES:
        raise too_large()
    return bytes(body)
