"""Serving: a model with clamps behind an OpenAI-compatible HTTP endpoint.

- `Engine`, `Job` (`engine`): one thread that runs the model for all requests at once, each with its own clamps
- `Rows` (`rows`): the sequences that are decoded together, which may come and go at any step
- `Decoder` (`decoder`): tokens as text while they come, and where to stop
- `Service`, `Limits` (`service`): requests as jobs, and their tokens as answers
- `make_app` (`app`): the endpoint
"""

from .app import make_app
from .engine import Engine, Job
from .service import Limits

__all__ = ["Engine", "Job", "Limits", "make_app"]
