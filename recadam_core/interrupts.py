"""Ctrl-C and a supervisor's SIGTERM: they end a command between two steps, and at once the second time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Signalled", "deferred", "exit_code", "interrupted", "obey", "rest"]

SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
SHOWN = b"\x1b[?25h"  # a terminal's cursor, which a progress bar hides
TWICE = 0.5  # seconds within which a signal counts once: `timeout` sends it to the process and to its group

_seen: list[int] = []
_again: list[int] = []  # signals that are sent once more, and are no second ones


class Signalled(KeyboardInterrupt):
    """Raised by a signal.

    A class of its own, since Python ends by SIGINT after a bare KeyboardInterrupt that has passed through
    `exec`, be it caught or not.
    """


def obey(insistent: bool = True) -> None:
    """In a program's main thread: the first signal raises `Signalled`, a later one ends the process.

    Python's handlers wait while a framework computes or compiles, for minutes perhaps. So a thread listens,
    too, to whom the system tells each signal as it comes; but not in the processes of a pool, which are told
    to end by their parent and once more by the pool.
    """
    if signal.getsignal(signal.SIGTERM) is _raise:
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as for a shell's background jobs
            signal.signal(number, _raise)
    sys.unraisablehook = _lost
    if not insistent:
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()


def rest() -> None:
    """Where the end is near: a signal more has nothing to end, and no say in the exit code."""
    for number in SIGNALS:
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.SIG_IGN)


def interrupted() -> bool:
    """Whether a signal was obeyed."""
    return bool(_seen)


def exit_code() -> int:
    """The code with which a program ends that was interrupted: 128 and the signal's number."""
    return 128 + (_seen[0] if _seen else signal.SIGINT)


def _raise(number: int, frame: FrameType | None) -> None:
    if not _seen:
        _seen.append(number)
        raise Signalled


def _lost(unraisable: Any) -> None:
    """Python drops what is raised in a finalizer or a collector's callback: then the signal is sent again."""
    if unraisable.exc_type is not Signalled or not _seen:
        sys.__unraisablehook__(unraisable)
        return
    number = _seen.pop()
    _again.append(number)
    main = threading.main_thread().ident or 0
    # In a moment: this, too, runs where nothing can be raised.
    timer = threading.Timer(0.01, signal.pthread_kill, (main, number))
    timer.daemon = True
    timer.start()


def _listen(heard: int) -> None:
    first = None
    while number := os.read(heard, 1):
        if number[0] not in SIGNALS:
            continue
        if _again and first is not None:
            _again.pop()
            continue
        now = time.monotonic()
        if first is not None and now - first > TWICE:
            os.write(2, (SHOWN if os.isatty(2) else b"") + b"recadam: ended at once\n")
            os._exit(128 + number[0])
        first = first or now


@contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Signals wait for a check: an exception amid a framework's callback is lost there, or worse.

    Yields the check, to be called where an exception is safe: it lets a signal that came be handled as it
    would have been. So does the end of the block. A second signal does not wait.

    Example:
        >>> try:
        ...     with deferred() as check:
        ...         signal.raise_signal(signal.SIGINT)
        ...         print("a step is taken to its end")
        ...         check()
        ... except KeyboardInterrupt:
        ...     print("and then the run ends")
        a step is taken to its end
        and then the run ends
    """
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[int] = []
    came = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if not waiting:
            waiting.append(number)
            came = time.monotonic()
        elif before[number] is not _raise and time.monotonic() - came > TWICE:  # else `_listen` sees to it
            before[number](number, frame)

    def check() -> None:
        if waiting:
            number = waiting.pop()
            before[number](number, None)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield check
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        check()  # of a signal that came after the last check
