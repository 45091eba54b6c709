"""`/v1/models`: the model, and its alias that runs the method."""

from __future__ import annotations

from typing import NamedTuple

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from mrsa_server.api.errors import EngineUnavailable, UnknownModel
from mrsa_server.api.wire import ALIAS_SUFFIX
from mrsa_server.runs.host import EngineHost

router = APIRouter()


class Names(NamedTuple):
    """What a client may call the model: `plain` for one generation, `method` for Markovian RSA by default."""

    plain: str
    method: str


class ModelNames:
    """Knows the served names, as soon as they can be known: a remote engine tells its model's when it is up."""

    def __init__(self, host: EngineHost, served_model: str | None, created: int) -> None:
        self._host = host
        self._served_model = served_model
        self._created = created

    @property
    def names(self) -> Names | None:
        """The names; None before they are known."""
        name = self._served_model or self._host.engine.model
        return Names(name, name + ALIAS_SUFFIX) if name else None

    def runs_method(self, model: str) -> bool:
        """Whether a name asks for the method.

        Raises:
            UnknownModel: If it is neither of the names. Before they are known, any that can be printed could be.
        """
        names = self.names
        if model not in names if names is not None else not model.isprintable():
            raise UnknownModel(model)
        return model == names.method if names is not None else model.endswith(ALIAS_SUFFIX)

    def listed(self) -> list[dict[str, object]]:
        """The models in OpenAI's shape.

        Raises:
            EngineUnavailable: The names are not known yet.
        """
        if self.names is None:
            raise EngineUnavailable(self._host.reason)
        return [
            {"id": name, "object": "model", "created": self._created, "owned_by": "mrsa-server"} for name in self.names
        ]


def _models(request: Request) -> ModelNames:
    names: ModelNames = request.app.state.models
    return names


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Both names of the model."""
    body = orjson.dumps({"object": "list", "data": _models(request).listed()})
    return Response(body, media_type="application/json")


@router.get("/v1/models/{model:path}")
async def get_model(model: str, request: Request) -> Response:
    """One of them."""
    for entry in _models(request).listed():
        if entry["id"] == model:
            return Response(orjson.dumps(entry), media_type="application/json")
    raise UnknownModel(model)
