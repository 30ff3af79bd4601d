"""Cluster: the connection to Ray, a local cluster of its own or one that runs, and whether it has room."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ..checks import count

LOCAL = "local"
STORE_BYTES = 100 << 20  # of the local object store: records pass through it, models never do
ANSWER_SECONDS = 5.0  # for a port to accept a connection


class ClusterError(ValueError):
    """Raised where the cluster cannot do what was asked of it; the message is one line."""


@dataclass(frozen=True)
class Failure:
    """A problem that was not finished.

    Attributes:
        place: its number.
        reason: of its last try, on one line.
    """

    place: int
    reason: str


class Cluster:
    """Workers of a Ray cluster.

        with Cluster(workers=4, gpus_per_worker=1) as cluster:
            for sample in distributed.rollout(problems, cluster=cluster, policy="Qwen/...", ...): ...

    A process that is connected to Ray already keeps that connection. Otherwise one is made, and closed at the end.

    Args:
        address: "HOST:PORT" of a running cluster; "auto" for the one on this machine; "local" for a cluster of this
            process's own, on 127.0.0.1 and gone at the end; None for RAY_ADDRESS where that is set, else "local".
        workers: processes with models; None: as many as there are GPUs for, without GPUs one a machine.
        gpus_per_worker: may be a fraction, for workers that share one; None: 1 where the cluster has GPUs, else 0.
        notice: called with a line on what became of workers.

    Attributes:
        workers, gpus_per_worker: as they were decided; workers is 0 before and after `with`.
        forward_calls: forwards that all workers have run, of those that they have told of.

    Raises:
        ImportError: Ray is not installed.
        TypeError, ValueError: a number is out of range. `with` raises ClusterError: nobody answers at the address, it
            runs other versions of Ray or Python, or it has no room for the workers.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        gpus_per_worker: float | None = None,
        notice: Callable[[str], object] | None = None,
    ) -> None:
        if workers is not None:
            count("workers", workers)
        if gpus_per_worker is not None:
            _check_gpus(gpus_per_worker)
        self.address = address
        self._workers, self._gpus = workers, gpus_per_worker
        self.workers = 0
        self.gpus_per_worker = 0.0
        self.notice = notice or (lambda line: None)
        self.forward_calls = 0
        self._folder: str | None = None
        self._ours = False

    def __enter__(self) -> Cluster:
        ray = import_ray()
        if not ray.is_initialized():
            self._connect(ray)
            self._ours = True
            # Ray prints a paragraph on standard output for each worker that dies, where records may stand. `notice` has
            # a line of it.
            self._print = ray._private.worker.print_to_stdstream
            ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
        elif self.address not in (None, LOCAL, "auto", here := ray.get_runtime_context().gcs_address):
            raise ClusterError(f"address={self.address!r}: this process is connected to {here} already")
        try:
            self.gpus_per_worker, self.workers = self._room(ray)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self.workers = 0
        if self._ours:
            ray = import_ray()
            ray.shutdown()
            ray._private.worker.print_to_stdstream = self._print
            self._ours = False
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _connect(self, ray: Any) -> None:
        address = self.address or os.environ.get("RAY_ADDRESS", LOCAL)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if address == LOCAL:
            # Sockets lie in this folder, and their paths must be short.
            self._folder = tempfile.mkdtemp(prefix="prm-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
            options |= {
                "include_dashboard": False,
                "num_cpus": max(os.cpu_count() or 1, self._workers or 1),
                "object_store_memory": STORE_BYTES,
                "_temp_dir": self._folder,
            }
        else:
            _reach(address)
        try:
            with loopback(ray) if address == LOCAL else nullcontext():
                ray.init(address=address, **options)
        except Exception as error:  # Ray raises this very class where a process of its own does not start in time
            with suppress(Exception):  # of what was started already
                ray.shutdown()
            self._close()
            raise ClusterError(f"address={address!r}: {_one_line(error)}") from error

    def _room(self, ray: Any) -> tuple[float, int]:
        """GPUs of a worker, and the number of workers. Raises ClusterError where they do not fit."""
        nodes = {node["NodeManagerAddress"] + ":" + node["NodeID"][:6]: node["Resources"]
                 for node in ray.nodes() if node["Alive"]}  # fmt: skip
        gpus = self._gpus
        if gpus is None:
            gpus = 1 if any(resources.get("GPU", 0) >= 1 for resources in nodes.values()) else 0
        room = {name: _fits(resources, gpus) for name, resources in nodes.items()}
        workers = self._workers
        if workers is None:
            workers = max(1, sum(room.values()) if gpus else sum(places > 0 for places in room.values()))
        if sum(room.values()) < workers:
            machines = ", ".join(
                f"{name.partition(':')[0]} has {resources.get('CPU', 0):g} and {resources.get('GPU', 0):g}"
                for name, resources in nodes.items()
            )
            raise ClusterError(
                f"workers={workers}, gpus_per_worker={gpus:g}: the cluster has room for {sum(room.values())} workers; "
                f"each takes 1 CPU and {gpus:g} GPUs, and {machines}"
            )
        return gpus, workers


def import_ray() -> Any:
    """The package ray, told to report nothing to its makers. Raises ImportError, naming the extra, without it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ImportError("many machines need the package ray: pip install 'prm-search[ray]'") from error
    return ray


@contextmanager
def loopback(ray: Any) -> Iterator[None]:
    """Have a cluster that is started meanwhile bind to 127.0.0.1, as Ray does by itself on macOS."""
    name, constants = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray._private.ray_constants
    environment, constant = os.environ.get(name), getattr(constants, "ENABLE_RAY_CLUSTER", None)
    os.environ[name] = "0"  # for the processes that are started
    constants.ENABLE_RAY_CLUSTER = False  # what this process read from it when it imported ray
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = constant
        if environment is None:
            del os.environ[name]
        else:
            os.environ[name] = environment


def _check_gpus(gpus: float) -> None:
    number = isinstance(gpus, int | float) and not isinstance(gpus, bool)
    if not number or not 0 <= gpus < float("inf") or (gpus > 1 and gpus != int(gpus)):
        raise ValueError(f"gpus_per_worker={gpus!r}: 0, a fraction of one GPU, or a whole number is needed")


def _fits(resources: Mapping[str, float], gpus: float) -> int:
    """Workers that a machine has room for."""
    by_cpu = int(resources.get("CPU", 0))
    return min(by_cpu, int(resources.get("GPU", 0) / gpus + 1e-9)) if gpus else by_cpu


def _reach(address: str) -> None:
    """Raises ClusterError where nothing listens at an address. Ray itself would try for a minute."""
    if address == "auto":
        return
    if "://" in address:
        raise ClusterError(
            f"address={address!r}: Ray Client is not supported; run the command on a machine of the cluster (`ray job "
            "submit`) with HOST:PORT, or auto"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ClusterError(f"address={address!r}: HOST:PORT, auto or local is needed")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"address={address!r}: no Ray cluster answers there ({error.strerror or error})") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
