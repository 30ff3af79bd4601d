"""uvicorn: listens, serves an app, and ends it cleanly on Ctrl-C."""

from __future__ import annotations

import socket
import sys

import uvicorn
from fastapi import FastAPI

from .service import GRACE

BACKLOG = 2048  # clients that wait to be accepted, as uvicorn has it


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is known before models are loaded. Clients that come before the
    server accepts them wait.

    Raises:
        OSError: it cannot be listened at; the message names host and port.
    """
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)  # two sockets that are only bound may have the same port
        return sock
    except OSError as error:
        if sock is not None:
            sock.close()
        raise OSError(error.errno, f"{host}:{port} cannot be listened at: {error.strerror}") from error


def claim(host: str, port: int) -> socket.socket | None:
    """Claim an address for a server that opens it itself, minutes later, with its models loaded, as vLLM does.

    The claim is a name in Linux's abstract namespace, which belongs to the same network as the port, and ends with the
    last process that holds the socket, a program that replaces this one included. Elsewhere there is none.

    Raises:
        OSError: the address is in use or claimed; the message names it.
    """
    sock = listen(host, port)
    address = sock.getsockname()[:2]
    sock.close()
    if sys.platform != "linux":
        return None
    claimed = socket.socket(socket.AF_UNIX)
    try:
        claimed.bind(f"\0prm-search serve {address}")
    except OSError as error:
        claimed.close()
        raise OSError(error.errno, f"{host}:{port} cannot be listened at: another server loads its models") from error
    claimed.set_inheritable(True)
    return claimed


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
