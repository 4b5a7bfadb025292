"""Rules on how a mixture of experts shares out its tokens."""

from __future__ import annotations

from .base import Measures, Rule, Values, Verdict, indices
from .thresholds import Thresholds


def _dead_experts(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    dead = float(values["dead_experts"])
    if not dead > 0:
        return None
    return Verdict("warning", dead, {"dead_experts": dead}, {"experts": indices(values["load"] == 0)})


def _expert_imbalance(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    most = float(values["max_load"])
    if not most >= limits.max_load:
        return None
    busiest = [int(values["load"].argmax())]
    evidence = {"max_load": most, "load_entropy": float(values["load_entropy"])}
    return Verdict("warning", most, evidence, {"experts": busiest})


def _router_collapse(values: Values, measures: Measures, limits: Thresholds) -> Verdict | None:
    information = float(values["router_information"])
    if not information < limits.router_information:
        return None
    evidence = {"router_information": information, "router_entropy": float(values["router_entropy"])}
    return Verdict("warning", -information, evidence, {})


RULES = (
    Rule(
        "dead-experts",
        ("dead_experts", "load"),
        _dead_experts,
        "Shazeer et al. 2017, Outrageously Large Neural Networks; Fedus et al. 2022, Switch Transformers",
        "No token of this text chose these experts. Read more and other text first; if they stay unused, their "
        "parameters can go. In training raise the load-balancing loss or the router's noise.",
    ),
    Rule(
        "expert-imbalance",
        ("max_load", "load", "load_entropy"),
        _expert_imbalance,
        "Shazeer et al. 2017, Outrageously Large Neural Networks; Fedus et al. 2022, Switch Transformers",
        "One expert takes several times its share: it limits the speed of expert parallelism, and with a capacity "
        "factor tokens are dropped. In training raise the load-balancing loss; in serving, replicate this expert.",
    ),
    Rule(
        "router-collapse",
        ("router_information", "router_entropy"),
        _router_collapse,
        "Zoph et al. 2022, ST-MoE; Chi et al. 2022, On the Representation Collapse of Sparse Mixture of Experts",
        "The router sends all tokens alike, so the experts act as one. In training look at the router's learning rate, "
        "its noise and the z-loss, and at whether its input has lost rank.",
    ),
)
