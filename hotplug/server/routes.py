"""Every route but the two that generate: models, tokens, liveness, readiness, version, metrics, the plan."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

import hotplug
from hotplug.core.errors import NotReadyError
from hotplug.server.body import json_response
from hotplug.server.errors import NOT_READY_RETRY, first_line
from hotplug.server.intake import beside, body_of, documented
from hotplug.server.schemas import DetokenizeBody, TokenizeBody, check_token_ids
from hotplug.server.service import Service, service_of

router = APIRouter()


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "hotplug",
        "max_model_len": service.llm.max_model_len,
    }


@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> Response:
    return json_response({"object": "list", "data": [_card(service_of(request))]})


@router.get("/v1/models/{model:path}", response_model=None)
async def get_model(request: Request, model: str) -> Response:
    service = service_of(request)
    service.check_model(model)
    return json_response(_card(service))


@router.post("/tokenize", response_model=None, openapi_extra=documented(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt, or of messages as /v1/chat/completions would see them."""
    body = await body_of(TokenizeBody, request)
    service = service_of(request)
    if body.model is not None:
        service.check_model(body.model)

    def work() -> Response:
        if body.messages is not None:
            tokens = service.encode_chat(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                variables=body.chat_template_kwargs,
            )
        else:
            [tokens] = service.encode([body.prompt or ""], add_special_tokens=body.add_special_tokens)
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": service.llm.max_model_len}
        if body.return_token_strs:
            answer["token_strs"] = [service.tokenizer.token_text(token) for token in tokens]
        return json_response(answer)

    return await beside(body.size, work)


@router.post("/detokenize", response_model=None, openapi_extra=documented(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    body = await body_of(DetokenizeBody, request)
    service = service_of(request)
    if body.model is not None:
        service.check_model(body.model)

    def work() -> Response:
        tokens = check_token_ids(body.tokens, service.llm.vocab_size, "tokens")
        return json_response({"prompt": service.tokenizer.decode(tokens, body.skip_special_tokens)})

    return await beside(body.size, work)


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """Whether the process is of any use: false only once the engine is dead."""
    failure = service_of(request).llm.failure
    if failure is not None:
        return json_response({"status": "dead", "reason": first_line(failure)}, 503)
    return json_response({"status": "ok"})


@router.get("/ready", response_model=None)
async def ready(request: Request) -> Response:
    """Whether requests are served now."""
    llm = service_of(request).llm
    if llm.failure is not None:
        return json_response({"status": "dead", "reason": first_line(llm.failure)}, 503)
    if not llm.ready:
        retry = {"retry-after": str(NOT_READY_RETRY)}
        return json_response({"status": "starting", "reason": "the engine is starting"}, 503, retry)
    if (stalled := llm.stalled) is not None:
        return json_response({"status": "stalled", "reason": stalled}, 503)
    return json_response({"status": "ready"})


@router.get("/version", response_model=None)
async def version() -> Response:
    return json_response({"version": hotplug.__version__})


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    found = request.app.state.metrics
    if not found.known:
        raise NotReadyError("the engine has not told its figures yet")
    render, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(render(found.registry), headers={"content-type": content_type})


@router.get("/debug/plan", response_model=None)
async def debug_plan(request: Request) -> Response:
    """What `hotplug explain --json` prints: site, provider, rejected candidates and why."""
    return json_response(await service_of(request).llm.explain())
