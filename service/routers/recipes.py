"""/v1/recipes: the presets."""

from fastapi import APIRouter

from duquant.config import DEFAULT_PRESET, PRESETS
from service.api_route import ApiRoute
from service.auth import Reader
from service.errors import ALWAYS, responses
from service.schemas.recipes import RecipeList, RecipeView

router = APIRouter(prefix="/v1", tags=["recipes"], route_class=ApiRoute)


def recipe_views() -> list[RecipeView]:
    """Show every preset."""
    return [
        RecipeView(
            name=name,
            summary=summary,
            is_default=name == DEFAULT_PRESET,
            digest=recipe.digest(),
            recipe=recipe.to_dict(),
        )
        for name, (summary, recipe) in PRESETS.items()
    ]


@router.get(
    "/recipes",
    operation_id="listRecipes",
    summary="List the presets",
    responses={
        200: {
            "content": {"application/json": {"example": {"items": [recipe_views()[0].model_dump()]}}},
        },
        **responses(*ALWAYS),
    },
)
def list_recipes(_caller: Reader) -> RecipeList:
    """List the recipes that have a name, with every field."""
    return RecipeList(items=recipe_views())
