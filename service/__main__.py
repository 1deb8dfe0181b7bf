"""`python -m service`: serve the API and the dashboard."""

import argparse
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from infra.errors import InfraError
from infra.logging import EXIT_BAD_SETTINGS, exit_status, setup_logging
from infra.tracing import setup_tracing
from service.app import create_app
from service.context import Context
from service.settings import ServiceSettings
from service.supervisor import Supervisor, end_with


class _Server(uvicorn.Server):
    """A server that tells open event streams to end, which would otherwise keep it from stopping."""

    def __init__(self, config: uvicorn.Config, service: Context) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stopping.set()
        super().handle_exit(sig, frame)


def main() -> int:
    """Serve until told to stop; return the exit status: 0 after a signal, 2 for bad settings, 5 when a part is down."""
    inherited = _parse()
    try:
        settings = ServiceSettings.load()
        setup_logging("service", level=settings.log_level, fmt=settings.log_format, secrets=settings.secrets())
        is_one_of_several = inherited.listener is not None
        if settings.api_processes == 1 or is_one_of_several:
            setup_tracing("service", settings.otel_endpoint)
        # Also where others will serve it: what is wrong with the settings is said once, before any of them starts.
        app = create_app(settings)
    except InfraError as error:
        return _refuse(str(error), exit_status(error))
    if is_one_of_several:
        end_with(inherited.lifeline)
        return _serve(app, socket.socket(fileno=inherited.listener))
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        reason = f"cannot listen on {where}: {error.strerror or error}; set DUQUANT_HOST and DUQUANT_PORT"
        return _refuse(reason, EXIT_BAD_SETTINGS)
    if settings.api_processes > 1:
        with listener:
            return Supervisor(listener, settings.api_processes).run()
    return _serve(app, listener)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.add_argument("--listener", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lifeline", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _serve(app: FastAPI, listener: socket.socket) -> int:
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5, timeout_keep_alive=30
    )
    with listener:
        _Server(config, app.state.context).run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything else starts, so that a taken one is a plain error."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=512)
    # Accepted connections inherit it; asyncio sets it only on sockets that name their protocol. Without it an answer's
    # body waits 40 ms behind its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _refuse(message: str, status: int) -> int:
    print(f"duquant service: {message}", file=sys.stderr)  # noqa: T201  before or without a log, for whoever started us
    return status


if __name__ == "__main__":
    sys.exit(main())
