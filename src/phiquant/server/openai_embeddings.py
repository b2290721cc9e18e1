"""POST /v1/embeddings."""

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from phiquant.server.failures import refuse
from phiquant.server.fields import Body, Name, Whole
from phiquant.server.hosting import Loaded
from phiquant.server.openai_completions import Prompts
from phiquant.server.service import Service, read_prompt
from phiquant.server.shapes.document import answers
from phiquant.server.shapes.openai import EmbeddingList
from phiquant.server.streaming import record_of

__all__ = ["EmbeddingBody", "embedded", "routes"]

MOST_INPUTS = 2048
_ANSWERS = answers("openai", EmbeddingList)


class EmbeddingBody(Body):
    """Texts, or their token ids, whose meaning is asked for."""

    model_config = ConfigDict(extra="forbid")

    input: Prompts
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Whole, Field(ge=1, le=1 << 20)] | None = None
    user: str | None = None


async def embedded(
    service: Service, loaded: Loaded, model: str | None, inputs: list[str] | list[list[int]], record: Any
) -> tuple[NDArray[Any], int]:
    """Vectors, float32 [inputs, width], and how many tokens were read. Raises Failure, RequestError."""
    if not service.hosting.find(model).model.embeddings:
        raise refuse("this server was started without --embeddings", code="embeddings_disabled")
    if not 1 <= len(inputs) <= MOST_INPUTS:
        raise refuse(f"there are {len(inputs)} inputs; give from 1 to {MOST_INPUTS}", "input")
    ids = [await read_prompt(loaded, text) for text in inputs]
    found = await loaded.engine.embed(ids)
    record.prompt_tokens += found.usage.prompt_tokens
    return found.vectors, found.usage.prompt_tokens


def routes(service: Service) -> APIRouter:
    """The endpoint."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/embeddings", summary="What texts mean, as vectors of length 1", responses=_ANSWERS)
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        given: Any = body.input
        several = isinstance(given, list) and (not given or not isinstance(given[0], int))
        inputs = given if several else [given]

        async def work(loaded: Loaded) -> dict[str, Any]:
            vectors, tokens = await embedded(service, loaded, body.model, inputs, record_of(request))
            width = vectors.shape[1]
            if body.dimensions not in (None, width):
                raise refuse(f"dimensions is {body.dimensions}; the model has {width} and cannot give others")
            as_text = body.encoding_format == "base64"
            data = [
                {
                    "object": "embedding",
                    "index": at,
                    "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row.tolist(),
                }
                for at, row in enumerate(vectors)
            ]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return {"object": "list", "data": data, "model": service.name(body.model), "usage": usage}

        return await service.use(request, body.model, work)

    return router
