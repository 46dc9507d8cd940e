"""A folder that a command writes: one owner at a time, and a manifest of the files that are the command's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from recadam_core.errors import RecAdamError
from recadam_core.files import UNFINISHED, check_regular, making, parse_json, replacing, write_json

__all__ = ["LOCK", "MANIFEST", "Folder", "is_empty", "owned", "sha256_of"]

MANIFEST, LOCK = "manifest.json", ".recadam.lock"


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """The folder, made if need be, is this process's alone; the system frees it when the process dies.

    Neither the lock nor a folder that was made for it stays, if nothing else was written there.
    """
    if path.exists() and not path.is_dir():
        raise RecAdamError(f"{path}: is a file; give a directory")
    with contextlib.ExitStack() as stack:
        while True:
            stack.enter_context(making(path))
            _check_lock(path / LOCK)
            lock = FileLock(path / LOCK, blocking=False)
            try:
                lock.acquire()
                break
            except Timeout:
                raise RecAdamError(
                    f"{path}: another process writes there; let it end, or give another directory"
                ) from None
            except FileNotFoundError:  # its owner has just taken the folder away
                continue
        before = (path / MANIFEST).exists()
        try:
            yield
        finally:
            # Of what was given up before anything was written, nothing stays.
            if not before and {found.name for found in path.iterdir()} == {LOCK, MANIFEST}:
                (path / MANIFEST).unlink()
            # Who has the file open already, and locks it now, sees that it is gone.
            (path / LOCK).unlink(missing_ok=True)
            lock.release()


def is_empty(path: Path) -> bool:
    """Whether there is no such folder, or nothing in it but a lock and what a kill left beside a manifest."""
    if not path.exists():
        return True
    names = [found.name for found in path.iterdir()]
    parts = [match["name"] for match in map(UNFINISHED.fullmatch, names) if match]
    return len(names) == names.count(LOCK) + parts.count(MANIFEST)


def _check_lock(path: Path) -> None:
    """Raise for a file that is no lock: a lock is empty, and goes when its owner does."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        raise RecAdamError(f"{path}: is there, and is no lock; move it, or give another directory")


class Folder:
    """What a command wrote in a folder, by its manifest: nothing else is ever replaced or removed there.

    Args:
        path: the folder.
        kind: what it holds: "run", "demo", "experiment", "report" or "seeds".

    Raises:
        RecAdamError: when it holds another kind, or its manifest is damaged.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        self.files: dict[str, str | None] = {}
        self.identity = ""
        self._swept = False
        manifest = path / MANIFEST
        if not manifest.exists():
            return
        remedy = "move what is yours, and delete the rest of the folder"
        check_regular(manifest)
        try:
            values = parse_json(manifest, manifest.read_bytes(), dict, remedy)
        except OSError as error:
            raise RecAdamError(f"{manifest}: {error.strerror}; {remedy}") from None
        held, files, identity = values.get("holds"), values.get("files"), values.get("identity")
        if isinstance(held, str) and held != kind:
            raise RecAdamError(f"{path}: holds a {held}, not a {kind}; give another directory")
        if held != kind or not isinstance(files, dict) or not isinstance(identity, str):
            raise RecAdamError(f"{manifest}: damaged (no manifest of a {kind}); {remedy}")
        for name, digest in files.items():
            inside = PurePosixPath(name)
            plain = name == str(inside) and not inside.is_absolute() and ".." not in inside.parts
            plain = plain and name.isprintable() and all(len(part.encode()) < 256 for part in inside.parts)
            hexadecimal = digest is None or (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest))
            if not plain or name in (".", MANIFEST) or not hexadecimal:
                raise RecAdamError(f"{manifest}: damaged (entry {name!r}); {remedy}")
        self.files, self.identity = files, identity

    def check(self, names: Iterable[str], overwrite: bool = True, edited: bool = True) -> None:
        """Raise unless these files may be written: they are not there, or this kind of command wrote them.

        With `edited=False` not if somebody has changed them since.
        """
        for name in names:
            path = self._inside(name)
            if not (path.exists() or path.is_symlink()):
                continue
            if path.is_dir():
                raise RecAdamError(f"{path}: is a folder where a file belongs; move it")
            if name not in self.files:
                raise RecAdamError(
                    f"{path}: is there, and no {self.kind} wrote it; move it, or give another directory"
                )
            if not overwrite:
                raise RecAdamError(f"{path}: is there already; give --overwrite or another directory")
            if not edited and self.altered(name):
                raise RecAdamError(f"{path}: was changed after the {self.kind} had written it; move it")

    def begin(self, names: Iterable[str], identity: str = "") -> None:
        """List files that are about to be written, and are not known before they are whole."""
        names = list(names)
        self.check(name for name in names if name not in self.files)
        held = self.identity, dict(self.files)
        self.identity = identity or self.identity
        self.files |= dict.fromkeys(names)
        if (self.identity, self.files) == held:
            self._sweep()
        else:
            self._save()

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all, and its sha256 into the manifest."""
        if self.files.get(name, "") is not None:
            self.begin([name])
        with replacing(self._inside(name)) as beside:
            beside.write_bytes(data)
        self.files[name] = hashlib.sha256(data).hexdigest()
        self._save()

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file likewise."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def seal(self, name: str) -> None:
        """Put the sha256 of a file that is whole now into the manifest."""
        self.files[name] = sha256_of(self.path / name)
        self._save()

    def altered(self, name: str, data: bytes | None = None) -> bool:
        """Whether a file is not what was written; False while that is not known."""
        wanted = self.files.get(name)
        if wanted is None:
            return False
        return wanted != (sha256_of(self.path / name) if data is None else hashlib.sha256(data).hexdigest())

    def remove(self, names: Iterable[str]) -> None:
        """Remove files of the manifest, and take them off it."""
        self._sweep()
        gone = [name for name in names if name in self.files]
        if any(self.files[name] for name in gone):  # from here on they may be missing
            self.files |= dict.fromkeys(gone)
            self._save()
        for name in gone:
            self._inside(name).unlink(missing_ok=True)
        for name in gone:
            del self.files[name]
        self._save()

    def _sweep(self) -> None:
        """Before anything is written, remove what a kill left beside the places of files of the manifest."""
        if self._swept:
            return
        self._swept = True
        listed = {self._inside(name) for name in (MANIFEST, *self.files)}
        for folder in {path.parent for path in listed if path.parent.is_dir()}:
            for beside in list(folder.iterdir()):
                match = UNFINISHED.fullmatch(beside.name)
                if match and folder / match["name"] in listed:
                    beside.unlink()

    def _inside(self, name: str) -> Path:
        """Where a file is, which no link may lead away from the folder."""
        parents = [self.path / part for part in PurePosixPath(name).parents if str(part) != "."]
        for parent in parents:
            if parent.is_symlink():
                raise RecAdamError(
                    f"{parent}: is a link to another folder; remove the link, or give another directory"
                )
            if parent.exists() and not parent.is_dir():
                raise RecAdamError(f"{parent}: is a file where a folder belongs; move it")
        return self.path / name

    def _save(self) -> None:
        self._sweep()
        values = {"holds": self.kind, "identity": self.identity, "files": self.files}
        write_json(self.path / MANIFEST, values)


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
