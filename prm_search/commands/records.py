"""JSON Lines in and out: prompts and responses to read, and result files that survive being stopped."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import Distinct, one_writer, parse_json
from ..tree import Prompt
from . import BadInput


@dataclass(frozen=True)
class Item:
    """One prompt of the input, and the response to score where there is one.

    Attributes:
        where: what to call it in messages: "prompts.jsonl, line 3".
        prompt: what to search or score under.
        response: text or token ids; None where only prompts are read.
        extra: the record's other fields; "id" is copied to the output.
    """

    where: str
    prompt: Prompt
    response: str | list[int] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def digest(self, *settings: object) -> str:
        """A short name for this input under these settings, which are plain values: equal ones have equal names."""
        messages = None if self.prompt.messages is None else [dict(message) for message in self.prompt.messages]
        values = [self.prompt.text, messages, self.prompt.token_ids, self.response, *settings]
        return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def digests(items: Sequence[Item], *settings: object) -> list[str]:
    """A name for each item; equal items are told apart by how many equal ones came before."""
    seen: Counter[str] = Counter()
    known: dict[int, str] = {}  # an item that stands in the list many times is named once
    names = []
    for item in items:
        name = known.get(id(item)) or known.setdefault(id(item), item.digest(*settings))
        names.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def lines_of(path: str) -> Iterator[tuple[str, str]]:
    """The lines of a text file ("-" is standard input) that are not blank, each with what to call it."""
    name = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {reason(error)}") from error
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            raise BadInput(f"{where} cannot be read: not UTF-8 (byte {error.start})") from error
        if text.strip():
            yield where, text


def json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a JSON Lines file, each with what to call it. Raises BadInput where a line is no JSON object."""
    for where, line in lines_of(path):
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise BadInput(f"{where}: a JSON object is needed, got {type(record).__name__}")
        yield where, record


def read_items(path: str, *, chat: bool = False, system: str | None = None, responses: bool = False) -> list[Item]:
    """Prompts, or prompts with responses, of a JSON Lines file; of any other file, a prompt a line.

    Args:
        path: "-" is standard input, read as JSON Lines.
        chat, system: see prompt_of.
        responses: each record needs a "response". A rollout, with "prompt_ids" and "response_ids" and no question,
            is read as these ids.

    Raises:
        BadInput: the file cannot be read or holds none, or a record lacks a field or has one of the wrong kind.
    """
    if path != "-" and not path.endswith((".jsonl", ".json")) and not responses:
        items = [Item(where, prompt_of(line, where, chat, system)) for where, line in lines_of(path)]
    else:
        items = [_item(where, record, chat, system, responses) for where, record in json_lines(path)]
    if not items:
        raise BadInput(f"{path} holds no {'responses' if responses else 'prompts'}")
    return items


def _item(where: str, record: dict[str, Any], chat: bool, system: str | None, responses: bool) -> Item:
    present = [name for name in ("prompt", "messages", "question") if name in record]
    if responses and not present and {"prompt_ids", "response_ids"} <= set(record):  # as `rollout` writes them
        record = {**record, "prompt": record["prompt_ids"], "response": record["response_ids"]}
        present = ["prompt"]
    if len(present) != 1:
        raise BadInput(f'{where}: one of "prompt", "messages" and "question" is needed, got {present or list(record)}')
    prompt = prompt_of(asked_in(record, present[0], where), where, chat, system)
    response = None
    if responses:
        if "response" not in record:
            raise BadInput(f'{where}: there is no "response"')
        response = record["response"]
        if not (isinstance(response, str) or _is_ids(response)) or not response:
            raise BadInput(f'{where}: "response" must be a text or a list of token ids, and not empty')
    return Item(where, prompt, response, {k: v for k, v in record.items() if k not in (*present, "response")})


