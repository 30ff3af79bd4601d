"""The place of a checkpoint: a hub id, a local folder, or a GGUF file in one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from ..files import parse_json


@dataclass(frozen=True)
class Checkpoint:
    """The place of a checkpoint.

    Attributes:
        path: hub id or local folder.
        revision, subfolder: as in transformers; subfolder for the hub only.
        gguf_file: the file in it that holds the weights, or None.
    """

    path: str
    revision: str | None = None
    subfolder: str = ""
    gguf_file: str | None = None

    @classmethod
    def of(cls, location: str | PathLike[str], revision: str | None = None, gguf_file: str | None = None) -> Checkpoint:
        """From what users pass: a hub id, a folder, or a GGUF file.

        Raises:
            OSError: it looks like a path, and nothing is there.
        """
        path = os.path.expanduser(os.fspath(location))
        if path.endswith(".gguf") and gguf_file is None:
            path, gguf_file = os.path.split(path)
            path = path or "."
        if not os.path.isdir(path) and (path.startswith((".", os.sep)) or path.count("/") > 1 or os.path.exists(path)):
            raise FileNotFoundError(f"{os.fspath(location)!r} is not a folder with a model (and no hub id either)")
        source = cls(path, revision, "", gguf_file)
        if gguf_file is not None and source.local and not os.path.isfile(os.path.join(path, gguf_file)):
            raise FileNotFoundError(f"there is no file {gguf_file!r} in {path!r}")
        return source

    @property
    def local(self) -> bool:
        """Return True if it is a folder here."""
        return os.path.isdir(self.path)

    @property
    def name(self) -> str:
        """For messages."""
        return os.path.join(self.path, self.subfolder, self.gguf_file or "").rstrip("/")

    def below(self, part: str) -> Checkpoint:
        """A folder inside this one."""
        if part == ".":
            return self
        if self.local:
            return replace(self, path=os.path.normpath(os.path.join(self.path, part)))
        return replace(self, subfolder=os.path.join(self.subfolder, part))

    def file(self, name: str, hub: Mapping[str, Any]) -> str | None:
        """Local path of one of its files, fetched where need be; None where it has no such file."""
        if self.local:
            path = os.path.join(self.path, name)
            return path if os.path.isfile(path) else None
        from transformers.utils import cached_file

        local_path: str | None = cached_file(
            self.path,
            name,
            revision=self.revision,
            subfolder=self.subfolder,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **{key: value for key, value in hub.items() if key != "trust_remote_code"},
        )
        return local_path

    def check_config(self) -> None:
        """Raises ValueError where a local config.json holds anything but a JSON object."""
        path = self.file("config.json", {}) if self.local and self.gguf_file is None else None
        if path is None:
            return
        with open(path, "rb") as file:
            config = parse_json(file.read(), path)
        if not isinstance(config, dict):
            raise ValueError(f"{path}: a JSON object is needed, got {type(config).__name__}")

    def where(self) -> dict[str, Any]:
        """As arguments of from_pretrained, beside the path."""
        return {"revision": self.revision} | ({"subfolder": self.subfolder} if self.subfolder else {})

    def stamp(self) -> tuple[object, ...]:
        """Changes when a local folder's files do."""
        if not self.local:
            return ()
        return tuple(sorted((e.name, e.stat().st_mtime_ns, e.stat().st_size) for e in os.scandir(self.path)))
