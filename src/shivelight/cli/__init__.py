"""The command line, one file per command. Errors are one readable line; `--debug` shows the traceback."""

import sys
from collections.abc import Sequence
from importlib import import_module
from keyword import iskeyword

import typer
from transformers.utils import logging

from shivelight.errors import ShivelightError

app = typer.Typer(
    name="shivelight",
    help="Make Diffusion Transformers compute only where it matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Before the commands are imported: it would tell of every optional package that is not there.
logging.set_verbosity_error()

CTRL_C = 130  # what typer makes of a KeyboardInterrupt
COMMANDS = ("demo", "train", "generate", "evaluate", "bench", "calibrate", "fit", "tune", "import", "report")
for _command in COMMANDS:
    _name = f"{_command}_" if iskeyword(_command) else _command
    app.command(_command)(getattr(import_module(f"shivelight.cli.{_name}"), _name))


def spread(arguments: Sequence[str]) -> list[str]:
    """Several numbers after an option that may be repeated, as that option repeated; and several names after --peers.

    >>> spread(["evaluate", "--keep", "0.8", "0.6", "--json", "out.json"])
    ['evaluate', '--keep', '0.8', '--keep', '0.6', '--json', 'out.json']
    """
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = commands.get(arguments[0]) if arguments else None
    repeated = {name for option in known.params if option.multiple for name in option.opts} if known else set()
    # Elsewhere a word may be an argument of the command's own.
    words = repeated & {"--peers"}
    spread_out: list[str] = []
    current = None
    for argument in arguments:
        if argument.startswith("--"):
            current = argument if argument in repeated else None
        elif current is not None and spread_out[-1] != current and (current in words or _is_number(argument)):
            spread_out.append(current)
        spread_out.append(argument)
    return spread_out


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 bad usage."""
    debug = "--debug" in sys.argv
    arguments = spread([argument for argument in sys.argv[1:] if argument != "--debug"])
    try:
        app(arguments)
    except ShivelightError as error:
        if debug:
            raise
        typer.echo(f"shivelight: {error}", err=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code != CTRL_C:
            raise
        typer.echo("shivelight: interrupted; nothing is left half-written", err=True)
        sys.exit(1)
