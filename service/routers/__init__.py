"""The routes, a module for each kind of resource."""

from starlette.convertors import Convertor, register_url_convertor


class _Segment(Convertor[str]):
    """A part of a path up to a slash or a colon: behind a colon stands what is to be done, as in `/jobs/ID:cancel`.

    Control characters are in no id; PostgreSQL would take a NUL for a fault of ours.
    """

    regex = r"[^/:\x00-\x1f\x7f]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


# Under the name of the usual one, so that no route can take `ID:cancel` for an id. It has to be there before any route.
register_url_convertor("str", _Segment())
