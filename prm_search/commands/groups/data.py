"""Options of problems: where they are, how they become prompts, how answers are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from .. import BadInput, options
from ..options import ADVANCED, DATA, LABELS
from ..problems import make_judge, read_problems
from ..records import Item

CHAT = typer.Option("--chat", help="Prompts are user messages to a chat model.", rich_help_panel=DATA)
DATA_HELP = (
    "JSON Lines (- is stdin), a name for the package datasets, with fields as GSM8K and MATH have them, or "
    "reasoning_gym:TASK?size=200."
)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The form in which a text becomes a prompt. Raises BadInput for a system message without a chat."""

    chat: Annotated[bool, CHAT] = False
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.", rich_help_panel=ADVANCED)] = (
        None
    )

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise BadInput("--system needs --chat")


@dataclass(frozen=True, kw_only=True)
class Questions(Chat):
    """The form of the questions in a file or a data set."""

    data_config: Annotated[str | None, typer.Option(help="Of the data set.", rich_help_panel=DATA)] = None
    split: Annotated[str, typer.Option(help="Of the data set.", rich_help_panel=DATA)] = "train"
    template: Annotated[
        str | None,
        typer.Option(help=r"Text around the question, which stands for {}; \n is read as such.", rich_help_panel=DATA),
    ] = None

    def where(self) -> dict[str, Any]:
        """As read_problems and read_rows take it."""
        return {"config": self.data_config, "split": self.split}

    def form(self) -> dict[str, Any]:
        """Return how a question becomes a prompt, as read_problems takes it."""
        text = None if self.template is None else options.unescape(self.template)
        return {"template": text, "chat": self.chat, "system": self.system}

    def problems(self, data: str) -> list[Item]:
        """The problems of a file or a data set, with their answers. Raises BadInput as read_problems does."""
        return read_problems(data, **self.where(), **self.form())


@dataclass(frozen=True, kw_only=True)
class Some(Questions):
    """The first questions alone. Raises BadInput as Chat, or for a limit below 1."""

    limit: Annotated[int | None, typer.Option(help="Problems at most.", rich_help_panel=DATA)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            options.at_least("--limit", self.limit)

    def where(self) -> dict[str, Any]:
        """As read_problems and read_rows take it."""
        return super().where() | {"limit": self.limit}


@dataclass(frozen=True, kw_only=True)
class Data(Some):
    """The questions of a file or a data set."""

    data: Annotated[str, typer.Option(help=DATA_HELP, rich_help_panel=DATA)]


@dataclass(frozen=True, kw_only=True)
class MaybeData(Some):
    """The questions of a file or a data set, where there is one."""

    data: Annotated[str | None, typer.Option(help=DATA_HELP, rich_help_panel=DATA)] = None
    split: Annotated[str, typer.Option(help="Of the data set.", rich_help_panel=DATA)] = "test"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The rule by which responses are judged."""

    label: Annotated[
        str,
        typer.Option(
            help="math (math-verify), exact, or module:function of response and answer.", rich_help_panel=LABELS
        ),
    ] = "math"
    answer: Annotated[
        str | None,
        typer.Option(
            help="The answer in a response: boxed, ####, number or module:function. Default: the first of ####, boxed, "
            "number that is there.",
            rich_help_panel=LABELS,
        ),
    ] = None

    def judge(self) -> Any:
        """A Judge. Raises BadInput naming the option that makes no sense."""
        return make_judge(self.label, self.answer)
