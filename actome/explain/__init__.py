"""Causes and features: which neurons, layers and subspaces a behaviour comes from."""

__all__: list[str] = []
