"""Measuring on several processes: a text is cut into shards, each measured on its own, and the statistics merged.

Under ``torchrun`` nothing special is needed: every rank calls ``model.measure(text.shard(rank, ranks), ...)`` and gets
the values of all. This module is for Ray, which also reaches other machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ActomeError, MeasureError
from .table import MeasureResult, MeasureTable
from .text import Text

if TYPE_CHECKING:
    from .model import Model


def merge_tables(tables: Sequence[MeasureTable]) -> MeasureTable:
    """The table of all the streams together: merging the parts equals measuring the whole.

    Args:
        tables: of the same measures at the same sites, such as those of the shards of a text.

    Raises:
        MeasureError: there is none, or they are not of the same measures and sites.
    """
    if not tables:
        raise MeasureError("there is nothing to merge")
    shape = [(type(r.measure), [s.name for s in r.sites]) for r in tables[0].results]
    for table in tables[1:]:
        if [(type(r.measure), [s.name for s in r.sites]) for r in table.results] != shape:
            raise MeasureError("these tables are of different measures or sites and cannot be merged")
    merged = []
    for parts in zip(*(table.results for table in tables), strict=True):
        total = parts[0].measure.clone()
        for part in parts[1:]:
            total.merge_state(part.measure)
        merged.append(MeasureResult(total, parts[0].sites, total.compute()))
    return MeasureTable(merged, tables[0].skipped)


def measure_on_ray(
    load: Callable[[], Model], text: Text, measures: Any, *, workers: int = 2, cpus: float = 1, gpus: float = 0
) -> MeasureTable:
    """`Model.measure` over a Ray cluster: each worker loads the model and measures its share of the rows.

    Args:
        load: makes the model, in each worker: ``lambda: ac.load("path")``.
        text: whose rows are dealt out in turn.
        measures: as for `Model.measure`.
        workers: how many shards; no more than the text has rows.
        cpus, gpus: of each worker.

    Returns:
        The same table as measuring the whole text in one process.

    Raises:
        ActomeError: Ray is not installed (``pip install "actome[ray]"``).

    Example:
        >>> table = measure_on_ray(ac.demo, text, {"blocks.*.resid.post": ActivationScale()})  # doctest: +SKIP
    """
    try:
        import ray
    except ImportError as error:
        raise ActomeError('Ray is not installed; pip install "actome[ray]"') from error
    if workers < 1:
        raise MeasureError(f"workers is {workers}; it must be at least 1")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)

    @ray.remote(num_cpus=cpus, num_gpus=gpus)
    def work(shard: Text) -> MeasureTable:
        return load().measure(shard, measures)

    return merge_tables(ray.get([work.remote(text.shard(i, workers)) for i in range(workers)]))
