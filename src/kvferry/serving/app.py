"""The routes: OpenAI's, and those for whoever watches the server. Knows no engine."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvferry.serving import answers, refusals
from kvferry.serving.schema import Body, ChatBody, CompletionBody
from kvferry.serving.service import Exchange, Service, exchange

MAX_BODY_BYTES = 16 * 2**20
"""A million token ids are half of it."""

Open = Annotated[Exchange, Depends(exchange)]


class BodyLimit:
    """Refuses bodies of more than `MAX_BODY_BYTES` before they are in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def receive_some() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise refusals.refusal(413, f"the body has more than {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, receive_some, send)


def make_app(service: Service) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="kvferry", openapi_url=None)
    app.state.service = service
    app.state.started_at = int(time.time())
    app.add_middleware(BodyLimit)
    refusals.install(app)
    app.add_api_route("/v1/completions", complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", list_models, response_model=None)
    app.add_api_route("/v1/models/{name:path}", show_model, response_model=None)
    app.add_api_route("/health", health, response_model=None)
    app.add_api_route("/metrics", metrics, response_model=None)
    return app


async def complete(body: CompletionBody, opened: Open) -> Response:
    return await _answer(answers.CompletionAnswer, body, opened)


async def chat(body: ChatBody, opened: Open) -> Response:
    return await _answer(answers.ChatAnswer, body, opened)


async def _answer(kind: type[answers.CompletionAnswer], body: Body, opened: Exchange) -> Response:
    handles = await opened.start(body)
    answer = kind(opened.service.name, shows_tokens=bool(body.return_token_ids))
    if not body.stream:
        return JSONResponse(answer.whole(await answers.wait(handles)))
    events = answers.stream(answer, handles, include_usage=body.includes_usage)
    # For proxies, which like to keep a stream until it is whole.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _model(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {"id": state.service.name, "object": "model", "created": state.started_at, "owned_by": "kvferry"}


async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(request)]}


async def show_model(name: str, request: Request) -> dict[str, Any]:
    request.app.state.service.check_name(name)
    return _model(request)


async def health(request: Request) -> dict[str, str]:
    """503 once the engine is dead, so that whoever watches can replace the process."""
    request.app.state.service.check_alive()
    return {"status": "ok"}


def metrics(request: Request) -> Response:
    """In a thread: a connector's stats may come from a server."""
    return Response(request.app.state.service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
