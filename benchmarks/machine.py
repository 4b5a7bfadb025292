"""What the figures were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import actome

from .row import Options

LIBRARIES = ("torch", "transformers", "transformer-lens", "nnsight")


def describe(options: Options) -> dict[str, str]:
    """Processor, cores, threads, system, versions and date."""
    facts = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(options.threads),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "actome": actome.__version__,
    }
    for library in LIBRARIES:
        try:
            facts[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            facts[library] = "not installed"
    return {**facts, "date": datetime.date.today().isoformat(), "rounds": "few (--quick)" if options.quick else "full"}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
