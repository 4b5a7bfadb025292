"""The hub: a training whose checkpoints are the branches or tags of one repository, such as those of Pythia."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from actome.core.errors import LoadError
from actome.dynamics.trace_steps import step_of

if TYPE_CHECKING:
    from actome.core.model import Model

# Of one checkpoint: its step, its revision, what opens it, and the commit that it is at.
Revision = tuple[int, str, "Callable[[], Model]", str | None]


def revisions_of(
    hub_id: str, revisions: str | Iterable[str] | None, tokenizer: Any, api: Any, loading: Mapping[str, Any]
) -> tuple[list[Revision], list[str]]:
    """The revisions that are checkpoints, and of the others that were asked for why they are none."""
    patterns = [revisions] if isinstance(revisions, str) else None if revisions is None else list(revisions)
    refs = _refs(hub_id, api)
    over: list[str] = []
    found: list[Revision] = []
    for name, commit in refs.items():
        if patterns is not None and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        step = step_of(name)
        if step is None:
            over.append(f"revision {name} says no step")
        else:
            found.append((step, name, _on_hub(hub_id, name, tokenizer, loading), commit))
    if not found:
        names = ", ".join(list(refs)[:8]) or "none"
        over = [f"no revision {'matches ' + ', '.join(patterns) if patterns else 'has a step in its name'} ({names})"]
    return found, over


def _refs(hub_id: str, api: Any) -> dict[str, str | None]:
    """Branches and tags with their commits; a branch hides a tag of its name, as on the hub."""
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        refs = api.list_repo_refs(hub_id)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadError(f"{hub_id} is no folder here, and its revisions cannot be listed: {reason}") from error
    both = [*getattr(refs, "branches", ()), *getattr(refs, "tags", ())]
    found: dict[str, str | None] = {}
    for ref in both:
        found.setdefault(ref.name, getattr(ref, "target_commit", None))
    return found


def _on_hub(hub_id: str, revision: str, tokenizer: Any, loading: Mapping[str, Any]) -> Callable[[], Model]:
    def opened() -> Model:
        from actome.core.load import load

        model = load(hub_id, revision=revision, **loading)
        model.name = f"{hub_id}, {revision}"
        if model.tokenizer is None:
            model.tokenizer = tokenizer
        return model

    return opened
