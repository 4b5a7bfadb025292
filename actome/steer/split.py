r"""SPLIT: trains what is added to one linear map so that preference is gained and utility kept.

Letters: D width of the map's output, F of its input, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from actome.clamps import Add, WeightUpdate
from actome.core.errors import MeasureError, SiteError
from actome.core.sites import MODULE_PREFIX

from .likelihood import response_nll
from .preference import Pairs, checked

if TYPE_CHECKING:
    from actome.core.model import Model

Form = Literal["vector", "lora", "weight"]
FORMS: tuple[Form, ...] = ("vector", "lora", "weight")
# The inputs of the linear maps that have sites of their own.
_INPUTS = {".mlp.out": ".mlp.act", ".attn.out": ".attn.z"}


@dataclass(frozen=True)
class SPLIT:
    r"""Fits an intervention on one linear map to pairs of responses, for preference and utility together.

    With the negative log-likelihoods :math:`L_p` of a wanted and :math:`L_n` of an unwanted response to the same
    prompt, the loss of a pair is

    .. math:: \lambda_p L_p + \lambda_n L_n + \gamma \max(0, \theta - (L_n - L_p)).

    The first two terms keep both kinds of answer likely (utility), the last asks for a margin between them
    (preference). ``lam_n=0, gamma=0`` is plain supervised tuning on the wanted responses.

    Args:
        site: output of the map; any site at all for ``"vector"``.
        form: ``"vector"`` adds a constant, ``"weight"`` a change of all weights and of the bias, ``"lora"`` a change of
            the weights of low rank.
        read: input of the map; known for ``mlp.out``, ``attn.out`` and ``module:PATH``.
        theta: the margin, in nats.
        gamma, lam_p, lam_n: weights of the terms.
        per_token: likelihoods as nats a token, for responses of different lengths; theta is then in nats a token.
        rank: of ``"lora"``.
        steps, lr, batch_size: of Adam; the learning rate goes down to zero along a half cosine.
        seed: of the order of pairs and of the first factor of ``"lora"``.

    At the start the update is zero, so that training starts from the model as it is.

    >>> import actome as ac
    >>> model = ac.demo()
    >>> pairs = Pairs(["import", "from"] * 2, [" os"] * 4, [" the"] * 4)
    >>> clamp = SPLIT("blocks.1.mlp.out", form="lora", rank=1, steps=4, batch_size=4).fit(model, pairs)
    >>> type(clamp).__name__, tuple(clamp.up.shape), clamp.scale
    ('WeightUpdate', (112, 1), 1.0)

    Source: Why Steering Works: Toward a Unified View of Language Model Parameter Dynamics (the loss, the three forms);
    weights of the terms, margin and rank are those of a released configuration.
    """

    site: str
    form: Form = "vector"
    read: str | None = None
    theta: float = 0.4
    gamma: float = 5.0
    lam_p: float = 1.0
    lam_n: float = 0.5
    per_token: bool = False
    rank: int = 4
    steps: int = 200
    lr: float = 1e-2
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise MeasureError(f"form={self.form!r} does not exist; choose {', '.join(FORMS)}")
        if min(self.gamma, self.lam_p, self.lam_n) < 0 or self.gamma + self.lam_p + self.lam_n == 0:
            raise MeasureError(
                f"lam_p={self.lam_p}, lam_n={self.lam_n}, gamma={self.gamma}: the weights of the terms are 0 or more, "
                "and not all of them 0"
            )
        if min(self.rank, self.steps, self.batch_size) < 1:
            raise MeasureError(f"rank={self.rank}, steps={self.steps}, batch_size={self.batch_size}: 1 at least")

    def loss(self, wanted_N: Tensor, unwanted_N: Tensor) -> Tensor:
        """Mean loss of pairs, of the negative log-likelihoods of their responses, (N) each.

        >>> float(SPLIT("x", theta=1.0, gamma=2.0, lam_n=0.5).loss(torch.tensor([1.0]), torch.tensor([1.5])))
        2.75
        """
        margin_N = F.relu(self.theta - (unwanted_N - wanted_N))
        return (self.lam_p * wanted_N + self.lam_n * unwanted_N + self.gamma * margin_N).mean()

    def fit(self, model: Model, pairs: Pairs) -> Add | WeightUpdate:
        """The clamp: an `Add` for ``"vector"``, else a `WeightUpdate`; its `scale` of 1 is what was trained.

        No weight of the model is changed, and none keeps a gradient.

        Raises:
            SiteError: no such site, or several; a map whose input is not known.
            MeasureError: the loss is not finite; what is given are no pairs.
        """
        checked(pairs)
        parts = self._start(model)
        adam = torch.optim.Adam(parts.values(), lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        frozen = [p for p in model.module.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            order: list[int] = []
            for step in range(self.steps):
                while len(order) < self.batch_size:
                    order += torch.randperm(len(pairs), generator=generator).tolist()
                part, order = pairs.part(order[: self.batch_size]), order[self.batch_size :]
                with model.clamp(self._clamp(parts)):
                    wanted = self._nll(model, part, part.wanted)
                    # Where nothing depends on the unwanted responses they need not be read.
                    unwanted = self._nll(model, part, part.unwanted) if self.gamma or self.lam_n else wanted
                    loss = self.loss(wanted, unwanted)
                if not bool(loss.isfinite()):
                    raise MeasureError(f"the loss of step {step} is {float(loss)}; lower lr={self.lr}")
                adam.zero_grad()
                loss.backward()
                adam.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
                adam.step()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        return self._clamp({name: part.detach() for name, part in parts.items()})

    def _nll(self, model: Model, part: Pairs, responses: object) -> Tensor:
        found = response_nll(model, part.prompts, responses, batch_size=len(part), grad=True)  # type: ignore[arg-type]
        return found.mean if self.per_token else found.nll

    def _start(self, model: Model) -> dict[str, Tensor]:
        """The parts that are trained, zero but for the first factor of a low rank."""
        out, into = _width(model, self.site), 0
        if self.form != "vector":
            into = _width(model, self._input)
        shapes: dict[Form, dict[str, tuple[int, ...]]] = {
            "vector": {"value": (out,)},
            "weight": {"weight": (out, into), "bias": (out,)},
            "lora": {"down": (self.rank, into), "up": (out, self.rank)},
        }
        parts = {name: torch.zeros(shape, device=model.device) for name, shape in shapes[self.form].items()}
        if self.form == "lora":
            noise = torch.randn(self.rank, into, generator=torch.Generator().manual_seed(self.seed))
            parts["down"] = (noise / into**0.5).to(model.device)
        return {name: part.requires_grad_() for name, part in parts.items()}

    def _clamp(self, parts: dict[str, Tensor]) -> Add | WeightUpdate:
        if self.form == "vector":
            return Add(self.site, parts["value"])
        return WeightUpdate(self.site, read=self._input, **parts)

    @property
    def _input(self) -> str:
        """The site of the map's input."""
        if self.read is not None:
            return self.read
        if self.site.startswith(MODULE_PREFIX) and "@" not in self.site:
            return f"{self.site}@in"
        for end, start in _INPUTS.items():
            if self.site.endswith(end):
                return self.site.removesuffix(end) + start
        raise SiteError(
            f"the input of the linear map at {self.site} is not known; give read=, or take mlp.out, attn.out or "
            "module:PATH"
        )


def _width(model: Model, name: str) -> int:
    """Numbers at one position of a site."""
    sites = model.match(name)
    if len(sites) != 1:
        raise SiteError(f"{name} is {len(sites)} sites; SPLIT trains at one")
    (site,) = sites
    if site.dims:
        sizes = site.sizes[2:]
        if site.dims[:2] != ("batch", "pos") or not sizes or None in sizes:
            raise SiteError(f"{name} has the dims {', '.join(site.dims)}, and not one vector a token")
        return math.prod(size for size in sizes if size is not None)
    module = getattr(site.address, "module", None)
    side = getattr(site.address, "side", "out")
    width = getattr(module, "in_features" if side == "in" else "out_features", None)
    if width is None:
        raise SiteError(f"{name} is a {type(module).__name__}; among modules only an nn.Linear has a known width")
    return int(width)
