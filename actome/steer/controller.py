"""Controllers: a small network that reads activations and sets how strongly, and at which layers, to steer.

Letters: B rows, N examples, L steered sites, R width of all that is read, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actome.core.clamp import Clamp
from actome.core.clamping import Place
from actome.core.errors import ClampError, MeasureError
from actome.tasks.draw import weights_from

from .contrast import Steering
from .likelihood import response_nll
from .preference import Pairs
from .states import count, states

if TYPE_CHECKING:
    from actome.core.model import Model


@dataclass(frozen=True, eq=False)
class Controlled(Clamp):
    r"""Adds :math:`s \, w_l \, \alpha d` at the newest token, where s and w are what a small network makes of states.

    With ``positions=`` it adds at each of those, by what is read there: so a response that is read in one forward is
    steered as it would be while it is generated.

    Args:
        read: the sites whose newest token it reads, in order.
        direction: (D), :math:`d`.
        scale: :math:`\alpha`.
        layer: which of the network's layer weights is this site's.
        hidden_weight, hidden_bias, out_weight, out_bias: of the network, (H, R), (H), (1 + L, H), (1 + L).
        centre, spread: (R), by which what is read is standardised.
        raw: take s as it comes, as the released code does, instead of its sigmoid; strength is then unbounded, and
            what surely needs no steering is pushed the other way.

    Source: Guiding Giants: Lightweight Controllers for Weighted Activation Steering in LLMs.
    """

    read: tuple[str, ...] = ()
    direction: Tensor | None = None
    scale: float = 1.0
    layer: int = 0
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None
    out_weight: Tensor | None = None
    out_bias: Tensor | None = None
    centre: Tensor | None = None
    spread: Tensor | None = None
    raw: bool = False
    newest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        missing = [name for name in _TENSORS if not isinstance(getattr(self, name), Tensor)]
        if missing or not self.read:
            raise ClampError(f"Controlled is made by WeightedController.fit; it lacks {', '.join(missing) or 'read'}")
        object.__setattr__(self, "read", tuple(self.read))

    @property
    def reads(self) -> tuple[str, ...]:
        """The sites that the network reads."""
        return self.read

    def strength(self, states: Tensor) -> Tensor:
        """What the direction is multiplied with at this site, (...), of states (..., R); `scale` not included."""
        x = (states.float() - _on(self.centre, states)) / _on(self.spread, states)
        hidden = F.relu(F.linear(x, _on(self.hidden_weight, x), _on(self.hidden_bias, x)))
        out = F.linear(hidden, _on(self.out_weight, x), _on(self.out_bias, x))
        s = out[..., 0] if self.raw else out[..., 0].sigmoid()
        return s * out[..., 1 + self.layer].sigmoid()

    def transform(self, x: Tensor, place: Place) -> Tensor:
        if self.positions is not None:
            return x + self._push(torch.cat([place.seen[name] for name in self.read], -1), x, place)
        last = self._last(x, place)
        rows = torch.arange(len(x), device=x.device)
        read_BR = torch.cat([place.seen[name][rows, last] for name in self.read], -1)
        return x.index_put((rows, last), x[rows, last] + self._push(read_BR, x, place))

    def _push(self, read: Tensor, x: Tensor, place: Place) -> Tensor:
        """What is added, (..., D), where (..., R) was read."""
        if read.shape[-1] != len(self.centre):  # type: ignore[arg-type]
            raise ClampError(
                f"{place.site.name}: the controller reads {len(self.centre)} numbers, and {', '.join(self.read)} "  # type: ignore[arg-type]
                f"have {read.shape[-1]}"
            )
        return ((self.scale * self.strength(read))[..., None] * _on(self.direction, x)).to(x.dtype)

    @staticmethod
    def _last(x: Tensor, place: Place) -> Tensor:
        """Where the newest real token of each row stands."""
        mask = place.run.mask
        if mask is None or mask.shape[0] != len(x):
            return torch.full((len(x),), x.shape[1] - 1, device=x.device)
        here_BT = mask[:, -x.shape[1] :].to(x.device)
        return (here_BT * torch.arange(1, x.shape[1] + 1, device=x.device)).amax(1).sub(1).clamp_min(0)


_TENSORS = ("direction", "hidden_weight", "hidden_bias", "out_weight", "out_bias", "centre", "spread")


def _on(value: Tensor | None, x: Tensor) -> Tensor:
    assert value is not None
    return value.to(device=x.device, dtype=torch.float32)


@dataclass(frozen=True)
class WeightedController:
    """Fits a controller of strength for a direction.

    Args:
        read: sites whose last token's states it reads, as a pattern or several; before all that are steered.
        hidden: width of its one hidden layer.
        scale: times the direction's own length at full strength.
        epochs, lr, batch_size: of its training on states, by AdamW; the paper has 20 epochs and 5e-5 at width 1024.
        raw: see `Controlled`.
        seed: of its weights and the order of examples.

    The strength s learns by cross-entropy to be 1 for examples that need steering and 0 for others. Layer weights get
    no such gradient: on the former a small term draws them to one half, as in the released code. With `fit(...,
    pairs=)` both are trained through the frozen model instead: it is to make the wanted responses likely where steering
    is needed, and to leave the likelihood of others as it was.

    Source: Guiding Giants: Lightweight Controllers for Weighted Activation Steering in LLMs (released training; the
    end-to-end form is ours).
    """

    read: str | Sequence[str]
    hidden: int = 64
    scale: float = 1.0
    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 16
    raw: bool = False
    seed: int = 0

    def fit(
        self,
        model: Model,
        steering: Steering,
        needed: Any,
        others: Any,
        *,
        sites: Sequence[str] | None = None,
        pairs: Pairs | None = None,
        keep: tuple[Any, Any] | None = None,
        steps: int = 100,
    ) -> list[Controlled]:
        """One clamp for each steered site; give all of them to ``model.clamp``.

        Args:
            steering: the direction; at each of `sites` its own.
            needed, others: prompts that need steering and that do not, eight of each at least.
            sites: the steered ones; that of the steering alone unless given.
            pairs: to train end to end: prompts that need steering with wanted and unwanted responses.
            keep: beside `pairs`, (prompts, responses) that must stay as likely as they were.
            steps: of that training.

        Raises:
            MeasureError: too few prompts; end-to-end training without `keep`.
            SiteError: a site that is read after one that is steered.
        """
        for name, some in (("prompts that need steering", needed), ("other prompts", others)):
            if count(some) < 8:
                raise MeasureError(f"{count(some)} {name} are too few; give 8 at least")
        if (pairs is None) != (keep is None):
            raise MeasureError("training end to end takes both: pairs= to change, and keep= to leave as they are")
        steered = list(sites or [steering.site])
        names = tuple(site.name for site in model.match(self.read))
        for name in names:
            for site in steered:
                model.before(name, model.table[site])
        high, low = (
            torch.cat([states(model, some, name, batch_size=self.batch_size)[name] for name in names], -1)
            for some in (needed, others)
        )
        net = self._net(torch.cat([high, low]), len(steered))
        self._on_states(net, high, low)
        if pairs is not None and keep is not None:
            self._end_to_end(model, net, names, steering, steered, pairs, keep, steps)
        fixed = nn.ParameterDict({name: nn.Parameter(p.detach().clone(), False) for name, p in net.items()})
        return self._clamps(fixed, names, steering, steered)

    def _net(self, states_NR: Tensor, sites: int) -> nn.ParameterDict:
        with weights_from(self.seed):
            hidden, out = nn.Linear(states_NR.shape[1], self.hidden), nn.Linear(self.hidden, 1 + sites)
        net = nn.ParameterDict(
            {
                "hidden_weight": hidden.weight,
                "hidden_bias": hidden.bias,
                "out_weight": out.weight,
                "out_bias": out.bias,
                "centre": nn.Parameter(states_NR.mean(0), requires_grad=False),
                "spread": nn.Parameter(states_NR.std(0).clamp_min(1e-6), requires_grad=False),
            }
        )
        return net

    def _on_states(self, net: nn.ParameterDict, high_NR: Tensor, low_NR: Tensor) -> None:
        x_NR = (torch.cat([high_NR, low_NR]) - net["centre"]) / net["spread"]
        y_N = torch.cat([torch.ones(len(high_NR)), torch.zeros(len(low_NR))])
        trained = [p for p in net.values() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for part in torch.randperm(len(y_N), generator=generator).split(self.batch_size):
                hidden = F.relu(F.linear(x_NR[part], net["hidden_weight"], net["hidden_bias"]))
                out = F.linear(hidden, net["out_weight"], net["out_bias"])
                loss = F.binary_cross_entropy_with_logits(out[:, 0], y_N[part])
                w = out[y_N[part] == 1, 1:].sigmoid()
                if w.numel():
                    loss = loss + 0.1 * ((w - 0.5).abs().mean() + 0.01 * w.mean())
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                adam.step()

    def _end_to_end(
        self,
        model: Model,
        net: nn.ParameterDict,
        names: tuple[str, ...],
        steering: Steering,
        steered: Sequence[str],
        pairs: Pairs,
        keep: tuple[Any, Any],
        steps: int,
    ) -> None:
        usual = response_nll(model, *keep, batch_size=self.batch_size).nll
        trained = [p for p in net.values() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        frozen = [p for p in model.module.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            for _ in range(steps):
                some = torch.randint(len(pairs), (self.batch_size,), generator=generator).tolist()
                kept = torch.randint(count(keep), (self.batch_size,), generator=generator).tolist()
                part, rest = pairs.part(some), Pairs(keep[0], keep[1], keep[1]).part(kept)
                clamps = self._clamps(net, names, steering, steered)
                wanted = response_nll(model, part.prompts, part.wanted, clamps=clamps, grad=True).nll.mean()
                stay = response_nll(model, rest.prompts, rest.wanted, clamps=clamps, grad=True).nll
                loss = wanted + (stay - usual[kept]).abs().mean()
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                adam.step()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _clamps(
        self, net: nn.ParameterDict, names: tuple[str, ...], steering: Steering, steered: Sequence[str]
    ) -> list[Controlled]:
        return [
            Controlled(
                site,
                read=names,
                direction=steering.to(site).value,
                scale=self.scale,
                layer=i,
                raw=self.raw,
                **net,
            )
            for i, site in enumerate(steered)
        ]
