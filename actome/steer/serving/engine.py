"""Engine: one thread that runs the model for all requests at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from actome.core.clamp import Clamp

from .rows import Rows, together

if TYPE_CHECKING:
    from actome.core.model import Model

Why = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(eq=False)
class Job:
    """One sequence to be generated.

    Attributes:
        ids: the prompt.
        on_token: called in the engine's thread with each new token; returns whether to go on.
        on_end: called once, with why it ended, and the error if that was one.
        max_tokens, temperature, top_p: of the sampling; temperature 0 takes the likeliest token.
        seed: of the sampling; drawn when None.
        stop_ids: tokens that end the text; they are not given out.
        clamps: of this sequence alone.
        deadline: `time.monotonic()` after which it is ended; None for never.
        cancelled: set by whoever no longer waits for it.
    """

    ids: Sequence[int]
    on_token: Callable[[int], bool]
    on_end: Callable[[Why, BaseException | None], None]
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    clamps: Sequence[Clamp] = ()
    deadline: float | None = None
    cancelled: bool = False
    made: int = 0
    last: int = 0
    generator: torch.Generator | None = field(default=None, repr=False)


class Busy(Exception):
    """More requests wait than are allowed."""


class Engine:
    """Decodes many sequences at once, one token each a step; new ones join between two steps.

    Sequences whose clamps do the same at every token share one batch, each row under its own clamps. Those whose
    clamps depend on positions, phases, steps or conditions have a batch each.

    Args:
        model: the network; nobody else may use it meanwhile.
        most: how many sequences are decoded at once.
        waiting: how many may wait beyond those.

    >>> import actome as ac
    >>> got, done = [], threading.Event()
    >>> with Engine(ac.demo()) as engine:
    ...     job = Job([5, 6, 7], lambda t: not got.append(t), lambda why, error: done.set(), max_tokens=3)
    ...     engine.submit(job)
    ...     _ = done.wait(60)
    >>> len(got)
    3
    """

    def __init__(self, model: Model, *, most: int = 8, waiting: int = 64):
        self.model, self.most, self.waiting = model, most, waiting
        self._queue: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._shared = Rows(model)
        self._batches: list[tuple[Rows, list[Job]]] = [(self._shared, [])]
        self._thread = threading.Thread(target=self._run, name="actome engine", daemon=True)

    def start(self) -> Engine:
        """Begins to work; what ``with`` does."""
        self.model.table  # noqa: B018 - the sites are proved now, and not in the first request
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends every job and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def load(self) -> dict[str, int]:
        """How many sequences are decoded and how many wait."""
        return {"running": sum(len(jobs) for _, jobs in self._batches), "waiting": len(self._queue)}

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            Busy: too many wait already, or the engine has ended.
        """
        with self._wake:
            if self._stopping:
                raise Busy("the server is shutting down")
            if len(self._queue) >= self.waiting:
                raise Busy(f"{len(self._queue)} requests are waiting already")
            self._queue.append(job)
            self._wake.notify()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._working() and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    break
            self._admit()
            for batch in list(self._batches):
                self._advance(*batch)
            self._batches = [batch for batch in self._batches if batch[1] or batch[0] is self._shared]
        for _, jobs in self._batches:
            for job in jobs:
                job.on_end("cancelled", None)
        for job in self._queue:
            job.on_end("cancelled", None)

    def _working(self) -> int:
        return sum(len(jobs) for _, jobs in self._batches)

    def _admit(self) -> None:
        while self._queue and self._working() < self.most:
            job = self._queue.popleft()
            if why := _over(job):
                job.on_end(why, None)
                continue
            rows, jobs = self._batches[0]
            if not together(job.clamps) or (len(rows) and not rows.mergeable):
                rows, jobs = Rows(self.model, alone=True), []
                self._batches.append((rows, jobs))
            try:
                logits_V = rows.join(job.ids, job.clamps)
            except Exception as error:  # whatever a request does to the model is told to that request
                job.on_end("error", error)
                continue
            jobs.append(job)
            if job.temperature > 0:
                job.generator = torch.Generator(device=logits_V.device)
                job.generator.manual_seed(job.seed) if job.seed is not None else job.generator.seed()
            self._take(rows, jobs, [len(jobs) - 1], logits_V[None])

    def _advance(self, rows: Rows, jobs: list[Job]) -> None:
        gone = [i for i, job in enumerate(jobs) if (why := _over(job)) and not job.on_end(why, None)]
        self._drop(rows, jobs, gone)
        if not jobs:
            return
        try:
            logits_BV = rows.step([job.last for job in jobs])
        except Exception as error:
            for job in jobs:
                job.on_end("error", error)
            self._drop(rows, jobs, list(range(len(jobs))))
            return
        self._take(rows, jobs, list(range(len(jobs))), logits_BV)

    def _take(self, rows: Rows, jobs: list[Job], which: list[int], logits_BV: Tensor) -> None:
        """Chooses the next token of some jobs, and lets go of those that are through."""
        gone = []
        likeliest = logits_BV.argmax(-1).tolist()
        for i, logits_V, top in zip(which, logits_BV, likeliest, strict=True):
            job = jobs[i]
            if not bool(torch.isfinite(logits_V).any()) or bool(torch.isnan(logits_V).any()):
                job.on_end("error", ArithmeticError("the logits are not finite; the clamps may be too strong"))
                gone.append(i)
                continue
            job.last = top if job.temperature == 0 else _sampled(logits_V, job)
            why: Why | None = "stop" if job.last in job.stop_ids else None
            if why is None:
                job.made += 1
                why = "stop" if not job.on_token(job.last) else "length" if job.made >= job.max_tokens else None
            if why is not None:
                job.on_end(why, None)
                gone.append(i)
        self._drop(rows, jobs, gone)

    def _drop(self, rows: Rows, jobs: list[Job], gone: list[int]) -> None:
        if not gone:
            return
        left = [i for i in range(len(jobs)) if i not in set(gone)]
        rows.keep(left)
        jobs[:] = [jobs[i] for i in left]


def _over(job: Job) -> Why | None:
    if job.cancelled:
        return "cancelled"
    return "timeout" if job.deadline is not None and time.monotonic() > job.deadline else None


def _sampled(logits_V: Tensor, job: Job) -> int:
    """A token from the softmax at the job's temperature, cut to the smallest set that holds `top_p` of it."""
    p_V = (logits_V / job.temperature).softmax(-1)
    if job.top_p < 1:
        sorted_V, order_V = p_V.sort(descending=True)
        sorted_V = sorted_V.where(sorted_V.cumsum(0) - sorted_V < job.top_p, 0.0)
        return int(order_V[torch.multinomial(sorted_V, 1, generator=job.generator)])
    return int(torch.multinomial(p_V, 1, generator=job.generator))
