"""One small configurable transformer whose every tensor is a site of actome."""

from .config import SubjectConfig
from .model import Subject

__all__ = ["Subject", "SubjectConfig"]
