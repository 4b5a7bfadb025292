"""Lock: that a run has one writer, who it is, and whether it lives."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from actome.core.errors import RunError

from .schema import LOCK

_FIRST = 1 << 30  # the byte that Windows locks, beyond what is written, so that others can read who holds the lock


class WriterLock:
    """The operating system's lock on a run, which ends with the process that holds it, however that ends.

    So there are no stale locks: a file that a dead process has left is simply locked anew.

    Raises:
        RunError: another writer holds it; the message says who.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._file: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        # A reader that looks whether the writer lives holds the lock for an instant, so one refusal says little.
        for wait in (0.0, 0.01, 0.03, 0.1):
            time.sleep(wait)
            if _take(self._file):
                break
        else:
            os.close(self._file)
            raise RunError(f"{folder} is being written by {_holder(self.path)}; a run has one writer at a time")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0) if hasattr(os, "pwrite") else os.write(self._file, text.encode())

    def release(self) -> None:
        """Gives the run free."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None

    def leave(self) -> None:
        """In a forked child: lets go without giving the parent's lock free, and without keeping it beyond its life."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def held(folder: Path) -> bool:
    """Whether a living process on this machine (or, where its file system tells, on another) writes the run."""
    try:
        file = os.open(folder / LOCK, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _take(file, shared=True)
    finally:
        os.close(file)


def _take(file: int, shared: bool = False) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file, _FIRST, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            # Not `lockf`: those locks are lost when the process closes any other descriptor of the file.
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        who = json.loads(path.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["since"]))
        mine = " (this process)" if who["pid"] == os.getpid() and who["host"] == socket.gethostname() else ""
        return f"process {who['pid']}{mine} on {who['host']}, since {since}"
    return "another process"
