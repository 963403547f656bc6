"""``GET /klora/loras`` and ``POST /klora/plan``, beside the host's API and under its log-ins."""

from __future__ import annotations

import math
from secrets import compare_digest
from typing import Any

import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import shared
from modules.call_queue import queue_lock
from pydantic import BaseModel, Field

from ..errors import KLoraError, readable
from ..plot import content_share, describe, style_share
from ..settings import from_fields


class PlanRequest(BaseModel, extra="forbid"):
    """A pair, the settings, and the sampling pass to plan for. Any other field is refused: a
    setting outside ``settings`` would be ignored, and the plan would be wrong."""

    content: str = Field(description="the content LoRA, by a name from /klora/loras")
    style: str = Field(description="the style LoRA, by a name from /klora/loras")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="fields as in alwayson_scripts; what is left out: default"
    )
    steps: int = Field(20, ge=1, le=1000, description="steps of the pass")
    t0: float = Field(0.0, ge=0, le=1, description="progress at which the pass starts")


class LayerPlan(BaseModel):
    """One layer of the pair."""

    name: str
    ratio: float | None = Field(
        description="S_c / (γ·S_s), or what the method has in their place: content while S(t) is "
        "at most this, with the scale share while it is among the largest; null if S_s is 0 or if "
        "the method does not compare the files"
    )
    content: list[bool] = Field(description="for each step: content is applied")
    style: list[bool] = Field(description="for each step: style is applied; with some methods both")


class PlanAnswer(BaseModel):
    """Which LoRA each layer gets in each step."""

    method: str
    gamma: float | None = Field(description="null if the method does not compare the files")
    overlap: float | None = Field(
        description="with NP-LoRA: which part of the content's energy lies in the style's row "
        "space, 0 to 1; null for another method, and if nothing could be projected"
    )
    t: list[float] = Field(description="progress of each step")
    content_share: list[float] = Field(description="part of the layers with content, each step")
    style_share: list[float] = Field(description="part of the layers with style, each step")
    layers: list[LayerPlan]
    unpaired: dict[str, str] = Field(description="layer → the one role that has it")
    summary: str
    warnings: list[str]


class LoraName(BaseModel):
    """A LoRA of the host's list."""

    name: str


def add_api(network: Any, app: FastAPI) -> None:
    """Adds the routes if the host's API is on."""
    if not (shared.cmd_opts.api or shared.cmd_opts.nowebui):
        return
    router = APIRouter(route_class=_Route, dependencies=[Depends(_guard(app))])

    @router.get(
        "/klora/loras", response_model=list[LoraName], tags=["K-LoRA"],
        summary="The LoRAs that K-LoRA can use",
    )  # fmt: skip
    def loras():
        return [{"name": name} for name in network.lora_names()]

    @router.post(
        "/klora/plan", response_model=PlanAnswer, tags=["K-LoRA"],
        summary="Which LoRA each layer would get in each step, without a generation",
    )  # fmt: skip
    def plan(request: PlanRequest):
        try:
            return _plan(network, request)
        except KLoraError as error:
            raise HTTPException(status_code=422, detail=str(error)) from error

    app.include_router(router)


class _Route(APIRoute):
    """Says in words what is wrong with a request. FastAPI's own answer has what was sent in it, and
    fails for what no JSON can hold: NaN, infinity, half of a UTF-16 pair."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def handle_or_say(request: Request):
            try:
                return await handle(request)
            except RequestValidationError as error:
                found = (
                    f"{'.'.join(map(str, part['loc'][1:]))}: {part['msg']}"
                    for part in error.errors()
                )
                sentence = readable(f"The request is not as in /docs: {'; '.join(found)}.")
                raise HTTPException(status_code=422, detail=sentence) from error

        return handle_or_say


def _plan(network: Any, request: PlanRequest) -> dict[str, Any]:
    named = {"content": request.content, "style": request.style}
    for role, name in named.items():
        if request.settings.get(role, name) != name:
            raise KLoraError(
                f"The {role} LoRA is “{name}” in the request and “{request.settings[role]}” in its "
                f"settings: leave it out of the settings."
            )
    settings = from_fields({**request.settings, **named})
    with queue_lock, torch.no_grad():
        # Nobody can interrupt it, and what the last generation's Interrupt left does not count.
        report = network.session.preview(
            [], settings, request.steps, request.t0, progress=lambda done, total: None
        )
    plan, pair = report.passes[0].plan, report.passes[0].pair
    ratios = [math.inf] * len(plan.layers) if plan.ratio is None else plan.ratio.tolist()
    return {
        "method": plan.method,
        "gamma": plan.gamma,
        "overlap": pair.overlap,
        "t": plan.t[:-1].tolist(),
        "content_share": content_share(plan).tolist(),
        "style_share": style_share(plan).tolist(),
        "layers": [
            {
                "name": name,
                "ratio": ratio if math.isfinite(ratio) else None,
                "content": plan.content[:-1, i].tolist(),
                "style": plan.style[:-1, i].tolist(),
            }
            for i, (name, ratio) in enumerate(zip(plan.layers, ratios, strict=True))
        ],
        "unpaired": dict(pair.unpaired),
        "summary": describe(plan, pair),
        "warnings": [*report.notes, *pair.notes],
    }


def _guard(app: FastAPI):
    """A dependency that lets through whoever has one of the host's log-ins: with ``--api-auth`` its
    user and password, with ``--gradio-auth`` the cookie of its page. Either will do. The host's own
    API is open with ``--gradio-auth`` alone; this one is not."""
    users = dict(pair.split(":", 1) for pair in (shared.cmd_opts.api_auth or "").split(",") if pair)
    basic = HTTPBasic(auto_error=False)

    def check(
        request: Request,
        credentials: HTTPBasicCredentials | None = Depends(basic),  # noqa: B008
    ) -> None:
        needs_login = getattr(app, "auth", None) is not None
        if not users and not needs_login:
            return
        if credentials is not None:
            password = users.get(credentials.username, "")
            given = credentials.password.encode()
            if password and compare_digest(given, password.encode()):
                return
        if needs_login and _logged_in(app, request):
            return
        headers = {"WWW-Authenticate": "Basic"} if users else None
        raise HTTPException(status_code=401, detail="Not authenticated", headers=headers)

    # The annotations are strings here, and FastAPI could not find the names in this function.
    check.__annotations__.update(
        request=Request, credentials=HTTPBasicCredentials | None, **{"return": None}
    )
    return check


def _logged_in(app: FastAPI, request: Request) -> bool:
    tokens = getattr(app, "tokens", {})
    return any(
        name.startswith("access-token") and value in tokens
        for name, value in request.cookies.items()
    )
