"""Turn errors of any command into one paragraph on stderr and an exit code."""

from __future__ import annotations

import sys
from typing import Any

import click

from effc.errors import EffcError

_INTERRUPTED = 130


class ErrorGroup(click.Group):
    """A group whose commands raise errors freely and return their exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        debug = "--debug" in sys.argv
        try:
            code = super().main(*args, **kwargs)
        except EffcError as error:
            code = _failed(error, str(error), error.exit_code, debug)
        except (click.exceptions.Abort, KeyboardInterrupt):
            click.echo("Interrupted; no half-written output was left.", err=True)
            code = _INTERRUPTED
        except click.ClickException as error:
            error.show()
            code = 2
        except (OSError, MemoryError) as error:
            text = f"{type(error).__name__}: {error}. Check the paths, free memory and disk; --debug shows more."
            code = _failed(error, text, 2, debug)
        except Exception as error:
            text = f"Unexpected {type(error).__name__}: {error}. Run again with --debug and report the trace."
            code = _failed(error, text, 2, debug)
        sys.exit(code if isinstance(code, int) else 0)


def _failed(error: BaseException, text: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    click.secho("Error: ", fg="red", bold=True, err=True, nl=False)
    click.echo(text, err=True)
    return code
