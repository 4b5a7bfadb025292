"""The endpoint: OpenAI's completions and chat, over HTTP, with clamps chosen by each request."""

# No postponed annotations: FastAPI reads those of the routes, which are functions within a function.

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
except ImportError:
    raise ImportError("serving needs FastAPI and uvicorn: pip install 'actome[serve]'") from None

from actome.core.clamp import Clamp
from actome.core.model import Model

from .requests import ChatRequest, CompletionRequest
from .service import Limits, Refused, Service


def make_app(
    model: Model,
    clamps: Mapping[str, Sequence[Clamp]] | None = None,
    *,
    name: str | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """An ASGI application that serves a model; run it with uvicorn, or with ``actome serve``.

    Args:
        model: a causal language model with a tokenizer.
        clamps: by name, lists of clamps. All apply to requests that do not choose; a request chooses with
            ``"clamps": ["calm", {"name": "brief", "scale": 0.5}]``, and ``[]`` for none.
        name: of the model; requests must ask for it.
        limits: what a request may ask for.

    Raises:
        ActomeError: a model that cannot generate or has no tokenizer; a clamp that has no place in it.
    """
    service = Service(model, dict(clamps or {}), name or model.name, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        with service.engine:
            yield

    app = FastAPI(title="actome", lifespan=lifespan, docs_url=None, redoc_url=None)

    def told(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        headers = {"Retry-After": "1"} if status == 429 else None
        body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        return JSONResponse(body, status, headers)

    @app.middleware("http")
    async def not_too_large(request: Request, call_next: Any) -> Any:
        length = request.headers.get("content-length", "0")
        if request.method == "POST" and not (length.isdecimal() and int(length) <= service.limits.body):
            return told(413, f"a request has {service.limits.body} bytes at most")
        return await call_next(request)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return told(error.status, error.message, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of several readings the one that went furthest
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        return told(400, f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}", where)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        return told(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **service.engine.load}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = {"id": service.name, "object": "model", "created": service.began, "owned_by": "actome"}
        return {"object": "list", "data": [one]}

    @app.get("/v1/clamps")
    async def known_clamps() -> dict[str, Any]:
        return {"data": [{"name": n, "sites": [one.site for one in some]} for n, some in service.clamps.items()]}

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Any:
        return await service.answer(body, service.prompt(body), request, chat=False)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Any:
        return await service.answer(body, service.conversation(body), request, chat=True)

    return app
