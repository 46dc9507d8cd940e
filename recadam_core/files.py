"""Files that are whole or absent: written beside their place, then renamed; and JSON that is checked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from .errors import RecAdamError

__all__ = [
    "UNFINISHED",
    "cache_folder",
    "check_regular",
    "making",
    "naming",
    "parse_json",
    "replacing",
    "write_json",
]

T = TypeVar("T")
UNFINISHED = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.recadam-part")
"""What a kill may leave beside the place of a file of that name."""


def cache_folder() -> Path:
    """The folder of downloads: $RECADAM_CACHE, or `recadam` under $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("RECADAM_CACHE")
    if named:
        try:
            return Path(named).expanduser().resolve()
        except RuntimeError as error:  # there is no such user
            raise RecAdamError(f"RECADAM_CACHE is {named!r}: {error}; give a folder") from None
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "recadam"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Where a system's error names no file, as that of a full disk, it names this one.

    Example:
        >>> with naming(Path("steps.jsonl")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        ...
        OSError: [Errno 28] No space left on device: 'steps.jsonl'
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def check_regular(path: Path) -> None:
    """Raise for what is there and is no file: from a pipe one would read for ever.

    Example:
        >>> check_regular(Path(os.devnull))
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: /dev/null: is no regular file; move it
    """
    if path.exists() and not path.is_file():
        raise RecAdamError(f"{path}: is no regular file; move it")


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """The folder, made if need be; what was made for it goes again if it is left empty."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in absent:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when not.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a.txt") as beside:
        ...     _ = beside.write_text("whole")
        >>> [p.name for p in folder.iterdir()]
        ['a.txt']
    """
    with making(path.parent), naming(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".recadam-part", dir=path.parent)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            beside.chmod(0o644)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; floats keep every digit.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_json(path, {"a": 0.1}); path.read_text().split()
        ['{', '"a":', '0.1', '}']
    """
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def parse_json(where: Path, text: bytes | str, kind: type[T], remedy: str) -> T:
    """The value of a JSON text, if it is of that type.

    Args:
        where: the file, for the message.
        text: what is in it.
        kind: dict or list.
        remedy: what to do about a damaged one.

    Returns:
        The value.

    Raises:
        RecAdamError: when it is no JSON, no Unicode, nested too deeply, or of another type.

    Example:
        >>> parse_json(Path("a.json"), "[" * 10**6, list, "write it again")
        Traceback (most recent call last):
        ...
        recadam_core.errors.RecAdamError: a.json: damaged (nested too deeply); write it again
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise RecAdamError(f"{where}: damaged (nested too deeply); {remedy}") from None
    except ValueError as error:  # a number of too many digits, and text that is no Unicode, too
        raise RecAdamError(f"{where}: damaged ({error}); {remedy}") from None
    if not isinstance(value, kind):
        raise RecAdamError(f"{where}: damaged (not a {kind.__name__}); {remedy}")
    return value
