"""GET /v1/models, and the models' names for llama-server's clients."""

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from phiquant.server.hosting import Hosted
from phiquant.server.service import Service
from phiquant.server.shapes.document import answers
from phiquant.server.shapes.openai import ModelEntry, ModelList
from phiquant.server.streaming import Json

__all__ = ["routes"]


def _entry(hosted: Hosted, started: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": hosted.model.name,
        "object": "model",
        "created": int(hosted.loaded_at) or started,
        "owned_by": "phiquant",
        "status": {"value": "unloaded" if hosted.loaded is None else "loaded"},
    }
    if hosted.loaded is not None:
        llm = hosted.loaded.llm
        found["meta"] = {
            "n_vocab": llm.config.vocab_size,
            "n_ctx": llm.context,
            "n_ctx_train": llm.config.context_length,
            "n_params": llm.parameter_count,
            "size": llm.weight_bytes,
        }
    return found


def routes(service: Service) -> APIRouter:
    """The endpoints."""
    router = APIRouter(tags=["models"])
    started = int(time.time())

    @router.get(
        "/v1/models",
        summary="The models that are served",
        responses=answers("openai", ModelList, post=False, model=False),
    )
    @router.get("/models", include_in_schema=False)
    async def listed() -> Response:
        hosted = service.hosting.hosted.values()
        return Json({"object": "list", "data": [_entry(one, started) for one in hosted]})

    @router.get("/v1/models/{model:path}", summary="One of them", responses=answers("openai", ModelEntry, post=False))
    async def one(model: str) -> Response:
        return Json(_entry(service.hosting.find(model), started))

    return router
