"""/v1/models: what can be quantized."""

from fastapi import APIRouter

from infra.model_shelf import ShelfModel
from service.api_route import ApiRoute
from service.auth import Reader
from service.context import Service
from service.errors import ALWAYS, responses
from service.openapi import shows
from service.schemas.models import ModelList, ModelView

router = APIRouter(prefix="/v1", tags=["models"], route_class=ApiRoute)

_MODELS = {
    "items": [
        {
            "source": "local",
            "name": "llama/7b",
            "architecture": "llama",
            "layers": 32,
            "hidden_size": 4096,
            "size_bytes": 13_476_000_000,
        }
    ],
    "allows_hub": False,
}


@router.get(
    "/models",
    operation_id="listModels",
    summary="List the models at hand",
    responses={
        200: shows(_MODELS),
        **responses(*ALWAYS),
    },
)
def list_models(service: Service, _caller: Reader) -> ModelList:
    """List the demo's models and those in the server's model folders, by name."""
    items = [_view(model) for model in service.shelf.list()]
    return ModelList(items=items, allows_hub=service.settings.allow_hub)


def _view(model: ShelfModel) -> ModelView:
    shape = model.shape
    return ModelView(
        source=model.ref.source,
        name=model.ref.name,
        architecture=None if shape is None else shape.architecture,
        layers=None if shape is None else shape.layers,
        hidden_size=None if shape is None else shape.hidden_size,
        size_bytes=model.size_bytes,
    )
