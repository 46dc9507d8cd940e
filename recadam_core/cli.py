"""The command `recadam`; its sub-commands are in `commands`."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from .errors import Interrupted, RecAdamError

__all__ = ["main"]

EXTRAS = {
    "conformance": "conformance",
    "backends": "conformance",
    "trial": "experiments",
    "experiment": "experiments",
}
"""What a sub-command needs, where that is not the extra `finetune`."""


def main() -> None:
    """Run the command line; bad input ends it with one line and exit code 2."""
    try:
        # A supervisor's SIGTERM ends a run as Ctrl-C does: child processes with it, directories true.
        signal.signal(signal.SIGTERM, _end)
        _run()
    except RecAdamError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = next((EXTRAS[word] for word in sys.argv[1:] if word in EXTRAS), "finetune")
        _fail(f"{error.name!r} is not installed; pip install 'recadam-core[{extra}]'")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; give a path that can be written and read")
    except (KeyboardInterrupt, Interrupted) as error:
        print("; ".join(filter(None, ("recadam: interrupted", str(error)))), file=sys.stderr)
        sys.exit(130)


def _end(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice, and would interrupt the end
    raise KeyboardInterrupt


def _run() -> None:
    import typer

    from .commands import whole

    try:
        code = whole()(standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Usage errors; typer's releases differ in which package their classes are of.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message().replace("\n", " ")
        if not message:  # the help was shown, for want of a command
            sys.exit(2)
        _fail(message)
    if code == 130:  # typer swallows the interrupt
        raise KeyboardInterrupt
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    print(f"recadam: {message}", file=sys.stderr)
    sys.exit(2)
