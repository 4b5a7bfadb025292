"""Fitted clamps while tokens are generated, and what a server adds before the first of them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import actome
from actome.core.model import Model
from actome.steer import Similar, Steering, WeightedController, when
from actome.tasks.numbered import numbered

from . import subjects
from .row import Options, Row
from .timing import Figure, interleave, threads

NAME = "steering"
READ, SITES = "blocks.{5..6}.resid.post", ("blocks.8.resid.post", "blocks.9.resid.post")


def run(options: Options) -> Iterator[Row]:
    """On GPT-2 small, 64 tokens with the cache after a prompt of 16, batch 1; and a server of it in this process."""
    with threads(options.threads):
        module = subjects.gpt2()
        yield from _clamps(module, options)
        yield from _server(module, options)


def _clamps(module: torch.nn.Module, options: Options) -> Iterator[Row]:
    ids, new = subjects.tokens(module, 1, subjects.PROMPT), subjects.NEW
    vector, never = subjects.vector(module), subjects.twin(module)
    model = actome.wrap(module)
    length = {"max_new_tokens": new, "min_new_tokens": new}
    constant = actome.Add(SITES[0], vector)
    # A condition that is always true, so that the clamp has its work as well.
    condition = Similar("blocks.6.resid.post", direction=vector, threshold=-1.0)

    def under(*clamps: actome.Clamp) -> Callable[[], object]:
        def work() -> object:
            with model.clamp(*clamps):
                return model.generate(ids, **length).ids

        return work

    works: dict[str, Callable[[], object]] = {
        "bare": lambda: subjects.generate(never, ids, new),
        "constant": under(constant),
        "conditional": under(when(constant, condition)),
        "controller": under(*_controller(module, model, vector)),
    }
    times = interleave(works, options.rounds(9))
    bare = f"{Figure(tuple(times['bare'])).median:.2f} s"
    for name, limit in (("constant", 1.02), ("conditional", 1.05), ("controller", 1.08)):
        yield Row(f"a {name} clamp, {new} tokens", "x", Figure.ratios(times[name], times["bare"]), limit, bare)


def _controller(module: torch.nn.Module, model: Model, vector: torch.Tensor) -> list[actome.Clamp]:
    """A controller of two layers' strength; what it was trained on does not matter for its speed."""
    unit = vector / vector.norm()
    ones = dict.fromkeys(SITES, float(vector.norm()))
    steering = Steering(SITES[0], vector, directions=dict.fromkeys(SITES, unit), gaps=ones, separation={}, about={})
    needed, others = subjects.tokens(module, 8, 8), subjects.tokens(module, 8, 9)[:, 1:]
    return list(WeightedController(READ, epochs=1).fit(model, steering, needed, others, sites=SITES))


def _server(module: torch.nn.Module, options: Options) -> Iterator[Row]:
    """Seconds to the first streamed token, less those of the same by `generate`: of GPT-2, and of a network so small
    that what the server adds is not lost in its noise."""
    try:
        import uvicorn  # noqa: F401
    except ImportError:
        return
    yield _first_token(module, "a request to the first streamed token", options.rounds(31))
    yield _first_token(actome.demo().module, "the same of the demo model", options.rounds(101))


def _first_token(module: torch.nn.Module, work: str, rounds: int) -> Row:
    from actome.steer.serving import make_app

    ids = subjects.tokens(module, 1, subjects.PROMPT)
    never = subjects.twin(module)
    # A word for every token, so that the first one is streamed whichever it is.
    model = actome.wrap(module, numbered(module.config.vocab_size))
    body = json.dumps({"prompt": ids[0].tolist(), "max_tokens": 2, "temperature": 0, "stream": True})
    with _listening(make_app(model, name="bench")) as port:

        def first() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
            assert connection.getresponse().readline().startswith(b"data: ")
            connection.close()

        works: dict[str, Callable[[], object]] = {"bare": lambda: subjects.generate(never, ids, 1), "server": first}
        times = interleave(works, rounds)
    more = tuple(1e3 * (a - b) for a, b in zip(times["server"], times["bare"], strict=True))
    bare = f"{1e3 * Figure(tuple(times['bare'])).median:.1f} ms"
    return Row(work, "ms", Figure(more), 10.0, bare)


@contextmanager
def _listening(app: object) -> Iterator[int]:
    """A server in a thread of this process, on a free port of this machine."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(30)
