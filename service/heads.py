"""HEAD, which load balancers and monitors send: answered like GET, without the body."""

from starlette.types import ASGIApp, Receive, Scope, Send

_FOUND = ("route", "path_params")


def takes_head(path: str) -> bool:
    """Return whether a path that takes GET takes HEAD, too: pages and probes do.

    Not calls of /v1, where an answer may be held back, and not event streams, which would go on without being read.
    """
    return not path.startswith("/v1/") and not path.endswith("/live")


class HeadAsGet:
    """Serves HEAD as GET: the framework's routes know only the methods that they are told. The server sends no body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or not takes_head(scope["path"]):
            await self.app(scope, receive, send)
            return
        # A copy: by its own the server knows that it is to send no body.
        as_get = {**scope, "method": "GET"}
        try:
            await self.app(as_get, receive, send)
        finally:
            scope.update({name: as_get[name] for name in _FOUND if name in as_get})
