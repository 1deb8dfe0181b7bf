"""The routes, a module for each kind of resource."""

from starlette.convertors import Convertor, register_url_convertor


class _Segment(Convertor[str]):
    """A part of a path up to a slash or a colon: behind a colon stands what is to be done, as in `/jobs/ID:cancel`."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


# Under the name of the usual one, so that no route can take `ID:cancel` for an id. It has to be there before any route.
register_url_convertor("str", _Segment())