def asked_in(record: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a record's field that holds its prompt. Raises BadInput for "messages" that are none."""
    value = record[name]
    if name == "messages" and not (isinstance(value, list) and value and all(map(_is_message, value))):
        raise BadInput(f'{where}: "messages" is {value!r:.80}: a list of objects with "role" and "content" is needed')
    return value


def prompt_of(value: object, where: str, chat: bool = False, system: str | None = None) -> Prompt:
    """A Prompt from a text, token ids or chat messages. Raises BadInput where it is none of them, or empty.

    Args:
        value: what the user wrote.
        where: what to call it.
        chat: a text becomes a user's message, for the model's chat template.
        system: with chat: the system's message before it.
    """
    if isinstance(value, str) and value.strip():
        if not chat:
            return Prompt(text=value)
        before = [] if system is None else [{"role": "system", "content": system}]
        return Prompt(messages=(*before, {"role": "user", "content": value}))
    if _is_ids(value) and value:
        return Prompt(token_ids=tuple(value))  # type: ignore[arg-type]
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return Prompt(messages=tuple(value))
    if not value or isinstance(value, str):
        raise BadInput(f"{where}: the prompt is empty")
    raise BadInput(f'{where}: a prompt is a text, a list of token ids, or messages with "role" and "content"')


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


class RecordFile:
    """A JSON Lines file of results. Each record is on disk before the next one is made, and a stopped run can go on.

    One process writes it at a time. A file that was made here and holds nothing at the end is deleted.

    Args:
        path: the file.
        keys: the key of each input (`digests`), in order; a record carries its input's "index" and "key".
        resume: go on with a file that exists.

    Attributes:
        done: index -> record of what the file held already.

    Raises:
        BadInput: the file exists and `resume` is False, it holds results of other inputs or settings, or it cannot be
            written.
        ValueError: it holds a record twice, or another process is writing it.
    """

    def __init__(self, path: str, keys: Sequence[str], *, resume: bool) -> None:
        self.path, self.keys = Path(path), list(keys)
        self.done: dict[int, dict[str, Any]] = {}
        try:
            if self.path.is_dir():
                raise BadInput(f"--out {path} is a folder: a file is needed")
            with ExitStack() as stack:
                stack.enter_context(one_writer(self.path))
                self._open(resume)
                stack.callback(self._shut)
                self._leave = stack.pop_all()
        except OSError as error:
            where = f" ({error.filename})" if isinstance(error, NotADirectoryError) else ""
            raise BadInput(f"--out {path} cannot be written: {reason(error)}{where}") from error

    def _open(self, resume: bool) -> None:
        self._new = not self.path.exists()
        if not self._new and self.path.stat().st_size:
            if not resume:
                raise BadInput(f"{self.path} exists: --resume goes on with it, otherwise name another file")
            self._read()
        self._file = self.path.open("ab", buffering=0)

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        once = Distinct()
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            where = f"{self.path}, line {number}"
            try:
                record = parse_json(line, where)
                index, key = record["index"], record["key"]
            except (ValueError, TypeError, KeyError) as error:
                raise BadInput(f"{where}: not a result that this command wrote") from error
            if not isinstance(index, int) or not 0 <= index < len(self.keys) or self.keys[index] != key:
                raise BadInput(f"{where}: a result of other inputs or settings; --resume needs the same ones")
            once.add(where, record)
            self.done[index] = record
        if len(whole) < len(content):  # the line that a stopped run was writing
            os.truncate(self.path, len(whole))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, at once and whole. Raises BadInput where it cannot be, as on a full disk."""
        line = dumps(record).encode() + b"\n"
        whole = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), whole)
            raise BadInput(f"--out {self.path} cannot be written: {reason(error)}") from error

    def put_in_order(self) -> None:
        """Order the records by their index, as the last thing that is done to a finished file.

        A reader finds the one order or the other: the file is written anew beside itself, and takes its place. Where
        that cannot be done it stays as it is, and a line on standard error says so.
        """
        if not self.path.is_file():  # a device, or a pipe
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        ordered = sorted(lines, key=lambda line: int(parse_json(line, str(self.path))["index"]))
        if ordered == lines:
            return
        beside = self.path.with_name(f"{self.path.name}.ordered")
        try:
            with beside.open("wb") as file:
                file.writelines(ordered)
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self.path, beside)
            os.replace(beside, self.path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            print(f"prm-search: {self.path} stays in the order of finishing: {reason(error)}", file=sys.stderr)
            return
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def _shut(self) -> None:
        self._file.close()
        if self._new and self.path.is_file() and not self.path.stat().st_size:
            self.path.unlink()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.close()


def finished(path: Path) -> list[dict[str, Any]]:
    """The records of a file that a run writes or wrote; a line that a stopped run was writing is left out.

    Raises BadInput where the file cannot be read, is empty, holds a record twice, or holds something else.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {reason(error)}") from error
    once, records = Distinct(), []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise BadInput(f"{where}: a JSON object is needed, got {type(record).__name__}")
        once.add(where, record)
        records.append(record)
    if not records:
        raise BadInput(f"{path} holds no records")
    return records


def dumps(record: Mapping[str, Any]) -> str:
    """One line of JSON that UTF-8 can hold. NaN and infinities, which JSON has no words for, become null."""
    line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a character, of an id for instance: escaped, so that no record is unwritable
        line = json.dumps(_finite(record), allow_nan=False)
    return line


def _finite(nested: Any) -> Any:
    if isinstance(nested, float):
        return nested if abs(nested) < float("inf") else None
    if isinstance(nested, Mapping):
        return {name: _finite(value) for name, value in nested.items()}
    if isinstance(nested, list | tuple):
        return [_finite(value) for value in nested]
    return nested


def asked(item: Item) -> Any:
    """The prompt as it was given."""
    prompt = item.prompt
    if prompt.messages is not None:
        return [dict(message) for message in prompt.messages]
    return prompt.text if prompt.text is not None else list(prompt.token_ids or ())


def writable(option: str, path: str) -> None:
    """Make a file's folder, and see whether it can be written, before any work is done. What is there stays as it is.

    Raises:
        BadInput: it cannot be written.
    """
    try:
        there = Path(path).exists()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).open("a", encoding="utf-8").close()
        if not there:
            Path(path).unlink()
    except (OSError, ValueError) as error:
        raise BadInput(f"{option} {path} cannot be written: {reason(error)}") from error


def write_text(option: str, path: str, text: str) -> None:
    """Write a file. Raises BadInput naming the option where it cannot be, as on a full disk."""
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadInput(f"{option} {path} cannot be written: {reason(error)}") from error


def report(file: RecordFile | None, done: int, total: int) -> None:
    """Say on standard error what a run that wrote a file has in it, where that is not everything."""
    if file is not None and 0 < done < total:
        print(f"{file.path} has {done} of {total} results; --resume goes on", file=sys.stderr)


def rounded(values: Iterable[float]) -> list[float]:
    """fp32 numbers with the digits that they have."""
    return [float(f"{float(value):.7g}") for value in values]


def reason(error: BaseException) -> str:
    """Return what an error says, on one line."""
    message = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return " ".join(message.split("\n\n")[0].split())
