"""An event loop in a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Work(Generic[T]):
    """Something that a LoopThread does.

    Attributes:
        future: its result or exception.
        task: it, once the loop has begun it.
    """

    def __init__(self) -> None:
        self.future: Future[T] = Future()
        self.task: asyncio.Task[T] | None = None

    def begin(self, work: Coroutine[Any, Any, T]) -> None:
        """Begin it, on the loop."""
        self.task = asyncio.ensure_future(work)
        self.task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[T]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self.future.set_result(task.result())
        else:
            self.future.set_exception(error)

    async def stop(self) -> None:
        """Cancel it, on the loop, and wait until it has ended."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


class LoopThread:
    """The loop. It starts when it is first used, and ends with `close` or with this object."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: Any = None

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Work[T]:
        """Begin some work on the loop."""
        work: Work[T] = Work()
        self._started().call_soon_threadsafe(work.begin, coroutine)
        return work

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what some work returns or raises, done on the loop. An interrupt of the caller cancels it."""
        work = self.start(coroutine)
        try:
            return work.future.result()
        except BaseException:
            if not work.future.done():
                self.start(work.stop())
            raise

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_serve, args=[self._loop], name=self._name, daemon=True)
                thread.start()
                self._end = weakref.finalize(self, _end, self._loop, thread)
            return self._loop

    def close(self) -> None:
        """Cancel what is under way and end the thread; a further `start` begins a new one."""
        with self._lock:
            end, self._end, self._loop = self._end, None, None
        if end is not None:
            end()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join()
