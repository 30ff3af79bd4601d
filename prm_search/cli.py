"""The command line: `prm-search`. Each command is a module of `prm_search.commands`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .commands.calibrate import calibrate
from .commands.demo import demo
from .commands.eval_steps import eval_steps
from .commands.evaluate import evaluate
from .commands.export_tree import export_tree
from .commands.generate import generate
from .commands.rollout import rollout
from .commands.score import score
from .commands.serve import serve
from .commands.train import train
from .commands.tune import tune
from .commands.view import view

app = typer.Typer(
    name="prm-search",
    help="Reward-guided decoding with implicit process rewards.",
    epilog="prm-search COMMAND --help says what a command takes.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
)
for command in (demo, generate, score, rollout, train, export_tree, eval_steps, calibrate, tune, view):
    app.command()(command)
app.command("eval")(evaluate)
app.command(context_settings={"allow_extra_args": True})(serve)  # what follows -- is for the engine's own server

INTERRUPTED = 130


def _version(show_version: bool) -> None:
    if show_version:
        from . import __version__

        print(f"prm-search {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        args: the words after the program's name; None for this process's own.

    Returns:
        0 for success. 1 where nobody reads the output any more. 2 for bad input, after one line on standard error. 130
        for Ctrl-C; finished results are kept. Errors of the program itself leave as exceptions.
    """
    arguments = _spelled_out(list(sys.argv[1:] if args is None else args))
    debug = "--debug" in arguments
    try:
        status = int(app(arguments, prog_name="prm-search", standalone_mode=False) or 0)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        line = _one_line(error)
        if line is None:
            raise
        _say(line)
        return 2
    if status == INTERRUPTED:  # also from typer, which makes an exit of Ctrl-C
        _say("interrupted")
    return status


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """The words, with `--ray` where it has no address as `--ray=local`: typer knows no options like it."""
    following = [*arguments, "--"][1:]
    return [
        "--ray=local" if word == "--ray" and after.startswith("-") else word
        for word, after in zip(arguments, following, strict=True)
    ]


def _one_line(error: Exception) -> str | None:
    """Return what to tell a user whose input was wrong; None where the program is."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own, of whatever typer that is
        if type(error).__name__ == "NoArgsIsHelpError":
            return "a command is needed; --help lists them"
        return _from_file(error) + " ".join(str(error.format_message()).split())
    if isinstance(error, ValueError | OSError | ImportError):
        from .commands.records import reason

        name = getattr(error, "filename", None)
        return f"{name}: {reason(error)}" if name else reason(error)
    return None


def _from_file(error: Any) -> str:
    """The file of --config, where the option that a message is of stands there and not on the command line."""
    context, name = getattr(error, "ctx", None), getattr(getattr(error, "param", None), "name", None)
    if context is None or name is None:
        return ""
    source = context.get_parameter_source(name)
    return f"{context.params.get('config')}: " if getattr(source, "name", None) == "DEFAULT_MAP" else ""


def _say(line: str) -> None:
    print(f"prm-search: {line}", file=sys.stderr)
