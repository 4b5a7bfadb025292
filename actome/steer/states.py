"""States of examples, which every estimator here is fitted on; they are read as `actome.measures.states` says."""

from actome.measures.states import OVERS, Over, chosen_tokens, count, is_pairs, states, subset

__all__ = ["OVERS", "Over", "chosen_tokens", "count", "is_pairs", "states", "subset"]
