"""The command line, one file per command. Errors are one readable line; `--debug` shows the traceback."""

import sys
from importlib import import_module
from keyword import iskeyword

import typer

from shivelight.errors import ShivelightError

app = typer.Typer(
    name="shivelight",
    help="Make Diffusion Transformers compute only where it matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CTRL_C = 130  # what typer makes of a KeyboardInterrupt
COMMANDS = ("demo", "train", "generate", "evaluate", "bench", "import", "report")
for _command in COMMANDS:
    _name = f"{_command}_" if iskeyword(_command) else _command
    app.command(_command)(getattr(import_module(f"shivelight.cli.{_name}"), _name))


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 bad usage."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
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
