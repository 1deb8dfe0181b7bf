"""What happens to a request of /v1 before FastAPI reads it: the key first, then the names of its query parameters."""

import difflib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, get_origin

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import ParamTypes
from fastapi.routing import APIRoute

from service.auth import NeedsScope
from service.errors import FieldProblem, ProblemError, pointer_of

_SHOWN = 10
"""Wrong parameters that an answer lists at most."""


class ApiRoute(APIRoute):
    """A route that looks at the key before it reads a body, and refuses query parameters that it does not take.

    FastAPI itself parses the body before the first dependency runs: whoever has no key would learn what is wrong with a
    body, and could send as many as they like. And it ignores unknown parameters (`?sate=failed` would list every job),
    and all but the last of those that come several times.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind these checks."""
        handle = super().get_route_handler()
        scopes = tuple(each.call for each in _dependencies(self.dependant) if isinstance(each.call, NeedsScope))
        params = get_flat_params(self.dependant)
        query = [each for each in params if getattr(each.field_info, "in_", None) is ParamTypes.query]
        names = frozenset(each.alias for each in query)
        lists = frozenset(each.alias for each in query if get_origin(each.field_info.annotation) is list)

        async def checked(request: Request) -> Response:
            for scope in scopes:
                await scope.check(request)
            if not names.issuperset(request.query_params):
                raise _unknown(request.query_params.keys() - names, names)
            counts = Counter(name for name, _ in request.query_params.multi_items() if name not in lists)
            if twice := [name for name, count in counts.items() if count > 1]:
                raise _refused(dict.fromkeys(sorted(twice)[:_SHOWN], "give it once; which of its values is meant?"))
            return await handle(request)

        return checked


def _dependencies(dependant: Dependant) -> Iterator[Dependant]:
    for each in dependant.dependencies:
        yield each
        yield from _dependencies(each)


def _unknown(wrong: set[str], names: frozenset[str]) -> ProblemError:
    """Say which parameters there are not, and which may have been meant."""
    details = {}
    for name in sorted(wrong)[:_SHOWN]:
        close = difflib.get_close_matches(name, names, n=1)
        there_are = f"there are {', '.join(sorted(names))}" if names else "there are none here"
        details[name] = f"unknown parameter; {f'did you mean {close[0]}?' if close else there_are}"
    return _refused(details)


def _refused(details: Mapping[str, str]) -> ProblemError:
    errors = [
        FieldProblem(location="query", pointer=pointer_of([name]), detail=detail) for name, detail in details.items()
    ]
    return ProblemError("validation-failed", "; ".join(f"{each.pointer}: {each.detail}" for each in errors[:3]), errors)
