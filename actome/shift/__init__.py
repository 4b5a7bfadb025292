"""What differs between two models, or between two bodies of data, at the same sites."""

__all__: list[str] = []
