"""The command `recadam`; its sub-commands are in `commands`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

from .errors import Interrupted, RecAdamError
from .files import naming
from .interrupts import exit_code, interrupted, obey, rest

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
        _open_streams()
        obey()
        _speak_anything()
        _run()
    except RecAdamError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = next((EXTRAS[word] for word in sys.argv[1:] if word in EXTRAS), "finetune")
        _fail(f"{error.name!r} is not installed; pip install 'recadam-core[{extra}]'")
    except BrokenPipeError:  # who reads the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + 13)
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; give a path that can be written and read")
    except MemoryError as error:
        _fail(f"not enough memory ({str(error) or 'nothing more is said'}); give fewer rows, seeds or steps")
    except (KeyboardInterrupt, Interrupted) as error:
        _end(exit_code(), "; ".join(filter(None, ("interrupted", str(error)))))
    except Exception:
        if not interrupted():
            raise
        _fail("")


def _open_streams() -> None:
    """Where the shell closed one, nothing is said; else the next file that is opened would take its place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def _speak_anything() -> None:
    """Names and signs that the terminal's encoding lacks are printed escaped; no name is a broken one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for word in sys.argv[1:]:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise RecAdamError(f"{ascii(word)[1:-1]}: is no valid text; give a name in UTF-8") from None


def _run() -> None:
    import typer

    from .commands import whole

    try:
        code = whole()(standalone_mode=False)
    except typer.Abort as error:  # which stands for an interrupt, and for the end of a file
        raise error.__cause__ or KeyboardInterrupt from None
    except Exception as error:
        # Usage errors; typer's releases differ in which package their classes are of.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message().replace("\n", " ")
        if not message:  # the help was shown, for want of a command
            sys.exit(2)
        raise RecAdamError(message) from None
    if code == 130:  # typer swallows the interrupt
        raise KeyboardInterrupt
    with naming(Path("standard output")):
        sys.stdout.flush()
    rest()
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    if interrupted():  # a library made another error of it
        _end(exit_code(), "interrupted")
    _end(2, str(RecAdamError(message)))


def _end(code: int, message: str) -> NoReturn:
    if code > 128:
        rest()
    with contextlib.suppress(OSError):  # the code says it, too
        print(f"recadam: {message}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.exit(code)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what cannot be written is not tried again
    sys.exit(code)
