"""What differs between two models, or between two bodies of data, at the same sites.

- `ConceptShift`, `coarse` (`concepts`): what fine-tuning did to each concept, and steering by what it did
"""

from .concepts import ConceptShift, coarse

__all__ = ["ConceptShift", "coarse"]
