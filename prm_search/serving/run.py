"""uvicorn: listens, serves an app, and ends it cleanly on Ctrl-C."""

from __future__ import annotations

import socket
import sys

import uvicorn
from fastapi import FastAPI

from .service import GRACE


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before models are loaded.

    Raises:
        OSError: it cannot be bound; the message names host and port.
    """
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return sock
    except OSError as error:
        if sock is not None:
            sock.close()
        raise OSError(error.errno, f"{host}:{port} cannot be listened at: {error.strerror}") from error


def run(app: FastAPI, sock: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM: searches under way then end with an error, and streams with an error event."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(GRACE), lifespan="on")
    server = Server(config)
    try:
        server.run(sockets=[sock])
    except KeyboardInterrupt:  # raised again by uvicorn once all is closed
        print("prm-search: stopped", file=sys.stderr)


class Server(uvicorn.Server):
    """Says where it listens, and ends searches before it waits for their connections."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        if self.started:
            for sock in sockets or []:
                host, port = sock.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                print(f"prm-search: serving at http://{host}:{port}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        service = getattr(self.config.app.state, "service", None)  # type: ignore[union-attr]
        if service is not None:
            await service.drain()
        await super().shutdown(sockets)
