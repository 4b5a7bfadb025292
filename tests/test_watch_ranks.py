"""Two processes that train one network, watched as one."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from watch_loop import PROBE, ids, loss_of, opened, same, subject, weights

import actome as ac
from actome.core.errors import RunError
from actome.dynamics.alarms import LowerLR, Reading
from actome.dynamics.alarms.base import Alarm, Detector

STEPS = 6


class Third(Detector):
    name = "third"
    needs = ("loss",)

    def update(self, step: int, readings: list[Reading]) -> list[Alarm]:
        return [Alarm(step, "third", "now")] * (step == 3)

    def rewind(self, step: int) -> None:
        pass


def _train(module, watch, rank: int, ranks: int) -> list[float]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        loss = loss_of(module, ids(step, 4)[rank::ranks])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if watch is not None:
            watch.step(loss)
    return losses


def _rank(rank: int, ranks: int, where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=ranks)
    module = subject()
    wrapped = DistributedDataParallel(module)
    actions = {"third": LowerLR(0.5)}
    options = {"text": PROBE, "run": f"{where}/run", "every": 2, "alarms": [Third()], "actions": actions}
    with ac.watch(wrapped, **options) as watch:
        assert watch.module is module
        assert (watch.run is not None) == (rank == 0)
        losses = _train(wrapped, watch, rank, ranks)
    # One writer: whoever comes second is refused in every process, and none waits for ever.
    with pytest.raises(RunError, match="holds a run already"):
        ac.watch(wrapped, **options).begin()
    torch.save(weights(module), f"{where}/{rank}.pt")
    Path(f"{where}/{rank}.json").write_text(json.dumps(losses), encoding="utf-8")
    # As the cadence has it, too, the processes come to the same steps; else they would wait for one another.
    panel = {"blocks.*.resid.post": [ac.measures.ActivationScale()]}
    with ac.watch(wrapped, panel, text=PROBE, run=f"{where}/auto", budget=0.9, steps=STEPS) as watch:
        _train(wrapped, watch, rank, ranks)
    # The network goes before its group: torch's reducer, were it the last to let go of a group, may wait for ever for a
    # thread that waits for the interpreter.
    network = weakref.ref(wrapped)
    del wrapped, watch
    gc.collect()
    assert network() is None
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_are_watched_as_one(tmp_path):
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    run = opened(tmp_path / "run")
    losses = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    means = [(a + b) / 2 for a, b in zip(*losses, strict=True)]
    assert run.scalars("loss").tolist() == pytest.approx(means, rel=1e-6)
    # What is measured is that of the whole probe, though each process read a half of it.
    whole = ac.wrap(subject()).measure(PROBE, {"blocks.*.resid.post": [ac.measures.Spectrum(max_width=1024)]})
    rank = run.frame("effective_rank", site="blocks.*.resid.post")
    assert rank[rank["step"] == 0]["value"].tolist() == pytest.approx(whole.value("effective_rank").tolist(), rel=1e-5)
    assert sorted(set(rank["step"])) == [0, 2, 4, 6]
    assert len(run.scalars("grad_norm")) == 3
    assert run.alarms["name"].tolist() == ["third"]
    # The action was taken in both, so that their weights are still the same.
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(one, other)
    assert opened(tmp_path / "auto").status == "finished"
