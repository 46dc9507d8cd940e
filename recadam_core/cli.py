"""The command `recadam`; its sub-commands are in `commands`."""

from __future__ import annotations

import sys

from .errors import RecAdamError

__all__ = ["main"]


def main() -> None:
    """Run the command line; bad input ends it with one line and exit code 2."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        print(
            f"recadam: the command line needs {error.name!r}; pip install 'recadam-core[finetune]'",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        app()
    except RecAdamError as error:
        print(f"recadam: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(
            f"recadam: {error.name!r} is not installed; pip install 'recadam-core[finetune]'", file=sys.stderr
        )
        sys.exit(2)
