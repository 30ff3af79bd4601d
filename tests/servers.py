"""Servers for tests: an app on a free port of 127.0.0.1, in a thread of its own or as the command."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from prm_search.serving.run import listen
from prm_search.serving.service import Service

TESTS = str(Path(__file__).parent)


class Served:
    """A running server.

    Attributes:
        host, port: where.
        policy: what samples, where a test wants to reach it.
        service: its Service, where it runs in this process.
    """

    policy: Any

    def __init__(self, port: int, service: Service | None = None) -> None:
        self.host, self.port, self._service = "127.0.0.1", port, service

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    def client(self, **options: Any) -> OpenAI:
        given: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": None}
        return OpenAI(base_url=f"http://{self.host}:{self.port}/v1", **given | options)

    def send(
        self, path: str, body: bytes | Any = None, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a raw request. The body: bytes, an iterator of them, or what goes as JSON."""
        connection = http.client.HTTPConnection(self.host, self.port)
        try:
            raw = body is None or isinstance(body, bytes | Iterator)
            connection.request(method, path, body if raw else json.dumps(body), headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """A number of /metrics; 0 where it is not told yet."""
        said = self.send("/metrics", method="GET")[2].decode()
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        found = re.search(rf"^{name}{re.escape('{' + wanted + '}') if wanted else ''} (\S+)$", said, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextmanager
def serving(app: FastAPI, sock: socket.socket | None = None) -> Iterator[Served]:
    """An app served by a thread of this process, at a free port or at a socket that listens."""
    sock = sock or listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=asyncio.run, args=[server.serve(sockets=[sock])])
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield Served(sock.getsockname()[1], getattr(app.state, "service", None))
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def until(holds: Callable[[], object]) -> None:
    """Wait for something that has to become true, however long a slow machine takes: pytest ends what never does."""
    while not holds():
        time.sleep(0.01)


_COMMAND = """
import sys
sys.path.append({tests!r})
{code}
from exact import exact_loading
from prm_search.cli import main
with exact_loading():
    sys.exit(main())
"""


@contextmanager
def command(*words: str, code: str = "") -> Iterator[tuple[subprocess.Popen[str], Served]]:
    """`prm-search serve` as a process of its own, in float64, once it listens; killed at the end where it still runs.

    Args:
        words: its arguments.
        code: Python that runs in its process beforehand.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _COMMAND.format(tests=TESTS, code=code), "serve", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", said)
        assert found, said + process.stderr.read()
        yield process, Served(int(found[1]))
    finally:
        process.kill()
        process.communicate()
