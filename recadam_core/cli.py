"""The command `recadam`; its sub-commands are in `commands`."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from .errors import RecAdamError

__all__ = ["main"]


def main() -> None:
    """Run the command line; bad input ends it with one line and exit code 2."""
    try:
        import typer

        from .commands import app
    except ModuleNotFoundError as error:
        _fail(f"the command line needs {error.name!r}; pip install 'recadam-core[finetune]'")
    try:
        # A supervisor's SIGTERM ends a run as Ctrl-C does: child processes with it, directories true.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.exit(app(standalone_mode=False))
    except RecAdamError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name!r} is not installed; pip install 'recadam-core[finetune]'")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; give a path that can be written and read")
    except (KeyboardInterrupt, typer.Abort):
        print("recadam: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Usage errors; typer's releases differ in which package their classes are of.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message().replace("\n", " "))


def _fail(message: str) -> NoReturn:
    print(f"recadam: {message}", file=sys.stderr)
    sys.exit(2)
