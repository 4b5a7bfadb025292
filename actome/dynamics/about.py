"""About: what a process is, so that a run can be told apart and made again."""

from __future__ import annotations

import os
import platform
import socket
import sqlite3
import subprocess
import sys
from importlib import metadata
from typing import Any

_LIBRARIES = ("torch", "transformers", "numpy")


def environment() -> dict[str, Any]:
    """Versions, host, command line, and the git commit of the working folder if it has one."""
    from actome import __version__

    found: dict[str, Any] = {"actome": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found |= {"sqlite": sqlite3.sqlite_version, "system": platform.platform(terse=True), "host": socket.gethostname()}
    found |= {"folder": os.getcwd(), "command": list(sys.argv)}
    commit = git_commit()
    return found | ({"git_commit": commit} if commit else {})


def git_commit() -> str | None:
    """The commit that the working folder is at; None without git or a repository."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
