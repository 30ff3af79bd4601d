"""Files that several commands read and write: one writer at a time, each record once, JSON read by line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

DEPTH = 100  # of JSON
LOCK = ".lock"  # ending of the file that a writer holds beside its own


@contextmanager
def one_writer(path: str | PathLike[str]) -> Iterator[None]:
    """Be the only writer of a file. The lock is the operating system's: it dies with the process that holds it.

    Folders above the file are made, and go again where nothing came to lie in them. Devices and pipes are not locked.

    Args:
        path: what is written. The lock is a file beside it, with the ending `LOCK`, which goes at the end.

    Raises:
        ValueError: another process, or another thread of this one, is writing it.
        OSError: the folder cannot be made, or nothing be written in it.
    """
    from filelock import FileLock, Timeout

    target = Path(path)
    if target.exists() and not target.is_file():
        yield
        return
    made = _make_folder(target.parent)
    try:
        lock = FileLock(f"{target}{LOCK}")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"{target} is being written by another process: wait for it, or name another") from error
        try:
            yield
        finally:
            with suppress(
                OSError
            ):  # before the release, so that whoever opened it meanwhile finds it gone and looks again
                os.unlink(lock.lock_file)
            lock.release()
    finally:
        for folder in made:
            with suppress(OSError):  # something lies in it
                folder.rmdir()


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it. Returns the new ones, the deepest first."""
    missing = []
    while not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return missing


class Distinct:
    """Refuse records that stand in a file twice, as two writers or a copied file leave them.

    A record is told by its "index" and, where it has one, its "key". Records without an index are not compared.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[object, object], str] = {}

    def add(self, where: str, record: Mapping[str, Any]) -> None:
        """Take in a record.

        Args:
            where: what to call it: "records.jsonl, line 3".
            record: as JSON has it.

        Raises:
            ValueError: it stood before; both lines are named.
        """
        index = record.get("index")
        if not isinstance(index, int):
            return
        key = record.get("key")
        before = self._seen.setdefault((index, key if isinstance(key, str) else None), where)
        if before != where:
            raise ValueError(f"{where}: index {index} stands in {before} already; each record is needed once")


def _deep(value: Any) -> bool:
    """Return True for lists and objects that are nested to more than `DEPTH`, which could not be written again."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(DEPTH):
        inner = (part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole))
        level = [part for part in inner if isinstance(part, list | dict)]
        if not level:
            return False
    return True


def parse_json(text: str | bytes, where: str) -> Any:
    """A value of JSON text.

    Args:
        text: the JSON.
        where: what to call it in messages: "prompts.jsonl, line 3".

    Raises:
        ValueError: it is not JSON, or nothing that Python can hold: nested too deep, or a number of 4,300 digits.
    """
    try:
        value = json.loads(text)
        if _deep(value):
            raise RecursionError
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start})") from error
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deep") from None
    except ValueError as error:  # of integers with more digits than Python converts
        raise ValueError(f"{where}: {str(error).partition(';')[0]}") from error


def parse_yaml(text: str, where: str) -> Any:
    """A value of YAML text, which may hold no key twice.

    Args:
        text: the YAML.
        where: what to call it in messages.

    Raises:
        ValueError: it is not YAML; the message says in which line.
    """
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ValueError(f"{where}{line}: not YAML ({error.problem or error.context})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())})") from error
    except RecursionError:
        raise ValueError(f"{where}: YAML that is nested too deep") from None


def _loader() -> Any:
    """PyYAML's safe loader, which refuses a key that stands twice instead of dropping one."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses doubled keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """A mapping, unless a key stands in it twice."""
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    return Loader
