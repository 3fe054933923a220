"""What a client is told when it gets no answer: every error in OpenAI's shape, whoever raised it. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from kvferry.errors import EngineDeadError, RequestError

_TYPES = {429: "rate_limit_error"}
_DEFAULT_TYPES = ("invalid_request_error", "server_error")
RETRY_AFTER_SECONDS = 1


def refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> HTTPException:
    """To be raised: `param` is the field of the body at fault, `code` OpenAI's word for the kind of error."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 429 else None
    return HTTPException(status, {"message": message, "param": param, "code": code}, headers)


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body that tell an error."""
    status, detail = _explain(error)
    error_type = _TYPES.get(status, _DEFAULT_TYPES[status >= 500])
    return status, {"error": {"message": "", "type": error_type, "param": None, "code": None} | detail}


def _explain(error: Exception) -> tuple[int, dict[str, Any]]:
    if isinstance(error, RequestValidationError):
        return 400, _explain_validation(error.errors())
    if isinstance(error, StarletteHTTPException):
        detail: Any = error.detail
        return error.status_code, detail if isinstance(detail, dict) else {"message": detail}
    if isinstance(error, RequestError):
        return 400, {"message": str(error)}
    if isinstance(error, EngineDeadError):
        return 503, {"message": str(error), "code": "unavailable"}
    return 500, {"message": "internal error; the server's log says more"}


def _explain_validation(errors: Sequence[Any]) -> dict[str, Any]:
    """Of the first field that is wrong; what a field of several types could have been comes as several errors."""
    first = errors[0]
    place = first["loc"][1] if len(first["loc"]) > 1 else None
    if first["type"] == "json_invalid":
        return {"message": f"the body is not JSON: {first['ctx']['error']}"}
    if place is None:
        return {"message": "the body must be a JSON object, sent as application/json"}
    reasons = dict.fromkeys(error["msg"] for error in errors if error["loc"][:2] == first["loc"][:2])
    return {"message": f"{place}: {'; or '.join(reasons)}", "param": str(place)}


async def _respond(request: Request, error: Exception) -> JSONResponse:
    status, body = error_body(error)
    if request.method == "POST" and status < 500:
        request.app.state.service.metrics.count_refused()
    return JSONResponse(body, status, getattr(error, "headers", None))


def install(app: FastAPI) -> None:
    """Answer all errors of an app so. What nobody foresaw is logged with its traceback by the HTTP server."""
    for kind in (RequestValidationError, StarletteHTTPException, RequestError, EngineDeadError, Exception):
        app.add_exception_handler(kind, _respond)
