"""Options of records and reports: where they go, and how they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from .. import BadInput, options
from ..options import ADVANCED, OUTPUT

OUT_HELP = "Write JSON Lines here, each record as soon as it is finished."
BATCH = typer.Option(help="Prompts, problems or responses at a time; changes no result.", rich_help_panel=ADVANCED)


TITLE = typer.Option(help="Of the report.", rich_help_panel=ADVANCED)
JSON = typer.Option("--json", help="JSON Lines on standard output.", rich_help_panel=OUTPUT)


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """Options of how records are made. Raises BadInput for a batch below 1."""

    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is in --out, if it exists.", rich_help_panel=OUTPUT)
    ] = False
    batch: Annotated[int, BATCH] = 32

    def __post_init__(self) -> None:
        options.at_least("--batch", self.batch)


@dataclass(frozen=True, kw_only=True)
class OutFile(Resumable):
    """A file of records."""

    out: Annotated[str, typer.Option(help=OUT_HELP, rich_help_panel=OUTPUT)]


@dataclass(frozen=True, kw_only=True)
class MaybeOutFile(Resumable):
    """A file of records, where there is to be one. Raises BadInput for --resume without it."""

    out: Annotated[str | None, typer.Option(help=OUT_HELP, rich_help_panel=OUTPUT)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.out is None:
            raise BadInput("--resume needs --out, the file to go on with")


@dataclass(frozen=True, kw_only=True)
class OutFolder(Resumable):
    """A folder with records and the report that is made of them."""

    out: Annotated[
        str,
        typer.Option(
            help="Folder for records, each as soon as it is finished, and the report.", rich_help_panel=OUTPUT
        ),
    ]
    report_only: Annotated[
        bool,
        typer.Option("--report-only", help="Make the report again from the records.", rich_help_panel=OUTPUT),
    ] = False
    title: Annotated[str, TITLE] = "Evaluation"
