"""Examples, pairs and clamps from the files that the command line names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actome.clamps import load_clamps
from actome.clamps.saved import read_header
from actome.core.clamp import Clamp
from actome.core.errors import ClampError, MeasureError, nearest_beside

from .choices import Choices
from .gguf import from_gguf
from .preference import Pairs

if TYPE_CHECKING:
    from actome.core.model import Model


def read_examples(path: str | Path) -> Any:
    """Examples of one kind: a text file with one a line, or JSON lines with ``prompt`` and ``response``.

    Returns:
        A list of texts, or ``(prompts, responses)``.

    Raises:
        MeasureError: no such file, nothing in it, or a line that is not as the others.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        return _lines(path)
    rows = _json_lines(path, ("prompt", "response"))
    return [row["prompt"] for row in rows], [row["response"] for row in rows]


def read_pairs(path: str | Path) -> Pairs:
    """Pairs to judge a clamp by: JSON lines with ``prompt``, ``wanted`` and ``unwanted``.

    Raises:
        MeasureError: no such file, nothing in it, or a line that lacks one of them.
    """
    rows = _json_lines(Path(path), ("prompt", "wanted", "unwanted"))
    return Pairs(*([row[name] for row in rows] for name in ("prompt", "wanted", "unwanted")))


def read_choices(path: str | Path) -> Choices:
    """Questions: JSON lines with ``prompt``, ``answers`` (texts) and ``right`` (which of them, from 0).

    Raises:
        MeasureError: no such file, nothing in it, or a line that lacks one of them.
    """
    path = Path(path)
    rows = _json_lines(path, ("prompt",))
    for number, row in enumerate(rows, 1):
        answers, right = row.get("answers"), row.get("right")
        texts = isinstance(answers, list) and all(isinstance(one, str) and one for one in answers)
        if not texts or not isinstance(right, int) or isinstance(right, bool):
            raise MeasureError(f"{path}, line {number}: give answers, a list of texts, and right, a place in it from 0")
    return Choices([row["prompt"] for row in rows], [row["answers"] for row in rows], [row["right"] for row in rows])


def read_clamps(path: str | Path, model: Model) -> list[Clamp]:
    """Clamps from a folder that `save_clamps` wrote, or from a GGUF control vector.

    Raises:
        ClampError: nothing there, damaged, or made for another model.
    """
    path = Path(path)
    if path.is_file() and path.suffix != ".gguf":
        raise ClampError(f"{path} is neither a folder with clamps nor a .gguf file")
    return list(from_gguf(path, model)) if path.suffix == ".gguf" else load_clamps(path, model)


def how_fitted(path: str | Path) -> dict[str, Any]:
    """How the clamps in a folder were fitted: method, over and sites, as `actome steer fit` keeps them.

    Raises:
        ClampError: a folder, or a file, that does not say.
    """
    path = Path(path)
    about = read_header(path).get("about") if path.is_dir() else None
    if isinstance(about, dict) and str(about.get("method", "")).startswith("split"):
        raise ClampError(f"{path} was trained on pairs of responses, so that there are no labels to shuffle")
    if not isinstance(about, dict) or not {"method", "over", "sites"} <= about.keys():
        raise ClampError(f"{path} does not say how it was fitted, so that it cannot be fitted to shuffled labels")
    return about


def _lines(path: Path) -> list[str]:
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise MeasureError(f"there is no file {path}{nearest_beside(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MeasureError(f"{path} cannot be read as text: {error}") from None
    if not found:
        raise MeasureError(f"{path} is empty; give one example a line")
    return found


def _json_lines(path: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise MeasureError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) and row[name] for name in names):
            raise MeasureError(f"{path}, line {number}: give an object with the texts {', '.join(names)}")
        rows.append(row)
    return rows
