"""The endpoint plugin: routes, and what they need of the engine.

vLLM loads it only where ``VLLM_PLUGINS`` names it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from enchtable_vllm.serving import compat, compat_swap, metrics
from enchtable_vllm.serving.config import LoaderConfig
from enchtable_vllm.serving.http.admin import HEADER, AdminToken
from enchtable_vllm.serving.http.version_header import VersionHeader, note
from enchtable_vllm.serving.swap.errors import CODES, SwapError
from enchtable_vllm.serving.swap.request import RollbackRequest, SwapRequest, schema
from enchtable_vllm.serving.swap.service import SwapService

_log = compat.logger("http")
_MOST_BODY_BYTES = 64 * 1024

Handler = Callable[[Request], Awaitable[JSONResponse]]


class EnchTableEndpoints:
    """What vLLM's endpoint plugins are asked for."""

    name = "enchtable"
    required_tasks = None

    def __init__(self) -> None:
        self._service: SwapService | None = None
        self._absent = "the server is starting"
        self._token = AdminToken.configured()

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; those that change something only where there is an admin token."""
        router = APIRouter(tags=["enchtable"], responses=_documented_errors())
        read = self._route(router, "GET")
        read("/enchtable/ready", self._ready, "Whether every rank serves the vector it should.")
        read("/v1/enchtable/status", self._status, "What is served, on every rank.")
        read("/v1/enchtable/vectors", self._vectors, "What may be swapped in.")
        if self._token is None:
            _log.info("no admin token: this server's vector cannot be swapped over HTTP")
        else:
            change = self._route(router, "POST")
            change("/v1/enchtable/swap", self._swap, "Exchange the safety vector.", SwapRequest)
            change(
                "/v1/enchtable/rollback",
                self._rollback,
                "Go back to what was served before the last swap.",
                RollbackRequest,
            )
            change("/v1/enchtable/probe", self._probe, "Digests of the weights in use.")
        app.include_router(router)
        app.add_middleware(VersionHeader)

    async def init_state(self, engine_client: Any, _state: Any, _args: Any) -> None:
        """The engine is up: see what it serves.

        Raises:
            SwapError: Its ranks do not answer.
        """
        engines, self._absent = compat_swap.engines_of(engine_client)
        if engines is None:
            _log.info("nothing to swap: %s", self._absent)
            return
        extra = engine_client.vllm_config.load_config.model_loader_extra_config
        service = SwapService(engines, LoaderConfig.parse(extra), metrics.shared())
        await service.start()
        compat_swap.note_versions(engine_client, note)
        self._service = service

    def _route(self, router: APIRouter, method: str) -> Callable[..., None]:
        def add(path: str, handler: Handler, summary: str, body: Any = None) -> None:
            async def answered(request: Request) -> JSONResponse:
                try:
                    return await handler(request)
                except SwapError as error:
                    metrics.shared().refused(error.code)
                    return JSONResponse(error.to_json(), error.status)

            extra = {} if body is None else schema(body)
            if method == "POST":
                text = {"type": "string"}
                extra["parameters"] = [
                    {"name": HEADER, "in": "header", "required": True, "schema": text}
                ]
            router.add_api_route(
                path,
                answered,
                methods=[method],
                summary=summary,
                name=f"enchtable{path.replace('/', '_')}",
                openapi_extra=extra,
                response_class=JSONResponse,
            )

        return add

    def _found(self) -> SwapService:
        if self._service is None:
            raise SwapError(
                "not_swappable",
                f"this server: expected a model that --load-format enchtable loaded, but "
                f"{self._absent}",
                "Start it with --load-format enchtable.",
            )
        return self._service

    async def _ready(self, _: Request) -> JSONResponse:
        ready, reason = await self._found().ready()
        return JSONResponse({"ready": ready, "reason": reason}, 200 if ready else 503)

    async def _status(self, _: Request) -> JSONResponse:
        return JSONResponse(await self._found().status())

    async def _vectors(self, _: Request) -> JSONResponse:
        return JSONResponse({"vectors": await self._found().vectors()})

    async def _swap(self, request: Request) -> JSONResponse:
        body = await self._admitted(request)
        return JSONResponse(await self._found().change(SwapRequest.parse(body)))

    async def _rollback(self, request: Request) -> JSONResponse:
        body = await self._admitted(request)
        return JSONResponse(await self._found().change(RollbackRequest.parse(body)))

    async def _probe(self, request: Request) -> JSONResponse:
        await self._admitted(request)
        return JSONResponse(await self._found().probe())

    async def _admitted(self, request: Request) -> bytes:
        """The body of a request that knows the token; nothing of it is read before."""
        assert self._token is not None  # the route would not exist
        self._token.check(request)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BODY_BYTES:
                raise SwapError(
                    "invalid_request",
                    f"request body: expected at most {_MOST_BODY_BYTES} bytes, got more",
                )
        return body


def _documented_errors() -> dict[int | str, dict[str, Any]]:
    codes: dict[int | str, dict[str, Any]] = {}
    for name, (status, meaning) in CODES.items():
        known = codes.setdefault(status, {"description": ""})
        described = f"`{name}`: {meaning}"
        known["description"] = "\n\n".join(filter(None, (known["description"], described)))
    return codes
