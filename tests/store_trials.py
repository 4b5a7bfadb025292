"""What happens to a run whose writer is killed, meets a full disk or is not alone: played in processes of their own.

``python store_trials.py TRIAL FOLDER [SEED COUNT]`` prints what it found as JSON. One process forks the writers, so
that a trial takes milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from actome.core.errors import RunError
from actome.dynamics import RunStore


def value(step: int, name: str) -> float:
    """What is logged, so that a reader knows it."""
    return step * 1000 + len(name) + 0.25


NAMES = ("a", "bb", "ccc")

os.fsync = lambda _: None  # waiting for the disk only matters to a power cut


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A child that does the work, given a pipe to tell its parent; its process id and our end of the pipe."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        try:
            work(theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    return child, ours


def write_forever(folder: Path, seed: int, first: int, fresh: bool) -> Callable[[int], None]:
    """Logs until it is killed, and tells each step that it has committed, in 4 bytes."""

    def work(pipe: int) -> None:
        chance = random.Random(seed)
        seconds = chance.choice([0.0005, 0.005, 10.0])  # the thread commits all the time, now and then, or never
        # Small caches and logs, so that a kill also falls into the folding of the log into the file.
        options = {"seconds": seconds, "every_rows": chance.choice([1, 7, 100, 10_000])}
        run = RunStore.create(folder, **options) if fresh else RunStore.resume(folder, from_step=first, **options)
        run._db.execute(f"PRAGMA wal_autocheckpoint = {chance.choice([1, 10, 1000])}")
        for step in range(first, first + 100_000):
            # The rows last: whoever finds them finds the rest of the step.
            if step % 11 == 0:
                run.log_tensor(step, "t", torch.full((3,), float(step)))
            if step % 5 == 0:
                run.event("five", step)
            run.log(step, {name: value(step, name) for name in NAMES})
            if chance.random() < 0.3:
                run.commit()
                os.write(pipe, step.to_bytes(4, "little"))

    return work


def kill(folder: Path, seed: int, count: int) -> dict[str, int]:
    """Kills a writer at random moments, looks what is there, and goes on with the same run; several runs."""
    chance, killed, told, begun, rows = random.Random(seed), 0, 0, 0, 0
    for trial in range(count):
        at = folder / str(trial)
        last = -1
        for _ in range(3):
            fresh = not (at / "run.sqlite").exists() or not _is_begun(at)
            child, pipe = forked(write_forever(at, chance.randrange(1 << 30), 0 if fresh else last + 1, fresh))
            for _ in range(chance.choice([0, 1, 5, 40])):  # how much it may do before it is killed
                if chance.random() < 0.1 or not os.read(pipe, 4):
                    break
            for _ in range(chance.randrange(20_000)):  # and a moment more
                pass
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            killed += 1
            promised = last
            while word := os.read(pipe, 4):
                promised = int.from_bytes(word, "little")
            os.close(pipe)
            if not _is_begun(at):
                assert promised == -1, "a step was promised and there is no run"
                continue
            begun += 1
            last = check(at, promised)
            told += promised >= 0
            rows = max(rows, last)
    return {"killed": killed, "begun": begun, "told": told, "most_steps": rows}


def _is_begun(at: Path) -> bool:
    try:
        RunStore.open(at).close()
    except RunError as error:
        if not any(words in str(error) for words in ("empty run", "there is no run", "it has no run.sqlite")):
            raise
        return False
    return True


def check(at: Path, promised: int) -> int:
    """Everything that was promised is there, whole steps only, none twice, none missing; the last step."""
    with RunStore.open(at) as run:
        assert run.status == "killed", run.status
        frame = run.frame()
        last = int(frame["step"].max()) if len(frame) else -1
        assert last >= promised, (last, promised)
        wanted = [(step, name, value(step, name)) for step in range(last + 1) for name in NAMES]
        assert list(zip(frame["step"], frame["measure"], frame["value"], strict=True)) == wanted
        for table, every in ((run.tensors, 11), (run.events, 5)):
            steps = table["step"].tolist()
            assert [step for step in steps if step <= last] == list(range(0, last + 1, every)), steps
            assert [step for step in steps if step > last] in ([], [last + 1]), steps
        for step in run.tensors["step"].tolist()[-2:]:
            assert run.tensor("t", step).tolist() == [step] * 3
    return last


def full(folder: Path) -> dict[str, object]:
    """A limit on the size of files stands for the full disk: SQLite and the shards both meet it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = RunStore.create(folder / "full", seconds=60.0, every_rows=500)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    message, step = "", -1
    while not message:
        step += 1
        try:
            run.log(step, {"a": float(step)})
        except RunError as error:
            message = str(error)
    committed = run.committed
    with RunStore.open(folder / "full") as reader:
        readable = reader.scalars("a").tolist() == [float(s) for s in range(committed)]
    try:
        run.log_tensor(step, "big", torch.zeros(100_000))
        tensor = "written"
    except RunError as error:
        tensor = str(error)
    files = sorted(path.name for path in (folder / "full" / "tensors").iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    run.log(step + 1, {"a": step + 1.0})  # tries again, now that there is room
    run.log_tensor(step, "big", torch.zeros(100_000))
    run.close()
    with RunStore.open(folder / "full") as reader:
        whole = reader.scalars("a").tolist() == [float(s) for s in range(step + 2)]
        shape = list(reader.tensor("big").shape)
    return {
        "message": message, "tensor": tensor, "files": files, "committed": committed, "readable": readable,
        "whole": whole, "shape": shape, "steps": step + 2,
    }  # fmt: skip


def others(folder: Path) -> dict[str, object]:
    """A second writer in another process; readers beside the writer; a writer that dies and is succeeded."""
    at, (go, told) = folder / "a", os.pipe()

    def work(pipe: int) -> None:
        run = RunStore.create(at, seconds=60.0)
        for step in range(4):
            run.log(step, {"loss": float(step)})
            run.commit()
            os.write(pipe, b".")
            os.read(go, 1)
        signal.pause()

    child, pipe = forked(work)
    seen, refusals = [], []
    with_last = None
    for _ in range(4):
        os.read(pipe, 1)
        if with_last is None:
            with_last = RunStore.open(at)  # one reader stays open
        seen.append((len(with_last.frame()), len(RunStore.open(at).frame()), with_last.status))
        for begin in (RunStore.resume, lambda path: RunStore.create(path, overwrite=True)):
            try:
                begin(at)
            except RunError as error:
                refusals.append(str(error))
        os.write(told, b".")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    after = with_last.status
    with RunStore.resume(at) as run:
        during = with_last.status
        run.log(4, {"loss": 4.0})
        # A data loader's worker, say, which lives on with a copy of everything when its parent dies.
        worker, word = forked(lambda pipe: os.write(pipe, _try_to_log(run).encode()))
        fork = os.read(word, 500).decode()
        os.waitpid(worker, 0)
        run.log(5, {"loss": 5.0})
    end = with_last.scalars("loss").tolist()
    return {
        "seen": seen, "refusals": refusals, "pid": child, "after": after, "during": during, "fork": fork, "end": end,
        "status": with_last.status,
    }  # fmt: skip


def _try_to_log(run) -> str:
    try:
        run.log(99, {"loss": 99.0})
    except RunError as error:
        run.close()
        return str(error)
    return "logged"


if __name__ == "__main__":
    trial, where = sys.argv[1], Path(sys.argv[2])
    found = {"kill": kill, "full": full, "others": others}[trial](where, *map(int, sys.argv[3:]))
    print(json.dumps(found))
