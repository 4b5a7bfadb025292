"""Learning curves extrapolated by a network that was trained on curves from a prior, once and for all.

- `network`: the transformer over points that are seen and points that are asked for
- `model`: `LCPFN`, its training, its predictions and its files
- `shipped.safetensors`, `CARD.md`: the network that comes with actome
"""

from .model import LCPFN, LCPFNError
from .network import PFNConfig

__all__ = ["LCPFN", "LCPFNError", "PFNConfig"]
